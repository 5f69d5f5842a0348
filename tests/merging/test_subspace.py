"""Merging of matrices against plain definitions."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from merging_cases import (
    SHAPES,
    arrays,
    close,
    draw,
    each,
    lora,
    models,
    short_stretches,  # noqa: F401
)
from torch import Tensor

from mergetune import merging as m


def plain_scores(significance: np.ndarray, ratio: float, calibration: float) -> np.ndarray:
    scores = np.exp(significance) / np.exp(significance).sum(0)
    for k, row in enumerate(significance):
        for i, value in enumerate(row):
            if value > ratio * row.mean() + 1e-12:  # the middle rank is not above the mean
                scores[k, i] = calibration
    return scores


@pytest.mark.parametrize(
    "options",
    [{}, {"ratio": 1.4, "calibration": 0.7}, {"scale": 0.4}, {"calibration": 0.3, "scale": 0.8, "normalize": True}],
)
def test_widen(options: dict) -> None:
    base, experts = models()
    setting = {"ratio": 1.0, "calibration": 1.0} | {o: v for o, v in options.items() if o in ("ratio", "calibration")}

    def used(scores: np.ndarray) -> np.ndarray:
        return options.get("scale", 1) * (scores / scores.sum(0) if options.get("normalize") else scores)

    def ranked(values: np.ndarray) -> np.ndarray:
        return np.stack([[sum(o < v for o in row) / len(row) for v in row] for row in values])

    def rule(name: str, b: np.ndarray, e: np.ndarray) -> np.ndarray:
        if b.ndim < 2:
            taus = (e - b).reshape(3, -1)
            return b + (used(plain_scores(abs(taus), **setting)) * taus).sum(0).reshape(b.shape)
        matrices = [x.reshape(len(b), -1) for x in (b, *e)]
        if name == "token_embedding.weight":
            matrices = [x.T for x in matrices]
        lengths = np.stack([np.linalg.norm(x, axis=0) for x in matrices])
        units = [x / length for x, length in zip(matrices, lengths, strict=True)]
        turned = np.stack([1 - (units[0] * unit).sum(0) for unit in units[1:]])
        scores = plain_scores(ranked(abs(lengths[1:] - lengths[0])), **setting)
        scores = used((scores + plain_scores(ranked(turned), **setting)) / 2)
        merged = matrices[0] + sum(s * (x - matrices[0]) for s, x in zip(scores, matrices[1:], strict=True))
        return (merged.T if name == "token_embedding.weight" else merged).reshape(b.shape)

    close(m.widen(base, experts, **options), each(rule, base, experts))


def test_widen_steps_farther_with_more_experts_and_normalized_it_stays_between_them() -> None:
    base, experts = models(4)
    twins = {**base, "w": torch.randn(64, 400, generator=torch.Generator().manual_seed(0))}
    moved = {**twins, "w": twins["w"] + 0.1 * torch.randn(64, 400, generator=torch.Generator().manual_seed(1))}
    step = moved["w"] - twins["w"]
    for count in (2, 4):
        far = ((m.widen(twins, [moved] * count)["w"] - twins["w"]) * step).sum() / step.square().sum()
        assert far.item() == pytest.approx(count / 2 + 0.45, abs=0.2)
    torch.testing.assert_close(m.widen(twins, [moved] * 4, normalize=True)["w"], moved["w"])
    got = m.widen(base, experts, normalize=True, calibration=0.2)
    for name in SHAPES:
        together = torch.stack([e[name] for e in experts])
        assert (together.amin(0) - 1e-9 <= got[name]).all() and (got[name] <= together.amax(0) + 1e-9).all()


def test_widen_takes_the_rows_of_what_it_is_told() -> None:
    base, experts = models()
    renamed = [{"ctx": s["token_embedding.weight"]} for s in (base, *experts)]
    got = m.widen(renamed[0], renamed[1:], rows=("ctx",))["ctx"]
    assert torch.equal(got, m.widen(base, experts)["token_embedding.weight"])
    assert not torch.equal(got, m.widen(renamed[0], renamed[1:])["ctx"])


def inverse_root(gram: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(gram)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def test_tsv_m() -> None:
    base, experts = models()

    def rule(name: str, b: np.ndarray, e: np.ndarray) -> np.ndarray:
        taus = e - b
        if b.ndim != 2:
            return b + 0.8 * taus.mean(0)
        us, ss, vs = [], [], []
        for tau in taus:
            u, s, v = np.linalg.svd(tau)
            keep = min(b.shape) // 3
            us, ss, vs = [*us, u[:, :keep]], [*ss, s[:keep]], [*vs, v[:keep]]
        u, v = np.hstack(us), np.vstack(vs).T
        return b + 0.8 * (u @ inverse_root(u.T @ u)) @ np.diag(np.concatenate(ss)) @ (v @ inverse_root(v.T @ v)).T

    close(m.tsv_m(base, experts, scale=0.8), each(rule, base, experts), tolerance=1e-8)


def test_tsv_m_averages_matrices_that_are_too_thin() -> None:
    base = {"w": torch.zeros(2, 9)}
    experts = [{"w": draw(k)["blocks.0.weight"].reshape(-1)[:18].reshape(2, 9).float()} for k in range(3)]
    torch.testing.assert_close(m.tsv_m(base, experts)["w"], sum(e["w"] for e in experts) / 3)


def test_tsv_m_keeps_experts_that_do_not_meet() -> None:
    """Rank-one residuals in spaces of their own are orthogonal already: nothing is lost."""
    base = {"w": torch.zeros(4, 4)}
    experts = [{"w": torch.diag(torch.eye(4)[k] * (k + 1.0))} for k in range(2)]
    torch.testing.assert_close(m.tsv_m(base, experts)["w"], experts[0]["w"] + experts[1]["w"])


@pytest.mark.parametrize("project", [None, lambda name: "embedding" not in name])
@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.9])
def test_opcm(alpha: float, project: Callable[[str], bool] | None) -> None:
    """The authors' recursion: full decompositions, and the running average normalised at each step."""
    base, experts = models()
    b, es = arrays(base), [arrays(e) for e in experts]

    def norm(taus: dict[str, np.ndarray]) -> float:
        return math.sqrt(sum((t**2).sum() for t in taus.values()))

    taus = [{n: e[n] - b[n] for n in SHAPES} for e in es]
    merged, previous = taus[0], 1.0
    for step in range(1, 3):
        new = {}
        for name in SHAPES:
            tau = taus[step][name]
            if tau.ndim == 2 and (project is None or name != "token_embedding.weight"):
                u, s, v = np.linalg.svd(merged[name])
                split = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
                inner = u.T @ tau @ v.T
                np.fill_diagonal(inner, 0)
                inner[:split, :split] = 0
                tau = u @ inner @ v
            new[name] = previous * merged[name] + tau
        mean = np.mean([norm(t) for t in taus[: step + 1]])
        previous = norm(new) / mean
        merged = {name: t / previous for name, t in new.items()}
    options = {"project": project} if project else {}
    close(m.opcm(base, experts, alpha=alpha, **options), {n: b[n] + merged[n] for n in SHAPES}, tolerance=1e-8)


def test_opcm_leaves_alone_what_has_no_direction() -> None:
    """The first expert did not move a matrix: the second one's step must not lose its diagonal in a random basis."""
    base = {"w": torch.zeros(3, 3), "b": torch.zeros(2)}
    experts = [{"w": torch.zeros(3, 3), "b": torch.ones(2)}, {"w": torch.eye(3), "b": torch.zeros(2)}]
    got = m.opcm(base, experts)["w"]
    torch.testing.assert_close(got / got[0, 0], torch.eye(3))


def test_opcm_keeps_what_lies_elsewhere() -> None:
    """The second expert moved only directions in which the first one, of rank one, did not move at all."""
    turn = torch.linalg.qr(draw(3)["blocks.0.weight"][:5, :5])[0]
    first, second = (
        turn @ torch.diag(torch.tensor(d).double()) @ turn.T for d in ([3.0, 0, 0, 0, 0], [0, 2.0, 1, 4, 0])
    )
    got = m.opcm({"w": torch.zeros(5, 5).double()}, [{"w": first}, {"w": second}])["w"]
    expected = first + second
    torch.testing.assert_close(got / got.norm(), expected / expected.norm())


def product(state: dict[str, Tensor]) -> Tensor:
    return state["x.lora_B.weight"] @ state["x.lora_A.weight"]


def units_of(state: dict[str, Tensor]) -> Tensor:
    units = torch.cat([state["x.lora_A.weight"], state["x.lora_B.weight"].T], 1)
    return units[units[:, 0].argsort()]


def test_lora_lego_merges_what_is_alike() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    centres = 10 * torch.eye(9)[[0, 4, 8]] + torch.arange(3.0)[:, None]
    a, b = lora(1, 3, centres, 0.1), lora(2, 2, centres, 0.1)
    pool = torch.cat([units_of(a)[i : i + 1] for i in range(3)] + [units_of(b)])
    nearest = torch.cdist(pool, centres).argmin(1)
    groups = [pool[nearest == c] for c in range(3)]
    means = torch.stack([g.mean(0) for g in groups])
    heights = [sum(unit.abs().max() for unit in g) / len(g) for g in groups]
    stretched = torch.stack([h / g.mean(0).abs().max() * g.mean(0) for h, g in zip(heights, groups, strict=True)])
    plain = m.lora_lego(None, [a, b], norms=False, outputs=False)
    torch.testing.assert_close(units_of(plain), means[means[:, 0].argsort()])
    torch.testing.assert_close(units_of(m.lora_lego(None, [a, b])), stretched[stretched[:, 0].argsort()])
    two = m.lora_lego(None, [a, b], rank=2, norms=False)
    alone = m.lora_lego(None, [a, b], rank=2, norms=False, outputs=False)
    assert two["x.lora_A.weight"].shape == (2, 5) and two["x.lora_B.weight"].shape == (4, 2)
    torch.testing.assert_close(product(two), math.sqrt(3 / 2) * product(alone))


def test_lora_lego_of_twins_is_the_twin() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    expert = lora(1, 3, torch.randn(3, 9, generator=torch.Generator().manual_seed(5)))
    shuffled = {
        "x.lora_A.weight": expert["x.lora_A.weight"][[2, 0, 1]],
        "x.lora_B.weight": expert["x.lora_B.weight"][:, [2, 0, 1]],
    }
    torch.testing.assert_close(product(m.lora_lego(None, [expert, shuffled])), product(expert))


def test_lora_lego_of_experts_with_different_factors() -> None:
    """Twins, one of which has a quarter of the update in its factors and alpha / r = 4: the result's factor is 1."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    expert = lora(1, 3, torch.randn(3, 9, generator=torch.Generator().manual_seed(5)))
    small = {n: t / 2 for n, t in expert.items()}
    got = m.lora_lego(None, [small, expert], scales=[4, 1])
    torch.testing.assert_close(product(got), product(expert))
    other = lora(2, 2, torch.randn(3, 9, generator=torch.Generator().manual_seed(6)))
    before = [{n: math.sqrt(s) * t for n, t in e.items()} for s, e in ((0.5, expert), (2, other))]
    expected, got = m.lora_lego(None, before), m.lora_lego(None, [expert, other], scales=[0.5, 2])
    assert all(torch.equal(got[n], t) for n, t in expected.items())
