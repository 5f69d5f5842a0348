"""Rows of arrays in memory and in the files of a cache, read with ``preadv`` or through a memory mapping.

Shapes: B requested rows, W numbers per row, N rows, V views.

A row that should have unit norm is checked when it is first read. A file that was cut off while it is open raises an
error: reading a mapping behind the end of its file would end the process, so the size is compared before each reading.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mergetune.io import FLOAT_DTYPES, open_regular, read_at

UNIT_NORM_ATOL = 1e-2  # largest distance of a stored norm from 1: rounding to bfloat16 moves it by up to 2 ** -8
ROWS = 4096  # rows per step of loops over all rows


class Rows(Protocol):
    """Rows of V views, wherever they are stored."""

    def read(self, row: Tensor, view: Tensor, out: Tensor) -> None:
        """Writes stored rows to ``out``.

        Args:
            row: positions of the rows, [B].
            view: view of each row, [B].
            out: result, [B, W] float32.

        Raises:
            ValueError: a row is damaged, or its file was cut off.
        """
        ...

    def contents(self, stored: Tensor) -> Iterator[Any]:
        """Yields the bytes that identify these rows, for a digest."""
        ...


class UnitNorms:
    """Remembers which rows were found to have unit norm, so that each row is checked once.

    Args:
        views, count: V and N.
        refuse: gets a description of damaged rows and returns the error to raise.
    """

    def __init__(self, views: int, count: int, refuse: Callable[[str], Exception]) -> None:
        self.given = views, count, refuse
        self.known = torch.zeros(views * count, dtype=torch.bool)

    def __reduce__(self) -> tuple[Any, ...]:
        return UnitNorms, self.given

    def check(self, row: Tensor, view: Tensor, x: Tensor) -> None:
        """Checks rows that were read, [B, W], unless they were checked before."""
        views, count, refuse = self.given
        place = view * count + row
        if self.known[place].all():
            return
        norms = torch.linalg.vector_norm(x, dim=1)
        bad = ~((norms - 1).abs() <= UNIT_NORM_ATOL)  # NaN is bad
        if bad.any():
            at, others = int(bad.nonzero()[0]), int(bad.sum()) - 1
            which = f"row {int(row[at]):,}{f' of view {int(view[at])}' if views > 1 else ''}"
            more = f" and others in {others:,} other rows" if others else ""
            raise refuse(f"each row must have norm 1, got {float(norms[at]):.4g} in {which}{more}")
        self.known[place] = True


class OpenFile:
    """A mapped file that stays open, so that it can be seen whether it was cut off since it was mapped."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, open_regular(path)
        self.size = os.fstat(self.file.fileno()).st_size

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def require_whole(self) -> None:
        """Raises ValueError if the file has become shorter: reading the mapping would end the process."""
        if (found := os.fstat(self.file.fileno()).st_size) < self.size:
            raise ValueError(
                f"{self.path} was truncated while it was open: the file must have {self.size} bytes, got {found}; read "
                "the whole file again"
            )


class TensorRows:
    """Rows of tensors in memory, or in mapped files of other projects; any rows of several tensors in one call.

    Args:
        tensors: tensors [V, n, W] of one dtype; row i of the whole is row i of their concatenation.
        checksums: what stands for the contents in a digest; None stands for all bytes.
        norms: checks rows when they are first read; None checks nothing.
        files: the files in which the tensors are mapped.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        checksums: bytes | None = None,
        norms: UnitNorms | None = None,
        files: Sequence[OpenFile] = (),
    ) -> None:
        self.given = tensors, checksums, norms, files
        self.tensors = shards = tuple(tensors)
        self.counts = torch.tensor([shard.shape[1] for shard in shards])
        self.first = self.counts.cumsum(0) - self.counts
        self.dim, self.dtype = shards[0].shape[-1], shards[0].dtype
        # ``window`` views the memory from the lowest to the highest address of all tensors as overlapping rows, one per
        # element, so that one number addresses any row. The memory between the tensors is never read.
        size = self.dtype.itemsize
        self.shards = [s.contiguous() if s.data_ptr() % size == 0 else s.clone().contiguous() for s in shards]
        address = torch.tensor([shard.data_ptr() for shard in self.shards])
        lowest = int(address.argmin())
        self.begin = (address - address[lowest]) // size
        last = int((self.begin + self.counts * self.shards[0].shape[0] * self.dim).max()) - self.dim
        words = self.shards[lowest].view({2: torch.int16, 4: torch.int32}[size]).numpy()
        overlapping = np.lib.stride_tricks.as_strided(words, (last + 1, self.dim), (size, size))
        self.window = torch.from_numpy(overlapping).view(self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorRows, self.given[:3]  # the window is not copied, and copies of the tensors need no files

    def read(self, row: Tensor, view: Tensor, out: Tensor) -> None:
        _, _, norms, files = self.given
        for file in files:
            file.require_whole()
        shard = torch.searchsorted(self.first, row, right=True) - 1
        place = (view * self.counts[shard] + row - self.first[shard]) * self.dim  # offset in the tensor, in elements
        raw = out if self.dtype == out.dtype else torch.empty(out.shape, dtype=self.dtype)
        torch.index_select(self.window, 0, self.begin[shard] + place, out=raw)
        if raw is not out:
            out.copy_(raw)
        if norms is not None:
            norms.check(row, view, out)

    def contents(self, stored: Tensor) -> Iterator[Any]:
        tensors, checksums, _, files = self.given
        for file in files:
            file.require_whole()
        yield stored.numpy().data
        if checksums is not None:
            yield checksums
        else:
            for tensor in tensors:
                yield tensor.contiguous().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Extent:
    """Rows [V, n, ...] in a file: the file, where they begin in bytes, and n."""

    file: Path
    begin: int
    count: int


class FileRows:
    """Rows of an array in files. The files stay open until no cache object uses them any more.

    If a cache is rebuilt, objects that opened the cache before still read the old files.

    Args:
        extents: where the rows lie; row i of the whole is row i of their concatenation.
        views: V.
        width: W, numbers per row.
        dtype: type of the numbers: "float32", "bfloat16" or "float16".
        mapped: whether rows are read through a memory mapping, which needs a single extent; else with ``preadv``.
        way_on: what the user can do about damage; ends the messages.
        checksums: what stands for the contents in a digest; None stands for the bytes of the rows.
        norms: checks rows when they are first read; None checks nothing.
        check: compares the contents of an open file with its checksums, after size or times of the file have changed;
            None compares nothing.
    """

    def __init__(
        self,
        extents: Sequence[Extent],
        views: int,
        width: int,
        dtype: str,
        *,
        mapped: bool,
        way_on: str,
        checksums: bytes | None = None,
        norms: UnitNorms | None = None,
        check: Callable[[int], None] | None = None,
    ) -> None:
        self.files, self.way_on = [], way_on  # the files first: __del__ closes them whatever fails here
        settings = {"mapped": mapped, "way_on": way_on, "checksums": checksums, "norms": norms, "check": check}
        self.given = (extents, views, width, dtype), settings
        self.width, self.views, self.dtype, self.checksums, self.norms = (
            width,
            views,
            FLOAT_DTYPES[dtype],
            checksums,
            norms,
        )
        self.row_bytes = width * self.dtype.itemsize
        self.paths = [extent.file for extent in extents]
        self.counts = torch.tensor([extent.count for extent in extents])
        self.first, self.count = self.counts.cumsum(0) - self.counts, int(self.counts.sum())
        self.begin = torch.tensor([extent.begin for extent in extents])
        self.ends = [extent.begin + views * extent.count * self.row_bytes for extent in extents]
        for extent in extents:
            self.files.append(open_regular(extent.file))
        self.descriptors = [file.fileno() for file in self.files]
        self.check, self.states = check, [_state(descriptor) for descriptor in self.descriptors]
        self.mapping: Tensor | None = None
        if mapped:
            (extent,) = extents
            self._require_whole(0)
            content = mmap.mmap(self.descriptors[0], self.ends[0], access=mmap.ACCESS_COPY)
            rows = torch.frombuffer(content, dtype=self.dtype, offset=extent.begin)
            self.mapping = rows.view(views * extent.count, width)

    def __del__(self) -> None:
        for file in self.files:
            file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, self.given  # another process opens the files again

    @property
    def mapped(self) -> bool:
        return self.mapping is not None

    def read(self, row: Tensor, view: Tensor, out: Tensor) -> None:
        raw = out if self.dtype == out.dtype else torch.empty(out.shape, dtype=self.dtype)
        self._read(row, view, raw)
        if raw is not out:
            out.copy_(raw)
        if self.norms is not None:
            self.norms.check(row, view, out)

    def contents(self, stored: Tensor) -> Iterator[Any]:
        if self.checksums is not None:
            yield stored.numpy().data
            yield self.checksums
            return
        yield torch.arange(len(stored)).numpy().data  # as for the same rows in memory
        for view in range(self.views):
            for rows in stored.split(ROWS):
                raw = torch.empty(len(rows), self.width, dtype=self.dtype)
                self._read(rows, torch.full_like(rows, view), raw)
                yield raw.view(torch.uint8).numpy().data

    def _read(self, row: Tensor, view: Tensor, out: Tensor) -> None:
        """Fills ``out``, [B, W] in the stored dtype."""
        if self.mapping is not None:
            self._require_whole(0)
            torch.index_select(self.mapping, 0, view * self.count + row, out=out)
            self._require_unchanged()
            return
        shard = torch.searchsorted(self.first, row, right=True) - 1
        begin = self.begin[shard] + (view * self.counts[shard] + row - self.first[shard]) * self.row_bytes
        breaks = (shard.diff() != 0) | (begin.diff() != self.row_bytes)  # adjacent rows are read together
        runs = torch.cat([torch.zeros(1, dtype=torch.int64), breaks.nonzero().squeeze(1) + 1])
        starts, buffer = (runs * self.row_bytes).tolist(), out.view(torch.uint8).numpy().reshape(-1).data
        ends = [*starts[1:], len(buffer)]
        for number, offset, a, b in zip(shard[runs].tolist(), begin[runs].tolist(), starts, ends, strict=True):
            try:
                read_at(self.descriptors[number], buffer[a:b], offset)
            except EOFError:
                raise self._cut_off(number) from None
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        """Compares the contents of files whose size or times have changed, after the reading that is to be trusted."""
        if self.check is None:
            return
        for number, descriptor in enumerate(self.descriptors):
            if (state := _state(descriptor)) != self.states[number]:
                self.check(descriptor)
                self.states[number] = state

    def _require_whole(self, number: int) -> None:
        if os.fstat(self.descriptors[number]).st_size < self.ends[number]:
            raise self._cut_off(number)

    def _cut_off(self, number: int) -> ValueError:
        size = os.fstat(self.descriptors[number]).st_size
        view, row = divmod(max(0, size - int(self.begin[number])) // self.row_bytes, int(self.counts[number]))
        which = f"row {int(self.first[number]) + row:,}{f' of view {view}' if self.views > 1 else ''}"
        return ValueError(
            f"{self.paths[number]} was truncated while it was open: the file must have {self.ends[number]} bytes, got "
            f"{size}, so that {which} and all behind it are lost; {self.way_on}"
        )


def _state(descriptor: int) -> tuple[int, int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _open_again(arguments: tuple[Any, ...], settings: dict[str, Any]) -> FileRows:
    return FileRows(*arguments, **settings)


def in_memory(rows: FileRows) -> Tensor:
    """All rows of an array, [V, N, W] in its dtype."""
    index = torch.arange(rows.count)
    out = torch.empty(rows.views, len(index), rows.width, dtype=rows.dtype)
    for view in range(rows.views):
        rows._read(index, torch.full_like(index, view), out[view])
    return out


def may_open(count: int) -> bool:
    """Whether so many files may be open beside those of others."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit == resource.RLIM_INFINITY or count <= limit // 2
