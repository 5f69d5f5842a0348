"""open_clip's own model, changed in place for one setting of a hard kind: what edits of many settings are held to."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from hard_kinds import BLOCKS, TEMPLATE, Adapter, DeepPrompt, Kind, Lora, Student
from tiny import NAMES
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergetune import FrozenClip


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Write a tensor, and what it was made from, into a model in the place of a parameter or buffer."""
    owner = model.get_submodule(name.rpartition(".")[0])
    own = name.rpartition(".")[2]
    owner._parameters.pop(own, None)
    owner._buffers.pop(own, None)
    setattr(owner, own, value)


def text_model(model: nn.Module) -> nn.Module:
    return getattr(model, "text", model)


def change_for_lora(model: nn.Module, solution: Lora, state: dict[str, Tensor]) -> None:
    for tower, owner in (("text", text_model(model)), ("image", model.visual)):
        for k, block in enumerate(owner.transformer.resblocks):
            q, k_, v, o = (
                solution.scaling * (state[f"{tower}.{k}.{m}.B"] @ state[f"{tower}.{k}.{m}.A"]) for m in "qkvo"
            )
            put(block, "attn.in_proj_weight", block.attn.in_proj_weight + torch.cat([q, k_, v]))
            put(block, "attn.out_proj.weight", block.attn.out_proj.weight + o)


def change_for_adapter(model: nn.Module, solution: Adapter, state: dict[str, Tensor]) -> None:
    state = solution.published(state)
    for tower, owner in (("text", text_model(model)), ("image", model.visual)):

        def beside(block, args, kwargs, out, tower=tower):
            x = block.ln_1(args[0])
            for layer in (f"{tower}.down", "shared", f"{tower}.up"):
                x = F.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"])
                x = x if layer.endswith("up") else F.relu(x)
            return out + solution.scale * x

        owner.transformer.resblocks[solution.block].register_forward_hook(beside, with_kwargs=True)


def change_for_deep_prompt(model: nn.Module, solution: DeepPrompt, state: dict[str, Tensor]) -> None:
    def instead(values: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], values.expand(len(x), -1, -1), x[:, 5:]], 1)

    text = text_model(model)
    text.token_embedding.register_forward_hook(lambda layer, args, out: instead(state["context"], out))
    for k in range(1, BLOCKS):
        text.transformer.resblocks[k].register_forward_pre_hook(
            lambda block, args, k=k: (instead(state[f"block.{k}"], args[0]), *args[1:])
        )


def change_for_student(model: nn.Module, solution: Student, state: dict[str, Tensor]) -> None:
    def appended(x: Tensor, values: Tensor) -> Tensor:
        return torch.cat([x, values.expand(len(x), -1, -1)], 1)

    visual, count = model.visual, len(state["prompt"])
    visual.ln_pre.register_forward_pre_hook(lambda layer, args: (appended(args[0], state["prompt"]),))
    for k in range(1, BLOCKS):
        visual.transformer.resblocks[k].register_forward_pre_hook(
            lambda block, args, k=k: (appended(args[0][:, :-count], state[f"block.{k}"]), *args[1:])
        )

    def projector(visual, args, out):
        x = F.linear(out, state["0.weight"], state["0.bias"])
        x = F.batch_norm(x, solution.running_mean, solution.running_var, state["1.weight"], state["1.bias"])
        return F.linear(F.relu(x), state["3.weight"], state["3.bias"])

    visual.register_forward_hook(projector)


CHANGES = {Lora: change_for_lora, Adapter: change_for_adapter, DeepPrompt: change_for_deep_prompt}
CHANGES[Student] = change_for_student


def slow(
    clip: FrozenClip, solution: Kind, state: dict[str, Tensor], x: Tensor, *, raw_texts: bool = False
) -> tuple[Tensor, Tensor]:
    """Image features [B, D'] and class features [C, D'] of one setting, unit norm.

    With ``raw_texts`` class features are as they are interpolated: those of context vectors are not of unit norm.
    """
    model = deepcopy(clip.model)
    CHANGES[type(solution)](model, solution, state)
    with sdpa_kernel(SDPBackend.MATH):  # torch's other attention has no second derivative
        images = model.encode_image(x)
        texts = model.encode_text(clip.tokenize([TEMPLATE.format(name) for name in NAMES]))
    texts = solution.rows if isinstance(solution, Student) else texts
    raw = raw_texts and isinstance(solution, DeepPrompt)
    return F.normalize(images, dim=-1), texts if raw else F.normalize(texts, dim=-1)
