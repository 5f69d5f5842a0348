"""Files that version 0.1 wrote (tests/files/v0.1, made by make.py there) open, mean the same, and are gone on with."""

import hashlib
import json
import shutil
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import parameter
from typer.testing import CliRunner

from mergetune import (
    FeatureCache,
    FitResult,
    Head,
    ImageFolder,
    Prompt,
    cache_features,
    fit,
    load_clip,
    load_solution,
    open_solution,
    tune,
)
from mergetune.cli import app

FILES = Path(__file__).parent / "files" / "v0.1"
CLASSES = ("anchor", "bell", "camera", "heart")
MODEL = "local-dir:icon-clip"  # as the files have it: a link to the embedded model
RUNS = {"tune": 16, "tune-head": 16, "fit": 8, "coop": 16, "fit-head": 16}  # finished, and their epochs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A folder with a copy of the files and a link to the embedded CLIP."""
    place = tmp_path_factory.mktemp("old")
    shutil.copytree(FILES, place, dirs_exist_ok=True)
    with as_file(files("mergetune") / "assets" / "icon-clip") as model:
        (place / "icon-clip").symlink_to(model)
        yield place


@pytest.fixture(autouse=True)
def inside(old, monkeypatch):
    monkeypatch.chdir(old)


@pytest.fixture(scope="module")
def clip(old):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(old)
        return load_clip(MODEL)


def test_the_files_are_those_that_version_0_1_wrote():
    digest = hashlib.sha256()
    for file in sorted(p for p in FILES.rglob("*") if p.is_file() and p.name != "make.py" and p.suffix != ".pyc"):
        digest.update(file.relative_to(FILES).as_posix().encode() + file.read_bytes())
    assert digest.hexdigest() == "5836ebd947896ce95b7ebe2d3ab1c8cf5648e7f05bc22b0828b819e545153946"


@pytest.mark.parametrize("folder", ["tune", "fit", "coop", "merged", "exports/hub"])
def test_prompts_open(folder):
    (ctx,) = load_file(f"{folder}/solution.safetensors").values()
    for solution in (load_solution(folder), open_solution(folder)):
        assert isinstance(solution, Prompt) and torch.equal(solution.ctx, ctx) and solution.ctx.shape == (4, 128)
        assert (solution.template, solution.position, solution.classnames) == ("a photo of a {}.", "end", None)
        assert solution.backbone == MODEL


@pytest.mark.parametrize("folder", ["tune-head", "fit-head"])
def test_heads_open(folder):
    tensors, config = load_file(f"{folder}/solution.safetensors"), json.loads(Path(folder, "solution.json").read_text())
    for solution in (load_solution(folder), open_solution(folder)):
        assert isinstance(solution, Head) and torch.equal(solution.weight, tensors["weight"])
        assert solution.classnames == CLASSES and solution.bias is None
        assert solution.logit_scale == config["logit_scale"]


def test_solutions_have_the_accuracy_that_they_had():
    solutions = [word for name in ("tune", "fit", "merged") for word in ("--solution", name)]
    result = CliRunner().invoke(
        app, ["eval", "--cache", "cache/test", "--backbone", MODEL, *solutions, "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.stderr
    found, before = json.loads(result.stdout), json.loads(Path("eval.json").read_text())
    assert list(found) == list(before) == ["zero-shot", "tune", "fit", "merged"]
    for name, entry in before.items():
        assert entry["images"] == 32 and entry["per_class"].keys() == set(CLASSES)
        assert {key: found[name][key] for key in entry} == entry


@pytest.mark.parametrize("folder", ["cache", "cache-views"])
@pytest.mark.parametrize(("split", "images"), [("train", 40), ("test", 32)])
def test_caches_open(clip, folder, split, images):
    cache = FeatureCache.open(Path(folder, split))
    cache.verify()
    assert len(cache) == images and cache.classnames == CLASSES and not cache.skipped
    assert cache.labels.tolist() == sorted(list(range(4)) * (images // 4))
    assert all(
        file.split("/")[:2] == [split, CLASSES[label]] for file, label in zip(cache.files, cache.labels, strict=True)
    )
    assert cache.fingerprint == clip.image_fingerprint
    stored = load_file(Path(folder, split, "shard-00000.safetensors"))["features"]
    assert cache.views == len(stored) == (2 if (folder, split) == ("cache-views", "train") else 1)
    assert cache.dtype == ("float32" if folder == "cache" else "bfloat16")
    for view, features in enumerate(stored):
        assert torch.equal(cache.tensor(view), features.float())


@pytest.mark.parametrize(("folder", "split", "options"), [
    ("cache", "train", {}),
    ("cache", "test", {}),
    ("cache-views", "train", {"dtype": "bfloat16", "views": 2}),
])  # fmt: skip
def test_a_finished_cache_is_not_encoded_again(clip, tmp_path, folder, split, options):
    with as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        for part in ("train", "test"):
            content.extractall(tmp_path / "images", FeatureCache.open(Path(folder, part)).files)
    images = getattr(ImageFolder(tmp_path / "images"), split)
    shutil.copytree(Path(folder, split), tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    before = shard.stat().st_mtime_ns, shard.read_bytes()
    cache = cache_features(clip, images, tmp_path / "cache", progress=False, **options)
    assert (shard.stat().st_mtime_ns, shard.read_bytes()) == before
    cache.verify(images, progress=False)


@pytest.mark.parametrize("folder", RUNS)
def test_results_of_runs_open(folder):
    result, record = FitResult.load(folder), json.loads(Path(folder, "result.json").read_text())
    assert [entry["epoch"] for entry in result.history] == list(range(1, RUNS[folder] + 1))
    assert list(result.history) == record["history"] and result.settings == record["settings"]
    assert result.timings["steps"] > 0
    assert torch.equal(parameter(result.solution), parameter(load_solution(folder)))


def again(clip, run, folder):
    """The run of a folder as its command, or make.py, calls it, with the settings that do not hang on the machine."""
    train = FeatureCache.open("cache/train")
    settings = record(folder)["settings"]
    common = {
        "epochs": settings["epochs"], "batch_size": settings["batch_size"], "lr": settings["lr"],
        "precision": settings["precision"], "resume": folder, "progress": False,
    }  # fmt: skip
    if run == "fit-head":
        near = open_solution("exports/head.safetensors", classnames=CLASSES)
        return fit(clip, train, load_solution("tune-head"), zero_shot=near, **common)
    return tune(clip, train, method="head" if run == "tune-head" else "coop", **common)


def record(folder):
    """What the state of a run says of it."""
    with safe_open(Path(folder, "state.safetensors"), "pt") as file:
        return json.loads(file.metadata()["run"])


@pytest.mark.parametrize("run", ["tune", "tune-head", "coop", "fit-head"])
def test_a_finished_run_is_not_run_again(clip, tmp_path, run):
    shutil.copytree(run, tmp_path / run)
    result, before = again(clip, run, tmp_path / run), FitResult.load(run)
    assert result.timings["steps"] == 0
    assert result.history == before.history and result.settings == before.settings
    assert torch.equal(parameter(result.solution), parameter(before.solution))


def test_a_head_of_version_0_1_keeps_its_lam_and_says_so(clip, tmp_path):
    shutil.copytree("fit-head-interrupted", tmp_path / "run")
    with pytest.warns(UserWarning, match="began: its lam is the weight of the surrogate itself"):
        old = again(clip, "fit-head", tmp_path / "run")
    assert old.settings == FitResult.load("fit-head").settings and "lam_effective" not in old.settings
    entry, beta = old.history[-1], old.settings["beta"][0]
    total = entry["endpoint"] + old.settings["lam"] * entry["surrogate"] + beta * entry["path_1"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("run", ["coop", "fit-head"])
def test_an_interrupted_run_goes_on_to_the_end_of_the_finished_one(clip, tmp_path, run):
    shutil.copytree(f"{run}-interrupted", tmp_path / "run")
    done, before = record(tmp_path / "run")["history"], FitResult.load(run)
    assert 0 < len(done) < RUNS[run]
    result = again(clip, run, tmp_path / "run")
    assert result.timings["steps"] == (RUNS[run] - len(done)) * 10
    assert len(result.history) == RUNS[run] and list(result.history[: len(done)]) == done
    start = load_file(f"{run}-interrupted/state.safetensors")["parameter"]
    moved = (parameter(before.solution) - start).abs().max()
    apart = (parameter(before.solution) - parameter(result.solution)).abs().max()
    assert apart < 1e-3 * moved  # the rounding of another processor


def test_exports_open(clip):
    prompt, head = load_solution("tune"), load_solution("tune-head")
    from_coop = open_solution("exports/coop/prompt_learner/model.pth.tar-50")
    assert isinstance(from_coop, Prompt) and torch.equal(from_coop.ctx, prompt.ctx)
    assert torch.equal(parameter(open_solution("exports/coop")), prompt.ctx)
    for suffix in (".npz", ".pt"):
        found = open_solution(f"exports/head{suffix}")
        assert isinstance(found, Head) and torch.equal(found.weight, head.weight)
        assert found.classnames == CLASSES and found.logit_scale == head.logit_scale
    weights = prompt.class_embeddings(clip, CLASSES)
    found = open_solution("exports/head.safetensors")
    torch.testing.assert_close(found.weight, weights)
    assert found.classnames == CLASSES and found.logit_scale == pytest.approx(clip.logit_scale)
    classifier = torch.load("exports/classifier.pt", weights_only=True)
    assert classifier.shape == (128, 4) and np.allclose(classifier.T, weights, atol=1e-5)
