"""The table of records: means and spread over cells, paired differences with intervals over cells and over classes.

Shapes: N cells, M rows, P parts of the images, R resamples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetune.experiments.engine import HOME, Record
from mergetune.facts.brief import brief

RESAMPLES = 2000
MEANS = {"HM": ("base", "novel"), "joint HM": ("seen", "unseen")}
Interval = tuple[float, float]


@brief()
@dataclass(frozen=True)
class Difference:
    """Difference of a line to the reference, in percentage points, with 95 % intervals.

    Attributes:
        mean: mean over cells.
        cells: paired t interval over cells; None for one cell. Cells of one dataset share test images: with few
            datasets, the interval covers other seeds and partitions, but not other data.
        datasets: t interval over the means of the datasets; None for one dataset.
        classes: percentile bootstrap interval. The classes of each dataset are drawn with replacement, the same draw
            for all cells of the dataset. None if a record has no counts per class.
    """

    mean: float
    cells: Interval | None
    datasets: Interval | None
    classes: Interval | None


@brief()
@dataclass(frozen=True)
class Line:
    """One line of a table; the dicts map columns to percentages.

    Attributes:
        row: name of the tested method.
        values: mean over cells.
        spread: standard deviation over cells; 0 for one cell.
        errors: standard error due to the choice of classes, by bootstrap over classes.
        differences: differences to the reference; empty for the reference.
    """

    row: str
    values: dict[str, float]
    spread: dict[str, float]
    errors: dict[str, float]
    differences: dict[str, Difference]


def lines_of(
    records: Sequence[Record],
    datasets: Sequence[str],
    reference: str,
    *,
    published: bool = False,
    resamples: int = RESAMPLES,
) -> list[Line]:
    """Computes the table of records, one line per row. Rows and parts that a record lacks are left out.

    Each harmonic mean has a column after its two parts: "HM" for the separate label spaces and "joint HM" for the joint
    label space. If there are other parts in addition to "imagenet", their mean has a column, too.

    Args:
        records: records of N cells, with "classes", "images" and "right".
        datasets: name of each cell's dataset; cells of one dataset share its classes.
        reference: the row to which differences are computed.
        published: whether harmonic means are computed from mean accuracies, as in papers; otherwise the harmonic means
            of the cells are averaged.
        resamples: R, number of resamples of the bootstrap over classes.

    Raises:
        ValueError: no row has the name of the reference.
    """
    rows = [row for row in records[0]["right"] if all(row in record["right"] for record in records)]
    if reference not in rows:
        raise ValueError(f"reference must be one of {', '.join(rows)}, got {reference!r}")
    found = [record["right"][row] for record in records for row in rows]
    parts = [part for part in found[0] if all(part in other for other in found)]
    values = torch.stack([_accuracies(record, rows, parts)[0] for record in records])  # [N, M, columns]
    drawn = _bootstrap(records, datasets, rows, parts, resamples)
    columns, lines, at = _columns(parts), [], rows.index(reference)
    for i, row in enumerate(rows):
        mean = values[:, i].mean(0)
        if published:
            mean = _summed_up(mean[[columns.index(part) for part in parts]], parts)
        spread = values[:, i].std(0) if len(records) > 1 else torch.zeros(len(columns))
        differences = {
            column: _difference(
                (values[:, i, c] - values[:, at, c]).tolist(),
                datasets,
                None if drawn is None else drawn[:, i, c] - drawn[:, at, c],
            )
            for c, column in enumerate(columns)
            if i != at
        }
        errors = {} if drawn is None else dict(zip(columns, drawn[:, i].std(0).tolist(), strict=True))
        means, spreads = (dict(zip(columns, numbers.tolist(), strict=True)) for numbers in (mean, spread))
        lines.append(Line(row, means, spreads, errors, differences))
    return lines


def main_column(lines: Sequence[Line]) -> str:
    """Returns the column that compares the rows: "HM", or the first column if there is no "HM"."""
    return "HM" if "HM" in lines[0].values else next(iter(lines[0].values))


def _columns(parts: Sequence[str]) -> list[str]:
    behind = {pair[1]: [name] for name, pair in MEANS.items() if set(pair) <= set(parts)}
    others = ["mean of the others"] if "imagenet" in parts and len(parts) > 1 else []
    return [column for part in parts for column in (part, *behind.get(part, ()))] + others


def _summed_up(values: Tensor, parts: Sequence[str]) -> Tensor:
    """Accuracies of columns, [..., columns], from those of parts, [..., P]."""
    columns, found = _columns(parts), {part: values[..., p] for p, part in enumerate(parts)}
    for name, pair in MEANS.items():
        if name in columns:
            a, b = (found[part] for part in pair)
            found[name] = torch.nan_to_num(2 * a * b / (a + b))
    if columns[-1] not in found:
        found[columns[-1]] = torch.stack([found[part] for part in parts if part != "imagenet"]).mean(0)
    return torch.stack([found[column] for column in columns], -1)


def _accuracies(record: Record, rows: Sequence[str], parts: Sequence[str], weights: Tensor | None = None) -> Tensor:
    """Accuracies in percent, [1, M, columns]; with weights of resampled classes, [R, all classes]: [R, M, columns]."""
    found = []
    for part in parts:
        home = HOME.get(part, part)
        images = torch.tensor(record["images"][home]).double()
        own = (torch.ones(1, len(images)) if weights is None else weights[:, record["classes"][home]]).double()
        right = torch.tensor([record["right"][row][part] for row in rows], dtype=torch.float64)
        found.append(100 * (own @ right.T) / (own @ images)[:, None])
    return _summed_up(torch.stack(found, -1), parts)


def _bootstrap(
    records: Sequence[Record], datasets: Sequence[str], rows: Sequence[str], parts: Sequence[str], resamples: int
) -> Tensor | None:
    """Means over cells for classes that are drawn with replacement per dataset, [R, M, columns].

    Draws that hold no class of some part are left out. The result is None if a record has no counts per class.
    """
    if any(record["classes"] is None for record in records):
        return None
    generator, weights, total = torch.Generator().manual_seed(0), {}, torch.zeros(())
    for record, dataset in zip(records, datasets, strict=True):
        if dataset not in weights:
            count = len({c for own in record["classes"].values() for c in own})
            drawn = torch.randint(count, (resamples, count), generator=generator)
            weights[dataset] = torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count))
        total = total + _accuracies(record, rows, parts, weights[dataset])
    means = total / len(records)
    return means[means.isfinite().all(2).all(1)]


def _difference(values: list[float], datasets: Sequence[str], drawn: Tensor | None) -> Difference:
    by_dataset: dict[str, list[float]] = {}
    for dataset, value in zip(datasets, values, strict=True):
        by_dataset.setdefault(dataset, []).append(value)
    over_datasets = t_interval([statistics.fmean(found) for found in by_dataset.values()])
    classes = None
    if drawn is not None:
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        classes = low, high
    return Difference(statistics.fmean(values), t_interval(values), over_datasets, classes)


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Returns Student's t interval for a mean; None for fewer than two values."""
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes a second to import

    if len(values) < 2:
        return None
    reach = stdtrit(len(values) - 1, (1 + level) / 2) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach
