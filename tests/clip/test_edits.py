"""Both towers under an edit, against open_clip's own model: changed in place and run for one setting at a time."""

from __future__ import annotations

from copy import deepcopy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hard_kinds import BLOCKS, KINDS, TEMPLATE, Adapter, DeepPrompt, Kind, Lora, Student, clip_of, with_tokens
from tiny import NAMES, SIGLIP
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergetune import FrozenClip
from mergetune.clip import (
    ClassRows,
    Context,
    Edit,
    TokensBefore,
    image_tokens,
    prepare_classes,
    prepare_images,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
NO_MASK = {name: value for name, value in SIGLIP.items() if name in ("no_causal_mask", "pool_type", "proj_bias")}
SHARPER = {"scale": 0.5}  # MMA's factor .001 hides errors


def pixels(clip: FrozenClip, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64).to(clip.model.logit_scale.dtype)


def stack(solutions: list[Kind]) -> dict[str, Tensor]:
    return {name: torch.stack([s.state()[name] for s in solutions]) for name in solutions[0].state()}


# -- the slow way: a model for each setting ----------------------------------------------------------------------------


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
        x = F.batch_norm(x, solution.mean, solution.var, state["1.weight"], state["1.bias"])
        return F.linear(F.relu(x), state["3.weight"], state["3.bias"])

    visual.register_forward_hook(projector)


CHANGES = {Lora: change_for_lora, Adapter: change_for_adapter, DeepPrompt: change_for_deep_prompt}
CHANGES[Student] = change_for_student


def slow(clip: FrozenClip, solution: Kind, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit image features [B, D'] and unit class features [C, D'] of one setting."""
    model = deepcopy(clip.model)
    CHANGES[type(solution)](model, solution, state)
    with sdpa_kernel(SDPBackend.MATH):  # torch's other attention has no second derivative
        images = model.encode_image(x)
        texts = model.encode_text(clip.tokenize([TEMPLATE.format(name) for name in NAMES]))
    texts = solution.rows if isinstance(solution, Student) else texts
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def fast(clip: FrozenClip, solution: Kind, states: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for all settings, [M, B, D'] and [M, C, D'], from an edit."""
    edit = solution.edit(clip, states)
    images = prepare_images(clip, edit, "pixels")
    assert images is not None
    classes = prepare_classes(clip, edit, NAMES, precision=clip.dtype)
    edit = solution.edit(clip, states)  # another edit of the form
    return images(edit, x), F.normalize(classes(edit), dim=-1)


def score(images: Tensor, classes: Tensor) -> Tensor:
    """A number in which every feature counts, [...]."""
    return (images @ classes.mT).mul(3).softmax(-1)[..., 0].sum(-1)


def drawn(kind: type[Kind], clip: FrozenClip, count: int) -> list[Kind]:
    extra = SHARPER if kind is Adapter else {}
    return [kind.drawn(clip, seed=seed, **extra) for seed in range(1, count + 1)]


# -- the four kinds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_of_stacked_settings(kind, settings):
    clip = clip_of()
    solutions, x = drawn(kind, clip, settings), pixels(clip)
    states = {name: values.requires_grad_() for name, values in stack(solutions).items()}
    images, classes = fast(clip, solutions[0], states, x)
    expected = [slow(clip, s, {name: values[i] for name, values in states.items()}, x) for i, s in enumerate(solutions)]
    torch.testing.assert_close(images.expand(settings, -1, -1), torch.stack([e[0] for e in expected]), **EXACT)
    torch.testing.assert_close(classes.expand(settings, -1, -1), torch.stack([e[1] for e in expected]), **EXACT)
    weights = torch.arange(1.0, settings + 1, dtype=torch.float64)
    found = torch.autograd.grad((weights * score(images, classes)).sum(), list(states.values()))
    wanted = torch.autograd.grad((weights * torch.stack([score(*e) for e in expected])).sum(), list(states.values()))
    for name, a, b in zip(states, found, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        assert (b.flatten(1).abs().amax(1) > 1e-6).all(), name  # every tensor of every setting counts
