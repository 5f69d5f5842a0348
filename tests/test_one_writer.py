"""Every function that writes a folder or file is refused, in one sentence, while another one writes there."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from cache_cases import BUILD, TinyClip, draw_images
from miniature import write_miniature
from PIL import Image
from safetensors.torch import save_file
from tiny import NAMES, cache, head, prompt, tiny_clip
from torch import nn

import mergetune as mt
from mergetune import evaluation, experiments, merging, serving
from mergetune.cli.predicting import _csv_rows
from mergetune.data import cache_features
from mergetune.evaluation import Classifier
from mergetune.experiments import Experiment, Task, cells_folder, plan
from mergetune.experiments import compare as run_comparison
from mergetune.io import convert_module, writing_in, writing_to
from mergetune.solutions import write_notes
from mergetune.training import run_folder

QUICK = {"epochs": 1, "precision": "float32", "progress": False}


def predictions():
    return mt.predict_features(Classifier(lambda names: torch.eye(8)[:3]), cache())


def paths():
    ends = [prompt(seed) for seed in range(3)]
    return {"test": mt.connectivity(tiny_clip(), *ends, cache(), points=3)}


def models(folder: Path) -> list[Path]:
    for name in "ab":
        (folder / name).mkdir()
        save_file({"w": torch.ones(3)}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    return [folder / name for name in "ab"]


def merge(out: Path) -> None:
    merging.merge_files(merging.average, None, models(out.parent), out)


def module(out: Path) -> None:
    torch.save(nn.Linear(2, 2), out.with_name("module.pt"))
    convert_module(out.with_name("module.pt"), out)


def images(out: Path) -> None:
    for name in NAMES:
        for i in range(6):
            file = out.parent / "images" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, len(name), 0)).save(file)
    mt.fit_dataset(tiny_clip(), mt.ImageFolder(out.parent / "images"), out, progress=False)


def paper(out: Path) -> None:
    write_miniature(out.parent / "data", "oxford_pets", images_per_class=4, classes=4, size=8)
    runs = plan("base-to-novel", datasets=["oxford_pets"], seeds=[1], shots=[1])
    experiments.reproduce(runs, Experiment(root=out.parent / "data", out=out), tiny_clip, progress=False)


def comparison(out: Path) -> None:
    classes = [f"class {i}" for i in range(4)]
    task = Task("task", cache(40, classes=classes), cache(40, seed=1, classes=classes))
    run_comparison(tiny_clip(), task, out, progress=False)


def in_a_run(choose: Callable, out: Path) -> None:
    with ExitStack() as held:
        choose(out, held=held)


FOLDERS: dict[str, Callable[[Path], object]] = {
    "save": lambda out: head().save(out),
    "write_notes": lambda out: write_notes(out, {}),
    "FitResult.save": lambda out: mt.FitResult(head(), (), {}, {}).save(out),
    "tune": lambda out: mt.tune(tiny_clip(), cache(), resume=out, **QUICK),
    "fit": lambda out: mt.fit(tiny_clip(), cache(), prompt(), resume=out, **QUICK),
    "fit_dataset": images,
    "cache_features": lambda out: cache_features(TinyClip(), draw_images(out.parent / "images", 5), out, **BUILD),
    "compare": comparison,
    "reproduce": paper,
    "run_folder": partial(in_a_run, partial(run_folder, asked={"lam": 1})),
    "cells_folder": partial(in_a_run, partial(cells_folder, heads={Path("a/cell.json"): {"cell": {}, "settings": {}}})),
    "to_hub": lambda out: mt.to_hub(head(), out),
    "to_coop": lambda out: mt.to_coop(prompt(), out.parent, clip=tiny_clip(), classnames=NAMES),
    "merge_files": merge,
}
FILES: dict[str, Callable[[Path], object]] = {
    "merged.safetensors": merge,
    "head.npz": lambda out: mt.to_head(head(), out),
    "head.safetensors": lambda out: mt.to_head(head(), out),
    "classifier.pt": lambda out: mt.zero_shot_classifier(prompt(), tiny_clip(), NAMES, file=out),
    "converted.safetensors": module,
    "model.pt2": lambda out: serving.to_torch_export(prompt(), out, clip=tiny_clip(), classnames=NAMES),
    "paths.png": lambda out: evaluation.plot(paths(), out),
    "report.html": lambda out: evaluation.report(out, paths()),
    "confusion.csv": lambda out: mt.confusion(predictions()).save(out),
    "scores.csv": lambda out: mt.confusion(predictions()).save_scores(out),
    "wrong.csv": lambda out: evaluation.save_wrong_answers(predictions(), out),
    "predictions.csv": lambda out: _csv_rows(out, 2).__enter__(),
}

SLOW = {"model.pt2": pytest.mark.slow}  # the graph is traced first


def everything(folder: Path) -> dict[Path, object]:
    return {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_has_one_writer(tmp_path, name):
    out = tmp_path / ("prompt_learner" if name == "to_coop" else "out")
    if name == "write_notes":
        head().save(out)
    with ThreadPoolExecutor() as others, writing_in(out):
        before = everything(out)
        with pytest.raises(RuntimeError, match=f"another thread of this process works in {out}: wait until it ends, "):
            others.submit(FOLDERS[name], out).result()
        assert everything(out) == before


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in FILES])
def test_a_file_has_one_writer(tmp_path, name):
    out = tmp_path / name
    with ThreadPoolExecutor() as others, writing_to(out):
        with pytest.raises(RuntimeError, match=f"another thread of this process writes {out}: wait until it ends, "):
            others.submit(FILES[name], out).result()
        assert not out.exists() and not list(tmp_path.glob(".*.part"))
