"""Several runs with one --out: where each run goes, what is kept, and how the runs are listed."""

import json
import multiprocessing
import os
import re
import shutil
import socket
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from fit_cases import QUICK
from PIL import Image, ImageColor
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import cache, prompt
from typer.testing import CliRunner

import mergetune
from mergetune.cli import app, listing
from mergetune.experiments import Task, cells_folder, comparison, list_runs
from mergetune.facts import CompareOptions
from mergetune.training import run_folder
from mergetune.training.runs import TrainingRun

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


def test_another_background_is_another_run_with_caches_of_its_own(model, tmp_path):
    """Also the contact sheet of `eval` lays transparent pictures on the colour that is asked for."""
    for name, colour in zip(CLASSES, ("red", "lime", "blue", "black"), strict=True):
        for part, size in (("train", 12), ("train", 13), ("test", 14)):
            picture = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
            picture.paste(ImageColor.getrgb(colour), (size, size, 40, 40))
            (tmp_path / "images" / part / name).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "images" / part / name / f"{size}.png")
    out, grey = tmp_path / "out", ["--background", "#708090"]
    arguments = ["fit", tmp_path / "images", "--backbone", model, "--epochs", 1, "--out", out, "--no-measure"]
    run(*arguments)
    told = invoke(*arguments, *grey, "--shots", 5)
    assert told.exit_code == 0, told.stderr
    assert "every class has fewer than --shots 5 images: 2" in " ".join(told.stderr.split())
    (second,) = out.glob("run-2-*")
    assert (second / "cache" / "test").is_dir() and invoke(*arguments, *grey, "--shots", 5).exit_code == 0
    features = [mergetune.FeatureCache.open(folder / "cache" / "test").tensor() for folder in (out, second)]
    assert not torch.equal(*features) and not list(out.glob("run-3-*"))

    sheets = []
    for colour in ("white", "#708090"):
        sheet = ["--images", tmp_path / "images", "--contact-sheet", tmp_path / "sheet.png", "--background", colour]
        run("eval", "--cache", second / "cache" / "test", "--solution", second, *sheet)
        with Image.open(tmp_path / "sheet.png") as drawn:
            sheets.append({colour for _, colour in drawn.convert("RGB").getcolors(1 << 24)})
    assert ((112, 128, 144) in sheets[1]) and (112, 128, 144) not in sheets[0]


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
        assert "this run was finished before: nothing is trained" in again.stderr
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
    val = run(*arguments, "--out", "tune", "--val", "cache/test")
    assert val["out"] == "tune/run-2-other-val"
    other = run(*arguments[:-2], "--out", "tune", "--weight-decay", 0.1)
    assert other["out"].startswith("tune/run-3-") and "weight-decay-0.1" in other["out"]


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


PARTS = ("tuned", "measure", "mergetune")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("link", [*PARTS, "measure/lam-4"])
def test_a_link_in_out_is_refused_and_what_is_behind_it_stays(tmp_path, link, overwrite):
    out, theirs = run_folder(tmp_path / "out", {"lam": 8}, parts=PARTS), tmp_path / "theirs" / "deep"
    theirs.mkdir(parents=True)
    (theirs / "solution.json").write_text("theirs")
    (out / link).parent.mkdir(exist_ok=True)
    (out / link).symlink_to(theirs.parent)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=f"out/{link} is a link to another one: remove the link"):
        run_folder(out, {"lam": 8}, parts=PARTS, overwrite=overwrite)
    assert content(tmp_path) == before


def test_overwrite_deletes_in_no_folder_that_only_a_record_names(tmp_path):
    out = run_folder(tmp_path, {"lam": 8}, parts=PARTS)
    record = json.loads((out / "call.json").read_text())
    for name in ("mymodel", "tuned"):
        (out / name / "deep").mkdir(parents=True)
        (out / name / "deep" / "solution.json").write_text("mine")
    (out / "call.json").write_text(json.dumps(record | {"parts": ["mymodel"]}))
    with pytest.raises(ValueError, match=r"parts\[0\] must be one of tuned, measure, mergetune, got 'mymodel'"):
        run_folder(out, {"lam": 8}, parts=PARTS)
    run_folder(out, {"lam": 8}, parts=PARTS, overwrite=True)
    assert (out / "mymodel" / "deep" / "solution.json").read_text() == "mine"
    run_folder(out, {"lam": 8}, parts=PARTS, overwrite=True)
    assert not (out / "tuned" / "deep" / "solution.json").exists()


@pytest.mark.parametrize("link", ["task", "task/partition-0", "task/partition-0/seed-1"])
def test_overwrite_of_cells_leaves_what_is_behind_links(clip, tmp_path, link):
    out = cells_folder(tmp_path / "out", heads(clip))
    shutil.move(out / link, tmp_path / "theirs")
    (out / link).symlink_to(tmp_path / "theirs")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="is a link to another one"):
        cells_folder(out, heads(clip, shots=2), overwrite=True)
    assert content(tmp_path) == before


def test_what_a_killed_process_leaves_blocks_nobody(work, model, tmp_path):
    run(*fit(work, model, tmp_path))
    (tmp_path / ".run-2-lam-4.123-0123abcd.part").mkdir(0o700)
    (tmp_path / "run-2-lam-4").mkdir()  # without a record
    (tmp_path / "run-3-lam-4").mkdir()
    (tmp_path / "run-3-lam-4" / "call.json").write_text("{")
    found = run(*fit(work, model, tmp_path, "--lam", 4))
    assert found["out"] == str(tmp_path / "run-4-lam-4")
    assert not list(tmp_path.glob(".*.part"))
    assert run(*fit(work, model, tmp_path, "--lam", 4))["out"] == found["out"]


def test_leftovers_are_removed_only_if_they_are_ours(tmp_path):
    run_folder(tmp_path, {"lam": 8})
    ours = ".run-5-lam-4.123-0123abcd.part"
    for name in (".run-mine.part", ".run-2-lam-4.part", ours):
        (tmp_path / name).mkdir(0o700)
        (tmp_path / name / "call.json").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "call.json").write_text("theirs")
    (tmp_path / ".run-2-lam-4.123-0123abcd.part").symlink_to("theirs")
    (tmp_path / ".run-2-lam-4-2.part").write_text("mine")
    before = content(tmp_path)
    assert run_folder(tmp_path, {"lam": 4}) == tmp_path / "run-2-lam-4"
    gone = before.keys() - content(tmp_path).keys()
    assert gone == {f"{ours}/call.json"} and (tmp_path / ".run-2-lam-4.123-0123abcd.part").is_symlink()
    assert sorted(path.name for path in (tmp_path / "run-2-lam-4").iterdir()) == ["call.json"]


@pytest.mark.parametrize("taken", ["run-999999", "run-1000000", f"run-{'9' * 240}", "run-7-mine"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_no_number_of_a_folder_ends_the_numbering(tmp_path, taken, kind):
    run_folder(tmp_path, {"lam": 1})
    if kind == "folder":
        (tmp_path / taken).mkdir()
    elif kind == "file":
        (tmp_path / taken).write_text("mine")
    else:
        (tmp_path / taken).symlink_to("nowhere")
    made = [run_folder(tmp_path, {"lam": lam}) for lam in (2, 3, 4)]
    assert len({*made, tmp_path / taken}) == 4 and [run_folder(tmp_path, {"lam": lam}) for lam in (2, 3, 4)] == made
    assert not list(tmp_path.glob(".*.part"))


def test_a_file_in_the_place_of_the_next_run_is_passed(tmp_path):
    run_folder(tmp_path, {"lam": 1})
    (tmp_path / "run-2-lam-2").write_text("mine")
    assert run_folder(tmp_path, {"lam": 2}) == tmp_path / "run-3-lam-2"


def at_once(work, arguments: list[tuple]) -> list:
    """Results of calls in forked processes that start together."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in arguments]
    ready = context.Barrier(len(arguments))

    def child(send, given):
        ready.wait()
        send.send(work(*given))

    children = [
        context.Process(target=child, args=(send, given)) for (_, send), given in zip(pipes, arguments, strict=True)
    ]
    for process in children:
        process.start()
    found = [receive.recv() if receive.poll(120) else None for receive, _ in pipes]
    for process in children:
        process.join()
    return found


def test_processes_that_start_at_once_share_a_folder_only_with_equal_settings(tmp_path, one_thread):
    values = [1.0, 2.0, 3.0, 4.0, 1.0, 2.0]
    found = at_once(lambda lam: run_folder(tmp_path / "out", {"lam": lam, "tau": 0.3}), [(lam,) for lam in values])
    assert len(set(found)) == 4 and found[4:] == found[:2] and tmp_path / "out" in found
    for lam, folder in zip(values, found, strict=True):
        assert json.loads((folder / "call.json").read_text())["settings"]["lam"] == lam


def test_under_torchrun_the_first_rank_decides(tmp_path, one_thread):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> list[Path]:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # Rank 1 asks for what it would never get alone: the answer of rank 0 counts.
        return [run_folder(tmp_path / "out", {"lam": lam + 10 * number}) for lam in (1, 2)]

    found = at_once(rank, [(0,), (1,)])
    assert found == [[tmp_path / "out", tmp_path / "out" / "run-2-lam-2"]] * 2
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["call.json", "run-2-lam-2"]


# -- images and experiments --------------------------------------------------------------------------------------------


def test_the_list_shows_the_saved_solution_in_columns_that_fit(work, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(*fit(work, model, out))
    run(*fit(work, model, out, "--lam", 4))
    parts = {"base": {"accuracy": 81.0}, "novel": {"accuracy": 55.0}, "hm": 65.5, "hm_error": 1.0}
    scores = {name: {"accuracy": value} for name, value in (("zero-shot", 50), ("MERGETUNE", 60), ("head", 70))}
    report = {"reports": {"all": scores}, "row": "head", "measured": {"head": parts, "MERGETUNE": parts | {"hm": 1.0}}}
    (out / "report.json").write_text(json.dumps(report))
    (row, other) = list_runs(out)
    expected = {"accuracy": 70.0, "your classes": 81.0, "new classes": 55.0, "HM": 65.5}
    assert row.results == expected | {"loss": row.results["loss"]} and other.results.keys() == {"loss"}
    (out / "report.json").write_text(json.dumps({"reports": {"all": scores}}))  # as version 0.1 wrote it
    assert list_runs(out)[0].results["accuracy"] == 60
    (out / "report.json").write_text(json.dumps(report))
    monkeypatch.setenv("COLUMNS", "60")
    piped = invoke("runs", out).stdout
    (line,) = [line for line in piped.splitlines() if "run-2-lam-4" in line]
    assert "finished" in line and "your classes" in piped and other.when in line
    monkeypatch.setattr(listing, "is_terminal", lambda: True)
    blocks = invoke("runs", out).stdout
    assert "  your classes: 81.00" in blocks.splitlines() and "run-2-lam-4" in blocks.splitlines()
    assert max(map(len, blocks.splitlines())) <= 60


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
    assert [row["settings"]["lam"] for row in rows] == ["chosen", "4"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert rows[0]["results"]["accuracy"] == report["reports"]["all"]["MERGETUNE"]["accuracy"]
    assert rows[0]["seconds"] >= sum(report["seconds"].values()) > 0
    again = invoke(*arguments)  # a finished run, which takes little time
    assert "this run was finished before: nothing is trained, only tested again" in again.stderr
    assert run("runs", tmp_path)[0]["seconds"] >= run("runs", tmp_path)[1]["seconds"] / 10
    names = sorted(name for name in os.listdir(tmp_path / "cache"))
    refused = invoke(*arguments, "--lam", -1)
    assert refused.exit_code == 2 and "lam must be" in refused.stderr
    assert [folder.name for folder in tmp_path.glob("run-*")] == ["run-2-lam-4"]  # a refused call leaves no run
    (work / "images" / "train" / "anchor" / "copy.png").write_bytes(
        next((work / "images" / "train" / "anchor").iterdir()).read_bytes()
    )
    try:
        more = invoke(*arguments)
    finally:
        (work / "images" / "train" / "anchor" / "copy.png").unlink()
    assert more.exit_code == 0 and "run 3 (other images)" in more.stdout, more.stderr
    assert sorted(os.listdir(tmp_path / "cache")) == names and (tmp_path / "run-3-other-images" / "cache").is_dir()
    shutil.rmtree(tmp_path / "run-3-other-images")
    replaced = invoke(*arguments, "--tau", 0.5, "--overwrite")
    assert replaced.exit_code == 0 and "continuing" not in replaced.stderr, "the run beside it does not count"
    assert [row["settings"] for row in run("runs", tmp_path)] == [
        {"lam": "chosen", "tau": "0.5"},
        {"lam": "4", "tau": "chosen"},
    ]


@pytest.mark.parametrize("command", ["fit", "cache"])
@pytest.mark.parametrize("out", ["out", ".", "train/../out", None])
def test_an_out_inside_the_images_is_refused_before_anything_is_written(work, model, monkeypatch, command, out):
    monkeypatch.chdir(work / "images")
    before = content(work / "images")
    if (command, out) == ("cache", None):
        out = "caches"  # it has no default
    refused = invoke(command, ".", "--backbone", model, *([] if out is None else ["--out", out]))
    said = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and "--out must not lie in IMAGES" in said and "a folder beside IMAGES" in said
    assert content(work / "images") == before and not (work / "images" / "out").exists()


def test_a_first_call_that_is_refused_leaves_the_folder_to_the_corrected_one(work, model, tmp_path):
    arguments = ["fit", work / "images", "--backbone", model, "--shots", 4, "--epochs", 1, "--out", tmp_path]
    assert invoke(*arguments, "--lam", -1).exit_code == 2
    assert f"run 1 in {tmp_path}" in invoke(*arguments, "--lam", 1).stdout


def small_task(seed: int = 1) -> Task:
    return Task("task", cache(seed=seed), cache(seed=2))


def heads(clip, *, task=None, seeds=(1,), **setup):
    options = CompareOptions(**{"experts": ("coop:1",), "shots": 4, "grid": {"lam": (8.0,)}} | setup)
    return comparison.heads(clip, [task or small_task()], options, (0,), seeds)


def test_cells_of_other_settings_go_beside_and_more_cells_to_those_of_their_settings(clip, tmp_path):
    """As compare, demo and reproduce choose their folder."""
    second = cells_folder(tmp_path, heads(clip))
    assert second == tmp_path
    four = cells_folder(tmp_path, heads(clip, grid={"lam": (4.0,)}))
    assert four == tmp_path / "run-2-grid-lam-4"
    assert cells_folder(tmp_path, heads(clip, task=small_task(5))) == tmp_path / "run-3-other-images"
    assert cells_folder(tmp_path, heads(clip, grid={"lam": (4.0,)}, seeds=(2, 3))) == four
    assert cells_folder(tmp_path, heads(clip, seeds=(2,))) == tmp_path
    assert cells_folder(tmp_path, heads(clip, shots=2, seeds=(7,))) == tmp_path / "run-4-shots-2"
    for folder, seeds in ((tmp_path, (1, 2)), (four, (1, 2, 3))):
        assert sorted(folder.glob("task/*/*/cell.json")) == [
            folder / "task" / "partition-0" / f"seed-{seed}" / "cell.json" for seed in seeds
        ]
    rows = {row.name: row for row in list_runs(tmp_path)}
    assert rows["run-2-grid-lam-4/task/partition-0/seed-1"].settings["grid lam"] == "4"
    assert {row.state for row in rows.values()} == {"started"} and len(rows) == 7


def test_overwrite_of_cells_replaces_their_table_and_leaves_other_files(clip, tmp_path):
    cells_folder(tmp_path, heads(clip, seeds=(1, 2)))
    cells_folder(tmp_path, heads(clip, shots=3))
    place = tmp_path / "task" / "partition-0"
    for file in ("coop-1/solution.json", "coop-1/mine.txt", "class-weights.safetensors", "notes.md"):
        (place / "seed-1" / file).parent.mkdir(exist_ok=True)
        (place / "seed-1" / file).write_text("x")
    before = content(tmp_path)
    assert cells_folder(tmp_path, heads(clip, shots=2), overwrite=True) == tmp_path
    gone = {name for name in before if name not in content(tmp_path)}
    own = "task/partition-0/seed"
    wanted = {f"{own}-1/coop-1/solution.json", f"{own}-1/class-weights.safetensors", f"{own}-2/cell.json"}
    assert gone == wanted
    assert json.loads((place / "seed-1" / "cell.json").read_text())["settings"]["shots"] == 2


# -- the list ----------------------------------------------------------------------------------------------------------


def trained(clip, folder, **options):
    result = mergetune.fit(clip, cache(), prompt(), resume=folder, **QUICK | {"epochs": 2} | options)
    result.save(folder)
    return result


def test_runs_are_listed_with_what_differs(clip, tmp_path):
    made = {
        ".": trained(clip, tmp_path, val=cache(9, seed=4)),
        "run-2-lam-4": trained(clip, tmp_path / "run-2-lam-4", lam=4.0, val=cache(9, seed=4)),
        "run-10-lam-2": trained(clip, tmp_path / "run-10-lam-2", lam=2.0, val=cache(9, seed=5)),
    }
    (tmp_path / "run-11-lam-1").mkdir()
    (tmp_path / "run-11-lam-1" / "result.json").write_text('{"history": 7}')
    rows = list_runs(tmp_path)
    assert [row.name for row in rows] == [*made, "run-11-lam-1"]
    assert [row.number for row in rows] == [1, 2, 10, 11]
    for row in rows[:3]:
        history, timings = made[row.name].history, made[row.name].timings
        assert row.state == "finished" and row.error is None
        assert row.results == {
            "loss": history[-1]["loss"],
            "val_accuracy": max(entry["val_accuracy"] for entry in history),
        }
        assert row.seconds == timings["seconds"] and re.fullmatch("[0-9]{4}-[0-9-]{5} [0-9:]{5}", row.when)
    assert [row.settings for row in rows[:3]] == [
        {"lam": "8", "val": "9 of 3 classes (1)"},
        {"lam": "4", "val": "9 of 3 classes (1)"},
        {"lam": "2", "val": "9 of 3 classes (2)"},
    ]
    assert rows[3].state == "damaged" and "result.json is damaged: history must be a list" in str(rows[3].error)
    assert [row.name for row in list_runs(tmp_path, sort="lam")][:3] == ["run-10-lam-2", "run-2-lam-4", "."]
    assert [row.results["loss"] for row in list_runs(tmp_path, sort="loss")[:3]] == sorted(
        row.results["loss"] for row in rows[:3]
    )
    with pytest.raises(
        ValueError, match="--sort must be one of name, state, lam, val, loss, val_accuracy, when, seconds, got 'mu'"
    ):
        list_runs(tmp_path, sort="mu")
    shown = invoke("runs", tmp_path)
    assert shown.exit_code == 0 and "run-10-lam-2" in shown.stdout and "run-11-lam-1" in shown.stdout
    assert "result.json is damaged" in shown.stderr
    assert [row["name"] for row in run("runs", tmp_path, "--sort", "name")] == [row.name for row in rows]


def test_a_run_that_was_interrupted_is_listed_with_its_epoch(clip, tmp_path, monkeypatch):
    write = TrainingRun.write

    def stop_after_two(self, folder):
        write(self, folder)
        if len(self.history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "write", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        trained(clip, tmp_path, epochs=5)
    (row,) = list_runs(tmp_path)
    assert row.state == "epoch 2 of 5" and row.seconds is None
    run_folder(tmp_path / "later", {"lam": 8})
    assert [(row.name, row.state) for row in list_runs(tmp_path.parent / tmp_path.name / "later")] == [(".", "started")]


def test_folders_of_version_0_1_and_several_outs_are_listed():
    rows = {row.name: row for row in list_runs(OLD)}
    assert list(rows) == ["coop", "coop-interrupted", "fit", "fit-head", "fit-head-interrupted", "tune", "tune-head"]
    assert rows["coop-interrupted"].state.startswith("epoch ") and rows["fit"].state == "finished"
    assert rows["fit"].settings["stage"] == "fit" and rows["tune"].settings["stage"] == "tune"
    assert all(row.number == 1 and row.results["loss"] > 0 for row in rows.values())
    assert not any(re.search("[0-9a-f]{8}", text) for row in rows.values() for text in row.settings.values())


@pytest.mark.parametrize("epochs", ["x", None, [3], {"a": 1}, 1.5, True])
def test_a_run_with_settings_of_another_type_is_a_row_with_its_error(clip, tmp_path, monkeypatch, epochs):
    trained(clip, tmp_path / "good")
    (tmp_path / "bad").mkdir()
    with safe_open(tmp_path / "good" / "state.safetensors", "pt") as file:
        tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    record = json.loads(facts["run"])
    record["settings"]["epochs"] = epochs
    save_file(tensors, tmp_path / "bad" / "state.safetensors", facts | {"run": json.dumps(record)})
    bad, good = list_runs(tmp_path)
    assert good.state == "finished" and bad.state == "damaged" and bad.name == "bad"
    assert "state.safetensors is damaged: settings.epochs must be a whole number" in str(bad.error)


def test_a_folder_that_cannot_be_listed_is_a_row_with_its_error(tmp_path, monkeypatch):
    run_folder(tmp_path / "good", {"lam": 8})
    run_folder(tmp_path / "locked", {"lam": 8})
    listed = os.listdir

    def refused(folder="."):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refused)
    good, locked = list_runs(tmp_path)
    assert good.state == "started" and locked.state == "damaged"
    assert "Permission denied" in str(locked.error)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused = invoke("runs", tmp_path / "gone")
    assert refused.exit_code == 2 and "gone does not exist" in " ".join(refused.stderr.split())
    assert "no runs in" in invoke("runs", tmp_path).stdout
