"""Residual attention blocks on packed texts: with a hand-written backward for frozen blocks, or with plain autograd.

Frozen blocks need gradients of activations only. For them the forward keeps the input of each layer norm, the queries,
keys and values, and the hidden layer before its activation: 9 W values per token and block. The backward computes the
attention probabilities again. Plain autograd runs the same forward with the plain definition of attention and also
gives gradients of weights and second derivatives. In the last block, only the pooled rows continue after the attention.

Shapes: M prompts, R = S + T rows per prompt (S of the shared prefix, T of the packed texts), C classes, W width, H
heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mergetune import ops
from mergetune.ops.arguments import real_dtype

ACTIVATIONS = (nn.GELU, QuickGELU)  # activations whose derivative this file implements

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of the texts in the packed rows.

    Attributes:
        prefix: S, number of rows of the shared prefix; 0 without a prefix.
        lengths: number of rows of each text, without the prefix.
        pooled: row that becomes the feature of each text, counted from the end of the prefix, [C]; the last row of the
            text.
        heads: H.
        causal: whether a row attends only to itself and earlier rows.
    """

    prefix: int
    lengths: tuple[int, ...]
    pooled: Tensor
    heads: int
    causal: bool


def run_blocks(
    blocks: tuple[ResidualAttentionBlock, ...], x: Tensor, layout: Layout, *, backend: str | None = None
) -> Tensor:
    """Run all blocks and return the pooled rows.

    Args:
        blocks: blocks with an activation of ``ACTIVATIONS``; must be frozen unless backend is "torch".
        x: prefix and packed texts of each prompt, [M, R, W].
        layout: positions of the texts in the R rows.
        backend: None uses the hand-written backward; "torch" uses plain autograd, which needs more memory.

    Returns:
        [M, C, W], differentiable once in ``x``; with "torch", any number of times in ``x`` and the weights.

    Raises:
        ValueError: an unknown backend, or blocks that require gradients without backend "torch".
    """
    if backend not in (None, "torch"):
        raise ValueError(f"backend must be None or 'torch', got {backend!r}")
    if backend is None:
        if torch.is_grad_enabled() and any(weight.requires_grad for block in blocks for weight in block.parameters()):
            raise ValueError("blocks must be frozen unless backend is 'torch', got weights that require a gradient")
        return _Blocks.apply(x, blocks, layout)
    for i, block in enumerate(blocks):
        x, _ = _forward(block, x, layout, last=i == len(blocks) - 1, backend=backend)
    return x


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, blocks: tuple[ResidualAttentionBlock, ...], layout: Layout) -> Tensor:
        ctx.blocks, ctx.layout, kept = blocks, layout, []
        for i, block in enumerate(blocks):
            x, saved = _forward(block, x, layout, last=i == len(blocks) - 1)
            if ctx.needs_input_grad[0]:
                kept += saved
        ctx.save_for_backward(*kept)
        return x

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's base takes *gradients; it passes one
        ctx, d: Tensor
    ) -> tuple[Tensor, None, None]:
        kept = ctx.saved_tensors  # read once: each read would run a checkpoint again
        each = len(kept) // len(ctx.blocks)
        with torch.autocast(d.device.type, enabled=False):
            for i in reversed(range(len(ctx.blocks))):
                own = kept[each * i : each * (i + 1)]
                d = _backward(ctx.blocks[i], d, own, ctx.layout, last=i == len(ctx.blocks) - 1)
        return d, None, None


class Mlp(Protocol):
    """The named layers of a block's ``nn.Sequential``."""

    c_fc: nn.Linear
    gelu: nn.Module
    c_proj: nn.Linear


def mlp_of(block: ResidualAttentionBlock) -> Mlp:
    """The MLP of a block, typed with its named layers."""
    return cast(Mlp, block.mlp)


def _forward(
    block: ResidualAttentionBlock, x: Tensor, layout: Layout, *, last: bool, backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The rows after a block, and the tensors that the backward needs."""
    normed, *statistics_1 = _normalise(block.ln_1, x, backend)
    qkv = F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias)
    mixed = _attend(qkv, layout, last=last, backend=backend)
    residual = x[:, layout.prefix + layout.pooled] if last else x
    middle = residual + block.ls_1(block.attn.out_proj(mixed))
    normed, *statistics_2 = _normalise(block.ln_2, middle, backend)
    mlp = mlp_of(block)
    hidden = mlp.c_fc(normed)
    out = middle + block.ls_2(mlp.c_proj(mlp.gelu(hidden)))
    return out, [x, qkv, middle, hidden, *statistics_1, *statistics_2]


def _backward(
    block: ResidualAttentionBlock, d: Tensor, kept: tuple[Tensor, ...], layout: Layout, *, last: bool
) -> Tensor:
    x, qkv, middle, hidden, mean_1, rstd_1, mean_2, rstd_2 = kept
    mlp = mlp_of(block)
    d_hidden = _activation_backward(mlp.gelu, block.ls_2(d) @ mlp.c_proj.weight, hidden)
    d = d + _layer_norm_backward(block.ln_2, d_hidden @ mlp.c_fc.weight, middle, mean_2, rstd_2)
    d_qkv = _attend_backward(block.ls_1(d) @ block.attn.out_proj.weight, qkv, layout, last=last)
    d_x = _layer_norm_backward(block.ln_1, d_qkv @ block.attn.in_proj_weight, x, mean_1, rstd_1)
    return d_x.index_add_(1, layout.prefix + layout.pooled, d) if last else d_x.add_(d)


def _split(qkv: Tensor, layout: Layout) -> tuple[Triple, Triple]:
    """Views of (q, k, v) for the prefix and for the texts; each tensor is [M, rows, H, W / H]."""
    q, k, v = qkv.unflatten(-1, (3, layout.heads, -1)).unbind(2)
    s = layout.prefix
    return (q[:, :s], k[:, :s], v[:, :s]), (q[:, s:], k[:, s:], v[:, s:])


def _attend(qkv: Tensor, layout: Layout, *, last: bool, backend: str | None) -> Tensor:
    """Attention output of all rows, [M, R, W]; in the last block, of the pooled rows, [M, C, W]."""
    prefix, (q, k, v) = _split(qkv, layout)
    _, prefix_k, prefix_v = prefix
    q = q[:, layout.pooled] if last else q
    mixed = ops.prefix_attention(q, k, v, prefix_k, prefix_v, layout.lengths, causal=layout.causal, backend=backend)
    if layout.prefix and not last:  # the prefix attends to itself
        own = ops.prefix_attention(*prefix, prefix_k[:, :0], prefix_v[:, :0], (layout.prefix,), backend=backend)
        mixed = torch.cat([own, mixed], 1)
    return mixed.flatten(2)


def _attend_backward(d: Tensor, qkv: Tensor, layout: Layout, *, last: bool) -> Tensor:
    d = d.unflatten(-1, (layout.heads, -1))
    prefix, (q, k, v) = _split(qkv, layout)
    _, prefix_k, prefix_v = prefix
    q = q[:, layout.pooled] if last else q
    d_texts = d if last else d[:, layout.prefix :]
    d_q, d_k, d_v, d_prefix_k, d_prefix_v = ops.prefix_attention_backward(
        d_texts, q, k, v, prefix_k, prefix_v, layout.lengths, causal=layout.causal
    )
    d_qkv = torch.zeros_like(qkv) if last else torch.empty_like(qkv)
    (to_prefix_q, to_prefix_k, to_prefix_v), (to_q, to_k, to_v) = _split(d_qkv, layout)
    to_k.copy_(d_k)
    to_v.copy_(d_v)
    if last:
        to_q[:, layout.pooled] = d_q
    else:
        to_q.copy_(d_q)
    if layout.prefix:
        if not last:
            none = prefix_k[:, :0], prefix_v[:, :0]
            own = ops.prefix_attention_backward(d[:, : layout.prefix], *prefix, *none, (layout.prefix,))
            to_prefix_q.copy_(own[0])
            d_prefix_k, d_prefix_v = d_prefix_k + own[1], d_prefix_v + own[2]
        to_prefix_k.copy_(d_prefix_k)
        to_prefix_v.copy_(d_prefix_v)
    return d_qkv


def _normalise(norm: nn.LayerNorm, x: Tensor, backend: str | None) -> tuple[Tensor, ...]:
    """The normalised rows; without backend "torch" also mean and reciprocal deviation, for the backward."""
    if backend == "torch":
        return (layer_norm(norm, x),)
    return torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the last dimension, from elementary operations.

    ``F.layer_norm`` has correct first and second derivatives only: in torch 2.14 its third derivative treats the saved
    mean and deviation as constants.
    """
    wide = x.to(real_dtype(x))
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    normed = (wide - mean) * torch.rsqrt(variance + norm.eps)
    normed = normed if norm.weight is None else normed * norm.weight
    return (normed if norm.bias is None else normed + norm.bias).to(x.dtype)


def _layer_norm_backward(norm: nn.LayerNorm, d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(
        d, x, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, (True, False, False)
    )[0]


def _activation_backward(activation: nn.Module, d: Tensor, hidden: Tensor) -> Tensor:
    if isinstance(activation, nn.GELU):
        return torch.ops.aten.gelu_backward(d, hidden, approximate=activation.approximate)
    gate = torch.sigmoid(1.702 * hidden)  # QuickGELU: x sigmoid(1.702 x)
    return d * gate * (1 + 1.702 * hidden * (1 - gate))
