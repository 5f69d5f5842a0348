"""Commands under a time limit: whatever one does, the next one runs, and all of them end in time.

Python's standard library alone: this runs before anything is installed.
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

TAIL = 2000  # characters of the output that a report shows
GRACE = 2.0  # seconds between the request to end and the kill
LEAST = 3.0  # seconds below which a part is not begun

PASSED, FAILED, UNSUPPORTED, TIMED_OUT, CRASHED = "passed", "failed", "not supported", "timed out", "crashed"
UNREADABLE, NOT_STARTED, NO_TIME = "unreadable", "not started", "no time left"


@dataclass(frozen=True)
class Part:
    """One command of a stage.

    Attributes:
        name: of the part, also of its files.
        command: program and arguments.
        limit: seconds that it may take.
        read: makes the facts to report, from the folder of the part (which holds "out" and "err"); what it raises makes
            the part unreadable. It is called whatever became of the command.
        env: added to the environment.
        judge: status, from exit code and facts, of a command that ended by itself; by default 0 is passed.
        reserve: seconds of the stage that are left to the parts behind this one.
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
    """What became of a part: its status, seconds, facts, and the end of its output, if it did not pass."""

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
    """Run one part, until its own limit or the stage's deadline, whichever comes first.

    Args:
        part: what to run.
        folder: where its files go, in a new folder named after it.
        deadline: of the stage, as ``time.monotonic()`` counts.
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
    except Exception as error:  # whatever a broken part has written
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
    """End a child's process group and every process that descends from it, in sessions of their own as well."""
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
    """The child, unless it has ended; what is below it; and what it left behind, if this process adopts orphans.

    Parts run one after the other: whatever is below this process belongs to the part.
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
    """Processes whose parents end become children of this one, so that :func:`end` finds them (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
            _adopting.append(os.getpid())


_adopting: list[int] = []  # this process, once it adopts


def descendants(ancestor: int) -> list[int]:
    """Processes below `ancestor`, by Linux's /proc; none elsewhere. Zombies are left out."""
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
    """The end of a file, or nothing if it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4 * characters))
        return file.read().decode(errors="replace")[-characters:]
    return ""
