"""Stage 2: fit() is MERGETUNE, from the zero-shot and the fine-tuned solutions to one with low-loss paths to both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune import ops
from mergetune.clip import PLAIN, PRECISIONS, FrozenClip, check_templates
from mergetune.data import Batches
from mergetune.facts import FitOptions, recorded
from mergetune.facts.function_options import SPACES, SURROGATES
from mergetune.solutions import (
    Solution,
    Space,
    check_compatible,
    check_same_shapes,
    image_features,
    space_of,
    stack_states,
    stacked,
)
from mergetune.training.curvature import fisher_diagonal
from mergetune.training.jobs import Job, check_cuda_graph, check_features, tower_precision, training_of, without_sgd
from mergetune.training.loop import train_together
from mergetune.training.objective import Anchors, Near, Objective, path_points
from mergetune.training.runs import FitResult, short_digest


def fit(
    clip: FrozenClip,
    features: Batches,
    tuned: Solution | Sequence[Solution],
    *,
    zero_shot: str | Sequence[str] | Solution | None = None,
    lam: float = 8.0,
    beta: float | Sequence[float] = 0.5,
    tau: float = 0.3,
    points: int = 5,
    grid: str | Sequence[float] = "even",
    surrogate: str = "identity",
    space: str = "embedding",
    epochs: int = 50,
    batch_size: int = 128,
    lr: float = 2e-3,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup_epochs: int = 1,
    warmup_lr: float = 1e-5,
    seed: int = 1,
    precision: str = "auto",
    backend: str | None = None,
    cuda_graph: bool = False,
    val: Batches | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> FitResult:
    """MERGETUNE: continue until one solution has a low-loss straight path to the zero-shot and to the fine-tuned ones.

    The defaults are the paper's. The official code's settings are ``lam=10, surrogate="cosine", beta=1.0, tau=1.0,
    grid="official", epochs=100``.

    Args:
        clip: the frozen CLIP that the features come from.
        features: the few-shot features that ``tuned`` was trained on.
        tuned: the fine-tuned solution w2, or several.
        zero_shot: the zero-shot solution w1: one or more templates, or a solution. None is "a photo of a {}.". What tau
            mixes in is the words of the first template with as many tokens as tuned's context, else "a photo of a".
        lam: weight of the surrogate for the zero-shot path, paper 8..16.
        beta: weight of the path to ``tuned``, paper .1 ... 5; one for each of several.
        tau: where the search starts, ``(1 - tau) w1 + tau w2`` in [0, 1]; the mean of several w2.
        points: N points on each path, paper 5..10.
        grid: "even", "official", "random" or the points themselves, see
            :func:`mergetune.training.objective.path_points`.
        surrogate: "identity" (the paper's: 1/2 |t - t1|^2, which on unit class embeddings is 1 - cos), "fisher"
            (diagonal Gauss-Newton), "cosine" or "l2" (official code). On class weights, in both spaces.
        space: "embedding" interpolates class embeddings (official code), "parameter" what is trained; one for heads.
        epochs, batch_size, lr: paper 50, 128, 2e-3.
        optimizer, momentum, weight_decay, warmup_epochs, warmup_lr: see :class:`Training`.
        seed: of the order of the batches, the choice of views and the random grid.
        precision: of the text tower: "float32", "bfloat16", or "auto", the faster one here. What is trained, its
            optimiser and the loss are float32.
        backend: see :func:`mergetune.ops.lmc_loss`.
        cuda_graph: capture a step once and replay it; for a CLIP on a GPU, and not with ``grid="random"``.
        val: features for choosing the best epoch; never the test set.
        resume: a folder for the state of the run; a killed run that is given it again goes on from its last epoch.
        progress: show a bar where stderr is a terminal.

    Raises:
        ValueError: an argument out of its range; solutions, features and CLIP that do not belong together.
        FloatingPointError: a term of the loss became NaN or infinite; says which one and at which step.
    """
    job = fit_job(
        clip, features, tuned,
        zero_shot=zero_shot, lam=lam, beta=beta, tau=tau, points=points, grid=grid, surrogate=surrogate,
        space=space, precision=precision, epochs=epochs, batch_size=batch_size, lr=lr, optimizer=optimizer,
        momentum=momentum, weight_decay=weight_decay, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, seed=seed,
        backend=backend, cuda_graph=cuda_graph, val=val, resume=resume, progress=progress,
    )  # fmt: skip
    return train_together([job])[0]


def fit_job(
    clip: FrozenClip,
    features: Batches,
    tuned: Solution | Sequence[Solution],
    *,
    val: Batches | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    **given: Any,
) -> Job:
    """Check and put together a run of :func:`fit`, for :func:`train_together`.

    Args:
        clip, features, tuned, val, resume, progress: see :func:`fit`.
        given: options of :class:`mergetune.facts.FitOptions`.
    """
    options = FitOptions(**given)
    training = training_of(options)
    precision = tower_precision(options.precision, clip.device)
    anchors = [tuned] if isinstance(tuned, Solution | str) else list(tuned)
    if others := [anchor for anchor in anchors if not isinstance(anchor, Solution)]:
        raise TypeError(f"tuned must be a solution, or several, got {others[0]!r}: load it first")
    if not anchors:
        raise ValueError("tuned must hold at least one solution, got none")
    betas = _betas(options, len(anchors))
    alphas = path_points(options.grid, options.points)
    check_cuda_graph(options.cuda_graph, clip.device, random=alphas is None)
    # Heads come with the logit scale beside their weight or in it: one unit for all, so that lam and lr mean the same.
    anchors = [anchor.rescaled(clip.logit_scale) for anchor in anchors if isinstance(anchor, Solution)]
    solution, classnames = anchors[0], features.classnames
    for other in anchors[1:]:
        check_compatible(solution, other, space=options.space)
        check_same_shapes(solution, other)
    check_features(clip, solution, features, val)
    if options.backend is None:
        ops.ensure_verified(clip.device, progress=progress)

    space = space_of(clip, solution, classnames, precision=PRECISIONS[precision])
    near, w1, start_at = _zero_shot(clip, features, options, solution, space)
    states = stack_states([anchor.state() for anchor in anchors], clip.device)
    start = solution.mean_of(states)
    if start_at is not None:
        start = solution.between(stacked(start_at.state(), clip.device), start, options.tau)
    start = {name: tensor[0] for name, tensor in start.items()}
    paths = Anchors(
        classes=torch.stack([anchor.class_weights(clip, classnames).float() for anchor in anchors]),
        betas=torch.tensor(betas, device=clip.device),
        alphas=None if alphas is None else alphas.to(clip.device),
        points=options.points,
        images=None if space.images is None else _images_of(clip, anchors),
        state=states if options.space == "parameter" else None,
    )
    settings = {"stage": "fit", "tuned": [short_digest(*anchor.identity) for anchor in anchors]}
    settings |= recorded(
        options,
        zero_shot=w1,
        beta=betas,
        points=options.points if alphas is None else len(alphas),
        grid=options.grid if isinstance(options.grid, str) else [float(t) for t in options.grid],
        precision=precision,
    )
    return Job(
        clip, Objective(space, paths, near, options.backend), solution.with_state(start), features, training,
        without_sgd(settings), cuda_graph=options.cuda_graph, val=val, resume=resume, progress=progress,
    )  # fmt: skip


def _betas(options: FitOptions, count: int) -> list[float]:
    """The weight of each path; refuses values out of their range."""
    beta = options.beta
    one = isinstance(beta, Real | float | int)  # Real holds the others too, but not for type checkers
    betas = [float(beta)] * count if one else [float(b) for b in beta]
    if len(betas) != count:
        raise ValueError(f"beta must be one number, or one for each of the {count} solutions, got {len(betas)}")
    for name, values in (("lam", [options.lam]), ("beta", betas)):
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(
                f"{name} must be finite and not negative, got {values if len(values) > 1 else values[0]!r}"
            )
    if not 0 <= options.tau <= 1:
        raise ValueError(f"tau must lie in [0, 1], got {options.tau!r}")
    if options.surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, got {options.surrogate!r}")
    if options.space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {options.space!r}")
    return betas


def _zero_shot(
    clip: FrozenClip, features: Batches, options: FitOptions, tuned: Solution, space: Space
) -> tuple[Near, str, Solution | None]:
    """The surrogate around the zero-shot solution; a digest of that; and the solution that tau mixes in, if any."""
    zero_shot, classnames = options.zero_shot, features.classnames
    given, templates = None, ()
    if isinstance(zero_shot, Solution):
        if type(zero_shot) is not type(tuned):
            raise TypeError(
                f"zero_shot must be a {tuned.kind} or templates where tuned is a {tuned.kind}, got a {zero_shot.kind}"
            )
        given = zero_shot.in_form_of(tuned)
        points: Sequence[Solution] = [given]
        if tuned.surrogate_on == "state":
            check_compatible(given, tuned)
    else:
        templates = check_templates(PLAIN if zero_shot is None else zero_shot)
        points = tuned.zero_shot_points(clip, classnames, templates)
    if not points:
        if options.lam or options.tau < 1:
            raise ValueError(
                f"lam must be 0 and tau 1 for a {tuned.kind}, got {options.lam} and {options.tau}: it has no zero-shot "
                "point in its form"
            )
        return Near(0.0, distance=lambda states: tuned.distance(states, states)), "none", None
    start = _start_at(points, tuned) if options.tau < 1 or tuned.surrogate_on == "state" else None
    if tuned.surrogate_on == "state":
        assert start is not None
        if options.surrogate != "identity":
            raise ValueError(f"surrogate must be identity for a {tuned.kind}, got {options.surrogate!r}")
        w1 = stacked(start.state(), clip.device)
        near = Near(options.lam, distance=lambda states: tuned.distance(states, w1))
        return near, short_digest(*start.identity), start if options.tau < 1 else None
    if given is None:
        classes = tuned.zero_shot_classes(clip, classnames, templates)
    else:
        given.check_classes(classnames)
        classes = given.class_weights(clip, classnames)
    curvature = None
    if options.surrogate == "fisher":
        curvature = fisher_diagonal(features, classes, scale=space.scale, normalize=space.normalize)
    return Near(options.lam, options.surrogate, classes, curvature), short_digest(classes), start


def _start_at(points: Sequence[Solution], tuned: Solution) -> Solution:
    """The first zero-shot point that has the shapes of tuned."""
    for point in points:
        if tuned.starts_at(point):
            return point
    theirs, own = ([list(t.shape) for t in s.state().values()][0] for s in (points[0], tuned))
    raise ValueError(
        f"zero_shot must have tuned's shape {own} for tau < 1, got {theirs}: give a template with as many tokens "
        "before {} as tuned has context vectors, or tau=1 to start at tuned"
    )


def _images_of(clip: FrozenClip, anchors: Sequence[Solution]) -> Callable[[Tensor], Tensor]:
    """What is read of B images -> each anchor's image features, [K, B, D]."""
    own = [image_features(clip, anchor) for anchor in anchors]

    @torch.no_grad()
    def images(x: Tensor) -> Tensor:
        return torch.stack([x if function is None else function(x) for function in own])

    return images
