"""Attention of packed texts behind a shared prefix, and its gradients, in Triton.

How it goes: :mod:`mergetune.kernels.prefix_attention_kernels`. Here the texts are shared out to programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from mergetune.kernels.common import MAX_REGISTERS, precision
from mergetune.kernels.prefix_attention_kernels import (
    ELEMENTS,
    prefix_attention_backward_kernel,
    prefix_attention_kernel,
    prefix_gradient_kernel,
)
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tile sizes, each a power of two of at least 16: query rows, key rows, columns at a time; and warps."""

    block_q: int
    block_k: int
    block_d: int
    num_warps: int = 4


# By (half type, width a multiple of 16): the first that holds prefix and longest text is taken; the last, which goes
# over tiles, for what none of the others holds. All of them compile without spills (aot.py).
CONFIGS = {
    (True, True): (Config(64, 64, 64), Config(128, 128, 16, num_warps=8), Config(32, 32, 32)),
    (True, False): (Config(64, 64, 16, num_warps=8), Config(16, 32, 16, num_warps=8)),
    (False, True): (Config(64, 64, 16, num_warps=8), Config(16, 32, 16, num_warps=8)),
    (False, False): (Config(32, 32, 16), Config(16, 16, 16)),
}


def configs(width: int, dtype: torch.dtype, *, pooled: bool) -> tuple[Config, ...]:
    """Those for one kind of operands; they depend on nothing else, so that the bits do not depend on the device."""
    block_d = max(16, triton.next_power_of_2(width))
    fit = lambda c: replace(c, block_q=16 if pooled else c.block_q, block_d=min(c.block_d, block_d))  # noqa: E731
    return tuple(map(fit, CONFIGS[dtype != torch.float32, width % 16 == 0]))


@dataclass(frozen=True, eq=False)
class Plan:
    """How the texts of a layout are shared out to programs.

    Attributes:
        config: the tile sizes.
        whole: whether each group is one tile.
        groups: G.
        bounds: first token of each group and the end; first query of each and the end; int32 [2, G + 1].
        windows: first token that each query sees; the end of those; int32 [2, Q].
    """

    config: Config
    whole: bool
    groups: int
    bounds: Tensor
    windows: Tensor


@cache  # for good, 8 bytes a query: a captured CUDA graph may read the tables again at any time
def make_plan(
    lengths: tuple[int, ...],
    prefix: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    pooled: bool,
    causal: bool,
) -> Plan:
    """Neighbouring texts in groups of at most a tile's keys, prefix included, and a tile's queries."""
    if min(lengths, default=0) < 1:
        raise ValueError(f"lengths must name at least one text, of at least one token each, got {list(lengths)}")
    *tiles, last = configs(width, dtype, pooled=pooled)
    longest = max(lengths)
    holding = [c for c in tiles if prefix + longest <= c.block_k]  # and the queries: their tiles are as large
    config = holding[0] if holding else last

    group_tokens, group_queries, begins, stops, token = [], [], [], [], 0
    for length in lengths:
        asking = 1 if pooled else length
        tokens_fit = group_tokens and prefix + token + length - group_tokens[-1] <= config.block_k
        if not tokens_fit or len(begins) + asking - group_queries[-1] > config.block_q:
            group_tokens.append(token)
            group_queries.append(len(begins))
        begins += [token] * asking
        token += length
        stops += [token] * asking if pooled or not causal else range(token - length + 1, token + 1)
    bounds = [*group_tokens, token], [*group_queries, len(begins)]
    table = lambda rows: torch.tensor(rows, dtype=torch.int32, device=device)  # noqa: E731
    return Plan(config, bool(holding), len(group_tokens), table(bounds), table([begins, stops]))


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: Sequence[int], causal: bool
) -> Tensor:
    """One launch, without a host synchronisation; the first call of a layout copies its tables to the device.

    Beside the launch there are only allocations. Arguments and result are those of the definition, in float32, bfloat16
    or float16, with any strides but that the values of a head lie side by side.
    """
    grid, arguments, plan = _prepare(q, k, v, prefix_k, prefix_v, lengths, causal)
    out = q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        prefix_attention_kernel[grid](**arguments, out=out, sums=_sums(out, plan))
    return out


def prefix_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lengths: Sequence[int],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v, prefix_k and prefix_v, contiguous, in two launches; in one if there is no prefix."""
    grid, arguments, plan = _prepare(q, k, v, prefix_k, prefix_v, lengths, causal)
    d_q, d_k, d_v, d_prefix_k, d_prefix_v = (t.new_empty(t.shape) for t in (q, k, v, prefix_k, prefix_v))
    prompts, size = len(q), prefix_k[0].numel()
    parts = q.new_empty(prompts, plan.groups, 2, size, dtype=torch.float32)
    with torch.cuda.device_of(q):
        prefix_attention_backward_kernel[grid](
            **arguments,
            **_strides(d_out=d_out),
            d_out=d_out,
            d_q=d_q,
            d_k=d_k,
            d_v=d_v,
            sums_q=_sums(d_q, plan),
            sums_k=_sums(d_k, plan),
            sums_v=_sums(d_v, plan),
            parts=parts,
            T=k.shape[1],
        )
        if size:
            blocks = triton.cdiv(size, ELEMENTS.value)
            prefix_gradient_kernel[blocks, 2, prompts](parts, d_prefix_k, d_prefix_v, size, plan.groups)
    return d_q, d_k, d_v, d_prefix_k, d_prefix_v


def _sums(result: Tensor, plan: Plan) -> Tensor:
    """Where a result is summed up: in itself, if it is float32 or comes from one tile."""
    return result if plan.whole or result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)


def _strides(**tensors: Tensor) -> dict[str, Any]:
    return {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate(("m", "row", "h"))}


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: Sequence[int], causal: bool
) -> tuple[tuple[int], dict[str, Any], Plan]:
    """The grid and what both kernels take."""
    if not q.numel():
        raise ValueError(f"q must have shape [M, T, H, d] without a 0, got {list(q.shape)}")
    prompts, queries, heads, width = q.shape
    prefix, pooled = prefix_k.shape[1], queries != k.shape[1]
    plan = make_plan(tuple(lengths), prefix, width, q.dtype, q.device, pooled=pooled, causal=causal)
    tensors = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    arguments = {
        **tensors,
        **_strides(**tensors),
        "bounds": plan.bounds,
        "windows": plan.windows,
        "S": prefix,
        "Q": queries,
        "H": heads,
        "G": plan.groups,
        "D": width,
        "scale": width**-0.5,
        **constants(plan.config, width, q.dtype, whole=plan.whole),
        "num_warps": plan.config.num_warps,
        "num_stages": 1,
        "maxnreg": MAX_REGISTERS,
    }
    return (prompts * plan.groups * heads,), arguments, plan


def constants(config: Config, width: int, dtype: torch.dtype, *, whole: bool) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "WHOLE": whole,
        "NARROW": width <= config.block_d,
        "PRECISION": precision(dtype),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "BLOCK_D": config.block_d,
    }
