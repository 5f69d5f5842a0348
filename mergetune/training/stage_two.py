"""Stage 2: fit() is MERGETUNE, from the zero-shot and the fine-tuned solutions to one with low-loss paths to both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune import ops
from mergetune.clip import PLAIN, PRECISIONS, FrozenClip, check_templates, words_before
from mergetune.data import FeatureCache
from mergetune.facts import FitOptions, recorded
from mergetune.facts.function_options import SPACES, SURROGATES
from mergetune.solutions import Head, Prompt, Solution, check_compatible, check_same_text
from mergetune.training.curvature import fisher_diagonal
from mergetune.training.jobs import Job, check_cuda_graph, check_features, tower_precision, training_of
from mergetune.training.loop import train_together
from mergetune.training.objective import Objective, path_points
from mergetune.training.runs import FitResult, short_digest


def fit(
    clip: FrozenClip,
    features: FeatureCache,
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
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup_epochs: int = 1,
    warmup_lr: float = 1e-5,
    seed: int = 1,
    precision: str = "auto",
    backend: str | None = None,
    cuda_graph: bool = False,
    val: FeatureCache | None = None,
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
        momentum, weight_decay, warmup_epochs, warmup_lr: see :class:`Training`.
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
        space=space, precision=precision, epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum,
        weight_decay=weight_decay, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, seed=seed, backend=backend,
        cuda_graph=cuda_graph, val=val, resume=resume, progress=progress,
    )  # fmt: skip
    return train_together([job])[0]


def fit_job(
    clip: FrozenClip,
    features: FeatureCache,
    tuned: Solution | Sequence[Solution],
    *,
    val: FeatureCache | None = None,
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
    anchors = [tuned] if isinstance(tuned, Prompt | Head | str) else list(tuned)
    if others := [anchor for anchor in anchors if not isinstance(anchor, Prompt | Head)]:
        raise TypeError(f"tuned must be a Prompt or Head, or several, got {others[0]!r}: load it first")
    if not anchors:
        raise ValueError("tuned must hold at least one solution, got none")
    beta = options.beta
    one = isinstance(beta, Real | float | int)  # Real holds the others too, but not for type checkers
    betas = [float(beta)] * len(anchors) if one else [float(b) for b in beta]
    if len(betas) != len(anchors):
        raise ValueError(f"beta must be one number, or one for each of the {len(anchors)} solutions, got {len(betas)}")
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
    alphas = path_points(options.grid, options.points)
    check_cuda_graph(options.cuda_graph, clip.device, random=alphas is None)
    # Heads come with the logit scale beside their weight or in it: one unit for all, so that lam and lr mean the same.
    anchors = [anchor.rescaled(clip.logit_scale) if isinstance(anchor, Head) else anchor for anchor in anchors]
    for other in anchors[1:]:
        check_compatible(anchors[0], other)
        if options.space == "parameter":
            check_same_text(anchors[0], other)
    check_features(clip, features, val)
    if options.backend is None:
        ops.ensure_verified(clip.device, progress=progress)

    classnames, solution = features.classnames, anchors[0]
    encode = solution.encoder(clip, classnames, precision=PRECISIONS[precision])
    w1, start_at = _zero_shot(clip, classnames, options.zero_shot, solution, needed=options.tau < 1)
    anchor_parameters = torch.stack([anchor.parameter.float().to(clip.device) for anchor in anchors])
    middle = anchor_parameters.mean(0)
    start = middle if start_at is None else (1 - options.tau) * start_at.to(middle) + options.tau * middle
    weights = torch.stack([anchor.class_weights(clip, classnames).float() for anchor in anchors])
    scale, normalize, curvature = solution.scale(clip), solution.normalize, None
    if options.surrogate == "fisher":
        curvature = fisher_diagonal(features, w1, scale=scale, normalize=normalize)
    objective = Objective(
        encode=encode,
        scale=scale,
        normalize=normalize,
        anchors=weights if options.space == "embedding" else anchor_parameters,
        betas=torch.tensor(betas, device=clip.device),
        alphas=None if alphas is None else alphas.to(clip.device),
        points=options.points,
        space=options.space,
        w1=w1,
        lam=options.lam,
        surrogate=options.surrogate,
        curvature=curvature,
        backend=options.backend,
    )
    settings = {"stage": "fit", "tuned": [short_digest(anchor.parameter, *_text(anchor)) for anchor in anchors]}
    settings |= recorded(
        options,
        zero_shot=short_digest(w1),
        beta=betas,
        points=options.points if alphas is None else len(alphas),
        grid=options.grid if isinstance(options.grid, str) else [float(t) for t in options.grid],
        precision=precision,
    )
    start = solution.with_parameter(start)
    return Job(
        clip, objective, start, features, training, settings, cuda_graph=options.cuda_graph, val=val, resume=resume,
        progress=progress,
    )  # fmt: skip


def _zero_shot(
    clip: FrozenClip,
    classnames: Sequence[str],
    zero_shot: str | Sequence[str] | Solution | None,
    tuned: Solution,
    *,
    needed: bool,
) -> tuple[Tensor, Tensor | None]:
    """The zero-shot class weights [C, D], and the zero-shot parameter (None if it is not ``needed``).

    The parameter of templates is the words of the first that has a token for each of tuned's context vectors, the plain
    "a photo of a" if none has: a dataset's own template, "{} texture.", may have no words in front of the name.
    """
    given, templates = None, ()
    if isinstance(zero_shot, Prompt | Head):
        given = zero_shot
    else:
        templates = check_templates(PLAIN if zero_shot is None else zero_shot)
    if isinstance(tuned, Head):
        if given is None:
            given = Head.zero_shot(clip, classnames, templates, bias=tuned.bias is not None)
        given = given.rescaled(tuned.logit_scale) if isinstance(given, Head) else given
        check_compatible(given, tuned)
        return given.class_weights(clip, classnames), given.parameter
    if isinstance(given, Head):
        raise TypeError("zero_shot must be a prompt or templates where tuned is a prompt, got a head")
    w1 = given.class_weights(clip, classnames) if given else clip.class_embeddings(classnames, templates)
    if not needed:
        return w1, None
    starts = [given] if given else [Prompt.from_template(clip, t) for t in (*templates, PLAIN) if words_before(t)]
    starts = [p.per_class(classnames) if tuned.classnames is not None and p.classnames is None else p for p in starts]
    fitting = [prompt for prompt in starts if prompt.parameter.shape == tuned.parameter.shape]
    if not fitting:
        raise ValueError(
            f"zero_shot must have context vectors of tuned's shape {list(tuned.parameter.shape)} for tau < 1, "
            f"got {list(starts[0].parameter.shape)} from {starts[0].template!r}: give a template with {tuned.n_ctx} "
            "tokens before {}, or tau=1 to start at tuned"
        )
    return w1, fitting[0].parameter


def _text(solution: Solution) -> tuple[str, ...]:
    """What a prompt's embeddings depend on beside its context."""
    return (solution.template, solution.position) if isinstance(solution, Prompt) else ()
