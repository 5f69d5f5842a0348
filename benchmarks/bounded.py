"""Commands with time limits: a command that fails or hangs does not stop the next one, and all end in time.

This file uses only Python's standard library, because it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAIL = 2000  # characters at the end of the output that a report shows
GRACE = 2.0  # seconds between SIGTERM and SIGKILL
LEAST = 3.0  # a part does not start with less than this time in seconds

PASSED, FAILED, UNSUPPORTED, TIMED_OUT, CRASHED = "passed", "failed", "not supported", "timed out", "crashed"
UNREADABLE, NOT_STARTED, NO_TIME = "unreadable", "not started", "no time left"


@dataclass(frozen=True)
class Part:
    """One command of a stage.

    Attributes:
        name: name of the part and of its folder.
        command: program and arguments.
        limit: time limit in seconds.
        read: function from the folder of the part (with the files "out" and "err") to the facts to report. It is called
            for every outcome of the command; if it raises, the status is "unreadable".
        env: variables added to the environment.
        judge: function from exit code and facts to the status of a command that ended by itself; by default exit code 0
            is passed.
        reserve: seconds of the stage that are reserved for later parts.
    """

    name: str
    command: Sequence[str]
    limit: float
    read: Callable[[Path], dict[str, Any]] = lambda folder: {}
    env: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[int, dict[str, Any]], str] = lambda code, facts: FAILED if code else PASSED
    reserve: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The result of a part: status, seconds, facts, and the end of the output if the part did not pass."""

    name: str
    status: str
    seconds: float
    detail: str
    facts: dict[str, Any]
    tail: str

    @property
    def good(self) -> bool:
        return self.status in (PASSED, UNSUPPORTED)


def run_part(part: Part, folder: Path, deadline: float) -> Outcome:
    """Runs one part until its limit or the stage's deadline, whichever comes first.

    Args:
        part: the part to run.
        folder: folder in which the part gets a folder with its name.
        deadline: end of the stage on the clock of ``time.monotonic()``.
    """
    own, began = folder / part.name.replace(" ", "-"), time.monotonic()
    limit = min(part.limit, deadline - began - 2 * GRACE - part.reserve)
    if limit < LEAST:
        return Outcome(part.name, NO_TIME, 0.0, "the limit of the stage came first", {}, "")
    own.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **part.env, "PART_FOLDER": str(own)}
    with (own / "out").open("wb") as out, (own / "err").open("wb") as err:
        try:
            child = subprocess.Popen(
                part.command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, cwd=own,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(part.name, NOT_STARTED, 0.0, f"{part.command[0]}: {error}", {}, "")
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
    seconds = time.monotonic() - began
    try:
        facts, unreadable = part.read(own), ""
        judged = part.judge(code or 0, facts)
    except Exception as error:  # a broken part may write anything
        facts, judged, unreadable = {}, UNREADABLE, f"{type(error).__name__}: {error}"[:300]
    if code is None:
        status, detail = TIMED_OUT, f"stopped after {seconds:.0f} s"
    elif code < 0:
        status, detail = CRASHED, f"ended by signal {-code}"
    else:
        status = FAILED if unreadable and code else judged
        detail = "; ".join(filter(None, (f"exit code {code}" if code else "", unreadable)))
    tail = "" if status == PASSED else "\n".join(filter(None, (last(own / "out"), last(own / "err"))))
    return Outcome(part.name, status, seconds, detail, facts, tail)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child's process group and all its descendants, also those in other sessions."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        stop = time.monotonic() + GRACE
        for process in remaining(child):
            with contextlib.suppress(OSError):
                os.kill(process, number)
        with contextlib.suppress(OSError):
            os.killpg(child.pid, number)
        while remaining(child) and time.monotonic() < stop:
            time.sleep(0.02)


def remaining(child: subprocess.Popen[bytes]) -> list[int]:
    """Ids of the child if it still runs, of its descendants, and of its orphans if this process adopts orphans.

    Parts run one after the other, so every process below this one belongs to the current part.
    """
    child.poll()
    found = [child.pid] if child.returncode is None else []
    if os.getpid() in _adopting:
        with contextlib.suppress(ChildProcessError):
            while child.returncode is not None and os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return found + [process for process in descendants(os.getpid()) if process not in found]
    return found + descendants(child.pid)


def adopt_orphans() -> None:
    """Makes orphaned processes children of this process, so that :func:`end` finds them (Linux only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
            _adopting.append(os.getpid())


_adopting: list[int] = []  # id of this process, once it adopts orphans


def descendants(ancestor: int) -> list[int]:
    """Ids of the descendants of a process without zombies, from Linux's /proc; empty on other systems."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, waiting = [], [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def last(path: Path, characters: int = TAIL) -> str:
    """The end of a file as text; empty if the file cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4 * characters))
        return file.read().decode(errors="replace")[-characters:]
    return ""
