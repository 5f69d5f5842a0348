"""Measurement of a candidate against baselines and lower bounds (floors), peak memory, and sizes of real tasks.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from report import show_bytes, show_seconds

TASKS = {"eurosat": 5, "caltech101": 50, "imagenet-base": 500, "imagenet": 1000}
"""Task -> number of training classes: half of the dataset's in base-to-novel; all classes for "imagenet"."""

BATCHES = (32, 128, 256, 512)
WIDTH = 512  # D of ViT-B/16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Work = Callable[[], Any]


def timed(work: Work) -> float:
    """Time of one call in seconds; on a GPU the time between two events of its stream."""
    if DEVICE == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_memory(work: Work) -> int | None:
    """Peak memory of one call in bytes, beyond the memory in use before: torch's on a GPU, resident pages on Linux."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # returns freed pages to the system, so that their new use counts
    Path("/proc/self/clear_refs").write_text("5")  # sets the recorded peak to the current resident memory
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(which: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


class Others:
    """Measures how many CPUs other processes use from now on; None if the system does not report this."""

    def __init__(self) -> None:
        self.began, self.busy = time.perf_counter(), _busy_seconds()

    def cpus(self) -> float | None:
        if self.busy is None:
            return None
        return max(0.0, (_busy_seconds() - self.busy) / (time.perf_counter() - self.began))


def _busy_seconds() -> float | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    own = os.times()
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - (own.user + own.system + own.children_user + own.children_system)


def compare(
    benchmark: BenchmarkFixture,
    title: str,
    candidate: Work,
    *,
    baselines: Mapping[str, Work] | None = None,
    floors: Mapping[str, Work] | None = None,
    measured: Mapping[str, float] | None = None,
    computed: Mapping[str, float] | None = None,
    rounds: int = 11,
    memory: bool = True,
    **facts: Any,
) -> None:
    """Times the candidate, baselines and floors in turn in every round, so that disturbances affect all equally.

    Args:
        benchmark: fixture of pytest-benchmark, which stores the results.
        title: name of the candidate, by which ``summarise.py`` compares runs.
        candidate: work of the library.
        baselines: name -> other work with the same result.
        floors: name -> work that every implementation must do, or a smaller case.
        measured: name of a baseline that is too slow for every round -> seconds, measured by the caller.
        computed: name of a floor computed from sizes and the device's speed -> seconds.
        rounds: number of rounds after one warm-up round. Medians and fastest times are recorded.
        memory: whether to record peak memory in a further round.
        facts: further entries of the record.
    """
    baselines, floors, measured = dict(baselines or {}), dict(floors or {}), dict(measured or {})
    computed = dict(computed or {})
    works = {title: candidate, **baselines, **floors}
    if not benchmark.enabled:
        benchmark(candidate)
        return
    for work in works.values():
        work()
    others, seconds = Others(), {name: [] for name in works}

    def all_others() -> None:
        for name, work in works.items():
            if name != title:
                seconds[name].append(timed(work))

    benchmark.pedantic(lambda: seconds[title].append(timed(candidate)), setup=all_others, rounds=rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()} | measured | computed
    fastest = {name: min(values) for name, values in seconds.items()} | measured | computed
    benchmark.extra_info |= {
        "title": title,
        "seconds": medians,
        "fastest": fastest,
        "baselines": [*baselines, *measured],
        "floors": [*floors, *computed],
        "other_cpus": others.cpus(),
        "peak_bytes": {n: peak_memory(work) for n, work in works.items() if n not in floors} if memory else {},
        **facts,
    }
    if record := os.environ.get("MERGETUNE_BENCH_RECORD"):  # an interrupted run keeps its results
        with open(record, "a") as file:
            file.write(json.dumps(dict(benchmark.extra_info)) + "\n")


def lines(info: Mapping[str, Any]) -> list[str]:
    """The record of :func:`compare` as lines of text."""
    own, peak = info["seconds"][info["title"]], info["peak_bytes"]
    disturbed = "" if info["other_cpus"] is None else f"; others used {info['other_cpus']:.2f} CPUs meanwhile"
    found = [f"{info['title']}: {show_seconds(own)}{show_bytes(peak.get(info['title']))}{disturbed}"]
    for name in info["baselines"]:
        seconds = info["seconds"][name]
        found.append(
            f"    {seconds / own:8.2f} x as fast as {name}: {show_seconds(seconds)}{show_bytes(peak.get(name))}"
        )
    for name in info["floors"]:
        seconds = info["seconds"][name]
        found.append(f"    {own / seconds:8.2f} x the time of {name}: {show_seconds(seconds)}")
    return found
