"""What a solution says of its origin, without paths of this computer: for files that others will read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from mergetune.solutions.base import Solution
from mergetune.solutions.stack import Stack

S = TypeVar("S", bound=Solution)

EMBEDDED = "icon-clip"  # the model that comes with mergetune
FOLDER, HUB = "local-dir:", "hf-hub:"
WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz")  # endings of weight files
_PATH = re.compile(r"local-dir:|file:|([/~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\)\S")  # how a path of a computer begins
_FOLDERS = re.compile(
    r"(?<![\w:/.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;]+[/\\])+"
)  # the folders of a path within a text


def public_backbone(backbone: str | None) -> str | None:
    """The recorded name of a backbone if it means the same on other computers, else None.

    A name of open_clip with a tag, a repository of the Hub and the embedded model mean the same everywhere. A folder or
    a weight file does not.

    Example:
        >>> from mergetune.solutions.published import public_backbone
        >>> [public_backbone(name) for name in ("ViT-B-32/openai", "local-dir:/home/me/clip", "RN50/me.pt")]
        ['ViT-B-32/openai', None, None]
    """
    if not backbone or backbone.startswith(HUB):
        return backbone or None
    if backbone.startswith(FOLDER):
        place = _parts(backbone.removeprefix(FOLDER))
        return EMBEDDED if place[-3:] == ("mergetune", "assets", EMBEDDED) else None
    _, _, weights = backbone.partition("/")
    local = len(_parts(weights)) > 1 or weights.lower().endswith(WEIGHTS) or _PATH.match(weights)
    return None if local or _PATH.match(backbone) else backbone


def architecture(backbone: str | None) -> str | None:
    """The open_clip name in a recorded backbone whose weights come from a file; None for other backbones."""
    name, _, weights = (backbone or "").partition("/")
    known = name and weights and not _PATH.match(backbone or "") and not (backbone or "").startswith(HUB)
    return name if known else None


def published(solution: S) -> S:
    """A copy of a solution whose backbone and notes, and those of a stack's parts, hold no paths of this computer.

    A path in the notes becomes its last part. The fingerprint stays, so another CLIP is still refused.
    """
    changes = {"backbone": public_backbone(solution.backbone), "notes": without_paths(solution.notes)}
    if isinstance(solution, Stack):
        stack = Stack(*map(published, solution.parts), fingerprint=solution.fingerprint, **changes)
        return stack  # pyright: ignore[reportReturnType]  # a stack of a stack's type
    return replace(solution, **changes)  # pyright: ignore[reportArgumentType]


def without_paths(value: Any) -> Any:
    """A JSON-able value in which each text that is a path of a computer is replaced with the last part of the path."""
    if isinstance(value, dict):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    _, slash, rest = value.partition("/")
    if _PATH.match(value) or (slash and (_PATH.match(rest) or rest.lower().endswith(WEIGHTS))):
        return (_parts(value.removeprefix(FOLDER)) or ("",))[-1]  # also of "ViT-B-32//home/me/clip.pt"
    return _FOLDERS.sub("", value)


def _parts(path: str) -> tuple[str, ...]:
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    return tuple(part for part in kind(path).parts if part not in ("/", "\\"))
