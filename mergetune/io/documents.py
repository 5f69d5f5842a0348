"""JSON documents: read, written whole or not at all, and values as they come back from JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergetune.io.files import MAX_SETTINGS, read_regular_text, write_atomically


def jsonable(value: Any) -> Any:
    """The value as it comes back from a JSON file: tuples are lists, keys are text."""
    return json.loads(json.dumps(value))


def compact_json(value: Any) -> bytes:
    """A value as JSON without spaces, in one line without its end."""
    return json.dumps(value, separators=(",", ":")).encode()


def write_json(file: Path, value: Any, *, indent: int = 1) -> None:
    """Put a JSON document in place whole, or leave the old one.

    Raises:
        TypeError, ValueError: JSON cannot hold the value; nothing is written then.
        OSError: the file cannot be written.
    """
    write_atomically(file, f"{json.dumps(value, indent=indent)}\n".encode())


def read_json(file: str | Path, *, limit: int = MAX_SETTINGS) -> Any:
    """The value of a JSON document in UTF-8, with a byte order mark or without.

    Args:
        file: the document.
        limit: bytes that it may have.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is not a regular one, it is too large, or it is not JSON; says which file.
    """
    try:
        return json.loads(read_regular_text(file, limit=limit))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
