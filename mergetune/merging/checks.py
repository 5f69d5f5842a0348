"""Checks of the arguments of merging methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergetune.merging.methods import Method
from mergetune.merging.sources import StateDict, floating, over_parts, title_of


def check(method: Method, base: StateDict | None, experts: Sequence[StateDict]) -> None:
    """Checks that the arguments are state dicts, as many as a method takes.

    Raises:
        TypeError: an argument is not a state dict.
        ValueError: the base is missing or not allowed, or the number of experts is wrong.
    """
    title = method.name
    if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
        raise TypeError(f"experts must be a list of state dicts, got {type(experts).__name__}")
    for argument, state in [("base", base), *((f"experts[{k}]", e) for k, e in enumerate(experts))]:
        if not isinstance(state, Mapping) and not (state is None and argument == "base"):
            raise TypeError(f"{argument} must be a state dict, got {type(state).__name__}")
    if base is None and method.base:
        raise ValueError(f"{title} needs a base, got None: the method merges differences from the base")
    if base is not None and method.base is False:
        raise ValueError(f"base must be None for {title}, got a state dict")
    if not method.least <= len(experts) <= (method.most or len(experts)):
        rule = f"{method.least}" if method.most == method.least else f"at least {method.least}"
        rule = f"{method.least} to {method.most}" if method.most not in (None, method.least) else rule
        raise ValueError(f"{title} needs {rule} expert(s), got {len(experts)}")


def per_expert(argument: str, values: Sequence[float] | None, count: int, default: float = 1.0) -> list[float]:
    """The values as a list of ``count`` finite floats; None gives ``default`` for every expert."""
    if values is None:
        return [default] * count
    numbers = [float(value) for value in values]
    if len(numbers) != count:
        raise ValueError(f"{argument} must hold one number for each of {count} experts, got {len(numbers)}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{argument} must be finite, got {numbers}")
    return numbers


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """K numbers as a tensor [K, 1, ...] that broadcasts over ``like``, [K, ...]."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def check_choice(argument: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_fraction(argument: str, value: float, *, zero: bool = False) -> None:
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise ValueError(f"{argument} must be in {'[' if zero else '('}0, 1], got {value}")


def check_states(argument: str, states: Sequence[StateDict], experts: Sequence[StateDict]) -> None:
    """Checks for one state dict per expert with the experts' names and finite values; ``Part.of`` checks the shapes."""
    if isinstance(states, Mapping) or len(states) != len(experts):
        raise ValueError(f"{argument} must hold one state dict for each of {len(experts)} experts, got {len(states)}")
    names = floating(experts[0])
    for k, state in enumerate(states):
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"{argument}[{k}] must hold the tensors of the experts, but lacks {missing[0]!r}")
        count = lambda part: (part.name, not_finite(part.stored[0]))  # noqa: E731
        for name, (nans, infinite) in over_parts(count, names, None, [state]):
            if nans or infinite:
                raise ValueError(
                    f"{title_of(f'{argument}[{k}]', state)} must hold finite numbers, got {nans} NaN and {infinite} "
                    f"infinite values in {name!r}"
                )


def not_finite(values: Tensor) -> tuple[int, int]:
    """How many of the values [n] are NaN, and how many are infinite."""
    if values.sum(dtype=torch.float32).isfinite():  # quick, and almost always enough
        return 0, 0
    return int(values.isnan().sum()), int(values.isinf().sum())
