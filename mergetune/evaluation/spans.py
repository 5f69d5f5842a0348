"""Solutions as points of one affine space, and loss and accuracy at any points of it.

Shapes: M points, K solutions, C classes, D embedding width, ... what is interpolated: [C, D], or a parameter's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.data import FeatureCache
from mergetune.facts.function_options import SPACES
from mergetune.solutions import Encoder, Head, Solution, check_compatible, check_same_text, inputs

CHUNK = 1 << 25  # numbers of class weights that are made at once: 128 MB in float32
ROWS = 2048  # images at a time


@dataclass(frozen=True, eq=False)
class Span:
    """Some solutions in the space that they are interpolated in.

    Attributes:
        ends: one point a solution, [...] each, on the CLIP's device.
        encode: points [M, ...] -> class weights [M, C, D], before any normalisation.
        normalize: whether class weights are made unit norm.
        scale: logit scale.
    """

    ends: tuple[Tensor, ...]
    encode: Encoder
    normalize: bool
    scale: float

    def unit(self, weights: Tensor) -> Tensor:
        return F.normalize(weights, dim=-1) if self.normalize else weights


def span(
    clip: FrozenClip,
    solutions: Sequence[Solution],
    features: FeatureCache,
    *,
    space: str = "embedding",
    precision: torch.dtype = torch.float32,
) -> Span:
    """Put solutions of one kind into one space; the last one's text, scale and classes are those of all.

    Args:
        clip: the frozen CLIP of all solutions.
        solutions: prompts, or heads.
        features: their class names are those of the class weights.
        space: "embedding" interpolates class weights before their normalisation, "parameter" what was trained.
        precision: of the points and of the text tower.
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    last = solutions[-1]
    if other := [s.kind for s in solutions if type(s) is not type(last)]:
        raise TypeError(f"solutions on one path must be of one kind, got {other[0]} and {last.kind}")
    if isinstance(last, Head):
        solutions = [s.rescaled(last.logit_scale) if isinstance(s, Head) else s for s in solutions]
    for solution in solutions[:-1]:
        if isinstance(last, Head) or space == "parameter":
            check_compatible(solution, last)
        if space == "parameter":
            check_same_text(solution, last)
    if space == "embedding":
        encode = lambda weights: weights  # noqa: E731
        ends = [solution.class_weights(clip, features.classnames) for solution in solutions]
    else:
        encode = last.encoder(clip, features.classnames, precision=precision)
        ends = [solution.parameter for solution in solutions]
    ends = tuple(end.to(clip.device, precision) for end in ends)
    return Span(ends, encode, last.normalize, last.scale(clip))


@torch.no_grad()
def measure(at: Span, mixtures: Tensor, features: FeatureCache) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean cross-entropy, and accuracy in percent, at mixtures of the K ends.

    The text tower takes many points at once, and images are read once for them all.

    Args:
        at: the space.
        mixtures: each point's shares of the ends, which sum to 1, [M, K] float64.
        features: images with labels.
    """
    losses, hits, ends = [], [], torch.stack(at.ends)
    numbers = max(ends[0].numel(), len(features.classnames) * features.dim)
    for chunk in mixtures.to(ends.device).split(max(1, CHUNK // numbers)):
        points = torch.tensordot(chunk, ends.double(), 1).to(ends)  # in float64: far outside the ends shares are large
        weights = at.unit(at.encode(points))
        loss, right = torch.zeros(2, len(weights), dtype=torch.float64, device=weights.device)
        for rows, labels, _ in features.batches(ROWS):
            x, labels = inputs(rows.to(weights), weights), labels.to(weights.device)
            for m, w in enumerate(weights):
                logits = at.scale * x @ w.T
                loss[m] += F.cross_entropy(logits, labels, reduction="sum")
                right[m] += (logits.argmax(-1) == labels).sum()
        losses += (loss / len(features)).tolist()
        hits += (100 * (right / len(features))).tolist()
    return tuple(losses), tuple(hits)
