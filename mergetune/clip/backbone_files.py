"""Safe loading of backbones from a folder or the Hugging Face Hub: their files are checked and copied before use.

open_clip and transformers obey the content of a backbone's files: they import Python files (``auto_map`` with
``trust_remote_code``), download other models by name and open paths. This module reads each file once, checks it, and
gives open_clip a private folder with the checked content only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.coca_model import MultimodalCfg

from mergetune.clip.text_model_files import TEXT_CONFIG, check_text_model, count_numbers
from mergetune.clip.tokenizer_files import (
    TOKENIZER_FILES,
    TOKENIZER_MODES,
    brief,
    check_plain,
    check_tokenizer_setting,
    copy_tokenizer,
    read_json,
    word_set,
)
from mergetune.io.atomic_files import scratch_folder
from mergetune.io.network import CACHED, not_reached

HUB, FOLDER = "hf-hub:", "local-dir:"
CONFIG = "open_clip_config.json"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip looks for them
FOLDER_WEIGHTS = (  # preferred files in a folder, in open_clip's order; then any other
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)

MODEL = word_set(
    "embed_dim vision_cfg text_cfg multimodal_cfg custom_text quick_gelu init_logit_scale init_logit_bias "
    "nonscalar_logit_scale output_dict"
)
TOWER = word_set(
    "layers width mlp_ratio ls_init_value final_ln_after_pool pool_type output_tokens act_kwargs norm_kwargs "
    "block_type qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc"
)
VISION = TOWER | word_set(
    "head_width patch_size image_size patch_dropout attentional_pool attn_pooler_queries attn_pooler_heads "
    "no_ln_pre pos_embed_type timm_model_name timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop "
    "timm_drop_path"
)
TEXT = TOWER | word_set(
    "context_length vocab_size heads embed_cls pad_id eos_id no_causal_mask proj_bias proj_type hf_tokenizer_name "
    "tokenizer_mode tokenizer_kwargs hf_model_name hf_model_pretrained hf_proj_type hf_pooler_type"
)
DECODER = word_set(  # CoCa: text features come from the text tower, but the weights also hold the decoder
    "context_length vocab_size width heads layers mlp_ratio ls_init_value dim_head n_queries attn_pooler_heads"
)
PREPROCESS = word_set("size mode mean std interpolation resize_mode fill_color")
KWARGS = {"act_kwargs": word_set("approximate inplace"), "norm_kwargs": word_set("eps elementwise_affine bias")}
BOUNDS = {  # {setting: (least, most)}; the comment gives the most in open_clip's own configurations
    "embed_dim": (1, 1 << 13),  # 1536
    "layers": (1, 256),  # 56; a ResNet has one number per stage
    "width": (1, 1 << 14),  # 1792
    "mlp_ratio": (0, 64),  # 8.6
    "head_width": (1, 1 << 12),  # 112
    "patch_size": (1, 512),  # 32
    "image_size": (1, 1 << 12),  # 512
    "size": (1, 1 << 12),  # 512
    "attn_pooler_queries": (1, 1 << 14),  # 256
    "attn_pooler_heads": (1, 512),  # 8
    "context_length": (1, 1 << 13),  # 77
    "vocab_size": (1, 1 << 22),  # 901,629
    "heads": (1, 512),  # 20
    "dim_head": (1, 1 << 12),  # 64
    "n_queries": (1, 1 << 14),  # 256
    "pad_id": (-1, 1 << 22),  # 1
    "eos_id": (-1, 1 << 22),  # 2
}
LISTS = {"layers": (4,), "image_size": (1, 2), "size": (1, 2)}  # {setting: allowed lengths if the value is a list}
MAX_NUMBERS = 1 << 34  # parameters of a model; the largest real one has 5 billion
FREE_NUMBERS = 1 << 24  # parameters that are allowed for weights of any size


@dataclass(frozen=True)
class Backbone:
    """A checked source from which open_clip creates a model.

    Attributes:
        name: name for open_clip: one of its models, or a private folder as "local-dir:path".
        weights: file of the weights that open_clip loads; None if there is no file.
        huggingface: True for a tokenizer of transformers, False for open_clip's tokenizer.
        folder: private folder with the checked files; deleted when the context ends.
        settings: further arguments of ``open_clip.create_model``.
    """

    name: str
    weights: Path | None
    huggingface: bool
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def checked_backbone(name: str, *, cache_dir: str | Path | None = None) -> Iterator[Backbone]:
    """Context with a checked copy of a backbone's files in a private folder. The weights are linked, not read.

    Args:
        name: "hf-hub:org/repo" or "local-dir:path". From a repository, the configuration is downloaded and checked
            first; the other files follow from the same commit.
        cache_dir: folder of downloads; None takes Hugging Face's default.

    Yields:
        The backbone, for open_clip.

    Raises:
        FileNotFoundError: the folder or its configuration does not exist.
        ValueError: a file is damaged or asks for more than a network and a vocabulary; the message names file and key.
        RuntimeError: the backbone has no weights, or a download failed.
    """
    with scratch_folder() as folder:
        if name.startswith(FOLDER):
            source = Path(name.removeprefix(FOLDER))
            if not source.is_dir():
                raise FileNotFoundError(
                    f"name must be {FOLDER} and the path of a folder, got {name!r}, which is no folder"
                )
            config = _check_config(source / CONFIG)
            find_tokenizer, find_weights = (lambda named: source), (lambda: _find_weights(source))
            find_text_model = partial(_own_text_model, source)
        else:
            repo = name.removeprefix(HUB)
            file = _download(repo, CONFIG, cache_dir=cache_dir)
            config = _check_config(file)
            commit = file.parent.name if file.parent.parent.name == "snapshots" else None
            find_tokenizer = partial(_download_tokenizer, repo, commit, file, cache_dir=cache_dir)
            find_weights = partial(_download, repo, *HUB_WEIGHTS, revision=commit, cache_dir=cache_dir)
            find_text_model = partial(_download_text_model, repo, commit, cache_dir=cache_dir)
        text = config["model_cfg"]["text_cfg"]
        named, numbers = text.get("hf_tokenizer_name"), None
        if named:  # checked before the weights are downloaded
            copy_tokenizer(find_tokenizer(named), folder)
        if text.get("hf_model_name"):
            made, numbers = copy_text_model(find_text_model(text["hf_model_name"]), folder)
            text.update(made)
        weights = find_weights()
        _check_size(config["model_cfg"], numbers, weights, name)
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        os.symlink(weights.absolute(), folder / HUB_WEIGHTS[weights.suffix != ".safetensors"])
        yield Backbone(f"{FOLDER}{folder}", weights, bool(named), folder)


@contextmanager
def described_text_model(named: str, model: str, *, cache_dir: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Context with the checked configuration of a Hugging Face text model, in a private folder.

    Args:
        named: name of the text model on the Hub.
        model: name of the open_clip model that contains the text model, for errors.
        cache_dir: folder of downloads; None takes Hugging Face's default.

    Yields:
        Settings for ``text_cfg`` with which open_clip builds the text model without separate weights.
    """
    try:
        file = _download(named, TEXT_CONFIG, cache_dir=cache_dir)
    except RuntimeError as error:
        raise RuntimeError(
            f"the text model of {model!r} needs the configuration of {named!r} from the Hub: {error}"
        ) from error
    with scratch_folder() as folder:
        yield copy_text_model(file, folder)[0]


def copy_text_model(file: Path, folder: Path) -> tuple[dict[str, Any], int]:
    """Check and copy a text model's configuration; return settings that name the copy, and the parameter count."""
    settings = check_text_model(file)
    numbers, place = count_numbers(settings, file), folder / "text-model"
    place.mkdir()
    (place / TEXT_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    return {"hf_model_name": str(place), "hf_model_pretrained": False}, numbers


# -- the configuration -------------------------------------------------------------------------------------------------


def _check_config(file: Path) -> dict[str, Any]:
    """Check a configuration and return the parts for open_clip."""
    content = read_json(file)
    model = _section(content, "model_cfg", MODEL, file)
    vision = _section(model, "model_cfg.vision_cfg", VISION, file)
    text = _section(model, "model_cfg.text_cfg", TEXT, file)
    sections = {"model_cfg": model, "model_cfg.vision_cfg": vision, "model_cfg.text_cfg": text}
    where = f"{file}: model_cfg"
    if "multimodal_cfg" in model:
        sections["model_cfg.multimodal_cfg"] = _section(model, "model_cfg.multimodal_cfg", DECODER, file)
    if text.get("hf_model_name"):
        _check_repository(text["hf_model_name"], f"{where}.text_cfg.hf_model_name")
    else:
        text.pop("hf_model_name", None)  # even an empty value makes open_clip build another class
    trunk = vision.get("timm_model_name")
    if trunk is not None and not (
        isinstance(trunk, str) and re.fullmatch(r"\w+(\.\w+)?", trunk) and timm.is_model(trunk)
    ):
        raise ValueError(f"{where}.vision_cfg.timm_model_name must be a built-in model of timm, got {brief(trunk)}")
    if text.get("tokenizer_mode") not in TOKENIZER_MODES:
        raise ValueError(
            f"{where}.text_cfg.tokenizer_mode must be one of {TOKENIZER_MODES}, got {brief(text['tokenizer_mode'])}"
        )
    named = text.get("hf_tokenizer_name")
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{where}.text_cfg.hf_tokenizer_name must be a name, got {brief(named)}")
    kwargs = text.get("tokenizer_kwargs")
    if not isinstance(kwargs, dict | None):
        raise ValueError(f"{where}.text_cfg.tokenizer_kwargs must be an object, got {brief(kwargs)}")
    for key, value in (kwargs or {}).items():
        check_tokenizer_setting(key, value, f"{where}.text_cfg.tokenizer_kwargs.{key}")
    for name, section in sections.items():
        for key, value in section.items():
            if key not in ("vision_cfg", "text_cfg", "multimodal_cfg", "tokenizer_kwargs"):
                _check_setting(key, value, f"{file}: {name}.{key}")
    text["tokenizer_kwargs"] = kwargs or {}
    checked = {"model_cfg": {**model, "vision_cfg": vision, "text_cfg": text}}
    if "preprocess_cfg" in content:
        preprocess = content["preprocess_cfg"]
        if not isinstance(preprocess, dict):
            raise ValueError(f"{file}: preprocess_cfg must be an object, got {brief(preprocess)}")
        checked["preprocess_cfg"] = {key: value for key, value in preprocess.items() if key in PREPROCESS}
        for key, value in checked["preprocess_cfg"].items():
            _check_setting(key, value, f"{file}: preprocess_cfg.{key}")
    return checked


def _check_setting(key: str, value: Any, where: str) -> None:
    check_plain(value, where, nested=key in KWARGS)
    if key in KWARGS and isinstance(value, dict) and not value.keys() <= KWARGS[key]:
        raise ValueError(f"{where} must have {', '.join(sorted(KWARGS[key]))} alone, got {', '.join(value)}")
    if key in BOUNDS and value is not None:
        least, most = BOUNDS[key]
        numbers: list[Any] = value if isinstance(value, list) and len(value) in LISTS.get(key, ()) else [value]
        kinds = (int, float) if key == "mlp_ratio" else (int,)
        if any(type(number) not in kinds for number in numbers) or not least <= min(numbers) <= max(numbers) <= most:
            raise ValueError(f"{where} must be from {least} to {most:,}, got {brief(value)}")


def _check_size(model: dict[str, Any], text_model: int | None, weights: Path, name: str) -> None:
    """Raise ValueError for a network that is far larger than its weight file, before memory is allocated.

    Args:
        model: the checked ``model_cfg``.
        text_model: number of parameters of a Hugging Face text model, which replaces open_clip's text tower, or None.
        weights: file of the weights.
        name: name of the backbone, for errors.
    """
    text, vision = CLIPTextCfg(**_known(model["text_cfg"])), CLIPVisionCfg(**_known(model["vision_cfg"]))
    numbers = text_model
    if numbers is None:
        numbers = text.width * (text.vocab_size + text.context_length + (model.get("embed_dim") or 0))
        numbers += _block_numbers(text.layers, text.width, text.mlp_ratio)
    if "multimodal_cfg" in model:
        decoder = MultimodalCfg(**_known(model["multimodal_cfg"]))
        numbers += decoder.width * (text.vocab_size + decoder.context_length)  # its output has the vocabulary
        numbers += 2 * _block_numbers(decoder.layers, decoder.width, decoder.mlp_ratio)  # attends to texts and images
    if not vision.timm_model_name:  # timm's networks have fixed sizes
        sides: Any = vision.image_size if isinstance(vision.image_size, list) else [vision.image_size]
        if isinstance(vision.layers, int):
            places = (sides[0] // vision.patch_size) * (sides[-1] // vision.patch_size)
            numbers += vision.width * (places + 3 * vision.patch_size**2)
        else:
            numbers += (sides[0] // 32) * (sides[-1] // 32) * vision.width * 32
        numbers += _block_numbers(vision.layers, vision.width, vision.mlp_ratio)
    stored = weights.stat().st_size
    if numbers > min(MAX_NUMBERS, max(4 * stored, FREE_NUMBERS)):
        raise ValueError(
            f"{CONFIG} of {name!r}: model_cfg must describe the network of its weights, got one of at least "
            f"{numbers:,.0f} parameters for {weights.name} of {stored:,} bytes"
        )


def _known(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def _block_numbers(layers: int | Sequence[int], width: int, mlp_ratio: float) -> float:
    """Lower bound of the number of parameters in the blocks of a transformer or a ResNet."""
    if isinstance(layers, int):
        return layers * width**2 * (4 + 2 * mlp_ratio)
    return sum(count * (width << stage) ** 2 * 9 for stage, count in enumerate(layers))


def _section(parent: Mapping[str, Any], name: str, allowed: frozenset[str], file: Path) -> dict[str, Any]:
    section = parent.get(name.rpartition(".")[2])
    if not isinstance(section, dict):
        raise ValueError(f"{file}: {name} must be an object, got {brief(section)}")
    for key in section:
        if key not in allowed:
            raise ValueError(f"{file}: {name}.{key} must be absent: a downloaded backbone may not have this setting")
    return dict(section)


# -- weights and downloads ---------------------------------------------------------------------------------------------


def _find_weights(folder: Path) -> Path:
    found = sorted(
        file for pattern in ("*.safetensors", "*.bin", "*.pth") for file in folder.glob(pattern) if file.is_file()
    )
    if not found:
        raise RuntimeError(f"{folder} must hold weights, such as {FOLDER_WEIGHTS[0]}, got no file that could be loaded")
    order = {name: position for position, name in enumerate(FOLDER_WEIGHTS)}
    return min(found, key=lambda file: (order.get(file.name, len(order)), file.suffix != ".safetensors"))


def _download(repo: str, *names: str, revision: str | None = None, cache_dir: str | Path | None) -> Path:
    """Path of the first of these files that the repository has, downloaded."""
    reason: Exception | None = None
    away: LocalEntryNotFoundError | None = None  # without a network the files of the repository are unknown
    for name in names:
        try:
            local = away is not None  # each failed connection takes half a minute
            found = hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir, local_files_only=local)
            return Path(found)
        except LocalEntryNotFoundError as error:
            away = away or error
        except EntryNotFoundError as error:
            reason = error
        except Exception as error:  # the HTTP library has its own types of error
            raise _not_downloaded(f"{name} of {HUB}{repo}", error) from None
    if away is not None:
        raise _not_downloaded(f"{' or '.join(names)} of {HUB}{repo}", away) from None
    raise RuntimeError(f"{HUB}{repo} must have {' or '.join(names)}, got none: {reason}") from reason


def _download_tokenizer(
    repo: str, commit: str | None, config: Path, name: str, *, cache_dir: str | Path | None
) -> Path:
    """Folder of the downloaded tokenizer files: from the backbone's commit, or from the repository ``name``."""
    _check_repository(name, f"{config}: model_cfg.text_cfg.hf_tokenizer_name")
    revision = commit if name == repo else None
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=list(TOKENIZER_FILES))
        )
    except Exception as error:  # the HTTP library has its own types of error
        raise _not_downloaded(f"the tokenizer {name!r} of {HUB}{repo}", error) from None


def _not_downloaded(what: str, error: Exception) -> RuntimeError:
    way_on = f'load a copy of the repository with "local-dir:FOLDER"; {CACHED}'
    return not_reached(f"{what} could not be downloaded", error, way_on=way_on)


def _own_text_model(folder: Path, name: str) -> Path:
    """Path of the text model's configuration in a local folder. Nothing is downloaded for a folder."""
    if not (folder / TEXT_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} must hold {TEXT_CONFIG}, the configuration of its text model, got none: copy the file from "
            f"{name!r} on the Hub, since nothing is downloaded for a folder"
        )
    return folder / TEXT_CONFIG


def _download_text_model(repo: str, commit: str | None, name: str, *, cache_dir: str | Path | None) -> Path:
    """Path of a text model's configuration, downloaded from the backbone's commit or from the repository ``name``."""
    return _download(name, TEXT_CONFIG, revision=commit if name == repo else None, cache_dir=cache_dir)


def _check_repository(name: Any, where: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{where} must be the name of a repository, such as org/name, got {brief(name)}") from error
