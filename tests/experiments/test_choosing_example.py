"""The example choosing: one short cell of it, and its tables on hand-made cells."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import mergetune as mt
from mergetune.experiments.icons import load_icons
from mergetune.experiments.making import KINDS, MERGETUNE
from mergetune.facts.function_options import TOP_METHODS, TUNE_SETTINGS

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "choosing"


@pytest.fixture
def example(monkeypatch):
    """The example's scripts by name, as Python finds them when one of them is started."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("domains", "run", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))  # run.py adds the folder of the domains
    return {name: importlib.import_module(name) for name in ("tables", "run")}  # run.py makes other tables visible


@pytest.mark.slow
def test_one_short_cell(example, tmp_path, monkeypatch):
    run, tables = example["run"], example["tables"]
    for method in TOP_METHODS:
        monkeypatch.setitem(TUNE_SETTINGS, method, {**TUNE_SETTINGS[method], "epochs": 5})
    clip, icons = load_icons(tmp_path)
    images = icons.select(range(0, 100, 13))  # 8 classes
    caches = [mt.cache_features(clip, getattr(images, part), tmp_path / part) for part in ("train", "test")]

    class Bench:
        def domain(self, name):
            return (run.random_clip(clip) if name == "random" else clip, images, *caches)

    cell = run.Cell("tilted", 1, shots=1, classes=4)
    record = json.loads(json.dumps(run.run_cell(Bench(), cell)))
    assert [len(record["images"][part]) for part in ("base", "novel")] == [4, 4]
    settings = [name for name in record["right"] if name not in KINDS]
    assert len(settings) >= 6 and set(KINDS) - record["right"].keys() == {MERGETUNE}
    assert set(record["validation"]["right"]) == {*settings[:6], *KINDS}
    own, new = run.classes_of(100, run.Cell("tilted", 2, 16, 12))
    assert len({*own, *new}) == 24
    assert tables.chosen_rows(record)["auto"] in record["right"]
    weights = run.random_clip(clip).class_embeddings(["cat", "dog"])
    assert not torch.allclose(weights, clip.class_embeddings(["cat", "dog"]), atol=0.1)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json").write_text(json.dumps(record))
    tables.main(tmp_path / "cells")


def hand_made(best: int) -> dict:
    """A cell in which a residual on zero-shot is the best on validation images, and right on so many test images."""
    bits = {"base": "1" * 50 + "0" * 50, "novel": "1" * 50 + "0" * 50}
    better = {part: "1" * 80 + "0" * 20 for part in bits}
    names = ["lam 8, tau 0.3", "lam 4, tau 0.3", *KINDS]
    right = {name: better if name == "zero-shot + residual" else bits for name in names}
    test = {name: {"base": [50, 0], "novel": [50, 0]} for name in names if name != MERGETUNE}
    return {
        "cell": {"domain": "tilted", "partition": 0, "shots": 16, "classes": 2, "seed": 1},
        "chosen": {"kind": "zero-shot + residual", "setting": "lam 8, tau 0.3"},
        "validation": {"labels": {part: [i % 2 for i in range(100)] for part in bits}, "right": right},
        "images": {"base": [50, 50], "novel": [50, 50]},
        "right": test | {"zero-shot + residual": {"base": [best, 0], "novel": [best, 0]}},
    }


def test_auto_stands_beside_every_constant_choice(example):
    tables = example["tables"]
    cells = [hand_made(60), hand_made(60)]
    assert tables.chosen_rows(cells[0]) == {"auto": "zero-shot + residual", "lam and tau chosen": "lam 8, tau 0.3"}
    assert tables.means(cells[0])["auto"] == pytest.approx(60)
    assert "| tilted, 2 classes | 2 | 60.0 | zero-shot + residual | 60.0 |" in tables.against_best(cells)
    assert "+10.00 ± 0.00" in tables.against_best(cells).splitlines()[2]
    assert tables.ahead_of_auto(cells).splitlines()[2] == "| tilted, 2 classes | none |"
    worse = [hand_made(40), hand_made(40)]
    assert "lam 8, tau 0.3 **+10.00 ± 0.00**" in tables.ahead_of_auto(worse)
    assert tables.by_margin(cells).splitlines()[2].startswith("| 0 | 60.00 | +0.00 |")
