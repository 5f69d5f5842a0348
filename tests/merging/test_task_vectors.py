"""Task vectors against plain definitions."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from merging_cases import (
    EMPTY,
    SHAPES,
    arrays,
    close,
    each,
    models,
    positive,
    short_stretches,  # noqa: F401
)
from torch import Tensor

from mergetune import merging as m
from mergetune.merging import sources, task_vectors


def together(rule: Callable[..., np.ndarray], base: dict[str, Tensor], experts: list) -> dict[str, np.ndarray]:
    """A rule for one long vector, (base [D], task vectors [K, D]) -> merged [D]."""
    b, es = arrays(base), [arrays(e) for e in experts]
    flat = np.concatenate([b[name].ravel() for name in SHAPES])
    merged = rule(flat, np.stack([np.concatenate([e[name].ravel() for name in SHAPES]) for e in es]) - flat)
    pieces = np.split(merged, np.cumsum([b[name].size for name in SHAPES])[:-1])
    return {name: piece.reshape(b[name].shape) for name, piece in zip(SHAPES, pieces, strict=True)}


def long_vectors(rule: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A rule for one long vector as a rule for one tensor."""
    return lambda name, b, es: rule(b.ravel(), (es - b).reshape(len(es), -1)).reshape(b.shape)


@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 2.0]])
def test_task_arithmetic_and_negation(weights: list[float] | None) -> None:
    base, experts = models()

    def rule(scale: float, w: list[float]) -> Callable[..., np.ndarray]:
        return lambda n, b, e: b + scale * np.tensordot(w, e - b, 1)

    w = weights or [1.0] * 3
    close(m.task_arithmetic(base, experts, weights=weights), each(rule(0.4, w), base, experts))
    close(m.negate(base, experts, scale=0.7), each(rule(-0.7, [1.0] * 3), base, experts))


def test_layerwise() -> None:
    base, experts = models()
    coefficients = {name: [0.1 * i, 0.5, -0.2] for i, name in enumerate([*SHAPES, EMPTY])}
    got = m.layerwise(base, experts, coefficients=coefficients)
    close(got, each(lambda n, b, e: b + np.tensordot(coefficients[n], e - b, 1), base, experts))


def plain_ties(
    base: np.ndarray, taus: np.ndarray, *, density: float, weights: list[float], sign: str, divide: str, scale: float
) -> np.ndarray:
    """Element by element, as the algorithm reads."""
    trimmed = np.zeros_like(taus)
    for k, tau in enumerate(taus):
        for i in sorted(range(len(tau)), key=lambda i: -abs(tau[i]))[: int(density * len(tau))]:  # noqa: B023
            trimmed[k, i] = tau[i]
    merged = base.copy()
    for i in range(len(base)):
        values = [(w, v) for w, v in zip(weights, trimmed[:, i], strict=True)]
        voters = [v if divide == "count" else w * v for w, v in values]
        elected = 1 if sum(np.sign(voters) if sign == "count" else voters) >= 0 else -1
        kept = [(w, v) for w, v in values if np.sign(v) == elected]
        if kept:
            by = {"count": len(kept), "weight": sum(w for w, _ in kept), "none": 1}[divide]
            merged[i] += scale * sum(w * v for w, v in kept) / by
    return merged


@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize("sign", ["sum", "count"])
@pytest.mark.parametrize("divide", ["count", "weight", "none"])
@pytest.mark.parametrize("density", [0.2, 0.71, 1.0])
def test_ties(trim: str, sign: str, divide: str, density: float) -> None:
    base, experts = models()
    options = {"density": density, "weights": [1.0, 0.25, 3.0], "sign": sign, "divide": divide, "scale": 0.8}

    def rule(b: np.ndarray, taus: np.ndarray) -> np.ndarray:
        return plain_ties(b, taus, **options)

    expected = together(rule, base, experts) if trim == "global" else each(long_vectors(rule), base, experts)
    close(m.ties(base, experts, trim=trim, **options), expected)


def test_ties_defaults_are_the_papers() -> None:
    base, experts = models()
    options = {"density": 0.2, "weights": [1.0] * 3, "sign": "sum", "divide": "count", "scale": 1.0}
    close(m.ties(base, experts), together(lambda b, taus: plain_ties(b, taus, **options), base, experts))


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_and_arithmetic_are_pefts(method: str) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    base, experts = models()
    weights = torch.tensor([1.0, 0.25, 3.0], dtype=torch.float64)
    sign = {"total": "sum", "frequency": "count"}[method]
    got = m.ties(base, experts, density=0.3, weights=weights.tolist(), trim="tensor", sign=sign)
    everything = m.dare(base, experts, density=1, weights=weights.tolist(), consensus=sign)
    added = m.task_arithmetic(base, experts, scale=1, weights=weights.tolist())
    for name in SHAPES:
        taus = [e[name] - base[name] for e in experts]
        torch.testing.assert_close(got[name], base[name] + peft.ties(taus, weights, 0.3, method))
        torch.testing.assert_close(added[name], base[name] + peft.task_arithmetic(taus, weights))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # density 1 prunes nothing, it says
            torch.testing.assert_close(everything[name], base[name] + peft.dare_ties(taus, weights, 1.0, method))


def dropped(density: float, seed: int = 0, names: tuple[str, ...] = ("x",), size: int = 20_000) -> dict[str, Tensor]:
    """Which elements of ones DARE keeps, for two experts: 1 for the first, 2 for the second, 3 for both."""
    zero = {name: torch.zeros(size) for name in names}
    experts = [{name: torch.full((size,), value) for name in names} for value in (1.0, 2.0)]
    return m.dare(zero, experts, density=density, rescale=None, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("density", [2**-17, 1e-5, 0.1, 1 / 3, 1 - 2**-17])
def test_dare_keeps_the_density_exactly_on_average(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Densities finer than the 16 random bits that decide most elements."""
    size = 2**22
    part = sources.Part("x", torch.Size([size]), 0, size, None, [torch.empty(0)])
    kept = task_vectors._random_mask(0, part, 0, density).sum().item()
    assert abs(kept - size * density) < 4 * math.sqrt(size * density * (1 - density)) + 1


def test_dare_drops_at_random_and_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STRETCH", 4096)
    share = torch.bincount(dropped(0.3)["x"].long(), minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.49, 0.21, 0.21, 0.09]), atol=0.01, rtol=0)
    halves = dropped(0.3)["x"].view(-1, 2)
    assert (halves[:, 0] == halves[:, 1]).float().mean() < 0.4  # .49^2 + 2 * .21^2 + .09^2 = .336


def test_dare_masks_depend_on_seed_and_name_alone() -> None:
    alone, beside = dropped(0.5, size=400), dropped(0.5, names=("a", "x", "z"), size=400)
    assert torch.equal(alone["x"], beside["x"])
    assert not torch.equal(beside["a"], beside["z"])
    assert not torch.equal(alone["x"], dropped(0.5, seed=1, size=400)["x"])


@pytest.mark.parametrize("rescale", ["density", "l1", "l2", "linf"])
@pytest.mark.parametrize("consensus", [None, "sum", "count"])
def test_dare_rescales_what_is_kept(rescale: str, consensus: str | None) -> None:
    base, experts = models(2)
    base[EMPTY] = experts[0][EMPTY] = experts[1][EMPTY]
    kept = []
    for k in range(2):  # the same masks, one expert at a time
        alone = [{n: base[n] + 1 if n in SHAPES and j == k else base[n] for n in base} for j in range(2)]
        found = m.dare(base, alone, density=0.4, rescale=None)
        kept.append({n: (found[n] - base[n]).round().numpy() for n in SHAPES})
    norms = {"l1": lambda v: abs(v).sum(), "l2": np.linalg.norm, "linf": lambda v: abs(v).max()}

    def rule(name: str, b: np.ndarray, e: np.ndarray) -> np.ndarray:
        taus = []
        for k in range(2):
            tau, mask = (e[k] - b).ravel(), kept[k][name].ravel()
            by = 1 / 0.4 if rescale == "density" else norms[rescale](tau) / (norms[rescale](tau * mask) or np.inf)
            taus.append(tau * mask * by)
        if consensus is None:
            return b + 0.5 * (1.0 * taus[0] + 0.3 * taus[1]).reshape(b.shape)
        options = {"density": 1.0, "weights": [1.0, 0.3], "sign": consensus, "divide": "count", "scale": 0.5}
        return plain_ties(b.ravel(), np.stack(taus), **options).reshape(b.shape)

    got = m.dare(base, experts, density=0.4, scale=0.5, weights=[1, 0.3], rescale=rescale, consensus=consensus)
    close(got, each(rule, base, experts))


def plain_pcb(
    b: np.ndarray, taus: np.ndarray, *, ratio: float = 0.1, scale: float = 1.0, clip: float = 1e-4, between: str = "raw"
):
    count, size = taus.shape
    shares, values, units = np.zeros_like(taus), np.zeros_like(taus), np.zeros_like(taus)
    for k, tau in enumerate(taus):
        order = np.sort(abs(tau))
        low, high = order[int(size * clip)], order[int(size * (1 - clip) - 1)]
        values[k] = np.sign(tau) * np.clip(abs(tau), low, high)
        units[k] = np.sign(tau) * (abs(values[k]) - low) / (high - low) if high > low else 0 * tau
    for k, tau in enumerate(taus):
        against = {
            "raw": lambda tau=tau: np.tanh(tau * taus.sum(0)),
            "normalized": lambda tau=tau: np.tanh(tau * units.sum(0)),
            "pairs": lambda k=k: sum(np.tanh(units[k] * unit) for unit in units),
        }[between]()
        balance = np.exp(count * units[k] ** 2) * against
        floor, top = np.sort(balance)[min(int(size * (1 - ratio)), size - 1)], balance.max()
        shares[k] = (np.maximum(balance, floor) - floor) / (top - floor) if top > floor else 0
    return b + scale * (shares * values).sum(0) / np.maximum(shares.sum(0), 1e-12)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ratio": 0.5, "scale": 1.2, "clip": 0.1}, {"ratio": 0.3, "between": "normalized"}, {"between": "pairs"}],
)
def test_pcb(scope: str, options: dict) -> None:
    base, experts = models()

    def rule(b: np.ndarray, taus: np.ndarray) -> np.ndarray:
        return plain_pcb(b, taus, **options)

    expected = together(rule, base, experts) if scope == "global" else each(long_vectors(rule), base, experts)
    close(m.pcb(base, experts, scope=scope, **options), expected, tolerance=1e-5)  # quantiles are float32


@pytest.mark.parametrize("select", ["vectors", "weights"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce(select: str, density: float) -> None:
    base, experts = models()
    for expert in experts:  # what nobody moved does not count for the density
        expert["blocks.1.weight"][:3] = base["blocks.1.weight"][:3]

    def rule(b: np.ndarray, taus: np.ndarray) -> np.ndarray:
        variance = ((taus - taus.mean(0)) ** 2).mean(0)
        keep = int(density * np.count_nonzero(variance))
        chosen = np.isin(np.arange(len(b)), np.argsort(-variance)[:keep]) if density < 1 else np.ones(len(b), bool)
        squares = ((taus * chosen) ** 2).sum(1)
        weights = squares / squares.sum() if squares.sum() else np.full(len(taus), 1 / len(taus))
        used = taus * chosen if select == "vectors" else taus
        agree = np.sign(used) == np.where(used.sum(0) >= 0, 1, -1)
        total = (weights[:, None] * agree).sum(0)
        return b + 0.9 * (weights[:, None] * agree * used).sum(0) / np.where(total > 0, total, 1)

    got = m.sce(base, experts, density=density, scale=0.9, select=select)
    close(got, each(long_vectors(rule), base, experts))


@pytest.mark.parametrize("per", ["tensor", "element"])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_delta_guided(per: str, power: float) -> None:
    base, experts = models()
    experts[0]["scale"] = experts[1]["scale"] = experts[2]["scale"] = base["scale"]  # nobody moved

    def rule(b: np.ndarray, taus: np.ndarray) -> np.ndarray:
        moved = abs(taus) if per == "element" else np.linalg.norm(taus, axis=1, keepdims=True)
        weights = moved**power
        return b + (weights * taus).sum(0) / np.where(weights.sum(0) > 0, weights.sum(0), 1)

    close(m.delta_guided(base, experts, power=power, per=per), each(long_vectors(rule), base, experts))


def test_lines() -> None:
    base, experts = models()
    depth = {"blocks.0.weight": 0, "blocks.0.bias": 0, "blocks.1.weight": 0.5, "blocks.2.weight": 1}
    expected = each(lambda n, b, e: b + (0.2 + 0.6 * depth.get(n, 0)) * (e - b).sum(0), base, experts)
    close(m.lines(base, experts, alpha=0.2, beta=0.6), expected)
    expected = each(lambda n, b, e: b + (1 / 3 + 0.4 * depth.get(n, 0)) * (e - b).sum(0), base, experts)
    close(m.lines(base, experts, beta=0.4), expected)
    expected = each(lambda n, b, e: b + (0.5 + 0.5 * depth.get(n, 0)) * (e[0] - b), base, experts[:1])
    close(m.lines(base, experts[:1]), expected)
    own = m.lines(base, experts[:1], alpha=0.0, beta=1.0, layer=lambda name: (1, 2) if name == "scale" else None)
    expected = each(lambda n, b, e: e[0] if n == "scale" else b, base, experts[:1])
    close(own, expected)


def test_lines_counts_each_tower_on_its_own() -> None:
    names = [f"visual.blocks.{i}.w" for i in range(3)] + [f"text.blocks.{i}.w" for i in range(11)] + ["visual.proj"]
    base, expert = ({name: torch.tensor([v]) for name in names} for v in (0.0, 1.0))
    got = m.lines(base, [expert], alpha=0.0)
    assert [got[f"visual.blocks.{i}.w"].item() for i in range(3)] == [0, 0.5, 1]
    assert got["text.blocks.10.w"].item() == 1 and got["text.blocks.5.w"].item() == pytest.approx(0.5)
    assert got["visual.proj"].item() == 0


def test_ota_ffg_keeps_nothing_of_no_saliency() -> None:
    """Where most saliencies are 0, so is the threshold: what did not move must not dilute what did."""
    base, experts = {"x": torch.zeros(10)}, [{"x": torch.zeros(10)}, {"x": torch.ones(10)}]
    experts[0]["x"][0] = 2.0
    moments = [{"x": torch.ones(10)}, {"x": torch.ones(10)}]
    got = m.ota_ffg(base, experts, second_moments=moments, density=0.5)["x"]
    torch.testing.assert_close(got, torch.tensor([1.5] + [1.0] * 9))


@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize("rank_one", [False, True])
def test_ota_ffg(trim: str, rank_one: bool) -> None:
    base, experts = models()
    moments = [{n: 1e-8 * t for n, t in positive(k + 10).items()} for k in range(3)]

    def second(k: int, name: str) -> np.ndarray:
        v = moments[k][name].numpy()
        if rank_one and v.ndim == 2:
            v = np.outer(v.sum(1), v.sum(0)) / v.sum()
        return v

    used = [{n: torch.from_numpy(np.array(second(k, n))) for n in SHAPES} for k in range(3)]
    flat = np.stack([np.concatenate([u[n].numpy().ravel() for n in SHAPES]) for u in used])

    def rule(b: np.ndarray, taus: np.ndarray, v: np.ndarray) -> np.ndarray:
        top, below = np.zeros(len(b)), np.zeros(len(b))
        for tau, s in zip(taus, v, strict=True):
            for i in np.argsort(-s * tau**2)[: int(0.3 * len(b))]:
                top[i] += (s[i] ** 0.5 + 1e-26) * tau[i]
                below[i] += s[i] ** 0.5 + 1e-26
        return b + top / np.where(below > 0, below, 1)

    if trim == "global":
        expected = together(lambda b, taus: rule(b, taus, flat), base, experts)
    else:
        expected = each(
            lambda n, b, e: rule(
                b.ravel(), (e - b).reshape(3, -1), np.stack([u[n].numpy().ravel() for u in used])
            ).reshape(b.shape),
            base,
            experts,
        )
    got = m.ota_ffg(base, experts, second_moments=moments, density=0.3, trim=trim, rank_one=rank_one)
    close(got, expected, tolerance=1e-7)


def test_compeft() -> None:
    base, experts = models(1)

    def rule(b: np.ndarray, taus: np.ndarray) -> np.ndarray:
        kept = np.zeros(len(b))
        kept[np.argsort(-abs(taus[0]))[: int(0.2 * len(b))]] = 1
        return b + 1.5 * taus[0].std(ddof=1) * np.sign(taus[0]) * kept

    close(m.compeft(base, experts, alpha=1.5), together(rule, base, experts))


def test_compeft_size() -> None:
    base, experts = models(1)
    size = sum(math.prod(shape) for shape in SHAPES.values())
    got = m.compeft_size(base, experts, density=0.1)
    merged = m.compeft(base, experts, density=0.1)
    assert got.parameters == size
    assert got.kept == int(0.1 * size) == sum(int((merged[n] != base[n]).sum()) for n in SHAPES)
    k = got.kept / size
    bits = size * (-(1 - k) * math.log2(1 - k) - k * math.log2(k / 2)) + 16
    assert (got.dense, got.masks, got.entropy) == (2 * size, math.ceil((2 * size + 16) / 8), math.ceil(bits / 8))


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_golomb_size_is_that_of_codes_written_out(density: float) -> None:
    """Gaps between what is kept, each as a quotient in unary and a remainder in b bits; b is the best one."""
    generator = torch.Generator().manual_seed(0)
    expert = {"x": torch.randn(100_000, generator=generator)}
    base = {"x": torch.zeros(100_000)}
    got = m.compeft_size(base, [expert], density=density)
    places = m.compeft(base, [expert], density=density)["x"].nonzero().flatten().numpy()
    gaps = np.diff(places, prepend=-1) - 1
    lengths = {b: int((gaps // 2**b + 1 + b).sum()) for b in range(8)}
    written = (min(lengths.values()) if density < 1 else 0) + len(places) + 16
    assert got.golomb == pytest.approx(written / 8, rel=0.01)
    if density <= 0.5:
        assert got.entropy <= got.golomb <= 1.05 * got.entropy
