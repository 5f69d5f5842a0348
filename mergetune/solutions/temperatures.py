"""The temperature of a solution: the number that its logits are divided by, so that probabilities match accuracies.

The method is temperature scaling (Guo et al. 2017, arXiv 1706.04599). A temperature changes probabilities only: the
order of the classes, and therefore every accuracy, stays the same. Training, paths and merging do not use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import repr as short

from mergetune.solutions.base import Solution
from mergetune.solutions.resaving import TEMPERATURE

LOWEST, HIGHEST = 1e-3, 1e3
"""Temperatures that are accepted: logits divided by them stay finite in float32 and differ."""


def temperature_of(solution: Solution | str | Sequence[str]) -> float:
    """The number that the logits of a solution are divided by before softmax or sigmoid.

    Args:
        solution: a solution; or zero-shot templates, whose temperature is 1.

    Returns:
        The temperature in the notes of the solution; 1.0 if the notes hold none.

    Raises:
        ValueError: the notes hold something else than a number from 1e-3 to 1e3.

    Example:
        >>> import mergetune as mt, torch
        >>> from mergetune.solutions import temperature_of, with_temperature
        >>> head = mt.Head(torch.eye(2), ("cat", "dog"))
        >>> temperature_of(head), temperature_of(with_temperature(head, 1.5))
        (1.0, 1.5)
    """
    value = solution.notes.get(TEMPERATURE, 1.0) if isinstance(solution, Solution) else 1.0
    return _checked("the temperature in the solution's notes", value)


def with_temperature(solution: Solution, t: float) -> Solution:
    """A copy of the solution that holds a temperature in its notes; the tensors are the same.

    Args:
        solution: a solution of any kind.
        t: the temperature, above 0. A larger temperature gives less certain probabilities.

    Raises:
        ValueError: t is not a number from 1e-3 to 1e3.

    Example:
        >>> import mergetune as mt, torch
        >>> mt.with_temperature(mt.Head(torch.eye(2), ("cat", "dog")), 1.5).notes
        {'temperature': 1.5}
    """
    return solution.with_state(solution.state(), notes={**solution.notes, TEMPERATURE: _checked("t", t)})


def _checked(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not LOWEST <= value <= HIGHEST:
        raise ValueError(f"{name} must be a finite number above 0, from {LOWEST:g} to {HIGHEST:g}, got {short(value)}")
    return float(value)
