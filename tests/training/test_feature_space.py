"""Stages 1 and 2 and evaluation of heads without a CLIP, and zero-shot solutions in place of templates."""

import pytest
import torch
from tiny import NAMES, cache, head, prompt, tiny_clip

import mergetune as mt

TEXT = "a photo of a {}."
SHORT = {"epochs": 2, "precision": "float32", "progress": False}


def space(clip, **more):
    """What heads need of a CLIP: width and logit scale."""
    return mt.FeatureSpace(clip.embed_dim, clip.logit_scale, **more)


def assert_equal(found, expected):
    found, expected = (solution.saved_state() for solution in (found, expected))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("method", ["kgcoop", "head", "residual", "map"])
def test_stage_1_takes_a_zero_shot_solution_in_place_of_templates(clip, method):
    x = cache(12)
    solution = mt.Templates((TEXT,), backbone=clip.name, fingerprint=clip.text_fingerprint)
    found = mt.tune(clip, x, method=method, zero_shot=solution, **SHORT)
    expected = mt.tune(clip, x, method=method, zero_shot=TEXT, **SHORT)
    assert_equal(found.solution, expected.solution)
    assert found.settings["zero_shot"] != expected.settings["zero_shot"] == [TEXT]


def test_stage_1_of_a_head_starts_at_the_logits_of_the_solution(clip):
    x, start = cache(12), head(scale=3.0)
    for given in (start, start.in_order_of(NAMES[::-1]), mt.Head(start.weight, NAMES, start.bias, logit_scale=3.0)):
        found = mt.tune(clip, x, method="head", zero_shot=given, lr=1e-12, weight_decay=0.0, warmup_lr=1e-12, **SHORT)
        torch.testing.assert_close(found.solution.rescaled(3.0).weight, start.weight)
        torch.testing.assert_close(found.solution.rescaled(3.0).bias, start.bias)
    with pytest.raises(ValueError, match="zero_shot must be templates or left out for method 'coop', got a head"):
        mt.tune(clip, x, zero_shot=start, **SHORT)


@pytest.mark.parametrize("fingerprint", ["", "known"])
def test_heads_need_width_and_logit_scale_only(clip, fingerprint):
    """The same bits as with the CLIP, in both stages and in evaluation."""
    known = {"fingerprint": clip.image_fingerprint, "name": clip.name} if fingerprint else {}
    x, zero, without = cache(12, fingerprint=known.get("fingerprint", "")), mt.Head.zero_shot(clip, NAMES, TEXT), None
    without = space(clip, **known)
    tuned = [mt.tune(model, x, method="head", zero_shot=zero, lr=0.1, **SHORT).solution for model in (without, clip)]
    assert_equal(*tuned)
    fitted = [mt.fit(model, x, tuned[0], zero_shot=zero, **SHORT).solution for model in (without, clip)]
    assert_equal(*fitted)
    stacks = [mt.tune(model, x, method="residual", base=zero, epochs=3, progress=False) for model in (without, clip)]
    assert_equal(*(stack.solution for stack in stacks))
    for solution in (fitted[0], stacks[0].solution):
        assert mt.evaluate(without, solution, x) == mt.evaluate(clip, solution, x)
    merged = [mt.merge_solutions("fisher_average", tuned, clip=model, features=x) for model in (without, clip)]
    assert_equal(*merged)
    assert (fitted[0].backbone, fitted[0].fingerprint) == (clip.name, clip.image_fingerprint)  # of the zero-shot head


def test_what_needs_a_tower_says_so(clip):
    without, x = space(clip), cache(12)
    for call in (
        lambda: mt.tune(without, x, method="head", **SHORT),
        lambda: mt.fit(without, x, head(), **SHORT),
        lambda: mt.evaluate(without, TEXT, x),
    ):
        with pytest.raises(TypeError, match="zero_shot must be a head where clip is a FeatureSpace, got templates"):
            call()
    for call in (
        lambda: mt.evaluate(without, prompt(), x),
        lambda: mt.tune(without, x, **SHORT),
        lambda: without.encode_image(torch.zeros(1, 3, 16, 16)),
        lambda: without.encode_text(["a cat"]),
    ):
        with pytest.raises(TypeError, match="clip must have towers for this, got a FeatureSpace"):
            call()


@pytest.mark.parametrize(("dim", "scale"), [(0, 1.0), (2.5, 1.0), (8, 0.0), (8, float("inf")), (8, float("nan"))])
def test_a_space_has_a_width_and_a_scale(dim, scale):
    with pytest.raises(ValueError, match="(embed_dim|logit_scale) must be"):
        mt.FeatureSpace(dim, scale)


def test_features_of_other_weights_are_refused_where_the_weights_are_known(clip):
    other = tiny_clip(1).image_fingerprint
    x = cache(12, fingerprint=other)
    with pytest.raises(ValueError, match="features must come from this CLIP's image tower"):
        mt.evaluate(space(clip, fingerprint=clip.image_fingerprint), head(), x)
    assert mt.evaluate(space(clip), head(), x).images == 12
    with pytest.raises(ValueError, match="features must have the embedding's width 9, got 8"):
        mt.evaluate(mt.FeatureSpace(9, 1.0), head(), x)
