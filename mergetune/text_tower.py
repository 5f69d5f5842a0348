"""Class features from context vectors: the text tower run on packed tokens, behind a prefix shared by all classes.

In a causal tower nothing after a text's last token can reach its feature, and ``[SOS, ctx_1 .. ctx_n]`` is the same
for every class: its keys and values are computed once, and only the class names' own tokens are packed behind it,
without padding. Class-specific contexts and towers without a causal mask take whole sequences through the same code.

Shapes: M prompts encoded together, C classes, L context length, W tower width, D embedding width, T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mergetune.blocks import Layout, run_blocks
from mergetune.clip import TextParts

CHUNK_TOKENS = 8192
"""Activations of at most so many tokens are kept at once: about 2 GB in float32 for a tower of 12 blocks, 512 wide."""


@dataclass(frozen=True, eq=False)
class PackedTexts:
    """Tokens of some classes, one after the other, with room for the context vectors.

    Attributes:
        rows: embeddings plus positions of the packed tokens, zero where a context vector comes, [T, W].
        lengths: packed tokens of each class, ascending.
        pooled: row of T that becomes each class's feature, [C].
        classes: which class each is, [C].
        context_rows: rows of T that take a class's context vectors, [C * n]; None when the context is in the prefix.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor
    classes: Tensor
    context_rows: Tensor | None


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Context vectors -> class features of fixed class names. Make one with :func:`text_encoder`."""

    text: TextParts
    start: Tensor  # [first_token, W]: the start token, if any, with its position
    context_positions: Tensor  # [n, W]
    chunks: tuple[PackedTexts, ...]

    def __call__(self, ctx: Tensor) -> Tensor:
        """Class features, not normalised.

        Args:
            ctx: M prompts, each shared by all classes, [M, n, W], or specific to each, [M, C, n, W].

        Returns:
            [M, C, D] float32, differentiable in ``ctx``.
        """
        shared, vectors = self.chunks[0].context_rows is None, tuple(self.context_positions.shape)
        if ctx.ndim not in ((3,) if shared else (3, 4)) or tuple(ctx.shape[-2:]) != vectors:
            form = "[M, n, W]" if shared else "[M, n, W] or [M, C, n, W]"
            raise ValueError(f"ctx must have shape {form} with n, W = {vectors}, got {list(ctx.shape)}")
        ctx = ctx.to(self.text.dtype) + self.context_positions
        encode = self._encode
        tokens = len(ctx) * sum(len(chunk.rows) for chunk in self.chunks)
        if tokens > CHUNK_TOKENS and torch.is_grad_enabled() and ctx.requires_grad:
            encode = partial(checkpoint, self._encode, use_reentrant=False)  # one piece's activations at a time
        chunks = []
        with torch.autocast(ctx.device.type, enabled=False):  # the tower has the precision that was asked for
            for chunk in self.chunks:
                pieces = ctx.split(max(1, CHUNK_TOKENS // len(chunk.rows)))
                chunks.append(torch.cat([encode(prompts, chunk) for prompts in pieces]))
        return torch.cat(chunks, 1)[:, torch.cat([chunk.classes for chunk in self.chunks]).argsort()]

    def _encode(self, ctx: Tensor, packed: PackedTexts) -> Tensor:
        prompts = len(ctx)
        rows = packed.rows.expand(prompts, -1, -1)
        if packed.context_rows is None:  # shared: the prefix is [SOS, ctx]
            prefix = torch.cat([self.start.expand(prompts, -1, -1), ctx], 1)
        else:
            own = ctx[:, packed.classes] if ctx.ndim == 4 else ctx[:, None].expand(-1, len(packed.classes), -1, -1)
            rows = rows.index_add(1, packed.context_rows, own.flatten(1, 2))
            prefix = rows[:, :0]
        layout = Layout(prefix.shape[1], packed.lengths, packed.pooled, self.text.heads, self.text.causal)
        return self.text.project(run_blocks(self.text.blocks, torch.cat([prefix, rows], 1), layout))


def text_encoder(
    text: TextParts, tokens: Tensor, *, first: int, context: int, shared: bool = True, chunk_tokens: int = CHUNK_TOKENS
) -> TextEncoder:
    """Pack class names for encoding with any context vectors.

    Args:
        text: the tower.
        tokens: each class's whole text, with stand-ins where the context goes, [C, L].
        first: position of the first context token.
        context: n, number of context tokens.
        shared: whether all classes will have the same context vectors; lets a causal tower share the prefix.
        chunk_tokens: classes are encoded in chunks of about so many tokens, so that memory is bounded.
    """
    pooled = text.pooled_position(tokens)
    if (pooled < first + context).any() and text.causal:
        raise ValueError(
            f"tokens must hold the class name after the {context} context tokens, got a text that ends before"
        )
    behind_prefix = shared and text.causal
    begin = first + context if behind_prefix else 0
    lengths = (pooled + 1 - begin) if text.causal else torch.full_like(pooled, tokens.shape[1])
    embedded = text.token_embedding.weight, text.positional_embedding.to(text.dtype)

    def pack(classes: Tensor) -> PackedTexts:
        rows, context_rows, offset = [], [], 0
        for c in classes.tolist():
            positions = torch.arange(begin, begin + int(lengths[c]), device=tokens.device)
            if not text.causal:  # without a mask the order is free: the pooled token goes last, where it is looked for
                positions = torch.cat([positions[positions != pooled[c]], pooled[c : c + 1]])
            row = embedded[0][tokens[c, positions]].to(text.dtype) + embedded[1][positions]
            if not behind_prefix:
                at = torch.tensor(
                    [positions.tolist().index(p) for p in range(first, first + context)], device=row.device
                )
                row = row.index_fill(0, at, 0.0)
                context_rows.append(at + offset)
            rows.append(row)
            offset += len(row)
        return PackedTexts(
            rows=torch.cat(rows),
            lengths=tuple(lengths[classes].tolist()),
            pooled=lengths[classes].cumsum(0) - 1,
            classes=classes,
            context_rows=None if behind_prefix else torch.cat(context_rows),
        )

    order = lengths.argsort(stable=True)
    chunk = (lengths[order].cumsum(0) - 1) // max(chunk_tokens, 1)
    return TextEncoder(
        text=text,
        start=embedded[0][tokens[0, :first]].to(text.dtype) + embedded[1][:first],
        context_positions=embedded[1][first : first + context],
        chunks=tuple(pack(order[chunk == c]) for c in chunk.unique()),
    )
