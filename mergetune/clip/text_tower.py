"""The text tower of an open_clip model, taken apart; towers that are not understood are refused by name."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
from open_clip.transformer import LayerNormFp32, ResidualAttentionBlock, Transformer
from torch import Tensor, nn

from mergetune.clip.packed_blocks import ACTIVATIONS, layer_norm, mlp_of

ClipModel = open_clip.CLIP | open_clip.CustomTextCLIP


@dataclass(frozen=True)
class TextParts:
    """The parts of a text tower, wherever open_clip keeps them. W is the tower's width, D the embedding's.

    Attributes:
        token_embedding: the vocabulary, [V, W].
        positional_embedding: [L, W].
        blocks: the residual attention blocks, in order.
        ln_final: the layer norm after the last block.
        projection: W -> D as a matrix [W, D], a linear layer, or None.
        pool: which row becomes the feature: "argmax" (highest token id), "eos" or "last".
        eos_id: the token that "eos" looks for.
        causal: whether a token sees only what stands before it.
        heads: attention heads.
        context_length: L, tokens in a text.
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
        """The precision that the blocks work in."""
        return mlp_of(self.blocks[0]).c_fc.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the tower lives."""
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
        """The row of each text that becomes its feature. tokens [C, L] -> [C]."""
        if self.pool == "last":
            return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        found = tokens.argmax(-1) if self.pool == "argmax" else (tokens == self.eos_id).int().argmax(-1)
        return found

    def project(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """Class features of the pooled rows, not normalised.

        Args:
            x: [..., W].
            backend: "torch" as in :func:`mergetune.clip.packed_blocks.run_blocks`.

        Returns:
            [..., D], float64 from float64 and else float32.
        """
        norm = self.ln_final
        x = layer_norm(norm, x) if backend == "torch" and isinstance(norm, nn.LayerNorm) else norm(x)
        if isinstance(self.projection, nn.Linear):
            x = self.projection(x)
        elif self.projection is not None:
            x = x @ self.projection
        return x if x.dtype == torch.float64 else x.float()


def _norm_as(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the last layer norm for a tower in another precision; LayerNormFp32 works in float32 alone."""
    if not isinstance(norm, LayerNormFp32):
        return deepcopy(norm).to(dtype)
    if dtype != torch.float64:
        return deepcopy(norm).to(torch.float32)
    affine, bias = norm.elementwise_affine, norm.bias is not None
    plain = nn.LayerNorm(list(norm.normalized_shape), norm.eps, affine, bias).to(norm.weight.device, dtype)
    plain.load_state_dict(norm.state_dict())
    return plain.requires_grad_(False)


def pooled(features: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Towers with ``output_tokens`` give (pooled, tokens)."""
    return features[0] if isinstance(features, tuple) else features


def understood(model: nn.Module) -> ClipModel:
    """The model, refused by name if it is another one, or one with a text decoder."""
    if not isinstance(model, ClipModel) or hasattr(model, "text_decoder"):
        raise refused_model(type(model).__name__)
    return model


def refused_model(kind: str) -> TypeError:
    return TypeError(
        f"model must be open_clip's CLIP or CustomTextCLIP, got {kind}: its text tower is not one that mergetune "
        "understands"
    )


def refused_tower(kind: str) -> TypeError:
    hint = ": Hugging Face's text models (RoBERTa, mT5, NLLB) are not supported" if kind == "HFTextEncoder" else ""
    return TypeError(f"text tower must be open_clip's TextTransformer, got {kind}{hint}")


def text_parts(model: ClipModel) -> TextParts:
    """The parts of the model's text tower; a tower that is not understood is refused by its name."""
    tower: Any = model.text if isinstance(model, open_clip.CustomTextCLIP) else model
    kind = type(tower).__name__
    blocks: Any = getattr(getattr(tower, "transformer", None), "resblocks", ())
    pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    if not isinstance(getattr(tower, "transformer", None), Transformer) or not len(blocks):
        raise refused_tower(kind)
    for block in blocks:
        if type(block) is not ResidualAttentionBlock:
            raise TypeError(f"text tower {kind} must be made of ResidualAttentionBlock, got {type(block).__name__}")
        if type(block.mlp.gelu) not in ACTIVATIONS:
            got = type(block.mlp.gelu).__name__
            raise TypeError(f"text tower {kind} must have the activation GELU or QuickGELU, got {got}")
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        raise TypeError(f"text tower {kind} must have neither a class token (CoCa) nor a padding mask, got one")
    if pool not in ("argmax", "eos", "last"):
        raise TypeError(f"text tower {kind} must pool by argmax, eos or last, got {pool!r}")
    mask = tower.attn_mask
    if mask is not None and not torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)):
        raise TypeError(f"text tower {kind} must have the causal attention mask or none, got another")
    return TextParts(
        token_embedding=tower.token_embedding,
        positional_embedding=tower.positional_embedding,
        blocks=tuple(blocks),
        ln_final=tower.ln_final,
        projection=tower.text_projection,
        pool=pool,
        eos_id=getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)),
        causal=mask is not None,
        heads=blocks[0].attn.num_heads,
        context_length=tower.context_length,
    )
