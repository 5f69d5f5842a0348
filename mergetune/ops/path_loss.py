"""lmc_loss, the LMC objective with its gradient, and path_cross_entropy, the row pass of the fused loss.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path, P = 1 + K * N points in all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mergetune.ops import reference
from mergetune.ops.arguments import LossArguments, PathArguments, real_dtype
from mergetune.ops.backends import OPS, Implementation, Op
from mergetune.ops.fused_path_loss import fused_lmc_loss, fused_path_cross_entropy
from mergetune.ops.library import library
from mergetune.ops.problems import loss_problems, path_problems
from mergetune.ops.selection import VERIFIED, choose, run_verified

# -- the ops ----------------------------------------------------------------------------------------------------------


def lmc_loss(
    x: Tensor,
    labels: Tensor,
    w: Tensor,
    anchors: Tensor,
    alphas: Tensor,
    betas: Tensor,
    *,
    scale: float,
    w1: Tensor | None = None,
    curvature: Tensor | None = None,
    lam: float = 0.0,
    normalize: bool = True,
    anchor_dots: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The LMC objective: the loss of class weights, of their surrogate and of their paths to the anchors.

    :func:`mergetune.ops.reference.lmc_loss` is the definition and describes the other arguments. All points of all
    paths share K + 1 products: ``x.(a + t(w - a)) = (1-t) x.a + t x.w``, and the squared norm of the interpolated
    weight is a quadratic in t. The forward pass also computes the gradient; the backward pass only scales the gradient.

    Args:
        anchor_dots: ``x @ anchors[k].T``, [K, B, C], if the caller has these products; None computes them.
        backend: "cpp", "triton", "cuda", "compile" (the definition through torch.compile) or "torch" (the definition).
            None takes the native core on a CPU, and on a GPU the fastest backend that was verified on this GPU.

    Returns:
        The loss and its unweighted terms, [2 + K]. The loss is differentiable once and in ``w`` alone; with backend
        "torch" it is differentiable any number of times, also in ``x``, ``anchors``, ``alphas``, ``betas``, ``w1`` and
        ``curvature``.
    """
    if backend != "torch":
        x, anchors, alphas, betas = x.detach(), anchors.detach(), alphas.detach(), betas.detach()
        w1, curvature, anchor_dots = (None if t is None else t.detach() for t in (w1, curvature, anchor_dots))
    arguments = LossArguments(x, labels, w, anchors, alphas, betas, scale, w1, curvature, lam, normalize, anchor_dots)
    arguments.check()
    taken = choose("lmc_loss", "w", w, arguments, backend)
    if taken in ("torch", "compile"):
        return _defined_loss(arguments, reference.lmc_loss if taken == "torch" else _compiled_loss())
    loss, terms, _ = torch.ops.mergetune.lmc_loss(*arguments, taken)
    return loss, terms


def path_cross_entropy(
    dots: Tensor,
    labels: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    weight: Tensor,
    rscale: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of P path points on B images and C classes, and the gradients of the weighted sum.

    The definition is :func:`mergetune.ops.reference.path_cross_entropy`, which describes each argument: products of
    features and path ends go in, [K + 1, B, C]; the losses [P], their gradient in the first products [B, C] and in
    ``rscale`` [P, C] come out. The backends "cpp" and "cuda" make no tensor of size [P, B, C]; tensors are float32 or
    float64.

    Args:
        backend: "cpp", "cuda" or "torch" (the definition). None chooses as in :func:`lmc_loss`.
    """
    arguments = PathArguments(dots, labels, anchor, alpha, weight, rscale)
    arguments.check()
    backend = choose("path_cross_entropy", "dots", dots, arguments, backend)
    return OPS["path_cross_entropy"].implementations[backend].run(arguments)


# -- implementations --------------------------------------------------------------------------------------------------


def _defined_loss(arguments: LossArguments, definition: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The definition, or a compiled copy of it, in :func:`real_dtype`."""
    real, labels, classes = real_dtype(arguments.w), arguments.labels, len(arguments.w)
    # On a GPU and in a compiled graph torch's assertion checks the labels without a synchronisation.
    looked_at = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and len(bad := labels[(labels < 0) | (labels >= classes)]):
        raise ValueError(f"labels must lie in [0, {classes - 1}], got {bad[0]}")
    x, w, anchors, alphas, w1, curvature = (
        None if t is None else t.to(real)
        for t in (arguments.x, arguments.w, arguments.anchors, arguments.alphas, arguments.w1, arguments.curvature)
    )
    options = {"scale": arguments.scale, "lam": arguments.lam, "normalize": arguments.normalize}
    return definition(x, labels, w, anchors, alphas, arguments.betas, w1=w1, curvature=curvature, **options)


@lru_cache(maxsize=1)
def _compiled_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(reference.lmc_loss, fullgraph=True)


def _with_gradient(definition: Callable[[], Callable]) -> Callable[[LossArguments], tuple[Tensor, Tensor, Tensor]]:
    """The definition in the form of the other implementations: a function that also returns the gradient."""

    def run(arguments: LossArguments) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            w = arguments.w.detach().requires_grad_()
            loss, terms = _defined_loss(arguments._replace(w=w), definition())
            (grad,) = torch.autograd.grad(loss, w)
        return loss.detach(), terms, grad.to(loss.dtype)

    return run


def _triton_loss(arguments: LossArguments) -> tuple[Tensor, Tensor, Tensor]:
    from mergetune.kernels import lmc_loss as kernel

    loss, terms, grad = (t.to(real_dtype(arguments.w)) for t in kernel.lmc_loss(*arguments))
    return loss, terms, grad


def _defined_path(arguments: PathArguments) -> tuple[Tensor, Tensor, Tensor]:
    return reference.path_cross_entropy(*arguments)


# -- comparison of implementations ------------------------------------------------------------------------------------


def _loss_results(implementation: Implementation, arguments: LossArguments) -> dict[str, Tensor]:
    return dict(zip(("loss", "terms", "grad"), implementation.run(arguments), strict=True))


def _loss_truth(arguments: LossArguments) -> dict[str, Tensor]:
    return _loss_results(OPS["lmc_loss"].implementations["torch"], in_float64(arguments))


def _path_results(implementation: Implementation, arguments: PathArguments) -> dict[str, Tensor]:
    return dict(zip(("loss", "d_dots", "d_rscale"), implementation.run(arguments), strict=True))


def _path_truth(arguments: PathArguments) -> dict[str, Tensor]:
    return _path_results(OPS["path_cross_entropy"].implementations["torch"], in_float64(arguments))


def in_float64(arguments: Any) -> Any:
    """The arguments with every float tensor converted to float64."""
    cast = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)
    return type(arguments)(*cast)


_loss = OPS["lmc_loss"] = Op(
    "lmc_loss", _loss_results, _loss_truth, loss_problems,
    (torch.float32, torch.bfloat16, torch.float16, torch.float64),
)  # fmt: skip
_loss.register(Implementation("torch", _with_gradient(lambda: reference.lmc_loss)))
_loss.register(Implementation("cpp", fused_lmc_loss))
_loss.register(Implementation("triton", _triton_loss, dtypes=(torch.float32, torch.bfloat16, torch.float16)))
_loss.register(Implementation("cuda", fused_lmc_loss))
_loss.register(Implementation("compile", _with_gradient(_compiled_loss)))

_path = OPS["path_cross_entropy"] = Op(
    "path_cross_entropy", _path_results, _path_truth, path_problems, (torch.float32, torch.float64)
)
_path.register(Implementation("torch", _defined_path))
_path.register(Implementation("cpp", fused_path_cross_entropy))
_path.register(Implementation("cuda", fused_path_cross_entropy))


# -- torch.library ----------------------------------------------------------------------------------------------------


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    problem = LossArguments(*given)
    if backend == VERIFIED:
        return run_verified("lmc_loss", problem.w, problem)
    return OPS["lmc_loss"].implementations[backend].run(problem)


def _fake(x, labels, w, anchors, *_):
    real = real_dtype(w)
    return w.new_empty((), dtype=real), w.new_empty(2 + len(anchors), dtype=real), w.new_empty(w.shape, dtype=real)


def _setup(ctx, inputs, output) -> None:
    _, terms, grad = output
    ctx.mark_non_differentiable(terms, grad)
    ctx.save_for_backward(grad)
    ctx.dtype, ctx.unused = inputs[2].dtype, len(inputs) - 3


def _backward(ctx, d_loss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("lmc_loss can be differentiated once: for second derivatives use backend='torch'")
    (grad,) = ctx.saved_tensors
    return None, None, (d_loss * grad).to(ctx.dtype), *(None,) * ctx.unused


library.define(
    "lmc_loss(Tensor x, Tensor labels, Tensor w, Tensor anchors, Tensor alphas, Tensor betas, float scale, Tensor? w1, "
    "Tensor? curvature, float lam, bool normalize, Tensor? anchor_dots, str backend) -> (Tensor loss, Tensor terms, "
    "Tensor grad)"
)
for _key in ("CPU", "CUDA"):
    # Autocast is off inside the op: it would round the products to a half type.
    library.impl("lmc_loss", torch.autocast(_key.lower(), enabled=False)(_kernel), _key)
torch.library.register_fake("mergetune::lmc_loss", _fake, lib=library)
torch.library.register_autograd("mergetune::lmc_loss", _backward, setup_context=_setup, lib=library)
