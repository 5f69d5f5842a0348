"""What all merging methods share: state dicts in memory or in files, read stretch by stretch, their checks, the driver.

A method that works tensor by tensor is written as a plan: it checks its options, reads what it must know of all tensors
(a first pass, if any) and returns a :class:`Merge`, which makes one stretch of one merged tensor. :func:`method` turns
the plan into a function on state dicts; :func:`mergetune.merging.merge_files` runs the same plan over files. Stretches
are worked on by several threads, each alone on its own, and come back in order. So all ways give the same bits.

Shapes: K experts, n elements of a stretch.
"""

from __future__ import annotations

import inspect
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
from threading import Barrier
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergetune import ops
from mergetune.merging.methods import METHODS, Method

T = TypeVar("T")
Options = ParamSpec("Options")
StateDict = Mapping[str, Tensor]
STRETCH = 2**18
"""Elements at a time: a stretch of every checkpoint fits the processor's cache. Part of the definition of ``dare``."""

STORED_DTYPES = {
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


@dataclass(frozen=True, eq=False)
class Source:
    """One tensor of one checkpoint, wherever it is.

    Attributes:
        shape, dtype, device: the tensor's.
        read: begin, end -> that stretch of its elements, [end - begin], in its own dtype. Not to be written to.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    read: Callable[[int, int], Tensor]

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
        return replace(found, read=lambda begin, end: torch.full((end - begin,), self.value, **options))


def source(state: StateDict, name: str) -> Source:
    """One tensor of a state dict, wherever it is."""
    if isinstance(state, TensorFile | Constant):
        return state.source(name)
    tensor = state[name].detach()
    flat = lru_cache(lambda: tensor.reshape(-1))  # a copy, if the tensor is transposed: only if it is read, and once
    return Source(tensor.shape, tensor.dtype, tensor.device, lambda begin, end: flat()[begin:end])


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
        part: the merged values of a part, in the shape of its base. Never the memory of its inputs.
        whole: whether it needs tensors whole; else it is called for one stretch after the other.
    """

    part: Callable[[Part], Tensor]
    whole: bool = False


class TensorMethod(Protocol[Options]):
    """A method that works tensor by tensor: ``(base, experts, *, options) -> state dict``.

    Attributes:
        plan: the same arguments -> how each part is merged. For :func:`mergetune.merging.merge_files`.
    """

    __name__: str
    plan: Callable[Options, Merge]

    def __call__(self, *args: Options.args, **kwargs: Options.kwargs) -> dict[str, Tensor]: ...


def method(plan: Callable[Options, Merge]) -> TensorMethod[Options]:
    """Turn a plan ``(base, experts, *, options) -> Merge`` into a method, which takes the same and gives a state dict.

    What the method merges and needs is the entry of its name in ``METHODS``.
    """
    facts = METHODS[plan.__name__]
    planned: Callable[..., Merge] = plan

    @wraps(plan)
    @torch.no_grad()
    def merge(base: StateDict | None, experts: Sequence[StateDict], **options: Any) -> dict[str, Tensor]:
        check(facts, base, experts)
        step, merged = planned(base, experts, **options), {}
        for name, like in sources(base if base is not None else experts[0]):
            merged[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        places = {name: tensor.view(-1) for name, tensor in merged.items()}
        for name, piece in merged_pieces(step, base, experts):
            places[name][: len(piece)] = piece
            places[name] = places[name][len(piece) :]
        return merged

    returned = "dict[str, Tensor]"
    merge.__annotations__ = plan.__annotations__ | {"return": returned}
    vars(merge).update(plan=plan, __signature__=inspect.signature(plan).replace(return_annotation=returned))
    return cast("Any", merge)


def facts_of(function: Callable[..., Any]) -> Method:
    """What is known of a method.

    Raises:
        ValueError: the function is not a merging method.
    """
    name = getattr(function, "__name__", "")
    if name not in METHODS:
        raise ValueError(f"method must be a function of mergetune.merging: {', '.join(METHODS)}; got {function!r}")
    return METHODS[name]


def merged_pieces(step: Merge, base: StateDict | None, experts: Sequence[StateDict]) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors in order, flat, in pieces, each with its tensor's name.

    Dtypes are those of the base (of the first expert without one).

    Raises:
        ValueError: a merged value is not finite.
    """
    reference = base if base is not None else experts[0]

    def piece(part: Part) -> tuple[str, Tensor]:
        return part.name, _finite(step.part(part).reshape(-1), part)

    for is_floating, names in groupby(reference, lambda name: source(reference, name).dtype.is_floating_point):
        if not is_floating:
            for name in names:
                like = source(reference, name)
                yield from ((name, like.read(begin, end)) for begin, end in stretches(like.numel))
        elif step.whole:
            yield from (piece(whole(name, base, experts)) for name in names if source(reference, name).numel)
        else:
            yield from over_parts(piece, names, base, experts)


def _finite(merged: Tensor, part: Part) -> Tensor:
    """Merged values of a part in their dtype; what is the same everywhere may be infinite."""
    like = part.stored[0] if part.stored_base is None else part.stored_base
    if merged.numel() != part.end - part.begin:
        raise ValueError(f"{part.name}: merged must hold {part.end - part.begin} values, got {merged.numel()}")
    found = merged.to(like.dtype)
    if not found.sum(dtype=merged.dtype).isfinite() and not found.isfinite().all():  # the sum is quick
        if not all(torch.equal(row, like) for row in part.stored):
            bad = int((~found.isfinite()).sum())
            raise ValueError(
                f"{part.name} must be finite after merging, got {bad} NaN or infinite values: an input holds them, or "
                f"they are too large for {like.dtype}"
            )
        return like  # a mask with -inf
    return found


def over_parts(
    function: Callable[[Part], T], names: Iterable[str], base: StateDict | None, experts: Sequence[StateDict]
) -> Iterator[T]:
    """``function`` of every stretch of some tensors, in order.

    On a CPU several threads share the stretches out; each computes alone, so that the bits do not depend on how many
    there are. A few stretches are in work at a time, whatever the tensors' sizes. A function must not call this again.
    """

    def work(tensor: _Tensor, begin: int, end: int) -> T:
        return function(tensor.part(begin, end))

    found = (_tensor(name, base, experts) for name in names)
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
    try:
        for _ in range(threads):
            pool.submit(int)
        ready.wait()
    except BaseException:  # no thread could be started: those that could must not wait for it
        ready.abort()
        pool.shutdown(wait=False)
        raise
    torch.set_num_threads(threads)
    return pool


os.register_at_fork(after_in_child=_workers.cache_clear)  # the threads stay with the parent


def whole(name: str, base: StateDict | None, experts: Sequence[StateDict]) -> Part:
    """A tensor whole, in its shape."""
    tensor = _tensor(name, base, experts)
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
        """A stretch of it, all on the base's device (the first expert's without one)."""
        device = (self.experts[0] if self.base is None else self.base).device
        start = None if self.base is None else self.base.read(begin, end)
        rows = [expert.read(begin, end).to(device) for expert in self.experts]
        return Part(self.name, self.experts[0].shape, begin, end, start, rows)


def _tensor(name: str, base: StateDict | None, experts: Sequence[StateDict]) -> _Tensor:
    return _Tensor(name, None if base is None else source(base, name), [source(expert, name) for expert in experts])


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


def check(method: Method, base: StateDict | None, experts: Sequence[StateDict]) -> list[str]:
    """Refuse what a method cannot merge.

    Returns:
        The names, in the order of the base (of the first expert without one).

    Raises:
        TypeError: something is no state dict, or a tensor is floating point in one and not in another.
        ValueError: base or experts are missing or too many, names or shapes differ, or integers do.
    """
    title = method.name
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
    between: about two percent of all values for each rank, an eighth at most. Where the sample was wrong, a further
    pass looks where the counts say.

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
    searches = {
        (k, rank): _Search(rank, row, upto=total)
        for k, row in enumerate(_sample(values, names, base, experts))
        for rank in ranks
    }
    while wanted := {key: search for key, search in searches.items() if search.found is None}:
        bounds = {key: search.bounds() for key, search in wanted.items()}

        def look(part: Part, bounds: Mapping = bounds) -> dict[tuple[int, int], tuple[list[int], Tensor]]:
            alike = len({row.dtype for row in (*part.stored, part.stored_base) if row is not None}) == 1
            rows, start = (part.stored, part.stored_base) if measure is None and alike else (values(part), None)
            counted = {key: ops.count_around(rows[key[0]], *ends, base=start) for key, ends in bounds.items()}
            most = max((part.end - part.begin) // 8, 16)
            return {key: (counts, row[:: math.ceil(len(row) / most) or 1]) for key, (counts, row) in counted.items()}

        seen = list(over_parts(look, names, base, experts))
        for key, search in wanted.items():
            counts, between = zip(*(stretch[key] for stretch in seen), strict=True)
            search.narrow(*bounds[key], np.sum(counts, 0).tolist(), torch.cat(between).cpu().numpy())
    return [[search.found for (_, own), search in searches.items() if own == rank] for rank in ranks]


@dataclass
class _Search:
    """For one order statistic among N values.

    Attributes:
        rank: 0 is the smallest value.
        sample: values, sorted, that are spread as those are that are left.
        upto: how many values are smaller than ``high``.
        low, high: it lies between these, or is found.
        under: how many values are at most ``low``.
    """

    rank: int
    sample: np.ndarray
    upto: int
    low: float = -math.inf
    high: float = math.inf
    under: int = 0
    found: float | None = None

    def bounds(self) -> tuple[float, float]:
        """Two values between which it is likely to lie, near each other; its bounds where the sample has none."""
        left = self.sample[(self.sample > self.low) & (self.sample < self.high)]  # NaN is not
        if not len(left):
            return self.low, self.high
        at = (self.rank - self.under) / max(self.upto - self.under, 1)
        width = min(0.005 + 2 / math.sqrt(len(left)), 0.25)  # never all of them: each pass must come nearer
        first, last = math.floor((at - width) * len(left)), math.ceil((at + width) * len(left))
        return self.low if first < 0 else float(left[first]), self.high if last >= len(left) else float(left[last])

    def narrow(self, low: float, high: float, counts: list[int], between: np.ndarray) -> None:
        """Take up what :func:`mergetune.ops.count_around` saw around two bounds; ``between`` may be a part of it."""
        below, at_low, inside, at_high = np.cumsum(counts).tolist()
        if self.rank < below:
            self.high, self.upto = low, below
        elif self.rank < at_low:
            self.found = low
        elif self.rank < inside and len(between) == inside - at_low:
            self.found = float(np.partition(between, self.rank - at_low)[self.rank - at_low])
        elif self.rank < inside:
            self.low, self.under, self.high, self.upto, self.sample = low, at_low, high, inside, np.sort(between)
        elif self.rank < at_high:
            self.found = high
        elif high == math.inf:
            self.found = math.nan  # which is in no order: it comes last
        else:
            self.low, self.under = high, at_high


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
        tensor = _tensor(names[which], base, experts)
        begin = int(place - ends[which]) + tensor.numel
        rows.append(measure(tensor.part(begin, min(begin + 1024, tensor.numel))).cpu().numpy())
    return np.sort(np.concatenate(rows, 1), 1)
