"""The arguments of each op as one object that checks shapes and dtypes.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path, P all points; M prompts encoded together,
T packed tokens, Q queries, S tokens of the shared prefix, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError with the argument's name if the tensor has another shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def expect_numbers(names: Iterable[str], values: Iterable[object]) -> None:
    """Raises ValueError with the argument's name if a tensor lies on the device meta, which stores no numbers."""
    for name, value in zip(names, values, strict=False):
        if isinstance(value, Tensor) and value.device.type == "meta":
            raise ValueError(f"{name} must hold numbers, got a tensor on the device meta, which has none")


def real_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which an op computes: float64 for float64 tensors, else float32.

    Half types are too coarse for logits of 100 times a cosine.
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class LossArguments(NamedTuple):
    """Arguments of ``lmc_loss`` in the order of its schema, described in :func:`mergetune.ops.reference.lmc_loss`."""

    x: Tensor
    labels: Tensor
    w: Tensor
    anchors: Tensor
    alphas: Tensor
    betas: Tensor
    scale: float
    w1: Tensor | None
    curvature: Tensor | None
    lam: float
    normalize: bool
    anchor_dots: Tensor | None

    def check(self) -> None:
        """Raises ValueError or TypeError with the argument's name if shapes or the labels' dtype do not fit."""
        expect_numbers(self._fields, self)
        x, w = self.x, self.w
        if w.ndim != 2 or x.ndim != 2:
            raise ValueError(f"x and w must have shapes [B, D] and [C, D], got {list(x.shape)} and {list(w.shape)}")
        classes, width = w.shape
        expect_shape("x", x, (len(x), width))
        expect_shape("labels", self.labels, (len(x),))
        expect_shape("anchors", self.anchors, (len(self.anchors), classes, width))
        expect_shape("betas", self.betas, (len(self.anchors),))
        if not len(x):
            raise ValueError("x must hold at least one row, got [0, D]")
        if len(self.anchors) and (self.alphas.ndim != 1 or not len(self.alphas)):
            raise ValueError(f"alphas must hold at least one path point, got shape {list(self.alphas.shape)}")
        if self.labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {self.labels.dtype}")
        if self.w1 is not None:
            expect_shape("w1", self.w1, (classes, width))
        if self.curvature is not None:
            expect_shape("curvature", self.curvature, (classes, width))
        if self.anchor_dots is not None:
            expect_shape("anchor_dots", self.anchor_dots, (len(self.anchors), len(x), classes))

    def shape_class(self) -> str:
        """Size class of the call, by which its backend is chosen: "small", "medium" or "large" by B * C logits."""
        return _size(len(self.x) * len(self.w), 4096, 131072)


class PathArguments(NamedTuple):
    """Arguments of ``path_cross_entropy``, described in :func:`mergetune.ops.reference.path_cross_entropy`."""

    dots: Tensor
    labels: Tensor
    anchor: Tensor
    alpha: Tensor
    weight: Tensor
    rscale: Tensor

    def check(self) -> None:
        """Raises ValueError or TypeError with the argument's name if shapes or dtypes do not fit."""
        expect_numbers(self._fields, self)
        dots, points = self.dots, len(self.anchor)
        if dots.dtype not in (torch.float32, torch.float64) or self.rscale.dtype != dots.dtype:
            raise TypeError(
                f"dots and rscale must both be float32 or float64, got {dots.dtype} and {self.rscale.dtype}"
            )
        _, batch, classes = dots.shape
        expect_shape("labels", self.labels, (batch,))
        expect_shape("alpha", self.alpha, (points,))
        expect_shape("weight", self.weight, (points,))
        expect_shape("rscale", self.rscale, (points, classes))

    def shape_class(self) -> str:
        """Size class of the call, as in :meth:`LossArguments.shape_class`."""
        return _size(self.dots[0].numel(), 4096, 131072)


class AttentionArguments(NamedTuple):
    """Arguments of ``prefix_attention``, described in :func:`mergetune.ops.reference.prefix_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    lengths: tuple[int, ...]
    causal: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.prefix_k, self.prefix_v

    def with_tensors(self, tensors: Iterable[Tensor]) -> AttentionArguments:
        """The same arguments with other tensors, given in the order of :attr:`tensors`."""
        q, k, v, prefix_k, prefix_v = tensors
        return self._replace(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)

    def check(self) -> None:
        """Raises ValueError or TypeError with the argument's name if shapes or dtypes do not fit."""
        q = self.q
        if q.ndim != 4:
            raise ValueError(f"q must have shape [M, T, H, d], got {list(q.shape)}")
        (prompts, queries, heads, width), tokens = q.shape, sum(self.lengths)
        expect_shape("k", self.k, (prompts, tokens, heads, width))
        expect_shape("v", self.v, (prompts, tokens, heads, width))
        expect_shape("prefix_k", self.prefix_k, (prompts, self.prefix_k.shape[1], heads, width))
        expect_shape("prefix_v", self.prefix_v, tuple(self.prefix_k.shape))
        if queries not in (tokens, len(self.lengths)):
            raise ValueError(
                f"q must have a row for each of {tokens} tokens or {len(self.lengths)} sequences, got {queries}"
            )
        if {t.dtype for t in self.tensors[1:]} != {q.dtype}:
            raise TypeError(f"q, k, v, prefix_k and prefix_v must have one dtype, got {q.dtype} and others")

    def shape_class(self) -> str:
        """Size class of the call, by which its backend is chosen: "small", "medium" or "large" by M * Q queries."""
        return _size(self.q.shape[0] * self.q.shape[1], 128, 1024)


def _size(count: int, small: int, medium: int) -> str:
    return "small" if count <= small else "medium" if count <= medium else "large"
