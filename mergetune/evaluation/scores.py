"""Accuracy over images and per class, base-to-novel results over seeds, harmonic mean. Accuracies are in percent.

Shapes: N images, C classes, D embedding width.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.data import Batches, FeatureCache
from mergetune.facts.brief import brief
from mergetune.io import require_plain
from mergetune.solutions import inputs

ImageMap = Callable[[Tensor], Tensor]
"""What is read of images [B, ...] -> image features [B, D]."""


@brief()
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
        directions: whether the weights are unit class embeddings multiplied by the logit scale, so that only their
            directions are learned; False for the rows of a head, whose lengths are learned too.
    """

    weights: Callable[[Sequence[str]], Tensor]
    images: ImageMap | None = None
    bias: bool = False
    directions: bool = False

    def __call__(self, classnames: Sequence[str]) -> Tensor:
        """Class weights multiplied by the logit scale, [C, D], or [C, D + 1] with a bias."""
        return self.weights(classnames)

    def logits(self, classnames: Sequence[str], x: Tensor | None = None) -> Tensor:
        """Logits [B, C] of the inputs of B images.

        Args:
            classnames: the C class names.
            x: image inputs, [B, D] features or the inputs of the solution's kind; must be given.

        Raises:
            TypeError: ``x`` is missing or no tensor, or ``classnames`` is no list of texts.
        """
        if isinstance(classnames, str) or not isinstance(classnames, Sequence):
            raise TypeError(
                f"classnames must be a list of class names, got {type(classnames).__name__}: call logits(classnames, x)"
            )
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x must be image inputs of B images, a tensor [B, D], got {type(x).__name__}: call "
                "logits(classnames, x)"
            )
        require_plain("x", x)
        weights = self.weights(classnames)
        x = x.to(weights)
        return inputs(x if self.images is None else self.images(x), weights) @ weights.T


@brief("accuracy", "images", "per_class")
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
        return _standard_error(self.accuracy, self.images)

    def to_json(self) -> dict[str, Any]:
        """All fields, the mean over classes and the standard error, JSON-able."""
        return asdict(self) | {"mean_per_class": self.mean_per_class, "standard_error": self.standard_error}


def _standard_error(accuracy: float, images: int) -> float:
    p = accuracy / 100
    return 100 * math.sqrt(p * (1 - p) / images)


@brief()
@dataclass(frozen=True)
class Hits:
    """Right answers and images of each class. Every accuracy, spread and interval is computed from these counts."""

    right: tuple[int, ...]
    images: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Correct share of all images, percent."""
        return 100 * (sum(self.right) / sum(self.images))

    @property
    def standard_error(self) -> float:
        """Of the accuracy, from the number of images alone, percent."""
        return _standard_error(self.accuracy, sum(self.images))

    def to_json(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "images": sum(self.images), "standard_error": self.standard_error}

    def report(self, classnames: Sequence[str]) -> Report:
        """The accuracies of the classes, by name, and of all images."""
        rows = zip(distinct_names(classnames), self.right, self.images, strict=True)
        per_class = {name: 100 * hits / images for name, hits, images in rows if images}
        return Report(self.accuracy, per_class, sum(self.images))


def distinct_names(classnames: Sequence[str]) -> tuple[str, ...]:
    """The names; where several classes have the same name, the class number is added: "missile (657)"."""
    shared = {name for name, owners in Counter(classnames).items() if owners > 1}
    return tuple(f"{name} ({c})" if name in shared else name for c, name in enumerate(classnames))


@torch.no_grad()
def right_answers(
    weights: Tensor, features: Batches, *, images: ImageMap | None = None, first: int = 0, batch_size: int = 2048
) -> Tensor:
    """Whether each image is classified correctly, [N] bool; the arguments are those of :func:`count_hits`."""
    require_plain("weights", weights)
    answers = []
    for x, _, _ in features.batches(batch_size):
        x = x.to(weights) if images is None else images(x.to(weights))
        answers.append((inputs(x, weights) @ weights.T).argmax(-1).cpu())
    return torch.cat(answers) == features.labels + first


def count_hits(
    weights: Tensor, features: Batches, *, images: ImageMap | None = None, first: int = 0, batch_size: int = 2048
) -> Hits:
    """Right answers of class weights on cached features.

    Args:
        weights: one row per class that may be answered, [C', D], or [C', D + 1] with a bias.
        features: image features with labels, of C classes.
        images: applied to the features first, see :class:`Classifier`.
        first: the row of the features' first class; the others follow it.
        batch_size: rows at a time.
    """
    right = right_answers(weights, features, images=images, first=first, batch_size=batch_size)
    count = len(features.classnames)
    counts = (torch.bincount(labels, minlength=count).tolist() for labels in (features.labels[right], features.labels))
    return Hits(*map(tuple, counts))


def accuracy(
    weights: Tensor | Classifier,
    features: Batches,
    *,
    normalize: bool = False,
    images: ImageMap | None = None,
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
    biases = (0, 1)
    if isinstance(weights, Classifier):
        biases, images, weights = (int(weights.bias),), weights.images, weights(features.classnames)
    dim = weights.shape[-1] - biases[0] if images is not None else getattr(features, "dim", weights.shape[-1])
    if weights.ndim != 2 or len(weights) != len(features.classnames) or weights.shape[1] - dim not in biases:
        raise ValueError(
            f"weights must have shape [C, D] = [{len(features.classnames)}, {dim}], got {list(weights.shape)}"
        )
    weights = F.normalize(weights, dim=-1) if normalize else weights
    return count_hits(weights, features, images=images, batch_size=batch_size).report(features.classnames)


# -- base to novel -----------------------------------------------------------------------------------------------------


def score(
    weights: Mapping[str, Tensor], tests: Mapping[str, Batches], *, images: ImageMap | None = None
) -> dict[str, Hits]:
    """Right answers on each set of test images, among the classes of that set.

    For "base" and "novel" classes also in the joint label space: "seen" are the base images and "unseen" the novel
    images, answered among the classes of both.

    Args:
        weights: class weights of each set, [C, D], or [C, D + 1] with a bias.
        tests: the test images of each set.
        images: applied to the features first, see :class:`Classifier`.
    """
    found = {part: count_hits(weights[part], features, images=images) for part, features in tests.items()}
    if tests.keys() == {"base", "novel"}:
        both = torch.cat([weights["base"], weights["novel"]])
        found["seen"] = count_hits(both, tests["base"], images=images)
        found["unseen"] = count_hits(both, tests["novel"], images=images, first=len(weights["base"]))
    return found


@brief()
@dataclass(frozen=True)
class BaseNovel:
    """Accuracy on base and on novel classes.

    Attributes:
        base, novel: base images classified among the base classes, novel images among the novel classes (CoCoOp's
            protocol).
        seen, unseen: the same images, classified among the classes of both: the joint label space. None where it was
            not tested.
    """

    base: Report
    novel: Report
    seen: Report | None = None
    unseen: Report | None = None

    @property
    def hm(self) -> float:
        """Harmonic mean of both accuracies, in percent."""
        return harmonic_mean(self.base.accuracy, self.novel.accuracy)

    @property
    def hm_error(self) -> float:
        """Standard error of :attr:`hm` due to the number of test images (delta method), in percent."""
        base, novel = self.base.accuracy, self.novel.accuracy
        if not base + novel:
            return 0.0
        slopes = 2 * novel**2 / (base + novel) ** 2, 2 * base**2 / (base + novel) ** 2
        return math.hypot(slopes[0] * self.base.standard_error, slopes[1] * self.novel.standard_error)

    @property
    def joint_hm(self) -> float | None:
        """Of seen and unseen."""
        if self.seen is None or self.unseen is None:
            return None
        return harmonic_mean(self.seen.accuracy, self.unseen.accuracy)

    def to_json(self) -> dict[str, Any]:
        parts = {"base": self.base, "novel": self.novel, "hm": self.hm}
        if self.joint_hm is not None:
            parts |= {"seen": self.seen, "unseen": self.unseen, "joint_hm": self.joint_hm}
        return {name: value.to_json() if isinstance(value, Report) else value for name, value in parts.items()}


@brief("name", "base", "novel", "hm", "seen", "unseen", "joint_hm", "seeds")
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
        seen, unseen, joint_hm: as base, novel and hm, in the joint label space; None where it was not tested.
        seen_std, unseen_std, joint_hm_std: standard deviation of these over seeds.
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
    seen: float | None = None
    unseen: float | None = None
    joint_hm: float | None = None
    seen_std: float | None = None
    unseen_std: float | None = None
    joint_hm_std: float | None = None


def base_to_novel(classify: Classifier, base: FeatureCache, novel: FeatureCache) -> BaseNovel:
    """Accuracy of a classifier on base and on novel classes, each among its classes and in the joint label space.

    Args:
        classify: the classifier.
        base: test features of the base classes.
        novel: test features of the novel classes.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> def images(names):  # class embeddings in place of image features
        ...     return mt.FeatureCache.from_tensors(clip.class_embeddings(names), range(len(names)), names)
        >>> classify = mt.classifier(clip, "a photo of a {}.")
        >>> mt.base_to_novel(classify, base=images(["cat", "dog"]), novel=images(["car", "tree"])).hm
        100.0
    """
    tests = {"base": base, "novel": novel}
    weights = {part: classify(features.classnames) for part, features in tests.items()}
    found = score(weights, tests, images=classify.images)
    home = {"seen": base, "unseen": novel} | tests
    return BaseNovel(**{part: hits.report(home[part].classnames) for part, hits in found.items()})


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
    columns = {part: [getattr(run, part).accuracy for run in runs] for part in ("base", "novel")}
    columns["hm"] = [run.hm for run in runs]
    if all(run.joint_hm is not None for run in runs):
        columns |= {part: [getattr(run, part).accuracy for run in runs] for part in ("seen", "unseen")}
        columns["joint_hm"] = [run.joint_hm for run in runs]
    values = {column: statistics.fmean(found) for column, found in columns.items()}
    values["hm"] = harmonic_mean(values["base"], values["novel"])
    if "joint_hm" in values:
        values["joint_hm"] = harmonic_mean(values["seen"], values["unseen"])
    spread = {f"{k}_std": statistics.stdev(found) if len(runs) > 1 else 0.0 for k, found in columns.items()}
    errors = {
        f"{part}_error": statistics.fmean(getattr(run, part).standard_error for run in runs)
        for part in ("base", "novel")
    }
    return Row(name=name, seeds=len(runs), **values, **spread, **errors)


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
