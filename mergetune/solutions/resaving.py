"""What is written with a solution: its temperature stays while its tensors stay; notes of many stages are bounded."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

#: Name of the note with the number that the logits of this state are divided by before probabilities are computed.
TEMPERATURE = "temperature"
_ABOUT = ("notes", "backbone", "fingerprint")  # fields of solution.json that do not change the answers


LEVELS = 100  # of objects and lists inside each other that are written; readers allow 256
LEFT_OUT = "left out: earlier stages"


def bounded(value: Any, levels: int = LEVELS) -> Any:
    """A JSON-able value in which everything below so many levels is replaced by a text.

    Every stage of training keeps the notes of the stage before in its own, one level deeper.
    """
    if not isinstance(value, dict | list | tuple) or not value:
        return value
    if not levels:
        return LEFT_OUT
    if isinstance(value, dict):
        return {name: bounded(inner, levels - 1) for name, inner in value.items()}
    return [bounded(inner, levels - 1) for inner in value]


def kept_temperature(there: dict[str, Any], here: dict[str, Any], path: Path) -> dict[str, float]:
    """The note of the temperature in a folder where the same solution is saved again; else empty.

    Another solution loses the temperature, with a warning.

    Args:
        there: ``solution.json`` of the folder, with the checksum of the tensors.
        here: ``solution.json`` that will be written.
        path: the folder, for the warning.
    """
    found = there["notes"].get(TEMPERATURE)
    if isinstance(found, bool) or not isinstance(found, int | float) or not (math.isfinite(found) and found > 0):
        return {}
    was, now = ({k: v for k, v in c.items() if k not in _ABOUT} for c in (there, json.loads(json.dumps(here))))
    if was == now:
        return {TEMPERATURE: found}
    warnings.warn(
        f"the temperature {found:.4g} is removed from {path}: it was fitted for another solution, which is replaced; "
        "`mergetune eval --temperature` fits one for the new solution",
        stacklevel=4,
    )
    return {}
