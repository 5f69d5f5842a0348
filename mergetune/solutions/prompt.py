"""Prompt: context vectors in front of, around or behind the class names, and the template they stand in."""

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
from mergetune.solutions.base import Description, Solution, State, check_finite
from mergetune.solutions.checkpoints import read_prompt

POSITIONS = ("end", "middle", "front")


class PromptDescription(Description, frozen=True):
    """A saved prompt."""

    template: str
    position: Literal["end", "middle", "front"] = "end"  # files from before the other positions do not have it


@dataclass(frozen=True, eq=False)
class Prompt(Solution):
    """Context vectors around the class name (CoOp, arXiv 2109.01134).

    Attributes:
        ctx: context vectors, [n, W], or specific to each class, [C, n, W]. float32.
        template: the whole text; the words before ``{}`` only hold the places of the context vectors: "X X X X {}.".
        classnames: the classes of a class-specific context; None where the context is shared.
        backbone: name of the CLIP that it was made for, if known.
        fingerprint: that CLIP's text fingerprint, if known; another CLIP is refused.
        notes: settings and origin, JSON-able, kept with the file.
        position: where the class name stands, CoOp's CLASS_TOKEN_POSITION: "end", behind all context vectors;
            "middle", behind the first n // 2; "front", before them. The words behind ``{}`` follow all of them.
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
        """The zero-shot solution: the embeddings of the template's own words.

        Its class embeddings are those of ``clip.class_embeddings(classnames, template)``. With the class name at
        another position they are not: that is CoOp's start from words, no zero-shot solution.

        Raises:
            TypeError: a CLIP that takes no prompts, naming its text tower.
            ValueError: a template without words before the class name.
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
        """CoOp's random start: normal context vectors of standard deviation 0.02."""
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
        """Read a prompt of CoOp, KgCoOp, ProGrad or the official MERGETUNE, ``prompt_learner/model.pth.tar-N``, safely.

        Args:
            path: the file, or its folder; see :func:`mergetune.solutions.read_prompt`.
            template: the text that it was trained with, one token before ``{}`` for each context vector; None is CoOp's
                "X X X X {}.".
            classnames: the classes of a class-specific context, in the order of training (CoOp: sorted labels); not
                looked at for a shared one.
            position: the run's TRAINER.COOP.CLASS_TOKEN_POSITION, which the file does not tell; KgCoOp has "end" only.
        """
        found = read_prompt(path)
        return cls(
            ctx=found.ctx,
            template=placeholder_template(found.ctx.shape[-2]) if template is None else template,
            classnames=None if classnames is None or found.ctx.ndim == 2 else tuple(classnames),
            notes={"checkpoint": found.file.name, "epoch": found.epoch},
            position=position,
        )

    @property
    def n_ctx(self) -> int:
        """n, the number of context vectors."""
        return self.ctx.shape[-2]

    def per_class(self, classnames: Sequence[str]) -> Prompt:
        """The same prompt with a context of its own for every class."""
        if self.classnames is not None:
            raise ValueError(f"ctx is class-specific already, got {list(self.ctx.shape)}")
        ctx = self.ctx.expand(len(classnames), -1, -1)
        return replace(self, ctx=ctx.clone(), classnames=tuple(classnames))

    # -- as a solution -------------------------------------------------------------------------------------------------

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """The class embeddings of this text with the context vectors of each setting."""
        return Edit(context=Context(states["ctx"], self.template, self.position, self.classnames))

    def zero_shot_points(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> list[Prompt]:
        """The words of each template, and of the plain "a photo of a {}." last; those of this prompt's length first.

        A dataset's own template may have no words before the name: "{} texture.".
        """
        texts = [template for template in (*templates, PLAIN) if words_before(template)]
        points = [Prompt.from_template(clip, template, position=self.position) for template in texts]
        points = points if self.classnames is None else [point.per_class(classnames) for point in points]
        return sorted(points, key=lambda point: point.ctx.shape != self.ctx.shape)

    def zero_shot_classes(self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The class embeddings of all templates together: context vectors have those of one text only."""
        return clip.class_embeddings(classnames, templates)

    def in_form_of(self, like: Solution) -> Prompt:
        """With context vectors for each class, if the other prompt has them."""
        if like.classnames is None or self.classnames is not None:
            return self
        return self.per_class(like.classnames)

    def settings(self) -> dict[str, Any]:
        return {"template": self.template, "position": self.position}

    def check_width(self, clip: FrozenClip) -> None:
        if self.ctx.shape[-1] != clip.text.width:
            raise ValueError(f"ctx must have the text tower's width {clip.text.width}, got {list(self.ctx.shape)}")

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Also refuse other words behind the class name and another position: no line of context vectors joins them."""
        super().check_line(other, space=space)
        there = other.settings()
        template, position = there["template"], there["position"]
        if space == "embedding":
            return
        if self.template.split("{}")[1] != template.split("{}")[1]:
            raise ValueError(
                f"templates on one path of context vectors must end alike, got {self.template!r}, {template!r}"
            )
        if self.position != position:
            raise ValueError(
                f"prompts on one path of context vectors must have one position, got {self.position}, {position}"
            )

    @property
    def form(self) -> Hashable:
        """Only the words behind the class name matter: the words before it are replaced."""
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
    """CoOp's stand-in text: "X X X X {}."."""
    return " ".join(["X"] * n_ctx) + " {}" + suffix
