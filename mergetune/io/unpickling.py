"""An unpickler that runs no code of a file: each name in the file is known, replaced by an inert object, or refused."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


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
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(
        self, stream: io.BytesIO, known: Mapping[tuple[str, str], Any], *, others: type[Inert] | None = Inert
    ) -> None:
        super().__init__(stream)
        self.known, self.others = known, others

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

    def refuse(self) -> None:
        raise pickle.UnpicklingError("an instruction that such files do not need")

    dispatch[pickle.BUILD[0]] = load_build
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER):
        dispatch[_code[0]] = refuse
