"""Backbones of strangers: tokenizers and repositories as transformers and the Hub's cache keep them."""

from __future__ import annotations

import shutil
from pathlib import Path

import tokenizers
import transformers

COMMIT = "a" * 40
WORDS = ["[PAD]", "[UNK]", "[EOS]", "a", "photo", "of", "cat", "fire", "truck", "dog"]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer as transformers saves it: a word each."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    fast.save_pretrained(folder)


def as_repository(folder: Path, cache: Path, repo: str = "org/clip", commit: str = COMMIT) -> None:
    """The folder as the Hub's own cache keeps a repository that was downloaded."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
