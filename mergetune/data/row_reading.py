"""Reading of rows from the shards of a cache, through memory mappings or with ``preadv``."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergetune.data.cache_files import REBUILD
from mergetune.io import read_at


class OpenFiles:
    """The open files of a cache's shards, closed when no cache object uses them any more.

    If a cache is rebuilt, objects that opened the cache before still read the old files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths, self.files = tuple(paths), []
        for path in self.paths:
            self.files.append(path.open("rb", buffering=0))

    def __del__(self) -> None:
        for file in self.files:
            file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self.paths,)  # another process opens the files again


def may_open(count: int) -> bool:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return hasattr(os, "preadv") and (limit == resource.RLIM_INFINITY or count <= limit // 2)


class RowReader:
    """Reads any rows of some shards in one call, also rows of several shards.

    Args:
        shards: features of each shard, [V, n, D].
        opened: open files of the shards, to read with ``preadv``; None reads from ``shards``.
    """

    def __init__(self, shards: Sequence[Tensor], opened: OpenFiles | None) -> None:
        self.given = shards, opened
        self.counts = torch.tensor([shard.shape[1] for shard in shards])
        self.first = self.counts.cumsum(0) - self.counts
        self.dim, self.dtype, self.opened = shards[0].shape[-1], shards[0].dtype, opened
        size = self.dtype.itemsize
        if opened is not None:  # begin: byte offset of each shard's features in its file
            self.paths, self.descriptors = opened.paths, [file.fileno() for file in opened.files]
            self.begin = torch.tensor([shard.storage_offset() * size for shard in shards])
            return
        # ``window`` views the memory from the lowest to the highest address of all shards as overlapping rows, one per
        # element, so that one number addresses any row. The memory between the shards is never read.
        self.shards = [s.contiguous() if s.data_ptr() % size == 0 else s.clone().contiguous() for s in shards]
        address = torch.tensor([shard.data_ptr() for shard in self.shards])
        lowest = int(address.argmin())
        self.begin = (address - address[lowest]) // size
        last = int((self.begin + self.counts * self.shards[0].shape[0] * self.dim).max()) - self.dim
        words = self.shards[lowest].view({2: torch.int16, 4: torch.int32}[size]).numpy()
        overlapping = np.lib.stride_tricks.as_strided(words, (last + 1, self.dim), (size, size))
        self.window = torch.from_numpy(overlapping).view(self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowReader, self.given  # pickling must not copy the window

    def read(self, row: Tensor, view: Tensor, out: Tensor) -> None:
        """Writes stored rows to ``out``.

        Args:
            row: positions in the concatenated shards, [B].
            view: view of each row, [B].
            out: result, [B, D] float32.
        """
        shard = torch.searchsorted(self.first, row, right=True) - 1
        place = (view * self.counts[shard] + row - self.first[shard]) * self.dim  # offset in the shard, in elements
        raw = out if self.dtype == out.dtype else torch.empty(out.shape, dtype=self.dtype)
        if self.opened is None:
            torch.index_select(self.window, 0, self.begin[shard] + place, out=raw)
        else:
            self._read_files(shard, self.begin[shard] + place * raw.itemsize, raw)
        if raw is not out:
            out.copy_(raw)

    def _read_files(self, shard: Tensor, begin: Tensor, out: Tensor) -> None:
        """Fills ``out`` [B, D] from byte offsets ``begin`` in the files ``shard``; adjacent rows are read together."""
        width = self.dim * out.itemsize
        breaks = (shard.diff() != 0) | (begin.diff() != width)
        runs = torch.cat([torch.zeros(1, dtype=torch.int64), breaks.nonzero().squeeze(1) + 1])
        starts, buffer = (runs * width).tolist(), out.view(torch.uint8).numpy().reshape(-1).data
        ends = [*starts[1:], len(buffer)]
        for number, offset, a, b in zip(shard[runs].tolist(), begin[runs].tolist(), starts, ends, strict=True):
            try:
                read_at(self.descriptors[number], buffer[a:b], offset)
            except EOFError as error:
                raise ValueError(f"{self.paths[number]} was truncated while it was open; {REBUILD}") from error
