"""Checks that a feature cache was built from the requested weights, settings and images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mergetune.data.cache_blocks import Damage, find_damage
from mergetune.data.cache_documents import Identity, Manifest, Plan, Settings
from mergetune.data.cache_files import (
    MANIFEST,
    PLAN,
    REBUILD,
    file_state,
    mend,
    read_images,
    read_manifest,
    remove_building_files,
    write_images,
    write_manifest,
)
from mergetune.data.cache_version_1 import Manifest1, image_identities_1, update_manifest_1, verify_shards
from mergetune.data.image_lists import ImageList
from mergetune.io import (
    FIRST_DECODING,
    MAX_IMAGE,
    decoding_differs,
    sha256_regular,
    writing_in,
)

if TYPE_CHECKING:
    from mergetune.clip import FrozenClip
    from mergetune.data.batches import Batches

P = TypeVar("P", bound=Settings)
AnyManifest = Manifest | Manifest1

# Fields on which features depend, and their names in messages. Labels and class names are not among them.
KEY = {
    "fingerprint": "the image weights",
    "preprocess": "the preprocessing",
    "decoding": "the decoding of pictures",
    "dtype": "dtype",
    "views": "views",
    "seed": "the seed of the augmented views",
}


def examine(path: Path, wanted: Plan, images: ImageList, *, trust: bool) -> tuple[bool, Damage | None]:
    """Compares a finished cache at ``path`` with what is wanted.

    If labels of all images or modification times are new, they are stored. Plan and records that a killed build left
    beside the manifest are removed.

    Args:
        path: folder of the cache.
        wanted: plan of the wanted cache.
        images: the images.
        trust: compare the checksums of the arrays only if their file has changed since the last check.

    Returns:
        Whether there is a finished cache, and the damage of its arrays.

    Raises:
        ValueError: the cache was built from other weights, settings or images, its documents are damaged, or its arrays
            are and not all images are given.
    """
    if not (path / MANIFEST).is_file():
        return False, None
    recorded = read_manifest(path)
    manifest = _decoded_alike(recorded, wanted, images) if isinstance(recorded, Manifest1) else recorded
    refuse_stale(path, manifest, wanted)
    lacking = set(wanted.files).difference(manifest.files)
    if lacking:
        first = next(file for file in wanted.files if file in lacking)
        raise ValueError(
            f"feature cache {path} lacks {len(lacking)} of {len(images)} images, the first is {first!r}; {REBUILD}"
        )
    moved = refuse_changed(path, images, zip(manifest.files, image_identities(path, manifest), strict=True))
    if isinstance(manifest, Manifest1):
        if not trust:
            verify_shards(path, manifest, progress=False)
    elif damage := find_damage(path, manifest, trust=trust):
        if len(wanted.files) != len(manifest.files):
            raise ValueError(f"{damage.text}; {mend(path)}, given all {len(manifest.files)} images")
        return True, damage
    fresh = manifest
    if len(wanted.files) == len(manifest.files):
        fresh = relabelled(manifest, wanted)
    if moved or fresh != recorded or (path / PLAN).exists():
        # The update is optional: it is left out if the folder is read-only or another process builds the cache.
        with contextlib.suppress(OSError, RuntimeError), writing_in(path):
            if read_manifest(path) == recorded:
                _update(path, recorded, fresh, moved)
                remove_building_files(path)
    return True, None


def _update(path: Path, recorded: AnyManifest, fresh: AnyManifest, moved: dict[str, Identity]) -> None:
    """Stores new labels, and new identities of images that were moved."""
    today = [moved.get(file, known) for file, known in zip(fresh.files, image_identities(path, recorded), strict=True)]
    if isinstance(fresh, Manifest1):
        update_manifest_1(path / MANIFEST, fresh, today)
        return
    if moved:
        write_images(path, fresh, today)
    if fresh != recorded:
        write_manifest(path, fresh)


def image_identities(path: Path, manifest: AnyManifest) -> Iterable[Identity]:
    """The identities of all images of a finished cache, in the order of its files."""
    if isinstance(manifest, Manifest1):
        return image_identities_1(path / MANIFEST, manifest)
    return read_images(path, manifest).each()


def _decoded_alike(recorded: Manifest1, wanted: Plan, images: ImageList) -> Manifest1:
    """The manifest of a finished cache; one of version 0.1 counts as today's if both decode these pictures alike."""
    if recorded.decoding != FIRST_DECODING or wanted.decoding == FIRST_DECODING:
        return recorded
    if any(decoding_differs(images.root / file) for file in images.files if file not in recorded.skipped):
        return recorded
    return recorded.model_copy(update={"decoding": wanted.decoding})


def check_image_tower(clip: FrozenClip, features: Batches, *, name: str) -> None:
    """Checks that features come from the image tower of a CLIP, if their origin is known.

    Args:
        clip: the model.
        features: the features; ``fingerprint`` is empty if their origin is unknown.
        name: name of the argument, for the message.

    Raises:
        ValueError: the features come from other weights.
    """
    if not features.fingerprint or clip.has_fingerprint("image", features.fingerprint):
        return
    path: Path | None = getattr(features, "path", None)
    maker = "" if path is None or not (path / MANIFEST).is_file() else read_manifest(path).clip
    of = f"those of {_printable(maker)}" if maker else "those of another CLIP"
    same = " with other weights" if maker == clip.name else ""
    where, mine = "" if path is None else f" in {path}", clip.name or "a FeatureSpace"
    raise ValueError(f"{name} must come from this CLIP's image tower, {mine}, got {of}{same}{where}")


def refuse_stale(path: Path, recorded: Settings, wanted: Plan) -> None:
    if recorded.fingerprint != wanted.fingerprint:
        before, now = _printable(recorded.clip), _printable(wanted.clip)
        raise ValueError(
            f"feature cache {path} is stale: the image weights must be those of {before}, as when the cache was built, "
            f"got {now}{' with other weights' if now == before else ''}; {REBUILD}"
        )
    for name, words in KEY.items():
        before, now = getattr(recorded, name), getattr(wanted, name)
        if before != now:
            raise ValueError(
                f"feature cache {path} is stale: {words} must be {_printable(before)}, as when the cache was built, "
                f"got {_printable(now)}; {REBUILD}"
            )
    before, now = (getattr(plan, "precision", "float32") for plan in (recorded, wanted))
    if before != now:
        raise ValueError(
            f"feature cache {path} is stale: the precision of the image tower must be {before}, as when the cache was "
            f"built, got {now}; {REBUILD}"
        )


def _printable(value: object) -> str:
    return str(value) if str(value).isprintable() else repr(value)


def refuse_changed(
    path: Path, images: ImageList, known: Iterable[tuple[str, Identity]], *, trust_mtime: bool = True
) -> dict[str, Identity]:
    """Checks that each image still has the bytes that were encoded.

    Args:
        path: folder of the cache, for messages.
        images: the images to check; other images of the cache are ignored.
        known: names and recorded identities of images of the cache.
        trust_mtime: whether an image with the recorded size and modification time counts as unchanged without reading.

    Returns:
        {file: current identity} of the images with another modification time.

    Raises:
        ValueError: an image is missing or has other bytes.
    """
    listed, changed, moved = set(images.files), [], {}
    for file, (sha256, size, mtime) in known:
        if file not in listed:
            continue
        now = file_state(os.path.join(images.root, file))
        same = now == (size, mtime) and trust_mtime
        if not same and (now[0] != size or file_sha256(images.root / file) != sha256):
            changed.append(file)
        elif now[1] != mtime:
            moved[file] = (sha256, size, now[1])
    if changed:
        raise ValueError(
            f"feature cache {path} is stale: {len(changed)} of {len(images)} images below {images.root} are missing or "
            f"differ from the encoded ones, the first is {changed[0]!r}; {REBUILD}"
        )
    return moved


def relabelled(recorded: P, wanted: Plan) -> P:
    """The recorded document with the wanted labels and class names; the order of its files stays."""
    label_of = dict(zip(wanted.files, wanted.labels, strict=True))
    labels = tuple(label_of[file] for file in recorded.files)
    return recorded.model_copy(update={"labels": labels, "classnames": wanted.classnames})


def image_identity(path: Path) -> Identity:
    """SHA-256, size in bytes and modification time in ns of a file; None for values that cannot be read."""
    stat = file_state(path)  # taken before reading, so that a file that changes during reading looks changed later
    return file_sha256(path), *stat


def file_sha256(path: Path, *, limit: int = MAX_IMAGE) -> str | None:
    try:
        return sha256_regular(path, limit=limit)
    except (OSError, ValueError):
        return None
