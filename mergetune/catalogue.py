"""The merging methods by name: their options from text, and how they are applied to solutions and to files.

Shapes: K experts, B batch, C classes, D embedding width, n context tokens, W text-tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune import merging
from mergetune.clip import FrozenClip
from mergetune.curvature import fisher_diagonal
from mergetune.evaluate import accuracy
from mergetune.facts import Kind, read_options
from mergetune.features import FeatureCache
from mergetune.files import write_atomically
from mergetune.geometry import cross_entropy
from mergetune.merging import StateDict, TensorFile
from mergetune.merging.methods import Method, find
from mergetune.merging.tensors import facts_of
from mergetune.solutions import Head, Prompt, Solution, check_compatible, check_same_text, inputs

FISHER_IMAGES = 256  # whose gradients make a Fisher diagonal of a prompt: each is a pass through the text tower

AVERAGES = ("average", "metrics_average", "fisher_average")  # of solutions: a base is one of what is averaged


# -- options from text ------------------------------------------------------------------------------------------------


def parse_options(method: str, given: Sequence[str]) -> dict[str, Any]:
    """``["scale=0.3", "weights=1,2"]`` -> keyword arguments of a method.

    Numbers, text and lists with commas; "none" where None is a value; names of safetensors files for state dicts
    (``fishers=a.safetensors,b.safetensors``); for ``evolve`` a method's name, ``space=density:0.1:1,weights:0:1:2`` and
    ``start=density:1,weights:0.5:0.5``.

    Raises:
        ValueError: no ``=``, an option that the method does not have, or a value that is none of its kind; says which
            options there are.
    """
    facts = find(method)
    options = read_options(facts.name, facts.options, given, _KINDS)
    if "method" in options:
        options["method"] = find(options["method"]).load()
    return options


_KINDS = {
    "states": Kind(
        "safetensors files with commas between", lambda text: [TensorFile(file) for file in text.split(",")]
    ),
    "method": Kind("a merging method", str),
}


# -- files ------------------------------------------------------------------------------------------------------------


def merge_files(
    method: str, base: str | Path | None, experts: Sequence[str | Path], out: str | Path, options: Mapping[str, Any]
) -> None:
    """Merge safetensors files into one: streamed where the method works tensor by tensor, else in memory.

    Args:
        method: a name of the catalogue.
        base: a file, or "zeros" or "ones" for experts that are differences already, as LoRA's and IA3's are; or None.
        experts, out, options: files, and the method's options.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the method needs images and a model, or refuses these files.
    """
    facts = find(method)
    if needed := facts.missing(options):
        why = f"-o {needed[0]}=..."
        if needed[0] in facts.from_images and facts.option(needed[0]).kind == "object":
            why = "images and a model, which files of tensors do not have: merge solutions, with --cache"
        elif facts.option(needed[0]).kind == "object":
            why = f"{needed[0]}, which cannot be given as text: call mergetune.merging from Python"
        raise ValueError(f"{facts.name} needs {why} ({facts.needs})")
    function = facts.load()
    if hasattr(function, "plan"):
        merging.merge_files(function, {"zeros": 0.0, "ones": 1.0}.get(base, base), experts, out, **options)
        return
    merged = function(None if base is None else TensorFile(base), [TensorFile(file) for file in experts], **options)
    write_atomically(Path(out), serialize({name: tensor.contiguous() for name, tensor in merged.items()}))


# -- solutions --------------------------------------------------------------------------------------------------------


def state_of(solution: Solution) -> dict[str, Tensor]:
    """What is merged: ``ctx``, or ``weight`` and ``bias``."""
    if isinstance(solution, Prompt):
        return {"ctx": solution.ctx}
    return {"weight": solution.weight} | ({} if solution.bias is None else {"bias": solution.bias})


def needs_base(method: str, experts: int, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a method needs the zero-shot solution beside so many experts."""
    facts = find(method)
    if facts.name == "evolve" and options and "method" in options:
        facts = facts_of(options["method"])
    elif facts.name == "evolve":
        facts = find(facts.option("method").default)
    return bool(facts.base) or (facts.base is None and experts < 2)


def merge_solutions(
    method: str,
    experts: Sequence[Solution],
    *,
    base: Solution | None = None,
    clip: FrozenClip | None = None,
    features: FeatureCache | None = None,
    options: Mapping[str, Any] | None = None,
) -> Solution:
    """Merge prompts, shared or class-specific, or heads.

    Args:
        method: a name of the catalogue.
        experts: solutions of one kind and shape; heads are brought to the logit scale of the first.
        base: the zero-shot solution; may be None for methods that do not need it. Where an average is given one, it is
            averaged too, as the first (``AVERAGES``).
        clip, features: for methods that need data: cached image features and their CLIP. Fisher diagonals and second
            moments are expected squared gradients over them; AdaMerging and Expert Merging learn on them without their
            labels; ``metrics_average`` takes its losses, ``evolve`` and ``natural_niches`` the labels that they score.
            Never those that a figure is reported on.
        options: of the method. ``evolve`` without options searches one coefficient for each expert in [0, 1].

    Returns:
        A solution like the first expert; its notes say how it was made.

    Raises:
        TypeError, ValueError: solutions that do not go together; a method that is not meaningful for them, with the
            reason; data that is missing.
    """
    facts, options = find(method), dict(options or {})
    method = facts.name
    if not experts:
        raise ValueError("experts must hold at least one solution, got none")
    first = experts[0]
    solutions = [s.rescaled(first.logit_scale) if isinstance(s, Head) and isinstance(first, Head) else s
                 for s in [*experts, *([] if base is None else [base])]]  # fmt: skip
    for other in solutions[1:]:
        check_compatible(first, other)
        check_same_text(first, other)
    if base is None and needs_base(method, len(experts), options):
        raise ValueError(f"{method} of {len(experts)} expert(s) needs a base, the zero-shot solution, got None")
    states = [state_of(solution) for solution in solutions]
    start, states = (states[-1], states[:-1]) if base is not None else (None, states)
    if start is not None and method in AVERAGES:
        start, states = None, [start, *states]
    given = {name: value for name, value in options.items() if not callable(value)}
    notes = {
        "merged": method,
        "options": {name: v if isinstance(v, int | float | str | list | None) else str(v) for name, v in given.items()},
        "base": None if base is None else base.notes or getattr(base, "template", "zero-shot"),
        "experts": [expert.notes for expert in experts],
        "data": facts.images,
    }
    if method == "compeft":
        density = {name: options[name] for name in ("density",) if name in options}
        notes["size"] = asdict(merging.compeft_size(start, states, **density))
    options |= _from_images(facts, options, first, states, clip, features)
    if missing := facts.missing(options):
        raise ValueError(f"{method} needs the option {missing[0]!r} ({facts.needs})")
    merged = facts.load()(start, states, **options)
    parameter = merged["ctx"] if isinstance(first, Prompt) else _joined(merged)
    return first.with_parameter(parameter, notes=notes)


def _joined(state: StateDict) -> Tensor:
    """A head's parameter from its weight and bias."""
    return torch.cat([state["weight"], state["bias"][:, None]], 1) if "bias" in state else state["weight"]


def _from_images(
    method: Method,
    options: Mapping[str, Any],
    like: Solution,
    experts: Sequence[StateDict],
    clip: FrozenClip | None,
    features: FeatureCache | None,
) -> dict[str, Any]:
    """The options that are computed from cached features."""
    wanted = [name for name in method.from_images if name not in options]
    if not wanted:
        return {}
    if clip is None or features is None:
        raise ValueError(f"{method.name} needs cached image features and their CLIP ({method.needs}): give --cache")
    weights = _class_weights(like, clip, features.classnames)
    scale, found = like.scale(clip), {}
    x = features.tensor().to(clip.device)

    def predict(state: StateDict, x: Tensor, k: int = 0) -> Tensor:
        classes = weights(state)
        return scale * inputs(x, classes) @ classes.T

    if method.name == "evolve":
        found["score"] = lambda state: accuracy(weights(state).detach(), features).accuracy
        if "space" not in options and options.get("method") in (None, merging.task_arithmetic):
            found |= {"space": {"weights": (0.0, 1.0, len(experts))}, "fixed": {"scale": 1.0}}
    elif method.name == "natural_niches":
        labels = features.labels.to(x.device)
        found["score"] = lambda state: predict(state, x).argmax(1).eq(labels).double()
    elif "metrics" in wanted:
        losses = [cross_entropy(weights(state).detach(), features, scale=scale) for state in experts]
        found["metrics"] = losses
    elif "predict" in wanted:
        found |= {"predict": predict, "data": [x] * len(experts)}
    else:
        found[wanted[0]] = [_fisher(like, state, clip, features) for state in experts]
    return found


def _class_weights(like: Solution, clip: FrozenClip, classnames: Sequence[str]) -> Callable[[StateDict], Tensor]:
    """State dict -> class weights [C, D], or [C, D + 1], differentiable."""
    if isinstance(like, Head):
        like.class_weights(clip, classnames)  # for its checks
        if tuple(classnames) != like.classnames:
            raise ValueError(f"features must have the head's {len(like.classnames)} classes, got {len(classnames)}")
        return lambda state: _joined(state).to(clip.device)
    encode = like.encoder(clip, classnames)
    last: list[Any] = [None, None]  # AdaMerging asks for the same weights once for each expert

    def weights(state: StateDict) -> Tensor:
        if state["ctx"] is not last[0]:
            last[:] = state["ctx"], F.normalize(encode(state["ctx"].to(clip.device)[None])[0], dim=-1)
        return last[1]

    return weights


def _fisher(like: Solution, state: StateDict, clip: FrozenClip, features: FeatureCache) -> dict[str, Tensor]:
    """Diagonal Fisher information of a solution's parameters on unlabelled features.

    A mean over images in either case, so that experts keep their scales. Heads: :func:`mergetune.fisher_diagonal`.
    Prompts: squared gradients of log p(y | x), with y drawn from p, at up to ``FISHER_IMAGES`` images; each image has a
    copy of the context vectors in one call of the text tower.
    """
    if isinstance(like, Head):
        made = {"scale": like.logit_scale, "normalize": False, "unit_mean": False}
        found = fisher_diagonal(features, _joined(state).to(clip.device), **made).cpu()
        return {"weight": found[:, : features.dim], **({"bias": found[:, -1]} if "bias" in state else {})}
    encode, generator = like.encoder(clip, features.classnames), torch.Generator().manual_seed(0)
    total = torch.zeros_like(state["ctx"])
    chosen = torch.randperm(len(features), generator=generator)[:FISHER_IMAGES]
    for index in chosen.split(32):
        copies = state["ctx"].to(clip.device).expand(len(index), *total.shape).clone().requires_grad_()
        x = features.rows(index).to(clip.device)
        with torch.enable_grad():
            logits = clip.logit_scale * torch.einsum("bd,bcd->bc", x, F.normalize(encode(copies), dim=-1))
            drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(x.device)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), copies)
        total += gradient.square().sum(0).to(total)
    return {"ctx": total / len(chosen)}
