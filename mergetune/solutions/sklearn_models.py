"""Weight, bias and classes of a fitted linear classifier of scikit-learn, with the scalers in front of it.

The model is an object in memory or one that was read from a pickle without running it. Shapes: R rows, D inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from warnings import warn

import numpy as np

from mergetune.io import PickledObject, plain

LINEAR = (
    "LogisticRegression", "LogisticRegressionCV", "RidgeClassifier", "RidgeClassifierCV", "LinearSVC", "SGDClassifier",
    "Perceptron", "PassiveAggressiveClassifier", "LinearDiscriminantAnalysis",
)  # fmt: skip
"""Classifiers with one row per class, or one row for two classes. Those of SVC stand for pairs of classes."""

SCALERS = {
    "StandardScaler": ("mean_", "scale_"),
    "RobustScaler": ("center_", "scale_"),
    "MaxAbsScaler": ("", "scale_"),
}
"""Steps of a pipeline that compute ``(x - shift) / scale`` -> names of shift and scale, which may be None."""


def linear_model(model: Any) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """The function ``x @ weight.T + bias`` of a fitted model, and its classes.

    Args:
        model: a linear classifier, a ``Pipeline`` that ends in one, or a search over one. Scalers of the pipeline are
            folded into weight and bias; ``Normalizer`` before them leaves the unit-norm features of a head as they are.

    Returns:
        Weight [R, D] and bias [R], float64, and the classes. For two classes R is 1: the row is the logit of the second
        class minus that of the first.

    Raises:
        TypeError: the model is not fitted, or no linear classifier.
        ValueError: a step of the pipeline cannot be folded into a linear head (the message names the step), or the
            model was fitted to several labels per image.
    """
    inner = _field(model, "best_estimator_")
    if inner is not None:
        return linear_model(inner)
    if "Pipeline" in _kinds(model):
        *steps, (_, last) = _field(model, "steps")
        return _folded([step for _, step in steps], *linear_model(last))
    weight, bias = _field(model, "coef_"), _field(model, "intercept_")
    classes = _field(model, "classes_")
    if classes is None:  # RidgeClassifier has them as a property
        classes = _field(_field(model, "_label_binarizer"), "classes_")
    if str(_field(_field(model, "_label_binarizer"), "y_type_")).startswith("multilabel"):
        raise ValueError(
            f"model must have one class per image, got {_kinds(model)[0]} that was fitted to several labels per image"
        )
    foreign = not (isinstance(model, PickledObject) or type(model).__module__.startswith("sklearn."))
    if not (foreign or set(_kinds(model)) & set(LINEAR)) or any(v is None for v in (weight, bias, classes)):
        raise TypeError(
            f"model must be fitted and have coef_, intercept_ and classes_, with a row per class, got "
            f"{_kinds(model)[0]}: use one of {', '.join(LINEAR)}"
        )
    weight, bias = (np.asarray(value) for value in (weight, bias))
    if weight.dtype.kind not in "fiu" or bias.dtype.kind not in "fiu":
        raise ValueError(f"model must have floating-point coef_ and intercept_, got {weight.dtype} and {bias.dtype}")
    weight = np.atleast_2d(weight).astype(np.float64)
    bias = np.broadcast_to(bias.astype(np.float64), len(weight)) if bias.size == 1 else bias.astype(np.float64)
    if _field(model, "multi_class") == "multinomial" and len(weight) == 1:
        weight, bias = 2 * weight, 2 * bias  # its two logits are -d and d, and not those of a sigmoid
    if _has_other_probabilities(model, len(weight)):
        warn(
            f"{_kinds(model)[0]} has probabilities that are no softmax, as those of a head are: the head predicts the "
            "same classes with other probabilities",
            stacklevel=2,
        )
    return weight, bias, np.asarray(classes).tolist()


def _has_other_probabilities(model: Any, rows: int) -> bool:
    """Whether a classifier has probabilities that are no softmax: one-vs-rest, or pieces of straight lines."""
    loss = _field(model, "loss")
    if "SGDClassifier" in _kinds(model):
        return loss == "modified_huber" or (rows > 1 and loss in ("log_loss", "log"))
    separate = _field(model, "multi_class") == "ovr" or _field(model, "solver") == "liblinear"
    return rows > 1 and separate and _kinds(model)[0].startswith("LogisticRegression")


def _folded(
    steps: Sequence[Any], weight: np.ndarray, bias: np.ndarray, classes: list[Any]
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """The linear function with the steps before it, last one first."""
    for place in reversed(range(len(steps))):
        step, kind = steps[place], _kinds(steps[place])[0]
        if step is None or isinstance(step, str) and step == "passthrough":
            continue
        if kind == "Normalizer" and _field(step, "norm") == "l2" and not any(map(_moves, steps[:place])):
            continue
        if kind not in (*SCALERS, "MinMaxScaler") or _field(step, "clip"):
            raise ValueError(
                f"model must be a pipeline of scalers ({', '.join(SCALERS)}, MinMaxScaler, before them Normalizer with "
                f"norm 'l2') and a linear classifier, got the step {kind}, which cannot be folded into a linear head"
            )
        shift, scale = _shift_and_scale(step, kind)
        weight = weight / scale
        bias = bias - weight @ np.broadcast_to(shift, weight.shape[1])
    return weight, bias, classes


def _moves(step: Any) -> bool:
    """Whether a step changes features of unit norm."""
    return not (step is None or step == "passthrough" or _kinds(step)[0] == "Normalizer")


def _shift_and_scale(step: Any, kind: str) -> tuple[Any, Any]:
    """Shift and scale of a fitted scaler, which computes (x - shift) / scale."""
    if kind == "MinMaxScaler":
        factor, least = (_fitted(step, kind, name) for name in ("scale_", "min_"))
        return -least / factor, 1 / factor
    shift, scale = SCALERS[kind]
    shifts = bool(shift) and _field(step, "with_mean" if kind == "StandardScaler" else "with_centering")
    scales = _field(step, {"StandardScaler": "with_std", "RobustScaler": "with_scaling"}.get(kind, "copy")) is not False
    scales = scales or kind == "MaxAbsScaler"
    return _fitted(step, kind, shift) if shifts else 0.0, _fitted(step, kind, scale) if scales else 1.0


def _fitted(step: Any, kind: str, name: str) -> np.ndarray:
    found = _field(step, name)
    if found is None:
        raise TypeError(f"model must be fitted, got the step {kind} without {name}")
    return np.asarray(found, dtype=np.float64)


def _kinds(model: Any) -> list[str]:
    """Names of the classes of a model, the most special first."""
    return [model.name] if isinstance(model, PickledObject) else [cls.__name__ for cls in type(model).__mro__]


def _field(model: Any, name: str) -> Any:
    """An attribute of a model, or None."""
    if not isinstance(model, PickledObject):
        return plain(getattr(model, name, None))
    found = plain(model.fields.get(name))  # a nested list may have no bound when numpy makes an array of it
    return found if name == "steps" or isinstance(found, str | int | float | np.ndarray | PickledObject) else None
