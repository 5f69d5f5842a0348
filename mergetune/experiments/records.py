"""The record of a cell: one JSON document with its settings, which a later call reads and other settings refuse.

    {"cell": ..., "settings": ..., "classes": {part: [class, ...]}, "images": {part: [number, ...]},
     "right": {row: {part: [number, ...]}}}

Images and right answers are per class. All accuracies, spreads and intervals are computed from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from mergetune.data import FeatureCache
from mergetune.evaluation import Hits, score
from mergetune.experiments.candidates import Candidate
from mergetune.io import jsonable, read_regular_text

Record = dict[str, Any]
HOME = {"seen": "base", "unseen": "novel"}  # the joint label space has the same images and classes


def held(file: Path, head: Mapping[str, Any]) -> Record:
    """What a cell's file holds, or ``head`` where there is no file.

    Args:
        file: of the cell.
        head: what the cell's results depend on: the cell itself, and "settings".

    Raises:
        ValueError: the file cannot be read, or it has another head.
    """
    wanted: Record = jsonable(head)
    record = read_record(file, wanted) or wanted
    for name, value in wanted.items():
        old = record[name] if isinstance(record[name], dict) else {}
        if other := [key for key in {**value, **old} if key not in old or old[key] != value.get(key)]:
            raise ValueError(f"out: {file.parent} holds results with other {', '.join(other)}: choose another --out")
    return record


def read_record(file: Path, needed: Sequence[str] | Mapping[str, Any]) -> Record | None:
    """The content of a cell's file with the ``needed`` keys; None if there is no file."""
    if not file.is_file():
        return None
    try:
        record = json.loads(read_regular_text(file))
        _ = [record[name] for name in needed]
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {file} cannot be read ({error}): delete it to run it again") from error


def tested(candidates: Sequence[Candidate], tests: Mapping[str, FeatureCache]) -> dict[str, dict[str, Hits]]:
    """Row -> part -> right answers, as :func:`mergetune.evaluation.score` counts them."""
    return {
        candidate.row: score({part: candidate.classify(images.classnames) for part, images in tests.items()}, tests)
        for candidate in candidates
    }


def counted(found: Mapping[str, Mapping[str, Hits]], classes: Mapping[str, Sequence[int]] | None = None) -> Record:
    """The counts of a record.

    Args:
        found: row -> part -> right answers.
        classes: the numbers of a part's classes in their dataset; None: all parts have classes of their own.
    """
    parts = next(iter(found.values()))
    images = {part: list(hits.images) for part, hits in parts.items() if part not in HOME}
    number = count()
    numbers = {part: list(islice(number, len(own))) for part, own in images.items()}
    right = {row: {part: list(hits.right) for part, hits in parts.items()} for row, parts in found.items()}
    return {"classes": {**(classes or numbers)}, "images": images, "right": right}


def hits(record: Record, row: str, part: str) -> Hits:
    """Right answers of a row on a part of the images."""
    return Hits(tuple(record["right"][row][part]), tuple(record["images"][HOME.get(part, part)]))
