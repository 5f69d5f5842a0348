"""Loss, accuracy and barrier along straight paths between solutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.clip.backbone import check_clip
from mergetune.data import Batches
from mergetune.data.batches import check_batches, check_holds
from mergetune.facts.brief import brief
from mergetune.solutions import Solution, inputs, measure, span


@brief("loss", "accuracy", "barrier")
@dataclass(frozen=True)
class Path:
    """Cross-entropy and accuracy at N points on the line from one solution (alpha 0) to another (alpha 1).

    Attributes:
        alphas: the N points, from 0 to 1.
        loss: mean cross-entropy at each point.
        accuracy: accuracy at each point, in percent.

    Example:
        >>> from mergetune.evaluation import Path
        >>> Path(alphas=(0.0, 0.5, 1.0), loss=(1.0, 2.5, 2.0), accuracy=(60.0, 40.0, 50.0)).barrier
        1.0
    """

    alphas: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """Largest height of the loss above the straight line between its end values, at least 0.

        This is the barrier of Entezari et al. (arXiv 2110.06296). A loss that is convex along the path has none.
        """
        first, last = self.loss[0], self.loss[-1]
        return max(0.0, *(loss - (1 - t) * first - t * last for t, loss in zip(self.alphas, self.loss, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """All fields and the barrier, JSON-able."""
        return asdict(self) | {"barrier": self.barrier}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Path:
        """Read what :meth:`to_json` gives."""
        return cls(*(tuple(record[name]) for name in ("alphas", "loss", "accuracy")))


def path(
    clip: FrozenClip, a: Solution, b: Solution, features: Batches, *, points: int = 21, space: str = "embedding"
) -> Path:
    """Loss and accuracy along the straight path from solution a to solution b.

    Args:
        clip: the frozen CLIP of both solutions.
        a, b: two solutions; of one kind in space "parameter".
        features: images with labels, on which loss and accuracy are measured.
        points: N, number of evenly spaced points, including both ends.
        space: "embedding" interpolates class features before their normalisation; "parameter" interpolates the trained
            states.

    Raises:
        TypeError: solutions of two kinds.
        ValueError: ``points`` below 2, an unknown ``space``, or two solutions that no line joins.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> x = clip.class_embeddings(["cat", "dog"], "an icon of a {}")  # in place of image features
        >>> features = mt.FeatureCache.from_tensors(x, [0, 1], ["cat", "dog"])
        >>> a, b = (mt.Prompt.from_template(clip, text) for text in ("an icon of a {}", "a photo of a {}"))
        >>> walk = mt.path(clip, a, b, features, points=3)
        >>> walk.alphas, walk.accuracy
        ((0.0, 0.5, 1.0), (100.0, 100.0, 100.0))
    """
    check_clip(clip)
    check_batches(features)
    if points < 2:
        raise ValueError(f"points must be at least 2, for both ends, got {points}")
    for end in (a, b):
        check_holds(features, end.image_input, end.kind)
    at = span(clip, (a, b), features.classnames, space=space)
    alphas = torch.linspace(0, 1, points, dtype=torch.float64)
    return Path(tuple(alphas.tolist()), *measure(at, torch.stack([1 - alphas, alphas], 1), features))


@torch.no_grad()
def cross_entropy(
    weights: Tensor,
    features: Batches,
    *,
    scale: float,
    images: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 8192,
) -> float:
    """Mean cross-entropy of class weights on cached features.

    Args:
        weights: class weights, [C, D] or [C, D + 1] with a bias; they are not normalised.
        features: images with labels.
        scale: factor on the logits.
        images: function that is applied to the features first, see :class:`mergetune.evaluation.Classifier`.
        batch_size: images per batch.
    """
    total = 0.0
    for x, labels, _ in features.batches(batch_size):
        x = x.to(weights) if images is None else images(x.to(weights))
        logits = scale * inputs(x, weights) @ weights.T
        total += F.cross_entropy(logits, labels.to(logits.device), reduction="sum").item()
    return total / len(features)


def connectivity(
    clip: FrozenClip,
    zero_shot: Solution,
    tuned: Solution,
    merged: Solution,
    features: Batches,
    *,
    points: int = 21,
    space: str = "embedding",
) -> dict[str, Path]:
    """The two paths that MERGETUNE lowers, w1 to w and w2 to w, and the direct path w1 to w2 for comparison.

    Args:
        clip: the frozen CLIP of all solutions.
        zero_shot: w1.
        tuned: w2.
        merged: w, the result of :func:`mergetune.fit`.
        features, points, space: see :func:`path`.

    Returns:
        Name of the path -> path.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> x = clip.class_embeddings(["cat", "dog"], "an icon of a {}")  # in place of image features
        >>> features = mt.FeatureCache.from_tensors(x, [0, 1], ["cat", "dog"])
        >>> w1, w2 = (mt.Prompt.from_template(clip, text) for text in ("an icon of a {}", "a photo of a {}"))
        >>> list(mt.connectivity(clip, w1, w2, mt.interpolate(w1, w2, 0.5), features, points=2))
        ['zero-shot to MERGETUNE', 'fine-tuned to MERGETUNE', 'zero-shot to fine-tuned']
    """
    ends = {
        "zero-shot to MERGETUNE": (zero_shot, merged),
        "fine-tuned to MERGETUNE": (tuned, merged),
        "zero-shot to fine-tuned": (zero_shot, tuned),
    }
    return {name: path(clip, a, b, features, points=points, space=space) for name, (a, b) in ends.items()}
