"""The candidates of a cell: zero-shot, tuned, every merge, ensembles and MERGETUNE, made from training images."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.evaluation import Classifier
from mergetune.experiments.cells import Fold
from mergetune.experiments.engine import Candidate, Together
from mergetune.experiments.solution_merging import merge_solutions
from mergetune.facts import CompareOptions, FitOptions, TuneOptions
from mergetune.facts.function_options import PATH_SETTINGS, TUNE_METHODS, used_by
from mergetune.merging.catalogue import AVERAGES, needs_base
from mergetune.merging.methods import METHODS
from mergetune.solutions import Solution, interpolate, zero_shot_like
from mergetune.training import FitResult, Job, fit_job, train_together, tune_job
from mergetune.training.runs import RESULT

MIX = (0.5, 0.25, 0.75)
MERGE_GRIDS: dict[str, dict[str, tuple]] = {
    "wise_ft": {"alpha": MIX},
    "slerp": {"t": MIX},
    "ties": {"density": (0.2, 0.5), "scale": (1.0, 0.5)},
    "dare": {"density": (0.1, 0.5), "scale": (1.0, 0.5, 0.25)},
    "pcb": {"ratio": (0.1, 0.3), "scale": (1.0, 0.5)},
    "sce": {"density": (0.1, 0.5), "scale": (1.0, 0.5)},
    "delta_guided": {"power": (1.0, 2.0)},
    "ota_ffg": {"density": (0.4, 0.1, 0.8)},
    "compeft": {"density": (0.2, 0.5), "alpha": (1.0, 0.5)},
    "tsv_m": {"scale": (1.0, 0.5)},
    "opcm": {"alpha": (0.5, 0.2)},
    "widen": {"normalize": (False, True), "scale": (1.0, 0.5)},
}
"""Hyper-parameters that are tried, the paper's default first: where validation does not tell them apart it is taken."""
EMBEDDING_METHODS: dict[str, dict[str, Any]] = {
    "average": {}, "wise_ft": {}, "slerp": {}, "task_arithmetic": {}, "ties": {"trim": "tensor"}, "dare": {},
    "pcb": {"scope": "tensor"}, "sce": {}, "delta_guided": {},
}  # fmt: skip
"""Methods that merge class embeddings too. Each class is a tensor of its own: classes do not depend on each other."""
LEFT_OUT = {
    "negate": "it makes a model forget its experts",
    "layerwise": "it takes coefficients as they are; adamerging and expert_merging learn them",
}
LABELLED = "training images, labelled"
SAME_AS_WISE_FT = ("average", "task_arithmetic")  # with one expert and the zero-shot solution


@dataclass(frozen=True, eq=False)
class Candidates:
    """All of a cell.

    Attributes:
        found: the candidates, row by row, a method's default first.
        together: what encodes them.
        left_out: method and number of experts -> why it is not compared.
    """

    found: list[Candidate]
    together: Together
    left_out: dict[str, str]

    def class_weights(self, classnames: Sequence[str]) -> tuple[Tensor, list[float]]:
        """Class weights of all candidates, [candidates, C, D], and the seconds that each took beside the encoding."""
        self.together.encode(classnames)
        weights, seconds = [], []
        for candidate in self.found:
            began = time.perf_counter()
            weights.append(candidate.classify(classnames))
            seconds.append(time.perf_counter() - began)
        return torch.stack(weights).cpu(), seconds


def candidates(
    clip: FrozenClip, fold: Fold, setup: CompareOptions, folder: Path, *, progress: bool = False
) -> Candidates:
    """Everything that a cell compares. A fold is all it sees of the images: no test images.

    Raises:
        ValueError: experts that know only their own classes, for a partition into base and novel.
    """
    train(clip, {folder: fold}, setup, progress=progress)
    experts, seconds = _experts(setup, fold, folder)
    first = next(iter(experts.values()))
    together, head = Together(clip), first.plain_head() is not None
    zero_shot = zero_shot_like(clip, first, fold.templates)
    zero = together.classifier(Classifier(partial(clip.class_embeddings, templates=fold.templates)))
    scaled = together.classifier(zero_shot) if head else Classifier(lambda names: clip.logit_scale * zero(names))
    found = [Candidate("zero-shot", scaled, experts=0)]
    found += [
        together.candidate(title, solution, data=LABELLED, seconds=seconds[title])
        for title, solution in experts.items()
    ]
    own = [candidate.classify for candidate in found[1:]]
    left_out: dict[str, str] = {}
    for group in _groups(experts):
        found += _merged(together, fold, zero_shot, group, left_out)
        if not head and all(classify.images is None for classify in own):
            size = sum(solution.numbers for solution in group)
            found += _mixed(clip.logit_scale, zero, own[: len(group)], size)
        found += _mergetuned(together, zero_shot, setup, folder, group, left_out)
    return Candidates(found, together, left_out)


def train(clip: FrozenClip, folds: Mapping[Path, Fold], setup: CompareOptions, *, progress: bool = False) -> None:
    """Train what cells need and is not on disk: all their experts together, then all their MERGETUNE runs together.

    Args:
        clip: the frozen CLIP.
        folds: the cells' folders, and their images. Prompts of cells with the same classes share calls of the
            text tower; what each run finds depends on the others in its rounding only.
        setup: experts, training and grid.
        progress: show bars where stderr is a terminal.

    Raises:
        ValueError: experts that know only their own classes, for a partition into base and novel.
    """
    stage_1, stage_2 = {}, {}
    several = len({expert.split(":")[0] for expert in setup.experts}) > 1  # an option may be for one of the methods
    for folder, fold in folds.items():
        for expert in () if isinstance(setup.experts, Mapping) else setup.experts:
            method, number = expert.split(":")
            given = {"method": method, "template": fold.templates[0], "zero_shot": fold.templates}
            given |= used_by(method, TuneOptions, setup.tune) if several else setup.tune
            seed = fold.seed + 1000 * (int(number) - 1)
            stage_1[_expert(folder, expert)] = partial(tune_job, clip, fold.train, seed=seed, **given)
    _train_missing(stage_1, progress=progress)
    for folder, fold in folds.items():
        for group in _groups(_experts(setup, fold, folder)[0]):
            for _, arguments, run in _tries(setup, folder, len(group)):  # the default may be there twice: one folder
                given = {"seed": fold.seed, "zero_shot": fold.templates} | arguments
                stage_2[run] = partial(fit_job, clip, fold.train, group, **given)
    _train_missing(stage_2, progress=progress)


def _train_missing(jobs: Mapping[Path, Callable[..., Job]], *, progress: bool) -> None:
    """Train the jobs whose folders hold no result, and leave it there."""
    missing = [folder for folder in jobs if not (folder / RESULT).is_file()]
    results = train_together([jobs[folder](resume=folder, progress=progress) for folder in missing])
    for folder, result in zip(missing, results, strict=True):
        result.save(folder)


def _expert(folder: Path, expert: str) -> Path:
    return folder / expert.replace(":", "-")


def _experts(setup: CompareOptions, fold: Fold, folder: Path) -> tuple[dict[str, Solution], dict[str, float]]:
    """The trained experts of a cell and the seconds that they took, or those that are given."""
    if isinstance(setup.experts, Mapping):
        experts, seconds = dict(setup.experts), dict.fromkeys(setup.experts, 0.0)
    else:
        experts, seconds = {}, {}
        for expert in setup.experts:
            method, number = expert.split(":")
            title, result = f"{TUNE_METHODS[method]} {number}", FitResult.load(_expert(folder, expert))
            experts[title], seconds[title] = result.solution, result.timings["seconds"]
    if len(fold.val) > 1 and next(iter(experts.values())).classnames is not None:
        raise ValueError("experts that know only their own classes cannot be tested on novel ones: use partition None")
    return experts, seconds


def _groups(experts: Mapping[str, Solution]) -> list[list[Solution]]:
    """What is merged: the first expert, and all of them."""
    everyone = list(experts.values())
    return [everyone[:1], everyone] if len(everyone) > 1 else [everyone]


def _merged(
    together: Together, fold: Fold, zero_shot: Solution, group: list[Solution], left_out: dict[str, str]
) -> list[Candidate]:
    """Merges of what was trained: context vectors, or head weights."""
    found, count, clip = [], len(group), together.clip
    what = "context vectors" if "ctx" in group[0].state() else "weights"
    for method, facts in METHODS.items():
        same = count == 1 and method in SAME_AS_WISE_FT
        if reason := "with one expert it is WiSE-FT" if same else LEFT_OUT.get(method):
            left_out[f"{method} [{count}]"] = reason
            continue
        scored = method in ("evolve", "natural_niches")  # on validation images: the experts know the training images
        features, data = (next(iter(fold.val.values())), "validation") if scored else (fold.train, "training")
        used = {"none": "none", "labelled images": f"{data} images, labelled"}.get(facts.images, f"{data} images")
        for base in _bases(method, zero_shot, count):
            row = f"{facts.title}{' with zero-shot' if base and method in AVERAGES else ''}, {what} [{count}]"
            try:
                for options in grid_of(method, count):
                    began = time.perf_counter()
                    made = merge_solutions(method, group, base=base, clip=clip, features=features, options=options)
                    spent = time.perf_counter() - began
                    took = {"data": used, "seconds": spent}
                    found.append(together.candidate(row, made, options=options, experts=count, **took))
            except (ValueError, ImportError) as error:
                left_out[f"{method} [{count}]"] = str(error)
    return found


def _bases(method: str, zero_shot: Solution, count: int) -> list[Solution | None]:
    """With and without the zero-shot solution, where both are something."""
    if METHODS[method].base is False or (method == "slerp" and count > 1):
        return [None]
    return [None, zero_shot] if method in AVERAGES and not needs_base(method, count) else [zero_shot]


def _mixed(scale: float, zero_shot: Classifier, experts: list[Classifier], size: int) -> list[Candidate]:
    """Merges of class embeddings, and averages of logits."""

    def mixture(mix: Callable[[Tensor, Tensor], Tensor]) -> Classifier:
        """``mix`` takes unit class embeddings, of zero-shot [C, D] and of the experts [K, C, D]."""

        def classify(names: Sequence[str]) -> Tensor:
            zero, own = zero_shot(names), torch.stack([expert(names) for expert in experts])
            return scale * mix(zero, F.normalize(own[..., : zero.shape[1]], dim=-1))

        return Classifier(classify)

    found, count = [], len(experts)
    for method, fixed in EMBEDDING_METHODS.items():
        facts = METHODS[method]
        fits = facts.least <= count <= (facts.most or count)
        if fits and not (count > 1 and method == "slerp") and not (count == 1 and method in SAME_AS_WISE_FT):
            for options in grid_of(method, count):
                mix = mixture(partial(_by_class, facts.load(), fixed | options))
                row = f"{facts.title}, class embeddings [{count}]"
                found.append(Candidate(row, mix, options, count, parameters=size))
    for t in MIX:
        mix = mixture(partial(_logit_average, t))
        found.append(Candidate(f"logit ensemble with zero-shot [{count}]", mix, {"t": t}, count, parameters=size))
    return found


def _by_class(method: Callable, options: Mapping[str, Any], zero: Tensor, own: Tensor) -> Tensor:
    states = [{str(c): row for c, row in enumerate(rows)} for rows in (zero, *own)]
    merged = method(states[0], states[1:], **options)
    return F.normalize(torch.stack([merged[str(c)] for c in range(len(zero))]), dim=-1)


def _logit_average(t: float, zero: Tensor, own: Tensor) -> Tensor:
    return (1 - t) * zero + t * own.mean(0)


def _mergetuned(
    together: Together,
    zero_shot: Solution,
    setup: CompareOptions,
    folder: Path,
    group: list[Solution],
    left_out: dict[str, str],
) -> list[Candidate]:
    """MERGETUNE with each setting, and "MERGETUNE + WE": its mean with zero-shot, as ``fit(weight_ensemble=True)``."""
    found, means, count = [], [], len(group)
    for options, _, run in _tries(setup, folder, count):
        result = FitResult.load(run)
        how = f"{'chosen' if options else 'defaults'} [{count}]"
        took = {"data": LABELLED, "seconds": result.timings["seconds"], "options": options, "experts": count}
        found.append(together.candidate(f"MERGETUNE, {how}", result.solution, **took))
        try:
            mean = interpolate(zero_shot, result.solution, 0.5)
        except ValueError as error:  # a prompt of another length than the template
            left_out[f"MERGETUNE + WE [{count}]"] = str(error)
            continue
        means.append(together.candidate(f"MERGETUNE + WE, {how}", mean, **took))
    return found + means


def _tries(setup: CompareOptions, folder: Path, count: int) -> list[tuple[dict[str, Any], dict[str, Any], Path]]:
    """What is tried for MERGETUNE of ``count`` experts: options, none first; the arguments; where the run is kept."""
    tries = []
    for options in [{}, *_product(setup.grid)]:
        usual = vars(FitOptions()) | PATH_SETTINGS[False]
        arguments = {name: usual[name] for name in setup.grid} | setup.fit | options
        name = "-".join(f"{key}-{arguments[key]:g}" for key in setup.grid)
        tries.append((options, arguments, folder / f"mergetune-{count}" / name))
    return tries


def grid_of(method: str, experts: int) -> list[dict[str, Any]]:
    """The choices of a merging method, its default first."""
    if method == "task_arithmetic":  # the TIES paper's for several; their mean; their mean with the zero-shot solution
        return [{"scale": scale} for scale in (0.4, 1 / experts, 1 / (experts + 1))]
    return _product(MERGE_GRIDS.get(method, {}))


def _product(grid: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
