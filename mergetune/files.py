"""Files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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


def jsonable(value: Any) -> Any:
    """The value as it comes back from a JSON file: tuples are lists, keys are text."""
    return json.loads(json.dumps(value))
