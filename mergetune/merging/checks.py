"""Checks of what merging methods are given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergetune.merging.methods import Method
from mergetune.merging.sources import StateDict, floating, source, stretches


def check(method: Method, base: StateDict | None, experts: Sequence[StateDict]) -> list[str]:
    """Refuse what a method cannot merge.

    Returns:
        The names, in the order of the base (of the first expert without one).

    Raises:
        TypeError: something is no state dict, or a tensor is floating point in one and not in another.
        ValueError: base or experts are missing or too many, names or shapes differ, or integers do.
    """
    title = method.name
    if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
        raise TypeError(f"experts must be a list of state dicts, got {type(experts).__name__}")
    for argument, state in [("base", base), *((f"experts[{k}]", e) for k, e in enumerate(experts))]:
        if not isinstance(state, Mapping) and not (state is None and argument == "base"):
            raise TypeError(f"{argument} must be a state dict, got {type(state).__name__}")
    if base is None and method.base:
        raise ValueError(f"{title} needs a base: it merges differences from it, got None")
    if base is not None and method.base is False:
        raise ValueError(f"{title} takes no base: pass None")
    if not method.least <= len(experts) <= (method.most or len(experts)):
        rule = f"{method.least}" if method.most == method.least else f"at least {method.least}"
        rule = f"{method.least} to {method.most}" if method.most not in (None, method.least) else rule
        raise ValueError(f"{title} needs {rule} expert(s), got {len(experts)}")
    reference, title = (base, "base") if base is not None else (experts[0], "experts[0]")
    for k, expert in enumerate(experts):
        if different := sorted(reference.keys() ^ expert.keys()):
            where = "lacks" if different[0] in reference else "holds"
            raise ValueError(
                f"experts[{k}] must hold the tensors of {title}, got {len(different)} other names: it {where} "
                f"{different[0]!r}"
            )
    for name in reference:
        like = source(reference, name)
        if like.dtype.is_complex:
            raise TypeError(f"{title}[{name!r}] must be real, got {like.dtype}")
        for k, expert in enumerate(experts):
            found = source(expert, name)
            if found.shape != like.shape:
                raise ValueError(
                    f"experts[{k}][{name!r}] must have shape {list(like.shape)} as {title} has, got {list(found.shape)}"
                )
            if found.dtype.is_floating_point != like.dtype.is_floating_point:
                raise TypeError(
                    f"experts[{k}][{name!r}] must be {like.dtype} as in {title}, or of its kind, got {found.dtype}"
                )
            if not like.dtype.is_floating_point and not all(
                torch.equal(found.read(a, b).to(like.device, torch.int64), like.read(a, b).long())
                for a, b in stretches(like.numel)
            ):
                raise ValueError(f"experts[{k}][{name!r}] must equal {title}'s: {like.dtype} values cannot be merged")
    return list(reference)


def per_expert(argument: str, values: Sequence[float] | None, count: int, default: float = 1.0) -> list[float]:
    """One finite number for each expert."""
    if values is None:
        return [default] * count
    numbers = [float(value) for value in values]
    if len(numbers) != count:
        raise ValueError(f"{argument} must hold one number for each of {count} experts, got {len(numbers)}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{argument} must be finite, got {numbers}")
    return numbers


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """[K] numbers, shaped to multiply [K, ...]."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def check_choice(argument: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_fraction(argument: str, value: float, *, zero: bool = False) -> None:
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise ValueError(f"{argument} must be in {'[' if zero else '('}0, 1], got {value}")


def check_states(argument: str, states: Sequence[StateDict], experts: Sequence[StateDict]) -> None:
    """Refuse what does not go with the experts: one state dict for each, of the same names (shapes: see Part.of)."""
    if isinstance(states, Mapping) or len(states) != len(experts):
        raise ValueError(f"{argument} must hold one state dict for each of {len(experts)} experts, got {len(states)}")
    for k, state in enumerate(states):
        if missing := [name for name in floating(experts[0]) if name not in state]:
            raise ValueError(f"{argument}[{k}] must hold the experts' tensors, it lacks {missing[0]!r}")
