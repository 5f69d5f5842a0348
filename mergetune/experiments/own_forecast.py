"""What work on own images would take: images, size of the caches, minutes. A few images and steps are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mergetune.clip import PRECISIONS, FrozenClip
from mergetune.data import FeatureCache, ImageList
from mergetune.facts import FitOptions
from mergetune.facts.function_options import TUNE_SETTINGS
from mergetune.io import load_image
from mergetune.training import FitResult

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
        steps: training steps, by stage.
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
    found: Forecast,
    clip: FrozenClip,
    images: FeatureCache | ImageList,
    stages: Mapping[str, tuple[Callable[..., FitResult], dict[str, Any]]],
) -> Forecast:
    """Adds training to a forecast.

    Args:
        found: the forecast without training.
        clip: the CLIP.
        images: the training images.
        stages: "tune" or "fit" -> the function with its fixed arguments, called as ``function(clip, features,
            **options)``, and its options. ``fit`` is given the result of "tune" as ``tuned`` if that stage is here too.
    """
    steps, seconds, tuned = dict(found.steps), dict(found.seconds_training), {}
    for stage, (train, options) in stages.items():
        usual = vars(FitOptions()) if stage == "fit" else TUNE_SETTINGS[options.get("method", "coop")]
        epochs, batch = (options.get(name) or usual[name] for name in ("epochs", "batch_size"))
        batch = min(batch or len(images), len(images))
        rows = max(batch, len(images.classnames))  # training needs an image of every class
        features = _random_features(clip, rows, images.classnames)
        short = options | {"batch_size": batch, "warmup_epochs": 0, "progress": False} | tuned
        train(clip, features, **short | {"epochs": 1})  # first calls are slower
        done = train(clip, features, **short | {"epochs": MEASURED_STEPS})
        tuned = {"tuned": done.solution}
        steps[stage] = epochs * -(-len(images) // batch)
        seconds[stage] = steps[stage] * done.timings["ms_per_step"] / 1e3
    return Forecast(**{**asdict(found), "steps": steps, "seconds_training": seconds})


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
