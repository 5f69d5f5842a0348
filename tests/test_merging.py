"""Every closed-form merging method against a second, plain numpy implementation; what must hold for all; refusals."""

import inspect
import math
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mergetune import merging as m
from mergetune.merging import task_vectors, tensors
from mergetune.merging.methods import METHODS

SHAPES = {
    "blocks.0.weight": (9, 7),
    "blocks.0.bias": (9,),
    "blocks.1.weight": (6, 11),
    "blocks.2.weight": (3, 4, 5),
    "token_embedding.weight": (13, 5),
    "scale": (),
}
EMPTY = "empty"


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor fits one stretch, so that every method meets the seams."""
    monkeypatch.setattr(tensors, "STRETCH", 17)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
    return state | {
        EMPTY: torch.empty(0, 3, dtype=dtype),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def models(count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = draw(0, dtype)
    small = [draw(k + 1, dtype) for k in range(count)]
    moved = [{n: base[n] + 0.3 * e[n] if n in SHAPES else base[n] for n in base} for e in small]
    return base, moved


def positive(seed: int) -> dict[str, Tensor]:
    return {name: t.abs() + 0.01 if name in SHAPES else t for name, t in draw(seed).items()}


def arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: state[name].double().numpy() for name in SHAPES}


def close(got: dict[str, Tensor], expected: dict[str, np.ndarray], tolerance: float = 1e-10) -> None:
    assert list(got) == [*SHAPES, EMPTY, "steps", "mask"]
    for name in SHAPES:
        np.testing.assert_allclose(got[name].double().numpy(), expected[name], rtol=tolerance, atol=tolerance)


def each(rule: Callable[..., np.ndarray], base: dict[str, Tensor], experts: list) -> dict[str, np.ndarray]:
    """A rule for one tensor, (name, base, [K, ...] experts) -> merged, on all of them."""
    b, es = arrays(base), [arrays(e) for e in experts]
    return {name: rule(name, b[name], np.stack([e[name] for e in es])) for name in SHAPES}


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


# -- averages ---------------------------------------------------------------------------------------------------------


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


# -- task vectors -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("density", [2**-17, 1e-5, 0.1, 1 / 3, 1 - 2**-17])
def test_dare_keeps_the_density_exactly_on_average(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Densities finer than the 16 random bits that decide most elements."""
    size = 2**22
    part = tensors.Part("x", torch.Size([size]), 0, size, None, [torch.empty(0)])
    kept = task_vectors._random_mask(0, part, 0, density).sum().item()
    assert abs(kept - size * density) < 4 * math.sqrt(size * density * (1 - density)) + 1


def test_dare_drops_at_random_and_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "STRETCH", 4096)
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


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_golomb_size_is_that_of_codes_written_out(density: float) -> None:
    """Gaps between what is kept, each as a quotient in unary and a remainder in b bits; b is the best one."""
    generator = torch.Generator().manual_seed(0)
    expert = {"x": torch.randn(200_000, generator=generator)}
    base = {"x": torch.zeros(200_000)}
    got = m.compeft_size(base, [expert], density=density)
    places = m.compeft(base, [expert], density=density)["x"].nonzero().flatten().numpy()
    gaps = np.diff(places, prepend=-1) - 1
    lengths = {b: int((gaps // 2**b + 1 + b).sum()) for b in range(8)}
    written = (min(lengths.values()) if density < 1 else 0) + len(places) + 16
    assert got.golomb == pytest.approx(written / 8, rel=0.01)
    if density <= 0.5:
        assert got.entropy <= got.golomb <= 1.05 * got.entropy


# -- matrices ---------------------------------------------------------------------------------------------------------


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


def lora(seed: int, rank: int, centres: Tensor, noise: float = 0.0) -> dict[str, Tensor]:
    """Rank ``rank`` of units [A row, B column] near the first ``rank`` centres [r, 5 + 4]."""
    units = centres[:rank] + noise * torch.randn(rank, 9, generator=torch.Generator().manual_seed(seed))
    return {"x.lora_A.weight": units[:, :5].contiguous(), "x.lora_B.weight": units[:, 5:].T.contiguous()}


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


# -- what must hold for all -------------------------------------------------------------------------------------------


def options_for(name: str, count: int) -> dict:
    """What a method cannot do without."""
    return {
        "fisher_average": {"fishers": [positive(k + 20) for k in range(count)]},
        "ota_ffg": {"second_moments": [positive(k + 20) for k in range(count)]},
        "metrics_average": {"metrics": [0.5 + k for k in range(count)]},
        "layerwise": {"coefficients": {n: [0.3] * count for n in [*SHAPES, EMPTY]}},
        "lines": {"beta": 0.4},
    }.get(name, {})


STREAMED = [name for name in METHODS if hasattr(getattr(m, name), "plan")]


def run(name: str, dtype: torch.dtype = torch.float64, **options) -> tuple[dict, list, dict[str, Tensor]]:
    method = getattr(m, name)
    base, experts = models(min(3, METHODS[name].most or 3), dtype)
    if name == "slerp":
        experts = experts[:1]
    return base, experts, method(base, experts, **options_for(name, len(experts)) | options)


def test_methods_that_work_tensor_by_tensor() -> None:
    assert len(STREAMED) == 20
    for name in STREAMED:
        merged, plan = inspect.signature(getattr(m, name)), inspect.signature(getattr(m, name).plan)
        assert merged.parameters == plan.parameters
        assert (plan.return_annotation, merged.return_annotation) == ("Merge", "dict[str, Tensor]")


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_merged_in_float32(name: str, dtype: torch.dtype) -> None:
    method = getattr(m, name)
    base, experts = models(min(3, METHODS[name].most or 3), dtype)
    experts = experts[:1] if name == "slerp" else experts
    wide = [{n: t.float() if n in SHAPES else t for n, t in s.items()} for s in (base, *experts)]
    options = options_for(name, len(experts))
    got, expected = method(base, experts, **options), method(wide[0], wide[1:], **options)
    for key in SHAPES:
        assert got[key].dtype == dtype and got[key].shape == base[key].shape
        assert torch.equal(got[key], expected[key].to(dtype)), key


@pytest.mark.parametrize("name", STREAMED)
def test_inputs_stay_and_buffers_are_copied(name: str) -> None:
    base, experts = models(min(3, METHODS[name].most or 3))
    experts = experts[:1] if name == "slerp" else experts
    before = [{n: t.clone() for n, t in s.items()} for s in (base, *experts)]
    for state in (base, *experts):
        state["blocks.0.weight"].requires_grad_()
    got = getattr(m, name)(base, experts, **options_for(name, len(experts)))
    assert all(torch.equal(s[n], b[n]) for s, b in zip((base, *experts), before, strict=True) for n in s)
    assert not any(t.requires_grad for t in got.values())
    assert got["steps"].dtype == torch.int64 and got["steps"].item() == 7 and got["mask"].tolist() == [True, False]
    pointers = {t.data_ptr() for s in (base, *experts) for t in s.values() if t.numel()}
    assert not pointers & {t.data_ptr() for t in got.values() if t.numel()}


@pytest.mark.parametrize(
    "name", sorted(set(STREAMED) - {"dare", "opcm", "metrics_average", "slerp", "wise_ft", "compeft"})
)
def test_the_order_of_experts_does_not_count(name: str) -> None:
    base, experts, got = run(name)
    options = options_for(name, 3)
    options = {o: v[::-1] if isinstance(v, list) else v for o, v in options.items()}
    close(getattr(m, name)(base, experts[::-1], **options), arrays(got), 1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("average", {}),
        ("metrics_average", {}),
        ("fisher_average", {}),
        ("delta_guided", {}),
        ("model_stock", {}),
        ("ties", {"density": 1.0}),
        ("sce", {"density": 1.0}),
        ("ota_ffg", {"density": 1.0}),
        ("task_arithmetic", {"scale": 1 / 3}),
        ("lines", {"beta": 0.0}),
    ],
)
def test_the_merge_of_one_model_with_itself_is_that_model(name: str, options: dict) -> None:
    base, experts = models(1)
    close(getattr(m, name)(base, experts * 3, **options_for(name, 3) | options), arrays(experts[0]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("average", {}),
        ("metrics_average", {"metrics": [0.1]}),
        ("wise_ft", {"alpha": 1.0}),
        ("slerp", {"t": 1.0}),
        ("task_arithmetic", {"scale": 1.0}),
        ("negate", {"scale": -1.0}),
        ("layerwise", {"coefficients": {n: [1.0] for n in [*SHAPES, EMPTY]}}),
        ("ties", {"density": 1.0}),
        ("dare", {"density": 1.0}),
        ("lines", {"alpha": 1.0, "beta": 0.0}),
        ("ota_ffg", {"density": 1.0}),
    ],
)
def test_one_expert_in_full_is_that_expert(name: str, options: dict) -> None:
    base, experts = models(1)
    close(getattr(m, name)(base, experts, **options_for(name, 1) | options), arrays(experts[0]))


@pytest.mark.parametrize("name", sorted(set(STREAMED) - {"pcb", "widen"}))
def test_units_do_not_count(name: str) -> None:
    """Everything times 2 (exact in floating point) gives twice the result; pcb and widen are not homogeneous."""
    base, experts, got = run(name)
    double = [{n: 2 * t if n in SHAPES else t for n, t in s.items()} for s in (base, *experts)]
    again = getattr(m, name)(double[0], double[1:], **options_for(name, len(experts)))
    close(again, {n: 2 * a for n, a in arrays(got).items()}, 1e-9)


@pytest.mark.parametrize("name", STREAMED)
def test_transposed_memory_does_not_count(name: str) -> None:
    base, experts, got = run(name)
    turned = [
        {n: t.T.contiguous().T if n in SHAPES and t.ndim == 2 else t for n, t in s.items()} for s in (base, *experts)
    ]
    again = getattr(m, name)(turned[0], turned[1:], **options_for(name, len(experts)))
    assert all(torch.equal(again[n], got[n]) for n in SHAPES)


def test_stretches_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {name: run(name)[2] for name in STREAMED if name != "dare"}
    monkeypatch.undo()
    for name, got in short.items():
        close(run(name)[2], arrays(got), 1e-12)


def test_base_gives_the_dtype_and_wider_inputs_are_not_rounded() -> None:
    base, experts = {"x": torch.tensor([1.0], dtype=torch.float16)}, [{"x": torch.tensor([1 + 2**-30]).double()}]
    assert m.task_arithmetic(base, experts)["x"].dtype == torch.float16
    wide = m.task_arithmetic({"x": base["x"].double()}, experts, scale=1.0)["x"]
    assert wide.item() == experts[0]["x"].item()
    assert m.average(None, [base, *experts])["x"].dtype == torch.float16


def test_order_statistics_are_exact() -> None:
    values = torch.cat([draw(k)["blocks.0.weight"].float().flatten() for k in range(20)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38]), values[:50]])
    check_order({"x": torch.stack([values, -values.flip(0), values.abs()])})


LARGE = {
    "smooth": lambda x: x,
    "few different values": lambda x: (2 * x).round(),
    "mostly one value": lambda x: x * (x > 1),
    "sorted, so that no short piece is like the whole": lambda x: x.sort(1).values,
    "rare and huge, where no sample looks": lambda x: x * (1 + 1e6 * (torch.arange(x.shape[1]) % 8192 == 8191)),
    "one half far from the other": lambda x: x + 100 * (torch.arange(x.shape[1]) < x.shape[1] // 2),
    "infinite": lambda x: torch.where(x > 1.5, math.inf, x),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_statistics_of_many_values_are_exact(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "STRETCH", 4096)
    monkeypatch.setattr(tensors, "FEW", 1000)
    generator = torch.Generator().manual_seed(0)
    rows = LARGE[kind](torch.randn(2, 150_000, generator=generator, dtype=dtype))
    check_order({"a": rows[:, :90_000], "none": rows[:, :0], "b": rows[:, 90_000:]})


def test_order_statistics_where_the_sample_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "STRETCH", 512)
    monkeypatch.setattr(tensors, "FEW", 1000)
    monkeypatch.setattr(tensors, "_sample", lambda *_: np.sort(np.random.default_rng(0).normal(5, 1e-3, (1, 4096))))
    check_order({"x": torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))})


def test_order_statistics_keep_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the sample is of no use, no pass keeps more than an eighth of the values."""
    monkeypatch.setattr(tensors, "STRETCH", 4096)
    monkeypatch.setattr(tensors, "FEW", 1000)
    monkeypatch.setattr(tensors, "_sample", lambda *_: np.full((1, 4096), 1e9, np.float32))
    kept, search = [], tensors._Search.narrow

    def watched(self, low: float, high: float, counts: list[int], between: np.ndarray) -> None:
        kept.append(len(between))
        search(self, low, high, counts, between)

    monkeypatch.setattr(tensors._Search, "narrow", watched)
    check_order({"x": torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))})
    assert max(kept) <= 100_000 / 8 + 64


def test_order_statistics_among_few_that_no_sample_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty values in a small tensor, between those of a large one: fewer than a sample of them would need."""
    monkeypatch.setattr(tensors, "FEW", 1000)
    monkeypatch.setattr(tensors, "_sample", lambda *_: np.repeat(np.float32([0, 10]), 500)[None])
    between = 1 + torch.rand(1, 20, generator=torch.Generator().manual_seed(0))
    rows = {"large": torch.tensor([0.0, 10.0]).repeat(3000)[None], "small": between}
    experts = [{name: row[0] for name, row in rows.items()}]
    ranks = list(range(2999, 3022))
    got = tensors.order_statistics(lambda part: part.experts, list(rows), None, experts, ranks)
    assert got == torch.cat([*rows.values()], 1).sort(1).values[:, ranks].T.tolist()


def test_thresholds_of_mixed_dtypes_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """One float64 expert makes all differences float64 ones."""
    monkeypatch.setattr(tensors, "FEW", 1000)
    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(5000, generator=generator) for _ in range(3))
    for density in (0.11, 0.3, 0.57):
        merged = m.ties({"x": base}, [{"x": a}, {"x": b.double()}], density=density, weights=[1, 0], divide="none")
        expected = m.ties(
            {"x": base}, [{"x": a.double()}, {"x": b.double()}], density=density, weights=[1, 0], divide="none"
        )
        assert torch.equal(merged["x"], expected["x"])


class Counted(dict):
    """A state dict that counts how often a tensor is asked for."""

    asked = 0

    def __getitem__(self, name: str) -> Tensor:
        self.asked += 1
        return super().__getitem__(name)


def test_tensors_are_asked_for_once_a_pass_and_may_be_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "STRETCH", 64)
    wide, tall = torch.randn(60, 70), torch.randn(70, 60)
    states = [Counted(x=wide), Counted(x=tall.T)]
    got = m.task_arithmetic(states[0], states[1:], scale=1.0)["x"]
    torch.testing.assert_close(got, tall.T)
    assert max(state.asked for state in states) < 10  # of 66 stretches


def test_experts_come_to_the_bases_device() -> None:
    """The device "meta" has no values, but refuses what is mixed, as a GPU does."""
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        m.task_arithmetic({"x": torch.ones(4, device="meta")}, [{"x": torch.ones(4)}])


def test_values_that_are_nan_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "FEW", 1000)
    values = torch.arange(2000.0)
    values[::2] = torch.nan
    got = tensors.order_statistics(lambda part: part.experts, ["x"], None, [{"x": values}], [0, 999, 1000, 1999])
    assert got[:2] == [[1.0], [1999.0]] and math.isnan(got[2][0]) and math.isnan(got[3][0])


def check_order(rows: dict[str, Tensor]) -> None:
    everything = torch.cat([*rows.values()], 1)
    ranks = [int(share * (everything.shape[1] - 1)) for share in (0, 1e-4, 0.03, 0.5, 0.8, 0.99, 0.9999, 1)]
    experts = [{name: x[k] for name, x in rows.items()} for k in range(len(everything))]
    got = tensors.order_statistics(lambda part: part.experts, list(rows), None, experts, ranks)
    assert got == everything.sort(1).values[:, ranks].T.tolist()


# -- refusals ---------------------------------------------------------------------------------------------------------


def changed(state: dict[str, Tensor], **tensors_: Tensor) -> dict[str, Tensor]:
    return state | tensors_


@pytest.mark.parametrize(
    ("merge", "error", "text"),
    [
        (lambda b, e: m.ties(None, e), ValueError, "ties needs a base"),
        (lambda b, e: m.lora_lego(b, e), ValueError, "lora_lego takes no base"),
        (lambda b, e: m.wise_ft(b, e), ValueError, "wise_ft needs 1 expert"),
        (lambda b, e: m.tsv_m(b, e[:1]), ValueError, "tsv_m needs at least 2 expert"),
        (lambda b, e: m.model_stock(None, e), ValueError, "model_stock needs a base"),
        (lambda b, e: m.model_stock(b, e[:1]), ValueError, "model_stock needs at least 2 expert"),
        (lambda b, e: m.average(b, []), ValueError, "average needs at least 1 expert"),
        (lambda b, e: m.slerp(b, e[:2]), ValueError, "slerp needs a base and one expert, or no base and two experts"),
        (lambda b, e: m.average(None, e[0]), TypeError, "experts must be a list of state dicts, got dict"),
        (lambda b, e: m.average(None, [1]), TypeError, r"experts\[0\] must be a state dict, got int"),
        (lambda b, e: m.average([b], e), TypeError, "base must be a state dict, got list"),
        (
            lambda b, e: m.average(b, [e[0], {n: t for n, t in e[1].items() if n != "scale"}]),
            ValueError,
            r"experts\[1\] must hold the tensors of base, got 1 other names: it lacks 'scale'",
        ),
        (
            lambda b, e: m.average(None, [e[0], changed(e[1], more=torch.ones(1))]),
            ValueError,
            r"experts\[1\] must hold the tensors of experts\[0\], got 1 other names: it holds 'more'",
        ),
        (
            lambda b, e: m.average(b, [changed(e[0], scale=torch.ones(2))]),
            ValueError,
            r"experts\[0\]\['scale'\] must have shape \[\] as base has, got \[2\]",
        ),
        (
            lambda b, e: m.average(b, [changed(e[0], scale=torch.tensor(1))]),
            TypeError,
            r"experts\[0\]\['scale'\] must be torch.float64 as in base, or of its kind, got torch.int64",
        ),
        (
            lambda b, e: m.average(b, [changed(e[0], steps=torch.tensor(8))]),
            ValueError,
            r"experts\[0\]\['steps'\] must equal base's: torch.int64 values cannot be merged",
        ),
        (
            lambda b, e: m.average(b, [changed(e[0], mask=torch.tensor([True, True]))]),
            ValueError,
            r"experts\[0\]\['mask'\] must equal base's: torch.bool values",
        ),
        (
            lambda b, e: m.average(None, [{"z": torch.ones(1, dtype=torch.complex64)}]),
            TypeError,
            "must be real, got torch.complex64",
        ),
        (lambda b, e: m.average(b, e, weights=[1, 2]), ValueError, "weights must hold one number for each of 3"),
        (lambda b, e: m.average(b, e, weights=[1, -1, 0]), ValueError, "weights must have a positive sum"),
        (lambda b, e: m.average(b, e, weights=[1, math.nan, 0]), ValueError, "weights must be finite"),
        (lambda b, e: m.metrics_average(b, e, metrics=[1, 0, 2]), ValueError, "metrics must be positive"),
        (lambda b, e: m.metrics_average(b, e, metrics=[1, 1, 2], penalty=-1), ValueError, "penalty must be at least 0"),
        (
            lambda b, e: m.fisher_average(b, e, fishers=e[:2]),
            ValueError,
            "fishers must hold one state dict for each of 3",
        ),
        (
            lambda b, e: m.fisher_average(b, e, fishers=[{}] * 3),
            ValueError,
            r"fishers\[0\] must hold the experts' tensors",
        ),
        (
            lambda b, e: m.fisher_average(b, e, fishers=[changed(positive(k), scale=torch.ones(2)) for k in range(3)]),
            ValueError,
            r"fishers\[0\]\['scale'\] must have shape \[\], got \[2\]",
        ),
        (lambda b, e: m.fisher_average(b, e, fishers=e), ValueError, "fishers must not be negative"),
        (lambda b, e: m.ota_ffg(b, e, second_moments=e), ValueError, "second_moments must not be negative"),
        (
            lambda b, e: m.fisher_average(b, e, fishers=e, normalize="max"),
            ValueError,
            "normalize must be one of None, norm, got 'max'",
        ),
        (lambda b, e: m.ties(b, e, density=0), ValueError, r"density must be in \(0, 1\], got 0"),
        (lambda b, e: m.dare(b, e, density=1.1), ValueError, r"density must be in \(0, 1\], got 1.1"),
        (lambda b, e: m.ties(b, e, trim="layer"), ValueError, "trim must be one of global, tensor, got 'layer'"),
        (lambda b, e: m.ties(b, e, sign="mean"), ValueError, "sign must be one of"),
        (lambda b, e: m.ties(b, e, divide="max"), ValueError, "divide must be one of"),
        (lambda b, e: m.ties(b, e, divide="weight", weights=[1, -1, 1]), ValueError, "weights must not be negative"),
        (lambda b, e: m.dare(b, e, rescale="l3"), ValueError, "rescale must be one of"),
        (lambda b, e: m.pcb(b, e, clip=0.5), ValueError, r"clip must be in \[0, 0.5\)"),
        (lambda b, e: m.sce(b, e[:1]), ValueError, "sce needs at least 2 expert"),
        (lambda b, e: m.delta_guided(b, e, power=-1), ValueError, "power must be at least 0"),
        (lambda b, e: m.layerwise(b, e, coefficients={}), ValueError, "coefficients must be there for every tensor"),
        (lambda b, e: m.lines(b, e[:2]), ValueError, "beta must be given for 2 experts"),
        (lambda b, e: m.lines({"ctx": b["scale"]}, [{"ctx": b["scale"]}]), ValueError, "lines needs names with block"),
        (lambda b, e: m.compeft(b, e), ValueError, "compeft needs 1 expert"),
        (lambda b, e: m.widen(b, e, normalize=True, calibration=0), ValueError, "calibration must be positive with"),
        (lambda b, e: m.opcm(b, e, alpha=2), ValueError, r"alpha must be in \[0, 1\], got 2"),
        (lambda b, e: m.lora_lego(None, e), ValueError, "lora_lego needs LoRA factors, matrices in pairs"),
    ],
)
def test_refusals(merge: Callable, error: type[Exception], text: str) -> None:
    if "lora" in text:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    base, experts = models()
    with pytest.raises(error, match=text):
        merge(base, experts)


def test_lora_lego_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="lora_lego needs scikit-learn: pip install"):
        m.lora_lego(None, [lora(1, 2, torch.ones(2, 9))] * 2)


def test_lora_lego_refuses_pairs_that_do_not_fit() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    good = lora(1, 3, torch.randn(3, 9))
    bad = changed(good, **{"x.lora_A.weight": torch.ones(2, 5)})
    with pytest.raises(ValueError, match=r"experts\[1\]\['x.lora_A.weight'\] and its lora_B must have shapes \[r, 5\]"):
        m.lora_lego(None, [good, bad])
    with pytest.raises(ValueError, match="rank must be from 1 to the experts' ranks together, 6, got 7"):
        m.lora_lego(None, [good, good], rank=7)
    with pytest.raises(ValueError, match=r"scales must be positive, got \[1.0, 0.0\]"):
        m.lora_lego(None, [good, good], scales=[1, 0])
    with pytest.raises(ValueError, match="scales must hold one number for each of 2 experts, got 1"):
        m.lora_lego(None, [good, good], scales=[1])


def test_values_that_are_not_finite() -> None:
    mask = {"mask": torch.full((40,), -math.inf), "w": torch.ones(3)}
    assert torch.equal(m.task_arithmetic(mask, [mask, mask])["mask"], mask["mask"])  # the same everywhere: copied
    bad = {"mask": torch.zeros(40), "w": torch.tensor([1, math.nan, 1])}
    with pytest.raises(ValueError, match="mask must be finite after merging, got 17 NaN or infinite values"):
        m.task_arithmetic(mask, [bad])
    small = {"w": torch.tensor([6e4], dtype=torch.float16)}
    with pytest.raises(ValueError, match="too large for torch.float16"):
        m.negate(small, [{"w": -small["w"]}])
