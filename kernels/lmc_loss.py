"""The LMC objective and its gradient in one Triton launch; the definition is :func:`mergetune.ops.reference.lmc_loss`.

Shapes: B rows (images), C classes, D embedding width, K anchors, N points on a path; E = K + 1 ends: w, then the
anchors; P = 1 + K N points: the endpoint w, then N a path. Row blocks hold BLOCK_B rows, class tiles BLOCK_C classes,
strips STRIP_C classes.

**Two passes, one launch.** A softmax needs its whole row before the gradient can begin, and the gradient to w needs all
rows: two dependencies across the grid. Programs therefore draw *jobs* from a ticket counter, in this order,

    class sums        a strip       squared norms of the ends, their products with w, the surrogate
    tile statistics   a row block,  pass 1: of every point, largest logit and sum of exponentials
                      some tiles
    row statistics    a row block   the statistics of its tiles merged; cross-entropies
    gradient tile     a class tile, pass 2: logits again, coefficients of x, their product with x
                      row blocks
    totals            -             loss and terms
    finish            a strip       partial gradients added in order; norms' and surrogate's gradient; cast

and a job waits only for jobs drawn before its own. Those have begun, and the first kind never waits: so there is no
deadlock however many programs the device holds at once, and neither a cooperative launch nor an order of programs is
assumed.

**What is shared.** All points of all paths come from the E products with the ends, since x.(a + t(w - a)) =
(1-t) x.a + t x.w, and |a + t(w - a)|^2 is a quadratic in t. All points fold into one coefficient tile before the last
product. Both passes make the products anew: memory is O(groups P B + slabs C D), never [B, C], let alone [N, B, C].

**What bounds it.** Predicted, not measured, for an H100 with B 256, C 500, D 512, N 8, K 2 in bfloat16. The E products
twice and the last one: 7 * 2 B C D = 0.92 GFLOP, 2 us at the 400 TFLOP/s that such small tiles may reach. Exponentials:
2 P B C = 4.4 M, 1 us. From and to memory 2.8 MB (x, w, anchors, w1, gradient), 1 us at 3 TB/s; but tiles read their
operands again from L2, about 50 MB in all, and partial gradients are written and read once there, 16 MB: together some
12 us at 5.5 TB/s. Five waits of 1-2 us each. So 15-25 us: neither bytes from memory nor flops, but L2 and latency, and
at this size the host's own launch overhead is of the same order.
"""

# In the kernels below Triton's tensors have operators that its annotations do not name: a reduction "returns" a tuple.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CLASS_GROUPS = 16  # parts that pass 1 may split a row's classes into; a power of two
PARALLEL_JOBS = 256  # what each pass is split into, if it can be; fixed, so that the bits do not depend on the device

MAX_REGISTERS = 255  # all that a thread can have: left alone, ptxas may prefer to spill for a higher occupancy

_MIN_SQUARED_NORM = tl.constexpr(1e-24)  # the square of F.normalize's floor
_STRIP_C = tl.constexpr(4)  # element-wise jobs: few classes, wide rows, one memory latency for D <= 512
_STRIP_D = tl.constexpr(512)
_PAIRS = tl.constexpr(128)  # (point, row) pairs merged at a time
_GROUPS = tl.constexpr(MAX_CLASS_GROUPS)

# Slots of the counters: the next ticket, then how many jobs of each kind are done.
_TICKET, _NORMS, _SURROGATES, _TILES, _ROWS, _SLABS, COUNTERS = (tl.constexpr(i) for i in range(7))


# -- between programs -------------------------------------------------------------------------------------------------


@triton.jit
def _signal(counter):
    """Publishes what this program has written: all its threads have, then one releases."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _wait(counter, count):
    """Until `count` jobs have signalled; what they wrote is visible after it."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


INTERPRETED = not isinstance(_signal, triton.runtime.JITFunction)
_WIDEN = tl.constexpr(INTERPRETED)  # Triton's interpreter would multiply the bit patterns of bfloat16


# -- building blocks --------------------------------------------------------------------------------------------------


@triton.jit
def _load(ptr, row, rows, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a matrix [rows, columns] from (row, column) on; 0 outside.

    64 bits for where the tile begins, 32 within it: an offset an element is what fills the registers.
    """
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = (r < rows - row)[:, None] & (c < columns - column)[None, :]
    begin = ptr + (tl.cast(row, tl.int64) * columns + column)
    return tl.load(begin + (r[:, None] * columns + c[None, :]), mask=inside, other=0.0)


@triton.jit
def _anchor(anchors, k, C, D):
    """Anchor k of [K, C, D]."""
    return anchors + tl.cast(k, tl.int64) * C * D


@triton.jit
def _products(
    x, row, B, end, c, C, D,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x @ end.T for a row block and a class tile, [BLOCK_B, BLOCK_C] in float32."""
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for d in range(0, D, BLOCK_D):
        x_tile = _load(x, row, B, d, D, BLOCK_B, BLOCK_D)
        end_tile = _load(end, c, C, d, D, BLOCK_C, BLOCK_D)
        if _WIDEN:
            x_tile = x_tile.to(tl.float32)
            end_tile = end_tile.to(tl.float32)
        total = tl.dot(x_tile, tl.trans(end_tile), total, input_precision=PRECISION)
    return total


@triton.jit
def _anchor_products(
    x, row, B, anchors, anchor_dots, k, c, C, D,
    KNOWN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The products with anchor k: read where the caller has them (they never change), else made."""
    if KNOWN:
        return _load(anchor_dots + tl.cast(k, tl.int64) * B * C, row, B, c, C, BLOCK_B, BLOCK_C).to(tl.float32)
    else:
        return _products(x, row, B, _anchor(anchors, k, C, D), c, C, D, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D)


@triton.jit
def _class_sum(sums, i, classes, C):
    """Row i of sums [rows, C], for these classes; 0 outside."""
    return tl.load(sums + i * C + classes, mask=classes < C, other=0.0)


@triton.jit
def _squared_norm(alpha, w_w, a_a, a_w):
    """|a + alpha (w - a)|^2 from the products of w and a; digits are lost only near 0, where w is almost -a."""
    return (1 - alpha) * (1 - alpha) * a_a + 2 * alpha * (1 - alpha) * a_w + alpha * alpha * w_w


@triton.jit
def _rscale(squared_norm, scale, NORMALIZE: tl.constexpr):
    """Logit scale over the norm of the class weight."""
    if NORMALIZE:
        return scale * tl.rsqrt(tl.maximum(squared_norm, _MIN_SQUARED_NORM))
    else:
        return tl.zeros_like(squared_norm) + scale


@triton.jit
def _row_dots(a, b, c, C, D):
    """The rows of a strip of a and b, multiplied: [STRIP_C]."""
    total = tl.zeros([_STRIP_C], tl.float32)
    for d in range(0, D, _STRIP_D):
        a_strip = _load(a, c, C, d, D, _STRIP_C, _STRIP_D).to(tl.float32)
        total += tl.sum(a_strip * _load(b, c, C, d, D, _STRIP_C, _STRIP_D).to(tl.float32), 1)
    return total


@triton.jit
def _apart(w, w1, curvature, c, d, C, D, norm, norm1, HAS_CURVATURE: tl.constexpr):
    """Of a strip: w on unit norm, its distance from w1 on unit norm, and the curvature times that distance."""
    unit = _load(w, c, C, d, D, _STRIP_C, _STRIP_D).to(tl.float32) / norm[:, None]
    apart = unit - _load(w1, c, C, d, D, _STRIP_C, _STRIP_D).to(tl.float32) / norm1[:, None]
    if HAS_CURVATURE:
        return unit, apart, apart * _load(curvature, c, C, d, D, _STRIP_C, _STRIP_D).to(tl.float32)
    else:
        return unit, apart, apart


# -- the jobs ---------------------------------------------------------------------------------------------------------


@triton.jit
def _class_sums(
    strip, w, anchors, w1, curvature, sums, surrogates, counters, C, D, K,
    NORMALIZE: tl.constexpr, HAS_W1: tl.constexpr, HAS_CURVATURE: tl.constexpr,
):  # fmt: skip
    """sums [2 E + 2, C]: each end with itself; each end with w; norm of w1; slope of the surrogate along w."""
    c = strip * _STRIP_C
    classes = c + tl.arange(0, _STRIP_C)
    inside = classes < C
    w_w = tl.zeros([_STRIP_C], tl.float32) + 1
    if NORMALIZE:
        w_w = _row_dots(w, w, c, C, D)
        tl.store(sums + classes, w_w, mask=inside)
        tl.store(sums + (K + 1) * C + classes, w_w, mask=inside)
        for k in range(K):
            a = _anchor(anchors, k, C, D)
            tl.store(sums + (k + 1) * C + classes, _row_dots(a, a, c, C, D), mask=inside)
            tl.store(sums + (K + 2 + k) * C + classes, _row_dots(a, w, c, C, D), mask=inside)
        _signal(counters + _NORMS)  # pass 1 need not wait for the surrogate

    if HAS_W1:
        norm1 = tl.zeros([_STRIP_C], tl.float32) + 1
        if NORMALIZE:
            norm1 = tl.sqrt(tl.maximum(_row_dots(w1, w1, c, C, D), _MIN_SQUARED_NORM))
        norm = tl.sqrt(tl.maximum(w_w, _MIN_SQUARED_NORM))
        surrogate = tl.zeros([_STRIP_C], tl.float32)
        along = tl.zeros([_STRIP_C], tl.float32)
        for d in range(0, D, _STRIP_D):
            unit, apart, slope = _apart(w, w1, curvature, c, d, C, D, norm, norm1, HAS_CURVATURE)
            surrogate += tl.sum(apart * slope, 1)
            along += tl.sum(unit * slope, 1)
        tl.store(sums + (2 * K + 2) * C + classes, norm1, mask=inside)
        tl.store(sums + (2 * K + 3) * C + classes, along, mask=inside)
        tl.store(surrogates + strip, 0.5 * tl.sum(tl.where(inside, surrogate, 0.0), 0) / C)
    _signal(counters + _SURROGATES)


@triton.jit
def _record(p, logits, labels, rows, c, B, C, peaks, totals, picked, first, BLOCK_C: tl.constexpr):
    """Largest logit and sum of exponentials of point p in one tile, merged with those of the group's tiles before."""
    classes = c + tl.arange(0, BLOCK_C)
    at = p * B + rows
    chosen = tl.sum(tl.where(labels[:, None] == classes[None, :], logits, 0.0), 1)
    tl.store(picked + at, chosen, mask=(rows < B) & (labels >= c) & (labels < tl.minimum(c + BLOCK_C, C)))

    logits = tl.where((classes < C)[None, :], logits, float("-inf"))
    peak = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - peak[:, None]), 1)
    if not first:
        old = tl.load(peaks + at, mask=rows < B, other=0.0)
        new = tl.maximum(old, peak)
        total = tl.load(totals + at, mask=rows < B, other=0.0) * tl.exp(old - new) + total * tl.exp(peak - new)
        peak = new
    tl.store(peaks + at, peak, mask=rows < B)
    tl.store(totals + at, total, mask=rows < B)


@triton.jit
def _tile_statistics(
    block, group, x, labels, w, anchors, anchor_dots, alphas, sums, peaks, totals, picked, counters,
    B, C, D, K, N, scale, tiles_per_group, strips,
    NORMALIZE: tl.constexpr, KNOWN_DOTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pass 1 of a row block over a group of tiles: peaks and totals [groups, P, B]; picked [P, B], of the labels."""
    row = block * BLOCK_B
    rows = row + tl.arange(0, BLOCK_B)
    own_labels = tl.load(labels + rows, mask=rows < B, other=-1).to(tl.int32)
    begin = group * tiles_per_group
    base = tl.cast(group, tl.int64) * B * (1 + K * N)
    for tile in range(begin, tl.minimum(begin + tiles_per_group, tl.cdiv(C, BLOCK_C))):
        c = tile * BLOCK_C
        classes = c + tl.arange(0, BLOCK_C)
        first = tile == begin
        if not first:
            tl.debug_barrier()  # what one thread of this program recorded, another may merge
        dots_w = _products(x, row, B, w, c, C, D, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D)
        w_w = tl.zeros([BLOCK_C], tl.float32)
        a_a = w_w
        a_w = w_w
        if NORMALIZE:
            _wait(counters + _NORMS, strips)  # only now: the product above did not need them
            w_w = _class_sum(sums, 0, classes, C)
        logits = dots_w * _rscale(w_w, scale, NORMALIZE)[None, :]
        _record(0, logits, own_labels, rows, c, B, C, peaks + base, totals + base, picked, first, BLOCK_C)
        for k in range(K):
            dots_a = _anchor_products(
                x, row, B, anchors, anchor_dots, k, c, C, D, KNOWN_DOTS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D
            )
            if NORMALIZE:
                a_a = _class_sum(sums, k + 1, classes, C)
                a_w = _class_sum(sums, K + 2 + k, classes, C)
            for n in range(N):
                alpha = tl.load(alphas + n).to(tl.float32)
                rscale = _rscale(_squared_norm(alpha, w_w, a_a, a_w), scale, NORMALIZE)
                logits = ((1 - alpha) * dots_a + alpha * dots_w) * rscale[None, :]
                p = 1 + k * N + n
                _record(p, logits, own_labels, rows, c, B, C, peaks + base, totals + base, picked, first, BLOCK_C)
    _signal(counters + _TILES)


@triton.jit
def _row_statistics(
    block, labels, peaks, totals, picked, row_terms, counters, B, C, K, N, groups, tile_jobs,
    BLOCK_B: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Merges the groups into slot `groups` of peaks and totals; row_terms [row blocks, ENDS]: cross-entropies, summed.

    A label out of range cannot be refused here without a host synchronisation: it makes loss and gradient NaN.
    """
    _wait(counters + _TILES, tile_jobs)
    points = 1 + K * N
    group = tl.arange(0, _GROUPS)
    result = tl.cast(groups, tl.int64) * points * B
    end = tl.arange(0, ENDS)
    terms = tl.zeros([ENDS], tl.float32)
    for start in range(0, points * BLOCK_B, _PAIRS):
        pair = start + tl.arange(0, _PAIRS)
        p = pair // BLOCK_B
        row = block * BLOCK_B + pair % BLOCK_B
        inside = (p < points) & (row < B)
        at = p * B + row
        from_groups = group.to(tl.int64)[:, None] * points * B + at[None, :]
        mask = (group < groups)[:, None] & inside[None, :]
        peak_of = tl.load(peaks + from_groups, mask=mask, other=float("-inf"))
        total_of = tl.load(totals + from_groups, mask=mask, other=0.0)
        peak = tl.where(inside, tl.max(peak_of, 0), 0.0)
        total = tl.sum(total_of * tl.exp(peak_of - peak[None, :]), 0)

        label = tl.load(labels + row, mask=inside, other=0)
        known = (label >= 0) & (label < C)
        total = tl.where(known & inside, total, float("nan"))
        loss = tl.log(total) + (peak - tl.load(picked + at, mask=inside & known, other=0.0))
        term = tl.where(p == 0, 0, 1 + (p - 1) // N)
        terms += tl.sum(tl.where((term[None, :] == end[:, None]) & inside[None, :], loss[None, :], 0.0), 1)
        tl.store(peaks + result + at, peak, mask=inside)
        tl.store(totals + result + at, total, mask=inside)
    tl.store(row_terms + block * ENDS + end, terms)
    _signal(counters + _ROWS)


@triton.jit
def _point_gradient(p, weight, logits, is_label, rows, classes, B, C, peaks, totals):
    """weight * (softmax - onehot) of point p: the gradient to its logits. 0 outside, since nothing / infinity is 0."""
    peak = tl.load(peaks + p * B + rows, mask=rows < B, other=0.0)
    total = tl.load(totals + p * B + rows, mask=rows < B, other=float("inf"))
    softmax = tl.exp(logits - peak[:, None]) / total[:, None]
    return weight * (tl.where((classes < C)[None, :], softmax, 0.0) - is_label)


@triton.jit
def _through_norm(gradient, logits, squared_norm):
    """[BLOCK_C] f, where the norm adds f t to the gradient to the class weight t; 0 at or below the norm's floor."""
    pull = -tl.sum(gradient * logits, 0) / tl.maximum(squared_norm, _MIN_SQUARED_NORM)
    return tl.where(squared_norm > _MIN_SQUARED_NORM, pull, 0.0)


@triton.jit
def _accumulate(ptr, value, mask, first, ATOMIC: tl.constexpr):
    """Adds to what several jobs own (ATOMIC: in any order), or to what this job owns alone and has not set if first."""
    if ATOMIC:
        tl.atomic_add(ptr, value, mask=mask, sem="relaxed")
    else:
        if not first:
            value += tl.load(ptr, mask=mask, other=0.0)
        tl.store(ptr, value, mask=mask)


@triton.jit
def _gradient_tile(
    part, tile, x, labels, w, anchors, anchor_dots, alphas, betas, sums, peaks, totals, pulls, slabs, counters,
    B, C, D, K, N, scale, groups, blocks_per_part,
    NORMALIZE: tl.constexpr, KNOWN_DOTS: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pass 2 of a part of the row blocks over a class tile.

    slabs [parts, C, D]: coefficients.T @ x; pulls [parts, E, C]: what the norms pull along each end. ATOMIC: one part.
    """
    c = tile * BLOCK_C
    classes = c + tl.arange(0, BLOCK_C)
    result = tl.cast(groups, tl.int64) * B * (1 + K * N)
    slab = part
    if ATOMIC:
        slab = part * 0
    pull_at = pulls + slab * (K + 1) * C + classes
    begin = part * blocks_per_part
    for block in range(begin, tl.minimum(begin + blocks_per_part, tl.cdiv(B, BLOCK_B))):
        row = block * BLOCK_B
        rows = row + tl.arange(0, BLOCK_B)
        own_labels = tl.load(labels + rows, mask=rows < B, other=-1).to(tl.int32)
        is_label = tl.where(own_labels[:, None] == classes[None, :], 1.0, 0.0)
        first = block == begin
        if not ATOMIC and not first:
            tl.debug_barrier()  # what one thread of this program stored, another may add to

        dots_w = _products(x, row, B, w, c, C, D, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D)
        _wait(counters + _ROWS, tl.cdiv(B, BLOCK_B))
        w_w = tl.zeros([BLOCK_C], tl.float32)
        a_a = w_w
        a_w = w_w
        if NORMALIZE:
            w_w = _class_sum(sums, 0, classes, C)
        rscale = _rscale(w_w, scale, NORMALIZE)
        logits = dots_w * rscale[None, :]
        gradient = _point_gradient(0, 1.0 / B, logits, is_label, rows, classes, B, C, peaks + result, totals + result)
        coefficients = gradient * rscale[None, :]
        pull_w = tl.zeros([BLOCK_C], tl.float32)
        if NORMALIZE:
            pull_w += _through_norm(gradient, logits, w_w)

        for k in range(K):
            dots_a = _anchor_products(
                x, row, B, anchors, anchor_dots, k, c, C, D, KNOWN_DOTS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D
            )
            weight = tl.load(betas + k).to(tl.float32) / N / B
            pull_a = tl.zeros([BLOCK_C], tl.float32)
            if NORMALIZE:
                a_a = _class_sum(sums, k + 1, classes, C)
                a_w = _class_sum(sums, K + 2 + k, classes, C)
            for n in range(N):
                alpha = tl.load(alphas + n).to(tl.float32)
                squared_norm = _squared_norm(alpha, w_w, a_a, a_w)
                rscale = _rscale(squared_norm, scale, NORMALIZE)
                logits = ((1 - alpha) * dots_a + alpha * dots_w) * rscale[None, :]
                gradient = _point_gradient(
                    1 + k * N + n, weight, logits, is_label, rows, classes, B, C, peaks + result, totals + result
                )
                coefficients += gradient * (alpha * rscale)[None, :]
                if NORMALIZE:  # t = (1 - alpha) a + alpha w, and d t / d w = alpha
                    pull = _through_norm(gradient, logits, squared_norm)
                    pull_a += alpha * (1 - alpha) * pull
                    pull_w += alpha * alpha * pull
            if NORMALIZE:
                _accumulate(pull_at + (k + 1) * C, pull_a, classes < C, first, ATOMIC)
        if NORMALIZE:
            _accumulate(pull_at, pull_w, classes < C, first, ATOMIC)

        # In float32 operands: a coefficient is up to scale / norm, too large for half types and too small when divided.
        of_classes = tl.trans(coefficients)
        for d in range(0, D, BLOCK_D):
            x_tile = _load(x, row, B, d, D, BLOCK_B, BLOCK_D).to(tl.float32)
            share = tl.dot(of_classes, x_tile, input_precision=GRADIENT_PRECISION)
            columns = tl.arange(0, BLOCK_D)
            inside = (classes < C)[:, None] & (columns < D - d)[None, :]
            begin_tile = slabs + ((tl.cast(slab, tl.int64) * C + c) * D + d)
            at = tl.arange(0, BLOCK_C)[:, None] * D + columns[None, :]
            _accumulate(begin_tile + at, share, inside, first, ATOMIC)
    _signal(counters + _SLABS)


@triton.jit
def _totals(
    row_terms, surrogates, betas, loss, terms, counters, B, K, N, lam, row_blocks, strips,
    HAS_W1: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """loss, and terms [2 + K] in the definition's order: endpoint, surrogate, paths."""
    _wait(counters + _ROWS, row_blocks)
    _wait(counters + _SURROGATES, strips)
    end = tl.arange(0, ENDS)
    sums = tl.zeros([ENDS], tl.float32)
    for start in range(0, row_blocks, _PAIRS):
        block = start + tl.arange(0, _PAIRS)
        sums += tl.sum(tl.load(row_terms + block[:, None] * ENDS + end, mask=(block < row_blocks)[:, None], other=0), 0)
    means = sums / tl.where(end == 0, B, B * N)
    weights = tl.where(end == 0, 1.0, tl.load(betas + end - 1, mask=(end > 0) & (end <= K), other=0).to(tl.float32))
    total = tl.sum(means * weights, 0)

    surrogate = 0.0
    if HAS_W1:
        for start in range(0, strips, _PAIRS):
            strip = start + tl.arange(0, _PAIRS)
            surrogate += tl.sum(tl.load(surrogates + strip, mask=strip < strips, other=0.0), 0)
        total += lam * surrogate
    tl.store(terms + tl.where(end == 0, 0, end + 1), means, mask=end <= K)
    tl.store(terms + 1, surrogate)
    tl.store(loss, total)


@triton.jit
def _finish(
    strip, w, anchors, w1, curvature, sums, pulls, slabs, grad, counters, C, D, K, lam, parts, slab_jobs, strips,
    NORMALIZE: tl.constexpr, HAS_W1: tl.constexpr, HAS_CURVATURE: tl.constexpr,
):  # fmt: skip
    """grad [C, D] of a strip: the parts in their order, what the norms pull, the surrogate's slope."""
    _wait(counters + _SLABS, slab_jobs)
    _wait(counters + _SURROGATES, strips)
    c = strip * _STRIP_C
    classes = c + tl.arange(0, _STRIP_C)
    norm = tl.zeros([_STRIP_C], tl.float32) + 1
    squared_norm = norm
    norm1 = norm
    along = norm
    if NORMALIZE:
        squared_norm = _class_sum(sums, 0, classes, C)
        norm = tl.sqrt(tl.maximum(squared_norm, _MIN_SQUARED_NORM))
    if HAS_W1:
        norm1 = tl.maximum(_class_sum(sums, 2 * K + 2, classes, C), 1e-12)
        along = _class_sum(sums, 2 * K + 3, classes, C)

    for d in range(0, D, _STRIP_D):
        total = tl.zeros([_STRIP_C, _STRIP_D], tl.float32)
        for part in range(parts):
            total += _load(slabs + tl.cast(part, tl.int64) * C * D, c, C, d, D, _STRIP_C, _STRIP_D)
        if NORMALIZE:
            for e in range(K + 1):
                pull = tl.zeros([_STRIP_C], tl.float32)
                for part in range(parts):
                    pull += _class_sum(pulls, part * (K + 1) + e, classes, C)
                if e == 0:
                    total += pull[:, None] * _load(w, c, C, d, D, _STRIP_C, _STRIP_D).to(tl.float32)
                else:
                    a = _anchor(anchors, e - 1, C, D)
                    total += pull[:, None] * _load(a, c, C, d, D, _STRIP_C, _STRIP_D).to(tl.float32)
        if HAS_W1:
            unit, _, slope = _apart(w, w1, curvature, c, d, C, D, norm, norm1, HAS_CURVATURE)
            if NORMALIZE:
                along_w = tl.where(squared_norm > _MIN_SQUARED_NORM, along, 0.0)
                slope = (slope - unit * along_w[:, None]) / norm[:, None]
            total += lam / C * slope
        columns = tl.arange(0, _STRIP_D)
        inside = (classes < C)[:, None] & (columns < D - d)[None, :]
        at = tl.arange(0, _STRIP_C)[:, None] * D + columns[None, :]
        tl.store(grad + (tl.cast(c, tl.int64) * D + d) + at, total.to(grad.dtype.element_ty), mask=inside)


# -- the kernel -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "K", "N", "tiles_per_group", "blocks_per_part"])
def lmc_loss_kernel(
    x, labels, w, anchors, anchor_dots, alphas, betas, w1, curvature, loss, terms, grad,
    sums, surrogates, peaks, totals, picked, row_terms, pulls, slabs, counters,
    B, C, D, K, N, scale, lam, tiles_per_group, blocks_per_part,
    NORMALIZE: tl.constexpr, HAS_W1: tl.constexpr, HAS_CURVATURE: tl.constexpr, KNOWN_DOTS: tl.constexpr,
    ATOMIC: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One job; see the top of the file. The program's own id is never read."""
    row_blocks = tl.cdiv(B, BLOCK_B)
    tiles = tl.cdiv(C, BLOCK_C)
    strips = tl.cdiv(C, _STRIP_C)
    groups = tl.cdiv(tiles, tiles_per_group)
    parts = tl.cdiv(row_blocks, blocks_per_part)

    from_tiles = strips
    from_rows = from_tiles + row_blocks * groups
    from_slabs = from_rows + row_blocks
    from_totals = from_slabs + parts * tiles
    ticket = tl.atomic_add(counters + _TICKET, 1, sem="relaxed")
    if ticket < from_tiles:
        _class_sums(
            ticket, w, anchors, w1, curvature, sums, surrogates, counters, C, D, K, NORMALIZE, HAS_W1, HAS_CURVATURE
        )
    elif ticket < from_rows:
        job = ticket - from_tiles
        _tile_statistics(
            job // groups, job % groups, x, labels, w, anchors, anchor_dots, alphas, sums, peaks, totals, picked,
            counters, B, C, D, K, N, scale, tiles_per_group, strips, NORMALIZE, KNOWN_DOTS, PRECISION,
            BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    elif ticket < from_slabs:
        _row_statistics(
            ticket - from_rows, labels, peaks, totals, picked, row_terms, counters, B, C, K, N, groups,
            row_blocks * groups, BLOCK_B, ENDS,
        )  # fmt: skip
    elif ticket < from_totals:
        job = ticket - from_slabs
        _gradient_tile(
            job // tiles, job % tiles, x, labels, w, anchors, anchor_dots, alphas, betas, sums, peaks, totals, pulls,
            slabs, counters, B, C, D, K, N, scale, groups, blocks_per_part, NORMALIZE, KNOWN_DOTS, ATOMIC, PRECISION,
            GRADIENT_PRECISION, BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    elif ticket == from_totals:
        _totals(row_terms, surrogates, betas, loss, terms, counters, B, K, N, lam, row_blocks, strips, HAS_W1, ENDS)
    else:
        slab_count = parts
        if ATOMIC:
            slab_count = 1
        _finish(
            ticket - from_totals - 1, w, anchors, w1, curvature, sums, pulls, slabs, grad, counters, C, D, K, lam,
            slab_count, parts * tiles, strips, NORMALIZE, HAS_W1, HAS_CURVATURE,
        )  # fmt: skip


# -- the launcher -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile sizes, each a power of two of at least 16, and what the compiler is told."""

    block_b: int
    block_c: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 3


# All of them compile without spills (aot.py); a float32 product in three parts needs the narrow tiles for that.
HALF_CONFIGS = (Config(32, 32, 64), Config(16, 32, 64), Config(64, 64, 32, num_warps=8))
FLOAT_CONFIGS = (Config(32, 32, 16), Config(16, 32, 16), Config(64, 32, 16, num_warps=8))
_fastest: dict[tuple, Config] = {}


def candidate_configs(batch: int, classes: int, width: int, dtype: torch.dtype) -> list[Config]:
    """The configurations whose tiles are not mostly empty.

    The first is the deterministic choice, made by shape alone: the largest tiles that still give half of
    PARALLEL_JOBS jobs (larger ones read less again), else the smallest. The fast variant times them all.
    """
    everything = FLOAT_CONFIGS if dtype == torch.float32 else HALF_CONFIGS
    area = lambda config: config.block_b * config.block_c  # noqa: E731
    if width == 1:  # a constant to the compiler, and Triton 3.8 cannot build a product of one step in sm_100's tiles
        return [min(everything, key=area)]
    jobs = lambda config: triton.cdiv(batch, config.block_b) * triton.cdiv(classes, config.block_c)  # noqa: E731
    fitting = [c for c in everything if c.block_b < 2 * max(batch, 16) and c.block_c < 2 * max(classes, 16)]
    fitting = fitting or [min(everything, key=area)]
    busy = [config for config in fitting if jobs(config) >= PARALLEL_JOBS // 2]
    first = max(busy, key=area) if busy else min(fitting, key=area)
    return [first, *(config for config in fitting if config != first)]


def lmc_loss(
    x: Tensor,
    labels: Tensor,
    w: Tensor,
    anchors: Tensor,
    alphas: Tensor,
    betas: Tensor,
    scale: float,
    w1: Tensor | None,
    curvature: Tensor | None,
    lam: float,
    normalize: bool,
    anchor_dots: Tensor | None,
    *,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, terms and gradient in one kernel launch, without a host synchronisation.

    Beside the launch there are only allocations: outputs, a float32 workspace (of zeros if not deterministic) and six
    counters (zeros). Arguments that are not contiguous, or not of one dtype, are copied first.

    Args:
        x: image features, [B, D], float32, bfloat16 or float16. A head's bias is a last column of w, and of ones in x.
        labels: int64 [B]; one that is not in [0, C) makes loss and gradient NaN.
        w: what is searched, [C, D].
        anchors: fine-tuned solutions, [K, C, D]; K may be 0.
        alphas: points on each path, [N], of any float dtype.
        betas: weight of each path, [K], of any float dtype.
        scale: logit scale.
        w1: the zero-shot solution, [C, D]; None leaves the surrogate out.
        curvature: its diagonal, [C, D]; None is the identity.
        lam: weight of the surrogate.
        normalize: unit norm per class after interpolation.
        anchor_dots: x @ anchors[k].T, [K, B, C], where known.
        deterministic: the same bits every time: partial gradients are added in a fixed order, and tile sizes depend on
            the shapes alone. Otherwise they are added atomically, and the first call of a kind times a few tile sizes.

    Returns:
        The loss and its terms [2 + K] in float32, and the gradient [C, D] in w's dtype.

    Raises:
        TypeError: for a w in float64, which this kernel does not compute in.
        RuntimeError: for CPU tensors outside of Triton's interpreter.
    """
    device, out_dtype = w.device, w.dtype
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("the Triton kernel needs tensors on a GPU, got w on cpu (TRITON_INTERPRET=1 interprets it)")
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"w must be float32, bfloat16 or float16, got {w.dtype}")
    # Products want one dtype: the common one, or float32 where only x or the anchors are float64.
    dtype = torch.promote_types(torch.promote_types(x.dtype, anchors.dtype), w.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype

    k = len(anchors)
    n = len(alphas) if k else 0
    ready = lambda t, to: w if t is None else t.to(device=device, dtype=to or t.dtype).contiguous()  # noqa: E731
    inputs = {
        "x": ready(x, dtype),
        "labels": ready(labels, torch.int64),
        "w": ready(w, dtype),
        "anchors": ready(anchors, dtype),
        "anchor_dots": ready(anchor_dots, None),
        "alphas": ready(alphas, None),
        "betas": ready(betas, None),
        "w1": ready(w1, None),
        "curvature": ready(curvature, None),
        "B": len(x),
        "C": len(w),
        "D": w.shape[1],
        "K": k,
        "N": max(n, 1),
        "scale": float(scale),
        "lam": float(lam),
        "NORMALIZE": bool(normalize),
        "HAS_W1": w1 is not None,
        "HAS_CURVATURE": curvature is not None,
        "KNOWN_DOTS": anchor_dots is not None,
        "ATOMIC": not deterministic,
        "ENDS": triton.next_power_of_2(k + 1),
        **precisions(dtype),
    }
    outputs = {
        "loss": torch.empty((), dtype=torch.float32, device=device),
        "terms": torch.empty(2 + k, dtype=torch.float32, device=device),
        "grad": torch.empty(w.shape, dtype=out_dtype, device=device),
    }
    configs = candidate_configs(len(x), len(w), w.shape[1], dtype)
    with torch.cuda.device_of(w):
        _launch(configs[0] if deterministic else _tuned(configs, inputs, outputs), inputs, outputs)
    return outputs["loss"], outputs["terms"], outputs["grad"]


def precisions(dtype: torch.dtype) -> dict[str, str]:
    """How dot products are taken: float32 as float32, in three TF32 products, unless torch is allowed TF32 itself."""
    if dtype != torch.float32:
        return {"PRECISION": "tf32", "GRADIENT_PRECISION": "tf32"}  # half operands ignore the first
    exact = torch.get_float32_matmul_precision() == "highest"
    return dict.fromkeys(("PRECISION", "GRADIENT_PRECISION"), "tf32x3" if exact else "tf32")


def _launch(config: Config, inputs: dict, outputs: dict) -> None:
    batch, classes, width, k, n = (inputs[name] for name in "BCDKN")
    points, ends, atomic = 1 + k * n, inputs["ENDS"], inputs["ATOMIC"]
    row_blocks, tiles = triton.cdiv(batch, config.block_b), triton.cdiv(classes, config.block_c)
    strips = triton.cdiv(classes, _STRIP_C.value)
    # Each pass is split into about PARALLEL_JOBS jobs, and its workspace grows with the jobs and not with B times C.
    tiles_per_group = triton.cdiv(tiles, min(tiles, MAX_CLASS_GROUPS, triton.cdiv(PARALLEL_JOBS, row_blocks)))
    blocks_per_part = 1 if atomic else triton.cdiv(row_blocks, min(row_blocks, triton.cdiv(PARALLEL_JOBS, tiles)))
    groups, parts = triton.cdiv(tiles, tiles_per_group), triton.cdiv(row_blocks, blocks_per_part)
    slabs = 1 if atomic else parts

    sizes = {
        "sums": (2 * k + 4) * classes,
        "surrogates": strips,
        "peaks": (groups + 1) * points * batch,
        "totals": (groups + 1) * points * batch,
        "picked": points * batch,
        "row_terms": row_blocks * ends,
        "pulls": slabs * (k + 1) * classes,
        "slabs": slabs * classes * width,
    }
    device = inputs["w"].device
    aligned = [triton.cdiv(size, 64) * 64 for size in sizes.values()]
    workspace = (torch.zeros if atomic else torch.empty)(sum(aligned), dtype=torch.float32, device=device)
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MAX_REGISTERS}
    lmc_loss_kernel[(strips + row_blocks * (groups + 1) + parts * tiles + 1 + strips,)](
        **inputs,
        **outputs,
        **dict(zip(sizes, workspace.split(aligned), strict=True)),
        counters=torch.zeros(COUNTERS.value, dtype=torch.int32, device=device),
        tiles_per_group=tiles_per_group,
        blocks_per_part=blocks_per_part,
        BLOCK_B=config.block_b,
        BLOCK_C=config.block_c,
        BLOCK_D=config.block_d,
        **options,
    )


def _tuned(configs: list[Config], inputs: dict, outputs: dict) -> Config:
    """The fastest configuration, timed once a device and kind of problem; the first where nothing can be timed."""
    device = inputs["w"].device
    if len(configs) == 1 or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return configs[0]
    key = (device, inputs["w"].dtype, triton.next_power_of_2(inputs["B"]), inputs["C"], inputs["D"], inputs["K"])
    if key not in _fastest:

        def milliseconds(config: Config) -> float:
            return cast("float", triton.testing.do_bench(lambda: _launch(config, inputs, outputs)))

        _fastest[key] = min(configs, key=milliseconds)
    return _fastest[key]
