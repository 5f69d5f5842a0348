"""JSON documents: reading, atomic writing, and conversion of values to their JSON form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergetune.io.files import MAX_SETTINGS, read_regular_text, write_atomically


def jsonable(value: Any) -> Any:
    """The value after writing to JSON and reading back: tuples become lists, keys become text."""
    return json.loads(json.dumps(value))


def compact_json(value: Any) -> bytes:
    """A value as JSON without spaces, on one line, without a newline at the end."""
    return json.dumps(value, separators=(",", ":")).encode()


def write_json(file: Path, value: Any, *, indent: int = 1) -> None:
    """Writes a JSON document atomically: on an error the old file stays.

    Raises:
        TypeError, ValueError: JSON cannot represent the value; nothing is written.
        OSError: the file cannot be written.
    """
    write_atomically(file, f"{json.dumps(value, indent=indent)}\n".encode())


def read_json(file: str | Path, *, limit: int = MAX_SETTINGS) -> Any:
    """Reads a JSON document in UTF-8, with or without a byte order mark.

    Args:
        file: the document.
        limit: largest allowed size in bytes.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is not a regular file, is too large or is not JSON; the message names the file.
    """
    try:
        return json.loads(read_regular_text(file, limit=limit))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
