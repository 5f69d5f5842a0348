"""Helpers of the commands: errors as one line, opening images, caches and solutions, and printing."""

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
    """Prints an error as one line and exits: code 2 for a wrong argument or input, code 1 for other failures."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output, such as `head`, has enough: typer ends the command in silence
        raise
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise _exit("error", error, 2) from None
    except (RuntimeError, FloatingPointError, OSError) as error:
        raise _exit("failed", error, 1) from None


def _exit(word: str, error: Exception, code: int) -> typer.Exit:
    err.print(f"[bold red]{word}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    return typer.Exit(code)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_images(path: Path, root: Path | None = None) -> Any:
    """Returns the dataset at ``path``.

    Args:
        path: folder of class folders, .csv or .json list, or split file of CoOp; with ``root`` the name of a benchmark.
        root: folder of the benchmark datasets.
    """
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
    """Returns a feature cache, restricted to some classes and to few-shot images.

    Args:
        folder: the cache.
        classes: "all", or "base" or "novel" for the first or second half of the classes, as in CoOp.
        shots: images per class, drawn as CoOp draws them; None keeps all images.
        seed: seed of the draw.
    """
    import mergetune as mt

    if classes not in ("all", "base", "novel"):
        raise ValueError(f"--classes must be all, base or novel, got {classes!r}")
    cache = mt.FeatureCache.open(folder)
    listed = mt.ImageList(
        root=folder, files=cache.files, labels=tuple(cache.labels.tolist()), classnames=cache.classnames
    )
    data = mt.Dataset(name=folder.name, full_train=listed)
    if classes != "all":
        data = data.base_novel()[classes == "novel"]
    return cache.select(data.few_shot(shots, seed))


def read_solution(path: str, features: Any = None, position: str = "end") -> Any:
    """Returns a solution from a saved folder, a checkpoint of CoOp's family or the file of a head.

    Args:
        path: the folder or file.
        features: feature cache whose class names are used if the file has none.
        position: place of the class name in a CoOp checkpoint.
    """
    from mergetune.solutions import open_solution

    return open_solution(path, classnames=None if features is None else features.classnames, position=position)


def read_names(file: Path) -> list[str]:
    """Returns the class names in a text file with one name per line."""
    from mergetune.io import read_regular_text, require_file

    require_file(file, f"--classnames must be a text file with one class name per line, and {file} does not exist")
    try:
        names = [line.strip() for line in read_regular_text(file).split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--classnames must be a text file in UTF-8, got {file}: {error}") from error
    if not names:
        raise ValueError(f"--classnames must be a text file with one class name per line, got {file} without a name")
    return names


def clip_for(
    backbone: str | None,
    pretrained: str | None,
    *,
    device: str = "cpu",
    precision: str = "float32",
    allow_torchscript: bool = False,
    caches: Sequence[Any] = (),
    solutions: Mapping[str, Any] | Sequence[Any] = (),
) -> Any:
    """Returns the backbone that --backbone names, or else the one that a solution records.

    Args:
        backbone, pretrained: values of --backbone and --pretrained.
        device, precision, allow_torchscript: see :func:`mergetune.load_clip`.
        caches: feature caches that the command uses.
        solutions: solutions that the command uses, or {path: solution}.

    Raises:
        ValueError: no backbone is named or recorded.
    """
    import mergetune as mt

    if backbone is None:
        given = solutions.values() if isinstance(solutions, Mapping) else solutions
        recorded = next((solution.backbone for solution in given if solution.backbone), None)
        if recorded is None:
            raise ValueError("--backbone is needed: the solution does not record its backbone")
        complete = recorded.startswith(("hf-hub:", "local-dir:"))
        name, _, weights = (recorded, "", "") if complete else recorded.partition("/")
        backbone, pretrained = str(name), pretrained or weights or None
    options: dict[str, Any] = {"device": device, "precision": precision, "allow_torchscript": allow_torchscript}
    return mt.load_clip(backbone, pretrained, **options)


# -- printing ---------------------------------------------------------------------------------------------------------


def first_rank() -> bool:
    """Returns whether this process prints: rank 0 under torchrun, and every process without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str) -> None:
    """Prints a line unchanged: paths are not wrapped, and brackets are not read as markup."""
    out.print(line, highlight=False, soft_wrap=True, markup=False)


def announce(as_json: bool) -> Callable[[str], None]:
    """Returns a function that prints progress messages to stderr; with ``--json`` the function prints nothing."""
    return (lambda line: None) if as_json else (lambda line: err.print(f"[dim]{escape(line)}[/]"))


def finish(as_json: bool, record: dict[str, Any], done: str, rows: dict[str, dict[str, Any]]) -> None:
    """Prints the result of a command on rank 0: the record as JSON, or one line per row and the closing line.

    Args:
        as_json: whether to print JSON.
        record: the result for JSON.
        done: the closing line.
        rows: name of a row -> its values.
    """
    if not first_rank():
        return
    if as_json:
        print_json(record)
        return
    for name, row in rows.items():
        out.print(f"[bold]{name}[/] " + ", ".join(f"{k} {plain(v)}" for k, v in row.items()), highlight=False)
    tell(done)


def new_table(first: str, *numbers: str) -> Table:
    """Returns an empty table with one column of names and columns of numbers."""
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
    """Returns a value as text for people: floats with four digits, lists with spaces between their elements."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
