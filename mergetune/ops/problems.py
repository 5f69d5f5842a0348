"""Random arguments on which the implementations of an op are compared: realistic sizes and unusual ones.

The first entry of each list has a realistic size and is timed. All entries of a list lie in its shape class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.ops.arguments import AttentionArguments, LossArguments, PathArguments


@dataclass(frozen=True)
class LossSize:
    """Sizes of a loss problem: B, C, D, K, N, and which optional arguments are given."""

    batch: int
    classes: int
    width: int = 512
    anchors: int = 1
    points: int = 5
    zero_shot: bool = True
    curvature: bool = False
    normalize: bool = True
    known_dots: bool = True


@dataclass(frozen=True)
class AttentionSize:
    """Sizes of an attention problem: M prompts, C texts of 2 to 8 tokens, S, H, d.

    ``last_only`` gives queries only for the last token of each text.
    """

    prompts: int
    texts: int
    prefix: int = 5
    heads: int = 8
    width: int = 64
    last_only: bool = False
    causal: bool = True


LOSS_SIZES = {
    "small": (
        LossSize(32, 5),
        LossSize(1, 1, 3, known_dots=False),
        LossSize(33, 7, 129, anchors=3, points=1, curvature=True, known_dots=False),
        LossSize(17, 3, 65, anchors=0, zero_shot=False, known_dots=False),
    ),
    "medium": (
        LossSize(128, 100),
        LossSize(65, 131, 80, anchors=2, points=3, normalize=False, known_dots=False),
        LossSize(127, 33, 513, curvature=True, points=7),
    ),
    "large": (
        LossSize(512, 1000),
        LossSize(513, 257, 200, anchors=2, points=2, curvature=True, known_dots=False),
    ),
}
ATTENTION_SIZES = {
    "small": (
        AttentionSize(1, 5),
        AttentionSize(1, 1, prefix=0, heads=1, width=1),
        AttentionSize(2, 6, prefix=3, heads=3, width=33, causal=False),
        AttentionSize(1, 5, last_only=True),
    ),
    "medium": (
        AttentionSize(1, 50),
        AttentionSize(3, 150, prefix=17, heads=2, width=80, last_only=True),
    ),
    "large": (
        AttentionSize(1, 500),
        AttentionSize(6, 67, prefix=2, heads=5, width=40),
        AttentionSize(3, 500, last_only=True),
    ),
}


def loss_problems(shape_class: str, dtype: torch.dtype, device: torch.device) -> list[LossArguments]:
    """Arguments of lmc_loss: unit features, w, anchors and w1 near each other as in training, a logit scale of 100."""
    return [_loss_problem(size, dtype, device) for size in LOSS_SIZES[shape_class]]


def _loss_problem(size: LossSize, dtype: torch.dtype, device: torch.device) -> LossArguments:
    draw = _Draws(device)
    w = F.normalize(draw(size.classes, size.width), dim=-1) * (1 + 0.1 * draw(size.classes, 1))
    near = lambda *shape: w + 0.3 * draw(*shape, size.classes, size.width) / size.width**0.5  # noqa: E731
    real = torch.promote_types(dtype, torch.float32)
    x, anchors = F.normalize(draw(size.batch, size.width), dim=-1).to(dtype), near(size.anchors).to(dtype)
    return LossArguments(
        x=x,
        labels=draw.integers(size.classes, size.batch),
        w=w.to(dtype),
        anchors=anchors,
        alphas=torch.linspace(0, 1, size.points + 1, dtype=torch.float64, device=device)[:-1],
        betas=torch.linspace(0.5, 1, size.anchors, dtype=torch.float64, device=device),
        scale=100.0 if size.normalize else 10.0,
        w1=near().to(dtype) if size.zero_shot else None,
        curvature=draw(size.classes, size.width).abs().to(dtype) if size.curvature else None,
        lam=8.0,
        normalize=size.normalize,
        anchor_dots=x.to(real) @ anchors.to(real).mT if size.known_dots and size.anchors else None,
    )


def path_problems(shape_class: str, dtype: torch.dtype, device: torch.device) -> list[PathArguments]:
    """Arguments of path_cross_entropy in the sizes of :func:`loss_problems`."""
    return [_path_problem(size, dtype, device) for size in LOSS_SIZES[shape_class]]


def _path_problem(size: LossSize, dtype: torch.dtype, device: torch.device) -> PathArguments:
    draw, n, k = _Draws(device), size.points, size.anchors
    points = torch.linspace(0, 1, n + 1, dtype=torch.float64, device=device)[:-1].repeat(k)
    anchor = torch.arange(1, k + 1, device=device).repeat_interleave(n)
    return PathArguments(
        dots=(0.1 * draw(k + 1, size.batch, size.classes)).to(dtype),
        labels=draw.integers(size.classes, size.batch),
        anchor=torch.cat([anchor.new_zeros(1), anchor]),
        alpha=torch.cat([points.new_ones(1), points]),
        weight=torch.cat([points.new_ones(1), points.new_full((k * n,), 0.5 / n)]),
        rscale=(100 + 10 * draw(1 + k * n, size.classes)).to(dtype),
    )


def attention_problems(shape_class: str, dtype: torch.dtype, device: torch.device) -> list[AttentionArguments]:
    """Arguments of prefix_attention with sorted lengths from 2 to 8, as of class names."""
    return [_attention_problem(size, dtype, device) for size in ATTENTION_SIZES[shape_class]]


def _attention_problem(size: AttentionSize, dtype: torch.dtype, device: torch.device) -> AttentionArguments:
    draw = _Draws(device)
    lengths = tuple(sorted(2 + i * 7 // size.texts for i in range(size.texts)))
    tokens = sum(lengths)
    rows = size.texts if size.last_only else tokens, tokens, tokens, size.prefix, size.prefix
    q, k, v, prefix_k, prefix_v = (draw(size.prompts, count, size.heads, size.width).to(dtype) for count in rows)
    return AttentionArguments(q, k, v, prefix_k, prefix_v, lengths, size.causal)


class _Draws:
    """Random numbers that are equal on every device and do not use the global generator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def integers(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator).to(self.device)
