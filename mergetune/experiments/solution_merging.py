"""Merging of solutions: the methods applied to prompts and heads, with what they need from cached features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune import merging
from mergetune.clip import FrozenClip
from mergetune.data import FeatureCache
from mergetune.evaluation import accuracy, cross_entropy
from mergetune.merging import StateDict
from mergetune.merging.catalogue import AVERAGES, needs_base
from mergetune.merging.methods import Method, find
from mergetune.solutions import Head, Prompt, Solution, check_compatible, check_same_text, inputs
from mergetune.training import fisher_diagonal

FISHER_IMAGES = 256  # whose gradients make a Fisher diagonal of a prompt: each is a pass through the text tower


def state_of(solution: Solution) -> dict[str, Tensor]:
    """What is merged: ``ctx``, or ``weight`` and ``bias``."""
    if isinstance(solution, Prompt):
        return {"ctx": solution.ctx}
    return {"weight": solution.weight} | ({} if solution.bias is None else {"bias": solution.bias})


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
    if method == "compeft" and start is not None:
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
