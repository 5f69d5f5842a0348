"""JSON documents: atomic writing, and the one reader that checks a document against its model.

A model is a subclass of :class:`Document` and stands beside what it describes. Every fault of a document becomes one
ValueError with one sentence: the file, the field, what the field must be, the value found, and the way on.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, WrapValidator, field_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from mergetune.io.atomic_files import write_atomically
from mergetune.io.files import MAX_SETTINGS, read_regular
from mergetune.io.text_files import decode_text

MAX_DEPTH = (
    256  # levels of lists and objects in a field that may hold any JSON: notes gain one level per training stage
)
MAX_COUNT = 1 << 53  # the largest whole number that every JSON reader keeps exactly

T = TypeVar("T")
M = TypeVar("M", bound="Document")

# -- models ------------------------------------------------------------------------------------------------------------


class Document(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """Base of the models of our own documents: exact types, finite numbers, no unknown fields.

    A model allows unknown fields (``extra="allow"`` or ``"ignore"``) only where another version may have written them.
    A field ``format`` or ``version`` is a ``Literal`` of one value; what is wrong with it is said first.
    """

    @field_validator("format", "version", mode="before", check_fields=False)
    @classmethod
    def _is_no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool | float):  # True == 1.0 == 1
            raise ValueError("a text or a whole number")
        return value


def _as_given(value: Any, check: Callable[[Any], float]) -> Any:
    check(value)
    return value


def _shallow(value: T) -> T:
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested at most {MAX_DEPTH} levels deep")
    return value


def _hexadecimal(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("64 hexadecimal digits")
    return text


Items = Annotated[tuple[T, ...], Field(strict=False, fail_fast=True)]  # a list of a million faults gives one
"""A list of the document, as a tuple."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""A whole number from 0 on."""
Size = Annotated[int, Field(ge=1, le=MAX_COUNT)]
"""A whole number from 1 on."""
Number = Annotated[float, WrapValidator(_as_given)]
"""A finite number. A whole number stays an ``int``, so that it is written as it was read."""
Sha256 = Annotated[str, AfterValidator(_hexadecimal)]
"""A SHA-256 in hexadecimal digits."""
JsonObject = Annotated[dict[str, Any], AfterValidator(_shallow)]
"""An object with any content."""


def fault(where: tuple[str | int, ...], expected: str, value: Any) -> ValidationError:
    """The error that a validator of a model raises if a value inside its field is wrong.

    Args:
        where: path to the value from the field.
        expected: completes "<field> must be ...". A validator whose whole field is wrong raises
            ``ValueError(expected)`` instead.
        value: the value found.
    """
    kind = PydanticCustomError("expected", "{expected}", {"expected": expected})
    return ValidationError.from_exception_data("document", [InitErrorDetails(type=kind, loc=where, input=value)])


# -- writing -----------------------------------------------------------------------------------------------------------


def jsonable(value: Any) -> Any:
    """The value after writing to JSON and reading back: tuples become lists, keys become text."""
    return json.loads(json.dumps(value))


def compact_json(value: Any) -> bytes:
    """A value as JSON without spaces, on one line, without a newline at the end."""
    return json.dumps(value, separators=(",", ":")).encode()


def write_json(file: Path, value: Any, *, indent: int = 1) -> None:
    """Writes a JSON document atomically: on an error the old file stays.

    Raises:
        TypeError, ValueError: JSON cannot represent the value; nothing is written.
        OSError: the file cannot be written.
    """
    write_atomically(file, f"{json.dumps(value, indent=indent)}\n".encode())


# -- reading -----------------------------------------------------------------------------------------------------------


def read_document(file: str | Path, model: type[M], *, way_on: str, limit: int = MAX_SETTINGS) -> M:
    """Reads one of our own JSON documents and checks it against its model.

    Args:
        file: the document, in UTF-8.
        model: the model.
        way_on: what the user can do about a damaged document; ends the message.
        limit: largest allowed size in bytes.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is not a regular file, is too large, is not JSON, or differs from the model.
    """
    try:
        content = read_regular(file, limit=limit)
    except ValueError as error:
        raise ValueError(f"{error}; {way_on}") from None
    return parse_document(content, model, name=file, way_on=way_on)


def parse_document(
    content: bytes | str, model: type[M], *, name: str | Path, way_on: str, at: tuple[str | int, ...] = ()
) -> M:
    """:func:`check_document` for JSON text that was read already."""
    try:
        value = _parse(content)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: the content must be JSON, got {error}; {way_on}") from None
    return check_document(value, model, name=name, way_on=way_on, at=at)


def check_document(value: Any, model: type[M], *, name: str | Path, way_on: str, at: tuple[str | int, ...] = ()) -> M:
    """:func:`read_document` for a value that was parsed already; ``name`` is the file in the message.

    ``at`` is the path to the value from the top of the document, if the value is a part of it.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    first = next((found for found in faults if found["loc"] in _VERSIONS), faults[0])
    if first["loc"] in _VERSIONS:
        field = str(first["loc"][0])
        (wanted,) = get_args(model.model_fields[field].annotation)
        if _is_later(wanted, first["input"]):
            way_on = "update mergetune"
        raise ValueError(f"{name} must have {field} {wanted!r}, got {_got(first)}; {way_on}")
    rule, got = _rule(first), _got(first)
    raise ValueError(f"{name} is damaged: {_field((*at, *first['loc']))} must {rule}, got {got}; {way_on}")


def damaged(name: str | Path, where: tuple[str | int, ...], rule: str, value: Any, *, way_on: str) -> ValueError:
    """The error for a field of a document that differs from other files.

    Args:
        name: the file.
        where: path to the field.
        rule: completes "<field> must ...".
        value: the value found.
        way_on: what the user can do; ends the message.
    """
    return ValueError(f"{name} is damaged: {_field(where)} must {rule}, got {_shown(value)}; {way_on}")


def read_json(file: str | Path, *, limit: int = MAX_SETTINGS) -> Any:
    """Reads a JSON document of others, in UTF-8 with or without a byte order mark.

    Args:
        file: the document.
        limit: largest allowed size in bytes.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is not a regular file, is too large or is not JSON; the message names the file.
    """
    return parse_json(decode_text(file, read_regular(file, limit=limit)), name=file)


def parse_json(content: bytes | str, *, name: str | Path) -> Any:
    """:func:`read_json` for content that was read already; ``name`` is the file in the message."""
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"{name} must be JSON, got {error}") from None


def _parse(content: bytes | str) -> Any:
    """The value of a JSON text; the ValueError completes "must be JSON, got ..."."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes that are not UTF-8, the first at {error.start:,}") from None
    except json.JSONDecodeError as error:
        what = f"a mistake in line {error.lineno:,}, column {error.colno:,}" if content.strip() else "no text"
        raise ValueError(what) from None
    except RecursionError:
        raise ValueError("too many lists and objects inside each other") from None
    except ValueError:  # Python bounds the digits of whole numbers
        raise ValueError("a number with too many digits") from None


# -- messages ----------------------------------------------------------------------------------------------------------

_VERSIONS = (("format",), ("version",))  # fields whose faults are said first
# Type of a fault -> what the field must do or be.
_RULES = {
    "missing": "be there",
    "extra_forbidden": "not be there",
    "model_type": "be an object",
    "dict_type": "be an object",
    "tuple_type": "be a list",
    "string_type": "be a text",
    "string_unicode": "be a text",
    "bool_type": "be true or false",
    "int_type": "be a whole number",
    "float_type": "be a number",
    "finite_number": "be a finite number",
    "none_required": "be null",
    "greater_than_equal": "be at least {ge}",
    "greater_than": "be greater than {gt}",
    "less_than_equal": "be at most {le}",
    "too_short": "have at least {min_length} entries",
    "too_long": "have at most {max_length} entries",
    "value_error": "be {error}",
    "expected": "be {expected}",
}


def _rule(found: ErrorDetails) -> str:
    """What the field must do or be."""
    kind, context = found["type"], found.get("ctx", {})
    if kind == "literal_error":
        return f"be {'one of ' if ' or ' in context['expected'] else ''}{context['expected']}"
    return _RULES.get(kind, "be as mergetune writes it").format(**context)


def _got(found: ErrorDetails) -> str:
    return "no such field" if found["type"] == "missing" else _shown(found["input"])


def _field(where: tuple[str | int, ...]) -> str:
    """A path as it is usually written: ``shards[3].skipped['a b.png']``."""
    steps = (f".{step}" if str(step).isidentifier() else f"[{_shown(step)}]" for step in where)
    return "".join(steps).removeprefix(".") or "the content"


def _shown(value: Any) -> str:
    """A value in a few words, on one line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple | dict):
        what = "an object" if isinstance(value, dict) else "a list"
        return f"{what} of {len(value):,}"
    if isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{8,}", value):
        return f"a checksum of {len(value):,} digits"
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def _is_later(expected: str | int, found: Any) -> bool:
    """Whether a format or version has a larger number at its end than the expected one, and is the same otherwise."""
    if isinstance(found, bool) or not isinstance(found, int | str):
        return False
    ours, theirs = (re.fullmatch(r"(.*?)([0-9]{1,9})", text) for text in (str(expected), str(found)))
    return bool(ours and theirs and ours[1] == theirs[1] and int(theirs[2]) > int(ours[2]))
