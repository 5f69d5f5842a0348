"""Measures class residuals and image maps on every text classifier: one JSON file per cell, then a table.

A cell is one half of the classes to learn (a partition) and one draw of 16 images per class (a seed).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tables
import torch
import typer
from tqdm import tqdm

import mergetune as mt
from mergetune.evaluation import Classifier
from mergetune.experiments.icons import SHOTS, STAGE_1, TEMPLATE, load_icons
from mergetune.io import write_atomically, write_json
from mergetune.solutions import Solution
from mergetune.training import fit_job, train_together, tune_job

COMMON = {"precision": "float32", "progress": False}  # figures must not depend on what the machine is fastest at


@dataclass(frozen=True)
class Settings:
    """What every cell is trained with, and what a cell's file records.

    The defaults were fixed on the tilted icons, partition 0, seed 1, and are the same in every domain: those of `fit`
    and of `tune` for "residual" (lam 8) and "map" (lam 0.5). Nothing is chosen on test images.

    Attributes:
        shots: training images per class.
        prompts: options of `tune` for CoOp and KgCoOp.
        repair: options of `fit` for MERGETUNE.
        tops: options of `tune` for residuals and maps.
    """

    shots: int = SHOTS
    prompts: Mapping[str, Any] = field(default_factory=lambda: dict(STAGE_1))
    repair: Mapping[str, Any] = field(default_factory=dict)
    tops: Mapping[str, Any] = field(default_factory=dict)


def run(
    clip: mt.FrozenClip,
    images: mt.Dataset,
    out: Path,
    *,
    partitions: Sequence[int] = (0, 1, 2, 3),
    seeds: Sequence[int] = (1, 2, 3),
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Measure all cells and write `results.json` and `table.md`.

    Args:
        clip: the frozen CLIP.
        images: training and test images of all classes.
        out: folder for features, cells and tables. A cell that is there is not measured again.
        partitions: 0 learns the first half of the classes, as CoOp does; 1, 2, ... a random half each.
        seeds: of the draw of training images and of the order of batches.
        settings: what is trained how; None: the defaults.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: a cell in `out` was measured with other settings, images or another CLIP.
    """
    settings = settings or Settings()
    train = mt.cache_features(clip, images.train, out / "features" / "train")
    test = mt.cache_features(clip, images.test, out / "features" / "test")
    about = {
        "backbone": clip.fingerprint,
        "features": [train.digest, test.digest],
        "template": TEMPLATE,
        "settings": vars(settings),
    }
    cells = []
    for partition in tqdm(partitions, desc="partitions", disable=None):
        base = base_classes(len(images.classnames), partition)
        files = {seed: out / "cells" / f"partition-{partition}-seed-{seed}.json" for seed in seeds}
        shots = {
            seed: train.select(images.select(base).few_shot(settings.shots, seed))
            for seed, file in files.items()
            if not file.exists()
        }
        for seed, solutions in text_classifiers(clip, shots, images.classnames, settings).items():
            cell = {
                "partition": partition,
                "seed": seed,
                "base": base,
                "classnames": list(images.classnames),
                "images": torch.bincount(test.labels, minlength=len(test.classnames)).tolist(),
                "right": {
                    row: right_answers(classify, test, base)
                    for row, classify in rows(clip, solutions, shots[seed], settings).items()
                },
                **about,
            }
            files[seed].parent.mkdir(exist_ok=True)
            write_json(files[seed], cell)
        cells += [_read(file, about) for file in files.values()]
    results = tables.summarise(cells)
    write_json(out / "results.json", results, indent=2)
    write_atomically(out / "table.md", tables.markdown(results).encode())
    return results


def base_classes(count: int, partition: int) -> list[int]:
    """The half of the classes that is learned: the first one (0), or a random one (1, 2, ...)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(partition)) if partition else range(count)
    return sorted(int(c) for c in order[: (count + 1) // 2])


# -- what is compared --------------------------------------------------------------------------------------------------


def text_classifiers(
    clip: mt.FrozenClip, shots: Mapping[int, mt.FeatureCache], classnames: Sequence[str], settings: Settings
) -> dict[int, dict[str, Solution]]:
    """Zero-shot, CoOp, KgCoOp, WiSE-FT and MERGETUNE for each seed; the prompts of all seeds are trained together.

    Args:
        clip: the frozen CLIP.
        shots: seed -> features of the base classes' training images.
        classnames: all classes.
        settings: what is trained how.
    """
    wanted = [(method, seed) for method in ("coop", "kgcoop") for seed in shots]
    tuned = train_together(
        [
            tune_job(clip, shots[seed], method=method, template=TEMPLATE, seed=seed, **settings.prompts, **COMMON)
            for method, seed in wanted
        ]
    )
    prompts = {key: result.solution for key, result in zip(wanted, tuned, strict=True)}
    repaired = train_together(
        [
            fit_job(clip, few, prompts["coop", seed], zero_shot=TEMPLATE, seed=seed, **settings.repair, **COMMON)
            for seed, few in shots.items()
        ]
    )
    zero_shot = mt.Templates((TEMPLATE,))
    return {
        seed: {
            tables.ZERO_SHOT: zero_shot,
            tables.COOP: prompts["coop", seed],
            tables.KGCOOP: prompts["kgcoop", seed],
            tables.WISE: wise_ft(clip, zero_shot, prompts["coop", seed], classnames),
            tables.MERGETUNE: result.solution,
        }
        for seed, result in zip(shots, repaired, strict=True)
    }


def wise_ft(clip: mt.FrozenClip, zero_shot: Solution, tuned: Solution, classnames: Sequence[str]) -> mt.Head:
    """WiSE-FT of class embeddings, half and half, as a cosine head of all classes."""
    average = mt.weight_average(mt.classifier(clip, zero_shot), mt.classifier(clip, tuned), 0.5)
    return mt.Head(average(classnames), tuple(classnames), logit_scale=clip.logit_scale, normalize=True)


def rows(
    clip: mt.FrozenClip, solutions: Mapping[str, Solution], few: mt.FeatureCache, settings: Settings
) -> dict[str, Classifier]:
    """The rows of the table: every text classifier plain, with a map, with a residual, and with both.

    The residual of the last row is trained on mapped features, so the map comes first.
    """
    found: dict[str, Classifier] = {}
    for name, plain in solutions.items():
        mapped = mt.tune(clip, few, method="map", base=plain, **settings.tops, **COMMON).solution
        residual, both = (
            mt.tune(clip, few, method="residual", base=base, **settings.tops, **COMMON).solution
            for base in (plain, mapped)
        )
        stacks = dict(zip(tables.TOPS, (plain, mapped, residual, both), strict=True))
        found |= {name + top: mt.classifier(clip, solution) for top, solution in stacks.items()}
    ends = (mt.classifier(clip, solutions[name]) for name in (tables.ZERO_SHOT, tables.COOP))
    return found | {tables.ENSEMBLE: mt.logit_ensemble(*ends)}


def right_answers(classify: Classifier, test: mt.FeatureCache, base: Sequence[int]) -> dict[str, list[int]]:
    """How many test images of each class are right, "half" among the classes of its half, "joint" among all."""
    x, count = test.tensor(), len(test.classnames)
    logits = classify.logits(test.classnames, x)
    learned = torch.zeros(count, dtype=torch.bool).index_fill(0, torch.tensor(base), True)
    same_half = learned[test.labels][:, None] == learned
    return {
        name: torch.bincount(test.labels[scores.argmax(1) == test.labels], minlength=count).tolist()
        for name, scores in (("half", logits.where(same_half, -torch.inf)), ("joint", logits))
    }


def _read(file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    cell = json.loads(file.read_text(encoding="utf-8"))
    if other := [name for name, value in about.items() if cell.get(name) != value]:
        raise ValueError(f"{file} was measured with other {', '.join(other)}: give another folder, or remove this one")
    return cell


# -- the command -------------------------------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Argument(help="folder for features, cells, results.json and table.md")],
    images: Annotated[
        Path | None, typer.Option(help="folder that domains.py wrote; without it: the embedded tilted icons")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="any open_clip model; without it: the embedded CLIP")] = None,
    partition: Annotated[list[int], typer.Option(min=0, help="halves of the classes")] = [0, 1, 2, 3],  # noqa: B006
    seed: Annotated[list[int], typer.Option(min=0, help="draws of training images")] = [1, 2, 3],  # noqa: B006
) -> None:
    """Measure the cells that OUT lacks, and write OUT/results.json and OUT/table.md."""
    clip, tilted = load_icons(out)
    clip = clip if backbone is None else mt.load_clip(backbone)
    data = tilted if images is None else mt.ImageFolder(images)
    results = run(clip, data, out, partitions=partition, seeds=seed)
    typer.echo(tables.markdown(results))


if __name__ == "__main__":
    typer.run(main)
