"""Classifiers from solutions, templates and ensembles, and their accuracy.

Shapes: C classes, D embedding width, B images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.clip.backbone import check_clip
from mergetune.data import Batches
from mergetune.data.batches import check_batches, check_holds
from mergetune.data.cache_identity import check_image_tower
from mergetune.evaluation.scores import Classifier, Report, accuracy
from mergetune.solutions import Solution, image_features, span, stacked


def classifier(clip: FrozenClip, solution: Solution | str | Sequence[str]) -> Classifier:
    """The classifier of a solution or of zero-shot templates: a function of class names that returns class weights.

    Args:
        clip: the CLIP that the solution was made for.
        solution: a solution of any kind, or one or more templates with ``{}``.

    Raises:
        ValueError: the solution was made for another CLIP.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> classify = mt.classifier(clip, "an icon of a {}")
        >>> classify(["cat", "dog", "car"]).shape  # [C, D]
        torch.Size([3, 128])
    """
    check_clip(clip)
    if not isinstance(solution, Solution):
        return Classifier(lambda names: clip.logit_scale * clip.class_embeddings(names, solution), directions=True)

    solution = solution.for_clip(clip)

    def weights(names: Sequence[str]) -> Tensor:
        at = span(clip, [solution], names)
        return at.space.scale * at.space.unit(at.ends["classes"][0])

    edit = solution.edit(clip, stacked(solution.state(), clip.device))
    bias = not edit.normalize and any(rows.values.shape[-1] == clip.embed_dim + 1 for rows in edit.rows)
    return Classifier(weights, image_features(clip, solution), bias, directions=edit.normalize)


def logit_ensemble(a: Classifier, b: Classifier, t: float = 0.5) -> Classifier:
    """A classifier whose logits are ``(1 - t) a + t b``, the weighted average of the logits of two classifiers.

    If both take the same image features, the class weights are averaged. Otherwise the image features of both are
    concatenated, and so are the scaled class weights.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> a, b = mt.classifier(clip, "an icon of a {}"), mt.classifier(clip, "a photo of a {}.")
        >>> mt.logit_ensemble(a, b, t=0.5)(["cat", "dog"]).shape  # [C, D]
        torch.Size([2, 128])
    """
    if a.images is b.images:
        mix = lambda names: _mixed(a(names), b(names), t)  # noqa: E731
        return Classifier(mix, a.images, a.bias or b.bias)

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
    """A classifier with averaged class weights: WiSE-FT (arXiv 2109.01903), ``(1 - t) a + t b``.

    The average of two unit class embeddings is shorter than one. If both classifiers have class embeddings, of which
    only the directions are learned, the average is scaled to their lengths again; for heads it is left as it is.

    Args:
        a, b: two classifiers of the same image features.
        t: 0 gives a, 1 gives b.

    Raises:
        ValueError: the classifiers take different image features, so their weights cannot be averaged.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> a, b = mt.classifier(clip, "an icon of a {}"), mt.classifier(clip, "a photo of a {}.")
        >>> round(mt.weight_average(a, b)(["cat"]).norm().item() / clip.logit_scale, 4)
        1.0
    """
    if a.images is not b.images:
        raise ValueError(
            "classifiers must take the same image features for a weight average, got different ones: use logit_ensemble"
        )
    directions = a.directions and b.directions

    def average(names: Sequence[str]) -> Tensor:
        start, end = a(names), b(names)
        mixed = _mixed(start, end, t)
        if not directions:
            return mixed
        length = (1 - t) * start.norm(dim=-1, keepdim=True) + t * end.norm(dim=-1, keepdim=True)
        return length * F.normalize(mixed, dim=-1)

    return Classifier(average, a.images, a.bias or b.bias, directions)


def _mixed(start: Tensor, end: Tensor, t: float) -> Tensor:
    width = max(start.shape[1], end.shape[1])  # one of them may have a bias
    start, end = (F.pad(w, (0, width - w.shape[1])) for w in (start, end))
    return (1 - t) * start + t * end


def evaluate(clip: FrozenClip, solution: Solution | str | Sequence[str], features: Batches) -> Report:
    """Accuracy of a solution or of zero-shot templates on cached features.

    Args:
        clip: the CLIP that the features come from; for a head, a :class:`mergetune.FeatureSpace` is enough.
        solution: a solution of any kind, or one or more templates with ``{}``.
        features: images with labels; their classes are the label space.

    Returns:
        Accuracy over all images and per class, in percent.

    Raises:
        ValueError: the features come from another CLIP, or the solution was made for another one.

    Example:
        >>> import mergetune as mt, torch
        >>> clip = mt.load_clip("icon-clip")
        >>> x = clip.class_embeddings(["cat", "dog"], "an icon of a {}")  # in place of image features
        >>> features = mt.FeatureCache.from_tensors(x, [0, 1], ["cat", "dog"])
        >>> mt.evaluate(clip, "an icon of a {}", features).accuracy
        100.0
    """
    check_clip(clip)
    check_batches(features)
    _check_fit(clip, features)
    if isinstance(solution, Solution):
        check_holds(features, solution.image_input, solution.kind)
    return accuracy(classifier(clip, solution), features)


def _check_fit(clip: FrozenClip, features: Batches) -> None:
    width = getattr(features, "dim", clip.embed_dim)
    if width != clip.embed_dim:
        raise ValueError(f"features must have the embedding's width {clip.embed_dim}, got {width}")
    check_image_tower(clip, features, name="features")
