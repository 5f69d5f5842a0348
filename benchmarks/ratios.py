"""Stored ratios per device (time of candidate over floor or baseline), and the comparison of later runs with them.

Both sides of a ratio come from one run on one machine, so ratios are stable when the load of the machine changes;
seconds are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIMIT = 0.15
"""Largest allowed relative growth of a ratio."""

Ratios = dict[str, dict[str, float]]
"""Title -> name of floor or baseline -> time of the candidate divided by the other time; smaller is better."""


@dataclass(frozen=True)
class Worse:
    """A ratio that has grown beyond the limit."""

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
    """The comparison of a run with the baseline of its device.

    Attributes:
        compared: number of ratios in both.
        worse: ratios beyond the limit.
        missing: "title / other" of ratios in the baseline that the run has not measured.
        new: "title / other" of ratios that are not in the baseline.
    """

    compared: int
    worse: tuple[Worse, ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]


def device_of(machine: Mapping[str, Any]) -> str:
    """Name of the run's device: the model of its GPU, or of its CPU with the number of threads."""
    if machine["gpu"]:
        return machine["gpu"]
    cpu = machine["cpu"].get("brand_raw") or machine.get("processor") or "unknown CPU"
    return f"{cpu}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def file_of(folder: Path, device: str) -> Path:
    """The baseline file of a device."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def ratios_of(infos: Iterable[Mapping[str, Any]]) -> Ratios:
    """The ratios of a run, computed from medians."""
    found: Ratios = {}
    for info in infos:
        own = info["seconds"][info["title"]]
        others = (*info["baselines"], *info["floors"])
        found[info["title"]] = {name: own / info["seconds"][name] for name in others}
    return found


def best_of(runs: Iterable[Ratios]) -> Ratios:
    """The smallest value of each ratio over several runs, because disturbances only slow runs down."""
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
    """Content of a device's baseline file.

    Attributes:
        device: see :func:`device_of`.
        date: date of the run.
        torch: version of torch.
        other_cpus: smallest and largest number of CPUs that other processes used during a row; None if unknown.
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
