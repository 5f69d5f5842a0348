"""States: the named tensors of solutions, stacked, mixed and checked.

Shapes: M states computed together, K solutions, B images, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergetune.io import not_plain, require_plain

State = dict[str, Tensor]
"""Tensors by name. A stacked state holds M states: each of its tensors has a leading dimension M."""


def mix(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """``(1 - t) a + t b``, for one number t or for one t per setting, [M]."""
    if isinstance(t, Tensor):
        t = t.to(b).view(-1, *(1,) * (b.ndim - 1))
    return (1 - t) * a + t * b


def weighted_sums(ends: State, shares: Tensor) -> State:
    """Weighted sums of K stacked states with weights [M, K], in float64: far from the ends, weights are large."""
    return {name: torch.tensordot(shares, end.double(), 1).to(end) for name, end in ends.items()}


def stacked(
    state: Mapping[str, Tensor], device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> State:
    """A stacked state that holds this state alone (M = 1)."""
    return {name: tensor.to(device, dtype)[None] for name, tensor in state.items()}


def stack_states(states: Sequence[Mapping[str, Tensor]], device: torch.device | None = None) -> State:
    """Stack M states: each tensor of the result is float32 and has a leading dimension M = ``len(states)``.

    Args:
        states: states with the same names and shapes.
        device: device of the result; None keeps the devices of the tensors.
    """
    return {name: torch.stack([state[name].float().to(device) for state in states]) for name in states[0]}


def inputs(x: Tensor, weights: Tensor) -> Tensor:
    """Features [..., B, D], with a constant 1 appended to each if the class weights hold a bias, [..., C, D + 1]."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if weights.shape[-1] == x.shape[-1] + 1 else x


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the tensor is floating point and finite."""
    require_plain(name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no comparisons
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} NaN or infinite values")


def check_same_shapes(a: Any, b: Any) -> None:
    """Raise ValueError unless the states of two solutions have the same shapes."""
    shapes = [{name: list(tensor.shape) for name, tensor in solution.state().items()} for solution in (a, b)]
    for name in {**shapes[0], **shapes[1]}:
        here, there = (found.get(name) for found in shapes)
        if here != there:
            raise ValueError(f"solutions on one path must have equal shapes, got {here} and {there} for {name}")


def float_copy(name: str, values: Any) -> Tensor:
    """A float32 copy of a tensor or array, all finite."""
    made = None
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            made = torch.from_numpy(values.astype(np.float32))
    elif isinstance(values, Tensor) and values.is_floating_point() and not_plain(values) is None:
        made = values.detach().float().clone()
    if made is not None and made.isfinite().all():
        return made
    if made is not None:
        raise ValueError(f"{name} must be finite, got {int((~made.isfinite()).sum())} NaN or infinite values")
    kind = not_plain(values) if isinstance(values, Tensor) else None
    raise ValueError(f"{name} must be floating point, got {kind or getattr(values, 'dtype', type(values).__name__)}")
