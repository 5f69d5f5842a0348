"""Ahead-of-time compilation of the Triton kernels, without a GPU, with a report of registers, spills and memory.

``python -m mergetune.kernels.aot`` compiles every configuration that a launcher may choose to machine code, for every
GPU architecture. ptxas reports spills; cuobjdump reports registers and stack. The exit code is 1 if a kernel spills or
exceeds the shared memory of a block.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path

if __name__ == "__main__":  # before the kernels are imported: interpreted ones cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from mergetune.kernels import lmc_loss, prefix_attention
from triton import knobs
from triton.backends.compiler import GPUTarget

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # compute capability -> bytes per block
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS = {  # kinds of calls that compile differently -> compile-time constants
    "prompt": {"NORMALIZE": True, "HAS_W1": True, "HAS_CURVATURE": True, "aligned": ("D",)},
    "prompt, fast": {"NORMALIZE": True, "HAS_W1": True, "HAS_CURVATURE": False, "ATOMIC": True},
    "head with bias": {"NORMALIZE": False, "HAS_W1": True, "HAS_CURVATURE": False, "aligned": ()},
    "one class": {
        "NORMALIZE": True,
        "HAS_W1": True,
        "HAS_CURVATURE": False,
        "C": 1,
        "D": 1,
    },  # Triton compiles 1 as a constant
    "cached dots": {"NORMALIZE": True, "HAS_W1": True, "HAS_CURVATURE": False, "KNOWN_DOTS": True},
}
WIDTHS = (32, 64, 80, 33, 5, 1)  # widths of heads; multiples of 16 allow wide loads, 1 is compiled as a constant


@dataclass(frozen=True)
class Resources:
    """GPU resources of one compiled kernel.

    Attributes:
        kernel: name of the kernel.
        capability: compute capability: 80, 90 or 100.
        dtype, variant, config: case for which the kernel was compiled; config is None for kernels without a choice.
        registers: registers per thread.
        spill_bytes: bytes stored to and loaded from memory because registers are missing.
        stack_bytes: local memory per thread.
        shared_bytes, shared_limit: shared memory per block, and the largest allowed value.
    """

    kernel: str
    capability: int
    dtype: str
    variant: str
    config: lmc_loss.Config | prefix_attention.Config | None
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int

    @property
    def fits(self) -> bool:
        return not self.spill_bytes and not self.stack_bytes and self.shared_bytes <= self.shared_limit


def compile_lmc_loss(capability: int, dtype: str, variant: str, config: lmc_loss.Config, anchors: int = 2) -> Resources:
    """Compiles the kernel of the LMC loss for one architecture and returns its resources."""
    flags = dict(VARIANTS[variant])
    aligned = flags.pop("aligned", ("C", "D"))  # multiples of 16 allow wide loads; with a bias, D is odd
    constants = {
        "ATOMIC": False,
        "KNOWN_DOTS": False,
        "ENDS": triton.next_power_of_2(anchors + 1),
        **flags,
        **lmc_loss.precisions(DTYPES[dtype]),
        "BLOCK_B": config.block_b,
        "BLOCK_C": config.block_c,
        "BLOCK_D": config.block_d,
    }
    types = dict.fromkeys(("x", "w", "anchors", "w1", "curvature", "grad"), f"*{dtype}")
    types |= {"labels": "*i64", "alphas": "*fp64", "betas": "*fp64", "counters": "*i32"}
    types |= dict.fromkeys(("B", "C", "D", "K", "N", "tiles_per_group", "blocks_per_part"), "i32")
    types |= {"scale": "fp32", "lam": "fp32"}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": lmc_loss.MAX_REGISTERS}
    what = "lmc_loss", capability, dtype, variant, config
    return _compile(lmc_loss.lmc_loss_kernel, what, constants, types, aligned, options)


def compile_prefix_attention(
    capability: int, dtype: str, backward: bool, width: int, config: prefix_attention.Config, whole: bool
) -> Resources:
    """Compiles the forward or backward attention kernel for one architecture and returns its resources.

    Args:
        capability, dtype: architecture and dtype.
        backward: whether to compile the backward kernel.
        width: width of a head.
        config: tile sizes.
        whole: whether each group of texts fits one tile.
    """
    kernel = prefix_attention.prefix_attention_backward_kernel if backward else prefix_attention.prefix_attention_kernel
    constants = prefix_attention.constants(config, width, DTYPES[dtype], whole=whole)
    if width == 1:
        constants["D"] = 1
    strides = [name for name in kernel.arg_names if name.endswith(("_m", "_row", "_h"))]
    types: dict[str, str] = dict.fromkeys(("S", "T", "Q", "H", "G", "D", *strides), "i32")
    types |= {"bounds": "*i32", "windows": "*i32", "parts": "*fp32", "scale": "fp32"}
    sums = ("sums", "sums_q", "sums_k", "sums_v")
    types |= {name: f"*{dtype}" for name in kernel.arg_names if name not in types and not (name in sums and not whole)}
    options = {"num_warps": config.num_warps, "num_stages": 1, "maxnreg": prefix_attention.MAX_REGISTERS}
    name = f"prefix_attention{'_backward' if backward else ''}"
    what = name, capability, dtype, f"heads {width} wide, {'whole' if whole else 'long'}", config
    return _compile(kernel, what, constants, types, ("D", *strides) if width % 16 == 0 else (), options)


def compile_prefix_gradient(capability: int, dtype: str) -> Resources:
    """Compiles the kernel that adds the parts of the prefix's gradient, and returns its resources."""
    types = {"parts": "*fp32", "d_prefix_k": f"*{dtype}", "d_prefix_v": f"*{dtype}", "size": "i32", "G": "i32"}
    what = "prefix_gradient", capability, dtype, "", None
    return _compile(prefix_attention.prefix_gradient_kernel, what, {}, types, (), {})


def _compile(
    kernel: triton.JITFunction,
    what: tuple[str, int, str, str, lmc_loss.Config | prefix_attention.Config | None],
    constants: dict,
    types: dict[str, str],
    aligned: tuple[str, ...],
    options: dict,
) -> Resources:
    """Compiles a kernel and reads its resources.

    Args:
        kernel: the kernel.
        what: the first five fields of the result.
        constants: compile-time constants.
        types: Triton types of arguments; other arguments are pointers to float32. All pointers are aligned.
        aligned: integer arguments that are multiples of 16.
        options: compiler options.
    """
    names, capability = kernel.arg_names, what[1]
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if "*" in signature[name] or name in aligned
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    registers, stack = _cubin_usage(compiled.asm["cubin"])
    reported, spills = _ptxas_report(compiled.asm["ptx"], capability)
    if reported != registers:
        raise RuntimeError(
            f"ptxas must be called as Triton calls it, got {reported} registers instead of the cubin's {registers}"
        )
    return Resources(*what, registers, spills, stack, compiled.metadata.shared, SHARED_LIMIT[capability])


def lmc_loss_cases(everything: bool) -> Iterator[Callable[[], Resources]]:
    """Yields functions that compile one case each: every case, or a few different default configurations."""
    configs = lambda dtype: lmc_loss.FLOAT_CONFIGS if dtype == "fp32" else lmc_loss.HALF_CONFIGS  # noqa: E731
    for capability in SHARED_LIMIT:
        if everything:
            one = lambda dtype: lmc_loss.candidate_configs(1, 1, 1, DTYPES[dtype])  # noqa: E731
            for d in DTYPES:
                for v in VARIANTS:
                    for c in one(d) if v == "one class" else configs(d):
                        yield partial(compile_lmc_loss, capability, d, v, c)
        else:
            yield partial(compile_lmc_loss, capability, "bf16", "prompt", configs("bf16")[0])
            yield partial(compile_lmc_loss, capability, "fp32", "head with bias", configs("fp32")[0])


def prefix_attention_cases(everything: bool) -> Iterator[Callable[[], Resources]]:
    """Yields functions that compile one case each: every case, or the first configurations for heads of width 64."""
    for capability in SHARED_LIMIT:
        if not everything:
            for dtype, backward in (("bf16", False), ("bf16", True), ("fp32", True)):
                config = prefix_attention.configs(64, DTYPES[dtype], pooled=False)[0]
                yield partial(compile_prefix_attention, capability, dtype, backward, 64, config, True)
            continue
        for dtype in DTYPES:
            yield partial(compile_prefix_gradient, capability, dtype)
            for width, pooled, backward in product(WIDTHS, (False, True), (False, True)):
                *tiles, last = prefix_attention.configs(width, DTYPES[dtype], pooled=pooled)
                for config in (*tiles, last):
                    yield partial(compile_prefix_attention, capability, dtype, backward, width, config, config != last)


CASES = {"lmc_loss": lmc_loss_cases, "prefix_attention": prefix_attention_cases}


def _ptxas_report(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes from ptxas, called with Triton's options; raises if there is no readable report."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        arch = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, "-lineinfo", "-v", "--regAllocOptLevel=2", arch, str(source)]
        report = subprocess.run([*command, "-o", f"{source}.o"], check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if not registers or not spills:
        raise RuntimeError(f"ptxas reported neither registers nor spills: {report}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, from the compiled machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if not usage:
        raise RuntimeError(f"cuobjdump reported neither registers nor stack: {report}")
    return int(usage[1]), int(usage[2])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the Triton kernels ahead of time, without a GPU.")
    parser.add_argument("--op", choices=CASES, help="compile only the kernels of this op")
    parser.add_argument("--quick", action="store_true", help="compile only a few default configurations")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args()
    failed = False
    for case in chain.from_iterable(CASES[op](not options.quick) for op in ([options.op] if options.op else CASES)):
        found = case()
        failed |= not found.fits
        if options.json:
            print(json.dumps(asdict(found) | {"fits": found.fits}), flush=True)
            continue
        case = f"{found.kernel} sm_{found.capability} {found.dtype}", found.variant, str(found.config or "")
        print(
            f"{', '.join(filter(None, case))}: {found.registers} registers, "
            f"{found.spill_bytes} B spilled, {found.stack_bytes} B stack, shared {found.shared_bytes} of "
            f"{found.shared_limit} B{'' if found.fits else '  DOES NOT FIT'}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
