"""Models whose text tower takes no prompts, small and random: CoCa, text models of Hugging Face, and a stranger."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
import transformers
from tiny import TEXT, VISION
from torch import Tensor, nn

TEXT_MODELS = {  # of open_clip's configurations
    "roberta-base": "roberta",
    "xlm-roberta-base": "xlm-roberta",
    "xlm-roberta-large": "xlm-roberta",
    "google/mt5-base": "mt5",
    "google/mt5-xl": "mt5",
    "facebook/nllb-200-distilled-600M": "m2m_100",
    "facebook/nllb-200-distilled-1.3B": "m2m_100",
}
_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = {
    "bert": _BERT,
    "roberta": _BERT | {"max_position_embeddings": 514},
    "xlm-roberta": _BERT | {"max_position_embeddings": 514},
    "mt5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "m2m_100": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    | {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
}
ATTENTIONAL = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}


def write_text_model(folder: Path, kind: str, *, vocab_size: int) -> Path:
    """A folder with the ``config.json`` of a small text model; padding is the token 0."""
    config = transformers.AutoConfig.for_model(kind, **SIZES[kind], vocab_size=vocab_size, pad_token_id=0)
    config.save_pretrained(folder)
    return folder


def text_cfg(folder: Path, kind: str, *, vocab_size: int = TEXT["vocab_size"], **more) -> dict:
    """open_clip's settings of such a text tower."""
    name = str(write_text_model(folder, kind, vocab_size=vocab_size))
    return {"hf_model_name": name, "hf_model_pretrained": False, "hf_proj_type": "linear", **more}


def coca(text: dict | None = None, **settings) -> nn.Module:
    """A CoCa with its class token and its text decoder, or with another text tower."""
    torch.manual_seed(0)
    text = {**TEXT, "embed_cls": True, "output_tokens": True} if text is None else text
    return open_clip.CoCa(8, {**TEXT, "layers": 1}, text, ATTENTIONAL, **settings)


class Stranger(nn.Module):
    """A model of one's own: what is asked of a CLIP and no more. A text is the mean of its words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.visual.image_size = 16
        self.words = nn.EmbeddingBag(TEXT["vocab_size"], 8, padding_idx=0)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.words(text)
