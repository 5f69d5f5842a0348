"""How large the tensors of a file may be together: a tensor can repeat the file's numbers as often as it likes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_REPEATED = 4  # bytes of all tensors together, for each byte of the file: tied weights and views repeat a storage
MAX_EXPANDED = 1 << 26  # bytes that all tensors together may have whatever the file's size is


class Sized(Protocol):
    """A tensor, or one that is not made yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def require_budget(tensors: Collection[Sized], stored: int) -> None:
    """Refuse tensors that would fill the memory from a file of ``stored`` bytes, once each has its own numbers."""
    needed = sum(tensor.nbytes for tensor in tensors)
    if needed > max(MAX_REPEATED * stored, MAX_EXPANDED):
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        raise ValueError(
            f"its tensors have {needed:,} bytes, the largest of them shape {list(largest.shape)}, and the file has "
            f"{stored:,}: it may hold each number {MAX_REPEATED} times, or tensors of {MAX_EXPANDED:,} bytes in all"
        )


def tensor_views(content: Any) -> Iterator[Tensor]:
    """The different tensors in dicts and lists: of those that torch ties, which are one, the first."""
    seen: set[Any] = set()
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided:  # sparse tensors repeat nothing
                continue
            where = value.data_ptr(), value.dtype, value.shape, value.stride()
            if where not in seen:
                seen.add(where)
                yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
