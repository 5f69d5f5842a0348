"""The files of a feature cache: their names, and reading and writing of manifest, plan, records and identities.

A cache is a folder. ``manifest.json`` lists images, settings and arrays, ``images.json`` the identities of the images,
and ``arrays.bin`` holds the arrays. An unfinished cache has a plan ``building.json`` instead of the manifest, and for
each finished block a record ``block-00000.json``. docs/cache.md describes the format. Documents are renamed atomically,
and a record is written after its rows, so a build may be killed at any time and continued later.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from mergetune.data.cache_documents import BlockRecord, Identities, Identity, ImagesFile, Manifest, Plan
from mergetune.data.cache_version_1 import FORMAT_1, Manifest1, without_identities
from mergetune.io import (
    MAX_TABLE,
    Document,
    compact_json,
    damaged,
    parse_document,
    read_document,
    read_regular,
    write_atomically,
)

MANIFEST, PLAN, IMAGES, ARRAYS, LAST_CHECK = (
    "manifest.json", "building.json", "images.json", "arrays.bin", "checked.json"
)  # fmt: skip
OURS = re.compile(  # also the files of version 0.1, and hidden files
    r"manifest\.json|building\.json|images\.json|arrays\.bin|checked\.json|block-\d+\.json"
    r"|shard-\d+\.(safetensors|json)|\..*"
)
REBUILD = "overwrite=True (--overwrite) rebuilds the cache, another path keeps it"
SEAL = b'{"checksum":"'  # the beginning of a sealed document; the checksum follows, and then '",'

_VERSION_1 = f'"{FORMAT_1}"'.encode()

M = TypeVar("M", bound=Document)


def mend(path: Path) -> str:
    """The way on where rows of a finished cache are damaged."""
    if path.name in ("train", "val", "test"):
        return f"`mergetune cache IMAGES --out {path.parent}` with the options as before encodes only these rows again"
    return "the call of cache_features that made the cache encodes only these rows again"


def file_state(path: str | Path) -> tuple[int | None, int | None]:
    """Size in bytes and modification time in ns of a file; None if it cannot be read."""
    try:
        stat = os.stat(path)
    except OSError:
        return None, None
    return stat.st_size, stat.st_mtime_ns


# -- sealed documents --------------------------------------------------------------------------------------------------


def seal(value: dict[str, Any]) -> bytes:
    """A document whose first field is the SHA-256 of all bytes behind this field."""
    content = compact_json({name: entry for name, entry in value.items() if name != "checksum"})[1:]
    return SEAL + hashlib.sha256(content).hexdigest().encode() + b'",' + content


def read_sealed(content: bytes, model: type[M], file: Path) -> M:
    """The document in the bytes of a sealed file; ValueError if any byte has changed."""
    begin = len(SEAL) + 64
    sealed = content.startswith(SEAL)
    changed = not sealed or hashlib.sha256(content[begin + 2 :]).hexdigest().encode() != content[len(SEAL) : begin]
    if sealed and changed:
        raise ValueError(f"{file} is damaged: its checksum must be that of its content, got another; {REBUILD}")
    document = parse_document(content, model, name=file, way_on=REBUILD)
    if not sealed:
        rule = f"the content must begin with {SEAL.decode()}, got {content[: len(SEAL)]!r}"
        raise ValueError(f"{file} is damaged: {rule}; {REBUILD}")
    return document


def _bytes(file: Path) -> bytes:
    try:
        return read_regular(file, limit=MAX_TABLE)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; {REBUILD}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {REBUILD}") from None


def read_manifest(path: Path) -> Manifest | Manifest1:
    """The manifest of a finished cache; ValueError if it is damaged or of another format."""
    content, file = _bytes(path / MANIFEST), path / MANIFEST
    if _VERSION_1 in content[:200]:
        content = without_identities(content)  # two thirds of it
        return parse_document(content, Manifest1, name=file, way_on=REBUILD)
    return read_sealed(content, Manifest, file)


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_atomically(path / MANIFEST, seal(manifest.model_dump()))


def read_images(path: Path, manifest: Manifest) -> Identities:
    """The identities of all images of a finished cache, in the order of its files."""
    file = path / IMAGES
    found = read_sealed(_bytes(file), ImagesFile, file)
    if found.plan != manifest.id:
        raise damaged(file, ("plan",), f"be the id in {MANIFEST}", found.plan, way_on=REBUILD)
    if len(found.images) != (count := len(manifest.files)):
        rule = f"be a list of {count:,}, one entry per image"
        raise damaged(file, ("images", "sha256"), rule, found.images.sha256, way_on=REBUILD)
    return found.images


def write_images(path: Path, manifest: Plan, identities: Iterable[Identity]) -> None:
    images = Identities.of(list(identities))
    write_atomically(
        path / IMAGES, seal({"format": "mergetune.images/2", "plan": manifest.id, "images": images.model_dump()})
    )


def is_cache(path: Path) -> bool:
    """Whether a folder is a cache, finished or not."""
    return any((path / name).is_file() for name in (MANIFEST, PLAN))


def caches_below(folder: Path) -> list[Path]:
    """The caches in a folder such as that of train, val and test, finished or not."""
    return [path for path in sorted(folder.iterdir()) if is_cache(path)] if folder.is_dir() else []


# -- an unfinished cache -----------------------------------------------------------------------------------------------


def read_plan(path: Path) -> Plan:
    """The plan of an unfinished cache; a damaged one, or one of version 0.1, raises ValueError."""
    if _VERSION_1 in (content := _bytes(path / PLAN))[:200]:
        raise ValueError(f"feature cache {path} is unfinished and was started by version 0.1; {REBUILD}")
    return parse_document(content, Plan, name=path / PLAN, way_on=REBUILD)


def write_plan(path: Path, plan: Plan) -> None:
    write_atomically(path / PLAN, compact_json(plan.model_dump()))


def record_name(number: int) -> str:
    return f"block-{number:05d}.json"


def read_records(path: Path, plan: Plan) -> dict[int, BlockRecord]:
    """{number: record} of the finished blocks of an unfinished cache; a damaged record raises ValueError."""
    done = {}
    for number in range(plan.shard_count):
        file = path / record_name(number)
        if file.is_file():
            record = read_document(file, BlockRecord, limit=MAX_TABLE, way_on=REBUILD)
            if record.plan == plan.id:
                if wrong := record.misfit(plan, number):
                    field, expected, value = wrong
                    raise damaged(file, field, f"be {expected}", value, way_on=REBUILD)
                done[number] = record
    return done


def write_record(path: Path, number: int, record: BlockRecord) -> None:
    write_atomically(path / record_name(number), compact_json(record.model_dump()))


# -- removal -----------------------------------------------------------------------------------------------------------


def remove_building_files(path: Path) -> None:
    """Removes plan and records; the plan goes last, because its presence shows that cleaning is not complete."""
    for file in [*path.glob("block-*.json"), *path.glob("shard-*.json"), *path.glob(PLAN)]:
        file.unlink()


def remove_cache_files(path: Path) -> None:
    """Removes the files of a cache; the manifest goes first, so that the remaining files never look complete."""
    (path / MANIFEST).unlink(missing_ok=True)
    remove_building_files(path)
    for file in [*path.glob("shard-*.safetensors"), *(path / name for name in (LAST_CHECK, IMAGES, ARRAYS))]:
        file.unlink(missing_ok=True)
