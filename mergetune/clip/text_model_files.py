"""The configuration of a Hugging Face text model: allowed settings, and the number of parameters of the network."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mergetune.clip.tokenizer_files import SCALAR, brief, read_json, word_set
from mergetune.io import reason

TEXT_CONFIG = "config.json"
BERT = word_set(
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings "
    "type_vocab_size pad_token_id bos_token_id eos_token_id hidden_act hidden_dropout_prob "
    "attention_probs_dropout_prob initializer_range layer_norm_eps"
)
# {model_type: settings that describe the network}. open_clip can pool only these architectures. Other settings are left
# out: some make transformers import code (auto_map) or download kernels (attn_implementation).
TEXT_MODELS = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "mt5": word_set(
        "vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets "
        "relative_attention_max_distance pad_token_id eos_token_id decoder_start_token_id dropout_rate "
        "layer_norm_epsilon initializer_factor feed_forward_proj"
    ),
    "m2m_100": word_set(
        "vocab_size d_model encoder_layers encoder_attention_heads encoder_ffn_dim decoder_layers "
        "decoder_attention_heads decoder_ffn_dim max_position_embeddings pad_token_id bos_token_id eos_token_id "
        "decoder_start_token_id activation_function dropout attention_dropout activation_dropout encoder_layerdrop "
        "decoder_layerdrop init_std scale_embedding"
    ),
}
ACTIVATIONS = word_set("gelu gelu_new gelu_fast gelu_pytorch_tanh quick_gelu relu silu gated-gelu gated-silu")
MOST_LAYERS = 256  # real models have 24; each layer is built on the meta device to count parameters
MOST = 1 << 22  # the largest vocabulary, of NLLB, has 256,206 words


def check_text_model(file: Path) -> dict[str, Any]:
    """Check a text model's ``config.json`` and return the settings that describe its network.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: open_clip does not know the architecture, or a setting is not a plain value or out of bounds.
    """
    content = read_json(file)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_MODELS:
        raise ValueError(f"{file}: model_type must be one of {', '.join(TEXT_MODELS)}, got {brief(kind)}")
    kept = {key: value for key, value in content.items() if key in TEXT_MODELS[kind]}
    for key, value in kept.items():
        if not isinstance(value, SCALAR) or (isinstance(value, str) and value not in ACTIVATIONS):
            raise ValueError(f"{file}: {key} must be a number, a flag or an activation, got {brief(value)}")
        most = MOST_LAYERS if key.endswith("layers") else MOST
        if isinstance(value, int | float) and not 0 <= value <= most:
            raise ValueError(f"{file}: {key} must be from 0 to {most:,}, got {brief(value)}")
    return {"model_type": kind, **kept}


def count_numbers(settings: dict[str, Any], file: Path) -> int:
    """Number of parameters of the network that checked settings describe. No memory is allocated for them.

    Args:
        settings: result of :func:`check_text_model`.
        file: file of the settings, for errors.

    Raises:
        RuntimeError: the package transformers is missing.
        ValueError: the settings do not fit together.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise RuntimeError(f"the text model of {file} needs a package: pip install transformers ({error})") from error
    try:
        with torch.device("meta"):
            network = AutoModel.from_config(AutoConfig.for_model(**settings), trust_remote_code=False)
    except Exception as error:  # transformers raises many types of error on bad settings
        raise ValueError(f"{file} must describe a text model that can be built, got: {reason(error)}") from error
    return sum(tensor.numel() for tensor in chain(network.parameters(), network.buffers()))
