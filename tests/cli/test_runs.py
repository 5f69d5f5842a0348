"""Several runs with one --out: where each run goes, what is kept, and how the runs are listed."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mergetune.cli import app

CLASSES = ("anchor", "bell", "camera", "heart")
OLD = Path(__file__).parents[1] / "files" / "v0.1"


@pytest.fixture(scope="module")
def model():
    with as_file(files("mergetune") / "assets" / "icon-clip") as folder:
        yield f"local-dir:{folder}"


@pytest.fixture(scope="module")
def work(tmp_path_factory, model):
    """A folder with images of four classes, their caches, and a tuned solution."""
    folder = tmp_path_factory.mktemp("work")
    with as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        wanted = [name for name in content.namelist() if name.split("/")[1] in CLASSES]
        content.extractall(folder / "images", wanted)
    run("cache", folder / "images", "--out", folder / "cache", "--backbone", model)
    run("tune", *train(folder, model), "--out", folder / "tuned")
    return folder


def train(work, model, epochs: int = 2) -> list:
    return ["--cache", work / "cache" / "train", "--backbone", model, "--shots", 8, "--epochs", epochs]


def fit(work, model, out, *more, epochs: int = 2) -> list:
    return ["fit", *train(work, model, epochs), "--tuned", work / "tuned", "--out", out, *more]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run(*arguments):
    """A command's JSON."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def content(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- where a run goes --------------------------------------------------------------------------------------------------


def test_other_settings_go_to_a_named_folder_and_equal_ones_to_their_own(work, model, tmp_path):
    out = tmp_path / "out"
    first = run(*fit(work, model, out))
    assert first["out"] == str(out) and first["settings"]["lam"] == 8
    second = run(*fit(work, model, out, "--lam", 4))
    assert second["out"] == str(out / "run-2-lam-4")
    third = run(*fit(work, model, out, "--lam", 4, "--tau", 0.6, "--lr", 1e-5, "--seed", 3))
    assert third["out"] == str(out / "run-3-lam-4_tau-0.6_lr-1e-05")
    before = content(out)
    for arguments, made in (((), first), (("--lam", 4), second)):  # also after another run was made
        again = invoke(*fit(work, model, out, *arguments))
        assert Path(made["out"]).name in again.stdout and content(out) == before
    shown = invoke(*fit(work, model, out, "--lam", 4, "--tau", 0.6, "--lr", 1e-5, "--seed", 3)).stdout
    assert f"run 3 (lam 4, tau 0.6, lr 1e-05) in {third['out']}" in shown
    assert json.loads((out / "run-2-lam-4" / "result.json").read_text())["settings"]["lam"] == 4
    tuned = run("tune", *train(work, model), "--out", out)
    assert tuned["out"].startswith(str(out / "run-4-tune_method-coop"))


def test_the_folder_of_a_run_of_version_0_1_is_run_1(work, model, tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    (tmp_path / "icon-clip").symlink_to(model.removeprefix("local-dir:"))
    monkeypatch.chdir(tmp_path)
    old = json.loads(Path("tune/result.json").read_text())["settings"]
    arguments = ["tune", "--cache", "cache/train", "--backbone", "local-dir:icon-clip", "--precision", old["precision"]]
    arguments += ["--method", old["method"], "--template", old["template"], "--epochs", old["epochs"]]
    arguments += ["--batch-size", old["batch_size"], "--lr", old["lr"], "--seed", old["seed"], "--classes", "all"]
    before = content(tmp_path / "tune")
    found = run(*arguments, "--out", "tune")
    assert found["settings"] == old and found["out"] == "tune"
    assert (
        before.items() <= content(tmp_path / "tune").items()
        or before["state.safetensors"] == content(tmp_path / "tune")["state.safetensors"]
    )
    other = run(*arguments[:-2], "--out", "tune", "--weight-decay", 0.1)
    assert other["out"].startswith("tune/run-2-") and "weight-decay-0.1" in other["out"]


def test_overwrite_replaces_the_run_in_out_and_deletes_nothing_else(work, model, tmp_path):
    out = tmp_path / "out"
    run(*fit(work, model, out))
    run(*fit(work, model, out, "--lam", 4))
    (out / "notes.txt").write_text("mine")
    (out / "kept").mkdir()
    shutil.copy(out / "solution.json", out / "kept" / "solution.json")
    (out / "cache").symlink_to(work / "cache")
    before = content(out)
    replaced = run(*fit(work, model, out, "--lam", 2, "--overwrite"))
    after = content(out)
    assert replaced["out"] == str(out) and replaced["settings"]["lam"] == 2
    ours = {"call.json", "state.safetensors", "result.json", "solution.json", "solution.safetensors"}
    assert {name for name in before if before[name] != after.get(name)} <= ours and before.keys() == after.keys()
    assert run(*fit(work, model, out, "--lam", 2))["out"] == str(out)
    assert run(*fit(work, model, out))["out"] == str(out / "run-3-lam-8")  # the replaced run is gone


def test_overwrite_of_a_folder_without_a_run_deletes_nothing(work, model, tmp_path):
    (tmp_path / "report.json").write_text("mine")
    (tmp_path / "paths.png").write_text("mine")
    run(*fit(work, model, tmp_path, "--overwrite"))
    assert (tmp_path / "report.json").read_text() == (tmp_path / "paths.png").read_text() == "mine"


def test_what_a_killed_process_leaves_blocks_nobody(work, model, tmp_path):
    run(*fit(work, model, tmp_path))
    (tmp_path / ".run-2-lam-4.part").mkdir()
    (tmp_path / "run-2-lam-4").mkdir()  # without a record
    (tmp_path / "run-3-lam-4").mkdir()
    (tmp_path / "run-3-lam-4" / "call.json").write_text("{")
    found = run(*fit(work, model, tmp_path, "--lam", 4))
    assert found["out"] == str(tmp_path / "run-4-lam-4")
    assert not (tmp_path / ".run-2-lam-4.part").exists()
    assert run(*fit(work, model, tmp_path, "--lam", 4))["out"] == found["out"]


CHOOSE = """
import sys
from mergetune.training import run_folder
print(run_folder(sys.argv[1], {"lam": float(sys.argv[2]), "tau": 0.3}))
"""


def test_processes_that_start_at_once_share_a_folder_only_with_equal_settings(tmp_path):
    values = [1.0, 2.0, 3.0, 1.0]
    started = [
        subprocess.Popen([sys.executable, "-c", CHOOSE, tmp_path / "out", str(lam)], stdout=subprocess.PIPE, text=True)
        for lam in values
    ]
    found = [process.communicate(timeout=120)[0].strip() for process in started]
    assert found[0] == found[3] and len(set(found)) == 3
    for lam, folder in zip(values, found, strict=True):
        assert json.loads((Path(folder) / "call.json").read_text())["settings"]["lam"] == lam


def test_under_torchrun_the_first_rank_decides(tmp_path):
    script = tmp_path / "choose.py"
    script.write_text(CHOOSE.replace("print(", "print(flush=True, end='', *[").replace("}))", "}), '\\n'])"))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    environment = os.environ | {"RDZV_BACKEND": "c10d"}
    for lam, name in ((1, ""), (2, "run-2-lam-2")):
        done = subprocess.run(
            [*command, "--standalone", script, tmp_path / "out", str(lam)],
            capture_output=True, text=True, timeout=240, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == [str(tmp_path / "out" / name).rstrip("/")] * 2
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [".runs.lock", "call.json", "run-2-lam-2"]


# -- images and experiments --------------------------------------------------------------------------------------------


def test_fit_on_images_shares_the_cache_between_runs(work, model, tmp_path):
    arguments = ["fit", work / "images", "--backbone", model, "--shots", 4, "--epochs", 1, "--out", tmp_path]
    run(*arguments)
    caches = {name for name in content(tmp_path) if name.startswith("cache/")}
    shown = invoke(*arguments, "--lam", 4)
    assert shown.exit_code == 0 and f"run 2 (lam 4) in {tmp_path / 'run-2-lam-4'}" in shown.stdout
    assert {name for name in content(tmp_path) if "cache/" in name} == caches
    assert (tmp_path / "run-2-lam-4" / "report.json").is_file() and (tmp_path / "run-2-lam-4" / "tuned").is_dir()
    rows = run("runs", tmp_path)
    assert [row["name"] for row in rows] == [".", "run-2-lam-4"]
    assert [row["settings"]["lam"] for row in rows] == ["chosen", "4"] and {"all"} <= rows[0]["results"].keys()
    run(*arguments, "--tau", 0.5, "--overwrite")
    assert [row["settings"] for row in run("runs", tmp_path)] == [
        {"lam": "chosen", "tau": "0.5"},
        {"lam": "4", "tau": "chosen"},
    ]


def test_compare_puts_other_settings_beside_and_more_cells_to_their_own(work, model, tmp_path):
    arguments = ["compare", work / "cache", "--out", tmp_path, "--backbone", model, "--expert", "coop:1", "--shots", 4]
    arguments += ["--tune", "epochs=1", "--fit", "epochs=1", "--tau", 0.3]
    run(*arguments, "--lam", 8, "--seeds", 1)
    run(*arguments, "--lam", 4, "--seeds", 1)
    (second,) = [folder.name for folder in tmp_path.glob("run-*")]
    assert second.startswith("run-2-grids-")
    run(*arguments, "--lam", 4, "--seeds", 2)
    run(*arguments, "--lam", 8, "--seeds", 2)
    assert [folder.name for folder in tmp_path.glob("run-*")] == [second]
    seeds = ["cache/partition-0/seed-1", "cache/partition-0/seed-2"]
    assert all((tmp_path / place / "cell.json").is_file() for place in (*seeds, *(f"{second}/{s}" for s in seeds)))
    assert all(row["state"] == "finished" for row in run("runs", tmp_path))
