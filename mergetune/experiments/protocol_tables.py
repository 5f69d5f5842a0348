"""Table and figure of the paper's experiments beside the published figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergetune.evaluation import harmonic_mean
from mergetune.facts.function_options import TUNE_METHODS
from mergetune.io import write_json

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
class Line:
    """A line of the table: means over seeds.

    Attributes:
        protocol: one of ``PROTOCOLS``.
        dataset: the source, or "mean" over several.
        method: stage 1.
        solution: "zero-shot", "tuned", "weight average", "logit ensemble" or "MERGETUNE".
        values: column -> percent.
        spread: column -> standard deviation over seeds, percent; 0 for one seed; empty for means over datasets.
        seeds: number of runs.
    """

    protocol: str
    dataset: str
    method: str
    solution: str
    values: dict[str, float]
    spread: dict[str, float]
    seeds: int

    @property
    def published(self) -> dict[str, float]:
        """The paper's figures, ViT-B/16 over all eleven datasets: of the mean only."""
        return PUBLISHED.get((self.protocol, self.method, self.solution), {}) if self.dataset == "mean" else {}

    def show(self, column: str) -> str:
        """A cell: the mean, and the deviation where there are several seeds."""
        deviation = f" ± {self.spread[column]:.2f}" if self.seeds > 1 and self.spread else ""
        return f"{self.values[column]:.2f}{deviation}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | ({"published": self.published} if self.published else {})


def tabulate(records: Sequence[dict[str, Any]]) -> list[Line]:
    """The table of a protocol from its records: means over seeds, and over datasets where there are several."""
    groups: dict[tuple[str, str], dict[int, dict[str, dict[str, float]]]] = {}
    for record in records:
        run = record["run"]
        by_seed = groups.setdefault((run["source"], run["method"]), {})
        by_solution = by_seed.setdefault(run["seed"], {})
        for target, solutions in record["results"].items():
            column = f"{run['shots']} shots" if run["protocol"] == "few-shot" else target
            for solution, report in solutions.items():
                by_solution.setdefault(solution, {})[column] = report["accuracy"]
    protocol = records[0]["run"]["protocol"]
    lines = [
        _line(protocol, dataset, method, solution, [found[solution] for found in by_seed.values()])
        for (dataset, method), by_seed in groups.items()
        for solution in next(iter(by_seed.values()))
    ]
    several = len({line.dataset for line in lines}) > 1
    return lines + (_means(lines) if several else [])


def _line(protocol: str, dataset: str, method: str, solution: str, runs: list[dict[str, float]]) -> Line:
    values = {column: statistics.fmean(run[column] for run in runs) for column in runs[0]}
    every = [run | _summary(protocol, run) for run in runs]
    values |= _summary(protocol, values)  # HM of the mean accuracies, as published
    spread = {column: statistics.stdev(run[column] for run in every) if len(every) > 1 else 0.0 for column in values}
    return Line(protocol, dataset, method, solution, values, spread, len(runs))


def _summary(protocol: str, values: dict[str, float]) -> dict[str, float]:
    """The columns that are made of others."""
    if protocol == "base-to-novel":
        return {"HM": harmonic_mean(values["base"], values["novel"])}
    others = [value for column, value in values.items() if column != "imagenet"]
    return {} if protocol == "few-shot" or not others else {"mean of the others": statistics.fmean(others)}


def _means(lines: Sequence[Line]) -> list[Line]:
    """Means over the datasets; HM is that of the mean accuracies, as published."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.method, line.solution), []).append(line)
    means = []
    for (method, solution), found in groups.items():
        values = {column: statistics.fmean(line.values[column] for line in found) for column in found[0].values}
        if "HM" in values:
            values["HM"] = harmonic_mean(values["base"], values["novel"])
        means.append(Line(found[0].protocol, "mean", method, solution, values, {}, found[0].seeds))
    return means


def save_table(records: Sequence[dict[str, Any]], folder: Path) -> list[Line]:
    """Write ``table.json`` and ``figure.png`` of a protocol's records into a folder; returns the table."""
    lines = tabulate(records)
    draw(records, folder / "figure.png")
    write_json(folder / "table.json", [line.to_json() for line in lines])
    return lines


def draw(records: Sequence[dict[str, Any]], file: str | Path) -> None:
    """The figure of a protocol.

    base-to-novel: base against novel accuracy, an arrow from tuned to MERGETUNE for each dataset. few-shot: accuracy
    over shots. robust: accuracy on ImageNet against the shifted sets, over the mixing coefficient. Others: bars.
    """
    from matplotlib.figure import Figure  # here, and without pyplot: no display is needed and no state is shared

    lines, protocol = tabulate(records), records[0]["run"]["protocol"]
    methods = list(dict.fromkeys(line.method for line in lines))
    figure = Figure(figsize=(5.2 * len(methods), 4.6), layout="constrained")
    for axis, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        own = [line for line in lines if line.method == method]
        if protocol == "robust":
            _draw_mixes(axis, [record for record in records if record["run"]["method"] == method])
        else:
            {"base-to-novel": _draw_halves, "few-shot": _draw_shots}.get(protocol, _draw_targets)(axis, own)
        axis.set_title(TUNE_METHODS[method])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


_COLORS = {"zero-shot": "#7f7f7f", "tuned": "#7570b3", "MERGETUNE": "#d95f02"}


def _draw_halves(axis: Any, lines: Sequence[Line]) -> None:
    for dataset in dict.fromkeys(line.dataset for line in lines if line.dataset != "mean"):
        at = {line.solution: (line.values["base"], line.values["novel"]) for line in lines if line.dataset == dataset}
        axis.annotate("", at["MERGETUNE"], at["tuned"], arrowprops={"arrowstyle": "->", "color": "#bbbbbb"})
        axis.annotate(dataset, at["MERGETUNE"], fontsize=6)
    for solution, color in _COLORS.items():
        found = [line.values for line in lines if line.solution == solution and line.dataset != "mean"]
        axis.scatter([v["base"] for v in found], [v["novel"] for v in found], color=color, s=16, label=solution)
    axis.set(xlabel="base classes (%)", ylabel="novel classes (%)")


def _draw_shots(axis: Any, lines: Sequence[Line]) -> None:
    of_mean = [line for line in lines if line.dataset == "mean"] or lines
    for line in of_mean:
        if line.solution in _COLORS:
            shots = [int(column.split()[0]) for column in line.values]
            axis.plot(shots, line.values.values(), color=_COLORS[line.solution], marker="o", label=line.solution)
    axis.set(xlabel="images a class", ylabel="accuracy (%)")


def _draw_targets(axis: Any, lines: Sequence[Line]) -> None:
    columns = list(lines[0].values)
    found = [line for line in lines if line.solution in _COLORS]
    for i, line in enumerate(found):
        places = [place + (i - 1) * 0.27 for place in range(len(columns))]
        axis.bar(places, [line.values[c] for c in columns], 0.25, color=_COLORS[line.solution], label=line.solution)
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="accuracy (%)")


def _draw_mixes(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    def curve(target: str, name: str) -> list[float]:
        return [statistics.fmean(values) for values in zip(*(r["mixes"][target][name] for r in records), strict=True)]

    first, *shifted = records[0]["mixes"]
    for name in records[0]["mixes"][first]:
        away = [statistics.fmean(values) for values in zip(*(curve(t, name) for t in shifted), strict=True)]
        axis.plot(curve(first, name), away, marker=".", label=name)
    axis.set(xlabel=f"{first} (%)", ylabel="mean of the shifted test sets (%)")
