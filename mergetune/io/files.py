"""Atomic writing of files, and reading that accepts regular files only."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what writing raises without the file's name


@contextmanager
def naming_full_disk(file: Path) -> Iterator[None]:
    """Context manager in which the error of a full disk, quota or failing disk names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


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
    part, stream = _new_part(file)
    try:
        with naming_full_disk(file), stream:
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


def remove_parts(folder: Path, name: str) -> None:
    """Removes the partial copies of a file that killed processes left in the folder; living processes keep theirs."""
    _remove_dead(folder, name)


_PART = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(?P<token>-[0-9a-f]{8})?\.part", re.DOTALL)


def _new_part(file: Path) -> tuple[Path, BinaryIO]:
    """A new part file and its stream, locked where the file system has locks."""
    beginning = os.fsdecode(os.fsencode(file.name)[:200])  # a name of 255 bytes leaves no room for more
    while True:
        part = file.with_name(f".{beginning}.{os.getpid()}-{secrets.token_hex(4)}.part")
        stream = part.open("xb")
        try:
            with contextlib.suppress(OSError):  # without locks the part file is never removed by others
                fcntl.flock(stream.fileno(), fcntl.LOCK_EX)
            if part.exists():  # otherwise another process took the file for a dead one before it was locked
                return part, stream
        except BaseException:
            stream.close()
            part.unlink(missing_ok=True)
            raise
        stream.close()


def _remove_dead(folder: Path, name: str) -> None:
    """Removes part files whose processes have ended: all with a token, and those of a file that have none.

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
    """Removes a part file if no process holds its lock; raises OSError otherwise."""
    with open_regular(part) as stream:
        fcntl.flock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)  # LOCK_EX needs a writable file on NFS
        part.unlink(missing_ok=True)


# Largest sizes in bytes of files that are read into memory. Each limit is far above usual sizes, which follow.
MAX_SETTINGS = 1 << 26  # a JSON document with settings, of a backbone or a solution: 0.1 MB
MAX_VOCABULARY = 1 << 28  # a tokenizer's vocabulary: 34 MB for 256,000 words
MAX_IMAGE = 1 << 28  # a photo: 50 MB
MAX_LIST = 1 << 28  # a JSON document that lists images: ImageNet's 1.3 million have 0.1 GB
MAX_TABLE = 1 << 30  # a table or a cache's manifest
MAX_WEIGHTS = 1 << 34  # weights that cannot be mapped into memory: 10 GB

# O_NONBLOCK: opening a FIFO must not wait for its writer. O_NOCTTY: a terminal must not become the controlling one.
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading bytes. Links are followed.

    The kind of the file is checked after opening, so no other file can replace it between check and reading.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the path is a folder, a FIFO or device (whose reading may never end), or a socket.
    """
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        if error.errno != errno.ENXIO:  # Linux returns ENXIO for a socket
            raise
        raise ValueError(f"{path} must be a regular file, got a socket") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ValueError(f"{path} must be a regular file, got {_KINDS.get(kind, 'something else')}")


def read_regular(path: str | Path, *, limit: int = MAX_TABLE) -> bytes:
    """All bytes of a regular file; raises the errors of :func:`open_regular` as well.

    Args:
        path: the file.
        limit: largest allowed size in bytes. A sparse file may have terabytes and use no space on the disk.

    Raises:
        ValueError: the file is larger (checked before reading), or grows during reading.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} must have at most {limit:,} bytes, got {size:,}")
        content = file.read(size + 1)
    if len(content) > size:
        raise ValueError(f"{path} must not change while it is read, got more than its {size:,} bytes")
    return content


def read_regular_text(path: str | Path, *, limit: int = MAX_TABLE) -> str:
    """The UTF-8 text of a regular file without byte order mark; raises the errors of :func:`read_regular` as well.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return read_regular(path, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be text in UTF-8, got another byte at {error.start:,}: save the file as UTF-8"
        ) from None


def sha256_regular(path: str | Path, *, limit: int = MAX_IMAGE) -> str:
    """The SHA-256 of a regular file, read in pieces; raises the errors of :func:`read_regular`."""
    digest, left = hashlib.sha256(), limit
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while size <= limit and left >= 0 and (chunk := file.read(1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
    if size > limit or left < 0:
        raise ValueError(f"{path} must have at most {limit:,} bytes, got {max(size, limit - left):,}")
    return digest.hexdigest()


def require_regular(path: str | Path) -> None:
    """Raises the errors of :func:`open_regular` for a path that a library will open."""
    open_regular(path).close()


def require_output_folder(folder: str | Path) -> None:
    """Checks, before the work for it begins, that a folder can be made or written to.

    Raises:
        ValueError: the path, or a part of it, is a file.
        PermissionError: the folder, or the one in which it would be made, cannot be written.
    """
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"out must be a folder that can be made, got {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "out must be a folder that can be written", str(there))


def require_file(path: str | Path, message: str) -> None:
    """Checks that a path is a regular file.

    Args:
        path: the path.
        message: message of the error if the path does not exist.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path is a folder, a FIFO, a device or a socket.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(message)
    if not os.path.isfile(path):
        require_regular(path)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fills a buffer with the bytes of an open file from an offset on. Several threads may read one file at once.

    Raises:
        EOFError: the file ends before the buffer is full, for example because the file was cut off while open.
    """
    while buffer:  # a read may return fewer bytes than requested
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise EOFError(f"the file ends {len(buffer)} bytes too early")
        buffer, offset = buffer[count:], offset + count
