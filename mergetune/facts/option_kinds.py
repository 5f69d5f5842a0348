"""Options as data (name, kind of value, default, help) and the reading of option values from text. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, SupportsFloat, SupportsIndex


class _Required:
    """Type of ``REQUIRED``, which stands for the default of an option that must be given."""

    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        rule: how a value is written; errors say "... must be {rule}".
        read: function from text to value, which raises ValueError or KeyError; None if no text stands for a value.
    """

    rule: str
    read: Callable[[str], Any] | None


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _number_or_numbers(text: str) -> float | list[float]:
    return _numbers(text) if "," in text else float(text)


def _word_or_numbers(text: str) -> str | list[float]:
    try:
        return _numbers(text)
    except ValueError:
        return text


def _starts(text: str) -> dict[str, float | list[float]]:
    pairs = (item.split(":", 1) for item in text.split(","))
    return {name: _values(values) for name, values in pairs}


def _values(text: str) -> float | list[float]:
    return [float(x) for x in text.split(":")] if ":" in text else float(text)


def _ranges(text: str) -> dict[str, tuple[float, ...]]:
    items = (item.split(":") for item in text.split(","))
    return {name: (float(low), float(high), *map(int, count)) for name, low, high, *count in items}


KINDS: Final[Mapping[str, Kind]] = {
    "int": Kind("a whole number", int),
    "float": Kind("a number", float),
    "bool": Kind("true or false", lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()]),
    "str": Kind("text", str),
    "floats": Kind("numbers with commas between", _numbers),
    "float or floats": Kind("a number, or numbers with commas between", _number_or_numbers),
    "str or floats": Kind("a name, or numbers with commas between", _word_or_numbers),
    "strs": Kind("texts with commas between", lambda text: text.split(",")),
    "starts": Kind("name:value[:value ...], with commas between", _starts),
    "ranges": Kind("name:low:high[:count], with commas between", _ranges),
    "object": Kind("an object", None),
}
"""Every kind of value that an option may have."""


# Types of Python values for kinds that are checked. Numbers of numpy and tensors with one element are numbers, too. The
# functions refuse fractions where whole numbers are needed.
_TYPES: Final[Mapping[str, Any]] = {
    "int": SupportsFloat, "float": SupportsFloat, "bool": (bool, SupportsIndex), "float or floats": SupportsFloat,
    "str or floats": SupportsFloat,
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One option of a function.

    Attributes:
        name: keyword of the function.
        kind: one of ``KINDS``, or of the kinds that the caller passes to :func:`read_options`.
        default: default of the function.
        help: one line of help.
        none: whether None is a valid value; its text is "none".
        choices: all valid values; empty if any value of the kind may be valid.
        least: smallest value that the command line accepts; None leaves the check to the function.
        methods: the methods that use the option; empty if all do.
    """

    name: str
    kind: str
    default: Any = REQUIRED
    help: str = ""
    none: bool = False
    choices: tuple[str, ...] = ()
    least: int | None = None
    methods: tuple[str, ...] = ()

    def shown(self) -> str:
        """Returns the default as text."""
        return repr(self.default) if self.default is REQUIRED else str(self.default)

    def check(self, value: Any) -> None:
        """Checks the type of a number, a flag or a list of numbers; other values are left to the function.

        Raises:
            TypeError: the value is not of the option's kind.
        """
        if self.kind not in _TYPES or (self.none and value is None):
            return
        values = [value]
        if "floats" in self.kind.split() and not isinstance(value, (str, bytes, Mapping)):
            with suppress(TypeError):  # one number
                values = list(value)
        if "str" in self.kind.split() and isinstance(value, str):
            return
        for one in values:
            if not isinstance(one, _TYPES[self.kind]) or (isinstance(one, bool) and self.kind != "bool"):
                got = "" if one is value else f" in {value!r}"
                raise TypeError(f"{self.name} must be {KINDS[self.kind].rule}, got {one!r} ({type(one).__name__}){got}")


def read_options(
    owner: str, options: Iterable[Option], given: Sequence[str], more_kinds: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """Parses options: ``["scale=0.3", "weights=1,2"]`` -> ``{"scale": 0.3, "weights": [1.0, 2.0]}``.

    Args:
        owner: name of the method or function that takes the options, for errors: "ties", "mergetune.fit".
        options: the options that the owner has.
        given: texts ``name=value``. "none" means None for an option that may be None.
        more_kinds: kinds of value in addition to ``KINDS``.

    Raises:
        ValueError: a text without ``=``, an unknown or repeated option, or a value that is not of the option's kind.
    """
    known, kinds, found = {option.name: option for option in options}, {**KINDS, **(more_kinds or {})}, {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"options must be name=value, got {item!r}")
        if name not in known:
            raise ValueError(f"{owner} has no option {name!r}; it has {', '.join(known) or 'none'}")
        if name in found:
            raise ValueError(f"options must not repeat, got {name!r} twice: give it once")
        found[name] = _read(owner, known[name], kinds[known[name].kind], text)
    return found


def _read(owner: str, option: Option, kind: Kind, text: str) -> Any:
    if option.none and text.lower() == "none":
        return None
    if kind.read is None:
        raise ValueError(f"{option.name} of {owner} cannot be given as text: call the function from Python")
    try:
        return kind.read(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{option.name} must be {kind.rule}, got {text!r}") from error
