"""Tables of measured cells: mean accuracies, and paired differences with intervals over cells and over classes.

`python tables.py out/tilted out/noisy` prints the differences that matter, a column for each folder.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scipy import stats
from torch import Tensor

ZERO_SHOT, COOP, KGCOOP, WISE, MERGETUNE = "zero-shot", "CoOp", "KgCoOp", "WiSE-FT a=.5", "MERGETUNE"
ENSEMBLE = "logit ensemble"
TOPS = ("", " + map", " + residual", " + map + residual")
COLUMNS = ("base", "novel", "HM", "seen", "unseen", "joint HM")
REFERENCES = (KGCOOP, WISE, MERGETUNE, MERGETUNE + TOPS[3])
RESAMPLES = 2000  # draws of the classes
TEXTS = (ZERO_SHOT, COOP, KGCOOP, WISE, MERGETUNE)
CLAIMS = (  # a row, what it is compared with, and the column
    (MERGETUNE, KGCOOP, "HM"),
    (MERGETUNE, WISE, "HM"),
    *((text + top, text, "HM") for top in TOPS[1:] for text in TEXTS),
    *((text + TOPS[2], text, "joint HM") for text in TEXTS),
    (ZERO_SHOT + TOPS[2], MERGETUNE, "HM"),
    (ZERO_SHOT + TOPS[3], MERGETUNE, "HM"),
    (ZERO_SHOT + TOPS[3], MERGETUNE + TOPS[3], "HM"),
    (ZERO_SHOT + TOPS[3], MERGETUNE + TOPS[3], "joint HM"),
)


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over cells, and differences between rows that are paired by cell.

    Args:
        cells: what the files of the cells hold.

    Returns:
        The settings of the cells and, by row, "mean" and "deviation" of each column and "differences": row that is
        compared with -> "HM" or "joint HM" -> mean; "cells", the 95 % t interval over cells, None for one cell;
        "classes", the 95 % percentile bootstrap that draws classes with replacement, the same ones in all cells;
        "higher", in how many cells the row is above the other.
    """
    names = list(cells[0]["right"])
    values = torch.stack([_accuracies(cell, names) for cell in cells])  # [cells, rows, columns]
    count = len(cells[0]["images"])
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(RESAMPLES, count).scatter_add_(1, drawn, torch.ones(RESAMPLES, count)).double()
    resampled = torch.stack([_accuracies(cell, names, weights) for cell in cells]).mean(0)  # [draws, rows, columns]

    def difference(row: str, other: str, column: str) -> dict[str, Any]:
        a, b, c = names.index(row), names.index(other), COLUMNS.index(column)
        by_cell = (values[:, a, c] - values[:, b, c]).tolist()
        by_draw = resampled[:, a, c] - resampled[:, b, c]
        ends = by_draw[by_draw.isfinite()].quantile(torch.tensor([0.025, 0.975]).double())
        return {
            "mean": statistics.fmean(by_cell),
            "cells": _t_interval(by_cell),
            "classes": ends.tolist(),
            "higher": sum(value > 0 for value in by_cell),
        }

    def differences(row: str) -> dict[str, Any]:
        others = [other for other in dict.fromkeys((*REFERENCES, row.split(" + ")[0])) if other != row]
        return {other: {name: difference(row, other, name) for name in ("HM", "joint HM")} for other in others}

    deviation = values.std(0) if len(cells) > 1 else torch.zeros_like(values[0])
    return {
        **{name: cells[0][name] for name in ("backbone", "template", "settings")},
        "cells": [[cell["partition"], cell["seed"]] for cell in cells],
        "rows": {
            row: {
                "mean": dict(zip(COLUMNS, values[:, i].mean(0).tolist(), strict=True)),
                "deviation": dict(zip(COLUMNS, deviation[i].tolist(), strict=True)),
                "differences": differences(row),
            }
            for i, row in enumerate(names)
        },
    }


def _accuracies(cell: dict[str, Any], names: Sequence[str], weights: Tensor | None = None) -> Tensor:
    """Percent, [rows, columns]; with weights of resampled classes, [draws, classes], [draws, rows, columns]."""
    images = torch.tensor(cell["images"]).double()
    base = torch.zeros(len(images), dtype=torch.bool).index_fill(0, torch.tensor(cell["base"]), True)
    one = weights is None
    weights = torch.ones(1, len(images)).double() if weights is None else weights
    found = []
    for space in ("half", "joint"):
        right = torch.tensor([cell["right"][name][space] for name in names]).double()  # [rows, classes]
        ends = [100 * (weights * part) @ right.T / ((weights * part) @ images)[:, None] for part in (base, ~base)]
        total = ends[0] + ends[1]  # NaN where a draw has no class of a half
        found += [*ends, torch.where(total == 0, 0, 2 * ends[0] * ends[1] / total)]
    found = torch.stack(found, -1)
    return found[0] if one else found


def _t_interval(values: Sequence[float]) -> list[float] | None:
    if len(values) < 2:
        return None
    reach = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return [mean - reach, mean + reach]


def markdown(results: dict[str, Any]) -> str:
    """The table: accuracies in percent; differences in HM, ± the t interval over cells, then the one over classes.

    Rows whose HM is above plain MERGETUNE's are bold.
    """
    head = ["", "base / novel / HM", "seen / unseen / HM, all classes"]
    head += [title for other in (KGCOOP, WISE) for title in (f"HM to {other}", "over classes")]
    lines = [head, ["---"] * len(head)]
    level = results["rows"][MERGETUNE]["mean"]["HM"]
    for name, row in results["rows"].items():
        mean = [f"{row['mean'][column]:.{2 if 'HM' in column else 1}f}" for column in COLUMNS]
        line = [f"**{name}**" if row["mean"]["HM"] > level else name, " / ".join(mean[:3]), " / ".join(mean[3:])]
        for other in (KGCOOP, WISE):
            found = row["differences"].get(other, {}).get("HM")
            line += _cells_of(found) if found else ["", ""]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def claims(by_domain: Mapping[str, dict[str, Any]]) -> str:
    """A table of paired differences with a column for each domain: ± over cells, then the interval over classes."""
    domains = list(by_domain)
    lines = [["", *domains], ["---"] * (1 + len(domains))]
    for row, other, column in CLAIMS:
        found = [by_domain[domain]["rows"][row]["differences"][other][column] for domain in domains]
        lines.append([f"{row}, to {other}: {column}", *("; ".join(_cells_of(difference)) for difference in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cells_of(difference: dict[str, Any]) -> list[str]:
    over_cells = difference["cells"]
    reach = "" if over_cells is None else f" ± {(over_cells[1] - over_cells[0]) / 2:.2f}"
    low, high = difference["classes"]
    return [f"{difference['mean']:+.2f}{reach}", f"{low:+.2f} to {high:+.2f}"]


def main(folders: Annotated[list[Path], typer.Argument(help="folders of run.py")]) -> None:
    """Print the differences that matter in each folder's results."""
    typer.echo(claims({folder.name: json.loads((folder / "results.json").read_text("utf-8")) for folder in folders}))


if __name__ == "__main__":
    typer.run(main)
