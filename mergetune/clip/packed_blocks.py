"""Residual attention blocks on packed texts, with a backward written by hand: activation gradients only.

The weights are frozen, so no gradient of theirs is ever made; what is kept for the backward is the input of each
normalisation, the queries, keys and values, and the hidden layer before its activation: 9 W numbers a token and block.
Attention probabilities are made again. In the last block only the pooled rows go past the attention.

Shapes: M prompts, R = S + T rows of a prompt (its shared prefix, then the packed texts), C classes, W width, H heads.
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

ACTIVATIONS = (nn.GELU, QuickGELU)  # those whose derivative is written here

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the texts lie in the packed rows.

    Attributes:
        prefix: S, rows of the shared prefix; 0 if there is none.
        lengths: rows of each text, after the prefix.
        pooled: row of T, counted after the prefix, that becomes each text's feature, [C]; the last of the text.
        heads: H.
        causal: whether a row sees only the rows before it.
    """

    prefix: int
    lengths: tuple[int, ...]
    pooled: Tensor
    heads: int
    causal: bool


def run_blocks(blocks: tuple[ResidualAttentionBlock, ...], x: Tensor, layout: Layout) -> Tensor:
    """The pooled rows after all blocks.

    Args:
        blocks: frozen, with one of ``ACTIVATIONS``.
        x: prefix and packed texts of each prompt, [M, R, W].
        layout: where they lie.

    Returns:
        [M, C, W], differentiable once in ``x``.
    """
    return _Blocks.apply(x, blocks, layout)


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
        kept = ctx.saved_tensors  # once: unpacking is what makes a checkpoint run again
        each = len(kept) // len(ctx.blocks)
        with torch.autocast(d.device.type, enabled=False):
            for i in reversed(range(len(ctx.blocks))):
                own = kept[each * i : each * (i + 1)]
                d = _backward(ctx.blocks[i], d, own, ctx.layout, last=i == len(ctx.blocks) - 1)
        return d, None, None


class Mlp(Protocol):
    """The layers that a block's ``nn.Sequential`` has by name."""

    c_fc: nn.Linear
    gelu: nn.Module
    c_proj: nn.Linear


def mlp_of(block: ResidualAttentionBlock) -> Mlp:
    return cast(Mlp, block.mlp)


def _forward(block: ResidualAttentionBlock, x: Tensor, layout: Layout, *, last: bool) -> tuple[Tensor, list[Tensor]]:
    normed, *statistics_1 = _layer_norm(block.ln_1, x)
    qkv = F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias)
    mixed = _attend(qkv, layout, last=last)
    residual = x[:, layout.prefix + layout.pooled] if last else x
    middle = residual + block.ls_1(block.attn.out_proj(mixed))
    normed, *statistics_2 = _layer_norm(block.ln_2, middle)
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
    """Views of the prefix's and of the texts' (q, k, v), each [M, rows, H, W / H]."""
    q, k, v = qkv.unflatten(-1, (3, layout.heads, -1)).unbind(2)
    s = layout.prefix
    return (q[:, :s], k[:, :s], v[:, :s]), (q[:, s:], k[:, s:], v[:, s:])


def _attend(qkv: Tensor, layout: Layout, *, last: bool) -> Tensor:
    """Attention of all rows, [M, R, W]; in the last block of the pooled rows, [M, C, W]."""
    prefix, (q, k, v) = _split(qkv, layout)
    _, prefix_k, prefix_v = prefix
    q = q[:, layout.pooled] if last else q
    mixed = ops.prefix_attention(q, k, v, prefix_k, prefix_v, layout.lengths, causal=layout.causal)
    if layout.prefix and not last:  # the prefix attends to itself
        own = ops.prefix_attention(*prefix, prefix_k[:, :0], prefix_v[:, :0], (layout.prefix,))
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


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _layer_norm_backward(norm: nn.LayerNorm, d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(
        d, x, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, (True, False, False)
    )[0]


def _activation_backward(activation: nn.Module, d: Tensor, hidden: Tensor) -> Tensor:
    if isinstance(activation, nn.GELU):
        return torch.ops.aten.gelu_backward(d, hidden, approximate=activation.approximate)
    gate = torch.sigmoid(1.702 * hidden)  # QuickGELU: x sigmoid(1.702 x)
    return d * gate * (1 + 1.702 * hidden * (1 - gate))
