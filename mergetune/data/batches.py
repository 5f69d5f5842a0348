"""Batches: what training and evaluation read of images, whether cached features, tokens or pixels.

Shapes: N images, B images asked for, V views of each image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mergetune.facts.brief import brief


class Batches(Protocol):
    """Images with labels, in a form that a solution reads; :class:`FeatureCache` and :class:`PixelBatches` are such.

    Images that are decoded when they are read also have ``stream``, see :meth:`PixelBatches.stream`.

    Attributes:
        holds: the form, "feature", "raw feature", "pixels" or tokens, see :func:`mergetune.clip.prepare_images`.
        labels: LongTensor [N].
        classnames: one name per class.
        files: N relative paths, or none.
        fingerprint: the image fingerprint of the model that made them; empty if no model did.
        views: V.
        digest: a digest of labels, class names and contents.
    """

    @property
    def holds(self) -> str: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def classnames(self) -> tuple[str, ...]: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def views(self) -> int: ...
    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def rows(self, index: Tensor, view: int | Tensor = 0) -> Tensor:
        """The inputs of some images, [B, ...]; ``view`` is one for all, or [B]."""
        ...

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """All images once, in their order, view 0: inputs, labels, and which rows they are."""
        ...

    def shared_with(self, other: Any) -> Tensor:
        """The rows of ``other``, batches of the same form, whose images are here too."""
        ...


def random_views(features: Batches, parts: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """The inputs of each batch, [B, ...], with a random view of each image.

    Args:
        features: the images.
        parts: the images of each batch.
        generator: random generator of the views.
    """

    def views(index: Tensor) -> int | Tensor:
        return torch.randint(features.views, (len(index),), generator=generator) if features.views > 1 else 0

    stream: Any = getattr(features, "stream", None)
    if stream is not None:  # it reads ahead, so all views are drawn first
        yield from stream([(index, views(index)) for index in parts])
        return
    for index in parts:
        yield features.rows(index, views(index))


@brief()
@dataclass(frozen=True, eq=False)
class TensorBatches:
    """Images in memory: pixels, tokens or features of any shape.

    Attributes:
        inputs: [N, ...], or [V, N, ...] with ``views`` given.
        labels: LongTensor [N].
        classnames: one name per class.
        holds: what ``inputs`` are, see :class:`Batches`.
    """

    inputs: Tensor
    labels: Tensor
    classnames: tuple[str, ...]
    holds: str = "pixels"
    files: tuple[str, ...] = ()
    views: int = 1

    fingerprint: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classnames", tuple(self.classnames))
        if self.views == 1:
            object.__setattr__(self, "inputs", self.inputs[None])
        if self.inputs.ndim < 3 or self.inputs.shape[:2] != (self.views, len(self.labels)):
            raise ValueError(
                f"inputs must have shape [N, ...] with N = {len(self.labels)} labels, got {list(self.inputs.shape[1:])}"
            )
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1 or not len(self.labels):
            raise ValueError(f"labels must be a LongTensor [N], got {self.labels.dtype} {list(self.labels.shape)}")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classnames):
            raise ValueError(f"labels must lie in [0, {len(self.classnames)}), got {int(self.labels.max())}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(repr((self.holds, self.classnames, tuple(self.inputs.shape))).encode())
        for tensor in (self.labels, self.inputs):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def rows(self, index: Tensor, view: int | Tensor = 0) -> Tensor:
        return self.inputs[view, index]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            yield self.inputs[0, part], self.labels[part], part

    def shared_with(self, other: TensorBatches) -> Tensor:
        known, theirs = {row.contiguous().numpy().tobytes() for row in self.inputs[0]}, other.inputs[0]
        shared = [i for i, row in enumerate(theirs) if row.contiguous().numpy().tobytes() in known]
        return torch.tensor(shared, dtype=torch.int64)


def check_batches(features: Any, name: str = "features") -> None:
    """Raise TypeError unless an argument is :class:`Batches`.

    Args:
        features: the argument.
        name: its name.
    """
    if not (hasattr(features, "rows") and hasattr(features, "batches")):
        path = isinstance(features, str | os.PathLike)
        got = repr(os.fspath(features)) if path else f"a {type(features).__name__}"
        opens = "mergetune.FeatureCache.open(FOLDER) opens them"
        way_on = opens if path else f"{opens}, mergetune.cache_features(clip, IMAGES, FOLDER) makes them of images"
        raise TypeError(f"{name} must be cached features, got {got}: {way_on}")


def check_holds(features: Batches, wanted: Any, owner: str, *, name: str = "features") -> None:
    """Raise ValueError unless images have the form that a solution reads.

    Args:
        features: the images.
        wanted: the image input of the solution.
        owner: kind of the solution.
        name: name of the argument.
    """
    if features.holds != wanted:
        way_on = ": mergetune.data.PixelBatches.of(clip, images) reads them" if wanted == "pixels" else ""
        raise ValueError(f"{name} must hold the image input of a {owner}, {wanted}, got {features.holds}{way_on}")
