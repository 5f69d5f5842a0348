"""Head: a linear classifier on image features, with one weight row per class."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergetune.clip import ClassRows, Edit, FrozenClip, check_classnames
from mergetune.facts.brief import brief
from mergetune.io import Items, Number
from mergetune.solutions.base import Solution
from mergetune.solutions.head_files import HeadFile, read_head, read_sklearn
from mergetune.solutions.solution_folders import Description
from mergetune.solutions.states import State, check_finite

LARGEST_SCALE = 1e12
"""Largest factor on logits: they stay finite in float32. The smallest is its inverse."""


class HeadDescription(Description, frozen=True):
    """A saved head."""

    classnames: Items[str]
    logit_scale: Annotated[Number, Field(gt=0, le=LARGEST_SCALE)]
    normalize: bool = False


@brief("weight", "bias", "classnames", "logit_scale", "normalize", "backbone", "notes")
@dataclass(frozen=True, eq=False)
class Head(Solution):
    """A linear classifier on unit-norm image features x: ``logits = logit_scale * (x @ weight.T + bias)``.

    Attributes:
        weight: one row per class, [C, D] float32.
        classnames: C names.
        bias: [C] float32, or None. ``logit_scale`` multiplies the bias, too.
        logit_scale: factor on the logits; 1 if the weight contains the factor, as in heads of other libraries.
        backbone: name of the CLIP that the head was made for, or None.
        fingerprint: SHA-256 of the weights of that CLIP's image tower, or None; a CLIP with other weights is refused.
        notes: settings and origin, JSON-able; saved with the head.
        normalize: whether the rows are scaled to unit norm before the product (a cosine classifier).

    Example:
        >>> import mergetune as mt, torch
        >>> head = mt.Head(torch.eye(2), ("cat", "dog"), bias=torch.zeros(2), logit_scale=100.0)
        >>> list(head.state()), head.numbers
        (['weight', 'bias'], 6)
        >>> head.rescaled(1.0).weight  # the same logits with the scale in the weight
        tensor([[100.,   0.],
                [  0., 100.]])
    """

    weight: Tensor
    classnames: tuple[str, ...]
    bias: Tensor | None = None
    logit_scale: float = 1.0
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    normalize: bool = False

    kind: ClassVar[str] = "head"
    tensors: ClassVar[tuple[str, ...]] = ("weight", "bias")
    surrogate_on: ClassVar[str] = "rows"
    description: ClassVar[type[Description]] = HeadDescription

    def __post_init__(self) -> None:
        check_finite("weight", self.weight)
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            raise ValueError(f"weight must have shape [C, D], got {list(self.weight.shape)}")
        if len(check_classnames(self.classnames)) != len(self.weight):
            raise ValueError(
                f"classnames must name the {len(self.weight)} classes of weight, got {len(self.classnames)}"
            )
        if self.bias is not None:
            check_finite("bias", self.bias)
            if tuple(self.bias.shape) != (len(self.weight),):
                raise ValueError(f"bias must have shape [C] = [{len(self.weight)}], got {list(self.bias.shape)}")
            if self.normalize:
                raise ValueError("bias must be None with normalize=True, got a bias: a cosine classifier has none")
        if not 1 / LARGEST_SCALE <= self.logit_scale <= LARGEST_SCALE:
            raise ValueError(
                f"logit_scale must be positive and finite, from {1 / LARGEST_SCALE:g} to {LARGEST_SCALE:g}, got "
                f"{self.logit_scale:g}"
            )

    @classmethod
    def zero_shot(
        cls,
        clip: FrozenClip,
        classnames: Sequence[str],
        templates: str | Sequence[str] = "a photo of a {}.",
        *,
        bias: bool = False,
    ) -> Head:
        """The zero-shot classifier as a head: unit-norm class embeddings and the CLIP's logit scale.

        Args:
            clip: the frozen CLIP.
            classnames: C names.
            templates: one or more texts with ``{}``; the class embeddings of several are averaged.
            bias: whether the head gets a bias, which starts at zero.
        """
        weight = clip.class_embeddings(classnames, templates)
        return cls(
            weight=weight,
            classnames=tuple(classnames),
            bias=weight.new_zeros(len(weight)) if bias else None,
            logit_scale=clip.logit_scale,
            backbone=clip.name,
            fingerprint=clip.image_fingerprint,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        classnames: Sequence[str] | None = None,
        name: str | None = None,
        logit_scale: float | None = None,
    ) -> Head:
        """Read a linear classifier from a file of torch.save, safetensors, .npz, pickle or joblib; no code is run.

        The classifier must have been trained on unit-norm image features of the same CLIP. A pickle may hold a model of
        scikit-learn; a pickled torch module, such as WiSE-FT's, must be converted with ``mergetune convert`` first.

        Args:
            path: the file, with a weight [C, D] and optionally a bias; see :func:`mergetune.solutions.read_head`. A
                matrix [D, C] without class names, as open_clip makes it, is read with C ``classnames``.
            classnames: class names by label number; None takes the names from the file.
            name: name of the weight, such as "classification_head.weight", in a file that holds several.
            logit_scale: factor on the logits. None takes ``scale`` from the file, or 1 if the file has none.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file holds no head or several, or names that do not match; see
                :func:`mergetune.solutions.read_head`.
        """
        found = read_head(path, name=name, logit_scale=logit_scale)
        return cls._from_file(found, classnames, {"checkpoint": Path(path).name})

    @classmethod
    def from_sklearn(cls, model: Any, *, classnames: Sequence[str] | None = None) -> Head:
        """The head of a fitted linear classifier of scikit-learn, or of a pipeline of scalers and one.

        Args:
            model: a fitted ``LogisticRegression``, ``RidgeClassifier``, ``LinearSVC``, ``SGDClassifier``,
                ``LinearDiscriminantAnalysis`` or one like them, or a ``Pipeline`` that ends in one. Scalers before it
                are folded into weight and bias.
            classnames: class names by label number; needed if the model was fitted on numbers.

        Raises:
            TypeError: the model is not fitted, or no linear classifier.
            ValueError: a step of the pipeline cannot be folded into a head.
        """
        return cls._from_file(read_sklearn(model), classnames, {"checkpoint": type(model).__name__})

    @classmethod
    def _from_file(cls, found: HeadFile, classnames: Sequence[str] | None, notes: dict[str, Any]) -> Head:
        found = found if classnames is None else found.oriented(len(classnames))
        names = found.name_rows(classnames)
        return cls(found.weight, names, found.bias, logit_scale=found.scale, notes=notes)

    # -- as a solution -------------------------------------------------------------------------------------------------

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """An edit whose class rows are the weight; a bias is appended as the last column."""
        weight, bias = states["weight"], states.get("bias")
        values = weight if bias is None else torch.cat([weight, bias[..., None]], -1)
        return Edit(rows=(ClassRows(self.classnames, values),), normalize=self.normalize, scale=self.logit_scale)

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> list[Head]:
        """The zero-shot classifier of these templates, with a zero bias if this head has a bias."""
        point = Head.zero_shot(clip, classnames, templates, bias=self.bias is not None)
        return [replace(point.rescaled(self.logit_scale), normalize=self.normalize)]

    def plain_head(self) -> Head | None:
        """The head itself, or None if its rows are scaled to unit norm."""
        return None if self.normalize else self

    def rescaled(self, logit_scale: float) -> Head:
        """A head with the same logits and this logit scale; weight and bias absorb the ratio of the scales."""
        if self.normalize:  # the rows are scaled to unit norm and cannot absorb a factor
            return self
        factor = self.logit_scale / logit_scale
        bias = None if self.bias is None else self.bias * factor
        return replace(self, weight=self.weight * factor, bias=bias, logit_scale=logit_scale)

    def in_order_of(self, classnames: Sequence[str]) -> Head:
        """A head with the same rows in the order of ``classnames``; self if these are other classes or repeat."""
        names = tuple(classnames)
        if names == self.classnames or len(set(names)) < len(names) or set(names) != set(self.classnames):
            return self
        rows = [self.classnames.index(name) for name in names]
        return replace(
            self, weight=self.weight[rows], classnames=names, bias=None if self.bias is None else self.bias[rows]
        )

    def with_bias(self) -> Head:
        """The same head with a bias of zeros; self if there is a bias, or if rows of unit norm cannot have one."""
        if self.bias is not None or self.normalize:
            return self
        return replace(self, bias=self.weight.new_zeros(len(self.weight)))

    def in_form_of(self, like: Solution) -> Head:
        """This head with the logit scale and the class order of ``like``, and with a bias if ``like`` has one."""
        found = super().in_form_of(like)
        if isinstance(like, Head) and like.bias is not None:
            found = found.with_bias()
        return found if like.classnames is None else found.in_order_of(like.classnames)

    def settings(self) -> dict[str, Any]:
        return {"logit_scale": self.logit_scale} | ({"normalize": True} if self.normalize else {})

    def check_width(self, clip: FrozenClip) -> None:
        if self.weight.shape[1] != clip.embed_dim:
            raise ValueError(f"weight must have the embedding's width {clip.embed_dim}, got {list(self.weight.shape)}")

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Check that a line joins two heads: equal shapes, classes, logit scale and ``normalize``."""
        super().check_line(other)  # the state is the class weights, so both spaces are the same
        if other.logit_scale is None or abs(self.logit_scale / other.logit_scale - 1) > 1e-6:
            raise ValueError(
                f"heads on one path must have one logit_scale, got {self.logit_scale} and {other.logit_scale}: "
                "convert one of them with rescaled(logit_scale)"
            )
        if self.normalize != other.normalize:
            raise ValueError(
                f"heads on one path must have the same normalize, got {self.normalize} and {other.normalize}"
            )

    @property
    def form(self) -> Hashable:
        return self.kind, tuple(self.weight.shape), self.bias is None, self.classnames, self.logit_scale, self.normalize

    @property
    def identity(self) -> tuple[Tensor | str, ...]:
        """The tensors; a cosine classifier adds its scale, which its rows do not hold."""
        return (*super().identity, *((f"unit rows, {self.logit_scale}",) if self.normalize else ()))

    def card(self) -> tuple[str, str, str]:
        size = f"[{len(self.classnames)}, {self.weight.shape[1]}]"
        return "Linear head for CLIP", "linear-head", f"{size}, on unit-norm image features."
