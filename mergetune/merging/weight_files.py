"""Checkpoints of whole models as state dicts: safetensors, torch.save, shards and folders, without their wrappers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mergetune.io import (
    AVERAGED,
    MAX_VOCABULARY,
    PLAIN,
    STORED_NAMES,
    dtype_name,
    inner_state,
    load_torch,
    named,
    names_file,
    not_plain,
    open_regular,
    read_json,
    read_regular,
    unwrapped,
    write_atomically,
)
from mergetune.merging.sources import Source, StateDict, TensorFile, View, source

INDEX = ".index.json"
FOLDER_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "open_clip_pytorch_model.bin",
    "adapter_model.bin",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
"""Names of weights in a folder, in the order in which they are looked for; otherwise the folder holds one file."""

ONE_FILE = ("ema_model.", "online_model.")  # prefixes of the average and of the weights in one dict

DESCRIPTION = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's archives, no weights


@names_file("path")
def open_weights(path: str | Path, *, ema: bool = False) -> StateDict:
    """Opens the weights of a model in a file or folder as a state dict. Nothing in the file is run.

    Safetensors files are read when their tensors are used; other files are mapped into memory. The prefixes that
    DistributedDataParallel ("module.") and torch.compile ("_orig_mod.") put before names are removed.

    Args:
        path: a safetensors file, a file of ``torch.save``, the index of a sharded checkpoint (``*.index.json``), or a
            folder with one of these.
        ema: take the moving average of the weights from a file that holds both. By default the weights are taken, and
            their average only from a file that holds nothing else.

    Raises:
        FileNotFoundError: the path, a shard or the weights of a folder do not exist.
        ValueError: the file is damaged or holds more than tensors; a tensor is sparse, quantised or of a dtype that
            safetensors files do not have; there is no average with ``ema``; or it is unclear which weights are meant.

    Example:
        >>> import mergetune as mt
        >>> weights = mt.merging.open_weights(f"{mt.__path__[0]}/assets/icon-clip")
        >>> weights["positional_embedding"].shape
        torch.Size([32, 128])
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} must be a file or folder of weights, got no such file")
    if path.is_dir():
        path = weights_in(path)
    averaged = False
    if path.name.endswith(INDEX):
        state = _sharded(path)
    elif path.suffix == ".safetensors" or _is_safetensors(path):
        state = TensorFile(path)
    else:
        state, averaged = _torch_file(path, ema)
    prefixes = {prefix for prefix in ONE_FILE if any(name.startswith(prefix) for name in state)}
    if ONE_FILE[0] in prefixes:  # one dict holds both models
        averaged = ema or len(prefixes) == 1
        state = _inside(state, ONE_FILE[not averaged], path)
    if ema and not (averaged or "n_averaged" in state):
        raise ValueError(f"{path} must hold a moving average of the weights, got weights only: leave out ema (--ema)")
    plain = unwrapped(list(state))
    if all(name == own for name, own in plain.items()):
        return state
    return View({name: partial(source, state, own) for name, own in plain.items()}, title=str(path))


def _inside(state: StateDict, prefix: str, path: Path) -> StateDict:
    """The tensors whose names begin with a prefix, without the prefix."""
    found = {name: partial(source, state, name) for name in state if name.startswith(prefix)}
    return View({name.removeprefix(prefix): make for name, make in found.items()}, title=str(path))


def weights_in(folder: Path) -> Path:
    """The file of a folder that holds the weights: one of ``FOLDER_WEIGHTS``, or the only one of its kind.

    Raises:
        FileNotFoundError: the folder holds no weights.
        ValueError: the folder holds several files of weights, none of which has a known name.
    """
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    for pattern in (f"*{INDEX}", "*.safetensors", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:4])
            raise ValueError(f"{folder} must hold the weights of one model, got {len(found)} files: {names}; name one")
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} must hold weights, such as {FOLDER_WEIGHTS[0]}, got none")


HEAD_FACTS = ("classes_", "classnames", "scale", "normalize", "logit_scale")
"""Entries beside the tensors of a linear head, which say what its rows and numbers mean."""

FEW = 8  # most tensors of a file that may be a head


def refuse_other_heads(files: Sequence[str | Path], states: Sequence[StateDict]) -> None:
    """Raises ValueError if files are heads whose rows stand for other classes, or whose scales differ.

    The tensors alone would be merged row by row, whatever the rows stand for.
    """
    found = [_head_facts(Path(file), state) for file, state in zip(files, states, strict=True)]
    for file, facts in zip(files, found, strict=True):
        for name in HEAD_FACTS:
            if facts.get(name) != found[0].get(name):
                raise ValueError(
                    f"expert_files must be heads of the same classes in the same order and of the same scale, got "
                    f"another {name} in {file} than in {files[0]}: mergetune.merge_solutions (on the command line "
                    "`mergetune merge`) merges heads by class name"
                )


def _head_facts(path: Path, state: StateDict) -> dict[str, Any]:
    """The entries of ``HEAD_FACTS`` in a file; empty for files that are no heads."""
    if len(state) > FEW or not path.is_file() or path.name.endswith(INDEX):
        return {}
    if isinstance(state, TensorFile):
        metadata = json.loads(state.header[8:]).get("__metadata__", {})
        return {name: metadata[name] for name in HEAD_FACTS if name in metadata}
    if _is_safetensors(path):
        return _head_facts(path, TensorFile(path))
    content = load_torch(path, mmap=True)
    found = {name: content[name] for name in HEAD_FACTS if name in content} if isinstance(content, Mapping) else {}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in found.items()}


SETTINGS = (
    "open_clip_config.json", "config.json", "adapter_config.json", "preprocessor_config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip
"""Files beside the weights of a folder that describe the model and its tokenizer."""


def copy_settings(folder: Path, out: Path) -> None:
    """Copies the files of ``SETTINGS`` that a folder has into another folder."""
    for name in SETTINGS if folder.resolve() != out.resolve() else ():
        if (folder / name).is_file():
            write_atomically(out / name, read_regular(folder / name, limit=MAX_VOCABULARY))


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do, whatever its name is."""
    with open_regular(path) as stream:
        start, size = stream.read(9), os.fstat(stream.fileno()).st_size
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _sharded(index: Path) -> StateDict:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(
            f"{index} must hold a weight_map from the names of tensors to files, got {type(places).__name__}"
        )
    shards: dict[str, StateDict] = {}
    for file in sorted(set(places.values())):
        if file != Path(file).name or file in ("", ".", "..") or file.endswith(INDEX):
            raise ValueError(f"{index}: weight_map must name files of the same folder, got {named(file)!r}")
        if not os.path.isfile(index.parent / file):  # also of a name that is too long for the system
            raise FileNotFoundError(f"{index} needs the shard {named(file)}, which does not exist in {index.parent}")
        shards[file] = _read_shard(index.parent / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise ValueError(f"{index}: {file} must hold {named(name)!r}, got no such tensor")
    found = {name: partial(source, shards[file], name) for name, file in places.items()}
    return View(_aligned(found), title=str(index))


def _read_shard(path: Path) -> StateDict:
    return TensorFile(path) if _is_safetensors(path) else _torch_file(path, ema=False)[0]


def _torch_file(path: Path, ema: bool) -> tuple[StateDict, bool]:
    """The state dict in a file of ``torch.save``, and whether its weights are a moving average."""
    content = load_torch(path, mmap=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold the weights of a model, a dict of tensors, got {type(content).__name__}")
    state, averaged = _chosen(content, path, ema)
    for name, tensor in state.items():
        if kind := not_plain(tensor):
            raise ValueError(f"{path}: {named(name)!r} must be a tensor of plain numbers, got {kind}")
        if dtype_name(tensor.dtype) not in STORED_NAMES:
            raise ValueError(
                f"{path}: {named(name)!r} must be {', '.join(STORED_NAMES)}, got {dtype_name(tensor.dtype)}"
            )
    return View(_aligned({name: partial(source, state, name) for name in state}), title=str(path)), averaged


def _aligned(found: Mapping[str, Callable[[], Source]]) -> dict[str, Callable[[], Source]]:
    """The tensors, those of wide dtypes first: a file in this order holds every number at a multiple of its size."""
    return dict(sorted(found.items(), key=lambda item: -item[1]().dtype.itemsize))


def _chosen(content: Mapping[Any, Any], path: Path, ema: bool) -> tuple[dict[str, Tensor], bool]:
    """The state dict in the content of a file, and whether it lies under the key of a moving average."""
    averaged, found, top = _below(content, AVERAGED), _below(content, PLAIN), _tensors(content)
    if found is None and (averaged is None or any(tensor.numel() > 1 for tensor in top.values())):
        found = top or None  # single numbers beside an average count steps
    if averaged is not None and (ema or found is None):
        return averaged, True
    if found is None:
        raise ValueError(
            f"{path} must hold tensors by name, at the top or in one of {', '.join(PLAIN)}, got {_keys(content)}"
        )
    return found, False


def _below(content: Mapping[Any, Any], keys: Collection[str]) -> dict[str, Tensor] | None:
    """The tensors under the first of these keys that has some."""
    for key in keys:
        inside = content.get(key)
        if isinstance(inside, Mapping):
            found = _tensors(inside) or _tensors(inner_state(inside)[1])
            if found:
                return found
    return None


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a dict by their names; other entries, such as the number of the epoch, are left out."""
    if not isinstance(content, Mapping):
        return {}
    return {
        name: tensor
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, Tensor) and name not in DESCRIPTION
    }


def _keys(content: Mapping[Any, Any]) -> str:
    shown = ", ".join(repr(key)[:40] for key in list(content)[:6])
    return f"the keys {shown}{', ...' if len(content) > 6 else ''}" if content else "an empty dict"
