"""Class features from context vectors: a text tower that runs on packed tokens after a shared prefix.

In a causal tower, tokens after the pooled token cannot influence the text feature, and the prefix
``[SOS, ctx_1 .. ctx_n]`` is the same for all classes. The keys and values of the prefix are computed once; the tokens
of the class names (and context vectors after the name) are packed after the prefix without padding. Class-specific
context vectors and towers without a causal mask use the same code with whole texts and no prefix.

Shapes: M prompts encoded together, C classes, L context length, W tower width, D embedding width, T packed tokens,
n context vectors, S of them in the shared prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mergetune.clip.packed_blocks import Layout, run_blocks
from mergetune.clip.text_tower import TextParts
from mergetune.facts.brief import brief

CHUNK_TOKENS = 8192
"""Most tokens whose activations are kept: about 2 GB in float32 for a tower of 12 blocks and width 512."""


@dataclass(frozen=True, eq=False)
class PackedTexts:
    """The texts of some classes as one sequence of T tokens without padding.

    Attributes:
        rows: token embedding plus position embedding of each token, [T, W]; at a context vector's place, the position
            embedding alone.
        lengths: number of packed tokens per class, ascending.
        pooled: row in T that becomes the feature of each class, [C].
        classes: index of each class, [C].
        context_rows: rows in T that receive the context vectors outside the prefix, class by class, [C * (n - S)].
    """

    rows: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor
    classes: Tensor
    context_rows: Tensor


@brief()
@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Function of context vectors that returns class features for fixed names. Make one with :func:`text_encoder`.

    By default, a hand-written backward makes the features differentiable once, with respect to the context vectors
    only. ``dataclasses.replace(encoder, backend="torch")`` uses plain autograd instead: differentiable any number of
    times, also with respect to the tower's weights (do not change these before the backward pass). Plain autograd needs
    more memory, and second derivatives keep the activations of all chunks.
    """

    text: TextParts
    start: Tensor  # [first_token, W]: embedding plus position of the start token, if any
    context: int  # n
    prefix_positions: Tensor | None  # [S, W], position embeddings of the prefix's context vectors; None: no prefix
    chunks: tuple[PackedTexts, ...]
    order: Tensor  # [C], index of each class in the concatenated chunks
    backend: str | None = None  # None: hand-written backward; "torch": plain autograd

    @property
    def at_once(self) -> int:
        """Most prompts per call whose activations are kept; for more prompts, the backward computes them again."""
        return CHUNK_TOKENS // sum(len(chunk.rows) for chunk in self.chunks)

    def __call__(self, ctx: Tensor) -> Tensor:
        """Encode M prompts.

        Args:
            ctx: context vectors, [M, n, W] if all classes share them, [M, C, n, W] if they are class-specific.

        Returns:
            Class features [M, C, D], not normalised, differentiable in ``ctx``; float64 in a float64 tower, else
            float32.

        Raises:
            ValueError: ``ctx`` has another shape.
        """
        shared, vectors = self.prefix_positions is not None, (self.context, self.text.width)
        if ctx.ndim not in ((3,) if shared else (3, 4)) or tuple(ctx.shape[-2:]) != vectors:
            form = "[M, n, W]" if shared else "[M, n, W] or [M, C, n, W]"
            raise ValueError(f"ctx must have shape {form} with n, W = {vectors}, got {list(ctx.shape)}")
        ctx = ctx.to(self.text.dtype)
        encode = self._encode
        wanted = ctx.requires_grad or self.backend == "torch"  # "torch" also gives gradients of weights
        if len(ctx) > self.at_once and torch.is_grad_enabled() and wanted:
            encode = partial(
                checkpoint, self._encode, use_reentrant=False, preserve_rng_state=False
            )  # keeps the activations of one piece only
        chunks = []
        with torch.autocast(ctx.device.type, enabled=False):  # autocast would change the precision of the tower
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
    """Pack the texts of some classes, for encoding with any context vectors.

    Args:
        text: the parts of the text tower.
        tokens: token ids of each class's whole text, with placeholders for the context vectors, [C, L].
        first: position of the first token after the start token.
        context: n, number of context vectors.
        places: positions of the context vectors in each text, ascending, [C, n]; None for the first n positions, before
            the class name. :func:`arrange` returns tokens and places for CoOp's other class-name positions.
        shared: whether all classes have the same context vectors; a causal tower then shares their prefix.
        chunk_tokens: approximate number of tokens that are encoded at once, which bounds the memory.

    Raises:
        ValueError: a text has no class name after its context vectors.
    """
    pooled = text.pooled_position(tokens)
    if (pooled < first + context).any() and text.causal:
        raise ValueError(
            f"tokens must hold the class name after the {context} context tokens, got a text that ends earlier"
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
            if (
                not text.causal
            ):  # without a mask the order is free: the pooled token goes last, where run_blocks expects it
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
    """Move class names to another position, as CoOp's CLASS_TOKEN_POSITION does (CoOp: trainers/coop.py, forward).

    Args:
        tokens: token ids of texts with the class name after the n context tokens, [C, L].
        name_end: position of the first token after each name, [C].
        first: position of the first context token.
        context: n, number of context tokens.
        position: where the name goes: "end" (after all context tokens), "middle" (after the first n // 2) or "front".

    Returns:
        Token ids of the rearranged texts, [C, L], and the positions of their context tokens, [C, n].
    """
    before = {"end": context, "middle": context // 2, "front": 0}[position]
    name, at = (name_end - first - context)[:, None], torch.arange(tokens.shape[1], device=tokens.device)[None]
    in_name = (at >= first + before) & (at < first + before + name)
    source = at + in_name * (context - before)  # the token at a context place does not matter
    vector = torch.arange(context, device=tokens.device)[None]
    return tokens.gather(1, source), first + vector + (vector >= before) * name
