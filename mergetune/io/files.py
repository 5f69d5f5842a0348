"""Files that appear whole or not at all, and files that are read only if they are regular ones."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def writing_atomically(file: Path) -> Iterator[BinaryIO]:
    """A stream to a file that is put in place whole at the end, or not at all, whatever happens to this process."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(file: Path, content: bytes) -> None:
    """Put a file in place whole, or leave the old one, whatever happens to this process or the power."""
    with writing_atomically(file) as stream:
        stream.write(content)


def remove_parts(folder: Path, name: str) -> None:
    """Remove what killed processes left of a file while they wrote it."""
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)


# O_NONBLOCK: to open a FIFO waits for its writer otherwise. O_NOCTTY: a terminal must not become this process's own.
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | Path) -> BinaryIO:
    """A stream of a regular file's bytes.

    The kind is that of the file that was opened, so no other file can take its place in between. A link is followed.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: a folder; a FIFO or a device, whose reading may never end; a socket.
    """
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        if error.errno != errno.ENXIO:  # what Linux answers for a socket
            raise
        raise ValueError(f"{path} must be a regular file, got a socket") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ValueError(f"{path} must be a regular file, got {_KINDS.get(kind, 'something else')}")


def read_regular(path: str | Path) -> bytes:
    """All bytes of a regular file; raises as :func:`open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_regular_text(path: str | Path) -> str:
    """A regular file's text in UTF-8, without a byte order mark; raises as :func:`open_regular`.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    return read_regular(path).decode("utf-8-sig")


def require_regular(path: str | Path) -> None:
    """Refuse what :func:`open_regular` refuses, before a library opens the path itself."""
    open_regular(path).close()


def read_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer with the bytes of an open file from a place on. Several threads may read one file at once.

    Raises:
        EOFError: the file ends before the buffer is full, as when it was cut off while it was open.
    """
    while buffer:  # the system may give less than was asked for
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise EOFError(f"the file ends {len(buffer)} bytes too early")
        buffer, offset = buffer[count:], offset + count
