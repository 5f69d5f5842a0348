"""Curvature of the loss along the path through solutions: extreme eigenvalues and trace of the Hessian.

Hessian-vector products are exact, in float64. The loss is f(p) = L(t(p)): p is the interpolated vector, t(p) are the
class weights in the logits, and L is the mean cross-entropy. With J = dt/dp and g = dL/dt,

    grad f = J^T g
    H v = J^T L'' (J v) + d<g, J v>/dp,    with g held constant.

The scalar <J^T g, v> equals <g, J v>. Its gradient with respect to g is J v, and its gradient with respect to p is the
second term of H v. One backward through the backward gives both, without any image. L'' needs no autograd: an image x
with logits scale * t x and softmax q adds scale * q * (dz - <q, dz>) x^T to L'' u, where dz = scale * u x; the sum over
images, which are read in batches, is divided by their number.

If image features depend on the point, too, H v is computed as the gradient of <grad f, v>, summed over images.

Shapes: B images, C classes, D embedding width, n values in one point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from mergetune.clip import FrozenClip
from mergetune.data import Batches
from mergetune.data.batches import check_holds
from mergetune.facts.brief import brief
from mergetune.io import hidden
from mergetune.solutions import Solution, Space, Span, State, inputs, span
from mergetune.solutions.space import ROWS, SHARES

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

RESTARTS = 300  # most restarts of Lanczos


@brief("solutions", "positions", "highest", "lowest", "trace")
@dataclass(frozen=True)
class Spectrum:
    """Curvature of the mean cross-entropy at points on the path through some solutions.

    The Hessian is taken with respect to the interpolated vector, and its eigenvalues depend on the scale of that
    vector. Compare eigenvalues along one path, not between the two spaces or between backbones.

    Attributes:
        positions: position of each point: 0 is the first solution, 1 the second, and so on.
        solutions: names of the solutions at positions 0, 1, ...
        highest: the largest eigenvalues at each point, descending.
        lowest: the smallest eigenvalue at each point; negative if the loss curves downward in some direction.
        trace: estimated trace (sum of all eigenvalues) at each point.
        trace_error: standard error of each trace estimate.
        gradient: norm of the gradient at each point; a quadratic surrogate around a point assumes 0.
        size: n, number of eigenvalues.
    """

    positions: tuple[float, ...]
    solutions: tuple[str, ...]
    highest: tuple[tuple[float, ...], ...]
    lowest: tuple[float, ...]
    trace: tuple[float, ...]
    trace_error: tuple[float, ...]
    gradient: tuple[float, ...]
    size: int

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)


def spectrum(
    clip: FrozenClip,
    solutions: Mapping[str, Solution],
    features: Batches,
    *,
    points: int = 5,
    top: int = 3,
    probes: int = 8,
    space: str = "embedding",
    tol: float = 1e-3,
    seed: int = 1,
    progress: bool = True,
) -> Spectrum:
    """Curvature of the loss along the path through solutions: extreme eigenvalues and trace of the Hessian.

    The Hessian is that of the mean cross-entropy. Lanczos (ARPACK) gives the eigenvalues, Hutchinson the trace.

    A point takes about 50 to 100 exact Hessian-vector products in float64. For a prompt of ViT-B/16 with 50 classes and
    800 images, one product takes about 1.7 s of a processor core in parameter space and 0.01 s in embedding space. In
    parameter space, the tower's activations are kept for all products of a point: 0.7 GB for these 50 classes, about
    11 GB for 1,000.

    Args:
        clip: the frozen CLIP of all solutions.
        solutions: name -> solution, two or more of one kind, in the order of the path.
        features: images with labels.
        points: number of evenly spaced points on each straight piece, including both ends of the piece.
        top: number of largest eigenvalues.
        probes: number of random vectors for the trace. The ``top`` eigenvalues are known, so the random vectors
            estimate only the sum of all other eigenvalues.
        space: the variables of the second derivative: "embedding" takes the class features before their
            normalisation, "parameter" the trained state.
        tol: relative accuracy of the largest eigenvalues. The smallest eigenvalue is accurate to tol times the
            difference between the largest and the smallest one.
        seed: seed of the start vector of Lanczos and of the probes.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError: too few solutions, points or probes, ``top`` out of range, or solutions whose kinds, shapes
            or texts differ, so that no straight line joins them.
        RuntimeError: Lanczos does not converge.

    Returns:
        A :class:`Spectrum`: per point the ``top`` largest eigenvalues, the smallest one and the estimated trace.

    Example:
        >>> import mergetune as mt, torch
        >>> clip = mt.load_clip("icon-clip")
        >>> names = ["cat", "dog"]
        >>> features = mt.FeatureCache.from_tensors(clip.class_embeddings(names), [0, 1], names)
        >>> ends = {text: mt.Head.zero_shot(clip, names, text) for text in ("an icon of a {}", "a {}")}
        >>> found = mt.spectrum(clip, ends, features, points=2, top=1)
        >>> found.positions, found.size, len(found.highest)
        ((0.0, 1.0), 256, 2)
    """
    if len(solutions) < 2:
        raise ValueError(f"solutions must be at least 2, got {len(solutions)}")
    if points < 2:
        raise ValueError(f"points must be at least 2, for both ends, got {points}")
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    at = _twice(clip, tuple(solutions.values()), features, space)
    ends = _flat(at)
    size = ends.shape[1]
    if not 1 <= top < size:
        raise ValueError(f"top must lie in [1, {size - 1}], below the number of eigenvalues, got {top}")
    positions = np.linspace(0, len(solutions) - 1, (points - 1) * (len(solutions) - 1) + 1).tolist()
    rows = []
    for position in tqdm(positions, "curvature", unit="point", disable=hidden(progress)):
        piece = min(int(position), len(solutions) - 2)
        point = torch.lerp(ends[piece], ends[piece + 1], position - piece)
        expansion = _expand(at, point, features, piece, position - piece)
        operator = _operator(point, expansion.product)
        rows.append((*_extremes(operator, top, probes, tol, seed), expansion.gradient.norm().item()))
    highest, lowest, trace, trace_error, gradient = zip(*rows, strict=True)
    return Spectrum(tuple(positions), tuple(solutions), highest, lowest, trace, trace_error, gradient, size)


def hessian(clip: FrozenClip, solution: Solution, features: Batches, *, space: str = "embedding") -> LinearOperator:
    """The Hessian of the mean cross-entropy at a solution, as a scipy ``LinearOperator`` of shape [n, n], float64.

    Args:
        clip: the frozen CLIP of the solution.
        solution: the point.
        features: images with labels.
        space: vector of the Hessian, flattened: "embedding" takes class features before their normalisation,
            "parameter" the trained state.
    """
    at = _twice(clip, (solution,), features, space)
    point = _flat(at)[0]
    return _operator(point, _expand(at, point, features).product)


def _twice(clip: FrozenClip, solutions: tuple[Solution, ...], features: Batches, space: str) -> Span:
    """The span of the solutions in float64, in a space that is differentiable twice."""
    for point in solutions:
        check_holds(features, point.image_input, point.kind)
    return span(clip, solutions, features.classnames, space=space, precision=torch.float64, backend="torch")


def _flat(at: Span) -> Tensor:
    """The ends as vectors p, [K, n]; derivatives are taken with respect to these."""
    return torch.cat([end.flatten(1) for name, end in at.ends.items() if name != SHARES], 1)


def _state(at: Span, vector: Tensor, shares: Tensor | None) -> State:
    """A vector p as a stacked state of one setting, with the given weights of the ends' image features."""
    found, begin = {}, 0
    for name, end in at.ends.items():
        if name == SHARES:
            assert shares is not None
            found[name] = shares
            continue
        size = end[0].numel()
        found[name] = vector[begin : begin + size].view(1, *end.shape[1:])
        begin += size
    return found


@dataclass(frozen=True, eq=False)
class _Expansion:
    """First and second derivative of the mean cross-entropy at a point; see the docstring of the file.

    Attributes:
        gradient: J^T g, [n].
        product: function v -> H v; both are [n].
    """

    gradient: Tensor
    product: Callable[[Tensor], Tensor]


def _expand(at: Span, point: Tensor, features: Batches, piece: int = 0, t: float = 0.0) -> _Expansion:
    """Derivatives at a point, which lies at ``t`` on the line from end number ``piece`` to the next end."""
    shares = at.ends.get(SHARES)
    if shares is not None:
        shares = torch.lerp(shares[piece], shares[min(piece + 1, len(shares) - 1)], t)[None]
    p = point.detach().requires_grad_()
    if at.space.images is None:
        return _expand_classes(at.space, p, _state(at, p, shares), features)
    return _expand_images(at, p, shares, features)


@torch.enable_grad()
def _expand_classes(space: Space, p: Tensor, state: State, features: Batches) -> _Expansion:
    """Derivatives if only class features depend on the point."""
    t = space.unit(space.classes(state))[0]
    loss = _ClassLoss(t.detach(), space.scale, features)
    g = loss.gradient().requires_grad_()
    (gradient,) = torch.autograd.grad(t, p, g, create_graph=True)  # J^T g, a function of p and linear in g

    def product(v: Tensor) -> Tensor:
        bent, along = torch.autograd.grad(
            gradient, (p, g), v, retain_graph=True, allow_unused=True, materialize_grads=True
        )  # d<g, J v>/dp and J v
        (straight,) = torch.autograd.grad(t, p, loss.product(along), retain_graph=True)
        return straight + bent

    return _Expansion(gradient.detach(), product)


def _expand_images(at: Span, p: Tensor, shares: Tensor | None, features: Batches) -> _Expansion:
    """Derivatives if image features depend on the point; every product reads all images again."""

    @torch.enable_grad()
    def total(of_part: Callable[[Tensor], Tensor]) -> Tensor:
        found = torch.zeros_like(p)
        for x, labels, _ in features.batches(ROWS):
            logits = at.space.logits(_state(at, p, shares), x)[0]
            loss = F.cross_entropy(logits, labels.to(p.device), reduction="sum") / len(features)
            (gradient,) = torch.autograd.grad(loss, p, create_graph=True)
            found += of_part(gradient)
        return found

    def bent(gradient: Tensor, v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, p, v, allow_unused=True, materialize_grads=True)[0]

    return _Expansion(total(Tensor.detach), lambda v: total(lambda gradient: bent(gradient, v)))


@dataclass(frozen=True, eq=False)
class _ClassLoss:
    """L, the mean cross-entropy as a function of the class weights t in the logits; images are read in batches."""

    t: Tensor  # [C, D]
    scale: float
    features: Batches

    def gradient(self) -> Tensor:
        """The gradient g = dL/dt, [C, D]."""
        total = torch.zeros_like(self.t)
        for x, labels, probabilities in self._parts():
            total += (probabilities - F.one_hot(labels, len(self.t))).T @ x
        return total * (self.scale / len(self.features))

    def product(self, u: Tensor) -> Tensor:
        """The product L'' u with a direction u, [C, D]."""
        total = torch.zeros_like(self.t)
        for x, _, probabilities in self._parts():
            logits = x @ u.T
            total += (probabilities * (logits - (probabilities * logits).sum(-1, keepdim=True))).T @ x
        return total * (self.scale**2 / len(self.features))

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of image features [B, D], labels [B] and softmax probabilities [B, C]."""
        for rows, labels, _ in self.features.batches(ROWS):
            x = inputs(rows.to(self.t), self.t)
            yield x, labels.to(self.t.device), (self.scale * x @ self.t.T).softmax(-1)


def _operator(point: Tensor, product: Callable[[Tensor], Tensor]) -> LinearOperator:
    """``product`` as a LinearOperator on flat arrays."""

    def flat(v: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)).view(point.shape).to(point.device)
        return product(direction).flatten().cpu().numpy()

    return _linear_operator(point.numel(), flat)


def _linear_operator(size: int, product: Callable[[np.ndarray], np.ndarray]) -> LinearOperator:
    from scipy.sparse.linalg import LinearOperator  # scipy takes a second to import, and only curvature needs it

    # __new__ returns an object of a subclass, whose __init__ takes these arguments; scipy has no annotations.
    return LinearOperator((size, size), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]


def _extremes(
    operator: LinearOperator, top: int, probes: int, tol: float, seed: int
) -> tuple[tuple[float, ...], float, float, float]:
    """The largest eigenvalues, the smallest one, the trace and its standard error."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    size, random = operator.shape[0], np.random.default_rng(seed)
    settings: dict[str, Any] = {"v0": random.standard_normal(size), "tol": tol, "maxiter": RESTARTS}
    try:
        values, vectors = eigsh(operator, top, which="LA", **settings)
        # Most eigenvalues lie close to 0, where relative accuracy takes many iterations. After a shift by the largest
        # eigenvalue, the smallest one has the largest magnitude, and tol is relative to the extent of the spectrum.
        far = max(values[-1], 0.0)
        shifted = _linear_operator(size, lambda v: operator.matvec(v) - far * v)
        lowest = eigsh(shifted, 1, which="LM", return_eigenvectors=False, **settings)[0] + far
    except ArpackNoConvergence as error:
        raise RuntimeError(f"tol must be larger, got {tol}, with which Lanczos did not converge ({error})") from error
    # Hutchinson on the complement of the known eigenvectors (Hutch++, arXiv 2010.09649): unbiased for any basis.
    known = np.linalg.qr(vectors)[0]
    estimates = []
    for _ in range(probes):
        z = random.choice((-1.0, 1.0), size)
        z -= known @ (known.T @ z)
        estimates.append(z @ operator.matvec(z))
    trace, error = values.sum() + np.mean(estimates), np.std(estimates, ddof=1) / np.sqrt(probes)
    return tuple(sorted(values.tolist(), reverse=True)), float(lowest), float(trace), float(error)
