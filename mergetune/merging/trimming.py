"""Trimming of task vectors: thresholds of magnitude per tensor or over the whole model."""

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
    """Groups of tensor names that are trimmed together: one group if "global", one per tensor if "tensor"."""
    names = [name for name in floating(base) if source(base, name).numel]
    return [names] if scope == "global" and names else [[name] for name in names]


def trim_thresholds(
    base: StateDict, experts: Sequence[StateDict], density: float, scope: str, measure: Callable[[Part], Tensor] | None
) -> dict[str, list[float]]:
    """Thresholds that keep the share ``density`` of the largest values of a measure.

    Args:
        base, experts: the state dicts.
        density: the threshold is the smallest of the ``int(density * elements)`` largest values.
        scope: "global" takes one threshold per expert over all tensors, "tensor" one per expert and tensor.
        measure: function from a part to values [K, n], not negative; None measures the magnitudes of the deltas.

    Returns:
        Name of each tensor -> the K thresholds of the experts.
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
    """Deltas [K, n] in which elements with a magnitude below the expert's threshold are replaced by 0."""
    rows = zip(deltas, _below(thresholds, deltas), strict=True)
    return torch.stack([F.hardshrink(row, limit.item()) for row, limit in rows])


def reach(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """1 where values [K, n] are at least the expert's threshold, else 0; faster on a CPU than a boolean mask."""
    return (values - _below(thresholds, values)[:, None]).relu_().sign_()


def _below(thresholds: Sequence[float], like: Tensor) -> Tensor:
    """The next smaller numbers, [K]: a value above them is at least the threshold."""
    limits = torch.tensor(thresholds, dtype=like.dtype, device=like.device)
    return torch.nextafter(limits, torch.full_like(limits, -math.inf))
