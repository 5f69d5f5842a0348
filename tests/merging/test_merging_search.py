"""Merging by search, on small problems whose best answer is known."""

import functools
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune import merging as m
from mergetune.merging import evolution
from mergetune.merging.evolution import mate


def classifiers(dtype: torch.dtype = torch.float32) -> tuple[dict, list[dict]]:
    """A base that knows nothing, and two experts: each tells two of four classes apart, on features of its own."""
    base = {"w": torch.zeros(4, 4, dtype=dtype), "bias": torch.zeros(4, dtype=dtype), "steps": torch.tensor(3)}
    first, second = torch.zeros(4, 4), torch.zeros(4, 4)
    first[[0, 1], [0, 1]] = 4.0
    second[[2, 3], [2, 3]] = 4.0
    return base, [base | {"w": w.to(dtype)} for w in (first, second)]


def inputs(count: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(2, (2, count), generator=generator)
    return [F.one_hot(places[k] + 2 * k, 4).float() for k in range(2)]


def linear(weights: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
    return x @ weights["w"].T + weights["bias"]


# -- learned coefficients ---------------------------------------------------------------------------------------------


def test_entropy_coefficients_see_as_much_as_the_authors_do() -> None:
    """Three steps of Adam on the sum over two batches of 16, with the images that the 32 of a step are."""
    base, experts = classifiers()
    data = [x * torch.linspace(0.1, 2, 64)[:, None] for x in inputs()]
    raw, drawn = torch.full((1, 2), 0.3, requires_grad=True), torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(3):
        merged = base | {"w": sum(raw.clamp(0, 1)[0, k] * experts[k]["w"] for k in range(2))}
        loss = 0.0
        for k, x in enumerate(data):
            for batch in x[torch.randperm(64, generator=drawn)[:32]].split(16):
                loss = loss + torch.distributions.Categorical(logits=linear(merged, batch, k)).entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    got = m.entropy_coefficients(base, experts, predict=linear, data=data, per="expert", steps=3, lr=0.05, seed=5)
    torch.testing.assert_close(torch.tensor(got["w"]), raw[0].detach())


@pytest.mark.parametrize("per", ["tensor", "expert"])
def test_entropy_coefficients_follow_their_definition(per: str) -> None:
    """Two steps of Adam on the entropy, by hand; the batch is everything."""
    base, experts = classifiers()
    experts[1]["bias"] = torch.tensor([0.5, 0, 0, -0.5])
    data, names = inputs(), ["w", "bias"]
    raw = torch.full((2 if per == "tensor" else 1, 2), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(2):
        c = raw.clamp(0, 1).expand(2, 2)
        merged = {n: base[n] + sum(c[i, k] * (experts[k][n] - base[n]) for k in range(2)) for i, n in enumerate(names)}
        loss = sum(
            torch.distributions.Categorical(logits=linear(merged, data[k], k)).entropy().mean() for k in range(2)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    options = {"per": per, "steps": 2, "lr": 0.05, "batch_size": 64}
    got = m.entropy_coefficients(base, experts, predict=linear, data=data, **options)
    expected = raw.clamp(0, 1).expand(2, 2)
    torch.testing.assert_close(torch.tensor([got[n] for n in names]), expected.detach())
    merged = m.adamerging(base, experts, predict=linear, data=data, **options)
    assert all(torch.equal(merged[n], t) for n, t in m.layerwise(base, experts, coefficients=got).items())


def test_adamerging_grows_sure() -> None:
    base, experts = classifiers()
    got = m.entropy_coefficients(base, experts, predict=linear, data=inputs(), steps=60, lr=0.05)
    assert got["w"] == [1.0, 1.0]  # more is surer, up to the bound
    assert got["bias"] == pytest.approx([0.3, 0.3])  # the experts did not move it


def test_alignment_coefficients_find_the_experts_answers() -> None:
    """Both experts' answers on both tasks come from the sum of their residuals: coefficients of 1."""
    base, experts = classifiers()
    free = {"stay": 0.0, "lr": 0.3, "steps": 150}
    got = m.alignment_coefficients(base, experts, predict=linear, data=inputs(), **free)
    assert min(got["w"]) > 0.9
    held = m.alignment_coefficients(base, experts, predict=linear, data=inputs(), stay=100.0, lr=0.01, steps=30)
    assert held["w"] == pytest.approx([0.1, 0.1], abs=0.02)
    merged = m.expert_merging(base, experts, predict=linear, data=inputs(), **free)
    for k, x in enumerate(inputs()):
        assert torch.equal(linear(merged, x, k).argmax(1), linear(experts[k], x, k).argmax(1))


@pytest.mark.parametrize("hidden", [0.0, 2.0])
def test_alignment_is_as_written(hidden: float) -> None:
    """AdamW, the clipped gradient and the restarting cosine written out, past the first restart."""
    base, experts = classifiers()
    experts[0]["bias"], experts[1]["bias"] = torch.tensor([0.4, 0, -1, 0]), torch.tensor([0, 1.0, 0, 2])
    data, t, weights = inputs(), 2.0, [3.0, 10.0]

    def predict(w: dict[str, Tensor], x: Tensor, k: int) -> tuple[Tensor, list[Tensor]]:
        return linear(w, x, k), [x @ w["w"].T, w["bias"].expand(len(x), 4)]

    raw, first, second = torch.full((2, 2), math.log(0.2 / 0.8)), 0.0, 0.0
    for step in range(60):
        raw.requires_grad_()
        c = raw.sigmoid()
        merged = {n: sum(c[i, k] * experts[k][n] for k in range(2)) for i, n in enumerate(["w", "bias"])}
        loss = 0.3 * (c - 0.2).abs().mean(0).sum()
        for k, x in enumerate(data):
            (soft, features), (found, own) = predict(experts[k], x, k), predict(merged, x, k)
            ce = -((soft / t).softmax(1) * (found / t).log_softmax(1)).sum(1).mean() * t**2
            mse = sum(((a - b) ** 2).mean() for a, b in zip(own, features, strict=True)) / 2
            loss = loss + weights[k] * (ce + hidden * mse) / 2
        (gradient,) = torch.autograd.grad(loss, raw)
        gradient = gradient / max(1.0, gradient.norm() + 1e-6)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        share = step / 50 if step < 50 else (step - 50) / 100
        lr = 0.01 + (0.1 - 0.01) * (1 + math.cos(math.pi * share)) / 2
        moved = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        raw = (raw - lr * 1e-5 * raw - lr * moved).detach()
    got = m.alignment_coefficients(
        base,
        experts,
        predict=predict,
        data=data,
        start=0.2,
        steps=60,
        batch_size=64,
        lr=0.1,
        temperature=t,
        hidden=hidden,
        stay=0.3,
        task_weights=weights,
    )
    torch.testing.assert_close(torch.tensor([got["w"], got["bias"]]), raw.sigmoid(), atol=1e-4, rtol=1e-4)


def test_excluded_tensors_keep_the_base() -> None:
    """They are learned without: the rest is as if the experts had not moved them."""
    base, experts = classifiers()
    still = [dict(e) for e in experts]
    experts[1]["bias"] = torch.tensor([0.5, 0, 0, -0.5])
    options = {"predict": linear, "data": inputs(), "steps": 5}
    got = m.alignment_coefficients(base, experts, exclude=["b*s"], **options)
    assert got["bias"] == [0.0, 0.0] and got["w"] != pytest.approx([0.1, 0.1], abs=0.01)
    merged = m.expert_merging(base, experts, exclude=["b*s"], **options)
    assert torch.equal(merged["bias"], base["bias"])
    one = m.alignment_coefficients({"w": base["w"]}, [{"w": e["w"]} for e in experts], **options | {"predict": bare})
    targets = m.alignment_coefficients(base, still, exclude=["bias"], **options)
    assert targets["w"] == pytest.approx(one["w"], rel=1e-5)


def bare(weights: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
    return x @ weights["w"].T


@pytest.mark.parametrize("method", [m.adamerging, m.expert_merging])
def test_learning_is_repeatable_and_keeps_half_types(method: Callable) -> None:
    base, experts = classifiers(torch.float16)
    data = [x * torch.linspace(0.1, 2, 64)[:, None] for x in inputs()]
    options = {"predict": linear, "data": data, "steps": 4, "batch_size": 4, "lr": 0.01}
    a, b, c = (method(base, experts, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(a["w"], b["w"]) and a["w"].dtype == torch.float16 and a["steps"].item() == 3
    assert not torch.equal(a["w"], c["w"])


def test_learning_refuses() -> None:
    base, experts = classifiers()
    with pytest.raises(ValueError, match="adamerging needs a base"):
        m.adamerging(None, experts, predict=linear, data=inputs())
    with pytest.raises(ValueError, match=r"data must hold inputs for each of 2 experts, got \[64\]"):
        m.adamerging(base, experts, predict=linear, data=inputs()[:1])
    with pytest.raises(ValueError, match="per must be one of tensor, expert"):
        m.adamerging(base, experts, predict=linear, data=inputs(), per="layer")
    with pytest.raises(ValueError, match=r"start must be within \(0, 1\), got 0"):
        m.expert_merging(base, experts, predict=linear, data=inputs(), start=0)
    for exclude, text in ((["w", "x*"], "'x\\*', which matches no tensor"), (["*"], "leave at least one tensor")):
        with pytest.raises(ValueError, match=f"exclude must .*{text}"):
            m.expert_merging(base, experts, predict=linear, data=inputs(), exclude=exclude)
    with pytest.raises(TypeError, match="exclude must be a list of patterns, got 'w'"):
        m.expert_merging(base, experts, predict=linear, data=inputs(), exclude="w")
    with pytest.raises(ValueError, match="the loss of adamerging must be finite"):
        m.adamerging(base, experts, predict=lambda w, x, k: w["w"] * math.nan, data=inputs())


# -- CMA-ES -----------------------------------------------------------------------------------------------------------


def spot(scale: float, first: float) -> tuple[dict, list[dict], Callable[[dict], float]]:
    """Task arithmetic's best options are known: the target is made with them."""
    base = {"w": torch.zeros(3)}
    experts = [{"w": torch.tensor([1.0, 0, 0])}, {"w": torch.tensor([0, 1.0, 0])}]
    target = torch.tensor([scale * first, scale, 0])
    return base, experts, lambda state: -float((state["w"] - target).square().sum())


@pytest.mark.parametrize("backend", ["cma", "optuna"])
@pytest.mark.filterwarnings("ignore")
def test_evolve_options_finds_what_scores_best(backend: str) -> None:
    pytest.importorskip({"cma": "cma", "optuna": "optuna"}[backend], reason=f"{backend} is not installed")
    base, experts, score = spot(1.2, 0.5)
    space = {"weights": (-1.0, 3.0, 2)}
    calls = []

    def counted(state: dict) -> float:
        calls.append(score(state))
        return calls[-1]

    options = {"space": space, "fixed": {"scale": 1.0}, "trials": 120, "backend": backend, "seed": 3}
    found = m.evolve_options(base, experts, score=counted, **options)
    assert found.trials == len(calls) == 120 and found.score == max(calls)
    np.testing.assert_allclose(found.options["weights"], [0.6, 1.2], atol=0.1)
    again = m.evolve_options(base, experts, score=score, **options)
    assert again == found
    merged = m.evolve(base, experts, score=score, **options)
    expected = m.task_arithmetic(base, experts, scale=1.0, weights=found.options["weights"])
    assert torch.equal(merged["w"], expected["w"])


@pytest.mark.parametrize("backend", ["cma", "optuna"])
@pytest.mark.filterwarnings("ignore")
def test_one_option_of_another_method(backend: str) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    base, experts, score = spot(0.3, 0.0)
    options = {"method": m.wise_ft, "space": {"alpha": (0, 1)}, "trials": 40, "backend": backend}
    found = m.evolve_options(base, experts[1:], score=score, **options)
    assert found.options["alpha"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("backend", ["cma", "optuna"])
@pytest.mark.filterwarnings("ignore")
def test_evolve_starts_where_it_is_told(backend: str) -> None:
    """The start is scored first, at a bound too, and what follows is spread about it: steps of a sixth of the range."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    base, experts, _ = spot(1, 1)
    space, middle = {"weights": (-1.0, 3.0, 2), "scale": (0.0, 1.0)}, [1.0, 1.0, 0.5]
    for start, expected in (
        (None, middle),
        ({"weights": [0.0, 2.0]}, [0.0, 2.0, 0.5]),
        ({"weights": 0.5, "scale": 1}, [0.5, 0.5, 1.0]),
    ):
        tried = []

        @functools.wraps(m.task_arithmetic)
        def seen(base: dict, experts: list, *, weights: list[float], scale: float) -> dict:
            tried.append([*weights, scale])  # noqa: B023
            return base

        options = {"space": space, "trials": 60, "backend": backend, "start": start, "method": seen}
        found = m.evolve_options(base, experts, score=lambda state: 0.0, **options)
        assert tried[0] == pytest.approx(expected) and len(tried) == found.trials == 60
        early = np.array(tried[1:6])[:, :2]
        assert abs(early.mean(0) - expected[:2]).max() < 1.0 and early.std() > 0.1
    best = m.evolve_options(base, experts, score=lambda s: -len(tried), **options | {"trials": 1})
    assert best.options == {"weights": [0.5, 0.5], "scale": 1.0} and best.trials == 1


def test_evolve_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts, score = spot(1, 1)
    for space in ({}, {"scale": (1, 1)}, {"scale": (1,)}):
        with pytest.raises(ValueError, match="space must hold options with"):
            m.evolve(base, experts, score=score, space=space)
    with pytest.raises(ValueError, match="backend must be one of cma, optuna"):
        m.evolve(base, experts, score=score, space={"scale": (0, 1)}, backend="pso")
    with pytest.raises(ValueError, match="trials must be at least 1"):
        m.evolve(base, experts, score=score, space={"scale": (0, 1)}, trials=0)
    with pytest.raises(ValueError, match="ties needs a base"):
        m.evolve(None, experts, score=score, method=m.ties, space={"scale": (0, 1)})
    space = {"weights": (0, 1, 2), "scale": (0, 2)}
    for start, text in (
        ({"density": 1}, r"start must hold options of space, weights, scale, got 'density'"),
        ({"weights": [1]}, r"start\['weights'\] must be a number or 2 numbers, got \[1\]"),
        ({"scale": [1]}, r"start\['scale'\] must be a number, got \[1\]"),
        ({"weights": [0.5, 1.5]}, r"start\['weights'\] must be within its range, 0 to 1, got \[0.5, 1.5\]"),
        ({"scale": math.nan}, r"start\['scale'\] must be within its range, 0 to 2, got nan"),
    ):
        with pytest.raises(ValueError, match=text):
            m.evolve(base, experts, score=score, space=space, start=start)
    for backend in ("cma", "optuna"):
        monkeypatch.setitem(sys.modules, backend, None)
        with pytest.raises(ImportError, match=f"backend='{backend}' needs .* pip install"):
            m.evolve(base, experts, score=score, space={"scale": (0, 1)}, backend=backend)


def test_a_score_that_is_no_number_is_refused() -> None:
    pytest.importorskip("cma", reason="cma is not installed")
    base, experts, _ = spot(1, 1)
    with pytest.raises(ValueError, match="score must be finite, got nan"):
        m.evolve(base, experts, score=lambda state: math.nan, space={"scale": (0, 1)})


# -- M2N2 -------------------------------------------------------------------------------------------------------------


def test_mating_crosses_at_the_split_point() -> None:
    a, b = torch.eye(6)[0] + torch.eye(6)[4], torch.eye(6)[1] + torch.eye(6)[5]  # a right angle between them
    s, c = math.sin(0.2 * math.pi / 2), math.cos(0.2 * math.pi / 2)
    torch.testing.assert_close(mate(a, b, 0.2, 3), torch.tensor([c, s, 0, 0, s, c]))
    torch.testing.assert_close(mate(a, a, 0.2, 3), a)
    torch.testing.assert_close(mate(a, 3 * a, 0.25, 3), a * torch.tensor([1.5] * 3 + [2.5] * 3))
    torch.testing.assert_close(mate(a, 0 * a, 0.25, 3), a * torch.tensor([0.75] * 3 + [0.25] * 3))


def test_natural_niches_joins_specialists() -> None:
    """One model solves the first half, the other the second: only a child with a part of each solves all."""
    size = 8
    first, second = torch.full((size,), -1.0), torch.full((size,), -1.0)
    first[: size // 2], second[size // 2 :] = 1.0, 1.0
    experts = [{"w": t.reshape(2, 4).half(), "steps": torch.tensor(2)} for t in (first, second)]

    def score(state: dict[str, Tensor]) -> Tensor:
        return (state["w"] > 0).float().flatten()

    got = m.natural_niches(None, experts, score=score, steps=60, population=6)
    assert score(got).mean() == 1 and got["w"].dtype == torch.float16 and got["steps"].item() == 2
    again = m.natural_niches(None, experts, score=score, steps=60, population=6)
    assert torch.equal(got["w"], again["w"])
    other = m.natural_niches(None, experts, score=score, steps=60, population=6, seed=1)
    assert not torch.equal(got["w"], other["w"])


def test_natural_niches_with_mutation_finds_what_no_parent_has() -> None:
    """Children of the two models lie between them, where the third number is 0."""
    experts = [{"w": torch.tensor([1.0, 0, 0])}, {"w": torch.tensor([0, 1.0, 0])}]

    def third(mutation: float, seed: int = 0) -> float:
        score = lambda state: state["w"].clamp(min=0)  # noqa: E731
        found = m.natural_niches(None, experts, score=score, steps=30, population=6, mutation=mutation, seed=seed)
        return found["w"][2].item()

    assert third(0) == 0 and third(0.5) > 0.1
    assert third(0.5) == third(0.5) != third(0.5, seed=1)


def test_natural_niches_competition_keeps_the_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three solve examples 0 to 2, one solves example 3 alone: it stays with competition, and dies out without."""
    experts = [{"w": torch.tensor([1.0, 1.0, 1.0, 0.0])} for _ in range(3)] + [{"w": torch.tensor([0.0, 0, 0, 1])}]
    parents: list[float] = []

    def copy(a: Tensor, b: Tensor, weight: float, split: int) -> Tensor:
        parents.append(float(a[3]))
        return a

    monkeypatch.setattr(evolution, "mate", copy)
    for alpha, kept in ((1.0, True), (0.0, False)):
        parents.clear()
        m.natural_niches(None, experts, score=lambda s: s["w"], population=4, steps=100, alpha=alpha)
        assert (max(parents[-50:]) == 1) == kept


def test_natural_niches_attracts_who_solves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second parent is one that solves what the first one cannot."""
    experts = [{"w": torch.tensor(w)} for w in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])]

    def copy(a: Tensor, b: Tensor, weight: float, split: int) -> Tensor:
        assert not torch.equal(a, b)
        return a

    monkeypatch.setattr(evolution, "mate", copy)
    m.natural_niches(None, experts, score=lambda s: s["w"], steps=50)


def test_natural_niches_draws_from_all_while_nobody_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that score nothing stay until four are there; then the first one goes. Every place is drawn."""
    made, places = [0.0, 1.0], []

    def count(a: Tensor, b: Tensor, weight: float, split: int) -> Tensor:
        places.extend((min(len(made), 4), made[-4:].index(parent)) for parent in (a.item(), b.item()))
        made.append(len(made))
        return torch.tensor([float(made[-1])])

    monkeypatch.setattr(evolution, "mate", count)
    experts = [{"w": torch.tensor([k])} for k in made]
    m.natural_niches(None, experts, score=lambda s: torch.zeros(3), population=4, steps=80)
    assert [size for size, _ in places[::2]] == [2, 3] + [4] * 78
    shares = torch.bincount(torch.tensor([place for size, place in places if size == 4])) / (2 * 78)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.1, rtol=0)


def test_natural_niches_never_loses_the_best_of_its_seeds_without_steps() -> None:
    base, experts = {"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": -torch.ones(2)}]
    got = m.natural_niches(base, experts, score=lambda s: (s["w"] > 0).float(), steps=0)
    assert torch.equal(got["w"], torch.ones(2))


def test_natural_niches_refuses() -> None:
    experts = [{"w": torch.ones(2)}, {"w": -torch.ones(2)}]
    with pytest.raises(ValueError, match=r"natural_niches needs 2 to 20 \(population\) models, base included, got 1"):
        m.natural_niches(None, experts[:1], score=lambda s: s["w"])
    with pytest.raises(ValueError, match="score must give numbers"):
        m.natural_niches(None, experts, score=lambda s: s["w"])
    with pytest.raises(ValueError, match="score must give numbers"):
        m.natural_niches(None, experts, score=lambda s: s["w"].abs().mean())
