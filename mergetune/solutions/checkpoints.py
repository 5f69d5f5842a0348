"""Prompts and heads from other projects' checkpoint files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergetune.io import load_tensors, load_torch, read_npz, read_regular, read_safetensors, require_file
from mergetune.io.tensor_files import EXTRAS

CLASS_DEPENDENT = ("token_prefix", "token_suffix", "token_midfix")  # of one set of class names: rebuilt, never read
KGCOOP_UNUSED = ("bias_vectors", "meta_net.")  # saved by KgCoOp, not used in its forward; CoCoOp uses its meta_net
PRODA_ONLY = ("nc_token_prefix", "nc_token_suffix")  # the texts without a class name, of its own term of the loss
HEADS = ("fc", "head", "classifier", "classification_head", "linear")  # what others call their last layer

PICKLES = (".pkl", ".pickle", ".joblib")


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


@dataclass(frozen=True, eq=False)
class HeadFile:
    """What a linear classifier's file says: ``logits = scale * (x @ weight.T + bias)``.

    Attributes:
        weight: [C, D] float32.
        bias: [C] float32, or None.
        scale: factor on the logits.
        rows: what each row of the weight stands for, class names or label numbers; None if the file does not tell.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    rows: tuple[str, ...] | tuple[int, ...] | None

    def name_rows(self, classnames: Sequence[str] | None) -> tuple[str, ...]:
        """The class name of each row.

        Args:
            classnames: the names by label number; may be None where the file has names itself.
        """
        named = tuple(row for row in self.rows or () if isinstance(row, str))
        if not named:
            if classnames is None:
                raise ValueError("classnames must be given: the head does not name its classes")
            names, labels = tuple(classnames), tuple(row for row in self.rows or () if isinstance(row, int))
            if not labels or (max(labels) >= len(names) == len(labels)):
                return names
            if min(labels) < 0 or max(labels) >= len(names):
                raise ValueError(f"classnames must name the labels up to {max(labels)}, got {len(names)} names")
            return tuple(names[label] for label in labels)
        if classnames is not None and set(classnames) != set(named):
            other = sorted(set(classnames) ^ set(named))
            raise ValueError(f"classnames must be those of the head, got a difference in {', '.join(other[:5])}")
        return named


def read_prompt(path: str | Path) -> PromptFile:
    """Read the context vectors of CoOp, KgCoOp, ProGrad or the official MERGETUNE.

    ProDA with a single prompt has the same format; its distributions of several prompts are refused.

    Args:
        path: a file ``model.pth.tar-N``, ``model-best.pth.tar`` and the like; or the folder that holds it (or holds
            ``prompt_learner``, or the official ``prompt_mid_learner``): then the file that Dassl's text file
            ``checkpoint`` names, else the highest epoch.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: not a checkpoint, foreign objects in it, or no context vectors.
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
                f"{file} must hold one prompt, got ProDA's distribution of {len(ctx)}: no prompt equals it"
            )
        ctx = ctx[0]
    epoch = content.get("epoch")
    return PromptFile(ctx=ctx.detach().float().clone(), epoch=epoch if isinstance(epoch, int) else None, file=file)


def state_dict_of(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint's state_dict, without the prefixes of wrappers and of CoOp's learner.

    Raises:
        ValueError: there is no state_dict.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file} must hold a state_dict, got {type(state).__name__}")
    return {name.removeprefix("module.").removeprefix("prompt_learner."): value for name, value in state.items()}


def read_arrays(file: Path) -> dict[str, Tensor]:
    """The floating-point arrays of a .pt, .pth, .npz or .safetensors file, as float32, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle, a damaged file, or an entry that is no floating-point array.
    """
    require_file(file, f"path must be a file of arrays, got {file}, where there is no file")
    return {str(name): _floats(f"{file}: {name}", value) for name, value in _read_dict(file).items()}


def read_head(path: str | Path, *, name: str | None = None, logit_scale: float | None = None) -> HeadFile:
    """Read a linear classifier from .pt or .pth (a tensor, or a dict of them), .safetensors or .npz.

    Args:
        path: the file.
        name: of the weight in it. None: ``weight``, scikit-learn's ``coef_``, or ``weight`` of ``fc``, ``head``,
            ``classifier``, ``classification_head`` or ``linear``; and nothing else may be in the file: a head that was
            trained together with other layers is none for a frozen CLIP's features.
        logit_scale: factor on the logits where the weight does not hold it. None: the file's own ``scale``, or 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle; a file that cannot be read; no head in it, or more than a head; a head for features that
            are not scaled to unit norm (WiSE-FT's attribute ``normalize``).
    """
    file = Path(path)
    require_file(file, f"path must be a head's file, got {file}, where there is no file")
    content = {str(key).removeprefix("module."): value for key, value in _read_dict(file).items()}
    known = ("weight", "coef_", *(f"{layer}.weight" for layer in HEADS))
    found = [key for key in ([name] if name else known) if key in content]
    if len(found) != 1:
        wanted = f"the weight {name!r}" if name else "one head's weight (name= says which it is)"
        raise ValueError(f"{file} must hold {wanted}, got {', '.join(list(content)[:8]) or 'nothing'}")
    layer = found[0].removesuffix("coef_").removesuffix("weight")
    beside = f"{layer}intercept_" if found[0].endswith("coef_") else f"{layer}bias"
    extras = {key.removeprefix(layer): value for key, value in content.items() if key.removeprefix(layer) in EXTRAS}
    more = [key for key in content if key not in (*found, beside) and key.removeprefix(layer) not in EXTRAS]
    if more and name is None:
        raise ValueError(
            f"{file} must hold a head alone, got further parameters that would be lost: {', '.join(more[:5])}; "
            f"name={found[0]!r} takes the head without them"
        )
    if extras.get("normalize") is False:
        raise ValueError(f"{file} must hold a head for features of unit norm, got one with normalize=False")
    if logit_scale is None and "logit_scale" in extras:
        raise ValueError(
            f"{file} holds a logit_scale: give logit_scale=, the factor on its logits (exp of what is there if that is "
            "a logarithm, as in CLIP)"
        )
    try:
        logit_scale = float(extras.get("scale", 1.0)) if logit_scale is None else logit_scale
        rows = extras.get("classes_", extras.get("classnames"))
        rows = rows.tolist() if isinstance(rows, Tensor | np.ndarray) else rows if rows is None else list(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: scale must be a number and the classes a list: {error}") from error
    weight, bias, rows = _head(str(file), content[found[0]], content.get(beside), rows, binary=beside != f"{layer}bias")
    return HeadFile(weight, bias, logit_scale, rows)


def read_sklearn(model: Any) -> HeadFile:
    """A head from a fitted ``sklearn.linear_model.LogisticRegression``, or what has its coef_, intercept_ and classes_.

    Two classes have one row there, the second's logit against the first's: half of it goes to each.
    """
    if not all(hasattr(model, name) for name in ("coef_", "intercept_", "classes_")):
        raise TypeError(f"model must be fitted, with coef_, intercept_ and classes_, got {type(model).__name__}")
    weight, bias, rows = _head("model", model.coef_, model.intercept_, model.classes_.tolist(), binary=True)
    return HeadFile(weight, bias, 1.0, rows)


def _head(
    origin: str, weight: Any, bias: Any, rows: list[Any] | None, *, binary: bool
) -> tuple[Tensor, Tensor | None, tuple[str, ...] | tuple[int, ...] | None]:
    """Weight, bias and what the rows stand for, checked, as float32."""
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
            raise ValueError(f"{origin}: there must be a class for each of the {len(weight)} rows, got {len(rows)}")
        numbers = [int(row) for row in rows if isinstance(row, int | float) and float(row).is_integer()]
        if len(numbers) != len(rows) and not all(isinstance(row, str) for row in rows):
            raise ValueError(f"{origin}: classes must be whole numbers or names, got {rows[:3]}")
        stand_for = tuple(numbers) if numbers else tuple(rows)
    return weight, bias, stand_for


def _floats(name: str, values: Any) -> Tensor:
    """A float32 copy of a tensor or array."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32))
    if isinstance(values, Tensor) and values.is_floating_point() and values.layout == torch.strided:
        return values.detach().float().clone()
    raise ValueError(f"{name} must be floating point, got {getattr(values, 'dtype', type(values).__name__)}")


def _read_dict(file: Path) -> dict[str, Any]:
    """The arrays of a .safetensors, .npz or torch file, by name; a bare tensor is called ``weight``."""
    if file.suffix in PICKLES:
        raise ValueError(
            f"{file} must be .pt, .safetensors or .npz, got a pickle, which is never run: save a scikit-learn model "
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
    """The checkpoint at a path: the file itself, or of a folder the one that Dassl names, else the latest.

    Raises:
        FileNotFoundError: nothing there.
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
    raise FileNotFoundError(f"path must hold model.pth.tar-N or model-best.pth.tar, got {path} without one")
