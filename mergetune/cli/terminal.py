"""What may reach the terminal: text of files and names without codes that steer terminals, and of bounded length."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergetune.io import sentences
from mergetune.io.sentences import UNSEEN, escaped

LONGEST = 2000  # characters of a message
LONGEST_CELL = 300  # characters of a cell of a table


def visible(text: str, *, longest: int = LONGEST) -> str:
    """:func:`mergetune.io.sentences.visible` for messages."""
    return sentences.visible(text, longest=longest)


class Terminal(Console):
    """A console that escapes control characters in each text but its line breaks, also in cells and titles."""

    def render_str(self, text: str, **options: Any) -> Text:
        lines = (UNSEEN.sub(escaped, line) for line in text.split("\n"))
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
