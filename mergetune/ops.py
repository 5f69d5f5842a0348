"""The torch ops: schema, fake, autograd and dispatch. The only file that touches torch.ops and the native core.

``ops.<name>`` is the dispatcher, ``reference.<name>`` its definition. CPU tensors go to the C++ core ("cpp"). CUDA
tensors go to plain torch ("torch"), or to the Triton kernel ("triton") or the compiled one ("cuda") if asked for: those
two become the default when they have run on a device. A backend that is not there raises; nothing falls back in
silence.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path, P = 1 + K * N points in all. For merging:
K experts, n elements.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mergetune import reference

try:  # torch is imported first, so that the core shares its OpenMP threads
    from mergetune import _C
except ImportError as error:
    raise ImportError(
        f"mergetune's native core could not be loaded ({error}). Build it with `pip install .` in the source tree "
        "(a C++17 compiler is all that it needs), or reinstall the wheel: `pip install --force-reinstall mergetune`."
    ) from error

BACKENDS = ("cpp", "triton", "cuda", "torch")
_MIN_SQUARED_NORM = 1e-24  # the square of F.normalize's floor


def build_info() -> dict:
    """What the native core was built with: version, compiler, OpenMP, CPU variants and the one in use, CUDA archs."""
    return _C.build_info()


def available_backends() -> tuple[str, ...]:
    """The backends that can be asked for here."""
    gpu = torch.cuda.is_available()
    there = {"triton": gpu and find_spec("triton"), "cuda": gpu and build_info()["cuda_archs"]}
    return tuple(name for name in BACKENDS if there.get(name, True))


def _backend(tensor: Tensor, backend: str | None, among: tuple[str, ...] = BACKENDS) -> str:
    """The backend asked for, or the device's own; refused where it is not built or not for the device."""
    device = tensor.device.type
    if backend is None:
        return "cpp" if device == "cpu" else "torch"
    if backend not in among:
        raise ValueError(f"backend must be None or one of {', '.join(among)}, got {backend!r}")
    if backend == "cuda" and not build_info()["cuda_archs"]:
        raise RuntimeError("backend 'cuda' was not built: nvcc was not found, or MERGETUNE_CUDA=0 was set")
    if backend == "triton" and not find_spec("triton"):
        raise RuntimeError("backend 'triton' needs the package triton, which is not installed")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    needed = {"cpp": "cpu", "cuda": "cuda", "triton": device if interpreted else "cuda"}.get(backend, device)
    if device != needed:
        raise ValueError(f"backend {backend!r} needs tensors on {needed}, got {device}")
    return backend


# -- path_cross_entropy -----------------------------------------------------------------------------------------------


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
    """Cross-entropy of every path point and its gradient in one pass; see :func:`reference.path_cross_entropy`.

    float32 and float64; nothing of size [P, B, C] is made.
    """
    backend = _backend(dots, backend, ("cpp", "cuda", "torch"))
    if dots.dtype not in (torch.float32, torch.float64) or rscale.dtype != dots.dtype:
        raise TypeError(f"dots and rscale must both be float32 or float64, got {dots.dtype} and {rscale.dtype}")
    points, batch, classes = len(anchor), *dots.shape[1:]
    _expect("labels", labels, (batch,))
    _expect("alpha", alpha, (points,))
    _expect("weight", weight, (points,))
    _expect("rscale", rscale, (points, classes))
    if backend == "torch":
        return reference.path_cross_entropy(dots, labels, anchor, alpha, weight, rscale)
    dots = dots if dots.stride(-1) == 1 else dots.contiguous()
    labels, anchor = labels.long().contiguous(), anchor.long().contiguous()
    alpha, weight, rscale = alpha.double().contiguous(), weight.double().contiguous(), rscale.contiguous()
    loss = torch.empty(points, dtype=torch.float64, device=dots.device)
    d_dots, d_rscale = torch.empty_like(dots[0], memory_format=torch.contiguous_format), torch.empty_like(rscale)
    kernel, where = (
        (_C.path_cross_entropy_cpu, torch.get_num_threads())
        if backend == "cpp"
        else (_C.path_cross_entropy_cuda, torch.cuda.current_stream(dots.device).cuda_stream)
    )
    kernel(
        str(dots.dtype).removeprefix("torch."),
        dots.data_ptr(),
        dots.stride(0),
        dots.stride(1),
        *(t.data_ptr() for t in (labels, anchor, alpha, weight, rscale, loss, d_dots, d_rscale)),
        len(dots) - 1,
        batch,
        classes,
        points,
        where,
    )
    return loss, d_dots, d_rscale


# -- lmc_loss ---------------------------------------------------------------------------------------------------------


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
    """The LMC objective; see :func:`reference.lmc_loss` for its definition and the arguments not described here.

    All points of all paths share K + 1 products: ``x.(a + t(w - a)) = (1-t) x.a + t x.w``, and the squared norm of the
    interpolated weight is a quadratic in t. The forward also makes the gradient; the backward only scales it.

    Args:
        anchor_dots: ``x @ anchors[k].T``, [K, B, C], where the caller has them already.
        backend: None picks by device; "cpp", "triton", "cuda" or "torch" (the definition itself).

    Returns:
        The loss, differentiable once and in ``w`` alone, and its unweighted terms [2 + K].
    """
    backend = _backend(w, backend)
    _check_lmc(x, labels, w, anchors, alphas, betas, w1, curvature, anchor_dots)
    x, anchors, alphas, betas = x.detach(), anchors.detach(), alphas.detach(), betas.detach()
    w1, curvature, anchor_dots = (None if t is None else t.detach() for t in (w1, curvature, anchor_dots))
    if backend == "torch":
        real = _real(w)
        # On a GPU torch's own assertion looks at the labels, without waiting for them.
        if labels.device.type == "cpu" and len(bad := labels[(labels < 0) | (labels >= len(w))]):
            raise ValueError(f"labels must lie in [0, {len(w) - 1}], got {bad[0]}")
        cast = lambda t: None if t is None else t.to(real)  # noqa: E731
        return reference.lmc_loss(
            cast(x), labels, w.to(real), cast(anchors), cast(alphas), betas,
            scale=scale, w1=cast(w1), curvature=cast(curvature), lam=lam, normalize=normalize,
        )  # fmt: skip
    loss, terms, _ = torch.ops.mergetune.lmc_loss(
        x, labels, w, anchors, alphas, betas, scale, w1, curvature, lam, normalize, anchor_dots, backend
    )
    return loss, terms


def _check_lmc(
    x: Tensor,
    labels: Tensor,
    w: Tensor,
    anchors: Tensor,
    alphas: Tensor,
    betas: Tensor,
    w1: Tensor | None,
    curvature: Tensor | None,
    anchor_dots: Tensor | None,
) -> None:
    if w.ndim != 2 or x.ndim != 2:
        raise ValueError(f"x and w must have shapes [B, D] and [C, D], got {list(x.shape)} and {list(w.shape)}")
    classes, width = w.shape
    _expect("x", x, (len(x), width))
    _expect("labels", labels, (len(x),))
    _expect("anchors", anchors, (len(anchors), classes, width))
    _expect("betas", betas, (len(anchors),))
    if not len(x):
        raise ValueError("x must hold at least one row, got [0, D]")
    if len(anchors) and (alphas.ndim != 1 or not len(alphas)):
        raise ValueError(f"alphas must hold at least one path point, got shape {list(alphas.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if w1 is not None:
        _expect("w1", w1, (classes, width))
    if curvature is not None:
        _expect("curvature", curvature, (classes, width))
    if anchor_dots is not None:
        _expect("anchor_dots", anchor_dots, (len(anchors), len(x), classes))


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _real(w: Tensor) -> torch.dtype:
    """What the loss is computed in: float64 if w is, else float32 (half types cannot hold logits of 100 x cosine)."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def _lmc_loss_kernel(
    x: Tensor,
    labels: Tensor,
    w: Tensor,
    anchors: Tensor,
    alphas: Tensor,
    betas: Tensor,
    scale: float,
    w1: Tensor | None,
    curvature: Tensor | None,
    lam: float,
    normalize: bool,
    anchor_dots: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """GEMM, one fused pass over the rows, GEMM: the loss, its terms and the gradient to w, in ``_real`` precision."""
    real = _real(w)
    if backend == "triton":
        from mergetune.kernels import lmc_loss as kernel

        found = kernel.lmc_loss(x, labels, w, anchors, alphas, betas, scale, w1, curvature, lam, normalize, anchor_dots)
        return tuple(t.to(real) for t in found)
    x, w, anchors = x.to(real), w.to(real), anchors.to(real)
    (classes, _), batch, k, n = w.shape, len(x), len(anchors), len(alphas) if len(anchors) else 0

    anchor, alpha, weight = _points(alphas if k else alphas[:0], betas)
    dots = x.new_empty(k + 1, batch, classes)
    torch.mm(x, w.T, out=dots[0])
    if anchor_dots is not None:
        dots[1:] = anchor_dots
    elif k:
        torch.matmul(x, anchors.transpose(1, 2), out=dots[1:])

    ends = w, anchors, w1 if w1 is None else w1.to(real), curvature if curvature is None else curvature.to(real)
    geometry = _ClassWeights(*(t if t is None else t.contiguous() for t in ends), anchor, alpha, scale, normalize)
    native = backend == "cpp"
    rscale, products = _path_scales_cpp(geometry) if native else _path_scales_torch(geometry)
    losses, d_dots, d_rscale = path_cross_entropy(dots, labels, anchor, alpha, weight, rscale, backend=backend)
    grad = d_dots.T @ x
    add_gradient = _class_gradient_cpp if native else _class_gradient_torch
    surrogate = add_gradient(geometry, rscale, d_rscale, products, lam, grad)
    paths = losses[1:].view(k, n).mean(1) if k else losses[1:]
    terms = torch.cat([losses[:1], surrogate, paths])
    loss = torch.dot(weight, losses) + lam * surrogate[0]
    return loss.to(real), terms.to(real), grad


def _points(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchor, position and weight of every point: the endpoint w, which "starts" at w itself, then each path."""
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
class _ClassWeights:
    """The ends of the paths and the points on them, contiguous: what the passes before and after the rows' work on."""

    w: Tensor  # [C, D]
    anchors: Tensor  # [K, C, D]
    w1: Tensor | None
    curvature: Tensor | None
    anchor: Tensor  # [P], 0 for w itself
    alpha: Tensor  # float64 [P]
    scale: float
    normalize: bool

    def native(self) -> tuple:
        """As the core takes them."""
        address = lambda t: 0 if t is None or not t.numel() else t.data_ptr()  # noqa: E731
        tensors = self.w, self.anchors, self.w1, self.curvature, self.anchor, self.alpha
        return *map(address, tensors), self.scale, self.normalize, len(self.anchors), *self.w.shape, len(self.anchor)


def _path_scales_cpp(ends: _ClassWeights) -> tuple[Tensor, Tensor]:
    """Logit scale over the norm of every interpolated weight, [P, C], and the products that it was made from."""
    rscale = ends.w.new_empty(len(ends.anchor), len(ends.w))
    products = torch.empty(len(ends.w), 1 + 2 * len(ends.anchors), dtype=torch.float64)
    dtype = str(rscale.dtype).removeprefix("torch.")
    _C.path_scales_cpu(dtype, ends.native(), rscale.data_ptr(), products.data_ptr(), torch.get_num_threads())
    return rscale, products


def _class_gradient_cpp(
    ends: _ClassWeights, rscale: Tensor, d_rscale: Tensor, products: Tensor, lam: float, grad: Tensor
) -> Tensor:
    """Adds to ``grad`` what reaches w through the norms, and the surrogate's gradient; returns the surrogate, [1]."""
    surrogate = torch.empty(1, dtype=torch.float64)
    addresses = (t.data_ptr() for t in (rscale, d_rscale, products))
    dtype = str(grad.dtype).removeprefix("torch.")
    _C.class_gradient_cpu(
        dtype, ends.native(), *addresses, lam, grad.data_ptr(), surrogate.data_ptr(), torch.get_num_threads()
    )
    return surrogate


def _path_scales_torch(ends: _ClassWeights) -> tuple[Tensor, Tensor | None]:
    """:func:`_path_scales_cpp` where there are no compiled passes; its products are the squared norms, [P, C]."""
    w, anchors, anchor, a = ends.w, ends.anchors, ends.anchor, ends.alpha[:, None]
    if not ends.normalize:
        return w.new_full((len(anchor), len(w)), ends.scale), None
    lengths = torch.linalg.vector_norm(w, dim=-1)[None], torch.linalg.vector_norm(anchors, dim=-1)
    own = torch.cat(lengths).double() ** 2  # [K + 1, C], as is cross: |end|^2 and end.w
    cross = torch.cat([own[:1], (anchors * w).sum(-1).double()])
    squares = (1 - a) ** 2 * own[anchor] + 2 * a * (1 - a) * cross[anchor] + a**2 * own[0]
    return (ends.scale * squares.clamp_min(_MIN_SQUARED_NORM).rsqrt()).to(w.dtype), squares


def _class_gradient_torch(
    ends: _ClassWeights, rscale: Tensor, d_rscale: Tensor, squares: Tensor | None, lam: float, grad: Tensor
) -> Tensor:
    """:func:`_class_gradient_cpp` where there are no compiled passes."""
    w, alpha, real = ends.w, ends.alpha[:, None], ends.w.dtype
    if squares is not None:  # d rscale / d w = -rscale / |t|^2 * (alpha (1 - alpha) a + alpha^2 w)
        pull = torch.where(squares > _MIN_SQUARED_NORM, -d_rscale.double() * rscale / squares, 0.0)
        grad.addcmul_(w, (pull * alpha**2).sum(0).to(real)[:, None])
        to_anchors = (pull * alpha * (1 - alpha)).to(real)[1:].chunk(max(len(ends.anchors), 1))  # a chunk a path
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


def _lmc_loss_fake(x, labels, w, anchors, *_):
    real = _real(w)
    return w.new_empty((), dtype=real), w.new_empty(2 + len(anchors), dtype=real), w.new_empty(w.shape, dtype=real)


def _lmc_loss_setup(ctx, inputs, output) -> None:
    _, terms, grad = output
    ctx.mark_non_differentiable(terms, grad)
    ctx.save_for_backward(grad)
    ctx.dtype, ctx.unused = inputs[2].dtype, len(inputs) - 3


def _lmc_loss_backward(ctx, d_loss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("lmc_loss can be differentiated once: for second derivatives use backend='torch'")
    (grad,) = ctx.saved_tensors
    return None, None, (d_loss * grad).to(ctx.dtype), *(None,) * ctx.unused


_library = torch.library.Library("mergetune", "DEF")
_library.define(
    "lmc_loss(Tensor x, Tensor labels, Tensor w, Tensor anchors, Tensor alphas, Tensor betas, float scale, Tensor? w1, "
    "Tensor? curvature, float lam, bool normalize, Tensor? anchor_dots, str backend) -> (Tensor loss, Tensor terms, "
    "Tensor grad)"
)
for _key in ("CPU", "CUDA"):
    # Under autocast the products inside would be rounded to a half type: the op computes in its own precision.
    _library.impl("lmc_loss", torch.autocast(_key.lower(), enabled=False)(_lmc_loss_kernel), _key)
torch.library.register_fake("mergetune::lmc_loss", _lmc_loss_fake, lib=_library)
torch.library.register_autograd("mergetune::lmc_loss", _lmc_loss_backward, setup_context=_lmc_loss_setup, lib=_library)


# -- prefix_attention -------------------------------------------------------------------------------------------------


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Attention of packed sequences behind a shared prefix; see :func:`reference.prefix_attention`.

    Arithmetic of half types is float32; differentiable once.

    Args:
        backend: None picks by device; "cpp" (float32, float64, bfloat16), "triton" (float32, bfloat16, float16) or
            "torch" (the definition itself, differentiable as often as one likes).
    """
    backend = _attention_backend(q, backend)
    if backend == "torch":
        return reference.prefix_attention(q, k, v, prefix_k, prefix_v, tuple(lengths), causal=causal)
    _check_attention(q, k, v, prefix_k, prefix_v, lengths)
    return torch.ops.mergetune.prefix_attention(q, k, v, prefix_k, prefix_v, lengths, causal, backend)


def prefix_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of :func:`prefix_attention` to q, k, v, prefix_k and prefix_v; the probabilities are made again."""
    inputs, backend = (q, k, v, prefix_k, prefix_v), _attention_backend(q, backend)
    if backend == "torch":
        leaves = [t.detach().requires_grad_() for t in inputs]
        with torch.enable_grad():
            out = reference.prefix_attention(*leaves, tuple(lengths), causal=causal)
        return torch.autograd.grad(out, leaves, d_out)
    _check_attention(*inputs, lengths)
    _expect("d_out", d_out, tuple(q.shape))
    if d_out.dtype != q.dtype:
        raise TypeError(f"d_out must have q's dtype {q.dtype}, got {d_out.dtype}")
    return torch.ops.mergetune.prefix_attention_backward(d_out, *inputs, lengths, causal, backend)


_ATTENTION_DTYPES = {
    "cpp": (torch.float32, torch.float64, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _attention_backend(q: Tensor, backend: str | None) -> str:
    """Like :func:`_backend`; if nothing is asked for, plain torch takes the dtypes that the device's own does not."""
    chosen = _backend(q, backend, ("cpp", "torch", "triton"))
    dtypes = _ATTENTION_DTYPES.get(chosen, (q.dtype,))
    if q.dtype in dtypes:
        return chosen
    if backend is None:
        return "torch"
    first, second, third = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise TypeError(f"q must be {first}, {second} or {third} for backend {backend!r}, got {q.dtype}")


def _check_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: Sequence[int]
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must have shape [M, T, H, d], got {list(q.shape)}")
    (prompts, queries, heads, width), tokens = q.shape, sum(lengths)
    _expect("k", k, (prompts, tokens, heads, width))
    _expect("v", v, (prompts, tokens, heads, width))
    _expect("prefix_k", prefix_k, (prompts, prefix_k.shape[1], heads, width))
    _expect("prefix_v", prefix_v, tuple(prefix_k.shape))
    if queries not in (tokens, len(lengths)):
        raise ValueError(f"q must have a row for each of {tokens} tokens or {len(lengths)} sequences, got {queries}")
    if {t.dtype for t in (k, v, prefix_k, prefix_v)} != {q.dtype}:
        raise TypeError(f"q, k, v, prefix_k and prefix_v must have one dtype, got {q.dtype} and others")


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    """A tensor [M, rows, H, d] as the core takes it: address and strides."""
    return t.data_ptr(), *t.stride()[:3]


def _adjacent(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with the values of a head side by side."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _call_attention(kernel, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...], lengths, causal: bool) -> None:
    """Run a kernel of the core on q, k, v, prefix_k, prefix_v and, behind the offsets, on what the kernel is about."""
    q, k, _, prefix_k, _ = inputs
    offsets = _offsets(tuple(lengths))  # held here: the cache may drop it while the core runs
    kernel(
        str(q.dtype).removeprefix("torch."),
        *(_heads(t) for t in inputs),
        offsets.data_ptr(),
        *(_heads(t) for t in others),
        *(len(q), q.shape[1], k.shape[1], prefix_k.shape[1], len(lengths), q.shape[2], q.shape[3]),
        causal,
        torch.get_num_threads(),
    )


def _prefix_attention_kernel(q, k, v, prefix_k, prefix_v, lengths, causal, backend="cpp") -> Tensor:
    inputs = _adjacent(q, k, v, prefix_k, prefix_v)
    if _attention_backend(q, backend) == "triton":
        from mergetune.kernels import prefix_attention as kernel

        return kernel.prefix_attention(*inputs, lengths, causal)
    out = q.new_empty(q.shape)
    _call_attention(_C.prefix_attention_cpu, inputs, (out,), lengths, causal)
    return out


def _prefix_attention_backward_kernel(
    d_out, q, k, v, prefix_k, prefix_v, lengths, causal, backend="cpp"
) -> tuple[Tensor, ...]:
    d_out, *inputs = _adjacent(d_out, q, k, v, prefix_k, prefix_v)
    if _attention_backend(q, backend) == "triton":
        from mergetune.kernels import prefix_attention as kernel

        return kernel.prefix_attention_backward(d_out, *inputs, lengths, causal)
    gradients = tuple(t.new_empty(t.shape) for t in inputs)
    _call_attention(_C.prefix_attention_backward_cpu, tuple(inputs), (d_out, *gradients), lengths, causal)
    return gradients


def _attention_setup(ctx, inputs, output) -> None:
    *tensors, ctx.lengths, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx, d_out) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError("prefix_attention can be differentiated once: for second derivatives use backend='torch'")
    others = ctx.lengths, ctx.causal, ctx.backend
    return *torch.ops.mergetune.prefix_attention_backward(d_out, *ctx.saved_tensors, *others), None, None, None


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, int[] lengths, bool causal, str backend='cpp'"
)
_library.define(f"prefix_attention({_INPUTS}) -> Tensor")
_library.define(f"prefix_attention_backward(Tensor d_out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
for _key in ("CPU", "CUDA"):
    _library.impl("prefix_attention", _prefix_attention_kernel, _key)
    _library.impl("prefix_attention_backward", _prefix_attention_backward_kernel, _key)
torch.library.register_fake("mergetune::prefix_attention", lambda q, *_: q.new_empty(q.shape), lib=_library)
torch.library.register_fake(
    "mergetune::prefix_attention_backward",
    lambda d_out, *inputs: tuple(t.new_empty(t.shape) for t in inputs[:5]),
    lib=_library,
)
torch.library.register_autograd(
    "mergetune::prefix_attention", _attention_backward, setup_context=_attention_setup, lib=_library
)


# -- merging ----------------------------------------------------------------------------------------------------------


def merge_deltas(
    base: Tensor | None,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    limits: Sequence[float] | None = None,
    kept: Tensor | None = None,
    vote: str | None = None,
    votes: Sequence[float] | None = None,
    shares: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Task vectors trimmed, elected and added in one pass; see :func:`reference.merge_deltas`.

    Not differentiable. Runs in the calling thread alone: callers have a stretch for each.

    Args:
        base, experts: as checkpoints hold them, [n] each: float32, float64, float16, bfloat16, also mixed.

    Returns:
        [n] float32; float64 where an input is.
    """
    experts = list(experts)
    if not experts or experts[0].ndim != 1 or not len(experts[0]):
        raise ValueError(f"experts must be tensors [n], at least one, got {[list(t.shape) for t in experts]}")
    backend = _backend(experts[0], backend, ("cpp", "torch"))
    k, n = len(experts), len(experts[0])
    for name, row in [("base", base), *((f"experts[{i}]", row) for i, row in enumerate(experts))]:
        if row is not None:
            _expect(name, row, (n,))
    if vote not in (None, "sum", "count"):
        raise ValueError(f"vote must be None, sum or count, got {vote!r}")
    if vote is None and (votes is not None or shares is not None):
        raise ValueError("votes and shares must be None where there is no vote")
    if kept is not None:
        _expect("kept", kept, (k, n))
        if kept.dtype != torch.bool:
            raise TypeError(f"kept must be bool, got {kept.dtype}")
    given = {"limits": limits, "weights": weights, "votes": votes, "shares": shares}
    for name, values in given.items():
        if values is not None and len(values) != k:
            raise ValueError(f"{name} must hold one number for each of {k} experts, got {len(values)}")
    dtype, rows = _alike([*experts, *([] if base is None else [base])], kept)
    real, start, rows = _real(rows[0]), None if base is None else rows[k], rows[:k]
    if backend == "torch":
        numbers = {name: v if v is None else experts[0].new_tensor(v, dtype=real) for name, v in given.items()}
        start, rows = None if start is None else start.to(real), torch.stack(rows).to(real)
        return reference.merge_deltas(start, rows, **numbers, scale=scale, kept=kept, vote=vote)
    if vote is not None and votes is None:
        given["votes"] = [1.0] * k
    numbers = [v if v is None else torch.tensor(v, dtype=torch.float64, device="cpu") for v in given.values()]
    held = [start, kept if kept is None else kept.contiguous(), *numbers]  # as are the rows, while the core runs
    start_at, *others = (0 if t is None else t.data_ptr() for t in held)
    out = torch.empty(n, dtype=real, device="cpu")
    arguments = start_at, [row.data_ptr() for row in rows], *others, vote == "count", scale, n
    _C.merge_deltas_cpu(dtype, arguments, out.data_ptr())
    return out


def count_around(
    values: Tensor, low: float, high: float, *, base: Tensor | None = None, backend: str | None = None
) -> tuple[list[int], Tensor]:
    """Counts that find an order statistic, in one pass; see :func:`reference.count_around`.

    Args:
        values, base: [n], of the dtypes of :func:`merge_deltas`.
    """
    backend = _backend(values, backend, ("cpp", "torch"))
    _expect("values", values, (values.numel(),))
    if base is not None:
        _expect("base", base, (len(values),))
    if not low <= high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    dtype, rows = _alike([values, *([] if base is None else [base])])
    real = _real(rows[0])
    low, high = torch.tensor([low, high], dtype=real, device="cpu").tolist()  # as the values can be
    if backend == "torch" or not len(values):
        rows = [row.to(real) for row in rows]
        return reference.count_around(rows[0], low, high, base=None if base is None else rows[1])
    between = torch.empty(len(values), dtype=real, device="cpu")
    start = 0 if base is None else rows[1].data_ptr()
    counts = _C.count_around_cpu(dtype, rows[0].data_ptr(), start, len(values), low, high, between.data_ptr())
    return counts, between[: counts[2]].clone()


_STORED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _alike(rows: list[Tensor], kept: Tensor | None = None) -> tuple[str, list[Tensor]]:
    """Rows in one dtype, the widest real one where they differ, as the core reads them; and the dtype's name."""
    if wrong := [row.dtype for row in rows if not row.dtype.is_floating_point]:
        raise TypeError(f"values must be floating point, got {wrong[0]}")
    if len(devices := {str(t.device) for t in (*rows, kept) if t is not None}) > 1:
        raise ValueError(f"all values must be on one device, got {', '.join(sorted(devices))}")
    rows = [row if row.dtype in _STORED else row.float() for row in rows]
    if len({row.dtype for row in rows}) > 1:
        rows = [row.to(max(map(_real, rows), key=lambda dtype: dtype.itemsize)) for row in rows]
    rows = [row.contiguous() for row in rows]
    rows = [row.clone() if row.data_ptr() % row.dtype.itemsize else row for row in rows]  # as memory-mapped files have
    return str(rows[0].dtype).removeprefix("torch."), rows


# -- self-test --------------------------------------------------------------------------------------------------------


def self_test() -> dict[str, float]:
    """Largest relative difference of each native op from its definition, on a small random case in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, labels = torch.nn.functional.normalize(draw(33, 24), dim=-1), torch.arange(33) % 7
    w, anchors, w1, rscale = draw(7, 24), draw(2, 7, 24), draw(7, 24), draw(5, 7).abs()
    alphas, betas = torch.tensor([0.0, 0.4]), torch.tensor([0.5, 2.0])
    heads = [draw(2, rows, 3, 8) for rows in (8, 8, 8, 5, 5)]
    points = (
        torch.tensor([0, 1, 1, 2, 2]),
        torch.tensor([1.0, 0.0, 0.4, 0.0, 0.4]),
        torch.tensor([1.0, 0.3, 0.3, 1.0, 1.0]),
    )

    def lmc(backend: str | None) -> Tensor:
        leaf = w.clone().requires_grad_()
        loss, terms = lmc_loss(x, labels, leaf, anchors, alphas, betas, scale=10.0, w1=w1, lam=4.0, backend=backend)
        return torch.cat([torch.autograd.grad(loss, leaf)[0].flatten(), terms])

    def rows(backend: str | None) -> Tensor:
        dots = x @ torch.cat([w[None], anchors]).mT
        return torch.cat([t.flatten() for t in path_cross_entropy(dots, labels, *points, rscale, backend=backend)])

    def attention(backend: str | None) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in heads]
        out = prefix_attention(*leaves, (1, 2, 2, 3), backend=backend)
        return torch.cat([t.flatten() for t in (out, *torch.autograd.grad(out.square().sum(), leaves))])

    def merging(backend: str | None) -> Tensor:
        experts, limits = draw(3, 999), [0.1, 0.2, 0.3]
        return merge_deltas(
            draw(999), experts, [1, 2, 0.5], limits=limits, vote="sum", shares=[1, 1, 1], backend=backend
        )

    def counting(backend: str | None) -> Tensor:
        counts, between = count_around(draw(999), 0.1, 0.7, base=draw(999), backend=backend)
        return torch.cat([torch.tensor(counts), between])

    def apart(run: Callable[[str | None], Tensor]) -> float:
        found = []
        for backend in (None, "torch"):
            generator.manual_seed(1)
            found.append(run(backend))
        return ((found[0] - found[1]).abs().max() / found[1].abs().max()).item()

    runs = {"lmc_loss": lmc, "path_cross_entropy": rows, "prefix_attention": attention}
    return {name: apart(run) for name, run in (runs | {"merge_deltas": merging, "count_around": counting}).items()}
