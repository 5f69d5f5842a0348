"""Measures heads on icons: zero-shot, fine-tuned, WiSE-FT and MERGETUNE with several values of lam.

A cell is a user with a few labelled icons of some classes. A head is fine-tuned on them and repaired. Tested are the
user's classes, the same icons changed (noisy, badge), and the user's classes beside as many new ones, for which
zero-shot rows stand in the head.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import mergetune as mt
from mergetune.evaluation import accuracy, score
from mergetune.experiments.cells import Task, halves_of
from mergetune.experiments.icons import TEMPLATE, icons_task
from mergetune.experiments.tables import t_interval
from mergetune.io import write_json
from mergetune.training.curvature import head_lam

sys.path.append(str(Path(__file__).resolve().parents[1] / "icon_residuals"))
import domains  # noqa: E402  # changes icons

EXACT = {"precision": "float32", "progress": False}
SHIFTS = ("noisy", "badge")
COLUMNS = ("own classes", "shifted", "joint HM", "mean")
GRID = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # values of lam of the stage rule
PLAIN = 8.0  # lam before heads had a unit: the weight of the surrogate itself
OPENAI = 100.0  # logit scale of OpenAI's models


@dataclass(frozen=True)
class Cell:
    """One user.

    Attributes:
        partition: which half of the 100 classes the user's classes are drawn from.
        classes: number of the user's classes, and of new ones.
        shots: training images per class.
        lr: learning rate of the fine-tuning.
        seed: of the draws and the training.
    """

    partition: int
    classes: int
    shots: int
    lr: float
    seed: int


def cells_of(stage: str) -> Iterator[Cell]:
    """The cells of a stage. "rule" is what the unit was fixed on: partitions 0 and 1; "table" has 2 and 3."""
    for partition in (0, 1) if stage == "rule" else (2, 3):
        for classes in (50, 12, 5):
            for shots in (16, 4, 1):
                for lr in (0.01, 0.002):
                    yield from (Cell(partition, classes, shots, lr, seed) for seed in (1, 2, 3))


def shifted_icons(folder: Path, clip: mt.FrozenClip) -> list[mt.FeatureCache]:
    """The test icons of every class, changed as in ``icon_residuals/domains.py``."""
    test, found = mt.ImageFolder(folder / "images").test, []
    for name in SHIFTS:
        place = folder / "shifted" / name
        if not place.exists():
            domains.write_changed(test.root, place, domains.CHANGES[name])
        images = mt.ImageList(place, test.files, test.labels, test.classnames)
        found.append(mt.cache_features(clip, images, folder / "cache" / name))
    return found


def run_cell(clip: mt.FrozenClip, task: Task, shifted: Sequence[mt.FeatureCache], cell: Cell, stage: str) -> dict:
    """The record of a cell: row -> column -> percent, and the weight that lam 8 stands for."""
    own, new = classes_of(len(task.train.classnames), cell)
    train = task.fold(cell.partition, cell.shots, cell.seed).train
    train = train.select_classes([train.classnames.index(task.train.classnames[c]) for c in own])
    common: dict[str, Any] = {"zero_shot": TEMPLATE, "seed": cell.seed, **EXACT}
    tuned = mt.tune(clip, train, method="head", template=TEMPLATE, lr=cell.lr, **common).solution
    zero_shot = mt.Head.zero_shot(clip, train.classnames, TEMPLATE)
    unit = head_lam(1.0, train, zero_shot.weight, scale=zero_shot.logit_scale)

    def merged(lam: float) -> mt.Head:
        found = mt.fit(clip, train, tuned, lam=lam, **common).solution
        assert isinstance(found, mt.Head)
        return found

    heads = {"zero-shot": zero_shot, "tuned head": tuned, "WiSE-FT a=.5": mt.interpolate(zero_shot, tuned, 0.5)}
    heads["MERGETUNE's start, untrained"] = mt.interpolate(zero_shot, tuned, 0.3)
    if stage == "rule":
        heads |= {f"lam {lam:g}": merged(lam) for lam in GRID}
    else:
        made = {
            "MERGETUNE": merged(8.0),
            "MERGETUNE, weight 8": merged(PLAIN / unit),
            "MERGETUNE, as weight 8 at scale 100": merged(PLAIN * (clip.logit_scale / OPENAI) ** 2 / unit),
        }
        heads |= made | {f"{row} + WE": mt.interpolate(zero_shot, head, 0.5) for row, head in made.items()}
    tests = {"base": task.test.select_classes(own), "novel": task.test.select_classes(new)}
    others = clip.logit_scale * clip.class_embeddings(tests["novel"].classnames, TEMPLATE)
    changed = [features.select_classes(own) for features in shifted]
    rows = {row: _columns(mt.classifier(clip, head), others, tests, changed) for row, head in heads.items()}
    return {"cell": asdict(cell), "weight of lam 8": 8 * unit, "rows": rows}


def classes_of(count: int, cell: Cell) -> tuple[list[int], list[int]]:
    """The user's classes and the new ones: as many of each half of the partition, drawn at random."""
    generator = torch.Generator().manual_seed(cell.seed)
    drawn = [
        sorted(half[i] for i in torch.randperm(len(half), generator=generator)[: cell.classes].tolist())
        for half in halves_of(count, cell.partition).values()
    ]
    return drawn[0], drawn[1]


def _columns(
    classify: Callable[[Sequence[str]], torch.Tensor],
    others: torch.Tensor,
    tests: Mapping[str, mt.FeatureCache],
    changed: Sequence[mt.FeatureCache],
) -> dict[str, float]:
    weights = classify(tests["base"].classnames)
    right = {part: hits.accuracy for part, hits in score({"base": weights, "novel": others}, tests).items()}
    away = statistics.fmean(accuracy(weights, features).accuracy for features in changed)
    found = (right["base"], away, mt.harmonic_mean(right["seen"], right["unseen"]))
    return dict(zip(COLUMNS, (*found, statistics.fmean(found)), strict=True))


# -- tables ------------------------------------------------------------------------------------------------------------


def rule_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The mean column for each lam, by the number of classes."""
    groups = {f"{n} classes": [r for r in records if r["cell"]["classes"] == n] for n in (50, 12, 5)} | {"all": records}
    return _markdown(
        ["row", *groups],
        [
            [row, *(f"{statistics.fmean(r['rows'][row]['mean'] for r in own):.2f}" for own in groups.values())]
            for row in records[0]["rows"]
        ],
    )


def final_table(records: Sequence[Mapping[str, Any]], reference: str = "MERGETUNE") -> str:
    """Every row's columns, and its difference to MERGETUNE in the mean with a 95 % interval; bold: surely ahead.

    Cells of one partition and seed share classes and images. The t interval is over the means of these groups.
    """
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["cell"]["partition"], record["cell"]["seed"]), []).append(record)
    lines = []
    for row in records[0]["rows"]:
        values = [f"{statistics.fmean(r['rows'][row][column] for r in records):.2f}" for column in COLUMNS]
        apart = [
            statistics.fmean(r["rows"][row]["mean"] - r["rows"][reference]["mean"] for r in own)
            for own in groups.values()
        ]
        ends, said = t_interval(apart), ""
        if ends is not None and row != reference:
            said = f"{statistics.fmean(apart):+.2f} ({ends[0]:+.2f} to {ends[1]:+.2f})"
        lines.append([f"**{row}**" if said and ends and ends[0] > 0 else row, *values, said])
    return _markdown(["row", *COLUMNS, f"mean, to {reference}"], lines)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def main(
    out: Annotated[Path, typer.Argument(help="folder for icons, features and STAGE.json")],
    stage: Annotated[str, typer.Option(help="rule: what the unit was fixed on; table: everything else")] = "table",
) -> None:
    """Measure the cells of a stage and print their table."""
    if stage not in ("rule", "table"):
        raise typer.BadParameter(f"--stage must be rule or table, got {stage!r}")
    torch.set_num_threads(1)
    clip, (task,) = icons_task(out)
    shifted = shifted_icons(out, clip)
    cells = tqdm(list(cells_of(stage)), desc=stage, unit="cell", disable=None)
    records = [run_cell(clip, task, shifted, cell, stage) for cell in cells]
    write_json(out / f"{stage}.json", records)
    typer.echo((rule_table if stage == "rule" else final_table)(records))


if __name__ == "__main__":
    typer.run(main)
