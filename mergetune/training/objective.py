"""The LMC objective: anchors, grids of path points and surrogates, put together for one set of classes.

    L(w) = CE(w) + lam * S(w; w1) + sum_k beta_k * mean_n CE(w2_k + a_n (w - w2_k))        (arXiv 2601.10497)

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune import ops
from mergetune.facts.function_options import PATH_GRIDS
from mergetune.solutions import Encoder, inputs


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a solution's parameter on a batch of features. Without anchors and w1 it is plain cross-entropy.

    Attributes:
        encode: parameters [M, ...] -> class weights [M, C, D].
        scale: logit scale.
        normalize: class weights are made unit norm after interpolation (prompts) or taken as they are (heads).
        anchors: class weights of the fine-tuned solutions, [K, C, D], in space "embedding"; their parameters [K, ...]
            in space "parameter".
        betas: weight of each anchor's path, [K].
        alphas: fixed path points, [N]; None draws ``points`` uniform ones at every step.
        points: N.
        space: "embedding" interpolates class weights, "parameter" what is trained.
        w1: class weights of the zero-shot solution, [C, D].
        lam: weight of the surrogate.
        surrogate: one of ``SURROGATES``; "identity" and "fisher" are diagonal, "cosine" and "l2" are
            the official code's.
        curvature: the diagonal of "fisher", [C, D].
        backend: see :func:`mergetune.ops.lmc_loss`.
    """

    encode: Encoder
    scale: float
    normalize: bool
    anchors: Tensor | None = None
    betas: Tensor | None = None
    alphas: Tensor | None = None
    points: int = 0
    space: str = "embedding"
    w1: Tensor | None = None
    lam: float = 0.0
    surrogate: str = "identity"
    curvature: Tensor | None = None
    backend: str | None = None

    @property
    def term_names(self) -> tuple[str, ...]:
        """The names of the terms that a call returns."""
        paths = 0 if self.anchors is None else len(self.anchors)
        return ("endpoint", "surrogate", *(f"path_{k + 1}" for k in range(paths)))

    @property
    def prompts(self) -> int:
        """How many parameters a call encodes: the solution's own, and in space "parameter" every point's."""
        if self.anchors is None or self.space == "embedding":
            return 1
        return 1 + len(self.anchors) * (self.points if self.alphas is None else len(self.alphas))

    def __call__(
        self,
        parameter: Tensor,
        x: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        anchor_dots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and its terms without their weights.

        Args:
            parameter: what is trained.
            x: image features, [B, D].
            labels: [B].
            generator: draws the path points of grid "random".
            anchor_dots: :meth:`anchor_products` of x, where they are known, [K, B, C].

        Returns:
            The loss, differentiable in ``parameter``, and [2 + K] terms, named by ``term_names``.
        """
        return together([self], [parameter], [(x, labels, generator, anchor_dots)])[0]

    def anchor_products(self, x: Tensor) -> Tensor | None:
        """``x @ anchors.T``, [K, B, C], which can be made once for all features; None where it is not needed."""
        if self.anchors is None or self.space != "embedding":
            return None
        return products_with(self.anchors, x)

    def _loss_at(
        self,
        w: Tensor,
        x: Tensor,
        labels: Tensor,
        alphas: Tensor | None = None,
        anchor_dots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Endpoint and surrogate, and with ``alphas`` the paths to the anchors, from the class weights w [C, D]."""
        anchors, betas = (w.new_empty(0, *w.shape), w.new_empty(0)) if alphas is None else self._paths
        loss, terms = ops.lmc_loss(
            inputs(x, w),
            labels,
            w,
            anchors,
            w.new_empty(0) if alphas is None else alphas,
            betas,
            scale=self.scale,
            w1=self.w1 if self._is_diagonal else None,
            curvature=self.curvature,
            lam=self.lam,
            normalize=self.normalize,
            anchor_dots=anchor_dots,
            backend=self.backend,
        )
        if self.w1 is None or self._is_diagonal:
            return loss, terms
        if self.surrogate == "cosine":
            surrogate = (1 - F.cosine_similarity(w, self.w1, dim=-1)).mean()
        else:
            ends = (F.normalize(w, dim=-1), F.normalize(self.w1, dim=-1)) if self.normalize else (w, self.w1)
            surrogate = torch.linalg.vector_norm(ends[0] - ends[1], dim=-1).mean()
        return loss + self.lam * surrogate, torch.cat([terms[:1], surrogate.detach()[None].to(terms), terms[2:]])

    def _alphas(self, generator: torch.Generator | None) -> Tensor | None:
        """The path points of a step, [N]; None where there are no paths."""
        if self.anchors is None or self.alphas is not None:
            return self.alphas
        return torch.rand(self.points, generator=generator, dtype=torch.float64)

    def _stack(self, parameter: Tensor, alphas: Tensor | None) -> Tensor:
        """What a step encodes, [P, ...]: the parameter, and behind it the points of its paths in space "parameter"."""
        if alphas is None or self.space == "embedding":
            return parameter[None]
        t = alphas.to(parameter).view(1, len(alphas), *(1,) * parameter.ndim)
        anchors, _ = self._paths
        path = anchors[:, None] + t * (parameter - anchors[:, None])
        return torch.cat([parameter[None], path.flatten(0, 1)])

    def _loss(
        self, weights: Tensor, x: Tensor, labels: Tensor, alphas: Tensor | None, anchor_dots: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss and its terms from the class weights of :meth:`_stack`, [P, C, D]."""
        if alphas is None or self.space == "embedding":
            return self._loss_at(weights[0], x, labels, alphas, anchor_dots)
        # Every point's class weights come from the encoder itself, all points in one call: the definition of LMC.
        loss, terms = self._loss_at(weights[0], x, labels)
        unit = F.normalize(weights[1:], dim=-1) if self.normalize else weights[1:]
        logits = self.scale * torch.einsum("bd,pcd->pbc", inputs(x, unit), unit)
        points = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(unit)), reduction="none")
        anchors, betas = self._paths
        points = points.view(len(anchors), -1).mean(1)
        return loss + (betas.to(points) * points).sum(), torch.cat([terms, points.detach()])

    @property
    def _paths(self) -> tuple[Tensor, Tensor]:
        """The anchors and the weights of their paths, where there are paths."""
        if self.anchors is None or self.betas is None:
            raise ValueError("anchors and betas must be given where there are path points, got None")
        return self.anchors, self.betas

    @property
    def _is_diagonal(self) -> bool:
        """Whether the fused op computes the surrogate: on unit norm, 1 - cos is the identity's 1/2 |t - t1|^2."""
        return self.surrogate in ("identity", "fisher") or (self.surrogate == "cosine" and self.normalize)


def products_with(anchors: Tensor, x: Tensor) -> Tensor:
    """Features [B, D] times the anchors' class weights [K, C, D], [K, B, C]."""
    return inputs(x, anchors) @ anchors.mT


Batch = tuple[Tensor, Tensor, torch.Generator | None, Tensor | None]
"""What a call of an objective takes behind the parameter."""


def together(
    objectives: Sequence[Objective], parameters: Sequence[Tensor], batches: Sequence[Batch]
) -> list[tuple[Tensor, Tensor]]:
    """What each objective gives for its own parameter and batch, with one call of the encoder that all of them share.

    Returns:
        Loss and terms of each, as :meth:`Objective.__call__` does.
    """
    alphas = [objective._alphas(batch[2]) for objective, batch in zip(objectives, batches, strict=True)]
    stacks = [objective._stack(w, points) for objective, w, points in zip(objectives, parameters, alphas, strict=True)]
    encode, sizes = objectives[0].encode, [len(stack) for stack in stacks]
    # One alone is not copied: a head is its own class weights, and they may be many.
    weights = encode(torch.cat(stacks)).split(sizes) if len(stacks) > 1 else [encode(stacks[0])]
    return [
        objective._loss(w, x, labels, points, dots)
        for objective, w, (x, labels, _, dots), points in zip(objectives, weights, batches, alphas, strict=True)
    ]


def path_points(grid: str | Sequence[float], points: int) -> Tensor | None:
    """The points a_n of a path; 0 is the fine-tuned solution, 1 is w.

    Args:
        grid: "even": ``points`` evenly spaced in [0, 1) (the paper); "official": ``arange(0.1, 1.01, 1 / points)``, the
            official code's: .1 .3 .5 .7 .9 for 5, but fewer points than asked for from 12 on, and for some the
            last a hair above 1; "random": uniform, new at every step; or the points themselves.
        points: N; not used with points of your own.

    Returns:
        float64 [N], or None for "random".
    """
    if not isinstance(grid, str):
        if not isinstance(grid, Sequence | np.ndarray | Tensor):
            raise TypeError(f"grid must be one of {', '.join(PATH_GRIDS)} or a list of points, got {grid!r}")
        own = torch.as_tensor(list(grid), dtype=torch.float64)
        if own.ndim != 1 or not len(own):
            raise ValueError("grid must hold at least one path point, got none")
        if not ((own >= 0) & (own <= 1)).all():
            raise ValueError(f"grid must hold path points in [0, 1], got {own.tolist()}")
        return own
    if grid not in PATH_GRIDS:
        raise ValueError(f"grid must be one of {', '.join(PATH_GRIDS)} or a list of points, got {grid!r}")
    if not isinstance(points, Integral) or isinstance(points, bool) or points < 1:
        raise ValueError(f"points must be a whole number of at least 1, got {points!r}")
    if grid == "random":
        return None
    values = np.arange(points) / points if grid == "even" else np.arange(0.1, 1.01, 1 / points)
    return torch.from_numpy(values)
