"""Weight files of backbones: checked before open_clip opens them, and taken out of what trainers put around weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune.io import (
    OWNERS,
    inner_state,
    is_torchscript,
    load_tensors_only,
    open_regular,
    read_safetensors,
    read_torchscript,
    require_regular,
    unwrapped,
)


def check_weights(file: str | Path, *, allow_torchscript: bool = False) -> dict[str, Tensor] | None:
    """Check that a weight file holds only tensors, before open_clip opens the file.

    Args:
        file: path of the weights.
        allow_torchscript: run a TorchScript archive if its tensors cannot be read otherwise.

    Returns:
        None if open_clip can read the file: .safetensors, .npz, or a pickle of tensors only. For a TorchScript archive,
        as OpenAI publishes them, and for weights in wrappers that open_clip does not know, the state dict.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the path is no regular file; a pickle contains code; the tensors of a TorchScript archive cannot be
            read without running it, and ``allow_torchscript`` is False.
    """
    file = Path(file)
    require_regular(file)
    if file.suffix in (".npz", ".npy"):
        return None
    if file.suffix == ".safetensors":
        return _out_of_wrappers(read_safetensors(file))
    if not is_torchscript(file):
        return _out_of_wrappers(load_tensors_only(file, mmap=True))
    try:
        return read_torchscript(file)
    except ValueError as error:
        if not allow_torchscript:
            raise ValueError(
                f"{error}; allow_torchscript=True (on the command line --allow-torchscript) runs the archive, which is "
                "as safe as running a program of its author"
            ) from error
    with open_regular(file) as stream:
        return torch.jit.load(stream, map_location="cpu").state_dict()


def _out_of_wrappers(content: Any) -> dict[str, Tensor] | None:
    """The weights without the dicts and prefixes of trainers; None if open_clip itself takes off what is there."""
    keys, state = inner_state(content)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        return None
    names = unwrapped([name for name, value in state.items() if isinstance(value, Tensor)], OWNERS)
    prefix = next((own.removesuffix(name) for name, own in names.items()), "")
    if keys in ((), ("state_dict",)) and prefix in ("", "module."):
        return None
    return {name: state[own] for name, own in names.items()}
