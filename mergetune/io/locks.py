"""Locks that let one process at a time write a folder or a file; the system frees a lock when its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from warnings import warn

LOCK = ".mergetune.lock"
"""The file of a folder's lock, which stands in the folder while a process writes there."""

_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # without waiting for the writer of a FIFO
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NAME = re.compile(r"\..+\.lock", re.DOTALL)
_OWNER = re.compile(rb"(\d{1,19}) ([\w.-]{1,255})\n")
_LONGEST = 300  # more bytes than the file of a lock has
_FOREIGN = {errno.ELOOP: "a link", errno.EISDIR: "a folder", errno.ENXIO: "a socket"}

PATIENCE, PAUSE = 100, 0.002  # how often, and seconds until, a lock is tried again whose process has ended


@dataclass(frozen=True)
class _Held:
    """A lock of this process: its open file, and the process and thread that hold it."""

    descriptor: int
    owner: tuple[int, int]


_held: dict[str, _Held] = {}  # path of the lock's file -> lock


@contextlib.contextmanager
def writing_in(folder: str | Path) -> Iterator[None]:
    """Context manager in which no other process writes a folder. The folder is made if it is missing.

    A function that is called in this context may lock the same folder again. Under torchrun rank 0 alone holds the
    lock, for all ranks.

    Raises:
        RuntimeError: another process or thread writes the folder.
        OSError: the folder cannot be made.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if _follows():
        yield
        return
    with locked(folder / LOCK, busy=f"{{}} works in {_plain(folder)}: {_way_on('folder')}"):
        yield


@contextlib.contextmanager
def writing_to(file: str | Path) -> Iterator[None]:
    """Context manager in which no other process writes a file; the folder of the file must exist.

    Nothing more is locked if this thread has locked the folder with :func:`writing_in`.

    Raises:
        RuntimeError: another process or thread writes the file.
        FileNotFoundError: the folder does not exist.
    """
    file = Path(file)
    if _follows() or _mine(_held.get(_key(file.parent / LOCK))):
        yield
        return
    if not file.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "must be a file in a folder that exists, got", str(file))
    beginning = os.fsdecode(os.fsencode(file.name)[:200])  # a name of 255 bytes leaves no room for more
    busy = f"{{}} writes {_plain(file)}: {_way_on('file')}"
    with locked(file.with_name(f".{beginning}.lock"), busy=busy):
        yield


@contextlib.contextmanager
def locked(file: Path, *, busy: str, wait: bool = False) -> Iterator[None]:
    """Context manager that holds the lock of a file; the system frees the lock when the process ends.

    The file holds the number of the process and the name of its machine. It is removed at the end; that of a killed
    process is removed by the next one that locks something in the same folder. A thread may take a lock again that it
    holds.

    Where nothing can be written, on a read-only file system for example, there is nothing to protect: the function
    continues without a lock. If the file system has no locks, the function warns and continues. A file that is no lock
    is neither written nor removed.

    Args:
        file: a file for this lock only; created if missing.
        busy: message of the error if the lock is held; ``{}`` stands for "another process" and its number.
        wait: wait until the other process frees the lock; no error is raised then.

    Raises:
        RuntimeError: another process or thread holds the lock.
        ValueError: the file is a link or a folder, has a second name, or holds something else than a lock does.
    """
    key = _key(file)
    remove_dead_locks(file.parent)
    descriptor = None if _mine(_held.get(key)) else _acquired(file, busy, wait)
    if descriptor is None:
        yield
        return
    _held[key] = lock = _Held(descriptor, _self())
    try:
        yield
    finally:
        if _held.get(key) is lock:  # otherwise release_locks has closed the descriptor
            del _held[key]
            try:
                with contextlib.suppress(OSError):
                    # otherwise the file is gone, or another process has made a new one or written something else
                    if _stands(file, descriptor) and not _is_no_lock(descriptor):
                        file.unlink()  # before the lock is freed: nobody else can take it
            finally:
                os.close(descriptor)


def release_locks() -> None:
    """Closes inherited locks in a forked process, so that they do not stay held after the parent is killed."""
    while _held:
        os.close(_held.popitem()[1].descriptor)


def _self() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def _mine(lock: _Held | None) -> bool:
    """Whether a lock is held by this thread; a forked process does not hold the locks of its parent."""
    return lock is not None and lock.owner == _self()


def _key(file: Path) -> str:
    return os.path.join(os.path.realpath(file.parent), file.name)


def _follows() -> bool:
    """Whether this process is a rank of torchrun that works with rank 0."""
    return os.environ.get("RANK", "0") != "0"


def _way_on(kind: str) -> str:
    return f"wait until it ends, then run the same command again, or choose another {kind}"


def _plain(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")


def _acquired(file: Path, busy: str, wait: bool) -> int | None:
    """The descriptor of a lock's file with its lock; None where nothing can be written."""
    patience = PATIENCE
    while (descriptor := _opened(file)) is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _stands(file, descriptor):
                with contextlib.suppress(OSError):  # the number is for messages alone
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} {_host()}\n".encode(), 0)
                return descriptor
        except BlockingIOError:
            owner, dead = _in_words(found := _owner(descriptor)), found is not None and _is_dead(*found)
            os.close(descriptor)
            if dead and patience:  # the file of a killed process is being removed, or its new owner has written nothing
                patience -= 1
                time.sleep(PAUSE)
                continue
            raise RuntimeError(busy.format(owner)) from None
        except OSError as error:
            warn(
                f"{file.parent} is on a file system without locks ({error}): do not let two processes work in this "
                "folder at once",
                stacklevel=2,
            )
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process that held the lock has removed the file
    return None


def _opened(file: Path) -> int | None:
    """The descriptor of a lock's file; None where nothing can be written; ValueError for a file that is no lock."""
    descriptor = None
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | _OPEN, 0o644)
    except OSError as error:
        if error.errno in _FOREIGN:
            raise _foreign(file, _FOREIGN[error.errno]) from None
        if error.errno not in _UNWRITABLE:
            raise
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY | _OPEN)  # the file of another user
    if descriptor is not None and (other := _is_no_lock(descriptor)):
        os.close(descriptor)
        raise _foreign(file, other)
    return descriptor


def _foreign(file: Path, other: str) -> ValueError:
    return ValueError(f"{file} must be missing or a lock of mergetune, got {other}: rename it or remove it")


def _is_no_lock(descriptor: int) -> str:
    """What a file is that no process of ours has made as a lock; "" for a lock, which is empty or names its process."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        return "no regular file"
    if found.st_nlink > 1:
        return "a file with a second name (a hard link)"
    content = os.pread(descriptor, _LONGEST, 0)
    return "" if not content or _OWNER.fullmatch(content) else "other content"


def _stands(file: Path, descriptor: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> tuple[int, str] | None:
    """The number of the process that a lock's file names, and its machine; None if the file does not tell."""
    found = _OWNER.fullmatch(os.pread(descriptor, _LONGEST, 0))
    return None if found is None else (int(found[1]), found[2].decode(errors="replace"))


def _host() -> str:
    """The name of this machine, with no other characters than those that a lock's file may have."""
    return re.sub(r"[^\w.-]", "-", socket.gethostname()[:255], flags=re.ASCII) or "-"


def _in_words(owner: tuple[int, str] | None) -> str:
    if owner is None:
        return "another process"
    number, host = owner
    if host != _host():
        return f"another process (pid {number} on {host})"
    return "another thread of this process" if number == os.getpid() else f"another process (pid {number})"


def _is_dead(number: int, host: str) -> bool:
    """Whether a process has ended, as far as this machine can tell."""
    if host != _host():
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def remove_dead_locks(folder: Path) -> None:
    """Removes files of locks of killed processes: they name a process that has ended, and nobody holds the lock."""
    try:
        names = [entry.name for entry in os.scandir(folder) if _NAME.fullmatch(entry.name)]
    except OSError:  # opening the lock says what is wrong
        return
    for file in (folder / name for name in names):
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | _OPEN)
            try:
                owner = _owner(descriptor)
                if owner is not None and not _is_no_lock(descriptor) and _is_dead(*owner):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _owner(descriptor) == owner and _stands(file, descriptor):
                        file.unlink()
            finally:
                os.close(descriptor)
