"""Class names from folders, labels and files of names: one spelling, one order, and what the names alone decide.

Folders and labels are called keys here: the key ``shopping_cart`` has the class name "shopping cart".
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import warn

from mergetune.io import MAX_LIST, lines_of, naming_file, read_json, read_text, require_file

GivenNames = Mapping[str, str] | Sequence[str] | str | os.PathLike[str] | None
"""Names of classes: {key: name}, one name per class in their order, or a file with either, see :func:`read_names`."""

WAY_ON = "classnames (on the command line --classnames FILE) names the classes"


def prettify(name: str) -> str:
    """A folder's name or a label as a class name: ``shopping_cart`` -> "shopping cart".

    Underscores become spaces, and accents have the composed form (NFC), whatever form the file system has.
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def meaning(name: str) -> str:
    """The part of a class name that text towers read: equal for ``Apple``/``apple``, all Unicode forms and widths."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).lower())
    return " ".join("".join(c for c in plain if unicodedata.category(c) != "Cf").replace("_", " ").split())


def in_order(keys: Iterable[str]) -> list[str]:
    """The keys in the order of their classes: by number if all are whole numbers, else by text."""
    keys = list(keys)
    if all(re.fullmatch(r"-?[0-9]{1,18}", key) for key in keys):
        return sorted(keys, key=lambda key: (int(key), key))
    return sorted(keys)


def class_names(keys: Sequence[str], given: GivenNames, *, what: str) -> tuple[str, ...]:
    """The class names of keys. Names that a text tower cannot tell apart are refused.

    Equal names that ``given`` sets for both classes are allowed: some usual names of ImageNet's classes are equal.

    Args:
        keys: the keys, in the order of the classes.
        given: names that replace those made from the keys.
        what: kind of the keys, for messages: "class folder" or "label".

    Raises:
        ValueError: an empty name, a name that is no text, or two names that mean the same.
    """
    if isinstance(given, str | os.PathLike):
        with naming_file(given):
            return _names_of(keys, given, what)
    return _names_of(keys, given, what)


def _names_of(keys: Sequence[str], given: GivenNames, what: str) -> tuple[str, ...]:
    told = _given(keys, given)
    names = [told.get(key, prettify(key)) for key in keys]
    owner: dict[str, str] = {}
    for key, name in zip(keys, names, strict=True):
        _check_name(name, f"classnames of {key!r}" if key in told else f"{what} {key!r}")
        other = owner.setdefault(meaning(name), key)
        if other != key and not (key in told and other in told and told[key] == told[other]):
            theirs = told.get(other, prettify(other))
            alike = repr(name) if theirs == name else f"{theirs!r} and {name!r}, which a text tower reads alike,"
            raise ValueError(
                f"class names must differ, got {alike} for {other!r} and {key!r}: put the images together, or rename "
                f"with classnames (on the command line --classnames FILE)"
            )
    return tuple(names)


def hint_at_names(names: Sequence[str]) -> None:
    """Warns if the class names are identifiers, which say nothing to a text tower."""
    for kind, pattern in _IDENTIFIERS.items():
        found = [name for name in names if pattern.fullmatch(name)]
        if len(names) > 1 and 2 * len(found) > len(names):
            warn(
                f"{len(found)} of {len(names)} class names are {kind}, such as {found[0]!r}: zero-shot classification "
                f"needs the words that one would say; {WAY_ON}",
                stacklevel=4,
            )
            return


_IDENTIFIERS = {
    "WordNet ids": re.compile(r"n\d{8}\b.*"),
    "numbers": re.compile(r"-?\d+"),
    "numbered": re.compile(r"(0\d+ ?|\d+ ?[.)-] ?)[^\W\d].*"),
}


def _check_name(name: Any, owner: str) -> None:
    if not isinstance(name, str) or not meaning(name):
        raise ValueError(f"{owner} must give a class name, got {name!r}: rename it, or {WAY_ON}")
    if any(0xD800 <= ord(character) < 0xE000 for character in name):
        raise ValueError(f"{owner} must be text in UTF-8, got other bytes: rename it, or {WAY_ON}")


# -- names that are given ---------------------------------------------------------------------------------------------


def read_names(file: str | Path) -> list[str]:
    """The class names in a text file with one name per line, in the spelling of :func:`prettify`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not text in UTF-8, or holds no name.
    """
    require_file(file, f"classnames must be a text file with one class name per line, and {file} does not exist")
    names = [prettify(line) for line in lines_of(read_text(file)) if line.strip()]
    if not names:
        raise ValueError(f"classnames must be a text file with one class name per line, got {file} without a name")
    for number, name in enumerate(names, start=1):
        _check_name(name, f"name {number} in {file}")
    return names


def _given(keys: Sequence[str], given: GivenNames) -> dict[str, str]:
    """{key: name} of the names that are given."""
    if given is None:
        return {}
    where, file = "classnames", None
    if isinstance(given, str | os.PathLike):
        where, file = f"classnames in {given}", given
        given = _of_file(Path(given), keys)
    if isinstance(given, Mapping):
        if given and not given.keys() & set(keys):
            raise ValueError(
                f"{where} must name the classes by folder or label, such as {keys[0]!r}, got {next(iter(given))!r}"
            )
        return {key: name for key, name in given.items() if key in keys}
    names = list(given)
    if len(names) != len(keys):
        raise ValueError(
            f"{where} must hold one name for each of the {len(keys):,} classes, in their order ({keys[0]!r} first), "
            f"got {len(names):,}"
        )
    pairs = dict(zip(keys, names, strict=True))
    if file is not None and any(meaning(key) != meaning(name) for key, name in pairs.items()):
        shown = ", ".join(f"{key!r} is {name!r}" for key, name in list(pairs.items())[:3])
        more = f" and so on for {len(pairs):,} classes" if len(pairs) > 3 else ""
        warn(f"{file} names the classes in their order: {shown}{more}", stacklevel=5)
    return pairs


def _of_file(file: Path, keys: Sequence[str]) -> Mapping[str, str] | list[str]:
    """The names in a file: by key, or in the order of the classes.

    JSON is an object {key: name} or a list of names; Keras' index {number: [key, name]} is read as well. A text file
    has one name per line, or in each line a key, then a tab, comma, colon or space, then the name.
    """
    if file.suffix.lower() == ".json":
        require_file(file, f"classnames must be a file of class names, and {file} does not exist")
        content = read_json(file, limit=MAX_LIST)
        if isinstance(content, dict) and all(map(_is_pair, content.values())):
            content = dict(content.values())
        values = list(content.values()) if isinstance(content, dict) else content
        if not isinstance(values, list) or not values or not all(isinstance(name, str) for name in values):
            raise ValueError(f"classnames in {file} must be an object {{folder: name}}, or a list of names")
        return {key: prettify(content[key]) for key in content} if isinstance(content, dict) else _pretty(values)
    read_names(file)  # refuses what is no list of names
    lines, named = [line.strip() for line in lines_of(read_text(file)) if line.strip()], {}
    known = set(keys)
    for line in lines:
        for cut in re.finditer(r"[\t,:]\s*|\s+", line):
            if line[: cut.start()].rstrip() in known:
                named.setdefault(line[: cut.start()].rstrip(), prettify(line[cut.end() :]))
                break
    if not named:
        return _pretty(lines)
    if lacking := [key for key in keys if key not in named]:
        raise ValueError(f"{file} must name every class, a key and its name per line, but lacks {lacking[0]!r}")
    return named


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _pretty(names: Sequence[str]) -> list[str]:
    return [prettify(name) for name in names]
