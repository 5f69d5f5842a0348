"""Commands that ``gpu.py`` runs as separate processes: facts of the machine, one time per op, small calls.

``machine`` needs neither torch nor mergetune, and lists missing packages and tools.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODULES = ("torch", "torchvision", "triton", "open_clip", "ftfy", "numpy", "scipy", "safetensors", "huggingface_hub",
           "typer", "rich", "tqdm", "matplotlib", "PIL", "transformers", "peft", "pytest", "xdist", "pytest_benchmark",
           "pytest_timeout", "pybind11", "setuptools", "wheel", "pip")  # fmt: skip
TOOLS = ("nvcc", "cmake", "ninja", "gcc", "g++", "git", "nvidia-smi", "compute-sanitizer", "ncu")
FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def tool(name: str) -> str | None:
    """Path of a program on PATH, beside Python or in CUDA's usual folders; None if not found."""
    home = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), *home, *FOLDERS]
    return shutil.which(name, path=os.pathsep.join(places))


def said(*command: str) -> str:
    """The last line that a command prints, or the error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1][:200]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"{type(error).__name__}: {error}"[:200]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def machine() -> dict[str, Any]:
    """The entries of pytest-benchmark's machine_info that reports use, and installed and missing packages and tools."""
    found: dict[str, Any] = {
        "cpu": {"brand_raw": cpu_model(), "count": os.cpu_count()},
        "processor": platform.machine(),
        "python_version": platform.python_version(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": None,
        "torch": "not installed",
        "tools": {name: path for name in TOOLS if (path := tool(name))},
        "missing modules": [name for name in MODULES if not find_spec(name)],
    }
    found["missing tools"] = [name for name in TOOLS if name not in found["tools"]]
    if "nvcc" in found["tools"]:
        found["nvcc"] = said(found["tools"]["nvcc"], "--version")
    if "nvidia-smi" in found["tools"]:
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem"
        found["nvidia-smi"] = said(found["tools"]["nvidia-smi"], query, "--format=csv,noheader")
    try:
        import torch

        found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            major, minor = torch.cuda.get_device_capability()
            found |= {
                "gpu": torch.cuda.get_device_name(),
                "capability": f"{major}{minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
    except Exception as error:  # a broken torch is part of the report
        found["torch"] = f"{type(error).__name__}: {error}"[:300]
    if find_spec("triton"):
        from importlib.metadata import version

        found["triton"] = version("triton")
    return found


def calls(small: bool) -> dict[str, Callable[[], Any]]:
    """Name -> call of every op with every available backend, forward and gradient."""
    import torch
    import torch.nn.functional as F

    from mergetune import ops

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    b, c, d, k, n, names = (17, 18, 33, 2, 3, 5) if small else (256, 500, 512, 2, 8, 500)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    x, labels = F.normalize(draw(b, d), dim=-1), (torch.arange(b) % c).to(device)
    w, anchors, w1 = draw(c, d), draw(k, c, d), draw(c, d)
    alphas, betas = (torch.arange(n) / n).to(device), torch.full((k,), 0.5, device=device)
    heads, width = (2, 16) if small else (8, 64)
    lengths = tuple(sorted(1 + i % 9 for i in range(names)))
    rows = [draw(1, size, heads, width) for size in (sum(lengths), sum(lengths), sum(lengths), 5, 5)]

    def loss(backend: str | None) -> Callable[[], Any]:
        def run() -> Any:
            leaf = w.detach().requires_grad_()
            value, _ = ops.lmc_loss(
                x, labels, leaf, anchors, alphas, betas, scale=10.0, w1=w1, lam=4.0, backend=backend
            )
            return torch.autograd.grad(value, leaf)

        return run

    def attention(backend: str | None) -> Callable[[], Any]:
        def run() -> Any:
            leaves = [t.detach().requires_grad_() for t in rows]
            out = ops.prefix_attention(*leaves, lengths, backend=backend)
            return torch.autograd.grad(out.sum(), leaves)

        return run

    def atomic() -> Any:
        from mergetune.kernels import lmc_loss as kernel

        return kernel.lmc_loss(
            x, labels, w, anchors, alphas, betas, 10.0, w1, None, 4.0, True, None, deterministic=False
        )

    def points(backend: str | None) -> Callable[[], Any]:
        p = 1 + k * n
        dots, places = x @ torch.cat([w[None], anchors]).mT, torch.linspace(0, 1, p, device=device).double()
        anchor, weight = (torch.arange(p) % (k + 1)).to(device), torch.ones(p, device=device).double()
        scales = draw(p, c).abs()
        return lambda: ops.path_cross_entropy(dots, labels, anchor, places, weight, scales, backend=backend)

    there = ops.available_backends()
    triton = "triton" in there or (interpreted and bool(find_spec("triton")) and small)
    own = [name for name in ("cpp", "cuda") if name in there and (name == "cpp") != gpu]
    found: dict[str, Callable[[], Any]] = {}
    for backend in (*own, *(["triton"] if triton else []), "torch"):
        found[f"lmc_loss, {backend}"] = loss(backend)
        if backend != "cuda":
            found[f"prefix_attention, {backend}"] = attention(backend)
        if backend != "triton":
            found[f"path_cross_entropy, {backend}"] = points(backend)
    if triton:
        found["lmc_loss, triton, atomic"] = atomic
    return found


def timings() -> None:
    """Prints one line of JSON per op: the median time of ten calls in milliseconds, or the error.

    Three calls warm up. In Triton's interpreter one call warms up and one is timed.
    """
    import statistics

    from measure import timed

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    first, rounds = (1, 1) if interpreted else (3, 10)
    for name, call in calls(small=interpreted).items():
        try:
            for _ in range(first):
                call()
            line = {"op": name, "ms": 1e3 * statistics.median(timed(call) for _ in range(rounds))}
        except Exception as error:  # the next op still runs
            line = {"op": name, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("machine", "timings", "small"))
    parser.add_argument("names", nargs="*", help="for `small`: names of calls to run; without names they are listed")
    options = parser.parse_args()
    if options.what == "machine":
        print(json.dumps(machine()))
    elif options.what == "timings":
        timings()
    elif options.what == "small":
        found = calls(small=True)
        for name in options.names or ():
            found[name]()
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print("\n".join(options.names or found))


if __name__ == "__main__":
    main()
