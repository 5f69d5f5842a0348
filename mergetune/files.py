"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Put a file in place whole, or leave the old one, whatever happens to this process or the power."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
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


def remove_parts(folder: Path, name: str) -> None:
    """Remove what killed processes left of a file while they wrote it."""
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)
