"""Decoding of pictures in worker processes, batch by batch and in order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mergetune.data.pictures import FoundPicture
from mergetune.facts.brief import brief
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS
from mergetune.io import begin_worker, read_picture, visible


def decode_in_workers(
    dataset: Dataset, batches: Iterable[list[Any]], *, collate: Callable[[list[Any]], Any], workers: int
) -> Iterator[Any]:
    """Reads batches of a dataset in worker processes; the results come in the order of the batches.

    Args:
        dataset: ``dataset[item]`` reads one item.
        batches: the items of each batch. They are taken when a worker is free, so they may be made one by one.
        collate: function of the read items of a batch that returns the result; runs in the worker.
        workers: number of processes; 0 reads in the calling process.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # the loader draws a seed; it must not change the caller's random stream
    )
    return iter(loader)


def seeded_view(augment: Callable[[Any], Tensor], image: Any, *, seed: int | None, view: int, file: str) -> Tensor:
    """A random view of an image, [3, H, W], with a random stream of its own; torch's global stream does not move."""
    stream = f"{seed}\0{view}\0{file}".encode(errors="surrogateescape")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(stream).digest()[:8], "big"))
        return augment(image)


@brief("pixels", pictures=lambda found: len(found.pictures), errors=lambda found: len(found.errors))
@dataclass(frozen=True)
class DecodedPictures:
    """A batch of B pictures, of which R are readable.

    Attributes:
        pictures: the B pictures.
        pixels: preprocessed pixels of the readable ones, in order, [R, 3, H, W]; [0] if there are none.
        errors: position of each unreadable picture -> the reason.
    """

    pictures: list[FoundPicture]
    pixels: Tensor
    errors: dict[int, str]


def decode_pictures(
    pictures: Iterable[FoundPicture],
    preprocess: Callable[[Any], Tensor],
    preprocess_cfg: Mapping[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    background: str = BACKGROUND,
) -> Iterator[DecodedPictures]:
    """Decodes and preprocesses pictures. Memory is bounded: ``pictures`` may be a generator without an end.

    Worker processes read the files. Pictures in memory are preprocessed in the calling process.

    Args:
        pictures: what :func:`find_pictures` gives.
        preprocess: transform of a CLIP, a PIL image -> [3, H, W].
        preprocess_cfg: settings of the transform.
        batch_size: most pictures per batch.
        workers: number of processes that decode files; 0 decodes in the calling process.
        max_pixels: largest width times height of a picture; a larger picture counts as unreadable.
        background: colour under transparent pixels.

    Raises:
        TypeError, ValueError: ``pictures`` raises such an error.
    """
    waiting: deque[list[FoundPicture]] = deque()

    def batches() -> Iterator[list[str | None]]:
        source = iter(pictures)
        while batch := list(islice(source, batch_size)):
            waiting.append(batch)
            yield [found.file for found in batch]

    read = _Reader(preprocess, {"preprocess_cfg": preprocess_cfg, "max_pixels": max_pixels, "background": background})
    for stacked, reasons in decode_in_workers(read, batches(), collate=_stack_readable, workers=workers):
        batch, readable = waiting.popleft(), iter(stacked)
        rows = [
            read.decode(found.value) if found.file is None else reason or next(readable)
            for found, reason in zip(batch, reasons, strict=True)
        ]
        errors = {i: row for i, row in enumerate(rows) if isinstance(row, str)}
        if len(rows) - len(errors) > len(stacked):  # pictures in memory stand between the files
            stacked = torch.stack([row for row in rows if not isinstance(row, str)])
        yield DecodedPictures(batch, stacked, errors)


class _Reader(Dataset):
    """Item "file" is the preprocessed picture, [3, H, W], or the text of the error; item None is None."""

    def __init__(self, preprocess: Callable[[Any], Tensor], reading: Mapping[str, Any]) -> None:
        self.preprocess, self.reading = preprocess, reading

    def __getitem__(self, file: str | None) -> Tensor | str | None:
        return None if file is None else self.decode(file)

    def decode(self, picture: Any) -> Tensor | str:
        """Pixels of a picture of any form, or the text of the error. A tensor holds preprocessed pixels already."""
        if isinstance(picture, Tensor):
            return picture.float()
        try:
            return self.preprocess(read_picture(picture, **self.reading))
        except Exception as error:  # also what the transform raises: each picture gets its row
            return visible(str(error)) or type(error).__name__


def _stack_readable(results: list[Tensor | str | None]) -> tuple[Tensor, list[str | None]]:
    """The readable pictures as one tensor, and for each picture its error or None.

    One tensor per batch takes one shared-memory file on its way out of the worker, not one per picture.
    """
    pixels = [result for result in results if isinstance(result, Tensor)]
    reasons = [result if isinstance(result, str) else None for result in results]
    return torch.stack(pixels) if pixels else torch.empty(0), reasons
