"""load_clip: any open_clip model, frozen, from a name and tag, a local checkpoint, a folder or the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast
from warnings import warn

import open_clip
import torch
from open_clip import CLIP
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from mergetune.clip.backbone import FrozenClip, weights_fingerprint
from mergetune.clip.backbone_files import CONFIG, Backbone, checked_backbone, described_text_model
from mergetune.clip.backbone_weights import check_weights
from mergetune.clip.precisions import PRECISIONS
from mergetune.clip.text_tower import checked_model
from mergetune.facts.backbones import ICON_CLIP, spelled
from mergetune.io import CACHED, is_torchscript, not_reached, quiet_retries, reason, require_regular, unreachable


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    cache_dir: str | Path | None = None,
    allow_torchscript: bool = False,
) -> FrozenClip:
    """Load any open_clip model as a frozen CLIP.

    No code in the model's files is run. Configuration and tokenizer files of "hf-hub:" and "local-dir:" may only
    describe a network and a vocabulary, and weight files may only hold tensors. From a TorchScript archive, as OpenAI
    publishes them, only the tensors are read.

    Args:
        name: an open_clip model name such as "ViT-B-16-quickgelu", or "hf-hub:org/repo", or "local-dir:path", or
            "icon-clip", the small CLIP that comes with mergetune. Case does not matter in names and tags.
        pretrained: an open_clip tag such as "openai", or a local checkpoint file; None with "hf-hub:", "local-dir:" and
            "icon-clip". A checkpoint does not record its preprocessing. If all of open_clip's tags for the name share
            one that is not the default (SigLIP, MobileCLIP, CLIPA, PE), that one is used, with a warning.
        device: device of the model.
        precision: dtype in which both towers compute, "float32", "bfloat16" or "float16"; features are always float32.
            The fingerprints are those of the weights before rounding, so caches and solutions fit in any precision.
        cache_dir: folder of open_clip's downloads.
        allow_torchscript: run a TorchScript archive if its tensors cannot be read otherwise. An archive is a program:
            allow this only if you trust its author.

    Raises:
        ValueError: an unknown precision, device, name or tag (the message suggests near ones); missing or doubly given
            weights, or weights that change while they are loaded; a file that asks for more than a network, a
            vocabulary and tensors (the message names file and key); settings that describe no valid network.
        RuntimeError: the weights belong to another model; a download failed; a package for the tokenizer or the text
            model is missing.

    Example:
        The small CLIP that comes with mergetune (for OpenAI's: ``mt.load_clip("ViT-B-16-quickgelu", "openai")``):

        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> clip.embed_dim, clip.device.type
        (128, 'cpu')
        >>> clip.class_embeddings(["cat", "dog"], "an icon of a {}").shape  # [C, D]
        torch.Size([2, 128])
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_device(device)
    name, weights = spelled(name, None if pretrained is None else str(pretrained))
    if name == ICON_CLIP:
        with as_file(files("mergetune") / "assets" / ICON_CLIP) as folder:
            embedded = load_clip(f"local-dir:{folder}", device=device, precision=precision)
        return replace(embedded, name=ICON_CLIP)
    published = {}
    cache_dir = None if cache_dir is None else str(cache_dir)
    if weights is None:
        opened = checked_backbone(name, cache_dir=cache_dir)
    else:
        config = open_clip.get_model_config(name) or {"text_cfg": {}}
        warn_quickgelu(name, weights)
        published = _published_preprocess(name, weights)
        opened = _built_in(name, weights, config, cache_dir)
    with quiet_retries(), opened as source, _unchanged(source.weights):
        tensors = None if source.weights is None else check_weights(source.weights, allow_torchscript=allow_torchscript)
        try:
            model = open_clip.create_model(
                source.name,
                weights,
                device=device,
                load_weights=tensors is None,
                require_pretrained=tensors is None,
                pretrained_text=False,  # the CLIP's weights include those of its text model
                force_preprocess_cfg=published,
                cache_dir=cache_dir,
                **source.settings,
            )
            if tensors is not None:
                _load_archive(model, tensors)
        except Exception as error:  # open_clip and torch raise many types of error on bad settings and weights
            # open_clip asserts when it resizes position embeddings
            if isinstance(error, AssertionError) or "state_dict" in str(error):
                what = f"the weights {weights or name} do not fit the model {name!r}"
                raise RuntimeError(f"{what}: {reason(error)}") from error
            if source.folder is None or isinstance(error, torch.OutOfMemoryError):
                raise
            said = reason(error).replace(str(source.folder), name)
            raise ValueError(f"{CONFIG} of {name!r} must describe a network that can be built, got: {said}") from error
        tokenizer = _load_tokenizer(name, source, cache_dir)
    temperature = checked_model(model).logit_scale
    logit_scale = temperature.detach().clone()
    rounded = precision != "float32"
    known = {part: weights_fingerprint(model, part) for part in ("both", "image", "text")} if rounded else {}
    model.to(dtype=PRECISIONS[precision])
    temperature.data = logit_scale  # keep the exact temperature: rounding it would change every logit
    return FrozenClip(model, tokenizer, name if weights is None else f"{name}/{weights}", fingerprints=known)


def check_device(device: str | torch.device) -> None:
    """Check that this machine has a device.

    Raises:
        ValueError: the name is not a device of torch, or this machine has no such device.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a device of torch such as cpu, cuda or cuda:1, got {device!r}") from None
    if wanted.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= there:
            has = "no GPU that torch can use" if not there else f"{there} GPU{'s' * (there > 1)}, numbered from 0"
            raise ValueError(f"device must be a device of this machine, which has {has}, got {str(device)!r}: use cpu")
    elif wanted.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device must be a device of this machine, which has no mps, got {str(device)!r}: use cpu")


@contextmanager
def _built_in(name: str, pretrained: str, config: Mapping[str, Any], cache_dir: str | None) -> Iterator[Backbone]:
    """Describe one of open_clip's built-in models, with weights from a tag (downloaded) or from a file."""
    text, settings = config["text_cfg"], {}
    with ExitStack() as stack:
        if named := text.get("hf_model_name"):  # checked before the weights, gigabytes, are downloaded
            described = stack.enter_context(described_text_model(named, name, cache_dir=cache_dir))
            settings = {"text_cfg": {**text, **described}}
        weights = pretrained if Path(pretrained).is_file() else ""
        if tag := open_clip.get_pretrained_cfg(name, pretrained):
            try:
                weights = open_clip.download_pretrained(tag, cache_dir=cache_dir)
            except Exception as error:  # downloads raise many types of error
                raise not_reached(
                    f"the weights {pretrained!r} of {name!r} could not be downloaded", error,
                    source=None if tag.get("hf_hub") else tag.get("url"),
                    way_on=f"give a checkpoint file in place of the tag (pretrained); {CACHED}",
                ) from None  # fmt: skip
        elif os.path.exists(pretrained):
            require_regular(pretrained)
        huggingface = bool(text.get("hf_tokenizer_name"))
        yield Backbone(name, Path(weights) if weights else None, huggingface, settings=settings)


@contextmanager
def _unchanged(file: Path | None) -> Iterator[None]:
    """Context manager in which a file is first checked and then loaded; None for no file.

    Raises:
        ValueError: the file was changed or replaced meanwhile, or a link to it leads elsewhere: what was loaded may not
            be what was checked.
    """
    before = None if file is None else _identity(file)
    yield
    if file is not None and _identity(file) != before:
        raise ValueError(f"{file} must not change while it is loaded, and it was changed or replaced: load it again")


def _identity(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _load_archive(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load tensors that open_clip does not read into the model, without values that are no part of a state dict."""
    state = convert_state_dict(cast(CLIP, model), dict(state))  # names of other projects, as open_clip converts them
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    described = {"input_resolution", "context_length", "vocab_size"}  # values in OpenAI's archives
    described |= {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    model.load_state_dict({k: v.float() for k, v in state.items() if k not in described})


def _load_tokenizer(name: str, source: Backbone, cache_dir: str | None) -> Callable[..., Tensor]:
    options = (
        {"trust_remote_code": False} if source.huggingface else {}
    )  # without this, transformers asks at the terminal
    try:
        tokenizer = open_clip.get_tokenizer(source.name, cache_dir=cache_dir, **options)
        _, _, cat, dog = tokenizer(
            ["a photo of a cat, 2 dogs' and  so on.\n", "", "cat", "dog"]
        )  # a tokenizer that fails, fails here
    except ImportError as error:  # open_clip does not require transformers
        raise RuntimeError(f"the tokenizer of {name!r} needs a package: pip install transformers ({error})") from error
    except BaseException as error:  # transformers raises many types of error for bad tokenizer files
        panic = (
            type(error).__name__ == "PanicException"
        )  # from the Rust library tokenizers; not a subclass of Exception
        if not (isinstance(error, Exception) or panic):
            raise
        if panic:
            raise ValueError(
                f"tokenizer.json of {name!r} must be a file that the package tokenizers can load, got: {reason(error)}"
            ) from error
        if unreachable(error):
            raise not_reached(f"the tokenizer of {name!r} could not be downloaded", error, way_on=CACHED) from None
        said = reason(error).replace(str(source.folder), name) if source.folder else reason(error)
        raise RuntimeError(f"the tokenizer of {name!r} cannot be loaded: {said}") from error
    if torch.equal(cat, dog):  # transformers returns an empty tokenizer if it finds no vocabulary
        raise RuntimeError(
            f"the tokenizer of {name!r} must have a vocabulary, got the same tokens for 'cat' and 'dog': download its "
            "files with a network connection"
        )
    return tokenizer


def warn_quickgelu(name: str, pretrained: str) -> None:
    """Warn if OpenAI weights in a file, trained with QuickGELU, go into a model with GELU (open_clip issue 771).

    A checkpoint does not record its activation. open_clip warns for tags, but not for files.

    Args:
        name: open_clip's model name.
        pretrained: tag or file of the weights.
    """
    path = Path(pretrained)
    if not path.is_file() or name.endswith("-quickgelu") or f"{name}-quickgelu" not in open_clip.list_models():
        return
    if "openai" in path.name.lower() or is_torchscript(path):
        warn(
            f"{path.name} looks like OpenAI's weights, which were trained with QuickGELU, but {name!r} uses GELU: "
            f"its features would be wrong. Load it as {name + '-quickgelu'!r}.",
            stacklevel=3,
        )


def _published_preprocess(name: str, pretrained: str) -> dict[str, Any]:
    """Preprocessing for a local checkpoint: the one that all tags of the model share if it is not the default."""
    if not Path(pretrained).is_file():
        return {}
    tags = open_clip.list_pretrained_tags_by_model(name)
    default = merge_preprocess_dict(PreprocessCfg(), {})
    shared = [merge_preprocess_dict(default, {**open_clip.get_pretrained_cfg(name, tag), "size": None}) for tag in tags]
    if not shared or shared[0] == default or any(cfg != shared[0] for cfg in shared):
        return {}
    cfg = {key: value for key, value in shared[0].items() if value != default[key]}
    settings = ", ".join(f"{key} {value}" for key, value in cfg.items())
    warn(
        f"{Path(pretrained).name} does not record its preprocessing; using that of open_clip's tags for {name!r}: "
        f"{settings}",
        stacklevel=3,
    )
    return cfg
