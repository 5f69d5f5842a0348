"""The child process of the verification: tries implementations one after the other and reports each on one line.

The parent kills the child if an implementation hangs, because a GPU kernel that loops for ever cannot be stopped within
its process. The report goes through a separate pipe.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mergetune.ops.agreement import Difference, compare_with_definition
from mergetune.ops.backends import OPS
from mergetune.ops.verdicts import Trial

REPEATS = 3  # comparisons on the first problem, to find errors that occur only sometimes
ROUNDS, ROUND_SECONDS = 15, 1.0  # most timed calls, and the time after which no further call starts


@dataclass(frozen=True)
class Case:
    """One implementation to try: op, backend, dtype ("float32") and shape class."""

    op: str
    backend: str
    dtype: str
    shape_class: str


def try_case(case: Case, device: torch.device) -> Trial:
    """Compares one implementation with the definition on every problem, and times it on the first.

    Raises:
        Exception: any error of the implementation.
    """
    op, dtype = OPS[case.op], getattr(torch, case.dtype)
    found, problems = op.implementations[case.backend], op.problems(case.shape_class, dtype, device)
    worst = Difference("", 0.0, 0.0)
    for number, problem in enumerate([problems[0]] * REPEATS + list(problems[1:])):
        difference = compare_with_definition(op, found, problem, dtype)
        if difference is None:
            raise ArithmeticError(f"the definition is not finite on problem {number}")
        if not difference.agrees:
            return Trial(
                backend=case.backend, status="wrong", error=_finite(difference.error), allowed=difference.allowed,
                detail=f"{difference.result} of comparison {number + 1} is off by {difference.error:.1e} of its "
                f"largest value, {difference.allowed:.1e} is allowed",
            )  # fmt: skip
        worst = max(worst, difference, key=lambda d: d.error)
    seconds = median_seconds(lambda: op.results(found, problems[0]), device)
    return Trial(backend=case.backend, status="agreed", error=worst.error, allowed=worst.allowed, seconds=seconds)


def median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call in seconds; on a GPU the time between two events of its stream."""
    for _ in range(3):
        work()
    seconds, began = [], time.perf_counter()
    while len(seconds) < ROUNDS and (len(seconds) < 3 or time.perf_counter() - began < ROUND_SECONDS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Tries implementations of ops and reports each on one line.")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--import", dest="modules", action="append", default=[], help="registers implementations")
    parser.add_argument("--report", type=int, required=True, help="file descriptor that the report goes to")
    parser.add_argument("cases", help="a JSON list of cases")
    options = parser.parse_args()
    _end_with_parent()
    stream = os.fdopen(options.report, "w", buffering=1)  # not stdout, to which a compiler may print

    def report(**line: Any) -> None:
        stream.write(json.dumps(line) + "\n")

    for module in ("mergetune.ops", *options.modules):
        importlib.import_module(module)
    torch.set_num_threads(options.threads)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    torch.zeros(1, device=options.device)
    report(ready=True)
    for case in [Case(**case) for case in json.loads(options.cases)]:
        report(begin=asdict(case))
        fatal = False
        try:
            trial = try_case(case, options.device)
            if options.device.type == "cuda":
                torch.cuda.synchronize(options.device)
        except Exception as error:
            trial = Trial(backend=case.backend, status="raised", detail=f"{type(error).__name__}: {str(error)[:500]}")
            fatal = options.device.type == "cuda" and not _device_works(options.device)
        report(end=asdict(case), trial=trial.model_dump(), fatal=fatal)
        if fatal:  # after a device fault, no further trial can run in this process
            sys.exit(3)


def _end_with_parent() -> None:
    """Makes this process end when its parent ends, because only the parent kills a child that hangs."""
    parent = os.getppid()
    if sys.platform == "linux":  # the kernel's signal arrives even if no thread of this process can run
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _device_works(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


if __name__ == "__main__":
    main()
