"""Text files of others: UTF-8 with or without a byte order mark; other encodings are refused by name."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from mergetune.io.files import MAX_TABLE, read_regular

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_BEGINNING = 1 << 12  # bytes in which texts in UTF-16 without a mark are recognised
_LINE = re.compile(r"\r\n|\r|\n")


def read_text(path: str | Path, *, limit: int = MAX_TABLE) -> str:
    """The text of a file in UTF-8, without the byte order mark.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is not a regular file, is too large, or has another encoding, which the message names.
    """
    return decode_text(path, read_regular(path, limit=limit))


def decode_text(name: str | Path, content: bytes, *, errors: str = "strict") -> str:
    """The text of bytes in UTF-8, without the byte order mark.

    Args:
        name: the file, for messages.
        content: the bytes.
        errors: how bytes that are not UTF-8 are decoded, see :meth:`bytes.decode`. UTF-16 is refused in any case.

    Raises:
        ValueError: the bytes have another encoding, which the message names as far as it is known.
    """
    found = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), None)
    if found or _has_wide_characters(content[:_BEGINNING]):
        raise ValueError(_refusal(name, f"{found or 'UTF-16'}, as Excel and PowerShell write", found or "UTF-16LE"))
    try:
        return content.decode("utf-8-sig", errors=errors)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        got = f"other bytes in line {line:,}, probably Latin-1 (Windows-1252)"
        raise ValueError(_refusal(name, got, "WINDOWS-1252")) from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, of any system: they end in LF, CR LF or CR. Other separators belong to the line."""
    return _LINE.split(text)


def _has_wide_characters(beginning: bytes) -> bool:
    """Whether almost every second byte is 0, as in UTF-16 without a mark; UTF-8 has such bytes in no text."""
    pairs = len(beginning) // 2
    return pairs > 1 and any(beginning[start::2].count(0) > 0.9 * pairs for start in (0, 1))


def _refusal(name: str | Path, got: str, encoding: str) -> str:
    return (
        f'{name} must be text in UTF-8, got {got}: save it as UTF-8 (in Excel as "CSV UTF-8"), or run '
        f"iconv -f {encoding} -t UTF-8 OLD > NEW"
    )
