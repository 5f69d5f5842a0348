"""`mergetune predict` classifies pictures with a saved solution."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.clip_choice import clip_for
from mergetune.cli.options import (
    AllowTorchscript,
    BackboneIfNeeded,
    Background,
    Device,
    HeadName,
    Json,
    MaxPixels,
    Position,
    Precision,
    Pretrained,
    Workers,
)
from mergetune.cli.shared import (
    announce,
    errors,
    read_names,
    read_solution,
)
from mergetune.cli.terminal import visible
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS, POSITIONS

TABLES = (".csv", ".tsv")  # endings of --csv

Write = Callable[[Any], None]
"""Function that writes one prediction."""


def predict(
    solution: Annotated[
        str,
        typer.Argument(
            help="Saved solution, for example the --out of `mergetune fit`; CoOp checkpoint or head; or a zero-shot "
            "template such as 'a photo of a {}.'."
        ),
    ],
    pictures: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, folders of pictures (with all subfolders), and lists: .txt with one path per line, .csv "
            "with a column path, .json with paths. Paths in a list are relative to the folder of the list."
        ),
    ],
    classes: Annotated[
        Path | None,
        typer.Option(
            "--classnames",
            help="Text file with one class name per line. Default: the classes that the solution knows or was trained "
            "on. A head has no other classes.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to show per picture.")] = 5,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", help="Write a table to this .csv or .tsv file instead. It appears when all rows are written."
        ),
    ] = None,
    as_json: Json = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help='Probability below which the label is "none". Default: every picture has a label.'
        ),
    ] = None,
    activation: Annotated[
        str,
        typer.Option(help="softmax: one class per picture; sigmoid: any number of classes, for SigLIP models only."),
    ] = "softmax",
    backbone: BackboneIfNeeded = None,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    precision: Precision = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per call of the image tower.")] = 64,
    workers: Workers = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    background: Background = BACKGROUND,
    position: Position = "end",
    weight: HeadName = None,
) -> None:
    """Classify pictures: one row per picture, in the order of the input, with the most probable classes.

    mergetune predict out/photos new-photos/ --csv predictions.csv

    A picture that cannot be read gets a row with the error. Exit code: 0 if all pictures were read, 1 if some could not
    be read (all rows are written), 2 for a wrong argument. The orientation in a photo's EXIF record is not applied, as
    in training: a photo that lies on its side there is classified as it lies.
    """
    import mergetune as mt
    from mergetune.clip import check_templates
    from mergetune.data import find_pictures
    from mergetune.data.image_files import describe_ignored, ignored_files
    from mergetune.evaluation import classes_of

    with errors():
        if position not in POSITIONS:
            raise ValueError(f"--position must be one of {', '.join(POSITIONS)}, got {position!r}")
        if csv_file is not None and csv_file.suffix.lower() not in TABLES:
            raise ValueError(f"--csv must end in {' or '.join(TABLES)}, got {csv_file}")
        if csv_file is not None and as_json:
            raise ValueError(f"--csv and --json exclude each other, got --csv {csv_file} and --json: leave one out")
        names = None if classes is None else read_names(classes)
        template = "{}" in solution
        if template:
            check_templates(solution)
        opened: Any = (
            solution if template else read_solution(solution, position=position, classnames=names, name=weight)
        )
        # What is wrong with names or pictures is said before the model is loaded.
        names = classes_of(opened, names, activation=activation)
        found = list(find_pictures(pictures))
        for folder in filter(os.path.isdir, pictures):
            if ignored := ignored_files(folder):
                announce(as_json)(f"{folder}: {describe_ignored(ignored)}")
        clip = clip_for(
            backbone, pretrained, device=device, precision=precision, allow_torchscript=allow_torchscript,
            solutions={} if template else {solution: opened},
        )  # fmt: skip
        predictor = mt.Predictor(
            clip, opened, names, top=top, threshold=threshold, activation=activation, batch_size=batch_size,
            workers=workers, max_pixels=max_pixels, background=background,
        )  # fmt: skip
        started, unreadable = time.monotonic(), 0
        rows_on_screen = csv_file is None and sys.stdout.isatty()  # a bar would be drawn into them
        with _writer(csv_file, as_json, solution, predictor) as write:
            for prediction in predictor.stream(found, progress=not rows_on_screen):
                write(prediction)
                unreadable += prediction.error is not None
        summary = f"{len(found):,} {'picture' if len(found) == 1 else 'pictures'}"
        summary += f", {unreadable:,} unreadable" if unreadable else ""
        summary += f"; {predictor.describe()}; {time.monotonic() - started:.1f} s"
        if csv_file is not None:
            _say(f"{csv_file}: {summary}")
        elif not as_json:
            print(visible(summary), file=sys.stderr)
    if unreadable:
        raise typer.Exit(1)


def _writer(csv_file: Path | None, as_json: bool, solution: str, predictor: Any) -> AbstractContextManager[Write]:
    """Context manager with the function that writes one prediction."""
    if csv_file is not None:
        return _csv_rows(csv_file, min(predictor.top, len(predictor.classnames)))
    return _json_rows(solution, predictor) if as_json else contextlib.nullcontext(_print_row)


@contextmanager
def _csv_rows(file: Path, top: int) -> Iterator[Write]:
    """Writes a table: file, label, error, then the ``top`` classes and their probabilities, best first.

    The file is written row by row under another name and renamed at the end, so it never holds a part of the rows.
    """
    from mergetune.io import writing_atomically, writing_to

    if not file.parent.is_dir():
        raise FileNotFoundError(f"--csv must be a file in an existing folder, got {file}: create {file.parent} first")
    if file.exists() and not file.is_file():
        raise ValueError(f"--csv must be a file that can be replaced, got {file}, which is no regular file")
    with writing_to(file), writing_atomically(file) as stream:
        # A name that is not UTF-8 must not make the whole table unreadable: its bytes are written as \udcXX.
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="")
        table = csv.writer(text, lineterminator="\n", delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        ranks = [column for i in range(1, top + 1) for column in (f"class_{i}", f"probability_{i}")]
        table.writerow(["file", "label", "error", *ranks])

        def write(found: Any) -> None:
            pairs = zip(found.labels, found.probabilities, strict=True)
            values = [value for name, p in pairs for value in (name, f"{p:.6g}")]
            values += [""] * (len(ranks) - len(values))
            table.writerow([found.file, found.label or "", found.error or "", *values])

        try:
            yield write
        finally:
            text.detach()  # writes the remaining text and leaves the stream open


@contextmanager
def _json_rows(solution: str, predictor: Any) -> Iterator[Write]:
    """Prints one JSON object; its list of predictions is printed one per line, as they come."""
    head = {
        "solution": solution,
        "backbone": predictor.clip.name,
        "activation": predictor.activation,
        "logit_scale": predictor.logit_scale,
        "temperature": predictor.temperature,
        "threshold": predictor.threshold,
        "classnames": list(predictor.classnames),
    }
    sys.stdout.write(json.dumps(head, indent=1).removesuffix("\n}") + ',\n "predictions": [')
    count = unreadable = 0

    def write(found: Any) -> None:
        nonlocal count, unreadable
        sys.stdout.write(f"{',' if count else ''}\n  {json.dumps(found.to_json())}")
        count, unreadable = count + 1, unreadable + (found.error is not None)

    yield write
    sys.stdout.write(f'\n ],\n "pictures": {count},\n "unreadable": {unreadable}\n}}\n')


def _print_row(found: Any) -> None:
    if found.error is not None:
        row = f"{found.file}: error: {found.error}"
    else:
        classes = ", ".join(f"{name} {p:.3f}" for name, p in zip(found.labels, found.probabilities, strict=True))
        row = f"{found.file}: {'none; ' if found.label != found.labels[0] else ''}{classes}"
    _say(row)


def _say(line: str) -> None:
    """Prints one line, also if the encoding of stdout lacks a character."""
    line = visible(line)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
