"""Tables of measured cells: the choice beside every constant choice, with paired differences of the harmonic mean."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mergetune import harmonic_mean
from mergetune.experiments.choosing import MARGIN, choose
from mergetune.experiments.making import KINDS, MERGETUNE, ON_MERGETUNE
from mergetune.experiments.tables import t_interval

AUTO, SETTINGS = "auto", "lam and tau chosen"  # what --method auto chooses, and what the other methods choose
MARGINS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
Cell = dict[str, Any]


def read(folder: Path) -> list[Cell]:
    """The cells of a stage, in the order of their names."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def chosen_rows(cell: Cell, margin: float = MARGIN) -> dict[str, str]:
    """What the rule chooses in a cell, with any margin: "auto" and "lam and tau chosen" -> a row that was tested.

    The recorded residual on MERGETUNE stands on the setting that was chosen with the usual margin.
    """
    validation = cell["validation"]
    right = {
        name: {part: torch.tensor([bit == "1" for bit in bits]) for part, bits in parts.items()}
        for name, parts in validation["right"].items()
    }
    labels = {part: torch.tensor(own) for part, own in validation["labels"].items()}
    if not right:  # there was too little to choose on
        return dict.fromkeys((AUTO, SETTINGS), cell["chosen"]["setting"])
    setting = choose({name: bits for name, bits in right.items() if name not in KINDS}, labels, margin=margin).chosen
    among = {MERGETUNE: right[setting]} | {kind: right[kind] for kind in KINDS if kind != MERGETUNE}
    kind = choose(among, labels, margin=margin).chosen
    row = setting if kind == MERGETUNE else kind
    on_setting = f"{kind}, {cell['chosen']['setting']}"
    return {AUTO: on_setting if kind == ON_MERGETUNE and on_setting in cell["right"] else row, SETTINGS: setting}


def means(cell: Cell, margin: float = MARGIN) -> dict[str, float]:
    """Row -> harmonic mean of the accuracies on the user's and on the new classes, in percent; both choices first."""
    found = {}
    for name, parts in cell["right"].items():
        if not name.startswith(ON_MERGETUNE + ","):
            found[name] = _mean(cell, parts)
    return {row: _mean(cell, cell["right"][name]) for row, name in chosen_rows(cell, margin).items()} | found


def _mean(cell: Cell, parts: Mapping[str, Sequence[int]]) -> float:
    return harmonic_mean(*(100 * sum(parts[part]) / sum(cell["images"][part]) for part in ("base", "novel")))


def group_of(cell: Cell) -> str:
    """The condition of a cell: domain and number of classes."""
    return f"{cell['cell']['domain']}, {cell['cell']['classes']} classes"


def grouped(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Condition -> its cells; all of them last."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(group_of(cell), []).append(cell)
    return found | {"all": list(cells)}


def differences(cells: Sequence[Cell], than: str = AUTO) -> dict[str, list[float]]:
    """Row -> its harmonic mean minus that of the row ``than``, per cell."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        values = means(cell)
        for row, value in values.items():
            found.setdefault(row, []).append(value - values[than])
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def against_best(cells: Sequence[Cell]) -> str:
    """Per condition: auto, the best constant choice, which nobody knows beforehand, and their difference."""
    lines = [["condition", "cells", "auto", "best constant choice", "its HM", "auto - best", "auto - default"]]
    for group, own in grouped(cells).items():
        gaps = differences(own)
        auto = statistics.fmean(means(cell)[AUTO] for cell in own)
        constants = [row for row in gaps if row not in (AUTO, SETTINGS)]
        best = max(constants, key=lambda row: statistics.fmean(gaps[row]))
        default = constants[0]
        lines.append(
            [group, str(len(own)), f"{auto:.1f}", best, f"{auto + statistics.fmean(gaps[best]):.1f}"]
            + [_told([-gap for gap in gaps[row]]) for row in (best, default)]
        )
    return _markdown(lines)


def against_all(cells: Sequence[Cell]) -> str:
    """Per row: its difference to auto in every condition."""
    groups = grouped(cells)
    by_group = {group: differences(own) for group, own in groups.items()}
    lines = [["row - auto, HM", *groups]]
    for row in next(iter(by_group.values())):
        if row != AUTO:
            lines.append([row, *(_told(found[row]) for found in by_group.values())])
    return _markdown(lines)


def ahead_of_auto(cells: Sequence[Cell]) -> str:
    """The rows that are ahead of auto, per condition; in bold where the interval over the cells lies above 0."""
    lines = [["condition", "rows ahead of auto, HM"]]
    for group, own in grouped(cells).items():
        ahead = {row: gaps for row, gaps in differences(own).items() if statistics.fmean(gaps) > 0}
        order = sorted(ahead, key=lambda row: -statistics.fmean(ahead[row]))
        lines.append([group, "; ".join(f"{row} {_told(ahead[row])}" for row in order) or "none"])
    return _markdown(lines)


def by_margin(cells: Sequence[Cell]) -> str:
    """Mean harmonic mean of the choices with other margins: what the margin was fixed on."""
    lines = [["margin", AUTO, "worst cell, auto - best constant", SETTINGS]]
    for margin in MARGINS:
        found = [means(cell, margin) for cell in cells]
        worst = min(
            own[AUTO] - max(value for row, value in own.items() if row not in (AUTO, SETTINGS)) for own in found
        )
        auto, settings = (statistics.fmean(own[row] for own in found) for row in (AUTO, SETTINGS))
        lines.append([f"{margin:g}", f"{auto:.2f}", f"{worst:+.2f}", f"{settings:.2f}"])
    return _markdown(lines)


def what_was_chosen(cells: Sequence[Cell]) -> str:
    """Per cell: what auto chose, and its harmonic mean beside the default's and that of the cell's best row."""
    lines = [["cell", "auto chose", "auto", "default", "best row of the cell"]]
    for cell in cells:
        values = means(cell)
        constants = {row: value for row, value in values.items() if row not in (AUTO, SETTINGS)}
        best = max(constants, key=constants.__getitem__)
        about = cell["cell"]
        name = f"{about['domain']} {about['partition']}, {about['shots']} shots, {about['classes']} classes"
        default = next(iter(constants.values()))
        lines.append(
            [name, chosen_rows(cell)[AUTO], f"{values[AUTO]:.1f}", f"{default:.1f}", f"{best} {constants[best]:.1f}"]
        )
    return _markdown(lines)


def _told(gaps: Sequence[float]) -> str:
    interval = t_interval(gaps)
    reach = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.2f}"
    text = f"{statistics.fmean(gaps):+.2f}{reach}"
    return f"**{text}**" if interval is not None and interval[0] > 0 else text


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])) + "\n"


BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"


def main(
    folder: Annotated[Path, typer.Argument(help="folder OUT/cells/STAGE of run.py")],
    page: Annotated[
        Path | None, typer.Option(help="page whose tables are replaced, between its marks; without it: print all")
    ] = None,
) -> None:
    """Print the tables of the cells in FOLDER, or put those that a page shows into it."""
    cells = read(folder)
    if not cells:
        raise typer.BadParameter(f"FOLDER must hold cells of run.py, got none in {folder}")
    shown = [against_best, ahead_of_auto, what_was_chosen]
    if page is not None:
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        found = "\n".join(table(cells) for table in shown)
        page.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    for table in (*shown, against_all, by_margin):
        typer.echo(f"{(table.__doc__ or '').splitlines()[0]}\n\n{table(cells)}")


if __name__ == "__main__":
    typer.run(main)
