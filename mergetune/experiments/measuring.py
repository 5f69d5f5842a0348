"""The measuring run: trains on half of the classes, chooses on validation images of both halves. No test images.

A user wants to know how a solution does on the classes that it learned and on classes that come later. All classes at
hand will be learned, so this run learns only half of them; the other half stands for the classes that come later.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mergetune.data import Dataset, FeatureCache, ImageList
from mergetune.experiments.cells import Fold
from mergetune.experiments.choosing import Choice, choose, setting_name
from mergetune.experiments.making import MERGETUNE, Making
from mergetune.experiments.paired import right_of
from mergetune.solutions import Solution
from mergetune.training import FitResult

LEAST_VALIDATION, ALL_VALIDATION = 32, 2000  # images per class, and of all classes, that validation takes at most
HELD_OUT = 5  # one of so many training images of each learned class becomes a validation image if there are no others


@dataclass(frozen=True, eq=False)
class Measured:
    """What a measuring run trained and chose.

    Attributes:
        tuned: the fine-tuned solution of the learned half.
        merged: MERGETUNE with the chosen setting.
        made: the solution of the chosen kind.
        row: the chosen kind.
        setting: the chosen ``lam`` and ``tau``.
        settings: the choice of the setting; None if nothing was chosen.
        kinds: the choice of the kind; None if nothing was chosen.
        right: candidate -> part -> which validation images it classifies correctly.
    """

    tuned: Solution
    merged: FitResult
    made: FitResult
    row: str
    setting: dict[str, float]
    settings: Choice | None
    kinds: Choice | None
    right: dict[str, dict[str, torch.Tensor]]


def other_images(data: Dataset, taken: ImageList, seed: int) -> ImageList | None:
    """Images for validation: those of the val split and those of the train split that training does not take.

    Of each class at most ``max(32, 2000 / C)`` images are drawn, so that large datasets are not encoded for nothing.

    Args:
        data: all classes.
        taken: the training images.
        seed: seed of the draw.

    Returns:
        The images, or None if there are none.
    """
    lists = [images for images in (data.full_val and data.val, data.full_train and data.train) if images]
    lists = [images for images in lists if images.root == lists[0].root]
    most = max(LEAST_VALIDATION, ALL_VALIDATION // len(data.classnames))
    gone, of_class = set(taken.files), defaultdict(list)
    for images in lists:
        for file, label in zip(images.files, images.labels, strict=True):
            if file not in gone:
                of_class[label].append(file)
    stream, drawn = random.Random(seed), []
    for label in sorted(of_class):
        files = sorted(of_class[label])
        drawn += [(file, label) for file in (stream.sample(files, most) if len(files) > most else files)]
    if not drawn:
        return None
    files, labels = zip(*drawn, strict=True)
    return ImageList(lists[0].root, files, labels, data.classnames)


def fold_of(
    train: FeatureCache,
    others: FeatureCache | None,
    halves: Mapping[str, Sequence[int]],
    templates: tuple[str, ...],
    seed: int,
    *,
    hold_out: bool = True,
) -> Fold:
    """The training and validation images of a measuring run; a half without validation images is left out of them.

    All images of the novel half that are no test images are validation images: they are not trained on.

    Args:
        train: few-shot images of all classes, or of the base half alone.
        others: images of all classes that are neither trained nor tested on.
        halves: "base" and "novel" -> class numbers.
        templates: zero-shot texts.
        seed: seed of the training, and of the images that are held out.
        hold_out: hold training images out for validation if there are fewer other images than learned classes.
    """
    own = {part: [] if others is None else [others.select_classes(classes)] for part, classes in _with(others, halves)}
    base = train
    if len(train.classnames) > len(halves["base"]):
        base = train.select_classes(halves["base"])
        own["novel"] = [train.select_classes(halves["novel"]), *own.get("novel", [])]
        if hold_out and sum(map(len, own.get("base", []))) < len(halves["base"]):
            base, held_out = _held_out(base, seed)
            own["base"] = [*own.get("base", []), *([held_out] if len(held_out) else [])]
    return Fold(base, {part: _together(own[part]) for part in halves if own.get(part)}, templates, seed)


def _with(others: FeatureCache | None, halves: Mapping[str, Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    there = set() if others is None else set(others.labels.tolist())
    return [(part, classes) for part, classes in halves.items() if there.intersection(classes)]


def _held_out(features: FeatureCache, seed: int) -> tuple[FeatureCache, FeatureCache]:
    """Training images without one of five of each class, and these; a class with one image keeps it."""
    generator, out = torch.Generator().manual_seed(seed), torch.zeros(len(features), dtype=torch.bool)
    for label in range(len(features.classnames)):
        rows = (features.labels == label).nonzero()[:, 0]
        if len(rows) > 1:
            out[rows[torch.randperm(len(rows), generator=generator)][: max(1, len(rows) // HELD_OUT)]] = True
    return _rows(features, ~out), _rows(features, out)


def _rows(features: FeatureCache, which: torch.Tensor) -> FeatureCache:
    rows = which.nonzero()[:, 0]
    files = tuple(features.files[i] for i in rows.tolist()) if features.files else ()
    return replace(features, labels=features.labels[rows], files=files, stored=features.stored[rows])


def _together(caches: Sequence[FeatureCache]) -> FeatureCache:
    if len(caches) == 1:
        return caches[0]
    return FeatureCache.from_tensors(
        torch.cat([cache.tensor() for cache in caches]),
        torch.cat([cache.labels for cache in caches]),
        caches[0].classnames,
        fingerprint=caches[0].fingerprint,
        normalize=True,  # rows that are stored in half precision are not quite of unit norm
    )


def measure(
    making: Making,
    fold: Fold,
    folder: Path,
    settings: Sequence[dict[str, float]],
    *,
    kinds: Sequence[str] = (MERGETUNE,),
    tuned: Sequence[Solution] = (),
    stage_1: Path | None = None,
    choosing: bool = True,
) -> Measured:
    """Train the candidates on the base half, and choose on the validation images of both halves.

    The setting of MERGETUNE is chosen first, then the kind. In both choices ties go to the first candidate.

    Args:
        making: how candidates are trained.
        fold: training and validation images.
        folder: each candidate is trained in a folder of its own below it.
        settings: ``lam`` and ``tau`` to choose from.
        kinds: kinds to choose from.
        tuned: fine-tuned solutions of the base half; none: stage 1 trains one.
        stage_1: folder of stage 1; None is a folder below ``folder``.
        choosing: whether to choose; without it the first setting and the first kind are taken.
    """
    labels = {part: cache.labels for part, cache in fold.val.items()}
    tries = settings if choosing else settings[:1]
    names = [setting_name(setting) for setting in tries]
    folders = [folder / name.replace(", ", "-").replace(" ", "-") for name in names]
    anchors = list(tuned) or [making.tuned(fold.train, stage_1 or folder / "tuned").solution]
    found = making.merged(fold.train, anchors, dict(zip(folders, tries, strict=True)))
    if not choosing:
        return Measured(anchors[0], found[0], found[0], MERGETUNE, tries[0], None, None, {})
    right = {
        name: right_of(making.classifier(result.solution), fold.val) for name, result in zip(names, found, strict=True)
    }
    by_setting = choose(right, labels)
    at = names.index(by_setting.chosen)
    made, among = {MERGETUNE: found[at]}, {MERGETUNE: right[by_setting.chosen]}
    for kind in kinds:
        if kind != MERGETUNE:
            made[kind] = making.kind(kind, fold.train, anchors[0], found[at], folder / kind.replace(" + ", "-"))
            among[kind] = right_of(making.classifier(made[kind].solution), fold.val)
    by_kind = choose(among, labels)
    return Measured(
        anchors[0], found[at], made[by_kind.chosen], by_kind.chosen, dict(tries[at]), by_setting,
        by_kind if len(among) > 1 else None, right | among,
    )  # fmt: skip
