"""The core's passes over class weights: norms on the paths and the surrogate, against float64 autograd.

C classes, D embedding width, K anchors, P path points.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune import _C
from mergetune.ops import fused_path_loss as fused
from mergetune.ops.fused_path_loss import ClassWeights

VARIANTS = [name for name in _C.build_info()["cpu_variants"] if _C.cpu_variant_runs(name)]
DTYPES = [torch.float32, torch.float64]
LAM, SCALE = 3.0, 20.0


def draw(k: int, c: int, d: int, n: int, dtype: torch.dtype, *, normalize=True, surrogate="fisher") -> ClassWeights:
    g = torch.Generator().manual_seed(1000 * k + 100 * c + 10 * d + n)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    alpha = torch.rand(n, generator=g, dtype=torch.float64)
    alpha[:2] = torch.tensor([0.0, 1.0])[:n]
    anchor, alpha, _ = fused.path_points_of(alpha if k else alpha[:0], torch.ones(k))
    return ClassWeights(
        w=randn(c, d),
        anchors=randn(k, c, d),
        w1=None if surrogate is None else randn(c, d),
        curvature=randn(c, d).abs() if surrogate == "fisher" else None,
        anchor=anchor,
        alpha=alpha,
        scale=SCALE,
        normalize=normalize,
    )


def run(ends: ClassWeights, d_rscale: Tensor, start: Tensor, variant: str = "", threads: int = 1):
    """rscale, surrogate and gradient of the core; NaN first, so that whatever is not written shows."""
    dtype, (c, _), p = ends.w.dtype, ends.w.shape, len(ends.anchor)
    rscale, grad = torch.full((p, c), torch.nan, dtype=dtype), start.clone()
    products = torch.full((c, 1 + 2 * len(ends.anchors)), torch.nan, dtype=torch.float64)
    surrogate, name = torch.full((1,), torch.nan, dtype=torch.float64), str(dtype).removeprefix("torch.")
    _C.path_scales_cpu(name, ends.native(), rscale.data_ptr(), products.data_ptr(), threads, variant)
    addresses = (t.data_ptr() for t in (rscale, d_rscale, products))
    _C.class_gradient_cpu(name, ends.native(), *addresses, LAM, grad.data_ptr(), surrogate.data_ptr(), threads, variant)
    return rscale, surrogate, grad


def truth(ends: ClassWeights, d_rscale: Tensor, start: Tensor):
    w = ends.w.double().requires_grad_()
    unit = (lambda t: F.normalize(t, dim=-1)) if ends.normalize else (lambda t: t)
    starts = [w, *ends.anchors.double()]
    points = [starts[k] + t * (w - starts[k]) for k, t in zip(ends.anchor.tolist(), ends.alpha.tolist(), strict=True)]
    norms = torch.stack([t.norm(dim=-1).clamp_min(1e-12) if ends.normalize else t.new_ones(len(t)) for t in points])
    rscale = ends.scale / norms + 0 * w.sum()
    surrogate = w.sum() * 0
    if ends.w1 is not None:
        h = 1.0 if ends.curvature is None else ends.curvature.double()
        surrogate = 0.5 * (h * (unit(w) - unit(ends.w1.double())) ** 2).sum(-1).mean()
    (grad,) = torch.autograd.grad((rscale * d_rscale.double()).sum() + LAM * surrogate, w)
    return rscale.detach(), surrogate.detach()[None], start.double() + grad


def check(ends: ClassWeights, results, expected) -> None:
    rtol = 100 * torch.finfo(ends.w.dtype).eps
    for name, ours, true in zip(("rscale", "surrogate", "gradient"), results, expected, strict=True):
        error = (ours - true).abs().max().item()  # NaN fails the comparison
        assert error <= rtol * max(1.0, true.abs().max().item()), f"{name} is off by {error}"


@pytest.mark.parametrize("variant", [*VARIANTS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("surrogate", [None, "identity", "fisher"])
def test_matches_autograd_at_odd_sizes(variant, dtype, normalize, surrogate) -> None:
    for k, c, d, n in ((0, 1, 1, 1), (1, 2, 3, 1), (2, 7, 33, 5), (3, 5, 64, 16), (1, 33, 17, 2)):
        ends = draw(k, c, d, n, dtype, normalize=normalize, surrogate=surrogate)
        g = torch.Generator().manual_seed(n)
        d_rscale = torch.randn(len(ends.anchor), c, generator=g, dtype=torch.float64).to(dtype)
        start = torch.randn(c, d, generator=g, dtype=torch.float64).to(dtype)
        if variant == "torch":  # what other devices run
            rscale, kept = fused.path_scales_torch(ends)
            grad = start.clone()
            found = rscale, fused.class_gradient_torch(ends, rscale, d_rscale, kept, LAM, grad), grad
        else:
            found = run(ends, d_rscale, start, variant)
        check(ends, found, truth(ends, d_rscale, start))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_class_weight_of_zero_stays_finite(variant: str) -> None:
    ends = draw(1, 3, 8, 2, torch.float64)
    ends.w[1] = 0
    d_rscale, start = torch.ones(len(ends.anchor), 3, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.float64)
    rscale, surrogate, grad = run(ends, d_rscale, start, variant)
    assert rscale[0, 1] == pytest.approx(SCALE / 1e-12)
    assert rscale.isfinite().all() and surrogate.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_the_threads(dtype: torch.dtype, variant: str) -> None:
    ends = draw(2, 300, 129, 3, dtype)  # enough values to wake a team
    d_rscale, start = torch.ones(len(ends.anchor), 300, dtype=dtype), torch.zeros(300, 129, dtype=dtype)
    one = run(ends, d_rscale, start, variant)
    for threads in (2, 3):
        for a, b in zip(one, run(ends, d_rscale, start, variant, threads), strict=True):
            assert torch.equal(a, b)


def test_refuses_wrong_arguments() -> None:
    ends = draw(1, 3, 4, 2, torch.float32)
    d_rscale, start = torch.ones(len(ends.anchor), 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"anchor must lie in \[0, 1\], got 2 at index 1"):
        run(replace(ends, anchor=torch.tensor([0, 2, 1])), d_rscale, start)
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        run(ends, d_rscale, start, threads=0)
    with pytest.raises(ValueError, match="variant must be one of the CPU variants built"):
        run(ends, d_rscale, start, "sse9")
