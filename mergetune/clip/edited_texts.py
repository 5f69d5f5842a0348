"""Text features of an edited CLIP: the text tower runs with the weights, hooks and context vectors of an edit.

This tower pads all texts to the longest one. For a text tower that an edit leaves unchanged, the faster packed tower
(:mod:`mergetune.clip.packed_texts`) is used instead.

Shapes: M settings computed together (1 if texts do not depend on the setting), C texts, L tokens, W width of the text
tower, D embedding width, n context tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergetune.clip.backbone import FrozenClip
from mergetune.clip.edited_towers import Blocks, Part, at_least_float32, blocks_of, check_edit, part_of, privately
from mergetune.clip.edits import Edit
from mergetune.clip.text_tower import TextParts, checked_model, text_tower

TextFeatures = Callable[[Edit], Tensor]
"""Function of an edit that returns the features of fixed texts, [M, C, D], not normalised."""


@dataclass(frozen=True, eq=False)
class EditedTextTower:
    """A text tower that runs with the tensors of any edit of one form. Make one with :func:`edited_text_tower`.

    Attributes:
        text: the unedited tower.
        prefix: prefix of open_clip's names of the tower's parameters: "" or "text.".
        embed: the token embedding.
        blocks: the transformer blocks.
        norm: the layer norm after the blocks.
        linear: the projection if it is a linear layer, else None.
    """

    text: TextParts
    prefix: str
    embed: Part
    blocks: Blocks
    norm: Part
    linear: Part | None

    def prepare(self, tokens: Tensor, places: Tensor | None = None) -> TextFeatures:
        """Make a function that encodes fixed texts under any edit of the form.

        Args:
            tokens: token ids of the texts, [C, L].
            places: positions of the context vectors in each text, [C, n]; None for texts without context vectors.

        Returns:
            A function of an edit that returns features [M, C, D], float32 or float64, not normalised. The function is
            differentiable any number of times.
        """
        text, pooled = self.text, self.text.pooled_position(tokens)
        if text.causal:  # tokens after the pooled token cannot influence it
            tokens = tokens[:, : int(pooled.max()) + 1]
        rows, length = torch.arange(len(tokens), device=tokens.device), tokens.shape[1]
        mask = None
        if text.causal:
            mask = torch.full((length, length), float("-inf"), dtype=text.dtype, device=tokens.device).triu(1)

        def features(edit: Edit) -> Tensor:
            x = self.embed(edit, tokens[None]).to(text.dtype)
            if places is not None and edit.context is not None:
                x = _put(x, edit.context.vectors.to(text.dtype), places)
            positions = self._matrix(edit, "positional_embedding", text.positional_embedding).to(text.dtype)
            x = self.blocks(edit, x + positions[:, None, :length], attn_mask=mask)
            x = self.norm(edit, x[:, rows, pooled])
            if self.linear is not None:
                x = self.linear(edit, x)
            elif isinstance(text.projection, Tensor):
                x = x @ self._matrix(edit, "text_projection", text.projection)
            return at_least_float32(x)

        return features

    def _matrix(self, edit: Edit, name: str, frozen: Tensor) -> Tensor:
        """A parameter that belongs to the tower directly, edited [M, ...] or frozen [1, ...]."""
        edited = edit.weights.get(self.prefix + name)
        return frozen[None] if edited is None else edited.to(frozen.dtype)


def edited_text_tower(clip: FrozenClip, edit: Edit, *, precision: torch.dtype = torch.float32) -> EditedTextTower:
    """Prepare the text tower for edits of the form of ``edit``: the same names and hooks with any tensors.

    Args:
        clip: the frozen CLIP.
        edit: one edit of the form.
        precision: precision of the text tower.

    Raises:
        ValueError: the CLIP has no parameter or block of a name in the edit, or a shape differs.
        TypeError: the text tower of the model cannot be taken apart, see :attr:`FrozenClip.takes_prompts`.
    """
    check_edit(clip, edit)
    text, prefix = clip.text_as(precision), "" if text_tower(checked_model(clip.model)) is clip.model else "text."

    def part(module: nn.Module, name: str) -> Part:
        full = f"{prefix}{name}."
        taken = {each: each.removeprefix(full) for each in edit.weights if each.startswith(full)}
        return part_of(privately(module), taken)

    return EditedTextTower(
        text=text,
        prefix=prefix,
        embed=part(text.token_embedding, "token_embedding"),
        blocks=blocks_of("text", [privately(block) for block in text.blocks], edit, f"{prefix}transformer.resblocks."),
        norm=part(text.ln_final, "ln_final"),
        linear=part(text.projection, "text_projection") if isinstance(text.projection, nn.Linear) else None,
    )


def _put(x: Tensor, vectors: Tensor, places: Tensor) -> Tensor:
    """Tokens [m, C, L, W] in which the vectors, [M, n, W] or [M, C, n, W], replace those at the positions [C, n]."""
    vectors = vectors[:, None] if vectors.ndim == 3 else vectors
    settings = max(len(x), len(vectors))
    index = places[None, :, :, None].expand(settings, -1, -1, x.shape[-1])
    return x.expand(settings, -1, -1, -1).scatter(2, index, vectors.expand_as(index))
