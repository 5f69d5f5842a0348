"""Comparison of an implementation with the definition of its op: tolerances and measured differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mergetune.ops.backends import Implementation, Op

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Dtype of the arguments -> error that is always allowed, as a share of the largest value of a result."""

SMALLEST = 1e-2
"""Least value that errors are divided by: with one class the loss is 0, and every rounding error would be too large."""

ROUNDING = 8
"""Multiple of plain torch's error in the same dtype that is allowed in addition: sums in another order round
differently."""


@dataclass(frozen=True)
class Difference:
    """The result of a call that differs most from the definition.

    Attributes:
        result: name of the result ("grad").
        error: largest difference from the definition in float64, as a share of the definition's largest value.
        allowed: largest error that the tolerance allows.
    """

    result: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def compare_with_definition(
    op: Op, implementation: Implementation, arguments: Any, dtype: torch.dtype
) -> Difference | None:
    """Compares an implementation with the definition of its op in float64.

    Args:
        op: the op.
        implementation: an implementation of the op.
        arguments: arguments of the op as one object.
        dtype: dtype of the arguments, on which the tolerance depends.

    Returns:
        The first result that differs too much, else the result with the largest error. None if the definition is not
        finite: then the implementation cannot be judged.
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
