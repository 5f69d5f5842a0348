"""What names and labels alone decide is said before a model is loaded, and options give names and shares."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from cache_cases import TinyClip
from PIL import Image
from typer.testing import CliRunner

import mergetune as mt
from mergetune.cli import app

ICONS = ["--backbone", "icon-clip"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "500"})


def draw(root: Path, *folders: str, images: int = 4) -> Path:
    """Pictures of one colour each, of different bytes."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(images):
            colour = tuple(os.urandom(3))
            Image.new("RGB", (8, 8), colour).save(root / folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folders of images, a head of three classes, and features of one class."""
    work = tmp_path_factory.mktemp("work")
    draw(work / "one", "cat")
    draw(work / "three", "ant", "bee", "cat")
    draw(work / "kept", "Training/cat", "Training/dog", images=1)
    draw(work / "case", "Apple", "apple")
    draw(work / "empty", "_", "cat")
    draw(work / "ids", "n01440764", "n01443537", "n01484850")
    draw(work / "train-only", "train/cat", "train/dog")
    for name, classes in (
        ("head", ("ant", "bee", "fox")),
        ("ok-head", ("ant", "bee", "cat")),
        ("two-head", ("a", "b")),
    ):
        mt.Head(torch.ones(len(classes), 128), classes).save(work / name)
    mt.cache_features(TinyClip(), mt.ImageFolder(work / "three", val=0).test, work / "features", progress=False)
    (work / "one.txt").write_text("cat\n")
    (work / "names.txt").write_text("tench\ngold_fish\nshark\n")
    (work / "twice.txt").write_text("tench\nTench\nshark\n")
    (work / "wide.txt").write_text("tench\n", encoding="utf-16")
    return work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "one"], "data must hold at least two classes, got only 'cat'"),
        (["cache", "one", "--out", "no"], "IMAGES must hold at least two classes, got only 'cat'"),
        (["predict", "a {}", "one", "--classnames", "one.txt"], "at least two names for softmax, .* got only 'cat'"),
        (["fit", "case"], "class names must differ, got 'Apple' and 'apple', which a text tower reads alike"),
        (["cache", "case", "--out", "no"], "class names must differ"),
        (["fit", "empty"], "class folder '_' must give a class name"),
        (["fit", "train-only"], "data must have test images, got none in 'train-only'"),
        (["fit", "three", "--template", "a photo"], "exactly one {} for the class name, got 'a photo'"),
        (["tune", "--cache", "gone", "--out", "no", "--template", "{} {}"], "exactly one {}"),
        (["eval", "--cache", "gone", "--template", "a photo"], "exactly one {}"),
        (["compare", "gone", "--template", "a photo"], "exactly one {}"),
        (["predict", "{} and {}", "three", "--classnames", "names.txt"], "exactly one {}"),
        (
            ["fit", "three", "--tuned", "head"],
            "--tuned must have the 3 classes of the images: .* class 2 must be 'fox'",
        ),
        (["fit", "three", "--tuned", "two-head"], "--tuned must have the 3 classes of the images: .*got 3 classes"),
        (
            ["fit", "three", "--classes", "base"],
            "--classes must be 'all' for fewer than 4 classes, .* got 'base' for 3",
        ),
        (["fit", "three", "--retain", "three"], "--retain must hold classes that are not trained"),
        (["fit", "three", "--retain", "kept"], "--retain must hold classes that are not trained, got 'cat'"),
        (["predict", "head", "three", "--classnames", "names.txt"], "among the 3 classes of the head, got 'tench'"),
        (
            ["eval", "--cache", "features", "--solution", "head"],
            "the head head, which does not know 'cat'",
        ),
        (["export", "head", "--to", "onnx", "--out", "a.onnx", "--classnames", "names.txt"], "among the 3 classes of"),
        (["fit", "ids", "--classnames", "one.txt"], "one name for each of the 3 classes"),
        (["fit", "ids", "--classnames", "twice.txt"], "class names must differ, got 'tench' and 'Tench'"),
        (["fit", "ids", "--classnames", "wide.txt"], "wide.txt must be text in UTF-8, got UTF-16"),
        (["predict", "a {}", "one", "--classnames", "wide.txt"], "wide.txt must be text in UTF-8, got UTF-16"),
        (
            ["cache", "dtd", "--root", "three", "--out", "no", "--classnames", "names.txt"],
            "cannot be used with a benchmark",
        ),
        (
            ["fit", "--cache", "gone", "--tuned", "head", "--out", "no", "--val-share", "0.1"],
            "--val-share needs images",
        ),
    ],
)
def test_what_names_decide_is_said_before_a_model_is_loaded(work, monkeypatch, arguments, message):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(mt, "load_clip", load)
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))
    refused = invoke(*arguments, *ICONS)
    assert refused.exit_code == 2, refused.exception
    assert not refused.stdout
    assert re.search(message, " ".join(refused.stderr.split())), refused.stderr
    assert sorted(work.rglob("*")) == before


def test_names_shares_and_ignored_files(work, tmp_path):
    """One call shows that --classnames, --val-share, --test-share and --split-seed arrive, and what is left out."""
    (work / "ids" / "n01440764" / "a.heic").touch()
    found = invoke(
        "cache", work / "ids", *ICONS, "--out", tmp_path, "--classnames", work / "names.txt",
        "--val-share", 0, "--test-share", 0.5, "--split-seed", 3,
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    assert "ignored 1: .heic (1); convert HEIC" in found.stderr and "WordNet" not in found.stderr
    expected = mt.ImageFolder(work / "ids", val=0, test=0.5, seed=3, classnames=["tench", "gold fish", "shark"])
    for split in ("train", "test"):
        manifest = json.loads((tmp_path / split / "manifest.json").read_text())
        images = getattr(expected, split)
        assert tuple(manifest["files"]) == images.files and tuple(manifest["classnames"]) == images.classnames
    assert not (tmp_path / "val").exists()


def test_a_test_set_without_a_class_is_evaluated_and_the_class_is_named(tmp_path):
    clip = mt.load_clip("icon-clip")
    names = ("anchor", "bell", "camera", "heart")
    draw(tmp_path / "images", *(f"train/{name}" for name in names), *(f"test/{name}" for name in names[:3]))
    with pytest.warns(UserWarning, match="has no images of 'heart'"):
        data = mt.ImageFolder(tmp_path / "images")
    mt.cache_features(clip, data.test, tmp_path / "test", progress=False)
    found = invoke("eval", "--cache", tmp_path / "test", "--json")
    assert found.exit_code == 0, found.stderr
    assert "--cache has no images of 'heart': left out of means over classes" in found.stderr
    assert set(json.loads(found.stdout)["zero-shot"]["per_class"]) == set(names[:3])
