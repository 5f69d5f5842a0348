"""Text features of an edited CLIP: the text tower with the weights, hooks and context vectors of an edit.

Texts are padded to the longest of them. The packed text tower (:mod:`mergetune.clip.packed_texts`) is the fast one for
towers that are not edited.

Shapes: M settings computed together (1 where texts do not depend on the setting), C texts, L tokens, W width of the
text tower, D embedding width, n context tokens.
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
"""An edit -> features of texts [M, C, D], not normalised."""


@dataclass(frozen=True, eq=False)
class EditedTextTower:
    """The text tower under edits of one form. Make one with :func:`edited_text_tower`.

    Attributes:
        text: the tower that is not edited.
        prefix: what open_clip puts before the names of the tower's tensors.
        embed: the token embedding.
        blocks: the blocks.
        norm: the layer norm behind them.
        linear: the projection, where it is a layer.
    """

    text: TextParts
    prefix: str
    embed: Part
    blocks: Blocks
    norm: Part
    linear: Part | None

    def prepare(self, tokens: Tensor, places: Tensor | None = None) -> TextFeatures:
        """A function for the features of fixed texts.

        Args:
            tokens: the texts, [C, L].
            places: where each text has the context vectors of the edit, [C, n]; None where it has none.

        Returns:
            A function of an edit, differentiable any number of times: [M, C, D], at least float32, not normalised.
        """
        text, pooled = self.text, self.text.pooled_position(tokens)
        if text.causal:  # nothing behind the pooled token reaches it
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
        """A tensor that belongs to no module, with a leading 1 or M."""
        edited = edit.weights.get(self.prefix + name)
        return frozen[None] if edited is None else edited.to(frozen.dtype)


def edited_text_tower(clip: FrozenClip, edit: Edit, *, precision: torch.dtype = torch.float32) -> EditedTextTower:
    """The text tower for edits that have the form of ``edit``: same names and hooks, other tensors.

    Args:
        clip: the frozen CLIP.
        edit: an edit of the form.
        precision: of the text tower.

    Raises:
        ValueError: weights or hooks that the CLIP has no place for.
        TypeError: a text tower that is not understood.
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
    """The tokens [m, C, L, W] with the vectors [M, n, W], or [M, C, n, W], at the places [C, n]."""
    vectors = vectors[:, None] if vectors.ndim == 3 else vectors
    settings = max(len(x), len(vectors))
    index = places[None, :, :, None].expand(settings, -1, -1, x.shape[-1])
    return x.expand(settings, -1, -1, -1).scatter(2, index, vectors.expand_as(index))
