"""The table of solution kinds, and functions for solutions of any kind: open, zero-shot, interpolate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from mergetune.clip import PLAIN, FrozenClip, check_classnames, check_templates
from mergetune.io import damaged, kind_of_content, names_file
from mergetune.merging import open_weights
from mergetune.merging.adapters import adapter_folder
from mergetune.solutions.base import Solution
from mergetune.solutions.checkpoints import NoContext, holds_context
from mergetune.solutions.head import Head
from mergetune.solutions.head_files import bare_shape, holds_weights
from mergetune.solutions.linear_map import LinearMap
from mergetune.solutions.lora import LoRA
from mergetune.solutions.lora_files import is_clip_lora, read_clip_lora
from mergetune.solutions.other_trainers import OtherTrainers
from mergetune.solutions.parameters import Parameters, is_model, read_model
from mergetune.solutions.peft_files import read_peft
from mergetune.solutions.prompt import Prompt
from mergetune.solutions.resaving import TEMPERATURE
from mergetune.solutions.residual import Residual
from mergetune.solutions.sidecars import read_export
from mergetune.solutions.solution_folders import CONFIG, read_config
from mergetune.solutions.stack import Stack
from mergetune.solutions.states import stacked
from mergetune.solutions.templates import Templates

#: {name: class} of the kinds of solutions.
KINDS: dict[str, type[Solution]] = {
    kind.kind: kind for kind in (Prompt, Head, Templates, Residual, LinearMap, LoRA, Parameters, Stack)
}
"""The kinds of solutions by name. A new kind is registered here and nowhere else."""

S = TypeVar("S", bound=Solution)


@names_file("path")
def load_solution(path: str | Path) -> Solution:
    """Read a solution of any kind that was saved with ``solution.save(path)``.

    Args:
        path: the folder with ``solution.json`` and ``solution.safetensors``.

    Raises:
        FileNotFoundError: the folder has no ``solution.json``.
        ValueError: an unknown kind, a damaged file or a later format.

    Example:
        >>> import mergetune as mt, tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> mt.Head(torch.eye(2), ("cat", "dog")).save(folder)
        >>> mt.load_solution(folder).classnames
        ('cat', 'dog')
    """
    kind = read_config(Path(path)).kind
    if kind not in KINDS:
        rule = f"be one of {', '.join(KINDS)}"
        raise damaged(Path(path) / CONFIG, ("kind",), rule, kind, way_on="update mergetune if a later version wrote it")
    return KINDS[kind].load(path)


def zero_shot_like(clip: FrozenClip, like: Solution, template: str | Sequence[str] = PLAIN) -> Solution:
    """The zero-shot solution in the form of another solution, such as w1 for a path.

    For a prompt, the context vectors are the words of a template; for a head, the rows are zero-shot class embeddings;
    a residual is zero and a map the identity.

    Args:
        clip: the frozen CLIP.
        like: the solution whose form is taken.
        template: one or more templates; of several, a prompt takes the first that has as many context tokens.

    Raises:
        ValueError: the kind has no zero-shot solution.
    """
    points = like.zero_shot_points(clip, like.classnames or (), check_templates(template))
    if not points:
        raise ValueError(f"like must be of a kind with a zero-shot solution, got a {like.kind}, which has none")
    return points[0]


@names_file("path")
def open_solution(
    path: str | Path,
    *,
    classnames: Sequence[str] | None = None,
    template: str | None = None,
    position: str = "end",
    name: str | None = None,
) -> Solution:
    """Open a solution in any supported format: saved by mergetune, a CoOp-family checkpoint, a head, a LoRA or a model.

    Exports are read back with class names and scale: the files of :func:`mergetune.to_head` and
    :func:`mergetune.zero_shot_classifier`, and those of :func:`mergetune.to_coop` as long as FILE.mergetune.json stands
    beside them. The content of a file says what it is, whatever its ending.

    Args:
        path: a folder with ``solution.json``; a prompt checkpoint or its folder, see :meth:`Prompt.from_checkpoint`;
            the file of a head, see :meth:`Head.from_checkpoint`; a LoRA, see
            :func:`mergetune.solutions.read_clip_lora` and :func:`mergetune.solutions.read_peft`; or a whole open_clip
            model, see :func:`mergetune.solutions.read_model`.
        classnames: class names by label number, for a head or a class-specific prompt whose file has no names.
        template, position: text and class-name position of a prompt checkpoint, see :meth:`Prompt.from_checkpoint`;
            ``template`` is also the text of a LoRA's class embeddings. Not used for a solution that mergetune saved.
        name: name of the weight in the file of a head that holds several. A solution that mergetune saved has none.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: the file is none of these.

    Example:
        >>> import mergetune as mt, os, tempfile, torch
        >>> file = os.path.join(tempfile.mkdtemp(), "head.pt")
        >>> torch.save({"weight": torch.eye(2)}, file)
        >>> mt.open_solution(file, classnames=["cat", "dog"]).kind
        'head'
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        if name is not None:
            raise ValueError(f"name must be None for a solution that mergetune saved, got {name!r} for {path}")
        return load_solution(path)
    if path.suffix in (".onnx", ".pt2"):
        raise ValueError(
            f"{path} must be a solution, got a graph from images to logits, which cannot be turned back: give the "
            "solution that it was exported from"
        )
    kind = kind_of_content(path) if path.is_file() else "torch"
    if name is None:
        exported = read_export(path, classnames=classnames, template=template, position=position)
        if exported is not None:
            return exported
        texts = check_templates(PLAIN if template is None else template)
        if adapter_folder(path) is not None:
            return read_peft(path, templates=texts)
        if path.is_file() and kind == "torch" and is_clip_lora(path):
            return read_clip_lora(path, templates=texts)
        if path.is_file() and kind in ("torch", "safetensors") and _holds_model(path):
            return read_model(path, templates=texts)
    if name is not None or not (kind == "torch" or (kind == "safetensors" and holds_context(path))):
        return Head.from_checkpoint(path, classnames=classnames, name=name)
    try:
        return Prompt.from_checkpoint(path, template=template, classnames=classnames, position=position)
    except OtherTrainers:
        raise
    except ValueError as no_prompt:
        try:
            return Head.from_checkpoint(path, classnames=classnames)
        except (ValueError, OSError) as no_head:
            if shape := bare_shape(path):
                raise ValueError(
                    f"{no_head}: context vectors [n, W] without a name, as the tensor {shape} might be, must be saved "
                    "as {'ctx': tensor}"
                ) from no_head
            if holds_weights(path):
                raise
            if isinstance(no_prompt, NoContext) and path.suffix in (".pt", ".pth"):  # the usual endings of heads
                raise ValueError(f"{no_prompt}: nor is it the weight [C, D] of a head") from no_head
            raise no_prompt from None


def _holds_model(path: Path) -> bool:
    """Whether a file holds the weights of an open_clip model. False for a file that cannot be read."""
    try:
        return is_model(open_weights(path))
    except (ValueError, OSError):
        return False


def known_classes(solution: Solution) -> tuple[str, ...] | None:
    """The class names that a solution knows: those of its tensors, else those that it was trained on; None if unknown.

    :func:`mergetune.tune` and :func:`mergetune.fit` record the training classes in the notes. A merged solution knows
    the classes that all its experts were trained on.

    Example:
        >>> import mergetune as mt
        >>> from mergetune.solutions import known_classes
        >>> clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
        >>> x = clip.class_embeddings(["cat", "dog"], "an icon of a {}")  # in place of image features
        >>> features = mt.FeatureCache.from_tensors(x, [0, 1], ["cat", "dog"])
        >>> prompt = mt.tune(clip, features, epochs=1).solution
        >>> prompt.classnames, known_classes(prompt)
        (None, ('cat', 'dog'))
    """
    if solution.classnames is not None:
        return solution.classnames
    if noted := _noted_classes(solution.notes):
        return noted
    parts = solution.parts if isinstance(solution, Stack) else ()
    return next((names for part in reversed(parts) if (names := known_classes(part))), None)


def given_names(solution: Any, classnames: Sequence[str]) -> tuple[str, ...]:
    """Class names that a user gives for a prediction or a file, as a tuple. Each name stands there once.

    The names that a solution knows are taken as they are: those of ImageNet repeat some.

    Args:
        solution: the solution, or zero-shot templates.
        classnames: the names.

    Raises:
        TypeError: a single text instead of a list.
        ValueError: no name, an empty one, or the same one twice.
    """
    names = check_classnames(classnames)
    if isinstance(solution, Solution) and names == known_classes(solution):
        return names
    first: dict[str, int] = {}
    for place, name in enumerate(names, start=1):
        if first.setdefault(name, place) != place:
            raise ValueError(
                f"classnames must not repeat, got {name!r} at positions {first[name]} and {place}: leave one out"
            )
    return names


def _noted_classes(notes: Any) -> tuple[str, ...] | None:
    """The training classes in the notes of a solution; None if the notes hold none."""
    if not isinstance(notes, dict):
        return None
    settings = notes.get("settings")
    names = settings.get("classnames") if isinstance(settings, dict) else None
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) and name.strip() for name in names):
        return tuple(names)
    experts = notes.get("experts")
    found = {_noted_classes(expert) for expert in experts} if isinstance(experts, list) else set()
    return found.pop() if len(found) == 1 else None


def interpolate(a: Solution, b: S, t: float) -> S:
    """The solution at ``t`` on the line from a (t = 0) to b (t = 1): its state is ``(1 - t) a + t b``.

    A kind may define another line for its states, see :meth:`Solution.between`.

    Args:
        a, b: solutions of one kind and shape. The result has the logit scale, texts and notes of b, without the
            temperature: it was fitted to the logits of b.
        t: position on the line; values outside [0, 1] extrapolate.

    Raises:
        TypeError: two different kinds.
        ValueError: shapes, classes, texts or logit scales differ.

    Example:
        >>> import mergetune as mt, torch
        >>> a, b = (mt.Head(torch.full((2, 2), x), ("cat", "dog")) for x in (0.0, 1.0))
        >>> mt.interpolate(a, b, 0.25).weight
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    a, b = in_one_form([a, b], b)
    check_compatible(a, b)
    found = b.between(stacked(a.state()), stacked(b.state()), t)
    notes = {name: value for name, value in b.notes.items() if name != TEMPERATURE}
    return b.with_state({name: tensor[0] for name, tensor in found.items()}, notes=notes)


def in_one_form(solutions: Sequence[Any], like: Solution) -> list[Any]:
    """The solutions in the form of ``like``, which is one of them. If one head has a bias, all have: of zeros."""
    if isinstance(like, Head) and any(isinstance(other, Head) and other.bias is not None for other in solutions):
        like = like.with_bias()
    return [solution.in_form_of(like) for solution in solutions]


def check_compatible(a: Solution, b: Solution, *, space: str = "parameter") -> None:
    """Check that a line joins two solutions.

    Args:
        a, b: the ends of the line.
        space: "parameter" checks the line of states, "embedding" the line of class embeddings.

    Raises:
        TypeError: two different kinds.
        ValueError: shapes, classes, texts or logit scales differ.
    """
    if type(a) is not type(b):
        raise TypeError(
            f"solutions on one path must be of one kind, got {a.kind} and {b.kind}: for a zero-shot end take "
            "b.zero_shot_points(clip, classnames, templates)[0]; below a residual or a map, Templates with Stack"
        )
    a.check_line(b, space=space)
