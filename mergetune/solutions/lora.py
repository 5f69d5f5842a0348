"""LoRA: low-rank changes of weights in the transformer blocks, in the text tower, the image tower or both.

Shapes: M settings computed together, K solutions, r rank, n inputs and m outputs of an adapted weight.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import PLAIN, Edit, FrozenClip, ImageInput, block_prefix, check_templates
from mergetune.facts.brief import brief
from mergetune.io import Items, Number
from mergetune.solutions.base import Solution
from mergetune.solutions.solution_folders import Description
from mergetune.solutions.states import State, check_finite, stacked

if TYPE_CHECKING:
    from typing_extensions import Self

PARTS: Mapping[str, tuple[str, int | None]] = {
    "q": ("attn.in_proj_weight", 0),
    "k": ("attn.in_proj_weight", 1),
    "v": ("attn.in_proj_weight", 2),
    "qkv": ("attn.in_proj_weight", None),
    "out": ("attn.out_proj.weight", None),
    "fc": ("mlp.c_fc.weight", None),
    "proj": ("mlp.c_proj.weight", None),
}
"""Part of a block -> open_clip's name of the weight, and the third of its rows that is adapted; None for all rows."""
TOWERS = ("text", "image")
_PLACE = re.compile(rf"({'|'.join(TOWERS)})\.(0|[1-9]\d{{0,3}})\.({'|'.join(PARTS)})")
NUMERICAL_RANK = 1e-6  # singular values below this share of the largest are rounding errors of float32


class LoRADescription(Description, frozen=True):
    """A saved LoRA."""

    classnames: None
    templates: Items[str]
    scales: dict[str, Number]


@brief("templates", "backbone", "notes", rank=lambda lora: lora.rank, places=lambda lora: len(lora.scales))
@dataclass(frozen=True, eq=False)
class LoRA(Solution):
    """Low-rank changes of weights, ``W = W0 + s B A`` (CLIP-LoRA, arXiv 2405.18541; PEFT's LoRA without dropout).

    An adapted weight has a place such as "image.11.q": tower, block (from 0) and part. The parts are q, k and v (thirds
    of open_clip's joint ``in_proj_weight``), qkv (all of it with one A, as PEFT adapts it), out, fc and proj (the two
    layers of the MLP). Ranks and scales may differ between places.

    Only the changes ``s B A`` have a meaning: ``B G`` and ``G^-1 A`` are the same LoRA for every invertible G. So the
    line between two LoRAs is the straight line of their changes. A point on it is exactly one LoRA of both ranks
    together, ``[(1 - t) B1, t B2] [A1; A2]``.

    Attributes:
        factors: "PLACE.A" [r, n] and "PLACE.B" [m, r] for each place; float32.
        scales: place -> s. CLIP-LoRA takes ``alpha / sqrt(r)``, PEFT ``alpha / r`` unless its file says ``use_rslora``.
        templates: texts of the class embeddings. Empty for a LoRA on a solution that makes them, in a
            :class:`mergetune.Stack`.
        backbone: name of the CLIP that the LoRA was made for, or None.
        fingerprint: SHA-256 of the weights of that CLIP's towers, or None; a CLIP with other weights is refused.
        notes: settings and origin, JSON-able; saved with the LoRA.

    Example:
        >>> import mergetune as mt, torch
        >>> factors = {"image.0.q.A": torch.ones(2, 16), "image.0.q.B": torch.zeros(16, 2)}
        >>> lora = mt.LoRA(factors, {"image.0.q": 0.5})
        >>> lora.rank, lora.image_input
        (2, 'pixels')
    """

    factors: State
    scales: dict[str, float]
    templates: tuple[str, ...] = (PLAIN,)
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    classnames: None = None

    kind: ClassVar[str] = "lora"
    tensors: ClassVar[tuple[str, ...]] = ()
    changes_weights: ClassVar[bool] = True
    description: ClassVar[type[Description]] = LoRADescription

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", check_templates(self.templates) if self.templates else ())
        check_places(self.scales)
        for place, scale in self.scales.items():
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"scales must be positive and finite, got {scale!r} for {place!r}")
        wanted = {f"{place}.{factor}" for place in self.scales for factor in "AB"}
        if odd := sorted(wanted ^ self.factors.keys()):
            raise ValueError(f"factors must hold A and B of each place in scales and no others, got {odd[0]!r} in one")
        for place in self.scales:
            a, b = self.factors[f"{place}.A"], self.factors[f"{place}.B"]
            check_finite(f"factors[{place}.A]", a)
            check_finite(f"factors[{place}.B]", b)
            if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or 0 in (a.shape[1], len(b)):
                shapes = f"{list(a.shape)} and {list(b.shape)}"
                raise ValueError(f"factors of {place!r} must have shapes [r, n] and [m, r], got {shapes}")

    @classmethod
    def start(
        cls,
        clip: FrozenClip,
        *,
        rank: int = 2,
        alpha: float = 1.0,
        parts: Sequence[str] = ("q", "k", "v"),
        tower: str = "both",
        last_blocks: int | None = None,
        templates: Sequence[str] = (PLAIN,),
        seed: int = 1,
    ) -> LoRA:
        """The LoRA at which training starts: random A, and B = 0, so that it changes nothing. Defaults of CLIP-LoRA.

        Args:
            clip: the frozen CLIP.
            rank: r of every place.
            alpha: the scale is ``alpha / sqrt(r)``.
            parts: adapted parts of a block, of ``PARTS``.
            tower: "text", "image" or "both".
            last_blocks: number of adapted blocks, counted from the last one of each tower; None adapts all.
            templates: texts of the class embeddings.
            seed: seed of A, which is uniform in ``[-1 / sqrt(n), 1 / sqrt(n)]``.

        Raises:
            ValueError: an unknown part or tower, or a number below 1.
            TypeError: a tower is not made of open_clip's transformer blocks.
        """
        for name, value in (("rank", rank), ("last_blocks", 1 if last_blocks is None else last_blocks)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be positive and finite, got {alpha!r}")
        if tower not in (*TOWERS, "both"):
            raise ValueError(f"tower must be one of {', '.join(TOWERS)}, both, got {tower!r}")
        places = [
            f"{each}.{block}.{part}"
            for each in (TOWERS if tower == "both" else (tower,))
            for block in blocks_of(clip, each)[-(last_blocks or 0) :]
            for part in parts
        ]
        check_places(places)
        generator, factors = torch.Generator().manual_seed(seed), {}
        for place in places:
            m, n = _rows(clip, place).shape
            factors[f"{place}.A"] = (2 * torch.rand(rank, n, generator=generator) - 1) / math.sqrt(n)
            factors[f"{place}.B"] = torch.zeros(m, rank)
        made = cls(factors, dict.fromkeys(places, alpha / math.sqrt(rank)), tuple(templates))
        return replace(made, **made.origin(clip))

    # -- what is adapted -----------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.factors[f"{place}.A"].shape[0] for place in self.scales)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The towers whose weights change: "text", "image" or both."""
        return tuple(tower for tower in TOWERS if any(place.startswith(tower) for place in self.scales))

    @property
    def tower(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The towers that the LoRA depends on; templates need the text tower."""
        towers = {*self.adapted, *(["text"] if self.templates else [])}
        return "both" if len(towers) == 2 else towers.pop()

    @property
    def image_input(self) -> ImageInput:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "pixels" if "image" in self.adapted else "feature"

    def delta(self, states: State, place: str) -> Tensor:
        """The change ``s B A`` of an adapted weight, [M, m, n]."""
        return self.scales[place] * (states[f"{place}.B"] @ states[f"{place}.A"])

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """An edit that replaces each adapted weight by ``W0 + s B A``."""
        changes: dict[str, dict[int | None, Tensor]] = {}
        for place in self.scales:
            name, third = parameter_of(clip, place)
            changes.setdefault(name, {})[third] = self.delta(states, place)
        weights = {}
        for name, found in changes.items():
            frozen = clip.model.get_parameter(name)
            if None in found:
                weights[name] = frozen + found[None]
                continue
            settings = max(map(len, found.values()))
            rows = [
                part + found[third] if third in found else part.expand(settings, *part.shape)
                for third, part in enumerate(frozen.chunk(3))
            ]
            weights[name] = torch.cat(rows, 1)
        return Edit(weights=weights, templates=self.templates)

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> list[LoRA]:
        """The LoRA of rank 0, which changes nothing: a point on the line to it has the rank of the other end."""
        factors = {name: (t[:0] if name.endswith("A") else t[:, :0]).clone() for name, t in self.factors.items()}
        return [replace(self, factors=factors)]

    def starts_at(self, point: Solution) -> bool:
        """True: the line joins LoRAs of any ranks."""
        return True

    # -- the line, in the space of changes -----------------------------------------------------------------------------

    def between(self, a: State, b: State, t: float | Tensor) -> State:
        """The straight line of the changes: a LoRA of both ranks together."""
        share = t.to(next(iter(b.values()))).view(-1, 1, 1) if isinstance(t, Tensor) else t
        return self._sum([(a, 1 - share), (b, share)])

    def mixture(self, ends: State, shares: Tensor) -> State:
        """Weighted sums of the changes of K LoRAs: a LoRA of all ranks together."""
        columns = shares.to(next(iter(ends.values()))).T[:, :, None, None]
        return self._sum([({name: t[k : k + 1] for name, t in ends.items()}, s) for k, s in enumerate(columns)])

    def mean_of(self, ends: State) -> State:
        count = len(next(iter(ends.values())))
        return self.mixture(ends, torch.full((1, count), 1 / count, dtype=torch.float64))

    def _sum(self, terms: Sequence[tuple[State, float | Tensor]]) -> State:
        """A LoRA whose change is the weighted sum of changes. The weights go into B."""
        found = {}
        for place in self.scales:
            bs = [share * state[f"{place}.B"] for state, share in terms]
            settings = max(map(len, bs))
            found[f"{place}.A"] = torch.cat([state[f"{place}.A"].expand(settings, -1, -1) for state, _ in terms], 1)
            found[f"{place}.B"] = torch.cat([b.expand(settings, -1, -1) for b in bs], 2)
        return found

    def distance(self, states: State, to: State) -> Tensor:
        """Half the squared Frobenius distance of the changes, [M], summed over places; no change is multiplied out.

        ``|B A|^2`` is the sum of the products of two Gram matrices, ``B' B`` and ``A A'``, [r, r]. They are float64,
        since the distance is a difference of large numbers near ``to``.
        """

        def product(x: State, y: State, place: str) -> Tensor:
            (a, b), (c, d) = ((state[f"{place}.A"].double(), state[f"{place}.B"].double()) for state in (x, y))
            return ((b.mT @ d) * (a @ c.mT)).sum((1, 2))

        total: Any = 0
        for place, scale in self.scales.items():
            squared = product(states, states, place) - 2 * product(states, to, place) + product(to, to, place)
            total = total + 0.5 * scale**2 * squared
        return total.to(next(iter(states.values())))

    def stack(self, solutions: Sequence[Solution], device: torch.device | None = None) -> State:
        """The states of LoRAs, with zeros up to the largest rank of each place."""
        ranks = {place: max(len(s.state()[f"{place}.A"]) for s in solutions) for place in self.scales}
        return super().stack([_padded(solution, ranks) for solution in solutions], device)

    def in_form_of(self, like: Solution) -> LoRA:
        """The same changes with the scales of another LoRA, and with at least its ranks."""
        if not isinstance(like, LoRA) or self.scales.keys() != like.scales.keys():
            return self
        factors = dict(self.factors)
        for place, scale in self.scales.items():
            if scale != like.scales[place]:
                factors[f"{place}.B"] = factors[f"{place}.B"] * (scale / like.scales[place])
        made = replace(self, factors=factors, scales=dict(like.scales))
        return _padded(made, {place: len(like.factors[f"{place}.A"]) for place in self.scales})

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Check that a line joins two LoRAs: the same places, scales and texts. Ranks may differ."""
        if space == "embedding":
            return
        assert isinstance(other, LoRA)  # of the same kind
        if self.templates != other.templates:
            raise ValueError(
                f"LoRAs on one path must have the same templates, got {self.templates} and {other.templates}"
            )
        for place in {**self.scales, **other.scales}:
            here, there = (lora.scales.get(place, "none") for lora in (self, other))
            if here != there:
                raise ValueError(f"LoRAs on one path must have the same scales, got {here} and {there} at {place!r}")

    # -- merging -------------------------------------------------------------------------------------------------------

    def merging_state(self) -> State:
        """The changes ``s B A`` by place: merging methods act on them, not on factors."""
        state = stacked(self.factors)
        return {place: self.delta(state, place)[0] for place in self.scales}

    def with_merged(self, state: State, **changes: Any) -> Self:
        """A LoRA with these changes, factored by singular values; its ranks are those of the changes."""
        factors = {}
        for place, change in state.items():
            u, s, v = torch.linalg.svd(change.double() / self.scales[place], full_matrices=False)
            rank = int((s > NUMERICAL_RANK * s[0]).sum())
            root = s[:rank].sqrt()
            factors[f"{place}.A"], factors[f"{place}.B"] = root[:, None] * v[:rank], u[:, :rank] * root
        return self.with_state(factors, **changes)

    # -- as a solution -------------------------------------------------------------------------------------------------

    def state(self) -> State:
        return dict(self.factors)

    def with_state(self, state: State, **changes: Any) -> Self:
        factors = {name: tensor.detach().float().clone().contiguous() for name, tensor in state.items()}
        return replace(self, factors=factors, **changes)

    def settings(self) -> dict[str, Any]:
        return {"templates": list(self.templates), "scales": self.scales}

    @classmethod
    def restore(cls, description: Description, tensors: State) -> Self:
        return cls(factors=tensors, **dict(description))

    @property
    def identity(self) -> tuple[Tensor | str, ...]:
        return *self.factors.values(), json.dumps(self.settings())

    def check_width(self, clip: FrozenClip) -> None:
        for place in self.scales:
            tower, block, _ = place.split(".")
            blocks = blocks_of(clip, tower)
            if int(block) not in blocks:
                raise ValueError(f"a LoRA must adapt blocks 0 to {blocks[-1]} of the {tower} tower, got {place!r}")
            shape = [len(self.factors[f"{place}.B"]), self.factors[f"{place}.A"].shape[1]]
            if (wanted := list(_rows(clip, place).shape)) != shape:
                raise ValueError(f"a LoRA must change a weight of shape {wanted} at {place!r}, got {shape}")

    def card(self) -> tuple[str, str, str]:
        parts = sorted({place.rpartition(".")[2] for place in self.scales}, key=list(PARTS).index)
        where = f"{', '.join(parts)} in blocks of {' and '.join(self.adapted)} ({len(self.scales)} weights)"
        return "LoRA for CLIP", "lora", f"Rank {self.rank}, on {where}."


def check_places(places: Iterable[str]) -> None:
    """Raise ValueError unless these are places of adapted weights, at least one, and no weight has two of them."""
    places = list(places)
    if not places:
        raise ValueError("a LoRA must adapt at least one weight, got none")
    for place in places:
        if not isinstance(place, str) or not _PLACE.fullmatch(place):
            raise ValueError(
                f"a place must be TOWER.BLOCK.PART with a tower of {', '.join(TOWERS)} and a part of "
                f"{', '.join(PARTS)}, got {place!r}"
            )
    found = set(places)
    for place in places:
        block, _, part = place.rpartition(".")
        if places.count(place) > 1 or (part in ("q", "k", "v") and f"{block}.qkv" in found):
            raise ValueError(f"places must not adapt a weight twice, got {place!r} and another place of these rows")


def place_order(place: str) -> tuple[int, int, int]:
    """Key that sorts places by tower, block and part."""
    tower, block, part = place.split(".")
    return TOWERS.index(tower), int(block), list(PARTS).index(part)


def parameter_of(clip: FrozenClip, place: str) -> tuple[str, int | None]:
    """open_clip's name of the weight at a place, and the third of its rows that is adapted; None for all rows."""
    tower, block, part = place.split(".")
    name, third = PARTS[part]
    return f"{block_prefix(clip, tower)}{block}.{name}", third


def blocks_of(clip: FrozenClip, tower: str) -> range:
    """The numbers of the transformer blocks of a tower."""
    prefix = block_prefix(clip, tower).removesuffix(".")
    return range(len(clip.model.get_submodule(prefix)))  # pyright: ignore[reportArgumentType]  # a ModuleList


def _rows(clip: FrozenClip, place: str) -> Tensor:
    """The frozen weight that a place adapts, [m, n]."""
    name, third = parameter_of(clip, place)
    try:
        weight = clip.model.get_parameter(name)
    except AttributeError:
        raise ValueError(f"a LoRA at {place!r} needs the weight {name} of {clip.name}, which has none") from None
    return weight if third is None else weight.chunk(3)[third]


def _padded(lora: Any, ranks: Mapping[str, int]) -> Any:
    """A LoRA with zeros up to at least these ranks."""
    factors = {}
    for name, tensor in lora.factors.items():
        place, _, factor = name.rpartition(".")
        more = max(0, ranks[place] - tensor.shape["AB".index(factor)])
        factors[name] = F.pad(tensor, (0, 0, 0, more) if factor == "A" else (0, more))
    return replace(lora, factors=factors)
