"""Lists of images in files: tables of other programs (CSV with any separator, TSV, JSON, JSON lines), and their paths.

A table has a path, a label and perhaps a split per image. Usual names of columns count, in any case of letters:
``filename``, ``file_name`` or ``image`` for the path, ``class`` or ``category`` for the label.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetune.data.folder_layouts import split_of
from mergetune.data.image_files import brief, leaves_root
from mergetune.io import MAX_LIST, image_extensions, lines_of, listing, read_json, read_text

TABLES = (".csv", ".tsv", ".json", ".jsonl")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# Column -> its usual names, without spaces and underscores; of several in a file, the first here counts.
COLUMNS: Mapping[str, Sequence[str]] = {
    "path": (
        "path", "filepath", "filepaths", "filename", "filenames", "file", "files", "imagepath", "imgpath", "imagefile",
        "imagename", "image", "images", "img", "imageid",
    ),
    "label": (
        "classname", "labelname", "class", "label", "labels", "category", "categoryname", "target", "species", "breed",
    ),
    "split": ("split", "set", "dataset", "subset", "partition"),
}  # fmt: skip


def table_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, each with the keys path, label and, if the table has splits, split.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no such table; the message names the file and, where one is wrong, the row.
    """
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise ValueError(f"path must end in {', '.join(TABLES[:-1])} or {TABLES[-1]}, got {path}")
    rows = _records(path, kind) if kind.startswith(".json") else cells(path, read_text(path))
    if not rows:
        raise ValueError(f"{path} must list at least one image, got none")
    for number, row in enumerate(rows, start=1):
        file, label, split = (row.get(key) for key in ("path", "label", "split"))
        where = f"row {number} of {path}"
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        if not (isinstance(file, str) and file and isinstance(label, str) and label.strip()):
            raise ValueError(f"{where} must have a path and a class name as label, got path={file!r}, label={label!r}")
        row["label"] = label.strip()
        if "split" in rows[0] or split is not None:
            row["split"] = split_of(split) if isinstance(split, str) else None
            if "split" not in rows[0] or row["split"] is None:
                raise ValueError(f"{where} must have a split (train, val or test) if any row has one, got {split!r}")
    return rows


def _records(path: Path, kind: str) -> list[dict[str, Any]]:
    """The objects of a JSON list, or of the lines of a file."""
    if kind == ".jsonl":
        rows = []
        for number, line in enumerate(lines_of(read_text(path)), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError):
                    raise ValueError(f"{path} must have JSON in each line, got none in line {number:,}") from None
    else:
        rows = read_json(path, limit=MAX_LIST)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must be a list of objects with path and label, got {brief(rows)}")
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not (columns := columns_of(keys)):
        raise ValueError(f"{path} must have the keys path and label, got {listing(keys)}: {_accepted([*COLUMNS])}")
    return [{name: row[key] for name, key in columns.items() if key in row} for row in rows]


def cells(path: Path, text: str, needed: Sequence[str] = ("path", "label")) -> list[dict[str, Any]]:
    """The rows of a table with separators, with a header or without.

    Args:
        path: the file, for messages.
        text: its content.
        needed: columns that must be there.

    Raises:
        ValueError: no such table; the message names the file and, where one is wrong, the row.
    """
    if found := re.match(r"sep=(.)\s*\n", text):  # Excel's hint
        text = text[found.end() :]
    first = next((line for line in lines_of(text) if line.strip()), "")
    headers = {sign: next(_split([first], sign, path), []) for sign in SEPARATORS}
    for sign, header in headers.items():
        header = [cell.strip() for cell in header]
        if columns := columns_of(header, needed):
            places, skipped = {name: header.index(column) for name, column in columns.items()}, 1
        elif len(needed) <= len(header) <= len(COLUMNS) and header[0].lower().endswith(tuple(image_extensions())):
            places, skipped = {name: place for place, name in enumerate([*COLUMNS][: len(header)])}, 0
        else:
            continue
        rows = [row for row in _split(io.StringIO(text, newline=""), sign, path) if any(map(str.strip, row))]
        return [_row(path, number, row, places, len(header)) for number, row in enumerate(rows[skipped:], start=1)]
    wanted = "the header path,label[,split]" if len(needed) > 1 else f"a header with the column {needed[0]}"
    sign = max(headers, key=lambda sign: len(headers[sign]))
    raise ValueError(
        f"{path} must have {wanted}, got {listing(headers[sign])}: columns may be separated by "
        f"{', '.join(SEPARATORS.values())}; {_accepted(needed if len(needed) == 1 else [*COLUMNS])}"
    )


def _accepted(columns: Sequence[str]) -> str:
    """The names that columns may have, for messages."""
    names = "; ".join(f"{column} may be {', '.join(COLUMNS[column])}" for column in columns)
    return f"{names}, in any case of letters"


def _split(lines: Iterable[str], separator: str, path: Path) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, delimiter=separator, skipinitialspace=True)
    except csv.Error as error:
        raise ValueError(f"{path} must be CSV in UTF-8: {error}") from error


def _row(path: Path, number: int, cells: list[str], places: Mapping[str, int], width: int) -> dict[str, Any]:
    if len(cells) > width:
        raise ValueError(
            f"row {number} of {path} must have {width} values as the first line has, got {len(cells)}: a value with a "
            "separator in it must stand in quotes"
        )
    return {name: cells[place] if place < len(cells) else None for name, place in places.items()}


def columns_of(names: Sequence[Any], needed: Sequence[str] = ("path", "label")) -> dict[str, Any] | None:
    """Column -> its name in a file; None unless the needed ones are among the names."""
    plain = {re.sub(r"[\W_]", "", str(name).lower()): name for name in reversed(names)}
    if set(needed) <= plain.keys():  # mergetune's own names
        found = {name: plain[name] for name in COLUMNS if name in plain}
    else:
        usual = {name: next((spelt for spelt in known if spelt in plain), None) for name, known in COLUMNS.items()}
        found = {name: plain[spelt] for name, spelt in usual.items() if spelt is not None}
    return found if set(needed) <= found.keys() else None


# -- paths in lists ---------------------------------------------------------------------------------------------------


def paths_below(root: Path) -> Callable[[str, str], str]:
    """A function of a listed path and the row it stands in, for messages, that returns the path relative to root.

    The path is normalised, so that each file has one spelling. Backslashes count as separators unless the file system
    has a file of that very name. An absolute path may reach the root through links, and so may ``root``. The function
    raises ValueError for a path that does not lie below root.
    """
    above = posixpath.normpath(root.absolute().as_posix())
    real: dict[str, str] = {}

    def below(file: str, where: str) -> str:
        spelt = with_slashes(file, root)
        found = posixpath.normpath(spelt)
        if posixpath.isabs(found):
            found = posixpath.relpath(found, above)
            if leaves_root(found):
                folder, name = posixpath.split(spelt)
                for path in (folder, str(root)):
                    if path not in real:
                        real[path] = os.path.realpath(path)
                found = posixpath.normpath(posixpath.join(posixpath.relpath(real[folder], real[str(root)]), name))
        if leaves_root(found) or re.match(r"[A-Za-z]:/", found):
            raise ValueError(
                f"{where} must lie below root = {above}, got {file!r}: write paths relative to root, the folder of the "
                "list unless another is given (root=, on the command line --root FOLDER)"
            )
        return found

    return below


def with_slashes(file: str, folder: str | Path) -> str:
    """A listed path with slashes for the backslashes of Windows, unless a file has a name with backslashes."""
    if "\\" not in file or os.path.exists(os.path.join(folder, file)):
        return file
    return file.replace("\\", "/")
