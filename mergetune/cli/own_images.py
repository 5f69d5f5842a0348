"""Prints the result of `mergetune fit` on images: the choice, the tables, the verdict and the next commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetune.cli.shared import HALVES, open_images, print_table, tell

if TYPE_CHECKING:
    from mergetune.evaluation import BaseNovel, Report
    from mergetune.experiments import FolderResult
    from mergetune.experiments.choosing import Choice

# Columns of a table of halves -> names of the parts and means that HALVES gives.
_TITLES = {"base": "your classes", "novel": "new classes"}


def print_result(found: FolderResult, run: Path, caches: Path, *, classes: str) -> None:
    """Print what `fit` on images did and found.

    Args:
        found: the result.
        run: folder of the solution.
        caches: folder of the feature caches.
        classes: the command's ``--classes``.
    """
    from mergetune.training import run_title

    for title, choice in (("setting of MERGETUNE", found.settings), ("kind of solution", found.kinds)):
        if choice is not None:
            _print_choice(title, choice)
    for what, reason in found.left_out.items():
        tell(f"No {what}: {reason}.")
    if found.measured is not None:
        learned, others = (len(names) for names in found.halves.values())
        title = f"Test images, %: {learned} learned classes (your classes), {others} other classes (new classes)"
        _print_halves(title, found, classes)
    if classes == "all":
        print_table("", _whole_rows(found), title="The solution that knows all classes, test images, %")
        if found.concept_names:
            count = next(iter(found.concept_names.values())).names
            tell(
                f"names as before: share of {count} common concept names that are recognised as by zero-shot CLIP, "
                "from their text alone"
            )
    tell("± is the standard error from the number of test images; in the next line it is half a 95 % interval.")
    tell(found.verdict)
    if found.kinds is not None and found.result.solution.kind == "head":
        tell("The saved solution is a head: it knows these classes only, and takes no new class names.")
    tell("Seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in found.seconds.items()))
    tell(f"Solution ({found.row}), report.json, paths.png: {run_title(run)}")
    tell("Next:")
    for command in next_commands(run, caches / "test"):
        tell(f"  {command}")


def next_commands(folder: Path, test: Path) -> list[str]:
    """Commands that use the solution in a folder, and the cached test images."""
    return [
        f"mergetune predict {folder} NEW_PICTURES",
        f"mergetune eval --cache {test} --solution {folder} --confusion {folder / 'confusion.png'}",
        f"mergetune export {folder} --to onnx --out {folder / 'model.onnx'}",
    ]


def _print_choice(title: str, choice: Choice) -> None:
    rows = []
    for line in choice.tried:
        cells = {_TITLES.get(part, part): f"{value:.1f}" for part, value in line.accuracies.items()}
        gain = "default" if line.gain is None else f"{line.gain.value:+.1f} ± {line.gain.error:.1f}"
        rows.append((line.name, cells | {"HM - default": gain}, "bold" if line.name == choice.chosen else None))
    print_table(title, rows, title="Tried on validation images of both halves, %; ± is the paired standard error")
    why = "no candidate is surely better" if choice.chosen == choice.default else "surely better than the default"
    tell(f"Chosen: {choice.chosen} ({why}, margin {choice.margin:g} standard errors)")


def _print_halves(title: str, found: FolderResult, classes: str) -> None:
    assert found.measured is not None
    rows = []
    for name, both in found.measured.items():
        cells = {_TITLES.get(column, column): text for column, text in _half_cells(both).items()}
        rows.append((name, cells, "bold" if name == found.row else None))
    print_table("measuring run" if classes == "all" else "base and novel", rows, title=title)


def _half_cells(both: BaseNovel) -> dict[str, str]:
    cells = {}
    for column, part in HALVES.items():
        value: Any = getattr(both, part)
        if part == "hm":
            cells[column] = f"{both.hm:.2f} ± {both.hm_error:.1f}"
        elif value is not None:
            cells[column] = f"{value:.2f}" if isinstance(value, float) else _with_error(value)
    return cells


def _with_error(report: Report) -> str:
    return f"{report.accuracy:.2f} ± {report.standard_error:.1f}"


def _whole_rows(found: FolderResult) -> list[tuple[str, dict[str, str], str | None]]:
    rows = []
    for name, report in found.reports["all"].items():
        cells = {"all classes": _with_error(report)}
        if found.concept_names:
            kept = found.concept_names.get(name)
            cells["names as before"] = "-" if kept is None else f"{kept.share:.1f}"
        if found.retained:
            shown = found.retained.get(name)
            cells["retained"] = "-" if shown is None else _with_error(shown)
        rows.append((name, cells, "bold" if name == found.row else None))
    return rows


def open_retained(path: Path) -> Any:
    """The dataset of ``--retain``. A folder of class folders is not split: a class may have a single picture."""
    import mergetune as mt
    from mergetune.data.folder_layouts import split_folders, unwrapped

    if not path.exists():
        raise FileNotFoundError(f"--retain must be a folder of class folders or an image list, {path} does not exist")
    if path.is_dir() and not split_folders(unwrapped(path)):
        return mt.ImageFolder(path, val=0, test=0)
    return open_images(path)
