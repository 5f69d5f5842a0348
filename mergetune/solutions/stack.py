"""Stack: solutions applied one after the other; the first makes class embeddings, the last is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PlainValidator
from torch import Tensor

from mergetune.clip import Edit, FrozenClip, ImageInput, earliest_input
from mergetune.facts.brief import brief
from mergetune.io import Document, Items, fault
from mergetune.solutions.base import Solution
from mergetune.solutions.solution_folders import Description
from mergetune.solutions.states import State, stacked


class StackPart(Document, frozen=True, extra="allow"):
    """A part of a saved stack; the other fields are the description, which depends on the kind."""

    kind: str


def _part(entry: Any) -> tuple[str, Description]:
    """Kind and description of a part of a saved stack."""
    from mergetune.solutions.kinds import KINDS  # the table of kinds names this file

    part, kinds = StackPart.model_validate(entry), [kind for kind in KINDS if kind != Stack.kind]
    if part.kind not in kinds:
        raise fault(("kind",), f"one of {', '.join(kinds)}", part.kind)
    return part.kind, KINDS[part.kind].description.model_validate(part.model_extra)


class StackDescription(Description, frozen=True):
    """A saved stack."""

    parts: Annotated[Items[Annotated[tuple[str, Description], PlainValidator(_part)]], Field(min_length=2)]


@brief("parts", "backbone", "notes")
@dataclass(frozen=True, init=False, eq=False)
class Stack(Solution):
    """Several solutions applied in order to one CLIP, for example ``Stack(prompt, linear_map, residual)``.

    The first part, the base, makes the class embeddings; each further part edits the class embeddings or the image
    features that the parts before it give. Only
    the last part, the top, is trained; all others are frozen. :func:`mergetune.tune` with ``base=`` returns a stack,
    and :func:`mergetune.fit` of a stack continues training its top.

    Attributes:
        parts: the solutions from the base to the top; a stack among the arguments contributes its parts.
        backbone: name of the CLIP that the stack was made for; by default the base's.
        fingerprint: SHA-256 of that CLIP's weights; by default the base's.
        notes: settings and origin, JSON-able; saved with the stack.

    Example:
        >>> import mergetune as mt, torch
        >>> residual = mt.Residual(torch.zeros(2, 512), ("cat", "dog"))
        >>> stack = mt.Stack(mt.Templates(("a photo of a {}.",)), mt.LinearMap(torch.eye(512)), residual)
        >>> [part.kind for part in stack.parts]
        ['templates', 'map', 'residual']
        >>> list(stack.state())
        ['residual.rows']
    """

    parts: tuple[Solution, ...]
    notes: dict[str, Any] = field(default_factory=dict)
    backbone: str | None = None
    fingerprint: str | None = None
    _edits: dict[FrozenClip, Edit] = field(default_factory=dict, repr=False)

    kind: ClassVar[str] = "stack"
    tensors: ClassVar[tuple[str, ...]] = ()
    description: ClassVar[type[Description]] = StackDescription

    def __init__(
        self,
        *parts: Solution,
        notes: dict[str, Any] | None = None,
        backbone: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        flat = [part for given in parts for part in (given.parts if isinstance(given, Stack) else (given,))]
        if len(flat) < 2:
            raise ValueError(f"a stack must hold a base and at least one solution on it, got {len(flat)}")
        if others := [part for part in flat if not isinstance(part, Solution)]:
            raise TypeError(f"parts of a stack must be solutions, got {others[0]!r}")
        for name, value in {
            "parts": tuple(flat),
            "notes": notes or {},
            "backbone": backbone or flat[0].backbone,
            "fingerprint": fingerprint or flat[0].fingerprint,
            "_edits": {},
        }.items():
            object.__setattr__(self, name, value)

    # -- the parts -----------------------------------------------------------------------------------------------------

    @property
    def base(self) -> Solution:
        """All parts below the top, as one solution: the only other part, or a stack."""
        return self.parts[0] if len(self.parts) == 2 else Stack(*self.parts[:-1])

    @property
    def top(self) -> Solution:
        """The last part, which is trained."""
        return self.parts[-1]

    @property
    def tower(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # the base's, not a constant
        return self.parts[0].tower

    @property
    def image_input(self) -> ImageInput:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The earliest image input among the parts; the inputs of the other parts are computed from it."""
        return earliest_input([part.image_input for part in self.parts])

    @property
    def surrogate_on(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.top.surrogate_on

    @property
    def changes_weights(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.top.changes_weights

    @property
    def classnames(self) -> tuple[str, ...] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The classes of the base; the other parts do not limit the classes, they fall back to the base."""
        return self.parts[0].classnames

    @property
    def logit_scale(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.parts[0].logit_scale

    @property
    def normalize(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(part.normalize for part in self.parts)

    # -- as a solution -------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """The state of the top; each name is prefixed with the kind of the top, for example "residual.rows"."""
        return self._named(len(self.parts) - 1, self.top.state())

    def with_state(self, state: State, **changes: Any) -> Stack:
        """A stack of the same parts in which the top has another state."""
        return self._with_top(self.top.with_state(self._of_top(state)), **changes)

    def _with_top(self, top: Solution, **changes: Any) -> Stack:
        given = {"notes": self.notes, "backbone": self.backbone, "fingerprint": self.fingerprint} | changes
        return Stack(*self.parts[:-1], top, **given)

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """The edits of all parts, applied from the base to the top."""
        if clip not in self._edits:  # the same Edit object in each call, so that frozen parts are computed once
            self._edits.clear()
            self._edits[clip] = self._edit_of_base(clip)
        return self._edits[clip].under(self.top.edit(clip, self._of_top(states)))

    def _edit_of_base(self, clip: FrozenClip) -> Edit:
        found = None
        for part in self.parts[:-1]:
            edit = part.edit(clip, stacked(part.state(), clip.device))
            found = edit if found is None else found.under(edit)
        assert found is not None
        return found

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> list[Stack]:
        """Stacks of the same base and a zero-shot top, which leaves the base unchanged."""
        points = self.top.zero_shot_points(clip, classnames, templates)
        return [
            Stack(*self.parts[:-1], point, backbone=self.backbone, fingerprint=self.fingerprint) for point in points
        ]

    def between(self, a: State, b: State, t: float | Tensor) -> State:
        """States on the line of the top; the other parts are the same at both ends."""
        return self._named(len(self.parts) - 1, self.top.between(self._of_top(a), self._of_top(b), t))

    def mixture(self, ends: State, shares: Tensor) -> State:
        return self._named(len(self.parts) - 1, self.top.mixture(self._of_top(ends), shares))

    def stack(self, solutions: Sequence[Solution], device: torch.device | None = None) -> State:
        tops = [part.top for part in solutions if isinstance(part, Stack)]
        return self._named(len(self.parts) - 1, self.top.stack(tops, device))

    def mean_of(self, ends: State) -> State:
        return self._named(len(self.parts) - 1, self.top.mean_of(self._of_top(ends)))

    def starts_at(self, point: Solution) -> bool:
        return isinstance(point, Stack) and self.top.starts_at(point.top)

    def distance(self, states: State, to: State) -> Tensor:
        return self.top.distance(self._of_top(states), self._of_top(to))

    def rescaled(self, logit_scale: float) -> Stack:
        """The stack itself. Other kinds fold another logit scale into their tensors; the top of a stack cannot."""
        return self

    def in_form_of(self, like: Solution) -> Stack:
        """This stack with a top in the form of the top of another stack."""
        if not isinstance(like, Stack) or type(self.top) is not type(like.top) or not self.top.state():
            return self
        top = self.top.in_form_of(like.top)
        return self if top is self.top else self._with_top(top)

    def merging_state(self) -> State:
        return self._named(len(self.parts) - 1, self.top.merging_state())

    def with_merged(self, state: State, **changes: Any) -> Stack:
        return self._with_top(self.top.with_merged(self._of_top(state)), **changes)

    def check_width(self, clip: FrozenClip) -> None:
        for part in self.parts:
            part.check_width(clip)

    def check(self, clip: FrozenClip) -> None:
        for part in self.parts:
            part.check(clip)

    def for_clip(self, clip: FrozenClip) -> Stack:
        """A stack of the parts for this CLIP, see :meth:`Solution.for_clip`; itself if no part changes."""
        parts = [part.for_clip(clip) for part in self.parts]
        if all(new is old for new, old in zip(parts, self.parts, strict=True)):
            return self
        return Stack(*parts, notes=self.notes, backbone=self.backbone, fingerprint=self.fingerprint)

    def check_classes(self, classnames: Sequence[str]) -> None:
        """The top's own rule. What is below only serves these classes: a head of more classes than are trained may."""
        self.top.check_classes(classnames)

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Check that a line joins two stacks: the same parts below the top, and tops that a line joins."""
        if space == "embedding":  # class embeddings and image features of any two stacks can be interpolated
            return
        assert isinstance(other, Stack)  # of the same kind
        if len(self.parts) != len(other.parts) or any(
            a.form != b.form or not all(map(torch.equal, a.state().values(), b.state().values()))
            for a, b in zip(self.parts[:-1], other.parts[:-1], strict=True)
        ):
            raise ValueError(
                "stacks on one path must have the same base (all parts below the top), got different ones: tune both "
                "on one base"
            )
        if type(self.top) is not type(other.top):
            raise TypeError(
                f"stacks on one path must have tops of the same kind, got {self.top.kind} and {other.top.kind}"
            )
        self.top.check_line(other.top, space=space)

    @property
    def form(self) -> Hashable:
        return self.kind, tuple(map(id, self.parts[:-1])), self.top.form

    @property
    def identity(self) -> tuple[Tensor | str, ...]:
        return tuple(item for part in self.parts for item in part.whole_identity)

    @property
    def whole_identity(self) -> tuple[Tensor | str, ...]:
        return self.identity

    # -- files ---------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        return {
            "parts": [
                {
                    "kind": part.kind,
                    **part.settings(),
                    "classnames": part.classnames,
                    "backbone": part.backbone,
                    "fingerprint": part.fingerprint,
                    "notes": part.notes,
                }
                for part in self.parts
            ]
        }

    def saved_state(self) -> State:
        """The states of all parts, each name prefixed with the kind of its part."""
        return {name: t for i, part in enumerate(self.parts) for name, t in self._named(i, part.saved_state()).items()}

    @classmethod
    def restore(cls, description: Description, tensors: State) -> Stack:
        from mergetune.solutions.kinds import KINDS  # the table of kinds names this file

        assert isinstance(description, StackDescription)
        parts = []
        prefixes = _prefixes([kind for kind, _ in description.parts])
        for (kind, described), prefix in zip(description.parts, prefixes, strict=True):
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            parts.append(KINDS[kind].restore(described, own))
        if lost := [name for name in tensors if not name.startswith(tuple(prefixes))]:
            raise ValueError(f"tensors must belong to a part of the stack, got {lost[0]!r}")
        return cls(*parts, notes=description.notes, backbone=description.backbone, fingerprint=description.fingerprint)

    def _named(self, part: int, state: State) -> State:
        prefix = _prefixes([part.kind for part in self.parts])[part]
        return {f"{prefix}{name}": tensor for name, tensor in state.items()}

    def _of_top(self, state: State) -> State:
        prefix = _prefixes([part.kind for part in self.parts])[-1]
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    def card(self) -> tuple[str, str, str]:
        cards = [part.card() for part in self.parts]
        what = " On it: ".join(f"{title.removesuffix(' for CLIP')}: {text}" for title, _, text in cards)
        return f"{cards[0][0].removesuffix(' for CLIP')} and more for CLIP", cards[-1][1], what


def _prefixes(kinds: Sequence[str]) -> list[str]:
    """Prefix of the tensor names of each part: its kind; from the second part of a kind on, also a number."""
    seen, found = Counter(), []
    for kind in kinds:
        seen[kind] += 1
        found.append(f"{kind}." if seen[kind] == 1 else f"{kind}-{seen[kind]}.")
    return found
