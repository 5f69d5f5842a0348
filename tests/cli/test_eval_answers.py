"""`mergetune eval`: calibration, confusions, wrong answers, and temperatures that are saved with solutions."""

import csv
import json
import shutil
import zipfile
from dataclasses import replace
from importlib.resources import as_file, files

import pytest
import torch
from typer.testing import CliRunner

from mergetune import (
    FeatureCache,
    Head,
    classifier,
    load_clip,
    load_solution,
    predict_features,
    temperature_of,
    with_temperature,
)
from mergetune.cli import app

CLASSES = ("anchor", "bell", "camera", "heart")
ASSETS = files("mergetune") / "assets"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with pictures, the caches of three splits, and two heads that answer too certainly."""
    folder = tmp_path_factory.mktemp("work")
    with as_file(ASSETS / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        content.extractall(folder / "images", [n for n in content.namelist() if n.split("/")[1] in CLASSES])
    for name in CLASSES:  # every second training image becomes one of validation
        (folder / "images" / "val" / name).mkdir(parents=True)
        for picture in sorted((folder / "images" / "train" / name).iterdir())[::2]:
            shutil.move(picture, folder / "images" / "val" / name / picture.name)
    result = invoke("cache", folder / "images", "--out", folder, "--backbone", model())
    assert result.exit_code == 0, result.stderr
    train = FeatureCache.open(folder / "train")
    for name, shots in (("head", 2), ("other", 1)):
        rows = [train.tensor()[train.labels == c][:shots].mean(0) for c in range(len(CLASSES))]
        head = Head(torch.nn.functional.normalize(torch.stack(rows), dim=-1), train.classnames, logit_scale=100.0)
        head.save(folder / name)
    return folder


def model():
    return f"local-dir:{ASSETS / 'icon-clip'}"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def evaluate(work, *arguments, cache="test"):
    return invoke("eval", "--cache", work / cache, "--backbone", model(), *arguments)


def told(*arguments, **keywords):
    result = evaluate(*arguments, "--json", **keywords)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(*arguments):
    result = evaluate(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def test_eval_shows_calibration(work):
    head = work / "head"
    report = told(work, "--solution", head)
    found = predict_features(classifier(load_clip(model()), load_solution(head)), FeatureCache.open(work / "test"))
    assert report[str(head)]["ece"] == found.ece and report[str(head)]["nll"] == found.nll
    assert report[str(head)]["accuracy"] == found.report.accuracy and report["zero-shot"]["temperature"] == 1
    shown = evaluate(work, "--solution", head).stdout
    assert "ECE" in shown and f"{found.ece:.2f}" in shown and "temperature" not in shown
    halves = told(work, "--solution", head, "--base-novel")[str(head)]
    alone = told(work, "--solution", head, "--classes", "base")[str(head)]
    assert halves["base"]["ece"] == alone["ece"] and "ece" not in halves["seen"]


def test_eval_writes_confusions_and_wrong_answers(work, tmp_path):
    head, folder = work / "head", tmp_path / "answers"
    folder.mkdir()
    asked = [a for option in ("--confusion c.csv", "--per-class p.csv", "--wrong w.csv", "--contact-sheet s.png")
             for a in (option.split()[0], folder / option.split()[1])]  # fmt: skip
    report = told(work, "--solution", head, *asked, "--images", work / "images")[str(head)]
    matrix = [[int(n) for n in row[1:]] for row in list(csv.reader((folder / "c.csv").open()))[1:]]
    right = sum(matrix[c][c] for c in range(len(CLASSES)))
    assert 100 * right / report["images"] == pytest.approx(report["accuracy"]) and report["accuracy"] < 100
    wrong = list(csv.DictReader((folder / "w.csv").open()))
    assert len(wrong) == report["images"] - right
    for row in wrong:
        assert (work / "images" / row["file"]).is_file() and f"/{row['true']}/" in row["file"] != row["predicted"]
    confidence = [float(row["probability"]) for row in wrong]
    assert confidence == sorted(confidence, reverse=True)
    scores = {row["name"]: row for row in csv.DictReader((folder / "p.csv").open())}
    assert {name: float(row["recall"]) for name, row in scores.items()} == pytest.approx(report["per_class"], abs=1e-3)
    assert [row["name"] for row in report["classes"]] == list(CLASSES) and (folder / "s.png").stat().st_size > 10_000
    shown = evaluate(work, "--solution", head, "--confusion", folder / "c.svg").stdout
    worst = report["mistakes"][0]
    assert "mean F1" in shown and worst["true"] in shown and str(folder / "c.svg") in shown
    assert (folder / "c.svg").read_text().startswith("<?xml")


def test_several_solutions_have_a_file_each(work, tmp_path):
    both = ["--solution", work / "head", "--solution", work / "other"]
    assert evaluate(work, *both, "--wrong", tmp_path / "w.csv").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w-head.csv", "w-other.csv"]
    assert evaluate(work, "--wrong", tmp_path / "zero.csv").exit_code == 0 and (tmp_path / "zero.csv").is_file()
    shutil.copytree(work / "head", tmp_path / "head")
    message = refusal(work, "--solution", work / "head", "--solution", tmp_path / "head", "--wrong", tmp_path / "x.csv")
    assert "same last part" in message and not (tmp_path / "x-head.csv").exists()


def test_a_temperature_is_fitted_saved_and_used(work, tmp_path):
    folder, other = tmp_path / "head", tmp_path / "head.npz"
    shutil.copytree(work / "head", folder)
    tensors = (folder / "solution.safetensors").read_bytes()
    before = told(work, "--solution", folder)[str(folder)]
    report = told(work, "--solution", folder, "--temperature", "--val", work / "val")
    fit = report[str(folder)]["fitted_temperature"]
    assert fit["saved"] and fit["validation_images"] == len(FeatureCache.open(work / "val"))
    assert fit["before"] == {"temperature": 1, "ece": before["ece"], "nll": before["nll"]}
    assert fit["after"]["nll"] < fit["before"]["nll"] and fit["after"]["ece"] < fit["before"]["ece"]
    assert temperature_of(load_solution(folder)) == fit["after"]["temperature"] > 1
    assert (folder / "solution.safetensors").read_bytes() == tensors
    again = told(work, "--solution", folder)[str(folder)]
    assert again["ece"] == fit["after"]["ece"] and again["per_class"] == before["per_class"]
    assert (
        told(work, "--solution", folder, "--temperature", "--val", work / "val")[str(folder)]["fitted_temperature"][
            "after"
        ]
        == fit["after"]
    )
    shown = evaluate(work, "--solution", folder, "--temperature", "--val", work / "val").stdout
    assert f"the {fit['validation_images']} images of {work / 'val'}" in shown.replace("\n", " ")
    assert f"Saved: {folder / 'solution.json'}" in shown
    assert invoke("export", folder, "--to", "head", "--out", other, "--backbone", model()).exit_code == 0
    exported = told(work, "--solution", other, "--temperature", "--val", work / "val")[str(other)]
    assert not exported["fitted_temperature"]["saved"] and exported["temperature"] == 1  # of a file without notes


def test_a_saved_temperature_does_not_stop_a_run_from_resuming(work, tmp_path):
    shutil.copytree(work / "head", tmp_path / "head")
    fit = ["fit", "--cache", work / "train", "--backbone", model(), "--epochs", 1]
    fit += ["--tuned", tmp_path / "head", "--out", tmp_path / "out"]
    assert invoke(*fit).exit_code == 0
    tensors = (tmp_path / "out" / "solution.safetensors").read_bytes()
    assert evaluate(work, "--solution", tmp_path / "head", "--temperature", "--val", work / "val").exit_code == 0
    again = invoke(*fit)
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "out" / "solution.safetensors").read_bytes() == tensors


def test_a_finished_run_keeps_its_temperature_when_it_runs_again(work, tmp_path):
    out, caches = tmp_path / "out", ["--cache", work / "train", "--backbone", model(), "--epochs", 1]
    for command in (["fit", *caches, "--tuned", work / "head"], ["tune", *caches, "--method", "head", "--overwrite"]):
        assert invoke(*command, "--out", out).exit_code == 0
        assert evaluate(work, "--solution", out, "--temperature", "--val", work / "val").exit_code == 0
        fitted = temperature_of(load_solution(out))
        again = invoke(*[word for word in command if word != "--overwrite"], "--out", out)
        assert again.exit_code == 0 and fitted != 1 and temperature_of(load_solution(out)) == fitted


def test_saving_keeps_the_temperature_of_the_same_solution_alone(work, tmp_path):
    head = load_solution(work / "head")
    with_temperature(head, 1.5).save(tmp_path)
    head.save(tmp_path)
    replace(head, notes={"settings": {"epochs": 2}}).save(tmp_path)
    assert load_solution(tmp_path).notes == {"settings": {"epochs": 2}, "temperature": 1.5}
    with_temperature(head, 1.0).save(tmp_path)
    assert temperature_of(load_solution(tmp_path)) == 1
    for other in (replace(head, weight=head.weight + 1), replace(head, logit_scale=2.0)):
        with_temperature(head, 1.5).save(tmp_path)
        with pytest.warns(UserWarning, match="the temperature 1.5 is removed from .* fitted for another solution"):
            other.save(tmp_path)
        assert temperature_of(load_solution(tmp_path)) == 1


def test_what_cannot_be_answered_is_refused(work, tmp_path):
    head = ["--solution", work / "head"]
    saved = (work / "head" / "solution.json").read_bytes()
    for arguments, message in (
        (["--confusion", tmp_path / "c.txt"], "--confusion must end in .png or .pdf or .svg or .csv"),
        (["--wrong", tmp_path / "w.png"], "--wrong must end in .csv"),
        (["--wrong", tmp_path / "no" / "w.csv"], "the folder of --wrong must exist"),
        (["--wrong", tmp_path / "w.csv", "--base-novel"], "--wrong needs one list of classes"),
        (["--contact-sheet", tmp_path / "s.png"], "--contact-sheet needs --images"),
        (["--contact-sheet", tmp_path / "s.png", "--images", tmp_path], "--images must hold the pictures"),
        (
            ["--confusion", tmp_path / "x.csv", "--wrong", tmp_path / "x.csv"],
            "must write different files",
        ),
        (["--temperature"], "--temperature needs --val"),
        (["--val", work / "val"], "add --temperature"),
        (["--temperature", "--val", work / "val", "--base-novel"], "--temperature needs one list of classes"),
        (["--temperature", "--val", work / "test"], "--val must hold no test image"),
    ):
        assert message in refusal(work, *head, *arguments)
    assert (work / "head" / "solution.json").read_bytes() == saved and not list(tmp_path.iterdir())


def test_a_temperature_is_not_fitted_on_training_images(work, tmp_path):
    trained = load_solution(work / "head")
    train = FeatureCache.open(work / "train")
    settings = {"settings": {"features": train.digest}}
    Head(trained.weight, trained.classnames, logit_scale=100.0, notes=settings).save(tmp_path / "trained")
    message = refusal(work, "--solution", tmp_path / "trained", "--temperature", "--val", work / "train")
    assert "--val must hold other images than" in message and "was trained on" in message
