"""Atomic writing of files and scratch folders; what killed processes leave of them is removed by the next process.

Everything unfinished is called ``.NAME.PID-TOKEN.part``: NAME is the file that is written (or "mergetune" in the
system's folder for temporary files), PID the process and TOKEN eight random hex digits. The process holds a lock on
it. Whatever has such a name and no lock is the rest of a dead process. Nothing else is ever removed.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mergetune.io.files import naming_full_disk


@contextmanager
def writing_atomically(file: Path) -> Iterator[BinaryIO]:
    """Context manager with a stream whose content becomes the file at the end; the file is never partly written.

    The content grows in a hidden part file beside the file, which is locked while its process lives. Part files of
    killed processes in the same folder are removed first.

    Raises:
        IsADirectoryError: the file is a folder.
        OSError: the folder does not exist or cannot be written, or the disk is full; the message names the file.
    """
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "must be a file that can be written, got a folder", str(file))
    _remove_dead(file.parent, file.name)
    part, descriptor = _new_part(file.parent, file.name, _new_file)
    try:
        with naming_full_disk(file), os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(part, file)  # before the stream is closed, which frees the lock
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(file: Path, content: bytes) -> None:
    """Writes a file atomically: after a crash or power failure, either the old or the whole new file exists."""
    with writing_atomically(file) as stream:
        stream.write(content)


@contextmanager
def scratch_folder(file: Path | None = None) -> Iterator[Path]:
    """Context manager with a new folder for this user alone, which is removed with its content at the end.

    The folder is locked while its process lives. Folders of killed processes are removed first.

    Args:
        file: file that will be made in the folder: the folder is hidden beside the place of the file, so that the file
            can be renamed. None takes the system's folder for temporary files.
    """
    parent, name = (Path(tempfile.gettempdir()), "mergetune") if file is None else (file.parent, file.name)
    _remove_dead(parent, name)
    folder, descriptor = _new_part(parent, name, _new_folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_parts(folder: Path, name: str) -> None:
    """Removes the partial copies of a file that killed processes left in the folder; living processes keep theirs."""
    _remove_dead(folder, name)


_PART = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(?P<token>-[0-9a-f]{8})?\.part", re.DOTALL)


_PRIVATE = 0o700  # mode of scratch folders


def _new_file(path: Path) -> tuple[int, int]:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), fcntl.LOCK_EX


def _new_folder(path: Path) -> tuple[int, int]:
    path.mkdir(_PRIVATE)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH


def _new_part(parent: Path, name: str, make: Callable[[Path], tuple[int, int]]) -> tuple[Path, int]:
    """A new part file or folder and its open descriptor, locked where the file system has locks."""
    beginning = os.fsdecode(os.fsencode(name)[:200])  # a name of 255 bytes leaves no room for more
    while True:
        part = parent / f".{beginning}.{os.getpid()}-{secrets.token_hex(4)}.part"
        try:
            descriptor, lock = make(part)
        except FileExistsError:
            continue
        except FileNotFoundError:
            if parent.is_dir():  # another process took the new folder for a dead one before it was opened
                continue
            raise
        with contextlib.suppress(OSError):  # without locks the part is never removed by others
            fcntl.flock(descriptor, lock)
        if part.exists():  # otherwise another process took it for a dead one before it was locked
            return part, descriptor
        os.close(descriptor)


def _remove_dead(folder: Path, name: str) -> None:
    """Removes parts whose processes have ended: all with a token, and those of a file that have none.

    Version 0.1 wrote names without a token. Such a name could be another program's unless it is that of the file.
    """
    try:
        entries = [entry.name for entry in os.scandir(folder) if entry.name.endswith(".part")]
    except OSError:  # no folder, or none that can be listed: writing says what is wrong
        return
    for found in filter(None, map(_PART.fullmatch, entries)):
        if found["token"] or found["name"] == name:
            with contextlib.suppress(OSError):
                _remove_unlocked(folder / found[0])


def _remove_unlocked(part: Path) -> None:
    """Removes a part file, or a scratch folder of this user, if no process holds its lock; else raises OSError."""
    descriptor = os.open(part, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        # NFS gives LOCK_EX to writable files alone: folders, which are none, are never removed there.
        if stat.S_ISREG(found.st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            part.unlink()
        elif stat.S_ISDIR(found.st_mode) and (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), _PRIVATE):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part)
    finally:
        os.close(descriptor)
