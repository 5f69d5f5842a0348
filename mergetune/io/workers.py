"""Child processes and Ctrl-C: the terminal signals all processes, but only the main one reacts and ends the others."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mergetune.io.locks import release_locks


def begin_worker(worker: int = 0) -> None:
    """Prepares a forked worker: it leaves Ctrl-C to its parent and closes the locks that it inherited.

    Args:
        worker: not used; a DataLoader passes the worker's number to its ``worker_init_fn``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    release_locks()


@contextmanager
def unaware_of_interrupts() -> Iterator[None]:
    """Context manager in which Ctrl-C is ignored; processes that are started in it ignore Ctrl-C from their start."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may change this
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_workers() -> None:
    """Ends the child processes that multiprocessing started. Call this when the main process is stopped."""
    for process in multiprocessing.active_children():
        process.terminate()
