"""Order statistics of many values in bounded memory: each pass over the stretches comes nearer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mergetune import ops
from mergetune.merging.sources import Part, StateDict, over_parts, source, tensor_of


def order_statistics(
    measure: Callable[[Part], Tensor] | None,
    names: Sequence[str],
    base: StateDict | None,
    experts: Sequence[StateDict],
    ranks: Sequence[int],
) -> list[list[float]]:
    """Exact order statistics of more values than fit in memory, mostly in one pass.

    A sample says between which two values each one lies. A pass counts what lies below these, and keeps what lies
    between: about two percent of all values for each rank, an eighth at most. Where the sample was wrong, a further
    pass looks where the counts say.

    Args:
        measure: part -> K rows of values, [K, n]. None: the magnitudes of the experts' differences from the base, which
            are counted without being stored.
        names: of the tensors whose values are ordered together.
        ranks: 0 is the smallest value of a row.

    Returns:
        For each rank the values of the K rows.
    """
    values = measure or (lambda part: part.deltas.abs())
    total = sum(source(experts[0], name).numel for name in names)
    if total <= FEW:
        rows = np.concatenate([*over_parts(lambda part: values(part).cpu().numpy(), names, base, experts)], 1)
        return np.partition(rows, ranks, 1)[:, ranks].T.tolist()
    searches = {
        (k, rank): _Search(rank, row, upto=total)
        for k, row in enumerate(_sample(values, names, base, experts))
        for rank in ranks
    }
    while wanted := {key: search for key, search in searches.items() if search.found is None}:
        bounds = {key: search.bounds() for key, search in wanted.items()}

        def look(part: Part, bounds: Mapping = bounds) -> dict[tuple[int, int], tuple[list[int], Tensor]]:
            alike = len({row.dtype for row in (*part.stored, part.stored_base) if row is not None}) == 1
            rows, start = (part.stored, part.stored_base) if measure is None and alike else (values(part), None)
            counted = {key: ops.count_around(rows[key[0]], *ends, base=start) for key, ends in bounds.items()}
            most = max((part.end - part.begin) // 8, 16)
            return {key: (counts, row[:: math.ceil(len(row) / most) or 1]) for key, (counts, row) in counted.items()}

        seen = list(over_parts(look, names, base, experts))
        for key, search in wanted.items():
            counts, between = zip(*(stretch[key] for stretch in seen), strict=True)
            search.narrow(*bounds[key], np.sum(counts, 0).tolist(), torch.cat(between).cpu().numpy())
    found = {key: search.found for key, search in searches.items() if search.found is not None}
    return [[value for (_, own), value in found.items() if own == rank] for rank in ranks]


@dataclass
class _Search:
    """For one order statistic among N values.

    Attributes:
        rank: 0 is the smallest value.
        sample: values, sorted, that are spread as those are that are left.
        upto: how many values are smaller than ``high``.
        low, high: it lies between these, or is found.
        under: how many values are at most ``low``.
    """

    rank: int
    sample: np.ndarray
    upto: int
    low: float = -math.inf
    high: float = math.inf
    under: int = 0
    found: float | None = None

    def bounds(self) -> tuple[float, float]:
        """Two values between which it is likely to lie, near each other; its bounds where the sample has none."""
        left = self.sample[(self.sample > self.low) & (self.sample < self.high)]  # NaN is not
        if not len(left):
            return self.low, self.high
        at = (self.rank - self.under) / max(self.upto - self.under, 1)
        width = min(0.005 + 2 / math.sqrt(len(left)), 0.25)  # never all of them: each pass must come nearer
        first, last = math.floor((at - width) * len(left)), math.ceil((at + width) * len(left))
        return self.low if first < 0 else float(left[first]), self.high if last >= len(left) else float(left[last])

    def narrow(self, low: float, high: float, counts: list[int], between: np.ndarray) -> None:
        """Take up what :func:`mergetune.ops.count_around` saw around two bounds; ``between`` may be a part of it."""
        below, at_low, inside, at_high = np.cumsum(counts).tolist()
        if self.rank < below:
            self.high, self.upto = low, below
        elif self.rank < at_low:
            self.found = low
        elif self.rank < inside and len(between) == inside - at_low:
            self.found = float(np.partition(between, self.rank - at_low)[self.rank - at_low])
        elif self.rank < inside:
            self.low, self.under, self.high, self.upto, self.sample = low, at_low, high, inside, np.sort(between)
        elif self.rank < at_high:
            self.found = high
        elif high == math.inf:
            self.found = math.nan  # which is in no order: it comes last
        else:
            self.low, self.under = high, at_high


FEW = 2**18
"""So many values are simply sorted."""


def _sample(
    measure: Callable[[Part], Tensor], names: Sequence[str], base: StateDict | None, experts: Sequence[StateDict]
) -> np.ndarray:
    """Sorted values of short pieces, evenly spread over the tensors, [K, n]."""
    ends = np.cumsum([source(experts[0], name).numel for name in names])
    rows = []
    for place in np.linspace(0, ends[-1], min(max(int(ends[-1]) // 2**17, 16), 256), endpoint=False).astype(np.int64):
        which = int(np.searchsorted(ends, place, side="right"))
        tensor = tensor_of(names[which], base, experts)
        begin = int(place - ends[which]) + tensor.numel
        rows.append(measure(tensor.part(begin, min(begin + 1024, tensor.numel))).cpu().numpy())
    return np.sort(np.concatenate(rows, 1), 1)
