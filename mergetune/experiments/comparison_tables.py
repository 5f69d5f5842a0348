"""The table of a comparison: one line per method, with costs and differences to the reference, and its figure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergetune.evaluation.figures import save_figure, shown
from mergetune.experiments.cells import Cell
from mergetune.experiments.engine import Record
from mergetune.experiments.tables import RESAMPLES, Interval, Line, lines_of, main_column
from mergetune.facts import CompareOptions
from mergetune.facts.brief import brief
from mergetune.io import jsonable, write_atomically, write_json, writing_in

REFERENCE = "MERGETUNE, chosen [1]"


@dataclass(frozen=True)
class ComparedLine(Line):
    """A line of the table, with the costs of its method.

    The columns are "base", "novel", "HM", "seen", "unseen" and "joint HM"; or "all" where classes are not divided.

    Attributes:
        data: data that the method needs in addition to the experts.
        parameters: number of values that must be stored to classify new class names.
        seconds: mean time to make one candidate, without the time for its experts.
        tried: number of candidates that were scored on validation images, per cell.
        options: chosen hyper-parameters -> number of cells in which they were chosen.
    """

    data: str
    parameters: int
    seconds: float
    tried: int
    options: dict[str, int]


@brief()
@dataclass(frozen=True)
class Comparison:
    """The table of a comparison.

    Attributes:
        lines: the lines in the order of the table.
        reference: the row to which differences are computed.
        choose, select: images and classes on which hyper-parameters were chosen, see
            :class:`mergetune.facts.CompareOptions`.
        cells: the cells.
        left_out: method and number of experts -> reason why it was not tested.
        main: the column that compares the lines.
        precision: precision of the text tower in MERGETUNE's training.
    """

    lines: tuple[ComparedLine, ...]
    reference: str
    choose: str
    select: str
    cells: tuple[Cell, ...]
    left_out: dict[str, str]
    main: str
    precision: str = "auto"

    def to_json(self) -> dict[str, Any]:
        return jsonable(asdict(self)) | {"caption": self.caption()}

    def caption(self) -> str:
        """What the differences are, what hyper-parameters were chosen on, and the precision, in four sentences."""
        classes = {"base": "the base classes: no label of a novel class was used"}
        classes["both"] = "base and novel classes (harmonic mean): labels of novel classes were used"
        on = "all classes" if self.main == "all" else classes[self.select]
        whose = "other datasets" if self.choose == "others" else "the same cell"
        return (
            f"Differences are in {self.main} to {self.reference!r}, over {len(self.cells)} cells. Hyper-parameters "
            f"were chosen on validation images of {whose}, of {on}. Nothing was chosen on test images. "
            f"Text tower in training: {self.precision}."
        )

    def markdown(self) -> str:
        """Returns the table in Markdown, with its caption: accuracies ± standard errors, and differences.

        Each difference has its intervals over cells and over classes.
        """
        columns, main = list(self.lines[0].values), self.main
        head = ["", *columns, f"{main} difference", "over cells", "over classes", "data", "numbers", "s", "chosen"]
        rows = []
        for line in self.lines:
            option, often = next(iter(line.options.items()))
            often = f" ({often} of {len(self.cells)})" if often < len(self.cells) else ""
            about = ["0", "", ""]
            if difference := line.differences.get(main):
                about = [f"{difference.mean:+.2f}", *(_interval(i) for i in (difference.cells, difference.classes))]
            cells = [f"{line.values[c]:.1f} ± {line.errors[c]:.1f}" for c in columns]
            cost = [line.data, str(line.parameters), f"{line.seconds:.1f}", option + often]
            title = f"**{line.row}**" if line.row.startswith("MERGETUNE") else line.row
            rows.append([title.replace("[", "(").replace("]", ")"), *cells, *about, *cost])
        table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
        return f"{table}\n\n{self.caption()}\n"

    def save(self, folder: str | Path) -> None:
        """Writes ``comparison.json``, ``comparison.md`` and ``comparison.png`` into a folder."""
        folder = Path(folder)
        with writing_in(folder):
            write_json(folder / "comparison.json", self.to_json())
            write_atomically(folder / "comparison.md", self.markdown().encode())
            plot(self, folder / "comparison.png")


def _interval(ends: Interval | None) -> str:
    return "" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"


def summarise(
    records: Sequence[Record],
    *,
    reference: str = REFERENCE,
    choose: str = CompareOptions.choose,
    select: str = CompareOptions.select,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Computes the table from the records of measured cells. Rows that a cell lacks are left out."""
    lines, tasks = [], [record["cell"]["task"] for record in records]
    for line in lines_of(records, tasks, reference, resamples=resamples):
        entries = [entry for record in records for entry in record["candidates"] if entry["row"] == line.row]
        won = [record["candidates"][record["chosen"][line.row]] for record in records]
        options = [", ".join(f"{k} {_short(v)}" for k, v in entry["options"].items()) for entry in won]
        lines.append(
            ComparedLine(
                **vars(line),
                data=won[0]["data"],
                parameters=won[0]["parameters"],
                seconds=statistics.fmean(entry["seconds"] for entry in entries),
                tried=len(entries) // len(records),
                options=dict(Counter(options).most_common()),
            )
        )
    left_out = {method: why for record in records for method, why in record["left_out"].items()}
    cells = tuple(Cell(**record["cell"]) for record in records)
    trained = [record.get("settings", {}).get("fit", {}) for record in records]
    precision = " or ".join(sorted({options.get("precision", "auto") for options in trained}))
    return Comparison(tuple(lines), reference, choose, select, cells, left_out, main_column(lines), precision)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(comparison: Comparison, file: str | Path) -> None:
    """Draws the difference of each line to the reference, with the bootstrap interval over classes."""
    from matplotlib.figure import Figure  # here, and without pyplot: no display is needed and no state is shared

    lines, main = comparison.lines, comparison.main
    figure = Figure(figsize=(8, 1.2 + 0.18 * len(lines)), layout="constrained")
    axis = figure.subplots()
    for i, line in enumerate(lines):
        color = "#d95f02" if line.row.startswith("MERGETUNE") else "#555555"
        difference = line.differences.get(main)
        mean, ends = (difference.mean, difference.classes) if difference else (0.0, None)
        axis.plot(ends or (mean, mean), [i, i], color=color, linewidth=1.2)
        axis.plot([mean], [i], "o", color=color, markersize=4)
    axis.axvline(0, color="#bbbbbb", linewidth=1)
    axis.set_yticks(range(len(lines)), [shown(line.row) for line in lines], fontsize=7)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlabel(f"{main}, difference to {shown(comparison.reference)} (points), 95 % over classes", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    save_figure(figure, file)
