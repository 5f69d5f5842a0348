"""Other projects' checkpoint files, read without ever executing what is pickled in them."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLASS_DEPENDENT = ("token_prefix", "token_suffix", "token_midfix")  # of one set of class names: rebuilt, never read
KGCOOP_UNUSED = ("bias_vectors", "meta_net.")  # saved by KgCoOp, not used in its forward; CoCoOp uses its meta_net


class _Inert:
    """Stands in for a pickled object that is of no use here: takes any state and drops it."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_numpy_scalar = (getattr(np, "_core", None) or np.core).multiarray.scalar  # numpy 2 and 1


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


# Dassl saves its scheduler as an object, which holds the optimiser. None of them is made: a stand-in is.
_ALLOWED = [
    *(
        (_Inert, name)
        for name in (
            "torch.optim.sgd.SGD",
            "torch.optim.adam.Adam",
            "torch.optim.adamw.AdamW",
            "torch.optim.lr_scheduler.CosineAnnealingLR",
            "torch.optim.lr_scheduler.StepLR",
            "torch.optim.lr_scheduler.MultiStepLR",
            "dassl.optim.lr_scheduler.ConstantWarmupScheduler",
            "dassl.optim.lr_scheduler.LinearWarmupScheduler",
        )
    ),
    (_plain_dict, "collections.defaultdict"),  # torch's unpickler fills plain dicts only
    (dict, "builtins.dict"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


@dataclass(frozen=True, eq=False)
class PromptFile:
    """What a CoOp-family checkpoint says.

    Attributes:
        ctx: context vectors, [n, W] or [C, n, W] float32.
        epoch: training epoch, if recorded.
        file: where it was read.
    """

    ctx: Tensor
    epoch: int | None
    file: Path


def read_prompt(path: str | Path) -> PromptFile:
    """Read the context vectors of CoOp, KgCoOp, ProGrad or the official MERGETUNE.

    Args:
        path: a file ``model.pth.tar-N``, ``model-best.pth.tar`` and the like; or the folder that holds it (or holds
            ``prompt_learner``, or the official ``prompt_mid_learner``): then the file that Dassl's text file
            ``checkpoint`` names, else the highest epoch.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: not a checkpoint, foreign objects in it, or no context vectors.
    """
    file = _find(Path(path))
    content = load_tensors(file)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file} must hold a state_dict, got {type(state).__name__}")
    state = {name.removeprefix("module.").removeprefix("prompt_learner."): value for name, value in state.items()}
    unused = KGCOOP_UNUSED if "bias_vectors" in state else ()
    kept = [name for name in state if name not in CLASS_DEPENDENT and not name.startswith(unused)]
    ctx = state.get("ctx")
    if not isinstance(ctx, Tensor) or ctx.ndim not in (2, 3) or not ctx.is_floating_point():
        what = f"ctx {list(ctx.shape)}" if isinstance(ctx, Tensor) else ", ".join(kept[:5]) or "nothing"
        raise ValueError(f"{file} must hold context vectors 'ctx' [n, W] or [C, n, W], got {what}")
    if kept != ["ctx"]:
        more = ", ".join(name for name in kept if name != "ctx")
        raise ValueError(f"{file} must be a prompt of CoOp's form, got further parameters that would be lost: {more}")
    epoch = content.get("epoch")
    return PromptFile(ctx=ctx.detach().float().clone(), epoch=epoch if isinstance(epoch, int) else None, file=file)


def load_tensors(file: Path) -> dict[str, Any]:
    """``torch.load`` of a dict with ``weights_only=True`` and a short allow-list, every refusal a ValueError."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds an object of {found[1]}, and pickled code is never run" if found else str(error)
        raise ValueError(f"{file} cannot be read as a checkpoint: {what}") from error
    except Exception as error:  # torch.load raises many kinds on files that are not checkpoints
        raise ValueError(f"{file} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dict, got {type(content).__name__}")
    return content


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"path must be a checkpoint or its folder, got {path}, which does not exist")
    for learner in ("prompt_mid_learner", "prompt_learner"):
        if (path / learner).is_dir():
            path = path / learner
            break
    if (path / "checkpoint").is_file():
        name = (path / "checkpoint").read_text(errors="replace").strip()
        named = [file for file in path.iterdir() if file.name == name]
        if named:
            return named[0]
    epochs = {file: re.fullmatch(r"model\.pth\.tar-(\d+)|model-(\d+)\.pth\.tar", file.name) for file in path.iterdir()}
    numbered = {file: int(match[1] or match[2]) for file, match in epochs.items() if match}
    if numbered:
        return max(numbered, key=numbered.__getitem__)
    if (path / "model-best.pth.tar").is_file():
        return path / "model-best.pth.tar"
    raise FileNotFoundError(f"path must hold model.pth.tar-N or model-best.pth.tar, got {path} without one")
