"""prefix_attention: attention of packed sequences that share a prefix, forward and backward.

Shapes: M prompts encoded together, T packed tokens, Q queries, S tokens of the prefix, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mergetune.io import dtype_name
from mergetune.ops import reference
from mergetune.ops.arguments import AttentionArguments, expect_numbers, expect_shape
from mergetune.ops.backends import OPS, Implementation, Op
from mergetune.ops.library import library
from mergetune.ops.native import core
from mergetune.ops.problems import attention_problems
from mergetune.ops.selection import VERIFIED, choose, run_verified

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# -- the ops ----------------------------------------------------------------------------------------------------------


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
    """Attention of packed sequences that share a prefix.

    :func:`mergetune.ops.reference.prefix_attention` is the definition and describes the other arguments. Half types are
    computed in float32. The op is differentiable once, except with backend "torch".

    Args:
        backend: "cpp" (float32, float64, bfloat16), "triton" (float32, bfloat16, float16), "compile" (the definition
            through torch.compile) or "torch" (the definition, differentiable any number of times). None takes the
            native core on a CPU, and on a GPU the fastest backend that was verified on this GPU.

    Returns:
        The attention output, in the shape of q.
    """
    arguments = AttentionArguments(q, k, v, prefix_k, prefix_v, tuple(lengths), causal)
    expect_numbers(arguments._fields, arguments)
    backend = choose("prefix_attention", "q", q, arguments, backend)
    if backend in ("torch", "compile"):
        return _defined(arguments, reference.prefix_attention if backend == "torch" else _compiled())
    arguments.check()
    return torch.ops.mergetune.prefix_attention(*arguments, backend)


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
) -> Gradients:
    """Gradients of :func:`prefix_attention` with respect to q, k, v, prefix_k and prefix_v.

    The probabilities of the forward pass are computed again.

    Args:
        d_out: gradient with respect to the output, in the shape and dtype of q.
        q, k, v, prefix_k, prefix_v, lengths, causal, backend: as in :func:`prefix_attention`.
    """
    arguments = AttentionArguments(q, k, v, prefix_k, prefix_v, tuple(lengths), causal)
    expect_numbers(("d_out", *arguments._fields), (d_out, *arguments))
    backend = choose("prefix_attention", "q", q, arguments, backend)
    if backend in ("torch", "compile"):
        return OPS["prefix_attention"].implementations[backend].run_backward(d_out, arguments)
    arguments.check()
    expect_shape("d_out", d_out, tuple(q.shape))
    if d_out.dtype != q.dtype:
        raise TypeError(f"d_out must have q's dtype {q.dtype}, got {d_out.dtype}")
    return torch.ops.mergetune.prefix_attention_backward(d_out, *arguments, backend)


# -- implementations --------------------------------------------------------------------------------------------------


def _defined(arguments: AttentionArguments, definition: Callable[..., Tensor]) -> Tensor:
    return definition(*arguments.tensors, arguments.lengths, causal=arguments.causal)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(reference.prefix_attention, fullgraph=True)


def _from_definition(
    definition: Callable[[], Callable[..., Tensor]],
) -> tuple[Callable[[AttentionArguments], Tensor], Callable[[Tensor, AttentionArguments], Gradients]]:
    """Forward and backward function of the definition or a compiled copy; the backward uses autograd."""

    def backward(d_out: Tensor, arguments: AttentionArguments) -> Gradients:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in arguments.tensors]
            out = _defined(arguments.with_tensors(leaves), definition())
            d_q, d_k, d_v, d_prefix_k, d_prefix_v = torch.autograd.grad(
                out, leaves, d_out, allow_unused=True, materialize_grads=True
            )
        return d_q, d_k, d_v, d_prefix_k, d_prefix_v

    return lambda arguments: _defined(arguments, definition()), backward


def _triton(arguments: AttentionArguments) -> Tensor:
    from mergetune.kernels import prefix_attention as kernel

    tensors = _adjacent(*arguments.tensors)
    return kernel.prefix_attention(*tensors, lengths=arguments.lengths, causal=arguments.causal)


def _triton_backward(d_out: Tensor, arguments: AttentionArguments) -> Gradients:
    from mergetune.kernels import prefix_attention as kernel

    tensors = _adjacent(d_out, *arguments.tensors)
    return kernel.prefix_attention_backward(*tensors, lengths=arguments.lengths, causal=arguments.causal)


def _native(arguments: AttentionArguments) -> Tensor:
    out = arguments.q.new_empty(arguments.q.shape)
    _call(core.prefix_attention_cpu, _adjacent(*arguments.tensors), (out,), arguments)
    return out


def _native_backward(d_out: Tensor, arguments: AttentionArguments) -> Gradients:
    d_out, *inputs = _adjacent(d_out, *arguments.tensors)
    q, k, v, prefix_k, prefix_v = (t.new_empty(t.shape) for t in inputs)
    gradients = q, k, v, prefix_k, prefix_v
    _call(core.prefix_attention_backward_cpu, tuple(inputs), (d_out, *gradients), arguments)
    return gradients


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a tensor [M, rows, H, d], for the native core."""
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)


def _adjacent(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with contiguous values of each head."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _call(
    kernel: Callable, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...], arguments: AttentionArguments
) -> None:
    """Runs a kernel of the native core.

    Args:
        kernel: function of the core.
        inputs: q, k, v, prefix_k and prefix_v.
        others: the output; for the backward kernel d_out and the gradients to fill.
        arguments: arguments of the op.
    """
    q, k, _, prefix_k, _ = inputs
    offsets = _offsets(arguments.lengths)  # keeps a reference: the cache may drop the tensor while the core runs
    kernel(
        dtype_name(q.dtype),
        *(_heads(t) for t in inputs),
        offsets.data_ptr(),
        *(_heads(t) for t in others),
        *(len(q), q.shape[1], k.shape[1], prefix_k.shape[1], len(arguments.lengths), q.shape[2], q.shape[3]),
        arguments.causal,
        torch.get_num_threads(),
    )


# -- comparison of implementations ------------------------------------------------------------------------------------


def _results(implementation: Implementation, arguments: AttentionArguments) -> dict[str, Tensor]:
    """Output and gradients, with a fixed d_out that depends only on the output's shape."""
    out = implementation.run(arguments)
    d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float32, device=out.device).sin().view(out.shape)
    gradients = implementation.run_backward(d_out.to(out.dtype), arguments)
    return dict(zip(("out", "d_q", "d_k", "d_v", "d_prefix_k", "d_prefix_v"), (out, *gradients), strict=True))


def _truth(arguments: AttentionArguments) -> dict[str, Tensor]:
    wide = arguments.with_tensors(t.double() for t in arguments.tensors)
    return _results(_op.implementations["torch"], wide)


_op = OPS["prefix_attention"] = Op(
    "prefix_attention", _results, _truth, attention_problems,
    (torch.float32, torch.bfloat16, torch.float16),
)  # fmt: skip
_op.register(Implementation("torch", *_from_definition(lambda: reference.prefix_attention)))
_op.register(Implementation("cpp", _native, _native_backward, (torch.float32, torch.float64, torch.bfloat16)))
_op.register(Implementation("triton", _triton, _triton_backward, (torch.float32, torch.bfloat16, torch.float16)))
_op.register(Implementation("compile", *_from_definition(_compiled)))


# -- torch.library ----------------------------------------------------------------------------------------------------


def _kernel(q, k, v, prefix_k, prefix_v, lengths, causal, backend="cpp") -> Tensor:
    arguments = AttentionArguments(q, k, v, prefix_k, prefix_v, tuple(lengths), causal)
    if backend == VERIFIED:
        return run_verified("prefix_attention", q, arguments)
    return _op.implementations[backend].run(arguments)


def _backward_kernel(d_out, q, k, v, prefix_k, prefix_v, lengths, causal, backend="cpp") -> Gradients:
    arguments = AttentionArguments(q, k, v, prefix_k, prefix_v, tuple(lengths), causal)
    if backend == VERIFIED:
        return run_verified("prefix_attention", q, arguments, d_out=d_out)
    return _op.implementations[backend].run_backward(d_out, arguments)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.lengths, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("prefix_attention can be differentiated once: for second derivatives use backend='torch'")
    others = ctx.lengths, ctx.causal, ctx.backend
    return *torch.ops.mergetune.prefix_attention_backward(d_out, *ctx.saved_tensors, *others), None, None, None


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, int[] lengths, bool causal, str backend='cpp'"
)
library.define(f"prefix_attention({_SCHEMA}) -> Tensor")
library.define(f"prefix_attention_backward(Tensor d_out, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
for _key in ("CPU", "CUDA"):
    library.impl("prefix_attention", _kernel, _key)
    library.impl("prefix_attention_backward", _backward_kernel, _key)
torch.library.register_fake("mergetune::prefix_attention", lambda q, *_: q.new_empty(q.shape), lib=library)
torch.library.register_fake(
    "mergetune::prefix_attention_backward",
    lambda d_out, *inputs: tuple(t.new_empty(t.shape) for t in inputs[:5]),
    lib=library,
)
torch.library.register_autograd("mergetune::prefix_attention", _backward, setup_context=_setup, lib=library)
