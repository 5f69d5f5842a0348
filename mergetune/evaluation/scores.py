"""Accuracy over images and per class, base-to-novel results over seeds, harmonic mean. Accuracies are in percent.

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
    """A function of class names that returns class weights, with the map of image features that goes with them.

    Make one with :func:`mergetune.classifier`.

    Attributes:
        weights: function of C class names that returns class weights, multiplied by the logit scale: [C, D], or
            [C, D + 1] with a bias.
        images: function of image inputs [B, ...] that returns image features [B, D]; None uses cached features
            unchanged.
        bias: whether the last column of the weights is a bias.
    """

    weights: Callable[[Sequence[str]], Tensor]
    images: Callable[[Tensor], Tensor] | None = None
    bias: bool = False

    def __call__(self, classnames: Sequence[str]) -> Tensor:
        """Class weights multiplied by the logit scale, [C, D], or [C, D + 1] with a bias."""
        return self.weights(classnames)

    def logits(self, classnames: Sequence[str], x: Tensor) -> Tensor:
        """Logits [B, C] of the inputs of B images."""
        weights = self.weights(classnames)
        x = x.to(weights)
        return inputs(x if self.images is None else self.images(x), weights) @ weights.T


@dataclass(frozen=True)
class Report:
    """Accuracy of a classifier on N images.

    Attributes:
        accuracy: share of correctly classified images, in percent.
        per_class: class name -> accuracy on the images of the class, in percent. Classes without images are left out.
            If several classes have the same name, the class number is added: "missile (657)".
        images: N.
    """

    accuracy: float
    per_class: dict[str, float]
    images: int

    @property
    def mean_per_class(self) -> float:
        """Mean of the accuracies of the classes, in percent."""
        return statistics.fmean(self.per_class.values())

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy due to the number of test images, in percent."""
        p = self.accuracy / 100
        return 100 * math.sqrt(p * (1 - p) / self.images)

    def to_json(self) -> dict[str, Any]:
        """All fields, the mean over classes and the standard error, JSON-able."""
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
    """Accuracy of a classifier or of class weights on cached features.

    Args:
        weights: a classifier, or one row per class of ``features``, [C, D] or [C, D + 1] with a bias.
        features: image features with labels.
        normalize: whether the rows are scaled to unit norm first, as class features of a prompt need.
        images: function that is applied to the features first; not used with a classifier, which holds such a function.
        batch_size: images per batch.

    Raises:
        ValueError: the weights do not have one row of the right width per class.

    Example:
        >>> import mergetune as mt, torch
        >>> features = mt.FeatureCache.from_tensors(torch.eye(3), [0, 1, 1], ["cat", "dog", "car"])
        >>> report = mt.accuracy(torch.eye(3), features)
        >>> round(report.accuracy, 1), report.per_class
        (66.7, {'cat': 100.0, 'dog': 50.0})
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
    """Accuracy on base and on novel classes, each with only its classes as the label space (CoCoOp's protocol).

    Attributes:
        base: base images, classified among the base classes.
        novel: novel images, classified among the novel classes.
    """

    base: Report
    novel: Report

    @property
    def hm(self) -> float:
        """Harmonic mean of both accuracies, in percent."""
        return harmonic_mean(self.base.accuracy, self.novel.accuracy)


@dataclass(frozen=True)
class Row:
    """Results of a method over several seeds, in percent.

    Attributes:
        name: name of the method.
        base, novel: mean accuracy over seeds.
        hm: harmonic mean of the two mean accuracies, as in publications.
        base_std, novel_std, hm_std: standard deviation over seeds; 0 for one seed.
        base_error, novel_error: standard error due to the number of test images, averaged over seeds.
        seeds: number of seeds.
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
    """Accuracy of a classifier on base and on novel classes.

    Args:
        classify: the classifier.
        base: test features of the base classes.
        novel: test features of the novel classes.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
        >>> def images(names):  # class embeddings in place of image features
        ...     return mt.FeatureCache.from_tensors(clip.class_embeddings(names), range(len(names)), names)
        >>> classify = mt.classifier(clip, "a photo of a {}.")
        >>> mt.base_to_novel(classify, base=images(["cat", "dog"]), novel=images(["car", "tree"])).hm
        100.0
    """
    return BaseNovel(*(accuracy(classify, part) for part in (base, novel)))


def summarise(name: str, runs: Sequence[BaseNovel]) -> Row:
    """Mean and spread of the results of a method over seeds.

    Args:
        name: name of the method.
        runs: one result per seed.

    Example:
        >>> import mergetune as mt
        >>> from mergetune.evaluation import BaseNovel, Report
        >>> runs = [BaseNovel(Report(base, {}, 100), Report(60.0, {}, 100)) for base in (70.0, 80.0)]
        >>> row = mt.summarise("CoOp", runs)
        >>> row.base, row.novel, round(row.hm, 2), round(row.base_std, 2)
        (75.0, 60.0, 66.67, 7.07)
    """
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
    """Harmonic mean of two accuracies, 2 b n / (b + n); 0 if both are 0.

    Example:
        >>> import mergetune as mt
        >>> mt.harmonic_mean(60.0, 40.0)
        48.0
    """
    if base < 0 or novel < 0:
        raise ValueError(f"accuracies must not be negative, got {base} and {novel}")
    return 2 * base * novel / (base + novel) if base + novel else 0.0
