"""tune and fit of a LoRA on pixels: the published settings, the objective, and runs that go on after a stop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NAMES, cache, head, prompt, tiny_clip

import mergetune.training.loop
from mergetune import LoRA, Prompt, classifier, evaluate, fit, interpolate, tune
from mergetune.data import ImageList, PixelBatches
from mergetune.facts import FitOptions
from mergetune.solutions import zero_shot_like


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> PixelBatches:
    """Twelve pictures of three classes, each of another colour."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(12):
        colour = np.eye(3)[i % 3] * 150 + random.integers(0, 100, (20, 20, 3))
        Image.fromarray(colour.astype(np.uint8)).save(folder / f"{i}.png")
    images = ImageList(folder, tuple(f"{i}.png" for i in range(12)), tuple(i % 3 for i in range(12)), NAMES)
    return PixelBatches.of(tiny_clip(), images, views=5)


def test_tune_takes_the_published_settings(clip, pixels):
    result = tune(clip, pixels, method="lora", epochs=1, progress=False)
    expected = {
        "method": "lora", "rank": 2, "alpha": 1.0, "parts": ["q", "k", "v"], "tower": "both", "last_blocks": None,
        "lr": 2e-4, "optimizer": "adamw", "weight_decay": 1e-2, "batch_size": 32, "warmup_epochs": 0,
        "precision": "float32", "features": pixels.digest,
    }  # fmt: skip
    assert {name: result.settings[name] for name in expected} == expected
    assert result.timings["steps"] == 1
    lora = result.solution
    assert len(lora.scales) == 9 and set(lora.scales.values()) == {1 / math.sqrt(2)}
    start = LoRA.start(clip, seed=1)
    a, b = lora.factors["image.0.q.A"], lora.factors["image.0.q.B"]
    torch.testing.assert_close(a, start.factors["image.0.q.A"] * (1 - 2e-4 * 1e-2))  # B = 0 gives A no gradient
    torch.testing.assert_close(b.abs(), torch.full_like(b, 2e-4), rtol=1e-3, atol=0)
    assert "rank" not in tune(clip, cache(), epochs=1, progress=False).settings


def test_epochs_are_those_of_500_steps_per_shot(clip, pixels, monkeypatch):
    """Four shots in batches of five, of which an epoch has two."""
    monkeypatch.setattr("mergetune.training.stage_one.LORA_STEPS", 3)
    result = tune(clip, pixels, method="lora", batch_size=5, tower="image", progress=False)
    assert result.timings["steps"] == 12 and len(result.history) == 6


def test_a_lora_learns_and_fit_takes_one_random_point_per_step(clip, pixels):
    tuned = tune(clip, pixels, method="lora", epochs=12, lr=0.05, batch_size=12, progress=False).solution
    before = evaluate(clip, zero_shot_like(clip, tuned), pixels).accuracy
    assert evaluate(clip, tuned, pixels).accuracy > before + 20
    usual = fit(clip, pixels, tuned, lam=0.1, epochs=2, progress=False)
    named = fit(
        clip, pixels, tuned, lam=0.1, epochs=2, space="parameter", grid="random", points=1, precision="float32",
        progress=False,
    )  # fmt: skip
    assert usual.settings == named.settings and usual.settings["points"] == 1
    assert all(map(torch.equal, usual.solution.state().values(), named.solution.state().values()))
    assert usual.history[0]["path_1"] != usual.history[1]["path_1"]
    still = fit(clip, pixels, tuned, tau=0.3, epochs=1, lr=1e-30, warmup_epochs=0, weight_decay=0.0, progress=False)
    start = interpolate(zero_shot_like(clip, tuned), tuned, 0.3)
    assert still.solution.rank == tuned.rank
    x = pixels.rows(torch.arange(12))
    torch.testing.assert_close(*(classifier(clip, s).logits(NAMES, x) for s in (still.solution, start)))


def test_options_that_are_given_hold_for_a_lora_and_the_others_keep_theirs(clip, pixels):
    lora = LoRA.start(clip, tower="image")
    few = {"epochs": 1, "progress": False}
    found = [
        {name: fit(*given, **few).settings[name] for name in ("space", "grid", "points")}
        for given in ((clip, pixels, lora), (clip, cache(), prompt()), (clip, cache(), head()))
    ]
    assert found[0] == {"space": "parameter", "grid": "random", "points": 1}
    assert found[1] == found[2] == {"space": "embedding", "grid": "even", "points": 5}
    even = fit(clip, pixels, lora, grid="even", **few).settings
    assert (even["grid"], even["points"]) == ("even", 5)
    assert fit(clip, pixels, lora, space="embedding", **few).settings["space"] == "embedding"
    assert FitOptions().points is None


def test_a_path_of_weight_zero_costs_no_pass(clip, pixels):
    """Without beta no term of the path is there; for other kinds it is measured as before."""
    lora = LoRA.start(clip, tower="image")
    assert "path_1" not in fit(clip, pixels, lora, beta=0.0, epochs=1, progress=False).history[0]
    assert "path_1" in fit(clip, cache(), prompt(), beta=0.0, epochs=1, progress=False).history[0]


@pytest.mark.parametrize("stage", ["tune", "fit"])
def test_a_run_goes_on_with_the_same_bits(clip, pixels, tmp_path, monkeypatch, stage, one_thread):
    lora = tune(clip, pixels, method="lora", epochs=1, lr=0.02, progress=False).solution
    pixels = replace(pixels, batch_size=4)

    def run(folder):
        settings = {"epochs": 3, "batch_size": 4, "val": None, "resume": folder, "progress": False}
        if stage == "tune":
            return tune(clip, pixels, method="lora", lr=0.02, **settings).solution
        return fit(clip, pixels, lora, lam=0.1, **settings).solution

    whole = run(tmp_path / "whole")
    end = mergetune.training.loop.TrainingRun.end

    def stopped(self, epoch, record):
        end(self, epoch, record)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(mergetune.training.loop.TrainingRun, "end", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    monkeypatch.undo()
    found = run(tmp_path / "stopped")
    assert all(map(torch.equal, found.state().values(), whole.state().values()))
    assert found.rank == whole.rank


def test_the_best_epoch_is_chosen_on_pixels(clip, pixels):
    images = pixels.images
    val = replace(pixels, images=images.take(range(6)))
    with pytest.raises(ValueError, match=r"val must not share images with features, got 6 in both, '0.png' among them"):
        tune(clip, pixels, method="lora", epochs=1, val=val, progress=False)
    train = replace(pixels, images=images.take(range(6, 12)))
    result = tune(clip, train, method="lora", epochs=2, val=val, progress=False)
    assert [entry["val_accuracy"] for entry in result.history]
    first = result.solution.notes["best_epoch"] - 1
    assert evaluate(clip, result.solution, val).accuracy == result.history[first]["val_accuracy"]


def test_a_lora_of_the_text_tower_trains_on_cached_features(clip):
    features = cache()
    result = tune(clip, features, method="lora", tower="text", epochs=2, progress=False)
    assert result.solution.adapted == ("text",)
    assert evaluate(clip, result.solution, features).images == len(features)


def test_what_does_not_fit_is_refused(clip, pixels):
    with pytest.raises(
        ValueError, match="features must hold the image input of a lora, pixels, got feature: mergetune.data.P"
    ):
        tune(clip, cache(), method="lora")
    with pytest.raises(ValueError, match="features must hold the image input of a prompt, feature, got pixels"):
        fit(clip, pixels, Prompt.from_template(clip, "a photo of a {}."))
    with pytest.raises(ValueError, match="features must be preprocessed for tiny-0, got"):
        tune(clip, replace(pixels, preprocess_cfg={"size": 7}), method="lora")
    with pytest.raises(ValueError, match="rank must be left out for method 'coop'"):
        tune(clip, cache(), rank=4)
    with pytest.raises(ValueError, match="a place must be TOWER.BLOCK.PART"):
        tune(clip, pixels, method="lora", parts="value")


def test_bfloat16_towers_are_taken_only_if_they_are_asked_for(clip, pixels):
    exact, rounded = (
        tune(clip, pixels, method="lora", epochs=1, precision=precision, progress=False).settings["precision"]
        for precision in ("auto", "bfloat16")
    )
    assert (exact, rounded) == ("float32", "bfloat16")
