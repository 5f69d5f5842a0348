"""The files of a feature cache: names of the files, and reading and checking of manifest, plan, records and shards.

A cache is a folder. ``manifest.json`` lists images and settings; ``shard-00000.safetensors`` and so on hold the
features [V, n, D] of consecutive images. An unfinished cache has a plan ``building.json`` instead of the manifest, and
for each finished shard a ``.json`` record with its checksum. Every file is written to disk first and then renamed
atomically, so a build may be killed at any time and continued later.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from mergetune.clip import PRECISIONS
from mergetune.io import STORED_NAMES, locked, read_regular

FORMAT = "mergetune.features/1"
MANIFEST, PLAN, LOCK = "manifest.json", "building.json", ".lock"
OURS = re.compile(r"manifest\.json|building\.json|shard-\d+\.(safetensors|json)|\..*")  # and hidden files
REBUILD = "overwrite=True (--overwrite) rebuilds the cache, another path keeps it"


def file_state(path: str | Path) -> list[int | None]:
    try:
        stat = os.stat(path)
    except OSError:
        return [None, None]
    return [stat.st_size, stat.st_mtime_ns]


def cache_lock(path: Path) -> AbstractContextManager[None]:
    """Context manager that holds the lock of a cache's folder, so that only one process builds the cache."""
    busy = f"feature cache {path} is being built by another process: wait for it, or use another path"
    return locked(path / LOCK, busy=busy)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def shard_files(plan: dict[str, Any], number: int) -> list[str]:
    first = number * plan["shard_size"]
    return plan["files"][first : first + plan["shard_size"]]


def shard_count(plan: dict[str, Any]) -> int:
    return -(-len(plan["files"]) // plan["shard_size"])


def skipped_files(manifest: dict[str, Any]) -> dict[str, str]:
    return {file: reason for shard in manifest["shards"] for file, reason in shard["skipped"].items()}


def finished_shards(path: Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """{number: record} of the finished shards of an unfinished cache; a damaged shard raises ValueError."""
    done = {}
    for number in range(shard_count(plan)):
        if (path / record_name(number)).is_file():
            record = _read_json(path / record_name(number))
            if record["plan"] == plan["id"]:
                _check_size(path / shard_name(number), record["shard"]["bytes"])
                done[number] = record["shard"]
    return done


def read_document(file: Path, *, images: bool = True) -> dict[str, Any]:
    """Reads a manifest or a plan.

    Args:
        file: the file.
        images: False leaves out the identities of the images, which are two thirds of a manifest.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    content = read_regular(file)
    if not images:
        kept, end = [], 0
        for begin, after in _images_in(content):
            kept.append(content[end:begin] + b"[]")
            end = after
        content = b"".join([*kept, content[end:]])
    document = _parse(content, file)
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} must have format {FORMAT!r}, got {found!r}; {REBUILD}")
    return document


def image_identities(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[int, list[list[Any]]]]:
    """Yields number and image identities of each shard in a manifest, one shard at a time to save memory."""
    content = read_regular(path / MANIFEST)
    places = list(_images_in(content))
    if len(places) == len(manifest["shards"]):
        yield from ((number, json.loads(content[begin:end])) for number, (begin, end) in enumerate(places))
    else:  # the manifest was reformatted after it was written
        yield from enumerate(shard["images"] for shard in json.loads(content)["shards"])


def _images_in(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields begin and end of each list of image identities in the bytes of a manifest."""
    mark, end = b'"images":[[', 0  # no file name can contain this mark: quotes in a name are escaped
    while (found := content.find(mark, end)) >= 0 and (last := content.find(b"]]", found)) >= 0:
        begin, end = found + len(mark) - 2, last + 2
        yield begin, end


def map_shard(path: Path, number: int, shard: dict[str, Any], manifest: dict[str, Any]) -> Tensor:
    """The memory-mapped features of a shard, [V, n, D]. Only the header is read, and not through the mapping."""
    file = path / shard_name(number)
    _check_size(file, shard["bytes"])
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            header = content.get_slice("features")
            names, shape, dtype = list(content.keys()), header.get_shape(), header.get_dtype()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}; {REBUILD}") from error
    expected = [manifest["views"], shard["rows"], manifest["dim"]]
    stored, kept = STORED_NAMES[manifest["dtype"]], PRECISIONS[manifest["dtype"]]
    if names != ["features"] or shape != expected or dtype != stored:
        raise ValueError(f"{file} is damaged: the file must hold {stored} {expected}, got {dtype} {shape}; {REBUILD}")
    begin = shard["bytes"] - math.prod(shape) * kept.itemsize
    return torch.from_file(str(file), size=shard["bytes"], dtype=torch.uint8)[begin:].view(kept).view(shape)


def _check_size(file: Path, size: int) -> None:
    found = file_state(file)[0]
    if found != size:
        state = "missing" if found is None else "truncated" if found < size else "damaged"
        raise ValueError(f"{file} is {state}: the file must have {size} bytes, got {found}; {REBUILD}")


def _read_json(file: Path) -> Any:
    return _parse(read_regular(file), file)


def _parse(content: bytes, file: Path) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; {REBUILD}") from error


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
