"""Plans of the paper's experiments: the runs of each protocol, and the settings that results depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from mergetune.clip import FrozenClip
from mergetune.data import benchmark, check_dataset, templates_for
from mergetune.experiments.cells import check_seeds
from mergetune.experiments.published_schedules import schedule
from mergetune.facts import FitOptions
from mergetune.facts.brief import brief
from mergetune.facts.function_options import BETA, TABLE_PRECISION, TUNE_METHODS

ELEVEN = (
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397",
    "dtd", "eurosat", "ucf101",
)  # fmt: skip
SHIFTED = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
PROTOCOLS = {
    "base-to-novel": "train on half of the classes, test on these and on the other classes (CoCoOp)",
    "cross-dataset": "train on ImageNet, test on the other datasets (CoCoOp)",
    "domain": "train on ImageNet, test on its shifted test sets (CoOp)",
    "few-shot": "train on 1, 2, 4, 8 and 16 images per class, test on the same classes (CoOp)",
    "robust": "train a head on ImageNet, test on ImageNet and its shifted test sets, ensemble with zero-shot (WiSE-FT)",
}


@brief()
@dataclass(frozen=True)
class Run:
    """One run: a training set, a method and a seed.

    Attributes:
        protocol: one of ``PROTOCOLS``.
        source: the dataset for training.
        method: method of stage 1, one of ``TUNE_METHODS``.
        shots: training images per class; None takes all images.
        seed: seed of the draw and of the training.
        targets: the datasets for testing, or "base" and "novel" for the two halves of the source.
    """

    protocol: str
    source: str
    method: str
    shots: int | None
    seed: int
    targets: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Folder of the run, relative to the folder of results."""
        return Path(self.protocol, self.source, self.method, f"shots-{self.shots or 'all'}", f"seed-{self.seed}")

    @property
    def test_sets(self) -> tuple[str, ...]:
        """The datasets whose test images the run needs."""
        return (self.source,) if self.protocol == "base-to-novel" else self.targets


@brief()
@dataclass(frozen=True)
class Experiment:
    """Settings that all runs share. Only ``root`` and ``out`` are required.

    Attributes:
        root: the folder of the datasets, in CoOp's layout.
        out: the folder of results, caches and solutions.
        runs: the folder of results and solutions, if it is not ``out``.
        templates: the set of zero-shot templates, see :data:`mergetune.data.TEMPLATES`.
        checkpoints: path of the checkpoints of stage 1, which are then read instead of trained. The path may hold
            {dataset}, {method}, {shots} and {seed}: "output/{dataset}/shots_{shots}/CoOp/seed{seed}".
        tune: more keyword arguments of :func:`mergetune.tune`; they replace those of the published schedule.
        fit: more keyword arguments of :func:`mergetune.fit`.
        cache: more keyword arguments of :func:`mergetune.cache_features`.
        views: views per training image, all but the first cropped and flipped at random; the publications draw a new
            one per step.
    """

    root: Path
    out: Path
    templates: str = "official"
    checkpoints: str | None = None
    tune: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    views: int = 1
    runs: Path | None = None

    def __post_init__(self) -> None:
        for name in ("root", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)).expanduser())
        templates_for("imagenet", self.templates)
        known = {"dataset", "method", "shots", "seed"}
        if unknown := {name for _, name, *_ in Formatter().parse(self.checkpoints or "") if name} - known:
            raise ValueError(f"checkpoints may hold {', '.join(sorted(known))} in braces, got {sorted(unknown)[0]!r}")
        if self.fit.get("weight_ensemble"):
            raise ValueError("fit must not hold weight_ensemble: protocol robust has the row 'MERGETUNE + WE'")

    @property
    def results(self) -> Path:
        """Where the runs are kept."""
        return self.out if self.runs is None else self.runs

    def stage_1(self, run: Run) -> dict[str, Any]:
        """Settings of :func:`mergetune.tune`: the published ones of the run, replaced by those of ``tune``."""
        published = schedule(run.protocol, run.method, run.source, run.shots)
        return {"method": run.method, "precision": TABLE_PRECISION, **published, **self.tune}

    def stage_2(self, run: Run) -> dict[str, Any]:
        """Settings of :func:`mergetune.fit`. After a start from random tokens it starts at the tuned prompt (tau 1).

        No template has as many tokens as such a prompt, so there is no zero-shot prompt to mix in. Defaults of ``lam``,
        ``beta`` and ``tau`` are among the settings, so that they are recorded with the results.
        """
        random_start = self.stage_1(run).get("n_ctx") is not None
        usual = {"lam": FitOptions.lam, "beta": BETA, "tau": 1.0 if random_start else FitOptions.tau}
        return {"precision": TABLE_PRECISION, **usual, **self.fit}

    def settings(self, clip: FrozenClip, run: Run) -> dict[str, Any]:
        """What the result of a run depends on."""
        return {
            "clip": clip.name,
            "fingerprint": clip.fingerprint,
            "templates": self.templates,
            "checkpoints": self.checkpoints,
            "tune": self.stage_1(run),
            "fit": self.stage_2(run),
            "views": self.views,
        }

    def checkpoint(self, run: Run) -> Path | None:
        """Path of the stage-1 checkpoint of a run; None if stage 1 is trained."""
        if self.checkpoints is None:
            return None
        return Path(
            self.checkpoints.format(dataset=run.source, method=run.method, shots=run.shots or "all", seed=run.seed)
        )


def plan(
    protocol: str,
    *,
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (1, 2, 3),
    shots: Sequence[int] = (),
) -> tuple[Run, ...]:
    """Returns the runs of a protocol.

    Args:
        protocol: one of ``PROTOCOLS``.
        datasets: for base-to-novel and few-shot, the datasets for training and testing; by default the eleven datasets.
            The other protocols train on ImageNet, and these are the test sets: by default the ten other datasets
            (cross-dataset) or the four shifted test sets of ImageNet.
        methods: methods in ``TUNE_METHODS``; by default "head" for robust and "coop" for the other protocols.
        seeds: the seeds; there is one run per seed.
        shots: training images per class; by default 1, 2, 4, 8, 16 for few-shot, all images for robust, otherwise 16.

    Raises:
        ValueError: an unknown name, or a combination that the protocol does not allow.
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
    for what, values in (("datasets", named), ("methods", methods), ("shots", shots)):
        if len(set(values)) != len(values):
            raise ValueError(f"{what} must not repeat, got {list(values)}")
    check_seeds(seeds)
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
    """Checks, before any computation, that the root holds all files of all datasets.

    Raises:
        FileNotFoundError: files are missing; the message lists those of all datasets.
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
