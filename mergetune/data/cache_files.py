"""The files of a feature cache: names, manifest, plan and records of the shards, read and checked.

A cache is a folder. ``manifest.json`` says what was encoded and how; ``shard-00000.safetensors`` and so on hold the
features [V, n, D] of consecutive images. While it is being built there is a ``building.json`` instead of the manifest,
and beside each finished shard a ``.json`` with its checksum. Every file appears by an atomic rename after it has
reached the disk, so a build can be killed at any moment and goes on where it was.
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
REBUILD = "overwrite=True rebuilds it, another path keeps it"


def file_state(path: str | Path) -> list[int | None]:
    try:
        stat = os.stat(path)
    except OSError:
        return [None, None]
    return [stat.st_size, stat.st_mtime_ns]


def cache_lock(path: Path) -> AbstractContextManager[None]:
    """The lock of a cache's folder, for the one process that builds it."""
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
    """{number: record} of the shards of an unfinished cache that are there. A damaged one is refused."""
    done = {}
    for number in range(shard_count(plan)):
        if (path / record_name(number)).is_file():
            record = _read_json(path / record_name(number))
            if record["plan"] == plan["id"]:
                _check_size(path / shard_name(number), record["shard"]["bytes"])
                done[number] = record["shard"]
    return done


def read_document(file: Path, *, images: bool = True) -> dict[str, Any]:
    """A manifest or a plan, of this format; on request without the images' identities, two thirds of a manifest."""
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
    """Number and images' identities of each shard in a manifest, one after the other: all at once take long lists."""
    content = read_regular(path / MANIFEST)
    places = list(_images_in(content))
    if len(places) == len(manifest["shards"]):
        yield from ((number, json.loads(content[begin:end])) for number, (begin, end) in enumerate(places))
    else:  # not as we write it
        yield from enumerate(shard["images"] for shard in json.loads(content)["shards"])


def _images_in(content: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each list of images' identities in a manifest."""
    mark, end = b'"images":[[', 0  # which no name can hold: the quotes in a name are escaped
    while (found := content.find(mark, end)) >= 0 and (last := content.find(b"]]", found)) >= 0:
        begin, end = found + len(mark) - 2, last + 2
        yield begin, end


def map_shard(path: Path, number: int, shard: dict[str, Any], manifest: dict[str, Any]) -> Tensor:
    """A shard's features [V, n, D], mapped. Nothing is read but the header, and that not through the mapping."""
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
        raise ValueError(f"{file} is damaged: it must hold {stored} {expected}, got {dtype} {shape}; {REBUILD}")
    begin = shard["bytes"] - math.prod(shape) * kept.itemsize
    return torch.from_file(str(file), size=shard["bytes"], dtype=torch.uint8)[begin:].view(kept).view(shape)


def _check_size(file: Path, size: int) -> None:
    found = file_state(file)[0]
    if found != size:
        state = "missing" if found is None else "truncated" if found < size else "damaged"
        raise ValueError(f"{file} is {state}: it must have {size} bytes, got {found}; {REBUILD}")


def _read_json(file: Path) -> Any:
    return _parse(read_regular(file), file)


def _parse(content: bytes, file: Path) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; {REBUILD}") from error


def remove_building_files(path: Path) -> None:
    """Remove what only an unfinished cache needs, the plan last: it tells that there is something to tidy."""
    for file in [*path.glob("shard-*.json"), *path.glob(PLAN)]:
        file.unlink()


def remove_cache_files(path: Path) -> None:
    """Remove a cache's own files, the manifest first, so that what is left never passes for complete."""
    (path / MANIFEST).unlink(missing_ok=True)
    remove_building_files(path)
    for file in path.glob("shard-*.safetensors"):
        file.unlink()
