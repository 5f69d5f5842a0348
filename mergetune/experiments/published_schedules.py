"""How the publications train stage 1, as data: settings of mergetune.tune by protocol, method, dataset and shots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """The published settings of some runs.

    Attributes:
        method: stage 1.
        settings: keyword arguments of :func:`mergetune.tune`.
        source: where they are published.
        protocols, datasets, shots: the runs that the settings are for; empty means all.
    """

    method: str
    settings: Mapping[str, Any] = field(hash=False)
    source: str
    protocols: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    shots: tuple[int | None, ...] = ()

    def serves(self, protocol: str, method: str, dataset: str, shots: int | None) -> bool:
        """Whether the settings are those of a run."""
        wanted = ((self.protocols, protocol), (self.datasets, dataset), (self.shots, shots))
        return method == self.method and all(value in allowed or not allowed for allowed, value in wanted)


COOP = "CoOp, arXiv 2109.01134"
RANDOM_16 = {"n_ctx": 16, "batch_size": 32}  # CoOp's few-shot prompts start from 16 random tokens
SCHEDULES = (
    Schedule("coop", {**RANDOM_16, "epochs": 50}, COOP, ("few-shot",), ("imagenet",)),
    Schedule("coop", {**RANDOM_16, "epochs": 50}, COOP, ("few-shot",), shots=(1,)),
    Schedule("coop", {**RANDOM_16, "epochs": 100}, COOP, ("few-shot",), shots=(2, 4)),
    Schedule("coop", {**RANDOM_16, "epochs": 200}, COOP, ("few-shot",)),
    Schedule("coop", {"epochs": 50, "batch_size": 32}, "CoCoOp, arXiv 2203.05557", datasets=("imagenet",)),
    Schedule("coop", {"epochs": 200, "batch_size": 32}, "CoCoOp, arXiv 2203.05557", ("base-to-novel",)),
    Schedule("kgcoop", {"epochs": 100, "batch_size": 128}, "KgCoOp, arXiv 2303.13283"),
)
"""The first one that serves a run counts. MERGETUNE's official code trains its stage 1 of CoOp for 100 epochs."""


def schedule(protocol: str, method: str, dataset: str, shots: int | None) -> dict[str, Any]:
    """Returns the published settings of a run's stage 1; empty for heads, which take the defaults of tune."""
    return next((dict(found.settings) for found in SCHEDULES if found.serves(protocol, method, dataset, shots)), {})
