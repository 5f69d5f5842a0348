"""The kinds of solutions, by name; solutions of any kind opened, put in another's form, interpolated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from mergetune.clip import PLAIN, FrozenClip, check_templates
from mergetune.io import damaged
from mergetune.solutions.base import CONFIG, Solution, read_config, stacked
from mergetune.solutions.head import Head
from mergetune.solutions.linear_map import LinearMap
from mergetune.solutions.prompt import Prompt
from mergetune.solutions.residual import Residual
from mergetune.solutions.stack import Stack
from mergetune.solutions.templates import Templates

#: {name: class} of the kinds of solutions.
KINDS: dict[str, type[Solution]] = {kind.kind: kind for kind in (Prompt, Head, Templates, Residual, LinearMap, Stack)}

S = TypeVar("S", bound=Solution)


def load_solution(path: str | Path) -> Solution:
    """Read a saved solution of any kind.

    Args:
        path: a folder that :meth:`Solution.save` wrote.
    """
    kind = read_config(Path(path)).kind
    if kind not in KINDS:
        rule = f"be one of {', '.join(KINDS)}"
        raise damaged(Path(path) / CONFIG, ("kind",), rule, kind, way_on="update mergetune if a later version wrote it")
    return KINDS[kind].load(path)


def zero_shot_like(clip: FrozenClip, like: Solution, template: str | Sequence[str] = PLAIN) -> Solution:
    """The zero-shot solution in the form of another: a prompt of the first template's words, a head, no residual.

    Raises:
        ValueError: there is no zero-shot solution in this form.
    """
    points = like.zero_shot_points(clip, like.classnames or (), check_templates(template))
    if not points:
        raise ValueError(f"a zero-shot solution must exist in the form of the solution, got a {like.kind}: it has none")
    return points[0]


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


def interpolate(a: Solution, b: S, t: float) -> S:
    """The solution at ``t`` on the line from a (0) to b (1), in the space of what was trained.

    Args:
        a, b: solutions of one kind and shape. Logit scale, texts and notes are those of b.
        t: ``(1 - t) a + t b`` for kinds with a straight line.
    """
    a = a.in_form_of(b)
    check_compatible(a, b)
    found = b.between(stacked(a.state()), stacked(b.state()), t)
    return b.with_state({name: tensor[0] for name, tensor in found.items()})


def check_compatible(a: Solution, b: Solution, *, space: str = "parameter") -> None:
    """Refuse two solutions that cannot stand on one line.

    Args:
        a, b: the ends.
        space: "parameter", the line of what was trained, or "embedding", that of the class embeddings.

    Raises:
        TypeError: two kinds.
        ValueError: shapes, classes, texts or scales that differ.
    """
    if type(a) is not type(b):
        raise TypeError(f"solutions on one path must be of one kind, got {a.kind} and {b.kind}")
    a.check_line(b, space=space)
