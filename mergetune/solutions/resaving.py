"""Saving over a saved solution: its temperature belongs to its tensors, and stays while they stay."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

#: Name of the note with the number that the logits of this state are divided by before probabilities are computed.
TEMPERATURE = "temperature"
_ABOUT = ("notes", "backbone", "fingerprint")  # fields of solution.json that do not change the answers


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
