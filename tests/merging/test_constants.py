"""Tensors that no expert moved: every method leaves them as they are, and no statistic sees them; finite statistics."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergetune import merging as m
from mergetune.merging.methods import METHODS

STREAMED = [name for name in METHODS if hasattr(getattr(m, name), "plan")]
SHAPES = {"blocks.0.weight": (6, 5), "blocks.1.weight": (7, 4), "bias": (9,), "conv": (3, 2, 2, 2)}
CONSTANTS = {
    "attention mask": torch.full((8, 8), -math.inf).triu(1),
    "bound": torch.tensor(math.inf),
    "half mask": torch.full((4, 4), -math.inf, dtype=torch.float16),
    "frozen": torch.linspace(-3, 3, 200),
    "zeros": torch.zeros(50, 2),
    "nothing": torch.empty(0, 3),
}


def draw(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def models(count: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = draw(0)
    return base, [{name: base[name] + t for name, t in draw(k + 1, 0.3).items()} for k in range(count)]


def case(name: str, most: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict]:
    """Base, experts and options of a method."""
    base, experts = models(1 if name == "slerp" else min(METHODS[name].most or most, most))
    positive = [{n: t.abs() for n, t in draw(k + 1000).items()} for k in range(len(experts))]
    options = {
        "fisher_average": {"fishers": positive, "normalize": "norm"},
        "ota_ffg": {"second_moments": positive},
        "metrics_average": {"metrics": [0.5 + 0.01 * k for k in range(len(experts))]},
        "layerwise": {"coefficients": {n: [0.3] * len(experts) for n in SHAPES}},
        "lines": {"beta": 0.4},
    }.get(name, {})
    return base, experts, options


@pytest.mark.parametrize("name", STREAMED)
def test_tensors_that_are_equal_everywhere_stay_and_change_no_other_tensor(name: str) -> None:
    base, experts, options = case(name)
    expected = getattr(m, name)(base, experts, **options)
    got = getattr(m, name)(base | CONSTANTS, [e | CONSTANTS for e in experts], **options)
    assert got.keys() == base.keys() | CONSTANTS.keys()
    assert all(torch.equal(got[n], expected[n]) for n in SHAPES)
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in CONSTANTS.items())


def test_searches_and_sizes_do_not_see_them_either() -> None:
    base, experts = models(2)
    masked = base | CONSTANTS, [e | CONSTANTS for e in experts]
    assert m.compeft_size(masked[0], masked[1][:1]) == m.compeft_size(base, experts[:1])

    def score(state: dict[str, Tensor]) -> Tensor:
        return (state["bias"] > 0).double()

    found, expected = (m.natural_niches(b, e, score=score, steps=5) for b, e in (masked, (base, experts)))
    assert all(torch.equal(found[n], expected[n]) for n in SHAPES) and torch.equal(found["bound"], CONSTANTS["bound"])

    def predict(state: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
        return x @ state["blocks.0.weight"].T

    learning = {"predict": predict, "data": [torch.ones(4, 5), -torch.ones(3, 5)], "steps": 3}
    found, expected = (m.adamerging(b, e, **learning) for b, e in (masked, (base, experts)))
    assert all(torch.equal(found[n], expected[n]) for n in SHAPES) and torch.equal(found["bound"], CONSTANTS["bound"])


@pytest.mark.parametrize("name", STREAMED)
def test_models_that_are_all_equal_are_the_result(name: str) -> None:
    base, experts, options = case(name)
    got = getattr(m, name)(base, [base] * len(experts), **options)
    assert all(torch.equal(got[n], t) for n, t in base.items())


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize(
    ("values", "where", "said"),
    [
        ([math.nan], 0, "1 NaN and 0 infinite"),
        ([math.inf, -math.inf, math.nan], -1, "1 NaN and 2 infinite"),
        ([-math.inf], "base", "0 NaN and 1 infinite"),
    ],
)
def test_values_that_are_not_finite_are_named_before_any_work(
    name: str, values: list[float], where: int | str, said: str, tmp_path: Path
) -> None:
    base, experts, options = case(name)
    state = base if where == "base" else experts[int(where)]
    state["bias"][: len(values)] = torch.tensor(values)
    files = [tmp_path / f"{k}.safetensors" for k in range(len(experts) + 1)]
    for file, tensors in zip(files, [base, *experts], strict=True):
        save_file(tensors, file)
    number = 0 if where == "base" else int(where) % len(experts) + 1
    argument = "base" if where == "base" else f"experts[{number - 1}]"
    with pytest.raises(ValueError, match=re.escape(f"{argument} ({files[number]}) holds {said} values")) as error:
        m.merge_files(getattr(m, name), files[0], files[1:], tmp_path / "out.safetensors", **options)
    assert "'bias'" in str(error.value) and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["fisher_average", "ota_ffg"])
def test_statistics_that_are_not_finite_are_named(name: str) -> None:
    base, experts, options = case(name)
    (argument, states) = next(item for item in options.items() if item[0] != "normalize")
    states[1]["bias"][2] = math.inf
    with pytest.raises(
        ValueError, match=rf"{argument}\[1\] must hold finite numbers, got 0 NaN and 1 infinite .*'bias'"
    ):
        getattr(m, name)(base, experts, **options)


MANY = [(name, {}) for name in STREAMED if METHODS[name].most is None]
MANY += [("pcb", {"between": "pairs"}), ("pcb", {"between": "normalized"}), ("pcb", {"scope": "tensor"})]
MANY += [("delta_guided", {"per": "element"}), ("delta_guided", {"power": 400.0}), ("ties", {"sign": "count"})]


@pytest.mark.parametrize(("name", "more"), MANY)
def test_300_experts_in_float32_merge_as_in_float64(name: str, more: dict) -> None:
    base, experts, options = case(name, 300)
    options = options | more

    def doubled(value: Any) -> Any:
        if isinstance(value, list) and isinstance(value[0], dict):
            return [{n: t.double() for n, t in state.items()} for state in value]
        return value

    got = getattr(m, name)(base, experts, **options)
    wide = {argument: doubled(value) for argument, value in options.items()}
    exact = getattr(m, name)(doubled([base])[0], doubled(experts), **wide)
    for n in SHAPES:
        assert got[n].isfinite().all()
        torch.testing.assert_close(got[n].double(), exact[n], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("between", ["raw", "normalized", "pairs"])
@pytest.mark.parametrize("count", [84, 85, 88, 89, 120])
def test_pcb_gives_the_numbers_of_exact_arithmetic_for_many_experts(between: str, count: int) -> None:
    """Written in float64, where exp(120) is far from the largest number."""
    base, experts = models(count)
    got = m.pcb(base, experts, between=between, ratio=0.3)
    deltas = torch.stack([torch.cat([(e[n] - base[n]).flatten().double() for n in SHAPES]) for e in experts])
    total = deltas.shape[1]
    ranks = deltas.abs().sort(1).values
    a = deltas.abs().clamp(ranks[:, int(total * 1e-4), None], ranks[:, int(total * (1 - 1e-4) - 1), None])

    def unit(x: Tensor) -> Tensor:
        return (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))

    n = deltas.sign() * unit(a)
    against = {
        "raw": lambda: torch.tanh(deltas * deltas.sum(0)),
        "normalized": lambda: torch.tanh(deltas * n.sum(0)),
        "pairs": lambda: torch.tanh(n[:, None] * n[None]).sum(1),
    }[between]()
    balance = (count * unit(a).square()).exp() * against
    kept = balance.maximum(balance.sort(1).values[:, min(int(total * 0.7), total - 1), None])
    shares = unit(kept)
    mixed = (shares * deltas.sign() * a).sum(0) / shares.sum(0).clamp(min=1e-12)
    expected = torch.cat([base[name].flatten().double() for name in SHAPES]) + mixed
    found = torch.cat([got[name].flatten().double() for name in SHAPES])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
