"""Attention of packed texts that share a prefix, and its gradients, in Triton.

This file assigns texts to programs. :mod:`mergetune.kernels.prefix_attention_kernels` explains the kernels.
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
    """Number of warps, and tile sizes of query rows, key rows and columns, each a power of two of at least 16."""

    block_q: int
    block_k: int
    block_d: int
    num_warps: int = 4


# (half type, width is a multiple of 16) -> configurations. The first whose tile holds prefix and longest text is used;
# if none does, the last is used, which loops over tiles. All configurations compile without spills (aot.py).
CONFIGS = {
    (True, True): (Config(64, 64, 64), Config(128, 128, 16, num_warps=8), Config(32, 32, 32)),
    (True, False): (Config(64, 64, 16, num_warps=8), Config(16, 32, 16, num_warps=8)),
    (False, True): (Config(64, 64, 16, num_warps=8), Config(16, 32, 16, num_warps=8)),
    (False, False): (Config(32, 32, 16), Config(16, 16, 16)),
}


def configs(width: int, dtype: torch.dtype, *, pooled: bool) -> tuple[Config, ...]:
    """The configurations for one kind of operands. They do not depend on the device, so neither do the bits.

    Args:
        width: width of a head.
        dtype: dtype of the operands.
        pooled: whether only the last token of each text has a query.
    """
    block_d = max(16, triton.next_power_of_2(width))
    fit = lambda c: replace(c, block_q=16 if pooled else c.block_q, block_d=min(c.block_d, block_d))  # noqa: E731
    return tuple(map(fit, CONFIGS[dtype != torch.float32, width % 16 == 0]))


@dataclass(frozen=True, eq=False)
class Plan:
    """Assignment of the texts of a layout to programs, one group of neighbouring texts per program.

    Attributes:
        config: tile sizes.
        whole: whether each group fits one tile.
        groups: number of groups, G.
        bounds: int32 [2, G + 1]: first token of each group, then the number of tokens; first query of each group, then
            the number of queries.
        windows: int32 [2, Q]: first token to which each query attends, and the end of these tokens.
    """

    config: Config
    whole: bool
    groups: int
    bounds: Tensor
    windows: Tensor


@cache  # never dropped (8 bytes per query): a captured CUDA graph may read the tables at any time
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
    """Groups neighbouring texts so that prefix and texts of a group fit the keys of a tile, and the queries fit too.

    Args:
        lengths: tokens of each text.
        prefix: tokens of the prefix.
        width: width of a head.
        dtype, device: of the operands.
        pooled: whether only the last token of each text has a query.
        causal: whether a token attends only to itself and earlier tokens of its text.

    Raises:
        ValueError: no texts, or a text without tokens.
    """
    if min(lengths, default=0) < 1:
        raise ValueError(f"lengths must name at least one text, of at least one token each, got {list(lengths)}")
    *tiles, last = configs(width, dtype, pooled=pooled)
    longest = max(lengths)
    holding = [c for c in tiles if prefix + longest <= c.block_k]  # the queries fit too: their tiles are as large
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
    """Attention in one launch, without a host synchronisation.

    Arguments and result are those of :func:`mergetune.ops.reference.prefix_attention`, in float32, bfloat16 or float16.
    The values of a head must be contiguous; other strides are free. The first call for a layout of texts copies its
    tables to the device; further calls only allocate the result and launch the kernel.
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
    """Gradients with respect to q, k, v, prefix_k and prefix_v, contiguous, in two launches; in one without a prefix.

    ``d_out`` is the gradient with respect to the output; the other arguments are those of :func:`prefix_attention`.
    """
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
    """Memory in which a result is summed: the result itself if float32 or from one tile, else a float32 copy."""
    return result if plan.whole or result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)


def _strides(**tensors: Tensor) -> dict[str, Any]:
    return {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate(("m", "row", "h"))}


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: Sequence[int], causal: bool
) -> tuple[tuple[int], dict[str, Any], Plan]:
    """The launch grid, the arguments of both kernels, and the plan."""
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
    """Compile-time constants of the kernels."""
    return {
        "WHOLE": whole,
        "NARROW": width <= config.block_d,
        "PRECISION": precision(dtype),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "BLOCK_D": config.block_d,
    }
