"""The demonstration: from image files to table and figure on the embedded CLIP and icons, through the ordinary path.

CoOp learns 50 base classes from 16 images each; MERGETUNE repairs what it forgot of the 50 novel ones.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mergetune.clip import FrozenClip, load_clip
from mergetune.data import Dataset, ImageFolder, cache_features
from mergetune.evaluation import (
    BaseNovel,
    Classifier,
    Row,
    base_to_novel,
    classifier,
    connectivity,
    logit_ensemble,
    plot,
    summarise,
    weight_average,
)
from mergetune.evaluation import Path as Walk
from mergetune.io import write_json
from mergetune.solutions import Prompt, Solution, interpolate
from mergetune.training import fit, tune

TEMPLATE = "an icon of a {}"
SHOTS = 16
STAGE_1 = {"epochs": 50, "batch_size": 64, "lr": 0.01}
PRECISION = "float32"  # so that the figures do not depend on what the machine is fastest at


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
            "runs": {
                name: [{"base": run.base.to_json(), "novel": run.novel.to_json(), "hm": run.hm} for run in runs]
                for name, runs in self.runs.items()
            },
            "paths": {
                part: {name: walk.to_json() for name, walk in paths.items()} for part, paths in self.paths.items()
            },
            "milliseconds_per_step": self.milliseconds,
            "settings": {"template": TEMPLATE, "shots": SHOTS, "precision": PRECISION, "stage_1": STAGE_1},
        }


def load_icons(folder: Path) -> tuple[FrozenClip, Dataset]:
    """The embedded CLIP, and its images as ordinary files in ``folder``."""
    assets = files("mergetune") / "assets"
    with as_file(assets / "icon-clip") as model:
        clip = load_clip(f"local-dir:{model}")
    images = folder / "images"
    with as_file(assets / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        if not images.is_dir() or sum(1 for _ in images.rglob("*.png")) != len(content.namelist()):
            content.extractall(images)
    return clip, ImageFolder(images)


def run_demo(
    folder: str | Path,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    progress: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Cache, fine-tune, repair, evaluate.

    Args:
        folder: for images, caches, solutions, results.json and the figure. What is there is used again.
        seeds: each draws its own 16 images a class and its own order of batches.
        progress: show bars where stderr is a terminal.
        report: told in a line what is about to be done.
    """
    if not seeds:
        raise ValueError("seeds must hold at least one seed, got none")
    folder = Path(folder)
    clip, data = load_icons(folder)
    base, novel = data.base_novel()
    report(f"encoding {len(data.train) + len(data.test)} images once")
    train = cache_features(clip, data.train, folder / "cache" / "train", progress=progress)
    test = cache_features(clip, data.test, folder / "cache" / "test", progress=progress)
    base_test, novel_test = test.select(base.test), test.select(novel.test)

    zero_shot = Prompt.from_template(clip, TEMPLATE)
    runs: dict[str, list[BaseNovel]] = defaultdict(list)
    milliseconds: dict[str, list[float]] = defaultdict(list)
    walks: dict[str, dict[str, Walk]] = {}
    for seed in seeds:
        shots = train.select(base.few_shot(SHOTS, seed=seed))
        common = {"seed": seed, "precision": PRECISION, "progress": progress}
        solutions: dict[str, Solution] = {}
        for method, title in (("coop", "CoOp"), ("kgcoop", "KgCoOp")):
            report(f"seed {seed}: {title} on {len(base.classnames)} base classes, {SHOTS} images each")
            tuned = tune(clip, shots, method=method, template=TEMPLATE, **STAGE_1, **common)
            solutions[title] = tuned.solution
            milliseconds[title].append(tuned.timings["ms_per_step"])
        report(f"seed {seed}: MERGETUNE from zero-shot and CoOp")
        merged = fit(clip, shots, solutions["CoOp"], zero_shot=TEMPLATE, **common)
        milliseconds["MERGETUNE"].append(merged.timings["ms_per_step"])
        merged.save(folder / f"seed-{seed}")
        solutions["MERGETUNE"] = merged.solution
        for name, classify in _table(clip, zero_shot, solutions).items():
            runs[name].append(base_to_novel(classify, base_test, novel_test))
        if seed == seeds[0]:
            walks = {
                part: connectivity(clip, zero_shot, solutions["CoOp"], solutions["MERGETUNE"], features)
                for part, features in (("base", base_test), ("novel", novel_test))
            }

    figure = folder / "paths.png"
    plot({f"{part} classes, test images": paths for part, paths in walks.items()}, figure)
    result = DemoResult(
        rows=tuple(summarise(name, found) for name, found in runs.items()),
        runs={name: tuple(found) for name, found in runs.items()},
        paths=walks,
        figure=figure,
        milliseconds={name: sum(times) / len(times) for name, times in milliseconds.items()},
    )
    write_json(folder / "results.json", result.to_json(), indent=2)
    return result


def _table(clip: FrozenClip, zero_shot: Prompt, solutions: dict[str, Solution]) -> dict[str, Classifier]:
    """The rows of the table, MERGETUNE last. The mixtures are of zero-shot and CoOp, half and half."""
    w1, w2 = classifier(clip, zero_shot), classifier(clip, solutions["CoOp"])
    return {
        "zero-shot": w1,
        "CoOp": w2,
        "KgCoOp": classifier(clip, solutions["KgCoOp"]),
        "weight average, context vectors": classifier(clip, interpolate(zero_shot, solutions["CoOp"], 0.5)),
        "weight average, class embeddings (WiSE-FT)": weight_average(w1, w2),
        "logit ensemble": logit_ensemble(w1, w2),
        "MERGETUNE": classifier(clip, solutions["MERGETUNE"]),
    }
