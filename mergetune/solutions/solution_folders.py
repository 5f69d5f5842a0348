"""Folders of saved solutions: ``solution.safetensors`` and ``solution.json``, written and read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from mergetune.io import (
    MAX_WEIGHTS,
    Document,
    Items,
    JsonObject,
    Sha256,
    check_document,
    listing,
    names_file,
    read_document,
    read_json,
    read_regular,
    write_atomically,
    write_json,
    writing_in,
)
from mergetune.solutions.resaving import TEMPERATURE, bounded, kept_temperature

if TYPE_CHECKING:
    from mergetune.solutions.base import Solution

S = TypeVar("S", bound="Solution")

WEIGHTS, CONFIG = "solution.safetensors", "solution.json"
FORMAT, VERSION = "mergetune-solution", 1
WAY_ON = "save the solution again, or take another copy of the folder"


class Description(Document, frozen=True):
    """The fields of a saved solution that all kinds have; a kind with settings adds a field per setting.

    The fields have the names of the kind's own fields and keep their documentation.
    """

    classnames: Items[str] | None
    backbone: str | None
    fingerprint: str | None
    notes: JsonObject


class SolutionFile(Document, frozen=True, extra="allow"):
    """``solution.json``; the other fields are the description, which depends on the kind.

    Attributes:
        format, version: name and version of the format.
        kind: the kind of the solution.
        sha256: checksum of ``solution.safetensors``, which shows a save that stopped between the two files.
    """

    format: Literal["mergetune-solution"]
    version: Literal[1]
    kind: str
    sha256: Sha256


def write_solution(solution: Solution, path: str | Path) -> None:
    """Write a solution into a folder: tensors as safetensors, everything else as JSON with their checksum.

    If the folder holds the same solution with a temperature, and this one has none, the temperature stays: it belongs
    to the tensors. A warning says so if the solution is another one and the temperature goes.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "kind": solution.kind,
        **solution.settings(),
        "classnames": solution.classnames,
        "backbone": solution.backbone,
        "fingerprint": solution.fingerprint,
        "notes": solution.notes,
    }
    weights = serialize({name: t.detach().cpu().contiguous() for name, t in solution.saved_state().items()})
    config["sha256"] = hashlib.sha256(weights).hexdigest()  # shows a save that was cut off between the two files
    if TEMPERATURE not in solution.notes and (path / CONFIG).is_file():
        with contextlib.suppress(ValueError, OSError):  # a damaged file is written again
            read_config(path)
            config["notes"] = solution.notes | kept_temperature(read_json(path / CONFIG), config, path)
    text = json.dumps(bounded(config), indent=2)  # fails before anything is written if notes are not JSON
    with writing_in(path):
        write_atomically(path / WEIGHTS, weights)
        write_atomically(path / CONFIG, f"{text}\n".encode())


def write_notes(path: str | Path, notes: dict[str, Any]) -> None:
    """Replaces the notes of the solution in the folder ``path``. ``solution.json`` alone is written, atomically.

    Args:
        path: folder of a saved solution.
        notes: the new notes, JSON-able.

    Raises:
        FileNotFoundError: the folder holds no solution.
        ValueError: ``solution.json`` is damaged or of a later format.
    """
    read_config(Path(path))
    file = Path(path) / CONFIG
    with writing_in(path):
        write_json(file, bounded({**read_json(file), "notes": notes}), indent=2)


def read_config(path: Path) -> SolutionFile:
    """The ``solution.json`` of a folder; the description is not checked yet."""
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} must be a folder with {CONFIG}, as save() writes it")
    return read_document(path / CONFIG, SolutionFile, way_on=WAY_ON)


@names_file("path")
def read_solution(cls: type[S], path: str | Path) -> S:
    """The solution that :func:`write_solution` wrote into a folder; it must be of the kind ``cls``."""
    path = Path(path)
    config = read_config(path)
    if config.kind != cls.kind:
        raise ValueError(f"{path / CONFIG} must hold a {cls.kind}, got {config.kind!r}")
    description = check_document(config.model_extra, cls.description, name=path / CONFIG, way_on=WAY_ON)
    try:
        weights = read_regular(path / WEIGHTS, limit=MAX_WEIGHTS)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path / WEIGHTS} cannot be read: {error}; {WAY_ON}") from error
    if hashlib.sha256(weights).hexdigest() != config.sha256:
        raise ValueError(
            f"{path / WEIGHTS} must be the file that {CONFIG} describes, got another checksum: saving was interrupted, "
            f"or one of the files is damaged; {WAY_ON}"
        )
    try:
        tensors = deserialize(weights)
    except SafetensorError:
        raise ValueError(f"{path / WEIGHTS} must be a .safetensors file; {WAY_ON}") from None
    try:
        return cls.restore(description, tensors)
    except TypeError as error:  # tensors of other names
        wanted = ", ".join(cls.tensors) or "the tensors of its parts"
        raise ValueError(f"{path / WEIGHTS} must hold {wanted}, got {listing(sorted(tensors))}; {WAY_ON}") from error
    except ValueError as error:  # a name or text that the kind refuses, or shapes that do not fit the names
        raise ValueError(
            f"{path / CONFIG} does not describe a solution of kind {cls.kind!r}: {error}; {WAY_ON}"
        ) from error
