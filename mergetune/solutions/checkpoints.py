"""Readers of prompts in checkpoint files of other projects. No code in a file is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mergetune.facts.brief import brief
from mergetune.io import load_tensors, read_regular, require_file

CLASS_DEPENDENT = ("token_prefix", "token_suffix", "token_midfix")  # depend on class names: never read
KGCOOP_UNUSED = ("bias_vectors", "meta_net.")  # KgCoOp saves these and never uses them; CoCoOp uses its meta_net
PRODA_ONLY = ("nc_token_prefix", "nc_token_suffix")  # texts without a class name, for an extra loss term


@brief()
@dataclass(frozen=True, eq=False)
class PromptFile:
    """Content of a CoOp-family checkpoint.

    Attributes:
        ctx: context vectors, float32: [n, W] if all classes share them, [C, n, W] if they are class-specific.
        epoch: training epoch, or None if the file does not record one.
        file: path of the file that was read.
    """

    ctx: Tensor
    epoch: int | None
    file: Path


def check_same_names(classnames: Sequence[str], named: Sequence[str]) -> None:
    """Raise ValueError unless the given class names are those that a file names, in any order."""
    if other := sorted(set(classnames) ^ set(named)):
        raise ValueError(f"classnames must be those of the file, got other names: {', '.join(other[:5])}")


def read_prompt(path: str | Path) -> PromptFile:
    """Read the context vectors from a checkpoint of CoOp, KgCoOp, ProGrad or the official MERGETUNE.

    A ProDA checkpoint with a single prompt has the same format; one with several prompts raises ValueError.

    Args:
        path: a file such as ``model.pth.tar-N`` or ``model-best.pth.tar``, or its folder, or a folder that contains
            ``prompt_learner`` or the official code's ``prompt_mid_learner``. In a folder, the file that Dassl's text
            file ``checkpoint`` names is read, else the one with the highest epoch.

    Raises:
        FileNotFoundError: no checkpoint at ``path``.
        ValueError: the file is no checkpoint, holds objects other than tensors and plain values, holds no context
            vectors, or holds further parameters.
    """
    file = checkpoint_file(path)
    content = load_tensors(file)
    state = state_dict_of(file, content)
    unused = KGCOOP_UNUSED if "bias_vectors" in state else ()
    kept = [name for name in state if name not in CLASS_DEPENDENT + PRODA_ONLY and not name.startswith(unused)]
    ctx = state.get("ctx")
    if not isinstance(ctx, Tensor) or ctx.ndim not in (2, 3) or not ctx.is_floating_point():
        what = f"ctx {list(ctx.shape)}" if isinstance(ctx, Tensor) else ", ".join(kept[:5]) or "nothing"
        raise ValueError(f"{file} must hold context vectors 'ctx' [n, W] or [C, n, W], got {what}")
    if kept != ["ctx"]:
        more = ", ".join(name for name in kept if name != "ctx")
        raise ValueError(f"{file} must be a prompt of CoOp's form, got further parameters that would be lost: {more}")
    if ctx.ndim == 3 and any(name in state for name in PRODA_ONLY):
        if len(ctx) > 1:
            raise ValueError(
                f"{file} must hold one prompt, got a distribution of {len(ctx)} (ProDA), which no single prompt equals"
            )
        ctx = ctx[0]
    epoch = content.get("epoch")
    return PromptFile(ctx=ctx.detach().float().clone(), epoch=epoch if isinstance(epoch, int) else None, file=file)


def state_dict_of(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The state_dict of a checkpoint, without the prefixes "module." and "prompt_learner." of its names.

    Raises:
        ValueError: the checkpoint holds no state_dict.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file} must hold a state_dict, got {type(state).__name__}")
    return {name.removeprefix("module.").removeprefix("prompt_learner."): value for name, value in state.items()}


def checkpoint_file(path: str | Path) -> Path:
    """Path of the checkpoint file at a path: the file itself, or the file of a folder, see :func:`read_prompt`.

    Raises:
        FileNotFoundError: no checkpoint at ``path``.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        require_file(path, f"path must be a checkpoint or its folder, got {path}, which does not exist")
    for learner in ("prompt_mid_learner", "prompt_learner"):
        if (path / learner).is_dir():
            path = path / learner
            break
    if (path / "checkpoint").is_file():
        name = read_regular(path / "checkpoint").decode("utf-8-sig", errors="replace").strip()
        named = [file for file in path.iterdir() if file.name == name]
        if named:
            return named[0]
    epochs = {file: re.fullmatch(r"model\.pth\.tar-(\d+)|model-(\d+)\.pth\.tar", file.name) for file in path.iterdir()}
    numbered = {file: int(match[1] or match[2]) for file, match in epochs.items() if match}
    if numbered:
        return max(numbered, key=numbered.__getitem__)
    if (path / "model-best.pth.tar").is_file():
        return path / "model-best.pth.tar"
    raise FileNotFoundError(f"path must contain model.pth.tar-N or model-best.pth.tar, got {path} with neither")
