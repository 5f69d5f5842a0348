"""Locks that let one process at a time work in a folder; the system frees a lock when its process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from warnings import warn

_held: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def locked(file: Path, *, busy: str, wait: bool = False) -> Iterator[None]:
    """Context manager that holds the lock of a file; the system frees the lock when the process ends.

    If the file system has no locks, the function warns and continues without a lock.

    Args:
        file: an empty file for this lock only; created if missing, and not removed.
        busy: message of the error if another process holds the lock.
        wait: wait until the other process frees the lock; no error is raised then.

    Raises:
        RuntimeError: another process holds the lock.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _lock(descriptor, file, busy, wait)
        yield
    finally:
        if descriptor in _held:  # otherwise release_locks has closed the descriptor
            _held.discard(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, file: Path, busy: str, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise RuntimeError(busy) from None
    except OSError as error:
        warn(
            f"{file.parent} is on a file system without locks ({error}): do not let two processes work in this folder "
            "at once",
            stacklevel=2,
        )


def release_locks() -> None:
    """Closes inherited locks in a forked process, so that they do not stay held after the parent is killed."""
    while _held:
        os.close(_held.pop())
