"""Every closed-form merging method against a second, plain numpy implementation; what must hold for all; refusals."""

import inspect
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from merging_cases import (
    EMPTY,
    SHAPES,
    arrays,
    close,
    draw,
    lora,
    models,
    positive,
    short_stretches,  # noqa: F401
)
from torch import Tensor

from mergetune import merging as m
from mergetune.merging import order_statistics, sources
from mergetune.merging.methods import METHODS

# -- what must hold for all --------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(sources, "STRETCH", 4096)
    monkeypatch.setattr(order_statistics, "FEW", 1000)
    generator = torch.Generator().manual_seed(0)
    rows = LARGE[kind](torch.randn(2, 150_000, generator=generator, dtype=dtype))
    check_order({"a": rows[:, :90_000], "none": rows[:, :0], "b": rows[:, 90_000:]})


def test_order_statistics_where_the_sample_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STRETCH", 512)
    monkeypatch.setattr(order_statistics, "FEW", 1000)
    monkeypatch.setattr(
        order_statistics, "_sample", lambda *_: np.sort(np.random.default_rng(0).normal(5, 1e-3, (1, 4096)))
    )
    check_order({"x": torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))})


def test_order_statistics_keep_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the sample is of no use, no pass keeps more than an eighth of the values."""
    monkeypatch.setattr(sources, "STRETCH", 4096)
    monkeypatch.setattr(order_statistics, "FEW", 1000)
    monkeypatch.setattr(order_statistics, "_sample", lambda *_: np.full((1, 4096), 1e9, np.float32))
    kept, search = [], order_statistics._Search.narrow

    def watched(self, low: float, high: float, counts: list[int], between: np.ndarray) -> None:
        kept.append(len(between))
        search(self, low, high, counts, between)

    monkeypatch.setattr(order_statistics._Search, "narrow", watched)
    check_order({"x": torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))})
    assert max(kept) <= 100_000 / 8 + 64


def test_order_statistics_among_few_that_no_sample_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty values in a small tensor, between those of a large one: fewer than a sample of them would need."""
    monkeypatch.setattr(order_statistics, "FEW", 1000)
    monkeypatch.setattr(order_statistics, "_sample", lambda *_: np.repeat(np.float32([0, 10]), 500)[None])
    between = 1 + torch.rand(1, 20, generator=torch.Generator().manual_seed(0))
    rows = {"large": torch.tensor([0.0, 10.0]).repeat(3000)[None], "small": between}
    experts = [{name: row[0] for name, row in rows.items()}]
    ranks = list(range(2999, 3022))
    got = order_statistics.order_statistics(lambda part: part.experts, list(rows), None, experts, ranks)
    assert got == torch.cat([*rows.values()], 1).sort(1).values[:, ranks].T.tolist()


def test_thresholds_of_mixed_dtypes_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """One float64 expert makes all differences float64 ones."""
    monkeypatch.setattr(order_statistics, "FEW", 1000)
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
    monkeypatch.setattr(sources, "STRETCH", 64)
    wide, tall = torch.randn(60, 70), torch.randn(70, 60)
    states = [Counted(x=wide), Counted(x=tall.T)]
    got = m.task_arithmetic(states[0], states[1:], scale=1.0)["x"]
    torch.testing.assert_close(got, tall.T)
    assert max(state.asked for state in states) < 10  # of 66 stretches


def test_tensors_without_numbers_are_refused_by_name() -> None:
    for base, expert, where in (("meta", "cpu", "base"), ("cpu", "meta", r"experts\[0\]"), ("meta", "meta", "base")):
        with pytest.raises(ValueError, match=rf"{where}\['x'\] must hold numbers, got a tensor on the device meta"):
            m.task_arithmetic({"x": torch.ones(4, device=base)}, [{"x": torch.ones(4, device=expert)}])


def test_values_that_are_nan_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_statistics, "FEW", 1000)
    values = torch.arange(2000.0)
    values[::2] = torch.nan
    got = order_statistics.order_statistics(
        lambda part: part.experts, ["x"], None, [{"x": values}], [0, 999, 1000, 1999]
    )
    assert got[:2] == [[1.0], [1999.0]] and math.isnan(got[2][0]) and math.isnan(got[3][0])


def check_order(rows: dict[str, Tensor]) -> None:
    everything = torch.cat([*rows.values()], 1)
    ranks = [int(share * (everything.shape[1] - 1)) for share in (0, 1e-4, 0.03, 0.5, 0.8, 0.99, 0.9999, 1)]
    experts = [{name: x[k] for name, x in rows.items()} for k in range(len(everything))]
    got = order_statistics.order_statistics(lambda part: part.experts, list(rows), None, experts, ranks)
    assert got == everything.sort(1).values[:, ranks].T.tolist()


# -- refusals ----------------------------------------------------------------------------------------------------------


def changed(state: dict[str, Tensor], **tensors_: Tensor) -> dict[str, Tensor]:
    return state | tensors_


@pytest.mark.parametrize(
    ("merge", "error", "text"),
    [
        (lambda b, e: m.ties(None, e), ValueError, "ties needs a base"),
        (lambda b, e: m.lora_lego(b, e), ValueError, "base must be None for lora_lego"),
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
            r"experts\[1\] must hold the tensors of base, got 1 different names: experts\[1\] lacks 'scale'",
        ),
        (
            lambda b, e: m.average(None, [e[0], changed(e[1], more=torch.ones(1))]),
            ValueError,
            r"experts\[1\] must hold the tensors of experts\[0\], got 1 different names: experts\[1\] holds 'more'",
        ),
        (
            lambda b, e: m.average(b, [changed(e[0], scale=torch.ones(2))]),
            ValueError,
            r"experts\[0\]\['scale'\] must have shape \[\] as base has, got \[2\]",
        ),
        (
            lambda b, e: m.average(b, [changed(e[0], scale=torch.tensor(1))]),
            TypeError,
            r"experts\[0\]\['scale'\] must be floating point, as base has torch.float64, got torch.int64",
        ),
        (
            lambda b, e: m.average(b, [changed(e[0], steps=torch.tensor(8))]),
            ValueError,
            r"experts\[0\]\['steps'\] must equal base\['steps'\], got other values: torch.int64 tensors",
        ),
        (
            lambda b, e: m.average(b, [changed(e[0], mask=torch.tensor([True, True]))]),
            ValueError,
            r"experts\[0\]\['mask'\] must equal base\['mask'\], got other values: torch.bool",
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
            r"fishers\[0\] must hold the tensors of the experts",
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
        (
            lambda b, e: m.fisher_average(b, e, fishers=[b] * 3, weights=[1, -1, 1]),
            ValueError,
            r"weights must not be negative, nor all zero, got \[1.0, -1.0, 1.0\]",
        ),
        (lambda b, e: m.fisher_average(b, e, fishers=[b] * 3, weights=[0, 0, 0]), ValueError, "nor all zero"),
        (lambda b, e: m.fisher_average(b, e, fishers=[b] * 3, floor=0), ValueError, "floor must be positive, got 0"),
        (lambda b, e: m.ota_ffg(b, e, second_moments=[b] * 3, power=0), ValueError, "power must be positive, got 0"),
        (
            lambda b, e: m.evolve(b, e, score=lambda state: 0.0, space={"scale": (0, 1)}, method=print),
            ValueError,
            "method must be a function of mergetune.merging: .*ties.*; got <built-in function print>",
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
        (lambda b, e: m.layerwise(b, e, coefficients={}), ValueError, "coefficients must hold every floating"),
        (lambda b, e: m.lines(b, e[:2]), ValueError, "beta must be given for 2 experts"),
        (
            lambda b, e: m.lines({"ctx": b["scale"]}, [{"ctx": b["scale"]}]),
            ValueError,
            "lines needs names with block",
        ),
        (lambda b, e: m.compeft(b, e), ValueError, "compeft needs 1 expert"),
        (lambda b, e: m.widen(b, e, normalize=True, calibration=0), ValueError, "calibration must be positive with"),
        (lambda b, e: m.opcm(b, e, alpha=2), ValueError, r"alpha must be in \[0, 1\], got 2"),
        (lambda b, e: m.lora_lego(None, e), ValueError, "must hold only LoRA factors, in pairs of matrices lora_A"),
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
    other = {name.replace("x.", "y."): factor for name, factor in good.items()}
    with pytest.raises(ValueError, match=r"experts\[1\] must hold the tensors of experts\[0\].*differ in 'x.lora_A"):
        m.lora_lego(None, [good, other])
    with pytest.raises(ValueError, match="rank must be from 1 to the sum of the experts' ranks, 6, got 7"):
        m.lora_lego(None, [good, good], rank=7)
    with pytest.raises(ValueError, match=r"scales must be positive, got \[1.0, 0.0\]"):
        m.lora_lego(None, [good, good], scales=[1, 0])
    with pytest.raises(ValueError, match="scales must hold one number for each of 2 experts, got 1"):
        m.lora_lego(None, [good, good], scales=[1])


def test_values_that_are_not_finite() -> None:
    mask = {"mask": torch.full((40,), -math.inf), "w": torch.ones(3)}
    assert torch.equal(m.task_arithmetic(mask, [mask, mask])["mask"], mask["mask"])  # the same everywhere: copied
    bad = {"mask": torch.zeros(40), "w": torch.tensor([1, math.nan, 1])}
    with pytest.raises(ValueError, match="'mask' must be finite.*base holds 0 NaN and 40 infinite values, and 1 more"):
        m.task_arithmetic(mask, [bad])
    small = {"w": torch.tensor([6e4], dtype=torch.float16)}
    with pytest.raises(ValueError, match="too large for torch.float16"):
        m.negate(small, [{"w": -small["w"]}])
