"""Choosing among trained candidates on validation images: a paired comparison in which ties go to the default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergetune.experiments.paired import HM, Estimate, Labels, Right, accuracies, gains
from mergetune.facts import FitOptions
from mergetune.facts.function_options import CHOICE_GRID

MARGIN = 1.0  # standard errors that a candidate must be ahead of the default
LEAST_IMAGES = 10  # validation images of each half, below which nothing is chosen


@dataclass(frozen=True)
class Tried:
    """A candidate on validation images.

    Attributes:
        name: what was tried.
        accuracies: "base", "novel" and "HM" in percent.
        gain: difference to the default's harmonic mean, in points; None for the default.
    """

    name: str
    accuracies: Mapping[str, float]
    gain: Estimate | None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **self.accuracies, "gain": None if self.gain is None else self.gain.to_json()}


@dataclass(frozen=True)
class Choice:
    """What was tried and what was chosen.

    Attributes:
        tried: the candidates, the default first.
        chosen: name of the chosen candidate.
        margin: see :func:`choose`.
    """

    tried: tuple[Tried, ...]
    chosen: str
    margin: float

    @property
    def default(self) -> str:
        return self.tried[0].name

    def to_json(self) -> dict[str, Any]:
        return {
            "tried": [line.to_json() for line in self.tried],
            "default": self.default,
            "chosen": self.chosen,
            "margin": self.margin,
        }


def choose(right: Mapping[str, Right], labels: Labels, *, margin: float = MARGIN) -> Choice:
    """Choose the candidate that is most surely better than the default; without a sure one, choose the default.

    A candidate's lower bound is ``gain - margin * error``: its harmonic mean of base and novel accuracy minus the
    default's, and the paired standard error of this difference (:func:`mergetune.experiments.paired.gains`). The
    candidate with the largest lower bound is chosen if this bound is positive.

    Args:
        right: candidate -> part -> which validation images it classifies correctly; the first candidate is the default.
        labels: class number of each image.
        margin: standard errors; 0 chooses the best mean.
    """
    default = next(iter(right))
    found = {name: gains(answers, right[default], labels)[HM] for name, answers in right.items()}
    bounds = {name: gain.value - margin * gain.error for name, gain in found.items()} | {default: 0.0}
    chosen = max(bounds, key=bounds.__getitem__)  # of equals the first: the default
    tried = tuple(
        Tried(name, accuracies(answers), None if name == default else found[name]) for name, answers in right.items()
    )
    return Choice(tried, chosen, margin)


def settings_to_try(given: Mapping[str, Any]) -> list[dict[str, float]]:
    """Settings of :func:`mergetune.fit` to choose from, its defaults first. Given values are kept in all of them.

    Args:
        given: options of fit that the user set; ``lam`` and ``tau`` among them are not chosen.
    """
    found: list[dict[str, float]] = []
    for lam, tau in CHOICE_GRID:
        setting = {"lam": given.get("lam", lam), "tau": given.get("tau", tau)}
        if setting not in found:
            found.append(setting)
    return found


def default_setting(given: Mapping[str, Any]) -> dict[str, float]:
    """The setting that is used where nothing is chosen."""
    return {name: given.get(name, getattr(FitOptions, name)) for name in ("lam", "tau")}


def setting_name(setting: Mapping[str, float]) -> str:
    """A setting as text: "lam 8, tau 0.3"."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def too_few(labels: Labels) -> str:
    """Why nothing can be chosen on these validation images of base and novel classes; empty if it can."""
    for part, whose in (("base", "the learned half of the classes"), ("novel", "the other half of the classes")):
        if (count := len(labels.get(part, ()))) < LEAST_IMAGES:
            return f"choosing needs at least {LEAST_IMAGES} validation images of {whose}, got {count}"
    return ""
