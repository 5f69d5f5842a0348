"""Readers of prompts and heads in checkpoint files of other projects. No code in a file is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergetune.facts.brief import brief
from mergetune.io import (
    listing,
    load_tensors,
    load_torch,
    names_file,
    not_plain,
    read_npz,
    read_regular,
    read_safetensors,
    require_file,
)
from mergetune.io.tensor_files import EXTRAS

CLASS_DEPENDENT = ("token_prefix", "token_suffix", "token_midfix")  # depend on class names: never read
KGCOOP_UNUSED = ("bias_vectors", "meta_net.")  # KgCoOp saves these and never uses them; CoCoOp uses its meta_net
PRODA_ONLY = ("nc_token_prefix", "nc_token_suffix")  # texts without a class name, for an extra loss term
HEADS = ("fc", "head", "classifier", "classification_head", "linear")  # usual names of a last layer

PICKLES = (".pkl", ".pickle", ".joblib")


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


@brief()
@dataclass(frozen=True, eq=False)
class HeadFile:
    """Content of a linear classifier's file: ``logits = scale * (x @ weight.T + bias)``.

    Attributes:
        weight: [C, D] float32.
        bias: [C] float32, or None.
        scale: factor on the logits.
        rows: class name or label number of each row of the weight; None if the file has neither.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    rows: tuple[str, ...] | tuple[int, ...] | None

    def name_rows(self, classnames: Sequence[str] | None) -> tuple[str, ...]:
        """The class name of each row.

        Args:
            classnames: class names by label number; None takes the names from the file.

        Raises:
            ValueError: the file has no names and none are given, or the given names differ from those of the file.
        """
        named = tuple(row for row in self.rows or () if isinstance(row, str))
        if not named:
            if classnames is None:
                raise ValueError("classnames must be given for a head whose file does not name its classes, got None")
            names, labels = tuple(classnames), tuple(row for row in self.rows or () if isinstance(row, int))
            if not labels or (max(labels) >= len(names) == len(labels)):
                return names
            if min(labels) < 0 or max(labels) >= len(names):
                raise ValueError(
                    f"classnames must name the labels 0 to {max(labels)} of the head, got {len(names)} names"
                )
            return tuple(names[label] for label in labels)
        if classnames is not None:
            check_same_names(classnames, named)
        return named


def check_same_names(classnames: Sequence[str], named: Sequence[str]) -> None:
    """Raise ValueError unless the given class names are those that a file names, in any order."""
    if other := sorted(set(classnames) ^ set(named)):
        raise ValueError(f"classnames must be those of the file, got other names: {listing(other, most=5)}")


@names_file("path")
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
    if not isinstance(ctx, Tensor) or ctx.ndim not in (2, 3) or not ctx.is_floating_point() or not_plain(ctx):
        what = f"ctx {list(ctx.shape)}" if isinstance(ctx, Tensor) else listing(kept, most=5)
        raise ValueError(f"{file} must hold context vectors 'ctx' [n, W] or [C, n, W], got {what}")
    if kept != ["ctx"]:
        more = listing((name for name in kept if name != "ctx"), most=5)
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


def read_arrays(file: Path) -> dict[str, Tensor]:
    """Read all arrays of a .pt, .pth, .npz or .safetensors file, as float32, by name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is a pickle or damaged, or an entry is no floating-point array.
    """
    require_file(file, f"path must be a file of arrays, got {file}, which does not exist")
    return {str(name): _floats(f"{file}: {name}", value) for name, value in _read_dict(file).items()}


@names_file("path")
def read_head(path: str | Path, *, name: str | None = None, logit_scale: float | None = None) -> HeadFile:
    """Read a linear classifier from a .pt or .pth file (a tensor or a dict of tensors), .safetensors or .npz.

    Args:
        path: the file.
        name: name of the weight in the file. None accepts ``weight``, scikit-learn's ``coef_``, or ``weight`` of
            ``fc``, ``head``, ``classifier``, ``classification_head`` or ``linear``. With None the file must hold
            nothing but the head, because a head that was trained together with other layers does not fit the features
            of a frozen CLIP.
        logit_scale: factor on the logits that the weight does not contain. None takes ``scale`` from the file, or 1.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is a pickle or damaged; it holds no head, or more than a head; the head takes features
            that are not unit norm (WiSE-FT's attribute ``normalize`` is False).
    """
    file = Path(path)
    require_file(file, f"path must be the file of a head, got {file}, which does not exist")
    content = {str(key).removeprefix("module."): value for key, value in _read_dict(file).items()}
    known = ("weight", "coef_", *(f"{layer}.weight" for layer in HEADS))
    found = [key for key in ([name] if name else known) if key in content]
    if len(found) != 1:
        wanted = f"the weight {name!r}" if name else "one head's weight (name= says which it is)"
        raise ValueError(f"{file} must hold {wanted}, got {listing(content)}")
    layer = found[0].removesuffix("coef_").removesuffix("weight")
    beside = f"{layer}intercept_" if found[0].endswith("coef_") else f"{layer}bias"
    extras = {key.removeprefix(layer): value for key, value in content.items() if key.removeprefix(layer) in EXTRAS}
    more = [key for key in content if key not in (*found, beside) and key.removeprefix(layer) not in EXTRAS]
    if more and name is None:
        raise ValueError(
            f"{file} must hold a head alone, got further parameters that would be lost: {listing(more, most=5)}; "
            f"name={found[0]!r} takes the head without them"
        )
    if extras.get("normalize") is False:
        raise ValueError(f"{file} must hold a head for features of unit norm, got one with normalize=False")
    if logit_scale is None and "logit_scale" in extras:
        raise ValueError(
            f"logit_scale must be given for {file}, because the file holds a logit_scale of unknown meaning: give the "
            "factor on the logits (exp of the stored value if that is a logarithm, as in CLIP)"
        )
    try:
        logit_scale = float(extras.get("scale", 1.0)) if logit_scale is None else logit_scale
        rows = extras.get("classes_", extras.get("classnames"))
        rows = np.atleast_1d(rows).tolist() if isinstance(rows, np.ndarray) else rows
        rows = rows.reshape(-1).tolist() if isinstance(rows, Tensor) else rows if rows is None else list(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: scale must be a number and the classes a list: {error}") from error
    weight, bias, rows = _head(str(file), content[found[0]], content.get(beside), rows, binary=beside != f"{layer}bias")
    return HeadFile(weight, bias, logit_scale, rows)


def read_sklearn(model: Any) -> HeadFile:
    """Weight, bias and classes of a fitted scikit-learn classifier with ``coef_``, ``intercept_`` and ``classes_``.

    For two classes, scikit-learn keeps one row w, the logit of the second class minus that of the first. The head gets
    the rows -w / 2 and w / 2.
    """
    if not all(hasattr(model, name) for name in ("coef_", "intercept_", "classes_")):
        raise TypeError(f"model must be fitted and have coef_, intercept_ and classes_, got {type(model).__name__}")
    weight, bias, rows = _head("model", model.coef_, model.intercept_, model.classes_.tolist(), binary=True)
    return HeadFile(weight, bias, 1.0, rows)


def _head(
    origin: str, weight: Any, bias: Any, rows: list[Any] | None, *, binary: bool
) -> tuple[Tensor, Tensor | None, tuple[str, ...] | tuple[int, ...] | None]:
    """Checked weight and bias, float32, and the class name or label number of each row."""
    weight, bias = (
        _floats(f"{origin}: the weight", weight),
        None if bias is None else _floats(f"{origin}: the bias", bias),
    )
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"{origin}: the weight must have shape [C, D], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{origin}: the bias must have shape [C] = [{len(weight)}], got {list(bias.shape)}")
    if binary and len(weight) == 1:
        weight = torch.cat([-weight / 2, weight / 2])
        bias = None if bias is None else torch.cat([-bias / 2, bias / 2])
    stand_for = None
    if rows is not None:
        if len(rows) != len(weight):
            raise ValueError(
                f"{origin}: the classes must be as many as the {len(weight)} rows of the weight, got {len(rows)}"
            )
        numbers = [int(row) for row in rows if isinstance(row, int | float) and float(row).is_integer()]
        if len(numbers) != len(rows) and not all(isinstance(row, str) for row in rows):
            raise ValueError(f"{origin}: classes must be whole numbers or names, got {rows[:3]}")
        stand_for = tuple(numbers) if numbers else tuple(rows)
    return weight, bias, stand_for


def _floats(name: str, values: Any) -> Tensor:
    """A float32 copy of a tensor or array."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32))
    if isinstance(values, Tensor) and values.is_floating_point() and not_plain(values) is None:
        return values.detach().float().clone()
    kind = not_plain(values) if isinstance(values, Tensor) else None
    raise ValueError(f"{name} must be floating point, got {kind or getattr(values, 'dtype', type(values).__name__)}")


def _read_dict(file: Path) -> dict[str, Any]:
    """The arrays of a .safetensors, .npz or torch file, by name; a single tensor gets the name ``weight``."""
    if file.suffix in PICKLES:
        raise ValueError(
            f"{file} must be .pt, .safetensors or .npz, got a pickle, which could run code: save a scikit-learn model "
            "with np.savez('head.npz', coef_=model.coef_, intercept_=model.intercept_, classes_=model.classes_)"
        )
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix == ".npz":
        return read_npz(file)
    try:
        content = load_torch(file)
    except ValueError as error:
        if "pickled code" not in str(error):
            raise
        raise ValueError(f"{error}; `mergetune convert` takes the tensors out of a pickled module") from error
    if isinstance(content, Tensor):
        return {"weight": content}
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a tensor or a dict of them, got {type(content).__name__}")
    return content


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
        name = read_regular(path / "checkpoint").decode(errors="replace").strip()
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
