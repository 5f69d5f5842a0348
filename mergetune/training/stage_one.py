"""Stage 1: tune() trains a prompt, a head, a class residual or an image map on cached features, or a LoRA on pixels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergetune import ops
from mergetune.clip import PRECISIONS, FrozenClip, check_templates
from mergetune.clip.backbone import check_clip
from mergetune.data import Batches
from mergetune.data.batches import check_batches
from mergetune.facts import TuneOptions, recorded
from mergetune.facts.function_options import (
    LORA_STEPS,
    TOP_METHODS,
    TOWER_METHODS,
    TUNE_SETTINGS,
    check_method,
    check_types,
    options_of,
)
from mergetune.solutions import Head, LinearMap, LoRA, Prompt, Residual, Solution, Stack, Templates, space_of, stacked
from mergetune.solutions.exports import as_head
from mergetune.training.jobs import Job, check_cuda_graph, check_features, tower_precision, training_of, without_sgd
from mergetune.training.loop import train_together
from mergetune.training.objective import Near, Objective
from mergetune.training.run_settings import solution_in_words
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
    zero_shot: str | Sequence[str] | Solution | None = None,
    kg_weight: float = 8.0,
    lam: float | None = None,
    rank: int = 2,
    alpha: float = 1.0,
    parts: str | Sequence[str] = ("q", "k", "v"),
    tower: str = "both",
    last_blocks: int | None = None,
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
    """Stage 1: fine-tune a solution of one kind on few-shot images, most kinds on their cached features.

    Args:
        clip: the frozen CLIP that the features come from. Where ``zero_shot`` or ``base`` is a head, a
            :class:`mergetune.FeatureSpace` is enough for the methods "head", "residual" and "map".
        features: few-shot features of the classes to learn; for a LoRA of the image tower their pixels, see
            :class:`mergetune.data.PixelBatches`.
        method: what is trained:

            - "coop": a prompt (arXiv 2109.01134);
            - "kgcoop": a prompt near the zero-shot class embeddings (arXiv 2303.13283), with the loss cross-entropy +
              ``kg_weight`` * mean(1 - cos);
            - "head": a linear head that starts at the zero-shot weights;
            - "residual": a vector per class that is added to the class embeddings of ``base``;
            - "map": a matrix on image features, with the class embeddings of ``base``;
            - "lora": low-rank changes of weights of the towers (CLIP-LoRA, arXiv 2405.18541), without the dropout that
              the published code applies to the inputs of the adapted layers.

            "residual" and "map" return a :class:`mergetune.Stack` of the unchanged base and the trained part.
        base: solution below a residual or a map. None takes the zero-shot class embeddings of ``zero_shot``.
        template: text whose words the context vectors start from; for a head, its zero-shot text.
        n_ctx: number of context vectors that start at random values; None starts from the words of ``template``.
        class_specific: train separate context vectors for each class.
        position: place of the class name, "end", "middle" or "front" (CoOp's CLASS_TOKEN_POSITION).
        zero_shot: templates of the zero-shot class embeddings, or a solution that has them, to which KgCoOp stays near
            and at which a head, a residual or a map starts. None takes ``template``. A head that starts at a solution
            keeps its logits: rows, bias and scale.
        kg_weight: weight of KgCoOp's distance.
        lam: weight of the distance to the base: ``lam * mean_c 1/2 |r_c|^2`` for a residual r,
            ``lam * |A - I|^2`` for a map A. None takes 8 for a residual, 0.5 for a map.
        rank, alpha, parts, tower, last_blocks: the weights that a LoRA adapts, and how, see :meth:`LoRA.start`.
        epochs, batch_size, lr, optimizer, momentum, weight_decay, warmup_epochs, warmup_lr: optimiser and schedule, see
            :class:`mergetune.training.jobs.Training`. None takes the method's default: for prompts and heads SGD, 50
            epochs, 32 images per step, lr 2e-3; for residuals and maps Adam, 300 steps of all images, lr 1e-3; for a
            LoRA AdamW, 500 steps per shot, 32 images per step, lr 2e-4.
        seed: seed of the random start and of the batch order.
        precision: precision of the towers, "float32", "bfloat16", or "auto" for the faster one on this device; for a
            LoRA "auto" is "float32". The trained tensors, the optimiser and the loss are float32.
        backend: implementation of the fused loss, see :func:`mergetune.ops.lmc_loss`.
        cuda_graph: capture one step as a CUDA graph and replay it; needs a CLIP on a GPU.
        val: validation features that select the best epoch. Do not pass the test set.
        resume: folder for the state of the run. If the run is killed, the same call continues after its last epoch.
        progress: show a progress bar if stderr is a terminal.

    Returns:
        The trained solution, with history, settings and timings.

    Raises:
        ValueError: an argument is out of range, or base, features and CLIP do not belong together.
        FloatingPointError: a term of the loss became NaN or infinite.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> x = clip.class_embeddings(["cat", "dog"], "an icon of a {}")  # in place of image features
        >>> features = mt.FeatureCache.from_tensors(x, [0, 1], ["cat", "dog"])
        >>> prompt = mt.tune(clip, features, method="coop", epochs=1).solution
        >>> stack = mt.tune(clip, features, method="residual", base=prompt, epochs=1).solution
        >>> prompt.kind, [part.kind for part in stack.parts]
        ('prompt', ['prompt', 'residual'])
    """
    job = tune_job(
        clip, features,
        method=method, base=base, template=template, n_ctx=n_ctx, class_specific=class_specific, position=position,
        zero_shot=zero_shot, kg_weight=kg_weight, lam=lam, rank=rank, alpha=alpha, parts=parts, tower=tower,
        last_blocks=last_blocks, precision=precision, epochs=epochs, batch_size=batch_size, lr=lr, optimizer=optimizer,
        momentum=momentum, weight_decay=weight_decay, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, seed=seed,
        backend=backend, cuda_graph=cuda_graph, val=val, resume=resume, progress=progress,
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
    """Check the arguments of :func:`tune` and return the run as a job, for :func:`train_together`.

    Args:
        clip, features, base, val, resume, progress: see :func:`tune`.
        given: the other options of :func:`tune`, see :class:`mergetune.facts.TuneOptions`.
    """
    check_clip(clip)
    check_batches(features)
    if val is not None:
        check_batches(val, "val")
    options = TuneOptions(**given)
    if options.method not in TUNE_SETTINGS:
        raise ValueError(f"method must be one of {', '.join(TUNE_SETTINGS)}, got {options.method!r}")
    check_types(options)
    on_base = options.method in TOP_METHODS
    _check_options(options, base, on_base=on_base)
    base = None if base is None else base.for_clip(clip)
    check_method(options)
    settings = TUNE_SETTINGS[options.method]
    options = replace(options, **{name: value for name, value in settings.items() if getattr(options, name) is None})
    if options.epochs is None:
        options = replace(options, epochs=_lora_epochs(features, options))
    training = training_of(options)
    precision = tower_precision(options.precision, clip.device, changes_weights=options.method in TOWER_METHODS)
    check_cuda_graph(options.cuda_graph, clip.device)
    if options.backend is None:
        ops.ensure_verified(clip.device, progress=progress)
    texts = _zero_shot(options)
    start = _start(clip, features.classnames, options, texts, base)
    check_features(clip, start, features, val)
    near = None
    if options.method == "kgcoop":
        names = features.classnames
        of_solution = isinstance(texts, Solution)
        goal = texts.class_embeddings(clip, names) if of_solution else clip.class_embeddings(names, texts)
        near = Near(options.kg_weight, "cosine", goal)
    elif on_base and options.lam is not None:
        unchanged = stacked(start.state(), clip.device)
        near = Near(options.lam, distance=lambda states: start.distance(states, unchanged), name="distance")
    objective = Objective(
        space=space_of(clip, start, features.classnames, precision=PRECISIONS[precision]),
        near=near,
        backend=options.backend,
    )
    with_texts = options.method != "coop" and base is None
    record = {"stage": "tune"} | recorded(
        options,
        zero_shot=None if not with_texts else _recorded(texts),
        kg_weight=options.kg_weight if options.method == "kgcoop" else None,
        parts=_listed(options.parts),
        precision=precision,
    )
    record = without_sgd(record)
    if on_base:
        record["base"] = None if base is None else short_digest(*base.whole_identity)
    else:
        del record["lam"]
    if options.method not in TOWER_METHODS:
        for name in (option.name for option in options_of(TuneOptions) if option.methods == tuple(TOWER_METHODS)):
            del record[name]
    in_words = {} if base is None else {"base": solution_in_words(base)}
    in_words |= {"zero_shot": solution_in_words(texts)} if with_texts and isinstance(texts, Solution) else {}
    return Job(
        clip, objective, start, features, training, record, cuda_graph=options.cuda_graph, val=val, resume=resume,
        progress=progress, in_words=in_words, begins_from=(clip.text_fingerprint, json.dumps(_recorded(texts))),
    )  # fmt: skip


def _zero_shot(options: TuneOptions) -> tuple[str, ...] | Solution:
    """The zero-shot templates, or the solution in their place."""
    given = options.template if options.zero_shot is None else options.zero_shot
    if not isinstance(given, Solution):
        return check_templates(given)
    if options.method in ("coop", "lora"):
        raise ValueError(f"zero_shot must be templates or left out for method {options.method!r}, got a {given.kind}")
    return given


def _recorded(texts: Sequence[str] | Solution) -> list[str] | str:
    return short_digest(*texts.whole_identity) if isinstance(texts, Solution) else list(texts)


def _check_options(options: TuneOptions, base: Solution | None, *, on_base: bool) -> None:
    """Raise ValueError for values out of range and for options that the method does not use."""
    if not (math.isfinite(options.kg_weight) and options.kg_weight >= 0):
        raise ValueError(f"kg_weight must be finite and not negative, got {options.kg_weight!r}")
    if options.lam is not None and not (math.isfinite(options.lam) and options.lam >= 0):
        raise ValueError(f"lam must be finite and not negative, got {options.lam!r}")
    if base is not None and not on_base:
        raise ValueError(
            f"base must be None unless method is {' or '.join(TOP_METHODS)}, got a base for {options.method}"
        )
    if base is not None and options.zero_shot is not None:
        raise ValueError("zero_shot must be None where base is given: the base has the class embeddings")
    if base is not None and not isinstance(base, Solution):
        raise TypeError(f"base must be a solution, got {base!r}: load a file with mergetune.open_solution")


def _start(
    clip: FrozenClip,
    classnames: Sequence[str],
    options: TuneOptions,
    texts: tuple[str, ...] | Solution,
    base: Solution | None,
) -> Solution:
    """The solution at which the method starts: a prompt of words or random vectors, a zero-shot head, or a stack."""
    if options.method in TOP_METHODS:
        below = base if base is not None else texts
        if not isinstance(below, Solution):
            below = Templates(below, backbone=clip.name, fingerprint=clip.text_fingerprint)
        top = Residual.zeros(clip, classnames) if options.method == "residual" else LinearMap.identity_map(clip)
        return Stack(below, top)
    if options.method == "head":
        if isinstance(texts, Solution):
            start = as_head(texts, clip, classnames, whole=False).rescaled(clip.logit_scale)
            known = texts.fingerprint if texts.tower == "image" else None
            return replace(start, backbone=clip.name or texts.backbone, fingerprint=clip.image_fingerprint or known)
        return Head.zero_shot(clip, classnames, texts)
    if options.method == "lora":
        assert not isinstance(texts, Solution)
        return LoRA.start(
            clip, rank=options.rank, alpha=options.alpha, parts=_listed(options.parts), tower=options.tower,
            last_blocks=options.last_blocks, templates=texts, seed=options.seed,
        )  # fmt: skip
    if options.n_ctx is None:
        start = Prompt.from_template(clip, options.template, position=options.position)
        return start.per_class(classnames) if options.class_specific else start
    names = classnames if options.class_specific else None
    return Prompt.random(clip, options.n_ctx, names, seed=options.seed, position=options.position)


def _listed(parts: str | Sequence[str]) -> list[str]:
    return [parts] if isinstance(parts, str) else list(parts)


def _lora_epochs(features: Batches, options: TuneOptions) -> int:
    """The fewest epochs with ``LORA_STEPS`` steps per shot."""
    size = min(options.batch_size or len(features), len(features))
    shots = len(features) / len(features.classnames)
    return math.ceil(LORA_STEPS * shots / (len(features) // size))
