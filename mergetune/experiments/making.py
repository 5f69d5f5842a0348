"""Trains what `fit` on images chooses from: the fine-tuned solution, MERGETUNE with several settings, other kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mergetune.clip import FrozenClip
from mergetune.data import FeatureCache
from mergetune.evaluation import Classifier, classifier
from mergetune.solutions import Solution, Templates
from mergetune.training import FitResult, fit_job, train_together, tune_job

MERGETUNE, TUNED, ZERO_SHOT, HEAD = "MERGETUNE", "fine-tuned", "zero-shot", "head"
RESIDUAL, MAP_RESIDUAL, ON_MERGETUNE = "zero-shot + residual", "zero-shot + map + residual", "MERGETUNE + residual"
KINDS = (MERGETUNE, ZERO_SHOT, TUNED, HEAD, RESIDUAL, MAP_RESIDUAL, ON_MERGETUNE)
"""The rows that method "auto" chooses from, its default first."""
TRAINED: Mapping[str, tuple[str, ...]] = {
    MERGETUNE: (), ZERO_SHOT: (), TUNED: (), HEAD: ("head",), RESIDUAL: ("residual",),
    MAP_RESIDUAL: ("map", "residual"), ON_MERGETUNE: ("residual",),
}  # fmt: skip
"""Kind -> methods of :func:`mergetune.tune` that :meth:`Making.kind` trains for it."""
SHARED = ("epochs", "precision", "backend")  # options of stage 1 that a head beside prompts is trained with as well


@dataclass(frozen=True, eq=False)
class Making:
    """What all trainings of one call share; each training resumes in a folder of its own.

    Attributes:
        clip: the frozen CLIP.
        templates: zero-shot texts.
        method: method of stage 1, see :func:`mergetune.tune`.
        seed: seed of the trainings.
        tune_options, fit_options: more keyword arguments of :func:`mergetune.tune` and :func:`mergetune.fit`.
        top_options: more keyword arguments of ``tune`` for residuals and maps.
        progress: show bars if stderr is a terminal.
    """

    clip: FrozenClip
    templates: tuple[str, ...]
    method: str = "coop"
    seed: int = 1
    tune_options: Mapping[str, Any] = field(default_factory=dict)
    fit_options: Mapping[str, Any] = field(default_factory=dict)
    top_options: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False

    @property
    def common(self) -> dict[str, Any]:
        return {"zero_shot": self.templates, "seed": self.seed, "progress": self.progress}

    def check(self, classnames: Sequence[str], tuned: Sequence[Solution]) -> None:
        """Check all options on made-up features of these classes, before images are encoded. Nothing is trained.

        Args:
            classnames: the training classes.
            tuned: the fine-tuned solutions; none: stage 1 trains one.

        Raises:
            TypeError, ValueError: see :func:`mergetune.tune` and :func:`mergetune.fit`.
        """
        count = len(classnames)
        x = F.normalize(torch.randn(count, self.clip.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
        features = FeatureCache.from_tensors(x, torch.arange(count), classnames)
        anchors = list(tuned)
        if not anchors:
            job = tune_job(
                self.clip, features, method=self.method, template=self.templates[0], **self.common, **self.tune_options
            )
            anchors = [job.start]
        fit_job(self.clip, features, anchors, **{**self.common, **self.fit_options})

    def tuned(self, features: FeatureCache, folder: Path, *, method: str | None = None) -> FitResult:
        """Stage 1 on these images; with another ``method`` than the own one, only shared options are taken."""
        given = dict(self.tune_options)
        if method is not None and method != self.method:
            given = {name: value for name, value in given.items() if name in SHARED}
        return self._trained(
            features, folder, method=method or self.method, template=self.templates[0], **self.common, **given
        )

    def merged(
        self, features: FeatureCache, anchors: Sequence[Solution], runs: Mapping[Path, Mapping[str, float]]
    ) -> list[FitResult]:
        """Stage 2 with several settings. Runs with prompts train together: they share calls of the text tower.

        Args:
            features: training images.
            anchors: the fine-tuned solutions.
            runs: folder -> ``lam`` and ``tau``.
        """
        jobs = [
            fit_job(self.clip, features, anchors, resume=folder, **self.common, **{**self.fit_options, **setting})
            for folder, setting in runs.items()
        ]
        results = train_together(jobs)
        for folder, result in zip(runs, results, strict=True):
            result.save(folder)
        return results

    def kind(self, name: str, features: FeatureCache, tuned: Solution, merged: FitResult, folder: Path) -> FitResult:
        """A solution of one of :data:`KINDS`.

        Args:
            name: the kind.
            features: training images.
            tuned: the fine-tuned solution.
            merged: MERGETUNE.
            folder: where what is trained here is kept.
        """
        if name == MERGETUNE:
            return merged
        if name == ZERO_SHOT:
            made = Templates(self.templates, backbone=self.clip.name, fingerprint=self.clip.text_fingerprint)
            return FitResult(made, (), {"stage": "none", "zero_shot": list(self.templates)}, {})
        if name == TUNED:
            return FitResult(tuned, (), {"stage": "tune", **tuned.notes.get("settings", {})}, {})
        if name == HEAD:
            return self.tuned(features, folder, method="head")
        base = None
        if name == ON_MERGETUNE:
            base = merged.solution
        elif name == MAP_RESIDUAL:
            base = self._top("map", features, folder / "map", None).solution
        return self._top("residual", features, folder, base)

    def _top(self, method: str, features: FeatureCache, folder: Path, base: Solution | None) -> FitResult:
        given = dict(self.top_options) | ({} if base is None else {"base": base})
        common = self.common | ({} if base is None else {"zero_shot": None})
        return self._trained(features, folder, method=method, template=self.templates[0], **common, **given)

    def _trained(self, features: FeatureCache, folder: Path, **given: Any) -> FitResult:
        (result,) = train_together([tune_job(self.clip, features, resume=folder, **given)])
        result.save(folder)
        return result

    def classifier(self, solution: Solution) -> Classifier:
        """The classifier of a solution; for class names that the solution does not know, zero-shot answers."""
        classify = classifier(self.clip, solution)
        return (
            classify if solution.classnames is None else with_zero_shot(self.clip, classify, solution, self.templates)
        )


def with_zero_shot(clip: FrozenClip, classify: Classifier, solution: Solution, templates: Sequence[str]) -> Classifier:
    """The classifier of a solution of fixed classes, which takes zero-shot weights for any other class names."""
    known = tuple(solution.classnames)

    def weights(names: Sequence[str]) -> torch.Tensor:
        if tuple(names) == known:
            return classify(names)
        zero_shot = clip.logit_scale * clip.class_embeddings(names, templates)
        return F.pad(zero_shot, (0, int(classify.bias)))  # zero-shot has no bias

    return Classifier(weights, classify.images, classify.bias)
