"""Compiles the Triton programs that tests and benchmarks launch on a GPU, in advance and without a GPU.

    python -m pytest tests -p launches ...        records launches in Triton's interpreter in the file $LAUNCHES
    python benchmarks/launches.py FILE FOLDER     compiles them for a GPU into FOLDER, a TRITON_CACHE_DIR

Each launch is compiled in the same way as on the GPU (``JITFunction.warmup``, with a driver that names the GPU), so
Triton computes the same cache key. The key depends on Triton's files, the source of the kernel, its arguments and
options, ptxas and the compute capability. FOLDER is therefore valid only for the same wheel of Triton, the same Python
and the same sources.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

KERNELS = {
    "mergetune.kernels.lmc_loss": ("lmc_loss_kernel",),
    "mergetune.kernels.prefix_attention": (
        "prefix_attention_kernel",
        "prefix_attention_backward_kernel",
        "prefix_gradient_kernel",
    ),
}
ALIGNMENT = 16  # Triton compiles for addresses that are multiples of 16, and for others


def described(value: Any) -> Any:
    """Properties of an argument on which a compiled program depends: dtype and alignment of a tensor, or a number."""
    if hasattr(value, "data_ptr"):
        return {"dtype": str(value.dtype).removeprefix("torch."), "offset": value.data_ptr() % ALIGNMENT}
    return value


class Tensor:
    """Replaces a tensor on a GPU."""

    def __init__(self, dtype: str, offset: int) -> None:
        import torch

        self.dtype, self.offset = getattr(torch, dtype), offset

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return 0


# -- recording of launches: a pytest plugin ---------------------------------------------------------------------------


def pytest_collection_finish() -> None:
    """Records every launch; equal launches of a process are recorded once."""
    seen: set[str] = set()
    for module_name, kernels in KERNELS.items():
        module = importlib.import_module(module_name)
        for name in kernels:
            kernel = getattr(module, name)
            kernel.run = recording(kernel.run, module_name, name, seen)


def recording(run: Any, module: str, kernel: str, seen: set[str]) -> Any:
    def wrapped(*args: Any, **options: Any) -> Any:
        given = {k: described(v) for k, v in options.items() if k not in ("grid", "warmup")}
        launch = {"module": module, "kernel": kernel, "args": list(map(described, args)), "options": given}
        line = json.dumps(launch, sort_keys=True)
        if line not in seen:
            seen.add(line)
            with open(os.environ["LAUNCHES"], "a") as file:
                file.write(line + "\n")
        return run(*args, **options)

    return wrapped


# -- compiling --------------------------------------------------------------------------------------------------------


class Driver:
    """A Triton driver that names the GPU to compile for, without having a GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(line: str, capability: int) -> str:
    """Compiles one launch; returns the kernel's name and "compiled", "found" (in the cache) or the error."""
    import triton

    launch = json.loads(line)
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    triton.runtime.driver.set_active(Driver(capability))
    found: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
    stand_in = lambda value: Tensor(**value) if isinstance(value, dict) else value  # noqa: E731
    options = {name: stand_in(value) for name, value in launch["options"].items()}
    try:
        kernel.warmup(*map(stand_in, launch["args"]), grid=(1,), **options)
    except Exception as error:  # on the GPU this launch is compiled again, or fails
        return f"{launch['kernel']}: {type(error).__name__}: {error}"[:300]
    return f"{launch['kernel']}: {'found' if not found or found[-1] else 'compiled'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="file that the plugin wrote")
    parser.add_argument("folder", type=Path, help="cache folder to fill")
    parser.add_argument("--capability", type=int, default=90, help="compute capability of the GPU: 80, 90 or 100")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(options.folder.resolve())}
    os.environ |= {"TRITON_STORE_BINARY_ONLY": "1"}  # a quarter of the size; the key does not depend on this variable
    lines = sorted(set(options.file.read_text().splitlines()))
    counts: dict[str, int] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        for result in pool.map(compile_launch, lines, [options.capability] * len(lines), chunksize=4):
            counts[result] = counts.get(result, 0) + 1
    print("\n".join(f"{count:5} {result}" for result, count in sorted(counts.items())))
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(f"{len(lines)} kinds of launches, {size / 2**20:.1f} MiB in {options.folder}")
    return 0 if all(result.endswith(("found", "compiled")) for result in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
