"""FILE.mergetune.json beside an export whose format holds no class names: names, scale, and text of a prompt.

Shapes: C classes, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mergetune.io import (
    MAX_WEIGHTS,
    Document,
    Items,
    Number,
    Sha256,
    listing,
    read_document,
    sha256_regular,
    write_json,
)
from mergetune.solutions.base import Solution
from mergetune.solutions.checkpoints import check_same_names, checkpoint_file, read_arrays
from mergetune.solutions.head import LARGEST_SCALE, Head
from mergetune.solutions.prompt import Prompt
from mergetune.solutions.temperatures import HIGHEST, LOWEST

FORMAT, VERSION, ENDING = "mergetune-export", 1, ".mergetune.json"
WAY_ON = "export the solution again, or remove this file and give class names and settings yourself"


class Sidecar(Document, frozen=True):
    """What the sidecar says about the export FILE.

    Attributes:
        format, version: name and version of the format.
        form: form of the export.
        sha256: checksum of FILE, which shows that the two files belong together.
        classnames: C names, in the order of the columns of a classifier; of a prompt for any classes, those of the
            file's token embeddings.
        logit_scale: factor on the logits; None takes that of the CLIP.
        temperature: number that these logits are divided by before softmax.
        backbone: name of the CLIP, unless it is a path of one computer.
        fingerprint: SHA-256 of the weights of the tower that the export depends on.
        template, position: text of a prompt and place of the class name in it.
    """

    format: Literal["mergetune-export"]
    version: Literal[1]
    form: Literal["classifier", "coop"]
    sha256: Sha256
    classnames: Annotated[Items[str], Field(min_length=1)]
    logit_scale: Annotated[Number, Field(gt=0, le=LARGEST_SCALE)] | None
    temperature: Annotated[Number, Field(ge=LOWEST, le=HIGHEST)] = 1.0
    backbone: str | None
    fingerprint: Sha256 | None
    template: str | None = None
    position: Literal["end", "middle", "front"] = "end"


def sidecar_of(file: Path) -> Path:
    return file.with_name(f"{file.name}{ENDING}")


def write_sidecar(file: Path, content: bytes, **fields: Any) -> None:
    """Write the file beside an export.

    Args:
        file: the export.
        content: its bytes.
        fields: the fields of :class:`Sidecar` but format, version and checksum.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    write_json(sidecar_of(file), {"format": FORMAT, "version": VERSION, **fields, "sha256": sha256}, indent=2)


def read_export(
    path: Path, *, classnames: Sequence[str] | None, template: str | None, position: str
) -> Solution | None:
    """The solution in an export that has its sidecar; None for other files.

    Args:
        path: a classifier, or a CoOp checkpoint or its folder.
        classnames: None, or the class names of the export in any order.
        template: another text for a prompt; None takes the recorded text.
        position: place of the class name in a prompt: "end", the default, or the recorded one.

    Raises:
        ValueError: the two files do not belong together, or the class names or the position are others.
    """
    file = _export_at(path)
    if file is None or not sidecar_of(file).is_file():
        return None
    found = read_document(sidecar_of(file), Sidecar, way_on=WAY_ON)
    if sha256_regular(file, limit=MAX_WEIGHTS) != found.sha256:
        raise ValueError(
            f"{sidecar_of(file)} must describe {file.name} beside it, got the checksum of another file; {WAY_ON}"
        )
    if position not in ("end", found.position):
        raise ValueError(f"position must be {found.position!r}, as {sidecar_of(file)} says, got {position!r}")
    try:
        solution = _described(file, found, template)
    except ValueError as error:  # a name or text that the kind refuses, or shapes that do not fit the names
        raise ValueError(f"{sidecar_of(file)} does not describe {file.name}: {error}; {WAY_ON}") from error
    if solution.classnames is not None and classnames is not None:
        check_same_names(classnames, solution.classnames)
    return solution


def _described(file: Path, found: Sidecar, template: str | None) -> Solution:
    origin: dict[str, Any] = {"backbone": found.backbone, "fingerprint": found.fingerprint}
    if found.form == "classifier":
        arrays = read_arrays(file)
        if "weight" not in arrays or arrays["weight"].ndim != 2:
            raise ValueError(f"{file.name} must hold a weight [D, C], got {listing(arrays)}")
        weight = arrays["weight"].T.contiguous()
        scale = (found.logit_scale or 1.0) / found.temperature
        return Head(weight, found.classnames, None, scale, notes={"checkpoint": file.name}, **origin)
    read = Prompt.from_checkpoint(file, classnames=found.classnames, template=template or found.template)
    notes = read.notes | {"settings": {"classnames": list(found.classnames)}}
    notes |= {} if found.temperature == 1 else {"temperature": found.temperature}
    return replace(read, position=found.position, notes=notes, **origin)


def _export_at(path: Path) -> Path | None:
    """The file of an export at a path; None if there is no file."""
    try:
        return checkpoint_file(path)
    except (FileNotFoundError, ValueError):
        return None  # the reader of the format says so
