"""Templates: the zero-shot class embeddings of texts as a solution without trained tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mergetune.clip import PLAIN, Edit, FrozenClip, check_templates
from mergetune.facts.brief import brief
from mergetune.io import Items
from mergetune.solutions.base import Solution
from mergetune.solutions.solution_folders import Description
from mergetune.solutions.states import State


class TemplatesDescription(Description, frozen=True):
    """Saved templates."""

    classnames: None
    texts: Items[str]


@brief("texts", "classnames", "backbone", "notes")
@dataclass(frozen=True, eq=False)
class Templates(Solution):
    """Zero-shot class embeddings, averaged over one or more texts: a solution with an empty state.

    Templates serve as the base of a :class:`mergetune.Stack` on an untuned CLIP.

    Attributes:
        texts: the templates, each with ``{}`` in the place of the class name.
        backbone, fingerprint: CLIP that the solution belongs to, if known; fingerprint of its text tower.
        notes: JSON-able; saved with the solution.

    Example:
        >>> import mergetune as mt
        >>> mt.Templates(("a photo of a {}.", "a drawing of a {}.")).state()
        {}
    """

    texts: tuple[str, ...] = (PLAIN,)
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    classnames: None = None

    kind: ClassVar[str] = "templates"
    tensors: ClassVar[tuple[str, ...]] = ()
    tower: ClassVar[str] = "text"
    description: ClassVar[type[Description]] = TemplatesDescription

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", check_templates(self.texts))

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """An edit that takes the class embeddings from the texts."""
        return Edit(templates=self.texts)

    def zero_shot_points(
        self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]
    ) -> list[Templates]:
        """The solution itself, which is zero-shot."""
        return [self]

    def settings(self) -> dict[str, Any]:
        return {"texts": list(self.texts)}

    @property
    def identity(self) -> tuple[str, ...]:
        return self.texts

    def card(self) -> tuple[str, str, str]:
        return "Zero-shot templates for CLIP", "zero-shot", f"Texts: {', '.join(f'`{text}`' for text in self.texts)}."
