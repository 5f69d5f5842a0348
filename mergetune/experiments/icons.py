"""The demonstration: from image files to table and figure on the embedded CLIP and icons, through the ordinary path.

CoOp learns 50 base classes from 16 images each; MERGETUNE repairs what it forgot of the 50 novel ones.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mergetune.clip import FrozenClip, load_clip
from mergetune.data import Dataset, ImageFolder, cache_features
from mergetune.evaluation import BaseNovel, Row, connectivity, logit_ensemble, plot, summarise, weight_average
from mergetune.evaluation import Path as Walk
from mergetune.experiments.cells import Cell, Task, check_seeds
from mergetune.experiments.engine import Candidate, Record, Together, begun, counted, finish, reports, tested
from mergetune.experiments.run_choice import cells_folder
from mergetune.facts.brief import brief
from mergetune.facts.function_options import TABLE_PRECISION
from mergetune.io import LOCK, locked, write_json
from mergetune.solutions import Prompt, Solution, interpolate
from mergetune.training import fit, tune
from mergetune.training.run_settings import images_in_words

TEMPLATE = "an icon of a {}"
RECORD = "cell.json"
SHOTS = 16
PARTITION = 0  # CoOp's: the first half of the classes is base
STAGE_1 = {"epochs": 50, "batch_size": 64, "lr": 0.01}
SETTINGS = {"template": TEMPLATE, "shots": SHOTS, "precision": TABLE_PRECISION, "stage_1": STAGE_1}


def load_icons(folder: Path) -> tuple[FrozenClip, Dataset]:
    """The embedded CLIP, and its images as ordinary files in ``folder``."""
    assets = files("mergetune") / "assets"
    clip = load_clip("icon-clip")
    images = folder / "images"
    with as_file(assets / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        if not _unpacked(content, images):
            images.mkdir(parents=True, exist_ok=True)
            with locked(images / LOCK, busy="", wait=True):
                if not _unpacked(content, images):
                    content.extractall(images)
    return clip, ImageFolder(images)


def _unpacked(content: zipfile.ZipFile, images: Path) -> bool:
    """Whether all images are there and whole; a process that is killed while it unpacks leaves a part of the last."""
    places = ((images / entry.filename, entry.file_size) for entry in content.infolist())
    return all(place.is_file() and place.stat().st_size == size for place, size in places)


def icons_task(
    folder: str | Path, *, progress: bool = False, report: Callable[[str], None] = lambda _: None
) -> tuple[FrozenClip, list[Task]]:
    """The embedded CLIP and its icons, encoded in ``folder``."""
    clip, data = load_icons(Path(folder))
    report(f"encoding {len(data.train) + len(data.test)} images once")
    caches = {
        part: cache_features(clip, images, Path(folder) / "cache" / part, progress=progress)
        for part, images in (("train", data.train), ("test", data.test))
    }
    return clip, [Task("icons", **caches, templates=(TEMPLATE,))]


@brief("rows", "figure")
@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured.

    Attributes:
        rows: one a method, in the order of the table.
        runs: method -> its result with each seed.
        paths: the first seed's paths, "base" and "novel" test images -> name -> path.
        figure: where the figure is.
        milliseconds: mean time of a training step, by method.
    """

    rows: tuple[Row, ...]
    runs: dict[str, tuple[BaseNovel, ...]]
    paths: dict[str, dict[str, Walk]]
    figure: Path
    milliseconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "runs": {name: [run.to_json() for run in runs] for name, runs in self.runs.items()},
            "paths": {
                part: {name: walk.to_json() for name, walk in paths.items()} for part, paths in self.paths.items()
            },
            "milliseconds_per_step": self.milliseconds,
            "settings": SETTINGS,
        }


def run_demo(
    folder: str | Path,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    overwrite: bool = False,
    progress: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Cache, fine-tune, repair, evaluate.

    Args:
        folder: for images, caches, solutions, records, results.json and the figure. What is there is used again.
        seeds: each draws its own 16 images a class and its own order of batches.
        overwrite: do these seeds anew.
        progress: show bars where stderr is a terminal.
        report: told in a line what is about to be done.

    Raises:
        ValueError: there is no seed, or a seed is negative or repeats.
        RuntimeError: another process works in the folder.
    """
    check_seeds(seeds)
    folder = Path(folder)
    clip, (task,) = icons_task(folder, progress=progress, report=report)
    cells = {Path(f"seed-{seed}"): Cell(task.name, PARTITION, seed) for seed in seeds}
    heads = {own / RECORD: _head(clip, task, cell) for own, cell in cells.items()}
    with ExitStack() as held:
        folder = cells_folder(folder, heads, overwrite=overwrite, held=held)
        records = [
            _seed(clip, task, cell, folder / own, progress=progress, report=report) for own, cell in cells.items()
        ]
        names = {part: [task.train.classnames[c] for c in own] for part, own in task.halves(PARTITION).items()}
        found = [reports(record, names) for record in records]
        runs = {row: tuple(BaseNovel(**parts[row]) for parts in found) for row in found[0]}
        times = {name: [record["milliseconds"][name] for record in records] for name in records[0]["milliseconds"]}
        walks = {
            part: {name: Walk.from_json(walk) for name, walk in paths.items()}
            for part, paths in records[0]["paths"].items()
        }
        result = DemoResult(
            rows=tuple(summarise(row, own) for row, own in runs.items()),
            runs=runs,
            paths=walks,
            figure=folder / "paths.png",
            milliseconds={name: sum(own) / len(own) for name, own in times.items()},
        )
        plot({f"{part} classes, test images": walks for part, walks in result.paths.items()}, result.figure)
        write_json(folder / "results.json", result.to_json(), indent=2)
    return result


def _head(clip: FrozenClip, task: Task, cell: Cell) -> Record:
    """What the record of a seed holds before any work."""
    made_from = {"clip": clip.fingerprint, "features": [task.train.digest, task.test.digest]}
    in_words = {"clip": clip.name, "features": [images_in_words(task.train), images_in_words(task.test)]}
    return {"cell": asdict(cell), "settings": made_from | SETTINGS, "in_words": in_words}


def _seed(
    clip: FrozenClip, task: Task, cell: Cell, folder: Path, *, progress: bool, report: Callable[[str], None]
) -> Record:
    """The record of a seed: made, or taken from disk."""
    file = folder / RECORD
    record = begun(file, _head(clip, task, cell))
    if "right" in record:
        return record
    shots = task.fold(PARTITION, SHOTS, cell.seed).train
    tests = {part: task.test.select_classes(own) for part, own in task.halves(PARTITION).items()}
    common = {"seed": cell.seed, "precision": TABLE_PRECISION, "progress": progress}
    results = {}
    for method, title in (("coop", "CoOp"), ("kgcoop", "KgCoOp")):
        report(f"seed {cell.seed}: {title} on {len(shots.classnames)} base classes, {SHOTS} images each")
        results[title] = tune(clip, shots, method=method, template=TEMPLATE, **STAGE_1, **common)
    report(f"seed {cell.seed}: MERGETUNE from zero-shot and CoOp")
    results["MERGETUNE"] = fit(clip, shots, results["CoOp"].solution, zero_shot=TEMPLATE, **common)
    results["MERGETUNE"].save(folder)
    zero_shot = Prompt.from_template(clip, TEMPLATE)
    solutions = {"zero-shot": zero_shot} | {title: result.solution for title, result in results.items()}
    ends = zero_shot, solutions["CoOp"], solutions["MERGETUNE"]
    walks = {part: connectivity(clip, *ends, features) for part, features in tests.items()}
    found = {
        "milliseconds": {title: result.timings["ms_per_step"] for title, result in results.items()},
        "paths": {part: {name: walk.to_json() for name, walk in found.items()} for part, found in walks.items()},
    }
    return finish(file, record, found | counted(tested(rows(clip, solutions), tests), task.halves(PARTITION)))


def rows(clip: FrozenClip, solutions: Mapping[str, Solution]) -> list[Candidate]:
    """The rows of the table, MERGETUNE last. The mixtures are of zero-shot and CoOp, half and half.

    Args:
        clip: the embedded CLIP.
        solutions: "zero-shot", "CoOp", "KgCoOp" and "MERGETUNE".
    """
    together = Together(clip)
    made = {title: together.classifier(solution) for title, solution in solutions.items()}
    w1, w2 = made["zero-shot"], made["CoOp"]
    average = together.classifier(interpolate(solutions["zero-shot"], solutions["CoOp"], 0.5))
    return [
        Candidate("zero-shot", w1),
        Candidate("CoOp", w2),
        Candidate("KgCoOp", made["KgCoOp"]),
        Candidate("weight average, context vectors", average),
        Candidate("weight average, class embeddings (WiSE-FT)", weight_average(w1, w2)),
        Candidate("logit ensemble", logit_ensemble(w1, w2)),
        Candidate("MERGETUNE", made["MERGETUNE"]),
    ]
