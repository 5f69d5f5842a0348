"""Baselines of the text tower: open_clip's blocks under autograd, and the matrix products of the tower alone.

Shapes: C classes, L tokens of a text, n context tokens, W tower width, D embedding width, R packed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor, nn

from mergetune.clip import TextParts

TEMPLATE, N_CTX, FIRST = "a photo of a {}.", 4, 1  # four context tokens after the start token


@dataclass(frozen=True)
class PlainPrompts:
    """Class features as CoOp computes them: the tower encodes each class's whole text with the context vectors."""

    tower: open_clip.CLIP
    transformer: nn.Module
    ln_final: nn.Module
    tokens: Tensor  # [C, L]
    dtype: torch.dtype

    @classmethod
    def of(cls, tower: open_clip.CLIP, tokens: Tensor, dtype: torch.dtype, *, truncate: bool = False) -> PlainPrompts:
        """Copies the blocks of a tower in a dtype; ``truncate`` cuts the tokens [C, L] after the longest text."""
        length = int(tokens.argmax(-1).max()) + 1 if truncate else tokens.shape[1]
        transformer, ln_final = (deepcopy(part).to(dtype) for part in (tower.transformer, tower.ln_final))
        return cls(tower, transformer, ln_final, tokens[:, :length], dtype)

    def __call__(self, ctx: Tensor, classes: slice = slice(None)) -> Tensor:
        """Class features [C, D] in float32, not normalised, from context vectors [n, W]."""
        tokens = self.tokens[classes]
        count, length = tokens.shape
        words = self.tower.token_embedding(tokens).to(self.dtype)
        own = ctx.to(self.dtype).expand(count, -1, -1)
        x = torch.cat([words[:, :FIRST], own, words[:, FIRST + N_CTX :]], 1)
        x = x + self.tower.positional_embedding[:length].to(self.dtype)
        x = self.ln_final(self.transformer(x, attn_mask=self.tower.attn_mask[:length, :length]))
        x = x[torch.arange(count, device=x.device), tokens.argmax(-1)]
        return (x @ self.tower.text_projection.to(self.dtype)).float()

    def gradient(self, ctx: Tensor, d: Tensor, *, at_once: int | None = None) -> Tensor:
        """Gradient [n, W] with respect to ctx, from d [C, D]; ``at_once`` classes per step to save memory."""
        leaf, step = ctx.detach().clone().requires_grad_(), at_once or len(d)
        for begin in range(0, len(d), step):
            some = slice(begin, begin + step)
            self(leaf, some).backward(d[some])
        return leaf.grad


def text_gemms(text: TextParts, rows: int, classes: int) -> Callable[[], None]:
    """A function that runs only the matrix products of the tower's forward pass and of the backward pass to its input.

    Each block has four products forward and four backward, on R rows. In the last block, only the C pooled rows go on
    after the attention. The projection follows.
    """
    pairs: list[tuple[int, Tensor]] = []  # rows, weight [out, in]
    for block in text.blocks:
        pooled = classes if block is text.blocks[-1] else rows
        pairs.append((rows, block.attn.in_proj_weight))
        pairs += [(pooled, layer.weight) for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)]
    pairs.append((classes, text.projection.T))

    def one_of(width: int) -> Tensor:
        return torch.randn(rows, width, device=text.device).to(text.dtype)

    widths = {width for _, weight in pairs for width in weight.shape}
    given, made = ({width: one_of(width) for width in widths} for _ in range(2))

    @torch.no_grad()
    def run() -> None:
        for count, weight in pairs:
            torch.mm(given[weight.shape[1]][:count], weight.T, out=made[weight.shape[0]][:count])
        for count, weight in reversed(pairs):
            torch.mm(given[weight.shape[0]][:count], weight, out=made[weight.shape[1]][:count])

    return run
