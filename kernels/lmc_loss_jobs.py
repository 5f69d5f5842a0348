"""The jobs of the LMC-loss kernel, which its programs take one after another.

:mod:`mergetune.kernels.lmc_loss_kernel` explains the shapes and the order of the jobs.
"""

# Triton's annotations are incomplete for the operators and reductions in these kernels.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from mergetune.kernels.lmc_loss_parts import (
    GROUPS,
    MIN_SQUARED_NORM,
    NORMS_DONE,
    PAIRS,
    ROWS_DONE,
    SLABS_DONE,
    STRIP_C,
    STRIP_D,
    SURROGATES_DONE,
    TILES_DONE,
    anchor_products,
    class_sum,
    load_tile,
    products,
    row_dots,
    rscale_of,
    select_anchor,
    signal,
    squared_norm_at,
    surrogate_strip,
    wait,
)


@triton.jit
def class_sums(
    strip, w, anchors, w1, curvature, sums, surrogates, counters, C, D, K,
    NORMALIZE: tl.constexpr, HAS_W1: tl.constexpr, HAS_CURVATURE: tl.constexpr,
):  # fmt: skip
    """Fills sums [2 E + 2, C] and surrogates for a strip of classes.

    Rows of sums: squared norm of each end, product of each end with w, norm of w1, slope of the surrogate along w.
    """
    c = strip * STRIP_C
    classes = c + tl.arange(0, STRIP_C)
    inside = classes < C
    w_w = tl.zeros([STRIP_C], tl.float32) + 1
    if NORMALIZE:
        w_w = row_dots(w, w, c, C, D)
        tl.store(sums + classes, w_w, mask=inside)
        tl.store(sums + (K + 1) * C + classes, w_w, mask=inside)
        for k in range(K):
            a = select_anchor(anchors, k, C, D)
            tl.store(sums + (k + 1) * C + classes, row_dots(a, a, c, C, D), mask=inside)
            tl.store(sums + (K + 2 + k) * C + classes, row_dots(a, w, c, C, D), mask=inside)
        signal(counters + NORMS_DONE)  # pass 1 needs only the norms, not the surrogate

    if HAS_W1:
        norm1 = tl.zeros([STRIP_C], tl.float32) + 1
        if NORMALIZE:
            norm1 = tl.sqrt(tl.maximum(row_dots(w1, w1, c, C, D), MIN_SQUARED_NORM))
        norm = tl.sqrt(tl.maximum(w_w, MIN_SQUARED_NORM))
        surrogate = tl.zeros([STRIP_C], tl.float32)
        along = tl.zeros([STRIP_C], tl.float32)
        for d in range(0, D, STRIP_D):
            unit, apart, slope = surrogate_strip(w, w1, curvature, c, d, C, D, norm, norm1, HAS_CURVATURE)
            surrogate += tl.sum(apart * slope, 1)
            along += tl.sum(unit * slope, 1)
        tl.store(sums + (2 * K + 2) * C + classes, norm1, mask=inside)
        tl.store(sums + (2 * K + 3) * C + classes, along, mask=inside)
        tl.store(surrogates + strip, 0.5 * tl.sum(tl.where(inside, surrogate, 0.0), 0) / C)
    signal(counters + SURROGATES_DONE)


@triton.jit
def _record(p, logits, labels, rows, c, B, C, peaks, totals, picked, first, BLOCK_C: tl.constexpr):
    """Merges largest logit and sum of exponentials of point p in a tile with those of the group's earlier tiles."""
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
def tile_statistics(
    block, group, x, labels, w, anchors, anchor_dots, alphas, sums, peaks, totals, picked, counters,
    B, C, D, K, N, scale, tiles_per_group, strips,
    NORMALIZE: tl.constexpr, KNOWN_DOTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pass 1 of a row block over a group of tiles: fills peaks and totals [groups, P, B], and picked [P, B].

    peaks are the largest logits, totals the sums of exponentials, picked the logits of the labels.
    """
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
            tl.debug_barrier()  # another thread of this program may merge values that this thread stored
        dots_w = products(x, row, B, w, c, C, D, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D)
        w_w = tl.zeros([BLOCK_C], tl.float32)
        a_a = w_w
        a_w = w_w
        if NORMALIZE:
            wait(counters + NORMS_DONE, strips)  # as late as possible: the product above does not need the norms
            w_w = class_sum(sums, 0, classes, C)
        logits = dots_w * rscale_of(w_w, scale, NORMALIZE)[None, :]
        _record(0, logits, own_labels, rows, c, B, C, peaks + base, totals + base, picked, first, BLOCK_C)
        for k in range(K):
            dots_a = anchor_products(
                x, row, B, anchors, anchor_dots, k, c, C, D, KNOWN_DOTS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D
            )
            if NORMALIZE:
                a_a = class_sum(sums, k + 1, classes, C)
                a_w = class_sum(sums, K + 2 + k, classes, C)
            for n in range(N):
                alpha = tl.load(alphas + n).to(tl.float32)
                rscale = rscale_of(squared_norm_at(alpha, w_w, a_a, a_w), scale, NORMALIZE)
                logits = ((1 - alpha) * dots_a + alpha * dots_w) * rscale[None, :]
                p = 1 + k * N + n
                _record(p, logits, own_labels, rows, c, B, C, peaks + base, totals + base, picked, first, BLOCK_C)
    signal(counters + TILES_DONE)


@triton.jit
def row_statistics(
    block, labels, peaks, totals, picked, row_terms, counters, B, C, K, N, groups, tile_jobs,
    BLOCK_B: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Merges the groups into slot `groups` of peaks and totals, and sums cross-entropies in row_terms.

    row_terms is [row blocks, ENDS]. A label out of range makes loss and gradient NaN: an error would need a host
    synchronisation.
    """
    wait(counters + TILES_DONE, tile_jobs)
    points = 1 + K * N
    group = tl.arange(0, GROUPS)
    result = tl.cast(groups, tl.int64) * points * B
    end = tl.arange(0, ENDS)
    terms = tl.zeros([ENDS], tl.float32)
    for start in range(0, points * BLOCK_B, PAIRS):
        pair = start + tl.arange(0, PAIRS)
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
    signal(counters + ROWS_DONE)


@triton.jit
def _point_gradient(p, weight, logits, is_label, rows, classes, B, C, peaks, totals):
    """weight * (softmax - onehot): the gradient with respect to the logits of point p; 0 outside the batch."""
    peak = tl.load(peaks + p * B + rows, mask=rows < B, other=0.0)
    total = tl.load(totals + p * B + rows, mask=rows < B, other=float("inf"))
    softmax = tl.exp(logits - peak[:, None]) / total[:, None]
    return weight * (tl.where((classes < C)[None, :], softmax, 0.0) - is_label)


@triton.jit
def _through_norm(gradient, logits, squared_norm):
    """Factor f, [BLOCK_C]: the norm contributes f t to the gradient of class weight t; 0 up to the norm's floor."""
    pull = -tl.sum(gradient * logits, 0) / tl.maximum(squared_norm, MIN_SQUARED_NORM)
    return tl.where(squared_norm > MIN_SQUARED_NORM, pull, 0.0)


@triton.jit
def _accumulate(ptr, value, mask, first, ATOMIC: tl.constexpr):
    """Adds value to memory: with ATOMIC to memory shared by several jobs, in any order; else to memory of this job.

    If first, memory of this job is overwritten.
    """
    if ATOMIC:
        tl.atomic_add(ptr, value, mask=mask, sem="relaxed")
    else:
        if not first:
            value += tl.load(ptr, mask=mask, other=0.0)
        tl.store(ptr, value, mask=mask)


@triton.jit
def gradient_tile(
    part, tile, x, labels, w, anchors, anchor_dots, alphas, betas, sums, peaks, totals, pulls, slabs, counters,
    B, C, D, K, N, scale, groups, blocks_per_part,
    NORMALIZE: tl.constexpr, KNOWN_DOTS: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pass 2 of a part of the row blocks over a class tile: fills slabs and pulls.

    slabs [parts, C, D] holds coefficients.T @ x; pulls [parts, E, C] holds the gradient through the norms, as a factor
    of each end. With ATOMIC all jobs add to one part.
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
            tl.debug_barrier()  # another thread of this program may add to values that this thread stored

        dots_w = products(x, row, B, w, c, C, D, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D)
        wait(counters + ROWS_DONE, tl.cdiv(B, BLOCK_B))
        w_w = tl.zeros([BLOCK_C], tl.float32)
        a_a = w_w
        a_w = w_w
        if NORMALIZE:
            w_w = class_sum(sums, 0, classes, C)
        rscale = rscale_of(w_w, scale, NORMALIZE)
        logits = dots_w * rscale[None, :]
        gradient = _point_gradient(0, 1.0 / B, logits, is_label, rows, classes, B, C, peaks + result, totals + result)
        coefficients = gradient * rscale[None, :]
        pull_w = tl.zeros([BLOCK_C], tl.float32)
        if NORMALIZE:
            pull_w += _through_norm(gradient, logits, w_w)

        for k in range(K):
            dots_a = anchor_products(
                x, row, B, anchors, anchor_dots, k, c, C, D, KNOWN_DOTS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D
            )
            weight = tl.load(betas + k).to(tl.float32) / N / B
            pull_a = tl.zeros([BLOCK_C], tl.float32)
            if NORMALIZE:
                a_a = class_sum(sums, k + 1, classes, C)
                a_w = class_sum(sums, K + 2 + k, classes, C)
            for n in range(N):
                alpha = tl.load(alphas + n).to(tl.float32)
                squared_norm = squared_norm_at(alpha, w_w, a_a, a_w)
                rscale = rscale_of(squared_norm, scale, NORMALIZE)
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

        # Operands are float32: coefficients reach scale / norm, and half types cannot hold their range.
        of_classes = tl.trans(coefficients)
        for d in range(0, D, BLOCK_D):
            x_tile = load_tile(x, row, B, d, D, BLOCK_B, BLOCK_D).to(tl.float32)
            share = tl.dot(of_classes, x_tile, input_precision=GRADIENT_PRECISION)
            columns = tl.arange(0, BLOCK_D)
            inside = (classes < C)[:, None] & (columns < D - d)[None, :]
            begin_tile = slabs + ((tl.cast(slab, tl.int64) * C + c) * D + d)
            at = tl.arange(0, BLOCK_C)[:, None] * D + columns[None, :]
            _accumulate(begin_tile + at, share, inside, first, ATOMIC)
    signal(counters + SLABS_DONE)


@triton.jit
def add_totals(
    row_terms, surrogates, betas, loss, terms, counters, B, K, N, lam, row_blocks, strips,
    HAS_W1: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Stores the loss, and the terms [2 + K] in the definition's order: endpoint, surrogate, paths."""
    wait(counters + ROWS_DONE, row_blocks)
    wait(counters + SURROGATES_DONE, strips)
    end = tl.arange(0, ENDS)
    sums = tl.zeros([ENDS], tl.float32)
    for start in range(0, row_blocks, PAIRS):
        block = start + tl.arange(0, PAIRS)
        sums += tl.sum(tl.load(row_terms + block[:, None] * ENDS + end, mask=(block < row_blocks)[:, None], other=0), 0)
    means = sums / tl.where(end == 0, B, B * N)
    weights = tl.where(end == 0, 1.0, tl.load(betas + end - 1, mask=(end > 0) & (end <= K), other=0).to(tl.float32))
    total = tl.sum(means * weights, 0)

    surrogate = 0.0
    if HAS_W1:
        for start in range(0, strips, PAIRS):
            strip = start + tl.arange(0, PAIRS)
            surrogate += tl.sum(tl.load(surrogates + strip, mask=strip < strips, other=0.0), 0)
        total += lam * surrogate
    tl.store(terms + tl.where(end == 0, 0, end + 1), means, mask=end <= K)
    tl.store(terms + 1, surrogate)
    tl.store(loss, total)


@triton.jit
def finish_gradient(
    strip, w, anchors, w1, curvature, sums, pulls, slabs, grad, counters, C, D, K, lam, parts, slab_jobs, strips,
    NORMALIZE: tl.constexpr, HAS_W1: tl.constexpr, HAS_CURVATURE: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of a strip of classes, rows of grad [C, D].

    The gradient is the sum of the slabs in a fixed order, the gradient through the norms, and the surrogate's slope.
    """
    wait(counters + SLABS_DONE, slab_jobs)
    wait(counters + SURROGATES_DONE, strips)
    c = strip * STRIP_C
    classes = c + tl.arange(0, STRIP_C)
    norm = tl.zeros([STRIP_C], tl.float32) + 1
    squared_norm = norm
    norm1 = norm
    along = norm
    if NORMALIZE:
        squared_norm = class_sum(sums, 0, classes, C)
        norm = tl.sqrt(tl.maximum(squared_norm, MIN_SQUARED_NORM))
    if HAS_W1:
        norm1 = tl.maximum(class_sum(sums, 2 * K + 2, classes, C), 1e-12)
        along = class_sum(sums, 2 * K + 3, classes, C)

    for d in range(0, D, STRIP_D):
        total = tl.zeros([STRIP_C, STRIP_D], tl.float32)
        for part in range(parts):
            total += load_tile(slabs + tl.cast(part, tl.int64) * C * D, c, C, d, D, STRIP_C, STRIP_D)
        if NORMALIZE:
            for e in range(K + 1):
                pull = tl.zeros([STRIP_C], tl.float32)
                for part in range(parts):
                    pull += class_sum(pulls, part * (K + 1) + e, classes, C)
                if e == 0:
                    total += pull[:, None] * load_tile(w, c, C, d, D, STRIP_C, STRIP_D).to(tl.float32)
                else:
                    a = select_anchor(anchors, e - 1, C, D)
                    total += pull[:, None] * load_tile(a, c, C, d, D, STRIP_C, STRIP_D).to(tl.float32)
        if HAS_W1:
            unit, _, slope = surrogate_strip(w, w1, curvature, c, d, C, D, norm, norm1, HAS_CURVATURE)
            if NORMALIZE:
                along_w = tl.where(squared_norm > MIN_SQUARED_NORM, along, 0.0)
                slope = (slope - unit * along_w[:, None]) / norm[:, None]
            total += lam / C * slope
        columns = tl.arange(0, STRIP_D)
        inside = (classes < C)[:, None] & (columns < D - d)[None, :]
        at = tl.arange(0, STRIP_C)[:, None] * D + columns[None, :]
        tl.store(grad + (tl.cast(c, tl.int64) * D + d) + at, total.to(grad.dtype.element_ty), mask=inside)
