"""Loading any open_clip model, frozen: names, tags, local checkpoints, their preprocessing and activation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from warnings import warn

import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from mergetune.clip.backbone import FrozenClip
from mergetune.clip.backbone_files import CONFIG, Backbone, check_weights, checked_backbone, described_text_model
from mergetune.clip.precisions import PRECISIONS
from mergetune.clip.text_tower import checked_model
from mergetune.io import is_torchscript, require_regular


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    cache_dir: str | Path | None = None,
    allow_torchscript: bool = False,
) -> FrozenClip:
    """Load any open_clip model, frozen.

    No code of the model's files is run: configurations and tokenizers of "hf-hub:" and "local-dir:" may name a network
    and a vocabulary, weights may hold tensors, and of a TorchScript archive, as OpenAI publishes, the tensors are read.

    Args:
        name: an open_clip model name ("ViT-B-16-quickgelu"), "hf-hub:org/repo" or "local-dir:path".
        pretrained: open_clip's tag ("openai") or a local checkpoint; not used with "hf-hub:" and "local-dir:". A
            checkpoint does not tell its preprocessing: where all of open_clip's tags for the name share one that is not
            the default (SigLIP, MobileCLIP, CLIPA, PE), it is taken, with a warning.
        device: where the model lives.
        precision: "float32", "bfloat16" or "float16" for the weights; features are float32 always.
        cache_dir: where open_clip keeps downloads.
        allow_torchscript: run a TorchScript archive whose tensors cannot be read otherwise. It is a program: allow it
            for an author whom you would let run one.

    Raises:
        ValueError: unknown precision; no weights named; weights given twice; files that ask for more than a network, a
            vocabulary and tensors, naming the file and the key; settings of which no network can be made.
        RuntimeError: open_clip does not know the model or the tag; weights of another model; a download that failed; a
            package for its tokenizer or text model is missing.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    complete = name.startswith(("hf-hub:", "local-dir:"))
    if complete and pretrained is not None:
        raise ValueError(f"pretrained must be None when name holds the weights ({name!r}), got {pretrained!r}")
    if not complete and pretrained is None:
        raise ValueError(
            f"pretrained must name the weights of {name!r}, got None: a tag of open_clip or a local checkpoint"
        )
    published = {}
    cache_dir = None if cache_dir is None else str(cache_dir)
    if not complete:
        name = name.replace("/", "-")  # as open_clip reads names, but not in its tokenizers
        config = open_clip.get_model_config(name) or {"text_cfg": {}}
        warn_quickgelu(name, str(pretrained))
        published = _published_preprocess(name, str(pretrained))
        opened = _built_in(name, str(pretrained), config, cache_dir)
    else:
        opened = checked_backbone(name, cache_dir=cache_dir)
    with opened as source:
        state = None if source.weights is None else check_weights(source.weights, allow_torchscript=allow_torchscript)
        try:
            model = open_clip.create_model(
                source.name,
                None if complete else str(pretrained),
                device=device,
                load_weights=state is None,
                require_pretrained=state is None,
                pretrained_text=False,  # a text model's own weights are in the CLIP's
                force_preprocess_cfg=published,
                cache_dir=cache_dir,
                **source.settings,
            )
        except AssertionError as error:  # from open_clip's resizing of position embeddings
            raise RuntimeError(f"the weights {pretrained or name} are not those of {name!r}: {error}") from error
        except Exception as error:  # open_clip and torch raise many kinds on settings that do not fit together
            others = isinstance(error, torch.OutOfMemoryError) or "state_dict" in str(error)  # weights of another model
            if source.folder is None or others:
                raise
            reason = f"{type(error).__name__}: {str(error).replace(str(source.folder), name)}"
            raise ValueError(f"{CONFIG} of {name!r} must describe a network that can be made, got {reason}") from error
        if state is not None:
            _load_archive(model, state)
        tokenizer = _load_tokenizer(name, source, cache_dir)
    temperature = checked_model(model).logit_scale
    logit_scale = temperature.detach().clone()
    model.to(dtype=PRECISIONS[precision])
    temperature.data = logit_scale  # the temperature is not rounded: a half type would change every logit
    return FrozenClip(model, tokenizer, name if complete else f"{name}/{pretrained}")


@contextmanager
def _built_in(name: str, pretrained: str, config: Mapping[str, Any], cache_dir: str | None) -> Iterator[Backbone]:
    """One of open_clip's own models, with the weights of a tag, which are downloaded, or of a file."""
    text, settings = config["text_cfg"], {}
    with ExitStack() as stack:
        if named := text.get("hf_model_name"):  # before gigabytes are downloaded
            described = stack.enter_context(described_text_model(named, name, cache_dir=cache_dir))
            settings = {"text_cfg": {**text, **described}}
        weights = pretrained if Path(pretrained).is_file() else ""
        if tag := open_clip.get_pretrained_cfg(name, pretrained):
            try:
                weights = open_clip.download_pretrained(tag, cache_dir=cache_dir)
            except Exception as error:  # whatever a download raises
                raise RuntimeError(
                    f"the weights {pretrained!r} of {name!r} could not be downloaded: {error}"
                ) from error
        elif os.path.exists(pretrained):
            require_regular(pretrained)
        huggingface = bool(text.get("hf_tokenizer_name"))
        yield Backbone(name, Path(weights) if weights else None, huggingface, settings=settings)


def _load_archive(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what a TorchScript archive holds: a state dict, and buffers that no state dict has."""
    described = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's
    described |= {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    model.load_state_dict({k: v.float() for k, v in state.items() if k not in described})


def _load_tokenizer(name: str, source: Backbone, cache_dir: str | None) -> Callable[..., Tensor]:
    options = {"trust_remote_code": False} if source.huggingface else {}  # transformers would ask at the terminal
    try:
        tokenizer = open_clip.get_tokenizer(source.name, cache_dir=cache_dir, **options)
        _, _, cat, dog = tokenizer(
            ["a photo of a cat, 2 dogs' and  so on.\n", "", "cat", "dog"]
        )  # what fails, fails here
    except ImportError as error:  # open_clip does not ask for transformers itself
        raise RuntimeError(f"the tokenizer of {name!r} needs a package: pip install transformers ({error})") from error
    except BaseException as error:  # transformers raises many kinds on files that are not a tokenizer's
        panic = type(error).__name__ == "PanicException"  # of the library in Rust, and no Exception
        if not (isinstance(error, Exception) or panic):
            raise
        if panic:
            raise ValueError(
                f"tokenizer.json of {name!r} must be one that the package tokenizers understands, got: {error}"
            ) from error
        reason = str(error).replace(str(source.folder), name) if source.folder else " ".join(str(error).split())
        raise RuntimeError(f"the tokenizer of {name!r} cannot be loaded: {type(error).__name__}: {reason}") from error
    if torch.equal(cat, dog):  # transformers makes one without a word where it finds no vocabulary
        raise RuntimeError(
            f"the tokenizer of {name!r} must have a vocabulary, got one that does not tell 'cat' from 'dog': fetch its "
            "files while there is a network"
        )
    return tokenizer


def warn_quickgelu(name: str, pretrained: str) -> None:
    """Warn when OpenAI weights from a file would meet GELU: they were trained with QuickGELU (open_clip issue 771).

    A checkpoint does not record its activation. For a tag open_clip warns itself; a file passes in silence.
    """
    path = Path(pretrained)
    if not path.is_file() or name.endswith("-quickgelu") or f"{name}-quickgelu" not in open_clip.list_models():
        return
    if "openai" in path.name.lower() or is_torchscript(path):
        warn(
            f"{path.name} looks like OpenAI's weights, which were trained with QuickGELU, but {name!r} uses GELU: "
            f"features would be silently wrong. Load it as {name + '-quickgelu'!r}.",
            stacklevel=3,
        )


def _published_preprocess(name: str, pretrained: str) -> dict[str, Any]:
    """The preprocessing that a local checkpoint needs: what all tags of the model share, if it is not the default."""
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
        f"{Path(pretrained).name} does not tell its preprocessing; taken as for open_clip's own {name!r}: {settings}",
        stacklevel=3,
    )
    return cfg
