"""Head: a linear classifier on image features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergetune.clip import ClassRows, Edit, FrozenClip, check_classnames
from mergetune.io import Items, Number
from mergetune.solutions.base import Description, Solution, State, check_finite
from mergetune.solutions.checkpoints import HeadFile, read_head, read_sklearn


class HeadDescription(Description, frozen=True):
    """A saved head."""

    classnames: Items[str]
    logit_scale: Annotated[Number, Field(gt=0)]
    normalize: bool = False


@dataclass(frozen=True, eq=False)
class Head(Solution):
    """A linear classifier on image features: ``logits = scale * (x @ weight.T + bias)``.

    Attributes:
        weight: [C, D] float32.
        classnames: C names.
        bias: [C] float32, or None. In the unit of the weight: a feature that is always 1.
        logit_scale: factor on the logits; 1 for weights that hold it already, as others' heads do.
        backbone, fingerprint: the CLIP that it was made for, if known; the fingerprint is the image tower's.
        notes: settings and origin, JSON-able, kept with the file.
        normalize: whether the rows are made unit norm before the product: a cosine classifier.
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
    surrogate_on: ClassVar[str] = "classes"
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
                raise ValueError("bias must be None where rows are made unit norm, got one")
        if not 0 < self.logit_scale < float("inf"):
            raise ValueError(f"logit_scale must be positive and finite, got {self.logit_scale}")

    @classmethod
    def zero_shot(
        cls,
        clip: FrozenClip,
        classnames: Sequence[str],
        templates: str | Sequence[str] = "a photo of a {}.",
        *,
        bias: bool = False,
    ) -> Head:
        """The zero-shot classifier: unit class embeddings, the CLIP's logit scale, and a bias of 0 if wanted."""
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
        """Read a linear classifier, [C, D] and a bias if there is one, from .pt, .pth, .safetensors or .npz, safely.

        It must have been trained on the CLIP's own features at unit norm. Heads in pickles are converted first:
        WiSE-FT's by ``mergetune convert``; scikit-learn's are saved as .npz, or given to
        :meth:`from_sklearn`.

        Args:
            path: the file; see :func:`mergetune.solutions.read_head`.
            classnames: the class names by label number; may be None where the file has them.
            name: of the weight in a file that holds more than a head: "classification_head.weight".
            logit_scale: factor on the logits. None: what the file says, or 1, as the weight holds it already.
        """
        found = read_head(path, name=name, logit_scale=logit_scale)
        return cls._from_file(found, classnames, {"checkpoint": Path(path).name})

    @classmethod
    def from_sklearn(cls, model: Any, *, classnames: Sequence[str] | None = None) -> Head:
        """A fitted ``sklearn.linear_model.LogisticRegression``; ``classnames`` by label number, if it has numbers."""
        return cls._from_file(read_sklearn(model), classnames, {"checkpoint": type(model).__name__})

    @classmethod
    def _from_file(cls, found: HeadFile, classnames: Sequence[str] | None, notes: dict[str, Any]) -> Head:
        names = found.name_rows(classnames)
        return cls(found.weight, names, found.bias, logit_scale=found.scale, notes=notes)

    # -- as a solution -------------------------------------------------------------------------------------------------

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """Its rows are the class weights; the bias is the weight of a constant 1."""
        weight, bias = states["weight"], states.get("bias")
        values = weight if bias is None else torch.cat([weight, bias[..., None]], -1)
        return Edit(rows=(ClassRows(self.classnames, values),), normalize=self.normalize, scale=self.logit_scale)

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> list[Head]:
        """The zero-shot classifier of these templates, with a bias of 0 if this head has one."""
        point = Head.zero_shot(clip, classnames, templates, bias=self.bias is not None)
        return [replace(point.rescaled(self.logit_scale), normalize=self.normalize)]

    def plain_head(self) -> Head | None:
        """Itself, unless its rows are made unit norm."""
        return None if self.normalize else self

    def rescaled(self, logit_scale: float) -> Head:
        """The same logits with another factor on them: weight and bias take up the difference."""
        if self.normalize:  # the length of its rows does not matter
            return self
        factor = self.logit_scale / logit_scale
        bias = None if self.bias is None else self.bias * factor
        return replace(self, weight=self.weight * factor, bias=bias, logit_scale=logit_scale)

    def settings(self) -> dict[str, Any]:
        return {"logit_scale": self.logit_scale} | ({"normalize": True} if self.normalize else {})

    def check_width(self, clip: FrozenClip) -> None:
        if self.weight.shape[1] != clip.embed_dim:
            raise ValueError(f"weight must have the embedding's width {clip.embed_dim}, got {list(self.weight.shape)}")

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Also refuse another logit scale: the same weights would not mean the same logits."""
        super().check_line(other)  # class weights are the state: there is one space
        if other.logit_scale is None or abs(self.logit_scale / other.logit_scale - 1) > 1e-6:
            raise ValueError(
                f"heads on one path must have one logit_scale, got {self.logit_scale} and {other.logit_scale}"
            )
        if self.normalize != other.normalize:
            raise ValueError(f"heads on one path must agree in normalize, got {self.normalize} and {other.normalize}")

    @property
    def form(self) -> Hashable:
        return self.kind, tuple(self.weight.shape), self.bias is None, self.classnames, self.logit_scale, self.normalize

    def card(self) -> tuple[str, str, str]:
        size = f"[{len(self.classnames)}, {self.weight.shape[1]}]"
        return "Linear head for CLIP", "linear-head", f"{size}, on unit-norm image features."
