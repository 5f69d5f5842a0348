"""Averages of weights against plain definitions."""

import math

import numpy as np
import pytest
import torch
from merging_cases import (
    EMPTY,
    SHAPES,
    arrays,
    close,
    draw,
    each,
    models,
    positive,
    short_stretches,  # noqa: F401
)

from mergetune import merging as m


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_average(weights: list[float] | None) -> None:
    base, experts = models()
    close(m.average(None, experts, weights=weights), each(lambda n, b, e: np.average(e, 0, weights), base, experts))
    assert torch.equal(m.average(base, experts)["scale"], m.average(None, experts)["scale"])


def test_wise_ft() -> None:
    base, experts = models(1)
    close(m.wise_ft(base, experts), each(lambda n, b, e: (b + e[0]) / 2, base, experts))
    close(m.wise_ft(base, experts, alpha=0.2), each(lambda n, b, e: 0.8 * b + 0.2 * e[0], base, experts))


@pytest.mark.parametrize("far", [1.0, 0.2])
def test_slerp_walks_the_arc(far: float) -> None:
    def arc(name: str, a: np.ndarray, e: np.ndarray) -> np.ndarray:
        a, b = (v / np.linalg.norm(v) for v in (a, e[0]))
        angle = np.arccos(np.clip((a * b).sum(), -1, 1))
        if np.isclose(abs((a * b).sum()), 1):
            return 0.7 * a + 0.3 * b
        other = b - (a * b).sum() * a  # the direction in which the arc starts
        return np.cos(0.3 * angle) * a + np.sin(0.3 * angle) * other / np.linalg.norm(other)

    ends = [draw(1), {n: far * draw(2)[n] + (1 - far) * t if n in SHAPES else t for n, t in draw(1).items()}]
    base, other = ({n: t / t.norm() if n in SHAPES else t for n, t in s.items()} for s in ends)
    expected = each(arc, base, [other])
    close(m.slerp(base, [other], t=0.3), expected)
    close(m.slerp(None, [base, other], t=0.3), expected)


def test_slerp_of_parallel_and_of_zero_is_straight() -> None:
    base = draw(1)
    double = {n: 2 * t if n in SHAPES else t for n, t in base.items()}
    close(m.slerp(base, [double], t=0.25), each(lambda n, b, e: 1.25 * b, base, [double]))
    zero = {n: 0 * t if n in SHAPES else t for n, t in base.items()}
    close(m.slerp(base, [zero], t=0.25), each(lambda n, b, e: 0.75 * b, base, [zero]))
    near = [{n: t + 0.01 * draw(2)[n] if n in SHAPES else t for n, t in base.items()}]
    close(m.slerp(base, near, t=0.25), arrays(m.wise_ft(base, near, alpha=0.25)))


@pytest.mark.parametrize("count", [2, 4])
def test_model_stock(count: int) -> None:
    base, experts = models(count)
    experts = [{n: t + draw(9)[n] * 0.2 if n in SHAPES else t for n, t in e.items()} for e in experts]  # a common part
    experts[0]["blocks.0.bias"] = base["blocks.0.bias"]  # one expert stayed
    for k, expert in enumerate(experts):  # nearly nothing: the floor of the product of norms
        expert["blocks.1.weight"] = base["blocks.1.weight"] + 1e-5 * draw(k)["blocks.1.weight"]

    def rule(name: str, b: np.ndarray, e: np.ndarray) -> np.ndarray:
        taus, cosines = e - b, []
        for i in range(count):
            for j in range(i):
                norms = np.linalg.norm(taus[i]) * np.linalg.norm(taus[j])
                cosines.append(np.clip((taus[i] * taus[j]).sum() / max(norms, 1e-6), -1, 1))
        below = 1 + (count - 1) * np.mean(cosines)
        t = count * np.mean(cosines) / below if below > 1e-9 else 0  # two numbers may be opposite
        return t * e.mean(0) + (1 - t) * b

    close(m.model_stock(base, experts), each(rule, base, experts))


def test_model_stock_is_the_mean_of_what_agrees_and_the_base_where_nothing_does() -> None:
    base = {"same": torch.zeros(3), "right angle": torch.zeros(2), "opposite": torch.zeros(2), "still": torch.ones(2)}
    moved = {"same": torch.tensor([1.0, 2, 3]), "right angle": torch.tensor([1.0, 0]), "opposite": torch.ones(2)}
    other = {"same": torch.tensor([3.0, 6, 9]), "right angle": torch.tensor([0, 4.0]), "opposite": -3 * torch.ones(2)}
    got = m.model_stock(base, [base | moved, base | other])
    torch.testing.assert_close(got["same"], torch.tensor([2.0, 4, 6]))
    assert all(torch.equal(got[name], base[name]) for name in ("right angle", "opposite", "still"))


def plain_fisher_average(
    e: np.ndarray, f: np.ndarray, weights: list[float], norms: list[float], floor: float, first: bool
) -> np.ndarray:
    """Expert by expert: floors first, then the coefficients; the weights alone where nothing is left."""
    above, below = np.zeros_like(e[0]), np.zeros_like(e[0])
    for k, weight in enumerate(weights):
        raised = np.maximum(f[k], floor) if k == 0 or not first else f[k]
        above, below = above + weight / norms[k] * raised * e[k], below + weight / norms[k] * raised
    with np.errstate(invalid="ignore"):
        return np.where(below > 0, above / below, np.average(e, 0, weights))


@pytest.mark.parametrize("normalize", [None, "norm"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 0.5, 2.0], [0.0, 1.0, 0.5]])
def test_fisher_average(normalize: str | None, first: bool, weights: list[float]) -> None:
    """Norms far from 1, a floor that half of the values are below, and elements without any Fisher."""
    base, experts = models()
    fishers = [{n: 10.0 ** (k - 1) * t for n, t in positive(k + 10).items()} for k in range(3)]
    for fisher in fishers:
        fisher["blocks.0.weight"][:3] = 0
    norms = [math.sqrt(sum((f[n] ** 2).sum() for n in SHAPES)) if normalize else 1 for f in fishers]

    def rule(name: str, b: np.ndarray, e: np.ndarray) -> np.ndarray:
        f = np.stack([fisher[name].numpy() for fisher in fishers])
        return plain_fisher_average(e, f, weights, norms, 0.5, first)

    options = {"weights": weights, "floor": 0.5, "normalize": normalize} | ({} if first else {"favor_first": False})
    close(m.fisher_average(None, experts, fishers=fishers, **options), each(rule, base, experts))


@pytest.mark.parametrize("normalize", [None, "norm"])
def test_fisher_average_of_nothing_known_is_the_first_or_the_plain_average(normalize: str | None) -> None:
    base, experts = models()
    options = {"fishers": [{n: 0 * t for n, t in e.items() if n in SHAPES or n == EMPTY} for e in experts]}
    options["normalize"] = normalize
    close(m.fisher_average(None, experts, **options), arrays(experts[0]))
    mean = each(lambda n, b, e: e.mean(0), base, experts)
    close(m.fisher_average(None, experts, favor_first=False, **options), mean)
    others = each(lambda n, b, e: np.average(e, 0, [0, 1, 3]), base, experts)
    close(m.fisher_average(None, experts, weights=[0, 1, 3], **options), others)


@pytest.mark.parametrize(
    ("higher", "penalty", "weights"),
    [(False, 1, [1 / 0.5, 1 / 0.25, 1 / 2]), (True, 2, [0.5**2, 0.25**2, 2**2]), (False, 0, [1, 1, 1])],
)
def test_metrics_average(higher: bool, penalty: float, weights: list[float]) -> None:
    base, experts = models()
    got = m.metrics_average(None, experts, metrics=[0.5, 0.25, 2], higher_is_better=higher, penalty=penalty)
    close(got, each(lambda n, b, e: np.average(e, 0, weights), base, experts))
