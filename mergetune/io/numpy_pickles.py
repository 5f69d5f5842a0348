"""Reading of numpy arrays and scikit-learn models from pickles and joblib files without running code from the file.

Every name in the file becomes an inert object, except for the few names that describe arrays; a name that neither
numpy nor scikit-learn nor joblib has is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from mergetune.io.files import MAX_WEIGHTS, read_regular
from mergetune.io.sentences import reason, shown
from mergetune.io.unpickling import MAX_NAMES, Budget, Inert, Ordered, Unpickler

INERT = ("sklearn.", "joblib.", "numpy.random.", "numpy.ma.")
"""Modules whose objects are read as fields that do nothing."""

MAX_INFLATED = 16  # most bytes of a compressed pickle per byte of the file: weights compress little
FREE_INFLATED = 1 << 26  # bytes that are always allowed


class PickledObject(Inert):
    """An object of scikit-learn in a pickle: the name of its class and its fields."""

    name: ClassVar[str] = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes of the object by name."""
        return self.state if isinstance(self.state, dict) else {}


class _Dtype(Inert):
    """``numpy.dtype`` in a pickle: its text, and the byte order in its state."""

    text: Any = None

    def __init__(self, *given: Any, **_: Any) -> None:
        self.text = given[0] if given else None

    def dtype(self) -> np.dtype:
        text = self.text
        if not isinstance(text, str) or not re.fullmatch(r"[fiub]\d{1,2}|[US]\d{1,6}|O8?", text):
            raise pickle.UnpicklingError(f"an array of the kind {shown(text)}, which is not understood")
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        return np.dtype((order if order in ("<", ">") else "") + text)


class _Array(Inert):
    """An array in a pickle, which :func:`plain` makes: shape, dtype, order and content."""

    def array(self) -> np.ndarray:
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise pickle.UnpicklingError("an array that is not understood")
        _, shape, dtype, fortran, content = self.state
        if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
            raise pickle.UnpicklingError("an array whose shape is not understood")
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array whose dtype is not understood")
        made, order, count = dtype.dtype(), "F" if fortran else "C", math.prod(shape)
        if made.hasobject and isinstance(content, list) and len(content) == count:
            objects = np.empty(count, dtype=object)
            objects[:] = content
            return objects.reshape(shape, order=order)
        if isinstance(content, np.ndarray):  # one of joblib's nested pickles
            return content.reshape(shape, order=order)
        if made.hasobject or not isinstance(content, bytes | bytearray) or len(content) != count * made.itemsize:
            raise pickle.UnpicklingError(f"an array of {count:,} values without their content")
        return np.frombuffer(content, dtype=made).reshape(shape, order=order)


class _JoblibArray(Inert):
    """``NumpyArrayWrapper`` of joblib: the content of the array follows in the file."""

    made: np.ndarray | None = None


def array_names() -> dict[tuple[str, str], Any]:
    """The names in pickles of arrays, for unpicklers -> inert objects, of which :func:`plain` makes arrays."""
    known: dict[tuple[str, str], Any] = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array}
    for core in ("numpy.core", "numpy._core"):
        known[f"{core}.multiarray", "_reconstruct"] = lambda *_: _Array()
        known[f"{core}.multiarray", "scalar"] = _scalar
        known[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return known


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _described(shape, dtype, order == "F", content)


def _scalar(dtype: Any, content: Any = None) -> _Array:
    return _described((), dtype, False, content)


def _described(shape: Any, dtype: Any, fortran: bool, content: Any) -> _Array:
    array = _Array()
    array.state = 1, shape, dtype, fortran, content
    return array


def plain(value: Any) -> Any:
    """A value of a pickle; arrays become numpy's.

    Raises:
        ValueError: an array whose description and content do not fit together.
    """
    if isinstance(value, _Array):
        try:
            return value.array()
        except Exception as error:  # numpy raises several kinds
            raise ValueError(f"it holds an array that is not understood: {error}") from error
    return value.made if isinstance(value, _JoblibArray) else value


def read_numpy_pickle(file: str | Path, *, compressed: bool = False) -> Any:
    """The object in a pickle of numpy arrays or of a scikit-learn model, or in a joblib file.

    Arrays are made by :func:`plain`; models are :class:`PickledObject`.

    Args:
        file: the file.
        compressed: whether joblib compressed the file with zlib or gzip.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, grows too much, or holds another object; the message names it.
    """
    try:
        content = read_regular(file, limit=MAX_WEIGHTS)
        return _load(io.BytesIO(_inflated(content) if compressed else content), Budget(len(content)))
    except OSError:
        raise
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(f"{file} cannot be read as a checkpoint: {reason(error)}") from error


def read_object_array(stream: IO[bytes], name: str, *, stored: int) -> np.ndarray:
    """An array of Python objects, such as class names, in numpy's format: its pickle is read and nothing in it is run.

    Args:
        stream: the content of a .npy file, or of an entry of a .npz file.
        name: name of the file or entry, for messages.
        stored: bytes of the content in the file, compressed: they bound how many objects it may hold.

    Raises:
        Exception: the content is damaged or holds other objects; of many kinds.
    """
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, _ = reader(stream)
    found = plain(_load(io.BytesIO(stream.read()), Budget(stored)))
    if not isinstance(found, np.ndarray) or found.shape != shape:
        raise ValueError(f"{name} must hold an array of shape {list(shape)}")
    return found


def _inflated(content: bytes) -> bytes:
    most = max(MAX_INFLATED * len(content), FREE_INFLATED)
    inflate = zlib.decompressobj(wbits=47)  # zlib's or gzip's header
    found = inflate.decompress(content, most)
    if inflate.unconsumed_tail or not inflate.eof:
        raise ValueError(f"it must inflate to at most {most:,} bytes, and must not end early")
    return found


def _load(stream: io.BytesIO, budget: Budget) -> Any:
    return _NumpyUnpickler(stream, budget).load()


class _NumpyUnpickler(Unpickler):
    """An unpickler for arrays, plain values and scikit-learn's models."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(Unpickler.dispatch)
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(self, stream: io.BytesIO, budget: Budget) -> None:
        known: dict[tuple[str, str], Any] = array_names() | {
            ("collections", "OrderedDict"): Ordered,
            ("builtins", "object"): Inert,
            ("__builtin__", "object"): Inert,
            ("copyreg", "_reconstructor"): self.reconstruct,
            ("copy_reg", "_reconstructor"): self.reconstruct,
            ("_codecs", "encode"): self.encode,
            ("joblib.numpy_pickle", "NumpyArrayWrapper"): _JoblibArray,
        }
        for core in ("numpy.core", "numpy._core"):
            known[f"{core}.multiarray", "scalar"] = self.scalar
        super().__init__(stream, known, others=None, budget=budget)
        self.stream, self.classes = stream, dict[str, type[Inert]]()
        self.left = 2 * stream.getbuffer().nbytes  # most bytes that older protocols hold as text

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known and f"{module}.".startswith(INERT):
            if (known := self.classes.get(f"{module}.{name}")) is not None:
                return known
            if len(self.classes) == MAX_NAMES:
                raise pickle.UnpicklingError(f"it names more than {MAX_NAMES:,} classes")
            made = self.classes[f"{module}.{name}"] = type(name, (PickledObject,), {"name": name})
            return made
        return super().find_class(module, name)

    def load_build(self) -> None:
        super().load_build()
        if isinstance(self.stack[-1], _JoblibArray) and self.stack[-1].made is None:
            self.stack[-1].made = self.following(self.stack[-1].state)

    def following(self, about: Any) -> np.ndarray:
        """The array that follows its description in a joblib file."""
        if not isinstance(about, dict) or not isinstance(about.get("dtype"), _Dtype):
            raise pickle.UnpicklingError("an array of joblib that is not understood")
        shape, dtype = about.get("shape"), about["dtype"].dtype()
        if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
            raise pickle.UnpicklingError("an array whose shape is not understood")
        array = _Array()
        if dtype.hasobject:
            content: Any = plain(_load(self.stream, self.budget))
            if not isinstance(content, np.ndarray) or content.shape != shape:
                raise pickle.UnpicklingError("an array of joblib without its content")
            return content
        if about.get("numpy_array_alignment_bytes") is not None:
            self.stream.read(int.from_bytes(self.stream.read(1), "little"))
        content = self.stream.read(math.prod(shape) * dtype.itemsize)
        array.state = 1, shape, about["dtype"], about.get("order") == "F", content
        return array.array()

    @staticmethod
    def reconstruct(kind: Any, *_: Any) -> Any:
        if not (isinstance(kind, type) and issubclass(kind, Inert)):
            raise pickle.UnpicklingError("an object that is not understood")
        return kind()

    @staticmethod
    def scalar(dtype: Any, content: Any = None) -> Any:
        return _scalar(dtype, content).array()[()].item()

    def encode(self, text: Any, encoding: Any) -> bytes:
        """The bytes that older pickle protocols encode as text."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes that are not understood")
        self.left -= len(text)
        if self.left < 0:
            raise pickle.UnpicklingError("bytes that are used more than once")
        return text.encode("latin1")

    def load_bytearray8(self) -> None:
        """Protocol 5 stores the content of arrays in this form. The size is compared with the file before reading."""
        size = int.from_bytes(self.read(8), "little")
        if size > self.stream.getbuffer().nbytes:
            raise pickle.UnpicklingError("bytes that the file does not have")
        self.append(self.read(size))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
