"""The fair table: zero-shot, tuned, every merge, ensembles and MERGETUNE on the same cells, with paired differences.

A cell is one dataset, one partition of its classes into base and novel, and one seed of the draw and the training. In
each cell all candidates (a method with one choice of hyper-parameters) are made from training images, scored on
validation images, one candidate a method is chosen, and only the chosen are tested. Each cell leaves one JSON file.

Shapes: K experts, M prompts encoded together, C classes, D embedding width, R resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from mergetune.clip import FrozenClip
from mergetune.experiments.comparison_candidates import train
from mergetune.experiments.comparison_cells import REFERENCE, Cell, Task
from mergetune.experiments.comparison_records import begin, choose, measure, prepare
from mergetune.experiments.comparison_tables import Comparison, summarise
from mergetune.facts import CompareOptions


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
    """
    setup, tasks, out = setup or CompareOptions(), [tasks] if isinstance(tasks, Task) else list(tasks), Path(out)
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
    prepared = []
    with tqdm(total=len(cells), desc="compare", unit="cell", disable=None if progress else True) as bar:
        for name, partition in itertools.product(by_name, partitions):
            task, alike = by_name[name], [cell for cell in cells if (cell.task, cell.partition) == (name, partition)]
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
    seen = [{key: record[key] for key in ("cell", "candidates")} for record in prepared]  # no results of earlier calls
    chosen = choose(seen, setup.choose)
    records = [
        measure(by_name[cell.task], record, best, out / cell.folder)
        for cell, record, best in zip(cells, prepared, chosen, strict=True)
    ]
    return summarise(records, reference=reference, choose=setup.choose)
