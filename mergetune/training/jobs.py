"""A training run before its first step: its optimiser and schedule, and what it is put together of."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mergetune.clip import FrozenClip
from mergetune.data import Batches
from mergetune.facts.function_options import OPTIMIZERS
from mergetune.solutions import Solution
from mergetune.training.objective import Objective

TOWER_PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Training:
    """The optimiser and its schedule: warm-up epochs at a constant rate, then a cosine by epoch.

    The defaults beside epochs, batch_size and lr are those of CoOp's family.

    Attributes:
        batch_size: images per step; None is all of them.
        optimizer: "sgd" or "adam".
    """

    epochs: int
    batch_size: int | None
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    seed: int = 1
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0), ("seed", 0)):
            value = getattr(self, name)
            if name == "batch_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
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
    features: Batches
    training: Training
    settings: dict[str, Any]
    cuda_graph: bool
    val: Batches | None
    resume: str | Path | None
    progress: bool

    @property
    def batches(self) -> int:
        """Batches an epoch: whole ones only (the last few images wait for the next epoch), as in Dassl."""
        return len(self.features) // self.batch_size

    @property
    def batch_size(self) -> int:
        size = self.training.batch_size
        return len(self.features) if size is None else min(size, len(self.features))

    @property
    def pace(self) -> Hashable:
        """Key of jobs that can be trained together: same text encoder, same number of steps per epoch and of epochs."""
        if self.objective.space.encoder is None or self.cuda_graph:  # no encoder to share; a graph is of one run
            return id(self)
        encoder = id(self.clip), self.features.classnames, self.start.form, self.settings["precision"]
        return encoder, self.batches, self.training.epochs


def training_of(options: Any) -> Training:
    """The training of :class:`TuneOptions` or :class:`FitOptions`."""
    return Training(**{field.name: getattr(options, field.name) for field in fields(Training)})


def without_sgd(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, without its optimiser if that is SGD: files of version 0.1, which had no other, agree."""
    return {name: value for name, value in settings.items() if (name, value) != ("optimizer", "sgd")}


def check_features(clip: FrozenClip, solution: Solution, features: Batches, val: Batches | None) -> None:
    """Refuse images that do not belong to the CLIP, to the solution, or to each other.

    Raises:
        ValueError: says which.
    """
    for name, cache in (("features", features), ("val", val)):
        if cache is None:
            continue
        if cache.holds != solution.image_input:
            raise ValueError(
                f"{name} must hold what a {solution.kind} reads of images, {solution.image_input}, got {cache.holds}"
            )
        width = getattr(cache, "dim", clip.embed_dim)
        if width != clip.embed_dim:
            raise ValueError(f"{name} must have the embedding's width {clip.embed_dim}, got {width}")
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


def check_cuda_graph(wanted: bool, device: torch.device, *, random: bool = False) -> None:
    if wanted and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CLIP on a CUDA device, got {device}")
    if wanted and random:
        raise ValueError("cuda_graph must be False with grid='random': a graph replays the points it was captured with")


def tower_precision(precision: str, device: torch.device) -> str:
    """The precision of the text tower; "auto" is bfloat16 where the machine multiplies it faster than float32."""
    if precision not in ("auto", *TOWER_PRECISIONS):
        raise ValueError(f"precision must be one of auto, {', '.join(TOWER_PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"
