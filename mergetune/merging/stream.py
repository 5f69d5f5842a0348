"""Merging of files of weights, read and written in stretches so that no checkpoint is held in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mergetune.io import STORED_NAMES, dtype_name, writing_atomically
from mergetune.merging.checks import check
from mergetune.merging.plans import facts_of, merged_pieces, plan_of
from mergetune.merging.preparation import prepared
from mergetune.merging.sources import Constant, StateDict, TensorFile, sources
from mergetune.merging.weight_files import open_weights

UNWRITTEN = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".npz", ".npy", ".json")
"""Endings that promise another format than the one that is written."""


@torch.no_grad()
def merge_files(
    method: Callable,
    base_file: str | Path | float | None,
    expert_files: Sequence[str | Path],
    out_file: str | Path,
    *,
    missing: str = "refuse",
    ema: bool = False,
    **options,
) -> None:
    """Merges files of weights into one safetensors file, with little memory and the same bits as on state dicts.

    Element-wise methods hold a few stretches of every checkpoint (some MB), and a few percent of the values while they
    search a threshold. Methods on matrices and ``widen`` hold one tensor and its factors. Every method reads the inputs
    once to check them. Methods that need statistics of all tensors read the inputs again; their docstrings say how
    often. The order of tensors and the metadata are those of the base, or of the first expert without a base. The
    output file appears only when complete, and may replace an input.

    Args:
        method: a method that works tensor by tensor, such as ``task_arithmetic`` or ``ties``.
        base_file: file of the base; None for methods without a base. A number stands for a base with this value in
            every element: 1 for IA3 vectors.
        expert_files: one or more files. Every file and folder that :func:`open_weights` opens is allowed.
        out_file: safetensors file to write. Missing folders are made; an existing file is replaced.
        missing: what happens to tensors that not every model has, see :func:`match`.
        ema: take the moving averages of the weights, see :func:`open_weights`.
        options: keyword arguments of the method. An option that takes state dicts also takes :class:`TensorFile`
            objects and what :func:`open_weights` returns.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: the method does not work tensor by tensor, an input holds no weights, the inputs cannot be merged,
            or the output cannot be a safetensors file.
        OSError: the output file cannot be written.
    """
    plan = plan_of(method)
    if plan is None:
        name = getattr(method, "__name__", method)
        raise ValueError(f"method must work tensor by tensor, got {name}: call the function on TensorFile objects")
    if isinstance(expert_files, str | Path):
        raise TypeError(f"expert_files must be a list of files, got {expert_files!r}")
    out_file = Path(out_file)
    check_out(out_file)
    base: StateDict | None = open_weights(base_file, ema=ema) if isinstance(base_file, str | Path) else None
    experts = [open_weights(file, ema=ema) for file in expert_files]
    if not experts:
        raise ValueError("expert_files must hold at least one file, got none")
    original = experts[0] if base is None else base
    if base_file is not None and not isinstance(base_file, str | Path):
        base = Constant(original, base_file)
    facts = facts_of(method)
    check(facts, base, experts)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(out_file) as out:  # opened before the work, so that a place that cannot be written is known
        given = prepared(facts, base, experts, missing=missing)
        step = plan(given.moving_base, given.moving, **options)
        size = sum(like.numel * like.dtype.itemsize for _, like in sources(given.reference))
        label = {"desc": f"merge ({facts.name})", "unit": "B", "unit_scale": True}
        with tqdm(total=size, disable=None, **label) as bar:
            out.write(_header(given.reference, original))
            for _, piece in merged_pieces(step, given):
                bar.update(out.write(piece.contiguous().view(torch.uint8).numpy().data))


def check_out(file: Path) -> None:
    """Raises ValueError for a path that promises another format than safetensors, or that is a folder."""
    if file.suffix in UNWRITTEN:
        raise ValueError(f"out_file must be a .safetensors file, got {file}: the result is written in this format only")
    if file.is_dir():
        raise ValueError(f"out_file must be a .safetensors file, got the folder {file}")


def _header(state: StateDict, original: StateDict) -> bytes:
    """The header of the output: that of a safetensors file whose tensors are all kept, or a new one."""
    if isinstance(original, TensorFile) and list(original) == list(state):
        return original.header
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, like in sources(state):
        end = begin + like.numel * like.dtype.itemsize
        dtype = STORED_NAMES[dtype_name(like.dtype)]
        entries[name] = {"dtype": dtype, "shape": list(like.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
