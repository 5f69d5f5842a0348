"""The paper's experiments on the benchmark datasets: planned, run, resumed, tabulated beside the published figures.

A run is one training set, method and seed: features are cached, stage 1 tunes, stage 2 (MERGETUNE) repairs, and every
solution is tested on the run's targets. Each run leaves one JSON file; runs that have theirs are not run again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from string import Formatter
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from mergetune.clip import FrozenClip
from mergetune.data import Dataset, ImageList
from mergetune.datasets import CoOpDataset, benchmark, check_dataset, few_shot_path
from mergetune.evaluate import Classifier, accuracy, classifier, harmonic_mean, logit_ensemble, weight_average
from mergetune.features import FeatureCache, cache_features, torchrun_team
from mergetune.files import jsonable, read_regular_text, write_atomically
from mergetune.fit import fit, tune
from mergetune.options import TUNE_METHODS
from mergetune.solutions import Solution, open_solution
from mergetune.templates import templates_for

ELEVEN = (
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397",
    "dtd", "eurosat", "ucf101",
)  # fmt: skip
SHIFTED = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
PROTOCOLS = {
    "base-to-novel": "train on half of the classes, test on them and on the others (CoCoOp)",
    "cross-dataset": "train on ImageNet, test on the other datasets (CoCoOp)",
    "domain": "train on ImageNet, test on its shifted test sets (CoOp)",
    "few-shot": "train on 1, 2, 4, 8 and 16 images a class, test on the same classes (CoOp)",
    "robust": "train a head on ImageNet, test on it and on its shifted test sets, ensembled with zero-shot (WiSE-FT)",
}
MIXES = tuple(i / 10 for i in range(11))  # the mixing coefficients of "robust"

# MERGETUNE (arXiv 2601.10497), ViT-B/16, means over the eleven datasets: (protocol, method, solution) -> column -> %.
PUBLISHED: dict[tuple[str, str, str], dict[str, float]] = {
    ("base-to-novel", "coop", "zero-shot"): {"HM": 71.70},
    ("base-to-novel", "coop", "tuned"): {"base": 82.69, "novel": 63.22, "HM": 71.66},
    ("base-to-novel", "coop", "MERGETUNE"): {"base": 80.82, "novel": 73.97, "HM": 77.24},
    ("base-to-novel", "kgcoop", "zero-shot"): {"HM": 71.70},
    ("base-to-novel", "kgcoop", "tuned"): {"HM": 77.01},
    ("base-to-novel", "kgcoop", "MERGETUNE"): {"HM": 77.98},
}


@dataclass(frozen=True)
class Run:
    """One training set, method and seed.

    Attributes:
        protocol: one of ``PROTOCOLS``.
        source: the dataset that is trained on.
        method: stage 1, one of ``TUNE_METHODS``.
        shots: images a class; None is all of them.
        seed: of the draw and of the training.
        targets: what is tested: datasets, or "base" and "novel" for the halves of the source.
    """

    protocol: str
    source: str
    method: str
    shots: int | None
    seed: int
    targets: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is kept, below the folder of results."""
        return Path(self.protocol, self.source, self.method, f"shots-{self.shots or 'all'}", f"seed-{self.seed}")

    @property
    def test_sets(self) -> tuple[str, ...]:
        """The datasets whose test images it needs."""
        return (self.source,) if self.protocol == "base-to-novel" else self.targets


@dataclass(frozen=True)
class Experiment:
    """What all runs share. Only ``root`` and ``out`` are needed.

    Attributes:
        root: the folder of the datasets, in CoOp's layout.
        out: the folder of results, caches and solutions.
        templates: the set of zero-shot templates, see :data:`mergetune.templates.TEMPLATES`.
        checkpoints: where stage 1 is to be read from instead of being run: a path with {dataset}, {method}, {shots} and
            {seed} in it, as "output/{dataset}/shots_{shots}/CoOp/seed{seed}".
        tune: more keyword arguments of :func:`mergetune.tune`.
        fit: more keyword arguments of :func:`mergetune.fit`.
        cache: more keyword arguments of :func:`mergetune.cache_features`.
    """

    root: Path
    out: Path
    templates: str = "official"
    checkpoints: str | None = None
    tune: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("root", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)).expanduser())
        templates_for("imagenet", self.templates)
        known = {"dataset", "method", "shots", "seed"}
        if unknown := {name for _, name, *_ in Formatter().parse(self.checkpoints or "") if name} - known:
            raise ValueError(f"checkpoints may hold {', '.join(sorted(known))} in braces, got {sorted(unknown)[0]!r}")

    def settings(self, clip: FrozenClip) -> dict[str, Any]:
        """What a result depends on beside the run."""
        return {
            "clip": clip.name,
            "fingerprint": clip.fingerprint,
            "templates": self.templates,
            "checkpoints": self.checkpoints,
            "tune": self.tune,
            "fit": self.fit,
        }

    def checkpoint(self, run: Run) -> Path | None:
        """Where the stage 1 of a run is read from, if it is."""
        if self.checkpoints is None:
            return None
        return Path(
            self.checkpoints.format(dataset=run.source, method=run.method, shots=run.shots or "all", seed=run.seed)
        )


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(
    protocol: str,
    *,
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (1, 2, 3),
    shots: Sequence[int] = (),
) -> tuple[Run, ...]:
    """The runs of a protocol.

    Args:
        protocol: one of ``PROTOCOLS``.
        datasets: base-to-novel and few-shot: trained and tested on, the eleven if none are given. The others train on
            ImageNet; these are their test sets: the ten others, or the four shifted ImageNets.
        methods: of ``TUNE_METHODS``; "coop", or "head" for robust, if none are given.
        seeds: one run each.
        shots: images a class: 16; 1, 2, 4, 8, 16 for few-shot; all of them for robust.

    Raises:
        ValueError: an unknown name; a combination that cannot be.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    methods = tuple(methods) or (("head",) if protocol == "robust" else ("coop",))
    for method in methods:
        if method not in TUNE_METHODS:
            raise ValueError(f"methods must be of {', '.join(TUNE_METHODS)}, got {method!r}")
        if method == "head" and protocol in ("base-to-novel", "cross-dataset"):
            raise ValueError(f"methods of {protocol} must be prompts, got 'head': it knows only the classes it learned")
        if method != "head" and protocol == "robust":
            raise ValueError(f"methods of robust must be 'head', got {method!r}: prompts are what domain is for")
    named = tuple(benchmark(name).name for name in datasets)
    for what, values in (("datasets", named), ("methods", methods), ("seeds", seeds), ("shots", shots)):
        if len(set(values)) != len(values):
            raise ValueError(f"{what} must not repeat, got {list(values)}")
    if not seeds:
        raise ValueError("seeds must hold at least one seed, got none")
    every_shots: tuple[int | None, ...] = tuple(shots) or {"few-shot": (1, 2, 4, 8, 16), "robust": (None,)}.get(
        protocol, (16,)
    )
    if protocol in ("base-to-novel", "few-shot"):
        if shifted := [name for name in named if name in SHIFTED]:
            raise ValueError(f"datasets of {protocol} must have training images, got {shifted[0]}")
        halves = ("base", "novel")
        pairs = [(name, halves if protocol == "base-to-novel" else (name,)) for name in named or ELEVEN]
    else:
        others = {"cross-dataset": ELEVEN[1:]}.get(protocol, SHIFTED)
        if wrong := [name for name in named if name not in (*others, "imagenet")]:
            raise ValueError(f"datasets of {protocol} must be among {', '.join(others)}, got {wrong[0]}")
        pairs = [("imagenet", ("imagenet", *(name for name in named or others if name != "imagenet")))]
    return tuple(
        Run(protocol, source, method, count, seed, targets)
        for source, targets in pairs
        for method in methods
        for count in every_shots
        for seed in seeds
    )


def check_data(runs: Sequence[Run], root: str | Path) -> None:
    """Refuse a root that lacks something of any dataset, before any work.

    Raises:
        FileNotFoundError: naming all that is missing, of all datasets.
    """
    lacking = []
    for name in _datasets(runs):
        try:
            check_dataset(name, root)
        except FileNotFoundError as error:
            lacking.append(str(error))
    if lacking:
        raise FileNotFoundError("\n".join(lacking))


def _datasets(runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for run in runs for name in (run.source, *run.test_sets)))


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Caches:
    """The feature caches of an experiment: the images that a seed draws, of all classes, and whole test sets."""

    clip: FrozenClip
    experiment: Experiment

    @cached_property
    def data(self) -> Callable[[str], Dataset]:
        """Datasets by name, read once."""
        return lru_cache(partial(_read, self.experiment.root))

    def path(self, name: str, part: str) -> Path:
        return self.experiment.out / "cache" / name / part

    def images(self, name: str, shots: int | None, seed: int | None) -> tuple[Path, ImageList]:
        """The folder and the images of a test set (no seed), or of a draw."""
        if seed is None:
            return self.path(name, "test"), self.data(name).test
        part = "train" if shots is None else f"train-shots-{shots}-seed-{seed}"
        return self.path(name, part), self.draw(self.data(name), name, shots, seed)

    def draw(self, data: Dataset, name: str, shots: int | None, seed: int) -> ImageList:
        """The training images: those that CoOp stored beside the dataset for this seed, or else drawn as it does."""
        stored = None if shots is None else few_shot_path(name, self.experiment.root, shots, seed)
        return data.few_shot_file(stored) if stored and stored.is_file() else data.few_shot(shots, seed)

    def needed(self, runs: Sequence[Run]) -> list[tuple[str, int | None, int | None]]:
        """(dataset, shots, seed) of every cache, test sets first."""
        tests = [(name, None, None) for run in runs for name in run.test_sets]
        draws = [(run.source, run.shots, run.seed if run.shots else 0) for run in runs]
        return list(dict.fromkeys(tests + draws))

    def build(self, name: str, shots: int | None = None, seed: int | None = None) -> None:
        """Encode what is not there yet; the ranks of torchrun together."""
        path, images = self.images(name, shots, seed)
        cache_features(self.clip, images, path, **self.experiment.cache)

    def get(self, name: str, shots: int | None = None, seed: int | None = None) -> FeatureCache:
        """A cache that was built."""
        path, images = self.images(name, shots, seed)
        return FeatureCache.open(path).select(images)

    def train(self, run: Run) -> FeatureCache:
        """The features that a run trains on."""
        features = self.get(run.source, run.shots, run.seed if run.shots else 0)
        if run.protocol != "base-to-novel":
            return features
        return features.select(self.draw(self.data(run.source).base_novel()[0], run.source, run.shots, run.seed))

    def tests(self, run: Run) -> Iterator[tuple[str, str, FeatureCache]]:
        """(target, its dataset, its features) of a run's targets."""
        if run.protocol != "base-to-novel":
            yield from ((name, name, self.get(name)) for name in run.targets)
            return
        features = self.get(run.source)
        for target, half in zip(run.targets, self.data(run.source).base_novel(), strict=True):
            yield target, run.source, features.select(half.test)


def _read(root: Path, name: str) -> Dataset:
    return CoOpDataset(name, root)


def execute(run: Run, caches: Caches, *, progress: bool = False) -> dict[str, Any]:
    """Do a run whose caches are built, or take its result from disk; killed, it goes on from its last epoch.

    Returns:
        Its record: the run, the settings, and ``results[target][solution]`` with accuracy, images and standard error;
        for "robust" also ``mixes[target][ensemble]``, accuracies at the coefficients ``MIXES``.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    clip, experiment = caches.clip, caches.experiment
    folder, settings = experiment.out / run.folder, jsonable(experiment.settings(clip))
    if (record := _record(folder)) is not None:
        if record["settings"] != settings or record["run"] != jsonable(asdict(run)):
            raise ValueError(f"out: {folder} holds a run with other settings or targets: choose another --out")
        return record
    began = time.perf_counter()
    features = caches.train(run)
    templates = templates_for(run.source, experiment.templates)
    common = {"seed": run.seed, "progress": progress}
    checkpoint = experiment.checkpoint(run)
    if checkpoint is None:
        stage_1 = {"method": run.method, "zero_shot": templates, "resume": folder / "tuned"}
        tuned = tune(clip, features, **common | stage_1 | experiment.tune)
        tuned.save(folder / "tuned")
        tuned = tuned.solution
    else:
        tuned = open_solution(checkpoint, classnames=features.classnames)
    stage_2 = {"zero_shot": templates, "resume": folder / "merged"}
    merged = fit(clip, features, tuned, **common | stage_2 | experiment.fit)
    merged.save(folder / "merged")

    results, mixes = {}, {}
    for target, name, test in caches.tests(run):
        zero_shot = classifier(clip, templates_for(name, experiment.templates))
        results[target] = {
            solution: _report(classify, test)
            for solution, classify in _solutions(clip, zero_shot, tuned, merged.solution).items()
        }
        if run.protocol == "robust":
            mixes[target] = {
                f"{kind} ensemble of {solution}": [_report(mix(zero_shot, end, t), test)["accuracy"] for t in MIXES]
                for solution, end in (
                    ("tuned", classifier(clip, tuned)),
                    ("MERGETUNE", classifier(clip, merged.solution)),
                )
                for kind, mix in (("weight", weight_average), ("logit", logit_ensemble))
            }
    record = {
        "run": asdict(run),
        "settings": settings,
        "results": results,
        **({"mixes": mixes} if mixes else {}),
        "seconds": time.perf_counter() - began,
    }
    write_atomically(folder / "run.json", f"{json.dumps(record, indent=1)}\n".encode())
    return jsonable(record)


def _solutions(clip: FrozenClip, zero_shot: Classifier, tuned: Solution, merged: Solution) -> dict[str, Classifier]:
    """What is compared; the mixtures are of zero-shot and tuned, half and half."""
    w2 = classifier(clip, tuned)
    return {
        "zero-shot": zero_shot,
        "tuned": w2,
        "weight average": weight_average(zero_shot, w2),
        "logit ensemble": logit_ensemble(zero_shot, w2),
        "MERGETUNE": classifier(clip, merged),
    }


def _report(classify: Classifier, test: FeatureCache) -> dict[str, float]:
    report = accuracy(classify(test.classnames), test)
    return {"accuracy": report.accuracy, "images": report.images, "standard_error": report.standard_error}


def _record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run."""
    file = folder / "run.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(read_regular_text(file))
        record["run"], record["settings"], record["results"]
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {file} cannot be read ({error}): delete it to run it again") from error


def reproduce(
    runs: Sequence[Run],
    experiment: Experiment,
    load: Callable[[], FrozenClip],
    *,
    processes: int = 1,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Do all runs: caches first, then the runs, which do not depend on each other.

    Under torchrun the ranks share the encoding and the runs; all return all records.

    Args:
        runs: of :func:`plan`.
        experiment: what they share.
        load: makes the CLIP; called in every process, so it must be picklable for several
            (``partial(load_clip, name, pretrained)``).
        processes: runs at a time.
        progress: show bars where stderr is a terminal.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    check_data(runs, experiment.root)
    caches = Caches(load(), experiment)
    for key in caches.needed(runs):
        caches.build(*key)
    with torchrun_team() as team:
        team.each(lambda: _share(runs[team.rank :: team.world], caches, load, processes, progress))
    return [execute(run, caches) for run in runs]  # all are on disk by now


def _share(runs: Sequence[Run], caches: Caches, load: Callable[[], FrozenClip], processes: int, progress: bool) -> None:
    """This process's runs, one after the other or in processes of their own."""
    bar = partial(tqdm, total=len(runs), desc="runs", unit="run", disable=None if progress else True)
    if processes == 1 or len(runs) < 2:
        for run in bar(runs):
            execute(run, caches, progress=progress)
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(load, caches.experiment, threads)
    ) as pool:
        for _ in bar(pool.map(_execute_here, runs)):
            pass


def _begin(load: Callable[[], FrozenClip], experiment: Experiment, threads: int) -> None:
    global _caches
    torch.set_num_threads(threads)
    _caches = Caches(load(), experiment)


def _execute_here(run: Run) -> None:
    execute(run, _caches)


# -- before: what would be done ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a plan would do.

    Attributes:
        runs: all of them; ``finished`` of them are done.
        finished: runs that have their result.
        images: images to encode, by cache; 0 for a cache that is there.
        seconds_encoding, seconds_training: estimated from a few measured images and steps, without those done.
    """

    runs: int
    finished: int
    images: dict[str, int]
    seconds_encoding: float
    seconds_training: float

    @property
    def seconds(self) -> float:
        return self.seconds_encoding + self.seconds_training

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds}


def forecast(runs: Sequence[Run], experiment: Experiment, clip: FrozenClip) -> Forecast:
    """Look at the data and what is there, measure a few images and steps, and do nothing else."""
    check_data(runs, experiment.root)
    caches = Caches(clip, experiment)
    images = {}
    for key in caches.needed(runs):
        path, wanted = caches.images(*key)
        images[path.relative_to(experiment.out / "cache").as_posix()] = (
            0 if (path / "manifest.json").is_file() else len(wanted)
        )
    left = [run for run in runs if _record(experiment.out / run.folder) is None]
    steps = {(run.source, run.method, run.protocol): 0.0 for run in left}
    for key in steps:
        steps[key] = _seconds_a_run(next(r for r in left if (r.source, r.method, r.protocol) == key), caches)
    # Steps grow with the images; the first run of each kind was measured.
    training = sum(steps[run.source, run.method, run.protocol] * (run.shots or 1) for run in left)
    return Forecast(
        runs=len(runs),
        finished=len(runs) - len(left),
        images=images,
        seconds_encoding=sum(images.values()) * _seconds_an_image(clip) if any(images.values()) else 0.0,
        seconds_training=training,
    )


def _seconds_an_image(clip: FrozenClip) -> float:
    height, width = (clip.preprocess_cfg["size"],) * 2 if isinstance(clip.preprocess_cfg["size"], int) else (
        clip.preprocess_cfg["size"]
    )  # fmt: skip
    pixels = torch.zeros(8, 3, height, width)
    clip.encode_image(pixels[:1])
    began = time.perf_counter()
    clip.encode_image(pixels)
    return (time.perf_counter() - began) / len(pixels)


def _seconds_a_run(run: Run, caches: Caches) -> float:
    """Both stages, for each image of a class (of the whole set, where all are used), from two epochs of one step."""
    clip, experiment = caches.clip, caches.experiment
    data = caches.data(run.source)
    data = data.base_novel()[0] if run.protocol == "base-to-novel" else data
    classes, images = len(data.classnames), len(data.train) if run.shots is None else len(data.classnames)
    x = F.normalize(torch.randn(classes, clip.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = FeatureCache.from_tensors(x, torch.arange(classes), data.classnames)
    templates, seconds = templates_for(run.source, experiment.templates), 0.0
    solution: Any = None
    for stage in ("tune", "fit"):
        given = dict(getattr(experiment, stage))
        epochs, batch = given.pop("epochs", 50), given.pop("batch_size", 32 if stage == "tune" else 128)
        common = {"epochs": 2, "batch_size": min(batch, classes), "zero_shot": templates, "progress": False} | given
        done = (
            tune(clip, features, method=run.method, **common)
            if stage == "tune"
            else fit(clip, features, solution, **common)
        )
        solution = done.solution
        if stage == "fit" or experiment.checkpoints is None:
            seconds += done.timings["ms_per_step"] / 1e3 * epochs * images / batch
    return seconds


# -- after: the table and the figure ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table: means over seeds.

    Attributes:
        protocol: one of ``PROTOCOLS``.
        dataset: the source, or "mean" over several.
        method: stage 1.
        solution: "zero-shot", "tuned", "weight average", "logit ensemble" or "MERGETUNE".
        values: column -> percent.
        spread: column -> standard deviation over seeds, percent; 0 for one seed; empty for means over datasets.
        seeds: number of runs.
    """

    protocol: str
    dataset: str
    method: str
    solution: str
    values: dict[str, float]
    spread: dict[str, float]
    seeds: int

    @property
    def published(self) -> dict[str, float]:
        """The paper's figures, ViT-B/16 over all eleven datasets: of the mean only."""
        return PUBLISHED.get((self.protocol, self.method, self.solution), {}) if self.dataset == "mean" else {}

    def show(self, column: str) -> str:
        """A cell: the mean, and the deviation where there are several seeds."""
        deviation = f" ± {self.spread[column]:.2f}" if self.seeds > 1 and self.spread else ""
        return f"{self.values[column]:.2f}{deviation}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | ({"published": self.published} if self.published else {})


def tabulate(records: Sequence[dict[str, Any]]) -> list[Line]:
    """The table of a protocol from its records: means over seeds, and over datasets where there are several."""
    groups: dict[tuple[str, str], dict[int, dict[str, dict[str, float]]]] = {}
    for record in records:
        run = record["run"]
        by_seed = groups.setdefault((run["source"], run["method"]), {})
        by_solution = by_seed.setdefault(run["seed"], {})
        for target, solutions in record["results"].items():
            column = f"{run['shots']} shots" if run["protocol"] == "few-shot" else target
            for solution, report in solutions.items():
                by_solution.setdefault(solution, {})[column] = report["accuracy"]
    protocol = records[0]["run"]["protocol"]
    lines = [
        _line(protocol, dataset, method, solution, [found[solution] for found in by_seed.values()])
        for (dataset, method), by_seed in groups.items()
        for solution in next(iter(by_seed.values()))
    ]
    several = len({line.dataset for line in lines}) > 1
    return lines + (_means(lines) if several else [])


def _line(protocol: str, dataset: str, method: str, solution: str, runs: list[dict[str, float]]) -> Line:
    values = {column: statistics.fmean(run[column] for run in runs) for column in runs[0]}
    every = [run | _summary(protocol, run) for run in runs]
    values |= _summary(protocol, values)  # HM of the mean accuracies, as published
    spread = {column: statistics.stdev(run[column] for run in every) if len(every) > 1 else 0.0 for column in values}
    return Line(protocol, dataset, method, solution, values, spread, len(runs))


def _summary(protocol: str, values: dict[str, float]) -> dict[str, float]:
    """The columns that are made of others."""
    if protocol == "base-to-novel":
        return {"HM": harmonic_mean(values["base"], values["novel"])}
    others = [value for column, value in values.items() if column != "imagenet"]
    return {} if protocol == "few-shot" or not others else {"mean of the others": statistics.fmean(others)}


def _means(lines: Sequence[Line]) -> list[Line]:
    """Means over the datasets; HM is that of the mean accuracies, as published."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.method, line.solution), []).append(line)
    means = []
    for (method, solution), found in groups.items():
        values = {column: statistics.fmean(line.values[column] for line in found) for column in found[0].values}
        if "HM" in values:
            values["HM"] = harmonic_mean(values["base"], values["novel"])
        means.append(Line(found[0].protocol, "mean", method, solution, values, {}, found[0].seeds))
    return means


def save_table(records: Sequence[dict[str, Any]], folder: Path) -> list[Line]:
    """Write ``table.json`` and ``figure.png`` of a protocol's records into a folder; returns the table."""
    lines = tabulate(records)
    draw(records, folder / "figure.png")
    write_atomically(folder / "table.json", f"{json.dumps([line.to_json() for line in lines], indent=1)}\n".encode())
    return lines


def draw(records: Sequence[dict[str, Any]], file: str | Path) -> None:
    """The figure of a protocol.

    base-to-novel: base against novel accuracy, an arrow from tuned to MERGETUNE for each dataset. few-shot: accuracy
    over shots. robust: accuracy on ImageNet against the shifted sets, over the mixing coefficient. Others: bars.
    """
    from matplotlib.figure import Figure  # here, and without pyplot: no display is needed and no state is shared

    lines, protocol = tabulate(records), records[0]["run"]["protocol"]
    methods = list(dict.fromkeys(line.method for line in lines))
    figure = Figure(figsize=(5.2 * len(methods), 4.6), layout="constrained")
    for axis, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        own = [line for line in lines if line.method == method]
        if protocol == "robust":
            _draw_mixes(axis, [record for record in records if record["run"]["method"] == method])
        else:
            {"base-to-novel": _draw_halves, "few-shot": _draw_shots}.get(protocol, _draw_targets)(axis, own)
        axis.set_title(TUNE_METHODS[method])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


_COLORS = {"zero-shot": "#7f7f7f", "tuned": "#7570b3", "MERGETUNE": "#d95f02"}


def _draw_halves(axis: Any, lines: Sequence[Line]) -> None:
    for dataset in dict.fromkeys(line.dataset for line in lines if line.dataset != "mean"):
        at = {line.solution: (line.values["base"], line.values["novel"]) for line in lines if line.dataset == dataset}
        axis.annotate("", at["MERGETUNE"], at["tuned"], arrowprops={"arrowstyle": "->", "color": "#bbbbbb"})
        axis.annotate(dataset, at["MERGETUNE"], fontsize=6)
    for solution, color in _COLORS.items():
        found = [line.values for line in lines if line.solution == solution and line.dataset != "mean"]
        axis.scatter([v["base"] for v in found], [v["novel"] for v in found], color=color, s=16, label=solution)
    axis.set(xlabel="base classes (%)", ylabel="novel classes (%)")


def _draw_shots(axis: Any, lines: Sequence[Line]) -> None:
    of_mean = [line for line in lines if line.dataset == "mean"] or lines
    for line in of_mean:
        if line.solution in _COLORS:
            shots = [int(column.split()[0]) for column in line.values]
            axis.plot(shots, line.values.values(), color=_COLORS[line.solution], marker="o", label=line.solution)
    axis.set(xlabel="images a class", ylabel="accuracy (%)")


def _draw_targets(axis: Any, lines: Sequence[Line]) -> None:
    columns = list(lines[0].values)
    found = [line for line in lines if line.solution in _COLORS]
    for i, line in enumerate(found):
        places = [place + (i - 1) * 0.27 for place in range(len(columns))]
        axis.bar(places, [line.values[c] for c in columns], 0.25, color=_COLORS[line.solution], label=line.solution)
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="accuracy (%)")


def _draw_mixes(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    def curve(target: str, name: str) -> list[float]:
        return [statistics.fmean(values) for values in zip(*(r["mixes"][target][name] for r in records), strict=True)]

    first, *shifted = records[0]["mixes"]
    for name in records[0]["mixes"][first]:
        away = [statistics.fmean(values) for values in zip(*(curve(t, name) for t in shifted), strict=True)]
        axis.plot(curve(first, name), away, marker=".", label=name)
    axis.set(xlabel=f"{first} (%)", ylabel="mean of the shifted test sets (%)")
