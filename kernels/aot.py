"""Compiles the Triton kernels ahead of time, without a GPU: ``python -m mergetune.kernels.aot`` says what they take.

Every configuration that the launcher may choose, for every GPU architecture, is compiled to machine code. Spills are
ptxas's own report, registers and stack what cuobjdump finds in the code. Exits with 1 if anything spills or exceeds the
shared memory of a block.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # before the kernels are imported: interpreted ones cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from mergetune.kernels import lmc_loss
from mergetune.kernels.lmc_loss import Config, lmc_loss_kernel
from triton.backends.compiler import GPUTarget

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS = {  # what the compiler sees of a call
    "prompt": {"NORMALIZE": True, "HAS_W1": True, "HAS_CURVATURE": True, "aligned": ("D",)},
    "prompt, fast": {"NORMALIZE": True, "HAS_W1": True, "HAS_CURVATURE": False, "ATOMIC": True},
    "head with bias": {"NORMALIZE": False, "HAS_W1": True, "HAS_CURVATURE": False, "aligned": ()},
    "one class": {"NORMALIZE": True, "HAS_W1": True, "HAS_CURVATURE": False, "C": 1, "D": 1},  # ones are constants
    "cached dots": {"NORMALIZE": True, "HAS_W1": True, "HAS_CURVATURE": False, "KNOWN_DOTS": True},
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a GPU.

    Attributes:
        kernel: its name.
        capability: 80, 90 or 100.
        dtype, variant, config: what it was compiled for.
        registers: a thread.
        spill_bytes: stored to and loaded from memory for want of registers.
        stack_bytes: local memory a thread.
        shared_bytes: a block, and its limit.
    """

    kernel: str
    capability: int
    dtype: str
    variant: str
    config: Config
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int

    @property
    def fits(self) -> bool:
        return not self.spill_bytes and not self.stack_bytes and self.shared_bytes <= self.shared_limit


def compile_lmc_loss(capability: int, dtype: str, variant: str, config: Config, anchors: int = 2) -> Resources:
    """Compiles the kernel of the LMC loss for one architecture and reads its resources."""
    flags = dict(VARIANTS[variant])
    aligned = flags.pop("aligned", ("C", "D"))  # multiples of 16: loads can be wide; with a bias, D is odd
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
    pointers = dict.fromkeys(("x", "w", "anchors", "w1", "curvature", "grad"), f"*{dtype}")
    pointers |= {"labels": "*i64", "alphas": "*fp64", "betas": "*fp64", "counters": "*i32"}
    scalars = dict.fromkeys(("B", "C", "D", "K", "N", "tiles_per_group", "blocks_per_part"), "i32")
    scalars |= {"scale": "fp32", "lam": "fp32"}
    names = lmc_loss_kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else scalars.get(name) or pointers.get(name, "*fp32") for name in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if "*" in signature[name] or name in aligned
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(lmc_loss_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": lmc_loss.MAX_REGISTERS,
        },
    )
    registers, stack = _cubin_usage(compiled.asm["cubin"])
    reported, spills = _ptxas_report(compiled.asm["ptx"], capability)
    if reported != registers:
        raise RuntimeError(f"ptxas was not called as by Triton: {reported} registers, and the cubin has {registers}")
    return Resources(
        "lmc_loss", capability, dtype, variant, config, registers, spills, stack, compiled.metadata.shared,
        SHARED_LIMIT[capability],
    )  # fmt: skip


def lmc_loss_cases(everything: bool) -> Iterator[tuple[int, str, str, Config]]:
    """Every case, or those of the default configurations that differ most."""
    configs = lambda dtype: lmc_loss.FLOAT_CONFIGS if dtype == "fp32" else lmc_loss.HALF_CONFIGS  # noqa: E731
    for capability in SHARED_LIMIT:
        if everything:
            one = lambda dtype: lmc_loss.candidate_configs(1, 1, 1, DTYPES[dtype])  # noqa: E731
            for d in DTYPES:
                for v in VARIANTS:
                    yield from ((capability, d, v, c) for c in (one(d) if v == "one class" else configs(d)))
        else:
            yield capability, "bf16", "prompt", configs("bf16")[0]
            yield capability, "fp32", "head with bias", configs("fp32")[0]


def _ptxas_report(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes, by Triton's own assembler and options; raises if it cannot be run or understood."""
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
    """Registers and bytes of local memory a thread, from the very machine code that would run."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if not usage:
        raise RuntimeError(f"cuobjdump reported neither registers nor stack: {report}")
    return int(usage[1]), int(usage[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the default configurations only")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    failed = False
    for case in lmc_loss_cases(not options.quick):
        found = compile_lmc_loss(*case)
        failed |= not found.fits
        if options.json:
            print(json.dumps(asdict(found) | {"fits": found.fits}), flush=True)
            continue
        c = found.config
        print(
            f"{found.kernel} sm_{found.capability} {found.dtype} {found.variant:14} tile {c.block_b} x {c.block_c} x "
            f"{c.block_d}, {c.num_warps} warps, {c.num_stages} stages: {found.registers} registers, "
            f"{found.spill_bytes} B spilled, {found.stack_bytes} B stack, shared {found.shared_bytes} of "
            f"{found.shared_limit} B{'' if found.fits else '  DOES NOT FIT'}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
