"""Tasks and cells of experiments: a task is a dataset, a cell is one partition of its classes with one seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mergetune.clip import PLAIN, check_templates
from mergetune.data import Dataset, FeatureCache, ImageList
from mergetune.facts.brief import brief

LEAST_CLASSES = 4  # that can be divided into halves: a half with one class has nothing to confuse


def check_seeds(seeds: Sequence[int]) -> None:
    """Check the seeds of several runs before any work.

    Raises:
        ValueError: there is none, one is negative, or one repeats.
    """
    if not seeds:
        raise ValueError("seeds must hold at least one seed, got none")
    if (least := min(seeds)) < 0:
        raise ValueError(f"seeds must be 0 or more, got {least}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must not repeat, got {list(seeds)}")


def halves_of(count: int, partition: int) -> dict[str, list[int]]:
    """Class numbers of the base and the novel half: the first ceil(count / 2) (0, CoOp's), or random (1, 2, ...)."""
    order = list(range(count))
    if partition:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(partition)).tolist()
    half = math.ceil(count / 2)
    return {"base": sorted(order[:half]), "novel": sorted(order[half:])}


@brief()
@dataclass(frozen=True, eq=False)
class Task:
    """A dataset with cached features of all its classes.

    Attributes:
        name: name of the dataset, used for its folder and in tables.
        train: images from which few-shot images are drawn.
        test: test images. Nothing is chosen on test images.
        val: validation images. None takes the images of ``train`` that were not drawn; for novel classes, these are all
            images of ``train``.
        templates: one or more zero-shot templates; several are averaged.
    """

    name: str
    train: FeatureCache
    test: FeatureCache
    val: FeatureCache | None = None
    templates: tuple[str, ...] = (PLAIN,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", check_templates(self.templates))
        for other in ("test", "val"):
            cache = getattr(self, other)
            if cache is not None and cache.classnames != self.train.classnames:
                raise ValueError(f"{other} must have the classes of train, got {list(cache.classnames)[:3]}...")
        pairs = [("test", self.test, self.train), ("test", self.test, self.val), ("val", self.val, self.train)]
        for title, cache, other in pairs:
            if None not in (cache, other) and len(both := cache.shared_with(other)):
                raise ValueError(f"{title} must share no image with what is trained or chosen on, got {len(both)}")

    def halves(self, partition: int | None) -> dict[str, list[int]]:
        """Returns the classes of the base and the novel half.

        Args:
            partition: 0 divides the classes in their order, as CoOp does; 1, 2, ... divide them at random; None does
                not divide them, and the result has one part "all".
        """
        count = len(self.train.classnames)
        if partition is None:
            return {"all": list(range(count))}
        if count < LEAST_CLASSES:
            raise ValueError(
                f"partitions need at least {LEAST_CLASSES} classes, two per half, got {count} in {self.name!r}"
            )
        return halves_of(count, partition)

    def fold(self, partition: int | None, shots: int | None, seed: int) -> Fold:
        """Returns training and validation images of a cell. Images are drawn from all classes, as CoOp draws them.

        Args:
            partition: see :meth:`halves`.
            shots: training images per class; None takes all images.
            seed: seed of the draw.

        Raises:
            ValueError: a half has no validation images.
        """
        halves = self.halves(partition)
        cache = replace(self.train, files=self.train.files or tuple(map(str, range(len(self.train)))))
        listed = ImageList(Path(), cache.files, tuple(cache.labels.tolist()), cache.classnames)
        learned = next(iter(halves.values()))
        drawn = Dataset(self.name, full_train=listed).select(learned).few_shot(shots, seed)
        taken = set(drawn.files)
        rest = [i for i, file in enumerate(listed.files) if file not in taken]
        labels = {listed.labels[i] for i in rest} if self.val is None else set(self.val.labels.tolist())
        for part, classes in halves.items():
            if not labels.intersection(classes):
                raise ValueError(
                    f"val must hold images of the {part} classes of {self.name!r} to choose on, got none: "
                    f"give some, or draw fewer than {shots} shots, so that some training images are left"
                )
        val = cache.select(listed.take(rest)) if self.val is None else self.val
        own = {part: val.select_classes(classes) for part, classes in halves.items()}
        return Fold(cache.select(drawn), own, self.templates, seed)


@brief()
@dataclass(frozen=True, eq=False)
class Fold:
    """The data of a cell for training and for choosing hyper-parameters, without test images.

    Attributes:
        train: the few-shot images of the training classes.
        val: "base" and "novel", or "all" -> validation images.
        templates: zero-shot templates.
        seed: seed of the draw and the training.
    """

    train: FeatureCache
    val: dict[str, FeatureCache]
    templates: tuple[str, ...]
    seed: int


@brief()
@dataclass(frozen=True)
class Cell:
    """A dataset, partition and seed on which all methods are compared.

    Attributes:
        task: name of the dataset.
        partition: number of the partition, see :meth:`Task.halves`.
        seed: seed of the draw and the training.
    """

    task: str
    partition: int | None
    seed: int

    @property
    def folder(self) -> Path:
        """Folder of the cell's record, relative to the folder of results."""
        return Path(self.task, "all" if self.partition is None else f"partition-{self.partition}", f"seed-{self.seed}")
