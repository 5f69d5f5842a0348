"""The ``repr`` of public objects: one short line with their facts; tensors are shown by dtype and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from operator import attrgetter
from pathlib import PurePath
from typing import Any, TypeVar

LIMIT = 400  # characters of a repr
VALUE, ITEM = 100, 40  # characters of one value, and of one item of a value
ITEMS = 3  # items of a collection that are shown

Class = TypeVar("Class", bound=type)


def brief(*names: str, **computed: Callable[[Any], Any]) -> Callable[[Class], Class]:
    """Returns a decorator that gives a class a short ``repr``.

    Args:
        names: the attributes that the repr shows, in order; by default the fields of the dataclass.
        computed: more facts: name -> function of the object.
    """

    def decorate(cls: Class) -> Class:
        own = names or tuple(f.name for f in fields(cls) if f.repr)
        facts = {name: attrgetter(name) for name in own} | computed
        type.__setattr__(cls, "__repr__", lambda self: _shown(self, facts))
        return cls

    return decorate


def shortened(text: str, limit: int) -> str:
    """Returns a text of at most ``limit`` characters; a longer text loses its middle."""
    if len(text) <= limit:
        return text
    end = (limit - 3) // 3
    return f"{text[: limit - 3 - end]}...{text[-end:]}"


def _shown(self: Any, facts: Mapping[str, Callable[[Any], Any]]) -> str:
    """Class and facts; those that do not fit are replaced by dots."""
    title, parts = type(self).__name__, []
    for name, fact in facts.items():
        try:
            value = fact(self)
        except Exception:  # a repr must not raise: debuggers show objects that are not finished
            continue
        parts.append(f"{name}={value_shown(value)}")
        if len(title) + len(", ".join(parts)) + 7 > LIMIT:
            parts[-1] = "..."
            break
    return f"{title}({', '.join(parts)})"


def value_shown(value: Any) -> str:
    """Returns a short text for one value: shapes of tensors, and sizes and first items of collections."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        device = str(getattr(value, "device", "cpu"))
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} {list(value.shape)}" + ("" if device == "cpu" else f" on {device}")
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (str, PurePath)):
        return shortened(repr(str(value)), VALUE)
    if isinstance(value, Mapping):
        first = list(value.items())[:ITEMS]
        return _collection([f"{key}: {value_shown(item)}" for key, item in first], "{}", len(value))
    if isinstance(value, (tuple, list, set, frozenset)):
        return _collection([value_shown(item) for item in list(value)[:ITEMS]], "[]", len(value))
    if type(value).__name__ in ("device", "dtype"):  # of torch, which this file does not import
        return str(value).removeprefix("torch.")
    if "__name__" in dir(value):  # functions, classes, modules
        return str(value.__name__)
    own = repr(value) if type(value).__module__.startswith("mergetune.") else ""
    return own if 0 < len(own) <= VALUE else type(value).__name__


def _collection(items: list[str], brackets: str, count: int) -> str:
    first = ", ".join(shortened(item, ITEM) for item in items[:ITEMS])
    left, right = brackets
    return f"{left}{first}{right}" if count <= ITEMS else f"{left}{count}: {first}, ...{right}"
