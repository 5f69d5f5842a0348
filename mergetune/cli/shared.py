"""Helpers of the commands: errors as one line, opening images, caches and solutions, and printing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mergetune.cli.running import first_rank, in_terms_of_options, nothing_follows, suggest
from mergetune.cli.terminal import LONGEST_CELL, PlainTable, Terminal, visible

out, err = Terminal(), Terminal(stderr=True)
HALVES = {"base": "base", "novel": "novel", "HM": "hm", "seen": "seen", "unseen": "unseen", "joint HM": "joint_hm"}
"""Columns of a table of base and novel classes -> names in :class:`mergetune.evaluation.BaseNovel` and its row."""


@contextmanager
def errors() -> Iterator[None]:
    """Prints an error as one line and exits: code 2 for a wrong argument or input, code 1 for other failures."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output, such as `head`, has enough: the command ends in silence
        raise
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise _exit("error", in_terms_of_options(str(error)), 2) from None
    except (RuntimeError, FloatingPointError, OSError, ImportError) as error:
        raise _exit("failed", str(error), 1) from None


def _exit(word: str, said: str, code: int) -> typer.Exit:
    complain(word, said)
    return typer.Exit(code)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_images(path: Path, root: Path | None = None, **reading: Any) -> Any:
    """Returns the dataset at ``path``.

    Args:
        path: folder of class folders, list of images, or split file of CoOp; with ``root`` the name of a benchmark, or
            a list.
        root: folder of the benchmark datasets, or of the images in the list.
        reading: ``classnames``, ``val``, ``test`` and ``seed`` of :func:`mergetune.ImageFolder`; None where not given.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: the images cannot be read, see :func:`mergetune.ImageFolder`, or options do not go with them.
    """
    import mergetune as mt
    from mergetune.data import listed_images

    given = {name: value for name, value in reading.items() if value is not None}
    if root is not None and not path.is_file():
        options = {
            "classnames": "--classnames", "val": "--val-share", "test": "--test-share", "seed": "--split-seed",
        }  # fmt: skip
        if taken := [option for name, option in options.items() if name in given]:
            raise ValueError(f"{taken[0]} cannot be used with a benchmark of --root, which has its own: leave it out")
        return mt.CoOpDataset(str(path), root)
    if not path.exists():
        raise FileNotFoundError(f"images must be a folder, a .csv or a .json list, and {path} does not exist")
    if path.is_dir():
        return mt.ImageFolder(path, **given)
    return listed_images(path, root=root, **given)


def ignored_in(folder: Path, data: Any) -> dict[str, int]:
    """Files in a folder of images that are no images of ``data``: type -> number; empty if ``folder`` is a list."""
    from mergetune.data.image_files import ignored_files

    lists = (data.full_train, data.full_val, data.full_test)
    used = {file for images in lists if images is not None for file in images.files}
    return ignored_files(folder, used) if folder.is_dir() else {}


def refuse_out_inside(images: Path, out_path: Path) -> None:
    """Raises ValueError if ``--out`` lies in the folder of the images, where its pictures would become images."""
    if images.is_dir() and out_path.resolve().is_relative_to(images.resolve()):
        raise ValueError(
            f"--out must not lie in IMAGES, got {out_path} in {images}: what is written there would be read as images "
            "by the next call; give --out a folder beside IMAGES"
        )


def open_cache(
    folder: Path,
    classes: str,
    *,
    shots: int | None = None,
    seed: int = 1,
    split: str | None = None,
    option: str = "--cache",
) -> Any:
    """Returns a feature cache, restricted to some classes and to few-shot images.

    Args:
        folder: the cache; with ``split`` also the folder above it, as `mergetune cache` writes it.
        classes: "all", or "base" or "novel" for the first or second half of the classes, as in CoOp.
        shots: images per class, drawn as CoOp draws them; None keeps all images.
        seed: seed of the draw.
        split: the cache that is taken from a folder with caches train, val and test; None takes none. Images for
            training must be of every class; in val and test a class without images is left out, with a warning.
        option: name of the option that gives the folder, for errors.
    """
    import mergetune as mt

    folder = _one_cache(folder, split, option)
    if classes not in ("all", "base", "novel"):
        raise ValueError(f"--classes must be all, base or novel, got {classes!r}")
    cache = mt.FeatureCache.open(folder)
    listed = mt.ImageList(
        root=folder, files=cache.files, labels=tuple(cache.labels.tolist()), classnames=cache.classnames
    )
    data = mt.Dataset(name=folder.name, full_train=listed)
    if classes != "all":
        data = data.base_novel()[classes == "novel"]
    if len(data.classnames) == 1:
        of = "" if classes == "all" else f" in the {classes} half, for --classes {classes} and --base-novel"
        raise ValueError(f"{option} must hold at least two classes{of}, got only {data.classnames[0]!r} in {folder}")
    if split in ("val", "test") and shots is None:
        if empty := [name for name, count in zip(data.classnames, data.train.counts, strict=True) if not count]:
            _warn(f"{option} has no images of {', '.join(map(repr, empty))}: left out of means over classes")
        return cache.select(data.train)
    few = data.few_shot(shots, seed)
    warn_of_few(shots, few)
    return cache.select(few)


def warn_of_few(shots: int | None, drawn: Any) -> None:
    """Prints a warning if classes have fewer images than ``--shots`` asks for.

    Args:
        shots: images per class that were asked for; None asks for all.
        drawn: the images that were drawn.
    """
    counts = Counter(drawn.labels)
    few = [count for count in counts.values() if shots is not None and count < shots]
    if few:
        there = str(min(few)) if min(few) == max(few) else f"{min(few)} to {max(few)}"
        which = "every class has" if len(few) == len(counts) else f"{len(few)} of {len(counts)} classes have"
        _warn(f"{which} fewer than --shots {shots} images: {there}")


def _warn(line: str) -> None:
    if first_rank():
        err.print(f"[yellow]warning:[/] {escape(visible(line))}", soft_wrap=True, highlight=False)


def _one_cache(folder: Path, split: str | None, option: str) -> Path:
    """The folder itself if it is a cache, finished or not; else the cache ``split`` in it."""
    from mergetune.data.cache_files import caches_below, is_cache

    if is_cache(folder):
        return folder
    if split is not None and is_cache(folder / split):
        return folder / split
    inside = [str(path) for path in caches_below(folder)]
    way_on = f"give {' or '.join(inside[:5])}" if inside else "`mergetune cache IMAGES --out FOLDER` writes caches"
    what = "is none" if folder.exists() else "does not exist"
    raise FileNotFoundError(f"{option} must be a feature cache, got {folder}, which {what}: {way_on}")


def read_solution(
    path: str,
    features: Any = None,
    position: str = "end",
    *,
    classnames: Sequence[str] | None = None,
    name: str | None = None,
    way_on: str = "; --classnames FILE names them",
) -> Any:
    """Returns a solution from a saved folder, a checkpoint of CoOp's family or the file of a head or a LoRA.

    A warning says that a head without class names is taken in the order of the classes of ``features``.

    Args:
        path: the folder or file.
        features: feature cache or dataset whose class names are used if the file has none.
        position: place of the class name in a CoOp checkpoint.
        classnames: these names in place of those of ``features``; they must be those of the file if it has names.
        name: name of the weight in the file of a head. Folders have none.
        way_on: end of the warning.
    """
    from mergetune.solutions import open_solution

    _refuse_no_solution(Path(path))
    opened = partial(open_solution, path, position=position, name=None if Path(path).is_dir() else name)
    if classnames is not None or features is None:
        return opened(classnames=classnames)
    with suppress(ValueError):  # a file without names, or one that cannot be read at all, which is said below
        return opened()
    names = features.classnames
    try:
        found = opened(classnames=names)
    except ValueError:
        if (whole := _whole_classnames(features)) == tuple(names):
            raise
        names, found = whole, opened(classnames=whole)
    if found.kind == "head":
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        what = "images" if hasattr(features, "full_train") else "cache"
        _warn(f"{path} names no classes: its rows are taken in the order of the {what} ({shown}){way_on}")
    return found


def _whole_classnames(features: Any) -> tuple[str, ...]:
    """The class names of the whole cache on disk of which ``features`` may be a half."""
    from mergetune.data.cache_files import read_manifest

    folder = getattr(features, "path", None)
    return tuple(features.classnames if folder is None else read_manifest(folder).classnames)


def is_saved(text: Any) -> bool:
    """Whether the value of an option for zero-shot templates is the path of a saved solution instead."""
    return isinstance(text, str) and "{}" not in text and Path(text).exists()


def check_folder(out_path: Path) -> None:
    """Raises ValueError if --out, a folder, has the ending of a file of weights."""
    if out_path.suffix in (".safetensors", ".npz", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".joblib"):
        raise ValueError(
            f"--out must be a folder, got {out_path}, which ends as a file: `mergetune export FOLDER --to head --out "
            "FILE` writes one"
        )


def read_names(file: Path) -> list[str]:
    """Returns the class names in a text file with one name per line."""
    from mergetune.data.class_names import read_names as read

    return read(file)


def names_of_rows(file: Path | None) -> list[str] | None:
    """Returns the class names of ``--classnames``; None without the option."""
    return None if file is None else read_names(file)


def _refuse_no_solution(path: Path) -> None:
    """Raises FileNotFoundError, with the solutions near ``path``, if nothing there could be a solution."""
    from mergetune.solutions.dassl_folders import LEARNERS, near_checkpoints
    from mergetune.solutions.other_trainers import folder_of_other

    files = [file.name for file in path.iterdir()] if path.is_dir() else []
    known = ("solution.json", "checkpoint", "adapter_config.json", *LEARNERS)
    if (path.exists() and not path.is_dir()) or any(name in known or ".pth" in name for name in files):
        return
    above = path if path.is_dir() else path.parent
    near = sorted(str(file.parent) for deep in ("*", "*/*") for file in above.glob(f"{deep}/solution.json"))
    what = "holds none of them" if path.is_dir() else "does not exist"
    ways = [f"solutions near it are {', '.join(near[:5])}"] if near else []
    ways += filter(None, [folder_of_other(path) or near_checkpoints(path)])
    way_on = "; ".join(ways) or "the --out of a finished run is one"
    raise FileNotFoundError(
        "path must be a solution (a folder with solution.json, a checkpoint of CoOp, or the file of a head or a LoRA), "
        f"got {path}, which {what}: {way_on}"
    )


def suggest_use(solution: Path, features: Path | None = None, classes: str = "all") -> None:
    """Suggests to test a solution, or to classify new pictures if there is no cache of test images.

    Args:
        solution: the folder of the solution.
        features: value of --cache; test images are looked for in and beside this folder.
        classes: value of --classes.
    """
    for folder in () if features is None else (features / "test", features.parent / "test"):
        with suppress(FileNotFoundError):
            test = _one_cache(folder, None, "--cache")
            suggest(
                "eval", "--cache", test, "--solution", solution, ("--classes", None if classes == "all" else classes)
            )
            return
    suggest("predict", solution, "NEW_PICTURES")


# -- printing ---------------------------------------------------------------------------------------------------------


def tell(line: str) -> None:
    """Prints a line as it is: paths are not wrapped, brackets are no markup, and control characters are escaped."""
    out.print(visible(line), highlight=False, soft_wrap=True, markup=False)


def complain(word: str, said: str) -> None:
    """Prints what is wrong to stderr: a word in red, and one line of at most about 2,000 characters."""
    err.print(f"[bold red]{word}:[/] {escape(visible(said))}", soft_wrap=True, highlight=False)


def announce(as_json: bool) -> Callable[[str], None]:
    """Returns a function that prints progress messages to stderr; with ``--json`` the function prints nothing."""
    return (lambda line: None) if as_json else (lambda line: err.print(f"[dim]{escape(visible(line))}[/]"))


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
    table = PlainTable(title_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(Text(visible(name, longest=LONGEST_CELL)), justify="right")
    return table


def print_table(
    first: str, rows: Sequence[tuple[str, Mapping[str, str], str | None]], *, title: str | None = None
) -> None:
    """Print rows: name, column -> text, style. The joint label space stands below where the terminal is too narrow."""

    def build(columns: Sequence[str]) -> Table:
        table = new_table(first, *columns)
        for name, cells, style in rows:
            if cells.keys() & set(columns):
                table.add_row(name, *(cells.get(column, "") for column in columns), style=style)
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
    """Prints a value as JSON; nothing is printed after it."""
    nothing_follows()
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
