"""What a run depends on, and the differences between two runs in words: names, counts and values, never a hash."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergetune.data import Batches
from mergetune.io import jsonable
from mergetune.solutions import Solution

_DIGEST = re.compile(r"[0-9a-f]{16}([0-9a-f]{48})?")

# What the settings are called if their values are no plain values: (in a sentence, in the name of a folder).
_CALLED = {
    "clip": ("another CLIP", "other-clip"),
    "fingerprint": ("a CLIP with other weights", "other-weights"),
    "images": ("other images", "other-images"),
    "features": ("other training images", "other-images"),
    "val": ("other validation images", "other-val"),
    "test": ("other test images", "other-test-images"),
    "tuned": ("another fine-tuned solution", "other-tuned"),
    "base": ("another base", "other-base"),
    "zero_shot": ("another zero-shot solution", "other-zero-shot"),
    "start": ("another start of the training", "other-start"),
    "classnames": ("other classes", "other-classes"),
    "experts": ("other experts", "other-experts"),
}
# The settings that tell most about a run come first; all others follow in their own order.
_TELLING = (
    "stage", "clip", "method", "images", "features", "classnames", "classes", "shots", "lam", "beta", "tau",
    "surrogate", "space", "points", "grid", "epochs", "lr", "batch_size", "optimizer", "seed", "tuned", "base",
    "zero_shot", "template", "templates", "val",
)  # fmt: skip
_FOLLOWS = {  # a setting that follows from others is named only if none of these differs
    "fingerprint": ("clip",),
    "features": ("images", "classnames", "clip", "shots", "seed"),
    "val": ("classnames", "clip"),
    "zero_shot": ("classnames", "clip", "tuned"),
    "tuned": ("classnames",),
    "lam_effective": ("lam", "features", "zero_shot", "clip", "classnames"),
}
_COMPUTED = ("lam_effective",)  # another processor rounds these numbers differently


@dataclass(frozen=True)
class Difference:
    """One setting that differs between two runs.

    Attributes:
        name: the setting.
        words: both values in words, for a sentence.
        short: the setting and the second value, for the name of a folder.
    """

    name: str
    words: str
    short: str


def images_in_words(images: Batches | None) -> str | None:
    """The number of images and classes; None for no images."""
    return None if images is None else f"{len(images):,} of {len(images.classnames):,} classes"


def solution_in_words(solution: Solution) -> str:
    """Kind of a solution, and the method, seed and epochs that made it, as far as its notes tell."""
    made = solution.notes.get("settings")
    made = made if isinstance(made, Mapping) else {}
    facts = [
        f"{name} {made[name]}" for name in ("lam", "tau", "epochs", "seed") if name in made and made[name] is not None
    ]
    how = made.get("method") or ("mergetune" if made.get("stage") == "fit" else None)
    return solution.kind + (f" by {', '.join([str(how), *facts])}" if how else "")


def is_digest(value: Any) -> bool:
    """Whether a recorded value, or an entry of it, is a checksum: users cannot read it."""
    if isinstance(value, str):
        return _DIGEST.fullmatch(value) is not None
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(is_digest, entries))


def differences(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    *,
    there_in_words: Mapping[str, Any] = {},
    here_in_words: Mapping[str, Any] = {},
    shared_only: bool = False,
) -> list[Difference]:
    """The settings in which a recorded run differs from the present one; the most telling ones come first.

    Args:
        there, here: recorded and present settings, JSON-able. A setting that is missing counts as None.
        there_in_words, here_in_words: descriptions of settings whose values are checksums.
        shared_only: compare only settings that both have, and values of the same form: the record is of single stages,
            which do not know the whole call.
    """
    there, here = flat(jsonable(there)), flat(jsonable(here))
    there_in_words, here_in_words = flat(there_in_words), flat(here_in_words)
    differ = [name for name in {**here, **there} if not _equal(name, there, here, shared_only)]
    named = [name for name in differ if not set(_FOLLOWS.get(name, ())).intersection(differ)]
    named = [name for name in named if name != "start"] or differ
    rank = {name: i for i, name in enumerate(_TELLING)}
    named.sort(key=lambda name: rank.get(re.sub("^(tune|fit|grid) ", "", name), len(rank)))
    return [
        _difference(name, there.get(name), here.get(name), there_in_words.get(name), here_in_words.get(name))
        for name in named
    ]


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with one level: the options of a stage, as {"fit": {"lam": 4}}, become "fit lam", and so do grids.

    Features of several splits are named by their splits.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("tune", "fit") and isinstance(value, Mapping):
            found |= {f"{name} {inner}": v for inner, v in value.items()}
        elif name == "grids" and isinstance(value, list) and len(value) == 2 and isinstance(value[0], Mapping):
            found |= {f"grid {inner}": v for inner, v in value[0].items()} | {"merge grids": value[1]}
        elif name == "features" and isinstance(value, list | tuple) and len(value) in (2, 3):
            found |= dict(zip(("features", *(("val",) if len(value) == 3 else ()), "test"), value, strict=True))
        else:
            found[name] = value
    return found


def _equal(name: str, there: Mapping[str, Any], here: Mapping[str, Any], shared_only: bool) -> bool:
    a, b = there.get(name), here.get(name)
    if name in _COMPUTED and isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4)
    if not shared_only:
        return a == b
    if name not in there or name not in here or is_digest(a) != is_digest(b):
        return True
    defaults = (None, "auto", "chosen")  # the record has the value that was taken
    return any(value == default for value in (a, b) for default in defaults) or a == b or a == [b] or b == [a]


def _difference(name: str, there: Any, here: Any, there_said: Any, here_said: Any) -> Difference:
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here) and is_digest([there, here]):
        other = [i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b]
        there_said, here_said = (_entries(said, other, len(here)) for said in (there_said, here_said))
        there, here = [there[i] for i in other], [here[i] for i in other]
    called, short = _CALLED.get(name, (name, None))
    if is_digest(there) or is_digest(here):
        a, b = (None if value is None else _said(said) for value, said in ((there, there_said), (here, here_said)))
        if here is None:
            words = f"{called}: {a or 'some'} there, none here"
        elif there is None:
            words = f"{called}: none there, {b or 'some'} here"
        elif a == b:
            words = f"{called}: {a or 'there and here'}{' in both' if a else ''}, but with other contents"
        else:
            words = f"{called}: {a or 'not recorded'} there, {b or 'not recorded'} here"
        return Difference(name, words, short or f"other-{_slug(name)}")
    if name == "classnames" and isinstance(there, list) and isinstance(here, list):
        return Difference(name, f"{called}: {_classes(there, here)} there, {_classes(here, there)} here", str(short))
    a, b = shown(there), shown(here)
    if name == "clip":
        return Difference(name, f"{called}: {a} there, {b} here", f"clip-{_slug(b)}")
    short = _slug(b) if name == "stage" else f"{_slug(name)}-{_slug(b)}"
    return Difference(name, f"{name} {a} there, {b} here", short)


def _entries(said: Any, chosen: list[int], count: int) -> Any:
    """The chosen entries of a description that has one entry per value; other descriptions as they are."""
    return [said[i] for i in chosen] if isinstance(said, list) and len(said) == count else said


def _said(said: Any) -> str | None:
    """A description in words; None if there is none."""
    if isinstance(said, list):
        return " and ".join(str(entry) for entry in said if entry is not None) or None
    if isinstance(said, Mapping):
        return ", ".join(f"{name} ({inner})" for name, inner in said.items()) or None
    return None if said is None else str(said)


def _classes(own: list[Any], other: list[Any]) -> str:
    """Number of the classes and the first one that the other list has not in its place."""
    new = next((name for i, name in enumerate(own) if other[i : i + 1] != [name]), None)
    return f"{len(own):,}" + ("" if new is None else f" with {shown(new)}")


def shown(value: Any) -> str:
    """A plain value as a person would write it, in at most 60 characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        text = ", ".join(map(shown, value)) or "none"
    elif isinstance(value, Mapping):
        text = ", ".join(f"{name} {shown(inner)}" for name, inner in value.items()) or "none"
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, str):
        text = value if re.fullmatch(r"[\w./:+-]+", value) else repr(value)
    else:
        text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _slug(text: str) -> str:
    """A text as part of a file name: letters, digits, dots and dashes, at most 24 characters."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)[:24].strip("-.") or "none"
