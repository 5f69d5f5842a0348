"""Merging of files of weights, read and written in stretches so that no checkpoint is held in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as serialize
from tqdm.auto import tqdm

from mergetune.io import (
    MAX_VOCABULARY,
    STORED_NAMES,
    dtype_name,
    hidden,
    naming_file,
    read_json,
    read_regular,
    write_json,
    writing_atomically,
    writing_in,
    writing_to,
)
from mergetune.merging.adapter_merging import merge_adapters
from mergetune.merging.adapters import (
    CONFIG,
    WEIGHTS,
    Adapter,
    adapter_folder,
    is_lora,
    merged_config,
    one_scale,
    open_adapter,
)
from mergetune.merging.checks import check
from mergetune.merging.matching import match
from mergetune.merging.plans import facts_of, merged_pieces, plan_of
from mergetune.merging.preparation import prepared
from mergetune.merging.sources import Constant, StateDict, TensorFile, sources
from mergetune.merging.weight_files import (
    FOLDER_WEIGHTS,
    SETTINGS,
    copy_settings,
    open_weights,
    refuse_other_heads,
    weights_in,
)

UNWRITTEN = (
    ".pt", ".pth", ".bin", ".ckpt", ".tar", ".npz", ".npy", ".json", ".pkl", ".pickle", ".joblib", ".zip", ".onnx",
    ".pt2", ".h5", ".gguf",
)  # fmt: skip
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
    lora: str | None = None,
    lora_rank: int | None = None,
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
        out_file: safetensors file to write, which replaces an existing one; or, if the base (else the first expert) is
            a folder, a folder that also gets a copy of its settings. Missing folders are made.
        missing: what happens to tensors that not every model has, see :func:`match`.
        ema: take the moving averages of the weights, see :func:`open_weights`.
        lora, lora_rank: form and rank for LoRA adapters, see :func:`merge_adapters`, which merges them. They need no
            base.
        options: keyword arguments of the method. An option that takes state dicts also takes :class:`TensorFile`
            objects and what :func:`open_weights` returns.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: the method does not work tensor by tensor, an input holds no weights, the inputs cannot be merged,
            or the output cannot be a safetensors file.
        TypeError: a tensor has whole numbers in one file and floating point in another.
        OSError: the output file cannot be written.
    """
    plan = plan_of(method)
    if plan is None:
        name = getattr(method, "__name__", method)
        raise ValueError(f"method must work tensor by tensor, got {name}: call the function on TensorFile objects")
    if isinstance(expert_files, str | Path):
        raise TypeError(f"expert_files must be a list of files, got {expert_files!r}")
    out, settings, base, experts = _opened(base_file, expert_files, out_file, ema)
    facts, original = facts_of(method), base if isinstance(base_file, str | Path) and base is not None else experts[0]
    if any(map(is_lora, experts)):
        if base_file not in (None, 0):
            raise ValueError(f"base_file must be None or 0 for LoRA adapters, which are differences, got {base_file!r}")
        check(facts, Constant(original) if facts.base else None, experts)
        adapters = [open_adapter(file, state) for file, state in zip(expert_files, experts, strict=True)]
        given = {"form": lora, "rank": lora_rank, "missing": missing}
        with _writing(out, settings, copied=False) as stream:
            merged, config = merge_adapters(method, adapters, **given, **options)
            stream.write(serialize(merged, metadata={"format": "pt"}))
            if config is not None:
                write_json(out.parent / CONFIG, config, indent=2)
        return
    if lora is not None or lora_rank is not None:
        raise ValueError("lora and lora_rank must be None for files without LoRA factors")
    check(facts, base, experts)
    with naming_file(out), _writing(out, settings) as stream:
        given = prepared(facts, base, experts, missing=missing)
        step = plan(given.moving_base, given.moving, **options)
        size = sum(like.numel * like.dtype.itemsize for _, like in sources(given.reference))
        label = {"desc": f"merge ({facts.name})", "unit": "B", "unit_scale": True}
        with tqdm(total=size, disable=hidden(), **label) as bar:
            stream.write(_header(given.reference, original))
            for _, piece in merged_pieces(step, given):
                bar.update(stream.write(piece.contiguous().view(torch.uint8).numpy().data))


@torch.no_grad()
def write_merged(
    method: Callable,
    base_file: str | Path | float | None,
    expert_files: Sequence[str | Path],
    out_file: str | Path,
    options: Mapping[str, Any],
    *,
    missing: str = "refuse",
    ema: bool = False,
) -> None:
    """:func:`merge_files` for a method that does not work tensor by tensor: everything is held in memory.

    ``lora_lego`` gets the scales of adapters from their configurations; the scale of the result is then 1.
    """
    out, settings, base, experts = _opened(base_file, expert_files, out_file, ema)
    adapters: list[Adapter] = []
    config = None
    if adapter_folder(expert_files[0]) and facts_of(method).name == "lora_lego":
        adapters = [open_adapter(file, state) for file, state in zip(expert_files, experts, strict=True)]
        options = {"scales": [one_scale(adapter) for adapter in adapters]} | dict(options)
    elif facts_of(method).base is not False:
        base, experts = match(base, experts, missing=missing)
    with _writing(out, settings, copied=not adapters) as stream:
        merged = method(base, experts, **options)
        if adapters:
            ranks = {layer: len(merged[found.a]) for layer, found in adapters[0].layers.items()}
            config = merged_config(adapters, ranks, ())
        stream.write(serialize({name: tensor.contiguous() for name, tensor in merged.items()}))
        if config is not None:
            write_json(out.parent / CONFIG, config, indent=2)


def _opened(
    base_file: str | Path | float | None, expert_files: Sequence[str | Path], out_file: str | Path, ema: bool
) -> tuple[Path, Path | None, StateDict | None, list[StateDict]]:
    """What :func:`_place` returns, then the base and the experts."""
    if not expert_files:
        raise ValueError("expert_files must hold at least one file, got none")
    named = isinstance(base_file, str | Path)
    place = _place(Path(out_file), Path(base_file if named else expert_files[0]))
    base = open_weights(base_file, ema=ema) if named else None
    experts = [open_weights(file, ema=ema) for file in expert_files]
    refuse_other_heads([*expert_files, *([base_file] if named else [])], [*experts, *([] if base is None else [base])])
    if base_file is not None and not named:
        base = Constant(experts[0], float(base_file))
    return *place, base, experts


def _place(out: Path, first: Path) -> tuple[Path, Path | None]:
    """The file to write, and the folder whose settings are copied beside it: that of the first input, if it is one."""
    adapter = adapter_folder(first)
    if out.suffix in UNWRITTEN:
        raise ValueError(f"out_file must be a .safetensors file, got {out}: the result is written in this format only")
    if out.suffix != ".safetensors" and (first.is_dir() or adapter):
        if out.exists() and not out.is_dir():
            raise ValueError(f"out_file must be a folder, as {first} is, got the file {out}")
        folder = adapter or first
        weights = WEIGHTS if adapter else weights_in(folder).name
        if not weights.endswith(".safetensors"):
            weights = FOLDER_WEIGHTS[0] if (folder / "open_clip_config.json").is_file() else "model.safetensors"
        _refuse_another_model(out, folder, weights)
        return out / weights, folder
    if out.is_dir():
        raise ValueError(f"out_file must be a .safetensors file, got the folder {out}")
    if adapter and out.name != WEIGHTS:
        raise ValueError(f"out_file must be a folder for adapters with {CONFIG}, which is written there, got {out}")
    return out, adapter


def _refuse_another_model(out: Path, folder: Path, weights: str) -> None:
    """Refuses an output folder with a model whose settings are not those of the inputs: it is none of our results."""
    if not out.is_dir() or out.resolve() == folder.resolve():
        return
    there = [name for name in (weights, *SETTINGS) if (out / name).exists()]
    known = [name for name in there if name in SETTINGS and _alike(out / name, folder / name)]
    if there and [name for name in there if name in SETTINGS] != known or there == [weights]:
        raise ValueError(
            f"out_file must be a new folder or one with an earlier result, got {out} with {there[0]} of another model: "
            "choose another folder"
        )


def _alike(one: Path, other: Path) -> bool:
    """Whether two files of settings are equal; of adapters, whether they belong to the same model."""
    if not other.is_file():
        return False
    if one.name != CONFIG:
        return read_regular(one, limit=MAX_VOCABULARY) == read_regular(other, limit=MAX_VOCABULARY)
    models = [
        found.get("base_model_name_or_path") if isinstance(found, dict) else None
        for found in map(read_json, (one, other))
    ]
    return models[0] == models[1]


@contextmanager
def _writing(out: Path, settings: Path | None, *, copied: bool = True) -> Iterator[BinaryIO]:
    """Context with the stream of the output and the lock of its folder, or of the file if nothing goes beside it.

    The stream opens before the work, so a place that cannot be written is known. The weights take their place last: a
    folder with weights alone would be that of another model.

    Args:
        out: the file to write.
        settings: folder whose settings belong beside the output; None if none do.
        copied: whether the settings are copied at the end; otherwise they are written in the context.
    """
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing_to(out) if settings is None else writing_in(out.parent), writing_atomically(out) as stream:
            yield stream
            if settings is not None and copied:
                copy_settings(settings, out.parent)
    except BaseException:
        with suppress(OSError):  # not empty: another process writes there
            for folder in made:
                folder.rmdir()
        raise


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
