"""Loss and accuracy along straight paths between solutions, the barrier on them, and the figure.

Shapes: C classes, D embedding width, N points on a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.evaluate import accuracy
from mergetune.features import FeatureCache
from mergetune.objective import SPACES
from mergetune.solutions import Head, Solution, check_compatible, check_same_text, inputs


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


@torch.no_grad()
def path(
    clip: FrozenClip, a: Solution, b: Solution, features: FeatureCache, *, points: int = 21, space: str = "embedding"
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
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    if type(a) is not type(b):
        raise TypeError(f"solutions on one path must be of one kind, got {a.kind} and {b.kind}")
    if isinstance(a, Head) and isinstance(b, Head):
        a = a.rescaled(b.logit_scale)
    if isinstance(a, Head) or space == "parameter":
        check_compatible(a, b)
    alphas = torch.linspace(0, 1, points, dtype=torch.float64)
    t = alphas.to(clip.device).float()
    if space == "embedding":
        ends = [solution.class_weights(clip, features.classnames) for solution in (a, b)]
        weights = [(1 - s) * ends[0] + s * ends[1] for s in t]
    else:
        check_same_text(a, b)
        encode = b.encoder(clip, features.classnames)
        start, end = (solution.parameter.float().to(clip.device) for solution in (a, b))
        weights = [encode(((1 - s) * start + s * end)[None])[0] for s in t]
    weights = [F.normalize(w, dim=-1) for w in weights] if b.normalize else weights
    return Path(
        alphas=tuple(alphas.tolist()),
        loss=tuple(cross_entropy(w, features, scale=b.scale(clip)) for w in weights),
        accuracy=tuple(accuracy(w, features).accuracy for w in weights),
    )


@torch.no_grad()
def cross_entropy(weights: Tensor, features: FeatureCache, *, scale: float, batch_size: int = 8192) -> float:
    """Mean cross-entropy of class weights [C, D], as they are, on cached features."""
    total = 0.0
    for index in torch.arange(len(features)).split(batch_size):
        x = inputs(features.rows(index).to(weights), weights)
        logits = scale * x @ weights.T
        total += F.cross_entropy(logits, features.labels[index].to(logits.device), reduction="sum").item()
    return total / len(features)


def connectivity(
    clip: FrozenClip,
    zero_shot: Solution,
    tuned: Solution,
    merged: Solution,
    features: FeatureCache,
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


def plot(panels: Mapping[str, Mapping[str, Path]], file: str | FilePath) -> None:
    """Draw loss (above) and accuracy (below) along paths, a column for each set of images, like the paper's Fig. 2.

    Args:
        panels: name of the images -> name of the path -> path, as :func:`connectivity` gives it.
        file: .png, .pdf or .svg.
    """
    from matplotlib.figure import Figure  # here, and without pyplot: no display is needed and no state is shared

    figure = Figure(figsize=(4.6 * len(panels), 6.0), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True)
    styles = [{"color": "#1b9e77"}, {"color": "#7570b3"}, {"color": "#d95f02", "linestyle": "--"}]
    for column, (title, paths) in enumerate(panels.items()):
        for style, (name, walked) in zip(chain(styles, repeat({})), paths.items(), strict=False):
            axes[0, column].plot(walked.alphas, walked.loss, label=name, **style)
            axes[1, column].plot(walked.alphas, walked.accuracy, **style)
        barrier = max(walked.barrier for walked in paths.values())
        axes[0, column].set(title=f"{title}\nhighest barrier {barrier:.3f}", ylabel="cross-entropy")
        axes[1, column].set(xlabel="position on the path", ylabel="accuracy (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles), frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
