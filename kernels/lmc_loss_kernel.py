"""The Triton kernel of the LMC objective and its gradient, split into jobs.

Shapes: B rows (images), C classes, D embedding width, K anchors, N points on a path; E = K + 1 ends: w, then the
anchors; P = 1 + K N points: the endpoint w, then N points per path. Row blocks hold BLOCK_B rows, class tiles BLOCK_C
classes, strips STRIP_C classes.

**Two passes, one launch.** The gradient of a softmax needs statistics of the whole row, and the gradient with respect
to w needs all rows: two dependencies across the grid. Programs therefore take *jobs* from a ticket counter, in this
order:

    class sums        a strip       squared norms of the ends, their products with w, the surrogate
    tile statistics   a row block,  pass 1: of every point, largest logit and sum of exponentials
                      some tiles
    row statistics    a row block   statistics of its tiles merged; cross-entropies
    gradient tile     a class tile, pass 2: logits again, coefficients of x, their product with x
                      row blocks
    totals            -             loss and terms
    finish            a strip       partial gradients added in order; norms' and surrogate's gradient; cast

A job waits only for jobs with smaller tickets. These have already started, and jobs of the first kind never wait. So no
deadlock is possible, for any number of programs that run at the same time; neither a cooperative launch nor an order of
programs is assumed.

**Shared products.** All points of all paths come from the E products with the ends, because x.(a + t(w - a)) =
(1-t) x.a + t x.w, and |a + t(w - a)|^2 is a quadratic in t. All points are summed into one coefficient tile before the
last product. Both passes compute the products, so memory is O(groups P B + slabs C D) and never [B, C] or [N, B, C].

**Expected time.** Predicted, not measured, for an H100 with B 256, C 500, D 512, N 8, K 2 in bfloat16. The E products
twice and the last product: 7 * 2 B C D = 0.92 GFLOP, 2 us at the 400 TFLOP/s that such small tiles may reach.
Exponentials: 2 P B C = 4.4 M, 1 us. Device memory: 2.8 MB (x, w, anchors, w1, gradient), 1 us at 3 TB/s. L2: tiles read
their operands again, about 50 MB in all, and partial gradients are written and read once, 16 MB, together about 12 us
at 5.5 TB/s. Waits: five of 1-2 us each. The total is 15-25 us, limited by L2 and latency and neither by memory nor by
flops. At this size the launch overhead of the host is of the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mergetune.kernels.lmc_loss_jobs import (
    add_totals,
    class_sums,
    finish_gradient,
    gradient_tile,
    row_statistics,
    tile_statistics,
)
from mergetune.kernels.lmc_loss_parts import STRIP_C, TICKET


@triton.jit(do_not_specialize=["B", "K", "N", "tiles_per_group", "blocks_per_part"])
def lmc_loss_kernel(
    x, labels, w, anchors, anchor_dots, alphas, betas, w1, curvature, loss, terms, grad,
    sums, surrogates, peaks, totals, picked, row_terms, pulls, slabs, counters,
    B, C, D, K, N, scale, lam, tiles_per_group, blocks_per_part,
    NORMALIZE: tl.constexpr, HAS_W1: tl.constexpr, HAS_CURVATURE: tl.constexpr, KNOWN_DOTS: tl.constexpr,
    ATOMIC: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Runs one job, which the ticket counter selects; see the top of the file. The program id is not used."""
    row_blocks = tl.cdiv(B, BLOCK_B)
    tiles = tl.cdiv(C, BLOCK_C)
    strips = tl.cdiv(C, STRIP_C)
    groups = tl.cdiv(tiles, tiles_per_group)
    parts = tl.cdiv(row_blocks, blocks_per_part)

    from_tiles = strips
    from_rows = from_tiles + row_blocks * groups
    from_slabs = from_rows + row_blocks
    from_totals = from_slabs + parts * tiles
    ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed")
    if ticket < from_tiles:
        class_sums(
            ticket, w, anchors, w1, curvature, sums, surrogates, counters, C, D, K, NORMALIZE, HAS_W1, HAS_CURVATURE
        )
    elif ticket < from_rows:
        job = ticket - from_tiles
        tile_statistics(
            job // groups, job % groups, x, labels, w, anchors, anchor_dots, alphas, sums, peaks, totals, picked,
            counters, B, C, D, K, N, scale, tiles_per_group, strips, NORMALIZE, KNOWN_DOTS, PRECISION,
            BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    elif ticket < from_slabs:
        row_statistics(
            ticket - from_rows, labels, peaks, totals, picked, row_terms, counters, B, C, K, N, groups,
            row_blocks * groups, BLOCK_B, ENDS,
        )  # fmt: skip
    elif ticket < from_totals:
        job = ticket - from_slabs
        gradient_tile(
            job // tiles, job % tiles, x, labels, w, anchors, anchor_dots, alphas, betas, sums, peaks, totals, pulls,
            slabs, counters, B, C, D, K, N, scale, groups, blocks_per_part, NORMALIZE, KNOWN_DOTS, ATOMIC, PRECISION,
            GRADIENT_PRECISION, BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    elif ticket == from_totals:
        add_totals(row_terms, surrogates, betas, loss, terms, counters, B, K, N, lam, row_blocks, strips, HAS_W1, ENDS)
    else:
        slab_count = parts
        if ATOMIC:
            slab_count = 1
        finish_gradient(
            ticket - from_totals - 1, w, anchors, w1, curvature, sums, pulls, slabs, grad, counters, C, D, K, lam,
            slab_count, parts * tiles, strips, NORMALIZE, HAS_W1, HAS_CURVATURE,
        )  # fmt: skip
