"""The objective written down anew in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tiny import state_of
from torch import Tensor

from mergetune.solutions import Solution, Space
from mergetune.training.objective import Anchors, Near, Objective

DOUBLE = torch.float64
BATCH, CLASSES, WIDTH = 9, 4, 6
NAMES = ("cat", "hot-air balloon", "dog", "sea lion")
GRID_POINTS = {"even": [0, 0.25, 0.5, 0.75], "official": [0.1, 0.35, 0.6, 0.85], "own": [1.0, 0.2, 0.0]}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def unit(t: Tensor) -> Tensor:
    return t / t.norm(dim=-1, keepdim=True)


# -- the independent implementation ------------------------------------------------------------------------------------


@dataclass
class Expected:
    """L(w) = CE(w) + lam S(w; w1) + sum_k beta_k mean_n CE(w2_k + a_n (w - w2_k)), in float64.

    ``logits`` of class weights t are ``scale * x @ t.T``; ``encode`` turns one parameter into class weights.
    """

    encode: Callable[[Tensor], Tensor]
    scale: float
    normalize: bool
    anchors: list[Tensor]  # parameters
    betas: list[float]
    alphas: list[float]
    w1: Tensor
    lam: float
    surrogate: str
    space: str
    curvature: Tensor | None = None

    def __call__(self, parameter: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        weights = self.encode(parameter)
        terms = [self.cross_entropy(weights, x, labels), self.distance(weights)]
        for anchor in self.anchors:
            points = []
            for a in self.alphas:
                if self.space == "parameter":
                    t = self.encode((1 - a) * anchor + a * parameter)
                else:
                    t = (1 - a) * self.encode(anchor) + a * weights
                points.append(self.cross_entropy(t, x, labels))
            terms.append(sum(points) / len(points))
        loss = terms[0] + self.lam * terms[1] + sum(b * t for b, t in zip(self.betas, terms[2:], strict=True))
        return loss, terms

    def cross_entropy(self, t: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        x = x if x.shape[1] == t.shape[1] else F.pad(x, (0, 1), value=1.0)  # the bias is the weight of a constant 1
        logits = self.scale * x @ (unit(t) if self.normalize else t).T
        return -logits.log_softmax(1)[torch.arange(len(x)), labels].mean()

    def distance(self, t: Tensor) -> Tensor:
        t1 = self.w1
        if self.surrogate == "cosine":
            return (1 - (unit(t) * unit(t1)).sum(1)).mean()
        apart = unit(t) - unit(t1) if self.normalize else t - t1
        if self.surrogate == "l2":
            return apart.norm(dim=1).mean()
        return (0.5 * (1 if self.surrogate == "identity" else self.curvature) * apart**2).sum(1).mean()


def objective_of(
    encode: Callable[[Tensor], Tensor],
    *,
    scale: float,
    normalize: bool,
    anchors: Tensor | None = None,
    betas: Tensor | None = None,
    alphas: Tensor | None = None,
    points: int = 0,
    space: str = "embedding",
    w1: Tensor | None = None,
    lam: float = 0.0,
    surrogate: str = "identity",
    curvature: Tensor | None = None,
    backend: str | None = None,
    name: str = "values",
) -> Objective:
    """The objective of states with one tensor, which ``encode`` turns into class features."""
    made = Space(
        classes=lambda states: encode(states[name]),
        images=None,
        between=Solution.straight,
        scale=scale,
        normalize=normalize,
        width=WIDTH,
    )
    paths = None
    if anchors is not None:
        state = {name: anchors} if space == "parameter" else None
        paths = Anchors(encode(anchors) if state else anchors, betas, alphas, points, state=state)
    near = None if w1 is None else Near(lam, surrogate, w1, curvature)
    return Objective(made, paths, near, backend)


def assert_agree(
    objective: Objective,
    expected: Expected,
    parameter: Tensor,
    x: Tensor,
    labels: Tensor,
    tolerance: float,
    draws: torch.Generator | None = None,
    like: Solution | None = None,
) -> None:
    """Loss, terms and the gradient to the parameter, which is the state of a solution, or has a name of its own."""
    leaf, truth = parameter.clone().requires_grad_(), parameter.double().requires_grad_()
    loss, terms = objective(state_of(like, leaf) if like else {"values": leaf}, x, labels, draws)
    expected_loss, expected_terms = expected(truth, x.double(), labels)
    assert len(terms) == len(expected_terms) == len(objective.term_names)
    pairs = {
        "loss": (loss, expected_loss),
        "terms": (terms, torch.stack(expected_terms)),
        "gradient": (torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected_loss, truth)[0]),
    }
    for name, (got, value) in pairs.items():
        assert got.shape == value.shape
        error = ((got.detach() - value.detach()).abs().max() / value.detach().abs().max()).item()
        assert error <= tolerance, f"{name}: relative error {error}"
    assert not terms.requires_grad


# -- by hand, with a tiny encoder in float64 ---------------------------------------------------------------------------


def batch(seed: int = 40) -> tuple[Tensor, Tensor]:
    return unit(draw(BATCH, WIDTH, seed=seed)), torch.randint(CLASSES, (BATCH,), generator=generator(seed))


# -- as fit() builds it ------------------------------------------------------------------------------------------------


def fisher_by_hand(x: Tensor, w1: Tensor, scale: float, normalize: bool, unit_mean: bool = True) -> Tensor:
    """h[c,d] = scale^2 mean_x p_c (1 - p_c) x_d^2, mean 1 or as it is."""
    x = x if x.shape[1] == w1.shape[1] else F.pad(x, (0, 1), value=1.0)
    h = torch.zeros_like(w1)
    for image in x:
        p = (scale * (unit(w1) if normalize else w1) @ image).softmax(0)
        for c in range(len(w1)):
            for d in range(w1.shape[1]):
                h[c, d] += scale**2 * p[c] * (1 - p[c]) * image[d] ** 2 / len(x)
    return h / h.mean() if unit_mean else h
