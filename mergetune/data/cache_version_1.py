"""Finished feature caches of version 0.1: their documents, reading of their shards, and new labels in their manifest.

``shard-00000.safetensors`` and so on hold the features [V, n, D] of n consecutive images. Caches of this version are
read and relabelled, but no longer built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import safetensors
import torch
from pydantic import Strict, model_validator
from tqdm.auto import tqdm

from mergetune.data.cache_documents import Identity, Settings
from mergetune.data.row_reading import Extent, FileRows, Rows, TensorRows, UnitNorms, in_memory, may_open
from mergetune.io import (
    MAX_WEIGHTS,
    STORED_NAMES,
    Count,
    Document,
    Items,
    Sha256,
    Size,
    compact_json,
    damaged,
    fault,
    hidden,
    parse_document,
    read_regular,
    sha256_regular,
    write_atomically,
)

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT_1 = "mergetune.features/1"
ANEW = "overwrite=True (--overwrite) rebuilds the cache, another path keeps it"

ImageOfShard = Annotated[tuple[str | None, int | None, int | None], Strict(False)]


class Shard(Document, frozen=True):
    """A shard: size and checksum of its file, rows per view, identity of each image, {file: reason} of skipped ones."""

    bytes: Size
    sha256: Sha256
    rows: Count
    images: Items[ImageOfShard]
    skipped: dict[str, str]


class ShardImages(Document, frozen=True):
    """The identities of a shard's images alone."""

    images: Items[ImageOfShard]


class Manifest1(Settings, frozen=True, extra="allow"):
    """The manifest of a finished cache of version 0.1."""

    format: Literal["mergetune.features/1"]
    torch: str
    shards: Items[Shard]

    @model_validator(mode="after")
    def _shards_hold_the_files(self) -> Self:
        if len(self.shards) != self.shard_count:
            raise fault(("shards",), f"a list of {self.shard_count:,}, one entry per shard", self.shards)
        for number, shard in enumerate(self.shards):
            files = self.files_of(number)
            if foreign := shard.skipped.keys() - set(files):
                raise fault(("shards", number, "skipped"), "limited to images of this shard", min(foreign))
            if shard.rows != (readable := len(files) - len(shard.skipped)):
                expected = f"{readable:,}, one per image that was not skipped"
                raise fault(("shards", number, "rows"), expected, shard.rows)
        return self

    @property
    def skipped(self) -> dict[str, str]:
        """{file: reason} of all images that could not be read."""
        return {file: reason for shard in self.shards for file, reason in shard.skipped.items()}


def without_identities(content: bytes) -> bytes:
    """The bytes of a manifest without the identities of the images."""
    kept, end = [], 0
    for begin, after in _images_in(content):
        kept.append(content[end:begin] + b"[]")
        end = after
    return b"".join([*kept, content[end:]])


def image_identities_1(file: Path, manifest: Manifest1) -> Iterator[Identity]:
    """The identities of all images in the order of the files, parsed shard by shard to save memory."""
    content = read_regular(file)
    places = list(_images_in(content))
    if len(places) == len(manifest.shards):
        texts = (b'{"images":%b}' % content[begin:end] for begin, end in places)
        found = (
            parse_document(text, ShardImages, name=file, way_on=ANEW, at=("shards", number)).images
            for number, text in enumerate(texts)
        )
    else:  # the manifest was reformatted after it was written
        found = (shard.images for shard in parse_document(content, Manifest1, name=file, way_on=ANEW).shards)
    for number, images in enumerate(found):
        if len(images) != (count := len(manifest.files_of(number))):
            rule = f"be a list of {count:,}, one entry per image"
            raise damaged(file, ("shards", number, "images"), rule, images, way_on=ANEW)
        yield from images


def _images_in(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields begin and end of each list of image identities in the bytes of a manifest."""
    mark, end = b'"images":[[', 0  # no file name can contain this mark: quotes in a name are escaped
    while (found := content.find(mark, end)) >= 0 and (last := content.find(b"]]", found)) >= 0:
        begin, end = found + len(mark) - 2, last + 2
        yield begin, end


def update_manifest_1(file: Path, manifest: Manifest1, identities: Sequence[Identity]) -> None:
    """Writes a manifest with other labels or identities of the images; the shards stay."""
    each = iter(identities)
    shards = [
        shard.model_copy(update={"images": tuple(next(each) for _ in manifest.files_of(number))})
        for number, shard in enumerate(manifest.shards)
    ]
    write_atomically(file, compact_json(manifest.model_copy(update={"shards": tuple(shards)}).model_dump()))


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _extents(path: Path, manifest: Manifest1) -> list[Extent]:
    """Where the rows of all shards lie; sizes of the files and their headers are checked."""
    found = []
    for number, shard in enumerate(manifest.shards):
        file = path / shard_name(number)
        size = file.stat().st_size if file.is_file() else None
        if size != shard.bytes:
            state = "missing" if size is None else "truncated" if size < shard.bytes else "damaged"
            raise ValueError(f"{file} is {state}: the file must have {shard.bytes} bytes, got {size}; {ANEW}")
        try:
            with safetensors.safe_open(file, framework="pt") as content:
                header = content.get_slice("features")
                names, shape, dtype = list(content.keys()), header.get_shape(), header.get_dtype()
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}; {ANEW}") from error
        expected, stored = [manifest.views, shard.rows, manifest.dim], STORED_NAMES[manifest.dtype]
        if names != ["features"] or shape != expected or dtype != stored:
            must = f"the file must hold {stored} {expected}, got {dtype} {shape}"
            raise ValueError(f"{file} is damaged: {must}; {ANEW}")
        if shard.rows:
            item = 4 if manifest.dtype == "float32" else 2
            found.append(Extent(file, shard.bytes - math.prod(shape) * item, shard.rows))
    return found


def verify_shards(path: Path, manifest: Manifest1, *, progress: bool) -> None:
    """Compares the checksums of all shards; ValueError names the first that differs."""
    first = 0
    for number, shard in enumerate(tqdm(manifest.shards, desc="verify", unit="shard", disable=hidden(progress))):
        file = path / shard_name(number)
        if sha256_regular(file, limit=MAX_WEIGHTS) != shard.sha256:
            told = f"its checksum must be that in the manifest, got another (rows from {first:,} on)"
            raise ValueError(f"{file} is damaged: {told}; {ANEW}")
        first += shard.rows


def open_shards(path: Path, manifest: Manifest1, *, most_in_memory: int) -> Rows:
    """The rows of all shards: in memory if they have few bytes or too many files, else read from the files."""
    extents = _extents(path, manifest)
    checksums = "".join(shard.sha256 for shard in manifest.shards).encode()  # as version 0.1 computed digests
    count, form = sum(extent.count for extent in extents), (manifest.views, manifest.dim, manifest.dtype)
    norms = UnitNorms(manifest.views, count, partial(_damaged, path))

    def rows(parts: list[Extent], **more: Any) -> FileRows:
        return FileRows(parts, *form, mapped=False, way_on=ANEW, **more)

    if sum(shard.bytes for shard in manifest.shards) > most_in_memory and may_open(len(extents)):
        return rows(extents, checksums=checksums, norms=norms)
    return TensorRows([torch.cat([in_memory(rows([extent])) for extent in extents], dim=1)], checksums, norms)


def _damaged(path: Path, told: str) -> ValueError:
    return ValueError(f"feature cache {path} is damaged: {told}; {ANEW}")
