"""Stage 1: tune() fine-tunes a prompt, a head, a class residual or an image map on cached features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergetune import ops
from mergetune.clip import PRECISIONS, FrozenClip, check_templates
from mergetune.data import Batches
from mergetune.facts import TuneOptions, recorded
from mergetune.facts.function_options import TOP_METHODS, TUNE_SETTINGS
from mergetune.solutions import Head, LinearMap, Prompt, Residual, Solution, Stack, Templates, space_of, stacked
from mergetune.training.jobs import Job, check_cuda_graph, check_features, tower_precision, training_of, without_sgd
from mergetune.training.loop import train_together
from mergetune.training.objective import Near, Objective
from mergetune.training.runs import FitResult, short_digest


def tune(
    clip: FrozenClip,
    features: Batches,
    *,
    method: str = "coop",
    base: Solution | None = None,
    template: str = "a photo of a {}.",
    n_ctx: int | None = None,
    class_specific: bool = False,
    position: str = "end",
    zero_shot: str | Sequence[str] | None = None,
    kg_weight: float = 8.0,
    lam: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    optimizer: str | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    warmup_epochs: int | None = None,
    warmup_lr: float | None = None,
    seed: int = 1,
    precision: str = "auto",
    backend: str | None = None,
    cuda_graph: bool = False,
    val: Batches | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> FitResult:
    """Stage 1: fine-tune on cached features.

    Args:
        clip: the frozen CLIP that the features come from.
        features: few-shot features of the classes to learn.
        method: "coop" (arXiv 2109.01134), "kgcoop" (arXiv 2303.13283: cross-entropy + ``kg_weight`` * (1 - cos)),
            "head" (linear head started at the zero-shot weights), "residual" (a vector per class, added to the class
            embeddings of ``base``) or "map" (a matrix on the image features below ``base``). The last two give a
            :class:`mergetune.Stack` of the base, which stays as it is, and what was trained.
        base: of "residual" and "map": a solution. None: the zero-shot class embeddings of ``zero_shot``.
        template: the text whose words the context starts from; for a head its zero-shot text.
        n_ctx: a random start with so many context tokens instead.
        class_specific: separate context vectors for each class.
        position: of the class name, "end", "middle" or "front" (CoOp's CLASS_TOKEN_POSITION).
        zero_shot: templates of the class embeddings that KgCoOp stays near, and that a head, a residual or a map starts
            from; None: ``template``.
        kg_weight: KgCoOp's weight.
        lam: weight of the distance to the base. A residual r costs ``lam`` times the mean over classes of 1/2 |r|^2; a
            map A costs ``lam |A - I|^2``. None: 8 and 0.5.
        epochs, batch_size, lr, optimizer, momentum, weight_decay, warmup_epochs, warmup_lr: see :class:`Training`.
            None: the method's own, of CoOp's family SGD with 50 epochs, 32 images per step, 2e-3; of a residual and a
            map Adam with 300 steps of all images, 1e-3.
        seed: of the random start and the order of the batches.
        precision: of the text tower: "float32", "bfloat16", or "auto", the faster one here. What is trained, its
            optimiser and the loss are float32.
        backend: see :func:`mergetune.ops.lmc_loss`.
        cuda_graph: capture a step once and replay it; for a CLIP on a GPU.
        val: features for choosing the best epoch; never the test set.
        resume: a folder for the state of the run; a killed run that is given it again goes on from its last epoch.
        progress: show a bar where stderr is a terminal.

    Raises:
        ValueError: an argument out of its range; a base and features that do not belong together.
        FloatingPointError: a term of the loss became NaN or infinite.
    """
    job = tune_job(
        clip, features,
        method=method, base=base, template=template, n_ctx=n_ctx, class_specific=class_specific, position=position,
        zero_shot=zero_shot, kg_weight=kg_weight, lam=lam, precision=precision, epochs=epochs, batch_size=batch_size,
        lr=lr, optimizer=optimizer, momentum=momentum, weight_decay=weight_decay, warmup_epochs=warmup_epochs,
        warmup_lr=warmup_lr, seed=seed, backend=backend, cuda_graph=cuda_graph, val=val, resume=resume,
        progress=progress,
    )  # fmt: skip
    return train_together([job])[0]


def tune_job(
    clip: FrozenClip,
    features: Batches,
    *,
    base: Solution | None = None,
    val: Batches | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    **given: Any,
) -> Job:
    """Check and put together a run of :func:`tune`, for :func:`train_together`.

    Args:
        clip, features, base, val, resume, progress: see :func:`tune`.
        given: options of :class:`mergetune.facts.TuneOptions`.
    """
    options = TuneOptions(**given)
    if options.method not in TUNE_SETTINGS:
        raise ValueError(f"method must be one of {', '.join(TUNE_SETTINGS)}, got {options.method!r}")
    on_base = options.method in TOP_METHODS
    _check_options(options, base, on_base=on_base)
    settings = TUNE_SETTINGS[options.method]
    options = replace(options, **{name: value for name, value in settings.items() if getattr(options, name) is None})
    training = training_of(options)
    precision = tower_precision(options.precision, clip.device)
    check_cuda_graph(options.cuda_graph, clip.device)
    if options.backend is None:
        ops.ensure_verified(clip.device, progress=progress)
    texts = check_templates(options.template if options.zero_shot is None else options.zero_shot)
    start = _start(clip, features.classnames, options, texts, base)
    check_features(clip, start, features, val)
    near = None
    if options.method == "kgcoop":
        near = Near(options.kg_weight, "cosine", clip.class_embeddings(features.classnames, texts))
    elif on_base and options.lam is not None:
        unchanged = stacked(start.state(), clip.device)
        near = Near(options.lam, distance=lambda states: start.distance(states, unchanged))
    objective = Objective(
        space=space_of(clip, start, features.classnames, precision=PRECISIONS[precision]),
        near=near,
        backend=options.backend,
    )
    with_texts = options.method != "coop" and base is None
    record = {"stage": "tune"} | recorded(
        options,
        zero_shot=list(texts) if with_texts else None,
        kg_weight=options.kg_weight if options.method == "kgcoop" else None,
        precision=precision,
    )
    record = without_sgd(record)
    if on_base:
        record["base"] = None if base is None else short_digest(*base.identity)
    else:
        del record["lam"]
    return Job(
        clip, objective, start, features, training, record, cuda_graph=options.cuda_graph, val=val, resume=resume,
        progress=progress,
    )  # fmt: skip


def _check_options(options: TuneOptions, base: Solution | None, *, on_base: bool) -> None:
    """Refuse options that the method does not look at, and values out of their range."""
    if not (math.isfinite(options.kg_weight) and options.kg_weight >= 0):
        raise ValueError(f"kg_weight must be finite and not negative, got {options.kg_weight!r}")
    if options.lam is not None and not (math.isfinite(options.lam) and options.lam >= 0):
        raise ValueError(f"lam must be finite and not negative, got {options.lam!r}")
    if options.lam is not None and not on_base:
        raise ValueError(f"lam is for {' and '.join(TOP_METHODS)}, got {options.lam!r} for {options.method}")
    if base is not None and not on_base:
        raise ValueError(f"base is for {' and '.join(TOP_METHODS)}, got one for {options.method}")
    if base is not None and not isinstance(base, Solution):
        raise TypeError(f"base must be a solution, got {base!r}: load it first")
    if (options.class_specific or options.n_ctx is not None) and options.method not in ("coop", "kgcoop"):
        raise ValueError(
            f"n_ctx and class_specific are for prompts, got {options.n_ctx}, {options.class_specific} for a "
            f"{options.method}"
        )


def _start(
    clip: FrozenClip, classnames: Sequence[str], options: TuneOptions, texts: Sequence[str], base: Solution | None
) -> Solution:
    """Where the method starts: words, random vectors, the zero-shot head, or the unchanged base."""
    if options.method in TOP_METHODS:
        below = Templates(tuple(texts), backbone=clip.name, fingerprint=clip.text_fingerprint) if base is None else base
        top = Residual.zeros(clip, classnames) if options.method == "residual" else LinearMap.identity_map(clip)
        return Stack(below, top)
    if options.method == "head":
        return Head.zero_shot(clip, classnames, texts)
    if options.n_ctx is None:
        start = Prompt.from_template(clip, options.template, position=options.position)
        return start.per_class(classnames) if options.class_specific else start
    names = classnames if options.class_specific else None
    return Prompt.random(clip, options.n_ctx, names, seed=options.seed, position=options.position)
