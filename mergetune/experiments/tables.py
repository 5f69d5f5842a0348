"""The table of records: means and spread over cells, paired differences with intervals over cells and over classes.

Shapes: N cells, M rows, P parts of the images, R resamples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergetune.experiments.engine import HOME, Record

RESAMPLES = 2000
MEANS = {"HM": ("base", "novel"), "joint HM": ("seen", "unseen")}
Interval = tuple[float, float]


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
    cells: Interval | None
    datasets: Interval | None
    classes: Interval | None


@dataclass(frozen=True)
class Line:
    """A line of a table: column -> percent.

    Attributes:
        row: what was tested.
        values: mean over cells.
        spread: standard deviation over cells; 0 for one.
        errors: standard error from the classes, by bootstrap: what other classes would have changed.
        differences: to the reference; empty for itself.
    """

    row: str
    values: dict[str, float]
    spread: dict[str, float]
    errors: dict[str, float]
    differences: dict[str, Difference]


@dataclass(frozen=True, eq=False)
class Table:
    """Accuracies of rows in cells. Rows and parts that some record lacks are left out.

    The harmonic mean stands behind the two parts that it is of, "HM" in the separate label spaces and "joint HM" in the
    joint one. Parts beside ImageNet have their mean as well.

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
        found = [record["right"][row] for record in self.records for row in self.rows]
        return [part for part in found[0] if all(part in other for other in found)]

    @cached_property
    def columns(self) -> list[str]:
        behind = {pair[1]: [name] for name, pair in MEANS.items() if set(pair) <= set(self.parts)}
        others = ["mean of the others"] if "imagenet" in self.parts and len(self.parts) > 1 else []
        return [column for part in self.parts for column in (part, *behind.get(part, ()))] + others

    @property
    def main(self) -> str:
        """The column that rows are compared in: HM, or the first."""
        return "HM" if "HM" in self.columns else self.columns[0]

    @cached_property
    def values(self) -> Tensor:
        """Accuracies, percent, [N, M, columns]."""
        return torch.stack([self._summed_up(self._accuracies(record)[0]) for record in self.records])

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
            total = total + self._summed_up(self._accuracies(record, weights[dataset]))
        means = total / len(self.records)
        return means[means.isfinite().all(2).all(1)]

    def _accuracies(self, record: Record, weights: Tensor | None = None) -> Tensor:
        """Of the parts of a cell, percent, [1, M, P]; with weights of its classes [R, classes], [R, M, P]."""
        found = []
        for part in self.parts:
            home = HOME.get(part, part)
            images = torch.tensor(record["images"][home]).double()
            own = torch.ones(1, len(images)) if weights is None else weights[:, record["classes"][home]]
            right = torch.tensor([record["right"][row][part] for row in self.rows], dtype=torch.float64)
            found.append(100 * (own.double() @ right.T) / (own.double() @ images)[:, None])
        return torch.stack(found, -1)

    def _summed_up(self, values: Tensor) -> Tensor:
        """Accuracies of parts [..., P] -> of columns [..., columns]."""
        found = {part: values[..., p] for p, part in enumerate(self.parts)}
        for name, pair in MEANS.items():
            if name in self.columns:
                a, b = (found[part] for part in pair)
                found[name] = torch.nan_to_num(2 * a * b / (a + b))
        if (last := self.columns[-1]) not in found:
            found[last] = torch.stack([found[part] for part in self.parts if part != "imagenet"]).mean(0)
        return torch.stack([found[column] for column in self.columns], -1)

    def lines(self, reference: str, *, published: bool = False) -> list[Line]:
        """All rows with their differences to the reference.

        Args:
            reference: one of the rows.
            published: harmonic means are of the mean accuracies, as papers print them; else means over cells.
        """
        if reference not in self.rows:
            raise ValueError(f"reference must be one of {', '.join(self.rows)}, got {reference!r}")
        lines, single = [], len(self.records) == 1
        for i, row in enumerate(self.rows):
            mean = self.values[:, i].mean(0)
            if published:
                mean = self._summed_up(mean[[self.columns.index(part) for part in self.parts]])
            spread = torch.zeros(len(self.columns)) if single else self.values[:, i].std(0)
            errors = torch.empty(0) if self.drawn is None else self.drawn[:, i].std(0)
            values, spread, errors = (
                dict(zip(self.columns, found.tolist(), strict=False)) for found in (mean, spread, errors)
            )
            differences = {} if row == reference else self._differences(i, self.rows.index(reference))
            lines.append(Line(row, values, spread, errors, differences))
        return lines

    def _differences(self, i: int, at: int) -> dict[str, Difference]:
        found = {}
        for c, column in enumerate(self.columns):
            values = (self.values[:, i, c] - self.values[:, at, c]).tolist()
            by_dataset: dict[str, list[float]] = {}
            for dataset, value in zip(self.datasets, values, strict=True):
                by_dataset.setdefault(dataset, []).append(value)
            datasets = t_interval([statistics.fmean(own) for own in by_dataset.values()])
            found[column] = Difference(
                statistics.fmean(values), t_interval(values), datasets, self._ends(i, at, c)
            )
        return found

    def _ends(self, i: int, at: int, c: int) -> Interval | None:
        if self.drawn is None:
            return None
        drawn = self.drawn[:, i, c] - self.drawn[:, at, c]
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        return low, high


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's interval for a mean; None for fewer than two values."""
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes a second to import

    if len(values) < 2:
        return None
    reach = stdtrit(len(values) - 1, (1 + level) / 2) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach
