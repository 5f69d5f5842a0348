"""Whether an implementation agrees with an op's definition: the tolerances, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mergetune.ops.backends import Implementation, Op

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Error that is always allowed, as a share of the largest value of a result, by the dtype of the arguments."""

SMALLEST = 1e-2
"""Results whose largest value is below this are held to it: with one class the loss is 0, and any rounding is more."""

ROUNDING = 8
"""Times the error of plain torch in the same dtype is allowed on top: other orders of sums round otherwise."""


@dataclass(frozen=True)
class Difference:
    """The result that is farthest from the definition, of those that one call gives.

    Attributes:
        result: its name ("grad").
        error: its largest difference from the definition in float64, as a share of the definition's largest value.
        allowed: what the tolerance allows.
    """

    result: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed  # NaN does not


def compare_with_definition(
    op: Op, implementation: Implementation, arguments: Any, dtype: torch.dtype
) -> Difference | None:
    """How far an implementation is from the definition in float64, and how far it may be.

    Args:
        arguments: the op's, as one object.
        dtype: the dtype of the arguments; the tolerance depends on it.

    Returns:
        None where the definition itself is not finite: no implementation can be judged by that.
    """
    truth, plain = op.truth(arguments), op.results(op.implementations["torch"], arguments)
    if not all(value.isfinite().all() for value in truth.values()):
        return None
    got, found = op.results(implementation, arguments), Difference("", 0.0, TOLERANCES[dtype])
    for name, expected in truth.items():
        if got[name].shape != expected.shape:
            return Difference(name, float("inf"), 0.0)
        if not expected.numel():
            continue
        largest = expected.abs().max().clamp_min(SMALLEST)
        error, own = (((t[name].double() - expected).abs().max() / largest).item() for t in (got, plain))
        difference = Difference(name, error, TOLERANCES[dtype] + ROUNDING * own)
        if not difference.agrees:
            return difference
        found = max(found, difference, key=lambda d: d.error)
    return found
