"""`mergetune runs` lists the runs in a folder of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.measure import Measurement

from mergetune.cli.options import Json
from mergetune.cli.shared import complain, errors, new_table, out, print_json, tell
from mergetune.cli.terminal import Terminal


def runs(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a command's --out, or of several.")],
    sort: Annotated[
        str | None,
        typer.Option("--sort", help="Column to sort by: a setting, a result (best first), when or seconds."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs in a folder: how far they are, the settings that differ, results, time.

    A run with the settings of an earlier one continues it; other settings with the same --out make a folder such as
    OUT/run-2-lam-4. Accuracies are those of the saved solution on test images, in percent: on all its classes, and,
    from the measuring run, on your classes and on new classes with their harmonic mean (HM). val_accuracy is the best
    one on validation images. A narrow terminal shows one block per run; a file or pipe gets the whole table.
    """
    from mergetune.experiments import list_runs

    with errors():
        rows = list_runs(folder, sort=sort)
    if as_json:
        print_json([row.to_json() for row in rows])
        return
    if not rows:
        tell(f"no runs in {folder}")
        return
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    results = list(dict.fromkeys(name for row in rows for name in row.results))
    columns = ["state", *settings, *results, "seconds", "when"]
    table, lines = new_table("run", *columns), []
    for column in table.columns:
        column.no_wrap = True
    table.columns[1].justify = "left"
    for row in rows:
        numbers = [f"{row.results[name]:.2f}" if name in row.results else "" for name in results]
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        cells = [row.state, *(row.settings.get(name, "") for name in settings), *numbers, seconds, row.when]
        table.add_row(row.name, *cells)
        lines += [row.name, *(f"  {name}: {cell}" for name, cell in zip(columns, cells, strict=True) if cell)]
    width = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    if width > out.width and is_terminal():
        for line in lines:
            tell(line)
    else:
        Terminal(width=max(width, out.width)).print(table)
    for row in rows:
        if row.error:
            complain("damaged", row.error)


def is_terminal() -> bool:
    """Whether the output goes to a terminal."""
    return sys.stdout.isatty()
