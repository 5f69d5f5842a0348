"""What is trained, Prompt and Head: their class embeddings, how they are saved and loaded.

Shapes: C classes, D embedding width, W text-tower width, n context tokens, M solutions encoded together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.checkpoints import HeadFile, read_head, read_prompt, read_sklearn
from mergetune.clip import PLAIN, FrozenClip, check_classnames, check_templates, fill, words_before
from mergetune.files import read_regular, read_regular_text, write_atomically
from mergetune.text_tower import arrange, text_encoder

WEIGHTS, CONFIG = "solution.safetensors", "solution.json"
FORMAT_VERSION = 1
POSITIONS = ("end", "middle", "front")

Encoder = Callable[[Tensor], Tensor]
"""Parameters of M solutions, [M, ...] -> their class weights, [M, C, D], as the loss takes them."""


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
        _check_finite("ctx", self.ctx)
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
        """
        check_templates(template)
        words = _words_before_name(clip, template)
        if not len(words):
            raise ValueError(f"template must hold at least one word before {{}}, got {template!r}")
        ctx = clip.text.token_embedding.weight[words].detach().float().clone()
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
            path: the file, or its folder; see :func:`mergetune.checkpoints.read_prompt`.
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
            _check_same_classes("classnames", classnames, self.classnames)
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
        _save(self, path, {"ctx": self.ctx}, {"template": self.template, "position": self.position})

    @classmethod
    def load(cls, path: str | Path) -> Prompt:
        """Read what :meth:`save` wrote."""
        config, tensors = _load(path, cls.kind, {"ctx"})
        position = config.get("position", "end")  # files from before the other positions do not have it
        return cls(ctx=tensors["ctx"], template=config["template"], position=position, **_common(config))


@dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier on image features: ``logits = scale * (x @ weight.T + bias)``.

    Attributes:
        weight: [C, D] float32.
        classnames: C names.
        bias: [C] float32, or None. In the unit of the weight: a feature that is always 1.
        logit_scale: factor on the logits; 1 for weights that hold it already, as others' heads do.
        backbone, fingerprint: the CLIP that it was made for, if known; the fingerprint is the image tower's.
        notes: settings and origin, JSON-able, kept with the file.
    """

    weight: Tensor
    classnames: tuple[str, ...]
    bias: Tensor | None = None
    logit_scale: float = 1.0
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "head"
    normalize: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_finite("weight", self.weight)
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            raise ValueError(f"weight must have shape [C, D], got {list(self.weight.shape)}")
        if len(check_classnames(self.classnames)) != len(self.weight):
            raise ValueError(
                f"classnames must name the {len(self.weight)} classes of weight, got {len(self.classnames)}"
            )
        if self.bias is not None:
            _check_finite("bias", self.bias)
            if tuple(self.bias.shape) != (len(self.weight),):
                raise ValueError(f"bias must have shape [C] = [{len(self.weight)}], got {list(self.bias.shape)}")
        if not 0 < self.logit_scale < float("inf"):
            raise ValueError(f"logit_scale must be positive and finite, got {self.logit_scale}")

    @classmethod
    def zero_shot(
        cls,
        clip: FrozenClip,
        classnames: Sequence[str],
        templates: str | Sequence[str] = "a photo of a {}.",
        *,
        bias: bool = False,
    ) -> Head:
        """The zero-shot classifier: unit class embeddings, the CLIP's logit scale, and a bias of 0 if wanted."""
        weight = clip.class_embeddings(classnames, templates)
        return cls(
            weight=weight,
            classnames=tuple(classnames),
            bias=weight.new_zeros(len(weight)) if bias else None,
            logit_scale=clip.logit_scale,
            backbone=clip.name,
            fingerprint=clip.image_fingerprint,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        classnames: Sequence[str] | None = None,
        name: str | None = None,
        logit_scale: float | None = None,
    ) -> Head:
        """Read a linear classifier, [C, D] and a bias if there is one, from .pt, .pth, .safetensors or .npz, safely.

        It must have been trained on the CLIP's own features at unit norm. Heads in pickles are converted first:
        WiSE-FT's by :func:`mergetune.pickles.convert_module`; scikit-learn's are saved as .npz, or given to
        :meth:`from_sklearn`.

        Args:
            path: the file; see :func:`mergetune.checkpoints.read_head`.
            classnames: the class names by label number; may be None where the file has them.
            name: of the weight in a file that holds more than a head: "classification_head.weight".
            logit_scale: factor on the logits. None: what the file says, or 1, as the weight holds it already.
        """
        found = read_head(path, name=name, logit_scale=logit_scale)
        return cls._from_file(found, classnames, {"checkpoint": Path(path).name})

    @classmethod
    def from_sklearn(cls, model: Any, *, classnames: Sequence[str] | None = None) -> Head:
        """A fitted ``sklearn.linear_model.LogisticRegression``; ``classnames`` by label number, if it has numbers."""
        return cls._from_file(read_sklearn(model), classnames, {"checkpoint": type(model).__name__})

    @classmethod
    def _from_file(cls, found: HeadFile, classnames: Sequence[str] | None, notes: dict[str, Any]) -> Head:
        names = found.name_rows(classnames)
        return cls(found.weight, names, found.bias, logit_scale=found.scale, notes=notes)

    @property
    def parameter(self) -> Tensor:
        """What is searched and interpolated: [C, D], or [C, D + 1] with the bias as a constant feature's weight."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1)

    def with_parameter(self, parameter: Tensor, **changes: Any) -> Head:
        parameter = parameter.detach().float().clone()
        if self.bias is None:
            return replace(self, weight=parameter, **changes)
        return replace(self, weight=parameter[:, :-1].contiguous(), bias=parameter[:, -1].contiguous(), **changes)

    def rescaled(self, logit_scale: float) -> Head:
        """The same logits with another factor on them: weight and bias take up the difference."""
        factor = self.logit_scale / logit_scale
        bias = None if self.bias is None else self.bias * factor
        return replace(self, weight=self.weight * factor, bias=bias, logit_scale=logit_scale)

    def scale(self, clip: FrozenClip | None = None) -> float:
        """Logit scale of its class weights."""
        return self.logit_scale

    def encoder(self, clip: FrozenClip, classnames: Sequence[str], *, precision: torch.dtype | None = None) -> Encoder:
        """A head is its own class weights."""
        self._check_clip(clip)
        _check_same_classes("classnames", check_classnames(classnames), self.classnames)
        return lambda parameter: parameter

    def class_weights(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """Its rows for these classes, [C, D], or [C, D + 1] with the bias.

        Of two classes with one name it is the first, unless all its classes are asked for, in their order.
        """
        self._check_clip(clip)
        if tuple(classnames) == self.classnames:
            return self.parameter.to(clip.device)
        row = {name: i for i, name in reversed(list(enumerate(self.classnames)))}
        unknown = [name for name in classnames if name not in row]
        if unknown:
            raise ValueError(f"classnames must be among the head's {len(row)} classes, got {unknown[0]!r}")
        return self.parameter[[row[name] for name in classnames]].to(clip.device)

    def class_embeddings(self, clip: FrozenClip, classnames: Sequence[str]) -> Tensor:
        """The weight's rows for these classes, made unit norm, [C, D]: directions only, without bias and scale."""
        return F.normalize(self.class_weights(clip, classnames)[:, : self.weight.shape[1]], dim=-1)

    def _check_clip(self, clip: FrozenClip) -> None:
        if self.weight.shape[1] != clip.embed_dim:
            raise ValueError(f"weight must have the embedding's width {clip.embed_dim}, got {list(self.weight.shape)}")
        if self.fingerprint is not None and self.fingerprint != clip.image_fingerprint:
            raise ValueError(
                f"clip must be the one that the head was made for ({self.backbone}, image fingerprint "
                f"{self.fingerprint[:12]}), got {clip.name} ({clip.image_fingerprint[:12]})"
            )

    def save(self, path: str | Path) -> None:
        """Write ``solution.safetensors`` and ``solution.json`` into the folder ``path``."""
        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        _save(self, path, tensors, {"logit_scale": self.logit_scale})

    @classmethod
    def load(cls, path: str | Path) -> Head:
        """Read what :meth:`save` wrote."""
        config, tensors = _load(path, cls.kind, {"weight"})
        return cls(
            weight=tensors["weight"], bias=tensors.get("bias"), logit_scale=config["logit_scale"], **_common(config)
        )


Solution = Prompt | Head


def load_solution(path: str | Path) -> Solution:
    """Read a saved solution of either kind."""
    kind = _read_config(Path(path)).get("kind")
    kinds = {cls.kind: cls for cls in (Prompt, Head)}
    if kind not in kinds:
        raise ValueError(f"{Path(path) / CONFIG}: kind must be one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind].load(path)


def zero_shot_like(clip: FrozenClip, like: Solution, template: str | Sequence[str] = PLAIN) -> Solution:
    """The zero-shot solution in the form of another: a prompt of the template's words, or a head."""
    if isinstance(like, Head):
        return Head.zero_shot(clip, like.classnames, template, bias=like.bias is not None).rescaled(like.logit_scale)
    words = template if isinstance(template, str) else template[0]
    prompt = Prompt.from_template(clip, words if words_before(words) else PLAIN, position=like.position)
    return prompt if like.classnames is None else prompt.per_class(like.classnames)


def open_solution(
    path: str | Path, *, classnames: Sequence[str] | None = None, template: str | None = None, position: str = "end"
) -> Solution:
    """A solution in any form that is read: saved by mergetune, a checkpoint of CoOp's family, or a head's file.

    Args:
        path: a folder with ``solution.json``; a checkpoint or its folder, see :meth:`Prompt.from_checkpoint`; or a head
            in .npz, .safetensors, .pt or .pth, see :meth:`Head.from_checkpoint`.
        classnames: the classes of a head or a class-specific context, by label, where the file does not name them.
        template, position: of a prompt, see :meth:`Prompt.from_checkpoint`; a saved solution knows its own.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return load_solution(path)
    if path.suffix in (".npz", ".safetensors", ".pkl", ".joblib"):
        return Head.from_checkpoint(path, classnames=classnames)
    try:
        return Prompt.from_checkpoint(path, template=template, classnames=classnames, position=position)
    except ValueError as no_prompt:
        if path.suffix not in (".pt", ".pth"):
            raise
        try:
            return Head.from_checkpoint(path, classnames=classnames)
        except ValueError as no_head:
            raise ValueError(f"{path} must hold a prompt or a head: {no_prompt}; {no_head}") from no_head


def interpolate(a: Solution, b: Solution, t: float) -> Solution:
    """``(1 - t) a + t b`` of what was trained: context vectors, or head weights. Logit scale and the rest are b's."""
    a = a.rescaled(b.logit_scale) if isinstance(a, Head) and isinstance(b, Head) else a
    check_compatible(a, b)
    check_same_text(a, b)
    return b.with_parameter((1 - t) * a.parameter.to(b.parameter) + t * b.parameter)


def check_compatible(a: Solution, b: Solution) -> None:
    """Refuse two solutions that cannot stand on one straight line."""
    if type(a) is not type(b):
        raise TypeError(f"solutions on one path must be of one kind, got {a.kind} and {b.kind}")
    if a.parameter.shape != b.parameter.shape:
        raise ValueError(
            f"solutions on one path must have one shape, got {list(a.parameter.shape)} and {list(b.parameter.shape)}"
        )
    if a.classnames is not None:
        _check_same_classes("classnames", a.classnames, b.classnames)
    if isinstance(a, Head) and abs(a.logit_scale / b.logit_scale - 1) > 1e-6:
        raise ValueError(f"heads on one path must have one logit_scale, got {a.logit_scale} and {b.logit_scale}")


def check_same_text(a: Solution, b: Solution) -> None:
    """Refuse two prompts with other words behind the class name, or the name at another position.

    No straight line of context vectors joins them.
    """
    if not (isinstance(a, Prompt) and isinstance(b, Prompt)):
        return
    if a.template.split("{}")[1] != b.template.split("{}")[1]:
        raise ValueError(f"templates on one path of context vectors must end alike, got {a.template!r}, {b.template!r}")
    if a.position != b.position:
        raise ValueError(
            f"prompts on one path of context vectors must have one position, got {a.position}, {b.position}"
        )


def inputs(x: Tensor, weights: Tensor) -> Tensor:
    """Features [B, D] as class weights [..., C, D] take them: with a constant 1 behind where those hold a bias."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1) if weights.shape[-1] == x.shape[-1] + 1 else x


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
    room = 2 * clip.text.context_length  # the texts themselves fit; a further word need not
    alone, followed = (clip.tokenizer([text + more for text in texts], context_length=room) for more in ("", " x"))
    return (alone != followed).int().argmax(1).to(clip.device)


def _check_same_classes(argument: str, got: Sequence[str], expected: Sequence[str]) -> None:
    if len(got) != len(expected):
        raise ValueError(
            f"{argument} must be the solution's {len(expected)} classes in its order, got {len(got)} classes"
        )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a != b:
            raise ValueError(
                f"{argument} must be the solution's classes in its order: class {i} must be {b!r}, got {a!r}"
            )


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} NaN or infinite values")


def _save(solution: Solution, path: str | Path, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "format": "mergetune-solution",
        "version": FORMAT_VERSION,
        "kind": solution.kind,
        **extra,
        "classnames": solution.classnames,
        "backbone": solution.backbone,
        "fingerprint": solution.fingerprint,
        "notes": solution.notes,
    }
    weights = serialize({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    config["sha256"] = hashlib.sha256(weights).hexdigest()  # a save that is cut off between the two files is seen
    text = json.dumps(config, indent=2)  # before anything is written: notes may not be JSON
    write_atomically(path / WEIGHTS, weights)
    write_atomically(path / CONFIG, f"{text}\n".encode())


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} must be a folder with {CONFIG}, as save() writes it")
    try:
        config = json.loads(read_regular_text(path / CONFIG))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "mergetune-solution":
        raise ValueError(f"{path / CONFIG} must have format 'mergetune-solution'")
    if config.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path / CONFIG}: version must be {FORMAT_VERSION}, got {config.get('version')!r}: update mergetune"
        )
    return config


def _load(path: str | Path, kind: str, needed: set[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = Path(path)
    config = _read_config(path)
    if config.get("kind") != kind:
        raise ValueError(f"{path} must hold a {kind}, got {config.get('kind')!r}")
    fields = {
        "classnames": list | None,
        "backbone": str | None,
        "fingerprint": str | None,
        "notes": dict,
        "sha256": str,
    }
    fields |= {"template": str} if kind == Prompt.kind else {"logit_scale": int | float}
    for name, expected in fields.items():
        if name not in config or not isinstance(config[name], expected):
            raise ValueError(f"{path / CONFIG}: {name} must be there and right, got {config.get(name)!r}")
    try:
        weights = read_regular(path / WEIGHTS)
        tensors = deserialize(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / WEIGHTS} cannot be read: {error}") from error
    if hashlib.sha256(weights).hexdigest() != config["sha256"]:
        raise ValueError(
            f"{path / WEIGHTS} must be what {CONFIG} describes, got another checksum: saving was interrupted"
        )
    if missing := needed - tensors.keys():
        raise ValueError(f"{path / WEIGHTS} must hold {', '.join(sorted(missing))}, got {', '.join(sorted(tensors))}")
    return config, tensors


def _common(config: dict[str, Any]) -> dict[str, Any]:
    names = config["classnames"]
    return {
        "classnames": None if names is None else tuple(names),
        "backbone": config["backbone"],
        "fingerprint": config["fingerprint"],
        "notes": config["notes"],
    }
