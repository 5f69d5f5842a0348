"""The files of a feature cache: names of the files, and reading and checking of manifest, plan, records and shards.

A cache is a folder. ``manifest.json`` lists images and settings; ``shard-00000.safetensors`` and so on hold the
features [V, n, D] of consecutive images. An unfinished cache has a plan ``building.json`` instead of the manifest, and
for each finished shard a ``.json`` record with its checksum. Every file is written to disk first and then renamed
atomically, so a build may be killed at any time and continued later.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from mergetune.clip import PRECISIONS
from mergetune.data.cache_documents import Identity, Manifest, Plan, Shard, ShardImages, ShardRecord
from mergetune.io import MAX_TABLE, STORED_NAMES, damaged, parse_document, read_document, read_regular

MANIFEST, PLAN = "manifest.json", "building.json"
OURS = re.compile(r"manifest\.json|building\.json|shard-\d+\.(safetensors|json)|\..*")  # and hidden files
REBUILD = "overwrite=True (--overwrite) rebuilds the cache, another path keeps it"


def file_state(path: str | Path) -> tuple[int | None, int | None]:
    try:
        stat = os.stat(path)
    except OSError:
        return None, None
    return stat.st_size, stat.st_mtime_ns


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def finished_shards(path: Path, plan: Plan) -> dict[int, Shard]:
    """{number: shard} of the finished shards of an unfinished cache; a damaged shard raises ValueError."""
    done = {}
    for number in range(plan.shard_count):
        file = path / record_name(number)
        if file.is_file():
            record = read_document(file, ShardRecord, limit=MAX_TABLE, way_on=REBUILD)
            if record.plan == plan.id:
                if wrong := record.shard.misfit(plan.files_of(number), images=True):
                    field, expected, value = wrong
                    raise damaged(file, ("shard", field), f"be {expected}", value, way_on=REBUILD)
                _check_size(path / shard_name(number), record.shard.bytes)
                done[number] = record.shard
    return done


def read_plan(path: Path) -> Plan:
    """The plan of an unfinished cache; a damaged one raises ValueError."""
    return read_document(path / PLAN, Plan, limit=MAX_TABLE, way_on=REBUILD)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a finished cache without the identities of the images, which are two thirds of it.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    content, kept, end = _manifest_bytes(path), [], 0
    for begin, after in _images_in(content):
        kept.append(content[end:begin] + b"[]")
        end = after
    content = b"".join([*kept, content[end:]])
    return parse_document(content, Manifest, name=path / MANIFEST, way_on=REBUILD)


def image_identities(path: Path, manifest: Manifest) -> Iterator[tuple[int, tuple[Identity, ...]]]:
    """Yields number and image identities of each shard in a manifest, one shard at a time to save memory."""
    content, file = _manifest_bytes(path), path / MANIFEST
    places = list(_images_in(content))
    if len(places) == len(manifest.shards):
        texts = (b'{"images":%b}' % content[begin:end] for begin, end in places)
        found = (
            parse_document(text, ShardImages, name=file, way_on=REBUILD, at=("shards", number)).images
            for number, text in enumerate(texts)
        )
    else:  # the manifest was reformatted after it was written
        found = (shard.images for shard in parse_document(content, Manifest, name=file, way_on=REBUILD).shards)
    for number, images in enumerate(found):
        if len(images) != (count := len(manifest.files_of(number))):
            rule = f"be a list of {count:,}, one entry per image"
            raise damaged(file, ("shards", number, "images"), rule, images, way_on=REBUILD)
        yield number, images


def _manifest_bytes(path: Path) -> bytes:
    try:
        return read_regular(path / MANIFEST)
    except ValueError as error:
        raise ValueError(f"{error}; {REBUILD}") from None


def _images_in(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields begin and end of each list of image identities in the bytes of a manifest."""
    mark, end = b'"images":[[', 0  # no file name can contain this mark: quotes in a name are escaped
    while (found := content.find(mark, end)) >= 0 and (last := content.find(b"]]", found)) >= 0:
        begin, end = found + len(mark) - 2, last + 2
        yield begin, end


def map_shard(path: Path, number: int, shard: Shard, manifest: Manifest) -> Tensor:
    """The memory-mapped features of a shard, [V, n, D]. Only the header is read, and not through the mapping."""
    file = path / shard_name(number)
    _check_size(file, shard.bytes)
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            header = content.get_slice("features")
            names, shape, dtype = list(content.keys()), header.get_shape(), header.get_dtype()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}; {REBUILD}") from error
    expected = [manifest.views, shard.rows, manifest.dim]
    stored, kept = STORED_NAMES[manifest.dtype], PRECISIONS[manifest.dtype]
    if names != ["features"] or shape != expected or dtype != stored:
        raise ValueError(f"{file} is damaged: the file must hold {stored} {expected}, got {dtype} {shape}; {REBUILD}")
    begin = shard.bytes - math.prod(shape) * kept.itemsize
    return torch.from_file(str(file), size=shard.bytes, dtype=torch.uint8)[begin:].view(kept).view(shape)


def _check_size(file: Path, size: int) -> None:
    found = file_state(file)[0]
    if found != size:
        state = "missing" if found is None else "truncated" if found < size else "damaged"
        raise ValueError(f"{file} is {state}: the file must have {size} bytes, got {found}; {REBUILD}")


def remove_building_files(path: Path) -> None:
    """Removes plan and records; the plan goes last, because its presence shows that cleaning is not complete."""
    for file in [*path.glob("shard-*.json"), *path.glob(PLAN)]:
        file.unlink()


def remove_cache_files(path: Path) -> None:
    """Removes the files of a cache; the manifest goes first, so that the remaining files never look complete."""
    (path / MANIFEST).unlink(missing_ok=True)
    remove_building_files(path)
    for file in path.glob("shard-*.safetensors"):
        file.unlink()
