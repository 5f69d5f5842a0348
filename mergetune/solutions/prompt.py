"""Prompt: context vectors that stand before, around or behind the class name in a template."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mergetune.clip import (
    PLAIN,
    Context,
    Edit,
    FrozenClip,
    check_classnames,
    check_templates,
    words_before,
    words_before_name,
)
from mergetune.facts.brief import brief
from mergetune.solutions.base import Solution
from mergetune.solutions.checkpoints import read_prompt
from mergetune.solutions.prompt_tokens import (
    NAMES,
    OtherClasses,
    check_same_tokens,
    has_other_start,
    rows_of_names,
    token_notes,
)
from mergetune.solutions.solution_folders import Description
from mergetune.solutions.states import State, check_finite

POSITIONS = ("end", "middle", "front")


class PromptDescription(Description, frozen=True):
    """A saved prompt."""

    template: str
    position: Literal["end", "middle", "front"] = "end"  # files from before the other positions do not have it


@brief("ctx", "template", "position", "classnames", "backbone", "notes")
@dataclass(frozen=True, eq=False)
class Prompt(Solution):
    """A soft prompt: trained context vectors in place of the words around the class name (CoOp, arXiv 2109.01134).

    Shapes: n context vectors, W width of the text tower, C classes.

    Attributes:
        ctx: context vectors, float32: [n, W] if all classes share them, [C, n, W] if they are class-specific.
        template: the whole text, for example "X X X X {}."; each token before ``{}`` marks the place of one context
            vector.
        classnames: the C classes of class-specific context vectors; None for shared ones.
        backbone, fingerprint: CLIP that the prompt was made for, if known; fingerprint of its text tower. A CLIP with
            another text tower is refused.
        notes: settings and origin, JSON-able; saved with the prompt.
        position: place of the class name, CoOp's CLASS_TOKEN_POSITION: "end" (behind all context vectors), "middle"
            (behind the first n // 2) or "front" (before all). The words after ``{}`` end the text in each case.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> prompt = mt.Prompt.from_template(clip, "a photo of a {}.")
        >>> prompt.ctx.shape  # [n, W]
        torch.Size([4, 128])
        >>> prompt.class_embeddings(clip, ["cat", "dog"]).shape  # [C, D]
        torch.Size([2, 128])
    """

    ctx: Tensor
    template: str
    classnames: tuple[str, ...] | None = None
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    position: str = "end"

    kind: ClassVar[str] = "prompt"
    tensors: ClassVar[tuple[str, ...]] = ("ctx",)
    tower: ClassVar[str] = "text"
    surrogate_on: ClassVar[str] = "classes"
    description: ClassVar[type[Description]] = PromptDescription

    def __post_init__(self) -> None:
        check_finite("ctx", self.ctx)
        check_templates(self.template)
        if self.ctx.ndim not in (2, 3) or 0 in self.ctx.shape:
            raise ValueError(f"ctx must have shape [n, W] or [C, n, W], got {list(self.ctx.shape)}")
        if (self.ctx.ndim == 3) != (self.classnames is not None):
            raise ValueError(
                f"classnames must be given for class-specific contexts [C, n, W] and for no others, got ctx "
                f"{list(self.ctx.shape)}"
            )
        if self.classnames is not None and len(check_classnames(self.classnames)) != len(self.ctx):
            raise ValueError(f"classnames must name the {len(self.ctx)} classes of ctx, got {len(self.classnames)}")
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {self.position!r}")

    @classmethod
    def from_template(cls, clip: FrozenClip, template: str = "a photo of a {}.", *, position: str = "end") -> Prompt:
        """The zero-shot prompt: its context vectors are the token embeddings of the words before ``{}``.

        With position "end", the prompt gives the class embeddings ``clip.class_embeddings(classnames, template)``. At
        another position the class name moves to another place, so the prompt is CoOp's start from words but no
        zero-shot solution.

        Raises:
            TypeError: the text tower of the CLIP takes no prompts; the message names the tower.
            ValueError: the template has no words before the class name.
        """
        check_templates(template)
        embedding = clip.text.token_embedding.weight
        words = words_before_name(clip, template)
        if not len(words):
            raise ValueError(f"template must hold at least one word before {{}}, got {template!r}")
        ctx = embedding[words].detach().float().clone()
        return cls(ctx=ctx, template=template, backbone=clip.name, fingerprint=clip.text_fingerprint, position=position)

    @classmethod
    def random(
        cls,
        clip: FrozenClip,
        n_ctx: int = 16,
        classnames: Sequence[str] | None = None,
        *,
        seed: int = 1,
        suffix: str = ".",
        position: str = "end",
    ) -> Prompt:
        """CoOp's random start: context vectors drawn from a normal distribution with standard deviation 0.02.

        Args:
            clip: the frozen CLIP.
            n_ctx: n, number of context vectors.
            classnames: C names for class-specific context vectors; None for shared ones.
            seed: seed of the draw.
            suffix: the text after the class name.
            position: place of the class name, see :class:`Prompt`.
        """
        if n_ctx < 1:
            raise ValueError(f"n_ctx must be at least 1, got {n_ctx}")
        shape = (n_ctx, clip.text.width) if classnames is None else (len(classnames), n_ctx, clip.text.width)
        ctx = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
        return cls(
            ctx=ctx.to(clip.device),
            template=placeholder_template(n_ctx, suffix),
            classnames=None if classnames is None else tuple(classnames),
            backbone=clip.name,
            fingerprint=clip.text_fingerprint,
            position=position,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        template: str | None = None,
        classnames: Sequence[str] | None = None,
        position: str = "end",
    ) -> Prompt:
        """Read a prompt checkpoint of CoOp, KgCoOp, ProGrad or the official MERGETUNE. No code in the file is run.

        Args:
            path: the file ``prompt_learner/model.pth.tar-N``, or its folder; see
                :func:`mergetune.solutions.read_prompt`.
            template: the text of the training run, with one token before ``{}`` per context vector; None takes CoOp's
                "X X X X {}.".
            classnames: names of the classes of a class-specific prompt. The file holds the embedded names: with another
                order than that of training (CoOp: sorted labels), :meth:`for_clip` puts the context vectors into it.
                Not used for shared context vectors.
            position: ``TRAINER.COOP.CLASS_TOKEN_POSITION`` of the run, which the file does not hold. KgCoOp always has
                "end".

        Raises:
            FileNotFoundError: no checkpoint at ``path``.
            ValueError: the file holds no context vectors, or other parameters as well.
        """
        found = read_prompt(path)
        return cls(
            ctx=found.ctx,
            template=placeholder_template(found.ctx.shape[-2]) if template is None else template,
            classnames=None if classnames is None or found.ctx.ndim == 2 else tuple(classnames),
            notes={"checkpoint": found.file.name, "epoch": found.epoch, **token_notes(found.start, found.suffix)},
            position=position,
        )

    @property
    def n_ctx(self) -> int:
        """n, the number of context vectors."""
        return self.ctx.shape[-2]

    def per_class(self, classnames: Sequence[str]) -> Prompt:
        """A class-specific prompt, [C, n, W], that starts with these context vectors for every class."""
        if self.classnames is not None:
            raise ValueError(f"ctx must be shared by all classes, [n, W], got class-specific {list(self.ctx.shape)}")
        ctx = self.ctx.expand(len(classnames), -1, -1)
        return replace(self, ctx=ctx.clone(), classnames=tuple(classnames))

    # -- as a solution -------------------------------------------------------------------------------------------------

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """An edit that takes the class embeddings from the template with these context vectors."""
        return Edit(context=Context(states["ctx"], self.template, self.position, self.classnames))

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> list[Prompt]:
        """Zero-shot prompts of the templates and, last, of "a photo of a {}."; those with this prompt's n come first.

        Templates without words before the class name, such as "{} texture.", are left out.
        """
        texts = [template for template in (*templates, PLAIN) if words_before(template)]
        points = [Prompt.from_template(clip, template, position=self.position) for template in texts]
        points = points if self.classnames is None else [point.per_class(classnames) for point in points]
        return sorted(points, key=lambda point: point.ctx.shape != self.ctx.shape)

    def zero_shot_classes(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Class embeddings averaged over all templates, [C, D]; a zero-shot prompt has those of one template."""
        return clip.class_embeddings(classnames, templates)

    def in_form_of(self, like: Solution) -> Prompt:
        """This prompt; expanded to class-specific context vectors if ``like`` has such."""
        if like.classnames is None or self.classnames is not None:
            return self
        return self.per_class(like.classnames)

    def settings(self) -> dict[str, Any]:
        return {"template": self.template, "position": self.position}

    def check_width(self, clip: FrozenClip) -> None:
        if self.ctx.shape[-1] != clip.text.width:
            raise ValueError(f"ctx must have the text tower's width {clip.text.width}, got {list(self.ctx.shape)}")

    def check(self, clip: FrozenClip) -> None:
        """Check that the prompt was made for this CLIP, and that its context vectors are in the order of its classes.

        A checkpoint of CoOp holds embedded texts instead of a fingerprint: their start token must be that of the CLIP.

        Raises:
            ValueError: the CLIP has another width or other weights, or the order of the classes is that of
                :meth:`for_clip` only.
        """
        self._check_backbone(clip)
        rows = self._rows(clip)
        if rows is not None and rows != sorted(rows):
            raise OtherClasses(
                f"classnames must be in the order of {self.notes.get('checkpoint', 'the file')}, got another order: "
                "take solution.for_clip(clip), which puts the context vectors into the order of the names"
            )

    def for_clip(self, clip: FrozenClip) -> Prompt:
        """This prompt, with the context vectors of a CoOp checkpoint in the order of ``classnames``.

        Raises:
            ValueError: the prompt was made for another CLIP, or no name is one of the file.
        """
        self._check_backbone(clip)
        rows = self._rows(clip)
        if rows is None:
            return self
        notes = {name: value for name, value in self.notes.items() if name != NAMES}
        return replace(self, ctx=self.ctx[rows], notes=notes)

    def _check_backbone(self, clip: FrozenClip) -> None:
        super().check(clip)
        if self.fingerprint is None and has_other_start(clip, self.notes):
            raise ValueError(
                f"the prompt of {self.notes.get('checkpoint', 'the file')} and the backbone {clip.name} do not belong "
                "together: the start token in the file has another embedding; load the backbone of the prompt's "
                "training run (MODEL.BACKBONE.NAME in its log.txt)"
            )

    def _rows(self, clip: FrozenClip) -> list[int] | None:
        """The row of the context vectors that belongs to each class, or None if no file tells."""
        if self.classnames is None:
            return None
        return rows_of_names(clip, self.classnames, self.template, self.n_ctx, self.notes)

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Check that a line joins two prompts.

        In space "parameter", both must have equal shapes and classes, the same words after ``{}`` and the same
        position. In space "embedding", any two prompts have a line.
        """
        super().check_line(other, space=space)
        check_same_tokens(self.notes, other.notes)
        there = other.settings()
        template, position = there["template"], there["position"]
        if space == "embedding":
            return
        if self.template.split("{}")[1] != template.split("{}")[1]:
            raise ValueError(
                f"templates on one path of context vectors must end alike after {{}}, got {self.template!r} and "
                f"{template!r}"
            )
        if self.position != position:
            raise ValueError(
                f"prompts on one path of context vectors must have one position, got {self.position}, {position}"
            )

    @property
    def form(self) -> Hashable:
        """Key with the words after ``{}`` only: the context vectors replace the words before ``{}``."""
        return self.kind, self.template.split("{}")[1], self.position, tuple(self.ctx.shape), self.classnames

    @property
    def identity(self) -> tuple[Tensor | str, ...]:
        return self.ctx, self.template, self.position

    def card(self) -> tuple[str, str, str]:
        specific = f" for each of {len(self.classnames)} classes" if self.classnames else ""
        what = (
            f"{self.n_ctx} context vectors{specific} around the class name: text `{self.template}`, class name at the "
            f"{self.position}."
        )
        return "Soft prompt for CLIP", "prompt-tuning", what


def placeholder_template(n_ctx: int, suffix: str = ".") -> str:
    """CoOp's placeholder text with n_ctx tokens before the class name, for example "X X X X {}."."""
    return " ".join(["X"] * n_ctx) + " {}" + suffix
