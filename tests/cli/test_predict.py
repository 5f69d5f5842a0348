"""`mergetune predict`: rows in the order of the input, as lines, CSV and JSON; exit codes; names of any kind."""

import csv
import json
import os
import subprocess
import sys
import zipfile
from importlib.resources import as_file, files

import pytest
from typer.testing import CliRunner

import mergetune as mt
from mergetune.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("anchor", "bell", "camera", "heart")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A trained prompt, a trained head, and icons of four classes in one folder."""
    folder = tmp_path_factory.mktemp("work")
    with (
        as_file(files("mergetune") / "assets" / "icon-clip") as model,
        as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive,
        zipfile.ZipFile(archive) as content,
    ):
        clip = mt.load_clip(f"local-dir:{model}")
        (folder / "icons").mkdir()
        for name in content.namelist():
            split, label, file = name.split("/")
            if split == "test" and label in CLASSES:
                (folder / "icons" / f"{label}-{file}").write_bytes(content.read(name))
        features = mt.FeatureCache.from_tensors(clip.class_embeddings(CLASSES, "an icon of a {}"), range(4), CLASSES)
        for method in ("coop", "head"):
            made = mt.tune(clip, features, method=method, template="an icon of a {}", epochs=1, progress=False)
            made.save(folder / method)
        (folder / "model").write_text(str(model))
    return folder


@pytest.fixture
def bad(tmp_path, work):
    """Pictures with names of every kind, also unreadable ones; only the file system bounds the names."""
    icon = next((work / "icons").iterdir()).read_bytes()
    names = ['line\nbreak, "quoted".png', "\x1b[31mred.png", "é 猫.png", os.fsdecode(b"\xff\xfe.png")]
    for name in names:
        (tmp_path / name).write_bytes(icon)
    (tmp_path / "cut.png").write_bytes(icon[:100])
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_json_has_a_row_per_picture_and_says_how_probabilities_are_made(work):
    result = invoke(work / "coop", work / "icons", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["classnames"] == list(CLASSES) and found["activation"] == "softmax" and found["temperature"] == 1
    assert found["logit_scale"] == pytest.approx(20.6, abs=0.1) and found["unreadable"] == 0
    assert [os.path.basename(row["file"]) for row in found["predictions"]] == sorted(os.listdir(work / "icons"))
    assert found["pictures"] == len(found["predictions"])
    right = sum(os.path.basename(row["file"]).startswith(row["label"]) for row in found["predictions"])
    assert right > 0.7 * found["pictures"]
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in found["predictions"])


def test_lines_and_csv_say_what_json_says(work, tmp_path):
    rows = json.loads(invoke(work / "coop", work / "icons", "--json", "--threshold", 0.6).stdout)["predictions"]
    shown = invoke(work / "coop", work / "icons", "--top", 2, "--threshold", 0.6)
    assert "softmax at logit scale 20.6 and temperature 1" in shown.stderr
    for row, line in zip(rows, shown.stdout.splitlines(), strict=True):
        none = "none; " if row["label"] == "none" else ""
        best = ", ".join(f"{row['labels'][i]} {row['probabilities'][i]:.3f}" for i in range(2))
        assert line == f"{row['file']}: {none}{best}"
    assert {row["label"] for row in rows} > {"none"}
    done = invoke(work / "coop", work / "icons", "--csv", tmp_path / "a.csv", "--top", 2, "--threshold", 0.6)
    assert done.exit_code == 0 and f"{len(rows)} pictures" in done.stdout
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["file", "label", "error", "class_1", "probability_1", "class_2", "probability_2"]
    for row, line in zip(rows, table, strict=True):
        assert [line["file"], line["label"], line["class_2"]] == [row["file"], row["label"], row["labels"][1]]
        assert float(line["probability_1"]) == pytest.approx(row["probabilities"][0], rel=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["a.csv"]


def test_an_unreadable_picture_is_a_row_and_the_exit_code_is_1(work, bad, tmp_path):
    lost = tmp_path / "lost.png"
    for form in ([], ["--json"], ["--csv", tmp_path / "a.csv"]):
        result = invoke(work / "coop", bad / "cut.png", lost, bad / "é 猫.png", "--workers", 1, *form)
        assert result.exit_code == 1
        shown = (tmp_path / "a.csv").read_text() if "--csv" in form else result.stdout
        places = [json.dumps(str(name))[1:-1] if "--json" in form else str(name) for name in (bad / "cut.png", lost)]
        assert all(f"cannot read image {place}" in shown for place in places)
        assert "2 unreadable" in result.stderr + result.stdout or '"unreadable": 2' in result.stdout


def test_names_of_any_kind_stay_one_row_each(work, bad, tmp_path):
    files = sorted(name for name in os.listdir(bad) if name.endswith("png"))
    rows = json.loads(invoke(work / "coop", bad, "--json").stdout)["predictions"]
    assert [os.path.basename(row["file"]) for row in rows] == files
    lines = invoke(work / "coop", bad).stdout.splitlines()
    assert len(lines) == len(files) and all(line.isprintable() for line in lines)
    assert invoke(work / "coop", bad, "--csv", tmp_path / "a.csv").exit_code == 1
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        names = [os.path.basename(row["file"]) for row in csv.DictReader(file)]
    assert names == [name.encode("utf-8", "backslashreplace").decode() for name in files]


def test_a_template_and_new_class_names_classify_without_a_solution(work, tmp_path):
    (tmp_path / "names.txt").write_text("heart\n\n bell \n")
    names = ["--classnames", tmp_path / "names.txt"]
    backbone = ["--backbone", f"local-dir:{(work / 'model').read_text()}"]
    for arguments in (["an icon of a {}", *backbone], [work / "coop"], [work / "head"]):
        found = json.loads(invoke(arguments[0], work / "icons", *arguments[1:], *names, "--json").stdout)
        assert found["classnames"] == ["heart", "bell"]
    refused = invoke("an icon of a {}", work / "icons", *backbone)
    assert refused.exit_code == 2 and "--classnames FILE" in refused.stderr
    (tmp_path / "names.txt").write_text("heart\ntree\n")
    refused = invoke(work / "head", work / "icons", *names)
    assert refused.exit_code == 2 and "got 'tree': a head has no text" in refused.stderr
    assert json.loads(invoke(work / "coop", work / "icons", *names, "--json").stdout)["classnames"] == ["heart", "tree"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{work}/icons", "--threshold", "2"], "--threshold"),
        (["{work}/icons", "--threshold", "nan"], "threshold"),
        (["{work}/icons", "--top", "0"], "--top"),
        (["{work}/icons", "--activation", "sigmoid"], "activation must be softmax"),
        (["{work}/icons", "--csv", "{tmp}/none/a.csv"], "create {tmp}/none first"),
        (["{work}/icons", "--csv", "{tmp}"], "--csv must end in .csv or .tsv"),
        (["{work}/icons", "--csv", "{work}/icons/a.png"], "--csv must end in .csv or .tsv"),
        (["{work}/icons", "--csv", "{tmp}/a.csv", "--json"], "exclude each other"),
        (["{work}/icons", "--classnames", "/dev/zero"], "must be a regular file, got a device"),
        (["{work}/icons", "--classnames", "{tmp}/lost.txt"], "--classnames must be a text file"),
        (["{work}/icons", "--classnames", "{tmp}/empty.txt"], "without a name"),
        (["{tmp}"], "at least one image"),
        (["{tmp}/lost.txt"], "there is no file {tmp}/lost.txt"),
        (["{tmp}/empty.txt"], "at least one picture"),
        ([], "pictures"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_wrong_arguments_exit_with_2_and_leave_no_file(work, tmp_path, arguments, message):
    (tmp_path / "empty.txt").touch()
    places = {"work": work, "tmp": tmp_path}
    result = invoke(work / "coop", *(argument.format(**places) for argument in arguments))
    shown = " ".join(result.stderr.split())
    assert result.exit_code == 2 and message.format(**places).lower() in shown.lower()
    assert os.listdir(tmp_path) == ["empty.txt"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_closed_pipe_ends_the_command_in_silence(work, tmp_path, form):
    icon = next((work / "icons").iterdir())
    (tmp_path / "list.txt").write_text(f"{icon}\n" * 2000)
    solution, backbone = work / "coop", mt.load_solution(work / "coop").backbone
    command = [sys.executable, "-m", "mergetune", "predict", solution, tmp_path / "list.txt", *form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read().decode().splitlines() == [f"backbone {backbone}, recorded by solution {solution}"]
    assert process.returncode == 1
