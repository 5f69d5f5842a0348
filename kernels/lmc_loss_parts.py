"""Building blocks of the LMC-loss jobs: signals between programs, tiles, products, norms.

:mod:`mergetune.kernels.lmc_loss_kernel` explains shapes and jobs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mergetune.kernels.common import operand

MAX_CLASS_GROUPS = 16  # most parts into which pass 1 splits the classes of a row; a power of two
MIN_SQUARED_NORM = tl.constexpr(1e-24)  # the square of F.normalize's floor
STRIP_C = tl.constexpr(4)  # element-wise jobs take few classes and wide rows: one memory latency for D <= 512
STRIP_D = tl.constexpr(512)
PAIRS = tl.constexpr(128)  # (point, row) pairs merged per step
GROUPS = tl.constexpr(MAX_CLASS_GROUPS)

# Slots of the counters: the next ticket, then the numbers of finished jobs of each kind.
TICKET, NORMS_DONE, SURROGATES_DONE, TILES_DONE, ROWS_DONE, SLABS_DONE, COUNTERS = (tl.constexpr(i) for i in range(7))


# -- between programs -------------------------------------------------------------------------------------------------


@triton.jit
def signal(counter):
    """Adds 1 to a counter after all threads of this program have written, with release semantics."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait(counter, count):
    """Waits until `count` jobs have signalled; their writes are visible afterwards."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


# -- building blocks --------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(ptr, row, rows, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile [ROWS, COLUMNS] of a matrix [rows, columns] that begins at (row, column); 0 outside the matrix.

    The tile's address has 64 bits, offsets within the tile have 32 bits: one offset per element fills the registers.
    """
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = (r < rows - row)[:, None] & (c < columns - column)[None, :]
    begin = ptr + (tl.cast(row, tl.int64) * columns + column)
    return tl.load(begin + (r[:, None] * columns + c[None, :]), mask=inside, other=0.0)


@triton.jit
def select_anchor(anchors, k, C, D):
    """Pointer to anchor k of anchors [K, C, D]."""
    return anchors + tl.cast(k, tl.int64) * C * D


@triton.jit
def products(
    x, row, B, end, c, C, D,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x @ end.T for a row block and a class tile, [BLOCK_B, BLOCK_C] in float32."""
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for d in range(0, D, BLOCK_D):
        x_tile = load_tile(x, row, B, d, D, BLOCK_B, BLOCK_D)
        end_tile = load_tile(end, c, C, d, D, BLOCK_C, BLOCK_D)
        total = tl.dot(operand(x_tile), tl.trans(operand(end_tile)), total, input_precision=PRECISION)
    return total


@triton.jit
def anchor_products(
    x, row, B, anchors, anchor_dots, k, c, C, D,
    KNOWN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x @ anchors[k].T for a row block and a class tile: read if the caller gave the products, else computed."""
    if KNOWN:
        return load_tile(anchor_dots + tl.cast(k, tl.int64) * B * C, row, B, c, C, BLOCK_B, BLOCK_C).to(tl.float32)
    else:
        return products(x, row, B, select_anchor(anchors, k, C, D), c, C, D, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D)


@triton.jit
def class_sum(sums, i, classes, C):
    """Row i of sums [rows, C], for these classes; 0 outside."""
    return tl.load(sums + i * C + classes, mask=classes < C, other=0.0)


@triton.jit
def squared_norm_at(alpha, w_w, a_a, a_w):
    """|a + alpha (w - a)|^2 from the products of w and a; inaccurate only near 0, where w is almost -a."""
    return (1 - alpha) * (1 - alpha) * a_a + 2 * alpha * (1 - alpha) * a_w + alpha * alpha * w_w


@triton.jit
def rscale_of(squared_norm, scale, NORMALIZE: tl.constexpr):
    """Logit scale divided by the norm of the class weight; the logit scale without NORMALIZE."""
    if NORMALIZE:
        return scale * tl.rsqrt(tl.maximum(squared_norm, MIN_SQUARED_NORM))
    else:
        return tl.zeros_like(squared_norm) + scale


@triton.jit
def row_dots(a, b, c, C, D):
    """Inner products of the rows of a and b in a strip, [STRIP_C]."""
    total = tl.zeros([STRIP_C], tl.float32)
    for d in range(0, D, STRIP_D):
        a_strip = load_tile(a, c, C, d, D, STRIP_C, STRIP_D).to(tl.float32)
        total += tl.sum(a_strip * load_tile(b, c, C, d, D, STRIP_C, STRIP_D).to(tl.float32), 1)
    return total


@triton.jit
def surrogate_strip(w, w1, curvature, c, d, C, D, norm, norm1, HAS_CURVATURE: tl.constexpr):
    """For a strip: w scaled to unit norm, its difference from w1 of unit norm, and curvature times the difference."""
    unit = load_tile(w, c, C, d, D, STRIP_C, STRIP_D).to(tl.float32) / norm[:, None]
    apart = unit - load_tile(w1, c, C, d, D, STRIP_C, STRIP_D).to(tl.float32) / norm1[:, None]
    if HAS_CURVATURE:
        return unit, apart, apart * load_tile(curvature, c, C, d, D, STRIP_C, STRIP_D).to(tl.float32)
    else:
        return unit, apart, apart
