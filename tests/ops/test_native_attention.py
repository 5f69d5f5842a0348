"""The native prefix attention through its raw-pointer interface, against its definition in float64.

M prompts, C sequences, T packed tokens, S prefix tokens, H heads, d head width.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mergetune import _C
from mergetune.ops import reference

BUILT = _C.build_info()["cpu_variants"]
RUNNABLE = [name for name in BUILT if _C.cpu_variant_runs(name)]
VARIANTS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in RUNNABLE, reason=f"this processor has no {name}"))
    for name in BUILT
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
INPUTS = ("q", "k", "v", "prefix_k", "prefix_v")
RESULTS = ("out", *(f"d_{name}" for name in INPUTS))


def heads(t: Tensor) -> tuple[int, int, int, int]:
    assert t.stride(3) == 1 or t.shape[3] == 1
    return (t.data_ptr(), *t.stride()[:3])


def nan_like(t: Tensor) -> Tensor:
    return torch.full(t.shape, torch.nan, dtype=t.dtype)  # what is not written shows


@dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    d_out: Tensor
    lengths: tuple[int, ...]
    causal: bool

    @staticmethod
    def random(
        m: int,
        lengths: tuple[int, ...],
        s: int,
        h: int,
        d: int,
        dtype: torch.dtype = torch.float64,
        *,
        last_only: bool = False,
        causal: bool = True,
        size: float = 1.0,
    ) -> "Problem":
        g = torch.Generator().manual_seed(m + sum(lengths) + s + h + d)
        tokens = sum(lengths)
        queries = len(lengths) if last_only else tokens
        draw = lambda rows: (size * torch.randn(m, rows, h, d, generator=g, dtype=torch.float64)).to(dtype)  # noqa: E731
        return Problem(*(draw(rows) for rows in (queries, tokens, tokens, s, s)), draw(queries) / size, lengths, causal)

    def inputs(self) -> list[Tensor]:
        return [getattr(self, name) for name in INPUTS]

    def to(self, dtype: torch.dtype) -> "Problem":
        return replace(self, **{name: getattr(self, name).to(dtype) for name in (*INPUTS, "d_out")})

    def sizes(self) -> dict[str, int]:
        m, tokens, h, d = self.k.shape
        s, c = self.prefix_k.shape[1], len(self.lengths)
        return {"M": m, "Tq": self.q.shape[1], "T": tokens, "S": s, "C": c, "H": h, "d": d}

    def run(
        self, variant: str = "", threads: int = 1, results: list[Tensor] | None = None, **changed: object
    ) -> list[Tensor]:
        """The output and the five gradients, written to `results` if given."""
        results = results or [nan_like(t) for t in (self.q, *self.inputs())]
        offsets = torch.tensor([0, *self.lengths]).cumsum(0)
        common = {
            "dtype": str(self.q.dtype).removeprefix("torch."),
            **{name: heads(t) for name, t in zip(INPUTS, self.inputs(), strict=True)},
            "offsets_ptr": offsets.data_ptr(),
            **self.sizes(),
            "causal": self.causal,
            "num_threads": threads,
            "variant": variant,
        }
        _C.prefix_attention_cpu(**(common | {"out": heads(results[0])} | changed))
        gradients = ("dq", "dk", "dv", "d_prefix_k", "d_prefix_v")
        gradients = {name: heads(t) for name, t in zip(gradients, results[1:], strict=True)}
        _C.prefix_attention_backward_cpu(**(common | {"d_out": heads(self.d_out)} | gradients | changed))
        return results

    def definition(self) -> list[Tensor]:
        """The same in plain torch, in the dtype of the problem."""
        inputs = [t.detach().clone().requires_grad_() for t in self.inputs()]
        out = reference.prefix_attention(*inputs, self.lengths, causal=self.causal)
        gradients = torch.autograd.grad(out, inputs, self.d_out, allow_unused=True)
        pairs = zip(inputs, gradients, strict=True)
        return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in pairs)]

    def check(self, variants: list[str] = RUNNABLE, rtol: float | None = None) -> None:
        """Every result against the definition in float64, relative to its largest value or to 1, which is more."""
        truths, plain = self.to(torch.float64).definition(), None
        if self.q.dtype == torch.bfloat16:
            plain = [largest(p.double() - t) for p, t in zip(self.definition(), truths, strict=True)]
        rtol = rtol or {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-3}[self.q.dtype]
        for variant in variants:
            for i, (name, ours, truth) in enumerate(zip(RESULTS, self.run(variant), truths, strict=True)):
                error, allowed = largest(ours.double() - truth), rtol * max(1.0, largest(truth))
                allowed += 2 * plain[i] if plain else 0.0
                assert error <= allowed, f"{variant}: {name} is off by {error}, allowed {allowed}"  # NaN fails too


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def mixed_lengths(count: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 5, 32, 64, 80])
def test_matches_the_definition_at_odd_sizes(d: int, dtype: torch.dtype) -> None:
    case = 0
    for s in (0, 1, 5):
        for h in (1, 3, 8):
            for last_only in (False, True):
                for causal in (True, False):
                    m, case = 1 + case % 3, case + 1
                    lengths = mixed_lengths(1 + 3 * (case % 4), 20, seed=case)
                    Problem.random(m, lengths, s, h, d, dtype, last_only=last_only, causal=causal).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_and_long_ones(dtype: torch.dtype) -> None:
    for causal in (True, False):
        Problem.random(1, tuple(range(1, 21)), 5, 2, 64, dtype, causal=causal).check()
        Problem.random(1, (77, 1, 33), 77, 2, 64, dtype, causal=causal).check()  # more than 16 queries at once
        Problem.random(1, (16, 17, 100), 0, 1, 128, dtype, causal=causal).check()
        Problem.random(2, (77, 3), 2, 1, 100, dtype, causal=causal, last_only=True).check()
    Problem.random(1, mixed_lengths(1100, 3), 5, 1, 3, dtype).check()  # more than 64 blocks of 8 sequences


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_each_with_nothing_before_it(dtype: torch.dtype) -> None:
    problem = Problem.random(2, (1,) * 9, 0, 3, 64, dtype)  # a lone key: its value, and no gradient to the scores
    for variant in RUNNABLE:
        out, dq, dk, dv, *_ = problem.run(variant)
        assert torch.equal(out, problem.v) and torch.equal(dv, problem.d_out)
        assert not dq.any() and not dk.any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_wider_tensors(dtype: torch.dtype, variant: str) -> None:
    """As the text tower passes them: q, k, v are thirds of [M, S + T, 3, H, d], and so are their gradients."""
    m, lengths, s, h, d = 2, mixed_lengths(9, 7), 5, 3, 40
    problem = Problem.random(m, lengths, s, h, d, dtype)
    expected = problem.run(variant)
    tokens = sum(lengths)
    joined = torch.full((m, s + tokens + 1, 3, h, d), torch.nan, dtype=dtype)
    d_joined, wide_out = joined.clone(), torch.full((m, tokens, h + 1, d + 3), torch.nan, dtype=dtype)
    thirds = lambda t: [t[:, s : s + tokens, i] for i in range(3)] + [t[:, :s, i] for i in (1, 2)]  # noqa: E731
    for part, t in zip(thirds(joined), problem.inputs(), strict=True):
        part.copy_(t)
    strided = Problem(*thirds(joined), problem.d_out.transpose(1, 2).contiguous().transpose(1, 2), lengths, True)
    results = [wide_out[:, :, :h, 1 : d + 1], *thirds(d_joined)]
    strided.run(variant, results=results)
    for name, ours, same in zip(RESULTS, results, expected, strict=True):
        assert torch.equal(ours, same), name
    assert wide_out[:, :, h].isnan().all() and wide_out[..., 0].isnan().all() and wide_out[..., d + 1 :].isnan().all()
    assert d_joined[:, :s, 0].isnan().all() and d_joined[:, -1].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_the_threads(dtype: torch.dtype, variant: str) -> None:
    for last_only in (False, True):
        problem = Problem.random(2, mixed_lengths(150, 9), 5, 4, 64, dtype, last_only=last_only)
        one = problem.run(variant, threads=1)
        for threads in (2, 3, 2):
            for a, b in zip(one, problem.run(variant, threads=threads), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_extreme_scores_stay_finite(size: float, dtype: torch.dtype) -> None:
    """Scores of +-1e3 .. +-1e9: all of a query's weight lies on one key, and the others' exponentials underflow."""
    problem = Problem.random(2, mixed_lengths(6, 9), 5, 2, 64, dtype, size=size)
    truths = problem.to(torch.float64).definition()
    for variant in RUNNABLE:
        for name, ours, truth in zip(RESULTS, problem.run(variant), truths, strict=True):
            assert ours.isfinite().all(), f"{variant}: {name}"
            if name == "out":
                assert largest(ours.double() - truth) <= 0.02 * largest(truth)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_is_nan_out_and_stays_in_its_sequence(dtype: torch.dtype, variant: str) -> None:
    problem = Problem.random(1, (4, 3, 5), 2, 2, 33, dtype)
    problem.k[0, 5, 1, 7] = torch.nan  # the second sequence's middle token
    out, dq, *_ = problem.run(variant)
    for t in (out, dq):
        assert t[0, 5:7, 1].isnan().all() and t[0, 4].isfinite().all() and t[0, :, 0].isfinite().all()
        assert t[0, :4].isfinite().all() and t[0, 7:].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_rounded_to_nearest_even(variant: str) -> None:
    """Equal keys: half of each of two gradients goes to the prefix, and their sum is exact before it is rounded."""
    problem = Problem.random(1, (1, 1), 1, 1, 999, torch.bfloat16)
    problem.k.zero_()
    problem.prefix_k.zero_()
    problem.d_out[:, 1] /= 128
    exact = problem.d_out.float().sum(1, keepdim=True) / 2
    ties = exact.view(torch.int32) & 0xFFFF == 0x8000
    assert ties.sum() > 10
    assert torch.equal(problem.run(variant)[-1], exact.bfloat16())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"M": 0}, "M must be at least 1, got 0"),
        ({"T": 0}, "T must be at least 1, got 0"),
        ({"S": -1}, "S must be at least 0, got -1"),
        ({"C": 0}, "C must be at least 1, got 0"),
        ({"H": 0}, "H must be at least 1, got 0"),
        ({"d": -2}, "d must be at least 1, got -2"),
        ({"Tq": 4}, "Tq must be T or C, that is 9 or 3, got 4"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"dtype": "float16"}, "dtype must be 'float32', 'bfloat16' or 'float64', got 'float16'"),
        ({"q": (0, 1, 1, 1)}, "q must be the address of a tensor's data, got 0"),
        ({"prefix_v": (2, 1, 1, 1)}, "prefix_v must be a multiple of 4, got 2"),
        ({"offsets_ptr": 0}, "offsets_ptr must be the address of a tensor's data, got 0"),
        ({"variant": "sse9"}, "variant must be one of the CPU variants built"),
    ],
)
def test_refuses_wrong_arguments(changed: dict, message: str) -> None:
    problem = Problem.random(1, (2, 3, 4), 2, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        problem.run(**changed)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 5, 9], r"offsets must ascend strictly from 0 to T: \[0\] must be 0, got 1"),
        ([0, 2, 2, 9], r"\[2\] must be more than 2, got 2"),
        ([0, 5, 2, 9], r"\[2\] must be more than 5, got 2"),
        ([0, 2, 10, 11], r"\[2\] must be at most T = 9, got 10"),
        ([0, 2, 5, 8], r"\[3\] must be T = 9, got 8"),
    ],
)
def test_refuses_wrong_offsets(offsets: list[int], message: str) -> None:
    problem, offsets = Problem.random(1, (2, 3, 4), 2, 2, 8, torch.float32), torch.tensor(offsets)
    with pytest.raises(ValueError, match=message):
        problem.run(offsets_ptr=offsets.data_ptr())
