"""Shared parts of the Triton kernels: interpreter mode, operands and precision of products, register limit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_REGISTERS = 255  # most registers per thread; without this option ptxas may spill to reach a higher occupancy


@triton.jit
def operand(x):
    """`x` as operand of tl.dot; float32 in Triton's interpreter, which would multiply the bit patterns of bfloat16."""
    if WIDEN:
        return x.to(tl.float32)
    else:
        return x


INTERPRETED = not isinstance(operand, triton.runtime.JITFunction)
WIDEN = tl.constexpr(INTERPRETED)


def precision(dtype: torch.dtype) -> str:
    """Triton's input precision for products: "tf32x3" for float32, or "tf32" if torch allows TF32.

    Products of half types ignore this value; products of float32 values in kernels of half types use one TF32 product.
    """
    return "tf32x3" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"
