"""Checks of a tokenizer.json: it may hold a vocabulary and the processing steps of published tokenizers.

The tokenizers library runs any steps: a chain of replacements can make a text grow until the process is aborted, and a
regular expression can run for ever or fail with an unexpected error.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# One dict per part: {type: settings}. A part has each type at most once, except the types in SEVERAL.
NORMALIZERS = {
    "BertNormalizer": "clean_text handle_chinese_chars strip_accents lowercase",
    "ByteLevel": "",
    "Lowercase": "",
    "NFC": "",
    "NFD": "",
    "NFKC": "",
    "NFKD": "",
    "Nmt": "",
    "Precompiled": "precompiled_charsmap",
    "Prepend": "prepend",
    "Replace": "pattern content",
    "Strip": "strip_left strip_right",
    "StripAccents": "",
}
PRE_TOKENIZERS = {
    "BertPreTokenizer": "",
    "ByteLevel": "add_prefix_space trim_offsets use_regex",
    "Digits": "individual_digits",
    "Metaspace": "replacement add_prefix_space prepend_scheme split str_rep",
    "Punctuation": "behavior",
    "Split": "pattern behavior invert",
    "Whitespace": "",
    "WhitespaceSplit": "",
}
POST_PROCESSORS = {
    "BertProcessing": "sep cls",
    "ByteLevel": "add_prefix_space trim_offsets use_regex",
    "RobertaProcessing": "sep cls trim_offsets add_prefix_space",
    "TemplateProcessing": "single pair special_tokens",
}
DECODERS = {
    "BPEDecoder": "suffix",
    "ByteFallback": "",
    "ByteLevel": "add_prefix_space trim_offsets use_regex",
    "Fuse": "",
    "Metaspace": "replacement add_prefix_space prepend_scheme split str_rep",
    "Replace": "pattern content",
    "Strip": "content start stop",
    "WordPiece": "prefix cleanup",
}
MODELS = {
    "BPE": "dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges vocab "
    "merges",
    "Unigram": "unk_id vocab byte_fallback",
    "WordLevel": "vocab unk_token",
    "WordPiece": "unk_token continuing_subword_prefix max_input_chars_per_word vocab",
}
PARTS = {  # {part: (types, key of the steps in a Sequence)}
    "normalizer": (NORMALIZERS, "normalizers"),
    "pre_tokenizer": (PRE_TOKENIZERS, "pretokenizers"),
    "post_processor": (POST_PROCESSORS, "processors"),
    "decoder": (DECODERS, "decoders"),
}
SEVERAL = ("Replace", "Split")
# Regular expressions of published tokenizers; each is fast on every text.
_ENDINGS = r"'s|'t|'re|'ve|'m|'ll|'d"
_WORDS = rf"{_ENDINGS}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
_START, _REST = (
    rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PATTERNS = {  # {pattern: fewest bytes of a match}
    r"\s+": 1,
    r" {2,}": 2,
    r"\s{2,}|[\n\r\t]": 1,
    _WORDS: 1,
    rf"<\|startoftext\|>|<\|endoftext\|>|{_WORDS}": 1,
    rf"{_ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+": 1,
    rf"{_START}|\p{{N}}|{_REST}": 1,
    rf"{_START}|\p{{N}}{{1,3}}|{_REST}": 1,
}
MAX_STEPS = 32  # steps per part; published tokenizers have up to 6
MAX_TEXT = 64  # bytes of a setting or of a character's replacement; published: up to 33
MAX_GROWTH = 16  # factor by which all replacements may lengthen a text; published: 3
MAX_LENGTH = 1 << 16  # tokens to which texts are cut or padded; published: 64


def check_tokenizer_json(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """The content, checked; raises ValueError, naming the key, for steps that no published tokenizer has."""
    for part, (types, inner) in PARTS.items():
        steps = list(_steps(content.get(part), part, inner, file))
        if len(steps) > MAX_STEPS:
            raise ValueError(f"{file}: {part} must have at most {MAX_STEPS} steps, got {len(steps)}")
        growth = 1.0
        for where, step in steps:
            growth *= _check_step(step, types, where)
        if growth > MAX_GROWTH:
            raise ValueError(f"{file}: {part} must make a text at most {MAX_GROWTH} times longer, got {growth:,.0f}")
        for name, count in Counter(step["type"] for _, step in steps).items():
            if count > 1 and name not in SEVERAL:
                raise ValueError(f"{file}: {part} must have {name} at most once, got {count} times")
    model = content.get("model") or {}
    where = f"{file}: model"
    _check_step(model, MODELS, where, free=("vocab", "merges"))
    if model.get("dropout"):
        raise ValueError(
            f"{where}.dropout must be absent, so that a text always has the same tokens, got {_short(model['dropout'])}"
        )
    _check_lengths(content, file)
    return content


def _steps(value: Any, where: str, inner: str, file: Path, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or value.get("type") != "Sequence":
        if value is not None:
            yield f"{file}: {where}", value
        return
    steps = value.get(inner)
    if not isinstance(steps, list) or depth > 4 or len(steps) > MAX_STEPS:
        raise ValueError(f"{file}: {where}.{inner} must be a list of at most {MAX_STEPS} steps, nested at most 4 deep")
    for number, step in enumerate(steps):
        yield from _steps(step, f"{where}.{inner}[{number}]", inner, file, depth + 1)


def _check_step(step: Any, types: Mapping[str, str], where: str, *, free: tuple[str, ...] = ()) -> float:
    """Check one step; return the factor by which it may lengthen a text."""
    name = step.get("type") if isinstance(step, dict) else None
    if not isinstance(name, str) or name not in types:
        raise ValueError(f"{where} must be one of {', '.join(types)}, got {_short(name)}")
    allowed = types[name].split()
    for key, value in step.items():
        place = f"{where}.{key}"
        if key != "type" and key not in allowed:
            raise ValueError(f"{place} must be absent: {name} has no such setting in published tokenizers")
        if key == "pattern":
            _pattern_bytes(value, place)
        elif key == "precompiled_charsmap":
            _check_charsmap(value, place)
        elif key in ("single", "pair", "special_tokens"):
            _check_template(value, place)
        elif key not in free and len(str(value).encode(errors="replace")) > MAX_TEXT:
            raise ValueError(f"{place} must have at most {MAX_TEXT} bytes, got {_short(value)}")
    if name == "Replace" and isinstance(step.get("content"), str):
        shortest = _pattern_bytes(step.get("pattern"), f"{where}.pattern")
        return max(1.0, len(step["content"].encode(errors="replace")) / shortest)
    return 1.0


def _pattern_bytes(pattern: Any, where: str) -> int:
    """Fewest bytes of a match of the pattern."""
    kind, text = next(iter(pattern.items())) if isinstance(pattern, dict) and len(pattern) == 1 else (None, None)
    if kind == "String" and isinstance(text, str) and 0 < (size := len(text.encode(errors="replace"))) <= MAX_TEXT:
        return size
    if kind == "Regex" and isinstance(text, str) and text in PATTERNS:
        return PATTERNS[text]
    raise ValueError(
        f"{where} must be a text of at most {MAX_TEXT} bytes, or one of the regular expressions of published "
        f"tokenizers, got {_short(pattern)}"
    )


def _check_charsmap(value: Any, where: str) -> None:
    """Raise ValueError for a table that replaces a character by a long text.

    The table holds a search tree and then the replacement texts, separated by zeros.
    """
    try:
        content = base64.b64decode(value or "", validate=True)
        texts = content[4 + struct.unpack_from("<L", content)[0] :] if content else b""
        texts.decode()
    except (TypeError, ValueError, struct.error, binascii.Error) as error:
        raise ValueError(f"{where} must be a table of character replacements: {error}") from error
    longest = max(map(len, texts.split(b"\0")))
    if longest > MAX_TEXT:
        raise ValueError(f"{where} must replace a character by at most {MAX_TEXT} bytes, got {longest:,}")


def _check_template(value: Any, where: str) -> None:
    if not isinstance(value, list | dict) or len(value) > MAX_STEPS:
        raise ValueError(f"{where} must have at most {MAX_STEPS} entries, got {_short(value)}")
    if isinstance(value, dict):  # {name: {"id": name, "ids": numbers, "tokens": names}}
        for name, token in value.items():
            fields = token.values() if isinstance(token, dict) else ()
            if sum(len(field) for field in fields if isinstance(field, list)) > MAX_STEPS:
                raise ValueError(f"{where}.{_short(name)} must have at most {MAX_STEPS} entries")


def _check_lengths(content: dict[str, Any], file: Path) -> None:
    """Raise ValueError for padding or truncation lengths that would fill the memory."""
    padding, truncation = content.get("padding"), content.get("truncation")
    for name, value in (("padding", padding), ("truncation", truncation)):
        if not isinstance(value, dict | None):
            raise ValueError(f"{file}: {name} must be an object, got {_short(value)}")
        strategy = (value or {}).get("strategy")
        numbers = {**(value or {}), **(strategy if isinstance(strategy, dict) else {})}
        for key, number in numbers.items():
            if isinstance(number, int | float) and not (math.isfinite(number) and 0 <= number <= MAX_LENGTH):
                raise ValueError(f"{file}: {name}.{key} must be at most {MAX_LENGTH:,}, got {_short(number)}")


def _short(value: Any) -> str:
    return repr(value)[:200]
