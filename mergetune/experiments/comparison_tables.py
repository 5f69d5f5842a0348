"""The table of the comparison: paired differences with intervals over cells and over classes."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune.experiments.comparison_cells import REFERENCE, Cell
from mergetune.experiments.comparison_records import Record
from mergetune.io import jsonable, write_atomically, write_json


@dataclass(frozen=True)
class Difference:
    """A line minus the reference, percent; 95 % intervals.

    Attributes:
        mean: over cells.
        cells: t interval over cells, paired; None for one cell. Cells of one dataset share test images: with few
            datasets it tells of seeds and partitions, not of other data.
        datasets: t interval over the datasets' means; None for one dataset.
        classes: percentile bootstrap that draws each dataset's classes with replacement, in all its cells the same.
    """

    mean: float
    cells: tuple[float, float] | None
    datasets: tuple[float, float] | None
    classes: tuple[float, float]


@dataclass(frozen=True)
class ComparedLine:
    """A line of the table.

    Attributes:
        row: method, what it merges, [number of experts].
        values: "base", "novel" and "HM", or "all" -> percent, mean over cells.
        spread: standard deviation over cells; 0 for one.
        errors: standard error from the classes, by bootstrap: what other classes would have changed.
        differences: to the reference; empty for itself.
        data: what is needed beside the experts.
        parameters: numbers that must be kept to classify new class names.
        seconds: to make one candidate, without its experts; mean.
        tried: candidates that were scored on validation images.
        options: the chosen hyper-parameters -> in how many cells.
    """

    row: str
    values: dict[str, float]
    spread: dict[str, float]
    errors: dict[str, float]
    differences: dict[str, Difference]
    data: str
    parameters: int
    seconds: float
    tried: int
    options: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """The table of a comparison.

    Attributes:
        lines: in the order of the table.
        reference: the line that differences are to.
        choose: what hyper-parameters were chosen on.
        cells: the cells.
        left_out: method and number of experts -> why.
    """

    lines: tuple[ComparedLine, ...]
    reference: str
    choose: str
    cells: tuple[Cell, ...]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return jsonable(asdict(self))

    def markdown(self) -> str:
        """The table for a README: accuracies ± standard error, differences of the last column with both intervals."""
        columns = list(self.lines[0].values)
        last = columns[-1]
        head = ["", *columns, f"{last} difference", "over cells", "over classes", "data", "numbers", "s", "chosen"]
        rows = []
        for line in self.lines:
            option, often = next(iter(line.options.items()))
            often = f" ({often} of {len(self.cells)})" if often < len(self.cells) else ""
            difference = line.differences.get(last)
            about = ["0", "", ""]
            if difference:
                about = [f"{difference.mean:+.2f}", *(_interval(i) for i in (difference.cells, difference.classes))]
            cells = [f"{line.values[c]:.1f} ± {line.errors[c]:.1f}" for c in columns]
            cost = [line.data, str(line.parameters), f"{line.seconds:.1f}", option + often]
            title = f"**{line.row}**" if line.row.startswith("MERGETUNE") else line.row
            rows.append([title.replace("[", "(").replace("]", ")"), *cells, *about, *cost])
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write ``comparison.json``, ``comparison.md`` and ``comparison.png``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", self.to_json())
        write_atomically(folder / "comparison.md", self.markdown().encode())
        plot(self, folder / "comparison.png")


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"


def summarise(
    records: Sequence[Record], *, reference: str = REFERENCE, choose: str = "validation", resamples: int = 2000
) -> Comparison:
    """The table of measured cells. Lines that some cell lacks are left out."""
    everywhere = set.intersection(*(set(record["right"]) for record in records))
    rows = [row for row in records[0]["right"] if row in everywhere]
    if reference not in rows:
        raise ValueError(f"reference must be one of {', '.join(rows)}, got {reference!r}")
    values = torch.stack([_values(record, rows) for record in records])  # [cells, rows, columns]
    drawn = _bootstrap(records, rows, resamples)  # [R, rows, columns]
    parts = list(records[0]["images"])
    columns = [*parts, "HM"] if len(parts) == 2 else parts
    tasks = [record["cell"]["task"] for record in records]
    at, lines = rows.index(reference), []
    for i, row in enumerate(rows):
        entries = [entry for record in records for entry in record["candidates"] if entry["row"] == row]
        won = [record["candidates"][record["chosen"][row]] for record in records]
        options = [", ".join(f"{k} {_short(v)}" for k, v in entry["options"].items()) for entry in won]
        deviation = values[:, i].std(0) if len(records) > 1 else torch.zeros(len(columns))
        differences = {
            column: _difference((values[:, i, c] - values[:, at, c]).tolist(), tasks, drawn[:, i, c] - drawn[:, at, c])
            for c, column in enumerate(columns)
            if i != at
        }
        lines.append(
            ComparedLine(
                row=row,
                values=dict(zip(columns, values[:, i].mean(0).tolist(), strict=True)),
                spread=dict(zip(columns, deviation.tolist(), strict=True)),
                errors=dict(zip(columns, drawn[:, i].std(0).tolist(), strict=True)),
                differences=differences,
                data=won[0]["data"],
                parameters=won[0]["parameters"],
                seconds=statistics.fmean(entry["seconds"] for entry in entries),
                tried=len(entries) // len(records),
                options=dict(Counter(options).most_common()),
            )
        )
    left_out = {method: why for record in records for method, why in record["left_out"].items()}
    return Comparison(tuple(lines), reference, choose, tuple(Cell(**r["cell"]) for r in records), left_out)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _values(record: Record, rows: Sequence[str], weights: Tensor | None = None) -> Tensor:
    """Accuracies, percent, [rows, columns]; with weights of resampled classes, [R, all classes], [R, rows, columns]."""
    parts = []
    for part, images in record["images"].items():
        own = torch.ones(1, len(images)) if weights is None else weights[:, record["classes"][part]]
        right = torch.tensor([record["right"][row][part] for row in rows], dtype=torch.float64)
        parts.append(100 * (own.double() @ right.T) / (own.double() @ torch.tensor(images).double())[:, None])
    if len(parts) == 2:
        parts.append(torch.nan_to_num(2 * parts[0] * parts[1] / (parts[0] + parts[1])))
    found = torch.stack(parts, -1)
    return found[0] if weights is None else found


def _bootstrap(records: Sequence[Record], rows: Sequence[str], resamples: int) -> Tensor:
    """Means over cells with each dataset's classes drawn with replacement, [R, rows, columns].

    A draw without any class of some half says nothing about it; its numbers are left out.
    """
    generator, weights, total = torch.Generator().manual_seed(0), {}, torch.zeros(())
    for record in records:
        task, count = record["cell"]["task"], sum(map(len, record["classes"].values()))
        if task not in weights:
            drawn = torch.randint(count, (resamples, count), generator=generator)
            weights[task] = torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count))
        total = total + _values(record, rows, weights[task])
    means = total / len(records)
    return means[means.isfinite().all(2).all(1)]


def _difference(values: list[float], tasks: Sequence[str], drawn: Tensor) -> Difference:
    by_task: dict[str, list[float]] = {}
    for task, value in zip(tasks, values, strict=True):
        by_task.setdefault(task, []).append(value)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    over_tasks = t_interval([statistics.fmean(found) for found in by_task.values()])
    return Difference(statistics.fmean(values), t_interval(values), over_tasks, (low, high))


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval for a mean; None for fewer than two values."""
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes a second to import

    if len(values) < 2:
        return None
    reach = stdtrit(len(values) - 1, (1 + level) / 2) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


def plot(comparison: Comparison, file: str | Path) -> None:
    """Each line's difference to the reference with its class bootstrap interval."""
    from matplotlib.figure import Figure  # here, and without pyplot: no display is needed and no state is shared

    lines, last = comparison.lines, list(comparison.lines[0].values)[-1]
    figure = Figure(figsize=(8, 1.2 + 0.18 * len(lines)), layout="constrained")
    axis = figure.subplots()
    for i, line in enumerate(lines):
        color = "#d95f02" if line.row.startswith("MERGETUNE") else "#555555"
        difference = line.differences.get(last)
        mean, low, high = (0, 0, 0) if difference is None else (difference.mean, *difference.classes)
        axis.plot([low, high], [i, i], color=color, linewidth=1.2)
        axis.plot([mean], [i], "o", color=color, markersize=4)
    axis.axvline(0, color="#bbbbbb", linewidth=1)
    axis.set_yticks(range(len(lines)), [line.row for line in lines], fontsize=7)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlabel(f"{last}, difference to {comparison.reference} (points), 95 % over classes", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
