"""Merging methods as plans, and the decorator that turns a plan into a function on state dicts.

A method that works tensor by tensor is written as a plan. The plan checks its options, computes the statistics of all
tensors that it needs (in passes over the inputs) and returns a :class:`Merge`, which computes one stretch of one merged
tensor. :func:`method` turns the plan into a function on state dicts; :func:`mergetune.merging.merge_files` runs the
same plan on files. Several threads work on stretches, one thread per stretch, and the results are used in order, so
memory, files and any number of threads give the same bits.

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

from mergetune.merging.methods import METHODS, Method
from mergetune.merging.preparation import Prepared, prepared
from mergetune.merging.sources import Part, StateDict, over_parts, source, sources, stretches, whole

Options = ParamSpec("Options")


@dataclass(frozen=True)
class Merge:
    """Computes merged values of a tensor.

    Attributes:
        part: function from a part to its merged values, in the shape of the part's base. The result must not share
            memory with the inputs.
        whole: whether ``part`` gets whole tensors; otherwise it gets one stretch at a time.
    """

    part: Callable[[Part], Tensor]
    whole: bool = False


class TensorMethod(Protocol[Options]):
    """A method that works tensor by tensor: ``(base, experts, *, options) -> state dict``.

    Attributes:
        plan: function of the same arguments that returns the :class:`Merge`; used by
            :func:`mergetune.merging.merge_files`.
    """

    __name__: str
    plan: Callable[Options, Merge]

    def __call__(self, *args: Options.args, **kwargs: Options.kwargs) -> dict[str, Tensor]: ...


def method(plan: Callable[Options, Merge]) -> TensorMethod[Options]:
    """Decorator that turns a plan ``(base, experts, *, options) -> Merge`` into a method that returns a state dict.

    ``METHODS`` must have an entry with the name of the plan; the method checks base and experts by this entry.
    """
    facts = METHODS[plan.__name__]
    planned: Callable[..., Merge] = plan

    @wraps(plan)
    @torch.no_grad()
    def merge(base: StateDict | None, experts: Sequence[StateDict], **options: Any) -> dict[str, Tensor]:
        given = prepared(facts, base, experts)
        step, merged = planned(given.moving_base, given.moving, **options), {}
        for name, like in sources(given.reference):
            merged[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        places = {name: tensor.view(-1) for name, tensor in merged.items()}
        for name, piece in merged_pieces(step, given):
            places[name][: len(piece)] = piece
            places[name] = places[name][len(piece) :]
        return merged

    returned = "dict[str, Tensor]"
    merge.__annotations__ = plan.__annotations__ | {"return": returned}
    vars(merge).update(plan=plan, __signature__=inspect.signature(plan).replace(return_annotation=returned))
    return cast("Any", merge)


def facts_of(function: Callable[..., Any]) -> Method:
    """The entry of a merging function in ``METHODS``.

    Raises:
        ValueError: the function is not a merging method.
    """
    name = getattr(function, "__name__", "")
    if name not in METHODS:
        raise ValueError(f"method must be a function of mergetune.merging: {', '.join(METHODS)}; got {function!r}")
    return METHODS[name]


def plan_of(function: Callable[..., Any]) -> Callable[..., Merge] | None:
    """The plan of a method that works tensor by tensor; None for other methods."""
    return getattr(function, "plan", None)


def merged_pieces(step: Merge, given: Prepared) -> Iterator[tuple[str, Tensor]]:
    """Yields (tensor name, merged values) in flat pieces, in the order of the tensors and their elements.

    Dtypes are those of the base, or of the first expert if the base is None.

    Raises:
        ValueError: a merged value is not finite.
    """
    reference = given.reference

    def piece(part: Part) -> tuple[str, Tensor]:
        return part.name, _finite(step.part(part).reshape(-1), part)

    for stored, names in groupby(reference, given.stored.__contains__):
        if stored:
            for name in names:
                like = source(reference, name)
                yield from ((name, like.read(begin, end)) for begin, end in stretches(like.numel))
        elif step.whole:
            yield from (piece(whole(name, given.base, given.experts)) for name in names)
        else:
            yield from over_parts(piece, names, given.base, given.experts)


def _finite(merged: Tensor, part: Part) -> Tensor:
    """The merged values of a part in the stored dtype, checked to be finite."""
    like = part.stored[0] if part.stored_base is None else part.stored_base
    if merged.numel() != part.end - part.begin:
        raise ValueError(f"{part.name}: merged must hold {part.end - part.begin} values, got {merged.numel()}")
    found = merged.to(like.dtype)
    if not found.sum(dtype=merged.dtype).isfinite() and not found.isfinite().all():  # the sum is quick
        bad = int((~found.isfinite()).sum())
        raise ValueError(
            f"{part.name} must be finite after merging, got {bad} NaN or infinite values: merged values are too large "
            f"for {like.dtype}"
        )
    return found
