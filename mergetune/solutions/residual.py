"""Residual: one vector per class that is added to the class embedding of the solution below."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergetune.clip import ClassRows, Edit, FrozenClip, check_classnames
from mergetune.facts.brief import brief
from mergetune.io import Items, listing, load_tensors, names_file, not_plain
from mergetune.solutions.base import Solution
from mergetune.solutions.checkpoints import state_dict_of
from mergetune.solutions.dassl_folders import checkpoint_file
from mergetune.solutions.head import Head
from mergetune.solutions.solution_folders import Description
from mergetune.solutions.stack import Stack
from mergetune.solutions.states import State, check_finite


class ResidualDescription(Description, frozen=True):
    """A saved residual."""

    classnames: Items[str]


@brief("rows", "classnames", "backbone", "notes")
@dataclass(frozen=True, eq=False)
class Residual(Solution):
    """Class residuals: a vector r_c per class, ``W_c = normalise(T_c + r_c)`` (TaskRes, arXiv 2211.10277).

    T_c is the unit-norm class embedding of the solution below in a :class:`mergetune.Stack`. A class without a row
    keeps T_c.

    Attributes:
        rows: the vectors r, [R, D] float32.
        classnames: R names, one per row.
        backbone: name of the CLIP that the residual was made for, or None.
        fingerprint: SHA-256 of the weights of that CLIP's image tower, or None; a CLIP with other weights is refused.
        notes: settings and origin, JSON-able; saved with the residual.

    Example:
        >>> import mergetune as mt, torch
        >>> residual = mt.Residual(torch.zeros(2, 512), ("cat", "dog"))
        >>> mt.Stack(mt.Templates(("a photo of a {}.",)), residual).numbers
        1024
    """

    rows: Tensor
    classnames: tuple[str, ...]
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "residual"
    tensors: ClassVar[tuple[str, ...]] = ("rows",)
    description: ClassVar[type[Description]] = ResidualDescription

    def __post_init__(self) -> None:
        check_finite("rows", self.rows)
        if self.rows.ndim != 2 or 0 in self.rows.shape:
            raise ValueError(f"rows must have shape [R, D], got {list(self.rows.shape)}")
        if len(check_classnames(self.classnames)) != len(self.rows):
            raise ValueError(f"classnames must name the {len(self.rows)} classes of rows, got {len(self.classnames)}")

    @classmethod
    def zeros(cls, clip: FrozenClip, classnames: Sequence[str]) -> Residual:
        """Zero residuals for these classes, the start of training: they change nothing."""
        rows = torch.zeros(len(check_classnames(classnames)), clip.embed_dim, device=clip.device)
        backbone, fingerprint = clip.name or None, clip.image_fingerprint or None
        return cls(rows, tuple(classnames), backbone=backbone, fingerprint=fingerprint)

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """An edit that adds the rows to the class embeddings."""
        return Edit(rows=(ClassRows(self.classnames, states["rows"], added=True),))

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> list[Residual]:
        """Zero residuals: they leave the solution below unchanged."""
        return [replace(self, rows=torch.zeros_like(self.rows))]

    def distance(self, states: State, to: State) -> Tensor:
        """Surrogate of :func:`mergetune.fit`, [M]: half the squared distance of the rows to ``to``, averaged over rows.

        Args:
            states: M stacked states.
            to: the zero-shot state, stacked, of one setting.
        """
        return 0.5 * (states["rows"] - to["rows"]).square().sum(-1).mean(-1)

    def check_classes(self, classnames: Sequence[str]) -> None:
        """Check that at least one class has a row; the others keep the embeddings of the solution below."""
        if not set(classnames) & set(self.classnames):
            raise ValueError(f"classnames must contain a class of the residual, got {list(classnames)[:3]}")

    def check_width(self, clip: FrozenClip) -> None:
        if self.rows.shape[1] != clip.embed_dim:
            raise ValueError(f"rows must have the embedding's width {clip.embed_dim}, got {list(self.rows.shape)}")

    @property
    def form(self) -> Hashable:
        return self.kind, tuple(self.rows.shape), self.classnames

    def card(self) -> tuple[str, str, str]:
        size = f"[{len(self.classnames)}, {self.rows.shape[1]}]"
        return "Class residuals for CLIP", "class-residual", f"{size}, added to unit-norm class embeddings."


@names_file("path")
def read_taskres(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read the class embeddings and the residuals of a TaskRes checkpoint, both [C, D] float32.

    The file holds neither class names nor the factor on the residuals (RESIDUAL_SCALE: 0.5, for Oxford Flowers 1).

    Args:
        path: the file ``prompt_learner/model.pth.tar-N``, or its folder.

    Raises:
        ValueError: the file is not a TaskRes checkpoint.
    """
    file = checkpoint_file(path)
    state = state_dict_of(file, load_tensors(file))
    wanted = ("base_text_features", "text_feature_residuals")
    found = [value for name in wanted if isinstance(value := state.get(name), Tensor) and not_plain(value) is None]
    base, rows = (value.detach().float() for value in found) if len(found) == 2 else (None, None)
    if base is None or rows is None or base.ndim != 2 or base.shape != rows.shape:
        raise ValueError(f"{file} must hold {' and '.join(wanted)} of one shape [C, D], got {listing(state)}")
    return base, rows


@names_file("path")
@names_file("path")
def open_taskres(
    path: str | Path, *, classnames: Sequence[str], factor: float = 0.5, logit_scale: float = 100.0
) -> Stack:
    """Read a TaskRes checkpoint as a stack of a cosine classifier (its class embeddings) and the residuals.

    Args:
        path: the file ``prompt_learner/model.pth.tar-N``, or its folder.
        classnames: C names, in the order of training.
        factor: factor on the residuals, ``TRAINER.TaskRes.RESIDUAL_SCALE`` of the run. The file does not hold it.
        logit_scale: factor on the logits; 100 for OpenAI's models.

    Raises:
        ValueError: the file is not a TaskRes checkpoint.
    """
    base, rows = read_taskres(path)
    notes = {"checkpoint": checkpoint_file(path).name, "factor": factor}
    below = Head(base, tuple(classnames), logit_scale=logit_scale, normalize=True)
    return Stack(below, Residual(factor * rows, tuple(classnames)), notes=notes)
