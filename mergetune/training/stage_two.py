"""Stage 2: fit() is MERGETUNE. It trains a solution with low-loss paths to the zero-shot and fine-tuned solutions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune import ops
from mergetune.clip import PLAIN, PRECISIONS, FrozenClip, check_templates
from mergetune.clip.backbone import check_clip
from mergetune.data import Batches
from mergetune.data.batches import check_batches
from mergetune.facts import FitOptions, recorded
from mergetune.facts.function_options import PATH_SETTINGS, SPACES, SURROGATES, check_types
from mergetune.solutions import (
    Solution,
    Space,
    check_compatible,
    check_same_shapes,
    space_of,
    stack_states,
    stacked,
)
from mergetune.training.curvature import fisher_diagonal, head_lam
from mergetune.training.jobs import (
    LAM_WEIGHT,
    Job,
    check_cuda_graph,
    check_features,
    tower_precision,
    training_of,
    without_sgd,
)
from mergetune.training.loop import train_together
from mergetune.training.objective import Anchors, Near, Objective, path_points
from mergetune.training.run_settings import shown, solution_in_words
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
    points: int | None = None,
    grid: str | Sequence[float] | None = None,
    surrogate: str = "identity",
    space: str | None = None,
    weight_ensemble: bool = False,
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
    """MERGETUNE: train one solution w with low-loss straight paths to the zero-shot and to the fine-tuned solutions.

    The loss is cross-entropy + ``lam`` * surrogate(w, zero-shot) + ``beta`` * mean cross-entropy on the path to
    ``tuned``. The defaults are those of the paper (arXiv 2601.10497). The official code uses ``lam=10,
    surrogate="cosine", beta=1.0, tau=1.0, grid="official", epochs=100``.

    Args:
        clip: the frozen CLIP that the features come from. Where ``tuned`` and ``zero_shot`` are heads, a
            :class:`mergetune.FeatureSpace` is enough.
        features: the few-shot features, or for a LoRA of the image tower the pixels, that ``tuned`` was trained on.
        tuned: the fine-tuned solution w2, or several solutions of one kind.
        zero_shot: the zero-shot solution w1, as one or more templates or as a solution. None takes "a photo of a {}.".
            The start of a prompt mixes ``tuned`` with the words of the first template that has as many tokens as
            ``tuned`` has context vectors, or with "a photo of a" if no template has.
        lam: weight of the surrogate of the path to w1; 8 to 16 in the paper. For a head, whose rows have a free
            length, ``lam`` is in the unit of the head's loss, see :func:`mergetune.training.curvature.head_lam`: a head
            and its copy with ``weight * k`` and ``logit_scale / k`` become the same classifier. The result's settings
            hold the weight itself as ``lam_effective``.
        beta: weight of the path to each w2, one number or one per solution; 0.1 to 5 in the paper.
        tau: start of the training, ``(1 - tau) w1 + tau w2``, in [0, 1]; several w2 are averaged.
        points: N, number of points on each path; 5 to 10 in the paper. None takes 5, and 1 for a LoRA.
        grid: "even", "official", "random" or a list of points, see
            :func:`mergetune.training.objective.path_points`. None takes "even", and "random" for a LoRA: one random
            point per step is an unbiased estimate of the path loss.
        surrogate: "identity" (paper: 1/2 |t - t1|^2, which equals 1 - cos for unit class embeddings), "fisher"
            (diagonal Gauss-Newton), "cosine" or "l2" (official code). Prompts and heads are compared by their class
            weights t, in both spaces; other kinds by their states, with "identity" only.
        space: what the paths interpolate: "embedding" the class embeddings (official code), "parameter" the trained
            states. For heads both are the same, and the loss is convex in their weights, so that no path has a barrier:
            the surrogate, not ``beta``, keeps a head near w1. None takes "embedding", and "parameter" for a LoRA.
        weight_ensemble: return the mean of w1 and the trained w, ``(w1 + w) / 2``, which is "MT + WE" in the paper; for
            solutions that have a zero-shot state of the same shape. ``val`` chooses the epoch before the mean is taken.
        epochs, batch_size, lr: 50, 128 and 2e-3 in the paper.
        optimizer, momentum, weight_decay, warmup_epochs, warmup_lr: see :class:`mergetune.training.jobs.Training`.
        seed: seed of the batch order, the views and the random grid.
        precision: precision of the towers, "float32", "bfloat16", or "auto" for the faster one on this device; for a
            LoRA "auto" is "float32". The trained tensors, the optimiser and the loss are float32.
        backend: implementation of the fused loss, see :func:`mergetune.ops.lmc_loss`.
        cuda_graph: capture one step as a CUDA graph and replay it; needs a CLIP on a GPU and a fixed ``grid``.
        val: validation features that select the best epoch. Do not pass the test set.
        resume: folder for the state of the run. If the run is killed, the same call continues after its last epoch.
        progress: show a progress bar if stderr is a terminal.

    Returns:
        The trained solution, of the kind of ``tuned``, with history, settings and timings.

    Raises:
        TypeError: ``tuned`` or ``zero_shot`` is no solution or of another kind.
        ValueError: an argument is out of range, or solutions, features and CLIP do not belong together.
        FloatingPointError: a term of the loss became NaN or infinite; the message names the term and the step.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> x = clip.class_embeddings(["cat", "dog"], "an icon of a {}")  # in place of image features
        >>> features = mt.FeatureCache.from_tensors(x, [0, 1], ["cat", "dog"])
        >>> tuned = mt.tune(clip, features, method="head", epochs=1).solution
        >>> merged = mt.fit(clip, features, tuned, epochs=2).solution
        >>> merged.kind, merged.classnames
        ('head', ('cat', 'dog'))
    """
    job = fit_job(
        clip, features, tuned,
        zero_shot=zero_shot, lam=lam, beta=beta, tau=tau, points=points, grid=grid, surrogate=surrogate,
        space=space, weight_ensemble=weight_ensemble, precision=precision, epochs=epochs, batch_size=batch_size,
        lr=lr, optimizer=optimizer, momentum=momentum, weight_decay=weight_decay, warmup_epochs=warmup_epochs,
        warmup_lr=warmup_lr, seed=seed, backend=backend, cuda_graph=cuda_graph, val=val, resume=resume,
        progress=progress,
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
    """Check the arguments of :func:`fit` and return the run as a job, for :func:`train_together`.

    Args:
        clip, features, tuned, val, resume, progress: see :func:`fit`.
        given: the other options of :func:`fit`, see :class:`mergetune.facts.FitOptions`.
    """
    check_clip(clip)
    check_batches(features)
    if val is not None:
        check_batches(val, "val")
    options = FitOptions(**given)
    check_types(options)
    training = training_of(options)
    anchors = [tuned] if isinstance(tuned, Solution | str) else list(tuned)
    if others := [anchor for anchor in anchors if not isinstance(anchor, Solution)]:
        raise TypeError(
            f"tuned must be a solution, or several, got {others[0]!r}: load a file with mergetune.open_solution"
        )
    if not anchors:
        raise ValueError("tuned must hold at least one solution, got none")
    options = _with_usual_paths(options, changes_weights=anchors[0].changes_weights)
    assert options.space is not None and options.grid is not None and options.points is not None
    precision = tower_precision(options.precision, clip.device, changes_weights=anchors[0].changes_weights)
    betas = _betas(options, len(anchors))
    alphas = path_points(options.grid, options.points)
    check_cuda_graph(options.cuda_graph, clip.device, random=alphas is None)
    # A head's logit scale may be separate or part of its weight. One convention gives lam and lr one meaning.
    anchors = [anchor.for_clip(clip).rescaled(clip.logit_scale) for anchor in anchors if isinstance(anchor, Solution)]
    classnames = features.classnames
    anchors = [anchor.in_order_of(classnames) for anchor in anchors]
    anchors = [anchor.in_form_of(anchors[0]) for anchor in anchors]
    solution = anchors[0]
    if not solution.state():
        raise ValueError(f"tuned must have a state to train, got {solution.kind}: tune a residual or a map on it")
    for other in anchors[1:]:
        check_compatible(solution, other, space=options.space)
        check_same_shapes(solution, other)
    check_features(clip, solution, features, val)
    if options.backend is None:
        ops.ensure_verified(clip.device, progress=progress)

    space = space_of(clip, solution, classnames, precision=PRECISIONS[precision])
    near, w1, older_w1, point = _zero_shot(clip, features, options, solution, space, PRECISIONS[precision])
    states = stack_states([anchor.state() for anchor in anchors], clip.device)
    start = solution.mean_of(states)
    zero_state = None if point is None else stacked(point.state(), clip.device)
    if zero_state is not None and options.tau < 1:
        start = solution.between(zero_state, start, options.tau)
    start = {name: tensor[0] for name, tensor in start.items()}
    own = [_own_space(clip, anchor, solution, space, classnames, PRECISIONS[precision]) for anchor in anchors]
    paths: Anchors | None = Anchors(
        classes=torch.stack([_classes_in(at, anchor, clip) for at, anchor in zip(own, anchors, strict=True)]),
        betas=torch.tensor(betas, device=clip.device),
        alphas=None if alphas is None else alphas.to(clip.device),
        points=options.points,
        images=None if space.images is None or options.space == "parameter" else _images_of(clip, anchors, own),
        state=states if options.space == "parameter" else None,
    )
    if solution.changes_weights and not any(betas):
        paths = None  # each point is a pass through the towers
    settings = {"stage": "fit", "tuned": [short_digest(*anchor.identity) for anchor in anchors]}
    settings |= recorded(
        options,
        zero_shot=w1,
        beta=betas,
        points=options.points if alphas is None else len(alphas),
        grid=options.grid if isinstance(options.grid, str) else [float(t) for t in options.grid],
        precision=precision,
    )
    if solution.surrogate_on == "rows":
        settings[LAM_WEIGHT] = near.lam
    return Job(
        clip, Objective(space, paths, near, options.backend), solution.with_state(start), features, training,
        without_sgd(settings), cuda_graph=options.cuda_graph, val=val, resume=resume, progress=progress,
        average_with=zero_state if options.weight_ensemble else None,
        in_words={
            "tuned": [solution_in_words(anchor) for anchor in anchors],
            "zero_shot": _zero_shot_in_words(options.zero_shot),
        },
        begins_from=(clip.text_fingerprint, w1, *settings["tuned"]),
        older_settings={"zero_shot": older_w1},
    )  # fmt: skip


def _with_usual_paths(options: FitOptions, *, changes_weights: bool) -> FitOptions:
    """The options, with the settings of ``PATH_SETTINGS`` where an option of the paths is None."""
    usual = PATH_SETTINGS[changes_weights]
    if options.grid is not None:  # one point is enough only if it is random
        usual = usual | {"points": PATH_SETTINGS[False]["points"]}
    return replace(options, **{name: value for name, value in usual.items() if getattr(options, name) is None})


def _zero_shot_in_words(zero_shot: Any) -> str:
    if isinstance(zero_shot, Solution):
        return solution_in_words(zero_shot)
    return shown(check_templates(PLAIN if zero_shot is None else zero_shot))


def _betas(options: FitOptions, count: int) -> list[float]:
    """The weight of each path; raises ValueError for options out of range."""
    beta = options.beta
    one = isinstance(beta, Real | float | int)  # Real holds the others too, but not for type checkers
    betas = [float(beta)] * count if one else [float(b) for b in beta]
    if len(betas) != count:
        raise ValueError(f"beta must be one number, or one per solution ({count}), got {len(betas)}")
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
    clip: FrozenClip, features: Batches, options: FitOptions, tuned: Solution, space: Space, precision: torch.dtype
) -> tuple[Near, str, str, Solution | None]:
    """The surrogate around the zero-shot solution w1, digests of w1, and w1 as a state, or None if none is needed.

    The first digest is that of what determines w1; the second, of its computed numbers, is what version 0.1 recorded.
    """
    zero_shot, classnames = options.zero_shot, features.classnames
    given, templates = None, ()
    if isinstance(zero_shot, Solution):
        if type(zero_shot) is not type(tuned):
            raise TypeError(f"zero_shot must be templates or a {tuned.kind}, the kind of tuned, got a {zero_shot.kind}")
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
                f"lam must be 0 and tau 1 for a {tuned.kind}, which has no zero-shot solution, got {options.lam} and "
                f"{options.tau}"
            )
        if options.weight_ensemble:
            raise ValueError(
                f"weight_ensemble must be False for a {tuned.kind}, which has no zero-shot solution, got True"
            )
        return Near(0.0, distance=lambda states: tuned.distance(states, states)), "none", "none", None
    given_as = zero_shot.whole_identity if isinstance(zero_shot, Solution) else ()
    digest = short_digest(*given_as or (clip.text_fingerprint, json.dumps(templates)))
    needed = options.tau < 1 or options.weight_ensemble
    start = _start_at(points, tuned, options) if needed or tuned.surrogate_on == "state" else None
    if tuned.surrogate_on == "state":
        assert start is not None
        if options.surrogate != "identity":
            raise ValueError(f"surrogate must be identity for a {tuned.kind}, got {options.surrogate!r}")
        w1 = stacked(start.state(), clip.device)
        near = Near(options.lam, distance=lambda states: tuned.distance(states, w1))
        return near, digest, short_digest(*start.identity), start
    if given is None:
        classes = tuned.zero_shot_classes(clip, classnames, templates)
    else:
        given.check_classes(classnames)
        classes = _classes_in(_own_space(clip, given, tuned, space, classnames, precision), given, clip)
    lam, curvature = options.lam, None
    if lam and tuned.surrogate_on == "rows":
        lam = head_lam(lam, features, space.unit(classes), scale=space.scale)
    if options.surrogate == "fisher":
        curvature = fisher_diagonal(features, classes, scale=space.scale, normalize=space.normalize)
    return Near(lam, options.surrogate, classes, curvature), digest, short_digest(classes), start


def _start_at(points: Sequence[Solution], tuned: Solution, options: FitOptions) -> Solution:
    """The first zero-shot solution at which training of tuned can start; raises ValueError if there is none."""
    for point in points:
        if tuned.starts_at(point):
            return point
    theirs, own = ([list(t.shape) for t in s.state().values()][0] for s in (points[0], tuned))
    why, way_on = "tau < 1", "start at tuned with tau=1"
    if options.weight_ensemble:
        why, way_on = "weight_ensemble", "leave weight_ensemble out"
    raise ValueError(
        f"zero_shot must have the shape of tuned, {own}, for {why}, got {theirs}: give a template with as many "
        f"tokens before {{}} as tuned has context vectors, or {way_on}"
    )


# -- anchors, in the precision of the trained solution: at tau 1, w lies on its own anchor -----------------------------


def _own_space(
    clip: FrozenClip, anchor: Solution, tuned: Solution, space: Space, classnames: Sequence[str], precision: torch.dtype
) -> Space:
    """The space of an anchor: that of the trained solution, or one for an anchor with other texts or another length."""
    return space if anchor.form == tuned.form else space_of(clip, anchor, classnames, precision=precision)


@torch.no_grad()
def _classes_in(space: Space, anchor: Solution, clip: FrozenClip) -> Tensor:
    """Class features of an anchor, [C, D], computed as those of the trained solution are."""
    return space.classes(stacked(anchor.state(), clip.device))[0].float()


def _images_of(clip: FrozenClip, anchors: Sequence[Solution], spaces: Sequence[Space]) -> Callable[[Tensor], Tensor]:
    """Function of the inputs of B images that returns the image features of each anchor, [K, B, D]."""
    states = [stacked(anchor.state(), clip.device) for anchor in anchors]

    @torch.no_grad()
    def images(x: Tensor) -> Tensor:
        found = [at.features(state, x) for at, state in zip(spaces, states, strict=True)]
        return torch.stack([x if at.images is None else own[0] for at, own in zip(spaces, found, strict=True)])

    return images
