"""Reading of tensors from other projects' .pt, .npz and .safetensors files, without running pickled code."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from mergetune.io.files import require_regular
from mergetune.io.numpy_pickles import read_object_array
from mergetune.io.pickled_modules import load_tensors_only
from mergetune.io.sentences import named, names_file, reason
from mergetune.io.tensor_budgets import require_unpacked
from mergetune.io.unpickling import Inert

EXTRAS = ("classes_", "classnames", "scale", "normalize", "logit_scale")  # metadata of a head beside weight and bias


class _Forgetful(Inert):
    """An inert object that drops its state: the state of an optimiser is as large as the model."""

    def __setstate__(self, _: Any) -> None: ...


_numpy_scalar = np.float64().__reduce__()[0]  # function in pickles of numpy scalars; its name differs in numpy 1 and 2


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


# Dassl saves its scheduler as an object that holds the optimiser. Inert objects replace both.
_ALLOWED = [
    *(
        (_Forgetful, name)
        for name in (
            "torch.optim.sgd.SGD",
            "torch.optim.adam.Adam",
            "torch.optim.adamw.AdamW",
            "torch.optim.lr_scheduler.CosineAnnealingLR",
            "torch.optim.lr_scheduler.StepLR",
            "torch.optim.lr_scheduler.MultiStepLR",
            "dassl.optim.lr_scheduler.ConstantWarmupScheduler",
            "dassl.optim.lr_scheduler.LinearWarmupScheduler",
        )
    ),
    (_plain_dict, "collections.defaultdict"),  # torch's unpickler fills plain dicts only
    (dict, "builtins.dict"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


def read_safetensors(file: Path) -> dict[str, Any]:
    """The memory-mapped tensors of a file by name, and the entries of its metadata that describe a head."""
    content: dict[str, Any] = {}
    require_regular(file)
    try:
        with safe_open(file, "pt") as opened:
            for key, text in (opened.metadata() or {}).items():
                if key.rpartition(".")[2] in EXTRAS:
                    content[key] = json.loads(text)
            return content | {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors, json and torch raise several kinds
        raise ValueError(f"{file} cannot be read as .safetensors: {reason(error)}") from error


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name. Pickled objects and zip bombs raise ValueError."""
    require_regular(file)
    try:
        with np.load(file, allow_pickle=False) as opened:
            entries = opened.zip.infolist()
            require_unpacked(sum(entry.file_size for entry in entries), file.stat().st_size)
            for entry in entries:
                _check_array(opened.zip, entry)
            return {name: _member(opened, name) for name in opened.files}
    except Exception as error:  # numpy and zipfile raise many kinds on damaged files
        raise ValueError(f"{file} cannot be read as .npz: {reason(error)}") from error


def _check_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Raises ValueError for an array whose header states more numbers than the entry holds: numpy allocates them."""
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    if math.prod(shape) * dtype.itemsize > entry.file_size and not dtype.hasobject:
        raise ValueError(f"{named(entry.filename)} must hold the numbers of its shape {list(shape)[:8]}, got fewer")


def _member(opened: Any, name: str) -> np.ndarray:
    """An array of an open .npz file; one of Python objects is read without running its pickle."""
    try:
        return opened[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        entry = f"{name}.npy" if f"{name}.npy" in opened.zip.namelist() else name
        with opened.zip.open(entry) as stream:
            return read_object_array(stream, entry, stored=opened.zip.getinfo(entry).compress_size)


def load_tensors(file: Path) -> dict[str, Any]:
    """:func:`load_torch` for a file that must hold a dict."""
    content = load_torch(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dict, got {type(content).__name__}")
    return content


@names_file("file")
def load_torch(file: Path, *, mmap: bool = False) -> Any:
    """:func:`mergetune.io.load_tensors_only` for checkpoints, which may also hold optimisers and numpy scalars.

    Optimisers and schedulers become inert objects without state.
    """
    return load_tensors_only(file, mmap=mmap, allowed=_ALLOWED)
