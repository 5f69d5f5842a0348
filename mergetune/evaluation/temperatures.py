"""Fitting of a temperature on validation images; :mod:`mergetune.solutions.temperatures` says what it is."""

from __future__ import annotations

import math

import torch

from mergetune.data import Batches
from mergetune.evaluation.predictions import logits_of
from mergetune.evaluation.scores import Classifier

BOUNDS = (0.01, 100.0)  # logits of CLIP lie within about ± 100: beyond these temperatures nothing changes any more


@torch.no_grad()
def fit_temperature(classify: Classifier, features: Batches, *, batch_size: int = 2048) -> float:
    """The temperature with the lowest cross-entropy (NLL) on labelled images.

    The cross-entropy has one minimum in the temperature. A root search in float64 finds the place where its slope is 0.
    The logits are computed anew for each step of the search, so that memory is bounded for any number of images.
    The temperature is fitted to the softmax, also for SigLIP models.

    Args:
        classify: the classifier of a solution, see :func:`mergetune.classifier`.
        features: validation images with labels: neither training images, on which a classifier is more certain than on
            new images, nor the images that results are reported on.
        batch_size: images per batch.

    Raises:
        ValueError: no temperature is best. The classifier answers all images correctly, so that ever lower temperatures
            are better; or it does no better than chance, so that ever higher ones are.

    Example:
        >>> import mergetune as mt, torch
        >>> from mergetune.evaluation import Classifier
        >>> features = mt.FeatureCache.from_tensors(torch.eye(2)[[0, 0, 0, 1]], [0, 0, 1, 1], ["cat", "dog"])
        >>> certain = Classifier(lambda names: 10 * torch.eye(2))  # 3 of 4 answers are right: 10 / T should be log(3)
        >>> round(mt.fit_temperature(certain, features), 2)
        9.1
    """
    from scipy.optimize import root_scalar

    weights = classify(features.classnames)

    def slope(log_temperature: float) -> float:
        """Mean logit of the true class minus the expected logit; has the sign of the slope of the cross-entropy."""
        total = 0.0
        for x, labels, _ in features.batches(batch_size):
            logits = logits_of(classify, weights, x).double()
            true = logits.gather(1, labels.to(logits.device)[:, None])
            expected = ((logits / math.exp(log_temperature)).softmax(1) * (logits - true)).sum()
            total -= expected.item()
        return total / len(features)

    low, high = (math.log(bound) for bound in BOUNDS)
    at_low, at_high = slope(low), slope(high)
    if at_low >= 0 or at_high <= 0:
        why = "all are answered correctly" if at_low >= 0 else "the answers are no better than chance"
        raise ValueError(
            f"features must determine a temperature between {BOUNDS[0]:g} and {BOUNDS[1]:g}, got {len(features):,} "
            f"images from which none follows ({why}): use more validation images"
        )
    return math.exp(root_scalar(slope, bracket=(low, high), method="brentq", xtol=1e-9).root)
