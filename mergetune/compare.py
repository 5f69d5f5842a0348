"""The fair table: zero-shot, tuned, every merge, ensembles and MERGETUNE on the same cells, with paired differences.

A cell is one dataset, one partition of its classes into base and novel, and one seed of the draw and the training. In
each cell all candidates (a method with one choice of hyper-parameters) are made from training images, scored on
validation images, one candidate a method is chosen, and only the chosen are tested. Each cell leaves one JSON file.

Shapes: K experts, M prompts encoded together, C classes, D embedding width, R resamples.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm import tqdm

from mergetune.catalogue import AVERAGES, merge_solutions, needs_base
from mergetune.clip import PLAIN, FrozenClip, check_templates
from mergetune.data import Dataset, ImageList
from mergetune.demo import TEMPLATE, load_icons
from mergetune.evaluate import accuracy, harmonic_mean
from mergetune.features import FeatureCache, cache_features
from mergetune.files import jsonable, read_regular, read_regular_text, write_atomically
from mergetune.fit import RESULT, FitResult, Job, fit_job, train_together, tune_job
from mergetune.merging.methods import METHODS
from mergetune.options import TUNE_METHODS, CompareOptions, FitOptions
from mergetune.solutions import Head, Prompt, Solution, inputs, zero_shot_like

Record = dict[str, Any]
WEIGHTS = "class-weights.safetensors"
ZERO_SHOT, REFERENCE = "zero-shot", "MERGETUNE, chosen [1]"
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
SAME_AS_WISE_FT = ("average", "task_arithmetic")  # with one expert and the zero-shot solution


@dataclass(frozen=True, eq=False)
class Task:
    """A dataset: cached features of all its classes.

    Attributes:
        name: of its folder and its lines.
        train: the pool that few-shot images are drawn from.
        test: test images. Nothing is chosen on them.
        val: validation images; None: those of ``train`` that were not drawn, and of novel classes all of ``train``.
        templates: zero-shot text; several are ensembled.
    """

    name: str
    train: FeatureCache
    test: FeatureCache
    val: FeatureCache | None = None
    templates: tuple[str, ...] = (PLAIN,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", check_templates(self.templates))
        for other in ("test", "val"):
            cache = getattr(self, other)
            if cache is not None and cache.classnames != self.train.classnames:
                raise ValueError(f"{other} must have the classes of train, got {list(cache.classnames)[:3]}...")
        pairs = [("test", self.test, self.train), ("test", self.test, self.val), ("val", self.val, self.train)]
        for title, cache, other in pairs:
            if None not in (cache, other) and len(both := cache.shared_with(other)):
                raise ValueError(f"{title} must share no image with what is trained or chosen on, got {len(both)}")

    def halves(self, partition: int | None) -> dict[str, list[int]]:
        """Classes of the base and the novel half: sorted (0, CoOp's), random (1, 2, ...); None: all of them."""
        count = len(self.train.classnames)
        if partition is None:
            return {"all": list(range(count))}
        if count < 4:
            raise ValueError(f"partitions need at least 4 classes, two a half, got {count} in {self.name!r}")
        order = list(range(count))
        if partition:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(partition)).tolist()
        half = math.ceil(count / 2)
        return {"base": sorted(order[:half]), "novel": sorted(order[half:])}

    def fold(self, partition: int | None, shots: int | None, seed: int) -> Fold:
        """The training and validation images of a cell. The draw is CoOp's, over all classes, for any partition."""
        halves = self.halves(partition)
        cache = replace(self.train, files=self.train.files or tuple(map(str, range(len(self.train)))))
        listed = ImageList(Path(), cache.files, tuple(cache.labels.tolist()), cache.classnames)
        learned = next(iter(halves.values()))
        drawn = Dataset(self.name, full_train=listed).select(learned).few_shot(shots, seed)
        taken = set(drawn.files)
        rest = [i for i, file in enumerate(listed.files) if file not in taken]
        labels = {listed.labels[i] for i in rest} if self.val is None else set(self.val.labels.tolist())
        for part, classes in halves.items():
            if not labels.intersection(classes):
                raise ValueError(
                    f"val must hold images of the {part} classes of {self.name!r} to choose on, got none: "
                    f"give some, or draw fewer than {shots} shots, so that some training images are left"
                )
        val = cache.select(listed.take(rest)) if self.val is None else self.val
        own = {part: val.select_classes(classes) for part, classes in halves.items()}
        return Fold(cache.select(drawn), own, self.templates, seed)


@dataclass(frozen=True, eq=False)
class Fold:
    """What training and choosing see of a cell: no test images.

    Attributes:
        train: the few-shot images of the classes that are learned.
        val: "base" and "novel", or "all" -> validation images.
        templates: zero-shot text.
        seed: of the draw and the training.
    """

    train: FeatureCache
    val: dict[str, FeatureCache]
    templates: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
        task: name of the dataset.
        partition: which halves, see :meth:`Task.halves`.
        seed: of the draw and the training.
    """

    task: str
    partition: int | None
    seed: int

    @property
    def folder(self) -> Path:
        """Where it is kept, below the folder of results."""
        return Path(self.task, "all" if self.partition is None else f"partition-{self.partition}", f"seed-{self.seed}")


def icons_task(folder: str | Path, *, report: Callable[[str], None] = lambda _: None) -> tuple[FrozenClip, list[Task]]:
    """The embedded CLIP and icons, encoded in ``folder``."""
    clip, data = load_icons(Path(folder))
    report(f"encoding {len(data.train) + len(data.test)} images once")
    caches = {
        part: cache_features(clip, images, Path(folder) / "cache" / part, progress=False)
        for part, images in (("train", data.train), ("test", data.test))
    }
    return clip, [Task("icons", **caches, templates=(TEMPLATE,))]


# -- candidates: made from training images ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method with one choice of hyper-parameters.

    Attributes:
        row: the line that it competes for.
        options: its hyper-parameters, JSON-able.
        experts: K.
        made: what is evaluated; or how class weights [C, D] come from unit class embeddings, of zero-shot [C, D] and of
            the experts [K, C, D].
        data: what it was made with, beside its experts.
        parameters: numbers that must be kept to classify new class names.
        seconds: to make it, without its experts.
    """

    row: str
    options: dict[str, Any]
    experts: int
    made: Solution | Callable[[Tensor, Tensor], Tensor]
    data: str = "none"
    parameters: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Candidates:
    """All of a cell.

    Attributes:
        experts: by name, what is merged.
        found: the candidates, row by row, a method's default first.
        left_out: method and number of experts -> why it is not compared.
    """

    experts: dict[str, Solution]
    found: list[Candidate]
    left_out: dict[str, str]


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
    zero_shot, head = zero_shot_like(clip, first, fold.templates), isinstance(first, Head)
    found = [Candidate(ZERO_SHOT, {}, 0, zero_shot if head else lambda zero, _: zero)]
    found += [
        Candidate(title, {}, 1, solution, "training images, labelled", solution.parameter.numel(), seconds[title])
        for title, solution in experts.items()
    ]
    left_out: dict[str, str] = {}
    for group in _groups(experts):
        found += _merged(clip, fold, zero_shot, group, left_out)
        found += [] if head else _mixed(group)
        found += _mergetuned(setup, folder, group)
    return Candidates(experts, found, left_out)


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
    for folder, fold in folds.items():
        for expert in () if isinstance(setup.experts, Mapping) else setup.experts:
            method, number = expert.split(":")
            given = {"method": method, "template": fold.templates[0], "zero_shot": fold.templates} | setup.tune
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
    clip: FrozenClip, fold: Fold, zero_shot: Solution, group: list[Solution], left_out: dict[str, str]
) -> list[Candidate]:
    """Merges of what was trained: context vectors, or head weights."""
    found, count = [], len(group)
    what = "context vectors" if isinstance(group[0], Prompt) else "weights"
    for method, facts in METHODS.items():
        reason = LEFT_OUT.get(method)
        if count == 1 and method in SAME_AS_WISE_FT:
            reason = "with one expert it is WiSE-FT"
        if reason:
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
                    found.append(Candidate(row, options, count, made, used, made.parameter.numel(), spent))
            except (ValueError, ImportError) as error:
                left_out[f"{method} [{count}]"] = str(error)
    return found


def _bases(method: str, zero_shot: Solution, count: int) -> list[Solution | None]:
    """With and without the zero-shot solution, where both are something."""
    if METHODS[method].base is False:
        return [None]
    if needs_base(method, count):
        return [zero_shot]
    if method in AVERAGES:
        return [None, zero_shot]
    return [None if method == "slerp" else zero_shot]


def _mixed(group: list[Solution]) -> list[Candidate]:
    """Merges of class embeddings, and averages of logits."""
    count = len(group)
    size = sum(solution.parameter.numel() for solution in group)
    found = []
    for method, fixed in EMBEDDING_METHODS.items():
        facts = METHODS[method]
        fits = facts.least <= count <= (facts.most or count)
        if fits and not (count > 1 and method == "slerp") and not (count == 1 and method in SAME_AS_WISE_FT):
            for options in grid_of(method, count):
                mix = partial(_by_class, facts.load(), fixed | options)
                row = f"{facts.title}, class embeddings [{count}]"
                found.append(Candidate(row, options, count, mix, parameters=size))
    for t in MIX:
        mix = partial(_logit_average, t)
        found.append(Candidate(f"logit ensemble with zero-shot [{count}]", {"t": t}, count, mix, parameters=size))
    return found


def _by_class(method: Callable, options: Mapping[str, Any], zero: Tensor, own: Tensor) -> Tensor:
    states = [{str(c): row for c, row in enumerate(rows)} for rows in (zero, *own)]
    merged = method(states[0], states[1:], **options)
    return F.normalize(torch.stack([merged[str(c)] for c in range(len(zero))]), dim=-1)


def _logit_average(t: float, zero: Tensor, own: Tensor) -> Tensor:
    return (1 - t) * zero + t * own.mean(0)


def _mergetuned(setup: CompareOptions, folder: Path, group: list[Solution]) -> list[Candidate]:
    found, count = [], len(group)
    for options, _, run in _tries(setup, folder, count):
        result = FitResult.load(run)
        row = f"MERGETUNE, {'chosen' if options else 'defaults'} [{count}]"
        size, spent = result.solution.parameter.numel(), result.timings["seconds"]
        found.append(Candidate(row, options, count, result.solution, "training images, labelled", size, spent))
    return found


def _tries(setup: CompareOptions, folder: Path, count: int) -> list[tuple[dict[str, Any], dict[str, Any], Path]]:
    """What is tried for MERGETUNE of ``count`` experts: options, none first; the arguments; where the run is kept."""
    tries = []
    for options in [{}, *_product(setup.grid)]:
        arguments = {name: getattr(FitOptions, name) for name in setup.grid} | setup.fit | options
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


def class_weights(
    clip: FrozenClip, made: Candidates, templates: Sequence[str], classnames: Sequence[str]
) -> tuple[Tensor, list[float]]:
    """Class weights of all candidates with the logit scale, [candidates, C, D], and the seconds that mixtures took.

    All prompts of one form share calls of the text tower.
    """
    solutions = [*made.experts.values(), *(c.made for c in made.found if not callable(c.made))]
    encoded = _encode(clip, solutions, classnames)
    zero, own = clip.class_embeddings(classnames, templates), torch.stack(encoded[: len(made.experts)])
    own, rest = F.normalize(own[..., : zero.shape[1]], dim=-1), iter(encoded[len(made.experts) :])
    weights, seconds = [], []
    for candidate in made.found:
        began = time.perf_counter()
        if callable(candidate.made):
            weights.append(clip.logit_scale * candidate.made(zero, own[: max(candidate.experts, 1)]))
        else:
            weights.append(next(rest))
        seconds.append(time.perf_counter() - began)
    return torch.stack(weights).cpu(), seconds


@torch.no_grad()
def _encode(clip: FrozenClip, solutions: Sequence[Solution], classnames: Sequence[str]) -> list[Tensor]:
    """Class weights of prompts and heads, [C, D] each."""
    found: dict[int, Tensor] = {}
    groups: dict[Any, list[int]] = {}
    for i, solution in enumerate(solutions):
        if isinstance(solution, Head):
            found[i] = solution.logit_scale * solution.class_weights(clip, classnames)
        else:
            groups.setdefault(solution.form, []).append(i)
    for members in groups.values():
        encode = solutions[members[0]].encoder(clip, classnames)
        weights = encode(torch.stack([solutions[i].ctx.to(clip.device) for i in members]))
        found |= dict(zip(members, clip.logit_scale * F.normalize(weights, dim=-1), strict=True))
    return [found[i] for i in range(len(solutions))]


# -- a cell: candidates are scored on validation images, the chosen are tested -----------------------------------------


def begin(clip: FrozenClip, task: Task, cell: Cell, setup: CompareOptions, folder: Path) -> Record:
    """What ``cell.json`` holds of a cell: the result of :func:`prepare` if it is there, or its settings alone.

    Raises:
        ValueError: the folder holds a cell with other settings.
    """
    file, settings = folder / "cell.json", jsonable(_settings(clip, task, setup))
    if file.is_file():
        record = _read(file)
        if record["settings"] != settings:
            raise ValueError(f"out: {folder} holds a comparison with other settings: choose another --out")
        return record
    folder.mkdir(parents=True, exist_ok=True)
    record = {"cell": asdict(cell), "settings": settings}
    _write(file, record)
    return record


def prepare(
    clip: FrozenClip, task: Task, cell: Cell, setup: CompareOptions, folder: Path, *, progress: bool = False
) -> Record:
    """Make and score the candidates of a cell, or take them from disk. Test images are not looked at.

    Leaves ``cell.json`` and every candidate's class weights in the cell's folder.

    Raises:
        ValueError: the folder holds a cell with other settings.
    """
    begun = begin(clip, task, cell, setup, folder)
    if "candidates" in begun:
        return begun
    fold = task.fold(cell.partition, setup.shots, cell.seed)
    made = candidates(clip, fold, setup, folder, progress=progress)
    weights, mixing = {}, [0.0] * len(made.found)
    for part, val in fold.val.items():
        weights[part], seconds = class_weights(clip, made, fold.templates, val.classnames)
        mixing = [a + b for a, b in zip(mixing, seconds, strict=True)]
    scores = score(weights, fold.val)
    write_atomically(folder / WEIGHTS, serialize({part: w.contiguous() for part, w in weights.items()}))
    entries = [
        {
            "row": c.row, "options": c.options, "experts": c.experts, "data": c.data, "parameters": c.parameters,
            "seconds": c.seconds + spent, "score": value,
        }
        for c, spent, value in zip(made.found, mixing, scores, strict=True)
    ]  # fmt: skip
    record = begun | {"candidates": entries, "left_out": made.left_out}
    _write(folder / "cell.json", record)
    return jsonable(record)


def score(weights: Mapping[str, Tensor], val: Mapping[str, FeatureCache]) -> list[float]:
    """Accuracy of each candidate on validation images; of base and novel classes the harmonic mean. Percent."""
    parts = [[accuracy(w, features).accuracy for w in weights[part]] for part, features in val.items()]
    return [_summary(values) for values in zip(*parts, strict=True)]


def _summary(accuracies: Sequence[float]) -> float:
    return harmonic_mean(*accuracies) if len(accuracies) == 2 else accuracies[0]


def choose(records: Sequence[Record], how: str = "validation") -> list[dict[str, int]]:
    """For each cell and row the candidate with the best validation score; of equals the first, the default.

    Args:
        records: of :func:`prepare`: validation scores, no test results.
        how: "validation", the cell's own; "others", mean over the cells of all other datasets.
    """
    if how == "others" and len({record["cell"]["task"] for record in records}) < 2:
        raise ValueError("choose='others' needs at least two datasets, got one")
    chosen = []
    for record in records:
        task, best = record["cell"]["task"], {}
        seen = [record] if how == "validation" else [r for r in records if r["cell"]["task"] != task]
        scores: dict[Any, list[float]] = {}
        for other in seen:
            for entry in other["candidates"]:
                scores.setdefault((entry["row"], json.dumps(entry["options"])), []).append(entry["score"])
        for number, entry in enumerate(record["candidates"]):
            found = scores.get((entry["row"], json.dumps(entry["options"])))
            if found is None:
                continue
            value = statistics.fmean(found)
            if entry["row"] not in best or value > best[entry["row"]][0]:
                best[entry["row"]] = (value, number)
        chosen.append({row: number for row, (_, number) in best.items()})
    return chosen


def measure(task: Task, record: Record, chosen: Mapping[str, int], folder: Path) -> Record:
    """Test the chosen candidates of a cell, or take their results from disk."""
    if record.get("chosen") == chosen:
        return record
    weights = deserialize(read_regular(folder / WEIGHTS))
    halves = task.halves(record["cell"]["partition"])
    results: dict[str, dict[str, list[int]]] = {row: {} for row in chosen}
    images = {}
    for part, classes in halves.items():
        test = task.test.select_classes(classes)
        counts = torch.bincount(test.labels, minlength=len(classes))
        images[part] = counts.tolist()
        for row, number in chosen.items():
            right = _right(weights[part][number], test)
            results[row][part] = torch.bincount(test.labels[right], minlength=len(classes)).tolist()
    record = record | {"chosen": dict(chosen), "classes": halves, "images": images, "right": results}
    _write(folder / "cell.json", record)
    return jsonable(record)


def _right(weights: Tensor, features: FeatureCache) -> Tensor:
    rows = torch.arange(len(features)).split(2048)
    answers = [(inputs(features.rows(index), weights) @ weights.T).argmax(-1) for index in rows]
    return torch.cat(answers) == features.labels


def _settings(clip: FrozenClip, task: Task, setup: CompareOptions) -> dict[str, Any]:
    """What a cell's result depends on beside the cell."""
    experts = setup.experts
    if isinstance(experts, Mapping):
        experts = {
            name: [s.kind, hashlib.sha256(s.parameter.cpu().contiguous().numpy()).hexdigest()]
            for name, s in experts.items()
        }
    return {
        "clip": clip.fingerprint,
        "templates": task.templates,
        "features": [None if cache is None else cache.digest for cache in (task.train, task.val, task.test)],
        "experts": experts,
        "shots": setup.shots,
        "tune": setup.tune,
        "fit": setup.fit,
        "grids": [setup.grid, MERGE_GRIDS],
    }


def _write(file: Path, record: Any) -> None:
    write_atomically(file, f"{json.dumps(record, indent=1)}\n".encode())


def _read(file: Path) -> Record:
    try:
        record = json.loads(read_regular_text(file))
        record["cell"], record["settings"]
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {file} cannot be read ({error}): delete it to run it again") from error


# -- all cells --------------------------------------------------------------------------------------------------------


def compare(
    clip: FrozenClip,
    tasks: Task | Sequence[Task],
    out: str | Path,
    *,
    setup: CompareOptions | None = None,
    partitions: Sequence[int | None] = (0,),
    seeds: Sequence[int] = (1,),
    reference: str = REFERENCE,
    progress: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compare everything on every cell: datasets x partitions x seeds. Killed, the same call goes on.

    Args:
        clip: the frozen CLIP that the features come from.
        tasks: one dataset or several.
        out: folder; each cell leaves its experts, its MERGETUNE runs and one ``cell.json``.
        setup: experts, few-shot images, training, grids, and how hyper-parameters are chosen.
        partitions: halves of the classes, see :meth:`Task.halves`; None trains and tests on all classes.
        seeds: of the draw of images and the training.
        reference: the line that the others' differences are to.
        progress: show bars where stderr is a terminal.
        report: told in a line what is about to be done.
    """
    setup, tasks, out = setup or CompareOptions(), [tasks] if isinstance(tasks, Task) else list(tasks), Path(out)
    by_name = {task.name: task for task in tasks}
    cells = [Cell(name, partition, seed) for name in by_name for partition in partitions for seed in seeds]
    if not cells or len(by_name) < len(tasks) or len(set(cells)) < len(cells):
        raise ValueError(f"tasks, partitions and seeds must be there and not repeat, got {cells}")
    if len({partition is None for partition in partitions}) > 1:
        raise ValueError(f"partitions must be halves, or None alone, got {list(partitions)}")
    if isinstance(setup.experts, Mapping) and len(cells) > 1:
        raise ValueError(f"experts that are given belong to one cell, got {len(cells)} cells")
    if setup.choose == "others" and len(by_name) < 2:
        raise ValueError("choose='others' needs at least two datasets, got one")
    prepared = []
    with tqdm(total=len(cells), desc="compare", unit="cell", disable=None if progress else True) as bar:
        for name, partition in itertools.product(by_name, partitions):
            task, alike = by_name[name], [cell for cell in cells if (cell.task, cell.partition) == (name, partition)]
            folds = {}
            for cell in alike:
                if "candidates" not in begin(clip, task, cell, setup, out / cell.folder):
                    report(f"{cell.folder}: experts, MERGETUNE")
                    folds[out / cell.folder] = task.fold(partition, setup.shots, cell.seed)
            train(clip, folds, setup, progress=progress)
            for cell in alike:
                report(f"{cell.folder}: merges, validation")
                prepared.append(prepare(clip, task, cell, setup, out / cell.folder, progress=progress))
                bar.update()
    seen = [{key: record[key] for key in ("cell", "candidates")} for record in prepared]  # no results of earlier calls
    chosen = choose(seen, setup.choose)
    records = [
        measure(by_name[cell.task], record, best, out / cell.folder)
        for cell, record, best in zip(cells, prepared, chosen, strict=True)
    ]
    return summarise(records, reference=reference, choose=setup.choose)


# -- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A line minus the reference, percent; 95 % intervals.

    Attributes:
        mean: over cells.
        cells: t interval over cells, paired; None for one cell. Cells of one dataset share test images: with few
            datasets it tells of seeds and partitions, not of other data.
        datasets: t interval over the datasets' means; None for one dataset.
        classes: percentile bootstrap that draws each dataset's classes with replacement, in all its cells the same.
    """

    mean: float
    cells: tuple[float, float] | None
    datasets: tuple[float, float] | None
    classes: tuple[float, float]


@dataclass(frozen=True)
class ComparedLine:
    """A line of the table.

    Attributes:
        row: method, what it merges, [number of experts].
        values: "base", "novel" and "HM", or "all" -> percent, mean over cells.
        spread: standard deviation over cells; 0 for one.
        errors: standard error from the classes, by bootstrap: what other classes would have changed.
        differences: to the reference; empty for itself.
        data: what is needed beside the experts.
        parameters: numbers that must be kept to classify new class names.
        seconds: to make one candidate, without its experts; mean.
        tried: candidates that were scored on validation images.
        options: the chosen hyper-parameters -> in how many cells.
    """

    row: str
    values: dict[str, float]
    spread: dict[str, float]
    errors: dict[str, float]
    differences: dict[str, Difference]
    data: str
    parameters: int
    seconds: float
    tried: int
    options: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """The table of a comparison.

    Attributes:
        lines: in the order of the table.
        reference: the line that differences are to.
        choose: what hyper-parameters were chosen on.
        cells: the cells.
        left_out: method and number of experts -> why.
    """

    lines: tuple[ComparedLine, ...]
    reference: str
    choose: str
    cells: tuple[Cell, ...]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return jsonable(asdict(self))

    def markdown(self) -> str:
        """The table for a README: accuracies ± standard error, differences of the last column with both intervals."""
        columns = list(self.lines[0].values)
        last = columns[-1]
        head = ["", *columns, f"{last} difference", "over cells", "over classes", "data", "numbers", "s", "chosen"]
        rows = []
        for line in self.lines:
            option, often = next(iter(line.options.items()))
            often = f" ({often} of {len(self.cells)})" if often < len(self.cells) else ""
            difference = line.differences.get(last)
            about = ["0", "", ""]
            if difference:
                about = [f"{difference.mean:+.2f}", *(_interval(i) for i in (difference.cells, difference.classes))]
            cells = [f"{line.values[c]:.1f} ± {line.errors[c]:.1f}" for c in columns]
            cost = [line.data, str(line.parameters), f"{line.seconds:.1f}", option + often]
            title = f"**{line.row}**" if line.row.startswith("MERGETUNE") else line.row
            rows.append([title.replace("[", "(").replace("]", ")"), *cells, *about, *cost])
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write ``comparison.json``, ``comparison.md`` and ``comparison.png``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "comparison.json", self.to_json())
        write_atomically(folder / "comparison.md", self.markdown().encode())
        plot(self, folder / "comparison.png")


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"


def summarise(
    records: Sequence[Record], *, reference: str = REFERENCE, choose: str = "validation", resamples: int = 2000
) -> Comparison:
    """The table of measured cells. Lines that some cell lacks are left out."""
    everywhere = set.intersection(*(set(record["right"]) for record in records))
    rows = [row for row in records[0]["right"] if row in everywhere]
    if reference not in rows:
        raise ValueError(f"reference must be one of {', '.join(rows)}, got {reference!r}")
    values = torch.stack([_values(record, rows) for record in records])  # [cells, rows, columns]
    drawn = _bootstrap(records, rows, resamples)  # [R, rows, columns]
    parts = list(records[0]["images"])
    columns = [*parts, "HM"] if len(parts) == 2 else parts
    tasks = [record["cell"]["task"] for record in records]
    at, lines = rows.index(reference), []
    for i, row in enumerate(rows):
        entries = [entry for record in records for entry in record["candidates"] if entry["row"] == row]
        won = [record["candidates"][record["chosen"][row]] for record in records]
        options = [", ".join(f"{k} {_short(v)}" for k, v in entry["options"].items()) for entry in won]
        deviation = values[:, i].std(0) if len(records) > 1 else torch.zeros(len(columns))
        differences = {
            column: _difference((values[:, i, c] - values[:, at, c]).tolist(), tasks, drawn[:, i, c] - drawn[:, at, c])
            for c, column in enumerate(columns)
            if i != at
        }
        lines.append(
            ComparedLine(
                row=row,
                values=dict(zip(columns, values[:, i].mean(0).tolist(), strict=True)),
                spread=dict(zip(columns, deviation.tolist(), strict=True)),
                errors=dict(zip(columns, drawn[:, i].std(0).tolist(), strict=True)),
                differences=differences,
                data=won[0]["data"],
                parameters=won[0]["parameters"],
                seconds=statistics.fmean(entry["seconds"] for entry in entries),
                tried=len(entries) // len(records),
                options=dict(Counter(options).most_common()),
            )
        )
    left_out = {method: why for record in records for method, why in record["left_out"].items()}
    return Comparison(tuple(lines), reference, choose, tuple(Cell(**r["cell"]) for r in records), left_out)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _values(record: Record, rows: Sequence[str], weights: Tensor | None = None) -> Tensor:
    """Accuracies, percent, [rows, columns]; with weights of resampled classes, [R, all classes], [R, rows, columns]."""
    parts = []
    for part, images in record["images"].items():
        own = torch.ones(1, len(images)) if weights is None else weights[:, record["classes"][part]]
        right = torch.tensor([record["right"][row][part] for row in rows], dtype=torch.float64)
        parts.append(100 * (own.double() @ right.T) / (own.double() @ torch.tensor(images).double())[:, None])
    if len(parts) == 2:
        parts.append(torch.nan_to_num(2 * parts[0] * parts[1] / (parts[0] + parts[1])))
    found = torch.stack(parts, -1)
    return found[0] if weights is None else found


def _bootstrap(records: Sequence[Record], rows: Sequence[str], resamples: int) -> Tensor:
    """Means over cells with each dataset's classes drawn with replacement, [R, rows, columns].

    A draw without any class of some half says nothing about it; its numbers are left out.
    """
    generator, weights, total = torch.Generator().manual_seed(0), {}, torch.zeros(())
    for record in records:
        task, count = record["cell"]["task"], sum(map(len, record["classes"].values()))
        if task not in weights:
            drawn = torch.randint(count, (resamples, count), generator=generator)
            weights[task] = torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count))
        total = total + _values(record, rows, weights[task])
    means = total / len(records)
    return means[means.isfinite().all(2).all(1)]


def _difference(values: list[float], tasks: Sequence[str], drawn: Tensor) -> Difference:
    by_task: dict[str, list[float]] = {}
    for task, value in zip(tasks, values, strict=True):
        by_task.setdefault(task, []).append(value)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    over_tasks = t_interval([statistics.fmean(found) for found in by_task.values()])
    return Difference(statistics.fmean(values), t_interval(values), over_tasks, (low, high))


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval for a mean; None for fewer than two values."""
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes a second to import

    if len(values) < 2:
        return None
    reach = stdtrit(len(values) - 1, (1 + level) / 2) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


def plot(comparison: Comparison, file: str | Path) -> None:
    """Each line's difference to the reference with its class bootstrap interval."""
    from matplotlib.figure import Figure  # here, and without pyplot: no display is needed and no state is shared

    lines, last = comparison.lines, list(comparison.lines[0].values)[-1]
    figure = Figure(figsize=(8, 1.2 + 0.18 * len(lines)), layout="constrained")
    axis = figure.subplots()
    for i, line in enumerate(lines):
        color = "#d95f02" if line.row.startswith("MERGETUNE") else "#555555"
        difference = line.differences.get(last)
        mean, low, high = (0, 0, 0) if difference is None else (difference.mean, *difference.classes)
        axis.plot([low, high], [i, i], color=color, linewidth=1.2)
        axis.plot([mean], [i], "o", color=color, markersize=4)
    axis.axvline(0, color="#bbbbbb", linewidth=1)
    axis.set_yticks(range(len(lines)), [line.row for line in lines], fontsize=7)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlabel(f"{last}, difference to {comparison.reference} (points), 95 % over classes", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
