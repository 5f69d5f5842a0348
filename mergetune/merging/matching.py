"""Matching of state dicts that differ in what is not merged: buffers, dtypes, prefixes, tied and extra tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from mergetune.io import BUFFERS, unwrapped
from mergetune.merging.checks import check_choice
from mergetune.merging.sources import Source, StateDict, View, file_of, source, stretches, title_of

MISSING = ("refuse", "base", "drop")


def match(
    base: StateDict | None, experts: Sequence[StateDict], *, missing: str = "refuse"
) -> tuple[StateDict | None, list[StateDict]]:
    """Returns state dicts with the same names, shapes and kinds of numbers, from state dicts that may differ in these.

    The reference is the base, or the first expert without a base. Its names, shapes and dtypes are kept. Where the
    others differ:

    - Prefixes of wrappers ("module.", "_orig_mod.") are ignored.
    - Buffers that no model learns (BatchNorm's ``num_batches_tracked``, ``position_ids``) are those of the reference.
    - A tensor with one number may have the shape [] or [1].
    - Integers and floating-point numbers of equal value are the same.
    - A tensor that an expert lacks because it was tied to another one (an output layer that is the embedding) is that
      other tensor. A tied tensor that only an expert stores is left out.

    Every merging method does this for its inputs with ``missing="refuse"``.

    Args:
        base: state dict or None.
        experts: state dicts.
        missing: what happens to other tensors that not every model has in the same shape. "refuse" raises ValueError.
            "base" takes the reference's tensor as it is, and leaves out tensors that the reference lacks. "drop" leaves
            all of them out.

    Raises:
        TypeError: a tensor is floating point in one model and not in another, or is complex.
        ValueError: tensors are missing or differ in shape, and ``missing`` is "refuse"; integers differ; or the models
            have no tensor in common.

    Example:
        >>> import torch
        >>> from mergetune import merging
        >>> a = {"w": torch.ones(2), "head": torch.ones(3)}
        >>> base, experts = merging.match(None, [a, {"module.w": torch.zeros(2)}], missing="drop")
        >>> merging.average(base, experts)
        {'w': tensor([0.5000, 0.5000])}
    """
    check_choice("missing", missing, MISSING)
    argument, reference = ("base", base) if base is not None else ("experts[0]", experts[0])
    title, stored = title_of(argument, reference), set[str]()
    found: list[Mapping[str, Callable[[], Source]]] = []
    for k, expert in enumerate(experts):
        if expert is reference:
            found.append({})
            continue
        ends = (title, reference), (f"experts[{k}]", expert)
        pairs, absent, extra = _paired(reference, expert)
        if (absent or extra) and missing == "refuse":
            raise ValueError(_difference(*ends, absent, extra))
        fitted = {name: _fitted(name, *ends, make, missing) for name, make in pairs.items()}
        found.append({name: make for name, make in fitted.items() if make is not None})
        stored |= {*absent, *(name for name, make in fitted.items() if make is None)}
    if stored and stored >= {name for name in reference if not is_buffer(name)}:
        raise ValueError(f"experts must have tensors in common with {title}, got none of the same name and shape")
    own = {n: partial(source, reference, n) for n in reference if missing != "drop" or n not in stored}
    matched: list[StateDict] = [
        View({n: make if n in stored else pairs.get(n, make) for n, make in own.items()}, title=file_of(expert))
        for pairs, expert in zip(found, experts, strict=True)
    ]
    return (None if base is None else View(own, title=file_of(base))), matched


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is stored and not learned."""
    return name.rpartition(".")[2] in BUFFERS


def _paired(reference: StateDict, expert: StateDict) -> tuple[dict[str, Callable[[], Source]], list[str], list[str]]:
    """Finds the tensors of the reference in an expert: (name -> source, names that it lacks, names it has beside)."""
    ours, theirs = unwrapped(list(reference)), unwrapped(list(expert))
    kept = set(ours.values())
    ours |= {name: name for name in reference if name not in kept}
    found = {name: partial(source, expert, theirs[plain]) for plain, name in ours.items() if plain in theirs}
    absent = []
    for plain, name in ours.items():
        if plain in theirs:
            continue
        twin = None if is_buffer(name) else _twin(reference, name, (ours[p] for p in ours if p in theirs))
        if twin is not None:
            found[name] = found[twin]
        elif not is_buffer(name):
            absent.append(name)
    extra = [
        name
        for plain, name in theirs.items()
        if plain not in ours
        and not is_buffer(name)
        and _twin(expert, name, (theirs[p] for p in theirs if p in ours)) is None
    ]
    return found, absent, extra


def _twin(state: StateDict, name: str, others: Iterable[str]) -> str | None:
    """The name of another matrix of a state dict with the same numbers: a tied tensor that was stored twice."""
    like = source(state, name)
    if not like.dtype.is_floating_point or len(like.shape) < 2:
        return None
    return next((other for other in others if other != name and _equal(like, source(state, other))), None)


def _equal(a: Source, b: Source) -> bool:
    """Whether two tensors hold the same numbers, perhaps in different dtypes."""
    if a.shape != b.shape:
        return False
    for begin, end in stretches(a.numel):
        left, right = (part.read(begin, end).double() for part in (a, b))
        if not torch.equal(left, right.to(left.device)):
            return False
    return True


def _fitted(
    name: str,
    reference: tuple[str, StateDict],
    expert: tuple[str, StateDict],
    found: Callable[[], Source],
    missing: str,
) -> Callable[[], Source] | None:
    """An expert's tensor in the shape of the reference, or the reference's if the tensor is stored and not merged.

    Args:
        name: the name in the reference.
        reference, expert: each with its name in errors.
        found: function that returns the expert's tensor.
        missing: see :func:`match`; with "refuse" another shape is an error, otherwise the result is None.
    """
    (title, state), (argument, other) = reference, expert
    stored = partial(source, state, name)
    like, here, where = stored(), found(), title_of(f"{argument}[{name!r}]", other)
    if like.dtype.is_complex or here.dtype.is_complex:
        raise TypeError(f"{where} must be real, got {here.dtype}")
    if here.shape != like.shape:
        if is_buffer(name):
            return stored
        if not here.numel == like.numel == 1:
            if missing != "refuse":
                return None
            raise ValueError(
                f"{where} must have shape {list(like.shape)} as {title} has, got {list(here.shape)}; {_WAYS} {title}"
            )
        make, found = found, lambda: replace(make(), shape=like.shape)
    floats = like.dtype.is_floating_point, here.dtype.is_floating_point
    if all(floats):
        return found
    if is_buffer(name) or _equal(like, found()):
        return stored
    if any(floats):
        rule = "floating point" if floats[0] else "integer or bool"
        raise TypeError(f"{where} must be {rule}, as {title} has {like.dtype}, got {here.dtype}")
    raise ValueError(f"{where} must equal {title}[{name!r}], got other values: {like.dtype} tensors cannot be merged")


_WAYS = "missing='drop' (--missing drop) leaves such tensors out, missing='base' keeps those of"


def _difference(
    reference: tuple[str, StateDict], expert: tuple[str, StateDict], absent: Sequence[str], extra: Sequence[str]
) -> str:
    """The error for names that differ; names the prefix if a prefix is the whole difference."""
    (title, state), (argument, other) = reference, expert
    said = (
        f"{title_of(argument, other)} must hold the tensors of {title}, got {len(absent) + len(extra)} different names"
    )
    for longer, shorter, whose in ((other, state, argument), (state, other, title)):
        if prefix := _prefix(longer, shorter):
            return f"{said}: the names of {whose} begin with {prefix!r}; remove this prefix from them"
    first = min([*absent, *extra])
    return f"{said}: {argument} {'lacks' if first in absent else 'holds'} {first!r}; {_WAYS} {title}"


def _prefix(longer: StateDict, shorter: StateDict) -> str | None:
    """What stands before every name of ``shorter`` in ``longer``; None if nothing does."""
    first = next(iter(shorter), "")
    prefixes = {name.removesuffix(first) for name in longer if name.endswith(f".{first}")}
    return next((prefix for prefix in sorted(prefixes) if all(prefix + name in longer for name in shorter)), None)
