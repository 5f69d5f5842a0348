"""Paired comparison on the same images: accuracies, their harmonic mean, differences and standard errors.

Shapes: N images of one part ("base" or "novel" classes), K classes with images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergetune.data import FeatureCache
from mergetune.evaluation import Classifier, harmonic_mean, right_answers

Right = Mapping[str, Tensor]
"""Part of the images -> whether each image was classified correctly, [N] bool."""
Labels = Mapping[str, Tensor]
"""Part of the images -> class number of each image, [N]."""
HM = "HM"
Z = 1.96  # half the width of a 95 % interval in standard errors


@dataclass(frozen=True)
class Estimate:
    """A value in percentage points, with its standard error."""

    value: float
    error: float

    @property
    def reach(self) -> float:
        """Half the width of the 95 % interval."""
        return Z * self.error

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.value > self.reach

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.value < -self.reach

    def __str__(self) -> str:
        return f"{self.value:+.1f} ± {self.reach:.1f}"

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "standard_error": self.error}


def right_of(classify: Classifier, images: Mapping[str, FeatureCache]) -> dict[str, Tensor]:
    """Whether each image of each part is classified correctly among the classes of its part."""
    return {
        part: right_answers(classify(features.classnames), features, images=classify.images)
        for part, features in images.items()
    }


def accuracies(right: Right) -> dict[str, float]:
    """Accuracy of each part in percent; for two parts also their harmonic mean, "HM"."""
    found = {part: 100 * answers.double().mean().item() for part, answers in right.items()}
    return found | ({HM: harmonic_mean(*found.values())} if len(found) == 2 else {})


def gains(better: Right, than: Right, labels: Labels) -> dict[str, Estimate]:
    """Accuracy and harmonic mean of one classifier minus those of another on the same images, with standard errors.

    Each image i of part p contributes e_i = g_p better_i - g'_p than_i. For an accuracy g = g' = 1. For the harmonic
    mean HM = 2 b n / (b + n) of two accuracies, g is its slope (delta method):

        dHM/db = 2 n^2 / (b + n)^2        dHM/dn = 2 b^2 / (b + n)^2

    The variance of a part's mean is the larger of two estimates, with d_i = e_i - mean(e):

        over images    sum_i d_i^2 / (N (N - 1))
        over classes   K / (K - 1) sum_c (sum_{i in c} d_i)^2 / N^2        for "novel" alone

    Other new classes than these may come, so the errors of "novel" must hold the choice of classes as well. Neither
    estimate is smaller than (g / N)^2, the effect of one image: three images on which both agree prove nothing.

    Args:
        better, than: which images were classified correctly by each of both.
        labels: class number of each image.

    Returns:
        Part, and "HM" for two parts, -> the difference in percentage points.
    """
    ones = dict.fromkeys(better, 1.0)
    found = {part: _gain(better, than, labels, ones, ones, [part]) for part in better}
    if len(better) == 2:
        found[HM] = _gain(better, than, labels, slopes(better), slopes(than), list(better))
        a, b = accuracies(better)[HM], accuracies(than)[HM]
        found[HM] = Estimate(a - b, found[HM].error)
    return found


def slopes(right: Right) -> dict[str, float]:
    """Derivative of the harmonic mean by the accuracy of each of two parts; 1 each if both accuracies are 0."""
    (first, a), (second, b) = ((part, answers.double().mean().item()) for part, answers in right.items())
    if not a + b:
        return {first: 1.0, second: 1.0}
    return {first: 2 * b**2 / (a + b) ** 2, second: 2 * a**2 / (a + b) ** 2}


def _gain(
    better: Right,
    than: Right,
    labels: Labels,
    up: Mapping[str, float],
    down: Mapping[str, float],
    parts: list[str],
) -> Estimate:
    value, variance = 0.0, 0.0
    for part in parts:
        each = up[part] * better[part].double() - down[part] * than[part].double()
        value += each.mean().item()
        least = (max(up[part], down[part]) / len(each)) ** 2
        variance += max(least, _variance(each, labels[part] if part == "novel" else None))
    return Estimate(100 * value, 100 * math.sqrt(variance))


def _variance(each: Tensor, labels: Tensor | None) -> float:
    """Variance of the mean of N values; with labels at least the variance from the choice of classes."""
    count, deviations = len(each), each - each.mean()
    found = deviations.square().sum().item() / (count * max(1, count - 1))
    if labels is not None:
        classes, index = labels.unique(return_inverse=True)
        sums = torch.zeros(len(classes), dtype=each.dtype).index_add_(0, index, deviations)
        found = max(found, len(classes) / max(1, len(classes) - 1) * sums.square().sum().item() / count**2)
    return found
