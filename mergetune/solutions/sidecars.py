"""What an export whose format holds no class names says about itself: names, scale, and text of a prompt.

The description stands beside the export, in FILE.mergetune.json, and for a classifier also in the archive that
torch.save writes, where torch ignores it: such a file can be moved and renamed.

Shapes: C classes, D embedding width.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mergetune.io import (
    MAX_SETTINGS,
    MAX_WEIGHTS,
    Document,
    Items,
    Number,
    Sha256,
    listing,
    open_regular,
    parse_document,
    read_document,
    sha256_regular,
    write_json,
)
from mergetune.solutions.base import Solution
from mergetune.solutions.checkpoints import check_same_names
from mergetune.solutions.dassl_folders import checkpoint_file
from mergetune.solutions.head import LARGEST_SCALE, Head
from mergetune.solutions.head_files import read_arrays
from mergetune.solutions.prompt import Prompt
from mergetune.solutions.prompt_tokens import NAMES, START
from mergetune.solutions.temperatures import HIGHEST, LOWEST

FORMAT, VERSION, ENDING, RECORD = "mergetune-export", 1, ".mergetune.json", "mergetune.json"
WAY_ON = "export the solution again, or remove this file and give class names and settings yourself"


class Description(Document, frozen=True):
    """What is said about an export.

    Attributes:
        format, version: name and version of the format.
        form: form of the export.
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
    classnames: Annotated[Items[str], Field(min_length=1)]
    logit_scale: Annotated[Number, Field(gt=0, le=LARGEST_SCALE)] | None
    temperature: Annotated[Number, Field(ge=LOWEST, le=HIGHEST)] = 1.0
    backbone: str | None
    fingerprint: Sha256 | None
    template: str | None = None
    position: Literal["end", "middle", "front"] = "end"


class Sidecar(Description, frozen=True):
    """FILE.mergetune.json beside an export.

    Attributes:
        sha256: checksum of FILE, which shows that the two files belong together.
    """

    sha256: Sha256


def sidecar_of(file: Path) -> Path:
    return file.with_name(f"{file.name}{ENDING}")


def write_sidecar(file: Path, content: bytes, **fields: Any) -> None:
    """Write the file beside an export.

    Args:
        file: the export.
        content: its bytes.
        fields: the fields of :class:`Description` but format and version.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    write_json(sidecar_of(file), {"format": FORMAT, "version": VERSION, **fields, "sha256": sha256}, indent=2)


def with_description(content: bytes, **fields: Any) -> bytes:
    """The bytes of torch.save with a description in the archive, which torch.load ignores.

    Args:
        content: the bytes.
        fields: the fields of :class:`Description` but format and version.
    """
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        text = json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=2)
        archive.writestr(zipfile.ZipInfo(f"{folder}/{RECORD}"), text)  # without today's date: equal exports are equal
    return stream.getvalue()


def _description_in(file: Path) -> Description | None:
    """The description in the archive of an export; None for other files."""
    try:
        with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
            found = [info for info in archive.infolist() if info.filename.endswith(f"/{RECORD}")]
            if not found or found[0].file_size > MAX_SETTINGS:
                return None
            text = archive.read(found[0])
    except Exception:  # zipfile raises many kinds on other and on damaged files, whose reader says what is wrong
        return None
    return parse_document(text, Description, name=f"{file}: {RECORD}", way_on=WAY_ON)


def read_export(
    path: Path, *, classnames: Sequence[str] | None, template: str | None, position: str
) -> Solution | None:
    """The solution in an export that has a description, beside it or in its archive; None for other files.

    Args:
        path: a classifier, or a CoOp checkpoint or its folder.
        classnames: None, or the class names of the export in any order.
        template: another text for a prompt; None takes the recorded text.
        position: place of the class name in a prompt: "end", the default, or the recorded one.

    Raises:
        ValueError: the two files do not belong together, or the class names or the position are others.
    """
    file = _export_at(path)
    if file is None:
        return None
    where = sidecar_of(file)
    if where.is_file():
        found: Description | None = read_document(where, Sidecar, way_on=WAY_ON)
        if sha256_regular(file, limit=MAX_WEIGHTS) != found.sha256:
            raise ValueError(f"{where} must describe {file.name} beside it, got the checksum of another file; {WAY_ON}")
    else:
        found, where = _description_in(file), f"{file}: {RECORD}"
    if found is None:
        return None
    if position not in ("end", found.position):
        raise ValueError(f"position must be {found.position!r}, as {where} says, got {position!r}")
    try:
        solution = _described(file, found, template)
    except ValueError as error:  # a name or text that the kind refuses, or shapes that do not fit the names
        raise ValueError(f"{where} does not describe {file.name}: {error}; {WAY_ON}") from error
    if solution.classnames is not None and classnames is not None:
        check_same_names(classnames, solution.classnames)
    return solution


def _described(file: Path, found: Description, template: str | None) -> Solution:
    origin: dict[str, Any] = {"backbone": found.backbone, "fingerprint": found.fingerprint}
    if found.form == "classifier":
        arrays = read_arrays(file)
        if "weight" not in arrays or arrays["weight"].ndim != 2:
            raise ValueError(f"{file.name} must hold a weight [D, C], got {listing(arrays)}")
        weight = arrays["weight"].T.contiguous()
        scale = (found.logit_scale or 1.0) / found.temperature
        return Head(weight, found.classnames, None, scale, notes={"checkpoint": file.name}, **origin)
    read = Prompt.from_checkpoint(file, classnames=found.classnames, template=template or found.template)
    notes = {name: note for name, note in read.notes.items() if name not in (START, NAMES)}  # the sidecar has both
    notes |= {"settings": {"classnames": list(found.classnames)}}
    notes |= {} if found.temperature == 1 else {"temperature": found.temperature}
    return replace(read, position=found.position, notes=notes, **origin)


def _export_at(path: Path) -> Path | None:
    """The file of an export at a path; None if there is no file."""
    try:
        return checkpoint_file(path)
    except (FileNotFoundError, ValueError):
        return None  # the reader of the format says so
