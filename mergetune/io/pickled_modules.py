"""Reading of tensors from pickled modules and TorchScript archives without running code from the file.

WiSE-FT saves classifiers with ``pickle.dump``, others save modules with ``torch.save``. Plain unpickling would run any
code that such a file names. Here, every name in the file becomes an inert object, except for the few names that
describe tensors. A TorchScript archive contains code and a pickle of its modules; only the pickle is read.
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
from mergetune.io.sentences import listing, named, names_file, reason
from mergetune.io.tensor_budgets import require_budget, require_stored, tensor_views
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
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle in torch.save's format before torch 1.6
MAX_MODULES = 1 << 16  # most modules of a TorchScript archive, counted per use: shared modules can multiply
MAX_CODE = 1 << 26  # most bytes of a TorchScript archive's code after decompression


def read_module(file: str | Path, *, only: str | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module, or of dicts of modules and tensors, by their dotted names.

    Args:
        file: file that ``pickle.dump`` or ``torch.save`` wrote, in torch's zip format or the older format.
        only: name of a submodule, such as "classification_head", whose tensors alone are returned. Other tensors are
            not read if the format allows.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a pickled module, holds no tensors (of ``only``), or its tensors are much larger
            than the file because they repeat its numbers.
    """
    return _read(Path(file), only)[0]


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
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipped)
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


def is_torchscript(file: str | Path) -> bool:
    """Whether a file is a TorchScript archive: a zip file with code and constants. False for a damaged zip file."""
    with open_regular(file) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                names = archive.namelist()
        except Exception:  # zipfile raises many kinds on other and on damaged files
            return False
    return any("/code/" in name or name.rpartition("/")[2] == "constants.pkl" for name in names)


@names_file("file")
def read_torchscript(file: str | Path) -> dict[str, Tensor]:
    """The state dict of a traced or scripted module, without running the archive as ``torch.jit.load`` would.

    The headers of the archive's classes say which attributes are parameters and buffers; other code is not read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a TorchScript archive, has modules that restore themselves by running code, or its
            tensors are much larger than the file because they repeat its numbers.
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
            f"{file} cannot be read as a TorchScript archive without running it: {reason(error)}"
        ) from error


@names_file("file")
def convert_module(file: str | Path, out: str | Path, *, only: str | None = None) -> list[str]:
    """Writes the tensors of a pickled module to a .safetensors file, which ``Head.from_checkpoint`` reads.

    ``file`` and ``only`` are those of :func:`read_module`. A module's attribute ``normalize`` (in WiSE-FT: whether the
    head scales its inputs to unit norm) is stored in the metadata.

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
    require_file(file, f"file must be a pickled module, got {file}, which does not exist")
    inside = "" if only is None else f"{only}."
    try:
        found = dict(_walk(_unpickle(file), set()))
        pieces = {name: leaf for name, leaf in found.items() if isinstance(leaf, _Piece)}
        tensors = _made({name: leaf for name, leaf in pieces.items() if _in(name, inside)}, file.stat().st_size)
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(f"{file} cannot be read as a pickled module: {reason(error)}") from error
    if not tensors:
        raise ValueError(f"{file} must hold tensors{f' of {only}' if only else ''}, got {listing(pieces)}")
    return tensors, {name: leaf for name, leaf in found.items() if isinstance(leaf, bool) and _in(name, inside)}


def _in(name: str, inside: str) -> bool:
    return name.removeprefix("module.").startswith(inside)


def _walk(value: Any, seen: set[int], prefix: str = "") -> Iterator[tuple[str, _Piece | bool]]:
    """Yields name and value of the tensors below a value, and of the attributes ``normalize`` of modules."""
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
    """Numbers in the file, which ``content`` reads on demand."""

    dtype: torch.dtype
    count: int
    content: Callable[[], bytes]


@dataclass(frozen=True)
class _Piece:
    """The description of a tensor that is not created yet: a view of a storage."""

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
    """Creates the tensors of a file with ``stored`` bytes, each with separate numbers; reads each storage once."""
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
    """An unpickler that returns tensors as ``_Piece``; ``load`` maps a storage's key to a function that reads it."""

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
        )  # most bytes unpacked from the pickle: each occurs at most as text and as storage

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise pickle.UnpicklingError("a reference that is not understood")
        if pid[0] == "module":  # torch.save's older format names a module's class this way
            return Inert
        _, dtype, key, _, count, *view = pid
        if pid[0] != "storage" or not isinstance(dtype, torch.dtype) or any(part is not None for part in view):
            raise pickle.UnpicklingError("a storage of a kind that is not understood")
        if self.load_storage is None or not isinstance(key, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage that is missing")
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
        """The storage in ``content``, which is a torch.save file: plain pickles contain storages in this form."""
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("a storage that is not understood")
        self.unpacks(content)
        storage = _unpickle_legacy(io.BytesIO(content))
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a storage that is not understood")
        return storage

    def encode(self, text: Any, encoding: Any) -> bytes:
        """The bytes that older pickle protocols encode as text."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes that are not understood")
        self.unpacks(text)
        return text.encode("latin1")


class _ScriptUnpickler(TensorUnpickler):
    """An unpickler that gives each TorchScript class a separate inert class with the same name."""

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
    """{name of a module's class: (names of its parameters, names of its buffers)}."""
    files = [info for info in archive.infolist() if info.filename.startswith(folder) and info.filename.endswith(".py")]
    if sum(info.file_size for info in files) > MAX_CODE:
        raise ValueError(f"the archive's code has more than {MAX_CODE} bytes")
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
    """Yields name and description of the parameters and buffers below a module, in the order of its state dict."""
    name, place = type(module).__name__, prefix.removesuffix(".") or "it"
    if name not in classes or any(module is other for other in above):
        raise ValueError(f"{place} is no module, or is inside itself")
    if not isinstance(module.state, dict):
        raise ValueError(f"{place} is a {name}, which can only be restored by running its code")
    if next(budget, None) is None:
        raise ValueError(f"the archive has more than {MAX_MODULES} modules")
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
        raise ValueError("the zip file was not written by torch.save")
    order = pickled.removesuffix("data.pkl") + "byteorder"
    if order in names and _stored(archive, order) != b"little":
        raise ValueError("the file's numbers are big-endian")
    return pickled


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # torch never compresses numbers; zip bombs do
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def _storages(content: Callable[[str], bytes], pickled: str) -> Callable[[str], Callable[[], bytes]]:
    """Function from the key of a storage to a function that reads its bytes from the archive of the pickle."""
    folder = pickled.removesuffix("data.pkl")
    return lambda key: lambda: content(f"{folder}data/{key}")


def _unpickle_legacy(stream: io.BytesIO) -> Any:
    """Reads torch.save's format before 1.6: magic number, version, machine, content, keys of storages, storages."""
    contents: dict[str, bytes] = {}
    made: dict[str, _Storage] = {}
    magic, _, machine = (TensorUnpickler(stream).load() for _ in range(3))
    if magic != LEGACY_MAGIC or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("the file is not in torch.save's older format, or its numbers are big-endian")

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
