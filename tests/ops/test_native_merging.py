"""The core's passes over task vectors, held to their definitions: every dtype, odd sizes, every option, NaN, refusals.

K experts, n elements.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mergetune import _C, ops
from mergetune.ops import reference

VARIANTS = [name for name in _C.build_info()["cpu_variants"] if _C.cpu_variant_runs(name)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
VOTES = [None, "sum", "count"]
SIZES = [(1, 1), (2, 17), (3, 511), (8, 512), (9, 1543)]


@pytest.fixture(params=VARIANTS, autouse=True)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with every variant of the core."""
    for name in ("merge_deltas_cpu", "count_around_cpu"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *arguments, kernel=kernel: kernel(*arguments, variant=request.param))
    return request.param


def draw(k: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Coarse numbers, so that deltas equal limits and votes are zero now and then."""
    generator = torch.Generator().manual_seed(1000 * k + n)
    rows = (8 * torch.randn(k + 1, n, generator=generator)).round() / 8
    return rows[0].to(dtype), list(rows[1:].to(dtype))


def truth(base: Tensor | None, experts: list[Tensor], weights: list[float], **options) -> Tensor:
    as_double = lambda t: None if t is None else torch.as_tensor(t, dtype=torch.float64)  # noqa: E731
    for name in ("limits", "votes", "shares"):
        options[name] = as_double(options.get(name))
    rows = torch.stack([expert.double() for expert in experts])
    return reference.merge_deltas(as_double(base), rows, as_double(weights), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vote", VOTES)
def test_merge_deltas(dtype: torch.dtype, size: tuple[int, int], vote: str | None) -> None:
    (k, n), (base, experts) = size, draw(*size, dtype)
    rising = [1 + 0.5 * i for i in range(k)]
    kept = torch.rand(k, n, generator=torch.Generator().manual_seed(n)) > 0.3
    choices = {"base": [None, base], "limits": [None, rising], "kept": [None, kept], "scale": [1.0, -0.3]}
    choices |= {"votes": [None, rising[::-1]], "shares": [None, rising]} if vote else {}
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values, strict=True)) | {"vote": vote}
        start = options.pop("base")
        got = ops.merge_deltas(start, experts, rising, **options)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = truth(start, experts, rising, **options)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6 * k, msg=str(options))
        same = ops.merge_deltas(start, experts, rising, **options, backend="torch")
        torch.testing.assert_close(got, same, rtol=1e-6, atol=1e-6 * k)


def test_definition_is_ties_written_out() -> None:
    """A loop over the elements, as algorithm 1 of arXiv 2306.01708 has it."""
    base, experts = draw(4, 300, torch.float64)
    limits, weights, merged = [0.5, 1.0, 1.5, 2.0], [1.0, 2.0, 0.5, 1.5], []
    for i in range(300):
        taus = [(e[i] - base[i]).item() for e in experts]
        kept = [tau if abs(tau) >= limit else 0.0 for tau, limit in zip(taus, limits, strict=True)]
        sign = 1 if sum(kept) >= 0 else -1
        agree = [(w, tau) for w, tau in zip(weights, kept, strict=True) if tau * sign > 0]
        merged.append(base[i].item() + 0.7 * sum(w * tau for w, tau in agree) / max(len(agree), 1))
    options = {"limits": limits, "vote": "sum", "shares": [1.0] * 4, "scale": 0.7}
    for backend in ("cpp", "torch"):
        got = ops.merge_deltas(base, experts, weights, **options, backend=backend)
        torch.testing.assert_close(got, torch.tensor(merged, dtype=torch.float64))


@pytest.mark.parametrize(("vote", "bad"), [(None, math.inf), ("sum", -math.inf), *((v, math.nan) for v in VOTES)])
def test_what_is_not_finite_is_not_hidden(vote: str | None, bad: float) -> None:
    base, experts = draw(3, 40)
    experts[1][7] = bad
    base[9] = math.nan
    shares = [1.0] * 3 if vote else None
    got = ops.merge_deltas(base, experts, [1.0] * 3, limits=[0.5] * 3, vote=vote, shares=shares)
    assert got.isfinite().sum() == 38 and not got[7].isfinite() and not got[9].isfinite()


def test_mixed_dtypes_and_memory_that_is_not_aligned() -> None:
    base, experts = draw(2, 100)
    raw = torch.zeros(401, dtype=torch.uint8)
    raw[1:] = experts[0].view(torch.uint8)
    odd = torch.frombuffer(raw.numpy(), dtype=torch.float32, count=100, offset=1)
    assert odd.data_ptr() % 4
    got = ops.merge_deltas(base.half(), [odd, experts[1].double()], [1, 2])
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, truth(base.half(), experts, [1, 2]))
    strided = torch.stack([base, base], 1)[:, 0]
    assert torch.equal(ops.merge_deltas(strided, experts, [1, 2]), ops.merge_deltas(base, experts, [1, 2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 512, 1543])
@pytest.mark.parametrize("based", [False, True])
def test_count_around(dtype: torch.dtype, n: int, based: bool) -> None:
    base, (values,) = draw(1, n, dtype)
    values[1::7] = torch.nan
    base = base if based else None
    for low, high in ((-math.inf, math.inf), (0.5, 1.5), (1.0, 1.0), (-0.3, 0.3), (0.0, math.inf)):
        counts, between = ops.count_around(values, low, high, base=base)
        expected = reference.count_around(values.double(), low, high, base=None if base is None else base.double())
        assert list(counts) == expected[0] and torch.equal(between.double(), expected[1])
        x = [
            v if base is None else abs(v - b)
            for v, b in zip(values.tolist(), (values if base is None else base).tolist(), strict=True)
        ]
        assert counts[0] == sum(v < low for v in x) and counts[1] == sum(v == low for v in x)
        assert between.tolist() == [v for v in x if low < v < high]


def test_other_float_types_are_widened() -> None:
    base, experts = draw(2, 100)
    eight = [expert.to(torch.float8_e4m3fn) for expert in experts]
    got = ops.merge_deltas(base, eight, [1, 2])
    torch.testing.assert_close(got, ops.merge_deltas(base, [expert.float() for expert in eight], [1, 2]))


def test_the_default_device_does_not_matter() -> None:
    base, experts = draw(2, 100)
    expected = ops.merge_deltas(base, experts, [1, 2]), ops.count_around(base, 0, 1)
    with torch.device("meta"):
        got = ops.merge_deltas(base, experts, [1, 2]), ops.count_around(base, 0, 1)
    assert torch.equal(got[0], expected[0]) and got[1][0] == expected[1][0]


def test_bounds_are_rounded_to_the_values_dtype() -> None:
    counts, _ = ops.count_around(torch.tensor([0.1]), 0.1, 0.1 + 1e-12)
    assert list(counts) == [0, 1, 0, 0]


def test_refusals() -> None:
    base, experts = draw(2, 10)
    with pytest.raises(ValueError, match=r"base must have shape \[10\], got \[9\]"):
        ops.merge_deltas(base[:9], experts, [1, 1])
    with pytest.raises(ValueError, match=r"experts\[1\] must have shape \[10\], got \[4\]"):
        ops.merge_deltas(base, [experts[0], experts[1][:4]], [1, 1])
    with pytest.raises(ValueError, match="weights must hold one number for each of 2 experts, got 1"):
        ops.merge_deltas(base, experts, [1])
    with pytest.raises(ValueError, match=r"experts must be tensors \[n\], at least one, got \[\]"):
        ops.merge_deltas(base, [], [])
    with pytest.raises(ValueError, match="vote must be None, sum or count, got 'most'"):
        ops.merge_deltas(base, experts, [1, 1], vote="most")
    with pytest.raises(ValueError, match="votes and shares must be None without a vote"):
        ops.merge_deltas(base, experts, [1, 1], shares=[1, 1])
    with pytest.raises(TypeError, match="kept must be bool, got torch.float32"):
        ops.merge_deltas(base, experts, [1, 1], kept=torch.ones(2, 10))
    with pytest.raises(TypeError, match="values must be floating point, got torch.int64"):
        ops.merge_deltas(base.long(), experts, [1, 1])
    for work in (
        lambda: ops.merge_deltas(base.to("meta"), experts, [1, 1]),
        lambda: ops.merge_deltas(base, experts, [1, 1], kept=torch.ones(2, 10, dtype=torch.bool, device="meta")),
        lambda: ops.count_around(base, 1, 2, base=base.to("meta")),
    ):
        with pytest.raises(ValueError, match="must hold numbers, got a tensor on the device meta, which has none"):
            work()
    with pytest.raises(ValueError, match="low must be at most high, got 2 and 1"):
        ops.count_around(base, 2, 1)
    with pytest.raises(ValueError, match="backend must be None or one of cpp, torch, got 'triton'"):
        ops.count_around(base, 1, 2, backend="triton")
    names, at = "dtype must be 'float32', 'float64', 'float16' or 'bfloat16', got 'int8'", base.data_ptr()
    with pytest.raises(ValueError, match=names):
        _C.count_around_cpu("int8", at, 0, 10, 0.0, 1.0, at)
    with pytest.raises(ValueError, match=names):
        _C.merge_deltas_cpu("int8", (0, [at], 0, 0, at, 0, 0, False, 1.0, 10), at)
