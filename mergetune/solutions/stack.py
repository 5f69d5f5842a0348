"""Stack: solutions on top of each other; the base has the class embeddings, the top one is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PlainValidator
from torch import Tensor

from mergetune.clip import Edit, FrozenClip, ImageInput, earliest_input
from mergetune.io import Document, Items, fault
from mergetune.solutions.base import Description, Solution, State, stacked


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


@dataclass(frozen=True, init=False, eq=False)
class Stack(Solution):
    """A base and what was put on it: ``Stack(prompt, linear_map, residual)``.

    The edits are applied in order: first those of the base, then those of each solution above it. All but the top are
    frozen: :func:`mergetune.tune` makes a stack from ``base=``, and :func:`mergetune.fit` goes on training its top.

    Attributes:
        parts: from the base up; a stack among them is taken apart.
        backbone, fingerprint: those of the base.
        notes: settings and origin, JSON-able, kept with the file.
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

    # -- its parts -----------------------------------------------------------------------------------------------------

    @property
    def base(self) -> Solution:
        """All but the top: a solution, or a stack."""
        return self.parts[0] if len(self.parts) == 2 else Stack(*self.parts[:-1])

    @property
    def top(self) -> Solution:
        """The part that is trained."""
        return self.parts[-1]

    @property
    def tower(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # of the base, not of the class
        return self.parts[0].tower

    @property
    def image_input(self) -> ImageInput:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The earliest of those that its parts read: the others are made of it."""
        return earliest_input([part.image_input for part in self.parts])

    @property
    def surrogate_on(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.top.surrogate_on

    @property
    def classnames(self) -> tuple[str, ...] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The classes that it is limited to: the base's, since the others fall back to the base."""
        return self.parts[0].classnames

    @property
    def logit_scale(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.parts[0].logit_scale

    @property
    def normalize(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(part.normalize for part in self.parts)

    # -- as a solution -------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """The top's state, its names prefixed by its kind: "residual.rows"."""
        return self._named(len(self.parts) - 1, self.top.state())

    def with_state(self, state: State, **changes: Any) -> Stack:
        """The same base with another state of the top."""
        top = self.top.with_state(self._of_top(state))
        given = {"notes": self.notes, "backbone": self.backbone, "fingerprint": self.fingerprint} | changes
        return Stack(*self.parts[:-1], top, **given)

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """The edits of all parts, from the base up."""
        if clip not in self._edits:  # the same object every time, so that what does not change is computed once
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
        """The base, unchanged by the top."""
        points = self.top.zero_shot_points(clip, classnames, templates)
        return [
            Stack(*self.parts[:-1], point, backbone=self.backbone, fingerprint=self.fingerprint) for point in points
        ]

    def between(self, a: State, b: State, t: float | Tensor) -> State:
        """The line of the top."""
        return self._named(len(self.parts) - 1, self.top.between(self._of_top(a), self._of_top(b), t))

    def mixture(self, ends: State, shares: Tensor) -> State:
        return self._named(len(self.parts) - 1, self.top.mixture(self._of_top(ends), shares))

    def mean_of(self, ends: State) -> State:
        return self._named(len(self.parts) - 1, self.top.mean_of(self._of_top(ends)))

    def starts_at(self, point: Solution) -> bool:
        return isinstance(point, Stack) and self.top.starts_at(point.top)

    def distance(self, states: State, to: State) -> Tensor:
        return self.top.distance(self._of_top(states), self._of_top(to))

    def rescaled(self, logit_scale: float) -> Stack:
        """Itself: the top was trained at the scale of the base."""
        return self

    def check_width(self, clip: FrozenClip) -> None:
        for part in self.parts:
            part.check_width(clip)

    def check(self, clip: FrozenClip) -> None:
        for part in self.parts:
            part.check(clip)

    def check_classes(self, classnames: Sequence[str]) -> None:
        for part in self.parts:
            part.check_classes(classnames)

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Also refuse another base: a line leads through the tops alone."""
        assert isinstance(other, Stack)  # of the same kind
        if len(self.parts) != len(other.parts) or any(
            a.form != b.form or not all(map(torch.equal, a.state().values(), b.state().values()))
            for a, b in zip(self.parts[:-1], other.parts[:-1], strict=True)
        ):
            raise ValueError("stacks on one path must have one base: only their tops differ on the way")
        if type(self.top) is not type(other.top):
            raise TypeError(f"stacks on one path must have tops of one kind, got {self.top.kind} and {other.top.kind}")
        self.top.check_line(other.top, space=space)

    @property
    def form(self) -> Hashable:
        return self.kind, tuple(map(id, self.parts[:-1])), self.top.form

    @property
    def identity(self) -> tuple[Tensor | str, ...]:
        return tuple(item for part in self.parts for item in part.identity)

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
        """The states of all parts."""
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
    """The prefix of each part's tensors: its kind, and a number from the second of a kind on."""
    seen, found = Counter(), []
    for kind in kinds:
        seen[kind] += 1
        found.append(f"{kind}." if seen[kind] == 1 else f"{kind}-{seen[kind]}.")
    return found
