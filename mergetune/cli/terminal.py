"""What may reach the terminal: text of files and names without codes that steer terminals, and of bounded length."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST = 2000  # characters of a message
LONGEST_CELL = 300  # characters of a cell of a table
# Control characters, halves of surrogate pairs, separators of lines, and marks that turn the direction of writing.
_UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")


def visible(text: str, *, longest: int = LONGEST) -> str:
    """Text on one line in which control characters are escaped, such as ``\\\\x1b``; a long one lacks its middle.

    Args:
        text: the text, of any length; it may quote files and names of others.
        longest: number of characters from which on the middle is left out.
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return _UNSEEN.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


class Terminal(Console):
    """A console that escapes control characters in each text but its line breaks, also in cells and titles."""

    def render_str(self, text: str, **options: Any) -> Text:
        lines = (_UNSEEN.sub(_escaped, line) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options)


class PlainTable(Table):
    """A table whose cells are shown as they are: without markup, and without line breaks of their own."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(Text(visible(cell, longest=LONGEST_CELL)) for cell in cells), **options)


@contextmanager
def visible_warnings() -> Iterator[None]:
    """Context manager in which Python's warnings are printed as one line without control characters.

    Warnings for users, such as those about images and names, have no place in a program.
    """

    def line(message: Warning | str, category: type[Warning], file: str, number: int, source: str | None = None) -> str:
        place = "warning" if category is UserWarning else f"{file}:{number}: {category.__name__}"
        return f"{place}: {visible(str(message))}\n"

    before = warnings.formatwarning
    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = before
