"""Stage 1: tune() fine-tunes a prompt or a head on cached features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergetune import ops
from mergetune.clip import PRECISIONS, FrozenClip, check_templates
from mergetune.data import FeatureCache
from mergetune.facts import TuneOptions, recorded
from mergetune.facts.function_options import TUNE_METHODS
from mergetune.solutions import Head, Prompt, Solution
from mergetune.training.jobs import Job, check_cuda_graph, check_features, tower_precision, training_of
from mergetune.training.loop import train_together
from mergetune.training.objective import Objective
from mergetune.training.runs import FitResult


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
        given: options of :class:`mergetune.facts.TuneOptions`.
    """
    options = TuneOptions(**given)
    training = training_of(options)
    precision = tower_precision(options.precision, clip.device)
    check_cuda_graph(options.cuda_graph, clip.device)
    check_features(clip, features, val)
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
