"""The fair table: zero-shot, tuned, every merge, ensembles and MERGETUNE on the same cells, with paired differences.

A cell is one dataset, one partition of its classes into base and novel, and one seed of the draw and the training. In
each cell all candidates (a method with one choice of hyper-parameters) are made from training images, scored on
validation images, one candidate a method is chosen, and only the chosen are tested. Each cell leaves one JSON file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm.auto import tqdm

from mergetune.clip import FrozenClip
from mergetune.clip.class_texts import check_texts
from mergetune.data import FeatureCache
from mergetune.evaluation import ImageMap, accuracy, classifier, harmonic_mean, score
from mergetune.experiments.cells import Cell, Fold, Task, check_seeds
from mergetune.experiments.comparison_candidates import MERGE_GRIDS, candidates, train
from mergetune.experiments.comparison_tables import REFERENCE, Comparison, summarise
from mergetune.experiments.engine import Record, begun, counted, finish
from mergetune.facts import CompareOptions
from mergetune.io import MAX_WEIGHTS, hidden, read_regular, write_atomically, writing_in
from mergetune.solutions import Solution, load_solution
from mergetune.training.run_settings import images_in_words, solution_in_words

RECORD, WEIGHTS = "cell.json", "class-weights.safetensors"
MAPPED = "mapped"  # folder of the candidates that map image features


def compare(
    clip: FrozenClip,
    tasks: Task | Sequence[Task],
    out: str | Path,
    *,
    setup: CompareOptions | None = None,
    partitions: Sequence[int | None] = (0,),
    seeds: Sequence[int] = (1,),
    reference: str = REFERENCE,
    progress: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compare everything on every cell: datasets x partitions x seeds. Killed, the same call goes on.

    Args:
        clip: the frozen CLIP that the features come from.
        tasks: one dataset or several.
        out: folder; each cell leaves its experts, its MERGETUNE runs and one ``cell.json``.
        setup: experts, few-shot images, training, grids, and how hyper-parameters are chosen.
        partitions: halves of the classes, see :meth:`Task.halves`; None trains and tests on all classes.
        seeds: of the draw of images and the training.
        reference: the line that the others' differences are to.
        progress: show bars where stderr is a terminal.
        report: told in a line what is about to be done.

    Raises:
        ValueError: an argument is out of range, or ``out`` holds cells with other settings.
        RuntimeError: another process works in ``out``.
    """
    setup, tasks, out = setup or CompareOptions(), [tasks] if isinstance(tasks, Task) else list(tasks), Path(out)
    check_seeds(seeds)
    by_name = {task.name: task for task in tasks}
    cells = [Cell(name, partition, seed) for name in by_name for partition in partitions for seed in seeds]
    if not cells or len(by_name) < len(tasks) or len(set(cells)) < len(cells):
        raise ValueError(f"tasks, partitions and seeds must be there and not repeat, got {cells}")
    if len({partition is None for partition in partitions}) > 1:
        raise ValueError(f"partitions must be halves, or None alone, got {list(partitions)}")
    if isinstance(setup.experts, Mapping) and len(cells) > 1:
        raise ValueError(f"experts that are given belong to one cell, got {len(cells)} cells")
    if setup.choose == "others" and len(by_name) < 2:
        raise ValueError("choose='others' needs at least two datasets, got one")
    for task, partition in itertools.product(tasks, partitions):
        check_texts(clip, task.train.classnames, task.templates)  # novel classes, too, before anything is trained
        task.halves(partition)
    with writing_in(out):
        prepared = []
        with tqdm(total=len(cells), desc="compare", unit="cell", disable=hidden(progress)) as bar:
            for name, partition in itertools.product(by_name, partitions):
                task = by_name[name]
                alike = [cell for cell in cells if (cell.task, cell.partition) == (name, partition)]
                folds = {}
                for cell in alike:
                    if "candidates" not in begin(clip, task, cell, setup, out / cell.folder):
                        report(f"{cell.folder}: experts, MERGETUNE")
                        folds[out / cell.folder] = task.fold(partition, setup.shots, cell.seed)
                train(clip, folds, setup, progress=progress)
                for cell in alike:
                    report(f"{cell.folder}: merges, validation")
                    prepared.append(prepare(clip, task, cell, setup, out / cell.folder, progress=progress))
                    bar.update()
        # no results of earlier calls
        seen = [{key: record[key] for key in ("cell", "candidates")} for record in prepared]
        chosen = choose(seen, setup.choose, setup.select)
        records = [
            measure(clip, by_name[cell.task], record, best, out / cell.folder, select=setup.select)
            for cell, record, best in zip(cells, prepared, chosen, strict=True)
        ]
    return summarise(records, reference=reference, choose=setup.choose, select=setup.select)


def begin(clip: FrozenClip, task: Task, cell: Cell, setup: CompareOptions, folder: Path) -> Record:
    """What a cell's file holds: the result of :func:`prepare` if it is there, or the settings alone."""
    return begun(folder / RECORD, _head(clip, task, cell, setup))


def heads(
    clip: FrozenClip,
    tasks: Sequence[Task],
    setup: CompareOptions,
    partitions: Sequence[int | None],
    seeds: Sequence[int],
) -> dict[Path, Record]:
    """The record files of all cells, below the folder of results, and what they hold before any work."""
    cells = [(task, Cell(task.name, partition, seed)) for task in tasks for partition in partitions for seed in seeds]
    return {cell.folder / RECORD: _head(clip, task, cell, setup) for task, cell in cells}


def _head(clip: FrozenClip, task: Task, cell: Cell, setup: CompareOptions) -> Record:
    in_words: Record = {"clip": clip.name, "features": list(map(images_in_words, (task.train, task.val, task.test)))}
    if isinstance(setup.experts, Mapping):
        in_words["experts"] = {name: solution_in_words(solution) for name, solution in setup.experts.items()}
    return {"cell": asdict(cell), "settings": _settings(clip, task, setup), "in_words": in_words}


def prepare(
    clip: FrozenClip, task: Task, cell: Cell, setup: CompareOptions, folder: Path, *, progress: bool = False
) -> Record:
    """Make and score the candidates of a cell, or take them from disk. Test images are not looked at.

    Leaves ``cell.json`` and every candidate's class weights in the cell's folder.

    Raises:
        ValueError: the folder holds a cell with other settings.
    """
    record = begin(clip, task, cell, setup, folder)
    if all(entry.get("scores") for entry in record.get("candidates", [{}])):
        return record
    fold = task.fold(cell.partition, setup.shots, cell.seed)
    if "candidates" in record:
        return _with_scores(clip, record, fold, folder)
    made = candidates(clip, fold, setup, folder, progress=progress)
    weights, mixing = {}, [0.0] * len(made.found)
    for part, val in fold.val.items():
        weights[part], seconds = made.class_weights(val.classnames)
        mixing = [a + b for a, b in zip(mixing, seconds, strict=True)]
    images = [candidate.classify.images for candidate in made.found]
    scores = validated(weights, fold.val, images)
    write_atomically(folder / WEIGHTS, serialize({part: w.contiguous() for part, w in weights.items()}))
    facts = ("row", "options", "experts", "data", "parameters")
    entries = [
        {name: getattr(c, name) for name in facts} | {"seconds": c.seconds + spent} | _score(value)
        for c, spent, value in zip(made.found, mixing, scores, strict=True)
    ]
    for number, candidate in enumerate(made.found):
        if candidate.classify.images is not None and candidate.solution is not None:
            candidate.solution.save(folder / MAPPED / str(number))
    return finish(folder / RECORD, record, {"candidates": entries, "left_out": made.left_out})


def validated(
    weights: Mapping[str, Tensor], val: Mapping[str, FeatureCache], images: Sequence[ImageMap | None]
) -> list[dict[str, float]]:
    """Accuracy of each candidate on the validation images of each part, in percent."""
    parts = [
        [accuracy(w, features, images=own).accuracy for w, own in zip(weights[part], images, strict=True)]
        for part, features in val.items()
    ]
    return [dict(zip(val, found, strict=True)) for found in zip(*parts, strict=True)]


def _score(scores: Mapping[str, float]) -> Record:
    """The validation scores of a candidate as its record has them: by part, and of base and novel the harmonic mean."""
    return {"score": harmonic_mean(*scores.values()) if len(scores) == 2 else scores["all"], "scores": dict(scores)}


def _with_scores(clip: FrozenClip, record: Record, fold: Fold, folder: Path) -> Record:
    """The record of an earlier version with the scores by part, as long as its class weights are there."""
    entries, kept = record["candidates"], folder / WEIGHTS
    if not kept.is_file():
        return record
    images = [_images(clip, folder, number) for number in range(len(entries))]
    found = validated(deserialize(read_regular(kept, limit=MAX_WEIGHTS)), fold.val, images)
    entries = [entry | {"scores": scores} for entry, scores in zip(entries, found, strict=True)]
    return finish(folder / RECORD, record, {"candidates": entries})


def choose(
    records: Sequence[Record], how: str = "validation", select: str = CompareOptions.select
) -> list[dict[str, int]]:
    """For each cell and row the candidate with the best validation score; of equals the first, the default.

    Args:
        records: of :func:`prepare`: validation scores, no test results.
        how: "validation", the cell's own; "others", mean over the cells of all other datasets.
        select: classes whose validation images count, "base" or "both".
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
                value = _selected(entry, other["cell"], select)
                scores.setdefault((entry["row"], json.dumps(entry["options"])), []).append(value)
        for number, entry in enumerate(record["candidates"]):
            found = scores.get((entry["row"], json.dumps(entry["options"])))
            if found is None:
                continue
            value = statistics.fmean(found)
            if entry["row"] not in best or value > best[entry["row"]][0]:
                best[entry["row"]] = (value, number)
        chosen.append({row: number for row, (_, number) in best.items()})
    return chosen


def _selected(entry: Record, cell: Mapping[str, Any], select: str) -> float:
    if select == "both" or cell["partition"] is None:
        return entry["score"]
    if "base" not in entry.get("scores", {}):
        raise ValueError(
            f"select must be both for the cell {Cell(**cell).folder}, got {select}: an earlier version scored it on "
            "base and novel classes together; or delete its folder to run it again"
        )
    return entry["scores"]["base"]


def measure(
    clip: FrozenClip, task: Task, record: Record, chosen: Mapping[str, int], folder: Path, *, select: str
) -> Record:
    """Test the chosen candidates of a cell, or take their results from disk.

    Results of version 0.1 have no joint label space; it is added from the class weights, where they are still there.
    """
    halves, kept = task.halves(record["cell"]["partition"]), folder / WEIGHTS
    select = "all" if len(halves) == 1 else select
    joint = len(halves) == 1 or all("seen" in parts for parts in record.get("right", {}).values())
    if record.get("chosen") == chosen and (joint or not kept.is_file()):
        return record if record.get("select") == select else finish(folder / RECORD, record, {"select": select})
    weights = deserialize(read_regular(kept, limit=MAX_WEIGHTS))
    tests = {part: task.test.select_classes(classes) for part, classes in halves.items()}
    found = {}
    for row, number in chosen.items():
        images = _images(clip, folder, number)
        found[row] = score({part: weights[part][number] for part in tests}, tests, images=images)
    return finish(folder / RECORD, record, {"chosen": dict(chosen), "select": select} | counted(found, halves))


def _images(clip: FrozenClip, folder: Path, number: int) -> ImageMap | None:
    """The image map of a candidate of a cell."""
    mapped = folder / MAPPED / str(number)
    return classifier(clip, load_solution(mapped)).images if mapped.is_dir() else None


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
    digest, state = hashlib.sha256(), solution.saved_state()
    if state.keys() == {"weight", "bias"}:  # as version 0.1 laid out a head
        state = {"weight": torch.cat([state["weight"], state["bias"][:, None]], 1)}
    for tensor in state.values():
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()
