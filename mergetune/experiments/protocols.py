"""Execution of the paper's experiments on the benchmark datasets.

A run is one training set, method and seed: features are cached, stage 1 fine-tunes, stage 2 (MERGETUNE) repairs, and
every solution is tested on the targets of the run. Each run writes one JSON file; a run that has one is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from mergetune.clip import FrozenClip
from mergetune.data import CoOpDataset, Dataset, FeatureCache, ImageList, cache_features, few_shot_path, templates_for
from mergetune.data.benchmarks import missing_images
from mergetune.evaluation import Hits, count_hits, logit_ensemble, weight_average
from mergetune.experiments.engine import Candidate, Record, Together, begun, counted, finish, tested, usual
from mergetune.experiments.protocol_plans import Experiment, Run, check_data
from mergetune.io import end_workers, hidden, torchrun_team, unaware_of_interrupts, writing_in
from mergetune.solutions import open_solution
from mergetune.training import fit, tune

RECORD = "run.json"
MIXES = tuple(i / 10 for i in range(11))  # mixing coefficients of "robust"


@dataclass(frozen=True, eq=False)
class Caches:
    """The feature caches of an experiment: training images, as drawn with each seed from all classes, and test sets."""

    clip: FrozenClip
    experiment: Experiment

    @cached_property
    def data(self) -> Callable[[str], Dataset]:
        """Function of a dataset's name that returns the dataset; each dataset is read once."""
        return lru_cache(partial(CoOpDataset, root=self.experiment.root))

    def images(self, name: str, shots: int | None, seed: int | None) -> tuple[Path, ImageList]:
        """Returns cache folder and images of a test set (seed None), or of the training images drawn with a seed."""
        folder = self.experiment.out / "cache" / name
        if seed is None:
            return folder / "test", self.data(name).test
        part = "train" if shots is None else f"train-shots-{shots}-seed-{seed}"
        part += f"-views-{self.experiment.views}" if self.experiment.views > 1 else ""
        return folder / part, self.draw(self.data(name), name, shots, seed)

    def draw(self, data: Dataset, name: str, shots: int | None, seed: int) -> ImageList:
        """Returns the training images: those in CoOp's file for this seed if there is one, else drawn as CoOp draws."""
        stored = None if shots is None else few_shot_path(name, self.experiment.root, shots, seed)
        return data.few_shot_file(stored) if stored and stored.is_file() else data.few_shot(shots, seed)

    def needed(self, runs: Sequence[Run]) -> list[tuple[str, int | None, int | None]]:
        """Returns (dataset, shots, seed) of every cache that the runs need, test sets first."""
        tests = [(name, None, None) for run in runs for name in run.test_sets]
        draws = [(run.source, run.shots, run.seed if run.shots else 0) for run in runs]
        return list(dict.fromkeys(tests + draws))

    def build(self, name: str, shots: int | None = None, seed: int | None = None) -> None:
        """Builds a cache if it does not exist; under torchrun, the ranks share the work."""
        path, images = self.images(name, shots, seed)
        views = 1 if seed is None else self.experiment.views
        cache_features(self.clip, images, path, **{"views": views, **self.experiment.cache})

    def get(self, name: str, shots: int | None = None, seed: int | None = None) -> FeatureCache:
        """Opens a cache that was built."""
        path, images = self.images(name, shots, seed)
        return FeatureCache.open(path).select(images)

    def train(self, run: Run) -> FeatureCache:
        """Returns the training features of a run."""
        features = self.get(run.source, run.shots, run.seed if run.shots else 0)
        if run.protocol != "base-to-novel":
            return features
        return features.select(self.draw(self.data(run.source).base_novel()[0], run.source, run.shots, run.seed))

    def tests(self, run: Run) -> Iterator[tuple[str, dict[str, FeatureCache]]]:
        """Yields each dataset of the run's targets, and the features of these targets by name."""
        if run.protocol != "base-to-novel":
            yield from ((name, {name: self.get(name)}) for name in run.targets)
            return
        features, halves = self.get(run.source), self.data(run.source).base_novel()
        yield run.source, {t: features.select(half.test) for t, half in zip(run.targets, halves, strict=True)}


def head_of(run: Run, experiment: Experiment, clip: FrozenClip) -> Record:
    """What the record of a run holds before any work."""
    return {"run": asdict(run), "settings": experiment.settings(clip, run), "in_words": {"fingerprint": clip.name}}


def execute(run: Run, caches: Caches, *, progress: bool = False) -> Record:
    """Executes a run whose caches are built, or reads its result if the run is finished.

    A run that was interrupted continues with its last epoch.

    Returns:
        The record of the run: run, settings, the counts of :mod:`mergetune.experiments.engine`, and the summary
        ``results[target][solution]`` with accuracy, images and standard error. For "robust", the record also has
        ``mixes[target][ensemble]``: accuracies at the coefficients ``MIXES``.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    clip, experiment = caches.clip, caches.experiment
    folder = experiment.results / run.folder
    record = begun(folder / RECORD, head_of(run, experiment, clip))
    if "results" in record:
        return record
    began = time.perf_counter()
    features = caches.train(run)
    templates = templates_for(run.source, experiment.templates)
    common = {"seed": run.seed, "progress": progress}
    checkpoint = experiment.checkpoint(run)
    if checkpoint is None:
        stage_1 = {"zero_shot": templates, "resume": folder / "tuned"}
        tuned = tune(clip, features, **common | stage_1 | experiment.stage_1(run))
        tuned.save(folder / "tuned")
        tuned = tuned.solution
    else:
        tuned = open_solution(checkpoint, classnames=features.classnames)
    stage_2 = {"zero_shot": templates, "resume": folder / "merged"}
    merged = fit(clip, features, tuned, **common | stage_2 | experiment.stage_2(run))
    merged.save(folder / "merged")

    found: dict[str, dict[str, Hits]] = {}
    mixes = {}
    for name, tests in caches.tests(run):
        together = Together(clip)
        made = (templates_for(name, experiment.templates), tuned, merged.solution)
        zero_shot, *ends = map(together.classifier, made)
        rows = usual(zero_shot, *ends)
        if run.protocol == "robust":
            rows.append(Candidate("MERGETUNE + WE", weight_average(zero_shot, ends[1])))
        for row, parts in tested(rows, tests).items():
            found.setdefault(row, {}).update(parts)
        if run.protocol == "robust":
            mixes[name] = {
                f"{kind} ensemble of {solution}": [
                    count_hits(mix(zero_shot, end, t)(tests[name].classnames), tests[name]).accuracy for t in MIXES
                ]
                for solution, end in zip(("tuned", "MERGETUNE"), ends, strict=True)
                for kind, mix in (("weight", weight_average), ("logit", logit_ensemble))
            }
    results = {part: {row: parts[part].to_json() for row, parts in found.items()} for part in found["zero-shot"]}
    done = {"results": results} | ({"mixes": mixes} if mixes else {}) | counted(found)
    lacking = {name: missing_images(caches.data(name)) for name in (run.source, *run.test_sets)}
    done["incomplete"] = {name: words for name, words in lacking.items() if words}
    return finish(folder / RECORD, record, done | {"seconds": time.perf_counter() - began})


def reproduce(
    runs: Sequence[Run],
    experiment: Experiment,
    load: Callable[[], FrozenClip],
    *,
    clip: FrozenClip | None = None,
    processes: int = 1,
    progress: bool = True,
) -> list[Record]:
    """Executes all runs: first the caches are built, then the runs, which do not depend on each other.

    Under torchrun, the ranks share the encoding and the runs; every rank returns all records.

    Args:
        runs: the runs, as :func:`plan` returns them.
        experiment: settings that all runs share.
        load: function that returns the CLIP. Every process calls the function, so with several processes it must be
            picklable, for example ``partial(load_clip, name, pretrained)``.
        clip: the CLIP that ``load`` returns, if it was loaded already.
        processes: number of runs that are executed at the same time.
        progress: show bars on a terminal.

    Raises:
        ValueError: an argument is out of range, data are missing, or the folder holds runs with other settings.
        RuntimeError: another process works in the folder of results.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    check_data(runs, experiment.root)
    caches = Caches(load() if clip is None else clip, experiment)
    if any(run.method != "head" for run in runs):
        _ = caches.clip.text  # a CLIP that takes no prompts is refused here, before any image is encoded
    with ExitStack() as held:
        with torchrun_team() as team:
            team.lead(lambda: held.enter_context(writing_in(experiment.results)))
        for key in caches.needed(runs):
            caches.build(*key)
        with torchrun_team() as team:
            team.each(lambda: _share(runs[team.rank :: team.world], caches, load, processes, progress))
        return [execute(run, caches) for run in runs]  # every result is on disk here


def _share(runs: Sequence[Run], caches: Caches, load: Callable[[], FrozenClip], processes: int, progress: bool) -> None:
    """Executes the runs of one rank, one after the other or in several processes."""
    bar = partial(tqdm, total=len(runs), desc="runs", unit="run", disable=hidden(progress))
    if processes == 1 or len(runs) < 2:
        for run in bar(runs):
            execute(run, caches, progress=progress)
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(load, caches.experiment, threads)
    ) as pool:
        try:
            with unaware_of_interrupts():  # here the processes start
                started = [pool.submit(_execute_here, run) for run in runs]
            for run in bar(started):
                run.result()
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
        except BaseException:
            end_workers()  # otherwise leaving the pool waits for the runs in progress
            raise


def _begin(load: Callable[[], FrozenClip], experiment: Experiment, threads: int) -> None:
    global _caches
    torch.set_num_threads(threads)
    _caches = Caches(load(), experiment)


def _execute_here(run: Run) -> None:
    execute(run, _caches)
