"""Reading of tensors from pickled modules and checkpoints without running code from the file.

WiSE-FT saves classifiers with ``pickle.dump``, others save modules with ``torch.save``. Every tensor of such a file is
read, left out and named, or refused by name: none is lost without a word.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.facts.brief import brief
from mergetune.io.atomic_files import write_atomically
from mergetune.io.dtypes import STORED_NAMES, dtype_name
from mergetune.io.files import open_regular, require_file, require_regular
from mergetune.io.locks import writing_to
from mergetune.io.pickled_contents import Contents, contents_of
from mergetune.io.sentences import listing, named, names_file, reason
from mergetune.io.tensor_budgets import require_budget, require_stored, tensor_views
from mergetune.io.tensor_pickles import make_tensors, unpickle
from mergetune.io.torchscript import is_torchscript, read_script, read_torchscript


@brief()
@dataclass(frozen=True)
class Converted:
    """What :func:`convert_module` wrote.

    Attributes:
        names: the names of the tensors in the file.
        numbers: how many numbers the tensors have.
        left_out: tensors that were not written, in words, such as "optimizer (4 tensors): optimiser state".
    """

    names: tuple[str, ...]
    numbers: int
    left_out: tuple[str, ...]


def read_module(file: str | Path, *, only: str | None = None, everything: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module, or of dicts of modules and tensors, by their dotted names.

    Names have neither the keys of the dicts around the weights ("state_dict", "model") nor the prefixes of wrappers
    ("module.", "_orig_mod."). Tensors in lists, sets, tuples and other objects are named by their places. Arrays and
    scalars of numpy are read as tensors.

    Args:
        file: file that ``pickle.dump`` or ``torch.save`` wrote, in torch's zip format or the older format, or a
            TorchScript archive.
        only: name of a submodule, such as "classification_head", whose tensors alone are returned, by their names in
            the submodule. Other tensors are not read if the format allows.
        everything: also read what is no weight: the states of optimisers and schedulers, what stands beside the
            weights, non-persistent buffers, and tensors that are plain attributes of modules.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a pickled module, holds no tensors (of ``only``), or its tensors are much larger
            than the file because they repeat its numbers. Or a tensor cannot be read (sparse, quantised, on the device
            meta, a subclass without plain numbers); the message names it.
    """
    return _read(Path(file), only, everything)[0]


@names_file("file")
def convert_module(
    file: str | Path, out: str | Path, *, only: str | None = None, everything: bool = False
) -> Converted:
    """Writes the tensors of a pickled module to a .safetensors file, which ``Head.from_checkpoint`` reads.

    ``file``, ``only`` and ``everything`` are those of :func:`read_module`. A module's attribute ``normalize`` (in
    WiSE-FT: whether the head scales its inputs to unit norm) is stored in the metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: see :func:`read_module`; ``out`` is no .safetensors file, or such files have no such dtype.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"out must be a .safetensors file, got {out}")
    tensors, found = _read(Path(file), only, everything)
    if other := [name for name, tensor in tensors.items() if dtype_name(tensor.dtype) not in STORED_NAMES]:
        raise ValueError(
            f"{file}: {other[0]!r} must be {', '.join(STORED_NAMES)}, got {dtype_name(tensors[other[0]].dtype)}; only "
            "(--only) takes another part of the file"
        )
    flags = {name: json.dumps(flag) for name, flag in found.flags.items()}
    with writing_to(out):
        write_atomically(out, serialize(tensors, metadata=flags))
    return Converted(tuple(tensors), sum(tensor.numel() for tensor in tensors.values()), found.left_out())


def load_tensors_only(file: str | Path, *, mmap: bool = False, allowed: Sequence[Any] = ()) -> Any:
    """``torch.load`` with ``weights_only=True``, which raises ValueError for every refused file.

    Args:
        file: file in torch's zip format or the older format. A TorchScript archive is read with
            :func:`read_torchscript`.
        mmap: memory-map the tensors of a file in zip format; damaged numbers are then not detected.
        allowed: further types that the file may hold, see ``torch.serialization.safe_globals``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a regular file, is damaged, holds more than tensors and plain values, or its tensors
            are much larger than the file because they repeat its numbers.
    """
    require_regular(file)
    if is_torchscript(file):
        return read_torchscript(file)
    try:
        zipped = zipfile.is_zipfile(file)
        if zipped:
            require_stored(file)
        misnamed = os.fspath(file).endswith(".safetensors")  # torch reads a path of this ending as safetensors
        with torch.serialization.safe_globals(list(allowed)), open_regular(file) as stream:
            source = stream if misnamed else file
            mapped = mmap and zipped and not misnamed
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        require_budget(list(tensor_views(content)), os.stat(file).st_size)
        return content
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        detail = named((re.search(r"WeightsUnpickler error:\s*(.*)", str(error)) or ("", ""))[1])  # without the advice
        what = f"an object of {named(found[1])}" if found else f"more than tensors ({detail or 'a pickle'})"
        raise ValueError(
            f"{file} cannot be read as a checkpoint: it holds {what}, and pickled code is never run"
        ) from error
    except Exception as error:  # torch.load raises many kinds on files that are not checkpoints
        raise ValueError(f"{file} cannot be read as a checkpoint: {reason(error)}") from error


def _read(file: Path, only: str | None, everything: bool) -> tuple[dict[str, Tensor], Contents]:
    require_file(file, f"file must be a pickled module, got {file}, which does not exist")
    try:
        found = contents_of(*read_script(file)) if is_torchscript(file) else contents_of(unpickle(file))
        found = found.below(only) if only is not None else found
        found = found.with_rest() if everything else found
        tensors = make_tensors(found.leaves(), file.stat().st_size)
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(f"{file} cannot be read as a pickled module: {reason(error)}") from error
    if not tensors:
        there = listing(found.all_names)
        raise ValueError(f"{file} must hold tensors{f' of {only}' if only else ''}, got {there}")
    return tensors, found
