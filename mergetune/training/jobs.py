"""Job: a checked training run before its first step, with optimiser, schedule and objective."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from mergetune.clip import FrozenClip
from mergetune.clip.class_texts import check_texts
from mergetune.data import Batches
from mergetune.data.batches import check_holds
from mergetune.data.cache_identity import check_image_tower
from mergetune.facts.brief import brief
from mergetune.facts.function_options import OPTIMIZERS
from mergetune.solutions import Solution, State
from mergetune.training.objective import Objective

TOWER_PRECISIONS = ("float32", "bfloat16")
LAM_WEIGHT = "lam_effective"  # setting of runs of heads: the weight that lam stands for; version 0.1 did not have it


@dataclass(frozen=True)
class Training:
    """Optimiser and learning-rate schedule: warm-up epochs at a constant rate, then a cosine that falls per epoch.

    The defaults are those of the CoOp family.

    Attributes:
        epochs: number of epochs, including the warm-up.
        batch_size: images per step; None takes all images in each step.
        lr: learning rate at the start of the cosine.
        momentum: momentum of SGD.
        weight_decay: weight decay.
        warmup_epochs, warmup_lr: number of warm-up epochs and their learning rate.
        seed: seed of the batch order, the views and the random path points.
        optimizer: "sgd", "adam" or "adamw".
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
        """Learning rate of an epoch (from 0). As in Dassl, the cosine starts after the warm-up and spans ``epochs``."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.epochs))


@brief()
@dataclass(frozen=True, eq=False)
class Job:
    """A checked training run before its first step; :func:`tune_job` and :func:`fit_job` make one.

    Attributes:
        clip: the frozen CLIP.
        objective: the loss that is minimised.
        start: the solution at which training starts; the result has the same kind.
        features: few-shot training images.
        training: optimiser and schedule.
        settings: all other arguments that the result depends on, JSON-able.
        cuda_graph, val, resume, progress: see :func:`fit`.
        in_words: descriptions of the settings whose values are checksums.
        begins_from: texts that determine ``start``, beside the settings. Its numbers may be computed, and another
            processor rounds them differently, so that their checksum would not be that of the same run there.
        older_settings: the settings that earlier versions recorded with other values: checksums of computed numbers.
        average_with: stacked state with which the trained one is averaged at the end, or None.
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
    in_words: dict[str, Any] = field(default_factory=dict)
    begins_from: tuple[str, ...] = ()
    older_settings: dict[str, Any] = field(default_factory=dict)
    average_with: State | None = None

    def finished(self, state: State) -> State:
        """The state of the result: the trained state, or its mean with ``average_with``."""
        if self.average_with is None:
            return state
        ends = self.average_with, {name: tensor[None] for name, tensor in state.items()}
        return {name: tensor[0] for name, tensor in self.start.between(*ends, 0.5).items()}

    def of_version_0_1(self) -> Job:
        """This run of a head as version 0.1 trained it: ``lam`` is the weight of the surrogate itself."""
        near = self.objective.near
        assert near is not None  # only fit has this setting
        warnings.warn(
            f"resume: {self.resume} holds a run of a head that version 0.1 began: its lam is the weight of the "
            "surrogate itself, not in the unit of the head's loss; give another folder to train with the unit",
            stacklevel=2,
        )
        objective = replace(self.objective, near=replace(near, lam=self.settings["lam"]))
        settings = {name: value for name, value in self.settings.items() if name != LAM_WEIGHT}
        return replace(self, objective=objective, settings=settings)

    @property
    def batches(self) -> int:
        """Number of batches per epoch, full ones only: as in Dassl, an epoch skips the left-over images."""
        return len(self.features) // self.batch_size

    @property
    def batch_size(self) -> int:
        """Images per step; at most the number of training images."""
        size = self.training.batch_size
        return len(self.features) if size is None else min(size, len(self.features))

    @property
    def pace(self) -> Hashable:
        """Key of jobs that can train together: same text encoder, same number of steps per epoch and of epochs."""
        if (
            self.objective.space.encoder is None or self.cuda_graph
        ):  # no encoder to share, or a CUDA graph, which serves one run
            return id(self)
        encoder = id(self.clip), self.features.classnames, self.start.form, self.settings["precision"]
        return encoder, self.batches, self.training.epochs


def training_of(options: Any) -> Training:
    """The optimiser and schedule in the options of :func:`tune` or :func:`fit`."""
    return Training(**{field.name: getattr(options, field.name) for field in fields(Training)})


def without_sgd(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without ``optimizer`` if it is "sgd", so that they equal settings in files of version 0.1."""
    return {name: value for name, value in settings.items() if (name, value) != ("optimizer", "sgd")}


def check_features(clip: FrozenClip, solution: Solution, features: Batches, val: Batches | None) -> None:
    """Check that training and validation images fit the CLIP, the solution and each other.

    Raises:
        ValueError: the images do not fit; the message names the argument and the rule.
    """
    for name, cache in (("features", features), ("val", val)):
        if cache is None:
            continue
        check_holds(cache, solution.image_input, solution.kind, name=name)
        width = getattr(cache, "dim", clip.embed_dim)
        if width != clip.embed_dim:
            raise ValueError(f"{name} must have the embedding's width {clip.embed_dim}, got {width}")
        check_image_tower(clip, cache, name=name)
        if (settings := getattr(cache, "preprocess_cfg", None)) is not None and settings != clip.preprocess_cfg:
            raise ValueError(f"{name} must be preprocessed for {clip.name}, got {settings}: make them with this CLIP")
        if cache.classnames != features.classnames:
            raise ValueError(f"{name} must have the classes of features, got {list(cache.classnames)[:3]}...")
    if len(features.classnames) < 2:
        raise ValueError(f"features must hold at least two classes, got {list(features.classnames)}")
    if solution.tower == "text":
        check_texts(clip, features.classnames)
    counts = torch.bincount(features.labels, minlength=len(features.classnames))
    if (counts == 0).any():
        raise ValueError(
            f"features must hold images of every class, got none of {features.classnames[int(counts.argmin())]!r}"
        )
    # A picture under two names may belong to the dataset; the same name with the same features is a leak.
    if val is not None and (both := features.shared_with(val).tolist()):
        what = f"{val.files[both[0]]!r}" if val.files else f"row {both[0]}"
        raise ValueError(f"val must not share images with features, got {len(both)} in both, {what} among them")


def check_cuda_graph(wanted: bool, device: torch.device, *, random: bool = False) -> None:
    """Raise ValueError if a CUDA graph is wanted without a CUDA device or with random path points."""
    if wanted and device.type != "cuda":
        raise ValueError(f"cuda_graph must be False unless the CLIP is on a CUDA device, got a CLIP on {device}")
    if wanted and random:
        raise ValueError(
            "cuda_graph must be False with grid='random': a graph would repeat the points of the captured step"
        )


def tower_precision(precision: str, device: torch.device, *, changes_weights: bool = False) -> str:
    """Precision of the towers. "auto" gives "bfloat16" if the device multiplies it faster than float32.

    Where weights of the towers are trained, "auto" gives "float32": bfloat16 rounds small changes of weights away.
    """
    if precision not in ("auto", *TOWER_PRECISIONS):
        raise ValueError(f"precision must be one of auto, {', '.join(TOWER_PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if changes_weights:
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"
