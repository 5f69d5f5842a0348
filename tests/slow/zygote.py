"""A process that has imported everything and forks one child per command, so that a command takes no time to start.

It reads one JSON object per line on stdin and answers with one on stdout:

    {"do": "start", "arguments": [...], "folder": ..., "output": FILE, "die_at": N or null} -> {"pid": ...}
    {"do": "end", "pid": ..., "after": SECONDS or null} -> {"signal": ..., "code": ..., "seconds": ..., "changes": ...}

"start" runs `mergetune ARGUMENTS` in a session of its own. A child with "die_at" sends itself SIGKILL just before its
N-th change of the files below its folder. "end" waits for the child; after so many seconds, SIGKILL ends its session.
"changes" is the number of changes, of children that end by themselves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401
import open_clip  # noqa: F401
import torch
import torch.export  # noqa: F401

import mergetune.experiments  # noqa: F401
import mergetune.serving  # noqa: F401
from mergetune.cli import app
from mergetune.experiments import comparison, icons, own_images, protocols  # noqa: F401

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def is_change(event: str, arguments: tuple, folder: str) -> bool:
    """Whether an audit event is a change of the files below a folder."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & os.O_CREAT:
            return False
    elif event in CHANGES:
        path = arguments[0]
    else:
        return False
    return isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(folder)


def child(arguments: list[str], folder: str, output: str, die_at: int | None, counted: int) -> None:
    """Runs one command and ends the process."""
    os.setsid()
    os.chdir(folder)
    to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    tempfile.tempdir = str(Path(folder) / "tmp")
    changes = 0

    def watch(event: str, given: tuple) -> None:
        nonlocal changes
        if is_change(event, given, folder):
            changes += 1
            if changes == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    code = 1
    try:
        app(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(counted, str(changes).encode())
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    running: dict[int, tuple[float, int]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.pop("do") == "start":
            counting, counted = os.pipe()
            began, pid = time.monotonic(), os.fork()
            if not pid:
                child(**asked, counted=counted)
            os.close(counted)
            running[pid] = began, counting
            answer = {"pid": pid}
        else:
            pid, after = asked["pid"], asked["after"]
            began, counting = running.pop(pid)
            status = None
            while status is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if not found:
                    status = None
                    if after is not None and time.monotonic() - began >= after:
                        try:
                            os.killpg(pid, signal.SIGKILL)
                        except ProcessLookupError:  # the child has no session of its own yet
                            os.kill(pid, signal.SIGKILL)
                        _, status = os.waitpid(pid, 0)
                    else:
                        time.sleep(0.0005)
            answer = {
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                "seconds": time.monotonic() - began,
                "changes": int(os.read(counting, 20) or 0),
            }
            os.close(counting)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
