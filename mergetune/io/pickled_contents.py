"""The tensors in the content of a pickle by name: the weights, and everything else that holds tensors, which is named.

``unpickle`` returns a file's content with descriptions of tensors and inert objects. This module finds every tensor in
it, in dicts, lists, sets, modules, and in the arguments and attributes of other objects.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mergetune.io.numpy_pickles import plain
from mergetune.io.tensor_pickles import Found, Ordered, Piece, Refused, Storage, Tagged
from mergetune.io.unpickling import Inert
from mergetune.io.wrappers import AVERAGED, PLAIN, inner_state, unwrapped

MAX_VISITS = 1 << 21  # most dicts, lists and objects, counted per use: shared ones can multiply
MAX_TENSORS = 1 << 17
MAX_STEPS = 1 << 24  # most entries of all of these
MAX_LETTERS = 1 << 27  # most characters of the names of all of these: a long key stands in each name below it
ASIDE = re.compile(
    r"(optimi[sz]er|optim|(lr_)?scheduler|(grad_)?scaler|amp|(\w+_)?rng)(s|_state|_states|_state_dict|_\d+)?", re.I
)
"""Keys at the top of a file for what a trainer needs to go on, and nothing else does."""

TRAINING, ASIDE_OF = "state of the training", "beside the weights"
TEMPORARY, ATTRIBUTE = "buffers that the module does not save", "attributes of modules that are no parameters"
CONSTANT = "constants and attributes of the program"


@dataclass(frozen=True)
class Leaf:
    """A tensor of the file.

    Attributes:
        value: its description, an array of numpy, or why it cannot be read.
        path: its place in the file.
        reason: why it is no weight, in words; "" for a weight.
    """

    value: Any
    path: str
    reason: str = ""


@dataclass(frozen=True)
class Contents:
    """The tensors of a file.

    Attributes:
        weights: the weights by name, without what wrappers put around names.
        rest: the other tensors by their places in the file.
        flags: attributes ``normalize`` of modules by name.
    """

    weights: dict[str, Leaf]
    rest: dict[str, Leaf] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)

    @property
    def all_names(self) -> list[str]:
        return [*self.weights, *self.rest]

    def below(self, name: str) -> Contents:
        """The tensors below a name, without the name; the name may be that of a weight or a place in the file."""
        paths = [{leaf.path: leaf for leaf in part.values()} for part in (self.weights, self.rest)]
        bare = next(iter(unwrapped([name])))
        for place, found in ((name, self.weights), (bare, self.weights), (name, paths[0]), (name, paths[1])):
            inside = {_below(own, place): leaf for own, leaf in found.items() if own.startswith(f"{place}.")}
            if place in found:
                inside = {place.rpartition(".")[2]: found[place]} | inside
            if inside:
                names = unwrapped(list(inside))
                flags = {_below(own, place): flag for own, flag in self.flags.items() if own.startswith(f"{place}.")}
                return Contents({own: replace(inside[old], reason="") for own, old in names.items()}, {}, flags)
        return Contents({}, self.weights | self.rest)

    def with_rest(self) -> Contents:
        """The same tensors, all of them as weights."""
        if twice := self.weights.keys() & self.rest.keys():
            raise ValueError(f"two tensors have the name {min(twice)}")
        return replace(self, weights=self.weights | self.rest, rest={})

    def leaves(self) -> dict[str, Piece | np.ndarray]:
        """The weights by name; raises ValueError, with the name, if one cannot be read."""
        found: dict[str, Piece | np.ndarray] = {}
        for name, leaf in self.weights.items():
            value = leaf.value
            if isinstance(value, Refused):
                raise ValueError(
                    f"{name[:80]!r} is {value.what}: make it a plain tensor before saving, or take another part of the "
                    "file with only (--only)"
                )
            found[name] = value
        return found

    def left_out(self) -> tuple[str, ...]:
        """The tensors that are no weights, in words, one entry per part of the file and reason."""
        read = {id(leaf.value) for leaf in self.weights.values()}
        groups: dict[tuple[str, str], list[str]] = {}
        for name, leaf in self.rest.items():
            if id(leaf.value) not in read:
                part = name if leaf.reason in (TEMPORARY, ATTRIBUTE) else name.partition(".")[0]
                groups.setdefault((leaf.reason, part if leaf.reason != TEMPORARY else ""), []).append(name)
        return tuple(_in_words(reason, part, names) for (reason, part), names in groups.items())


def _below(name: str, place: str) -> str:
    return name.removeprefix(f"{place}.") if place else name


def _in_words(reason: str, part: str, names: list[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:3]) + (", ..." if len(names) > 3 else "")
    if part and part not in names:
        shown = f"{part[:60]} ({len(names):,} tensor{'s' * (len(names) > 1)})"
    return f"{shown}: {reason}"


def contents_of(content: Any, rest: Mapping[str, Any] | None = None) -> Contents:
    """The tensors in the content of a file.

    Args:
        content: the content; with ``rest`` the weights by name.
        rest: None finds the weights in the content. Otherwise, what else the file holds, by names for it.

    Raises:
        ValueError: two tensors have one name, or the content holds too many objects.
    """
    walk = _Walk()
    keys, state = ((), content) if rest is not None else _weights_in(content)
    prefix = ".".join(keys)
    leaves = list(walk.below(state, prefix))
    weights = [leaf for leaf in leaves if not leaf.reason]
    others = [leaf for leaf in leaves if leaf.reason]
    around = content
    for depth, key in enumerate(keys):
        place = "".join(f"{above}." for above in keys[:depth])
        for name, value in around.items():
            if name != key:
                reason = TRAINING if ASIDE.fullmatch(str(name)) or _is_optimiser(value) else ASIDE_OF
                others += walk.below(value, f"{place}{name}", reason)
        around = around[key]
    for name, value in (rest or {}).items():
        others += walk.below(value, name, CONSTANT)
    by_path = _by_name((leaf.path, leaf) for leaf in weights)
    stripped = unwrapped([_below(path, prefix) for path in by_path])
    named = {name: by_path[_outside(own, prefix)] for name, own in stripped.items()}
    kept = {id(leaf) for leaf in named.values()}
    others += [replace(leaf, reason=ASIDE_OF) for leaf in weights if id(leaf) not in kept]  # a wrapper's own buffers
    common = next((own.removesuffix(name) for name, own in stripped.items()), "")
    flags = {_below(path, prefix).removeprefix(common): flag for path, flag in walk.flags.items()}
    return Contents(named, _by_name((leaf.path, leaf) for leaf in others), flags)


def _outside(name: str, prefix: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _by_name(found: Iterable[tuple[str, Leaf]]) -> dict[str, Leaf]:
    names: dict[str, Leaf] = {}
    for name, leaf in found:
        if name in names and names[name].value is not leaf.value:
            raise ValueError(f"two tensors have the name {name[:80]}")
        names[name] = leaf
    return names


def _weights_in(content: Any) -> tuple[tuple[str, ...], Any]:
    """The dict or module with the weights, and the keys that lead to it."""
    for keys in (PLAIN, AVERAGED):
        path, state = inner_state(content, tensor=_is_leaf, module=_is_module, keys=keys)
        if path:
            return path, state
    return (), content


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Piece | Tagged | Refused) or _is_array(value)


def _is_array(value: Any) -> bool:
    """Whether a value is the description of an array of numpy."""
    return isinstance(value, Inert) and not isinstance(value, Found)


def _is_module(value: Any) -> bool:
    return isinstance(value, Found) and {"_parameters", "_modules"} <= value.fields.keys()


def _is_optimiser(value: Any) -> bool:
    state = value.fields if isinstance(value, Found) else value
    return isinstance(state, Mapping) and "param_groups" in state and "state" in state


class _Walk:
    """Finds the tensors below a value."""

    def __init__(self) -> None:
        self.visits = self.tensors = self.steps = self.letters = 0
        self.flags: dict[str, bool] = {}

    def below(self, value: Any, path: str, reason: str = "", above: tuple[int, ...] = ()) -> Iterator[Leaf]:
        """The tensors below a value at a place of the file, in the order of the file."""
        name = path or "weight"
        if isinstance(value, Storage):
            value = Piece(value, 0, (value.count,), (1,), value.dtype)
        if isinstance(value, Piece | Refused):
            yield self.counted(Leaf(value, name, reason))
        elif isinstance(value, Tagged):
            yield from self.below(value.tensor, path, reason, above)
            yield from self.below(value.attributes, path, reason, above)
        elif _is_array(value):
            yield from self.array(value, path, reason, above)
        elif isinstance(value, Mapping | list | tuple | Found) and id(value) not in above:
            self.visits += 1
            if self.visits > MAX_VISITS:
                raise ValueError(f"it holds more than {MAX_VISITS:,} objects")
            above = (*above, id(value))
            for key, inside, why in self.entries(value, path):
                self.steps += 1
                if self.steps > MAX_STEPS:
                    raise ValueError(f"it holds more than {MAX_STEPS:,} values")
                if inside is None or isinstance(inside, str | bytes | int | float):
                    continue
                self.letters += len(path)
                if self.letters > MAX_LETTERS:
                    raise ValueError(f"its names have more than {MAX_LETTERS:,} characters")
                yield from self.below(inside, _joined(path, key), reason or why, above)

    def counted(self, leaf: Leaf) -> Leaf:
        self.tensors += 1
        if self.tensors > MAX_TENSORS:
            raise ValueError(f"it holds more than {MAX_TENSORS:,} tensors")
        return leaf

    def array(self, value: Any, path: str, reason: str, above: tuple[int, ...]) -> Iterator[Leaf]:
        """An array of numpy: numbers are read, text is none, objects may be tensors."""
        try:
            found = plain(value)
        except ValueError as error:
            yield Leaf(Refused(str(error).removeprefix("it holds ")), path or "weight", reason)
            return
        if isinstance(found, np.ndarray) and found.dtype.kind in "fiub":
            found = found if found.itemsize <= 8 else Refused(f"an array of {found.dtype}")
            yield self.counted(Leaf(found, path or "weight", reason))
        elif isinstance(found, np.ndarray) and found.dtype.kind == "O" and id(value) not in above:
            yield from self.below(found.ravel().tolist(), path, reason, (*above, id(value)))

    def entries(self, value: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
        """Key, value and reason (see :class:`Leaf`) of what a dict, a list or an object holds."""
        if isinstance(value, Found) and _is_module(value):
            yield from self.module(value, path)
        elif isinstance(value, Found):
            why = TRAINING if _is_optimiser(value) else ""
            given = value.arguments
            if len(given) == 1 and isinstance(given[0], list | tuple):  # a set, a deque
                given = given[0]
            numbered = (*given, *value.items, *value.other_states)
            yield from ((str(place), inside, why) for place, inside in enumerate(numbered))
            yield from ((key, inside, why) for key, inside in value.entries.items())
            yield from ((key, inside, why) for key, inside in value.fields.items())
        elif isinstance(value, Mapping):
            for place, (key, inside) in enumerate(value.items()):
                if not isinstance(key, str | int | float | None):
                    yield f"key {place}", key, ""
                    key = place
                aside = path == "" and ASIDE.fullmatch(str(key)) and not isinstance(inside, Piece | Tagged)
                yield key, inside, TRAINING if aside or _is_optimiser(inside) else ""
            if isinstance(value, Ordered):
                yield from (("attributes", inside, ATTRIBUTE) for inside in value.attributes)
        else:
            yield from ((str(place), inside, "") for place, inside in enumerate(value))

    def module(self, module: Found, path: str) -> Iterator[tuple[Any, Any, str]]:
        fields = module.fields
        if isinstance(fields.get("normalize"), bool):
            self.flags[_joined(path, "normalize")] = fields["normalize"]
        temporary = set(_texts(fields.get("_non_persistent_buffers_set")))
        for part in ("_parameters", "_buffers"):
            inside = fields.get(part)
            for key, value in inside.items() if isinstance(inside, Mapping) else ():
                if isinstance(value, Found):
                    value = Refused(f"an object of {value.name}, which is no plain tensor")
                yield key, value, TEMPORARY if part == "_buffers" and key in temporary else ""
        inside = fields.get("_modules")
        yield from ((key, value, "") for key, value in (inside.items() if isinstance(inside, Mapping) else ()))
        for key, value in fields.items():
            if key not in ("_parameters", "_buffers", "_modules"):
                yield key, value, ATTRIBUTE
        for place, value in enumerate((*module.arguments, *module.items, *module.other_states)):
            yield str(place), value, ATTRIBUTE


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a set of the file."""
    inside = (*value.arguments, *value.items) if isinstance(value, Found) else value
    for each in inside if isinstance(inside, list | tuple) else ():
        if isinstance(each, str):
            yield each
        elif isinstance(each, list | tuple):
            yield from (text for text in each if isinstance(text, str))
