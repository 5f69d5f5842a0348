"""Solution: a named state and how it edits a frozen CLIP; what all kinds share, and how they are saved and loaded.

Shapes: M settings that are computed together, C classes, D embedding width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.clip import Edit, FrozenClip, ImageInput, check_same_classes, prepare_classes
from mergetune.io import (
    MAX_WEIGHTS,
    Document,
    Items,
    JsonObject,
    Sha256,
    check_document,
    read_document,
    read_regular,
    write_atomically,
)

if TYPE_CHECKING:
    from typing_extensions import Self

WEIGHTS, CONFIG = "solution.safetensors", "solution.json"
FORMAT, VERSION = "mergetune-solution", 1
WAY_ON = "save the solution again, or take another copy of the folder"

State = dict[str, Tensor]
"""What is trained, interpolated, merged and saved, by name. A stacked state has a leading M in every tensor."""


class Description(Document, frozen=True):
    """The fields of a saved solution that all kinds have; a kind with settings adds a field per setting.

    The fields have the names of the kind's own fields and keep their documentation.
    """

    classnames: Items[str] | None
    backbone: str | None
    fingerprint: str | None
    notes: JsonObject


class SolutionFile(Document, frozen=True, extra="allow"):
    """``solution.json``; the other fields are the description, which depends on the kind.

    Attributes:
        format, version: name and version of the format.
        kind: the kind of the solution.
        sha256: checksum of ``solution.safetensors``, which shows a save that stopped between the two files.
    """

    format: Literal["mergetune-solution"]
    version: Literal[1]
    kind: str
    sha256: Sha256


class Solution:
    """A named state, and a pure description of how it edits a frozen CLIP. Each kind is a frozen dataclass in a file.

    A kind has its tensors as fields, says with :meth:`edit` what they change, and registers itself in
    :mod:`mergetune.solutions.kinds`. Everything else is written once, for all kinds.
    """

    kind: ClassVar[str]
    """Its name in files and tables: "prompt"."""
    tensors: ClassVar[tuple[str, ...]]
    """Names of the fields that are the state; a field that is None is not in it."""
    tower: ClassVar[str] = "image"
    """The tower whose weights it depends on, "image", "text" or "both": their fingerprint is kept with it."""
    image_input: ClassVar[ImageInput] = "feature"
    """What is read of each image, see :func:`mergetune.clip.prepare_images`."""
    surrogate_on: ClassVar[str] = "state"
    """What the second-order surrogate is taken on: "classes", the class embeddings, or "state", the state itself."""

    # Fields of each kind, which narrows their types (checkers take no narrower type of a field that may be written).
    classnames: Any
    """Classes of its own, to which it is limited, a tuple of names; None serves any classes."""
    backbone: Any
    """Name of the CLIP that it was made for, or None."""
    fingerprint: Any
    """Fingerprint of that CLIP's ``tower``, or None; another CLIP is refused."""
    notes: Any
    """Settings and origin, a JSON-able dict, kept with the file."""
    logit_scale: Any = None
    """Factor on the logits; None is the CLIP's."""
    normalize: Any = True
    """Whether class embeddings are made unit norm before their product with image features."""

    # -- what each kind says ------------------------------------------------------------------------------------------

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """How a stacked state of this form edits the CLIP. Checks nothing: :meth:`check` does."""
        raise NotImplementedError

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> Sequence[Self]:
        """The zero-shot solution in this form, the best candidate first; empty if there is no such point."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What is kept with the tensors beside the fields that all kinds have, JSON-able."""
        return {}

    #: The model of :meth:`settings` and of the fields that all kinds have, as a file holds them.
    description: ClassVar[type[Description]] = Description

    @classmethod
    def restore(cls, description: Description, tensors: State) -> Self:
        """A solution from its description and its tensors."""
        return cls(**tensors, **dict(description))

    def check_width(self, clip: FrozenClip) -> None:
        """Refuse a CLIP that has other widths.

        Raises:
            ValueError: says which width was expected.
        """

    def card(self) -> tuple[str, str, str]:
        """Title, tag and one sentence for a model card."""
        raise NotImplementedError

    # -- what a kind may say otherwise ---------------------------------------------------------------------------------

    def between(self, a: State, b: State, t: float | Tensor) -> State:
        """The points ``t`` on the line from a (0) to b (1), which is straight unless a kind says otherwise.

        Args:
            a, b: stacked states, of M settings or of one.
            t: one number for all, or [M].
        """
        return self.straight(a, b, t)

    @staticmethod
    def straight(a: State, b: State, t: float | Tensor) -> State:
        """``(1 - t) a + t b``."""
        return {name: mix(a[name], b[name], t) for name in b}

    def mixture(self, ends: State, shares: Tensor) -> State:
        """Points at mixtures of some solutions, a weighted sum unless a kind says otherwise.

        Args:
            ends: K of them, as one stacked state.
            shares: each point's shares of the ends, which sum to 1, [M, K] float64.
        """
        return weighted_sums(ends, shares)

    def mean_of(self, ends: State) -> State:
        """The mean of some solutions, as a stacked state of one setting."""
        return {name: end.mean(0, keepdim=True) for name, end in ends.items()}

    def starts_at(self, point: Solution) -> bool:
        """Whether a line leads from a zero-shot point to this solution, on which training may start."""
        shapes = [[tensor.shape for tensor in solution.state().values()] for solution in (point, self)]
        return shapes[0] == shapes[1]

    def distance(self, states: State, to: State) -> Tensor:
        """What the surrogate "identity" on the state penalises, [M]: half the squared distance."""
        return torch.stack([0.5 * (states[name] - to[name]).flatten(1).square().sum(1) for name in states]).sum(0)

    def check_classes(self, classnames: Sequence[str]) -> None:
        """Refuse to be trained on, or walked through, other classes than its own."""
        if self.classnames is not None:
            check_same_classes("classnames", classnames, self.classnames)

    def plain_head(self) -> Any:
        """This solution where it is a plain linear head, :class:`mergetune.Head`, which needs no CLIP; else None."""
        return None

    def rescaled(self, logit_scale: float) -> Self:
        """The same logits with another factor on them, where the state can take up the difference."""
        return self

    def in_form_of(self, like: Solution) -> Self:
        """The same solution as far as possible in the form of another: with its logit scale."""
        return self if like.logit_scale is None else self.rescaled(like.logit_scale)

    def zero_shot_classes(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Class features of the zero-shot solution, [C, D]: the target of a surrogate on class embeddings."""
        return self.zero_shot_points(clip, classnames, templates)[0].class_weights(clip, classnames)

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Refuse a solution of the same kind to which no line leads.

        Args:
            other: the other end.
            space: "parameter" or "embedding".

        Raises:
            ValueError: shapes or classes that differ.
        """
        if space == "embedding":
            return
        check_same_shapes(self, other)
        if self.classnames is not None and other.classnames is not None:
            check_same_classes("classnames", self.classnames, other.classnames)

    @property
    def form(self) -> Hashable:
        """Equal for solutions whose states can be stacked."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in self.state().items())
        return self.kind, shapes, self.classnames, json.dumps(self.settings(), sort_keys=True)

    @property
    def identity(self) -> tuple[Tensor | str, ...]:
        """What the class embeddings depend on: tensors and texts, for a digest."""
        return tuple(self.state().values())

    # -- what is the same for all kinds -------------------------------------------------------------------------------

    def state(self) -> State:
        """The named tensors that are trained, interpolated, merged and saved."""
        found = {name: getattr(self, name) for name in self.tensors}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def saved_state(self) -> State:
        """The tensors that a file holds: :meth:`state`, and of a stack those of its base too."""
        return self.state()

    def with_state(self, state: State, **changes: Any) -> Self:
        """The same solution with another state, copied as float32.

        Args:
            state: tensors by the names of :meth:`state`.
            changes: other fields.
        """
        given = {name: tensor.detach().float().clone().contiguous() for name, tensor in state.items()}
        return dataclasses.replace(self, **given, **changes)  # pyright: ignore[reportArgumentType]

    @property
    def numbers(self) -> int:
        """How many numbers the state holds."""
        return sum(tensor.numel() for tensor in self.state().values())

    def origin(self, clip: FrozenClip) -> dict[str, Any]:
        """The fields that say which CLIP a solution was made for."""
        return {"backbone": clip.name, "fingerprint": self._fingerprint_of(clip)}

    def _fingerprint_of(self, clip: FrozenClip) -> str:
        """Of the weights that the solution depends on."""
        return clip.fingerprint if self.tower == "both" else getattr(clip, f"{self.tower}_fingerprint")

    def check(self, clip: FrozenClip) -> None:
        """Refuse a CLIP that the solution was not made for.

        Raises:
            ValueError: another width, or other weights.
        """
        self.check_width(clip)
        if self.fingerprint is None:
            return
        there = self._fingerprint_of(clip)
        if self.fingerprint != there:
            what = "fingerprint of both towers" if self.tower == "both" else f"{self.tower} fingerprint"
            raise ValueError(
                f"clip must be the one that the {self.kind} was made for ({self.backbone}, {what} "
                f"{self.fingerprint[:12]}), got {clip.name} ({there[:12]})"
            )

    @torch.no_grad()
    def class_weights(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """Class features as they are interpolated: float32, not normalised, without the logit scale.

        Args:
            clip: the CLIP that the solution was made for.
            classnames: C names.

        Returns:
            [C, D], or [C, D + 1] for a head with a bias, the weight of a constant 1.
        """
        self.check(clip)
        edit = self.edit(clip, stacked(self.state(), clip.device))
        return prepare_classes(clip, edit, classnames)(edit)[0]

    def class_embeddings(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """Unit-norm class embeddings, [C, D] float32: of a head the directions of its rows."""
        weights = self.class_weights(clip, classnames)  # a bias stands only in rows that are taken as they are
        return F.normalize(weights if self.normalize else weights[:, : clip.embed_dim], dim=-1)

    def save(self, path: str | Path) -> None:
        """Write ``solution.safetensors`` and ``solution.json`` into the folder ``path``."""
        write_solution(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another kind, a damaged file, or one of a later version.
        """
        return read_solution(cls, path)


S = TypeVar("S", bound=Solution)


# -- states ------------------------------------------------------------------------------------------------------------


def mix(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """``(1 - t) a + t b``, for one t or for [M] of them."""
    if isinstance(t, Tensor):
        t = t.to(b).view(-1, *(1,) * (b.ndim - 1))
    return (1 - t) * a + t * b


def weighted_sums(ends: State, shares: Tensor) -> State:
    """Sums of K stacked states with the weights [M, K], in float64: far outside the ends shares are large."""
    return {name: torch.tensordot(shares, end.double(), 1).to(end) for name, end in ends.items()}


def stacked(
    state: Mapping[str, Tensor], device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> State:
    """A state as a stacked one of one setting."""
    return {name: tensor.to(device, dtype)[None] for name, tensor in state.items()}


def stack_states(states: Sequence[Mapping[str, Tensor]], device: torch.device | None = None) -> State:
    """Several states as one stacked state, float32."""
    return {name: torch.stack([state[name].float().to(device) for state in states]) for name in states[0]}


def inputs(x: Tensor, weights: Tensor) -> Tensor:
    """Features [..., B, D] as class weights [..., C, D] take them: with a 1 behind where those hold a bias."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if weights.shape[-1] == x.shape[-1] + 1 else x


# -- checks ------------------------------------------------------------------------------------------------------------


def check_same_shapes(a: Solution, b: Solution) -> None:
    """Refuse two solutions whose states have other shapes."""
    shapes = [{name: list(tensor.shape) for name, tensor in solution.state().items()} for solution in (a, b)]
    for name in {**shapes[0], **shapes[1]}:
        here, there = (found.get(name) for found in shapes)
        if here != there:
            raise ValueError(f"solutions on one path must have one shape, got {here} and {there} for {name}")


def check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} NaN or infinite values")


# -- files -------------------------------------------------------------------------------------------------------------


def write_solution(solution: Solution, path: str | Path) -> None:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "kind": solution.kind,
        **solution.settings(),
        "classnames": solution.classnames,
        "backbone": solution.backbone,
        "fingerprint": solution.fingerprint,
        "notes": solution.notes,
    }
    weights = serialize({name: t.detach().cpu().contiguous() for name, t in solution.saved_state().items()})
    config["sha256"] = hashlib.sha256(weights).hexdigest()  # a save that is cut off between the two files is seen
    text = json.dumps(config, indent=2)  # before anything is written: notes may not be JSON
    write_atomically(path / WEIGHTS, weights)
    write_atomically(path / CONFIG, f"{text}\n".encode())


def read_config(path: Path) -> SolutionFile:
    """The ``solution.json`` of a folder; the description is not checked yet."""
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} must be a folder with {CONFIG}, as save() writes it")
    return read_document(path / CONFIG, SolutionFile, way_on=WAY_ON)


def read_solution(cls: type[S], path: str | Path) -> S:
    """The solution that :func:`write_solution` wrote into a folder; it must be of the kind ``cls``."""
    path = Path(path)
    config = read_config(path)
    if config.kind != cls.kind:
        raise ValueError(f"{path / CONFIG} must hold a {cls.kind}, got {config.kind!r}")
    description = check_document(config.model_extra, cls.description, name=path / CONFIG, way_on=WAY_ON)
    try:
        weights = read_regular(path / WEIGHTS, limit=MAX_WEIGHTS)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path / WEIGHTS} cannot be read: {error}; {WAY_ON}") from error
    if hashlib.sha256(weights).hexdigest() != config.sha256:
        raise ValueError(
            f"{path / WEIGHTS} must be the file that {CONFIG} describes, got another checksum: saving was interrupted, "
            f"or one of the files is damaged; {WAY_ON}"
        )
    try:
        tensors = deserialize(weights)
    except SafetensorError:
        raise ValueError(f"{path / WEIGHTS} must be a .safetensors file; {WAY_ON}") from None
    try:
        return cls.restore(description, tensors)
    except TypeError as error:  # tensors of other names
        wanted, got = ", ".join(cls.tensors) or "the tensors of its parts", ", ".join(sorted(tensors)) or "none"
        raise ValueError(f"{path / WEIGHTS} must hold {wanted}, got {got}; {WAY_ON}") from error
    except ValueError as error:  # a name or text that the kind refuses, or shapes that do not fit the names
        raise ValueError(
            f"{path / CONFIG} does not describe a solution of kind {cls.kind!r}: {error}; {WAY_ON}"
        ) from error
