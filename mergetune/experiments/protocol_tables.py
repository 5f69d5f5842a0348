"""Tables and figures of the paper's experiments, with the published numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mergetune.evaluation.figures import save_figure
from mergetune.experiments.engine import HOME, Record
from mergetune.experiments.tables import Line, lines_of
from mergetune.facts.function_options import COOP_SETTINGS, TUNE_METHODS, FitOptions
from mergetune.io import write_atomically, write_json, writing_in

# MERGETUNE (arXiv 2601.10497), ViT-B/16, means over the eleven datasets: (protocol, method, solution) -> column -> %.
PUBLISHED: dict[tuple[str, str, str], dict[str, float]] = {
    ("base-to-novel", "coop", "zero-shot"): {"HM": 71.70},
    ("base-to-novel", "coop", "tuned"): {"base": 82.69, "novel": 63.22, "HM": 71.66},
    ("base-to-novel", "coop", "MERGETUNE"): {"base": 80.82, "novel": 73.97, "HM": 77.24},
    ("base-to-novel", "kgcoop", "zero-shot"): {"HM": 71.70},
    ("base-to-novel", "kgcoop", "tuned"): {"HM": 77.01},
    ("base-to-novel", "kgcoop", "MERGETUNE"): {"HM": 77.98},
}


@dataclass(frozen=True)
class ProtocolLine(Line):
    """A line of the table: the results of a solution, averaged over seeds. Differences are to MERGETUNE.

    Attributes:
        protocol: one of ``PROTOCOLS``.
        dataset: the training dataset, or "mean" for the mean over several, which has no spread.
        method: method of stage 1.
        seeds: number of seeds.
    """

    protocol: str
    dataset: str
    method: str
    seeds: int

    @property
    def published(self) -> dict[str, float]:
        """The numbers in the paper, for ViT-B/16; only lines of the mean over datasets have them."""
        return PUBLISHED.get((self.protocol, self.method, self.row), {}) if self.dataset == "mean" else {}

    def show(self, column: str) -> str:
        """Returns the text of a cell: the mean, with the standard deviation if there are several seeds."""
        deviation = f" ± {self.spread[column]:.2f}" if self.seeds > 1 and self.spread else ""
        return f"{self.values[column]:.2f}{deviation}"

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return found | {"solution": found.pop("row")} | ({"published": self.published} if self.published else {})


def tabulate(records: Sequence[Record]) -> list[ProtocolLine]:
    """Computes the table of a protocol from its records: means over seeds and, with several datasets, over datasets."""
    cells, protocol = _cells(records), records[0]["run"]["protocol"]
    groups = [(dataset, method, [(dataset, cell) for cell in found]) for (dataset, method), found in cells.items()]
    if len({dataset for dataset, _ in cells}) > 1:
        for name in dict.fromkeys(method for _, method in cells):
            groups.append(("mean", name, [pair for _, method, pairs in groups if method == name for pair in pairs]))
    lines = []
    for dataset, method, pairs in groups:
        datasets, own = zip(*pairs, strict=True)
        seeds = len(own) // len(set(datasets))
        for line in lines_of(own, datasets, "MERGETUNE", published=True):
            line = replace(line, spread={}) if dataset == "mean" else line
            lines.append(ProtocolLine(**vars(line), protocol=protocol, dataset=dataset, method=method, seeds=seeds))
    return lines


def _cells(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """(dataset, method) -> the counts of each seed. The numbers of shots of few-shot are parts of one cell."""
    found: dict[tuple[str, str], dict[int, Record]] = {}
    counts = [record if "right" in record else _of_version_0_1(record) for record in records]
    joint = all(HOME.keys() <= parts.keys() for record in counts for parts in record["right"].values())
    for record in counts:
        run = record["run"]
        by_seed = found.setdefault((run["source"], run["method"]), {})
        cell = by_seed.setdefault(run["seed"], {"classes": {}, "images": {}, "right": {}})
        name = f"{run['shots']} shots" if run["protocol"] == "few-shot" else None
        if record["classes"] is None or cell["classes"] is None:
            cell["classes"] = None
        else:
            cell["classes"] |= {name or part: classes for part, classes in record["classes"].items()}
        cell["images"] |= {name or part: images for part, images in record["images"].items()}
        for row, parts in record["right"].items():
            kept = {name or part: right for part, right in parts.items() if joint or part not in HOME}
            cell["right"].setdefault(row, {}).update(kept)
    return {key: list(by_seed.values()) for key, by_seed in found.items()}


def _of_version_0_1(record: Record) -> Record:
    """A record of version 0.1, which holds accuracies only, with counts of all classes together."""
    right: dict[str, dict[str, list[int]]] = {}
    images = {}
    for part, reports in record["results"].items():
        for row, report in reports.items():
            images[part] = [report["images"]]
            right.setdefault(row, {})[part] = [round(report["accuracy"] * report["images"] / 100)]
    return record | {"classes": None, "images": images, "right": right}


def save_table(records: Sequence[Record], folder: Path) -> list[ProtocolLine]:
    """Write ``table.json``, ``caption.txt`` and ``figure.png`` of a protocol's records; returns the table."""
    lines = tabulate(records)
    with writing_in(folder):
        draw(lines, records, folder / "figure.png")
        write_json(folder / "table.json", [line.to_json() for line in lines])
        write_atomically(folder / "caption.txt", (caption(records) + "\n").encode())
    return lines


def caption(records: Sequence[Record]) -> str:
    """How the runs of a table were trained, in a few sentences."""
    stages: dict[str, dict[str, None]] = {}
    for record in records:
        settings = COOP_SETTINGS | record["settings"]["tune"]
        words = f"{settings['epochs']} epochs, batch {settings['batch_size']}"
        words += f", {settings['n_ctx']} random tokens" if settings.get("n_ctx") else ""
        words = f"read from {record['settings']['checkpoints']}" if record["settings"].get("checkpoints") else words
        stages.setdefault(TUNE_METHODS[record["run"]["method"]], {})[words] = None
    first = "; ".join(f"{title} {' or '.join(words)}" for title, words in stages.items())
    settings = [record["settings"] for record in records]
    epochs = _listed(s["fit"].get("epochs", FitOptions().epochs) for s in settings)
    precision = _listed(s["fit"].get("precision", "auto") for s in settings)
    views = _listed(s.get("views", 1) for s in settings)
    said = (
        f"Stage 1: {first}. Stage 2: {epochs} epochs. Text tower: {precision}. Views per training image: {views}. The "
        "last epoch counts: nothing is chosen on validation images."
    )
    if any("MERGETUNE + WE" in record.get("right", {}) for record in records):
        said += " The weight average (WiSE-FT) and MERGETUNE + WE are means with zero-shot, half and half."
    lacking = {name: words for record in records for name, words in record.get("incomplete", {}).items()}
    if lacking:
        named = "; ".join(f"{name}: {words}" for name, words in lacking.items())
        said += f" Incomplete datasets, whose figures cannot stand beside published ones: {named}."
    return said


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(map(str, sorted(set(values))))


def draw(lines: Sequence[ProtocolLine], records: Sequence[Record], file: Path) -> None:
    """Draws the figure of a protocol.

    The figure of base-to-novel shows base and novel accuracy, with an arrow from tuned to MERGETUNE per dataset. The
    figure of robust shows accuracies on ImageNet and on the shifted test sets for all mixing coefficients. Figures of
    other protocols show the accuracy in each column.
    """
    from matplotlib.figure import Figure  # here, and without pyplot: no display is needed and no state is shared

    protocol = lines[0].protocol
    methods = list(dict.fromkeys(line.method for line in lines))
    figure = Figure(figsize=(5.2 * len(methods), 4.6), layout="constrained")
    for axis, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        own = [line for line in lines if line.method == method]
        if protocol == "robust":
            _draw_mixes(axis, [record for record in records if record["run"]["method"] == method])
        else:
            (_draw_halves if protocol == "base-to-novel" else _draw_columns)(axis, own)
        axis.set_title(TUNE_METHODS[method])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, file)


_COLORS = {"zero-shot": "#7f7f7f", "tuned": "#7570b3", "MERGETUNE": "#d95f02"}


def _draw_halves(axis: Any, lines: Sequence[ProtocolLine]) -> None:
    for dataset in dict.fromkeys(line.dataset for line in lines if line.dataset != "mean"):
        at = {line.row: (line.values["base"], line.values["novel"]) for line in lines if line.dataset == dataset}
        axis.annotate("", at["MERGETUNE"], at["tuned"], arrowprops={"arrowstyle": "->", "color": "#bbbbbb"})
        axis.annotate(dataset, at["MERGETUNE"], fontsize=6)
    for solution, color in _COLORS.items():
        found = [line.values for line in lines if line.row == solution and line.dataset != "mean"]
        axis.scatter([v["base"] for v in found], [v["novel"] for v in found], color=color, s=16, label=solution)
    axis.set(xlabel="base classes (%)", ylabel="novel classes (%)")


def _draw_columns(axis: Any, lines: Sequence[ProtocolLine]) -> None:
    """Draws the accuracy in each column, of the mean over datasets if there is one. Lines join the numbers of shots."""
    joined = "-" if lines[0].protocol == "few-shot" else ""
    for line in [line for line in lines if line.dataset == "mean"] or lines:
        if line.row in _COLORS:
            style = {"color": _COLORS[line.row], "marker": "o", "linestyle": joined, "label": line.row}
            axis.plot(range(len(line.values)), list(line.values.values()), **style)
    axis.set_xticks(range(len(lines[0].values)), list(lines[0].values), rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="accuracy (%)")


def _draw_mixes(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    def curve(target: str, name: str) -> list[float]:
        return [statistics.fmean(values) for values in zip(*(r["mixes"][target][name] for r in records), strict=True)]

    first, *shifted = records[0]["mixes"]
    for name in records[0]["mixes"][first]:
        away = [statistics.fmean(values) for values in zip(*(curve(t, name) for t in shifted), strict=True)]
        axis.plot(curve(first, name), away, marker=".", label=name)
    axis.set(xlabel=f"{first} (%)", ylabel="mean of the shifted test sets (%)")
