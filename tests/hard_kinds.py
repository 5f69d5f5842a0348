"""Four solutions that are hard to describe, each in a few lines: LoRA, MMA's adapter, deep text prompts, a student.

They are for tests: without files and checks. A tiny CLIP with two towers of three blocks goes with them.

Shapes: M settings computed together, r rank, W width of a tower, D embedding width, n prompt tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F
from tiny import NAMES, TEXT, VISION
from torch import Tensor, nn

from mergetune import FrozenClip
from mergetune.clip import ClassRows, Context, Edit, ImageInput, TokensBefore, prepare_classes
from mergetune.solutions import Solution, State

BLOCKS = 3
TEMPLATE = "a photo of a {}."


@functools.cache
def clip_of(kind: type = open_clip.CLIP, dtype: torch.dtype = torch.float64, **text) -> FrozenClip:
    """A CLIP of two small transformers, every parameter random, so that a bias or scale left out shows."""
    torch.manual_seed(0)
    model = kind(8, {**VISION, "layers": BLOCKS}, {**TEXT, "layers": BLOCKS, **text})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.ndim == 1 else 0.05)
        getattr(model, "text", model).token_embedding.weight.mul_(10)
    return FrozenClip(model.to(dtype), open_clip.SimpleTokenizer(context_length=TEXT["context_length"]), "two-towers")


def blocks_of(clip: FrozenClip, tower: str) -> Sequence[nn.Module]:
    return clip.text.blocks if tower == "text" else clip.model.visual.transformer.resblocks


def prefix_of(clip: FrozenClip, tower: str) -> str:
    """What open_clip puts before the number of a block."""
    flat = "" if isinstance(clip.model, open_clip.CLIP) else "text."
    return ("visual." if tower == "image" else flat) + "transformer.resblocks."


def with_tokens(tokens: Tensor, values: Tensor, at: int, *, replaced: int) -> Tensor:
    """Tokens [m, B, L, W] with the values [M, n, W] at a position, instead of ``replaced`` tokens."""
    settings = max(len(tokens), len(values))
    tokens = tokens.expand(settings, -1, -1, -1)
    values = values[:, None].expand(settings, tokens.shape[1], -1, -1)
    return torch.cat([tokens[:, :, :at], values, tokens[:, :, at + replaced :]], 2)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A frozen layer norm in the precision of what it is given, which may be another than the model's."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)


@dataclass(frozen=True, eq=False)
class Kind(Solution):
    """What the four have in common: a state of any names, and no files."""

    values: State
    classnames: tuple[str, ...] | None = None
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    tensors: ClassVar[tuple[str, ...]] = ()
    image_input: ClassVar[ImageInput] = "pixels"

    def state(self) -> State:
        return dict(self.values)

    def with_state(self, state: State, **changes: Any):
        return replace(
            self, values={name: tensor.detach().float().clone() for name, tensor in state.items()}, **changes
        )


def random(shapes: dict[str, tuple[int, ...]], seed: int, std: float = 0.3) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: std * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


# -- LoRA --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lora(Kind):
    """CLIP-LoRA (arXiv 2405.18541): W + s B A for the query, key, value and output matrices of both towers.

    State: "text.0.q.A" [r, W], "text.0.q.B" [W, r], and so on.
    """

    scaling: float = 0.7

    kind: ClassVar[str] = "lora"
    tower: ClassVar[str] = "both"

    @classmethod
    def drawn(cls, clip: FrozenClip, seed: int = 0, rank: int = 2) -> Lora:
        shapes = {}
        for tower in ("text", "image"):
            for k, block in enumerate(blocks_of(clip, tower)):
                width = block.attn.embed_dim
                for matrix in "qkvo":
                    shapes[f"{tower}.{k}.{matrix}.A"] = (rank, width)
                    shapes[f"{tower}.{k}.{matrix}.B"] = (width, rank)
        return cls(random(shapes, seed))

    def delta(self, states: State, place: str) -> Tensor:
        return self.scaling * states[f"{place}.B"] @ states[f"{place}.A"]

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        weights = {}
        for tower in ("text", "image"):
            for k, block in enumerate(blocks_of(clip, tower)):
                name, own = f"{prefix_of(clip, tower)}{k}.attn.", f"{tower}.{k}."
                rows = torch.cat([self.delta(states, own + matrix) for matrix in "qkv"], 1)
                weights[name + "in_proj_weight"] = block.attn.in_proj_weight + rows
                weights[name + "out_proj.weight"] = block.attn.out_proj.weight + self.delta(states, own + "o")
        return Edit(weights=weights, templates=(TEMPLATE,))

    def zero_shot_points(self, clip: FrozenClip, classnames, templates) -> list[Lora]:
        """Of rank 0, so that a point on the line from it to a LoRA has the rank of that."""
        return [replace(self, values={n: t[:, :0] if n.endswith("B") else t[:0] for n, t in self.values.items()})]

    def starts_at(self, point: Solution) -> bool:
        return True

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """LoRAs of any two ranks have one."""

    def in_form_of(self, like: Solution) -> Lora:
        """With zeros up to the rank of another."""

        def padded(values: Tensor, there: Tensor) -> Tensor:
            missing = [max(0, there.shape[d] - values.shape[d]) for d in (1, 0)]
            return F.pad(values, (0, missing[0], 0, missing[1]))

        return replace(self, values={name: padded(t, like.state()[name]) for name, t in self.values.items()})

    def between(self, a: State, b: State, t: float | Tensor) -> State:
        """The straight line of B A, which does not depend on how it is factored: a LoRA of both ranks together."""
        share = t.to(b["text.0.q.B"]).view(-1, 1, 1) if isinstance(t, Tensor) else t
        scaled = {name: ((1 - share) * a[name], share * b[name]) for name in b if name.endswith("B")}
        found = {}
        for name in b:
            ends = scaled.get(name, (a[name], b[name]))
            settings = max(len(end) for end in (*ends, scaled["text.0.q.B"][1]))
            found[name] = torch.cat([end.expand(settings, -1, -1) for end in ends], 2 if name in scaled else 1)
        return found

    def mixture(self, ends: State, shares: Tensor) -> State:
        """The same of any number of ends."""
        points, found = len(shares), {}
        for name, tensors in ends.items():
            if name.endswith("B"):
                found[name] = torch.cat((shares.to(tensors)[:, :, None, None] * tensors).unbind(1), 2)
            else:
                found[name] = torch.cat(tensors.unbind(0), 0).expand(points, -1, -1)
        return found

    def mean_of(self, ends: State) -> State:
        count = len(ends["text.0.q.B"])
        return self.mixture(ends, torch.full((1, count), 1 / count))

    def distance(self, states: State, to: State) -> Tensor:
        """Half the squared distance of B A, [M]."""
        places = [name.removesuffix(".A") for name in states if name.endswith("A")]
        squares = [(self.delta(states, place) - self.delta(to, place)).square().sum((1, 2)) for place in places]
        return 0.5 * torch.stack(squares).sum(0)


# -- MMA ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Adapter(Kind):
    """MMA's adapter of one block (CVPR 2024), in both towers: s up(relu(shared(relu(down(ln_1 x))))) beside it.

    State: "text.down.weight" [h, W], "text.down.bias", "text.up.weight" [W, h], "text.up.bias", the same for "image",
    "shared.weight" [h, h] and "shared.bias", each times the square root of s. The published block scales gradients by
    1 / s: in this unit plain SGD with the published rate and weight decay takes the same steps.
    """

    block: int = 1
    scale: float = 0.001

    kind: ClassVar[str] = "adapter"
    tower: ClassVar[str] = "both"
    image_input: ClassVar[ImageInput] = TokensBefore(1)

    @classmethod
    def drawn(cls, clip: FrozenClip, seed: int = 0, hidden: int = 4, **fields) -> Adapter:
        shapes: dict[str, tuple[int, ...]] = {"shared.weight": (hidden, hidden), "shared.bias": (hidden,)}
        for tower in ("text", "image"):
            width = blocks_of(clip, tower)[0].attn.embed_dim
            shapes |= {f"{tower}.down.weight": (hidden, width), f"{tower}.down.bias": (hidden,)}
            shapes |= {f"{tower}.up.weight": (width, hidden), f"{tower}.up.bias": (width,)}
        scale = fields.get("scale", cls.scale)
        return cls(random(shapes, seed, std=scale**0.5), **fields)

    def published(self, states: State) -> State:
        """In the published unit."""
        return {name: values / self.scale**0.5 for name, values in states.items()}

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        states = self.published(states)

        def linear(x: Tensor, layer: str) -> Tensor:
            weight = states[f"{layer}.weight"].mT[:, None]
            return x.to(weight) @ weight + states[f"{layer}.bias"][:, None, None]

        def beside(tower: str) -> Callable[[Tensor], Tensor]:
            norm = blocks_of(clip, tower)[self.block].ln_1

            def added(x: Tensor) -> Tensor:
                hidden = linear(normed(norm, x), f"{tower}.down").relu()
                return self.scale * linear(linear(hidden, "shared").relu(), f"{tower}.up")

            return added

        places = {(tower, self.block): beside(tower) for tower in ("text", "image")}
        return Edit(beside=places, templates=(TEMPLATE,))

    def zero_shot_points(self, clip: FrozenClip, classnames, templates) -> list[Adapter]:
        """up = 0: on the way there the edit is linear."""
        return [replace(self, values={name: t * 0 if ".up." in name else t for name, t in self.values.items()})]


# -- deep text prompts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DeepPrompt(Kind):
    """Context vectors, and other vectors in their places before the blocks 1, 2 .. (the text side of PromptSRC, MaPLe).

    State: "context" [n, W] and "block.1" [n, W], "block.2" ...
    """

    kind: ClassVar[str] = "deep-prompt"
    tower: ClassVar[str] = "text"
    image_input: ClassVar[ImageInput] = "feature"
    surrogate_on: ClassVar[str] = "classes"

    @classmethod
    def drawn(cls, clip: FrozenClip, seed: int = 0, tokens: int = 4) -> DeepPrompt:
        names = ["context", *(f"block.{k}" for k in range(1, BLOCKS))]
        return cls(random(dict.fromkeys(names, (tokens, clip.text.width)), seed))

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        count = states["context"].shape[1]

        def before(values: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: with_tokens(x, values, clip.first_token, replaced=count)

        deep = {("text", k): before(states[f"block.{k}"]) for k in range(1, BLOCKS)}
        return Edit(context=Context(states["context"], TEMPLATE), before=deep)

    def zero_shot_points(
        self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]
    ) -> list[DeepPrompt]:
        """The frozen tower's tokens before each block: "a photo of a" sees no class name, so they are exact."""
        first, seen = clip.first_token, {}
        words = clip.tokenize([TEMPLATE.format("cat")])[:, first : first + 4]

        def keep(block: int) -> Callable[[Tensor], Tensor]:
            return lambda x: seen.setdefault(f"block.{block}", x[:, 0, first : first + 4]) is None or x

        seen["context"] = clip.text.token_embedding.weight[words]
        edit = Edit(context=Context(seen["context"], TEMPLATE), before={("text", k): keep(k) for k in range(1, BLOCKS)})
        prepare_classes(clip, edit, ["cat"], precision=clip.dtype)(edit)
        return [replace(self, values={name: values[0] for name, values in seen.items()})]


# -- PromptKD's student ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Student(Kind):
    """PromptKD's student (arXiv 2403.02781): deep visual prompts and a projector into the space of a teacher's classes.

    State: "prompt" [n, W] at the end of the tokens, "block.1" .. that replace them before these blocks, and the
    projector "0.weight" [H, D], "0.bias", "1.weight" [H], "1.bias" (BatchNorm), "3.weight" [D', H], "3.bias".

    Attributes:
        rows: the teacher's class embeddings, [C, D'].
        running_mean, running_var: statistics of the BatchNorm, [H]; they are no part of the search.
    """

    rows: Tensor = field(kw_only=True)
    running_mean: Tensor = field(kw_only=True)
    running_var: Tensor = field(kw_only=True)

    kind: ClassVar[str] = "student"

    @classmethod
    def drawn(cls, clip: FrozenClip, seed: int = 0, tokens: int = 2, hidden: int = 6, width: int = 10) -> Student:
        visual = blocks_of(clip, "image")[0].attn.embed_dim
        shapes = {name: (tokens, visual) for name in ("prompt", *(f"block.{k}" for k in range(1, BLOCKS)))}
        shapes |= {"0.weight": (hidden, clip.embed_dim), "0.bias": (hidden,), "1.weight": (hidden,)}
        shapes |= {"1.bias": (hidden,), "3.weight": (width, hidden), "3.bias": (width,)}
        fixed = random({"rows": (len(NAMES), width), "mean": (hidden,), "var": (hidden,)}, 7)
        var = 1 + fixed["var"].abs()
        return cls(random(shapes, seed), NAMES, rows=fixed["rows"], running_mean=fixed["mean"], running_var=var)

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        visual, count = clip.model.visual, states["prompt"].shape[1]

        def before(values: Tensor, replaced: int) -> Callable[[Tensor], Tensor]:
            return lambda x: with_tokens(x, values, x.shape[2] - replaced, replaced=replaced)

        # In the published model the prompt stands before the first layer norm, which takes each token alone.
        deep = {("image", 0): before(normed(visual.ln_pre, states["prompt"]), 0)}
        deep |= {("image", k): before(states[f"block.{k}"], count) for k in range(1, BLOCKS)}

        def projector(x: Tensor) -> Tensor:
            hidden = x.to(states["0.weight"]) @ states["0.weight"].mT + states["0.bias"][:, None]
            normed = (hidden - self.running_mean.to(hidden)) / (self.running_var.to(hidden) + 1e-5).sqrt()
            hidden = (normed * states["1.weight"][:, None] + states["1.bias"][:, None]).relu()
            return hidden @ states["3.weight"].mT + states["3.bias"][:, None]

        return Edit(
            before=deep,
            image_maps=(projector,),
            raw_image_map=True,
            rows=(ClassRows(self.classnames, F.normalize(self.rows, dim=-1).to(states["prompt"])[None]),),
        )

    def zero_shot_points(self, clip: FrozenClip, classnames, templates) -> list[Student]:
        """None: a vision transformer sees its prompts in every token, and the teacher's space is another one."""
        return []


KINDS = (Lora, Adapter, DeepPrompt, Student)
