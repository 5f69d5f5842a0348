"""Training: tune() makes a fine-tuned solution (stage 1), fit() is MERGETUNE (stage 2); one loop serves both.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm import tqdm

from mergetune import ops
from mergetune.clip import PLAIN, FrozenClip, check_templates, words_before
from mergetune.curvature import fisher_diagonal
from mergetune.evaluate import accuracy
from mergetune.features import FeatureCache
from mergetune.files import jsonable, read_regular_text, remove_parts, require_regular, write_atomically
from mergetune.objective import Batch, Objective, path_points, together
from mergetune.options import SPACES, SURROGATES, TUNE_METHODS, FitOptions, TuneOptions, recorded
from mergetune.solutions import Head, Prompt, Solution, check_compatible, check_same_text, load_solution

RESULT, STATE = "result.json", "state.safetensors"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_PRODUCTS = 1 << 28  # bytes of anchors' products that are kept for all features


@dataclass(frozen=True)
class Training:
    """The published optimiser of CoOp's family: SGD, one warm-up epoch at a constant rate, then cosine by epoch."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2^32, got {self.seed}")
        for name, positive in (("lr", True), ("warmup_lr", True), ("momentum", False), ("weight_decay", False)):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
                raise ValueError(
                    f"{name} must be finite and {'positive' if positive else 'not negative'}, got {value!r}"
                )

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch. The cosine starts after the warm-up and spans all epochs, as in Dassl."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.epochs))


@dataclass(frozen=True, eq=False)
class FitResult:
    """What a training run leaves.

    Attributes:
        solution: what was found.
        history: one entry an epoch: lr, loss, every term of the loss, and val_accuracy where there was a val set.
        settings: every argument that the result depends on, JSON-able.
        timings: seconds, steps, milliseconds a step; of this process alone if the run was resumed. Of runs that were
            trained together each has an equal part of the seconds.
    """

    solution: Solution
    history: tuple[dict[str, float], ...]
    settings: dict[str, Any]
    timings: dict[str, float]

    def save(self, path: str | Path) -> None:
        """Write the solution and ``result.json`` into the folder ``path``."""
        self.solution.save(path)
        record = {"history": self.history, "settings": self.settings, "timings": self.timings, "versions": _versions()}
        write_atomically(Path(path) / RESULT, f"{json.dumps(record, indent=2)}\n".encode())

    @classmethod
    def load(cls, path: str | Path) -> FitResult:
        """Read what :meth:`save` wrote."""
        try:
            record = json.loads(read_regular_text(Path(path) / RESULT))
            return cls(load_solution(path), tuple(record["history"]), record["settings"], record["timings"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{Path(path) / RESULT} is not a result of mergetune: {error}") from error


@dataclass(frozen=True, eq=False)
class Job:
    """A training run before its first step: what :func:`tune` and :func:`fit` check and put together.

    Attributes:
        clip: the frozen CLIP.
        objective: what is minimised.
        start: where; the result is a solution of its kind.
        features: few-shot features.
        training: the optimiser.
        settings: every argument that the result depends on beside start, features, val and clip, JSON-able.
        cuda_graph, val, resume, progress: see :func:`fit`.
    """

    clip: FrozenClip
    objective: Objective
    start: Solution
    features: FeatureCache
    training: Training
    settings: dict[str, Any]
    cuda_graph: bool
    val: FeatureCache | None
    resume: str | Path | None
    progress: bool

    @property
    def batches(self) -> int:
        """Batches an epoch: whole ones only (the last few images wait for the next epoch), as in Dassl."""
        return len(self.features) // self.batch_size

    @property
    def batch_size(self) -> int:
        return min(self.training.batch_size, len(self.features))

    @property
    def pace(self) -> Hashable:
        """Equal for jobs that can go in lockstep: with one text encoder, and as many steps an epoch, and epochs."""
        if isinstance(self.start, Head) or self.cuda_graph:  # there is no encoder to share; a graph is of one run
            return id(self)
        encoder = id(self.clip), self.features.classnames, self.start.form, self.settings["precision"]
        return encoder, self.batches, self.training.epochs


def tune(
    clip: FrozenClip,
    features: FeatureCache,
    *,
    method: str = "coop",
    template: str = "a photo of a {}.",
    n_ctx: int | None = None,
    class_specific: bool = False,
    position: str = "end",
    zero_shot: str | Sequence[str] | None = None,
    kg_weight: float = 8.0,
    epochs: int = 50,
    batch_size: int = 32,
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
    """Stage 1: fine-tune on cached features.

    Args:
        clip: the frozen CLIP that the features come from.
        features: few-shot features of the classes to learn.
        method: "coop" (arXiv 2109.01134), "kgcoop" (arXiv 2303.13283: cross-entropy + ``kg_weight`` * (1 - cos)) or
            "head" (linear head started at the zero-shot weights).
        template: the text whose words the context starts from; for a head its zero-shot text.
        n_ctx: a random start with so many context tokens instead.
        class_specific: a context of its own for every class.
        position: of the class name, "end", "middle" or "front" (CoOp's CLASS_TOKEN_POSITION).
        zero_shot: templates of the class embeddings that KgCoOp stays near and a head starts from; None: ``template``.
        kg_weight: KgCoOp's weight.
        epochs, batch_size, lr: CoOp's are 50, 32, 2e-3.
        momentum, weight_decay, warmup_epochs, warmup_lr: see :class:`Training`.
        seed: of the random start and the order of the batches.
        precision: of the text tower: "float32", "bfloat16", or "auto", the faster one here. What is trained, its
            optimiser and the loss are float32.
        backend: see :func:`mergetune.ops.lmc_loss`.
        cuda_graph: capture a step once and replay it; for a CLIP on a GPU.
        val: features for choosing the best epoch; never the test set.
        resume: a folder for the state of the run; a killed run that is given it again goes on from its last epoch.
        progress: show a bar where stderr is a terminal.
    """
    job = tune_job(
        clip, features,
        method=method, template=template, n_ctx=n_ctx, class_specific=class_specific, position=position,
        zero_shot=zero_shot, kg_weight=kg_weight, precision=precision, epochs=epochs, batch_size=batch_size, lr=lr,
        momentum=momentum, weight_decay=weight_decay, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, seed=seed,
        backend=backend, cuda_graph=cuda_graph, val=val, resume=resume, progress=progress,
    )  # fmt: skip
    return train_together([job])[0]


def tune_job(
    clip: FrozenClip,
    features: FeatureCache,
    *,
    val: FeatureCache | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    **given: Any,
) -> Job:
    """Check and put together a run of :func:`tune`, for :func:`train_together`.

    Args:
        clip, features, val, resume, progress: see :func:`tune`.
        given: options of :class:`mergetune.options.TuneOptions`.
    """
    options = TuneOptions(**given)
    training = _training(options)
    precision = _precision(options.precision, clip.device)
    _check_cuda_graph(options.cuda_graph, clip.device)
    _check_features(clip, features, val)
    if options.backend is None:
        ops.ensure_verified(clip.device, progress=progress)
    if options.method not in TUNE_METHODS:
        raise ValueError(f"method must be one of {', '.join(TUNE_METHODS)}, got {options.method!r}")
    if not (math.isfinite(options.kg_weight) and options.kg_weight >= 0):
        raise ValueError(f"kg_weight must be finite and not negative, got {options.kg_weight!r}")
    if options.method == "head" and (options.class_specific or options.n_ctx is not None):
        raise ValueError(
            f"n_ctx and class_specific are for prompts, got {options.n_ctx}, {options.class_specific} for a head"
        )
    near = check_templates(options.template if options.zero_shot is None else options.zero_shot)
    if options.method == "head":
        start: Solution = Head.zero_shot(clip, features.classnames, near)
    elif options.n_ctx is None:
        start = Prompt.from_template(clip, options.template, position=options.position)
        start = start.per_class(features.classnames) if options.class_specific else start
    else:
        start = Prompt.random(
            clip,
            options.n_ctx,
            features.classnames if options.class_specific else None,
            seed=options.seed,
            position=options.position,
        )
    objective = Objective(
        encode=start.encoder(clip, features.classnames, precision=PRECISIONS[precision]),
        scale=start.scale(clip),
        normalize=start.normalize,
        w1=clip.class_embeddings(features.classnames, near) if options.method == "kgcoop" else None,
        lam=options.kg_weight if options.method == "kgcoop" else 0.0,
        surrogate="cosine",
        backend=options.backend,
    )
    settings = {"stage": "tune"} | recorded(
        options,
        zero_shot=list(near) if options.method != "coop" else None,
        kg_weight=options.kg_weight if options.method == "kgcoop" else None,
        precision=precision,
    )
    return Job(
        clip, objective, start, features, training, settings, cuda_graph=options.cuda_graph, val=val, resume=resume,
        progress=progress,
    )  # fmt: skip


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
        grid: "even", "official", "random" or the points themselves, see :func:`mergetune.objective.path_points`.
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
        given: options of :class:`mergetune.options.FitOptions`.
    """
    options = FitOptions(**given)
    training = _training(options)
    precision = _precision(options.precision, clip.device)
    anchors = [tuned] if isinstance(tuned, Prompt | Head | str) else list(tuned)
    if others := [anchor for anchor in anchors if not isinstance(anchor, Prompt | Head)]:
        raise TypeError(f"tuned must be a Prompt or Head, or several, got {others[0]!r}: load it first")
    if not anchors:
        raise ValueError("tuned must hold at least one solution, got none")
    betas = [float(options.beta)] * len(anchors) if isinstance(options.beta, Real) else [float(b) for b in options.beta]
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
    _check_cuda_graph(options.cuda_graph, clip.device, random=alphas is None)
    # Heads come with the logit scale beside their weight or in it: one unit for all, so that lam and lr mean the same.
    anchors = [anchor.rescaled(clip.logit_scale) if isinstance(anchor, Head) else anchor for anchor in anchors]
    for other in anchors[1:]:
        check_compatible(anchors[0], other)
        if options.space == "parameter":
            check_same_text(anchors[0], other)
    _check_features(clip, features, val)
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
    settings = {"stage": "fit", "tuned": [_digest(anchor.parameter, *_text(anchor)) for anchor in anchors]}
    settings |= recorded(
        options,
        zero_shot=_digest(w1),
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


def _training(options: TuneOptions | FitOptions) -> Training:
    return Training(**{field.name: getattr(options, field.name) for field in fields(Training)})


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
    given = zero_shot if isinstance(zero_shot, Prompt | Head) else None
    templates = () if given is not None else check_templates(PLAIN if zero_shot is None else zero_shot)
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


def _check_features(clip: FrozenClip, features: FeatureCache, val: FeatureCache | None) -> None:
    for name, cache in (("features", features), ("val", val)):
        if cache is None:
            continue
        if cache.dim != clip.embed_dim:
            raise ValueError(f"{name} must have the embedding's width {clip.embed_dim}, got {cache.dim}")
        if cache.fingerprint and cache.fingerprint != clip.image_fingerprint:
            raise ValueError(
                f"{name} must come from this CLIP's image tower {clip.image_fingerprint[:12]}, got "
                f"{cache.fingerprint[:12]}"
            )
        if cache.classnames != features.classnames:
            raise ValueError(f"{name} must have the classes of features, got {list(cache.classnames)[:3]}...")
    if len(features.classnames) < 2:
        raise ValueError(f"features must hold at least two classes, got {list(features.classnames)}")
    counts = torch.bincount(features.labels, minlength=len(features.classnames))
    if (counts == 0).any():
        raise ValueError(
            f"features must hold images of every class, got none of {features.classnames[int(counts.argmin())]!r}"
        )
    # The same picture under two names is the data set's own affair; the same name with the same features is a leak.
    if val is not None and (both := features.shared_with(val).tolist()):
        what = f"{val.files[both[0]]!r}" if val.files else f"row {both[0]}"
        raise ValueError(f"val must not share images with features, got {len(both)} in both, {what} among them")


def train_together(jobs: Sequence[Job]) -> list[FitResult]:
    """Train several runs, in lockstep where they share the text encoder: one call of it serves a step of all of them.

    Each run has its own loss, batches, optimiser, ``val`` and ``resume``, and is up to rounding what it is alone.
    Killed, the same call goes on; runs that are behind catch up first.

    Args:
        jobs: of :func:`tune_job` and :func:`fit_job`.

    Returns:
        Their results, in this order.

    Raises:
        ValueError: jobs with one folder for ``resume``, or folders that hold other runs.
        FloatingPointError: see :func:`fit`; of several runs it says which.
    """
    folders = [Path(job.resume).resolve() for job in jobs if job.resume is not None]
    if repeated := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"resume must be a folder for each run, got {repeated[0]} twice")
    runs = [_Run(job, _which(jobs, i)) for i, job in enumerate(jobs)]  # all are read before any is trained
    for group in _groups(runs):
        _train(group)
    return [run.result() for run in runs]


def _which(jobs: Sequence[Job], i: int) -> str:
    """What an error says of run i, where there are others."""
    if len(jobs) == 1:
        return ""
    return f" of run {i + 1} of {len(jobs)}" + ("" if jobs[i].resume is None else f" ({jobs[i].resume})")


def _groups(runs: Sequence[_Run]) -> Iterator[list[_Run]]:
    """The unfinished runs, in parts that go in lockstep."""
    by_pace: dict[Hashable, list[_Run]] = {}
    for run in runs:
        if len(run.history) < run.job.training.epochs:
            by_pace.setdefault(run.job.pace, []).append(run)
    for alike in by_pace.values():
        parts = 1
        if len(alike) > 1:
            # More prompts in a call, and the tower makes every activation twice: that costs what lockstep saves.
            prompts = max(run.job.objective.prompts for run in alike)
            parts = math.ceil(len(alike) / max(1, alike[0].job.objective.encode.at_once // prompts))
        for part in range(parts):
            yield alike[part::parts]


def _train(runs: Sequence[_Run]) -> None:
    """SGD on objectives from their starts: the loop of both stages, for one run or several in lockstep."""
    job = runs[0].job
    products = {run: _anchor_products(run.job, MAX_PRODUCTS // len(runs)) for run in runs}
    epochs = range(min(len(run.history) for run in runs), job.training.epochs)
    label = job.settings.get("method", "mergetune") + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
    captured = None
    with tqdm(epochs, desc=label, unit="epoch", disable=None if job.progress else True, leave=False) as bar:
        for epoch in bar:
            began, active = time.perf_counter(), [run for run in runs if len(run.history) == epoch]
            records = [run.begin(epoch) for run in active]
            gradients = partial(_gradients, [r.job.objective for r in active], [r.parameter for r in active])
            for step, batches in enumerate(zip(*(run.batches(epoch, products[run]) for run in active), strict=True)):
                if job.cuda_graph and captured is None:
                    captured = _capture(gradients, batches)
                for run, record, found in zip(active, records, (captured or gradients)(batches), strict=True):
                    loss, terms, run.parameter.grad = found
                    run.optimizer.step()
                    record[step] = torch.cat([loss[None], terms])
            for run, record in zip(active, records, strict=True):
                run.end(epoch, record)
            spent = time.perf_counter() - began
            for run in active:
                run.seconds += spent / len(active)
            bar.set_postfix(loss=f"{active[0].history[-1]['loss']:.3f}")


def _gradients(
    objectives: Sequence[Objective], parameters: Sequence[Tensor], batches: Sequence[Batch]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each run's loss of its batch, the terms and the gradient to its parameter, all by one backward."""
    losses, terms = zip(*together(objectives, parameters, batches), strict=True)
    gradients = torch.autograd.grad(losses, parameters)
    return list(zip([loss.detach() for loss in losses], terms, gradients, strict=True))


def _capture(gradients: Callable[..., list[tuple[Tensor, ...]]], batches: Sequence[Batch]) -> Callable[..., list]:
    """The same function as one CUDA graph: batches are copied to where the first ones lie, the results stay in place.

    The optimisers step outside of it, so that their learning rates may change.
    """
    static = [tuple(t.clone() if isinstance(t, Tensor) else t for t in batch) for batch in batches]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries choose their algorithms and take their workspaces here
        for _ in range(3):
            gradients(static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gradients(static)

    def replay(batches: Sequence[Batch]) -> list[tuple[Tensor, ...]]:
        for places, batch in zip(static, batches, strict=True):
            for place, new in zip(places, batch, strict=True):
                if isinstance(place, Tensor):  # neither a generator, which is unused, nor None
                    place.copy_(new, non_blocking=True)
        graph.replay()
        return results

    return replay


def _anchor_products(job: Job, most: int) -> Tensor | None:
    """The anchors' products with all features, [K, N, C], where there is one view of each and few enough bytes."""
    objective, features, device = job.objective, job.features, job.clip.device
    if objective.anchors is None or features.views > 1:
        return None
    shape = len(objective.anchors), len(features), len(features.classnames)
    if objective.space != "embedding" or 4 * math.prod(shape) > most:
        return None
    products = torch.empty(shape, device=device)
    for part in torch.arange(len(features)).split(4096):
        products[:, part] = objective.anchor_products(features.rows(part).to(device))
    return products


class _Run:
    """The state of a training run: what it is made of, its epochs, and how it is kept on disk.

    Every epoch draws from a generator of its own, seeded by (seed, epoch): the state that a resumed run needs is the
    parameter, its momentum and the history, no more.
    """

    def __init__(self, job: Job, which: str) -> None:
        self.job, self.which, training, device = job, which, job.training, job.clip.device
        self.settings = {
            **job.settings,
            "start": _digest(job.start.parameter),
            "features": job.features.digest,
            "val": None if job.val is None else job.val.digest,
            "clip": job.clip.name,
            "classnames": list(job.features.classnames),
        }
        self.names = ("loss", *job.objective.term_names)
        self.labels = job.features.labels.to(device)
        self.parameter = job.start.parameter.detach().float().to(device).clone().requires_grad_()
        self.optimizer = torch.optim.SGD(
            [self.parameter], lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay
        )
        self.history: list[dict[str, float]] = []
        self.best, self.best_epoch = self.parameter.detach().clone(), 0
        self.seconds, self.steps = 0.0, 0
        self.folder = None if job.resume is None else Path(job.resume)
        if self.folder is not None:
            self.read(self.folder)

    def begin(self, epoch: int) -> Tensor:
        """Set the epoch's learning rate; give the place for the loss and terms of its steps."""
        self.optimizer.param_groups[0]["lr"] = self.job.training.lr_at(epoch)
        return torch.zeros(self.job.batches, len(self.names), device=self.job.clip.device)

    def batches(self, epoch: int, products: Tensor | None) -> Iterator[Batch]:
        """The batches of an epoch."""
        features, size = self.job.features, self.job.batch_size
        generator = torch.Generator().manual_seed((self.job.training.seed << 20) + epoch)
        order = torch.randperm(len(features), generator=generator)
        order_there = order.to(self.labels.device)
        for step in range(self.job.batches):
            here = slice(step * size, (step + 1) * size)
            index, there = order[here], order_there[here]
            views = torch.randint(features.views, (len(index),), generator=generator) if features.views > 1 else 0
            x = features.rows(index, views).to(self.labels.device, non_blocking=True)
            yield x, self.labels[there], generator, None if products is None else products[:, there]

    def end(self, epoch: int, record: Tensor) -> None:
        """Check an epoch, evaluate it and write it down."""
        _check_finite(record, self.parameter, self.names, epoch, self.which)
        self.steps += len(record)
        entry = {
            "epoch": epoch + 1,
            "lr": self.job.training.lr_at(epoch),
            **dict(zip(self.names, record.mean(0).tolist(), strict=True)),
        }
        if self.job.val is not None:
            weights = self.job.objective.encode(self.parameter.detach()[None])[0]
            entry["val_accuracy"] = accuracy(weights, self.job.val, normalize=self.job.start.normalize).accuracy
        self.add(entry)
        if self.folder is not None:
            self.write(self.folder)

    def result(self) -> FitResult:
        start, clip = self.job.start, self.job.clip
        fingerprint = clip.image_fingerprint if isinstance(start, Head) else clip.text_fingerprint
        notes = {"settings": self.settings, "best_epoch": self.best_epoch, "start": start.notes}
        return FitResult(
            solution=start.with_parameter(self.best.cpu(), notes=notes, backbone=clip.name, fingerprint=fingerprint),
            history=tuple(self.history),
            settings=self.settings,
            timings={
                "seconds": self.seconds,
                "steps": self.steps,
                "ms_per_step": 1e3 * self.seconds / max(self.steps, 1),
            },
        )

    def add(self, entry: dict[str, float]) -> None:
        """Append an epoch; the best one is that of the highest val accuracy, or the last where there is no val set."""
        scores = [past.get("val_accuracy", -1.0) for past in self.history]
        if "val_accuracy" not in entry or not scores or entry["val_accuracy"] > max(scores):
            self.best, self.best_epoch = self.parameter.detach().clone(), entry["epoch"]
        self.history.append(entry)

    def write(self, folder: Path) -> None:
        """Replace the state on disk in one step, so that a kill leaves the old one or the new one."""
        momentum = self.optimizer.state[self.parameter].get("momentum_buffer")
        tensors = {"parameter": self.parameter.detach(), "best": self.best}
        tensors |= {} if momentum is None else {"momentum": momentum}
        record = {"settings": self.settings, "history": self.history, "best_epoch": self.best_epoch}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        record["digest"] = _digest(*(tensors[name] for name in sorted(tensors)))
        write_atomically(folder / STATE, serialize(tensors, metadata={"run": json.dumps(record)}))

    def read(self, folder: Path) -> None:
        """Take up the state in ``folder``, if there is one; it must be of this very run."""
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"resume must be a folder, got the file {folder}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"resume must be a folder that can be written, got {folder}: {error}") from error
        remove_parts(folder, STATE)
        path = folder / STATE
        if not path.exists():
            return
        try:
            require_regular(path)
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings, history, best_epoch = (record[name] for name in ("settings", "history", "best_epoch"))
            parameter, best = tensors["parameter"], tensors["best"]
            if _digest(*(tensors[name] for name in sorted(tensors))) != record["digest"]:
                raise ValueError("its checksum is wrong")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume: {path} cannot be read ({error}): delete it to start anew") from error
        for name in {**settings, **self.settings}:
            old, new = settings.get(name), jsonable(self.settings.get(name))
            if old != new:
                raise ValueError(
                    f"resume: {folder} holds another run: its {name} is {_short(old)}, this run's is {_short(new)}"
                )
        self.history, self.best_epoch, self.best = history, best_epoch, best.to(self.parameter)
        with torch.no_grad():
            self.parameter.copy_(parameter)
        if "momentum" in tensors:
            self.optimizer.state[self.parameter]["momentum_buffer"] = tensors["momentum"].to(self.parameter)


def _check_finite(record: Tensor, parameter: Tensor, names: Sequence[str], epoch: int, which: str) -> None:
    """One look an epoch, so that the loop never waits for the device."""
    broken = ~record.isfinite()
    if broken.any():
        step = int(broken.any(1).int().argmax())
        terms = broken[step, 1:] if broken[step, 1:].any() else broken[step]
        name = names[int(terms.int().argmax()) + (len(names) - len(terms))]
        value = record[step, names.index(name)].item()
        raise FloatingPointError(
            f"the term {name!r}{which} became {value} at step {epoch * len(record) + step + 1} (epoch {epoch + 1}): "
            "lower lr, or look at the features"
        )
    if not parameter.isfinite().all():
        raise FloatingPointError(
            f"the solution{which} became NaN or infinite at the end of epoch {epoch + 1}: lower lr"
        )


def _check_cuda_graph(wanted: bool, device: torch.device, *, random: bool = False) -> None:
    if wanted and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CLIP on a CUDA device, got {device}")
    if wanted and random:
        raise ValueError("cuda_graph must be False with grid='random': a graph replays the points it was captured with")


def _precision(precision: str, device: torch.device) -> str:
    """The precision of the text tower; "auto" is bfloat16 where the machine multiplies it faster than float32."""
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


def _digest(*parts: Tensor | str) -> str:
    """Short SHA-256 of tensors and texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            part.encode()
            if isinstance(part, str)
            else part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        )
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _versions() -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "unknown"

    return {
        "python": platform.python_version(),
        **{name: of(name) for name in ("mergetune", "torch", "open_clip_torch")},
    }
