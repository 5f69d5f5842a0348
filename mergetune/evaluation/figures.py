"""Figures of loss and accuracy along paths and over planes, and of curvature along paths.

Names are drawn as given: "$" does not start mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, cycle, repeat
from pathlib import Path as FilePath
from typing import IO, TYPE_CHECKING

import numpy as np

from mergetune.evaluation.paths import Path
from mergetune.evaluation.planes import Plane
from mergetune.evaluation.spectra import Spectrum
from mergetune.io import writing_atomically, writing_to

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

File = str | FilePath | IO[bytes]
COLOURS = ("#1b9e77", "#7570b3", "#d95f02")
MARKERS = ("s", "^", "o")
LEVELS = 21
DPI = 150


def plot(panels: Mapping[str, Mapping[str, Path]], file: File) -> None:
    """Draws loss (above) and accuracy (below) along paths, one column per set of images, as in Fig. 2 of the paper.

    Args:
        panels: name of the images -> name of the path -> path, as :func:`connectivity` returns.
        file: path ending in .png, .pdf or .svg, or an open file, which gets a PNG.
    """
    figure = new_figure(4.6 * len(panels), 6.0)
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True)
    styles = [{"color": colour} for colour in COLOURS]
    styles[2]["linestyle"] = "--"
    for column, (title, paths) in enumerate(panels.items()):
        for style, (name, walked) in zip(chain(styles, repeat({})), paths.items(), strict=False):
            axes[0, column].plot(walked.alphas, walked.loss, label=shown(name), **style)
            axes[1, column].plot(walked.alphas, walked.accuracy, **style)
        barrier = max(walked.barrier for walked in paths.values())
        axes[0, column].set(title=f"{shown(title)}\nhighest barrier {barrier:.3f}", ylabel="cross-entropy")
        axes[1, column].set(xlabel="position on the path", ylabel="accuracy (%)")
    names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=1 if len(panels) == 1 else len(styles), frameon=False)
    for axis in axes.flat:
        _plain_axes(axis)
    save_figure(figure, file)


def plot_plane(panels: Mapping[str, Plane], file: File) -> None:
    """Draws contours of loss (above) and accuracy (below) over planes, one column per set of images.

    Args:
        panels: name of the images -> plane, as :func:`plane` returns.
        file: path ending in .png, .pdf or .svg, or an open file, which gets a PNG.
    """
    figure = new_figure(4.8 * len(panels), 8.4)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, (title, found) in enumerate(panels.items()):
        _contours(figure, axes[0, column], found, -np.array(found.loss), "cross-entropy", sign=-1)
        _contours(figure, axes[1, column], found, np.array(found.accuracy), "accuracy (%)", sign=1)
        axes[0, column].set_title(shown(title))
    save_figure(figure, file)


def plot_spectrum(panels: Mapping[str, Spectrum], file: File) -> None:
    """Draws extreme eigenvalues (above) and trace (below) of the Hessian along paths, one column per set of images.

    Args:
        panels: name of the images -> spectrum, as :func:`spectrum` returns.
        file: path ending in .png, .pdf or .svg, or an open file, which gets a PNG.
    """
    figure = new_figure(4.6 * len(panels), 6.0)
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    for column, (title, found) in enumerate(panels.items()):
        above, below = axes[:, column]
        for k, (values, marker) in enumerate(zip(zip(*found.highest, strict=True), cycle(MARKERS), strict=False)):
            above.plot(found.positions, values, color=COLOURS[0], marker=marker, alpha=1 / (1 + 0.5 * k))
        above.plot(found.positions, found.lowest, color=COLOURS[2], linestyle="--", marker="v")
        above.set(title=shown(title), ylabel=f"{len(found.highest[0])} largest and smallest eigenvalue")
        below.errorbar(found.positions, found.trace, found.trace_error, color=COLOURS[1], marker="o", capsize=3)
        below.set(ylabel="trace (± standard error)")
        below.set_xticks(range(len(found.solutions)), [shown(name) for name in found.solutions])
        for axis in (above, below):
            _plain_axes(axis)
            axis.axhline(0, color="grey", linewidth=0.8)
    save_figure(figure, file)


def _contours(figure: Figure, axis: Axes, found: Plane, goodness: np.ndarray, label: str, *, sign: int) -> None:
    """Draws contours of sign * goodness with denser levels near the best value, so that colours show this region."""
    from matplotlib.colors import BoundaryNorm

    best, extent = goodness.max(), np.ptp(goodness) or 1.0
    levels = best - extent * np.linspace(1, 0, LEVELS) ** 2
    levels, colours = (levels, "viridis") if sign > 0 else (-levels[::-1], "viridis_r")
    values, style = sign * goodness, {"cmap": colours, "norm": BoundaryNorm(levels, 256)}
    filled = axis.contourf(found.xs, found.ys, values, levels, **style)
    lines = axis.contour(found.xs, found.ys, values, levels[2:-2:2], colors="black", linewidths=0.5, alpha=0.6)
    axis.clabel(lines, fontsize=7, fmt="%.4g")
    figure.colorbar(filled, ax=axis, label=label, shrink=0.9, ticks=levels[::2], format="%.4g")
    corners = [(corner.x, corner.y) for corner in found.solutions.values()]
    axis.plot(*zip(*corners, corners[0], strict=True), color="black", linewidth=1, linestyle=":")
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    for name, (x, y), marker in zip(found.solutions, corners, MARKERS, strict=True):
        axis.plot(x, y, marker=marker, color="white", markeredgecolor="black", markersize=9)
        above = y > 0
        axis.annotate(
            shown(name), (x, y), (0, 10 if above else -10), textcoords="offset points", ha="center",
            va="bottom" if above else "top", fontsize=9, bbox=box,
        )  # fmt: skip
    axis.set(xlabel="distance along the first two", ylabel="distance from their line", aspect="equal")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot, figures need no display and share no state

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, file: File) -> None:
    """Writes a figure, to a path atomically: a link of that name is replaced, and what it points to stays."""
    if not isinstance(file, str | FilePath):
        figure.savefig(file, dpi=DPI)
        return
    file = FilePath(file)
    file = file if file.suffix else file.with_name(f"{file.name}.png")
    with writing_to(file), writing_atomically(file) as stream:
        figure.savefig(stream, dpi=DPI, format=file.suffix[1:].lower())


def _plain_axes(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def shown(name: str) -> str:
    """A name on one line, in which matplotlib does not read "$" as mathematics."""
    return "".join(c if c.isprintable() else " " for c in name).replace("$", r"\$")
