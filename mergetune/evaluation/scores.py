"""Accuracy, per class and over classes; harmonic mean; base-to-novel over seeds. Accuracies are in percent.

Shapes: N images, C classes, D embedding width.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.data import Batches, FeatureCache
from mergetune.solutions import inputs


@dataclass(frozen=True, eq=False)
class Classifier:
    """Class weights by class names, and what is done with image features before their product. It is called with names.

    Attributes:
        weights: class names -> class weights with the logit scale, [C, D], or [C, D + 1] with a bias.
        images: what is read of images [B, ...] -> image features [B, D]; None takes cached features as they are.
        bias: whether the weights hold a bias.
    """

    weights: Callable[[Sequence[str]], Tensor]
    images: Callable[[Tensor], Tensor] | None = None
    bias: bool = False

    def __call__(self, classnames: Sequence[str]) -> Tensor:
        """Class weights with the logit scale, [C, D], or [C, D + 1] with a bias."""
        return self.weights(classnames)

    def logits(self, classnames: Sequence[str], x: Tensor) -> Tensor:
        """[B, C] for what is read of B images."""
        weights = self.weights(classnames)
        x = x.to(weights)
        return inputs(x if self.images is None else self.images(x), weights) @ weights.T


@dataclass(frozen=True)
class Report:
    """How a classifier does on some images.

    Attributes:
        accuracy: correct share of all images, percent.
        per_class: class name -> accuracy of its images, percent; classes without images are left out. A name that
            several classes have is followed by their number: "missile (657)".
        images: N.
    """

    accuracy: float
    per_class: dict[str, float]
    images: int

    @property
    def mean_per_class(self) -> float:
        """Mean of the classes' accuracies, percent."""
        return statistics.fmean(self.per_class.values())

    @property
    def standard_error(self) -> float:
        """Of the accuracy, from the number of test images alone, percent."""
        p = self.accuracy / 100
        return 100 * math.sqrt(p * (1 - p) / self.images)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean_per_class": self.mean_per_class, "standard_error": self.standard_error}


@torch.no_grad()
def accuracy(
    weights: Tensor | Classifier,
    features: Batches,
    *,
    normalize: bool = False,
    images: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 2048,
) -> Report:
    """Accuracy of a classifier, or of class weights, on cached features.

    Args:
        weights: a classifier; or one row per class of ``features``, [C, D], or [C, D + 1] with a bias.
        features: image features with labels.
        normalize: make the rows unit norm first, as for class features of a prompt.
        images: applied to the features first; a classifier has its own.
        batch_size: rows at a time.
    """
    if isinstance(weights, Classifier):
        weights, images = weights(features.classnames), weights.images
    dim = weights.shape[-1] if images is not None else getattr(features, "dim", weights.shape[-1])
    if weights.ndim != 2 or len(weights) != len(features.classnames) or weights.shape[1] - dim not in (0, 1):
        raise ValueError(
            f"weights must have shape [C, D] = [{len(features.classnames)}, {dim}], got {list(weights.shape)}"
        )
    weights = F.normalize(weights, dim=-1) if normalize else weights
    right = torch.cat(
        [
            (inputs(x.to(weights) if images is None else images(x.to(weights)), weights) @ weights.T).argmax(-1).cpu()
            == labels
            for x, labels, _ in features.batches(batch_size)
        ]
    ).double()
    counts = torch.bincount(features.labels, minlength=len(weights))
    hits = torch.bincount(features.labels, weights=right, minlength=len(weights))
    shared = {name for name, owners in Counter(features.classnames).items() if owners > 1}
    per_class = {
        f"{name} ({c})" if name in shared else name: 100 * hit / count
        for c, (name, hit, count) in enumerate(zip(features.classnames, hits.tolist(), counts.tolist(), strict=True))
        if count
    }
    return Report(accuracy=100 * right.mean().item(), per_class=per_class, images=len(features))


# -- base to novel -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseNovel:
    """Accuracy among the base classes and among the novel ones, each in its own label space (CoCoOp's protocol)."""

    base: Report
    novel: Report

    @property
    def hm(self) -> float:
        return harmonic_mean(self.base.accuracy, self.novel.accuracy)


@dataclass(frozen=True)
class Row:
    """A method over seeds: means and standard deviations; hm is the harmonic mean of the mean accuracies, as published.

    Attributes:
        base, novel, hm: percent.
        base_std, novel_std, hm_std: over seeds, percent; 0 for one seed.
        base_error, novel_error: standard error from the number of test images, percent.
        seeds: number of runs.
    """

    name: str
    base: float
    novel: float
    hm: float
    base_std: float
    novel_std: float
    hm_std: float
    base_error: float
    novel_error: float
    seeds: int


def base_to_novel(classify: Classifier, base: FeatureCache, novel: FeatureCache) -> BaseNovel:
    """Test a classifier on base and on novel classes."""
    return BaseNovel(*(accuracy(classify, part) for part in (base, novel)))


def summarise(name: str, runs: Sequence[BaseNovel]) -> Row:
    """Mean and spread of a method's runs."""
    if not runs:
        raise ValueError(f"runs must hold at least one result of {name!r}, got none")

    def mean_and_std(values: list[float]) -> tuple[float, float]:
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    base, base_std = mean_and_std([run.base.accuracy for run in runs])
    novel, novel_std = mean_and_std([run.novel.accuracy for run in runs])
    _, hm_std = mean_and_std([run.hm for run in runs])
    return Row(
        name=name,
        base=base,
        novel=novel,
        hm=harmonic_mean(base, novel),
        base_std=base_std,
        novel_std=novel_std,
        hm_std=hm_std,
        base_error=statistics.fmean(run.base.standard_error for run in runs),
        novel_error=statistics.fmean(run.novel.standard_error for run in runs),
        seeds=len(runs),
    )


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n); 0 if both are 0."""
    if base < 0 or novel < 0:
        raise ValueError(f"accuracies must not be negative, got {base} and {novel}")
    return 2 * base * novel / (base + novel) if base + novel else 0.0
