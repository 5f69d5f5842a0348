"""What the commands share: errors as one line, opening images, caches and solutions, and printing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

out, err = Console(), Console(stderr=True)
HALVES = {"base": "base", "novel": "novel", "HM": "hm", "seen": "seen", "unseen": "unseen", "joint HM": "joint_hm"}
"""Columns of a table of base and novel classes -> names in :class:`mergetune.evaluation.BaseNovel` and its row."""


@contextmanager
def errors() -> Iterator[None]:
    """Errors as one line: 2 for what the user can mend in the call, 1 for the rest."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise _exit("error", error, 2) from None
    except (RuntimeError, FloatingPointError, OSError) as error:
        raise _exit("failed", error, 1) from None


def _exit(word: str, error: Exception, code: int) -> typer.Exit:
    err.print(f"[bold red]{word}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    return typer.Exit(code)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_images(path: Path, root: Path | None = None) -> Any:
    """A folder of class folders, a table, one of CoOp's split files, or with a root the name of a benchmark dataset."""
    import mergetune as mt

    if root is not None:
        return mt.CoOpDataset(str(path), root)
    if not path.exists():
        raise FileNotFoundError(f"images must be a folder, a .csv or a .json list, and {path} does not exist")
    if path.is_dir():
        return mt.ImageFolder(path)
    if path.suffix == ".json" and path.name.startswith("split_zhou_"):
        return mt.coop_split(path.parent, path)
    return mt.image_table(path)


def open_cache(folder: Path, classes: str, *, shots: int | None = None, seed: int = 1) -> Any:
    """A feature cache, of all classes or one of CoOp's halves, and of it the images that CoOp draws."""
    import mergetune as mt

    if classes not in ("all", "base", "novel"):
        raise ValueError(f"classes must be all, base or novel, got {classes!r}")
    cache = mt.FeatureCache.open(folder)
    listed = mt.ImageList(
        root=folder, files=cache.files, labels=tuple(cache.labels.tolist()), classnames=cache.classnames
    )
    data = mt.Dataset(name=folder.name, full_train=listed)
    if classes != "all":
        data = data.base_novel()[classes == "novel"]
    return cache.select(data.few_shot(shots, seed))


def read_solution(path: str, features: Any = None, position: str = "end") -> Any:
    """A saved solution, a checkpoint of CoOp's family, or a head's file; features name the classes if it does not."""
    from mergetune.solutions import open_solution

    return open_solution(path, classnames=None if features is None else features.classnames, position=position)


# -- printing ---------------------------------------------------------------------------------------------------------


def first_rank() -> bool:
    """Whether this process is the one that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str) -> None:
    """A line as it is: paths are not cut, brackets are not taken for markup."""
    out.print(line, highlight=False, soft_wrap=True, markup=False)


def announce(as_json: bool) -> Callable[[str], None]:
    """Tells what is about to be done, to people."""
    return (lambda line: None) if as_json else (lambda line: err.print(f"[dim]{escape(line)}[/]"))


def finish(as_json: bool, record: dict[str, Any], done: str, rows: dict[str, dict[str, Any]]) -> None:
    """The record for machines; for people a line for each of the rows, and what is done."""
    if not first_rank():
        return
    if as_json:
        print_json(record)
        return
    for name, row in rows.items():
        out.print(f"[bold]{name}[/] " + ", ".join(f"{k} {plain(v)}" for k, v in row.items()), highlight=False)
    tell(done)


def new_table(first: str, *numbers: str) -> Table:
    """An empty table: a column of names, and columns of numbers."""
    table = Table(title_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def print_table(
    first: str, rows: Sequence[tuple[str, Mapping[str, str], str | None]], *, title: str | None = None
) -> None:
    """Print rows: name, column -> text, style. The joint label space stands below where the terminal is too narrow."""

    def build(columns: Sequence[str]) -> Table:
        table = new_table(first, *columns)
        for name, cells, style in rows:
            if cells.keys() & set(columns):
                table.add_row(escape(name), *(cells.get(column, "") for column in columns), style=style)
        return table

    columns = list(rows[0][1])
    joint = [column for column in ("seen", "unseen", "joint HM") if column in columns]
    blocks = [build(columns)]
    if joint and Measurement.get(out, out.options.update(max_width=1000), blocks[0]).maximum > out.width:
        blocks = [build([column for column in columns if column not in joint]), build(joint)]
    blocks[0].title = title
    for table in blocks:
        out.print(table)


def plain(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
