"""What the paper's experiments would take here: runs that are left, images to encode, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from mergetune.clip import FrozenClip
from mergetune.data import FeatureCache, templates_for
from mergetune.experiments.engine import kept
from mergetune.experiments.protocol_plans import Experiment, Run, check_data
from mergetune.experiments.protocols import RECORD, Caches
from mergetune.experiments.records import RunRecordFile
from mergetune.facts.brief import brief
from mergetune.training import fit, tune


@brief()
@dataclass(frozen=True)
class Forecast:
    """What a plan would do.

    Attributes:
        runs: all of them; ``finished`` of them are done.
        finished: runs that have their result.
        images: images to encode, by cache; 0 for a cache that is there.
        seconds_encoding, seconds_training: estimated from a few measured images and steps, without those done.
    """

    runs: int
    finished: int
    images: dict[str, int]
    seconds_encoding: float
    seconds_training: float

    @property
    def seconds(self) -> float:
        return self.seconds_encoding + self.seconds_training

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds}


def forecast(runs: Sequence[Run], experiment: Experiment, clip: FrozenClip) -> Forecast:
    """Look at the data and what is there, measure a few images and steps, and do nothing else."""
    check_data(runs, experiment.root)
    caches = Caches(clip, experiment)
    images = {}
    for key in caches.needed(runs):
        path, wanted = caches.images(*key)
        name, there = path.relative_to(experiment.out / "cache").as_posix(), (path / "manifest.json").is_file()
        images[name] = 0 if there else len(wanted)
    records = [kept(experiment.results / run.folder / RECORD, RunRecordFile) for run in runs]
    left = [run for run, record in zip(runs, records, strict=True) if "results" not in (record or {})]
    # Steps grow with the images, and the epochs may depend on the shots: one run of each kind is measured.
    kinds = {run: (run.source, run.method, run.protocol, run.shots) for run in left}
    seconds = {kind: _seconds_a_run(run, caches) for kind, run in {kind: run for run, kind in kinds.items()}.items()}
    training = sum(seconds[kind] * (run.shots or 1) for run, kind in kinds.items())
    return Forecast(
        runs=len(runs),
        finished=len(runs) - len(left),
        images=images,
        seconds_encoding=sum(images.values()) * _seconds_an_image(clip) if any(images.values()) else 0.0,
        seconds_training=training,
    )


def _seconds_an_image(clip: FrozenClip) -> float:
    size = clip.preprocess_cfg["size"]
    pixels = torch.zeros(8, 3, *((size, size) if isinstance(size, int) else size))
    clip.encode_image(pixels[:1])
    began = time.perf_counter()
    clip.encode_image(pixels)
    return (time.perf_counter() - began) / len(pixels)


def _seconds_a_run(run: Run, caches: Caches) -> float:
    """Both stages, for each image of a class (of the whole set, where all are used), from two epochs of one step."""
    clip, experiment = caches.clip, caches.experiment
    data = caches.data(run.source)
    data = data.base_novel()[0] if run.protocol == "base-to-novel" else data
    classes, images = len(data.classnames), len(data.train) if run.shots is None else len(data.classnames)
    x = F.normalize(torch.randn(classes, clip.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = FeatureCache.from_tensors(x, torch.arange(classes), data.classnames)
    templates, seconds = templates_for(run.source, experiment.templates), 0.0
    solution: Any = None
    for stage in ("tune", "fit"):
        given = experiment.stage_1(run) if stage == "tune" else experiment.stage_2(run)
        epochs, batch = given.pop("epochs", 50), given.pop("batch_size", 32 if stage == "tune" else 128)
        common = {"epochs": 2, "batch_size": min(batch, classes), "zero_shot": templates, "progress": False} | given
        run_stage = tune if stage == "tune" else partial(fit, tuned=solution)
        done = run_stage(clip, features, **common)
        solution = done.solution
        if stage == "fit" or experiment.checkpoints is None:
            seconds += done.timings["ms_per_step"] / 1e3 * epochs * images / batch
    return seconds
