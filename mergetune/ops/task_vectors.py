"""merge_deltas merges task vectors; count_around counts values around bounds, to find order statistics.

Shapes: K experts, n elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergetune.io import dtype_name
from mergetune.ops import reference
from mergetune.ops.arguments import expect_numbers, expect_shape, real_dtype
from mergetune.ops.backends import check_backend
from mergetune.ops.native import core


def merge_deltas(
    base: Tensor | None,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    limits: Sequence[float] | None = None,
    kept: Tensor | None = None,
    vote: str | None = None,
    votes: Sequence[float] | None = None,
    shares: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Trims task vectors, elects signs and adds the deltas in one pass.

    :func:`mergetune.ops.reference.merge_deltas` is the definition and describes the arguments. The op is not
    differentiable. It runs in the calling thread only: callers use one thread per stretch.

    Args:
        base, experts: stored values, [n] each, in float32, float64, float16 or bfloat16, also mixed.
        backend: "cpp" or "torch" (the definition). None takes the native core on a CPU, and plain torch on a GPU.

    Returns:
        Merged values, [n], in float32, or float64 if an input is float64.
    """
    experts = list(experts)
    if not experts or experts[0].ndim != 1 or not len(experts[0]):
        raise ValueError(f"experts must be tensors [n], at least one, got {[list(t.shape) for t in experts]}")
    backend = _backend(experts[0], backend)
    k, n = len(experts), len(experts[0])
    for name, row in [("base", base), *((f"experts[{i}]", row) for i, row in enumerate(experts))]:
        if row is not None:
            expect_shape(name, row, (n,))
    if vote not in (None, "sum", "count"):
        raise ValueError(f"vote must be None, sum or count, got {vote!r}")
    if vote is None and (votes is not None or shares is not None):
        raise ValueError("votes and shares must be None without a vote, got vote=None: set vote, or leave them out")
    if kept is not None:
        expect_shape("kept", kept, (k, n))
        if kept.dtype != torch.bool:
            raise TypeError(f"kept must be bool, got {kept.dtype}")
    given = {"limits": limits, "weights": weights, "votes": votes, "shares": shares}
    for name, values in given.items():
        if values is not None and len(values) != k:
            raise ValueError(f"{name} must hold one number for each of {k} experts, got {len(values)}")
    dtype, rows = _alike([*experts, *([] if base is None else [base])], kept)
    real, start, rows = real_dtype(rows[0]), None if base is None else rows[k], rows[:k]
    if backend == "torch":
        row = lambda values: None if values is None else experts[0].new_tensor(values, dtype=real)  # noqa: E731
        return reference.merge_deltas(
            None if start is None else start.to(real),
            torch.stack(rows).to(real),
            experts[0].new_tensor(weights, dtype=real),
            scale=scale,
            limits=row(limits),
            kept=kept,
            vote=vote,
            votes=row(votes),
            shares=row(shares),
        )
    if vote is not None and votes is None:
        given["votes"] = [1.0] * k
    numbers = [v if v is None else torch.tensor(v, dtype=torch.float64, device="cpu") for v in given.values()]
    held = [start, kept if kept is None else kept.contiguous(), *numbers]  # referenced while the core runs
    start_at, kept_at, limits_at, weights_at, votes_at, shares_at = (0 if t is None else t.data_ptr() for t in held)
    out = torch.empty(n, dtype=real, device="cpu")
    arguments = (
        start_at, [row.data_ptr() for row in rows], kept_at, limits_at, weights_at, votes_at, shares_at,
        vote == "count", scale, n,
    )  # fmt: skip
    core.merge_deltas_cpu(dtype, arguments, out.data_ptr())
    return out


def count_around(
    values: Tensor, low: float, high: float, *, base: Tensor | None = None, backend: str | None = None
) -> tuple[list[int], Tensor]:
    """Counts of values below, at and between two bounds, in one pass: a step of finding a quantile.

    :func:`mergetune.ops.reference.count_around` is the definition.

    Args:
        values: [n], in the dtypes of :func:`merge_deltas`.
        low, high: the bounds, low <= high.
        base: [n]; if given, the magnitudes of ``values - base`` are counted.
        backend: as in :func:`merge_deltas`.

    Returns:
        Four counts (below ``low``, equal to ``low``, strictly between, equal to ``high``), and the values between.
    """
    backend = _backend(values, backend)
    expect_shape("values", values, (values.numel(),))
    if base is not None:
        expect_shape("base", base, (len(values),))
    if not low <= high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    dtype, rows = _alike([values, *([] if base is None else [base])])
    real = real_dtype(rows[0])
    low, high = torch.tensor([low, high], dtype=real, device="cpu").tolist()  # rounded to the dtype of the values
    if backend == "torch" or not len(values):
        rows = [row.to(real) for row in rows]
        return reference.count_around(rows[0], low, high, base=None if base is None else rows[1])
    between = torch.empty(len(values), dtype=real, device="cpu")
    start = 0 if base is None else rows[1].data_ptr()
    counts = core.count_around_cpu(dtype, rows[0].data_ptr(), start, len(values), low, high, between.data_ptr())
    return counts, between[: counts[2]].clone()


_STORED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _alike(rows: list[Tensor], kept: Tensor | None = None) -> tuple[str, list[Tensor]]:
    """Name of a common dtype, and the rows in it, contiguous and aligned for the native core.

    Rows of different dtypes become float32, or float64 if one of them is float64.
    """
    expect_numbers(["values"] * len(rows) + ["kept"], [*rows, kept])
    if wrong := [row.dtype for row in rows if not row.dtype.is_floating_point]:
        raise TypeError(f"values must be floating point, got {wrong[0]}")
    if len(devices := {str(t.device) for t in (*rows, kept) if t is not None}) > 1:
        raise ValueError(f"all values must be on one device, got {', '.join(sorted(devices))}")
    rows = [row if row.dtype in _STORED else row.float() for row in rows]
    if len({row.dtype for row in rows}) > 1:
        rows = [row.to(max(map(real_dtype, rows), key=lambda dtype: dtype.itemsize)) for row in rows]
    rows = [row.contiguous() for row in rows]
    # Rows of memory-mapped files may be misaligned.
    rows = [row.clone() if row.data_ptr() % row.dtype.itemsize else row for row in rows]
    return dtype_name(rows[0].dtype), rows


def _backend(tensor: Tensor, backend: str | None) -> str:
    """The named backend, after a check; for None the native core on a CPU and plain torch on a GPU."""
    if backend is None:
        return "cpp" if tensor.device.type == "cpu" else "torch"
    check_backend(backend, tensor.device.type, ("cpp", "torch"))
    return backend
