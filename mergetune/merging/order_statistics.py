"""Exact order statistics of many values in bounded memory: each pass over the values narrows the search."""

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
    """Exact order statistics of more values than fit in memory, usually in one pass.

    A sample gives two bounds for each order statistic. A pass counts the values below the bounds and keeps the values
    between them: about two percent of all values per rank, an eighth at most. If the order statistic lies outside the
    bounds, the counts tell the next pass where to look.

    Args:
        measure: function from a part to K rows of values, [K, n]. None measures the magnitudes of the task vectors,
            which are counted without being stored.
        names: the tensors whose values are ordered together.
        base, experts: the state dicts, see :func:`over_parts`.
        ranks: ranks within a row; 0 is the smallest value.

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
    """The search for one order statistic among N values.

    Attributes:
        rank: 0 is the smallest value.
        sample: sorted sample of the values that remain candidates.
        upto: number of values smaller than ``high``.
        low, high: bounds between which the order statistic lies until it is found.
        under: number of values that are at most ``low``.
        found: the order statistic, once it is known.
    """

    rank: int
    sample: np.ndarray
    upto: int
    low: float = -math.inf
    high: float = math.inf
    under: int = 0
    found: float | None = None

    def bounds(self) -> tuple[float, float]:
        """Two close values between which the order statistic probably lies; low or high where the sample ends."""
        left = self.sample[(self.sample > self.low) & (self.sample < self.high)]  # excludes NaN
        if not len(left):
            return self.low, self.high
        at = (self.rank - self.under) / max(self.upto - self.under, 1)
        width = min(0.005 + 2 / math.sqrt(len(left)), 0.25)  # never the whole sample: each pass must narrow the search
        first, last = math.floor((at - width) * len(left)), math.ceil((at + width) * len(left))
        return self.low if first < 0 else float(left[first]), self.high if last >= len(left) else float(left[last])

    def narrow(self, low: float, high: float, counts: list[int], between: np.ndarray) -> None:
        """Updates the search with the result of :func:`mergetune.ops.count_around` for two bounds.

        Args:
            low, high: the two bounds.
            counts: number of values below low, equal to low, between low and high, and equal to high.
            between: values between the bounds; all of them, or a sample if they are too many.
        """
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
            self.found = math.nan  # NaN values rank last
        else:
            self.low, self.under = high, at_high


FEW = 2**18
"""Up to this number of values, all values are sorted in memory."""


def _sample(
    measure: Callable[[Part], Tensor], names: Sequence[str], base: StateDict | None, experts: Sequence[StateDict]
) -> np.ndarray:
    """Sorted sample of the values, [K, n], from short pieces spread evenly over the tensors."""
    ends = np.cumsum([source(experts[0], name).numel for name in names])
    rows = []
    for place in np.linspace(0, ends[-1], min(max(int(ends[-1]) // 2**17, 16), 256), endpoint=False).astype(np.int64):
        which = int(np.searchsorted(ends, place, side="right"))
        tensor = tensor_of(names[which], base, experts)
        begin = int(place - ends[which]) + tensor.numel
        rows.append(measure(tensor.part(begin, min(begin + 1024, tensor.numel))).cpu().numpy())
    return np.sort(np.concatenate(rows, 1), 1)
