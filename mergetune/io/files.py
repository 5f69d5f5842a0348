"""Files that appear whole or not at all, and files that are read only if they are regular ones."""

import errno
import hashlib
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


# Bytes that files may have which are read whole. Each limit is far above what there is.
MAX_SETTINGS = 1 << 26  # a JSON document with settings, of a backbone or a solution: 0.1 MB
MAX_VOCABULARY = 1 << 28  # a tokenizer's vocabulary: 34 MB for 256,000 words
MAX_IMAGE = 1 << 28  # a photo: 50 MB
MAX_LIST = 1 << 28  # a JSON document that lists images: ImageNet's 1.3 million have 0.1 GB
MAX_TABLE = 1 << 30  # a table or a cache's manifest
MAX_WEIGHTS = 1 << 34  # weights that cannot be mapped into memory: 10 GB

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


def read_regular(path: str | Path, *, limit: int = MAX_TABLE) -> bytes:
    """All bytes of a regular file; raises as :func:`open_regular`.

    Args:
        path: the file.
        limit: bytes that it may have. A file can say that it has terabytes and use no place on the disk.

    Raises:
        ValueError: it is larger, which is seen before anything is read, or it grows meanwhile.
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
    """A regular file's text in UTF-8, without a byte order mark; raises as :func:`read_regular`.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    return read_regular(path, limit=limit).decode("utf-8-sig")


def sha256_regular(path: str | Path, *, limit: int = MAX_IMAGE) -> str:
    """The SHA-256 of a regular file, read piece by piece; raises as :func:`read_regular`."""
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
    """Refuse what :func:`open_regular` refuses, before a library opens the path itself."""
    open_regular(path).close()


def require_file(path: str | Path, message: str) -> None:
    """Refuse what is no regular file: by its kind if it is there, or else with this message.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder, a FIFO, a device or a socket.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(message)
    if not os.path.isfile(path):
        require_regular(path)


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
