"""Prompt: context vectors in front of, around or behind the class names, and the template they stand in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip, arrange, check_classnames, check_templates, fill, text_encoder
from mergetune.solutions.base import (
    Encoder,
    check_finite,
    check_same_classes,
    common_fields,
    read_solution,
    write_solution,
)
from mergetune.solutions.checkpoints import read_prompt

POSITIONS = ("end", "middle", "front")


@dataclass(frozen=True, eq=False)
class Prompt:
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
    normalize: ClassVar[bool] = True
    """Class embeddings are unit norm; interpolation comes before the normalisation."""

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
        words = _words_before_name(clip, template)
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

    @property
    def parameter(self) -> Tensor:
        """What is searched and interpolated."""
        return self.ctx

    @property
    def form(self) -> tuple:
        """What prompts have in common that can be encoded together, stacked."""
        return self.template.split("{}")[1], self.position, tuple(self.ctx.shape), self.classnames

    def with_parameter(self, ctx: Tensor, **changes: Any) -> Prompt:
        """A prompt with these context vectors, copied as float32; ``changes`` are of other fields."""
        return replace(self, ctx=ctx.detach().float().clone(), **changes)

    def per_class(self, classnames: Sequence[str]) -> Prompt:
        """The same prompt with a context of its own for every class."""
        if self.classnames is not None:
            raise ValueError(f"ctx is class-specific already, got {list(self.ctx.shape)}")
        ctx = self.ctx.expand(len(classnames), -1, -1)
        return replace(self, ctx=ctx.clone(), classnames=tuple(classnames))

    def scale(self, clip: FrozenClip) -> float:
        """Logit scale of its class weights."""
        return clip.logit_scale

    def encoder(self, clip: FrozenClip, classnames: Sequence[str], *, precision: torch.dtype | None = None) -> Encoder:
        """Context vectors [M, n, W] or [M, C, n, W] -> class features [M, C, D] float32, not normalised."""
        self._check_clip(clip)
        classnames = check_classnames(classnames)
        if self.classnames is not None:
            check_same_classes("classnames", classnames, self.classnames)
        template, first = self.template, clip.first_token
        words = _words_before_name(clip, template)
        if len(words) != self.n_ctx and set(template.split("{}")[0].split()) == {"X"}:
            template = template.replace("X", "a", self.n_ctx)  # "X" is two tokens for some tokenizers, "a" is one
            words = _words_before_name(clip, template)
        tokens = clip.tokenize([fill(template, name) for name in classnames])
        if len(words) != self.n_ctx or (tokens[:, first : first + self.n_ctx] != words).any():
            raise ValueError(
                f"template must hold {self.n_ctx} tokens before {{}}, one for each context vector, got "
                f"{self.template!r}"
            )
        text, where = clip.text_as(precision or torch.float32), {"first": first, "context": self.n_ctx}
        places = None
        if self.position != "end":
            ends = _name_ends(clip, template, classnames)
            tokens, places = arrange(tokens, ends, position=self.position, **where)
        return text_encoder(text, tokens, places=places, shared=self.classnames is None, **where)

    @torch.no_grad()
    def class_weights(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """Class features as they are interpolated: [C, D] float32, not normalised."""
        encoder = self.encoder(clip, classnames)
        return encoder(self.ctx.to(clip.device)[None])[0]

    def class_embeddings(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """A plain zero-shot classifier for any class names: [C, D] float32, unit norm.

        Raises:
            TypeError: a CLIP that takes no prompts, naming its text tower.
            ValueError: class-specific contexts and other class names; a text that does not fit the tower; another CLIP.
        """
        return F.normalize(self.class_weights(clip, classnames), dim=-1)

    def _check_clip(self, clip: FrozenClip) -> None:
        if self.ctx.shape[-1] != clip.text.width:
            raise ValueError(f"ctx must have the text tower's width {clip.text.width}, got {list(self.ctx.shape)}")
        if self.fingerprint is not None and self.fingerprint != clip.text_fingerprint:
            raise ValueError(
                f"clip must be the one that the prompt was made for ({self.backbone}, text fingerprint "
                f"{self.fingerprint[:12]}), got {clip.name} ({clip.text_fingerprint[:12]})"
            )

    def save(self, path: str | Path) -> None:
        """Write ``solution.safetensors`` and ``solution.json`` into the folder ``path``."""
        write_solution(self, path, {"ctx": self.ctx}, {"template": self.template, "position": self.position})

    @classmethod
    def load(cls, path: str | Path) -> Prompt:
        """Read what :meth:`save` wrote."""
        config, tensors = read_solution(path, cls.kind, {"ctx"}, {"template": str})
        position = config.get("position", "end")  # files from before the other positions do not have it
        return cls(ctx=tensors["ctx"], template=config["template"], position=position, **common_fields(config))


def placeholder_template(n_ctx: int, suffix: str = ".") -> str:
    """CoOp's stand-in text: "X X X X {}."."""
    return " ".join(["X"] * n_ctx) + " {}" + suffix


def _words_before_name(clip: FrozenClip, template: str) -> Tensor:
    """Token ids of a template before its class name."""
    # With no name and with two names: two words may begin alike, as a sentencepiece "▁" before each.
    tokens = clip.tokenize([template.split("{}")[0], fill(template, "cat"), fill(template, "dog")])
    return tokens[0, clip.first_token : int((tokens != tokens[0]).any(0).int().argmax())]


def _name_ends(clip: FrozenClip, template: str, classnames: Sequence[str]) -> Tensor:
    """Where each class name ends in the template's texts: the position of the first token behind it, [C]."""
    texts = [template.split("{}")[0] + name for name in classnames]
    room = 2 * clip.context_length  # the texts themselves fit; a further word need not
    alone, followed = (clip.tokenizer([text + more for text in texts], context_length=room) for more in ("", " x"))
    return (alone != followed).int().argmax(1).to(clip.device)
