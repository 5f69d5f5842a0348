"""Figures of answers: the confusion matrix, and a contact sheet of wrongly answered pictures with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mergetune.data import load_image
from mergetune.data.image_files import leaves_root
from mergetune.evaluation.answers import Confusion, WrongAnswer
from mergetune.evaluation.figures import File, new_figure, save_figure, shown
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS

NUMBERED = 20  # up to so many classes, cells hold their numbers of images
LABELLED = 60  # so many names fit along an axis; of more classes every second, third ... has its name
SIDE = 13.0  # largest side of the matrix, inches
COLUMNS = 6  # pictures per row of a contact sheet
THUMBNAIL = 256  # pixels
CAPTION = 26  # characters per line


def plot_confusion(confusion: Confusion, file: File, *, title: str = "") -> None:
    """Draws a confusion matrix: each row shows the answers to the images of one class, in percent of these images.

    Colours grow with the square root of the share, so that rare mistakes can be seen. Rows of classes without images
    are empty. Classes stand in class order. With over 60 classes, only every second, third ... has its name.

    Args:
        confusion: the matrix, see :func:`confusion`.
        file: path ending in .png, .pdf or .svg, or an open file, which gets a PNG.
        title: text above the matrix.
    """
    from matplotlib.colors import PowerNorm

    count, names = len(confusion.names), [_short(shown(name)) for name in confusion.names]
    total = confusion.counts.sum(1, keepdims=True)
    shares = np.ma.masked_invalid(np.divide(100.0 * confusion.counts, total, where=total > 0, out=_nan(count)))
    side = min(max(0.22 * count, 2.5), SIDE)
    figure = new_figure(side + 3.2, side + 2.2)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    label = "share of the images of the true class (%)"
    figure.colorbar(image, ax=axis, label=label, shrink=0.6, ticks=[0, 5, 25, 50, 100])
    step = -(-count // LABELLED)
    places = range(0, count, step)
    axis.set_xticks(places, [names[c] for c in places], rotation=90, fontsize=7)
    axis.set_yticks(places, [names[c] for c in places], fontsize=7)
    axis.set(title=shown(title), xlabel="predicted class", ylabel="true class")
    if count <= NUMBERED:
        for row, column in zip(*confusion.counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 40 else "black"
            number = f"{confusion.counts[row, column]}"
            axis.text(column, row, number, ha="center", va="center", fontsize=7, color=colour)
    save_figure(figure, file)


def plot_wrong_answers(
    answers: Sequence[WrongAnswer],
    root: str | Path,
    file: File,
    *,
    title: str = "",
    max_pixels: int = MAX_PIXELS,
    background: str = BACKGROUND,
) -> None:
    """Draws wrongly answered pictures in rows, with true class, predicted class and its probability below each.

    Args:
        answers: the wrong answers, see :func:`wrong_answers`.
        root: folder that the file names are relative to.
        file: path ending in .png, .pdf or .svg, or an open file, which gets a PNG.
        title: text above the pictures.
        max_pixels: largest width times height of a picture.
        background: colour under transparent pixels, a name or "#rrggbb".

    Raises:
        ValueError: there are no answers, or a picture is missing, does not lie below root or cannot be read.
    """
    for wrong in answers:
        if leaves_root(wrong.file):
            raise ValueError(f"files of answers must lie below root = {root}, got {wrong.file!r}")
    if not answers:
        raise ValueError("answers must hold at least one wrong answer, got none")
    rows = -(-len(answers) // COLUMNS)
    figure = new_figure(2.0 * COLUMNS, 2.7 * rows + 0.5)
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, wrong in zip(axes.flat, answers, strict=False):
        picture = load_image(Path(root) / wrong.file, max_pixels=max_pixels, background=background)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        axis.imshow(np.asarray(picture))
        lines = (f"true: {wrong.true}", f"predicted: {wrong.predicted}", f"probability {100 * wrong.probability:.1f} %")
        text = "\n".join(shown(line) for caption in lines for line in textwrap.wrap(caption, CAPTION)[:2])
        axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=7)
    figure.suptitle(shown(title))
    save_figure(figure, file)


def _nan(count: int) -> np.ndarray:
    return np.full((count, count), np.nan)


def _short(name: str) -> str:
    return name if len(name) <= CAPTION else f"{name[: CAPTION - 3]}..."
