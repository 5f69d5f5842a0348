"""Errors as one sentence: text of files and of other libraries on one line, of bounded length, with the file's name."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

LONGEST = 600  # characters of a message, and of the reason that another library gives
LONGEST_REASON = 320
MAX_PATH = 1 << 12  # characters of a path that systems allow
LONGEST_NAME = 80  # characters of a name in a file, such as that of a tensor
# Control characters, halves of surrogate pairs, separators of lines, and marks that turn the direction of writing.
UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")

# What torch and safetensors write before the reason.
_PREAMBLE = re.compile(
    r"^(\[enforce fail at [\w.:]+\] \. |"
    r"Error\(s\) in loading state_dict for \w+:\s*|Error while deserializing header: )"
)

P = ParamSpec("P")
R = TypeVar("R")


def visible(text: str, *, longest: int = LONGEST) -> str:
    """Text on one line in which control characters are escaped, such as ``\\\\x1b``; a long one lacks its middle.

    Args:
        text: the text, of any length; it may quote files and names of others.
        longest: number of characters from which on the middle is left out.
    """
    left_out = max(0, len(text) - 2 * longest)  # its escapes are not needed
    shown = UNSEEN.sub(escaped, text[:longest] + text[-longest:] if left_out else text)
    if len(shown) <= longest and not left_out:
        return shown
    half = longest // 2
    return f"{shown[:half]} [... {len(shown) - 2 * half + left_out:,} characters ...] {shown[-half:]}"


def escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def named(name: object) -> str:
    """A name of a file's content, such as that of a tensor, in a message."""
    return visible(str(name), longest=LONGEST_NAME)


def shown(value: object) -> str:
    """A value of a file in a message: a short text or number, else only its kind, as nested values have no bound."""
    if (
        value is None
        or isinstance(value, str | bytes | bool | float)
        or (isinstance(value, int) and abs(value) < 1 << 64)
    ):
        return reprlib.repr(value)
    return f"an object of the kind {type(value).__name__}"


def listing(names: Iterable[object], *, most: int = 8) -> str:
    """The first names of a file's content in a message, or "none"."""
    first = list(itertools.islice(names, most + 1))
    return ", ".join([*map(named, first[:most]), *(["..."] if len(first) > most else [])]) or "none"


def reason(error: BaseException) -> str:
    """What another library's error says, as a clause: its first line, without advice and without addresses.

    Torch and other libraries write several sentences, some of which advise to run the file.
    """
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"it has bytes that are not UTF-8, the first at {error.start:,}"
    if isinstance(error, json.JSONDecodeError):
        return "it has text that is not JSON"
    if isinstance(error, EOFError):
        return "it ends too early"
    if isinstance(error, KeyError | IndexError | AttributeError):  # their text may be a value of the file, of any depth
        return f"it is not what such files are ({type(error).__name__})"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text[: 1 << 14].splitlines() if line.strip()]
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    line = _PREAMBLE.sub("", line)
    line = re.sub(r" at 0x[0-9a-f]+", "", line)
    line = re.split(r"(?<=[a-z)'\"])\. (?=[A-Z])", line)[0].rstrip(".")  # the first sentence
    if "weights_only" in line:
        line = "it holds more than tensors"
    if not line:
        line = f"it is not what such files are ({type(error).__name__})"
    return visible(line, longest=LONGEST_REASON)


@contextmanager
def naming_file(path: Any) -> Iterator[None]:
    """Context manager in which ValueError and FileNotFoundError become one line and name the file."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        _tidy(error, path)
        raise


def names_file(argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a reader: :func:`naming_file` around each call.

    Args:
        argument: name of the argument with the path.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        place = list(inspect.signature(function).parameters).index(argument)

        @functools.wraps(function)
        def reader(*args: P.args, **kwargs: P.kwargs) -> R:
            with naming_file(args[place] if place < len(args) else kwargs.get(argument)):
                return function(*args, **kwargs)

        return reader

    return decorate


def _tidy(error: Exception, path: Any) -> None:
    """Shortens and escapes the message of one of our errors, and adds the path if the message lacks the path."""
    if len(error.args) != 1 or not isinstance(error.args[0], str):  # an error of the system, which names its file
        return
    said, name = error.args[0], os.fspath(path) if isinstance(path, str | os.PathLike) else None
    said = visible(said, longest=LONGEST + 3 * len(name or ""))
    if isinstance(name, str):
        name = visible(name, longest=MAX_PATH)
        folder = os.path.dirname(name)
        if name not in said and not (folder and f"{folder}/" in said):  # a file beside it may be named
            said = f"{said}, in {name}"
    error.args = (said,)
