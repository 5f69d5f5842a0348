"""The native core through its raw-pointer interface, against a plain float64 loop over the path points.

B rows, C classes, K anchors, P path points.
"""

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from devices import GPU, marked
from torch import Tensor

from mergetune import _C

BUILT = _C.build_info()["cpu_variants"]
RUNNABLE = [name for name in BUILT if _C.cpu_variant_runs(name)]
VARIANTS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in RUNNABLE, reason=f"this processor has no {name}"))
    for name in BUILT
]
DTYPES = [torch.float32, torch.float64]


@dataclass
class Problem:
    dots: Tensor
    labels: Tensor
    anchor: Tensor
    alpha: Tensor
    weight: Tensor
    rscale: Tensor

    @staticmethod
    def random(k: int, b: int, c: int, p: int, dtype: torch.dtype, scale: float = 10.0, seed: int = 0) -> "Problem":
        g = torch.Generator().manual_seed(seed)
        alpha = torch.rand(p, generator=g, dtype=torch.float64)
        alpha[:2] = torch.tensor([1.0, 0.0])[: len(alpha[:2])]
        return Problem(
            dots=(2 * torch.rand(k + 1, b, c, generator=g, dtype=torch.float64) - 1).to(dtype),
            labels=torch.randint(c, (b,), generator=g),
            anchor=torch.randint(k + 1, (p,), generator=g),
            alpha=alpha,
            weight=torch.rand(p, generator=g, dtype=torch.float64),
            rscale=(scale * (0.5 + torch.rand(p, c, generator=g, dtype=torch.float64))).to(dtype),
        )

    def run(self, variant: str = "", threads: int = 1, **changed) -> tuple[Tensor, Tensor, Tensor]:
        (k, b, c), p, dtype = self.dots.shape, len(self.anchor), self.dots.dtype
        assert self.dots.stride(2) == 1 and self.rscale.is_contiguous()
        out = (  # NaN, so that whatever is not written shows
            torch.full((p,), torch.nan, dtype=torch.float64),
            torch.full((b, c), torch.nan, dtype=dtype),
            torch.full((p, c), torch.nan, dtype=dtype),
        )
        arguments = {
            "dtype": str(dtype).removeprefix("torch."),
            "dots_ptr": self.dots.data_ptr(),
            "stride_m": self.dots.stride(0),
            "stride_b": self.dots.stride(1),
            "labels_ptr": self.labels.data_ptr(),
            "anchor_ptr": self.anchor.data_ptr(),
            "alpha_ptr": self.alpha.data_ptr(),
            "weight_ptr": self.weight.data_ptr(),
            "rscale_ptr": self.rscale.data_ptr(),
            "loss_ptr": out[0].data_ptr(),
            "d_dots_ptr": out[1].data_ptr(),
            "d_rscale_ptr": out[2].data_ptr(),
            "K": k - 1,
            "B": b,
            "C": c,
            "P": p,
            "num_threads": threads,
            "variant": variant,
        }
        _C.path_cross_entropy_cpu(**(arguments | changed))
        return out

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        dots = self.dots.double()
        w, rscale = dots[0].clone().requires_grad_(), self.rscale.double().requires_grad_()
        losses = []
        for p, k in enumerate(self.anchor.tolist()):
            a = self.alpha[p]
            dot = w if k == 0 or a == 1 else (1 - a) * dots[k] + a * w
            losses.append(F.cross_entropy(dot * rscale[p], self.labels))
        loss = torch.stack(losses)
        return loss.detach(), *torch.autograd.grad((self.weight * loss).sum(), (w, rscale))

    def check(self, variants: list[str], scale: float = 10.0) -> None:
        # A rounding of a logit of size `scale` moves the probabilities by scale * eps. Where a row is all but certain,
        # softmax - onehot is the difference of two numbers near 1: the error is relative to 1, not to the result.
        rtol = torch.finfo(self.dots.dtype).eps * (20 + 4 * scale)
        floors, names = (1.0, scale / len(self.labels), 1.0), ("loss", "d_dots", "d_rscale")
        truths = self.truth()
        for variant in variants:
            for name, ours, truth, floor in zip(names, self.run(variant), truths, floors, strict=True):
                error = (ours - truth).abs().max().item()  # NaN fails the comparison below
                assert error <= rtol * max(floor, truth.abs().max().item()), f"{variant}: {name} is off by {error}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_matches_a_plain_loop_at_odd_sizes(k: int, dtype: torch.dtype) -> None:
    for b in (1, 2, 3, 7, 33):
        for c in (1, 2, 3, 7, 33, 500):
            p = (b + c + k) % 4 + 1
            Problem.random(k, b, c, p, dtype, seed=b + c).check(RUNNABLE)
    Problem.random(k, 33, 33, 33, dtype).check(RUNNABLE)
    Problem.random(k, 7, 500, 16, dtype).check(RUNNABLE)
    Problem.random(k, 1100, 5, 2, dtype).check(RUNNABLE)  # more rows than 64 blocks of 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_extreme_logits_stay_finite(scale: float, dtype: torch.dtype) -> None:
    Problem.random(2, 33, 100, 7, dtype, scale).check(RUNNABLE, scale)


def test_logits_of_plus_and_minus_ten_thousand() -> None:
    problem = Problem.random(1, 4, 33, 3, torch.float32, 1.0)
    problem.dots = torch.where(problem.dots > 0, 1e4, -1e4)
    problem.rscale = torch.ones(3, 33)
    problem.check(RUNNABLE, 1e4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_products(dtype: torch.dtype, variant: str) -> None:
    problem = Problem.random(2, 9, 37, 5, dtype)
    expected = problem.run(variant)
    wide = torch.full((9, 3, 50), torch.nan, dtype=dtype)  # rows outermost, a gap after each
    wide[:, :, 5:42] = problem.dots.transpose(0, 1)
    problem.dots = wide[:, :, 5:42].transpose(0, 1)
    for ours, same in zip(problem.run(variant), expected, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_the_threads(dtype: torch.dtype, variant: str) -> None:
    for b in (1, 33, 256, 1100):
        problem = Problem.random(2, b, 101, 9, dtype)
        one = problem.run(variant, threads=1)
        for threads in (2, 3, 2):
            for a, b_ in zip(one, problem.run(variant, threads=threads), strict=True):
                assert torch.equal(a, b_)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_anchor_is_not_read_where_alpha_is_one(variant: str) -> None:
    problem = Problem.random(1, 7, 33, 3, torch.float32)
    problem.anchor, problem.alpha = torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.float64)
    expected = problem.run(variant)
    problem.dots[1] = torch.nan
    for ours, same in zip(problem.run(variant), expected, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("variant", VARIANTS)
def test_alpha_zero_is_the_anchor_and_moves_nothing(variant: str) -> None:
    problem = Problem.random(1, 7, 33, 1, torch.float32)
    problem.anchor, problem.alpha = torch.tensor([1]), torch.zeros(1, dtype=torch.float64)
    loss, d_dots, d_rscale = problem.run(variant)
    assert not d_dots.any() and d_rscale.any()
    at_anchor = replace(problem, dots=problem.dots[1:], anchor=torch.tensor([0]))
    assert torch.equal(loss, at_anchor.run(variant)[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_is_nan_out_and_stays_in_its_row(dtype: torch.dtype, variant: str) -> None:
    problem = Problem.random(1, 6, 20, 2, dtype)
    problem.dots[0, 2, 3] = torch.nan
    loss, d_dots, _ = problem.run(variant)
    assert loss[0].isnan()
    assert d_dots[2].isnan().all()
    assert d_dots[[0, 1, 3, 4, 5]].isfinite().all()


def test_refuses_wrong_arguments() -> None:
    problem = Problem.random(2, 4, 6, 3, torch.float32)
    for changed, message in (
        ({"K": -1}, "K must be at least 0, got -1"),
        ({"B": 0}, "B must be at least 1, got 0"),
        ({"C": 0}, "C must be at least 1, got 0"),
        ({"P": -3}, "P must be at least 1, got -3"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'float64', got 'float16'"),
        ({"rscale_ptr": 0}, "rscale_ptr must be the address of a tensor's data, got 0"),
        ({"dots_ptr": problem.dots.data_ptr() + 1}, "dots_ptr must be a multiple of 4"),
        ({"variant": "sse9"}, "variant must be one of the CPU variants built"),
    ):
        with pytest.raises(ValueError, match=message):
            problem.run(**changed)


def test_refuses_labels_and_anchors_out_of_range() -> None:
    for field, index, value, message in (
        ("labels", 2, 6, r"labels must lie in \[0, 5\], got 6 at index 2"),
        ("labels", 0, -1, r"labels must lie in \[0, 5\], got -1 at index 0"),
        ("anchor", 1, 3, r"anchor must lie in \[0, 2\], got 3 at index 1"),
    ):
        problem = Problem.random(2, 4, 6, 3, torch.float32)
        getattr(problem, field)[index] = value
        with pytest.raises(ValueError, match=message):
            problem.run()


def test_build_info() -> None:
    info = _C.build_info()
    assert set(info) == {"version", "compiler", "openmp", "cpu_variants", "cpu_variant", "cuda_archs", "sources"}
    assert info["cpu_variants"][0] == "portable"
    assert info["cpu_variant"] in info["cpu_variants"] and _C.cpu_variant_runs(info["cpu_variant"])
    assert all(arch.isdigit() for arch in info["cuda_archs"])
    assert hasattr(_C, "path_cross_entropy_cuda") == bool(info["cuda_archs"])


@pytest.mark.parametrize("forced", ["portable", "sse9"])
def test_environment_variable_forces_the_variant(forced: str) -> None:
    code = "import torch; from mergetune import _C; print(_C.build_info()['cpu_variant'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MERGETUNE_CPU": forced}, capture_output=True, text=True
    )
    if forced == "portable":
        assert done.stdout.strip() == "portable"
    else:
        assert "MERGETUNE_CPU must be one of the CPU variants built" in done.stderr


@marked(GPU)
@pytest.mark.skipif(not _C.build_info()["cuda_archs"], reason="built without CUDA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_kernel_matches_the_cpu(dtype: torch.dtype) -> None:
    for k, b, c, p in ((1, 1, 1, 1), (2, 7, 33, 5), (3, 65, 500, 17)):
        problem = Problem.random(k, b, c, p, dtype)
        on_gpu = {name: t.cuda() for name, t in vars(problem).items()}
        shapes = ((p,), torch.float64), ((b, c), dtype), ((p, c), dtype)
        results = []
        for _ in range(2):
            out = [torch.full(shape, torch.nan, dtype=kind, device="cuda") for shape, kind in shapes]
            _C.path_cross_entropy_cuda(
                str(dtype).removeprefix("torch."),
                on_gpu["dots"].data_ptr(),
                *on_gpu["dots"].stride()[:2],
                *(on_gpu[name].data_ptr() for name in ("labels", "anchor", "alpha", "weight", "rscale")),
                *(t.data_ptr() for t in out),
                *(k, b, c, p),
                torch.cuda.current_stream().cuda_stream,
            )
            results.append([t.cpu() for t in out])
        for ours, again, cpu in zip(*results, problem.run(), strict=True):
            assert torch.equal(ours, again)
            torch.testing.assert_close(ours, cpu, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-6)


# -- what type checkers are told --------------------------------------------------------------------------------------


def test_type_checkers_are_told_the_functions_and_arguments_that_are_there():
    tree = ast.parse(Path(_C.__file__).with_name("_C.pyi").read_text(encoding="utf-8"))
    told = {node.name: [arg.arg for arg in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    there = {name: vars(_C)[name].__doc__.split("\n")[0] for name in vars(_C) if callable(vars(_C)[name])}
    there = {name: re.findall(r"[(,] ?(\w+): ", signature) for name, signature in there.items() if "(" in signature}
    if not _C.build_info()["cuda_archs"]:
        del told["path_cross_entropy_cuda"]
    assert told == there
