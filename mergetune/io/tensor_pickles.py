"""Pickles with tensors, read without running code from the file: tensors become descriptions, objects become inert.

Plain unpickling would run any code that a file names. Here, every name in the file becomes an inert object that keeps
what the file gives it, except for the few names that describe tensors and arrays.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mergetune.io.files import MAX_WEIGHTS, open_regular, read_regular
from mergetune.io.numpy_pickles import array_names
from mergetune.io.sentences import shown
from mergetune.io.tensor_budgets import require_budget
from mergetune.io.unpickling import MAX_NAMES, Inert, Ordered, Unpickler, counted

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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8,  # quantised tensors are refused, but what follows them is read
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8,
    "QUInt2x4Storage": torch.uint8,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle in torch.save's format before torch 1.6
REFUSED = {  # functions that rebuild tensors without plain numbers -> what these are
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the device meta, which has no numbers",
    "_rebuild_wrapper_subclass": "a tensor subclass that keeps its numbers elsewhere",
}


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers in the file, which ``content`` reads on demand."""

    dtype: torch.dtype
    count: int
    content: Callable[[], bytes]


@dataclass(frozen=True, eq=False)
class Piece:
    """The description of a tensor that is not created yet: a view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Tagged:
    """A tensor with Python attributes, or of a subclass that keeps its numbers as tensors do."""

    tensor: Any
    attributes: Any


@dataclass(frozen=True, eq=False)
class Refused:
    """A tensor that cannot be read, and what it is, in words."""

    what: str


class Found(Inert):
    """An object of an unknown class, or the result of an unknown function. It keeps what the file gives it."""

    name: ClassVar[str] = "an object"

    def __new__(cls, *arguments: Any, **named: Any) -> Found:
        made = object.__new__(cls)
        made.arguments, made.entries, made.items, made.states = (*arguments, *named.values()), {}, [], []
        return made

    arguments: tuple[Any, ...]
    entries: dict[Any, Any]
    items: list[Any]
    states: list[Any]

    def __call__(self, *arguments: Any) -> Found:
        return Found(self, *arguments)

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Any) -> None:
        self.items.extend(values if isinstance(values, list | tuple) else [values])

    add = append

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    @property
    def fields(self) -> Mapping[Any, Any]:
        """The attributes of the object by name."""
        found: dict[Any, Any] = {}
        for part in self._parts():
            found.update(part if isinstance(part, Mapping) else {})
        return found

    @property
    def other_states(self) -> list[Any]:
        """What the file gives the object beside attributes, as ``functools.partial`` and some classes have it."""
        return [part for part in self._parts() if not isinstance(part, Mapping)]

    def _parts(self) -> list[Any]:
        return [part for state in self.states for part in (state if isinstance(state, tuple) else (state,))]


def make_tensors(found: Mapping[str, Piece | np.ndarray], stored: int) -> dict[str, Tensor]:
    """Creates the tensors of a file with ``stored`` bytes, each with separate numbers; reads each storage once."""
    require_budget(found.values(), stored)
    by_storage: dict[int, list[tuple[str, Piece]]] = {}
    tensors: dict[str, Tensor] = {}
    for name, each in found.items():
        if isinstance(each, Piece):
            by_storage.setdefault(id(each.storage), []).append((name, each))
        else:
            tensors[name] = torch.from_numpy(each.astype(each.dtype.newbyteorder("="), order="C"))
    for pieces in by_storage.values():
        content = bytearray(pieces[0][1].storage.content())
        for name, piece in pieces:
            numbers = torch.frombuffer(content, dtype=piece.dtype) if content else torch.empty(0, dtype=piece.dtype)
            tensors[name] = numbers.as_strided(piece.size, piece.stride, piece.offset).contiguous().clone()
    return {name: tensors[name] for name in found}


class TensorUnpickler(Unpickler):
    """An unpickler that returns tensors as ``Piece``; ``load`` maps a storage's key to a function that reads it."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(Unpickler.dispatch)
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO, load: Callable[[str], Callable[[], bytes]] | None = None) -> None:
        self.rebuilders: dict[str, Callable[..., Any]] = {
            "_rebuild_tensor": self.rebuild_tensor,
            "_rebuild_tensor_v2": self.rebuild_tensor,
            "_rebuild_tensor_v3": self.rebuild_typed,
            "_rebuild_parameter": self.rebuild_parameter,
            "_rebuild_parameter_with_state": self.rebuild_parameter,
            "_rebuild_device_tensor_from_cpu_tensor": self.rebuild_parameter,
            "_rebuild_device_tensor_from_numpy": self.rebuild_parameter,
        } | {name: _refuser(what) for name, what in REFUSED.items()}
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): Ordered,
            ("torch._tensor", "_rebuild_from_type_v2"): self.rebuild_subclass,
            ("torch._tensor", "_rebuild_from_type"): self.rebuild_subclass,
            ("torch.storage", "_load_from_bytes"): self.storage_from_bytes,
            ("torch.storage", "UntypedStorage"): torch.uint8,
            ("_codecs", "encode"): self.encode,
        }
        known |= {("torch._utils", name): function for name, function in self.rebuilders.items()}
        known |= {("torch", name): dtype for name, dtype in (DTYPES | STORAGES).items()}
        super().__init__(stream, known | array_names())
        self.load_storage = load
        self.storages: dict[Any, Storage] = {}
        self.classes: dict[tuple[str, str], type[Found]] = {}
        self.size = stream.getbuffer().nbytes
        self.left = 2 * self.size  # most bytes unpacked from the pickle: each occurs at most as text and as storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if (module, name) not in self.classes:
            if len(self.classes) == MAX_NAMES:
                raise pickle.UnpicklingError(f"it names more than {MAX_NAMES:,} classes")
            self.classes[module, name] = type(name, (Found,), {"name": f"{module}.{name}"})
        return self.classes[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise pickle.UnpicklingError(f"unknown persistent id {shown(pid)}")
        if pid[0] == "module":  # torch.save's older format names a module's class this way
            return pid[1] if isinstance(pid[1], type) and issubclass(pid[1], Found) else Found
        _, dtype, key, _, count, *view = pid
        if pid[0] != "storage" or not isinstance(dtype, torch.dtype) or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"a storage of a kind that is not understood: {shown(pid)}")
        if self.load_storage is None or not isinstance(key, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"a storage that is missing: {shown(pid)}")
        if (key, dtype, count) not in self.storages:
            self.storages[key, dtype, count] = Storage(dtype, count, self.load_storage(key))
        return self.storages[key, dtype, count]

    @staticmethod
    def rebuild_tensor(
        storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None, hooks: Any = None, *more: Any
    ) -> Piece | Refused:
        flags = more[0] if more else None
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor that is not understood")
        if isinstance(flags, Mapping) and any(flags.values()):
            return Refused(f"a view with the flag {', '.join(map(shown, flags))[:40]}")
        return Piece(storage, offset, tuple(size), tuple(stride), storage.dtype)

    @staticmethod
    def rebuild_typed(
        storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *flags: Any
    ) -> Piece | Refused:
        """A tensor of one of the newer dtypes, whose storage holds bytes."""
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a tensor that is not understood")
        made = TensorUnpickler.rebuild_tensor(storage, offset, size, stride, grad, hooks, *flags)
        return made if isinstance(made, Refused) else Piece(made.storage, offset, made.size, made.stride, dtype)

    @staticmethod
    def rebuild_parameter(data: Any, *more: Any) -> Any:
        """A parameter's tensor; what follows its hooks are its attributes."""
        if isinstance(data, Found):
            return Refused(f"a parameter of {data.name[:80]}, which is no plain tensor")
        return Tagged(data, more[2]) if len(more) > 2 else data

    def rebuild_subclass(self, function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
        """A tensor with attributes, or of a subclass: the function that makes it has the numbers."""
        if function not in self.rebuilders.values():
            return Refused(f"a tensor of {getattr(kind, 'name', 'a subclass')[:80]}")
        return Tagged(function(*arguments), state)

    def unpacks(self, content: bytes | str) -> None:
        self.left -= len(content)
        if self.left < 0:
            raise pickle.UnpicklingError("bytes that are used more than once")

    def storage_from_bytes(self, content: Any) -> Storage:
        """The storage in ``content``, which is a torch.save file: plain pickles contain storages in this form."""
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("a storage that is not understood")
        self.unpacks(content)
        storage = _unpickle_legacy(io.BytesIO(content))
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a storage that is not understood")
        return storage

    def encode(self, text: Any, encoding: Any) -> bytes:
        """The bytes that older pickle protocols encode as text."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes that are not understood")
        self.unpacks(text)
        return text.encode("latin1")

    # -- instructions of the pickle whose objects could lose tensors ---------------------------------------------------

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Found):
            target.states.append(state)
        elif isinstance(target, Ordered):
            target.attributes = (*target.attributes, state)
        elif isinstance(target, Inert):
            target.state = state

    def load_empty_set(self) -> None:
        self.append(Found())

    def load_frozenset(self) -> None:
        made = Found()
        made.items = self.pop_mark()
        self.append(made)

    def load_bytearray8(self) -> None:
        """Protocol 5 holds the numbers of arrays in this form. The size is compared with the file before reading."""
        size = int.from_bytes(self.read(8), "little")
        if size > self.size:
            raise pickle.UnpicklingError("bytes that the file does not have")
        self.append(self.read(size))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.EMPTY_SET[0]] = counted(load_empty_set)
    dispatch[pickle.FROZENSET[0]] = counted(load_frozenset)
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _refuser(what: str) -> Callable[..., Refused]:
    return lambda *_: Refused(what)


def unpickle(file: Path) -> Any:
    """The content of a file of ``pickle.dump`` or ``torch.save``, in torch's zip format or the older format."""
    with open_regular(file) as stream:
        if zipfile.is_zipfile(stream):
            return _unpickle_zip(file)
    content = read_regular(file, limit=MAX_WEIGHTS)
    value = TensorUnpickler(io.BytesIO(content)).load()
    return _unpickle_legacy(io.BytesIO(content)) if value == LEGACY_MAGIC else value


def _unpickle_zip(file: Path) -> Any:
    def content(name: str) -> bytes:
        with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
            return stored_content(archive, name)

    with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
        pickled = pickle_in(archive)
    return TensorUnpickler(io.BytesIO(content(pickled)), storages_beside(content, pickled)).load()


def pickle_in(archive: zipfile.ZipFile) -> str:
    """The name of the pickle in torch's zip format."""
    names = archive.namelist()
    pickled = next((name for name in names if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError("the zip file was not written by torch.save")
    order = pickled.removesuffix("data.pkl") + "byteorder"
    if order in names and stored_content(archive, order) != b"little":
        raise ValueError("the file's numbers are big-endian")
    return pickled


def stored_content(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry of an archive; torch never compresses numbers, zip bombs do."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def storages_beside(
    content: Callable[[str], bytes], pickled: str, *, folder: str = "data"
) -> Callable[[str], Callable[[], bytes]]:
    """Function from the key of a storage to a function that reads its bytes from the archive of the pickle."""
    place = pickled.rpartition("/")[0]
    return lambda key: lambda: content(f"{place}/{folder}/{key}")


def _unpickle_legacy(stream: io.BytesIO) -> Any:
    """Reads torch.save's format before 1.6: magic number, version, machine, content, keys of storages, storages."""
    contents: dict[str, bytes] = {}
    made: dict[str, Storage] = {}
    magic, _, machine = (TensorUnpickler(stream).load() for _ in range(3))
    if magic != LEGACY_MAGIC or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("the file is not in torch.save's older format, or its numbers are big-endian")

    class Content(TensorUnpickler):
        def persistent_load(self, pid: Any) -> Any:
            found = super().persistent_load(pid)
            if isinstance(found, Storage):
                made[pid[2]] = found
            return found

    value = Content(stream, lambda key: lambda: contents[key]).load()
    for key in TensorUnpickler(stream).load():
        if not isinstance(key, str):
            raise pickle.UnpicklingError("a storage whose key is no text")
        (count,) = struct.unpack("<q", stream.read(8))
        if count != made[key].count:
            raise ValueError(f"storage {key} must have {made[key].count} numbers, got {count}")
        contents[key] = stream.read(count * made[key].dtype.itemsize)
    return value
