"""Measures the choice of `fit --method auto` against every constant choice: one JSON file per cell.

A cell is a user with a few labelled images of some classes. The choice is made as `fit` makes it: half of the user's
classes are learned, the other half decides. Every candidate is then trained on all of the user's classes and tested on
them and on as many new classes, of which the choice has seen nothing.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import mergetune as mt
from mergetune.experiments.cells import halves_of
from mergetune.experiments.choosing import setting_name, settings_to_try, too_few
from mergetune.experiments.icons import STAGE_1, TEMPLATE, load_icons
from mergetune.experiments.making import KINDS, MERGETUNE, ON_MERGETUNE, Making
from mergetune.experiments.measuring import fold_of, measure, other_images
from mergetune.experiments.paired import right_of
from mergetune.io import write_json
from mergetune.solutions import Solution

sys.path.append(str(Path(__file__).resolve().parents[1] / "icon_residuals"))
import domains  # noqa: E402  # writes the icons' domains

PRECISION = "float32"  # figures must not depend on what the machine is fastest at
DOMAINS = ("tilted", "clean", "noisy", "badge")


@dataclass(frozen=True)
class Cell:
    """One user.

    Attributes:
        domain: which icons, see ``icon_residuals/domains.py``; or "random", tilted icons and a CLIP of random weights.
        partition: which half of the 100 classes the user's classes are drawn from.
        shots: training images per class.
        classes: number of the user's classes, and of new ones.
        seed: of the draws and the training.
    """

    domain: str
    partition: int
    shots: int
    classes: int
    seed: int = 1

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.partition}-shots-{self.shots}-classes-{self.classes}-seed-{self.seed}"


def cells_of(stage: str) -> Iterator[Cell]:
    """The cells of a stage, those that matter most first.

    "rule" is what the rule was fixed on: tilted icons, partitions 0 and 1. "test" is everything else.
    """
    if stage == "rule":
        for classes in (50, 5):
            for partition in (0, 1):
                yield from (Cell("tilted", partition, shots, classes) for shots in (16, 4, 1))
        return
    for partition in (2, 3):
        yield Cell("random", partition, 16, 12)
        for shots in (16, 1, 4):
            for domain in ("tilted", "noisy", "clean", "badge"):
                for classes in (50, 5):
                    yield Cell(domain, partition, shots, classes)
        yield from (Cell("random", partition, shots, 12) for shots in (4, 1))


class Bench:
    """The CLIPs and the cached features of the domains."""

    def __init__(self, folder: Path, icons: Path | None) -> None:
        self.folder, self.icons = folder, icons
        self.clip, self.tilted = load_icons(folder)
        self._kept: dict[str, tuple[mt.FrozenClip, mt.Dataset, mt.FeatureCache, mt.FeatureCache]] = {}

    def domain(self, name: str) -> tuple[mt.FrozenClip, mt.Dataset, mt.FeatureCache, mt.FeatureCache]:
        """The CLIP, the images, and the features of the training and the test images."""
        if name not in self._kept:
            clip, data = self.clip, self.tilted
            if name == "random":
                clip = random_clip(self.clip)
            elif name != "tilted":
                domains.main(self.folder / "domains", icons=self.icons)
                data = mt.ImageFolder(self.folder / "domains" / name)
            features = self.folder / "features" / name
            caches = [mt.cache_features(clip, getattr(data, part), features / part) for part in ("train", "test")]
            self._kept[name] = (clip, data, *caches)
        return self._kept[name]


def random_clip(like: mt.FrozenClip, seed: int = 0) -> mt.FrozenClip:
    """A CLIP of the same layers whose weights are random: its zero-shot answers are guesses."""
    model = copy.deepcopy(like.model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # scales and biases of norms stay
            values = parameter.data.flatten()
            parameter.data = values[torch.randperm(len(values), generator=generator)].view_as(parameter)
    return mt.FrozenClip(model, like.tokenizer, "random weights")


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """The record of a cell: validation answers of the choice, and right test answers of every candidate."""
    began = time.perf_counter()
    clip, data, train, test = bench.domain(cell.domain)
    own, new = classes_of(len(data.classnames), cell)
    user = data.select(own)
    few = user.few_shot(cell.shots, cell.seed)
    others = other_images(user, few, cell.seed)
    features = train.select(few)
    making = Making(
        clip,
        (TEMPLATE,),
        seed=cell.seed,
        tune_options={**STAGE_1, "precision": PRECISION},
        fit_options={"precision": PRECISION},
        top_options={"precision": PRECISION},
    )
    settings = settings_to_try({})
    halves = halves_of(len(own), cell.seed + 1)
    fold = fold_of(features, None if others is None else train.select(others), halves, (TEMPLATE,), cell.seed)
    record: dict[str, Any] = {"cell": asdict(cell), "clip": clip.fingerprint}
    with tempfile.TemporaryDirectory() as folder:
        labels = {part: cache.labels for part, cache in fold.val.items()}
        found = measure(making, fold, Path(folder) / "measure", settings, kinds=KINDS, choosing=not too_few(labels))
        record["chosen"] = {"kind": found.row, "setting": setting_name(found.setting)}
        record["validation"] = {
            "labels": {part: own.tolist() for part, own in labels.items()},
            "right": {
                name: {part: "".join(map(str, bits.int().tolist())) for part, bits in right.items()}
                for name, right in found.right.items()
            },
        }
        record["measuring_seconds"] = time.perf_counter() - began
        made = constants(making, features, Path(folder) / "all", settings, (found.row, found.setting))
        tests = {"base": test.select_classes(own), "novel": test.select_classes(new)}
        record["images"] = {part: _counts(cache.labels, cache) for part, cache in tests.items()}
        record["right"] = {
            name: {
                part: _counts(tests[part].labels[right], tests[part])
                for part, right in right_of(making.classifier(solution), tests).items()
            }
            for name, solution in made.items()
        }
    return record | {"seconds": time.perf_counter() - began}


def classes_of(count: int, cell: Cell) -> tuple[list[int], list[int]]:
    """The user's classes and the new ones: as many of each half of the partition, drawn at random."""
    generator = torch.Generator().manual_seed(cell.seed)
    found = []
    for half in halves_of(count, cell.partition).values():
        drawn = torch.randperm(len(half), generator=generator)[: cell.classes].tolist()
        found.append(sorted(half[i] for i in drawn))
    return found[0], found[1]


def constants(
    making: Making,
    features: mt.FeatureCache,
    folder: Path,
    settings: Sequence[dict[str, float]],
    chosen: tuple[str, dict[str, float]],
) -> dict[str, Solution]:
    """Every candidate, trained on all of the user's classes: setting or kind -> solution.

    A residual stands on MERGETUNE with its defaults, and on the chosen setting if the choice put one there.
    """
    tuned = making.tuned(features, folder / "tuned").solution
    names = [setting_name(setting) for setting in settings]
    merged = making.merged(features, [tuned], {folder / str(i): setting for i, setting in enumerate(settings)})
    made = {name: result.solution for name, result in zip(names, merged, strict=True)}
    for i, kind in enumerate(KINDS):
        if kind != MERGETUNE:
            made[kind] = making.kind(kind, features, tuned, merged[0], folder / f"kind-{i}").solution
    kind, setting = chosen
    if kind == ON_MERGETUNE and setting != settings[0]:
        base = merged[settings.index(setting)]
        made[f"{kind}, {setting_name(setting)}"] = making.kind(kind, features, tuned, base, folder / "chosen").solution
    return made


def _counts(labels: torch.Tensor, features: mt.FeatureCache) -> list[int]:
    return torch.bincount(labels, minlength=len(features.classnames)).tolist()


# -- the command -------------------------------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Argument(help="folder for the domains, their features and cells/*.json")],
    stage: Annotated[str, typer.Option(help="rule: what the rule was fixed on; test: everything else")] = "test",
    icons: Annotated[
        Path | None, typer.Option(help="clean icons, see icon_residuals/domains.py; without them: tilted and random")
    ] = None,
    minutes: Annotated[float, typer.Option(help="start no cell after so many minutes")] = 1e9,
) -> None:
    """Measure the cells that OUT lacks."""
    if stage not in ("rule", "test"):
        raise typer.BadParameter(f"--stage must be rule or test, got {stage!r}")
    torch.set_num_threads(1)
    bench, began = Bench(out, icons), time.monotonic()
    for cell in tqdm(list(cells_of(stage)), desc=stage, unit="cell", disable=None):
        file = out / "cells" / stage / f"{cell.name}.json"
        if file.exists() or (icons is None and cell.domain not in ("tilted", "random")):
            continue
        if time.monotonic() - began > 60 * minutes:
            break
        record = run_cell(bench, cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
        chosen = record["chosen"]
        typer.echo(f"{cell.name}: {chosen['kind']}, {chosen['setting']} ({record['seconds']:.0f} s)")


if __name__ == "__main__":
    typer.run(main)
