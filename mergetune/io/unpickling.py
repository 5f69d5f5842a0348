"""The unpickler that runs nothing: what a file names is known here, or an inert stand-in, or refused."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar


class Inert:
    """Stands in for whatever else a file names. It does nothing, and keeps the state that it is given."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __call__(self, *_: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    append = extend = add = __setitem__ = __call__


class Unpickler(pickle._Unpickler):  # the one written in Python: the other one can be made to take all memory
    """Knows dicts, lists, plain values and what it is told. Whatever a file does with anything else comes to nothing.

    Args:
        stream: the pickle.
        known: (module, name) in the file -> what is taken for it. A class that is to get a state is a subclass of
            :class:`Inert`; functions are called with what the file says, and must be safe for any arguments.
        others: what everything else is taken for; None refuses the file.
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
