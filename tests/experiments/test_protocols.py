"""`reproduce`: plans, miniature trees of all 15 datasets through every protocol, resumption, forecast, table."""

import functools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from miniature import WORDNET, write_few_shot, write_miniature
from tiny import TEXT, tiny_model
from typer.testing import CliRunner

import mergetune
from mergetune import FrozenClip, accuracy, classifier, experiments, load_solution, training
from mergetune.cli import app
from mergetune.data import (
    DATASETS,
    CoOpDataset,
    Dataset,
    FeatureCache,
    ImageList,
    templates_for,
)
from mergetune.data.benchmarks import missing_images
from mergetune.experiments import Experiment, plan, protocol_forecast, protocols, reproduce
from mergetune.experiments.protocol_plans import ELEVEN, SHIFTED
from mergetune.experiments.protocol_tables import PUBLISHED, tabulate

QUICK = {"tune": {"epochs": 1}, "fit": {"epochs": 1}}
HALVES = ["base", "novel", "HM", "seen", "unseen", "joint HM"]
SOLUTIONS = ["zero-shot", "tuned", "weight average", "logit ensemble", "MERGETUNE"]


@functools.cache
def tiny_clip() -> FrozenClip:
    with torch.random.fork_rng([]):
        model = tiny_model(text={**TEXT, "context_length": 40})
    cfg = {
        "size": (16, 16),
        "mode": "RGB",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=40), "tiny", cfg)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    for name in DATASETS:
        whole = name in ("imagenet", "imagenetv2", "imagenet_sketch")  # a head must know the classes of -A and -R
        write_miniature(place, name, images_per_class=8, classes=len(WORDNET) if whole else 4, size=16)
    return place


def experiment(root: Path, out: Path, **changes) -> Experiment:
    return Experiment(root=root, out=out, **QUICK | changes)


# -- plans ------------------------------------------------------------------------------------------------------------


def test_the_plans_are_the_papers() -> None:
    runs = plan("base-to-novel", methods=["coop", "kgcoop"])
    assert len(runs) == 11 * 2 * 3
    assert {run.source for run in runs} == set(ELEVEN) and {run.shots for run in runs} == {16}
    assert {run.targets for run in runs} == {("base", "novel")}
    assert len({run.folder for run in runs}) == len(runs)
    (cross,) = plan("cross-dataset", seeds=[2])
    assert (cross.source, cross.targets) == ("imagenet", ("imagenet", *ELEVEN[1:]))
    (domain,) = plan("domain", seeds=[1])
    assert domain.targets == ("imagenet", *SHIFTED)
    assert [run.shots for run in plan("few-shot", datasets=["DTD"], seeds=[1])] == [1, 2, 4, 8, 16]
    (robust,) = plan("robust", seeds=[1])
    assert (robust.method, robust.shots) == ("head", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"protocol": "few"},
            "protocol must be one of base-to-novel, cross-dataset, domain, few-shot, robust, got 'few'",
        ),
        ({"methods": ["maple"]}, "methods must be of coop, kgcoop, head, got 'maple'"),
        ({"methods": ["head"]}, "methods of base-to-novel must be prompts, got 'head'"),
        ({"protocol": "robust", "methods": ["coop"]}, "methods of robust must be 'head', got 'coop'"),
        ({"datasets": ["cifar10"]}, "name must be one of imagenet, .*got 'cifar10'"),
        ({"datasets": ["dtd", "DescribableTextures"]}, "datasets must not repeat"),
        ({"datasets": ["imagenet_r"]}, "datasets of base-to-novel must have training images, got imagenet_r"),
        ({"protocol": "domain", "datasets": ["dtd"]}, "datasets of domain must be among imagenetv2, .*got dtd"),
        ({"seeds": []}, "seeds must hold at least one seed"),
        ({"seeds": [1, 1]}, "seeds must not repeat"),
        ({"seeds": [-1]}, "seeds must be 0 or more, got -1"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**{"protocol": "base-to-novel", **arguments})


def test_everything_that_is_missing_is_said_before_any_work(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as found:
        reproduce(plan("base-to-novel"), experiment(tmp_path, tmp_path / "out"), lambda: pytest.fail("it began"))
    assert all(f"dataset {name!r}" in str(found.value) for name in ELEVEN)
    assert not (tmp_path / "out").exists()


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "settings", "columns"),
    [
        (
            "base-to-novel",
            {"shots": [2], "methods": ["coop", "kgcoop"], "seeds": [1]},
            ["base", "novel", "HM", "seen", "unseen", "joint HM"],
        ),
        ("cross-dataset", {"shots": [2], "seeds": [1]}, ["imagenet", *ELEVEN[1:], "mean of the others"]),
        ("domain", {"shots": [2], "seeds": [1, 2]}, ["imagenet", *SHIFTED, "mean of the others"]),
        (
            "few-shot",
            {"shots": [1, 2], "seeds": [1], "datasets": ["eurosat", "dtd"], "methods": ["coop", "head"]},
            ["1 shots", "2 shots"],
        ),
        ("robust", {"seeds": [1]}, ["imagenet", *SHIFTED, "mean of the others"]),
    ],
)
def test_every_protocol_runs_on_miniature_trees(
    protocol: str, settings: dict, columns: list[str], root: Path, tmp_path: Path
) -> None:
    runs, work = plan(protocol, **settings), experiment(root, tmp_path)
    records = reproduce(runs, work, tiny_clip, progress=False)
    assert [Path(tmp_path / run.folder / "run.json").is_file() for run in runs] == [True] * len(runs)
    lines = experiments.save_table(records, tmp_path / protocol)
    assert (tmp_path / protocol / "figure.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / protocol / "table.json").read_text())) == len(lines)
    assert [list(line.values) for line in lines] == [columns] * len(lines)
    assert [line.row for line in lines[:5]] == SOLUTIONS
    assert ("MERGETUNE + WE" in {line.row for line in lines}) == (protocol == "robust")
    assert all(0 <= value <= 100 for line in lines for value in line.values.values())
    caption, used = (tmp_path / protocol / "caption.txt").read_text(), {n for run in runs for n in run.test_sets}
    assert all(f"{name}: " in caption.split("Incomplete datasets")[1] for name in used)  # the trees are miniatures
    # one figure, looked up by hand
    run, clip = runs[0], tiny_clip()
    data = CoOpDataset(run.source, root)
    images = data.base_novel()[0].test if protocol == "base-to-novel" else data.test
    test = FeatureCache.open(tmp_path / "cache" / run.source / "test").select(images)
    for solution, folder in (("tuned", "tuned"), ("MERGETUNE", "merged")):
        weights = classifier(clip, load_solution(tmp_path / run.folder / folder))(test.classnames)
        found = records[0]["results"]["base" if protocol == "base-to-novel" else run.source][solution]
        assert found["accuracy"] == accuracy(weights, test).accuracy
    template = templates_for(run.source, "official")
    zero_shot = accuracy(clip.class_embeddings(test.classnames, template), test).accuracy
    assert lines[0].values[columns[0]] == pytest.approx(zero_shot)


@pytest.mark.parametrize("name", ["eurosat", "imagenet_a", "caltech101"])
def test_datasets_of_another_size_than_published_are_marked(name: str) -> None:
    names, sizes = ("a", "b"), DATASETS[name].sizes

    def images(split: str, count: int) -> ImageList | None:
        files = tuple(f"{split}/{i}.jpg" for i in range(count))
        return ImageList(Path(), files, tuple(i % 2 for i in range(count)), names) if count else None

    def dataset(*counts: int) -> Dataset:
        return Dataset(name, *(images(*pair) for pair in zip(("train", "val", "test"), counts, strict=True)))

    assert missing_images(dataset(*sizes)) == ""
    assert missing_images(dataset(*sizes[:2], 40)) == f"test 40 instead of {sizes[2]:,}"
    assert missing_images(dataset(*sizes[:2], sizes[2] + 1)).endswith(f"{sizes[2] + 1:,} instead of {sizes[2]:,}")


def test_reproduce_takes_no_weight_ensemble(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fit must not hold weight_ensemble: protocol robust has the row"):
        experiment(root, tmp_path, fit={"weight_ensemble": True})


def test_base_to_novel_trains_on_coops_draw_of_the_base_classes(root: Path, tmp_path: Path) -> None:
    (run,) = plan("base-to-novel", datasets=["eurosat"], seeds=[3], shots=[2])
    work = experiment(root, tmp_path)
    reproduce([run], work, tiny_clip, progress=False)
    features = protocols.Caches(tiny_clip(), work).train(run)
    drawn = CoOpDataset("eurosat", root).base_novel()[0].few_shot(2, seed=3)
    assert features.files == drawn.files and features.classnames == drawn.classnames
    assert len(features.classnames) == 2


def test_a_draw_that_coop_stored_is_taken(tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, "eurosat", images_per_class=8, classes=4, size=16)
    data = CoOpDataset("eurosat", tmp_path)
    last = [i for c in range(4) for i in [n for n, label in enumerate(data.train.labels) if label == c][-2:]]
    stored = [(data.train.files[i], data.train.labels[i], data.classnames[data.train.labels[i]]) for i in last]
    write_few_shot(folder / "split_fewshot" / "shot_2-seed_1.pkl", {"train": stored, "val": []})
    runs = plan("base-to-novel", datasets=["eurosat"], seeds=[1, 2], shots=[2])
    work = experiment(tmp_path, tmp_path / "out")
    reproduce(runs, work, tiny_clip, progress=False)
    caches = protocols.Caches(tiny_clip(), work)
    assert caches.train(runs[0]).files == tuple(data.train.files[i] for i in last[:4])
    assert caches.train(runs[1]).files == data.base_novel()[0].few_shot(2, seed=2).files


def test_a_second_call_trains_nothing_and_other_settings_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan("base-to-novel", datasets=["eurosat"], seeds=[1], shots=[2])
    first = reproduce(runs, experiment(root, tmp_path), tiny_clip, progress=False)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("it trained"))
    assert reproduce(runs, experiment(root, tmp_path), tiny_clip, progress=False) == first
    with pytest.raises(ValueError, match="fit epochs 1 there, 2 here; choose another --out, or delete run.json"):
        reproduce(runs, experiment(root, tmp_path, fit={"epochs": 2}), tiny_clip, progress=False)
    (tmp_path / runs[0].folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged: the content must be JSON.*; delete it to run it again"):
        reproduce(runs, experiment(root, tmp_path), tiny_clip, progress=False)


@pytest.mark.parametrize("old", [1, 2])
def test_runs_of_version_0_1_are_not_run_again(
    old: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files have accuracies only: the table has the same figures without the joint label space."""
    runs = plan("base-to-novel", datasets=["eurosat"], seeds=[1, 2], shots=[2])
    work = experiment(root, tmp_path)
    lines = tabulate(reproduce(runs, work, tiny_clip, progress=False))
    assert list(lines[1].differences) == HALVES and lines[1].differences["HM"].classes is not None
    for run in runs[:old]:
        record = json.loads((tmp_path / run.folder / "run.json").read_text())
        kept = {name: record[name] for name in ("run", "settings", "results", "seconds")}
        kept["results"] = {part: kept["results"][part] for part in ("base", "novel")}
        (tmp_path / run.folder / "run.json").write_text(json.dumps(kept))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("it trained"))
    again = tabulate(reproduce(runs, work, tiny_clip, progress=False))
    for line, before in zip(again, lines, strict=True):
        assert line.row == before.row and line.spread == pytest.approx({c: before.spread[c] for c in HALVES[:3]})
        assert line.values == pytest.approx({column: before.values[column] for column in HALVES[:3]})
        assert all(found.classes is None and found.cells for found in line.differences.values())


def test_an_interrupted_plan_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plan("base-to-novel", datasets=["eurosat", "dtd"], seeds=[1], shots=[2])
    whole = reproduce(runs, experiment(root, tmp_path / "whole"), tiny_clip, progress=False)
    real, calls = training.fit, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(protocols, "fit", interrupted)
    monkeypatch.setattr(protocol_forecast, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce(runs, experiment(root, tmp_path / "out"), tiny_clip, progress=False)
    assert (
        reproduce(runs, experiment(root, tmp_path / "out"), tiny_clip, progress=False)[1]["results"]
        == (whole[1]["results"])
    )
    assert len(calls) == 3  # the first run was not done again


def test_stage_1_is_read_from_checkpoints(root: Path, tmp_path: Path) -> None:
    (run,) = plan("base-to-novel", datasets=["eurosat"], seeds=[1], shots=[2])
    first = reproduce([run], experiment(root, tmp_path / "a"), tiny_clip, progress=False)
    tuned = load_solution(tmp_path / "a" / run.folder / "tuned")
    place = tmp_path / "coop" / "eurosat" / "shots_2" / "seed1" / "prompt_learner"
    place.mkdir(parents=True)
    torch.save({"state_dict": {"ctx": tuned.ctx}, "epoch": 1}, place / "model.pth.tar-1")
    pattern = str(tmp_path / "coop" / "{dataset}" / "shots_{shots}" / "seed{seed}")
    again = reproduce([run], experiment(root, tmp_path / "b", checkpoints=pattern, tune={}), tiny_clip, progress=False)
    assert again[0]["results"]["base"]["tuned"] == first[0]["results"]["base"]["tuned"]
    assert not (tmp_path / "b" / run.folder / "tuned").exists()
    with pytest.raises(ValueError, match="checkpoints may hold dataset, method, seed, shots in braces, got 'sead'"):
        experiment(root, tmp_path, checkpoints="{sead}")


def test_a_forecast_counts_and_does_nothing(root: Path, tmp_path: Path) -> None:
    runs = plan("base-to-novel", datasets=["eurosat"], seeds=[1, 2], shots=[2])
    work = experiment(root, tmp_path)
    found = experiments.forecast(runs, work, tiny_clip())
    data = CoOpDataset("eurosat", root)
    assert found.images == {
        "eurosat/test": len(data.test),
        "eurosat/train-shots-2-seed-1": 8,
        "eurosat/train-shots-2-seed-2": 8,
    }
    assert (found.runs, found.finished) == (2, 0) and found.seconds_encoding > 0 and found.seconds_training > 0
    assert list(tmp_path.iterdir()) == []
    reproduce(runs[:1], work, tiny_clip, progress=False)
    found = experiments.forecast(runs, work, tiny_clip())
    assert found.finished == 1 and found.images["eurosat/test"] == 0


def test_the_table_is_means_and_spreads_with_the_published_figures() -> None:
    def record(source: str, seed: int, base: float, novel: float) -> dict:
        report = {name: {"accuracy": v, "images": 10} for name, v in (("base", base), ("novel", novel))}
        results = {target: {"tuned": value, "MERGETUNE": value} for target, value in report.items()}
        return {
            "run": {"protocol": "base-to-novel", "source": source, "method": "coop", "shots": 16, "seed": seed},
            "results": results,
        }

    lines = tabulate(
        [record("dtd", 1, 60, 40), record("dtd", 2, 70, 50), record("eurosat", 1, 90, 50), record("eurosat", 2, 80, 70)]
    )
    a, b, mean = (line for line in lines if line.row == "tuned")
    assert a.values == pytest.approx({"base": 65, "novel": 45, "HM": 2 * 65 * 45 / 110})
    assert a.spread["base"] == pytest.approx(7.0710678) and a.show("base") == "65.00 ± 7.07"
    assert b.values["novel"] == 60 and not b.published
    assert mean.dataset == "mean" and mean.values == pytest.approx(
        {"base": 75, "novel": 52.5, "HM": 2 * 75 * 52.5 / 127.5}
    )
    assert mean.published == PUBLISHED["base-to-novel", "coop", "tuned"] == {"base": 82.69, "novel": 63.22, "HM": 71.66}


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def icon_clip() -> str:
    return f"local-dir:{Path(mergetune.__file__).parent / 'assets' / 'icon-clip'}"


def test_the_command_takes_lists_and_prints_the_published_figures(root: Path, tmp_path: Path, icon_clip: str) -> None:
    command = [
        "reproduce",
        "base-to-novel",
        "--root",
        str(root),
        "--out",
        str(tmp_path / "out"),
        "--backbone",
        icon_clip,
        "--datasets",
        "eurosat",
        "dtd",
        "--seeds",
        "1",
        "2",
        "--method",
        "coop",
        "--shots",
        "2",
        "--epochs",
        "1",
    ]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0 and "4 runs, 0 of them finished" in dry.output, dry.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "mean, coop, MERGETUNE" in done.output and "77.24" in done.output and "joint" in done.output
    lines = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert {line["dataset"] for line in lines} == {"eurosat", "dtd", "mean"}
    wrong = CliRunner().invoke(app, [*command[:2], "--root", str(tmp_path), *command[4:]])
    assert wrong.exit_code == 2 and "split_zhou_EuroSAT.json" in wrong.stderr


@pytest.mark.parametrize("launcher", ["processes", "torchrun"])
def test_runs_in_several_processes_are_the_same(launcher: str, root: Path, tmp_path: Path, icon_clip: str) -> None:
    runs = plan("base-to-novel", datasets=["eurosat"], seeds=[1, 2], shots=[2])
    from mergetune import load_clip

    load = partial(load_clip, icon_clip)
    fit = {"epochs": 1, "lam": 8.0, "beta": 0.5, "tau": 0.3}
    alone = reproduce(runs, experiment(root, tmp_path / "alone", fit=fit), load, progress=False)
    if launcher == "processes":
        found = reproduce(runs, experiment(root, tmp_path / "b", fit=fit), load, processes=2, progress=False)
    else:
        command = [
            "-m",
            "mergetune",
            "reproduce",
            "base-to-novel",
            "--root",
            str(root),
            "--out",
            str(tmp_path / "b"),
            "--backbone",
            icon_clip,
            "--datasets",
            "eurosat",
            "--seeds",
            "1",
            "2",
            "--shots",
            "2",
            "--epochs",
            "1",
            "--json",
        ]
        launched = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--master-port",
                "29641",
                *command,
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert launched.returncode == 0, launched.stderr
        found = reproduce(runs, experiment(root, tmp_path / "b", fit=fit), load, progress=False)
    for ours, other in zip(found, alone, strict=True):
        for target, solutions in ours["results"].items():
            for solution, report in solutions.items():
                assert report["accuracy"] == other["results"][target][solution]["accuracy"]
