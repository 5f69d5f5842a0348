"""What the Triton kernels share: where they run, how they multiply, how many registers a thread may have."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_REGISTERS = 255  # all that a thread can have: left alone, ptxas may prefer to spill for a higher occupancy


@triton.jit
def operand(x):
    """`x` as tl.dot takes it: Triton's interpreter would multiply the bit patterns of bfloat16."""
    if WIDEN:
        return x.to(tl.float32)
    else:
        return x


INTERPRETED = not isinstance(operand, triton.runtime.JITFunction)
WIDEN = tl.constexpr(INTERPRETED)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are taken: in three TF32 products, unless torch is allowed TF32 itself.

    Half operands ignore it; what they are multiplied with in float32 takes one.
    """
    return "tf32x3" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"
