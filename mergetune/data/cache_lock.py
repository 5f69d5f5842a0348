"""The lock of a feature cache, held by the one process that builds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from warnings import warn

from mergetune.data.cache_files import LOCK

_held: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Hold the cache's lock. The system frees it when the process dies, however it dies."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _lock(descriptor, path)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"feature cache {path} is being built by another process: wait for it, or use another path"
        ) from None
    except OSError as error:
        warn(
            f"{path} lies on a file system without locks ({error}): two builds at once would disturb each other",
            stacklevel=2,
        )


def release_locks(worker: int) -> None:
    """In a decoding process: let go of an inherited lock, which would otherwise outlive a killed parent."""
    while _held:
        os.close(_held.pop())
