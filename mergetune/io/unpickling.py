"""An unpickler that runs no code of a file: each name in the file is known, replaced by an inert object, or refused."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_NAMES = 1 << 14  # most different names of classes and functions in a file
FREE_OBJECTS = 1 << 20  # objects, and entries of the memo, that are always allowed; else one per two bytes of the file
LONGEST_KEY = 16  # most items of a tuple that is a key
_LOAD: Mapping[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


class Budget:
    """What a file may still make: counted by all unpicklers that read the file.

    Args:
        stored: bytes of the file, before its content is decompressed.
    """

    def __init__(self, stored: int) -> None:
        self.most = max(FREE_OBJECTS, stored // 2)
        self.objects, self.entries = 0, 0

    def count_object(self) -> None:
        self.objects += 1
        self._require(self.objects, "objects")

    def count_entry(self) -> None:
        self.entries += 1
        self._require(self.entries, "entries in its memo")

    def _require(self, count: int, what: str) -> None:
        if count > self.most:
            raise pickle.UnpicklingError(f"it makes more than {self.most:,} {what}")


def require_keys(keys: Iterable[Any]) -> None:
    """Raises UnpicklingError for keys whose hash may take long: nested tuples, which a small file doubles 100 times."""
    for key in keys:
        items = key if isinstance(key, tuple) and len(key) <= LONGEST_KEY else (key,)
        if not all(map(_is_flat, items)):
            raise pickle.UnpicklingError(f"a key of the kind {type(key).__name__}, which is nested or too long")


def _is_flat(value: Any) -> bool:
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None or isinstance(value, str | bytes | float) or type(value).__hash__ is object.__hash__


class Ordered(OrderedDict):
    """An ordered dict of the file; a state dict has attributes, too."""

    attributes: tuple[Any, ...] = ()

    def __init__(self, pairs: Any = ()) -> None:
        pairs = [(key, value) for key, value in (pairs.items() if isinstance(pairs, Mapping) else pairs)]
        require_keys(key for key, _ in pairs)
        super().__init__(pairs)


class Inert:
    """Replaces an unknown class or function of a file. Calls do nothing; the object only stores its state."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return super().__new__(cls)

    def __call__(self, *_: Any) -> Inert:
        return Inert()

    append = extend = add = __setitem__ = __call__


class Unpickler(pickle._Unpickler):  # Python's implementation: a file can make the one in C use all memory
    """Reads dicts, lists, plain values and known objects from a pickle; other objects become inert.

    Args:
        stream: the pickle.
        known: (module, name) in the file -> class or function to use. Classes that receive a state must be subclasses
            of :class:`Inert`. Functions get arguments from the file and must be safe for any arguments.
        others: class for all other names; None refuses a file with other names.
        budget: what the file may make; None counts the bytes of the stream.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(
        self,
        stream: io.BytesIO,
        known: Mapping[tuple[str, str], Any],
        *,
        others: type[Inert] | None = Inert,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(stream)
        self.known, self.others = known, others
        self.budget = Budget(stream.getbuffer().nbytes) if budget is None else budget

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if self.others is None:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, and pickled code is never run")
        return self.others

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        require_keys(self.stack[-2:-1])
        _LOAD[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        require_keys(self.stack[::2])
        _LOAD[pickle.SETITEMS[0]](self)

    def load_dict(self) -> None:
        require_keys(self.stack[::2])
        _LOAD[pickle.DICT[0]](self)

    def load_additems(self) -> None:
        if isinstance(self.metastack[-1][-1], set):  # other objects keep their items in lists
            require_keys(self.stack)
        _LOAD[pickle.ADDITEMS[0]](self)

    def load_frozenset(self) -> None:
        require_keys(self.stack)
        _LOAD[pickle.FROZENSET[0]](self)

    def refuse(self) -> None:
        raise pickle.UnpicklingError("an instruction that such files do not need")

    dispatch[pickle.BUILD[0]] = load_build
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER):
        dispatch[_code[0]] = refuse
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset


def counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """An instruction that makes an object, which is counted before."""

    def load_counted(unpickler: Unpickler) -> None:
        unpickler.budget.count_object()
        load(unpickler)

    return load_counted


def _remembered(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def load_remembered(unpickler: Unpickler) -> None:
        unpickler.budget.count_entry()
        load(unpickler)

    return load_remembered


_MAKING = (
    pickle.LIST, pickle.EMPTY_LIST, pickle.DICT, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.TUPLE,
    pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ,
    pickle.INST,
)  # fmt: skip
for _code in _MAKING:
    Unpickler.dispatch[_code[0]] = counted(Unpickler.dispatch[_code[0]])
for _code in (pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE):
    Unpickler.dispatch[_code[0]] = _remembered(Unpickler.dispatch[_code[0]])
