"""Loss and accuracy along straight paths between solutions, and the barrier on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.data import Batches
from mergetune.solutions import Solution, inputs, measure, span


@dataclass(frozen=True)
class Path:
    """Cross-entropy and accuracy on the straight line from one solution (alpha 0) to another (alpha 1).

    Attributes:
        alphas: N points, from 0 to 1.
        loss: mean cross-entropy at each.
        accuracy: percent, at each.
    """

    alphas: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the chord between its ends, at least 0 (arXiv 1912.05671)."""
        first, last = self.loss[0], self.loss[-1]
        return max(0.0, *(loss - (1 - t) * first - t * last for t, loss in zip(self.alphas, self.loss, strict=True)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"barrier": self.barrier}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Path:
        """Read what :meth:`to_json` gives."""
        return cls(*(tuple(record[name]) for name in ("alphas", "loss", "accuracy")))


def path(
    clip: FrozenClip, a: Solution, b: Solution, features: Batches, *, points: int = 21, space: str = "embedding"
) -> Path:
    """Walk from a to b.

    Args:
        clip: the frozen CLIP of both solutions.
        a, b: two solutions of one kind.
        features: images with labels on which loss and accuracy are taken.
        points: N evenly spaced points, both ends included.
        space: "embedding" interpolates class weights before their normalisation, "parameter" what was trained.
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, both ends, got {points}")
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
    """Mean cross-entropy of class weights [C, D], as they are, on cached features.

    Args:
        weights: [C, D], or [C, D + 1] with a bias.
        features: images with labels.
        scale: factor on the logits.
        images: applied to the features first, see :class:`mergetune.evaluation.Classifier`.
        batch_size: images at a time.
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
    """The paths that MERGETUNE lowers, w1 -> w and w2 -> w, and the direct one, w1 -> w2, for comparison."""
    ends = {
        "zero-shot to MERGETUNE": (zero_shot, merged),
        "fine-tuned to MERGETUNE": (tuned, merged),
        "zero-shot to fine-tuned": (zero_shot, tuned),
    }
    return {name: path(clip, a, b, features, points=points, space=space) for name, (a, b) in ends.items()}
