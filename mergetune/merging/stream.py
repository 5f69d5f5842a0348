"""Merging safetensors files: read, merged and written stretch by stretch, so that no checkpoint is held in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mergetune.io import writing_atomically
from mergetune.merging.checks import check
from mergetune.merging.plans import facts_of, merged_pieces, plan_of
from mergetune.merging.sources import Constant, StateDict, TensorFile, sources


@torch.no_grad()
def merge_files(
    method: Callable,
    base_file: str | Path | float | None,
    expert_files: Sequence[str | Path],
    out_file: str | Path,
    **options,
) -> None:
    """Merge safetensors files into one: the same bits as ``method`` on the state dicts in memory, in little memory.

    Element-wise methods hold a few stretches of every checkpoint at a time, some MB, and a few percent of the values
    where they look for a threshold; those on matrices and ``widen`` hold the tensor in work with its factors. Methods
    with statistics of all tensors (said in their docstrings) read the inputs more than once. The output has the header
    of the base, or of the first expert without one: the same order of tensors and metadata. It appears whole or not at
    all; it may replace an input.

    Args:
        method: a method that works tensor by tensor, such as ``task_arithmetic`` or ``ties``.
        base_file: None for methods without a base. A number is the base in every element, for experts that are
            differences already: 0 for LoRA factors, 1 for IA3's.
        expert_files: one or more.
        out_file: is replaced if it is there.
        options: the method's. Options that are state dicts may be :class:`TensorFile`, so that they too are read from
            files.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: the method does not work tensor by tensor, an input is no safetensors file, or it cannot be merged.
    """
    plan = plan_of(method)
    if plan is None:
        raise ValueError(f"method must work tensor by tensor, got {getattr(method, '__name__', method)}")
    if isinstance(expert_files, str | Path):
        raise TypeError(f"expert_files must be a list of files, got {expert_files!r}")
    given = TensorFile(base_file) if isinstance(base_file, str | Path) else None
    experts = [TensorFile(file) for file in expert_files]
    if not experts:
        raise ValueError("expert_files must hold at least one file, got none")
    reference = experts[0] if given is None else given
    base: StateDict | None = given
    if base_file is not None and not isinstance(base_file, str | Path):
        base = Constant(reference, base_file)
    facts = facts_of(method)
    check(facts, base, experts)
    step = plan(base, experts, **options)
    size = sum(like.numel * like.dtype.itemsize for _, like in sources(reference))
    label = {"desc": f"merge ({facts.name})", "unit": "B", "unit_scale": True}
    with writing_atomically(Path(out_file)) as out, tqdm(total=size, disable=None, **label) as bar:
        out.write(reference.header)
        for _, piece in merged_pieces(step, base, experts):
            bar.update(out.write(piece.contiguous().view(torch.uint8).numpy().data))
