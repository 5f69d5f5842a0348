"""`fit_dataset`: measured on held-out classes, chosen without test images, trained on all classes, resumable."""

import json
import zipfile
from collections import Counter
from dataclasses import replace
from importlib.resources import as_file, files

import pytest
import torch

import mergetune as mt
from mergetune.experiments import measuring
from mergetune.experiments.choosing import choose
from mergetune.experiments.making import KINDS, Making
from mergetune.experiments.own_forecast import forecast_dataset
from mergetune.facts.function_options import TOP_METHODS, TUNE_SETTINGS

TEMPLATE = "an icon of a {}"
CLASSES = ("anchor", "bell", "camera", "heart", "key", "lock")
RETAINED = ("cloud", "star")
SHORT = {"tune_options": {"epochs": 2}, "fit_options": {"epochs": 2}, "shots": 4, "template": TEMPLATE}
SHORT |= {"progress": False}


@pytest.fixture(autouse=True)
def short_tops(monkeypatch):
    """Residuals and maps are trained in 10 steps in place of 300."""
    for method in TOP_METHODS:
        monkeypatch.setitem(TUNE_SETTINGS, method, {**TUNE_SETTINGS[method], "epochs": 10})


@pytest.fixture(scope="module")
def icon_clip():
    return mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of six classes and of two others, and a folder that all tests keep features in."""
    here = tmp_path_factory.mktemp("photos")
    with as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        for name in content.namelist():
            split, label, _ = name.split("/")
            if label in CLASSES + RETAINED:
                content.extract(name, here / ("images" if label in CLASSES else "others"))
    return here


@pytest.fixture(scope="module")
def data(folder):
    return mt.ImageFolder(folder / "images")


@pytest.fixture(scope="module")
def fit(icon_clip, data, folder):
    """`fit_dataset` on these images, with short runs."""

    def run(out, images=data, **given):
        return mt.fit_dataset(icon_clip, images, out, **{**SHORT, "cache": folder / "cache", **given})

    return run


def planted(name):
    """The rule with one candidate planted as the best, where there is such a candidate."""

    def rule(right, labels, **given):
        found = choose(right, labels, **given)
        return replace(found, chosen=name) if name in right else found

    return rule


def renamed(data, place, suffix=""):
    """The dataset with a class name that is too long, and a suffix to all others."""
    names = [f"{name}{suffix}" for name in data.classnames]
    names[place] = "a very long title " * 12
    lists = {f"full_{split}": getattr(data, split) for split in ("train", "test")}
    return mt.Dataset(data.name, **{split: replace(images, classnames=names) for split, images in lists.items()})


def without_seconds(out):
    report = json.loads((out / "report.json").read_text())
    return {name: value for name, value in report.items() if name not in ("seconds", "figure")}


def test_the_chosen_setting_is_trained_on_all_classes_and_saved(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "choose", planted("lam 4, tau 0.6"))
    found = fit(tmp_path)
    assert (found.result.settings["lam"], found.result.settings["tau"]) == (4.0, 0.6)
    settings = mt.load_solution(tmp_path).notes["settings"]
    assert (settings["lam"], settings["tau"], settings["classnames"]) == (4.0, 0.6, list(CLASSES))
    report = json.loads((tmp_path / "report.json").read_text())
    choice = report["choice"]["settings"]
    assert choice["chosen"] == "lam 4, tau 0.6" and choice["default"] == "lam 8, tau 0.3" and len(choice["tried"]) == 6
    assert {part: len(names) for part, names in report["halves"].items()} == {"base": 3, "novel": 3}
    assert set(report["halves"]["base"] + report["halves"]["novel"]) == set(CLASSES)
    assert list(report["measured"]) == list(report["reports"]["all"])
    assert {"zero-shot", "fine-tuned", "weight average", "logit ensemble", "MERGETUNE"} == set(report["measured"])
    assert report["measured"]["MERGETUNE"]["hm_error"] > 0
    assert report["verdict"] and report["seconds"].keys() == {"encoding", "measuring run", "training", "testing"}
    assert report["concept_names"]["zero-shot"]["share"] == 100 and not report["left_out"]


@pytest.mark.parametrize("given", [{"method": "auto"}, {"classes": "base"}, {"choosing": False}, {"measuring": False}])
def test_a_forecast_counts_what_the_call_does(fit, icon_clip, data, tmp_path, monkeypatch, given):
    monkeypatch.setattr(measuring, "choose", planted("MERGETUNE"))
    asked = {name: value for name, value in SHORT.items() if name != "progress"}
    forecast, told = forecast_dataset(icon_clip, data, **asked, **given), []
    fit(tmp_path, report=told.append, **given)
    assert told[0] == f"encoding {', '.join(f'{n} {part}' for part, n in forecast.images.items())} images once"
    trained = Counter()  # all images fit into one batch, so that an epoch is a step
    for state in tmp_path.rglob("state.safetensors"):
        settings = json.loads((state.parent / "result.json").read_text())["settings"]
        stage = settings["stage"] if settings.get("method") in (None, "coop") else "kinds"
        trained[stage] += settings["epochs"]
    assert forecast.steps == trained and forecast.seconds > 0


def test_test_images_decide_nothing(fit, data, folder, tmp_path):
    """With other labels of the test images the choice and the solution are the same, and the report is another."""
    test = data.full_test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()
    other = replace(data, full_test=replace(test, labels=tuple(test.labels[i] for i in order)))
    found = [fit(tmp_path / "a", method="auto"), fit(tmp_path / "b", other, method="auto", cache=tmp_path / "cache")]
    assert found[0].settings == found[1].settings and found[0].kinds == found[1].kinds
    assert [line.name for line in found[0].kinds.tried] == list(KINDS)
    states = [mt.load_solution(tmp_path / name).saved_state() for name in "ab"]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert found[0].measured != found[1].measured and found[0].reports != found[1].reports


def test_a_killed_call_continues_to_the_same_report(fit, tmp_path):
    fit(tmp_path / "whole")
    for at in ("measuring run", "MERGETUNE on"):

        def killed(line, at=at):
            if line.startswith(at):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "killed", report=killed)
    fit(tmp_path / "killed")
    assert without_seconds(tmp_path / "killed") == without_seconds(tmp_path / "whole")
    fit(tmp_path / "killed")
    assert without_seconds(tmp_path / "killed") == without_seconds(tmp_path / "whole")


def test_given_settings_are_not_chosen_over(fit, tmp_path):
    found = fit(tmp_path, fit_options={"epochs": 1, "lam": 2.0, "tau": 0.5})
    assert [line.name for line in found.settings.tried] == ["lam 2, tau 0.5"]
    assert (found.result.settings["lam"], found.result.settings["tau"]) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({"measuring": False}, {"measuring": "switched off", "choosing": "needs the measuring run"}),
        ({"choosing": False}, {"choosing": "switched off"}),
        ({"images": 3}, {"measuring": "at least 4 classes, two per half, got 3", "choosing": "at least 4 classes"}),
    ],
    ids=str,
)
def test_what_is_not_done_is_said(fit, data, tmp_path, given, left_out):
    classes = given.get("images", 4)
    found = fit(tmp_path, data.select(range(classes)), **{k: v for k, v in given.items() if k != "images"})
    assert found.left_out.keys() == left_out.keys()
    assert all(text in found.left_out[what] for what, text in left_out.items())
    assert found.settings is None and found.result.settings["lam"] == 8.0
    assert (found.measured is None) == ("measuring" in left_out)
    assert ("new classes were not measured" in found.verdict) == ("measuring" in left_out)


def test_given_solutions_of_all_classes_leave_no_new_classes(fit, tmp_path):
    first = fit(tmp_path / "first", measuring=False)
    found = fit(tmp_path / "second", tuned=[mt.load_solution(tmp_path / "first" / "tuned")])
    assert "has learned all classes" in found.left_out["measuring"]
    assert found.reports == first.reports and "against the fine-tuned solution" in found.verdict


def test_base_classes_need_no_extra_run(fit, tmp_path):
    found = fit(tmp_path, classes="base", method="head")
    assert list(found.reports) == ["base", "novel", "seen", "unseen"]
    assert found.halves == {"base": CLASSES[:3], "novel": CLASSES[3:]} and found.settings is not None
    novel = {row: report.accuracy for row, report in found.reports["novel"].items()}
    assert len(set(novel.values())) == 1  # a head knows its own classes; zero-shot answers for the others
    assert mt.load_solution(tmp_path).classnames == CLASSES[:3] and list(found.concept_names) == ["zero-shot"]


def test_validation_images_are_neither_trained_nor_tested_on(data, icon_clip, folder):
    few = data.few_shot(4, 1)
    others = measuring.other_images(data, few, 1)
    assert not set(others.files) & {*few.files, *data.test.files}
    assert set(others.files) == set(data.train.files) - set(few.files)
    train = mt.cache_features(icon_clip, data.train, folder / "cache" / "all", progress=False)
    halves = {"base": [0, 2, 4], "novel": [1, 3, 5]}
    fold = measuring.fold_of(train.select(few), train.select(others), halves, (TEMPLATE,), 1)
    assert fold.train.classnames == fold.val["base"].classnames == ("anchor", "camera", "key")
    assert len(fold.val["novel"]) == sum(data.train.counts[c] for c in halves["novel"])
    assert not len(fold.train.shared_with(fold.val["base"]))
    alone = measuring.fold_of(train, None, halves, (TEMPLATE,), 1)  # no others: some training images are held out
    assert len(alone.train) + len(alone.val["base"]) == sum(data.train.counts[c] for c in halves["base"])
    assert not len(alone.train.shared_with(alone.val["base"])) and len(alone.val["base"]) >= 3 * 3


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_trained_saved_and_opened(icon_clip, data, folder, tmp_path, kind):
    features = mt.cache_features(icon_clip, data.train, folder / "cache" / "all", progress=False)
    short = {"epochs": 2}
    making = Making(icon_clip, (TEMPLATE,), tune_options=short, fit_options=short)
    tuned = making.tuned(features, tmp_path / "tuned").solution
    (merged,) = making.merged(features, [tuned], {tmp_path / "merged": {"lam": 8.0, "tau": 0.3}})
    made = making.kind(kind, features, tuned, merged, tmp_path / "made")
    made.save(tmp_path / "made")
    opened = mt.load_solution(tmp_path / "made")
    for names in (CLASSES, ("cat", "dog")):
        weights = making.classifier(made.solution)(names)
        assert torch.equal(making.classifier(opened)(names), weights)
    zero_shot = icon_clip.logit_scale * icon_clip.class_embeddings(("cat", "dog"), TEMPLATE)
    assert torch.allclose(weights, zero_shot, atol=1e-4) == (kind in ("zero-shot", "head", *KINDS[4:6]))


def test_a_chosen_kind_is_saved_in_place_of_mergetune(fit, data, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "choose", planted("zero-shot + residual"))
    retain = mt.ImageFolder(folder / "others")
    found = fit(tmp_path, method="auto", retain=retain)
    assert found.row == "zero-shot + residual" and mt.load_solution(tmp_path).kind == "stack"
    assert [row for row in found.measured if row not in found.reports["all"]] == []
    assert "MERGETUNE" in found.measured and mt.load_solution(tmp_path / "mergetune").kind == "prompt"
    assert found.retained.keys() == found.measured.keys() and found.concept_names["zero-shot + residual"].share == 100
    assert found.retained["zero-shot"] == found.retained["zero-shot + residual"]  # residuals leave other classes alone
    with pytest.raises(ValueError, match="retain must hold classes that are not trained, got 'anchor'"):
        fit(tmp_path / "no", retain=data)


def test_other_methods_are_refused_with_those_there_are(fit, tmp_path):
    with pytest.raises(ValueError, match="method must be one of coop, kgcoop, head, auto, got 'wise'"):
        fit(tmp_path, method="wise")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fit_options": {"lam": -3}}, "lam must be finite and not negative, got -3"),
        ({"fit_options": {"tau": 3}}, r"tau must lie in \[0, 1\], got 3"),
        ({"fit_options": {"epochs": 0}}, "epochs must be a whole number of at least 1, got 0"),
        ({"fit_options": {"surrogate": "hessian"}}, "surrogate must be one of"),
        ({"fit_options": {"grid": [2.0]}}, "grid|points"),
        ({"tune_options": {"lr": -1.0}}, "lr must be finite and positive"),
        ({"tune_options": {"n_ctx": 0}}, "n_ctx"),
        ({"tune_options": {"template": "a photo"}, "template": "a photo"}, "template"),
        ({"method": "head", "tune_options": {"momentum": -1.0}}, "momentum must be finite"),
        ({"method": "auto", "fit_options": {"beta": -1.0}}, "beta must be finite"),
        ({"classes": "base", "fit_options": {"points": 0}}, "points must be"),
        ({"data": lambda _, data: data.select([0])}, "data must hold at least two classes, got only 'anchor'"),
        ({"data": lambda _, data: replace(data, full_test=None)}, "data must have test images"),
        ({"data": lambda _, data: renamed(data, 5)}, "texts must fit the text tower's 32 tokens, got 'an icon of a a"),
        (
            {"data": lambda _, data: renamed(data, 5), "classes": "base"},
            "texts must fit",
        ),  # a class that is only tested
        ({"retain": lambda _, data: renamed(data.select([0, 5]), 1, "x")}, "texts must fit"),
        ({"retain": lambda _, data: data}, "retain must hold classes that are not trained, got 'anchor'"),
        ({"data": lambda _, data: data.select([0, 1, 2]), "classes": "base"}, "classes must be 'all' for fewer than 4"),
        ({"tuned": lambda clip, _: [mt.Head.zero_shot(clip, ["ant", *CLASSES[1:]])]}, "class 0 must be 'ant'"),
        ({"tuned": lambda clip, _: [mt.Prompt.random(clip, n) for n in (3, 4)]}, "must have equal shapes"),
    ],
)
def test_values_are_checked_before_any_image_is_encoded(icon_clip, data, tmp_path, monkeypatch, given, message):
    given = {name: change(icon_clip, data) if callable(change) else change for name, change in given.items()}
    data = given.pop("data", data)

    def encode(*_, **__):
        raise AssertionError("an image is encoded")

    monkeypatch.setattr(mt.FrozenClip, "encode_image", encode)
    with pytest.raises((ValueError, TypeError), match=message):
        mt.fit_dataset(icon_clip, data, tmp_path / "out", **{"template": TEMPLATE, "progress": False, **given})
    assert not list(tmp_path.iterdir())
