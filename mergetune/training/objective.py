"""The LMC objective of both stages: cross-entropy, surrogate of the zero-shot path, and paths to fine-tuned anchors.

    L(w) = CE(w) + lam * S(w; w1) + sum_k beta_k * mean_n CE(w2_k + a_n (w - w2_k))        (arXiv 2601.10497)

w is the trained solution, w1 the zero-shot solution, w2_k an anchor (a fine-tuned solution), a_n a path point.

Shapes: B images of a batch, C classes, D embedding width, K anchors, N points per path, M settings of a stacked state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune import ops
from mergetune.facts.brief import brief
from mergetune.facts.function_options import PATH_GRIDS
from mergetune.solutions import Space, State, inputs


@dataclass(frozen=True, eq=False)
class Anchors:
    """The fine-tuned solutions w2, from which the paths lead to the trained solution.

    Attributes:
        classes: class features of the anchors, [K, C, D], for space "embedding".
        betas: weight of each path, [K].
        alphas: fixed path points, [N]; None draws uniform random points in every step.
        points: N, the number of random points.
        images: function of the inputs of B images that returns the anchors' image features, [K, B, D], for space
            "embedding"; None if solutions of this kind leave image features unchanged.
        state: the anchors as one stacked state, for space "parameter"; None selects space "embedding".
    """

    classes: Tensor
    betas: Tensor
    alphas: Tensor | None
    points: int
    images: Callable[[Tensor], Tensor] | None = None
    state: State | None = None

    def __len__(self) -> int:
        return len(self.classes)

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """The path points of one step, [N]."""
        if self.alphas is not None:
            return self.alphas
        return torch.rand(self.points, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Near:
    """The surrogate S(w; w1): how far the trained solution is from the zero-shot solution w1.

    The surrogate is measured on class embeddings (then ``classes`` is set) or on states (then ``distance`` is set).

    Attributes:
        lam: weight of the surrogate.
        surrogate: one of ``SURROGATES``, on class embeddings: "identity" and "fisher" have a diagonal H; "cosine" and
            "l2" come from the official code.
        classes: class features of w1, [C, D].
        curvature: the diagonal H of "fisher", [C, D].
        distance: function of stacked states that returns the surrogate on states, [M].
        name: name of the term in the history of a run.
    """

    lam: float
    surrogate: str = "identity"
    classes: Tensor | None = None
    curvature: Tensor | None = None
    distance: Callable[[State], Tensor] | None = None
    name: str = "surrogate"


@brief()
@dataclass(frozen=True, eq=False)
class Objective:
    """The loss as a function of a solution's state and a batch. Without anchors and surrogate: plain cross-entropy.

    The objective uses only the functions of :class:`mergetune.solutions.Space`, so it serves every kind of solution.

    Attributes:
        space: the space of the trained solution.
        anchors: the fine-tuned solutions and their paths, or None.
        near: the surrogate of the zero-shot path, or None.
        backend: implementation of the fused loss, see :func:`mergetune.ops.lmc_loss`.
    """

    space: Space
    anchors: Anchors | None = None
    near: Near | None = None
    backend: str | None = None

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms that a call returns."""
        paths = 0 if self.anchors is None else len(self.anchors)
        return (
            "endpoint",
            "surrogate" if self.near is None else self.near.name,
            *(f"path_{k + 1}" for k in range(paths)),
        )

    @property
    def settings(self) -> int:
        """Number of states that one step encodes as class features: w and, in space "parameter", every path point."""
        anchors = self.anchors
        if anchors is None or anchors.state is None:
            return 1
        return 1 + len(anchors) * (anchors.points if anchors.alphas is None else len(anchors.alphas))

    def __call__(
        self,
        state: State,
        x: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        anchor_dots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss and its terms on a batch.

        Args:
            state: the trained state.
            x: image features, [B, D], or the image inputs of the solution's kind.
            labels: class indices, [B].
            generator: random generator of the path points of grid "random".
            anchor_dots: :meth:`anchor_products` of x, [K, B, C], if already computed.

        Returns:
            The loss, differentiable in ``state``, and the detached terms without their weights, [2 + K], in the order
            of ``term_names``.
        """
        return together([self], [state], [(x, labels, generator, anchor_dots)])[0]

    def anchor_products(self, x: Tensor) -> Tensor | None:
        """``x @ anchors.T``, [K, B, C], which can be computed once for all features; None if the loss needs none."""
        if self.anchors is None or self.anchors.state is not None or self.space.images is not None:
            return None
        return products_with(self.anchors.classes, x)

    # -- one step ------------------------------------------------------------------------------------------------------

    def stack(self, state: State, alphas: Tensor | None) -> list[State]:
        """Stacked states that one step encodes: the state and, in space "parameter", the points of each path."""
        end = {name: tensor[None] for name, tensor in state.items()}
        if alphas is None or self.anchors is None or self.anchors.state is None:
            return [end]
        found = [end]
        for k in range(len(self.anchors)):
            anchor = {name: tensor[k : k + 1] for name, tensor in self.anchors.state.items()}
            found.append(self.space.between(anchor, end, alphas))
        return found

    def loss(
        self, states: list[State], classes: list[Tensor], x: Tensor, labels: Tensor, alphas: Tensor | None,
        anchor_dots: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss and its terms, from encoded class features.

        Args:
            states: result of :meth:`stack`.
            classes: class features of each stacked state, [M, C, D] each.
            x, labels: the batch.
            alphas: path points, [N]; None without anchors.
            anchor_dots: see :meth:`__call__`.
        """
        anchors, space = self.anchors, self.space
        w = classes[0][0]
        near, distance = (None, None) if self.near is None else (self.near, self.near.distance)
        diagonal = near is not None and near.classes is not None and self._is_diagonal
        fused = anchors is not None and alphas is not None and anchors.state is None and space.images is None
        features = space.features(states[0], x)
        loss, terms = ops.lmc_loss(
            inputs(features if space.images is None else features[0], w),
            labels,
            w,
            anchors.classes if anchors is not None and fused else w.new_empty(0, *w.shape),
            alphas if alphas is not None and fused else w.new_empty(0),
            anchors.betas if anchors is not None and fused else w.new_empty(0),
            scale=space.scale,
            w1=near.classes if near is not None and diagonal else None,
            curvature=None if near is None else near.curvature,
            lam=near.lam if near is not None and diagonal else 0.0,
            normalize=space.normalize,
            anchor_dots=anchor_dots,
            backend=self.backend if space.images is None else "torch",  # the others give images no gradient
        )
        if near is not None and not diagonal:
            surrogate = self._surrogate(w) if distance is None else distance(states[0])[0]
            loss = loss + near.lam * surrogate
            terms = torch.cat([terms[:1], surrogate.detach()[None].to(terms), terms[2:]])
        if anchors is None or alphas is None or fused:
            return loss, terms
        if anchors.state is None:
            points = self._embedding_paths(anchors, w, features, x, labels, alphas)
        else:
            points = torch.stack(
                [
                    self._points(weights, space.features(state, x), labels).mean()
                    for state, weights in zip(states[1:], classes[1:], strict=True)
                ]
            )
        return loss + (anchors.betas.to(points) * points).sum(), torch.cat([terms, points.detach()])

    def _points(self, weights: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy at each of M points, [M].

        Args:
            weights: class features of the points, [M, C, D].
            features: image features, [B, D] or [M, B, D].
            labels: class indices, [B].
        """
        unit = self.space.unit(weights)
        x = inputs(features, unit)
        logits = self.space.scale * x @ unit.mT
        repeated = labels.repeat(len(logits))
        return F.cross_entropy(logits.flatten(0, 1), repeated, reduction="none").view(len(logits), -1).mean(1)

    def _embedding_paths(
        self, anchors: Anchors, w: Tensor, features: Tensor, x: Tensor, labels: Tensor, alphas: Tensor
    ) -> Tensor:
        """Mean cross-entropy over the points of each path, [K], if image features differ between the ends of a path."""
        t = alphas.to(w).view(-1, 1, 1)
        assert anchors.images is not None  # the trained solution changes images, and its anchors are of its form
        theirs = anchors.images(x)
        found = []
        for k in range(len(anchors)):
            weights = anchors.classes[k] + t * (w - anchors.classes[k])
            images = F.normalize(theirs[k] + t * (features[0] - theirs[k]), dim=-1)
            found.append(self._points(weights, images, labels).mean())
        return torch.stack(found)

    def _surrogate(self, w: Tensor) -> Tensor:
        """Distance "cosine" or "l2" of class features [C, D] to those of w1, as in the official code."""
        near = self.near
        assert near is not None and near.classes is not None
        if near.surrogate == "cosine":
            return (1 - F.cosine_similarity(w, near.classes, dim=-1)).mean()
        return torch.linalg.vector_norm(self.space.unit(w) - self.space.unit(near.classes), dim=-1).mean()

    @property
    def _is_diagonal(self) -> bool:
        """Whether the fused op computes the surrogate. For unit-norm t, "cosine" equals "identity", 1/2 |t - t1|^2."""
        surrogate = "" if self.near is None else self.near.surrogate
        return surrogate in ("identity", "fisher") or (surrogate == "cosine" and self.space.normalize)


def products_with(anchors: Tensor, x: Tensor) -> Tensor:
    """Products of features [B, D] with the class features of the anchors [K, C, D]: [K, B, C]."""
    return inputs(x, anchors) @ anchors.mT


Batch = tuple[Tensor, Tensor, torch.Generator | None, Tensor | None]
"""The arguments of an objective after the state: image inputs, labels, generator, anchor products."""


def together(
    objectives: Sequence[Objective], states: Sequence[State], batches: Sequence[Batch]
) -> list[tuple[Tensor, Tensor]]:
    """Evaluate each objective on its state and batch, with one text-tower call for all of them.

    Args:
        objectives: objectives that share a text encoder.
        states: one state per objective.
        batches: one batch per objective.

    Returns:
        Loss and terms of each objective, as :meth:`Objective.__call__` returns them.
    """
    alphas = [
        None if objective.anchors is None else objective.anchors.draw(batch[2])
        for objective, batch in zip(objectives, batches, strict=True)
    ]
    stacks = [objective.stack(w, points) for objective, w, points in zip(objectives, states, alphas, strict=True)]
    classes = iter(_classes(objectives[0].space, [state for stack in stacks for state in stack]))
    return [
        objective.loss(stack, [next(classes) for _ in stack], x, labels, points, dots)
        for objective, stack, (x, labels, _, dots), points in zip(objectives, stacks, batches, alphas, strict=True)
    ]


def _classes(space: Space, states: Sequence[State]) -> list[Tensor]:
    """Class features of each stacked state; states of the same shape are encoded in one call."""
    if len(states) == 1:  # without a copy, since the class features of a head may be large
        return [space.classes(states[0])]
    groups: dict[tuple, list[int]] = {}
    for i, state in enumerate(states):
        groups.setdefault(tuple(tensor.shape[1:] for tensor in state.values()), []).append(i)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        joined = {name: torch.cat([states[i][name] for i in members]) for name in states[members[0]]}
        sizes = [len(next(iter(states[i].values()))) for i in members]
        made = space.classes(joined)
        made = made.expand(sum(sizes), -1, -1) if len(made) == 1 else made  # they may be the same for all states
        found |= dict(zip(members, made.split(sizes), strict=True))
    return [found[i] for i in range(len(states))]


def path_points(grid: str | Sequence[float], points: int) -> Tensor | None:
    """The points a_n of a path, where 0 is the fine-tuned solution and 1 is the trained solution w.

    Args:
        grid: one of these names, or a list of points in [0, 1]:

            - "even": N evenly spaced points in [0, 1), as in the paper;
            - "official": ``arange(0.1, 1.01, 1 / N)`` as in the official code. N = 5 gives .1 .3 .5 .7 .9; from N = 12
              on there are fewer than N points, and for some N the last point lies slightly above 1;
            - "random": uniform random points, drawn in every step.
        points: N; not used with a list of points.

    Returns:
        Points, [N] float64, or None for "random".

    Raises:
        TypeError: ``grid`` is neither a name nor a list.
        ValueError: an unknown name, points outside [0, 1], or N below 1.

    Example:
        >>> from mergetune.training.objective import path_points
        >>> path_points("even", 5).tolist()
        [0.0, 0.2, 0.4, 0.6, 0.8]
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
