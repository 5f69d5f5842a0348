"""The commands, from a folder of images to a report: what they print, what they leave, how they fail."""

import json
import os
import pickle
import shutil
import sys
import zipfile
from importlib.resources import as_file, files

import pytest
import torch
from miniature import write_miniature
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mergetune import load_clip, load_solution, open_solution
from mergetune.cli import app

CLASSES = ("anchor", "bell", "camera", "heart")


@pytest.fixture(scope="module")
def model():
    return "icon-clip"


@pytest.fixture(scope="module")
def work(tmp_path_factory, model):
    """A folder with images of four classes, and what cache, tune and fit make of them."""
    folder = tmp_path_factory.mktemp("work")
    with (
        as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive,
        zipfile.ZipFile(archive) as content,
    ):
        wanted = [name for name in content.namelist() if name.split("/")[1] in CLASSES]
        content.extractall(folder / "images", wanted)
    backbone = ["--backbone", model]
    short = ["--epochs", "2", "--classes", "base", "--shots", "8"]
    cached = run("cache", folder / "images", "--out", folder / "cache", *backbone)
    assert cached["train"]["classes"] == len(CLASSES) and cached["test"]["skipped"] == 0
    train = ["--cache", folder / "cache" / "train"]
    run("tune", *train, "--out", folder / "coop", *backbone, *short, "--template", "an icon of a {}")
    run("tune", *train, "--out", folder / "kgcoop", *backbone, *short, "--method", "kgcoop")
    tuned = ["--tuned", folder / "coop", "--tuned", folder / "kgcoop", "--beta", "0.5", "--beta", "0.1"]
    fitted = run("fit", *train, "--out", folder / "merged", *backbone, *short, *tuned)
    assert len(fitted["history"]) == 2 and {"path_1", "path_2"} <= fitted["history"][0].keys()
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run(*arguments):
    """A command's JSON."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_eval_reports_accuracy_of_each_solution(work, model):
    test = ["--cache", work / "cache" / "test", "--backbone", model, "--solution", work / "merged"]
    report = run("eval", *test)
    assert report.keys() == {"zero-shot", str(work / "merged")}
    assert all(entry["per_class"].keys() == set(CLASSES) and entry["images"] > 50 for entry in report.values())
    halves = run("eval", *test, "--base-novel")["zero-shot"]
    assert set(halves["base"]["per_class"]) == {"anchor", "bell"}
    assert set(halves["novel"]["per_class"]) == {"camera", "heart"}
    assert f"{report['zero-shot']['accuracy']:.2f}" in invoke("eval", *test).stdout
    shown = " ".join(invoke("eval", *test, "--base-novel").stdout.split())
    assert all(f"{value:.2f}" in shown for value in (halves["base"]["accuracy"], halves["hm"])) and "HM" in shown


def test_path_writes_barriers_and_a_figure(work, model):
    figure = work / "paths.png"
    walks = run(
        "path", "--cache", work / "cache" / "test", "--backbone", model, "--tuned", work / "coop",
        "--solution", work / "merged", "--figure", figure, "--points", 3, "--classes", "base",
    )  # fmt: skip
    assert all(walk["barrier"] >= 0 and len(walk["loss"]) == 3 for walk in walks.values())
    assert figure.stat().st_size > 10_000


def test_fit_again_gives_the_same_and_other_settings_another_run(work, model):
    arguments = [
        "fit", "--cache", work / "cache" / "train", "--out", work / "merged", "--backbone", model, "--classes", "base",
        "--shots", 8, "--tuned", work / "coop", "--tuned", work / "kgcoop", "--beta", 0.5, "--beta", 0.1, "--epochs", 2,
    ]  # fmt: skip
    before = (work / "merged" / "solution.safetensors").read_bytes()
    run(*arguments)
    assert (work / "merged" / "solution.safetensors").read_bytes() == before
    shown = invoke(*arguments, "--lam", 3).stdout
    assert f"run 2 (lam 3) in {work / 'merged' / 'run-2-lam-3'}" in shown
    assert (work / "merged" / "solution.safetensors").read_bytes() == before


def test_options_of_the_functions_are_options_of_the_commands(work, model, tmp_path):
    train = ["--cache", work / "cache" / "train", "--backbone", model, "--classes", "base", "--epochs", 1]
    more = ["--val", work / "cache" / "test", "--precision", "float32", "--momentum", 0.5, "--warmup-epochs", 0]
    tuned = run("tune", *train, *more, "--out", tmp_path / "tuned", "--class-specific", "--position", "front")
    assert "val_accuracy" in tuned["history"][0] and tuned["settings"]["class_specific"] is True
    assert [tuned["settings"][name] for name in ("position", "momentum", "warmup_epochs")] == ["front", 0.5, 0]
    arguments = ["fit", *train, *more, "--tuned", work / "coop", "--grid", "0,0.5", "--backend", "torch"]
    fitted = run(*arguments, "--out", tmp_path / "fit")
    assert fitted["settings"]["grid"] == [0, 0.5] and fitted["settings"]["points"] == 2
    assert "val_accuracy" in fitted["history"][0] and fitted["settings"]["momentum"] == 0.5
    given = run(*arguments, "--out", tmp_path / "given", "--zero-shot", work / "kgcoop")
    assert given["settings"]["zero_shot"] != fitted["settings"]["zero_shot"]
    images = ["fit", work / "images", "--backbone", model, "--out", tmp_path / "no"]
    for wrong, message in (
        ([*images, "--tune", "method=head"], "--tune must not hold method, got 'head': use --method instead"),
        ([*images, "--val", work / "cache" / "test"], "--val needs --cache"),
        ([*arguments, "--out", tmp_path / "no", "--tune", "epochs=3"], "--tune is for stage 1 on images"),
    ):
        refused = invoke(*wrong)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split())
    assert not (tmp_path / "no").exists()


def test_fit_takes_a_folder_of_images_the_whole_way(work, model, tmp_path):
    arguments = ["fit", work / "images", "--backbone", model, "--shots", 4, "--epochs", 2, "--classes", "base"]
    report = run(*arguments, "--out", tmp_path / "all")
    assert list(report["reports"]) == ["base", "novel", "seen", "unseen"] and (tmp_path / "all" / "paths.png").is_file()
    assert set(report["reports"]["novel"]["MERGETUNE"]["per_class"]) == {"camera", "heart"}
    assert report["settings"]["epochs"] == 2 and len(
        json.loads((tmp_path / "all" / "result.json").read_text())["history"]
    )
    test = ["--cache", tmp_path / "all" / "cache" / "test", "--backbone", model, "--base-novel"]
    found = run("eval", *test, "--solution", tmp_path / "all")[str(tmp_path / "all")]
    for part in report["reports"]:
        assert found[part]["accuracy"] == report["reports"][part]["MERGETUNE"]["accuracy"]
    for command in (["eval", *test], [*arguments, "--out", tmp_path / "all"]):
        shown = invoke(*command).stdout
        assert all(word in shown for word in ("base", "novel", "HM", "seen", "unseen", "joint HM")), shown
    given = run(*arguments, "--out", tmp_path / "given", "--tuned", tmp_path / "all" / "tuned")
    assert given["reports"] == report["reports"] and not (tmp_path / "given" / "tuned").exists()
    head = invoke(
        "fit", work / "images", "--backbone", model, "--method", "head", "--epochs", 1, "--out", tmp_path / "h"
    )
    assert head.exit_code == 0 and "MERGETUNE" in head.stdout


def test_fit_measures_chooses_and_says_what_it_did(work, model, tmp_path):
    shutil.copytree(work / "images", tmp_path / "images")
    (tmp_path / "images" / "train" / "bell" / "notes.txt").touch()
    keep = tmp_path / "keep"
    with as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        for number, name in enumerate(["cloud", "cloud", "star"]):
            found = [file for file in content.namelist() if file.split("/")[1] == name][number]
            (keep / name).mkdir(parents=True, exist_ok=True)
            (keep / name / found.split("/")[2]).write_bytes(content.read(found))
    arguments = ["fit", tmp_path / "images", "--backbone", model, "--shots", 4, "--epochs", 1, "--retain", keep]
    arguments += ["--out", tmp_path / "out"]
    report = run(*arguments, "--tau", 0.5)
    assert {line["name"].split(", ")[1] for line in report["choice"]["settings"]["tried"]} == {"tau 0.5"}
    assert report["settings"]["tau"] == 0.5 and report["ignored"] == {".txt": 1}
    assert report["retained"]["zero-shot"]["images"] == 3 and len(report["halves"]["novel"]) == 2
    shown = invoke(*arguments, "--tau", 0.5)
    assert shown.exit_code == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    for word in (
        "Chosen: lam",
        "your classes",
        "new classes",
        "HM",
        "retained",
        report["verdict"],
        "Seconds:",
    ):
        assert word in text, word
    assert f"mergetune predict {tmp_path / 'out'}" in text
    assert "ignored 1: .txt (1)" in shown.stderr
    plain = invoke(*arguments[:-1], tmp_path / "plain", "--no-measure").stdout
    assert "No measuring: measuring is switched off." in plain and "Chosen" not in plain


def test_fit_takes_images_or_a_cache(work, model, tmp_path):
    backbone, out = ["--backbone", model], ["--out", tmp_path / "no"]
    cache = ["--cache", work / "cache" / "train"]
    for arguments, message in (
        (["fit", *out], "give either a folder of images or --cache, got neither"),
        (["fit", work / "images", *cache, *out], f"got {work / 'images'} and --cache {cache[1]}"),
        (["fit", *cache, *out], "--tuned and --out are needed with --cache"),
        (["fit", *cache, "--tuned", work / "coop"], "--tuned and --out are needed with --cache"),
        (["fit", tmp_path / "gone", *out], f"and {tmp_path / 'gone'} does not exist"),
        (["fit", work / "images", *out, "--retain", tmp_path / "gone"], "--retain must be a folder of class folders"),
        (["fit", work / "images", *out, "--retain", work / "images"], "retain must hold classes that are not trained"),
        (["fit", *cache, *out, "--tuned", work / "coop", "--no-measure"], "--no-measure needs images"),
    ):
        refused = invoke(*arguments, *backbone)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), refused.stderr
    assert not (tmp_path / "no").exists()


def test_only_the_first_rank_prints(work, model, tmp_path):
    """Under torchrun every rank runs the command; one result is to be read."""
    commands = (
        ["fit", "--cache", work / "cache" / "train", "--tuned", work / "coop", "--epochs", 1, "--classes", "base"],
        ["fit", work / "images", "--epochs", 1, "--shots", 2],
    )
    for number, command in enumerate(commands):
        arguments = [str(a) for a in [*command, "--backbone", model, "--out", tmp_path / str(number)]]
        first = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
        assert first.exit_code == 0 and str(tmp_path / str(number)) in first.stdout, first.stderr
        for form in ([], ["--json"]):
            second = CliRunner().invoke(app, [*arguments, *form], env={"RANK": "1"})
            assert (second.exit_code, second.stdout) == (0, ""), second.stderr
    shown = CliRunner().invoke(app, [str(a) for a in [*commands[0], "--backbone", model, "--out", tmp_path / "0"]])
    history = json.loads((tmp_path / "0" / "result.json").read_text())["history"]
    assert f"loss {history[-1]['loss']:.4g}" in shown.stdout  # for people: four digits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tuned", "nowhere"], "nowhere"),
        (["--tuned", "{work}/coop", "--tau", "1.5"], "tau must lie in [0, 1], got 1.5"),
        (["--tuned", "{work}/coop", "--points", "0"], "points must be a whole number of at least 1, got 0"),
        (["--tuned", "{work}/coop", "--classes", "half"], "--classes must be all, base or novel, got 'half'"),
        (["--tuned", "{work}/coop", "--template", "no place for a name"], "exactly one {}"),
    ],
)
def test_a_wrong_argument_exits_with_2_and_leaves_nothing(work, model, tmp_path, arguments, message):
    arguments = [argument.replace("{work}", str(work)) for argument in arguments]
    out = tmp_path / "out"
    result = invoke("fit", "--cache", work / "cache" / "train", "--out", out, "--backbone", model, *arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not out.exists()


def test_brackets_in_an_error_are_printed(work, model, tmp_path):
    """Shapes and paths look like markup to rich, which would drop them."""
    (tmp_path / "[a] run").mkdir()
    (tmp_path / "[a] run" / "solution.json").write_text("{")
    arguments = ["--cache", work / "cache" / "test", "--backbone", model, "--solution", tmp_path / "[a] run"]
    result = invoke("eval", *arguments)
    assert result.exit_code == 2 and "[a] run" in result.stderr


def test_cache_names_an_unreadable_image_and_can_skip_it(work, model, tmp_path):
    shutil.copytree(work / "images", tmp_path / "images")
    broken = next((tmp_path / "images" / "train" / "bell").iterdir())
    broken.write_bytes(broken.read_bytes()[:40])
    arguments = ["cache", tmp_path / "images", "--out", tmp_path / "cache", "--backbone", model]
    refused = invoke(*arguments)
    assert refused.exit_code == 2 and broken.name in "".join(refused.stderr.split())
    assert run(*arguments, "--skip-unreadable")["train"]["skipped"] == 1
    fit = ["fit", tmp_path / "images", "--out", tmp_path / "fit", "--backbone", model, "--epochs", 1]
    refused = invoke(*fit)
    assert refused.exit_code == 2 and broken.name in "".join(refused.stderr.split())
    assert "MERGETUNE" in run(*fit, "--skip-unreadable")["reports"]["all"]


def test_what_is_exported_comes_back(work, model, tmp_path):
    """The merged solution records its backbone and its training classes, so neither is given."""
    names, merged = tmp_path / "names.txt", work / "kgcoop"  # its text ends in ".", as CoOp's
    names.write_text("anchor\nbell\n")
    for form, target in (("coop", "coop"), ("head", "head.npz"), ("classifier", "zs.pt"), ("hub", "hub")):
        more = ["--backbone", model, "--classnames", names] if form == "coop" else []
        done = invoke("export", merged, "--to", form, "--out", tmp_path / target, *more)
        assert done.exit_code == 0, done.stderr
    test = ["--cache", work / "cache" / "test", "--backbone", model, "--classes", "base"]
    forms = [tmp_path / name for name in ("coop", "head.npz", "zs.pt", "hub")]
    report = run("eval", *test, *(a for path in (merged, *forms) for a in ("--solution", path)))
    assert len({report[str(path)]["accuracy"] for path in (merged, *forms)}) == 1
    assert tuple(torch.load(tmp_path / "zs.pt", weights_only=True).shape) == (128, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "onnxx"], "peft, peft-transformers, coop or hub, got 'onnxx'"),
        (["--to", "onnx"], "--out must be a file that ends in .onnx for --to onnx, got 'out.x'"),
        (["--to", "torch-export"], "--out must be a file that ends in .pt2"),
        (["--to", "classifier"], "--out must be a file that ends in .pt or .pth"),
        (["--to", "head"], "--out must be a file that ends in .safetensors or .npz or .pt or .pth"),
        (["--to", "coop", "--license", "mit"], "--license is an option of --to hub, got it with --to coop"),
        (["--to", "coop", "--push", "me/x"], "--push is an option of --to hub"),
        (["--to", "hub", "--half"], "--half is an option of --to coop"),
        (["--to", "coop"], "--backbone (the solution records none) and --classnames (the solution serves any classes)"),
        (
            ["--to", "coop", "--pretrained", "x", "--classnames", "{names}"],
            "--backbone (the solution records none) must",
        ),
        (["--to", "coop", "--classnames", "{empty}"], "--classnames must be a text file with one class name per line"),
    ],
)
def test_all_that_an_export_lacks_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, options, said):
    monkeypatch.setattr("mergetune.load_clip", lambda *a, **k: pytest.fail("a model was loaded"))
    torch.save({"ctx": torch.ones(4, 128)}, tmp_path / "model.pth.tar-5")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "empty.txt").write_text("\n")
    options = [o.format(names=tmp_path / "names.txt", empty=tmp_path / "empty.txt") for o in options]
    refused = invoke("export", tmp_path / "model.pth.tar-5", "--out", tmp_path / "out.x", *options)
    assert refused.exit_code == 2 and said in refused.stderr, refused.stderr
    assert not (tmp_path / "out.x").exists()


def test_a_file_is_no_folder_for_an_export_and_a_folder_is_no_file(work, tmp_path):
    (tmp_path / "out").write_text("")
    refused = invoke("export", work / "kgcoop", "--to", "hub", "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "--out must be a folder for --to hub, got the file" in refused.stderr
    (tmp_path / "out.onnx").mkdir()
    refused = invoke("export", work / "kgcoop", "--to", "onnx", "--out", tmp_path / "out.onnx")
    assert refused.exit_code == 2 and "for --to onnx, got a folder" in refused.stderr


def test_a_graph_says_how_to_use_it_and_names_a_missing_package(work, tmp_path, monkeypatch):
    program = tmp_path / "new" / "a.pt2"
    done = invoke("export", work / "coop", "--to", "torch-export", "--out", program)
    assert done.exit_code == 0 and f"torch-export: {program}" in done.stdout, done.stderr
    assert torch.export.load(program).module()(torch.zeros(3, 3, 48, 48)).shape == (3, 2)
    done = invoke("export", work / "coop", "--to", "onnx", "--out", tmp_path / "a.onnx")
    assert done.exit_code == 0 and f"python {tmp_path / 'predict_onnx.py'} {tmp_path / 'a.onnx'}" in done.stdout
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused = invoke("export", work / "coop", "--to", "onnx", "--out", tmp_path / "b.onnx")
    assert refused.exit_code == 1 and "pip install 'mergetune[onnx]'" in refused.stderr


def test_export_to_the_hub_prints_the_address_in_one_piece(work, tmp_path, monkeypatch):
    pushed = []

    def push(solution, repository: str, **options) -> str:
        pushed.append((solution.kind, options))
        return f"https://huggingface.co/{repository}"

    monkeypatch.setattr("mergetune.solutions.push_to_hub", push)
    repository = f"somebody/{'prompt-' * 12}end"  # longer than a line of a terminal
    done = invoke("export", work / "coop", "--to", "hub", "--out", tmp_path, "--push", repository, "--license", "mit")
    assert done.exit_code == 0 and f"https://huggingface.co/{repository}" in done.stdout, done.stderr
    assert pushed == [("prompt", {"license": "mit", "metrics": {}})]
    assert repository in (tmp_path / "README.md").read_text()


def test_a_pickled_head_is_converted_without_running_it(tmp_path):
    torch.save(torch.nn.Linear(4, 3), tmp_path / "head.pt")
    done = invoke("convert", tmp_path / "head.pt", tmp_path / "head.safetensors")
    assert done.exit_code == 0 and "weight, bias" in done.stdout
    assert open_solution(tmp_path / "head.safetensors", classnames=["a", "b", "c"]).weight.shape == (3, 4)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert invoke("convert", tmp_path / "bad.pt", tmp_path / "out.safetensors").exit_code == 2
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_class_names_position_of_a_checkpoint_matters(work, model, tmp_path):
    tuned = load_solution(work / "coop")
    torch.save({"state_dict": {"ctx": tuned.ctx}, "epoch": 3}, tmp_path / "model.pth.tar-3")
    test = ["--cache", work / "cache" / "test", "--backbone", model, "--solution", tmp_path / "model.pth.tar-3"]
    weights = {p: run("eval", *test, "--position", p)[str(tmp_path / "model.pth.tar-3")] for p in ("end", "front")}
    assert weights["end"] != weights["front"]
    wrong = invoke("eval", *test, "--position", "back")
    assert wrong.exit_code == 2 and "position must be" in wrong.stderr


def test_a_benchmark_dataset_is_taken_by_name(model, tmp_path):
    write_miniature(tmp_path, "eurosat", images_per_class=8, classes=2, size=48)
    report = run("cache", "EuroSAT", "--root", tmp_path, "--out", tmp_path / "cache", "--backbone", model)
    assert {split: found["classes"] for split, found in report.items()} == {"train": 2, "val": 2, "test": 2}
    refused = invoke("cache", "dtd", "--root", tmp_path, "--out", tmp_path / "other", "--backbone", model)
    assert refused.exit_code == 2 and "split_zhou_DescribableTextures.json" in refused.stderr


def test_images_may_be_a_split_file_or_a_table(model, tmp_path):
    write_miniature(tmp_path, "eurosat", images_per_class=8, classes=2, size=48)
    (split,) = tmp_path.rglob("split_zhou_*.json")
    by_name = run("cache", "EuroSAT", "--root", tmp_path, "--out", tmp_path / "a", "--backbone", model)
    rows = [(part, *row) for part, listed in json.loads(split.read_text()).items() for row in listed]
    (images,) = {path.parents[1] for path in tmp_path.rglob("*.jpg")}
    shutil.copy(split, images / split.name)  # whose files are relative to its folder
    by_split = run("cache", images / split.name, "--out", tmp_path / "b", "--backbone", model)
    assert by_split == by_name
    table = "".join(f"{file},{name},{part}\n" for part, file, _, name in rows)
    (images / "rows.csv").write_text("path,label,split\n" + table)
    by_table = run("cache", images / "rows.csv", "--out", tmp_path / "c", "--backbone", model)
    assert by_table == by_name


def test_reproduce_estimates_its_time_as_json(model, tmp_path):
    write_miniature(tmp_path, "eurosat", images_per_class=8, classes=4, size=48)
    work = ["--datasets", "eurosat", "--seeds", 1, 2, "--shots", 2, "--epochs", 1, "--dry-run"]
    out = tmp_path / "out"
    found = run("reproduce", "base-to-novel", "--root", tmp_path, "--out", out, "--backbone", model, *work)
    assert (found["runs"], found["finished"]) == (2, 0) and found["seconds_training"] > 0
    assert not out.exists()


def test_files_of_tensors_are_merged(tmp_path):
    states = [{"w": torch.tensor([0.0, 0, 0])}, {"w": torch.tensor([4.0, 0, 0])}, {"w": torch.tensor([0, 2.0, 0])}]
    names = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    for state, name in zip(states, names, strict=True):
        save_file(state, name)
    base, *experts = names
    out = tmp_path / "out.safetensors"
    arguments = ["merge", "task-arithmetic", *experts, "--base", base, "--out", out, "-o", "scale=0.5"]
    assert run(*arguments)["merged"] == "task_arithmetic"
    assert load_file(out)["w"].tolist() == [2, 1, 0]
    out.unlink()
    assert f"task_arithmetic of 2: {out}" in invoke(*arguments).stdout and load_file(out)["w"].tolist() == [2, 1, 0]
    refused = invoke(*arguments, "--cache", tmp_path)
    assert refused.exit_code == 2 and "--cache must not be given with weights" in refused.stderr


@pytest.fixture(scope="module")
def model_folder():
    with as_file(files("mergetune") / "assets" / "icon-clip") as folder:
        yield folder


def test_backbones_that_differ_are_merged_and_loaded(model_folder, tmp_path):
    folder = model_folder
    weights = load_file(folder / "open_clip_model.safetensors")
    shared = {f"module.{n}": t if t.is_floating_point() else t + 1 for n, t in weights.items()}
    for name, more in (("one", {}), ("two", {"module.head.weight": torch.ones(3, 128)})):
        torch.save({"state_dict": shared | more, "epoch": 1}, tmp_path / f"{name}.pt")
    out = tmp_path / "new" / "merged.safetensors"
    arguments = ["merge", "ties", tmp_path / "one.pt", tmp_path / "two.pt", "--base", folder, "--out", out]
    refused = invoke(*arguments)
    assert refused.exit_code == 2 and "holds 'head.weight'" in refused.stderr and "--missing drop" in refused.stderr
    assert not out.parent.exists()
    assert run(*arguments, "--missing", "drop")["merged"] == "ties"
    found = load_file(out)
    assert found.keys() == weights.keys() and all(torch.equal(found[n], t) for n, t in weights.items())

    (tmp_path / "tuned").mkdir()
    shutil.copy(folder / "open_clip_config.json", tmp_path / "tuned")
    tuned = {name: 3 * t if name == "text_projection" else t for name, t in weights.items()}
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    assert run("merge", "wise_ft", tmp_path / "tuned", "--base", folder, "--out", tmp_path / "merged")["experts"]
    merged = load_clip(f"local-dir:{tmp_path / 'merged'}").model.state_dict()["text_projection"]
    torch.testing.assert_close(merged, 2 * weights["text_projection"].float(), atol=1e-3, rtol=1e-3)


def test_a_solution_that_lies_beside_a_model_is_a_solution(work, model_folder, tmp_path):
    shutil.copytree(work / "coop", tmp_path / "both")
    shutil.copy(model_folder / "open_clip_config.json", tmp_path / "both")
    run("merge", "average", tmp_path / "both", work / "coop", "--out", tmp_path / "new" / "merged")
    assert load_solution(tmp_path / "new" / "merged").kind == "prompt"


def test_options_for_weights_are_refused_with_solutions(work, tmp_path):
    for option in (["--missing", "drop"], ["--ema"], ["--lora", "svd"], ["--lora-rank", 2]):
        refused = invoke("merge", "average", work / "coop", work / "kgcoop", "--out", tmp_path / "x", *option)
        assert refused.exit_code == 2 and f"{option[0]} must not be given with solutions" in refused.stderr
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        refused = invoke("merge", "average", work / "coop", work / "kgcoop", "--out", out)
        assert refused.exit_code == 2 and "out must be a folder that can be made" in refused.stderr


def test_compare_trains_all_experts_or_none(work, tmp_path):
    refused = invoke("compare", "--demo", "--out", tmp_path / "no", "--expert", "coop:1", work / "coop")
    assert refused.exit_code == 2 and not (tmp_path / "no").exists()
    said = f"METHOD:NUMBER each time or a saved solution each time, got coop:1, {work / 'coop'}"
    assert said in " ".join(refused.stderr.split())


def test_doctor_is_healthy():
    report = run("doctor")
    assert report["healthy"] and "cpp" in report["backends"] and report["native core"]["cpu_variant"]
    assert "lmc_loss ok" in " ".join(invoke("doctor").stdout.split())


def test_demo_reproduces_the_effect(tmp_path, monkeypatch):
    report = run("demo", "--out", tmp_path, "--seed", 1)
    rows = {row["name"]: row for row in report["rows"]}
    zero_shot, coop, merged = rows["zero-shot"], rows["CoOp"], rows["MERGETUNE"]
    assert coop["base"] > zero_shot["base"] and coop["novel"] < zero_shot["novel"]  # it learns, and forgets
    assert merged["novel"] > coop["novel"] and merged["hm"] > max(zero_shot["hm"], coop["hm"])  # repaired
    assert {"KgCoOp", "logit ensemble"} < rows.keys()
    assert (tmp_path / "paths.png").is_file() and (tmp_path / "seed-1" / "solution.safetensors").is_file()
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert all(0 < row["joint_hm"] < row["hm"] for row in rows.values())  # among 100 classes instead of 50
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("it trained"))
    assert run("demo", "--out", tmp_path, "--seed", 1) == report  # from the record of the seed
    shown = " ".join(invoke("demo", "--out", tmp_path, "--seed", 1).stdout.split())
    assert "seed 1" in shown and all(f"{merged[part]:.1f}" in shown for part in ("base", "novel", "hm"))
    assert f"{merged['base']:.1f} ±" not in shown  # one seed has no deviation
    assert "paths.png" in shown
    record = tmp_path / "seed-1" / "cell.json"
    record.write_text(record.read_text().replace('"shots": 16', '"shots": 8'))

    def stop(*_):
        raise RuntimeError("it trains elsewhere")

    monkeypatch.setattr(torch.optim.SGD, "step", stop)
    assert "it trains elsewhere" in invoke("demo", "--out", tmp_path, "--seed", 1).stderr
    assert [file.name for file in (tmp_path / "run-2-shots-16" / "seed-1").iterdir()] == ["cell.json"]
    assert not (tmp_path / "run-2-shots-16" / "cache").exists()


def test_a_damaged_cache_is_named_by_each_command_and_mended_by_cache(work, model, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(work / "cache", cache)
    check = ["cache", "--out", cache, "--verify"]
    assert {split: entry["images"] for split, entry in run(*check).items()} == {"train": 89, "test": 79}
    whole = (cache / "test" / "arrays.bin").read_bytes()
    (cache / "test" / "arrays.bin").write_bytes(bytes(4096) + whole[4096:])
    commands = {"eval": ["eval", "--cache", cache, "--solution", work / "merged"], "cache": check}
    for command in commands.values():
        refused = invoke(*command)
        assert refused.exit_code == 2, refused.output
        said = " ".join(refused.stderr.split())
        assert "arrays.bin is damaged: rows 0 to 78 must have the checksums in manifest.json" in said
        assert f"`mergetune cache IMAGES --out {cache}` with the options as before encodes only these rows" in said
    with pytest.warns(UserWarning, match="rows 0 to 78 must have .*; their images are encoded again"):
        run("cache", work / "images", "--out", cache)  # the caches record the backbone
    assert (cache / "test" / "arrays.bin").read_bytes() == whole
    assert run(*check).keys() == {"train", "test"}


def test_cache_says_what_it_needs(tmp_path, work):
    for arguments, message in (
        ([], "IMAGES must be given, got none: only --verify does without"),
        (["--verify"], f"--out must hold feature caches, got {tmp_path} without any"),
        ([work / "images"], "--backbone is needed"),
    ):
        refused = invoke("cache", *arguments, "--out", tmp_path)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), refused.output
