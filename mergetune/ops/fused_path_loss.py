"""The LMC loss as two GEMMs with a fused row pass between them: native core on a CPU, compiled CUDA on a GPU.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path, P = 1 + K * N points in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from mergetune.io import dtype_name
from mergetune.ops.arguments import LossArguments, PathArguments, real_dtype
from mergetune.ops.native import address, core

_MIN_SQUARED_NORM = 1e-24  # the square of F.normalize's floor


def fused_path_cross_entropy(arguments: PathArguments) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mergetune.ops.reference.path_cross_entropy` in one pass, without a tensor of size [P, B, C]."""
    dots, labels, anchor, alpha, weight, rscale = arguments
    dots = dots if dots.stride(-1) == 1 else dots.contiguous()
    labels, anchor = labels.long().contiguous(), anchor.long().contiguous()
    alpha, weight, rscale = alpha.double().contiguous(), weight.double().contiguous(), rscale.contiguous()
    loss = torch.empty(len(anchor), dtype=torch.float64, device=dots.device)
    d_dots, d_rscale = torch.empty_like(dots[0], memory_format=torch.contiguous_format), torch.empty_like(rscale)
    kernel: Callable[..., None]
    kernel, where = (
        (core.path_cross_entropy_cpu, torch.get_num_threads())
        if dots.device.type == "cpu"
        else (core.path_cross_entropy_cuda, torch.cuda.current_stream(dots.device).cuda_stream)
    )
    kernel(
        dtype_name(dots.dtype),
        dots.data_ptr(),
        dots.stride(0),
        dots.stride(1),
        *(t.data_ptr() for t in (labels, anchor, alpha, weight, rscale, loss, d_dots, d_rscale)),
        len(dots) - 1,
        *dots.shape[1:],
        len(anchor),
        where,
    )
    return loss, d_dots, d_rscale


def fused_lmc_loss(arguments: LossArguments) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its terms [2 + K] and the gradient with respect to w, [C, D], in :func:`real_dtype`."""
    real = real_dtype(arguments.w)
    x, w, anchors = (t.to(real) for t in (arguments.x, arguments.w, arguments.anchors))
    (classes, _), batch, k, n = w.shape, len(x), len(anchors), len(arguments.alphas) if len(anchors) else 0

    anchor, alpha, weight = path_points_of(arguments.alphas if k else arguments.alphas[:0], arguments.betas)
    dots = x.new_empty(k + 1, batch, classes)
    torch.mm(x, w.T, out=dots[0])
    if arguments.anchor_dots is not None:
        dots[1:] = arguments.anchor_dots
    elif k:
        torch.matmul(x, anchors.transpose(1, 2), out=dots[1:])

    w1, curvature = (None if t is None else t.to(real).contiguous() for t in (arguments.w1, arguments.curvature))
    ends = ClassWeights(
        w.contiguous(), anchors.contiguous(), w1, curvature, anchor, alpha, arguments.scale, arguments.normalize
    )
    if w.device.type == "cpu":
        rscale, products = path_scales_cpp(ends)
        add_gradient = partial(class_gradient_cpp, products=products)
    else:
        rscale, squares = path_scales_torch(ends)
        add_gradient = partial(class_gradient_torch, squares=squares)
    losses, d_dots, d_rscale = fused_path_cross_entropy(
        PathArguments(dots, arguments.labels, anchor, alpha, weight, rscale)
    )
    grad = d_dots.T @ x
    surrogate = add_gradient(ends, rscale, d_rscale, lam=arguments.lam, grad=grad)
    paths = losses[1:].view(k, n).mean(1) if k else losses[1:]
    terms = torch.cat([losses[:1], surrogate, paths])
    loss = torch.dot(weight, losses) + arguments.lam * surrogate[0]
    return loss.to(real), terms.to(real), grad


def path_points_of(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the end (0 for w, k for anchor k), position and weight of every point, [P] each.

    The first point is the endpoint w, with index 0, position 1 and weight 1. The N points of each path follow.
    """
    if alphas.device.type == "cpu":
        return _points_of(tuple(alphas.tolist()), tuple(betas.tolist()))
    k, n, one = len(betas), len(alphas), alphas.new_ones(1, dtype=torch.float64)
    anchor = torch.arange(1, k + 1, device=one.device)
    weight = (betas.to(one) / max(n, 1))[:, None].expand(k, n).flatten()
    return (
        torch.cat([anchor.new_zeros(1), anchor[:, None].expand(k, n).flatten()]),
        torch.cat([one, alphas.to(one).repeat(k)]),
        torch.cat([one, weight]),
    )


@lru_cache(maxsize=64)
def _points_of(alphas: tuple[float, ...], betas: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    pairs = [(k, t, beta / len(alphas)) for k, beta in enumerate(betas, start=1) for t in alphas]
    anchor, alpha, weight = zip((0, 1.0, 1.0), *pairs, strict=True)
    double = torch.float64
    return torch.tensor(anchor), torch.tensor(alpha, dtype=double), torch.tensor(weight, dtype=double)


@dataclass(frozen=True, eq=False)
class ClassWeights:
    """Contiguous copies of the path ends and path points, shared by all passes of the kernel."""

    w: Tensor  # [C, D]
    anchors: Tensor  # [K, C, D]
    w1: Tensor | None
    curvature: Tensor | None
    anchor: Tensor  # [P], 0 for w, k for anchor k
    alpha: Tensor  # float64 [P]
    scale: float
    normalize: bool

    def native(self) -> tuple:
        """The fields as arguments of the native core."""
        tensors = self.w, self.anchors, self.w1, self.curvature, self.anchor, self.alpha
        return *map(address, tensors), self.scale, self.normalize, len(self.anchors), *self.w.shape, len(self.anchor)


def path_scales_cpp(ends: ClassWeights) -> tuple[Tensor, Tensor]:
    """Logit scale over the norm of every interpolated class weight, [P, C], and the inner products of the path ends."""
    rscale = ends.w.new_empty(len(ends.anchor), len(ends.w))
    products = torch.empty(len(ends.w), 1 + 2 * len(ends.anchors), dtype=torch.float64)
    core.path_scales_cpu(
        dtype_name(rscale.dtype), ends.native(), rscale.data_ptr(), products.data_ptr(), torch.get_num_threads()
    )
    return rscale, products


def class_gradient_cpp(
    ends: ClassWeights, rscale: Tensor, d_rscale: Tensor, products: Tensor, lam: float, grad: Tensor
) -> Tensor:
    """Adds to ``grad`` the gradients through the norms and of the surrogate; returns the surrogate, [1].

    Args:
        ends: the path ends and points.
        rscale, products: results of :func:`path_scales_cpp`.
        d_rscale: gradient with respect to ``rscale``, [P, C].
        lam: weight of the surrogate.
        grad: gradient with respect to w, [C, D], changed in place.
    """
    surrogate = torch.empty(1, dtype=torch.float64)
    core.class_gradient_cpu(
        dtype_name(grad.dtype), ends.native(), rscale.data_ptr(), d_rscale.data_ptr(), products.data_ptr(), lam,
        grad.data_ptr(), surrogate.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return surrogate


def path_scales_torch(ends: ClassWeights) -> tuple[Tensor, Tensor | None]:
    """:func:`path_scales_cpp` in plain torch; the second result are the squared norms, [P, C]."""
    w, anchors, anchor, a = ends.w, ends.anchors, ends.anchor, ends.alpha[:, None]
    if not ends.normalize:
        return w.new_full((len(anchor), len(w)), ends.scale), None
    lengths = torch.linalg.vector_norm(w, dim=-1)[None], torch.linalg.vector_norm(anchors, dim=-1)
    own = torch.cat(lengths).double() ** 2  # |end|^2, [K + 1, C]; cross holds end.w, [K + 1, C]
    cross = torch.cat([own[:1], (anchors * w).sum(-1).double()])
    squares = (1 - a) ** 2 * own[anchor] + 2 * a * (1 - a) * cross[anchor] + a**2 * own[0]
    return (ends.scale * squares.clamp_min(_MIN_SQUARED_NORM).rsqrt()).to(w.dtype), squares


def class_gradient_torch(
    ends: ClassWeights, rscale: Tensor, d_rscale: Tensor, squares: Tensor | None, lam: float, grad: Tensor
) -> Tensor:
    """:func:`class_gradient_cpp` in plain torch."""
    w, alpha, real = ends.w, ends.alpha[:, None], ends.w.dtype
    if squares is not None:  # d rscale / d w = -rscale / |t|^2 * (alpha (1 - alpha) a + alpha^2 w)
        pull = torch.where(squares > _MIN_SQUARED_NORM, -d_rscale.double() * rscale / squares, 0.0)
        grad.addcmul_(w, (pull * alpha**2).sum(0).to(real)[:, None])
        to_anchors = (pull * alpha * (1 - alpha)).to(real)[1:].chunk(max(len(ends.anchors), 1))  # one per path
        for end, shares in zip(ends.anchors, to_anchors, strict=False):
            grad.addcmul_(end, shares.sum(0)[:, None])
    if ends.w1 is None:
        return alpha.new_zeros(1)
    norm = w.norm(dim=-1, keepdim=True).clamp_min(_MIN_SQUARED_NORM**0.5) if ends.normalize else 1.0
    unit = w / norm
    apart = unit - (torch.nn.functional.normalize(ends.w1, dim=-1) if ends.normalize else ends.w1)
    slope = (apart if ends.curvature is None else ends.curvature * apart) / len(w)
    along = unit * (unit * slope).sum(-1, keepdim=True) if ends.normalize else 0.0
    grad.add_((slope - along) / norm, alpha=lam)
    return 0.5 * (apart * slope).sum().double()[None]
