"""Benchmark of a linear head on a cache of ImageNet's size: open, select, training steps, accuracy and memory.

MERGETUNE_BENCH_ROWS=1281167 gives ImageNet's size. This needs 1.3 GB of disk in the folder ``--basetemp`` and some
minutes.

The figures are for these rows in a cache of version 0.1, on one thread of an AMD EPYC (Zen 5) that other processes used
as well. Opening takes 0.9 s of CPU time (with the checksums of the images 3.0 s and 0.4 GB
more at the peak). ``select`` takes 0.6 s for 16,000 images and 1.3 s for all. Rows in random order take 0.7 to 1.5 ms
per batch of 512, all rows in order 0.3 s. The table shows one process from import to test, in CPU seconds and highest
resident memory in GB:

| | CPU | all memory | anonymous |
|---|---|---|---|
| imports | | 0.81 | 0.48 |
| a ViT-B/16 | 0.9 s | 1.45 | 1.11 |
| open | 0.9 s | 1.80 | 1.46 |
| zero-shot weights, 128 texts per call | 9.3 s | 1.78 | 1.43 |
| ``tune(method="head")``, one epoch, B 512: 17 ms per step | 40 s | 1.75 | 1.39 |
| ``fit``, one epoch, B 512: 23 ms per step | 56 s | 1.75 | 1.39 |
| accuracy on all rows | 15 s | 1.75 | 1.39 |

Memory-mapped features would add 1.3 GB. With 512 texts per call of the text tower the total rises to 2.10 GB.

Shapes: B batch, C classes, D embedding width, N rows of the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from bench_cache import random_cache
from measure import TASKS, WIDTH, Others, compare

from mergetune import Dataset, FeatureCache, FrozenClip, Head, ImageList, fit, tune
from mergetune.evaluation import accuracy
from mergetune.solutions import Solution, Space
from mergetune.training.objective import Anchors, Near, Objective, path_points

ROWS = int(os.environ.get("MERGETUNE_BENCH_ROWS", 300_000))
BATCH, CLASSES, MAX_RSS = 512, TASKS["imagenet"], 2_000_000_000
SCALE, POINTS, LAM, BETA = 100.0, 5, 8.0, 0.5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cache whose class names are numbers."""
    path = tmp_path_factory.mktemp("imagenet")
    random_cache(path, ROWS, [f"number {i}" for i in range(CLASSES)])
    return path


@pytest.fixture(scope="module")
def cache(path: Path) -> FeatureCache:
    return FeatureCache.open(path)


def images_of(cache: FeatureCache) -> ImageList:
    return ImageList(cache.path, cache.files, tuple(cache.labels.tolist()), cache.classnames)


def test_open(benchmark, path: Path) -> None:
    """Times opening the cache, which precedes reading the first row."""
    manifest = path / "manifest.json"
    compare(
        benchmark,
        f"open, {ROWS} images",
        lambda: FeatureCache.open(path),
        baselines={"reading the whole manifest": lambda: json.loads(manifest.read_bytes())},
        rounds=3,
        manifest=manifest.stat().st_size,
    )


def test_select(benchmark, cache: FeatureCache) -> None:
    """Times the selection of 16 images per class, drawn beforehand."""
    few = Dataset("imagenet", images_of(cache)).few_shot(16)
    compare(benchmark, f"select, {len(few)} of {ROWS} images", lambda: cache.select(few), rounds=3)


@pytest.mark.parametrize("stage", ["tune", "fit"])
def test_step(benchmark, cache: FeatureCache, stage: str) -> None:
    """Times one training step of ``tune(method="head")`` or ``fit`` with batches drawn from all rows."""
    generator = torch.Generator().manual_seed(0)
    w1 = torch.nn.functional.normalize(torch.randn(CLASSES, WIDTH, generator=generator), dim=-1)
    paths = Anchors(
        classes=w1[None] + 0.01 * torch.randn(1, CLASSES, WIDTH, generator=generator),
        betas=torch.tensor([BETA]),
        alphas=path_points("even", POINTS),
        points=POINTS,
    )
    space = Space(
        classes=lambda states: states["weight"], images=None, between=Solution.straight, scale=SCALE, normalize=False,
        width=WIDTH,
    )  # fmt: skip
    objective = Objective(space, *((paths, Near(LAM, classes=w1)) if stage == "fit" else ()))
    parameter = w1.clone().requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=1e-4, momentum=0.9, weight_decay=5e-4)
    order = torch.randperm(ROWS, generator=generator)
    batches = iter(order.repeat(8).split(BATCH))
    x = cache.rows(order[:BATCH])

    def step(rows: torch.Tensor, index: torch.Tensor) -> None:
        loss, _ = objective({"weight": parameter}, rows, cache.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def drawn() -> None:
        index = next(batches)
        step(cache.rows(index), index)

    way = "mapped" if cache.source.mapped else "read"
    compare(
        benchmark,
        f"{stage} a head, one step, B {BATCH}, C {CLASSES}, {way}",
        drawn,
        baselines={"the same batch every time": lambda: step(x, order[:BATCH])},
        floors={
            "the rows alone": lambda: cache.rows(next(batches)),
            "its GEMMs": lambda: (x @ w1.T).T @ x,
        },
        rounds=31,
    )


def test_accuracy(benchmark, cache: FeatureCache) -> None:
    """Times the accuracy over all rows, in order."""
    weights = torch.randn(CLASSES, WIDTH)
    x = torch.randn(2048, WIDTH)
    compare(
        benchmark,
        f"accuracy of a head, {ROWS} images",
        lambda: accuracy(weights, cache),
        floors={"its GEMMs": lambda: [x @ weights.T for _ in range(ROWS // len(x))]},
        rounds=3,
    )


@pytest.mark.slow
def test_memory(benchmark, path: Path) -> None:
    """Measures a separate process: imports, a ViT-B/16, opening, one epoch of ``tune`` and of ``fit``, and a test."""
    others, began = Others(), time.perf_counter()
    command = [sys.executable, __file__, str(path)]
    run = benchmark.pedantic(lambda: subprocess.run(command, capture_output=True, text=True, check=True), rounds=1)
    phases = json.loads(run.stdout)
    title = f"a head on {ROWS} x {WIDTH}, whole run"
    most = max(phase["peak_rss"] for phase in phases.values())
    benchmark.extra_info |= {
        "title": title,
        "seconds": {title: time.perf_counter() - began},
        "fastest": {title: time.perf_counter() - began},
        "baselines": [],
        "floors": [],
        "other_cpus": others.cpus(),
        "peak_bytes": {title: most},
        "phases": phases,
    }
    assert most < MAX_RSS, phases


class Phases:
    """Time and peak memory of consecutive phases of a process, as Linux reports them."""

    def __init__(self) -> None:
        self.done: dict[str, dict[str, float]] = {}
        self.anonymous, self.began = 0, (time.perf_counter(), time.process_time())
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:  # Linux does not record the peak of anonymous memory
            self.anonymous = max(self.anonymous, self._of_status("RssAnon"))
            time.sleep(0.005)

    def end(self, name: str) -> None:
        wall, processor = self.began
        self.done[name] = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - processor,
            "peak_rss": self._of_status("VmHWM"),
            "peak_anonymous": self.anonymous,
        }
        Path("/proc/self/clear_refs").write_text("5")
        self.anonymous, self.began = 0, (time.perf_counter(), time.process_time())

    def _of_status(self, which: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(which)).split()[1]) * 1024


def whole_run(path: Path) -> dict[str, dict[str, float]]:
    """The work of the process in :func:`test_memory`; returns the figures of its phases."""
    import open_clip

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    phases = Phases()
    phases.end("imports")
    torch.manual_seed(0)
    clip = FrozenClip(open_clip.create_model("ViT-B-16"), open_clip.get_tokenizer("ViT-B-16"), "ViT-B-16/random")
    phases.end("CLIP")
    cache = FeatureCache.open(path)
    phases.end("open")
    head = Head.zero_shot(clip, cache.classnames)
    phases.end("zero-shot weights")
    training = {"epochs": 1, "batch_size": BATCH, "warmup_epochs": 0}
    tuned = tune(clip, cache, method="head", lr=1e-4, **training)
    phases.end("tune")
    merged = fit(clip, cache, tuned.solution, zero_shot=head, lr=1e-4, **training)
    phases.end("fit")
    accuracy(merged.solution.weight, cache)
    phases.end("accuracy")
    phases.done["tune"]["ms_per_step"] = tuned.timings["ms_per_step"]
    phases.done["fit"]["ms_per_step"] = merged.timings["ms_per_step"]
    return phases.done


if __name__ == "__main__":
    print(json.dumps(whole_run(Path(sys.argv[1]))))
