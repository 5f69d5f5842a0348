"""Merging methods written as plans, and how a plan becomes a function on state dicts.

A method that works tensor by tensor is written as a plan: it checks its options, reads what it must know of all tensors
(a first pass, if any) and returns a :class:`Merge`, which makes one stretch of one merged tensor. :func:`method` turns
the plan into a function on state dicts; :func:`mergetune.merging.merge_files` runs the same plan over files. Stretches
are worked on by several threads, each alone on its own, and come back in order. So all ways give the same bits.

Shapes: K experts, n elements of a stretch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import groupby
from typing import Any, ParamSpec, Protocol, cast

import torch
from torch import Tensor

from mergetune.merging.checks import check
from mergetune.merging.methods import METHODS, Method
from mergetune.merging.sources import Part, StateDict, over_parts, source, sources, stretches, whole

Options = ParamSpec("Options")


@dataclass(frozen=True)
class Merge:
    """How a part is merged.

    Attributes:
        part: the merged values of a part, in the shape of its base. Never the memory of its inputs.
        whole: whether it needs tensors whole; else it is called for one stretch after the other.
    """

    part: Callable[[Part], Tensor]
    whole: bool = False


class TensorMethod(Protocol[Options]):
    """A method that works tensor by tensor: ``(base, experts, *, options) -> state dict``.

    Attributes:
        plan: the same arguments -> how each part is merged. For :func:`mergetune.merging.merge_files`.
    """

    __name__: str
    plan: Callable[Options, Merge]

    def __call__(self, *args: Options.args, **kwargs: Options.kwargs) -> dict[str, Tensor]: ...


def method(plan: Callable[Options, Merge]) -> TensorMethod[Options]:
    """Turn a plan ``(base, experts, *, options) -> Merge`` into a method, which takes the same and gives a state dict.

    What the method merges and needs is the entry of its name in ``METHODS``.
    """
    facts = METHODS[plan.__name__]
    planned: Callable[..., Merge] = plan

    @wraps(plan)
    @torch.no_grad()
    def merge(base: StateDict | None, experts: Sequence[StateDict], **options: Any) -> dict[str, Tensor]:
        check(facts, base, experts)
        step, merged = planned(base, experts, **options), {}
        for name, like in sources(base if base is not None else experts[0]):
            merged[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        places = {name: tensor.view(-1) for name, tensor in merged.items()}
        for name, piece in merged_pieces(step, base, experts):
            places[name][: len(piece)] = piece
            places[name] = places[name][len(piece) :]
        return merged

    returned = "dict[str, Tensor]"
    merge.__annotations__ = plan.__annotations__ | {"return": returned}
    vars(merge).update(plan=plan, __signature__=inspect.signature(plan).replace(return_annotation=returned))
    return cast("Any", merge)


def facts_of(function: Callable[..., Any]) -> Method:
    """What is known of a method.

    Raises:
        ValueError: the function is not a merging method.
    """
    name = getattr(function, "__name__", "")
    if name not in METHODS:
        raise ValueError(f"method must be a function of mergetune.merging: {', '.join(METHODS)}; got {function!r}")
    return METHODS[name]


def plan_of(function: Callable[..., Any]) -> Callable[..., Merge] | None:
    """The plan of a method that works tensor by tensor; None for another one."""
    return getattr(function, "plan", None)


def merged_pieces(step: Merge, base: StateDict | None, experts: Sequence[StateDict]) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors in order, flat, in pieces, each with its tensor's name.

    Dtypes are those of the base (of the first expert without one).

    Raises:
        ValueError: a merged value is not finite.
    """
    reference = base if base is not None else experts[0]

    def piece(part: Part) -> tuple[str, Tensor]:
        return part.name, _finite(step.part(part).reshape(-1), part)

    for is_floating, names in groupby(reference, lambda name: source(reference, name).dtype.is_floating_point):
        if not is_floating:
            for name in names:
                like = source(reference, name)
                yield from ((name, like.read(begin, end)) for begin, end in stretches(like.numel))
        elif step.whole:
            yield from (piece(whole(name, base, experts)) for name in names if source(reference, name).numel)
        else:
            yield from over_parts(piece, names, base, experts)


def _finite(merged: Tensor, part: Part) -> Tensor:
    """Merged values of a part in their dtype; what is the same everywhere may be infinite."""
    like = part.stored[0] if part.stored_base is None else part.stored_base
    if merged.numel() != part.end - part.begin:
        raise ValueError(f"{part.name}: merged must hold {part.end - part.begin} values, got {merged.numel()}")
    found = merged.to(like.dtype)
    if not found.sum(dtype=merged.dtype).isfinite() and not found.isfinite().all():  # the sum is quick
        if not all(torch.equal(row, like) for row in part.stored):
            bad = int((~found.isfinite()).sum())
            raise ValueError(
                f"{part.name} must be finite after merging, got {bad} NaN or infinite values: an input holds them, or "
                f"they are too large for {like.dtype}"
            )
        return like  # a mask with -inf
    return found
