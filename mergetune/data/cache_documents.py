"""The documents of a feature cache as models: its plan, its manifest, and the records of its shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, Strict, model_validator

from mergetune.io import FIRST_DECODING, Count, Document, Items, JsonObject, Sha256, Size, fault

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "mergetune.features/1"

Identity = Annotated[tuple[str | None, int | None, int | None], Strict(False)]
"""SHA-256, size in bytes and modification time in ns of an image; None for values that could not be read."""


class Shard(Document, frozen=True):
    """A shard as its record and the manifest describe it.

    Attributes:
        bytes, sha256: size and checksum of its file.
        rows: n, number of features per view.
        images: identity of each image of the shard, also of the skipped ones.
        skipped: {file: reason} of the images that could not be read.
    """

    bytes: Size
    sha256: Sha256
    rows: Count
    images: Items[Identity]
    skipped: dict[str, str]

    def misfit(self, files: Sequence[str], *, images: bool) -> tuple[str, str, object] | None:
        """What does not fit the names of the shard's images: field, expectation and value; None if all fits.

        Args:
            files: the names.
            images: whether ``images`` was read as well.
        """
        if foreign := self.skipped.keys() - set(files):
            return "skipped", "limited to images of this shard", min(foreign)
        readable = len(files) - len(self.skipped)
        if self.rows != readable:
            return "rows", f"{readable:,}, one per image that was not skipped", self.rows
        if images and len(self.images) != len(files):
            return "images", f"a list of {len(files):,}, one entry per image", self.images
        return None


class ShardImages(Document, frozen=True):
    """The identities of a shard's images alone."""

    images: Items[Identity]


class ShardRecord(Document, frozen=True):
    """The record of a finished shard in an unfinished cache; ``plan`` is the ``id`` of its plan."""

    plan: str
    shard: Shard


class Plan(Document, frozen=True, extra="allow"):
    """The plan of an unfinished cache. Fields that a later version adds are kept.

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
        shard_size: images per shard.
        files: N names, relative to the root of the images.
        labels: N class indices.
        classnames: C names.
        id: digest of all fields on which the shards depend.
    """

    format: Literal["mergetune.features/1"]
    clip: str
    fingerprint: str
    preprocess: JsonObject
    decoding: str = FIRST_DECODING
    dtype: Literal["float32", "bfloat16", "float16"]
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
        """The names of a shard's images."""
        first = number * self.shard_size
        return self.files[first : first + self.shard_size]


class Manifest(Plan, frozen=True, extra="allow"):
    """The manifest of a finished cache.

    Attributes:
        torch: version of torch that encoded the last images.
        shards: one entry per shard.
    """

    torch: str
    shards: Items[Shard]

    @model_validator(mode="after")
    def _shards_hold_the_files(self) -> Self:
        if len(self.shards) != self.shard_count:
            raise fault(("shards",), f"a list of {self.shard_count:,}, one entry per shard", self.shards)
        for number, shard in enumerate(self.shards):
            if wrong := shard.misfit(self.files_of(number), images=False):
                field, expected, value = wrong
                raise fault(("shards", number, field), expected, value)
        return self

    @property
    def skipped(self) -> dict[str, str]:
        """{file: reason} of all images that could not be read."""
        return {file: reason for shard in self.shards for file, reason in shard.skipped.items()}
