"""Solutions of any kind: opened, put in another's form, compared, interpolated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergetune.clip import PLAIN, FrozenClip, words_before
from mergetune.solutions.base import CONFIG, check_same_classes, read_config
from mergetune.solutions.head import Head
from mergetune.solutions.prompt import Prompt

#: What is trained, interpolated and saved, of either kind.
Solution = Prompt | Head


def load_solution(path: str | Path) -> Solution:
    """Read a saved solution of either kind."""
    kind = read_config(Path(path)).get("kind")
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
    if a.classnames is not None and b.classnames is not None:  # contexts of one shape both have them
        check_same_classes("classnames", a.classnames, b.classnames)
    if isinstance(a, Head) and isinstance(b, Head) and abs(a.logit_scale / b.logit_scale - 1) > 1e-6:
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
