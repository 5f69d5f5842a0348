"""Classifiers made of solutions, of ensembles and of templates, and their accuracy in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.data import FeatureCache
from mergetune.evaluation.scores import Classifier, Report, accuracy
from mergetune.solutions import Head, Prompt, Solution


def classifier(clip: FrozenClip, solution: Solution | str | Sequence[str]) -> Classifier:
    """Class weights by class names: of a prompt, a head, or zero-shot templates."""
    if isinstance(solution, Head):
        return lambda names: solution.logit_scale * solution.class_weights(clip, names)
    if isinstance(solution, Prompt):
        return lambda names: clip.logit_scale * solution.class_embeddings(clip, names)
    return lambda names: clip.logit_scale * clip.class_embeddings(names, solution)


def logit_ensemble(a: Classifier, b: Classifier, t: float = 0.5) -> Classifier:
    """Average of the logits, ``(1 - t) a + t b``, which for linear classifiers is the average of the weights."""

    def average(names: Sequence[str]) -> Tensor:
        ends = a(names), b(names)
        width = max(w.shape[1] for w in ends)  # one of them may have a bias
        start, end = (F.pad(w, (0, width - w.shape[1])) for w in ends)
        return (1 - t) * start + t * end

    return average


def weight_average(a: Classifier, b: Classifier, t: float = 0.5) -> Classifier:
    """WiSE-FT (arXiv 2109.01903) on class embeddings: directions are averaged, and lengths, so that unit stays unit."""

    def average(names: Sequence[str]) -> Tensor:
        mixed = logit_ensemble(a, b, t)(names)
        length = (1 - t) * a(names).norm(dim=-1, keepdim=True) + t * b(names).norm(dim=-1, keepdim=True)
        return length * F.normalize(mixed, dim=-1)

    return average


def evaluate(clip: FrozenClip, solution: Solution | str | Sequence[str], features: FeatureCache) -> Report:
    """Accuracy of a solution, or of zero-shot templates, on cached features."""
    _check_clip(clip, features)
    return accuracy(classifier(clip, solution)(features.classnames), features)


def _check_clip(clip: FrozenClip, features: FeatureCache) -> None:
    if features.fingerprint and features.fingerprint != clip.image_fingerprint:
        raise ValueError(
            f"features must come from this CLIP's image tower {clip.image_fingerprint[:12]}, got "
            f"{features.fingerprint[:12]}"
        )
