"""Locks: one process at a time works in a folder, and the system frees the lock when that process dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from warnings import warn

_held: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def locked(file: Path, *, busy: str) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is not there. The system frees it when the process dies.

    Where the file system has no locks, a warning says so.

    Args:
        file: of the lock alone; it stays there, and is empty.
        busy: what the error says where another process holds the lock.

    Raises:
        RuntimeError: another process holds the lock.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _lock(descriptor, file, busy)
        yield
    finally:
        if descriptor in _held:  # else release_locks has closed it
            _held.discard(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, file: Path, busy: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(busy) from None
    except OSError as error:
        warn(
            f"{file.parent} lies on a file system without locks ({error}): two processes at once would disturb each "
            "other",
            stacklevel=2,
        )


def release_locks(worker: int = 0) -> None:
    """In a forked process: let go of inherited locks, which would otherwise outlive a killed parent.

    Args:
        worker: its number; not used, but a DataLoader's ``worker_init_fn`` is given it.
    """
    while _held:
        os.close(_held.pop())
