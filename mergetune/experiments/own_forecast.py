"""What work on own images would take: images, size of the caches, minutes. A few images and steps are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from mergetune.clip import PLAIN, PRECISIONS, FrozenClip, check_templates
from mergetune.data import Dataset, FeatureCache, ImageList
from mergetune.experiments.choosing import settings_to_try
from mergetune.experiments.making import SHARED, TRAINED
from mergetune.experiments.measuring import fold_of
from mergetune.experiments.own_plan import kinds_of, plan_images, stage_1_of, why_not
from mergetune.facts import FitOptions
from mergetune.facts.function_options import TUNE_METHODS, TUNE_SETTINGS
from mergetune.io import load_image
from mergetune.solutions import Solution
from mergetune.training import FitResult, fit, tune

MEASURED_IMAGES, MEASURED_STEPS = 8, 4
GIB = 1 << 30


@dataclass(frozen=True)
class Forecast:
    """What a command would do, and for how long.

    Attributes:
        images: images to encode, by part of the data.
        classes: number of classes.
        gib: size of the features in GiB.
        seconds_encoding: estimated from ``MEASURED_IMAGES`` of the images.
        steps: training steps of all runs, by stage.
        seconds_training: by stage, estimated from ``MEASURED_STEPS`` steps on random features of the same size.
    """

    images: dict[str, int]
    classes: int
    gib: float
    seconds_encoding: float
    steps: dict[str, int]
    seconds_training: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.seconds_encoding + sum(self.seconds_training.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds}


@dataclass(frozen=True, eq=False)
class Stage:
    """Trainings that a forecast adds.

    Attributes:
        name: "tune" (stage 1), "fit" (stage 2), or "kinds" (the other kinds of solution that are tried).
        options: keyword arguments of :func:`mergetune.fit` for "fit", and of :func:`mergetune.tune` for the others.
        runs: number of trainings with these options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    runs: int = 1


def forecast_caches(
    clip: FrozenClip, parts: Mapping[str, tuple[ImageList, int]], *, dtype: str = "float32", workers: int = 0
) -> Forecast:
    """Forecasts the encoding of images; an existing cache is not looked at.

    Args:
        clip: the CLIP.
        parts: name of the part -> its images and the number of views.
        dtype: type of the stored features.
        workers: number of processes that decode images.

    Raises:
        ValueError: an image among the measured ones cannot be read.
    """
    passes = sum(len(images) * views for images, views in parts.values())
    first = next(images for images, _ in parts.values())
    return Forecast(
        images={name: len(images) for name, (images, _) in parts.items()},
        classes=len(first.classnames),
        gib=passes * clip.embed_dim * PRECISIONS[dtype].itemsize / GIB,
        seconds_encoding=passes * _seconds_per_image(clip, first, workers),
        steps={},
        seconds_training={},
    )


def nothing_to_encode(features: FeatureCache) -> Forecast:
    """Returns the forecast for images that are cached: no encoding, and no training yet."""
    return Forecast({}, len(features.classnames), 0.0, 0.0, {}, {})


def with_stages(
    found: Forecast, clip: FrozenClip, images: FeatureCache | ImageList, stages: Sequence[Stage]
) -> Forecast:
    """Adds training to a forecast, to the steps and seconds that it has already.

    Args:
        found: the forecast.
        clip: the CLIP.
        images: the training images.
        stages: the trainings. A stage "fit" without ``tuned`` among its options is given the result of "tune".
    """
    steps, seconds, tuned = dict(found.steps), dict(found.seconds_training), {}
    for stage in stages:
        fits = stage.name == "fit"
        usual = vars(FitOptions()) if fits else TUNE_SETTINGS[stage.options.get("method", "coop")]
        epochs, batch = (stage.options.get(name) or usual[name] for name in ("epochs", "batch_size"))
        batch = min(batch or len(images), len(images))
        rows = max(batch, len(images.classnames))  # training needs an image of every class
        features = _random_features(clip, rows, images.classnames)
        measured = {"batch_size": batch, "warmup_epochs": 0, "progress": False}
        short: dict[str, Any] = {**(tuned if fits else {}), **stage.options, **measured}
        train: Callable[..., FitResult] = fit if fits else tune
        train(clip, features, **short | {"epochs": 1})  # first calls are slower
        done = train(clip, features, **short | {"epochs": MEASURED_STEPS})
        if stage.name == "tune":
            tuned = {"tuned": done.solution}
        count = stage.runs * epochs * -(-len(images) // batch)
        steps[stage.name] = steps.get(stage.name, 0) + count
        seconds[stage.name] = seconds.get(stage.name, 0.0) + count * done.timings["ms_per_step"] / 1e3
    return replace(found, steps=steps, seconds_training=seconds)


def forecast_dataset(
    clip: FrozenClip,
    data: Dataset,
    *,
    tuned: Sequence[Solution] = (),
    method: str = "coop",
    classes: str = "all",
    shots: int | None = 16,
    template: str | Sequence[str] = PLAIN,
    seed: int = 1,
    measuring: bool = True,
    choosing: bool = True,
    retain: Dataset | None = None,
    tune_options: Mapping[str, Any] | None = None,
    fit_options: Mapping[str, Any] | None = None,
    workers: int = 0,
) -> Forecast:
    """Forecasts a call of :func:`mergetune.fit_dataset`: encoding, the measuring run with its choices, and training.

    A chosen kind other than MERGETUNE would be trained once more on all classes; this is not counted.

    Args:
        clip: the CLIP.
        data: the images.
        tuned, method, classes, shots, template, seed, measuring, choosing, retain, tune_options, fit_options: see
            :func:`mergetune.fit_dataset`.
        workers: number of processes that decode images.

    Raises:
        ValueError: what ``fit_dataset`` refuses, or an image among the measured ones cannot be read.
    """
    texts, given = check_templates(template), dict(fit_options or {})
    stage_1 = stage_1_of(clip, tuned, method, classes)
    images = plan_images(
        data, tuned=tuned, classes=classes, shots=shots, seed=seed, measuring=measuring, choosing=choosing,
        retain=retain,
    )  # fmt: skip
    found = forecast_caches(clip, {name: (part, 1) for name, part in images.parts.items()}, workers=workers)
    common = {"zero_shot": texts, "seed": seed}
    first = Stage("tune", {"method": stage_1, "template": texts[0], **common, **(tune_options or {})})
    second = Stage("fit", common | given | ({"tuned": list(tuned)} if tuned else {}))
    before, chooses = [] if tuned else [first], False
    if images.halves:
        others = None if images.validation is None else _unseen(images.validation)
        fold = fold_of(_unseen(images.training), others, images.halves, texts, seed, hold_out=choosing)
        chooses = not why_not(fold, images.left_out, choosing=choosing)
        if classes == "all" or chooses:
            runs = len(settings_to_try(given)) if chooses else 1
            found = with_stages(found, clip, fold.train, [*before, replace(second, runs=runs)])
        if chooses:
            trained = [name for kind in kinds_of(method, stage_1) for name in TRAINED[kind]]
            shared = {name: value for name, value in first.options.items() if name in SHARED}
            for name in dict.fromkeys(trained):
                options = common | {"method": name} | (shared if name in TUNE_METHODS else {})
                found = with_stages(found, clip, fold.train, [Stage("kinds", options, runs=trained.count(name))])
    if classes == "base" and chooses:  # the solution of the measuring run is the result
        return found
    return with_stages(found, clip, images.training, [*before, second])


def _unseen(images: ImageList) -> FeatureCache:
    """A cache with these files and labels; its features mean nothing."""
    return FeatureCache.from_tensors(torch.ones(len(images), 1), images.labels, images.classnames, files=images.files)


def _seconds_per_image(clip: FrozenClip, images: ImageList, workers: int) -> float:
    files = images.files[:: -(-len(images) // MEASURED_IMAGES)]

    def decode(files: Sequence[str]) -> torch.Tensor:
        return torch.stack([clip.preprocess(load_image(images.root / file)) for file in files])

    clip.encode_image(decode(files[:1])).cpu()  # first calls are slower
    began = time.perf_counter()
    pixels = decode(files)
    decoded = time.perf_counter()
    clip.encode_image(pixels).cpu()
    return ((decoded - began) / max(workers, 1) + time.perf_counter() - decoded) / len(files)


def _random_features(clip: FrozenClip, rows: int, classnames: tuple[str, ...]) -> FeatureCache:
    x = F.normalize(torch.randn(rows, clip.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    return FeatureCache.from_tensors(x, torch.arange(rows) % len(classnames), classnames)
