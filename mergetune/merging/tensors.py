"""What all merging methods share: state dicts in memory or in files, read stretch by stretch, their checks, the driver.

A method that works tensor by tensor is written as a plan: it checks its options, reads what it must know of all tensors
(a first pass, if any) and returns a :class:`Merge`, which makes one stretch of one merged tensor. :func:`method` turns
the plan into a function on state dicts; :func:`mergetune.merging.merge_files` runs the same plan over files. So both
give the same bits.

Shapes: K experts, n elements of a stretch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

StateDict = Mapping[str, Tensor]
STRETCH = 2**17
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


@dataclass(frozen=True, eq=False)
class Source:
    """One tensor of one checkpoint, wherever it is.

    Attributes:
        shape, dtype, device: the tensor's.
        read: begin, end -> that stretch of its elements, [end - begin], in its own dtype, valid until the next call.
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

        buffer = torch.empty(0, dtype=dtype)

        def read(begin: int, end: int) -> Tensor:
            nonlocal buffer
            buffer = buffer if len(buffer) >= end - begin else torch.empty(end - begin, dtype=dtype)
            stretch = buffer[: end - begin]
            self._file.seek(offset + begin * dtype.itemsize)
            raw = memoryview(stretch.view(torch.uint8).numpy())
            while raw:  # the system may give less than was asked for
                got = self._file.readinto(raw)
                if not got:
                    raise ValueError(f"{self.path} ends before {name} does: it was cut off while it was read")
                raw = raw[got:]
            return stretch

        return Source(torch.Size(entry["shape"]), dtype, torch.device("cpu"), read)


def source(state: StateDict, name: str) -> Source:
    """One tensor of a state dict in memory or in a file."""
    if isinstance(state, TensorFile):
        return state.source(name)
    tensor = state[name].detach()
    flat = tensor.reshape(-1)
    return Source(tensor.shape, tensor.dtype, tensor.device, lambda begin, end: flat[begin:end])


@dataclass(frozen=True, eq=False)
class Part:
    """The same stretch of one tensor in base and experts; or the tensors whole, in their shape.

    Attributes:
        name, shape: of the tensor.
        begin, end: which of its elements.
        base: [n], or its shape; None where there is no base. float32, or float64 where an input is.
        experts: [K, n], or [K, *shape]. The dtype of base.
    """

    name: str
    shape: torch.Size
    begin: int
    end: int
    base: Tensor | None
    experts: Tensor

    @property
    def deltas(self) -> Tensor:
        """The task vectors, experts - base."""
        return self.experts - self.base

    def of(self, argument: str, states: Sequence[StateDict]) -> Tensor:
        """The same stretch of other state dicts (``argument`` names them in errors), [len(states), n]."""
        rows = torch.empty(len(states), self.end - self.begin, dtype=self.experts.dtype, device=self.experts.device)
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
            names = check(merge, base, experts)
            step = plan(base, experts, **options)
            merged = {}
            for name in names:
                like = source(base if base is not None else experts[0], name)
                merged[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
                flat, begin = merged[name].view(-1), 0
                for piece in merged_pieces(step, name, base, experts):
                    flat[begin : begin + len(piece)] = piece
                    begin += len(piece)
            return merged

        merge.plan = plan
        return merge

    return wrap


def merged_pieces(step: Merge, name: str, base: StateDict | None, experts: Sequence[StateDict]) -> Iterator[Tensor]:
    """One merged tensor, flat, in pieces, in the dtype of the base (of the first expert without one).

    Each piece is valid until the next one.

    Raises:
        ValueError: a merged value is not finite.
    """
    like = source(base if base is not None else experts[0], name)
    if not like.dtype.is_floating_point:
        yield from (like.read(a, b) for a, b in stretches(like.numel))
        return
    for part in parts(name, base, experts, whole=step.whole):
        merged = step.part(part).reshape(-1)
        if merged.numel() != part.end - part.begin:
            raise ValueError(f"{name}: merged must hold {part.end - part.begin} values, got {merged.numel()}")
        piece = merged.to(like.dtype)
        if not piece.sum(dtype=merged.dtype).isfinite() and not piece.isfinite().all():  # the sum is quick
            original = like.read(part.begin, part.end)
            if not all(torch.equal(source(e, name).read(part.begin, part.end), original) for e in experts):
                bad = int((~piece.isfinite()).sum())
                raise ValueError(
                    f"{name} must be finite after merging, got {bad} NaN or infinite values: an input holds them, or "
                    f"they are too large for {like.dtype}"
                )
            piece = original  # a mask with -inf, the same everywhere
        yield piece


def parts(name: str, base: StateDict | None, experts: Sequence[StateDict], *, whole: bool = False) -> Iterator[Part]:
    """All parts of one tensor in order; each is valid until the next one."""
    sources = [source(state, name) for state in ([] if base is None else [base]) + list(experts)]
    first = sources[0]
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in sources) else torch.float32
    longest = first.numel if whole else min(first.numel, STRETCH)
    buffer = torch.empty(len(sources), longest, dtype=dtype, device=first.device)
    for begin, end in stretches(first.numel, longest):
        rows = buffer[:, : end - begin]
        for row, s in zip(rows, sources, strict=True):
            row.copy_(s.read(begin, end))
        rows = rows.reshape(-1, *first.shape) if whole else rows
        yield Part(name, first.shape, begin, end, None if base is None else rows[0], rows if base is None else rows[1:])


def stretches(numel: int, step: int | None = None) -> Iterator[tuple[int, int]]:
    """Begin and end of each."""
    step = step or STRETCH
    return ((begin, min(begin + step, numel)) for begin in range(0, numel, step))


def floating(state: StateDict) -> list[str]:
    """Names of the tensors that are merged: those of a floating-point dtype."""
    return [name for name in state if source(state, name).dtype.is_floating_point]


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


def weighted_sum(weights: Sequence[float], rows: Tensor) -> Tensor:
    """``sum_k weights_k rows_k``, expert by expert: no product of all of them is made."""
    total = rows[0] * weights[0]
    for weight, row in zip(weights[1:], rows[1:], strict=True):
        total.add_(row, alpha=weight)
    return total


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


def order_statistics(values: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> list[list[float]]:
    """Exact order statistics of more values than fit in memory, as float32, in two passes.

    A histogram of the upper 16 bits of all values finds the bin of each rank, a histogram of the lower 16 bits in these
    bins finds the value: the bits of floats are in the order of the floats, those of negative ones in reverse.

    Args:
        values: gives K rows of values, [K, n] at a time; called twice. None of them may be NaN.
        ranks: 0 is the smallest value of a row.

    Returns:
        For each rank the values of the K rows.
    """
    uppers: dict[int, np.ndarray] = {}
    for stretch in values():
        for k, row in enumerate(stretch):
            uppers[k] = uppers.get(k, 0) + np.bincount(_halves(row)[1], minlength=2**16)
    ends = {k: np.cumsum(counts[_ORDER]) for k, counts in uppers.items()}
    bins = {k: [int(np.searchsorted(end, rank, side="right")) for rank in ranks] for k, end in ends.items()}
    lowers: dict[tuple[int, int], np.ndarray] = {}
    for stretch in values():
        for k, row in enumerate(stretch):
            lower, upper = _halves(row)
            for top in {int(_ORDER[place]) for place in bins[k]}:
                counts = np.bincount(lower[upper == top], minlength=2**16)
                lowers[k, top] = lowers.get((k, top), 0) + counts

    def value(k: int, rank: int, place: int) -> float:
        top = int(_ORDER[place])
        below = ends[k][place] - uppers[k][top]  # how many values lie in the bins before this one
        negative = top >= 2**15
        counts = lowers[k, top][::-1] if negative else lowers[k, top]
        low = int(np.searchsorted(np.cumsum(counts), rank - below, side="right"))
        return np.uint32(top << 16 | (2**16 - 1 - low if negative else low)).view(np.float32).item()

    return [[value(k, rank, bins[k][i]) for k in uppers] for i, rank in enumerate(ranks)]


_ORDER = np.concatenate([np.arange(2**16 - 1, 2**15 - 1, -1), np.arange(2**15)])
"""The upper halves of float32 from the least to the largest value."""


def _halves(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper 16 bits of float32 values."""
    pairs = values.float().contiguous().cpu().numpy().astype("<f4", copy=False).view("<u2").reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
