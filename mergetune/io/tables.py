"""Tables in text files: the rows of a CSV file, with the wanted columns alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergetune.io.sentences import listing


def csv_rows(
    text: str, *, name: str | Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, str | None]]:
    """Yields the rows of a CSV text with a header as {column: value}; empty lines are left out.

    Only the wanted columns are kept: a header of many columns would give every short row many empty values.

    Args:
        text: the CSV text.
        name: the file in messages.
        columns: columns that the header must have.
        optional: columns that are kept if the header has them.

    Raises:
        ValueError: the text is not CSV, or the header lacks a column.
    """
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        header = next(reader, [])
        places = {column: place for place, column in enumerate(header)}
        if any(column not in places for column in columns):
            wanted = ",".join(columns) + "".join(f"[,{column}]" for column in optional)
            raise ValueError(f"{name} must have the header {wanted}, got {listing(header)}")
        kept = {column: places[column] for column in (*columns, *optional) if column in places}
        for row in reader:
            if row:
                yield {column: row[place] if place < len(row) else None for column, place in kept.items()}
    except csv.Error as error:
        raise ValueError(f"{name} must be CSV, got a mistake in line {reader.line_num:,}: {error}") from error
