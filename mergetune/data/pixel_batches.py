"""PixelBatches: preprocessed pixels of an image list, decoded in worker processes when they are read."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mergetune.data.cache_identity import file_sha256
from mergetune.data.decoding import decode_in_workers, seeded_view
from mergetune.data.image_lists import ImageList
from mergetune.facts.brief import brief
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS
from mergetune.io import compact_json, decoding_rules, jsonable, read_picture

if TYPE_CHECKING:
    from mergetune.clip import FrozenClip


@brief("images", "views", "seed", "workers")
@dataclass(frozen=True, eq=False)
class PixelBatches(torch.utils.data.Dataset):
    """Pixels of labelled images, for solutions that change the image tower, such as a LoRA. Make it with :meth:`of`.

    Nothing is kept in memory: each step decodes the images of one batch. View 0 of an image is the evaluation
    transform. Every other view is CoOp's random crop and flip, with a separate random stream from seed, view and file
    name, so a view has the same pixels whenever it is read. Views cost nothing until they are read.

    Attributes:
        images: the images.
        preprocess, augment: functions of a PIL image that return view 0 and a random view, [3, H, W].
        preprocess_cfg: settings of the preprocessing; a CLIP with others is refused.
        views: number of views that training draws from.
        seed: seed of the augmented views.
        batch_size: most images that :meth:`batches` reads at once, which bounds the memory of evaluations.
        workers: number of processes that decode images; 0 decodes in the calling process.
        max_pixels: largest width times height of an image.
        background: colour under transparent pixels.
    """

    images: ImageList
    preprocess: Callable[[Any], Tensor] = field(repr=False)
    augment: Callable[[Any], Tensor] = field(repr=False)
    preprocess_cfg: Mapping[str, Any]
    views: int = 1
    seed: int = 0
    batch_size: int = 64
    workers: int = 0
    max_pixels: int = MAX_PIXELS
    background: str = BACKGROUND

    holds: ClassVar[str] = "pixels"
    fingerprint: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, least in (("views", 1), ("batch_size", 1), ("workers", 0), ("max_pixels", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        decoding_rules(self.background)  # refuses an unknown colour

    @classmethod
    def of(cls, clip: FrozenClip, images: ImageList, **options: Any) -> PixelBatches:
        """The pixels of an image list, preprocessed for a CLIP.

        Args:
            clip: the frozen CLIP.
            images: the images.
            **options: views, seed, batch_size, workers, max_pixels, background.

        Raises:
            TypeError: ``images`` is no image list.
            ValueError: an option is out of range.

        Example:
            >>> import mergetune as mt
            >>> from mergetune.data import ImageList, PixelBatches
            >>> clip = mt.load_clip("icon-clip")
            >>> folder = f"{mt.__path__[0]}/assets"
            >>> pixels = PixelBatches.of(clip, ImageList(folder, ("a.png",), (0,), ("cat",)), views=100)
            >>> len(pixels), pixels.views
            (1, 100)
        """
        if not isinstance(images, ImageList):
            raise TypeError(
                f"images must be an ImageList, got a {type(images).__name__}: mergetune.ImageFolder reads a folder"
            )
        return cls(images, clip.preprocess, clip.augment, dict(clip.preprocess_cfg), **options)

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def labels(self) -> Tensor:
        """LongTensor [N]."""
        return torch.tensor(self.images.labels)

    @property
    def classnames(self) -> tuple[str, ...]:
        return self.images.classnames

    @property
    def files(self) -> tuple[str, ...]:
        return self.images.files

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the pixels and labels depend on, among it the bytes of the files."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        images = self.images
        known = [jsonable(dict(self.preprocess_cfg)), decoding_rules(self.background), self.views, self.seed]
        listed = [images.classnames, images.labels, images.files, self._hashes]
        return hashlib.sha256(compact_json([*known, *listed])).hexdigest()

    @functools.cached_property
    def _hashes(self) -> tuple[str | None, ...]:
        return tuple(file_sha256(path) for path in self.images.paths)

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        """A view of an image, [3, H, W].

        Args:
            item: index of the image and number of the view.

        Raises:
            ValueError: the image cannot be read.
        """
        index, view = item
        picture = read_picture(
            self.images.paths[index],
            preprocess_cfg=self.preprocess_cfg,
            max_pixels=self.max_pixels,
            background=self.background,
        )
        if not view:
            return self.preprocess(picture)
        return seeded_view(self.augment, picture, seed=self.seed, view=view, file=self.images.files[index])

    def rows(self, index: Tensor, view: int | Tensor = 0) -> Tensor:
        """Pixels of some images, [B, 3, H, W]; ``view`` is one for all, or [B]. Decodes in the calling process."""
        return torch.stack([self[item] for item in _items(index, view)])

    def stream(self, parts: Iterable[tuple[Tensor, int | Tensor]]) -> Iterator[Tensor]:
        """Pixels of one batch after the other, [B, 3, H, W]; the worker processes read ahead.

        Args:
            parts: the images and the views of each batch, see :meth:`rows`.
        """
        batches = [_items(index, view) for index, view in parts]
        return decode_in_workers(self, batches, collate=torch.stack, workers=self.workers)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """All images once, in order, view 0: pixels, labels, and their rows; at most ``batch_size`` images at once."""
        parts = torch.arange(len(self)).split(min(size, self.batch_size))
        start = 0
        for index, pixels in zip(parts, self.stream((index, 0) for index in parts), strict=True):
            yield pixels, self.labels[index], slice(start, start + len(index))
            start += len(index)

    def shared_with(self, other: PixelBatches) -> Tensor:
        """Indices of the images of ``other`` that are here too: the same name and the same bytes."""
        known = set(zip(self.files, self._hashes, strict=True))
        pairs = zip(other.files, other._hashes, strict=True)
        return torch.tensor([row for row, pair in enumerate(pairs) if pair in known], dtype=torch.int64)


def _items(index: Tensor, view: int | Tensor) -> list[tuple[int, int]]:
    views = view.tolist() if isinstance(view, Tensor) else [view] * len(index)
    return list(zip(index.tolist(), views, strict=True))
