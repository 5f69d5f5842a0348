"""Head: a linear classifier on image features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip, check_classnames
from mergetune.solutions.base import (
    Encoder,
    check_finite,
    check_same_classes,
    common_fields,
    read_solution,
    write_solution,
)
from mergetune.solutions.checkpoints import HeadFile, read_head, read_sklearn


@dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier on image features: ``logits = scale * (x @ weight.T + bias)``.

    Attributes:
        weight: [C, D] float32.
        classnames: C names.
        bias: [C] float32, or None. In the unit of the weight: a feature that is always 1.
        logit_scale: factor on the logits; 1 for weights that hold it already, as others' heads do.
        backbone, fingerprint: the CLIP that it was made for, if known; the fingerprint is the image tower's.
        notes: settings and origin, JSON-able, kept with the file.
    """

    weight: Tensor
    classnames: tuple[str, ...]
    bias: Tensor | None = None
    logit_scale: float = 1.0
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "head"
    normalize: ClassVar[bool] = False

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

    @property
    def parameter(self) -> Tensor:
        """What is searched and interpolated: [C, D], or [C, D + 1] with the bias as a constant feature's weight."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1)

    def with_parameter(self, parameter: Tensor, **changes: Any) -> Head:
        """A head with this :attr:`parameter`, copied as float32; ``changes`` are of other fields."""
        parameter = parameter.detach().float().clone()
        if self.bias is None:
            return replace(self, weight=parameter, **changes)
        return replace(self, weight=parameter[:, :-1].contiguous(), bias=parameter[:, -1].contiguous(), **changes)

    def rescaled(self, logit_scale: float) -> Head:
        """The same logits with another factor on them: weight and bias take up the difference."""
        factor = self.logit_scale / logit_scale
        bias = None if self.bias is None else self.bias * factor
        return replace(self, weight=self.weight * factor, bias=bias, logit_scale=logit_scale)

    def scale(self, clip: FrozenClip | None = None) -> float:
        """Logit scale of its class weights."""
        return self.logit_scale

    def encoder(self, clip: FrozenClip, classnames: Sequence[str], *, precision: torch.dtype | None = None) -> Encoder:
        """A head is its own class weights."""
        self._check_clip(clip)
        check_same_classes("classnames", check_classnames(classnames), self.classnames)
        return lambda parameter: parameter

    def class_weights(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """Its rows for these classes, [C, D], or [C, D + 1] with the bias.

        Of two classes with one name it is the first, unless all its classes are asked for, in their order.
        """
        self._check_clip(clip)
        if tuple(classnames) == self.classnames:
            return self.parameter.to(clip.device)
        row = {name: i for i, name in reversed(list(enumerate(self.classnames)))}
        unknown = [name for name in classnames if name not in row]
        if unknown:
            raise ValueError(f"classnames must be among the head's {len(row)} classes, got {unknown[0]!r}")
        return self.parameter[[row[name] for name in classnames]].to(clip.device)

    def class_embeddings(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """The weight's rows for these classes, made unit norm, [C, D]: directions only, without bias and scale."""
        return F.normalize(self.class_weights(clip, classnames)[:, : self.weight.shape[1]], dim=-1)

    def _check_clip(self, clip: FrozenClip) -> None:
        if self.weight.shape[1] != clip.embed_dim:
            raise ValueError(f"weight must have the embedding's width {clip.embed_dim}, got {list(self.weight.shape)}")
        if self.fingerprint is not None and self.fingerprint != clip.image_fingerprint:
            raise ValueError(
                f"clip must be the one that the head was made for ({self.backbone}, image fingerprint "
                f"{self.fingerprint[:12]}), got {clip.name} ({clip.image_fingerprint[:12]})"
            )

    def save(self, path: str | Path) -> None:
        """Write ``solution.safetensors`` and ``solution.json`` into the folder ``path``."""
        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        write_solution(self, path, tensors, {"logit_scale": self.logit_scale})

    @classmethod
    def load(cls, path: str | Path) -> Head:
        """Read what :meth:`save` wrote."""
        config, tensors = read_solution(path, cls.kind, {"weight"}, {"logit_scale": int | float})
        return cls(
            weight=tensors["weight"],
            bias=tensors.get("bias"),
            logit_scale=config["logit_scale"],
            **common_fields(config),
        )
