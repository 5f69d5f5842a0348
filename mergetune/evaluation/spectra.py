"""Curvature of the loss along the way through solutions: extreme eigenvalues of its Hessian, and their sum.

The text tower's hand-written backward gives first derivatives only, so a Hessian-vector product is the central
difference of two exact gradients in float64, both of one call.

Shapes: M points, C classes, D embedding width, n numbers in one point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mergetune.clip import FrozenClip, TextEncoder, TextParts
from mergetune.data import FeatureCache
from mergetune.evaluation.spans import ROWS, Span, span
from mergetune.solutions import Solution, inputs

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

STEP = 1e-6  # of the central difference, in parts of the point's norm
RESTARTS = 300  # of Lanczos


@dataclass(frozen=True)
class Spectrum:
    """Curvature at points of the way through some solutions.

    The Hessian is that of the mean cross-entropy with respect to what is interpolated. Its eigenvalues depend on how
    that is scaled: compare them along one way, not between the two spaces or between backbones.

    Attributes:
        positions: where, 0 at the first solution, 1 at the second, and so on.
        solutions: names of the solutions at positions 0, 1, ...
        highest: the largest eigenvalues at each position, descending.
        lowest: the smallest eigenvalue, negative where the loss bends downward.
        trace: estimated sum of all eigenvalues.
        trace_error: standard error of that estimate.
        gradient: norm of the gradient, which a quadratic surrogate around the point takes to be 0.
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
        return asdict(self)


def spectrum(
    clip: FrozenClip,
    solutions: Mapping[str, Solution],
    features: FeatureCache,
    *,
    points: int = 5,
    top: int = 3,
    probes: int = 8,
    space: str = "embedding",
    tol: float = 1e-3,
    seed: int = 1,
    progress: bool = True,
) -> Spectrum:
    """Extreme eigenvalues (Lanczos: ARPACK) and trace (Hutchinson) of the Hessian along the way through solutions.

    A point takes about 50 to 100 Hessian-vector products, each two float64 gradients over all the images. For a prompt
    of ViT-B/16 with 50 classes one is 1.5 s of a processor core in parameter space, 0.01 s in embedding space.

    Args:
        clip: the frozen CLIP of all solutions.
        solutions: two or more of one kind, by name, in the order in which the way goes through them.
        features: images with labels.
        points: evenly spaced on each straight piece, both its ends included.
        top: how many of the largest eigenvalues.
        probes: random vectors for the trace; the largest eigenvalues are taken exactly, the probes see the others.
        space: "embedding": with respect to class weights before their normalisation; "parameter": to what was trained.
        tol: relative accuracy of the largest eigenvalues; the smallest is right to tol times the spectrum's extent.
        seed: of Lanczos' start and of the probes.
        progress: show a bar where stderr is a terminal.

    Raises:
        RuntimeError: Lanczos does not converge.
    """
    if len(solutions) < 2:
        raise ValueError(f"solutions must be at least 2, got {len(solutions)}")
    if points < 2:
        raise ValueError(f"points must be at least 2, both ends, got {points}")
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    at = _exact(span(clip, tuple(solutions.values()), features, space=space, precision=torch.float64))
    size = at.ends[0].numel()
    if not 1 <= top < size:
        raise ValueError(f"top must lie in [1, {size - 1}], below the {size} numbers of a solution, got {top}")
    positions = np.linspace(0, len(solutions) - 1, (points - 1) * (len(solutions) - 1) + 1).tolist()
    rows = []
    for position in tqdm(positions, "curvature", unit="point", disable=None if progress else True):
        piece = min(int(position), len(solutions) - 2)
        start, end = at.ends[piece : piece + 2]
        point = torch.lerp(start, end, position - piece)
        gradient = _gradient(at, features)(point[None]).norm().item()
        rows.append((*_extremes(_operator(at, point, features), top, probes, tol, seed), gradient))
    highest, lowest, trace, trace_error, gradient = zip(*rows, strict=True)
    return Spectrum(tuple(positions), tuple(solutions), highest, lowest, trace, trace_error, gradient, size)


def hessian(
    clip: FrozenClip, solution: Solution, features: FeatureCache, *, space: str = "embedding"
) -> LinearOperator:
    """The Hessian of the mean cross-entropy at a solution, as scipy's ``LinearOperator`` of shape [n, n], float64.

    Args:
        clip: the solution's frozen CLIP.
        solution: the point.
        features: images with labels.
        space: "embedding": with respect to its class weights before their normalisation, flattened; "parameter": to
            what was trained, flattened.
    """
    at = _exact(span(clip, (solution,), features, space=space, precision=torch.float64))
    return _operator(at, at.ends[0], features)


def _operator(at: Span, point: Tensor, features: FeatureCache) -> LinearOperator:
    gradient, step = _gradient(at, features), STEP * point.norm().clamp_min(1e-12)

    def product(v: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)).view(point.shape).to(point.device)
        length = direction.norm()
        if length == 0:
            return np.zeros(point.numel())
        ahead, behind = gradient(torch.stack([point + step / length * direction, point - step / length * direction]))
        return ((ahead - behind) * (length / (2 * step))).flatten().cpu().numpy()

    return _linear_operator(point.numel(), product)


def _linear_operator(size: int, product: Callable[[np.ndarray], np.ndarray]) -> LinearOperator:
    from scipy.sparse.linalg import LinearOperator  # scipy takes a second to import, and only curvature needs it

    # __new__ returns an object of a subclass, whose __init__ takes these arguments; scipy has no annotations.
    return LinearOperator((size, size), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]


def _gradient(at: Span, features: FeatureCache) -> Callable[[Tensor], Tensor]:
    """Points [M, ...] -> gradients of the mean cross-entropy there, [M, ...]; each image is met once for all points."""

    def gradient(points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        encoded = at.encode(points)
        weights = encoded.detach().requires_grad_()
        for x, labels, _ in features.batches(ROWS):
            logits = at.scale * inputs(x.to(weights), weights) @ at.unit(weights).mT  # [M, B, C]
            labels = labels.to(weights.device).expand(len(weights), -1)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / len(features)).backward()
        return torch.autograd.grad(encoded, points, weights.grad)[0]

    return torch.enable_grad()(gradient)


def _extremes(
    operator: LinearOperator, top: int, probes: int, tol: float, seed: int
) -> tuple[tuple[float, ...], float, float, float]:
    """The largest eigenvalues, the smallest, the trace and its standard error."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    size, random = operator.shape[0], np.random.default_rng(seed)
    settings: dict[str, Any] = {"v0": random.standard_normal(size), "tol": tol, "maxiter": RESTARTS}
    try:
        values, vectors = eigsh(operator, top, which="LA", **settings)
        # Most eigenvalues lie close to 0, where Lanczos' relative accuracy is dear. Seen from the largest, the smallest
        # is the farthest, and as accurate as the spectrum's extent allows.
        far = max(values[-1], 0.0)
        shifted = _linear_operator(size, lambda v: operator.matvec(v) - far * v)
        lowest = eigsh(shifted, 1, which="LM", return_eigenvectors=False, **settings)[0] + far
    except ArpackNoConvergence as error:
        raise RuntimeError(f"Lanczos did not converge: tol must be larger, got {tol} ({error})") from error
    # Hutchinson on what the known eigenvectors leave (Hutch++, arXiv 2010.09649): unbiased for any basis of theirs.
    known = np.linalg.qr(vectors)[0]
    estimates = []
    for _ in range(probes):
        z = random.choice((-1.0, 1.0), size)
        z -= known @ (known.T @ z)
        estimates.append(z @ operator.matvec(z))
    trace, error = values.sum() + np.mean(estimates), np.std(estimates, ddof=1) / np.sqrt(probes)
    return tuple(sorted(values.tolist(), reverse=True)), float(lowest), float(trace), float(error)


class _ExactText(TextParts):
    """A text tower whose features stay float64; its own are rounded to float32, and differences need more."""

    def project(self, x: Tensor) -> Tensor:
        norm = self.ln_final
        if isinstance(norm, nn.LayerNorm):
            x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)
        else:
            x = norm(x)
        if isinstance(self.projection, nn.Linear):
            return self.projection(x)
        return x if self.projection is None else x @ self.projection


def _exact(at: Span) -> Span:
    if not isinstance(at.encode, TextEncoder):
        return at
    return replace(at, encode=replace(at.encode, text=_ExactText(**vars(at.encode.text))))
