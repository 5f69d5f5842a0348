"""Merging of safetensors files, read and written in stretches so that no checkpoint is held in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from mergetune.io import hidden, writing_atomically
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
    """Merges safetensors files into one file, with little memory and the same bits as ``method`` on state dicts.

    Element-wise methods hold a few stretches of every checkpoint (some MB), and a few percent of the values while they
    search a threshold. Methods on matrices and ``widen`` hold one tensor and its factors. Methods that need statistics
    of all tensors read the inputs more than once; their docstrings say how often. The output has the header of the
    base, or of the first expert without a base: the same order of tensors and the same metadata. The output file
    appears only when complete, and may replace an input.

    Args:
        method: a method that works tensor by tensor, such as ``task_arithmetic`` or ``ties``.
        base_file: file of the base; None for methods without a base. A number stands for a base with this value in
            every element: 0 for LoRA factors, 1 for IA3 vectors.
        expert_files: one or more files.
        out_file: file to write; an existing file is replaced.
        options: keyword arguments of the method. An option that takes state dicts also takes :class:`TensorFile`
            objects.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: the method does not work tensor by tensor, an input is not a safetensors file, or the inputs cannot
            be merged.
    """
    plan = plan_of(method)
    if plan is None:
        name = getattr(method, "__name__", method)
        raise ValueError(f"method must work tensor by tensor, got {name}: call the function on TensorFile objects")
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
    with writing_atomically(Path(out_file)) as out, tqdm(total=size, disable=hidden(), **label) as bar:
        out.write(reference.header)
        for _, piece in merged_pieces(step, base, experts):
            bar.update(out.write(piece.contiguous().view(torch.uint8).numpy().data))
