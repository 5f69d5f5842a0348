"""Merging of solutions: the merging methods applied to solutions, with the data that the methods need."""

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
from mergetune.solutions import Solution, Space, check_compatible, inputs, space_of, stacked
from mergetune.solutions.kinds import in_one_form
from mergetune.training import fisher_diagonal

FISHER_IMAGES = 256  # images for the Fisher diagonal of a prompt: each image needs a pass through the text tower


def merge_solutions(
    method: str,
    experts: Sequence[Solution],
    *,
    base: Solution | None = None,
    clip: FrozenClip | None = None,
    features: FeatureCache | None = None,
    options: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> Solution:
    """Merges solutions of one kind into one solution.

    Args:
        method: name of a merging method, see ``mergetune merge METHOD --list``.
        experts: solutions of one kind and shape. Heads are converted to the logit scale and the class
            order of the first expert; a missing bias counts as zeros.
        base: the zero-shot solution; None for methods that do not need it. Averaging methods (``AVERAGES``) average the
            base as well, as the first solution.
        clip, features: cached image features and their CLIP, for methods that need data. Fisher diagonals and second
            moments are means of squared gradients over the images. AdaMerging and Expert Merging learn on the images
            without labels. ``metrics_average`` computes losses, and ``evolve`` and ``natural_niches`` accuracies, with
            labels. Do not use test images.
        options: options of the method. ``evolve`` without options searches one coefficient per expert in [0, 1].
        names: what messages call the experts, such as their files; None numbers them.

    Returns:
        A solution in the form of the first expert; its notes describe the merge.

    Raises:
        TypeError, ValueError: solutions that cannot be merged, a method that cannot be used for them (the message says
            why), or missing data.
    """
    facts, options = find(method), dict(options or {})
    method = facts.name
    if not experts:
        raise ValueError("experts must hold at least one solution, got none")
    if clip is not None:
        experts, base = [expert.for_clip(clip) for expert in experts], None if base is None else base.for_clip(clip)
    solutions = [*experts, *([] if base is None else [base])]
    solutions = in_one_form(solutions, experts[0])
    first = solutions[0]
    called = [f"expert {number}" for number in range(1, 1 + len(experts))] if names is None else names
    for name, other in zip([*called, "the base"][1:], solutions[1:], strict=False):
        try:
            check_compatible(first, other)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{called[0]} and {name} cannot be merged: {error}") from error
    if base is None and needs_base(method, len(experts), options):
        raise ValueError(f"{method} of {len(experts)} expert(s) needs a base, the zero-shot solution, got None")
    if facts.from_images and first.changes_weights:
        raise ValueError(
            f"method must be one without images for a {first.kind}, got {method}: image features of the towers that "
            f"a {first.kind} changes cannot be cached"
        )
    states = [solution.merging_state() for solution in solutions]
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
    return first.with_merged(facts.load()(start, states, **options), notes=notes)


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
    space, found = space_of(clip, like, features.classnames), {}
    x = features.tensor().to(clip.device)
    last: list[Any] = [None, None]  # AdaMerging requests the same weights once per expert

    def weights(state: StateDict) -> Tensor:
        """Class weights that image features are multiplied by, [C, D] or [C, D + 1], differentiable."""
        key = next(iter(state.values()))
        if key is not last[0]:
            last[:] = key, space.unit(space.classes(stacked(state, clip.device)))[0]
        return last[1]

    def images(state: StateDict) -> Callable[[Tensor], Tensor] | None:
        if space.images is None:
            return None
        return lambda x: space.features(stacked(state, clip.device), x)[0]

    def predict(state: StateDict, x: Tensor, k: int = 0) -> Tensor:
        own, classes = images(state), weights(state)
        return space.scale * inputs(x if own is None else own(x), classes) @ classes.T

    if method.name == "evolve":
        found["score"] = lambda state: accuracy(weights(state).detach(), features, images=images(state)).accuracy
        if "space" not in options and options.get("method") in (None, merging.task_arithmetic):
            found |= {"space": {"weights": (0.0, 1.0, len(experts))}, "fixed": {"scale": 1.0}}
    elif method.name == "natural_niches":
        labels = features.labels.to(x.device)
        found["score"] = lambda state: predict(state, x).argmax(1).eq(labels).double()
    elif "metrics" in wanted:
        made = [(weights(state).detach(), images(state)) for state in experts]
        found["metrics"] = [cross_entropy(w, features, scale=space.scale, images=own) for w, own in made]
    elif "predict" in wanted:
        found |= {"predict": predict, "data": [x] * len(experts)}
    else:
        found[wanted[0]] = [_fisher(space, like, state, clip, features) for state in experts]
    return found


def _fisher(
    space: Space, like: Solution, state: StateDict, clip: FrozenClip, features: FeatureCache
) -> dict[str, Tensor]:
    """Returns the diagonal Fisher information of a solution's state on unlabelled features.

    The result is a mean over images, so that experts keep their scales. For a plain head, the result is exact, see
    :func:`mergetune.fisher_diagonal`. For other solutions, it is the mean of squared gradients of log p(y | x), with y
    drawn from p, over at most ``FISHER_IMAGES`` images. One call computes the gradients of 32 images, with one copy of
    the state per image.
    """
    if like.plain_head() is not None:
        made = {"scale": space.scale, "normalize": False, "unit_mean": False}
        found = fisher_diagonal(features, space.classes(stacked(state, clip.device))[0], **made).cpu()
        return {"weight": found[:, : features.dim], **({"bias": found[:, -1]} if "bias" in state else {})}
    generator = torch.Generator().manual_seed(0)
    total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    chosen = torch.randperm(len(features), generator=generator)[:FISHER_IMAGES]
    for index in chosen.split(32):
        copies = {
            name: tensor.to(clip.device).expand(len(index), *tensor.shape).clone().requires_grad_()
            for name, tensor in state.items()
        }
        x = features.rows(index).to(clip.device)
        with torch.enable_grad():
            unit = space.unit(space.classes(copies))
            images = (
                x
                if space.images is None
                else space.features(copies, x).expand(len(index), -1, -1).diagonal(dim1=0, dim2=1).T
            )
            logits = space.scale * torch.einsum("bd,bcd->bc", inputs(images, unit), unit.expand(len(index), -1, -1))
            drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(x.device)
            loss = F.cross_entropy(logits, drawn, reduction="sum")
            gradients = torch.autograd.grad(loss, list(copies.values()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient.square().sum(0).to(total[name])
    return {name: tensor / len(chosen) for name, tensor in total.items()}
