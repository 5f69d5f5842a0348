"""The text tower of a model as separate parts, which prompts and edits need.

A tower that cannot be taken apart is opaque: mergetune only calls its ``encode_text``.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import open_clip
import torch
from open_clip.transformer import LayerNormFp32, ResidualAttentionBlock, Transformer
from torch import Tensor, nn

from mergetune.clip.packed_blocks import ACTIVATIONS, layer_norm, mlp_of
from mergetune.facts.brief import brief

MEMBERS = ("encode_image", "encode_text", "logit_scale", "visual")
OPAQUE = (
    "this CLIP takes no prompts. Its zero-shot templates and heads work: train a head with method='head' (on the "
    "command line --method head)"
)


class ClipModel(Protocol):
    """The interface that a model must have; open_clip's CLIP, CustomTextCLIP and CoCa have it."""

    visual: nn.Module
    logit_scale: nn.Parameter

    def encode_image(self, image: Tensor) -> Tensor | tuple[Tensor, ...]: ...

    def encode_text(self, text: Tensor) -> Tensor | tuple[Tensor, ...]: ...


@brief()
@dataclass(frozen=True)
class TextParts:
    """The parts of a text tower. W is the width of the tower, D the embedding width, V the vocabulary size.

    Attributes:
        token_embedding: the embedding of token ids, [V, W].
        positional_embedding: the embedding of positions, [L, W].
        blocks: the residual attention blocks, in order.
        ln_final: the layer norm after the last block.
        projection: the map from W to D: a matrix [W, D], a linear layer, or None if there is none.
        pool: token whose row becomes the text feature: "argmax" (highest token id), "eos" or "last".
        eos_id: the token id that "eos" looks for; None otherwise.
        causal: whether a token attends only to itself and earlier tokens.
        heads: number of attention heads.
        context_length: L, number of tokens per text.
    """

    token_embedding: nn.Embedding
    positional_embedding: Tensor
    blocks: tuple[ResidualAttentionBlock, ...]
    ln_final: nn.Module
    projection: Tensor | nn.Linear | None
    pool: str
    eos_id: int | None
    causal: bool
    heads: int
    context_length: int

    @property
    def width(self) -> int:
        """W, the width of the tower."""
        return self.token_embedding.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        """Precision (dtype) of the blocks."""
        return mlp_of(self.blocks[0]).c_fc.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tower."""
        return self.positional_embedding.device

    def astype(self, dtype: torch.dtype) -> TextParts:
        """A copy in another precision."""
        return replace(
            self,
            token_embedding=deepcopy(self.token_embedding).to(dtype),
            positional_embedding=self.positional_embedding.to(dtype),
            blocks=tuple(deepcopy(block).to(dtype) for block in self.blocks),
            ln_final=_norm_as(self.ln_final, dtype),
            projection=None if self.projection is None else deepcopy(self.projection).to(dtype),
        )

    def pooled_position(self, tokens: Tensor) -> Tensor:
        """Position of the token whose row becomes the text feature: tokens [C, L] -> [C]."""
        if self.pool == "last":
            return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        found = tokens.argmax(-1) if self.pool == "argmax" else (tokens == self.eos_id).int().argmax(-1)
        return found

    def project(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """Apply the last layer norm and the projection to pooled rows.

        Args:
            x: pooled rows, [..., W].
            backend: as in :func:`mergetune.clip.packed_blocks.run_blocks`.

        Returns:
            Text features, [..., D], not normalised; float64 if x is float64, else float32.
        """
        norm = self.ln_final
        x = layer_norm(norm, x) if backend == "torch" and isinstance(norm, nn.LayerNorm) else norm(x)
        if isinstance(self.projection, nn.Linear):
            x = self.projection(x)
        elif self.projection is not None:
            x = x @ self.projection
        return x if x.dtype == torch.float64 else x.float()


def _norm_as(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the last layer norm for a tower of precision ``dtype``. LayerNormFp32 supports only float32."""
    if not isinstance(norm, LayerNormFp32):
        return deepcopy(norm).to(dtype)
    if dtype != torch.float64:
        return deepcopy(norm).to(torch.float32)
    affine, bias = norm.elementwise_affine, norm.bias is not None
    plain = nn.LayerNorm(list(norm.normalized_shape), norm.eps, affine, bias).to(norm.weight.device, dtype)
    plain.load_state_dict(norm.state_dict())
    return plain.requires_grad_(False)


def pooled(features: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The pooled features of a tower's output, which is a pair (pooled, tokens) in towers with ``output_tokens``."""
    return features[0] if isinstance(features, tuple) else features


def checked_model(model: nn.Module) -> ClipModel:
    """The model, typed as a CLIP; raises TypeError, naming the missing member, if the model is no CLIP."""
    if missing := [name for name in MEMBERS if not hasattr(model, name)]:
        raise TypeError(
            f"model must have {', '.join(MEMBERS)}, as open_clip's models have, got {type(model).__name__} without "
            f"{missing[0]}"
        )
    return cast(ClipModel, model)


def text_tower(model: ClipModel) -> Any:
    """The module that holds the text tower: ``model.text``, or the model itself if it has no such module."""
    tower = getattr(model, "text", None)
    return tower if isinstance(tower, nn.Module) else model


def obstacle(model: ClipModel) -> str | None:
    """The reason why the text tower cannot be taken apart, as a sentence with rule and value; None if it can be."""
    tower = text_tower(model)
    kind = type(tower).__name__
    blocks: Any = getattr(getattr(tower, "transformer", None), "resblocks", ())
    if not isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa):  # others may change it
        return (
            f"text tower must be that of open_clip's CLIP, CustomTextCLIP or CoCa, got {kind} of {type(model).__name__}"
        )
    if not isinstance(getattr(tower, "transformer", None), Transformer) or not len(blocks):
        return f"text tower must be open_clip's TextTransformer, got {kind}"
    for block in blocks:
        if type(block) is not ResidualAttentionBlock:
            return f"text tower {kind} must be made of ResidualAttentionBlock, got {type(block).__name__}"
        if type(block.mlp.gelu) not in ACTIVATIONS:
            return f"text tower {kind} must have the activation GELU or QuickGELU, got {type(block.mlp.gelu).__name__}"
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        return f"text tower {kind} must have neither a class token (CoCa) nor a padding mask, got one"
    if _pool(tower) not in ("argmax", "eos", "last"):
        return f"text tower {kind} must pool by argmax, eos or last, got {_pool(tower)!r}"
    mask = tower.attn_mask
    if mask is not None and not torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)):
        return f"text tower {kind} must have the causal attention mask or none, got another"
    return None


def text_parts(model: ClipModel) -> TextParts:
    """The parts of the model's text tower.

    Raises:
        TypeError: the tower is opaque; the message names the tower and the reason.
    """
    if reason := obstacle(model):
        raise TypeError(f"{reason}: {OPAQUE}")
    tower = text_tower(model)
    blocks, mask = tower.transformer.resblocks, tower.attn_mask
    return TextParts(
        token_embedding=tower.token_embedding,
        positional_embedding=tower.positional_embedding,
        blocks=tuple(blocks),
        ln_final=tower.ln_final,
        projection=tower.text_projection,
        pool=_pool(tower),
        eos_id=getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)),
        causal=mask is not None,
        heads=blocks[0].attn.num_heads,
        context_length=tower.context_length,
    )


def _pool(tower: Any) -> Any:
    return getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)


# -- properties of any tower, opaque or not ----------------------------------------------------------------------------


def output_dim(model: ClipModel) -> int | None:
    """D, width of text features, read from the tower's attributes; None if they do not show D."""
    tower = text_tower(model)
    if hasattr(tower, "text_projection"):  # TextTransformer: without a projection, output_dim is not D
        projection = tower.text_projection
        if projection is None:
            return tower.token_embedding.embedding_dim
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
    width = getattr(tower, "output_dim", None)
    return width if isinstance(width, int) else None


def working_dtype(model: ClipModel) -> torch.dtype:
    """Precision of the text tower's matrices. (In open_clip's mixed precision the embeddings stay float32.)"""
    tower = text_tower(model)
    linear = next((module.weight for module in tower.modules() if isinstance(module, nn.Linear)), None)
    return (next(tower.parameters()) if linear is None else linear).dtype


def context_length(model: ClipModel, tokenizer: Callable[..., Tensor]) -> int:
    """L, number of tokens per text: the smallest ``context_length`` of tokenizer, text tower and model.

    A Hugging Face text model may allow longer texts than the CLIP was trained on.

    Raises:
        TypeError: none of them has a ``context_length``.
    """
    told = [getattr(one, "context_length", None) for one in (tokenizer, text_tower(model), model)]
    lengths = [length for length in told if isinstance(length, int) and length > 0]
    if not lengths:
        kind = type(text_tower(model)).__name__
        raise TypeError(f"tokenizer must have context_length because the text tower {kind} has none, got none")
    return min(lengths)
