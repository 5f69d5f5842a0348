"""Checks of tokenizer files: they may hold vocabularies and settings of transformers' built-in tokenizers."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergetune import io
from mergetune.clip.tokenizer_json import check_tokenizer_json
from mergetune.io import MAX_SETTINGS, MAX_VOCABULARY, read_regular


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


SIDES, FLAG = ("left", "right"), (True, False)
TOKENIZER_KWARGS = {  # {name: allowed values; None allows any text}
    "clean": ("canonicalize", "lower", "whitespace"),
    "strip_sep_token": FLAG,
    "language": None,
    "use_fast": FLAG,
    "do_lower_case": FLAG,
    "add_prefix_space": FLAG,
    "add_bos_token": FLAG,
    "add_eos_token": FLAG,
    "padding_side": SIDES,
    "truncation_side": SIDES,
    "trust_remote_code": (False,),
}
TOKENIZER_MODES = (None, "", "clips")

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# Tokenizers that consist of a vocabulary and rules. Some others start programs (a phonemizer) or load other models.
FAMILIES = word_set(
    "Albert Bart Barthez Bert BigBird CLIP Camembert Deberta DebertaV2 DistilBert Electra GPT2 Gemma Llama MBart "
    "MBart50 MPNet MT5 Nllb PreTrained Qwen2 RemBert Roberta Siglip Siglip2 T5 XLMRoberta XLNet"
)
# Values of model_type in config.json that select one of these tokenizers if no class is named.
MODEL_TYPES = word_set(
    "albert bart bert big_bird camembert clip clip_text_model deberta deberta-v2 distilbert electra gemma gemma2 "
    "gemma3 gpt2 llama m2m_100 mbart mpnet mt5 nllb qwen2 rembert roberta siglip siglip2 siglip2_text_model "
    "siglip_text_model t5 xlm-roberta xlnet"
)
# Settings without effect on tokens; they name files, classes or programs (a chat template is a program).
UNUSED = word_set(
    "auto_map chat_template fast_tokenizer_files name_or_path _name_or_path _commit_hash processor_class "
    "feature_extractor_type image_processor_type trust_remote_code"
)
# Fields of an added token.
TOKEN = word_set("__type content lstrip rstrip normalized single_word special")
NAMED = (
    "added_tokens_decoder",
    "extra_special_tokens",
    "model_specific_special_tokens",
)  # settings with a dict of tokens
SCALAR = (str, int, float, bool, type(None))


def read_json(file: Path, *, limit: int = MAX_SETTINGS) -> dict[str, Any]:
    """The JSON object in a regular file of at most ``limit`` bytes; raises ValueError for anything else."""
    content = io.read_json(file, limit=limit)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, got {type(content).__name__}")
    return content


def brief(value: Any) -> str:
    """A short repr of a value of any depth and length."""
    return reprlib.repr(value)


def check_tokenizer_setting(key: str, value: Any, where: str) -> None:
    """Raise ValueError, naming the place ``where``, unless a tokenizer may have this setting with this value."""
    if key not in TOKENIZER_KWARGS:
        raise ValueError(f"{where} must be absent: a downloaded backbone may not have this setting")
    allowed = TOKENIZER_KWARGS[key]
    if isinstance(value, str) if allowed is None else any(type(value) is type(one) and value == one for one in allowed):
        return
    must = "a text" if allowed is None else " or ".join(map(json.dumps, allowed))
    code = ": code of a downloaded backbone is never run" if key == "trust_remote_code" else ""
    raise ValueError(f"{where} must be {must}, got {json.dumps(value)}{code}")


def check_plain(value: Any, where: str, *, nested: bool = False) -> None:
    """Raise ValueError unless the value is a number, text, flag or list of these (``nested``: or a dict of these)."""
    inner = value.values() if nested and isinstance(value, dict) else value if isinstance(value, list) else [value]
    if not all(isinstance(one, SCALAR) for one in inner):
        raise ValueError(f"{where} must be a number, a text, a flag or a list of them, got {brief(value)}")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of one folder to another; files with settings are checked first."""
    checks = {
        "tokenizer_config.json": _check_tokenizer_config,
        "special_tokens_map.json": _check_special_tokens,
        "added_tokens.json": _check_added_tokens,
        "config.json": _check_transformers_config,
        "tokenizer.json": check_tokenizer_json,
    }
    for name in TOKENIZER_FILES:
        file = source / name
        try:
            if name in checks:
                settings = read_json(file, limit=MAX_VOCABULARY if name == "tokenizer.json" else MAX_SETTINGS)
                content = json.dumps(checks[name](settings, file)).encode()
            else:
                content = read_regular(file, limit=MAX_VOCABULARY)
        except FileNotFoundError:
            continue
        (folder / name).write_bytes(content)


def _check_tokenizer_config(config: dict[str, Any], file: Path) -> dict[str, Any]:
    _refuse_code(config, file)
    _check_class(config.get("tokenizer_class"), file)
    if config.pop("init_inputs", None):
        raise ValueError(f"{file}: init_inputs must be empty: only named settings of a tokenizer can be checked")
    kept = {key: value for key, value in config.items() if key not in UNUSED and not key.endswith("_file")}
    for key, value in kept.items():
        _check_tokens(value, f"{file}: {key}", named=key in NAMED)
    return kept


def _check_special_tokens(tokens: dict[str, Any], file: Path) -> dict[str, Any]:
    for key, value in tokens.items():
        if not re.fullmatch(r"\w+_tokens?", key):  # transformers would pass any key as an argument, also paths
            raise ValueError(f"{file}: {key} must be the name of a token, such as unk_token")
        _check_tokens(value, f"{file}: {key}", named=key in NAMED)
    return tokens


def _check_added_tokens(tokens: dict[str, Any], file: Path) -> dict[str, Any]:
    for key, value in tokens.items():
        if type(value) is not int:
            raise ValueError(f"{file}: {key} must have a number, got {brief(value)}")
    return tokens


def _check_transformers_config(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Check a model's configuration and return the settings that select the tokenizer class."""
    _refuse_code(config, file)
    _check_class(config.get("tokenizer_class"), file)
    kept = {"tokenizer_class": config["tokenizer_class"]} if config.get("tokenizer_class") else {}
    kind = config.get("model_type")
    return kept | ({"model_type": kind} if isinstance(kind, str) and kind in MODEL_TYPES else {})


def _refuse_code(config: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for a tokenizer that is Python code. Code of other parts is ignored: nothing here calls it."""
    code = config.get("auto_map")
    if code and (not isinstance(code, dict) or "AutoTokenizer" in code):
        raise ValueError(
            f"{file}: auto_map must not name a tokenizer's code, got {brief(code)}: code of a downloaded backbone is "
            "never run"
        )


def _check_class(name: Any, file: Path) -> None:
    known = isinstance(name, str) and name.removesuffix("Fast").removesuffix("Tokenizer") in FAMILIES
    if name is not None and name != "TokenizersBackend" and not known:
        families = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{file}: tokenizer_class must be a tokenizer of {families}, got {brief(name)}")


def _check_tokens(value: Any, where: str, *, named: bool = False) -> None:
    """Raise ValueError unless the value is plain, a token or a list of these, or with ``named`` a dict of these."""
    if named and isinstance(value, dict) and not value.keys() <= TOKEN:
        value = list(value.values())
    for one in value if isinstance(value, list) else [value]:
        token = (
            isinstance(one, dict) and one.keys() <= TOKEN and all(isinstance(field, SCALAR) for field in one.values())
        )
        if not isinstance(one, SCALAR) and not token:
            raise ValueError(f"{where} must be a plain value, a token or a list of them, got {brief(one)}")
