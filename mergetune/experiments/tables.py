"""The table of records: means and spread over cells, paired differences with intervals over cells and over classes.

Shapes: N cells, M rows, P parts of the images, R resamples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mergetune.experiments.records import HOME, Record

RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """A line minus the reference, percent; 95 % intervals.

    Attributes:
        mean: over cells.
        cells: t interval over cells, paired; None for one cell. Cells of one dataset share test images: with few
            datasets it tells of seeds and partitions, not of other data.
        datasets: t interval over the datasets' means; None for one dataset.
        classes: percentile bootstrap that draws each dataset's classes with replacement, in all its cells the same;
            None where some record has no counts per class.
    """

    mean: float
    cells: tuple[float, float] | None
    datasets: tuple[float, float] | None
    classes: tuple[float, float] | None


def columns_of(parts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The columns of a table -> the parts that each is computed from.

    The harmonic mean stands behind the two parts that it is of, "HM" in the separate label spaces and "joint HM" in the
    joint one. Parts beside ImageNet have their mean as well.
    """
    columns: dict[str, tuple[str, ...]] = {}
    for part in parts:
        columns[part] = (part,)
        for name, pair in (("HM", ("base", "novel")), ("joint HM", ("seen", "unseen"))):
            if part == pair[1] and pair[0] in parts:
                columns[name] = pair
    others = tuple(part for part in parts if part != "imagenet")
    return columns | ({"mean of the others": others} if others and len(others) < len(parts) else {})


def summed_up(values: Tensor, columns: dict[str, tuple[str, ...]]) -> Tensor:
    """Accuracies of parts [..., P] -> of columns [..., columns]."""
    parts = [column for column, of in columns.items() if of == (column,)]
    found = []
    for column, of in columns.items():
        a, *others = (values[..., parts.index(part)] for part in of)
        if column.endswith("HM"):
            (b,) = others
            found.append(torch.nan_to_num(2 * a * b / (a + b)))
        else:
            found.append(torch.stack([a, *others]).mean(0) if others else a)
    return torch.stack(found, -1)


@dataclass(frozen=True, eq=False)
class Table:
    """Accuracies of rows in cells. Rows and parts that some record lacks are left out.

    Attributes:
        records: of the cells, with "classes", "images" and "right".
        datasets: of each cell; cells of one dataset share its classes.
        resamples: R, of the bootstrap over classes.
    """

    records: Sequence[Record]
    datasets: Sequence[str]
    resamples: int = RESAMPLES

    @cached_property
    def rows(self) -> list[str]:
        first, *others = (record["right"] for record in self.records)
        return [row for row in first if all(row in other for other in others)]

    @cached_property
    def parts(self) -> list[str]:
        found = [right[row] for right in (record["right"] for record in self.records) for row in self.rows]
        return [part for part in found[0] if all(part in other for other in found)]

    @cached_property
    def columns(self) -> dict[str, tuple[str, ...]]:
        return columns_of(self.parts)

    @property
    def main(self) -> str:
        """The column that rows are compared in: HM, or the first."""
        return "HM" if "HM" in self.columns else next(iter(self.columns))

    @cached_property
    def values(self) -> Tensor:
        """Accuracies, percent, [N, M, columns]."""
        return torch.stack([summed_up(self._parts(record)[0], self.columns) for record in self.records])

    @cached_property
    def drawn(self) -> Tensor | None:
        """Means over cells with each dataset's classes drawn with replacement, [R, M, columns].

        A draw without any class of some part says nothing about it; it is left out. None if there are no counts per
        class.
        """
        if any(record["classes"] is None for record in self.records):
            return None
        generator, weights, total = torch.Generator().manual_seed(0), {}, torch.zeros(())
        for record, dataset in zip(self.records, self.datasets, strict=True):
            if dataset not in weights:
                count = len({c for own in record["classes"].values() for c in own})
                drawn = torch.randint(count, (self.resamples, count), generator=generator)
                ones = torch.ones(self.resamples, count)
                weights[dataset] = torch.zeros(self.resamples, count).scatter_add_(1, drawn, ones)
            total = total + summed_up(self._parts(record, weights[dataset]), self.columns)
        means = total / len(self.records)
        return means[means.isfinite().all(2).all(1)]

    def _parts(self, record: Record, weights: Tensor | None = None) -> Tensor:
        """Accuracies of the parts of a cell, [1, M, P]; with weights of its classes [R, classes], [R, M, P]."""
        found = []
        for part in self.parts:
            home = HOME.get(part, part)
            images = torch.tensor(record["images"][home]).double()
            own = torch.ones(1, len(images)) if weights is None else weights[:, record["classes"][home]]
            right = torch.tensor([record["right"][row][part] for row in self.rows], dtype=torch.float64)
            found.append(100 * (own.double() @ right.T) / (own.double() @ images)[:, None])
        return torch.stack(found, -1)

    def means(self, row: str, *, published: bool = False) -> dict[str, float]:
        """Column -> mean over cells; if published, harmonic means are of the mean accuracies."""
        values = self.values[:, self.rows.index(row)].mean(0)
        if published:
            at = [i for i, (column, of) in enumerate(self.columns.items()) if of == (column,)]
            values = summed_up(values[at], self.columns)
        return self._named(values)

    def spread(self, row: str) -> dict[str, float]:
        """Column -> standard deviation over cells; 0 for one."""
        values = self.values[:, self.rows.index(row)]
        return self._named(values.std(0) if len(values) > 1 else torch.zeros(len(self.columns)))

    def errors(self, row: str) -> dict[str, float]:
        """Column -> standard error from the classes, by bootstrap: what other classes would have changed."""
        return {} if self.drawn is None else self._named(self.drawn[:, self.rows.index(row)].std(0))

    def _named(self, values: Tensor) -> dict[str, Any]:
        return dict(zip(self.columns, values.tolist(), strict=True))

    def differences(self, row: str, reference: str) -> dict[str, Difference]:
        """Column -> a row minus the reference, paired; empty for the reference itself."""
        if reference not in self.rows:
            raise ValueError(f"reference must be one of {', '.join(self.rows)}, got {reference!r}")
        i, at = self.rows.index(row), self.rows.index(reference)
        columns = self._named((self.values[:, i] - self.values[:, at]).T) if i != at else {}
        found = {}
        for c, (column, values) in enumerate(columns.items()):
            by_dataset: dict[str, list[float]] = {}
            for dataset, value in zip(self.datasets, values, strict=True):
                by_dataset.setdefault(dataset, []).append(value)
            classes = None
            if self.drawn is not None:
                drawn = self.drawn[:, i, c] - self.drawn[:, at, c]
                low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
                classes = low, high
            datasets = t_interval([statistics.fmean(own) for own in by_dataset.values()])
            found[column] = Difference(statistics.fmean(values), t_interval(values), datasets, classes)
        return found


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval for a mean; None for fewer than two values."""
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes a second to import

    if len(values) < 2:
        return None
    reach = stdtrit(len(values) - 1, (1 + level) / 2) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach
