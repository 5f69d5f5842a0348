"""Temperatures: one number per solution that its logits are divided by, so that probabilities match accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergetune.solutions import Solution

TEMPERATURE = "temperature"  # the note with the number


def temperature_of(solution: Solution | str | Sequence[str]) -> float:
    """The number that the logits of a solution are divided by before softmax or sigmoid.

    Args:
        solution: a solution; or zero-shot templates, whose temperature is 1.

    Returns:
        The temperature in the notes of the solution; 1.0 if the notes hold none.

    Raises:
        ValueError: the notes hold something that is not a finite number above 0.
    """
    value = solution.notes.get(TEMPERATURE, 1.0) if isinstance(solution, Solution) else 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"the temperature in the solution's notes must be a finite number above 0, got {value!r}")
    return float(value)
