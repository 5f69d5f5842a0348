"""State dicts in memory or in files, read in stretches (runs of consecutive elements of a tensor)."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice, starmap
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergetune.facts.brief import brief
from mergetune.io import STORED_DTYPES, read_at, reason

T = TypeVar("T")

StateDict = Mapping[str, Tensor]
STRETCH = 2**18
"""Elements per stretch, so that a stretch of every checkpoint fits the processor's cache.

The masks of ``dare`` depend on this number."""


@dataclass(frozen=True, eq=False)
class Source:
    """One tensor of one state dict, in memory or in a file.

    Attributes:
        shape, dtype, device: of the tensor.
        read: function of begin and end that returns these elements, [end - begin], in the tensor's dtype. The result
            may share memory with the tensor: do not write to it.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    read: Callable[[int, int], Tensor]

    @property
    def numel(self) -> int:
        return self.shape.numel()


@brief("path", tensors=len)
class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a state dict: each access reads a tensor from the file, nothing stays in memory.

    Merging methods accept a ``TensorFile`` wherever they take a state dict. If the file is replaced, the object still
    reads the old file.

    Args:
        path: the safetensors file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a safetensors file, or has tensors of an unsupported dtype.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} must be a safetensors file, got no such file")
        try:
            with safe_open(self.path, "pt"):  # checks sizes, offsets and the header
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a safetensors file: {reason(error)}") from error
        self._file = self.path.open("rb", buffering=0)
        length = self._file.read(8)
        self.header = length + self._file.read(int.from_bytes(length, "little"))
        entries = json.loads(self.header[8:])
        entries.pop("__metadata__", None)
        unknown = {entry["dtype"] for entry in entries.values()} - STORED_DTYPES.keys()
        if unknown:
            raise ValueError(f"{self.path} must hold {', '.join(STORED_DTYPES)} only, got {', '.join(sorted(unknown))}")
        self._entries = dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))

    def __getitem__(self, name: str) -> Tensor:
        source = self.source(name)
        return source.read(0, source.numel).reshape(source.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the data."""
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def source(self, name: str) -> Source:
        entry = self._entries[name]
        dtype = STORED_DTYPES[entry["dtype"]]
        offset = len(self.header) + entry["data_offsets"][0]

        def read(begin: int, end: int) -> Tensor:
            stretch, at = torch.empty(end - begin, dtype=dtype, device="cpu"), offset + begin * dtype.itemsize
            try:
                read_at(self._file.fileno(), stretch.view(torch.uint8).numpy().data, at)
            except EOFError:
                raise ValueError(f"{self.path} ends within {name}: the file was cut off while it was read") from None
            return stretch

        return Source(torch.Size(entry["shape"]), dtype, torch.device("cpu"), read)


@brief("value", tensors=len)
class Constant(Mapping[str, Tensor]):
    """A state dict like another one, with one number as every floating-point value.

    Each tensor is one stored number, expanded to the shape: do not write into it. ``Constant`` stands for the base
    checkpoint that adapters do not have: with 0 for LoRA factors a merge of differences to the base is a merge of the
    factors themselves, which is how peft merges them; IA3 vectors need 1.

    Args:
        like: state dict that gives names, shapes, dtypes and all values that are not floating point.
        value: the number.
    """

    def __init__(self, like: StateDict, value: float = 0.0) -> None:
        self.like, self.value = like, value

    def __getitem__(self, name: str) -> Tensor:
        found = self.source(name)
        return found.read(0, found.numel).reshape(found.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def source(self, name: str) -> Source:
        found = source(self.like, name)
        if not found.dtype.is_floating_point:
            return found
        options = {"dtype": found.dtype, "device": found.device}
        return replace(found, read=lambda begin, end: torch.full((end - begin,), self.value, **options))


class View(Mapping[str, Tensor]):
    """A state dict whose tensors are read from other state dicts, perhaps under other names or in other shapes.

    Args:
        found: name -> function that returns the :class:`Source` of the tensor.
        title: the file or files that hold the tensors, for errors; None for state dicts in memory.
        whole: the state dict of which the view leaves tensors out; None for a view that leaves out none.
    """

    def __init__(
        self, found: Mapping[str, Callable[[], Source]], *, title: str | None = None, whole: StateDict | None = None
    ) -> None:
        self._found, self.title, self.whole = dict(found), title, whole

    def __getitem__(self, name: str) -> Tensor:
        found = self.source(name)
        return found.read(0, found.numel).reshape(found.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def source(self, name: str) -> Source:
        return self._found[name]()


def title_of(argument: str, state: StateDict) -> str:
    """The argument that holds a state dict, and its file if there is one: "experts[1] (b.safetensors)"."""
    file = file_of(state)
    return argument if file is None else f"{argument} ({file})"


def file_of(state: StateDict) -> str | None:
    """The file that holds a state dict; None for one in memory."""
    return str(state.path) if isinstance(state, TensorFile) else state.title if isinstance(state, View) else None


def whole_of(state: StateDict) -> StateDict:
    """The state dict of which a view leaves tensors out, or the state dict itself."""
    return state.whole if isinstance(state, View) and state.whole is not None else state


def source(state: StateDict, name: str) -> Source:
    """The :class:`Source` of one tensor of a state dict."""
    if isinstance(state, TensorFile | Constant | View):
        return state.source(name)
    tensor = state[name].detach()
    flat = lru_cache(lambda: tensor.reshape(-1))  # copies a transposed tensor once, and only if the tensor is read
    return Source(tensor.shape, tensor.dtype, tensor.device, lambda begin, end: flat()[begin:end])


@dataclass(frozen=True, eq=False)
class Part:
    """The same stretch of one tensor in base and experts, or the whole tensor in its shape.

    Attributes:
        name, shape: of the tensor.
        begin, end: range of the elements; n = end - begin.
        stored_base: the base's elements, [n], in the stored dtype; None without a base.
        stored: the elements of each of the K experts, [n], in the stored dtypes.
        whole: whether ``base`` and ``experts`` have the tensor's shape instead of n elements.
    """

    name: str
    shape: torch.Size
    begin: int
    end: int
    stored_base: Tensor | None
    stored: list[Tensor]
    whole: bool = False

    @cached_property
    def base(self) -> Tensor:
        """The base's elements, [n] or the tensor's shape, as float32, or float64 if any input is float64.

        Raises:
            ValueError: the part has no base. Methods that need a base check for one before they read a part.
        """
        if self.stored_base is None:
            raise ValueError(f"base must hold {self.name!r}, got None")
        return self.stored_base.to(self._dtype).reshape(self.shape if self.whole else -1)

    @cached_property
    def experts(self) -> Tensor:
        """The experts' elements, [K, n] or [K, *shape], in the dtype of ``base``."""
        rows = torch.empty(len(self.stored), len(self.stored[0]), dtype=self._dtype, device=self.stored[0].device)
        for row, stored in zip(rows, self.stored, strict=True):
            row.copy_(stored)
        return rows.reshape(len(rows), *self.shape) if self.whole else rows

    @property
    def _dtype(self) -> torch.dtype:
        rows = [*self.stored, *([] if self.stored_base is None else [self.stored_base])]
        return torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32

    @property
    def deltas(self) -> Tensor:
        """The task vectors, experts - base."""
        return self.experts - self.base

    def of(self, argument: str, states: Sequence[StateDict]) -> Tensor:
        """The same stretch of other state dicts, [len(states), n].

        Args:
            argument: name of the argument that holds the state dicts, for errors.
            states: state dicts with a tensor of this name and shape.
        """
        rows = torch.empty(len(states), self.end - self.begin, dtype=self._dtype, device=self.stored[0].device)
        for k, state in enumerate(states):
            found = source(state, self.name)
            if found.shape != self.shape and not found.numel == self.shape.numel() == 1:
                raise ValueError(
                    f"{argument}[{k}][{self.name!r}] must have shape {list(self.shape)}, got {list(found.shape)}"
                )
            rows[k] = found.read(self.begin, self.end)
        return rows


def over_parts(
    function: Callable[[Part], T], names: Iterable[str], base: StateDict | None, experts: Sequence[StateDict]
) -> Iterator[T]:
    """Yields ``function(part)`` for every stretch of the named tensors, in order.

    On a CPU several threads work on different stretches. Torch uses one thread within a stretch, so the bits do not
    depend on the number of threads. Memory holds only a few stretches at a time, for tensors of any size. ``function``
    must not call ``over_parts``.
    """

    def work(tensor: _Tensor, begin: int, end: int) -> T:
        return function(tensor.part(begin, end))

    found = (tensor_of(name, base, experts) for name in names)
    tasks = ((tensor, *ends) for tensor in found for ends in stretches(tensor.numel))
    if any(like.device.type != "cpu" for _, like in islice(sources(experts[0] if base is None else base), 1)):
        yield from starmap(work, tasks)
        return
    threads, waiting = torch.get_num_threads(), deque()
    pool = _workers(threads)
    try:
        for task in tasks:
            waiting.append(pool.submit(work, *task))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    """A pool of threads, in each of which torch computes on one thread only.

    ``torch.set_num_threads`` acts on the calling thread and on all threads that start later, so the number is set back
    at the end.
    """
    ready = Barrier(threads + 1)

    def alone() -> None:
        torch.get_num_threads()  # applies the default for new threads now; else the first computation applies it later
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "merge", initializer=alone)
    try:
        for _ in range(threads):
            pool.submit(int)
        ready.wait()
    except BaseException:  # a thread could not be started: the others must not wait for this thread
        ready.abort()
        pool.shutdown(wait=False)
        raise
    torch.set_num_threads(threads)
    return pool


os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked child does not inherit the threads


def whole(name: str, base: StateDict | None, experts: Sequence[StateDict]) -> Part:
    """The part that holds a whole tensor in its shape."""
    tensor = tensor_of(name, base, experts)
    return replace(tensor.part(0, tensor.numel), whole=True)


@dataclass(frozen=True, eq=False)
class _Tensor:
    """The same tensor in base and experts."""

    name: str
    base: Source | None
    experts: list[Source]

    @property
    def numel(self) -> int:
        return self.experts[0].numel

    def part(self, begin: int, end: int) -> Part:
        """A stretch of the tensor, on the device of the base, or of the first expert without a base."""
        device = (self.experts[0] if self.base is None else self.base).device
        start = None if self.base is None else self.base.read(begin, end)
        rows = [expert.read(begin, end).to(device) for expert in self.experts]
        return Part(self.name, self.experts[0].shape, begin, end, start, rows)


def tensor_of(name: str, base: StateDict | None, experts: Sequence[StateDict]) -> _Tensor:
    return _Tensor(name, None if base is None else source(base, name), [source(expert, name) for expert in experts])


def stretches(numel: int, step: int | None = None) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of a tensor with ``numel`` elements; ``step`` elements each, or STRETCH."""
    step = step or STRETCH
    return ((begin, min(begin + step, numel)) for begin in range(0, numel, step))


def sources(state: StateDict) -> Iterator[tuple[str, Source]]:
    """Name and :class:`Source` of each tensor of a state dict, in its order."""
    return ((name, source(state, name)) for name in state)


def floating(state: StateDict) -> list[str]:
    """Names of the tensors that are merged: those of a floating-point dtype."""
    return [name for name, like in sources(state) if like.dtype.is_floating_point]
