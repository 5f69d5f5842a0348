"""Loss and accuracy over the plane through three solutions (Garipov et al. 2018, arXiv 1802.10026).

Shapes: N grid points a side, ... what is interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from mergetune.clip import FrozenClip
from mergetune.data import Batches
from mergetune.solutions import Solution, measure, span
from mergetune.solutions.space import SHARES


class Corner(NamedTuple):
    """A solution on the plane: its coordinates, cross-entropy and accuracy in percent."""

    x: float
    y: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Plane:
    """Cross-entropy and accuracy on a square grid of the plane through three solutions.

    The coordinates are lengths: of an orthonormal basis with the first solution at (0, 0), the second at (d, 0), d > 0,
    and the third at (x, y), y > 0.

    Attributes:
        xs, ys: the grid's N coordinates each way.
        loss: mean cross-entropy, N rows from the lowest y up, N numbers each from the lowest x up.
        accuracy: percent, likewise.
        solutions: the three by name, in their order.
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
    """Loss and accuracy over the plane of three solutions, such as zero-shot, fine-tuned and merged.

    Args:
        clip: the frozen CLIP of all three.
        solutions: three of one kind by name.
        features: images with labels on which loss and accuracy are taken.
        points: N, the grid has N x N.
        margin: room around the triangle on every side, in parts of its longer extent.
        space: "embedding" spans the plane in class weights before their normalisation, "parameter" in what was trained.
        progress: show a bar where stderr is a terminal.

    Raises:
        ValueError: the three lie on one line, as a weight average of two of them does: they span no plane.
    """
    if len(solutions) != 3:
        raise ValueError(f"solutions must be three, got {len(solutions)}")
    if points < 2:
        raise ValueError(f"points must be at least 2 a side, got {points}")
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be at least 0 and finite, got {margin}")
    at = span(clip, tuple(solutions.values()), features.classnames, space=space)
    ends = torch.cat([end.double().flatten(1) for name, end in at.ends.items() if name != SHARES], 1)
    first, second = ends[1:] - ends[0]
    d = first.norm().item()
    share = (first @ second).item() / d**2 if d else 0.0
    x, y = share * d, (second - share * first).norm().item()
    # What is left of a third point on the line is its rounding to float32.
    if not y > 1e-5 * max(d, second.norm().item()) or not d:
        raise ValueError(f"solutions must span a plane, got three on one line: {', '.join(solutions)}")
    corners = zip((0.0, d, x), (0.0, 0.0, y), *measure(at, torch.eye(3, dtype=torch.float64), features), strict=True)
    left, right = min(0.0, x), max(d, x)
    half = (0.5 + margin) * max(right - left, y)
    offsets = torch.linspace(-half, half, points, dtype=torch.float64)
    xs, ys = (left + right) / 2 + offsets, y / 2 + offsets
    loss, accuracy = [], []
    # One row at a time: the text tower takes its N points at once, and the bar moves.
    for row in tqdm(ys.tolist(), "plane", unit="row", disable=None if progress else True):
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
