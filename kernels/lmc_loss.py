"""The LMC objective and its gradient in one Triton launch; the definition is :func:`mergetune.ops.reference.lmc_loss`.

This file splits a call into jobs and allocates memory. :mod:`mergetune.kernels.lmc_loss_kernel` explains the kernel.
"""

# Triton turns the integers of a launch into its constants.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
from mergetune.kernels.common import INTERPRETED, MAX_REGISTERS, precision
from mergetune.kernels.lmc_loss_kernel import lmc_loss_kernel
from mergetune.kernels.lmc_loss_parts import COUNTERS, MAX_CLASS_GROUPS, STRIP_C
from torch import Tensor

PARALLEL_JOBS = 256  # jobs per pass, if possible; fixed, so that the bits do not depend on the device


@dataclass(frozen=True)
class Config:
    """Tile sizes, each a power of two of at least 16, and compiler options."""

    block_b: int
    block_c: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 3


# All configurations compile without spills (aot.py); for this, float32 products of three parts need narrow tiles.
HALF_CONFIGS = (Config(32, 32, 64), Config(16, 32, 64), Config(64, 64, 32, num_warps=8))
FLOAT_CONFIGS = (Config(32, 32, 16), Config(16, 32, 16), Config(64, 32, 16, num_warps=8))
_fastest: dict[tuple, Config] = {}


def candidate_configs(batch: int, classes: int, width: int, dtype: torch.dtype) -> list[Config]:
    """The configurations whose tiles are not mostly empty.

    The first one is the deterministic choice, which depends on the shapes only: the largest tiles that still give half
    of PARALLEL_JOBS jobs (larger tiles read less memory again), else the smallest tiles. The variant that is not
    deterministic times all configurations.
    """
    everything = FLOAT_CONFIGS if dtype == torch.float32 else HALF_CONFIGS
    area = lambda config: config.block_b * config.block_c  # noqa: E731
    if width == 1:  # Triton compiles 1 as a constant, and Triton 3.8 cannot compile a product of one step for sm_100
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

    Besides the launch, the function only allocates memory: outputs, a float32 workspace (zeros if not deterministic)
    and six counters (zeros). Arguments that are not contiguous or differ in dtype are copied first.

    Args:
        x: image features, [B, D], float32, bfloat16 or float16. For a head with bias, the last column of w is the bias,
            and the last column of x is 1.
        labels: class of each image, int64 [B]; a label outside [0, C) makes loss and gradient NaN.
        w: class weights of the trained solution, [C, D].
        anchors: class weights of the fine-tuned solutions, [K, C, D]; K may be 0.
        alphas: points on each path, [N], of any float dtype.
        betas: weight of each path, [K], of any float dtype.
        scale: logit scale.
        w1: class weights of the zero-shot solution, [C, D]; None leaves the surrogate out.
        curvature: diagonal curvature of the surrogate, [C, D]; None is the identity.
        lam: weight of the surrogate.
        normalize: whether class weights are scaled to unit norm per class after the interpolation.
        anchor_dots: x @ anchors[k].T, [K, B, C]; None computes these products.
        deterministic: True gives the same bits in every call: partial gradients are added in a fixed order, and tile
            sizes depend on the shapes only. False adds them atomically, and the first call of a kind times a few tile
            sizes.

    Returns:
        The loss and its terms [2 + K] in float32, and the gradient with respect to w, [C, D], in the dtype of w.

    Raises:
        TypeError: w is float64, which this kernel does not support.
        RuntimeError: the tensors are on the CPU and Triton's interpreter is not in use.
    """
    device, out_dtype = w.device, w.dtype
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("w must be on a GPU, got cpu (with TRITON_INTERPRET=1 the kernel also runs on a CPU)")
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"w must be float32, bfloat16 or float16, got {w.dtype}")
    # Products need one dtype: the common one, or float32 if x or the anchors are float64.
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
    """Precision constants of the products with the path ends and of the product with the coefficients."""
    return dict.fromkeys(("PRECISION", "GRADIENT_PRECISION"), precision(dtype))


def _launch(config: Config, inputs: dict, outputs: dict) -> None:
    batch, classes, width, k, n = (inputs[name] for name in "BCDKN")
    points, ends, atomic = 1 + k * n, inputs["ENDS"], inputs["ATOMIC"]
    row_blocks, tiles = triton.cdiv(batch, config.block_b), triton.cdiv(classes, config.block_c)
    strips = triton.cdiv(classes, STRIP_C.value)
    # Each pass is split into about PARALLEL_JOBS jobs; the workspace grows with the jobs and not with B times C.
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
    """The fastest configuration, timed once per device and kind of problem; the first if calls cannot be timed."""
    device = inputs["w"].device
    if len(configs) == 1 or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return configs[0]
    key = (device, inputs["w"].dtype, triton.next_power_of_2(inputs["B"]), inputs["C"], inputs["D"], inputs["K"])
    if key not in _fastest:

        def milliseconds(config: Config) -> float:
            return cast("float", triton.testing.do_bench(lambda: _launch(config, inputs, outputs)))

        _fastest[key] = min(configs, key=milliseconds)
    return _fastest[key]
