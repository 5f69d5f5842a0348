"""The documents of a feature cache as models: plan, records of blocks, manifest, identities of images, last check.

Letters: N files, V views, D embedding width. A block is ``shard_size`` consecutive rows of one view of an array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from mergetune.io import FIRST_DECODING, Count, Document, Items, JsonObject, Sha256, Size, fault

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "mergetune.features/2"
FEATURES = "features"  # name of the array that FeatureCache reads
ALIGNMENT = 4096  # arrays begin at multiples of this number of bytes
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes

Identity = tuple[str | None, int | None, int | None]
"""SHA-256, size in bytes and modification time in ns of an image; None for values that could not be read."""
ArrayType = Literal["float32", "bfloat16", "float16"]


class Layout(Document, frozen=True):
    """Where an array lies in the file, and what it holds.

    Attributes:
        name: its name; "features" are the image features.
        dtype: type of the numbers, little-endian; bfloat16 is the upper half of float32.
        shape: [V, N, ...], in C order. Row i belongs to file i; the rows of skipped files are zeros.
        offset: where the array begins in the file, in bytes.
        unit_norm: whether each row of a file that was not skipped has norm 1.
    """

    name: Annotated[str, Field(min_length=1)]
    dtype: ArrayType
    shape: Annotated[Items[Size], Field(min_length=2)]
    offset: Count
    unit_norm: bool

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[2:]) * ITEM_SIZES[self.dtype]

    @property
    def end(self) -> int:
        return self.offset + self.shape[0] * self.shape[1] * self.row_bytes

    def blocks(self, size: int) -> Iterator[tuple[int, int, int]]:
        """Yields view, first row and number of rows of each block of up to ``size`` rows, view by view."""
        for view in range(self.shape[0]):
            for first in range(0, self.shape[1], size):
                yield view, first, min(size, self.shape[1] - first)

    def place(self, view: int, row: int) -> int:
        """Where a row begins in the file, in bytes."""
        return self.offset + (view * self.shape[1] + row) * self.row_bytes


class Array(Layout, frozen=True):
    """An array of a finished cache; ``sha256`` has the checksum of each block, view by view."""

    sha256: Items[Sha256]


def lay_out(arrays: Iterable[tuple[str, str, Sequence[int], bool]]) -> tuple[Layout, ...]:
    """The layouts of arrays that follow each other in a file.

    Args:
        arrays: name, dtype, shape [V, N, ...] and whether rows have unit norm, of each array.
    """
    found, end = [], 0
    for name, dtype, shape, unit_norm in arrays:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        values = {"name": name, "dtype": dtype, "shape": shape, "offset": offset}
        found.append(Layout.model_validate({**values, "unit_norm": unit_norm}))
        end = found[-1].end
    return tuple(found)


class Settings(Document, frozen=True, extra="allow"):
    """What the plans of all versions have. Fields that a later version adds are kept.

    Attributes:
        format: name and version of the format.
        clip: name of the model.
        fingerprint: fingerprint of its image tower.
        preprocess: its preprocessing.
        decoding: how pictures become RGB, in words, see :func:`mergetune.io.decoding_rules`.
        dtype: type of the stored features.
        views: V, views of each image.
        seed: seed of the augmented views; None without such views.
        dim: D, embedding width.
        shard_size: images per block (rows per shard in version 0.1); the last block may have fewer.
        files: N names, relative to the root of the images.
        labels: N class indices.
        classnames: C names.
        id: digest of all fields on which the features depend.
    """

    format: str
    clip: str
    fingerprint: str
    preprocess: JsonObject
    decoding: str = FIRST_DECODING
    dtype: ArrayType
    views: Size
    seed: int | None
    dim: Size
    shard_size: Size
    files: Annotated[Items[str], Field(min_length=1)]
    labels: Items[int]
    classnames: Items[str]
    id: str

    @model_validator(mode="after")
    def _one_label_per_file(self) -> Self:
        if len(self.labels) != len(self.files):
            raise fault(("labels",), f"a list of {len(self.files):,}, one class index per file", self.labels)
        if self.labels and (min(self.labels) < 0 or max(self.labels) >= len(self.classnames)):
            wrong = next(i for i, label in enumerate(self.labels) if not 0 <= label < len(self.classnames))
            expected = f"a class index below {len(self.classnames):,}"
            raise fault(("labels", wrong), expected, self.labels[wrong])
        return self

    @property
    def shard_count(self) -> int:
        return -(-len(self.files) // self.shard_size)

    def files_of(self, number: int) -> tuple[str, ...]:
        """The names of the images of a block."""
        first = number * self.shard_size
        return self.files[first : first + self.shard_size]


class Plan(Settings, frozen=True, extra="allow"):
    """The plan of an unfinished cache.

    Attributes:
        bytes: size of the file with the arrays.
        arrays: the arrays, in the order of the file.
    """

    format: Literal["mergetune.features/2"]
    bytes: Size
    arrays: Annotated[Items[Layout], Field(min_length=1)]

    @model_validator(mode="after")
    def _arrays_fit(self) -> Self:
        if len(set(self.files)) != len(self.files):
            raise fault(("files",), "a list of different names", self.files)
        end, start = 0, [self.views, len(self.files)]
        for i, array in enumerate(self.arrays):
            if list(array.shape[:2]) != start:
                raise fault(("arrays", i, "shape"), f"[{start[0]:,}, {start[1]:,}, ...], views and files", array.shape)
            if array.offset < end or array.offset % ALIGNMENT:
                expected = f"a multiple of {ALIGNMENT:,} behind the array before, from {end:,} on"
                raise fault(("arrays", i, "offset"), expected, array.offset)
            if array.name in {other.name for other in self.arrays[:i]}:
                raise fault(("arrays", i, "name"), "a name that no other array has", array.name)
            end = array.end
        if self.bytes != end:
            raise fault(("bytes",), f"{end:,}, where the last array ends", self.bytes)
        facts = (FEATURES, self.dtype, (self.dim,), True)
        if facts not in [(array.name, array.dtype, array.shape[2:], array.unit_norm) for array in self.arrays]:
            expected = f"a list with an array {FEATURES!r} of unit norm, {self.dtype} and width {self.dim:,}"
            raise fault(("arrays",), expected, self.arrays)
        return self


class Manifest(Plan, frozen=True, extra="allow"):
    """The manifest of a finished cache.

    Attributes:
        checksum: SHA-256 of all bytes of the document behind this field and its comma.
        arrays: the arrays with the checksums of their blocks.
        rows: number of files that were not skipped.
        skipped: {file: reason} of the images that could not be read.
        torch: version of torch that encoded the last images.
    """

    checksum: Sha256
    arrays: Annotated[Items[Array], Field(min_length=1)]
    rows: Size
    skipped: dict[str, str]
    torch: str

    @model_validator(mode="after")
    def _rows_and_blocks_fit(self) -> Self:
        if foreign := self.skipped.keys() - set(self.files):
            raise fault(("skipped",), "limited to names in files", min(foreign))
        if self.rows != (readable := len(self.files) - len(self.skipped)):
            raise fault(("rows",), f"{readable:,}, one per file that was not skipped", self.rows)
        for i, array in enumerate(self.arrays):
            if len(array.sha256) != (count := self.views * self.shard_count):
                expected = f"a list of {count:,}, one checksum per block"
                raise fault(("arrays", i, "sha256"), expected, array.sha256)
        return self

    def array(self, name: str) -> Array:
        return next(array for array in self.arrays if array.name == name)


class Identities(Document, frozen=True):
    """SHA-256, size in bytes and modification time in ns of images, each as a list; null if it could not be read."""

    sha256: Items[str | None]
    bytes: Items[int | None]
    mtime_ns: Items[int | None]

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        for name in ("bytes", "mtime_ns"):
            if len(found := getattr(self, name)) != len(self.sha256):
                raise fault((name,), f"a list of {len(self.sha256):,}, one entry per image", found)
        return self

    @classmethod
    def of(cls, identities: Sequence[Identity]) -> Self:
        sha256, sizes, times = zip(*identities, strict=True)
        return cls(sha256=sha256, bytes=sizes, mtime_ns=times)

    def __len__(self) -> int:
        return len(self.sha256)

    def each(self) -> Iterator[Identity]:
        """Yields the identity of each image."""
        return zip(self.sha256, self.bytes, self.mtime_ns, strict=True)


class ImagesFile(Document, frozen=True):
    """The identities of all images of a finished cache, in the order of its files; ``plan`` is its ``id``."""

    checksum: Sha256
    format: Literal["mergetune.images/2"]
    plan: str
    images: Identities


class BlockRecord(Document, frozen=True):
    """The record of a finished block of an unfinished cache.

    Attributes:
        plan: the ``id`` of the plan.
        sha256: for each array of the plan the checksums of the block, one per view.
        images: identities of the images of the block, also of the skipped ones.
        skipped: {file: reason} of the images that could not be read.
    """

    plan: str
    sha256: Items[Items[Sha256]]
    images: Identities
    skipped: dict[str, str]

    def misfit(self, plan: Plan, number: int) -> tuple[tuple[str | int, ...], str, object] | None:
        """What does not fit the plan: field, expectation and value; None if all fits."""
        files = plan.files_of(number)
        if foreign := self.skipped.keys() - set(files):
            return ("skipped",), "limited to images of this block", min(foreign)
        if len(self.images) != len(files):
            return ("images",), f"a list of {len(files):,}, one entry per image", self.images.sha256
        if len(self.sha256) != len(plan.arrays):
            return ("sha256",), f"a list of {len(plan.arrays):,}, one entry per array", self.sha256
        for i, checksums in enumerate(self.sha256):
            if len(checksums) != plan.views:
                return ("sha256", i), f"a list of {plan.views:,}, one checksum per view", checksums
        return None


class LastCheck(Document, frozen=True):
    """State of the file with the arrays when all checksums were last compared.

    Attributes:
        bytes, mtime_ns, ctime_ns, inode: state of the file. A process can set the time of modification, and cannot set
            the time of change.
        blocks: digest of the checksums of all blocks.
    """

    bytes: Count
    mtime_ns: int
    ctime_ns: int
    inode: Count
    blocks: Sha256
