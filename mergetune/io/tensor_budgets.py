"""Limits of the total size of a file's tensors, because views can repeat the numbers of a small file without end."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mergetune.io.files import open_regular
from mergetune.io.sentences import named

MAX_REPEATED = 4  # most bytes of all tensors per byte of the file: tied weights and views repeat a storage
MAX_EXPANDED = 1 << 26  # bytes of all tensors that are always allowed
MAX_UNPACKED = 16  # most bytes of a compressed file's content per byte of the file: weights compress little
FREE_UNPACKED = 1 << 26  # bytes of the content that are always allowed


class Sized(Protocol):
    """An object with a shape and a size in bytes: a tensor, or the description of a tensor that is not created yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def require_budget(tensors: Collection[Sized], stored: int) -> None:
    """Raises ValueError if separate copies of the tensors would need far more memory than the ``stored`` bytes."""
    needed = sum(tensor.nbytes for tensor in tensors)
    if needed > max(MAX_REPEATED * stored, MAX_EXPANDED):
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        raise ValueError(
            f"its tensors have {needed:,} bytes, the largest of them shape {list(largest.shape)}, and the file has "
            f"{stored:,}: tensors may have {MAX_REPEATED} times the bytes of the file, or {MAX_EXPANDED:,} bytes in all"
        )


def require_unpacked(unpacked: int, stored: int) -> None:
    """Raises ValueError if the content of a compressed file of ``stored`` bytes has far more bytes."""
    if unpacked > max(MAX_UNPACKED * stored, FREE_UNPACKED):
        raise ValueError(
            f"its arrays have {unpacked:,} bytes and the file has {stored:,}: arrays must have at most {MAX_UNPACKED} "
            f"times the bytes of the file, or {FREE_UNPACKED:,}"
        )


def require_stored(file: str | Path) -> None:
    """Raises ValueError if a zip file compresses an entry: torch would unpack it, and zeros shrink 1,000 times."""
    with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
        if packed := next((entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED), None):
            raise ValueError(f"{named(packed.filename)} is compressed, and torch.save compresses nothing")


def tensor_views(content: Any) -> Iterator[Tensor]:
    """Yields the different tensors in nested dicts and lists; tied tensors, which are equal views, only once."""
    seen: set[Any] = set()
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided:  # sparse tensors do not repeat numbers
                continue
            where = value.data_ptr(), value.dtype, value.shape, value.stride()
            if where not in seen:
                seen.add(where)
                yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
