"""Loss and accuracy over the plane through three solutions (Garipov et al. 2018, arXiv 1802.10026).

Shapes: N grid points per side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from mergetune.clip import FrozenClip
from mergetune.data import Batches
from mergetune.data.batches import check_holds
from mergetune.facts.brief import brief
from mergetune.io import hidden
from mergetune.solutions import Solution, measure, span
from mergetune.solutions.space import SHARES


class Corner(NamedTuple):
    """A point on the plane: coordinates, cross-entropy and accuracy in percent."""

    x: float
    y: float
    loss: float
    accuracy: float


@brief("solutions", "xs", "ys")
@dataclass(frozen=True)
class Plane:
    """Cross-entropy and accuracy on a square grid of the plane through three solutions.

    Coordinates are lengths in an orthonormal basis with the first solution at (0, 0), the second at (d, 0) with d > 0,
    and the third at (x, y) with y > 0.

    Attributes:
        xs, ys: the N coordinates of the grid in each direction, ascending.
        loss: mean cross-entropy; loss[i][j] belongs to ys[i] and xs[j].
        accuracy: accuracy in percent, in the same order.
        solutions: name -> point of each solution, in the given order.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    accuracy: tuple[tuple[float, ...], ...]
    solutions: dict[str, Corner]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"solutions": {name: c._asdict() for name, c in self.solutions.items()}}


def plane(
    clip: FrozenClip,
    solutions: Mapping[str, Solution],
    features: Batches,
    *,
    points: int = 21,
    margin: float = 0.25,
    space: str = "embedding",
    progress: bool = True,
) -> Plane:
    """Measures loss and accuracy over the plane through three solutions, such as zero-shot, fine-tuned and merged.

    Args:
        clip: the frozen CLIP of all three solutions.
        solutions: name -> solution, three solutions of one kind.
        features: features with labels on which loss and accuracy are measured.
        points: N; the grid has N x N points.
        margin: width of the margin around the triangle on every side, as a share of the triangle's longer extent.
        space: "embedding" spans the plane in class weights before normalisation, "parameter" in trained parameters.
        progress: show a bar if stderr is a terminal.

    Raises:
        ValueError: the solutions lie on one line and span no plane (a weight average of two of them does), or an
            argument is out of range.
    """
    if len(solutions) != 3:
        raise ValueError(f"solutions must hold three solutions, got {len(solutions)}")
    if points < 2:
        raise ValueError(f"points must be at least 2 per side, got {points}")
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be at least 0 and finite, got {margin}")
    for corner in solutions.values():
        check_holds(features, corner.image_input, corner.kind)
    at = span(clip, tuple(solutions.values()), features.classnames, space=space)
    ends = torch.cat([end.double().flatten(1) for name, end in at.ends.items() if name != SHARES], 1)
    first, second = ends[1:] - ends[0]
    d = first.norm().item()
    share = (first @ second).item() / d**2 if d else 0.0
    x, y = share * d, (second - share * first).norm().item()
    # The distance of a third point on the line is not exactly 0, because points are rounded to float32.
    if not y > 1e-5 * max(d, second.norm().item()) or not d:
        raise ValueError(f"solutions must span a plane, got three on one line: {', '.join(solutions)}")
    corners = zip((0.0, d, x), (0.0, 0.0, y), *measure(at, torch.eye(3, dtype=torch.float64), features), strict=True)
    left, right = min(0.0, x), max(d, x)
    half = (0.5 + margin) * max(right - left, y)
    offsets = torch.linspace(-half, half, points, dtype=torch.float64)
    xs, ys = (left + right) / 2 + offsets, y / 2 + offsets
    loss, accuracy = [], []
    # One row per step: the text tower encodes its N points in one call, and the bar moves.
    for row in tqdm(ys.tolist(), "plane", unit="row", disable=hidden(progress)):
        third_share = torch.full_like(xs, row / y)
        second_share = xs / d - third_share * share
        mixtures = torch.stack([1 - second_share - third_share, second_share, third_share], 1)
        for values, found in zip((loss, accuracy), measure(at, mixtures, features), strict=True):
            values.append(found)
    return Plane(
        xs=tuple(xs.tolist()),
        ys=tuple(ys.tolist()),
        loss=tuple(loss),
        accuracy=tuple(accuracy),
        solutions={name: Corner(*corner) for name, corner in zip(solutions, corners, strict=True)},
    )
