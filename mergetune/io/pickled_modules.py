"""Tensors of pickled modules and TorchScript archives, read without running anything that the file names.

WiSE-FT saves its classifiers with ``pickle.dump``, others save whole modules with ``torch.save``: plain unpickling
would import and run what such a file asks for. Here every name in it becomes an inert stand-in, but for the few that
describe tensors. A TorchScript archive is a program beside a pickle of its modules: here the pickle alone is read.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.io.files import MAX_WEIGHTS, open_regular, read_regular, require_file, require_regular, write_atomically
from mergetune.io.tensor_budgets import require_budget, tensor_views
from mergetune.io.unpickling import Inert, Unpickler

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch.save's format before 1.6
MAX_MODULES = 1 << 16  # of a TorchScript archive, each as often as it is used: modules that share modules can be many
MAX_CODE = 1 << 28  # bytes of a TorchScript archive's code, which is compressed


def read_module(file: str | Path, *, only: str | None = None) -> dict[str, Tensor]:
    """The parameters and buffers of a pickled module, or of dicts of modules and tensors, by their dotted names.

    Args:
        file: made by ``pickle.dump`` or ``torch.save``, in its zip format or the older one.
        only: one submodule, as "classification_head": nothing else is returned, nor read where the format allows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; no tensors in it, or none of ``only``; tensors that repeat the numbers of the file
            more than a few times.
    """
    return _read(Path(file), only)[0]


def load_tensors_only(file: str | Path, *, mmap: bool = False, allowed: Sequence[Any] = ()) -> Any:
    """``torch.load`` with ``weights_only=True``, every refusal a ValueError.

    Args:
        file: in torch's zip format or the older one. The tensors of a TorchScript archive are read as
            :func:`read_torchscript` does.
        mmap: map the tensors of a zip format into memory; damage to their numbers is not noticed then.
        allowed: types that the file may hold besides, see ``torch.serialization.safe_globals``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file, damaged, or holds more than tensors and plain values; tensors that repeat the
            numbers of the file more than a few times.
    """
    require_regular(file)
    if is_torchscript(file):
        return read_torchscript(file)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(file))
        require_budget(list(tensor_views(content)), os.stat(file).st_size)
        return content
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        detail = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))  # not the advice to run it
        what = f"an object of {found[1]}" if found else f"more than tensors ({detail[1] if detail else 'a pickle'})"
        raise ValueError(
            f"{file} cannot be read as a checkpoint: it holds {what}, and pickled code is never run"
        ) from error
    except Exception as error:  # torch.load raises many kinds on files that are not checkpoints
        advice = "weights_only" in str(error)  # to run it
        reason = "it holds more than tensors" if advice else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} cannot be read as a checkpoint: {reason}") from error


def is_torchscript(file: str | Path) -> bool:
    """Whether a file is a TorchScript archive: a zip file with code and its constants. A damaged zip file is none."""
    with open_regular(file) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                names = archive.namelist()
        except Exception:  # zipfile raises many kinds on what is no zip file, or a damaged one
            return False
    return any("/code/" in name or name.rpartition("/")[2] == "constants.pkl" for name in names)


def read_torchscript(file: str | Path) -> dict[str, Tensor]:
    """The state dict of a traced or scripted module, as ``torch.jit.load(file).state_dict()``, which runs the archive.

    Which attributes are parameters and buffers stands in the code's class headers; nothing else of it is looked at.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such an archive; one with modules that bring themselves back by code of their own; tensors that
            repeat the numbers of the file more than a few times.
    """
    with open_regular(file) as stream:
        return _read_script(stream, file)


def _read_script(stream: BinaryIO, file: str | Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(stream) as archive:
            pickled = _pickled(archive)
            content = partial(_stored, archive)
            root = _ScriptUnpickler(io.BytesIO(content(pickled)), _storages(content, pickled)).load()
            classes = _script_classes(archive, pickled.removesuffix("data.pkl") + "code/")
            leaves = dict(_walk_script(root, classes, (), iter(range(MAX_MODULES))))
            return _made(leaves, os.fstat(stream.fileno()).st_size)
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(
            f"{file} cannot be read as a TorchScript archive without running it: {type(error).__name__}: {error}"
        ) from error


def convert_module(file: str | Path, out: str | Path, *, only: str | None = None) -> list[str]:
    """Write the tensors of a pickled module as ``out``, a .safetensors file; see :func:`read_module`.

    ``Head.from_checkpoint`` reads the result. A module's own attribute ``normalize`` (WiSE-FT: whether the head scales
    its inputs to unit norm) is kept in the metadata.

    Returns:
        The names of the tensors.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"out must be a .safetensors file, got {out}")
    tensors, flags = _read(Path(file), only)
    write_atomically(out, serialize(tensors, metadata={name: json.dumps(flag) for name, flag in flags.items()}))
    return list(tensors)


def _read(file: Path, only: str | None) -> tuple[dict[str, Tensor], dict[str, bool]]:
    require_file(file, f"file must be a pickled module, got {file}, where there is no file")
    inside = "" if only is None else f"{only}."
    try:
        found = dict(_walk(_unpickle(file), set()))
        pieces = {name: leaf for name, leaf in found.items() if isinstance(leaf, _Piece)}
        tensors = _made({name: leaf for name, leaf in pieces.items() if _in(name, inside)}, file.stat().st_size)
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(f"{file} cannot be read as a pickled module: {type(error).__name__}: {error}") from error
    if not tensors:
        raise ValueError(
            f"{file} must hold tensors{f' of {only}' if only else ''}, got {', '.join(list(pieces)[:5]) or 'none'}"
        )
    return tensors, {name: leaf for name, leaf in found.items() if isinstance(leaf, bool) and _in(name, inside)}


def _in(name: str, inside: str) -> bool:
    return name.removeprefix("module.").startswith(inside)


def _walk(value: Any, seen: set[int], prefix: str = "") -> Iterator[tuple[str, _Piece | bool]]:
    """The named tensors below a value, and the attributes ``normalize`` of modules."""
    if isinstance(value, _Piece):
        yield prefix.removesuffix(".") or "weight", value
        return
    state = value.state if isinstance(value, Inert) else value
    if not isinstance(state, dict) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Inert):
        if isinstance(state.get("normalize"), bool):
            yield f"{prefix}normalize", state["normalize"]
        state = {k: v for part in ("_parameters", "_buffers", "_modules") for k, v in (state.get(part) or {}).items()}
    for name, below in state.items():
        yield from _walk(below, seen, f"{prefix}{name}.")


@dataclass(frozen=True)
class _Storage:
    """Numbers in the file, read when they are asked for."""

    dtype: torch.dtype
    count: int
    content: Callable[[], bytes]


@dataclass(frozen=True)
class _Piece:
    """A tensor that is not made yet: a view on a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize


def _made(pieces: Mapping[str, _Piece], stored: int) -> dict[str, Tensor]:
    """The tensors of a file of ``stored`` bytes, each with numbers of its own. Each storage is read once."""
    require_budget(pieces.values(), stored)
    by_storage: dict[int, list[str]] = {}
    for name, piece in pieces.items():
        by_storage.setdefault(id(piece.storage), []).append(name)
    tensors = {}
    for names in by_storage.values():
        storage = pieces[names[0]].storage
        content = bytearray(storage.content())
        numbers = torch.frombuffer(content, dtype=storage.dtype) if content else torch.empty(0, dtype=storage.dtype)
        for name in names:
            piece = pieces[name]
            tensors[name] = numbers.as_strided(piece.size, piece.stride, piece.offset).contiguous().clone()
    return {name: tensors[name] for name in pieces}


class TensorUnpickler(Unpickler):
    """Knows tensors too, each as a piece of a storage that is read when it is asked for."""

    def __init__(self, stream: io.BytesIO, load: Callable[[str], Callable[[], bytes]] | None = None) -> None:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self.rebuild_parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self.rebuild_parameter,
            ("torch.storage", "_load_from_bytes"): self.storage_from_bytes,
            ("_codecs", "encode"): self.encode,
        }
        super().__init__(stream, known | {("torch", name): dtype for name, dtype in STORAGES.items()})
        self.load_storage = load
        self.storages: dict[Any, _Storage] = {}
        self.left = (
            2 * stream.getbuffer().nbytes
        )  # bytes unpacked inside, as text and as storages: each stands there once

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")
        if pid[0] == "module":  # torch.save's older format names a module's class this way
            return Inert
        _, dtype, key, _, count, *view = pid
        if pid[0] != "storage" or not isinstance(dtype, torch.dtype) or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"a storage of a kind that is not understood: {pid!r}")
        if self.load_storage is None or not isinstance(key, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"a storage that is not there: {pid!r}")
        if (key, dtype, count) not in self.storages:
            self.storages[key, dtype, count] = _Storage(dtype, count, self.load_storage(key))
        return self.storages[key, dtype, count]

    @staticmethod
    def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Piece:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor that is not understood")
        return _Piece(storage, offset, tuple(size), tuple(stride))

    @staticmethod
    def rebuild_parameter(data: Any, *_: Any) -> Any:
        return data

    def unpacks(self, content: bytes | str) -> None:
        self.left -= len(content)
        if self.left < 0:
            raise pickle.UnpicklingError("bytes that are used more than once")

    def storage_from_bytes(self, content: Any) -> _Storage:
        """Plain pickles keep each storage as a torch.save file inside."""
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("a storage that is not understood")
        self.unpacks(content)
        storage = _unpickle_legacy(io.BytesIO(content))
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a storage that is not understood")
        return storage

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Bytes in the older pickle protocols."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes that are not understood")
        self.unpacks(text)
        return text.encode("latin1")


class _ScriptUnpickler(TensorUnpickler):
    """Gives each TorchScript class a stand-in of its own, which keeps the class's name."""

    def __init__(self, stream: io.BytesIO, load: Callable[[str], Callable[[], bytes]]) -> None:
        super().__init__(stream, load)
        self.classes: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "__torch__":
            return super().find_class(module, name)
        full = f"{module}.{name}"
        return self.classes.setdefault(full, type(full, (Inert,), {}))


_HEADER = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.MULTILINE
)


def _script_classes(archive: zipfile.ZipFile, folder: str) -> dict[str, tuple[set[str], set[str]]]:
    """{name of a module's class: names of its parameters, names of its buffers}."""
    files = [info for info in archive.infolist() if info.filename.startswith(folder) and info.filename.endswith(".py")]
    if sum(info.file_size for info in files) > MAX_CODE:
        raise ValueError(f"its code has more than {MAX_CODE} bytes")
    classes = {}
    for info in files:
        module = info.filename.removeprefix(folder).removesuffix(".py").replace("/", ".")
        for name, *lists in _HEADER.findall(archive.read(info).decode()):
            parameters, buffers = ({json.loads(word) for word in re.findall(r'"[^"]*"', names)} for names in lists)
            classes[f"{module}.{name}"] = parameters, buffers
    return classes


def _walk_script(
    module: Any,
    classes: Mapping[str, tuple[set[str], set[str]]],
    above: tuple[Any, ...],
    budget: Iterator[int],
    prefix: str = "",
) -> Iterator[tuple[str, _Piece]]:
    """The named parameters and buffers below a module, in the order of its own state dict."""
    name, place = type(module).__name__, prefix.removesuffix(".") or "it"
    if name not in classes or any(module is other for other in above):
        raise ValueError(f"{place} is no module, or is inside itself")
    if not isinstance(module.state, dict):
        raise ValueError(f"{place} is a {name}, which is read by code of its own")
    if next(budget, None) is None:
        raise ValueError(f"it has more than {MAX_MODULES} modules")
    for own in classes[name]:
        for key, value in module.state.items():
            if key in own and isinstance(value, _Piece):
                yield f"{prefix}{key}", value
    for key, value in module.state.items():
        if isinstance(value, Inert) and type(value).__name__ in classes:
            yield from _walk_script(value, classes, (*above, module), budget, f"{prefix}{key}.")


def _unpickle(file: Path) -> Any:
    with open_regular(file) as stream:
        if zipfile.is_zipfile(stream):
            return _unpickle_zip(file)
    content = read_regular(file, limit=MAX_WEIGHTS)
    value = TensorUnpickler(io.BytesIO(content)).load()
    return _unpickle_legacy(io.BytesIO(content)) if value == LEGACY_MAGIC else value


def _unpickle_zip(file: Path) -> Any:
    def content(name: str) -> bytes:
        with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
            return _stored(archive, name)

    with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
        pickled = _pickled(archive)
    return TensorUnpickler(io.BytesIO(content(pickled)), _storages(content, pickled)).load()


def _pickled(archive: zipfile.ZipFile) -> str:
    """The name of the pickle in torch's zip format."""
    names = archive.namelist()
    pickled = next((name for name in names if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError("it is a zip file, but none of torch.save's")
    order = pickled.removesuffix("data.pkl") + "byteorder"
    if order in names and _stored(archive, order) != b"little":
        raise ValueError("its numbers are big-endian")
    return pickled


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # torch never packs numbers; a bomb would be
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def _storages(content: Callable[[str], bytes], pickled: str) -> Callable[[str], Callable[[], bytes]]:
    """What gives the numbers of each storage beside the pickle, when they are asked for."""
    folder = pickled.removesuffix("data.pkl")
    return lambda key: lambda: content(f"{folder}data/{key}")


def _unpickle_legacy(stream: io.BytesIO) -> Any:
    """torch.save's format before 1.6: magic number, version, machine, content, keys of the storages, the storages."""
    contents: dict[str, bytes] = {}
    made: dict[str, _Storage] = {}
    magic, _, machine = (TensorUnpickler(stream).load() for _ in range(3))
    if magic != LEGACY_MAGIC or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it is not of torch.save's older format, or its numbers are big-endian")

    class Content(TensorUnpickler):
        def persistent_load(self, pid: Any) -> Any:
            found = super().persistent_load(pid)
            if isinstance(found, _Storage):
                made[pid[2]] = found
            return found

    value = Content(stream, lambda key: lambda: contents[key]).load()
    for key in TensorUnpickler(stream).load():
        (count,) = struct.unpack("<q", stream.read(8))
        if count != made[key].count:
            raise ValueError(f"storage {key} must have {made[key].count} numbers, got {count}")
        contents[key] = stream.read(count * made[key].dtype.itemsize)
    return value
