"""Readers of linear heads in files of other projects. No code in a file is run.

Shapes: C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergetune.facts.brief import brief
from mergetune.io import (
    OWNERS,
    PLAIN,
    PickledObject,
    inner_state,
    kind_of_content,
    load_torch,
    named,
    names_file,
    plain,
    read_npz,
    read_numpy_pickle,
    read_safetensors,
    reason,
    require_file,
    unwrapped,
)
from mergetune.io.pickled_contents import MAX_LETTERS
from mergetune.io.sentences import shown
from mergetune.io.tensor_files import EXTRAS
from mergetune.solutions.checkpoints import check_same_names
from mergetune.solutions.sklearn_models import linear_model
from mergetune.solutions.states import float_copy

LAYERS = ("fc", "head", "classifier", "classification_head", "linear")
NAMES = ("weight", "coef_", *(f"{layer}.weight" for layer in LAYERS))
"""Usual names of a head's weight; other names are found if the file holds no other matrix."""
ASIDE = ("optim", "sched", "scaler", "lr_sched", "ema")  # beginnings of keys beside the model, which are left out
ROWS = ("classes_", "classnames", "classes", "class_names")  # keys of the class of each row
BIASES = {"weight": "bias", "weights": "biases", "coef_": "intercept_", "W": "b", "kernel": "bias"}
"""Last part of a weight's name -> that of its bias."""
ABOUT = (*EXTRAS, *ROWS, "class_to_idx")  # entries beside the tensors that describe a head
NO_HEADS = ("ctx", "token_prefix", "token_suffix")  # matrices of other meanings
DEEPEST = 8  # most dicts around a tensor
LISTED = 8  # most tensors that a message lists

WRAPPED = (*OWNERS, *(f"{key}." for key in PLAIN))
"""Beginnings of names that trainers put around those of the layers, as prefixes or as dicts."""


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

    def oriented(self, classes: int) -> HeadFile:
        """The head itself, or transposed if only its columns are as many as the classes.

        open_clip's zero-shot classifiers are stored as [D, C], without class names.
        """
        rows, columns = self.weight.shape
        if self.rows is not None or self.bias is not None or rows == classes or columns != classes:
            return self
        return replace(self, weight=self.weight.T.contiguous())


def read_arrays(file: Path) -> dict[str, Tensor]:
    """Read all arrays of a file of torch.save, .npz, .safetensors or a pickle, as float32, by name; no code is run.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or holds code, or an entry is no floating-point array.
    """
    require_file(file, f"path must be a file of arrays, got {file}, which does not exist")
    content = _content(file)
    if isinstance(content, Tensor):
        content = {"weight": content}
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold arrays by name, got {_kind(content)}")
    _, state = inner_state(content, tensor=_is_array)
    found = {str(name): plain(value) for name, value in state.items()}
    return {name: float_copy(f"{file}: {name}", found[own]) for name, own in unwrapped(list(found), OWNERS).items()}


@names_file("path")
def read_head(path: str | Path, *, name: str | None = None, logit_scale: float | None = None) -> HeadFile:
    """Read a linear classifier from a file of torch.save, safetensors, .npz, pickle or joblib; no code in it is run.

    The content says what the file is, whatever its ending. A pickle may hold a linear classifier of scikit-learn, a
    pipeline of scalers and one, or arrays by name.

    Args:
        path: the file.
        name: name of the weight in the file, or of its layer. None takes the only weight [C, D] of the file, whatever
            its name, with its bias. With None the file must hold nothing but the head, because a head that was trained
            together with other layers does not fit the features of a frozen CLIP.
        logit_scale: factor on the logits that the weight does not contain. None takes ``scale`` from the file, or 1.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or holds code; it holds no head, several (the message lists them), or more than
            a head; a step of a pipeline cannot be folded into a head; the head takes features that are not unit norm
            (WiSE-FT's attribute ``normalize`` is False).
    """
    file = Path(path)
    require_file(file, f"path must be the file of a head, got {file}, which does not exist")
    content = _content(file)
    if isinstance(content, PickledObject):
        return _sklearn_file(file, content, name, logit_scale)
    try:
        found = _named(content)
    except ValueError as error:  # an array of a damaged pickle
        raise ValueError(f"{file} cannot be read as a head: {error}") from error
    key = _chosen(file, found, name)
    beside, layer = _bias_of(found, key), key[: key.rfind(".") + 1]
    about = _about(found, layer)
    more = [other for other in _tensors(found) if other not in (key, beside)]
    if more and name is None:
        raise ValueError(
            f"{file} must hold a head alone, got further parameters that would be lost: {_listed(found, more)}; "
            f"name={key!r} takes the head without them"
        )
    if about.get("normalize") is False:
        raise ValueError(f"{file} must hold a head for features of unit norm, got one with normalize=False")
    if logit_scale is None and "logit_scale" in about:
        raise ValueError(
            f"logit_scale must be given for {file}, because the file holds a logit_scale of unknown meaning: give the "
            "factor on the logits (exp of the stored value if that is a logarithm, as in CLIP)"
        )
    try:
        logit_scale = float(about.get("scale", 1.0)) if logit_scale is None else logit_scale
        rows = _rows(about)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: scale must be a number and the classes a list: {error}") from error
    bias = None if beside is None else found[beside]
    return _head(str(file), found[key], bias, rows, scale=logit_scale, binary=key.endswith("coef_"))


def is_head(path: str | Path) -> bool:
    """Whether a file holds a linear head and nothing else, so that :func:`read_head` reads it without a name.

    A single matrix without bias, classes and scale is a head if its name is usual, such as ``weight``. False for files
    that cannot be read and for files that do not exist.
    """
    try:
        content = _content(Path(path), mmap=True)
        if isinstance(content, PickledObject):
            return True
        found = _named(content)
        key = _chosen(Path(path), found, None)
    except (OSError, TypeError, ValueError):
        return False
    about = _about(found, key[: key.rfind(".") + 1])
    alone = set(_tensors(found)) <= {key, _bias_of(found, key)}
    return alone and bool(about or key.rpartition(".")[2] in BIASES)


def bare_shape(path: str | Path) -> list[int] | None:
    """Shape of the matrix that a file holds without a name around it; None for other files: for a message."""
    try:
        content = _content(Path(path), mmap=True)
    except (OSError, TypeError, ValueError):
        return None
    return list(content.shape) if isinstance(content, Tensor | np.ndarray) and content.ndim == 2 else None


def holds_weights(path: str | Path) -> bool:
    """Whether all matrices of a file have names of layers' weights, as those of heads: for the choice of a message."""
    try:
        found = _named(_content(Path(path), mmap=True))
    except (OSError, TypeError, ValueError):
        return False
    matrices = [key.rpartition(".")[2] for key in _tensors(found) if found[key].ndim == 2]
    return bool(matrices) and set(matrices) <= BIASES.keys()


def read_sklearn(model: Any) -> HeadFile:
    """The head of a fitted linear classifier of scikit-learn, or of a pipeline of scalers and one.

    For two classes, scikit-learn keeps one row w, the logit of the second class minus that of the first. The head gets
    the rows -w / 2 and w / 2.

    Raises:
        TypeError, ValueError: see :func:`mergetune.solutions.sklearn_models.linear_model`.
    """
    weight, bias, classes = linear_model(model)
    return _head("model", weight, bias, classes, binary=True)


def _sklearn_file(file: Path, model: PickledObject, name: str | None, logit_scale: float | None) -> HeadFile:
    if name is not None:
        raise ValueError(f"name must be None for the model in {file}, which has one weight, got {name!r}")
    try:
        found = read_sklearn(model)
    except Exception as error:  # a damaged model raises many kinds
        raise ValueError(f"{file} cannot be read as a head: {reason(error)}") from error
    return found if logit_scale is None else replace(found, scale=logit_scale)


# -- the tensors of a file ---------------------------------------------------------------------------------------------


def _content(file: Path, *, mmap: bool = False) -> Any:
    """Content of a file: arrays by name, perhaps nested; or one array; or a model of scikit-learn."""
    kind = kind_of_content(file)
    if kind == "safetensors":
        return read_safetensors(file)
    if kind == "npz":
        return read_npz(file)
    if kind == "npy":
        raise ValueError(f"{file} must hold arrays by name, got a .npy file: save weight and bias with np.savez")
    try:
        if kind == "torch":
            return load_torch(file, mmap=mmap)
        content = read_numpy_pickle(file, compressed=kind != "pickle")
    except ValueError as error:
        if "pickled code" not in str(error):
            raise
        raise ValueError(f"{error}; `mergetune convert` takes the tensors out of a pickled module") from error
    try:
        return plain(content)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as a head: {error}") from error


def _named(content: Any) -> dict[str, Any]:
    """The entries of nested dicts by dotted name, without wrappers; a single tensor gets the name ``weight``."""
    if isinstance(content, Tensor | np.ndarray):
        return {"weight": content}
    found: dict[str, Any] = {}
    seen: set[int] = set()
    left = MAX_LETTERS

    def walk(inside: Any, prefix: str, depth: int) -> None:
        if not isinstance(inside, dict) or id(inside) in seen or depth > DEEPEST:
            return
        seen.add(id(inside))
        for key, value in inside.items():
            nonlocal left
            left -= len(prefix)
            if left < 0:
                raise ValueError(f"its names have more than {MAX_LETTERS:,} characters")
            value = plain(value)
            if isinstance(value, dict) and key != "class_to_idx":
                if not (prefix == "" and str(key).startswith(ASIDE)):
                    walk(value, f"{prefix}{key}.", depth + 1)
            else:
                found[f"{prefix}{key}"] = value

    walk(content, "", 0)
    names = unwrapped(_tensors(found), WRAPPED)
    prefix = next((own.removesuffix(name) for name, own in names.items()), "")  # one for all
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _is_array(value: Any) -> bool:
    return isinstance(plain(value), Tensor | np.ndarray)


def _tensors(found: dict[str, Any]) -> list[str]:
    """Names of the tensors and arrays, without those that name the classes."""
    return [
        name
        for name, value in found.items()
        if isinstance(value, Tensor | np.ndarray) and name.rpartition(".")[2] not in ABOUT
    ]


def _chosen(file: Path, found: dict[str, Any], name: str | None) -> str:
    """Name of the head's weight; raises ValueError if there is none or the choice is open."""
    matrices = [key for key in _tensors(found) if _is_weight(key, found[key])]
    if name is not None:
        keys = [key for key in _tensors(found) if name == key or name in (f"{w}{key}" for w in WRAPPED)]
        keys = keys or [key for key in matrices if key in (f"{name}.weight", f"{name}.coef_")]
        if not keys:
            raise ValueError(
                f"name must be that of a weight in {file}, got {name!r}: {file} must hold the weight {name!r}, got "
                f"{_listed(found, matrices or _tensors(found))}"
            )
        return keys[0]
    usual = [key for key in NAMES if key in found]
    keys = usual if len(usual) == 1 and set(matrices) <= set(usual) else matrices
    if len(keys) > 1:
        example = (usual or keys)[-1]
        raise ValueError(
            f"name must choose the head's weight in {file}, which holds several, got None: "
            f"{_listed(found, keys)}; for example name={example!r}"
        )
    if not keys:
        raise ValueError(
            f"{file} must hold one head's weight [C, D] (name= says which it is), got {_listed(found, list(found))}"
        )
    return keys[0]


def _is_weight(name: str, value: Any) -> bool:
    """Whether a tensor may be the weight [C, D] of a head."""
    floating = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
    return floating and value.ndim == 2 and value.shape[1] > 1 and name.rpartition(".")[2] not in NO_HEADS


def _bias_of(found: dict[str, Any], key: str) -> str | None:
    """Name of the bias beside a weight, or None."""
    layer, _, last = key.rpartition(".")
    layer = f"{layer}." if layer else ""
    if last in BIASES:
        return f"{layer}{BIASES[last]}" if f"{layer}{BIASES[last]}" in found else None
    inside = [name for name in _tensors(found) if name.startswith(layer) and found[name].ndim == 1]
    for count in found[key].shape:  # [C, D], then [D, C]
        vectors = [name for name in inside if len(found[name]) == count]
        if len(vectors) == 1:
            return vectors[0]
    return None


def _rows(about: dict[str, Any]) -> list[Any] | None:
    """The class of each row, or None."""
    numbered = about.get("class_to_idx")
    if isinstance(numbered, dict) and all(isinstance(number, int) for number in numbered.values()):
        rows = {number: name for name, number in numbered.items()}
        return [rows[number] for number in range(len(numbered))] if sorted(rows) == [*range(len(numbered))] else None
    rows = next((about[name] for name in ROWS if name in about), None)
    if isinstance(rows, Tensor | np.ndarray):
        return rows.reshape(-1).tolist()
    return rows if rows is None else list(rows)


def _listed(found: dict[str, Any], names: Sequence[str]) -> str:
    """Names with the shapes of their tensors, for a message."""
    shown = [
        f"{named(name)} {list(found[name].shape)}" if isinstance(found[name], Tensor | np.ndarray) else named(name)
        for name in names[:LISTED]
    ]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(shown) + more if shown else "nothing"


def _kind(value: Any) -> str:
    return getattr(value, "name", type(value).__name__)


def _about(found: dict[str, Any], layer: str) -> dict[str, Any]:
    """The entries that describe the head of a layer, by their plain names."""
    return {key.removeprefix(layer): value for key, value in found.items() if key.removeprefix(layer) in ABOUT}


def _head(origin: str, weight: Any, bias: Any, rows: list[Any] | None, *, scale: float = 1.0, binary: bool) -> HeadFile:
    """Checked weight and bias, float32, and the class name or label number of each row.

    A weight [D, C] is transposed if the number of biases or of classes says so.
    """
    weight, bias = (
        float_copy(f"{origin}: the weight", weight),
        None if bias is None else float_copy(f"{origin}: the bias", bias),
    )
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"{origin}: the weight must have shape [C, D], got {list(weight.shape)}")
    count = bias.numel() if bias is not None else len(rows or ())
    if count == weight.shape[1] != len(weight) and not (binary and len(weight) == 1):
        weight = weight.T.contiguous()  # [D, C], as Keras and matrix products on the right have it
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
            raise ValueError(f"{origin}: classes must be whole numbers or names, got {', '.join(map(shown, rows[:3]))}")
        stand_for = tuple(numbers) if numbers else tuple(rows)
    return HeadFile(weight, bias, scale, stand_for)
