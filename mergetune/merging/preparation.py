"""What a method gets: matched inputs, without the tensors that are equal in all models, checked to be finite."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mergetune.merging.checks import check, not_finite
from mergetune.merging.matching import match
from mergetune.merging.methods import Method
from mergetune.merging.sources import Part, StateDict, View, file_of, floating, over_parts, source, sources, title_of


@dataclass(frozen=True)
class Prepared:
    """Inputs of a merge.

    Attributes:
        base, experts: the matched state dicts.
        stored: names of the tensors that are not merged: integers, and tensors that are equal in all models. The result
            takes the reference's.
        moving_base, moving: the state dicts without the stored tensors, of which a method makes its statistics.
    """

    base: StateDict | None
    experts: list[StateDict]
    stored: frozenset[str]
    moving_base: StateDict | None
    moving: list[StateDict]

    @property
    def reference(self) -> StateDict:
        """The state dict that gives names, shapes, dtypes and the stored tensors."""
        return self.experts[0] if self.base is None else self.base


def prepared(
    method: Method, base: StateDict | None, experts: Sequence[StateDict], *, missing: str = "refuse"
) -> Prepared:
    """Checks and matches the inputs of a method, and finds the tensors that no expert moved. Reads the inputs once.

    A tensor that is equal in base and experts has no task vector. It enters no statistic, no norm and no quantile, and
    may hold infinite values, as attention masks do.

    Raises:
        TypeError, ValueError: as :func:`mergetune.merging.checks.check` and :func:`match`.
        ValueError: a tensor that differs between the models, or a NaN, is not finite.
    """
    check(method, base, experts)
    base, matched = match(base, experts, missing=missing)
    reference, argument = (matched[0], "experts[0]") if base is None else (base, "base")
    for title, state in [(argument, reference), *((f"experts[{k}]", expert) for k, expert in enumerate(matched))]:
        for name, like in sources(state):
            if like.dtype.is_complex:
                raise TypeError(f"{title_of(f'{title}[{name!r}]', state)} must be real, got {like.dtype}")
            if like.device.type == "meta":
                raise ValueError(
                    f"{title}[{name!r}] must hold numbers, got a tensor on the device meta, which has none"
                )
    equal = dict.fromkeys(floating(reference), True)
    bad: dict[str, list[tuple[int, int]]] = {}
    for name, same, counts in over_parts(_inspected, equal, base, matched):
        equal[name] &= same
        if any(map(any, counts)):
            before = bad.get(name, [(0, 0)] * len(counts))
            bad[name] = [(a + c, b + d) for (a, b), (c, d) in zip(before, counts, strict=True)]
    if wrong := [name for name in bad if not equal[name]]:
        raise ValueError(_not_finite(wrong, bad[wrong[0]], base, matched))
    stored = frozenset(name for name in reference if equal.get(name, True))
    moving = [_without(stored, state) for state in matched]
    return Prepared(base, matched, stored, None if base is None else _without(stored, base), moving)


def _inspected(part: Part) -> tuple[str, bool, list[tuple[int, int]]]:
    """Name; whether all models hold the same values; counts of NaN and infinite values in each expert and the base."""
    rows = [*part.stored, *([] if part.stored_base is None else [part.stored_base])]
    alike = len({row.dtype for row in rows}) == 1
    first = rows[0] if alike else rows[0].double()
    same = len(rows) > 1 or not first.isnan().any()
    for row in rows[1:] if same else ():
        other = row if alike else row.double()
        same = same and torch.equal(other[:64], first[:64]) and torch.equal(other, first)
    return part.name, bool(same), [not_finite(row) for row in rows]


def _not_finite(
    names: Sequence[str], counts: Sequence[tuple[int, int]], base: StateDict | None, experts: Sequence[StateDict]
) -> str:
    """The error for tensors of these names, with the counts of the first one."""
    states = [(f"experts[{k}]", expert) for k, expert in enumerate(experts)]
    states += [] if base is None else [("base", base)]
    found = [
        f"{title_of(argument, state)} holds {nans} NaN and {infinite} infinite values"
        for (argument, state), (nans, infinite) in zip(states, counts, strict=True)
        if nans or infinite
    ]
    more = f", and {len(names) - 1} more tensors hold such values" if len(names) > 1 else ""
    return f"{names[0]!r} must be finite because it is not equal in all models, but {'; '.join(found)}{more}"


def _without(names: Collection[str], state: StateDict) -> StateDict:
    left = {name: partial(source, state, name) for name in state if name not in names}
    return View(left, title=file_of(state), whole=state)
