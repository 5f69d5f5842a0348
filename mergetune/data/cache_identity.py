"""Whether a feature cache is the one that is wanted: the same weights, settings and images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergetune.data.cache_files import (
    MANIFEST,
    PLAN,
    REBUILD,
    cache_lock,
    file_state,
    image_identities,
    read_document,
    remove_building_files,
    shard_files,
)
from mergetune.data.image_lists import ImageList
from mergetune.io import MAX_IMAGE, compact_json, sha256_regular, write_atomically

# What features depend on, and the words for it. Labels and class names are not among them.
KEY = {
    "fingerprint": "the image weights",
    "preprocess": "the preprocessing",
    "dtype": "dtype",
    "views": "views",
    "seed": "the seed of the augmented views",
}


def is_complete(path: Path, wanted: dict[str, Any], images: ImageList) -> bool:
    """Whether the cache is there. Raises ValueError if it is another one.

    Takes over new labels of the same images, and new modification times, for the next open, and tidies up after a
    build that was killed when all but that was done.
    """
    if not (path / MANIFEST).is_file():
        return False
    manifest = read_document(path / MANIFEST, images=False)
    refuse_stale(path, manifest, wanted)
    lacking = set(wanted["files"]).difference(manifest["files"])
    if lacking:
        first = next(file for file in wanted["files"] if file in lacking)
        raise ValueError(
            f"feature cache {path} lacks {len(lacking)} of {len(images)} images, the first is {first!r}; {REBUILD}"
        )
    moved = refuse_changed(path, manifest, images, image_identities(path, manifest))
    fresh = dict(manifest)
    if len(wanted["files"]) == len(manifest["files"]):
        fresh |= {"labels": reordered(manifest, wanted), "classnames": wanted["classnames"]}
    if moved or fresh != manifest or (path / PLAN).exists():
        # A convenience: where the folder is read-only or someone rebuilds it, what is there does as well.
        with contextlib.suppress(OSError, RuntimeError), cache_lock(path):
            if read_document(path / MANIFEST, images=False) == manifest:
                for number, identities in image_identities(path, manifest):
                    manifest["shards"][number]["images"] = moved.get(number, identities)
                write_atomically(path / MANIFEST, compact_json({**fresh, "shards": manifest["shards"]}))
                remove_building_files(path)
    return True


def refuse_stale(path: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, words in KEY.items():
        if recorded[name] != wanted[name]:
            raise ValueError(
                f"feature cache {path} is stale: {words} must be what it was built with, {recorded[name]}, "
                f"got {wanted[name]}; {REBUILD}"
            )


def refuse_changed(
    path: Path,
    recorded: dict[str, Any],
    images: ImageList,
    identities: Iterable[tuple[int, list[list[Any]]]],
    *,
    trust_mtime: bool = True,
) -> dict[int, list[list[Any]]]:
    """Raise ValueError unless each image still has the bytes that were encoded.

    Args:
        recorded: a manifest or a plan.
        identities: number and images' identities of each shard to look at.
        trust_mtime: whether an image of the recorded size and modification time need not be read.

    Returns:
        The identities of the shards in which a modification time is another one today.
    """
    listed, changed, moved = set(images.files), [], {}
    for number, known in identities:
        today = []
        for file, (sha256, size, mtime) in zip(shard_files(recorded, number), known, strict=True):
            if file in listed:
                now = file_state(os.path.join(images.root, file))
                same = now == [size, mtime] and trust_mtime
                if not same and (now[0] != size or file_sha256(images.root / file) != sha256):
                    changed.append(file)
                mtime = now[1]
            today.append([sha256, size, mtime])
        if today != known:
            moved[number] = today
    if changed:
        raise ValueError(
            f"feature cache {path} is stale: {len(changed)} of {len(images)} images below {images.root} are missing or "
            f"not what was encoded, the first is {changed[0]!r}; {REBUILD}"
        )
    return moved


def reordered(recorded: dict[str, Any], wanted: dict[str, Any]) -> list[int]:
    """The wanted labels in the order of the recorded files."""
    label_of = dict(zip(wanted["files"], wanted["labels"], strict=True))
    return [label_of[file] for file in recorded["files"]]


def image_identity(path: Path) -> list[Any]:
    """[SHA-256, bytes, modification time in ns] of a file; Nones if it cannot be read."""
    stat = file_state(path)  # before reading: a file that changes meanwhile must look changed later
    return [file_sha256(path), *stat]


def file_sha256(path: Path, *, limit: int = MAX_IMAGE) -> str | None:
    try:
        return sha256_regular(path, limit=limit)
    except (OSError, ValueError):
        return None
