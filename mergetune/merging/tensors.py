"""What all merging methods share: state dicts in memory or in files, read stretch by stretch, their checks, the driver.

A method that works tensor by tensor is written as a plan: it checks its options, reads what it must know of all tensors
(a first pass, if any) and returns a :class:`Merge`, which makes one stretch of one merged tensor. :func:`method` turns
the plan into a function on state dicts; :func:`mergetune.merging.merge_files` runs the same plan over files. Stretches
are worked on by several threads, each alone on its own, and come back in order. So all ways give the same bits.

Shapes: K experts, n elements of a stretch.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, wraps
from itertools import groupby, islice, starmap
from pathlib import Path
from threading import Barrier, local
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergetune import ops

T = TypeVar("T")
StateDict = Mapping[str, Tensor]
STRETCH = 2**18
"""Elements at a time: a stretch of every checkpoint fits the processor's cache. Part of the definition of ``dare``."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


WIDEST = max(dtype.itemsize for dtype in DTYPES.values())


@dataclass(frozen=True, eq=False)
class Source:
    """One tensor of one checkpoint, wherever it is.

    Attributes:
        shape, dtype, device: the tensor's.
        read: begin, end -> that stretch of its elements, [end - begin], in its own dtype. Not to be written to. A third
            argument is memory that may be used for it, [end - begin] or longer; else there is new memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    read: Callable[..., Tensor]

    @property
    def numel(self) -> int:
        return self.shape.numel()


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a state dict that holds nothing in memory: each access reads from the file.

    Pass it wherever a method takes a state dict. The file may be replaced meanwhile: this still reads the old one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} must be a safetensors file")
        try:
            with safe_open(self.path, "pt"):  # checks sizes, offsets and the header
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a safetensors file: {error}") from error
        self._file = self.path.open("rb", buffering=0)
        length = self._file.read(8)
        self.header = length + self._file.read(int.from_bytes(length, "little"))
        entries = json.loads(self.header[8:])
        entries.pop("__metadata__", None)
        unknown = {entry["dtype"] for entry in entries.values()} - DTYPES.keys()
        if unknown:
            raise ValueError(f"{self.path} must hold {', '.join(DTYPES)} only, got {', '.join(sorted(unknown))}")
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
        dtype = DTYPES[entry["dtype"]]
        offset = len(self.header) + entry["data_offsets"][0]

        def read(begin: int, end: int, room: Tensor | None = None) -> Tensor:
            stretch = torch.empty(end - begin, dtype=dtype) if room is None else room.view(dtype)[: end - begin]
            at = offset + begin * dtype.itemsize
            raw = memoryview(stretch.view(torch.uint8).numpy())
            while raw:  # the system may give less than was asked for
                got = os.preadv(self._file.fileno(), [raw], at)
                if not got:
                    raise ValueError(f"{self.path} ends before {name} does: it was cut off while it was read")
                raw, at = raw[got:], at + got
            return stretch

        return Source(torch.Size(entry["shape"]), dtype, torch.device("cpu"), read)


class Constant(Mapping[str, Tensor]):
    """A state dict as another one, with one number in place of its floating-point values; takes no memory.

    The base of what are differences already: 0 for LoRA's factors (as peft merges them), 1 for IA3's.
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
        return replace(found, read=lambda begin, end, room=None: torch.full((end - begin,), self.value, **options))


def source(state: StateDict, name: str) -> Source:
    """One tensor of a state dict, wherever it is."""
    if isinstance(state, TensorFile | Constant):
        return state.source(name)
    tensor = state[name].detach()
    flat = tensor.reshape(-1)
    return Source(tensor.shape, tensor.dtype, tensor.device, lambda begin, end, room=None: flat[begin:end])


@dataclass(frozen=True, eq=False)
class Part:
    """The same stretch of one tensor in base and experts; or the tensors whole, in their shape.

    Attributes:
        name, shape: of the tensor.
        begin, end: which of its elements.
        stored_base: [n], as it is stored; None where there is no base.
        stored: the experts, K of [n], as they are stored.
        whole: whether ``base`` and ``experts`` have the tensor's shape.
    """

    name: str
    shape: torch.Size
    begin: int
    end: int
    stored_base: Tensor | None
    stored: list[Tensor]
    whole: bool = False

    @cached_property
    def base(self) -> Tensor | None:
        """[n], or its shape; float32, or float64 where an input is."""
        if self.stored_base is None:
            return None
        return self.stored_base.to(self._dtype).reshape(self.shape if self.whole else -1)

    @cached_property
    def experts(self) -> Tensor:
        """[K, n], or [K, *shape]. The dtype of base."""
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
        """The same stretch of other state dicts (``argument`` names them in errors), [len(states), n]."""
        rows = torch.empty(len(states), self.end - self.begin, dtype=self._dtype, device=self.stored[0].device)
        for k, state in enumerate(states):
            found = source(state, self.name)
            if found.shape != self.shape:
                raise ValueError(
                    f"{argument}[{k}][{self.name!r}] must have shape {list(self.shape)}, got {list(found.shape)}"
                )
            rows[k] = found.read(self.begin, self.end)
        return rows


@dataclass(frozen=True)
class Merge:
    """How a part is merged.

    Attributes:
        part: the merged values of a part, in the shape of its base.
        whole: whether it needs tensors whole; else it is called for one stretch after the other.
    """

    part: Callable[[Part], Tensor]
    whole: bool = False


def needs(*, base: bool | None, least: int = 1, most: int | None = None) -> Callable[[Callable], Callable]:
    """Note on a method what it merges, as ``base``, ``least`` and ``most``, so that a caller can see where it applies.

    Args:
        base: whether it needs a base; None where it works with and without.
        least: experts that it needs.
        most: experts that it takes; None is any number.
    """

    def note(function: Callable) -> Callable:
        function.base, function.least, function.most = base, least, most
        return function

    return note


def method(
    *, base: bool | None, least: int = 1, most: int | None = None
) -> Callable[[Callable[..., Merge]], Callable[..., dict[str, Tensor]]]:
    """Turn a plan ``(base, experts, *, options) -> Merge`` into a method ``(base, experts, *, options) -> state dict``.

    The plan's signature and docstring are the method's, so it is annotated as what it becomes. The method carries its
    ``plan``, for :func:`mergetune.merging.merge_files`, and what :func:`needs` notes.
    """

    def wrap(plan: Callable[..., Merge]) -> Callable[..., dict[str, Tensor]]:
        @needs(base=base, least=least, most=most)
        @wraps(plan)
        @torch.no_grad()
        def merge(base: StateDict | None, experts: Sequence[StateDict], **options) -> dict[str, Tensor]:
            check(merge, base, experts)
            step, merged = plan(base, experts, **options), {}
            for name, like in sources(base if base is not None else experts[0]):
                merged[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            places = {name: tensor.view(-1) for name, tensor in merged.items()}
            for name, piece in merged_pieces(step, base, experts):
                places[name][: len(piece)] = piece
                places[name] = places[name][len(piece) :]
            return merged

        merge.plan = plan
        return merge

    return wrap


def merged_pieces(step: Merge, base: StateDict | None, experts: Sequence[StateDict]) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors in order, flat, in pieces, each with its tensor's name.

    Dtypes are those of the base (of the first expert without one).

    Raises:
        ValueError: a merged value is not finite.
    """
    reference = base if base is not None else experts[0]

    def piece(part: Part) -> tuple[str, Tensor]:
        return part.name, _finite(step.part(part).reshape(-1), part, source(reference, part.name), experts)

    for is_floating, names in groupby(reference, lambda name: source(reference, name).dtype.is_floating_point):
        if not is_floating:
            for name in names:
                like = source(reference, name)
                yield from ((name, like.read(begin, end)) for begin, end in stretches(like.numel))
        elif step.whole:
            yield from (piece(whole(name, base, experts)) for name in names if source(reference, name).numel)
        else:
            yield from over_parts(piece, names, base, experts)


def _finite(merged: Tensor, part: Part, like: Source, experts: Sequence[StateDict]) -> Tensor:
    """Merged values of a part in their dtype; what is the same everywhere may be infinite."""
    if merged.numel() != part.end - part.begin:
        raise ValueError(f"{part.name}: merged must hold {part.end - part.begin} values, got {merged.numel()}")
    found = merged.to(like.dtype)
    if not found.sum(dtype=merged.dtype).isfinite() and not found.isfinite().all():  # the sum is quick
        original = like.read(part.begin, part.end)
        if not all(torch.equal(source(e, part.name).read(part.begin, part.end), original) for e in experts):
            bad = int((~found.isfinite()).sum())
            raise ValueError(
                f"{part.name} must be finite after merging, got {bad} NaN or infinite values: an input holds them, or "
                f"they are too large for {like.dtype}"
            )
        return original  # a mask with -inf
    return found


def over_parts(
    function: Callable[[Part], T], names: Iterable[str], base: StateDict | None, experts: Sequence[StateDict]
) -> Iterator[T]:
    """``function`` of every stretch of some tensors, in order. What it gives must not be a part's own memory.

    On a CPU several threads share the stretches out; each computes alone, so that the bits do not depend on how many
    there are. A few stretches are in work at a time, whatever the tensors' sizes.
    """

    def work(name: str, begin: int, end: int) -> T:
        return function(_part(base, experts, name, begin, end, rooms=_rooms(len(experts) + 1, end - begin)))

    tasks = ((name, *ends) for name in names for ends in stretches(source(experts[0], name).numel))
    if any(like.device.type != "cpu" for _, like in islice(sources(experts[0]), 1)):
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
    """Threads in each of which torch computes alone.

    ``torch.set_num_threads`` holds for the thread that calls it and for threads to come, so it is set back afterwards.
    """
    ready = Barrier(threads + 1)

    def alone() -> None:
        torch.get_num_threads()  # takes up the number for new threads, which the first computation would else do later
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "merge", initializer=alone)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)
    return pool


os.register_at_fork(after_in_child=_workers.cache_clear)  # the threads stay with the parent


def whole(name: str, base: StateDict | None, experts: Sequence[StateDict]) -> Part:
    """A tensor whole, in its shape."""
    return replace(_part(base, experts, name, 0, source(experts[0], name).numel), whole=True)


def _part(
    base: StateDict | None,
    experts: Sequence[StateDict],
    name: str,
    begin: int,
    end: int,
    *,
    rooms: Sequence[Tensor] | None = None,
) -> Part:
    rooms = [None] * (len(experts) + 1) if rooms is None else rooms
    start = None if base is None else source(base, name).read(begin, end, rooms[-1])
    rows = [source(expert, name).read(begin, end, room) for expert, room in zip(experts, rooms, strict=False)]
    return Part(name, source(experts[0], name).shape, begin, end, start, rows)


_kept = local()


def _rooms(count: int, numel: int) -> list[Tensor]:
    """Memory for stretches that this thread keeps: to get new pages takes longer than to fill them.

    What was read into it is valid until the thread's next part.
    """
    rooms = getattr(_kept, "rooms", [])
    if len(rooms) < count or rooms[0].numel() < numel * WIDEST:
        _kept.rooms = rooms = [torch.empty(numel * WIDEST, dtype=torch.uint8) for _ in range(count)]
    return rooms


def stretches(numel: int, step: int | None = None) -> Iterator[tuple[int, int]]:
    """Begin and end of each."""
    step = step or STRETCH
    return ((begin, min(begin + step, numel)) for begin in range(0, numel, step))


def sources(state: StateDict) -> Iterator[tuple[str, Source]]:
    """All tensors of a state dict, in its order."""
    return ((name, source(state, name)) for name in state)


def floating(state: StateDict) -> list[str]:
    """Names of the tensors that are merged: those of a floating-point dtype."""
    return [name for name, like in sources(state) if like.dtype.is_floating_point]


def check(method: Callable, base: StateDict | None, experts: Sequence[StateDict]) -> list[str]:
    """Refuse what a method cannot merge.

    Returns:
        The names, in the order of the base (of the first expert without one).

    Raises:
        TypeError: something is no state dict, or a tensor is floating point in one and not in another.
        ValueError: base or experts are missing or too many, names or shapes differ, or integers do.
    """
    title = method.__name__
    if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
        raise TypeError(f"experts must be a list of state dicts, got {type(experts).__name__}")
    for argument, state in [("base", base), *((f"experts[{k}]", e) for k, e in enumerate(experts))]:
        if not isinstance(state, Mapping) and not (state is None and argument == "base"):
            raise TypeError(f"{argument} must be a state dict, got {type(state).__name__}")
    if base is None and method.base:
        raise ValueError(f"{title} needs a base: it merges differences from it, got None")
    if base is not None and method.base is False:
        raise ValueError(f"{title} takes no base: pass None")
    if not method.least <= len(experts) <= (method.most or len(experts)):
        rule = f"{method.least}" if method.most == method.least else f"at least {method.least}"
        rule = f"{method.least} to {method.most}" if method.most not in (None, method.least) else rule
        raise ValueError(f"{title} needs {rule} expert(s), got {len(experts)}")
    reference, title = (base, "base") if base is not None else (experts[0], "experts[0]")
    for k, expert in enumerate(experts):
        if different := sorted(reference.keys() ^ expert.keys()):
            where = "lacks" if different[0] in reference else "holds"
            raise ValueError(
                f"experts[{k}] must hold the tensors of {title}, got {len(different)} other names: it {where} "
                f"{different[0]!r}"
            )
    for name in reference:
        like = source(reference, name)
        if like.dtype.is_complex:
            raise TypeError(f"{title}[{name!r}] must be real, got {like.dtype}")
        for k, expert in enumerate(experts):
            found = source(expert, name)
            if found.shape != like.shape:
                raise ValueError(
                    f"experts[{k}][{name!r}] must have shape {list(like.shape)} as {title} has, got {list(found.shape)}"
                )
            if found.dtype.is_floating_point != like.dtype.is_floating_point:
                raise TypeError(
                    f"experts[{k}][{name!r}] must be {like.dtype} as in {title}, or of its kind, got {found.dtype}"
                )
            if not like.dtype.is_floating_point and not all(
                torch.equal(found.read(a, b).to(like.device, torch.int64), like.read(a, b).long())
                for a, b in stretches(like.numel)
            ):
                raise ValueError(f"experts[{k}][{name!r}] must equal {title}'s: {like.dtype} values cannot be merged")
    return list(reference)


def per_expert(argument: str, values: Sequence[float] | None, count: int, default: float = 1.0) -> list[float]:
    """One finite number for each expert."""
    if values is None:
        return [default] * count
    numbers = [float(value) for value in values]
    if len(numbers) != count:
        raise ValueError(f"{argument} must hold one number for each of {count} experts, got {len(numbers)}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{argument} must be finite, got {numbers}")
    return numbers


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """[K] numbers, shaped to multiply [K, ...]."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def check_choice(argument: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_fraction(argument: str, value: float, *, zero: bool = False) -> None:
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise ValueError(f"{argument} must be in {'[' if zero else '('}0, 1], got {value}")


def check_states(argument: str, states: Sequence[StateDict], experts: Sequence[StateDict]) -> None:
    """Refuse what does not go with the experts: one state dict for each, of the same names (shapes: see Part.of)."""
    if isinstance(states, Mapping) or len(states) != len(experts):
        raise ValueError(f"{argument} must hold one state dict for each of {len(experts)} experts, got {len(states)}")
    for k, state in enumerate(states):
        if missing := [name for name in floating(experts[0]) if name not in state]:
            raise ValueError(f"{argument}[{k}] must hold the experts' tensors, it lacks {missing[0]!r}")


def order_statistics(
    measure: Callable[[Part], Tensor] | None,
    names: Sequence[str],
    base: StateDict | None,
    experts: Sequence[StateDict],
    ranks: Sequence[int],
) -> list[list[float]]:
    """Exact order statistics of more values than fit in memory, mostly in one pass.

    A sample says between which two values each one lies. A pass counts what lies below these, and keeps what lies
    between: a percent or two of all values. Where the sample was wrong, a further pass looks within wider bounds.

    Args:
        measure: part -> K rows of values, [K, n]. None: the magnitudes of the experts' differences from the base, which
            are counted without being stored.
        names: of the tensors whose values are ordered together.
        ranks: 0 is the smallest value of a row.

    Returns:
        For each rank the values of the K rows.
    """
    values = measure or (lambda part: part.deltas.abs())
    total = sum(source(experts[0], name).numel for name in names)
    if total <= FEW:
        rows = np.concatenate([*over_parts(lambda part: values(part).cpu().numpy(), names, base, experts)], 1)
        return np.partition(rows, ranks, 1)[:, ranks].T.tolist()
    sample = _sample(values, names, base, experts)
    found: dict[tuple[int, int], float] = {}
    wanted = [(k, rank) for k in range(len(sample)) for rank in ranks]
    width = 0.005 + 2 / math.sqrt(sample.shape[1])
    while wanted:
        bounds = {(k, rank): _bounds(sample[k], rank / total, width) for k, rank in wanted}

        def look(part: Part, bounds: Mapping = bounds) -> dict[tuple[int, int], tuple[list[int], Tensor]]:
            rows, start = (part.stored, part.stored_base) if measure is None else (measure(part), None)
            return {key: ops.count_around(rows[key[0]], *ends, base=start) for key, ends in bounds.items()}

        seen = list(over_parts(look, names, base, experts))
        for (k, rank), (low, high) in bounds.items():
            counts, between = zip(*(stretch[k, rank] for stretch in seen), strict=True)
            below, at_low, inside, at_high = np.sum(counts, 0).cumsum()
            if at_low <= rank < inside:
                place = int(rank - at_low)
                found[k, rank] = float(np.partition(torch.cat(between).cpu().numpy(), place)[place])
            elif below <= rank < at_high:
                found[k, rank] = low if rank < at_low else high
            elif width == 1:
                found[k, rank] = math.nan  # which is in no order: they come last
        wanted, width = [key for key in wanted if key not in found], min(4 * width, 1.0)
    return [[found[k, rank] for k in range(len(sample))] for rank in ranks]


FEW = 2**18
"""So many values are simply sorted."""


def _sample(
    measure: Callable[[Part], Tensor], names: Sequence[str], base: StateDict | None, experts: Sequence[StateDict]
) -> np.ndarray:
    """Sorted values of short pieces, evenly spread over the tensors, [K, n]."""
    ends = np.cumsum([source(experts[0], name).numel for name in names])
    rows = []
    for place in np.linspace(0, ends[-1], min(max(int(ends[-1]) // 2**17, 16), 256), endpoint=False).astype(np.int64):
        which = int(np.searchsorted(ends, place, side="right"))
        numel = source(experts[0], names[which]).numel
        begin = int(place - ends[which] + numel)
        rows.append(measure(_part(base, experts, names[which], begin, min(begin + 1024, numel))).cpu().numpy())
    return np.sort(np.concatenate(rows, 1), 1)


def _bounds(ordered: np.ndarray, at: float, width: float) -> tuple[float, float]:
    """The values of a sorted sample that lie ``width`` of it before and behind the place ``at``, both in [0, 1]."""
    n = len(ordered)
    first, last = math.floor((at - width) * n), math.ceil((at + width) * n)
    low = -math.inf if first < 0 else float(ordered[first])
    high = math.inf if last >= n else float(ordered[last])
    return -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high
