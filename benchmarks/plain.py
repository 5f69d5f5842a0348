"""What the text tower is compared with: open_clip's own blocks under autograd, and the tower's matrix products alone.

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

TEMPLATE, N_CTX, FIRST = "a photo of a {}.", 4, 1  # four context tokens behind the start token


@dataclass(frozen=True)
class PlainPrompts:
    """CoOp's way: the whole text of every class through the tower, the context vectors put in its place."""

    tower: open_clip.CLIP
    transformer: nn.Module
    ln_final: nn.Module
    tokens: Tensor  # [C, L]
    dtype: torch.dtype

    @classmethod
    def of(cls, tower: open_clip.CLIP, tokens: Tensor, dtype: torch.dtype, *, truncate: bool = False) -> PlainPrompts:
        """``truncate`` leaves out what stands behind the end of the longest text."""
        length = int(tokens.argmax(-1).max()) + 1 if truncate else tokens.shape[1]
        transformer, ln_final = (deepcopy(part).to(dtype) for part in (tower.transformer, tower.ln_final))
        return cls(tower, transformer, ln_final, tokens[:, :length], dtype)

    def __call__(self, ctx: Tensor, classes: slice = slice(None)) -> Tensor:
        """Context vectors [n, W] -> class features [C, D] float32, not normalised."""
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
        """Forward and backward: d [C, D] -> [n, W]. ``at_once`` classes at a time, for memory's sake."""
        leaf, step = ctx.detach().clone().requires_grad_(), at_once or len(d)
        for begin in range(0, len(d), step):
            some = slice(begin, begin + step)
            self(leaf, some).backward(d[some])
        return leaf.grad


def text_gemms(text: TextParts, rows: int, classes: int) -> Callable[[], None]:
    """The products of the tower's forward and of the backward to its input, and nothing else.

    Four of each a block, R rows; in the last block only the C pooled rows go past the attention. Then the projection.
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
