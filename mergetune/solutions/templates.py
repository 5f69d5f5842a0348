"""Templates: zero-shot class embeddings as a solution; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mergetune.clip import PLAIN, Edit, FrozenClip, check_templates
from mergetune.io import Items
from mergetune.solutions.base import Description, Solution, State


class TemplatesDescription(Description, frozen=True):
    """Saved templates."""

    classnames: None
    texts: Items[str]


@dataclass(frozen=True, eq=False)
class Templates(Solution):
    """The zero-shot class embeddings of one or more texts, averaged: the base of a stack where nothing was tuned.

    Attributes:
        texts: each with ``{}`` where the class name goes.
        backbone, fingerprint: the CLIP that it belongs to, if known; the fingerprint is the text tower's.
        notes: JSON-able, kept with the file.

    Example:
        >>> Templates(("a photo of a {}.",)).numbers
        0
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
        """Class embeddings of the texts."""
        return Edit(templates=self.texts)

    def zero_shot_points(
        self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]
    ) -> list[Templates]:
        """Itself."""
        return [self]

    def settings(self) -> dict[str, Any]:
        return {"texts": list(self.texts)}

    @property
    def identity(self) -> tuple[str, ...]:
        return self.texts

    def card(self) -> tuple[str, str, str]:
        return "Zero-shot templates for CLIP", "zero-shot", f"Texts: {', '.join(f'`{text}`' for text in self.texts)}."
