"""Verification: tries every implementation for a device once, in a child process with a time limit.

For each op, dtype and shape class, the child (:mod:`mergetune.ops.trials`) compares results and gradients of each
implementation with the definition on random data, and times the implementation. If an implementation hangs or crashes,
the child is killed, the trial is recorded, and a new child continues with the others. The verdicts are stored per
device, driver and versions.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict

import torch
from tqdm.auto import tqdm

from mergetune.io import Document, dtype_name, hidden, locked, parse_document, scratch_folder
from mergetune.ops.backends import OPS, SHAPE_CLASSES, missing
from mergetune.ops.selection import VARIABLE, goes_by_verdict, has_verdicts, indexed, take_verdicts
from mergetune.ops.trials import Case
from mergetune.ops.verdicts import (
    Trial,
    Verdict,
    VerdictFile,
    device_facts,
    folder,
    read_verdicts,
    write_verdicts,
)

LIMIT, CASE_LIMIT, START_LIMIT = 240.0, 60.0, 120.0  # seconds: in total, per trial, until the child is ready
END_LIMIT = 10.0  # seconds from the end of the child's report until it is killed
MAX_LINE = 1 << 20  # bytes of a line of the report: usual ones have 500
Progress = Callable[[int, int, str], None]


class CaseReport(Document, frozen=True):
    """A case in the child's report, see :class:`mergetune.ops.trials.Case`."""

    op: str
    backend: str
    dtype: str
    shape_class: str


class Report(Document, frozen=True):
    """A line of the child's report.

    Attributes:
        ready: the child has started.
        begin: the case that it begins.
        end: the case that it has ended, with its ``trial``.
        trial: outcome of the case.
        fatal: the device is broken, and the child ends.
    """

    ready: bool = False
    begin: CaseReport | None = None
    end: CaseReport | None = None
    trial: Trial | None = None
    fatal: bool = False


def ensure_verified(device: torch.device, *, progress: bool = True) -> None:
    """Verifies the kernels of a device if ``backend=None`` uses a verdict on this device and none is stored.

    A verification takes a few minutes, once per device, driver and versions. Only one process verifies at a time; other
    processes wait for its verdict. If the verification fails, a warning gives the reason, and plain PyTorch is used.

    Args:
        device: device of the ops.
        progress: show a bar if stderr is a terminal.
    """
    if not goes_by_verdict(device) or _known(device):
        return
    with _alone():
        if _known(device):
            return
        with tqdm(disable=hidden(progress), desc=f"verifying kernels on {device}", leave=False) as bar:

            def show(done: int, total: int, what: str) -> None:
                bar.total, bar.n = total, done
                bar.set_postfix_str(what)

            try:
                found = verify(device, progress=show)
            except Exception as error:  # no executable, no temporary folder, a full disk, ...: training must continue
                warnings.warn(
                    f"kernels could not be verified on {device}: {error}. Plain PyTorch is used.", stacklevel=2
                )
                take_verdicts(device, None)  # this process does not try again
                return
        keep(device, found)


def keep(device: torch.device, found: VerdictFile) -> None:
    """Uses a verdict in this process and stores it for later processes; warns if storing fails."""
    take_verdicts(device, found)
    try:
        write_verdicts(found)
    except OSError as error:
        warnings.warn(
            f"the verdict on {device} could not be stored, so the next process verifies again: {error}", stacklevel=3
        )


def verify(
    device: torch.device,
    *,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    shape_classes: Sequence[str] = SHAPE_CLASSES,
    modules: Sequence[str] = (),
    limit: float = LIMIT,
    case_limit: float = CASE_LIMIT,
    progress: Progress | None = None,
) -> VerdictFile:
    """Tries every implementation that can run on a device, in a child process with time limits.

    Args:
        device: "cpu" or a GPU.
        ops: names of the ops; None tries all ops.
        dtypes: dtypes to try; None tries the dtypes of each op.
        shape_classes: some of "small", "medium" and "large".
        modules: modules that the child imports first; they may register further implementations.
        limit: total time in seconds; implementations that are not tried within this time are not used.
        case_limit: seconds per trial, with compilation, after which the child is killed.
        progress: called with the number of finished trials, the number of all trials, and the current trial.

    Returns:
        A verdict for each op, dtype and shape class. :func:`keep` stores the result.

    Raises:
        RuntimeError: the child process does not start.
    """
    device, began = indexed(device), time.monotonic()
    cases = _cases(device, ops or tuple(OPS), dtypes, shape_classes)
    trials: dict[Case, Trial] = {}
    starts_failed = 0
    while (left := [case for case in cases if case not in trials]) and time.monotonic() - began < limit:
        with _Child(device, left, modules) as child:
            try:
                child.wait_until_ready(min(START_LIMIT, began + limit - time.monotonic()))
                starts_failed = 0
            except RuntimeError:
                starts_failed += 1
                if starts_failed == 2:
                    raise
                continue
            while (case := child.next_case()) is not None:
                if progress:
                    progress(len(trials), len(cases), f"{case.op} {case.backend} {case.dtype} {case.shape_class}")
                trial = child.wait_for_trial(case, min(case_limit, max(1.0, began + limit - time.monotonic())))
                trials[case] = trial
                if trial.status in ("hung", "crashed"):  # each further trial of this backend would cost a child
                    reason = f"{trial.status} with {case.dtype}, {case.shape_class} size"
                    same = [c for c in left if (c.op, c.backend) == (case.op, case.backend) and c not in trials]
                    trials |= {c: Trial(backend=c.backend, status="not tried", detail=reason) for c in same}
                    break
                if time.monotonic() - began >= limit:
                    break
    out_of_time = f"no time was left of {limit:g} s"
    trials |= {c: Trial(backend=c.backend, status="not tried", detail=out_of_time) for c in cases if c not in trials}
    grouped: dict[tuple[str, str, str], list[Trial]] = {}
    for case in cases:
        grouped.setdefault((case.op, case.dtype, case.shape_class), []).append(trials[case])
    verdicts = tuple(
        Verdict(op=op, dtype=f"torch.{dtype}", shape_class=shape_class, trials=tuple(found))
        for (op, dtype, shape_class), found in grouped.items()
    )
    return VerdictFile(facts=device_facts(device), verdicts=verdicts, seconds=time.monotonic() - began)


def _cases(
    device: torch.device,
    ops: Sequence[str],
    dtypes: Sequence[torch.dtype] | None,
    shape_classes: Sequence[str],
) -> list[Case]:
    """The cases to try, in order: float32 before other dtypes, and "compile", which is slow, last."""
    found = [
        Case(name, backend, dtype_name(dtype), shape_class)
        for name in ops
        for dtype in OPS[name].dtypes
        if dtypes is None or dtype in dtypes
        for shape_class in shape_classes
        for backend, implementation in OPS[name].implementations.items()
        if implementation.takes(dtype) and missing(backend, device.type) is None
        if not (backend == "triton" and device.type == "cpu")  # Triton's interpreter takes minutes
    ]
    return sorted(found, key=lambda case: (case.backend == "compile", case.dtype != "float32"))


class _Child:
    """A process that tries cases; all waits have time limits, and a process that does not end is killed."""

    def __init__(self, device: torch.device, cases: Sequence[Case], modules: Sequence[str]) -> None:
        if not sys.executable:
            raise RuntimeError("sys.executable must name the Python program, got none: no process can be started")
        reading, writing = os.pipe()
        self.lines: queue.Queue[Report | None] = queue.Queue()
        self.cases = set(cases)
        self.reported = False  # whether the report has ended
        self.damaged = ""  # what is wrong with the report
        self.places = ExitStack()  # closed with the process
        place = self.places.enter_context(scratch_folder())
        self.errors = self.places.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        # The child imports mergetune from the paths of this process, and starts in an empty folder: in the root of a
        # source tree it would import the sources.
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        places = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        environment["PYTHONPATH"] = os.pathsep.join(places)
        command = [sys.executable, "-m", "mergetune.ops.trials", f"--device={device}", f"--report={writing}"]
        command += [f"--threads={torch.get_num_threads()}", *(f"--import={module}" for module in modules)]
        try:
            self.process = subprocess.Popen(
                [*command, json.dumps([asdict(case) for case in cases])],
                stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors, cwd=place,
                env=environment, start_new_session=True, pass_fds=(writing,),
            )  # fmt: skip
        except BaseException:
            os.close(reading)
            self.places.close()
            raise
        finally:
            os.close(writing)
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        if (
            self.reported
        ):  # the process is ending by itself; only so does it remove the temporary files of its compilers
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_LIMIT)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver cannot be awaited
            self.process.wait(10)
        self.places.close()

    def wait_until_ready(self, seconds: float) -> None:
        """Waits for the process's first report; raises RuntimeError if none comes within this time."""
        line = self._next(seconds)
        if line is None or not line.ready:
            raise RuntimeError(f"the process that tries the kernels does not start: {self._last_error()}")

    def next_case(self) -> Case | None:
        """The case that the process begins; None if the process has ended."""
        line = self._next(START_LIMIT)
        if line is None or line.begin is None:
            return None
        case = Case(**line.begin.model_dump())
        return case if case in self.cases else None

    def wait_for_trial(self, case: Case, seconds: float) -> Trial:
        """The trial of the case that has begun; "hung" after ``seconds``, "crashed" if the process ends early."""
        began = time.monotonic()
        line = self._next(seconds)
        if line is not None and line.end == CaseReport(**asdict(case)) and line.trial is not None:
            if line.trial.backend == case.backend:
                return line.trial
            self.damaged = f"its report on {case.backend} is about {line.trial.backend}"
        if line is None and time.monotonic() - began >= seconds:
            detail = f"killed after {seconds:.0f} s: the implementation hangs or is too slow"
            return Trial(backend=case.backend, status="hung", detail=detail)
        return Trial(backend=case.backend, status="crashed", detail=self._last_error())

    def _read(self, reading: int) -> None:
        """Puts the lines of the report in the queue, then None; a line that is not a report ends the reading."""
        try:
            with os.fdopen(reading, "rb") as stream:
                while line := stream.readline(MAX_LINE):
                    self.lines.put(parse_document(line, Report, name="its report", way_on="it is killed"))
            self.reported = True
        except (ValueError, RecursionError) as error:
            self.damaged = str(error)
        finally:
            self.lines.put(None)

    def _next(self, seconds: float) -> Report | None:
        """The next line of the report; None if the process has ended or the time is over."""
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return None

    def _last_error(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # the process may have closed its report just before it ends
        code = self.process.poll()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        state = "is still running" if code is None else f"ended with code {code}"
        damaged = f"; {self.damaged[:300]}" if self.damaged else ""
        return f"the process {state}{damaged}; last line: {said[-1][:300] if said else 'none'}"


def _known(device: torch.device) -> bool:
    """Whether this process has a verdict for the device; a stored verdict is loaded."""
    if has_verdicts(device):
        return True
    found = kept_verdicts(device)
    if found is not None:
        take_verdicts(device, found)
    return found is not None


def kept_verdicts(device: torch.device) -> VerdictFile | None:
    """The stored verdict of a device; None if no verdict is stored or the file is damaged."""
    try:
        return read_verdicts(device_facts(device))
    except (ValueError, OSError):
        return None


@contextmanager
def _alone() -> Iterator[None]:
    """Lets one process of a user verify at a time; if the folder cannot be locked, processes do not wait."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder().mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder() / ".lock", busy="", wait=True))
        yield
