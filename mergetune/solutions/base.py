"""Solution: the base class of everything that is trained, the functions on states, and the files of solutions.

Shapes: M settings (states that are computed together), C classes, D embedding width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import Edit, FrozenClip, ImageInput, check_same_classes, prepare_classes
from mergetune.solutions.solution_folders import Description, read_solution, write_solution
from mergetune.solutions.states import State, check_same_shapes, mix, stack_states, stacked, weighted_sums

if TYPE_CHECKING:
    from typing_extensions import Self


class Solution:
    """Named tensors, and a description of how these tensors edit a frozen CLIP.

    The tensors form the state: a dict that is trained, interpolated, merged and saved. :meth:`edit` says what the state
    changes in a CLIP, as an :class:`mergetune.clip.Edit`. Nothing is injected into the model, so one CLIP serves any
    number of solutions. Functions take stacked states, with a leading dimension M in every tensor: the M points of a
    path, for example, are computed in one call.

    Each kind of solution (prompt, head, residual ...) is a frozen dataclass in one file. The kind holds its tensors as
    fields, implements ``edit``, ``zero_shot_points`` and ``card``, and is listed in :mod:`mergetune.solutions.kinds`.
    Training, paths, merging, evaluation and files are written once for all kinds.

    Example:
        >>> import mergetune as mt, torch
        >>> head = mt.Head(torch.ones(2, 3), ("cat", "dog"))
        >>> {name: list(tensor.shape) for name, tensor in head.state().items()}
        {'weight': [2, 3]}
        >>> head.with_state({"weight": torch.zeros(2, 3)}).weight.sum().item()
        0.0
    """

    kind: ClassVar[str]
    """Name of the kind in files and tables, for example "prompt"."""
    tensors: ClassVar[tuple[str, ...]]
    """Names of the fields that form the state; a field that is None is left out."""
    tower: ClassVar[str] = "image"
    """Tower whose weights the solution depends on: "image", "text" or "both"."""
    image_input: ClassVar[ImageInput] = "feature"
    """What the solution takes of each image, see :data:`mergetune.clip.ImageInput`."""
    surrogate_on: ClassVar[str] = "state"
    """On what :func:`mergetune.fit` measures the distance to zero-shot: "state", "classes" (embeddings) or "rows",
    class weights that are trained themselves: their length is free, so ``lam`` is in the unit of their loss."""
    changes_weights: ClassVar[bool] = False
    """Whether the state changes weights of the towers: they compute in float32, and paths lead through states."""

    # Fields of each kind, which narrows their types (checkers take no narrower type of a field that may be written).
    classnames: Any
    """Names of the classes that the tensors belong to, a tuple; None if the tensors belong to no classes."""
    backbone: Any
    """Name of the CLIP that the solution was made for, or None if unknown."""
    fingerprint: Any
    """SHA-256 of the weights of ``tower`` in that CLIP, or None; :meth:`check` refuses a CLIP with other weights."""
    notes: Any
    """Settings and origin: a JSON-able dict that is saved with the solution."""
    logit_scale: Any = None
    """Factor on the logits; None takes the logit scale of the CLIP."""
    normalize: Any = True
    """Whether class embeddings are scaled to unit norm before the product with image features."""

    # -- what every kind implements -----------------------------------------------------------------------------------

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """Description of what stacked states of this form change in the CLIP. :meth:`check` checks the CLIP."""
        raise NotImplementedError

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> Sequence[Self]:
        """Zero-shot solutions of this kind (w1 of :func:`mergetune.fit`), best candidate first, or nothing."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """JSON-able values that are saved in addition to the tensors and the fields that all kinds have."""
        return {}

    #: The model of :meth:`settings` and of the fields that all kinds have, as a file holds them.
    description: ClassVar[type[Description]] = Description

    @classmethod
    def restore(cls, description: Description, tensors: State) -> Self:
        """A solution from its description and its tensors."""
        return cls(**tensors, **dict(description))

    def check_width(self, clip: FrozenClip) -> None:
        """Raise ValueError, with the expected width, unless the widths of the solution fit the CLIP."""

    def card(self) -> tuple[str, str, str]:
        """Title, tag and one sentence for a model card on the Hugging Face Hub."""
        raise NotImplementedError

    # -- defaults that a kind may override -----------------------------------------------------------------------------

    def between(self, a: State, b: State, t: float | Tensor) -> State:
        """States at ``t`` on the line from a (t = 0) to b (t = 1). The line is straight unless a kind overrides it.

        Args:
            a, b: stacked states, of M settings or of one.
            t: one number for all settings, or one per setting, [M].
        """
        return self.straight(a, b, t)

    @staticmethod
    def straight(a: State, b: State, t: float | Tensor) -> State:
        """States at ``t`` on the straight line: ``(1 - t) a + t b``."""
        return {name: mix(a[name], b[name], t) for name in b}

    def mixture(self, ends: State, shares: Tensor) -> State:
        """M mixtures of K states. A mixture is a weighted sum, unless a kind overrides this method.

        Args:
            ends: the K states, stacked: the ends of paths or the corners of a plane.
            shares: weight of each state in each mixture, possibly negative, [M, K] float64; each row sums to 1.
        """
        return weighted_sums(ends, shares)

    def stack(self, solutions: Sequence[Solution], device: torch.device | None = None) -> State:
        """The states of several solutions on one path, stacked."""
        return stack_states([solution.state() for solution in solutions], device)

    def mean_of(self, ends: State) -> State:
        """Mean of stacked states, as a stacked state of one setting (M = 1)."""
        return {name: end.mean(0, keepdim=True) for name, end in ends.items()}

    def starts_at(self, point: Solution) -> bool:
        """Whether training may start between ``point``, a zero-shot solution, and this solution."""
        shapes = [[tensor.shape for tensor in solution.state().values()] for solution in (point, self)]
        return shapes[0] == shapes[1]

    def distance(self, states: State, to: State) -> Tensor:
        """Surrogate "identity" on the state, [M]: half the squared distance of each setting to ``to``."""
        return torch.stack([0.5 * (states[name] - to[name]).flatten(1).square().sum(1) for name in states]).sum(0)

    def check_classes(self, classnames: Sequence[str]) -> None:
        """Raise ValueError unless these are the solution's classes, in order. A kind without classes takes any."""
        if self.classnames is not None:
            check_same_classes("classnames", classnames, self.classnames)

    def plain_head(self) -> Any:
        """The solution as a :class:`mergetune.Head` if it is a linear head, which needs no CLIP; else None."""

    def rescaled(self, logit_scale: float) -> Self:
        """A solution with the same logits and this logit scale; self if the tensors cannot absorb the change."""
        return self

    def in_form_of(self, like: Solution) -> Self:
        """This solution in the form of ``like`` as far as possible: by default, with the logit scale of ``like``."""
        return self if like.logit_scale is None else self.rescaled(like.logit_scale)

    def in_order_of(self, classnames: Sequence[str]) -> Self:
        """This solution with its class rows in the order of ``classnames``; self for a kind that cannot do so."""
        return self

    def zero_shot_classes(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Zero-shot class features, [C, D]: a surrogate on class embeddings measures the distance to them."""
        return self.zero_shot_points(clip, classnames, templates)[0].class_weights(clip, classnames)

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Check that a line leads from this solution to another of the same kind.

        Args:
            other: the other end of the line.
            space: "parameter" interpolates states, "embedding" class embeddings.

        Raises:
            ValueError: shapes or classes differ.
        """
        if space == "embedding":
            return
        check_same_shapes(self, other)
        if self.classnames is not None and other.classnames is not None:
            check_same_classes("classnames", self.classnames, other.classnames)

    @property
    def form(self) -> Hashable:
        """Hashable key: solutions with equal keys have states that can be stacked."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in self.state().items())
        return self.kind, shapes, self.classnames, json.dumps(self.settings(), sort_keys=True)

    @property
    def identity(self) -> tuple[Tensor | str, ...]:
        """Tensors and texts that determine the class embeddings, for a digest."""
        return tuple(self.state().values())

    @property
    def whole_identity(self) -> tuple[Tensor | str, ...]:
        """Everything that determines what the solution computes: tensors, kind, class names and settings."""
        texts = self.kind, json.dumps(self.classnames), json.dumps(self.settings(), sort_keys=True)
        return (*texts, *self.identity)

    # -- the same for all kinds ---------------------------------------------------------------------------------------

    def state(self) -> State:
        """The tensors that are trained, interpolated, merged and saved, by name."""
        found = {name: getattr(self, name) for name in self.tensors}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def saved_state(self) -> State:
        """The tensors that a file holds: :meth:`state`; a stack adds the states below its top."""
        return self.state()

    def with_state(self, state: State, **changes: Any) -> Self:
        """A copy of this solution with another state, cloned as float32.

        Args:
            state: tensors under the names of :meth:`state`.
            changes: new values of other fields.
        """
        given = {name: tensor.detach().float().clone().contiguous() for name, tensor in state.items()}
        return dataclasses.replace(self, **given, **changes)  # pyright: ignore[reportArgumentType]

    def merging_state(self) -> State:
        """The tensors that merging methods take: :meth:`state`, unless a kind overrides this method."""
        return self.state()

    def with_merged(self, state: State, **changes: Any) -> Self:
        """A copy of this solution with a merged :meth:`merging_state`."""
        return self.with_state(state, **changes)

    @property
    def numbers(self) -> int:
        """Number of values in the state."""
        return sum(tensor.numel() for tensor in self.state().values())

    def origin(self, clip: FrozenClip) -> dict[str, Any]:
        """The fields ``backbone`` and ``fingerprint`` of a solution that is made for this CLIP."""
        return {"backbone": clip.name or self.backbone, "fingerprint": self._fingerprint_of(clip) or self.fingerprint}

    def _fingerprint_of(self, clip: FrozenClip) -> str:
        """Fingerprint of the weights of the CLIP that the solution depends on."""
        return clip.fingerprint if self.tower == "both" else getattr(clip, f"{self.tower}_fingerprint")

    def check(self, clip: FrozenClip) -> None:
        """Check that the solution was made for this CLIP.

        Raises:
            ValueError: the CLIP has another width or other weights.
        """
        self.check_width(clip)
        if self.fingerprint is None:
            return
        if not clip.has_fingerprint(self.tower, self.fingerprint):
            towers = "both towers" if self.tower == "both" else f"the {self.tower} tower"
            known, got = self.backbone or "its name is not recorded", clip.name or "a FeatureSpace"
            same = f", other weights of {towers} under the same name" if clip.name == self.backbone else ""
            raise ValueError(f"clip must be the one that the {self.kind} was made for ({known}), got {got}{same}")

    def for_clip(self, clip: FrozenClip) -> Self:
        """This solution after :meth:`check`; a kind completes what its file tells only together with the CLIP."""
        self.check(clip)
        return self

    @torch.no_grad()
    def class_weights(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """Class features as they are interpolated: float32, not normalised, without the logit scale.

        Args:
            clip: the CLIP that the solution was made for.
            classnames: C names.

        Returns:
            [C, D]; or [C, D + 1] for a head with a bias, which stands in the last column.
        """
        self.check(clip)
        edit = self.edit(clip, stacked(self.state(), clip.device))
        return prepare_classes(clip, edit, classnames)(edit)[0]

    def class_embeddings(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """Unit-norm class embeddings, [C, D] float32; those of a head are the directions of its rows."""
        weights = self.class_weights(clip, classnames)  # only rows that are not normalised may hold a bias
        return F.normalize(weights if self.normalize else weights[:, : clip.embed_dim], dim=-1)

    def save(self, path: str | Path) -> None:
        """Write ``solution.safetensors`` and ``solution.json`` into the folder ``path``."""
        write_solution(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The solution that :meth:`save` wrote into the folder ``path``.

        Raises:
            ValueError: the folder holds another kind, a damaged file or a later format.
        """
        return read_solution(cls, path)
