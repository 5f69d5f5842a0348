"""The rule by which `fit` on images chooses, its paired errors, the verdict, the canary, and files left out."""

import math
import os

import pytest
import torch

import mergetune as mt
from mergetune.data.image_files import ignored_files
from mergetune.experiments.canary import concept_names, recognised, retained_images, tell_apart
from mergetune.experiments.choosing import choose, settings_to_try, too_few
from mergetune.experiments.paired import Estimate, accuracies, gains
from mergetune.experiments.verdict import verdict
from mergetune.facts import FitOptions

CLASSES = 5


def answers(base: int, novel: int, images: int = 100) -> dict[str, torch.Tensor]:
    """So many right answers of each half, the first images of every class."""
    order = torch.arange(images)
    return {"base": order < base, "novel": order < novel}


def labels(images: int = 100) -> dict[str, torch.Tensor]:
    """Classes go round, so that all have as many right answers."""
    return {part: torch.arange(images) % CLASSES for part in ("base", "novel")}


# -- paired errors -----------------------------------------------------------------------------------------------------


def test_a_gain_is_the_difference_of_harmonic_means_with_the_error_of_the_delta_method():
    better, than = answers(60, 40), answers(50, 50)
    found = gains(better, than, labels())
    assert found["base"].value == pytest.approx(10) and found["novel"].value == pytest.approx(-10)
    assert found["HM"].value == pytest.approx(48 - 50)
    up, down = {"base": 2 * 0.4**2, "novel": 2 * 0.6**2}, {"base": 0.5, "novel": 0.5}
    variance = 0.0
    for part in up:
        each = up[part] * better[part].double() - down[part] * than[part].double()
        variance += each.var().item() / 100  # classes are alike here: the error over images is the larger one
    assert found["HM"].error == pytest.approx(100 * math.sqrt(variance))
    assert accuracies(better) == pytest.approx({"base": 60, "novel": 40, "HM": 48})


def test_images_of_one_new_class_are_no_independent_evidence():
    than = answers(50, 50)
    spread, one = answers(50, 60), answers(50, 50)
    one["novel"] = than["novel"] | ((labels()["novel"] == 0) & (torch.arange(100) >= 50))  # ten images of one class
    alike, clustered = gains(spread, than, labels()), gains(one, than, labels())
    assert alike["novel"].value == clustered["novel"].value == pytest.approx(10)
    assert clustered["novel"].error > 2 * alike["novel"].error
    assert clustered["base"] == alike["base"]


def test_equal_answers_have_the_error_of_one_image():
    found = gains(answers(50, 50), answers(50, 50), labels())
    assert found["base"] == Estimate(0.0, pytest.approx(1.0)) and found["HM"].value == 0


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_a_planted_better_candidate_is_chosen():
    found = choose({"default": answers(50, 50), "other": answers(51, 50), "best": answers(70, 70)}, labels())
    assert found.chosen == "best" and found.default == "default"
    assert [line.name for line in found.tried] == ["default", "other", "best"]
    assert found.tried[0].gain is None and found.tried[2].gain.value == pytest.approx(20)


@pytest.mark.parametrize("other", [(50, 50), (51, 50), (50, 51), (40, 61), (30, 30)])
def test_without_a_sure_gain_the_default_is_kept(other):
    assert choose({"default": answers(50, 50), "other": answers(*other)}, labels()).chosen == "default"


def test_a_larger_margin_asks_for_more():
    right = {"default": answers(50, 50), "other": answers(56, 56)}
    chosen = [choose(right, labels(), margin=margin).chosen for margin in (0.0, 1.0, 10.0)]
    assert chosen == ["other", "other", "default"]


def test_nothing_is_chosen_on_a_handful_of_images():
    assert too_few(labels()) == ""
    assert "of the learned half of the classes, got 4" in too_few(labels() | {"base": torch.zeros(4)})
    assert "of the other half of the classes, got 0" in too_few({"base": torch.zeros(40)})


def test_settings_start_with_the_default_and_keep_what_is_given():
    assert settings_to_try({})[0] == {"lam": FitOptions.lam, "tau": FitOptions.tau}
    assert {setting["lam"] for setting in settings_to_try({"lam": 2.0})} == {2.0}
    assert settings_to_try({"lam": 2.0, "tau": 0.1}) == [{"lam": 2.0, "tau": 0.1}]


# -- the verdict -------------------------------------------------------------------------------------------------------

ROWS = ("MERGETUNE", "fine-tuned", "zero-shot")


def said(merged: tuple, tuned: tuple, zero_shot: tuple, row: str = "MERGETUNE", **more) -> str:
    right = {name: answers(*own, 400) for name, own in zip(ROWS, (merged, tuned, zero_shot), strict=True)}
    return verdict(right, labels(400), row=row, tuned=ROWS[1], zero_shot=ROWS[2], title="CoOp", **more)


def test_a_gain_is_told_with_its_interval():
    sentence = said((300, 300), (300, 260), (280, 280))
    assert sentence.startswith("MERGETUNE: +10.0 ± ") and " points on new classes and +0.0 ± " in sentence
    assert "against CoOp; +5.0 ± " in sentence and sentence.endswith("HM against zero-shot CLIP.")


def test_a_poor_zero_shot_is_named():
    sentence = said((100, 80), (136, 80), (83, 80))
    assert sentence.startswith("Zero-shot CLIP is poor here (20.8 % on your classes): MERGETUNE repairs towards it")
    assert "loses 9.0 ± 2.8 points" in sentence and "use --method head" in sentence
    assert said((100, 80), (136, 80), (83, 80), head=True).endswith("against CoOp; keep the head.")


def test_a_loss_is_called_a_loss():
    assert said((300, 250), (300, 290), (280, 240)).startswith("Do not use MERGETUNE here: -10.0 ± ")
    against_zero = said((300, 250), (310, 200), (300, 300))
    assert against_zero.startswith("Do not use MERGETUNE here") and against_zero.endswith("CLIP alone is better.")


def test_no_difference_is_called_none():
    above_zero_shot = said((300, 300), (301, 300), (250, 301))
    assert above_zero_shot.startswith("MERGETUNE and CoOp cannot be told apart here")
    assert above_zero_shot.endswith("; keep the simpler one, CoOp.")


@pytest.mark.parametrize("zero_shot", [(300, 300), (300, 301), (299, 300)])
def test_where_tuning_changed_nothing_zero_shot_is_the_simplest(zero_shot):
    sentence = said((300, 300), (300, 300), zero_shot)
    assert sentence.startswith("Tuning changed nothing measurable here: ")
    assert sentence.endswith("; keep the simplest one, zero-shot CLIP.")


def test_a_chosen_zero_shot_or_fine_tuned_solution_is_named():
    assert said((300, 300), (300, 260), (300, 300), row="zero-shot").startswith("Zero-shot CLIP is the best choice")
    assert said((300, 300), (300, 310), (300, 300), row="fine-tuned").startswith("The fine-tuned solution is the best")


def test_without_new_classes_the_verdict_says_so():
    right = {name: {"all": answers(n, 0)["base"]} for name, n in zip(ROWS, (60, 40, 50), strict=True)}
    own = {"all": labels()["base"]}
    sentence = verdict(right, own, row=ROWS[0], tuned=ROWS[1], zero_shot=ROWS[2], title="CoOp")
    assert "MERGETUNE: +20.0 ± " in sentence and "new classes were not measured" in sentence


# -- classes that the user does not own --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def icon_clip():
    return mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")


def test_concepts_are_many_differ_and_leave_the_users_classes_out():
    names = concept_names()
    assert len(names) > 300 and len(set(names)) == len(names)
    assert set(names) - set(concept_names(["Dog", "teapot", "no concept"])) == {"dog", "teapot"}


def test_concept_names_show_what_forgets_and_what_does_not(icon_clip):
    template = "an icon of a {}"
    names = tell_apart(icon_clip, concept_names(), template)

    def measured(solution):
        return recognised(icon_clip, mt.classifier(icon_clip, solution), names, template)

    plain = measured(template)
    assert plain.share == 100 and plain.cosine == pytest.approx(1) and plain.names == len(names) > 200
    prompt = mt.Prompt.from_template(icon_clip, template)
    noise = 20 * torch.randn(prompt.ctx.shape, generator=torch.Generator().manual_seed(0)) * prompt.ctx.std()
    broken = measured(prompt.with_state({"ctx": prompt.ctx + noise}))
    assert broken.share < 90 and broken.cosine < 0.9
    stack = mt.Stack(mt.Templates((template,)), mt.LinearMap(torch.eye(128).roll(1, 0)))
    assert measured(stack).share < 20  # a map of the images alone forgets as well


def test_retained_pictures_are_all_of_other_classes(tmp_path):
    for split, name in (("train", "cat"), ("test", "cat"), ("train", "dog"), ("test", "dog")):
        (tmp_path / "keep" / split / name).mkdir(parents=True)
        (tmp_path / "keep" / split / name / "a.png").touch()
    data = mt.ImageFolder(tmp_path / "keep")
    assert len(retained_images(data, ["car"])) == 4 and retained_images(data, ["car"]).classnames == ("cat", "dog")
    with pytest.raises(ValueError, match="retain must hold classes that are not trained, got 'dog'"):
        retained_images(data, ["Dog", "car"])
    with pytest.raises(ValueError, match="retain must hold at least two classes, got cat"):
        retained_images(data.select([0]), ["car"])


def test_files_left_out_are_counted_by_type(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("a.png", "b.JPG", "c.txt", "d.txt", "README", ".DS_Store", "e.heic"):
        (tmp_path / "cat" / name).touch()
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    assert ignored_files(tmp_path) == {
        ".heic": 1, ".txt": 2, "hidden": 1, "not a regular file": 1, "without extension": 1,
    }  # fmt: skip
