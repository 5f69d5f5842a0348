"""A cell of the comparison, scored, chosen and tested; each cell leaves one JSON file."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.data import FeatureCache
from mergetune.evaluation import accuracy, harmonic_mean
from mergetune.experiments.comparison_candidates import MERGE_GRIDS, candidates, class_weights
from mergetune.experiments.comparison_cells import Cell, Task
from mergetune.facts import CompareOptions
from mergetune.io import MAX_WEIGHTS, jsonable, read_regular, read_regular_text, write_atomically, write_json
from mergetune.solutions import Solution, inputs

Record = dict[str, Any]
WEIGHTS = "class-weights.safetensors"


def begin(clip: FrozenClip, task: Task, cell: Cell, setup: CompareOptions, folder: Path) -> Record:
    """What ``cell.json`` holds of a cell: the result of :func:`prepare` if it is there, or its settings alone.

    Raises:
        ValueError: the folder holds a cell with other settings.
    """
    file, settings = folder / "cell.json", jsonable(_settings(clip, task, setup))
    if file.is_file():
        record = read_record(file)
        if record["settings"] != settings:
            raise ValueError(f"out: {folder} holds a comparison with other settings: choose another --out")
        return record
    folder.mkdir(parents=True, exist_ok=True)
    record = {"cell": asdict(cell), "settings": settings}
    write_json(file, record)
    return record


def prepare(
    clip: FrozenClip, task: Task, cell: Cell, setup: CompareOptions, folder: Path, *, progress: bool = False
) -> Record:
    """Make and score the candidates of a cell, or take them from disk. Test images are not looked at.

    Leaves ``cell.json`` and every candidate's class weights in the cell's folder.

    Raises:
        ValueError: the folder holds a cell with other settings.
    """
    begun = begin(clip, task, cell, setup, folder)
    if "candidates" in begun:
        return begun
    fold = task.fold(cell.partition, setup.shots, cell.seed)
    made = candidates(clip, fold, setup, folder, progress=progress)
    weights, mixing = {}, [0.0] * len(made.found)
    for part, val in fold.val.items():
        weights[part], seconds = class_weights(clip, made, fold.templates, val.classnames)
        mixing = [a + b for a, b in zip(mixing, seconds, strict=True)]
    scores = score(weights, fold.val)
    write_atomically(folder / WEIGHTS, serialize({part: w.contiguous() for part, w in weights.items()}))
    entries = [
        {
            "row": c.row, "options": c.options, "experts": c.experts, "data": c.data, "parameters": c.parameters,
            "seconds": c.seconds + spent, "score": value,
        }
        for c, spent, value in zip(made.found, mixing, scores, strict=True)
    ]  # fmt: skip
    record = begun | {"candidates": entries, "left_out": made.left_out}
    write_json(folder / "cell.json", record)
    return jsonable(record)


def score(weights: Mapping[str, Tensor], val: Mapping[str, FeatureCache]) -> list[float]:
    """Accuracy of each candidate on validation images; of base and novel classes the harmonic mean. Percent."""
    parts = [[accuracy(w, features).accuracy for w in weights[part]] for part, features in val.items()]
    return [_summary(values) for values in zip(*parts, strict=True)]


def _summary(accuracies: Sequence[float]) -> float:
    return harmonic_mean(*accuracies) if len(accuracies) == 2 else accuracies[0]


def choose(records: Sequence[Record], how: str = "validation") -> list[dict[str, int]]:
    """For each cell and row the candidate with the best validation score; of equals the first, the default.

    Args:
        records: of :func:`prepare`: validation scores, no test results.
        how: "validation", the cell's own; "others", mean over the cells of all other datasets.
    """
    if how == "others" and len({record["cell"]["task"] for record in records}) < 2:
        raise ValueError("choose='others' needs at least two datasets, got one")
    chosen = []
    for record in records:
        task, best = record["cell"]["task"], {}
        seen = [record] if how == "validation" else [r for r in records if r["cell"]["task"] != task]
        scores: dict[Any, list[float]] = {}
        for other in seen:
            for entry in other["candidates"]:
                scores.setdefault((entry["row"], json.dumps(entry["options"])), []).append(entry["score"])
        for number, entry in enumerate(record["candidates"]):
            found = scores.get((entry["row"], json.dumps(entry["options"])))
            if found is None:
                continue
            value = statistics.fmean(found)
            if entry["row"] not in best or value > best[entry["row"]][0]:
                best[entry["row"]] = (value, number)
        chosen.append({row: number for row, (_, number) in best.items()})
    return chosen


def measure(task: Task, record: Record, chosen: Mapping[str, int], folder: Path) -> Record:
    """Test the chosen candidates of a cell, or take their results from disk."""
    if record.get("chosen") == chosen:
        return record
    weights = deserialize(read_regular(folder / WEIGHTS, limit=MAX_WEIGHTS))
    halves = task.halves(record["cell"]["partition"])
    results: dict[str, dict[str, list[int]]] = {row: {} for row in chosen}
    images = {}
    for part, classes in halves.items():
        test = task.test.select_classes(classes)
        counts = torch.bincount(test.labels, minlength=len(classes))
        images[part] = counts.tolist()
        for row, number in chosen.items():
            right = _right(weights[part][number], test)
            results[row][part] = torch.bincount(test.labels[right], minlength=len(classes)).tolist()
    record = record | {"chosen": dict(chosen), "classes": halves, "images": images, "right": results}
    write_json(folder / "cell.json", record)
    return jsonable(record)


def _right(weights: Tensor, features: FeatureCache) -> Tensor:
    answers = [(inputs(x, weights) @ weights.T).argmax(-1) for x, _, _ in features.batches(2048)]
    return torch.cat(answers) == features.labels


def _settings(clip: FrozenClip, task: Task, setup: CompareOptions) -> dict[str, Any]:
    """What a cell's result depends on beside the cell."""
    experts = setup.experts
    if isinstance(experts, Mapping):
        experts = {name: [s.kind, _digest(s)] for name, s in experts.items()}
    return {
        "clip": clip.fingerprint,
        "templates": task.templates,
        "features": [None if cache is None else cache.digest for cache in (task.train, task.val, task.test)],
        "experts": experts,
        "shots": setup.shots,
        "tune": setup.tune,
        "fit": setup.fit,
        "grids": [setup.grid, MERGE_GRIDS],
    }


def _digest(solution: Solution) -> str:
    digest = hashlib.sha256()
    for tensor in solution.state().values():
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def read_record(file: Path) -> Record:
    try:
        record = json.loads(read_regular_text(file))
        _ = record["cell"], record["settings"]
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {file} cannot be read ({error}): delete it to run it again") from error
