"""Trimming of task vectors: thresholds of magnitude by tensor or over the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.merging.checks import check_choice, check_fraction
from mergetune.merging.order_statistics import order_statistics
from mergetune.merging.sources import Part, StateDict, floating, source

SCOPES = ("global", "tensor")


def scope_groups(base: StateDict, scope: str) -> list[list[str]]:
    """Names of the tensors that are trimmed together."""
    names = [name for name in floating(base) if source(base, name).numel]
    return [names] if scope == "global" and names else [[name] for name in names]


def trim_thresholds(
    base: StateDict, experts: Sequence[StateDict], density: float, scope: str, measure: Callable[[Part], Tensor] | None
) -> dict[str, list[float]]:
    """For each tensor and expert the least of the largest ``int(density * elements)`` values of a measure.

    Args:
        measure: part -> [K, n], not negative; None: the magnitudes of the deltas.
    """
    check_fraction("density", density)
    check_choice("trim", scope, SCOPES)
    found: dict[str, list[float]] = {}
    for group in scope_groups(base, scope):
        total = sum(source(base, name).numel for name in group)
        keep = int(density * total)
        if keep in (0, total):
            thresholds = [0.0 if keep else math.inf] * len(experts)
        else:
            (thresholds,) = order_statistics(measure, group, base, experts, [total - keep])
        found |= dict.fromkeys(group, thresholds)
    return found


def trim(deltas: Tensor, thresholds: Sequence[float]) -> Tensor:
    """[K, n] with 0 in place of what does not reach its expert's threshold in magnitude."""
    rows = zip(deltas, _below(thresholds, deltas), strict=True)
    return torch.stack([F.hardshrink(row, limit.item()) for row, limit in rows])


def reach(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """1 where [K, n] reach their expert's threshold, else 0. By arithmetic, much faster on a CPU than by booleans."""
    return (values - _below(thresholds, values)[:, None]).relu_().sign_()


def _below(thresholds: Sequence[float], like: Tensor) -> Tensor:
    """The next numbers below thresholds, [K]: what is above them reaches the thresholds."""
    limits = torch.tensor(thresholds, dtype=like.dtype, device=like.device)
    return torch.nextafter(limits, torch.full_like(limits, -math.inf))
