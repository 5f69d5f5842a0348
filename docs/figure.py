"""Draws new_classes.png, the figure of README.md, from the table "Tilted" in icons.md: python docs/figure.py"""

from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parent
ROWS = (
    "zero-shot", "CoOp", "KgCoOp", "WiSE-FT a=.5", "MERGETUNE", "MERGETUNE + residual", "zero-shot + map + residual",
)  # fmt: skip
YOURS, NEW = "#7570b3", "#1b9e77"


def accuracies(page: str) -> dict[str, tuple[float, float]]:
    """Returns row -> accuracy on learned and on new classes, in percent, of the table "Tilted"."""
    table = page.split("### Tilted (12 cells)")[1].split("###")[0]
    cells = [[cell.strip(" *") for cell in line.split("|")] for line in table.splitlines() if line.count("/") >= 2]
    found = {}
    for _, name, scores, *_ in cells[1:]:
        learned, new, _ = map(float, scores.split("/"))
        found[name] = (learned, new)
    return found


def draw(found: dict[str, tuple[float, float]], file: Path) -> None:
    figure = Figure(figsize=(8.2, 3.1), dpi=150, layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(ROWS):
        learned, new = found[name]
        axis.plot([learned, new], [i, i], color="0.8", linewidth=3, zorder=1)
        axis.scatter([learned], [i], color=YOURS, zorder=2, label="classes that it was tuned on" if i == 0 else None)
        axis.scatter([new], [i], color=NEW, marker="D", zorder=2, label="new classes" if i == 0 else None)
    axis.axvline(found["zero-shot"][1], color=NEW, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(ROWS)), ROWS)
    axis.invert_yaxis()
    axis.set_xlabel("accuracy (%), 12 cells of the embedded icons; dotted: zero-shot on new classes")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(file)


if __name__ == "__main__":
    draw(accuracies((DOCS / "icons.md").read_text(encoding="utf-8")), DOCS / "new_classes.png")
