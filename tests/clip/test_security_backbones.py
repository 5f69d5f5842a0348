"""Backbones of strangers: whatever their files ask for, no code of theirs runs, and the file and the key are named."""

from __future__ import annotations

import base64
import functools
import json
import os
import pickle
import re
import shutil
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tokenizers
import torch
import transformers
from backbone_cases import WORDS, as_repository, write_tokenizer
from open_clip.coca_model import MultimodalCfg
from PIL import Image
from safetensors.torch import save_file
from tiny import TEXT, VISION
from torch import Tensor, nn
from typer.testing import CliRunner

from mergetune import FrozenClip, load_clip
from mergetune.cli import app
from mergetune.clip.backbone_files import BOUNDS, DECODER
from mergetune.clip.backbone_files import TEXT as TEXT_KEYS
from mergetune.clip.backbone_files import VISION as VISION_KEYS
from mergetune.clip.backbone_weights import check_weights
from mergetune.clip.tokenizer_json import check_tokenizer_json
from mergetune.io import is_torchscript, load_torch, read_torchscript
from mergetune.io.pickled_modules import read_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor"),
]

OTHER = "b" * 40
TEXTS = ["a photo of a cat", "fire truck dog"]
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "hf_tokenizer_name": "org/clip", "tokenizer_kwargs": {"clean": "lower"}},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": 99},
}


@functools.cache
def model() -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(8, VISION, TEXT)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that code of a stranger would make. Nor is anybody asked whether it may run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the worst that torch can be told
    return tmp_path / "code-ran"


@pytest.fixture
def folder(tmp_path, marker):
    """A backbone with everything that it needs, and a Python file that nothing asks for yet."""
    path = tmp_path / "org-clip"
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    save_file(model().state_dict(), path / "open_clip_model.safetensors")
    write_tokenizer(path)
    (path / "hostile.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast, PretrainedConfig, PreTrainedModel\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
        "class Config(PretrainedConfig): model_type = 'hostile'\n"
        "class Model(PreTrainedModel): config_class = Config\n"
    )
    return path


def edit(file: Path, place: str, value: Any) -> None:
    """Set a key of a JSON document, as "model_cfg.text_cfg.hf_model_name"."""
    content = json.loads(file.read_text()) if file.exists() else {}
    *parents, key = place.split(".")
    functools.reduce(lambda here, name: here.setdefault(name, {}), parents, content)[key] = value
    file.write_text(json.dumps(content))


def load(folder: Path, how: str) -> FrozenClip:
    if how == "local-dir":
        return load_clip(f"local-dir:{folder}")
    as_repository(folder, folder.parent / "cache")
    return load_clip("hf-hub:org/clip", cache_dir=folder.parent / "cache")


HOW = pytest.mark.parametrize("how", ["local-dir", "hf-hub"])


# -- what is right ----------------------------------------------------------------------------------------------------


@HOW
def test_a_backbone_is_open_clips_own(folder, how):
    theirs = open_clip.create_model(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    ours = load(folder, how)
    assert torch.equal(ours.tokenizer(TEXTS), tokens) and tokens[0].tolist()[:6] == [3, 4, 5, 3, 6, 2]
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.model.state_dict().items())
    assert ours.preprocess_cfg == json.loads(json.dumps(open_clip.get_model_preprocess_cfg(theirs)))
    assert ours.name == (f"local-dir:{folder}" if how == "local-dir" else "hf-hub:org/clip")


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors", "open_clip_pytorch_model.bin"),
        ("other.safetensors", "pytorch_model.bin"),
        ("epoch_1.pth", "other.safetensors"),
        ("a.bin", "b.pth"),
    ],
)
def test_of_several_weights_those_are_loaded_that_open_clip_takes(folder, names):
    (folder / "open_clip_model.safetensors").unlink()
    for number, name in enumerate(names):
        state = {key: value + number for key, value in model().state_dict().items()}
        (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
    theirs, ours = open_clip.create_model(f"local-dir:{folder}"), load_clip(f"local-dir:{folder}")
    assert torch.equal(ours.model.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_configuration_of_open_clip_passes(tmp_path, name):
    """What is missed is another file: the text model's own configuration, or the weights."""
    config = open_clip.get_model_config(name)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    missed = r"config\.json, the configuration of its text" if "hf_model_name" in config["text_cfg"] else "weights"
    with pytest.raises((FileNotFoundError, RuntimeError), match=f"must hold {missed}"):
        load_clip(f"local-dir:{tmp_path}")


def test_every_setting_of_open_clip_was_considered():
    """A setting that a new open_clip brings is refused until somebody has looked at what it makes open_clip do."""
    for settings, allowed in ((open_clip.CLIPVisionCfg, VISION_KEYS), (open_clip.CLIPTextCfg, TEXT_KEYS)):
        assert {field.name for field in fields(settings)} == allowed
    assert {field.name for field in fields(MultimodalCfg)} == TEXT_KEYS | DECODER


@HOW
def test_what_no_text_needs_is_left_out(folder, marker, how):
    """Code of other parts, chat templates, and paths that a tokenizer was once saved with."""
    expected = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    settings = folder / "tokenizer_config.json"
    edit(settings, "auto_map", {"AutoProcessor": "hostile.Tokenizer"})
    edit(settings, "chat_template", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    edit(settings, "tokenizer_file", "/etc/hostname")
    edit(settings, "name_or_path", "/somewhere/else")
    edit(settings, "fast_tokenizer_files", ["../tokenizer.4.0.0.json"])
    edit(folder / "config.json", "auto_map", {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"})
    edit(folder / "config.json", "model_type", "hostile")
    assert torch.equal(load(folder, how).tokenizer(TEXTS), expected)
    assert not marker.exists()


# -- what is refused --------------------------------------------------------------------------------------------------

CODE = {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}
KWARGS = "model_cfg.text_cfg.tokenizer_kwargs"
OPEN_CLIP, TOKENIZER, TRANSFORMERS = "open_clip_config.json", "tokenizer_config.json", "config.json"
REFUSED = [
    (OPEN_CLIP, f"{KWARGS}.trust_remote_code", True),
    (OPEN_CLIP, f"{KWARGS}.trust_remote_code", 1),
    (OPEN_CLIP, f"{KWARGS}.trust_remote_code", "yes"),
    (OPEN_CLIP, f"{KWARGS}.code_revision", "main"),
    (OPEN_CLIP, f"{KWARGS}.subfolder", ".."),
    (OPEN_CLIP, f"{KWARGS}.vocab_file", "/etc/hostname"),
    (OPEN_CLIP, f"{KWARGS}.gguf_file", "model.gguf"),
    (OPEN_CLIP, f"{KWARGS}.tokenizer_type", "bert"),
    (OPEN_CLIP, f"{KWARGS}.bpe_path", "/etc/hostname"),
    (OPEN_CLIP, f"{KWARGS}.reduction_mask", "syntax"),
    (OPEN_CLIP, f"{KWARGS}.clean", "exec"),
    (OPEN_CLIP, KWARGS, ["trust_remote_code"]),
    (OPEN_CLIP, "model_cfg.text_cfg.tokenizer_mode", "hostile"),
    (OPEN_CLIP, "model_cfg.text_cfg.hf_tokenizer_name", {"auto_map": CODE}),
    (OPEN_CLIP, "model_cfg.text_cfg.hf_model_name", "/etc"),
    (OPEN_CLIP, "model_cfg.text_cfg.hf_model_name", "../org-clip"),
    (OPEN_CLIP, "model_cfg.text_cfg.hf_model_name", "."),
    (OPEN_CLIP, "model_cfg.text_cfg.hf_model_name", {"auto_map": CODE}),
    (OPEN_CLIP, "model_cfg.text_cfg.hf_model_config", {}),
    (OPEN_CLIP, "model_cfg.vision_cfg.timm_model_name", "hf-hub:org/hostile"),
    (OPEN_CLIP, "model_cfg.vision_cfg.timm_model_name", "local-dir:."),
    (OPEN_CLIP, "model_cfg.vision_cfg.timm_model_name", "../vit_tiny_patch16_224"),
    (OPEN_CLIP, "model_cfg.vision_cfg.timm_model_name", "no_such_model"),
    (OPEN_CLIP, "model_cfg.vision_cfg.checkpoint_path", "hostile.pt"),
    (OPEN_CLIP, "model_cfg.vision_cfg.norm_kwargs", {"device": {"a": 1}}),
    (OPEN_CLIP, "model_cfg.multimodal_cfg", None),
    (OPEN_CLIP, "model_cfg.multimodal_cfg.hf_model_name", "org/hostile"),
    (OPEN_CLIP, "model_cfg.multimodal_cfg.width", "16"),
    (OPEN_CLIP, "model_cfg.pretrained_text_path", "hostile.pt"),
    (OPEN_CLIP, "model_cfg.text_cfg", None),
    (OPEN_CLIP, "preprocess_cfg.mean", {"a": 1}),
    (TOKENIZER, "auto_map", CODE),
    (TOKENIZER, "auto_map", ["hostile.Tokenizer", None]),
    (TOKENIZER, "auto_map", {"AutoTokenizer": "org/other--hostile.Tokenizer"}),
    (TOKENIZER, "tokenizer_class", "Wav2Vec2PhonemeCTCTokenizer"),
    (TOKENIZER, "tokenizer_class", "RagTokenizer"),
    (TOKENIZER, "tokenizer_class", ["BertTokenizer"]),
    (TOKENIZER, "init_inputs", ["/etc/hostname"]),
    (TOKENIZER, "tokenizer_object", {"a": {"b": 1}}),
    (TRANSFORMERS, "auto_map", CODE),
    (TRANSFORMERS, "tokenizer_class", "hostile.Tokenizer"),
    ("special_tokens_map.json", "tokenizer_file", "/etc/hostname"),
    ("special_tokens_map.json", "auto_map", CODE),
    ("special_tokens_map.json", "unk_token", {"content": "a", "path": "/etc/hostname"}),
    ("added_tokens.json", "cat", "/etc/hostname"),
]


@HOW
@pytest.mark.parametrize(("file", "place", "value"), REFUSED)
def test_a_file_that_asks_for_more_is_refused_by_name(folder, marker, how, file, place, value):
    edit(folder / TOKENIZER, "auto_map", CODE)  # whatever else is asked for could lead there
    if file != OPEN_CLIP:
        edit(folder / TOKENIZER, "auto_map", {})
    edit(folder / file, place, value)
    with pytest.raises(ValueError, match=f"{re.escape(file)}: {re.escape(place)}"):
        load(folder, how)
    assert not marker.exists()


@pytest.mark.parametrize("how", ["trust", "ask"])
def test_open_clip_alone_would_run_the_tokenizers_code(folder, marker, how, monkeypatch):
    """What is guarded against is real: by the configuration, and by who answers at the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    edit(folder / TOKENIZER, "auto_map", CODE)
    if how == "ask":
        edit(folder / TOKENIZER, "tokenizer_class", "HostileTokenizer")
    else:
        edit(folder / OPEN_CLIP, f"{KWARGS}.trust_remote_code", True)
    open_clip.get_tokenizer(f"local-dir:{folder}")
    assert marker.exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model_cfg": 1}', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("file", [OPEN_CLIP, TOKENIZER])
def test_damaged_documents_are_named(folder, file, content):
    if file == TOKENIZER and content.startswith(b'{"'):
        content = b'{"added_tokens_decoder": [[]]}'
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(folder / file))):
        load_clip(f"local-dir:{folder}")


def test_what_is_lacking_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_clip(f"local-dir:{tmp_path / 'nowhere'}")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        RuntimeError, match=re.escape(f"the tokenizer of 'local-dir:{folder}' cannot be loaded")
    ) as error:
        load_clip(f"local-dir:{folder}")
    assert "mergetune-" not in str(error.value)  # the private folder is nobody's business
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="must hold weights"):
        load_clip(f"local-dir:{folder}")
    (folder / OPEN_CLIP).unlink()
    with pytest.raises(FileNotFoundError, match=OPEN_CLIP):
        load_clip(f"local-dir:{folder}")


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", list(BOUNDS))
def test_each_size_has_a_bound(folder, key):
    places = {"embed_dim": "model_cfg.embed_dim", "size": "preprocess_cfg.size"}
    sections = {"text_cfg": TEXT_KEYS, "vision_cfg": VISION_KEYS, "multimodal_cfg": DECODER}
    section = next((section for section, keys in sections.items() if key in keys), "model_cfg")
    place = places.get(key, f"model_cfg.{section}.{key}")
    original = (folder / OPEN_CLIP).read_text()
    least, most = BOUNDS[key]
    for value in (most + 1, 10**12, 1e300, least - 1, "1", True, [1, most + 1], [1] * 5, [], float("inf")):
        (folder / OPEN_CLIP).write_text(original)
        edit(folder / OPEN_CLIP, place, value)
        with pytest.raises(ValueError, match=rf"{OPEN_CLIP}: {re.escape(place)} must be from {least} to {most:,}, got"):
            load_clip(f"local-dir:{folder}")


def test_every_size_of_open_clips_configurations_has_room():
    """The most that is published is at most half of each bound."""
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        for section in (config, config["vision_cfg"], config["text_cfg"], config.get("multimodal_cfg", {})):
            for key in (key for key in BOUNDS if section.get(key) is not None):
                values = section[key] if isinstance(section[key], list) else [section[key]]
                assert all(BOUNDS[key][0] <= value <= BOUNDS[key][1] / 2 for value in values), (name, key)


LARGE = {
    "text": {"text_cfg.layers": 256, "text_cfg.width": 1 << 14},
    "words": {"text_cfg.vocab_size": 1 << 22, "text_cfg.width": 1 << 10},
    "vision": {"vision_cfg.layers": 256, "vision_cfg.width": 1 << 14},
    "ResNet": {"vision_cfg.layers": [256] * 4, "vision_cfg.width": 1 << 13},
    "places": {"vision_cfg.image_size": 4096, "vision_cfg.patch_size": 1},
    "decoder": {"multimodal_cfg.layers": 256, "multimodal_cfg.width": 1 << 14},
}


@HOW
@pytest.mark.parametrize("name", list(LARGE))
def test_a_network_is_not_far_larger_than_its_weights(folder, monkeypatch, how, name):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("room was made for it"))
    for place, value in LARGE[name].items():
        edit(folder / OPEN_CLIP, f"model_cfg.{place}", value)
    with pytest.raises(
        ValueError, match=rf"{OPEN_CLIP} of .*: model_cfg must describe the network of its weights, got one"
    ):
        load(folder, how)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("text_cfg.heads", 3),
        ("text_cfg.pool_type", "nowhere"),
        ("text_cfg.mlp_ratio", 0.001),
        ("text_cfg.norm_kwargs", {"eps": "a"}),
        ("text_cfg.act_kwargs", {"inplace": 1}),
        ("vision_cfg.pos_embed_type", "nowhere"),
        ("vision_cfg.patch_size", 99),
        ("vision_cfg.layers", [1, 1]),
        ("vision_cfg.head_width", 1000),
        ("vision_cfg.pool_type", 7),
        ("vision_cfg.patch_dropout", 7),
        ("embed_dim", None),
        ("init_logit_scale", "a"),
    ],
)
def test_settings_that_do_not_fit_are_one_error(folder, place, value):
    """Or weights of another model, which is the other documented error; or the setting changes nothing."""
    edit(folder / OPEN_CLIP, f"model_cfg.{place}", value)
    try:
        load_clip(f"local-dir:{folder}")
    except ValueError as error:
        assert OPEN_CLIP in str(error) and str(folder) in str(error)
    except RuntimeError as error:
        assert "state_dict" in str(error) or "do not fit the model" in str(error)


@pytest.mark.parametrize(("key", "value"), [("device", "meta"), ("dtype", "float64"), ("out", 1)])
@pytest.mark.parametrize("section", ["vision_cfg", "text_cfg"])
@pytest.mark.parametrize("kwargs", ["norm_kwargs", "act_kwargs"])
def test_settings_of_layers_are_those_of_layers(folder, section, kwargs, key, value):
    edit(folder / OPEN_CLIP, f"model_cfg.{section}.{kwargs}", {key: value})
    with pytest.raises(ValueError, match=f"{OPEN_CLIP}: model_cfg.{section}.{kwargs} must have .* alone, got {key}"):
        load_clip(f"local-dir:{folder}")


# -- tokenizer.json ---------------------------------------------------------------------------------------------------

_GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}
_SEQUENCE = {"type": "Sequence", "normalizers": []}
_TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}


def charsmap(texts: bytes) -> str:
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + texts).decode()


JSON_REFUSED: list[tuple[str, Any, str]] = [
    ("normalizer", {"type": "Sequence", "normalizers": [_GROW] * 8}, "normalizer must make a text at most 16 times"),
    (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [_GROW] * 2}] * 2},
        "normalizer must make a text at most 16 times",
    ),
    ("normalizer", {**_GROW, "content": "a" * 65}, "normalizer.content must have at most 64 bytes"),
    ("normalizer", {**_GROW, "pattern": {"String": ""}}, "normalizer.pattern must be a text"),
    ("normalizer", {**_GROW, "pattern": {"Regex": "(a|a|aa)+$"}}, "normalizer.pattern must be a text"),
    ("normalizer", {"type": "Prepend", "prepend": "a" * 1000}, "normalizer.prepend must have at most 64 bytes"),
    ("normalizer", {"type": "Python"}, "normalizer must be one of BertNormalizer"),
    ("normalizer", [], "normalizer must be one of BertNormalizer"),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 2}, "normalizer must have NFC at most once"),
    ("normalizer", {"type": "Sequence", "normalizers": [_SEQUENCE] * 33}, "normalizer.normalizers must be a list"),
    (
        "normalizer",
        functools.reduce(lambda inner, _: {"type": "Sequence", "normalizers": [inner]}, range(9), _SEQUENCE),
        "must be a list",
    ),
    (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": charsmap(b"a" * 65)},
        "replace a character by at most 64 bytes",
    ),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AA"}, "must be a table of character replacements"),
    (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": charsmap(b"\xff")},
        "must be a table of character replacements",
    ),
    (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
        "pre_tokenizer.pattern must be a text",
    ),
    ("pre_tokenizer", {"type": "UnicodeScripts"}, "pre_tokenizer must be one of"),
    ("post_processor", {**_TEMPLATE, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 33}, "at most 32 entries"),
    ("post_processor", {"type": "Sequence", "processors": [_TEMPLATE] * 2}, "TemplateProcessing at most once"),
    (
        "post_processor",
        {**_TEMPLATE, "special_tokens": {"a": {"id": "a", "ids": [1] * 33, "tokens": ["a"] * 33}}},
        "at most 32 entries",
    ),
    ("decoder", {"type": "Sequence", "decoders": [_GROW] * 8}, "decoder must make a text at most 16 times"),
    ("decoder", {"type": "CTC"}, "decoder must be one of"),
    ("model", None, "model must be one of BPE"),
    ("model", {"type": "Python"}, "model must be one of BPE"),
    ("model", {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.5}, "model.dropout must be absent"),
    ("model", {"type": "BPE", "vocab": {}, "merges": [], "path": "/etc/hostname"}, "model.path must be absent"),
    ("padding", {"strategy": {"Fixed": 10**9}}, "padding.Fixed must be at most"),
    (
        "padding",
        {"strategy": "BatchLongest", "pad_to_multiple_of": 10**9},
        "padding.pad_to_multiple_of must be at most",
    ),
    ("truncation", [], "truncation must be an object"),
]


@HOW
@pytest.mark.parametrize(("part", "value", "reason"), JSON_REFUSED)
def test_steps_that_published_tokenizers_do_not_have_are_refused(folder, how, part, value, reason):
    edit(folder / "tokenizer.json", part, value)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {part}.*{re.escape(reason.removeprefix(part))}"):
        load(folder, how)


def metaspace(text: str = "▁") -> Any:
    return tokenizers.pre_tokenizers.Metaspace(text)


N, P, D = tokenizers.normalizers, tokenizers.pre_tokenizers, tokenizers.decoders
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
PIPELINES: dict[str, tuple[Any, Any, Any]] = {  # as the tokenizers of open_clip's configurations have them
    "CLIP": (
        N.Sequence([N.NFC(), N.Replace(tokenizers.Regex(r"\s+"), " "), N.Lowercase()]),
        P.Sequence([P.Split(tokenizers.Regex(CLIP_WORDS), "removed", True), P.ByteLevel(add_prefix_space=False)]),
        D.ByteLevel(),
    ),
    "SigLIP": (
        N.Sequence([N.Strip(left=False), N.Replace(tokenizers.Regex(" {2,}"), "▁")]),
        P.Sequence([P.WhitespaceSplit(), metaspace()]),
        D.Metaspace(),
    ),
    "SigLIP 2": (
        N.Replace(" ", "▁"),
        P.Split(" ", "merged_with_previous"),
        D.Sequence([D.Replace("▁", " "), D.ByteFallback(), D.Fuse()]),
    ),
    "BERT": (N.BertNormalizer(), P.BertPreTokenizer(), D.WordPiece()),
    "RoBERTa": (None, P.ByteLevel(), D.ByteLevel()),
    "XLM-V": (
        N.Sequence([N.Replace("``", '"'), N.NFKD(), N.StripAccents(), N.Replace(tokenizers.Regex(" {2,}"), " ")]),
        metaspace(),
        D.Metaspace(),
    ),
    "Llama": (N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]), None, D.Sequence([D.Strip(" ", 1, 0)])),
}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_the_steps_of_published_tokenizers_are_kept(folder, name):
    words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    normalizer, pre_tokenizer, decoder = PIPELINES[name]
    if normalizer is not None:
        words.normalizer = normalizer
    if pre_tokenizer is not None:
        words.pre_tokenizer = pre_tokenizer
    words.decoder = decoder
    words.add_tokens(["cat", "dog"])  # whatever the steps make of them, they are told apart
    words.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    assert check_tokenizer_json(content, folder) == json.loads((folder / "tokenizer.json").read_text())
    expected = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(load_clip(f"local-dir:{folder}").tokenizer(TEXTS), expected)


def test_a_panic_of_the_library_is_an_error_that_names_the_file(folder):
    """A table of characters whose search tree points into nothing: the library in Rust panics over it."""
    tree = b"".join(number.to_bytes(4, "little") for number in (0xFFFFFFFF,) * 4)
    table = base64.b64encode(len(tree).to_bytes(4, "little") + tree + b"a\0").decode()
    edit(folder / "tokenizer.json", "normalizer", {"type": "Precompiled", "precompiled_charsmap": table})
    with pytest.raises(BaseException) as theirs:
        open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert not isinstance(theirs.value, Exception)
    with pytest.raises(ValueError, match=r"tokenizer\.json of 'local-dir:.*' must be a file that"):
        load_clip(f"local-dir:{folder}")


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../org-clip", "/etc", "https://example.org/clip", "org/clip/more", "local-dir:.", ".", "C:\\clip"]
)
def test_a_repository_names_no_tokenizer_but_a_repository(folder, marker, monkeypatch, name):
    edit(folder / TOKENIZER, "auto_map", CODE)
    edit(folder / OPEN_CLIP, "model_cfg.text_cfg.hf_tokenizer_name", name)
    monkeypatch.chdir(folder)
    with pytest.raises(
        ValueError, match=f"{OPEN_CLIP}: model_cfg.text_cfg.hf_tokenizer_name must be the name of a repository"
    ):
        load(folder, "hf-hub")
    assert not marker.exists()


def test_a_folder_here_is_not_taken_for_the_repository_of_a_tokenizer(folder, marker, monkeypatch, tmp_path):
    shutil.copytree(folder, tmp_path / "bert")
    edit(tmp_path / "bert" / TOKENIZER, "auto_map", CODE)
    edit(folder / OPEN_CLIP, "model_cfg.text_cfg.hf_tokenizer_name", "bert")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="the tokenizer 'bert' of hf-hub:org/clip could not be downloaded"):
        load(folder, "hf-hub")
    assert not marker.exists()


@pytest.mark.parametrize(("file", "place", "value"), [entry for entry in REFUSED if entry[0] == TOKENIZER])
def test_a_tokenizer_of_another_repository_is_checked_too(folder, marker, tmp_path, file, place, value):
    shutil.copytree(folder, tmp_path / "words")
    as_repository(tmp_path / "words", tmp_path / "good", "org/words")
    edit(folder / OPEN_CLIP, "model_cfg.text_cfg.hf_tokenizer_name", "org/words")
    as_repository(folder, tmp_path / "good")
    assert load_clip("hf-hub:org/clip", cache_dir=tmp_path / "good").tokenizer(TEXTS)[0, 4] == WORDS.index("cat")
    edit(tmp_path / "words" / file, place, value)
    as_repository(tmp_path / "words", tmp_path / "bad", "org/words")
    as_repository(folder, tmp_path / "bad")
    with pytest.raises(ValueError, match=f"{re.escape(file)}: {re.escape(place)}"):
        load_clip("hf-hub:org/clip", cache_dir=tmp_path / "bad")
    assert not marker.exists()


def test_what_is_loaded_is_of_the_commit_that_was_checked(folder, marker, tmp_path, monkeypatch):
    """The repository changes as soon as its configuration was read."""
    from mergetune.clip import backbone_files

    cache = tmp_path / "cache"
    as_repository(folder, cache)
    edit(folder / TOKENIZER, "auto_map", CODE)
    edit(folder / OPEN_CLIP, f"{KWARGS}.trust_remote_code", True)
    save_file({key: value + 1 for key, value in model().state_dict().items()}, folder / "open_clip_model.safetensors")
    download = backbone_files.hf_hub_download

    def changing(*args, **kwargs):
        found = download(*args, **kwargs)
        if not (cache / "models--org--clip" / "snapshots" / OTHER).exists():
            as_repository(folder, cache, commit=OTHER)
        return found

    monkeypatch.setattr(backbone_files, "hf_hub_download", changing)
    clip = load_clip("hf-hub:org/clip", cache_dir=cache)
    assert (cache / "models--org--clip" / "refs" / "main").read_text() == OTHER
    assert torch.equal(clip.model.logit_scale, model().logit_scale)
    assert not marker.exists()


def test_a_folder_that_changes_after_the_check_changes_nothing(folder, marker, monkeypatch):
    create = open_clip.create_model

    def changing(*args, **kwargs):
        edit(folder / OPEN_CLIP, f"{KWARGS}.trust_remote_code", True)
        edit(folder / TOKENIZER, "auto_map", CODE)
        return create(*args, **kwargs)

    monkeypatch.setattr(open_clip, "create_model", changing)
    assert load_clip(f"local-dir:{folder}").tokenizer(TEXTS)[0, 4] == WORDS.index("cat")
    assert not marker.exists()


def test_a_repository_that_is_not_there(tmp_path):
    with pytest.raises(RuntimeError, match=r"open_clip_config\.json"):
        load_clip("hf-hub:org/nothing", cache_dir=tmp_path)


# -- pickled weights --------------------------------------------------------------------------------------------------


class Runs:
    """What calls a function when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


class Fails(Runs):
    """What raises TypeError under weights_only: then open_clip opens the file once more, without it."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return torch._utils._rebuild_parameter, (1, 2, 3, 4, 5, 6)


PICKLES: dict[str, Callable[[Any, Path], object]] = {
    "zip": lambda state, file: torch.save(state, file),
    "legacy": lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
    "plain": lambda state, file: file.write_bytes(pickle.dumps(state, protocol=2)),
}
CALLS = {
    "os.mkdir": lambda marker: Runs(os.mkdir, str(marker)),
    "exec": lambda marker: Runs(exec, f"open({str(marker)!r}, 'w').close()"),
    "after TypeError": lambda marker: [Fails(print), Runs(os.mkdir, str(marker))],
}


@pytest.fixture
def tiny_name(tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    (tmp_path / "configs").mkdir()
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "configs" / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    return "tiny-test"


def load_weights(
    where: str, file: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **options
) -> FrozenClip:
    """Load a file of weights by one of the ways that lead to open_clip."""
    if where == "pretrained":
        return load_clip(name, str(file), **options)
    if where == "tag":
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"tag": {"file": str(file)}})
        return load_clip(name, "tag", **options)
    (folder / "open_clip_model.safetensors").unlink()
    shutil.copy(file, folder / "open_clip_pytorch_model.bin")
    if where == "local-dir":
        return load_clip(f"local-dir:{folder}", **options)
    as_repository(folder, folder.parent / "cache")
    return load_clip("hf-hub:org/clip", cache_dir=folder.parent / "cache", **options)


WHERE = pytest.mark.parametrize("where", ["pretrained", "tag", "local-dir", "hf-hub"])


@WHERE
@pytest.mark.parametrize("form", list(PICKLES))
@pytest.mark.parametrize("call", list(CALLS))
def test_pickled_weights_run_nothing(folder, marker, tiny_name, tmp_path, monkeypatch, where, form, call):
    PICKLES[form]({"logit_scale": CALLS[call](marker)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"(weights\.pt|model\.bin) cannot be read as a checkpoint") as error:
        load_weights(where, tmp_path / "weights.pt", folder, tiny_name, monkeypatch)
    assert not marker.exists()
    assert "weights_only" not in str(error.value)  # torch's advice is to run it


@WHERE
def test_pickled_tensors_are_loaded(folder, tiny_name, tmp_path, monkeypatch, where):
    torch.save(model().state_dict(), tmp_path / "weights.pt")
    found = load_weights(where, tmp_path / "weights.pt", folder, tiny_name, monkeypatch)
    assert torch.equal(found.model.logit_scale, model().logit_scale)


# -- TorchScript ------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Whatever a module can have: shared and tied parts, buffers of all kinds, attributes that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.same = self.first
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        self.blocks = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.BatchNorm1d(3))
        self.small = nn.Parameter(torch.arange(6).reshape(2, 3).T.to(torch.float16))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("none", None)
        self.part = nn.Parameter(torch.arange(12.0).reshape(3, 4)[1:, ::2])  # a view
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.plain = torch.ones(2)  # no parameter and no buffer
        self.tensors = {"a": torch.ones(1)}
        self.names, self.number = ["a"], 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first(x) + self.same(x) + self.tied(x)) * self.count + self.plain.sum()
        return x + self.part.sum() + self.tensors["a"] * self.number


@functools.cache
def program(name: str) -> Callable[[Path], None]:
    if name == "odd, scripted":
        made = torch.jit.script(Odd().eval())
    elif name == "odd, traced":
        made = torch.jit.trace(Odd().eval(), torch.zeros(4, 2), strict=False)
    elif name == "frozen":
        made = torch.jit.freeze(torch.jit.script(Odd().eval()), preserved_attrs=["small", "first"])
    elif name == "a ResNet's":
        vision = {**VISION, "layers": [1, 1, 1, 1], "image_size": 32}
        made = torch.jit.trace(open_clip.CLIP(8, vision, TEXT).visual.eval(), torch.zeros(1, 3, 32, 32))
    else:
        inputs = torch.zeros(1, 3, 16, 16), torch.zeros(1, TEXT["context_length"], dtype=torch.long)
        network = model() if name == "CLIP" else open_clip.CustomTextCLIP(8, VISION, TEXT)
        network = network.half() if name == "CLIP, half" else network
        made = torch.jit.trace(network.eval(), inputs, strict=False, check_trace=False)
    return functools.partial(torch.jit.save, made)


@pytest.mark.parametrize("name", ["odd, scripted", "odd, traced", "frozen", "a ResNet's", "CLIP", "CustomTextCLIP"])
def test_an_archive_is_read_as_torch_would_load_it(tmp_path, name):
    program(name)(tmp_path / "a.pt")
    expected = torch.jit.load(tmp_path / "a.pt").state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was run"))
        found = read_torchscript(tmp_path / "a.pt")
        assert is_torchscript(tmp_path / "a.pt") and load_torch(tmp_path / "a.pt").keys() == expected.keys()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@WHERE
def test_a_backbone_may_be_an_archive(folder, tiny_name, tmp_path, monkeypatch, where):
    program("CLIP")(tmp_path / "weights.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was run"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_weights(where, tmp_path / "weights.pt", folder, tiny_name, monkeypatch)
    for key, value in model().state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value), key
    if where in ("local-dir", "hf-hub"):
        assert found.preprocess_cfg["mean"] == [0.5] * 3


@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize(
    ("keys", "prefix"),
    [(("model",), ""), (("net", "state_dict"), "module."), ((), "_orig_mod."), (("state_dict",), "model.module.")],
    ids=str,
)
def test_a_backbone_may_be_in_what_trainers_put_around_weights(tiny_name, tmp_path, keys, prefix, how):
    content = {f"{prefix}{name}": tensor for name, tensor in model().state_dict().items()}
    if how == "safetensors":
        save_file(content, tmp_path / "weights.safetensors")
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    if how != "safetensors":
        torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=how == "zip")
    file = tmp_path / f"weights.{'safetensors' if how == 'safetensors' else 'pt'}"
    found = load_clip(tiny_name, str(file)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model().state_dict().items())


class Returns(nn.Module):
    """Brings itself back by code, which torch.jit.load runs: here it writes a file."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.weight, self.marker = nn.Parameter(torch.ones(2)), marker

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return self.weight, self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight, self.marker, self.training = state[0], state[1], state[2]
        torch.save(state[0], state[1])


class Holds(nn.Module):
    def __init__(self, marker: str) -> None:
        super().__init__()
        self.inside = Returns(marker)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


@WHERE
@pytest.mark.parametrize("kind", [Returns, Holds])
def test_an_archive_that_must_be_run_is_refused(folder, marker, tiny_name, tmp_path, monkeypatch, where, kind):
    torch.jit.save(torch.jit.script(kind(str(marker))), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"(weights\.pt|model\.bin) cannot be read .* without running it") as error:
        load_weights(where, tmp_path / "weights.pt", folder, tiny_name, monkeypatch)
    assert "allow_torchscript=True (on the command line --allow-torchscript)" in str(error.value)
    assert not marker.exists()


class Repeats(nn.Module):
    """Tensors that name the same few numbers again and again: each is small, together they would fill the memory."""

    def __init__(self, tensors: int, numbers: int) -> None:
        super().__init__()
        for number in range(tensors):
            self.register_buffer(f"b{number}", torch.zeros(1).expand(numbers))

    def forward(self, x: Tensor) -> Tensor:
        return x


def same_storage(tensors: int, numbers: int) -> dict[str, Tensor]:
    whole = torch.zeros(1)
    return {f"b{number}": whole.expand(number + 1, numbers // (number + 1)) for number in range(tensors)}


FORMS: dict[str, Callable[[int, int, Path], object]] = {
    "TorchScript": lambda n, each, file: torch.jit.save(torch.jit.script(Repeats(n, each)), file),
    "module": lambda n, each, file: torch.save(Repeats(n, each), file),
    "pickle": lambda n, each, file: file.write_bytes(pickle.dumps(Repeats(n, each), protocol=2)),
    "zip": lambda n, each, file: torch.save(same_storage(n, each), file),
    "legacy": lambda n, each, file: torch.save(same_storage(n, each), file, _use_new_zipfile_serialization=False),
}
TENSOR_READERS: dict[str, Callable[[Path], Any]] = {
    "TorchScript": check_weights,
    "module": read_module,
    "pickle": read_module,
    "zip": load_torch,
    "legacy": load_torch,
}


@pytest.mark.parametrize("form", list(FORMS))
def test_tensors_together_are_not_larger_than_the_file_by_far(tmp_path, form):
    """The limit holds for the sum: 17 times 4 MiB of one number are refused, 15 times are read."""
    file = tmp_path / "weights.pt"
    FORMS[form](17, 1 << 20, file)
    assert file.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"weights\.pt cannot be read .*its tensors have 71,30"):
            TENSOR_READERS[form](file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
    FORMS[form](15, 1 << 20, file)
    assert len(TENSOR_READERS[form](file)) == 15


class Tied(nn.Module):
    """One weight under three names, larger than what any file may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3000, 3000, bias=False)
        self.b, self.c = nn.Linear(1, 1, bias=False), self.a
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def test_tied_weights_are_read(tmp_path):
    tied = Tied()
    torch.jit.save(torch.jit.script(tied), tmp_path / "script.pt")
    torch.save(tied, tmp_path / "module.pt")
    script, module = check_weights(tmp_path / "script.pt"), read_module(tmp_path / "module.pt")
    assert script.keys() == tied.state_dict().keys() and module.keys() == tied.state_dict().keys()
    for found in (script, module):
        assert all(torch.equal(value, tied.a.weight) for value in found.values())


def test_a_storage_that_many_tensors_share_is_read_once(tmp_path, monkeypatch):
    """As the parameters of a flattened model do; else a small file would be read for hours."""
    whole = torch.arange(1000.0)
    torch.save({f"p{i}": whole[i : i + 1] for i in range(1000)}, tmp_path / "a.pt")
    read = zipfile.ZipFile.read
    names = []
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, name: names.append(name) or read(self, name))
    found = read_module(tmp_path / "a.pt")
    assert [found[f"p{i}"].item() for i in range(1000)] == whole.tolist()
    assert sum("/data/" in name for name in names) == 1


def test_bytes_in_a_pickle_are_unpacked_once(tmp_path):
    """A pickle can name one text as often as it likes, and would make it anew each time."""
    encode = b"c_codecs\nencode\n"
    text = b"X" + (1_000_000).to_bytes(4, "little") + b"a" * 1_000_000 + b"q\x01"
    again = encode + b"h\x01" + b"X\x06\x00\x00\x00latin1" + b"\x86R"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + text + b"0](" + again * 50 + b"e.")
    with pytest.raises(ValueError, match=r"a\.pkl cannot be read .* used more than once"):
        read_module(tmp_path / "a.pkl")


def test_an_archive_is_run_for_who_allows_it(marker, tmp_path):
    torch.jit.save(torch.jit.script(Holds(str(marker))), tmp_path / "weights.pt")
    assert torch.equal(check_weights(tmp_path / "weights.pt", allow_torchscript=True)["inside.weight"], torch.ones(2))
    assert marker.exists()  # so the tests above guard against what is real


def test_the_command_line_tells_how_to_allow_it(marker, tiny_name, tmp_path):
    torch.jit.save(torch.jit.script(Returns(str(marker))), tmp_path / "weights.pt")
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "train" / name / "a.png")
    call = ["cache", tmp_path / "images", "--out", tmp_path / "cache"]
    call += ["--backbone", tiny_name, "--pretrained", tmp_path / "weights.pt"]
    refused = CliRunner().invoke(app, [*map(str, call)])
    assert refused.exit_code == 2 and "--allow-torchscript" in refused.stderr and not marker.exists()
    allowed = CliRunner().invoke(app, [*map(str, call), "--allow-torchscript"])
    assert allowed.exit_code == 1 and "state_dict" in allowed.stderr and marker.exists()  # weights of another model


@pytest.mark.parametrize("damage", ["cut", "no code", "packed", "itself"])
def test_damaged_archives_are_named(tmp_path, damage):
    program("odd, scripted")(tmp_path / "whole.pt")
    file = tmp_path / "a.pt"
    if damage == "cut":
        file.write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    with zipfile.ZipFile(tmp_path / "whole.pt") as source:
        entries = {name: source.read(name) for name in source.namelist()}
    if damage != "cut":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if damage == "packed" else zipfile.ZIP_STORED) as target:
            for name, content in entries.items():
                if damage == "itself" and name.endswith("data.pkl"):
                    content = b"\x80\x02c__torch__\nOdd\nq\x00)\x81q\x01}(X\x04\x00\x00\x00selfh\x01ub."
                if damage != "no code" or not name.endswith(".py"):
                    target.writestr(name, content)
    with pytest.raises(ValueError, match=r"a\.pt cannot be read as a TorchScript archive without running it"):
        read_torchscript(file)


@pytest.mark.parametrize("change", ["another file", "another target of a link", "other bytes"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_weights_that_are_exchanged_after_they_were_checked_are_refused(tmp_path, monkeypatch, given, change):
    names = ("first", "second")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": {**CONFIG["model_cfg"], "text_cfg": TEXT}})
        )
        save_file(model().state_dict(), tmp_path / name / "open_clip_model.safetensors")
    file, other = (tmp_path / name / "open_clip_model.safetensors" for name in names)
    if change == "another target of a link":
        file.rename(tmp_path / "target.safetensors")
        file.symlink_to(tmp_path / "target.safetensors")

    def check_and_exchange(path, **more):
        found = check_weights(path, **more)
        if change == "other bytes":
            file.write_bytes(file.read_bytes())
        else:
            file.unlink()
            file.symlink_to(other) if "link" in change else other.rename(file)
        return found

    monkeypatch.setattr("mergetune.clip.loading.check_weights", check_and_exchange)
    wanted = (f"local-dir:{tmp_path / 'first'}",) if given == "folder" else ("ViT-B-32", str(file))
    if given == "file":
        monkeypatch.setattr("open_clip.create_model", lambda *_, **__: model())
    with pytest.raises(ValueError, match="open_clip_model.safetensors must not change while it is loaded"):
        load_clip(*wanted)
