"""Classifiers made of solutions, of ensembles and of templates, and their accuracy in one call.

Shapes: C classes, D embedding width, B images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.data import Batches
from mergetune.evaluation.scores import Classifier, Report, accuracy
from mergetune.solutions import Solution, image_features, span, stacked


def classifier(clip: FrozenClip, solution: Solution | str | Sequence[str]) -> Classifier:
    """The classifier of a solution, or of zero-shot templates, for any class names.

    Args:
        clip: the CLIP that the solution was made for.
        solution: of any kind; or one or more templates with ``{}``.
    """
    if not isinstance(solution, Solution):
        return Classifier(lambda names: clip.logit_scale * clip.class_embeddings(names, solution))

    def weights(names: Sequence[str]) -> Tensor:
        at = span(clip, [solution], names)
        return at.space.scale * at.space.unit(at.ends["classes"][0])

    solution.check(clip)
    edit = solution.edit(clip, stacked(solution.state(), clip.device))
    bias = not edit.normalize and any(rows.values.shape[-1] == clip.embed_dim + 1 for rows in edit.rows)
    return Classifier(weights, image_features(clip, solution), bias)


def logit_ensemble(a: Classifier, b: Classifier, t: float = 0.5) -> Classifier:
    """Average of the logits, ``(1 - t) a + t b``.

    For classifiers of the same image features it is the average of the weights. Otherwise the features of both stand
    side by side, and the weights too.
    """
    if a.images is b.images:
        return Classifier(lambda names: _mixed(a(names), b(names), t), a.images, a.bias or b.bias)

    def side_by_side(names: Sequence[str]) -> Tensor:
        ends, biases = [], []
        for part, share in ((a, 1 - t), (b, t)):
            weights = share * part(names)
            ends.append(weights[:, :-1] if part.bias else weights)
            biases += [weights[:, -1:]] if part.bias else []
        return torch.cat([*ends, *([torch.stack(biases).sum(0)] if biases else [])], 1)

    def both(x: Tensor) -> Tensor:
        return torch.cat([x if c.images is None else c.images(x) for c in (a, b)], -1)

    return Classifier(side_by_side, both, a.bias or b.bias)


def weight_average(a: Classifier, b: Classifier, t: float = 0.5) -> Classifier:
    """WiSE-FT (arXiv 2109.01903) on class embeddings: directions are averaged, and lengths, so that unit stays unit.

    Raises:
        ValueError: classifiers of different image features: their weights mean different things.
    """
    if a.images is not b.images:
        raise ValueError("classifiers must take the same image features for a weight average, got two different ones")

    def average(names: Sequence[str]) -> Tensor:
        mixed = _mixed(a(names), b(names), t)
        length = (1 - t) * a(names).norm(dim=-1, keepdim=True) + t * b(names).norm(dim=-1, keepdim=True)
        return length * F.normalize(mixed, dim=-1)

    return Classifier(average, a.images, a.bias or b.bias)


def _mixed(start: Tensor, end: Tensor, t: float) -> Tensor:
    width = max(start.shape[1], end.shape[1])  # one of them may have a bias
    start, end = (F.pad(w, (0, width - w.shape[1])) for w in (start, end))
    return (1 - t) * start + t * end


def evaluate(clip: FrozenClip, solution: Solution | str | Sequence[str], features: Batches) -> Report:
    """Accuracy of a solution, or of zero-shot templates, on cached features.

    Args:
        clip: the CLIP that the features come from.
        solution: of any kind; or one or more templates with ``{}``.
        features: images with labels.
    """
    _check_clip(clip, features)
    return accuracy(classifier(clip, solution), features)


def _check_clip(clip: FrozenClip, features: Batches) -> None:
    if features.fingerprint and features.fingerprint != clip.image_fingerprint:
        raise ValueError(
            f"features must come from this CLIP's image tower {clip.image_fingerprint[:12]}, got "
            f"{features.fingerprint[:12]}"
        )
