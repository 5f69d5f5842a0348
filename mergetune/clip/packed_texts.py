"""Class features from context vectors: the text tower run on packed tokens, behind a prefix shared by all classes.

In a causal tower nothing after a text's last token can reach its feature, and ``[SOS, ctx_1 .. ctx_n]`` is the same
for every class: its keys and values are computed once, and only the class names' own tokens are packed behind it,
without padding. Context vectors behind the name are packed with it. Class-specific contexts and towers without a causal
mask take whole sequences through the same code.

Shapes: M prompts encoded together, C classes, L context length, W tower width, D embedding width, T packed tokens,
n context tokens, S of them in the shared prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mergetune.clip.packed_blocks import Layout, run_blocks
from mergetune.clip.text_tower import TextParts

CHUNK_TOKENS = 8192
"""Activations of at most so many tokens are kept at once: about 2 GB in float32 for a tower of 12 blocks, 512 wide."""


@dataclass(frozen=True, eq=False)
class PackedTexts:
    """Tokens of some classes, one after the other, with room for the context vectors.

    Attributes:
        rows: embeddings plus positions of the packed tokens, the position alone where a context vector comes, [T, W].
        lengths: packed tokens of each class, ascending.
        pooled: row of T that becomes each class's feature, [C].
        classes: which class each is, [C].
        context_rows: rows of T that take the context vectors behind the prefix, class by class, [C * (n - S)].
    """

    rows: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor
    classes: Tensor
    context_rows: Tensor


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Context vectors -> class features of fixed class names. Make one with :func:`text_encoder`.

    The features are differentiable once and in the context vectors alone, by a backward written by hand.
    ``dataclasses.replace(encoder, backend="torch")`` takes plain autograd: differentiable any number of times and also
    in the tower's weights, which must stay in place until the gradient is made. It needs more memory, and second
    derivatives keep the activations of all chunks.
    """

    text: TextParts
    start: Tensor  # [first_token, W]: the start token, if any, with its position
    context: int  # n
    prefix_positions: Tensor | None  # [S, W], of the context vectors in the prefix; None: nothing is shared
    chunks: tuple[PackedTexts, ...]
    order: Tensor  # [C], where each class lies in the chunks
    backend: str | None = None  # None: a backward written by hand; "torch": plain autograd

    @property
    def at_once(self) -> int:
        """Prompts that a call takes with their activations kept; for more the gradient has them made again."""
        return CHUNK_TOKENS // sum(len(chunk.rows) for chunk in self.chunks)

    def __call__(self, ctx: Tensor) -> Tensor:
        """Class features, not normalised.

        Args:
            ctx: M prompts, each shared by all classes, [M, n, W], or specific to each, [M, C, n, W].

        Returns:
            [M, C, D], float64 from a float64 tower and else float32, differentiable in ``ctx``.
        """
        shared, vectors = self.prefix_positions is not None, (self.context, self.text.width)
        if ctx.ndim not in ((3,) if shared else (3, 4)) or tuple(ctx.shape[-2:]) != vectors:
            form = "[M, n, W]" if shared else "[M, n, W] or [M, C, n, W]"
            raise ValueError(f"ctx must have shape {form} with n, W = {vectors}, got {list(ctx.shape)}")
        ctx = ctx.to(self.text.dtype)
        encode = self._encode
        wanted = ctx.requires_grad or self.backend == "torch"  # the latter makes gradients of weights as well
        if len(ctx) > self.at_once and torch.is_grad_enabled() and wanted:
            encode = partial(
                checkpoint, self._encode, use_reentrant=False, preserve_rng_state=False
            )  # one piece at a time
        chunks = []
        with torch.autocast(ctx.device.type, enabled=False):  # the tower has the precision that was asked for
            for chunk in self.chunks:
                pieces = ctx.split(max(1, CHUNK_TOKENS // len(chunk.rows)))
                chunks.append(torch.cat([encode(prompts, chunk) for prompts in pieces]))
        return torch.cat(chunks, 1)[:, self.order]

    def _encode(self, ctx: Tensor, packed: PackedTexts) -> Tensor:
        prompts = len(ctx)
        rows, prefix = packed.rows.expand(prompts, -1, -1), ctx.new_empty(prompts, 0, ctx.shape[-1])
        if self.prefix_positions is not None:
            inside = len(self.prefix_positions)
            prefix = torch.cat([self.start.expand(prompts, -1, -1), ctx[:, :inside] + self.prefix_positions], 1)
            ctx = ctx[:, inside:]
        if len(packed.context_rows):
            own = ctx[:, packed.classes] if ctx.ndim == 4 else ctx[:, None].expand(-1, len(packed.classes), -1, -1)
            rows = rows.index_add(1, packed.context_rows, own.flatten(1, 2))
        layout = Layout(prefix.shape[1], packed.lengths, packed.pooled, self.text.heads, self.text.causal)
        x = run_blocks(self.text.blocks, torch.cat([prefix, rows], 1), layout, backend=self.backend)
        return self.text.project(x, backend=self.backend)


def text_encoder(
    text: TextParts,
    tokens: Tensor,
    *,
    first: int,
    context: int,
    places: Tensor | None = None,
    shared: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TextEncoder:
    """Pack class names for encoding with any context vectors.

    Args:
        text: the tower.
        tokens: each class's whole text, with stand-ins where the context goes, [C, L].
        first: position of the first of a text's own tokens, behind the start token.
        context: n, number of context tokens.
        places: where each text has its context tokens, ascending, [C, n]; None where they come first, before the name.
            :func:`arrange` makes both for CoOp's other positions of the class name.
        shared: whether all classes will have the same context vectors; lets a causal tower share the prefix.
        chunk_tokens: classes are encoded in chunks of about so many tokens, so that memory is bounded.
    """
    pooled = text.pooled_position(tokens)
    if (pooled < first + context).any() and text.causal:
        raise ValueError(
            f"tokens must hold the class name after the {context} context tokens, got a text that ends before"
        )
    leading = torch.arange(first, first + context, device=tokens.device)
    places = leading.expand(len(tokens), -1) if places is None else places
    behind_prefix = shared and text.causal
    inside = int((places == leading).all(0).cumprod(0).sum()) if behind_prefix else 0  # S
    begin = first + inside if behind_prefix else 0
    lengths = (pooled + 1 - begin) if text.causal else torch.full_like(pooled, tokens.shape[1])
    embedding, position = text.token_embedding.weight, text.positional_embedding.to(text.dtype)

    def pack(classes: Tensor) -> PackedTexts:
        rows, context_rows, offset = [], [], 0
        for c in classes.tolist():
            positions = torch.arange(begin, begin + int(lengths[c]), device=tokens.device)
            if not text.causal:  # without a mask the order is free: the pooled token goes last, where it is looked for
                positions = torch.cat([positions[positions != pooled[c]], pooled[c : c + 1]])
            at = (positions == places[c, inside:, None]).int().argmax(1)
            rows.append(embedding[tokens[c, positions]].to(text.dtype).index_fill(0, at, 0.0) + position[positions])
            context_rows.append(at + offset)
            offset += len(positions)
        return PackedTexts(
            rows=torch.cat(rows),
            lengths=tuple(lengths[classes].tolist()),
            pooled=lengths[classes].cumsum(0) - 1,
            classes=classes,
            context_rows=torch.cat(context_rows),
        )

    order = lengths.argsort(stable=True)
    chunk = (lengths[order].cumsum(0) - 1) // max(chunk_tokens, 1)
    return TextEncoder(
        text=text,
        start=embedding[tokens[0, :first]].to(text.dtype) + position[:first],
        context=context,
        prefix_positions=position[first:begin] if behind_prefix else None,
        chunks=tuple(pack(order[chunk == c]) for c in chunk.unique()),
        order=order.argsort(),
    )


def arrange(tokens: Tensor, name_end: Tensor, *, first: int, context: int, position: str) -> tuple[Tensor, Tensor]:
    """Put the class names where CoOp's option CLASS_TOKEN_POSITION wants them (CoOp: trainers/coop.py, forward).

    Args:
        tokens: texts with the name behind the n context tokens, [C, L].
        name_end: position of the first token behind each name, [C].
        first: position of the first context token.
        context: n.
        position: "end", or "middle" (the name behind the first n // 2 context tokens), or "front".

    Returns:
        The texts, [C, L], and the places of their context tokens, [C, n].
    """
    before = {"end": context, "middle": context // 2, "front": 0}[position]
    name, at = (name_end - first - context)[:, None], torch.arange(tokens.shape[1], device=tokens.device)[None]
    in_name = (at >= first + before) & (at < first + before + name)
    source = at + in_name * (context - before)  # what stands in for a context vector does not matter
    vector = torch.arange(context, device=tokens.device)[None]
    return tokens.gather(1, source), first + vector + (vector >= before) * name
