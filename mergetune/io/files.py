"""Reading that accepts regular files only, and checks of paths before the work."""

import errno
import hashlib
import os
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
