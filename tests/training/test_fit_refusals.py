"""What tune() and fit() refuse before any training."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fit_cases import QUICK, fit_random, tune_kgcoop
from tiny import NAMES, cache, head, normal, prompt

from mergetune import FeatureCache, Head, fit, tune
from mergetune.training import fit_job

pytestmark = pytest.mark.usefixtures("one_thread")

BAD_TRAINING = [
    ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
    ({"epochs": 1.5}, "epochs must be a whole number"),
    ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ({"lr": 0.0}, "lr must be finite and positive, got 0.0"),
    ({"lr": -1.0}, "lr must be finite and positive"),
    ({"lr": float("nan")}, "lr must be finite and positive, got nan"),
    ({"momentum": -0.1}, "momentum must be finite and not negative"),
    ({"weight_decay": float("inf")}, "weight_decay must be finite"),
    ({"warmup_epochs": -1}, "warmup_epochs must be a whole number of at least 0"),
    ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ({"precision": "int8"}, "precision must be one of auto, float32, bfloat16, got 'int8'"),
    ({"features": cache(fingerprint="x" * 64)}, "features must come from this CLIP's image tower"),
    ({"features": cache(dim=6)}, "features must have the embedding's width 8, got 6"),
    ({"features": cache(classes=("cat",))}, "features must hold at least two classes, got"),
    ({"features": cache().select_classes([0, 1])}, None),
    ({"val": cache(classes=NAMES[::-1])}, "val must have the classes of features"),
    ({"val": cache(fingerprint="x" * 64)}, "val must come from this CLIP's image tower"),
]
BAD_FIT = [
    ({"tau": -0.1}, r"tau must lie in \[0, 1\], got -0.1"),
    ({"tau": 1.1}, r"tau must lie in \[0, 1\]"),
    ({"tau": float("nan")}, r"tau must lie in \[0, 1\]"),
    ({"lam": -1}, "lam must be finite and not negative, got -1"),
    ({"lam": float("inf")}, "lam must be finite"),
    ({"beta": -1}, "beta must be finite and not negative, got -1"),
    ({"beta": float("nan")}, "beta must be finite"),
    ({"beta": [0.5, 0.5]}, "beta must be one number, or one per solution .1., got 2"),
    ({"beta": []}, "beta must be one number"),
    ({"tuned": []}, "tuned must hold at least one solution"),
    ({"points": 0}, "points must be .*at least 1, got 0"),
    ({"points": 2.5}, "points must be .*at least 1, got 2.5"),
    ({"grid": "odd"}, "grid must be one of even, official, random or a list of points, got 'odd'"),
    ({"grid": []}, "grid must hold at least one path point"),
    ({"grid": [0.5, 1.5]}, r"grid must hold path points in \[0, 1\], got \[0.5, 1.5\]"),
    ({"grid": [float("nan")]}, r"grid must hold path points in \[0, 1\]"),
    ({"surrogate": "hessian"}, "surrogate must be one of identity, fisher, cosine, l2, got 'hessian'"),
    ({"space": "weights"}, "space must be one of embedding, parameter, got 'weights'"),
    (
        {"tuned": replace(prompt(), ctx=torch.ones(2, 16), template="X X {}.")},
        "give a template with as many tokens before {}",
    ),
    ({"zero_shot": "no place"}, "exactly one {}"),
    ({"tuned": prompt().per_class(NAMES[::-1])}, "class 0 must be 'dog', got 'cat'"),
    ({"tuned": replace(head(), classnames=("cow", *NAMES[1:]))}, "class 0 must be 'cow', got 'cat'"),
    ({"tuned": Head(torch.ones(3, 6), NAMES)}, "weight must have the embedding's width 8, got"),
    ({"tuned": Head(torch.ones(2, 8), NAMES[:2])}, "2 classes of the solution in the same order, got 3"),
    ({"tuned": [prompt(), replace(prompt(), ctx=torch.ones(2, 16))]}, "equal shapes"),
    ({"tuned": replace(prompt(), fingerprint="x" * 64)}, "clip must be the one that the prompt was made for"),
]
BAD_TUNE = [
    ({"method": "cocoop"}, "method must be one of coop, kgcoop, head, residual, map, lora, got 'cocoop'"),
    ({"kg_weight": -1}, "kg_weight must be finite and not negative"),
    ({"n_ctx": 0}, "n_ctx must be at least 1, got 0"),
    ({"n_ctx": 40}, "must fit the text tower's 16 tokens"),
    ({"template": "a photo"}, "exactly one {}"),
    ({"template": "{}"}, "at least one word before {}"),
]


@pytest.mark.parametrize("template", ["{} texture.", "a centered satellite photo of {}."])
def test_a_template_of_another_length_is_the_reference_and_the_plain_words_the_start(clip, template):
    job = functools.partial(fit_job, clip, cache(), prompt(), epochs=1, batch_size=30, precision="float32")
    start = job(zero_shot=template, tau=0.0).start
    assert torch.equal(start.ctx, job(tau=0.0).start.ctx)  # "a photo of a"
    assert job(zero_shot=template).settings["zero_shot"] != job().settings["zero_shot"]


def gap() -> FeatureCache:
    features = cache()
    return replace(features, labels=features.labels.clamp(max=1))


@pytest.mark.parametrize(("change", "match"), [*BAD_TRAINING, *BAD_FIT])
def test_fit_refuses_before_it_trains(clip, tmp_path, monkeypatch, change, match):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("it trained"))
    kwargs = {"features": cache(), "tuned": head() if match is None else prompt(), **change}
    with pytest.raises(ValueError, match=match or "3 classes of the solution in the same order, got 2"):
        fit(clip, resume=tmp_path / "run", **kwargs)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "match"), [*(bad for bad in BAD_TRAINING if bad[1]), *BAD_TUNE])
def test_tune_refuses_before_it_trains(clip, tmp_path, monkeypatch, change, match):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=match):
        tune(clip, resume=tmp_path / "run", **{"features": cache(), **change})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("run", [tune_kgcoop, fit_random])
def test_an_empty_class_is_refused(clip, tmp_path, run):
    with pytest.raises(ValueError, match="features must hold images of every class, got none of 'dog'"):
        run(clip, gap(), resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": torch.full((6, 8), float("nan"))}, "features must be finite"),
        ({"features": torch.ones(6, 8)}, "of unit norm"),
        ({"labels": [0, 1, 2, 0, 1, 3]}, r"labels must lie in \[0, 3\), got 0 to 3"),
        ({"labels": [0, 1, 2, 0, 1, -1]}, r"labels must lie in \[0, 3\)"),
    ],
)
def test_features_are_refused_when_they_are_made(change, match):
    kwargs = {"features": F.normalize(torch.ones(6, 8), dim=-1), "labels": [0, 1, 2, 0, 1, 2], "classnames": NAMES}
    with pytest.raises(ValueError, match=match):
        FeatureCache.from_tensors(**{**kwargs, **change})


@pytest.mark.parametrize(
    ("tuned", "zero_shot"), [([prompt(), head()], None), (prompt(), head()), (head(), prompt())], ids=str
)
def test_prompts_and_heads_do_not_mix(clip, tuned, zero_shot):
    with pytest.raises(TypeError, match="prompt"):
        fit(clip, cache(), tuned, zero_shot=zero_shot, **QUICK)


def test_a_path_for_tuned_is_refused_by_name(clip):
    with pytest.raises((TypeError, ValueError), match="tuned"):
        fit(clip, cache(), "out", **QUICK)


def test_an_unknown_argument_is_named(clip):
    with pytest.raises(TypeError, match="epoch"):
        fit(clip, cache(), prompt(), epoch=3)


@pytest.mark.parametrize(
    "tuned", [replace(prompt(), ctx=prompt().ctx.bfloat16()), Head(normal(3, 8).bfloat16(), NAMES)]
)
def test_solutions_in_bfloat16(clip, tuned):
    fit(clip, cache(), tuned, **QUICK)


def test_prompts_of_other_templates_do_not_mix_in_parameter_space(clip):
    other = replace(prompt(2), template="X X X X {}, a type of pet.")
    with pytest.raises(ValueError, match="template"):
        fit(clip, cache(), [prompt(1), other], space="parameter", **QUICK)


def test_a_file_for_resume_is_refused_before_training(clip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="resume"):
        fit(clip, cache(), prompt(), resume=tmp_path / "file", **QUICK)
