"""The Triton kernels of prefix_attention: forward, backward, and the sum over parts of the prefix's gradient.

The definition is :func:`mergetune.ops.reference.prefix_attention`. Shapes: M prompts, C texts, T packed tokens of the
texts, S rows of the prefix, H heads, D head width; Q queries: T, or C if only the last token of each text has a query.

**Blocks.** The texts are short, so one program computes a *group* of neighbouring texts, for one head and prompt. The
keys of a group are the rows [prefix; texts of the group]. Its scores are one dense tile, masked outside of each query's
window [begin, stop) of packed tokens. The windows alone encode causality and which tokens have queries; they are made
once per layout and stay on the device. A text lies in one group only, so one program computes its gradient. For the
gradient of the prefix each program computes a part, and a second launch adds the parts in a fixed order. No atomics are
used, so the bits are always the same.

If a text is longer than the largest tile, programs loop over query and key tiles. For each query tile, the first loop
computes the statistics of the softmax, and the second loop the results, which are summed in float32 memory that only
this program uses.

**Expected time.** Predicted, not measured, for an H100 and 500 ImageNet names (S 5, T 2206, H 8, D 64, M 1) in
bfloat16. Forward: 9 MB of memory traffic, 3 us at 3 TB/s; 40 groups x 8 heads of 64 x 64 tiles and two products, 0.3
GFLOP, less than 1 us. Backward: 16 MB, 5 us; five products, 0.8 GFLOP. All 320 programs run at the same time (3 per SM,
by the registers of the backward kernel), so the kernel takes as long as one program: table, rows, product, softmax,
product, rows, about 5 us. 8 of 9 scores are masked, which costs nothing: latency and launches limit the time, not
memory or flops.

Sizes are run-time arguments, so one binary serves each dtype, choice of tiles and alignment of the strides. Products of
half types round probabilities and their gradients to that type; all sums and the softmax are float32. A NaN spreads to
the other texts of its tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mergetune.kernels.common import operand

PARTS = tl.constexpr(32)  # parts of the prefix's gradient added per step
ELEMENTS = tl.constexpr(128)  # elements of the prefix's gradient per program


# -- building blocks --------------------------------------------------------------------------------------------------


@triton.jit
def _program(bounds, H, G):
    """(prompt, head, group, first key, end of keys, first query, end of queries) of this program."""
    program = tl.program_id(0)
    group = program // H % G
    at = bounds + group
    ends = tl.load(at), tl.load(at + 1), tl.load(at + G + 1), tl.load(at + G + 2)
    return (program // H // G).to(tl.int64), program % H, group, ends[0], ends[1], ends[2], ends[3]


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32, of operands in b's dtype."""
    return tl.dot(operand(a.to(b.dtype)), operand(b), input_precision=PRECISION)


@triton.jit
def _head(ptr, m, row, h, stride_m, stride_row, stride_h):
    """Pointer to row `row` of a head of a tensor [M, rows, H, D], with a 64-bit offset; later offsets have 32 bits."""
    return ptr + (m * stride_m + tl.cast(row, tl.int64) * stride_row + h * stride_h)


@triton.jit
def _load_rows(rows, inside, width, BLOCK_D: tl.constexpr):
    """Values [rows, BLOCK_D] from the pointers to each row; 0 outside."""
    column = tl.arange(0, BLOCK_D)
    return tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _load_keys(prefix, texts, j, S, keys, width, BLOCK_D: tl.constexpr):
    """Rows j of a group's keys or values; the first S rows are the prefix. Two loads compile better than one."""
    from_prefix = _load_rows(prefix, j < S, width, BLOCK_D)
    from_texts = _load_rows(texts, (j >= S) & (j < keys), width, BLOCK_D)
    return tl.where((j < S)[:, None], from_prefix, from_texts)


@triton.jit
def _store_rows(rows, inside, values, width, BLOCK_D: tl.constexpr):
    """Stores values [rows, BLOCK_D] at the pointers to each row, in the dtype of the memory."""
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(rows[:, None] + column[None, :], values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _add(values, sums, rows, inside, width, first, last, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds values to the float32 `sums` of this program's earlier tiles; after the last tile stores them in `rows`."""
    if WHOLE:
        _store_rows(rows, inside, values, width, BLOCK_D)
    else:
        if not first:
            values += _load_rows(sums, inside, width, BLOCK_D)
        if last:
            _store_rows(rows, inside, values, width, BLOCK_D)
        else:
            _store_rows(sums, inside, values, width, BLOCK_D)


@triton.jit
def _window(windows, query, query_end, key_end, Q):
    """Window [begin, stop) of tokens of each query; rows after the group's queries get all tokens, never none."""
    begin = tl.load(windows + query, mask=query < query_end, other=0)
    return begin, tl.load(windows + Q + query, mask=query < query_end, other=key_end)


@triton.jit
def _products(
    queries, asks, prefix, texts, j, S, keys, D, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of query rows and key rows, [BLOCK_Q, BLOCK_K] in float32."""
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for c in range(0, BLOCK_D if NARROW else D, BLOCK_D):
        own = _load_rows(queries + c, asks, D - c, BLOCK_D)
        total += _dot(own, tl.trans(_load_keys(prefix + c, texts + c, j, S, keys, D - c, BLOCK_D)), PRECISION)
    return total


@triton.jit
def _scores(
    queries, asks, begin, stop, prefix, texts, j, S, keys, key, D, scale, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scaled products of queries and keys; -inf outside of a query's window. Row j >= S is token key + j - S."""
    products = _products(queries, asks, prefix, texts, j, S, keys, D, NARROW, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D)
    token = (key + j - S)[None, :]
    seen = (j < S)[None, :] | ((token >= begin[:, None]) & (token < stop[:, None]))
    return tl.where(seen, products * scale, float("-inf"))


# -- the kernels ------------------------------------------------------------------------------------------------------
#
# WHOLE: every group is one tile. All loops except those over the width then have one step, the compiler knows this, and
# the scores are computed once.


@triton.jit(do_not_specialize=["S", "Q", "H", "G"])
def prefix_attention_kernel(
    q, k, v, prefix_k, prefix_v, out, sums, bounds, windows,
    q_m, q_row, q_h, k_m, k_row, k_h, v_m, v_row, v_h,
    prefix_k_m, prefix_k_row, prefix_k_h, prefix_v_m, prefix_v_row, prefix_v_h,
    S, Q, H, G, D, scale,
    WHOLE: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores out [M, Q, H, D] of one group, head and prompt; sums holds intermediate results in float32."""
    m, h, _, key, key_end, query, query_end = _program(bounds, H, G)
    asking = query_end - query
    keys = S + key_end - key
    row = H * D
    queries = _head(q, m, query, h, q_m, q_row, q_h)
    prefix_keys = _head(prefix_k, m, 0, h, prefix_k_m, prefix_k_row, prefix_k_h)
    prefix_values = _head(prefix_v, m, 0, h, prefix_v_m, prefix_v_row, prefix_v_h)
    text_keys = _head(k, m, key, h, k_m, k_row, k_h)
    text_values = _head(v, m, key, h, v_m, v_row, v_h)
    to = _head(out, m * Q, query, h, row, row, D)
    sums = _head(sums, m * Q, query, h, row, row, D)
    for first in range(0, BLOCK_Q if WHOLE else asking, BLOCK_Q):
        i = first + tl.arange(0, BLOCK_Q)
        asks = i < asking
        begin, stop = _window(windows, query + i, query_end, key_end, Q)
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        for start in range(0, BLOCK_K if WHOLE else keys, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            scores = _scores(
                queries + i * q_row, asks, begin, stop, prefix_keys + j * prefix_k_row, text_keys + (j - S) * k_row,
                j, S, keys, key, D, scale, NARROW, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            new = tl.maximum(peak, tl.max(scores, 1))  # finite, because the first tile has a key for every query
            total = total * tl.exp(peak - new) + tl.sum(tl.exp(scores - new[:, None]), 1)
            peak = new

        for start in range(0, BLOCK_K if WHOLE else keys, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            scores = _scores(
                queries + i * q_row, asks, begin, stop, prefix_keys + j * prefix_k_row, text_keys + (j - S) * k_row,
                j, S, keys, key, D, scale, NARROW, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            weight = tl.exp(scores - peak[:, None])
            for c in range(0, BLOCK_D if NARROW else D, BLOCK_D):
                v_tile = _load_keys(
                    prefix_values + c + j * prefix_v_row, text_values + c + (j - S) * v_row, j, S, keys, D - c, BLOCK_D
                )
                mixed = _dot(weight, v_tile, PRECISION) / total[:, None]
                at = c + i * row
                _add(mixed, sums + at, to + at, asks, D - c, start == 0, start + BLOCK_K >= keys, WHOLE, BLOCK_D)
            if not WHOLE:
                tl.debug_barrier()  # another thread of this program may add to values that this thread stored


@triton.jit(do_not_specialize=["S", "T", "Q", "H", "G"])
def prefix_attention_backward_kernel(
    d_out, q, k, v, prefix_k, prefix_v, d_q, d_k, d_v, sums_q, sums_k, sums_v, parts, bounds, windows,
    d_out_m, d_out_row, d_out_h, q_m, q_row, q_h, k_m, k_row, k_h, v_m, v_row, v_h,
    prefix_k_m, prefix_k_row, prefix_k_h, prefix_v_m, prefix_v_row, prefix_v_h,
    S, T, Q, H, G, D, scale,
    WHOLE: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores d_q [M, Q, H, D], d_k and d_v [M, T, H, D] of one group, head and prompt.

    parts [M, G, 2, S, H, D] gets the group's part of the prefix's gradient. sums_q, sums_k and sums_v hold intermediate
    results in float32.
    """
    m, h, group, key, key_end, query, query_end = _program(bounds, H, G)
    asking = query_end - query
    keys = S + key_end - key
    row = H * D
    queries = _head(q, m, query, h, q_m, q_row, q_h)
    slopes = _head(d_out, m, query, h, d_out_m, d_out_row, d_out_h)
    prefix_keys = _head(prefix_k, m, 0, h, prefix_k_m, prefix_k_row, prefix_k_h)
    prefix_values = _head(prefix_v, m, 0, h, prefix_v_m, prefix_v_row, prefix_v_h)
    text_keys = _head(k, m, key, h, k_m, k_row, k_h)
    text_values = _head(v, m, key, h, v_m, v_row, v_h)
    to_queries = _head(d_q, m * Q, query, h, row, row, D)
    to_keys = _head(d_k, m * T, key, h, row, row, D)
    to_values = _head(d_v, m * T, key, h, row, row, D)
    sums_q = _head(sums_q, m * Q, query, h, row, row, D)
    sums_k = _head(sums_k, m * T, key, h, row, row, D)
    sums_v = _head(sums_v, m * T, key, h, row, row, D)
    part_of_keys = _head(parts, (m * G + group) * 2 * S, 0, h, row, row, D)
    part_of_values = part_of_keys + S * row
    for first in range(0, BLOCK_Q if WHOLE else asking, BLOCK_Q):
        i = first + tl.arange(0, BLOCK_Q)
        asks = i < asking
        begin, stop = _window(windows, query + i, query_end, key_end, Q)
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        mean = tl.zeros([BLOCK_Q], tl.float32)  # mean of d_weight, weighted by weight
        for start in range(0, BLOCK_K if WHOLE else keys, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            scores = _scores(
                queries + i * q_row, asks, begin, stop, prefix_keys + j * prefix_k_row, text_keys + (j - S) * k_row,
                j, S, keys, key, D, scale, NARROW, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            d_weight = _products(
                slopes + i * d_out_row, asks, prefix_values + j * prefix_v_row, text_values + (j - S) * v_row, j, S,
                keys, D, NARROW, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            new = tl.maximum(peak, tl.max(scores, 1))
            weight = tl.exp(scores - new[:, None])
            decay = tl.exp(peak - new)
            total = total * decay + tl.sum(weight, 1)
            mean = mean * decay + tl.sum(weight * d_weight, 1)
            peak = new
        mean = mean / total

        for start in range(0, BLOCK_K if WHOLE else keys, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            scores = _scores(
                queries + i * q_row, asks, begin, stop, prefix_keys + j * prefix_k_row, text_keys + (j - S) * k_row,
                j, S, keys, key, D, scale, NARROW, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            d_weight = _products(
                slopes + i * d_out_row, asks, prefix_values + j * prefix_v_row, text_values + (j - S) * v_row, j, S,
                keys, D, NARROW, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            weight = tl.exp(scores - peak[:, None]) / total[:, None]
            d_scores = weight * (d_weight - mean[:, None])
            weight = tl.trans(weight.to(d_out.dtype.element_ty))  # rounded first, to save half of the memory
            d_scores = d_scores.to(q.dtype.element_ty)
            own = (j >= S) & (j < keys)
            first_q = first == 0
            last_q = first + BLOCK_Q >= asking
            for c in range(0, BLOCK_D if NARROW else D, BLOCK_D):
                q_tile = _load_rows(queries + c + i * q_row, asks, D - c, BLOCK_D)
                slope = _load_rows(slopes + c + i * d_out_row, asks, D - c, BLOCK_D)
                k_tile = _load_keys(
                    prefix_keys + c + j * prefix_k_row, text_keys + c + (j - S) * k_row, j, S, keys, D - c, BLOCK_D
                )
                d_values = _dot(weight, slope, PRECISION)
                d_keys = _dot(tl.trans(d_scores), q_tile, PRECISION) * scale
                d_queries = _dot(d_scores, k_tile, PRECISION) * scale
                at = c + (j - S) * row
                _add(d_values, sums_v + at, to_values + at, own, D - c, first_q, last_q, WHOLE, BLOCK_D)
                _add(d_keys, sums_k + at, to_keys + at, own, D - c, first_q, last_q, WHOLE, BLOCK_D)
                at = part_of_values + c + j * row
                _add(d_values, at, at, j < S, D - c, first_q, last_q, WHOLE, BLOCK_D)
                at = part_of_keys + c + j * row
                _add(d_keys, at, at, j < S, D - c, first_q, last_q, WHOLE, BLOCK_D)
                at = c + i * row
                _add(
                    d_queries, sums_q + at, to_queries + at, asks, D - c, start == 0, start + BLOCK_K >= keys, WHOLE,
                    BLOCK_D,
                )  # fmt: skip
            if not WHOLE:
                tl.debug_barrier()  # another thread of this program may add to values that this thread stored


@triton.jit(do_not_specialize=["size", "G"])
def prefix_gradient_kernel(parts, d_prefix_k, d_prefix_v, size, G):
    """Stores d_prefix_k and d_prefix_v [M, size]: the sums over G of parts [M, G, 2, size], in a fixed order."""
    m = tl.program_id(2).to(tl.int64)
    which = tl.program_id(1)
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    total = tl.zeros([PARTS, ELEMENTS], tl.float32)
    for start in range(0, G, PARTS):
        part = start + tl.arange(0, PARTS)
        at = parts + ((m * G + part) * 2 + which)[:, None] * size + element[None, :]
        total += tl.load(at, mask=(part < G)[:, None] & inside[None, :], other=0.0)
    to = d_prefix_k
    if which == 1:
        to = d_prefix_v
    tl.store(to + m * size + element, tl.sum(total, 0).to(to.dtype.element_ty), mask=inside)
