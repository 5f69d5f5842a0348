"""Ratios kept for a device, and whether a later run is worse: candidate over floor, candidate over baseline.

Both sides of a ratio come from one run on one machine, so that it outlasts the machine's mood; seconds do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIMIT = 0.15
"""A ratio may grow by this part of itself."""

Ratios = dict[str, dict[str, float]]
"""Title -> what it is compared with -> its own time over the other's; smaller is better."""


@dataclass(frozen=True)
class Worse:
    """A ratio beyond the limit."""

    title: str
    other: str
    before: float
    now: float

    def text(self, limit: float) -> str:
        return (
            f"{self.title} / {self.other}: {self.now:.3g}, was {self.before:.3g}; "
            f"at most {self.before * (1 + limit):.3g} is allowed (+{limit:.0%})"
        )


@dataclass(frozen=True)
class Comparison:
    """A run against its baseline.

    Attributes:
        compared: how many ratios both have.
        worse: those beyond the limit.
        missing: "title / other" of the baseline that the run has not measured.
        new: those of the run that the baseline does not know.
    """

    compared: int
    worse: tuple[Worse, ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]


def device_of(machine: Mapping[str, Any]) -> str:
    """The model of what the run used: its GPU, or its CPU and the number of threads."""
    if machine["gpu"]:
        return machine["gpu"]
    cpu = machine["cpu"].get("brand_raw") or machine.get("processor") or "unknown CPU"
    return f"{cpu}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def file_of(folder: Path, device: str) -> Path:
    """Where the baseline of a device is kept."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def ratios_of(infos: Iterable[Mapping[str, Any]]) -> Ratios:
    """The ratios of medians of one run."""
    found: Ratios = {}
    for info in infos:
        own = info["seconds"][info["title"]]
        others = (*info["baselines"], *info["floors"])
        found[info["title"]] = {name: own / info["seconds"][name] for name in others}
    return found


def best_of(runs: Iterable[Ratios]) -> Ratios:
    """Of each ratio the smallest: a run that is repeated is disturbed less or more, but never too fast."""
    found: Ratios = {}
    for run in runs:
        for title, row in run.items():
            best = found.setdefault(title, {})
            for other, ratio in row.items():
                best[other] = min(ratio, best.get(other, ratio))
    return found


def compare(now: Ratios, before: Ratios, limit: float = LIMIT) -> Comparison:
    pairs = [(title, other) for title, row in before.items() for other in row]
    known = {(title, other) for title, row in now.items() for other in row}
    both = [pair for pair in pairs if pair in known]
    every = [Worse(title, other, before[title][other], now[title][other]) for title, other in both]
    return Comparison(
        compared=len(both),
        worse=tuple(one for one in every if not one.now <= one.before * (1 + limit)),  # NaN is worse
        missing=tuple(f"{title} / {other}" for title, other in pairs if (title, other) not in known),
        new=tuple(f"{title} / {other}" for title, other in sorted(known - set(pairs))),
    )


@dataclass(frozen=True)
class Baseline:
    """What a device's file holds: where and when the ratios come from, and the ratios.

    Attributes:
        device: see :func:`device_of`.
        date: of the run.
        torch: its version.
        other_cpus: CPUs that other processes used meanwhile: least and most of all rows; None where it is not known.
        ratios: see :data:`Ratios`.
    """

    device: str
    date: str
    torch: str
    other_cpus: tuple[float, float] | None
    ratios: Ratios

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = file_of(folder, self.device)
        rounded = {title: {other: float(f"{r:.4g}") for other, r in row.items()} for title, row in self.ratios.items()}
        path.write_text(json.dumps(asdict(self) | {"ratios": rounded}, indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Baseline:
        return cls(**json.loads(path.read_text()))
