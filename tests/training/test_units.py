"""What the numbers of fit mean: a head's lam, one precision for w and its anchors, the mean with zero-shot."""

from dataclasses import replace

import pytest
import torch
from fit_cases import QUICK
from tiny import NAMES, cache, head, normal, parameter, prompt

from mergetune import FeatureCache, Head, LinearMap, Prompt, Residual, Stack, Templates, evaluate, fit, interpolate
from mergetune.facts import FitOptions
from mergetune.facts.function_options import recorded
from mergetune.solutions import zero_shot_like
from mergetune.training.curvature import head_lam

pytestmark = pytest.mark.usefixtures("one_thread")
FACTORS = (0.01, 0.5, 3.0, 100.0)
STILL = {"epochs": 1, "lr": 1e-30, "warmup_lr": 1e-30}  # rates that move nothing


def copy_of(solution: Head, factor: float) -> Head:
    """The same classifier: rows and bias times a factor, the logit scale divided by it."""
    bias = None if solution.bias is None else solution.bias * factor
    return replace(solution, weight=solution.weight * factor, bias=bias, logit_scale=solution.logit_scale / factor)


# -- the unit of a head's lam ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "bias", "surrogate"),
    [
        *((factor, bias, "identity") for factor in FACTORS for bias in (False, True)),
        *((100.0, True, surrogate) for surrogate in ("fisher", "cosine", "l2")),
    ],
)
def test_a_head_and_its_copy_in_another_scale_become_one_classifier(clip, factor, bias, surrogate):
    zero_shot = Head.zero_shot(clip, NAMES, bias=bias)
    given = [head(1, bias), head(2, bias)]
    runs = [
        fit(clip, cache(), tuned, zero_shot=w1, surrogate=surrogate, **QUICK)
        for tuned, w1 in ((given, zero_shot), ([copy_of(h, factor) for h in given], copy_of(zero_shot, factor)))
    ]
    for own, copied in zip(*(run.history for run in runs), strict=True):
        assert copied == pytest.approx(own, rel=1e-4, abs=1e-6)
    own, copied = (run.solution for run in runs)
    assert own.logit_scale == copied.logit_scale
    torch.testing.assert_close(parameter(copied), parameter(own), rtol=1e-4, atol=1e-6)
    assert runs[0].settings["lam"] == runs[1].settings["lam"] == 8.0
    assert runs[1].settings["lam_effective"] == pytest.approx(runs[0].settings["lam_effective"], rel=1e-5)
    assert evaluate(clip, own, cache()).accuracy == evaluate(clip, copied, cache()).accuracy


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", FACTORS)
def test_the_weighted_surrogate_has_the_same_value_in_every_scale(factor, bias):
    """Also without the common scale that fit puts heads into: lam |w - w1|^2 does not change."""
    w1, w = (parameter(head(seed, bias)) for seed in (1, 2))
    values = [
        head_lam(8.0, cache(), k * w1, scale=10.0 / k) * (k * w - k * w1).square().sum().item() for k in (1.0, factor)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_lam_is_a_factor_and_copies_of_the_images_change_nothing():
    w1, images = parameter(head(bias=False)), cache()
    one, two = (head_lam(lam, images, w1, scale=3.0) for lam in (1.0, 2.0))
    assert two == pytest.approx(2 * one, rel=1e-5)
    (x, labels, _), *_ = images.batches(64)
    twice = FeatureCache.from_tensors(torch.cat([x, x]), torch.cat([labels, labels.flip(0)]), NAMES)
    assert head_lam(1.0, twice, w1, scale=3.0) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("tuned", ["prompt", "residual", "map"])
def test_other_kinds_keep_lam_as_the_weight_itself(clip, tuned):
    result = fit(clip, cache(), solutions(clip)[tuned], **QUICK)
    assert result.settings["lam"] == 8.0 and "lam_effective" not in result.settings
    entry = result.history[-1]
    total = entry["endpoint"] + 8 * entry["surrogate"] + 0.5 * entry["path_1"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


# -- one precision -----------------------------------------------------------------------------------------------------


def solutions(clip) -> dict:
    """A fine-tuned solution of each kind."""
    return {
        "prompt": prompt(),
        "class-specific": prompt().per_class(NAMES),
        "head": head(),
        "cosine head": replace(head(bias=False), normalize=True),
        "residual": Stack(Templates(), Residual(0.3 * normal(3, 8), NAMES)),
        "residual on a prompt": Stack(prompt(2), Residual(0.3 * normal(3, 8), NAMES)),
        "map": Stack(prompt(2), LinearMap(torch.eye(8) + 0.1 * normal(8, 8))),
    }


KINDS = tuple(solutions(None))


@pytest.mark.parametrize("space", ["embedding", "parameter"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_tau_1_w_lies_on_its_own_anchor(clip, kind, precision, space):
    """Then all points of the path are w, so that their loss is w's own."""
    tuned = solutions(clip)[kind]
    (entry,) = fit(clip, cache(), tuned, tau=1.0, precision=precision, space=space, **STILL).history
    assert entry["path_1"] == pytest.approx(entry["endpoint"], rel=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_anchor_with_other_texts_has_the_same_precision(clip, precision):
    """Two prompts of one place, the second anchored under other words: its path starts where its own run lies."""
    other = replace(prompt(), template="X X X X {}, outdoors.")
    pair = fit(clip, cache(), [other, prompt(2)], tau=1.0, grid=[0.0], precision=precision, **STILL).history[0]
    alone = [
        fit(clip, cache(), tuned, tau=1.0, precision=precision, **STILL).history[0] for tuned in (other, prompt(2))
    ]
    for k, entry in enumerate(alone):
        assert pair[f"path_{k + 1}"] == pytest.approx(entry["endpoint"], rel=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_tau_0_w_lies_on_a_zero_shot_solution_that_is_given(clip, kind, precision):
    tuned = solutions(clip)[kind]
    w1 = zero_shot_like(clip, tuned, "a photo of a {}.")
    (entry,) = fit(clip, cache(), tuned, zero_shot=w1, tau=0.0, precision=precision, **STILL).history
    assert entry["surrogate"] == pytest.approx(0, abs=1e-6)


# -- the mean with zero-shot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weight_ensemble_is_the_mean_of_zero_shot_and_the_result(clip, kind, tmp_path):
    tuned = solutions(clip)[kind]
    plain = fit(clip, cache(), tuned, **QUICK)
    mean = fit(clip, cache(), tuned, weight_ensemble=True, resume=tmp_path, **QUICK)
    assert plain.history == mean.history
    expected = interpolate(zero_shot_like(clip, tuned), plain.solution, 0.5)
    for name, tensor in mean.solution.state().items():
        torch.testing.assert_close(tensor, expected.state()[name], rtol=1e-5, atol=1e-6)
    assert mean.solution.notes["settings"]["weight_ensemble"] is True
    assert mean.settings == plain.settings | {"weight_ensemble": True}
    again = fit(clip, cache(), tuned, weight_ensemble=True, resume=tmp_path, **QUICK)  # a finished run
    assert all(map(torch.equal, again.solution.state().values(), mean.solution.state().values()))
    with pytest.raises(ValueError, match="weight_ensemble yes there, none here"):
        fit(clip, cache(), tuned, resume=tmp_path, **QUICK)


def test_records_without_the_mean_are_those_of_earlier_versions():
    assert "weight_ensemble" not in recorded(FitOptions())
    assert recorded(FitOptions(weight_ensemble=True))["weight_ensemble"] is True


def test_a_zero_shot_prompt_of_another_length_has_no_mean(clip):
    with pytest.raises(ValueError, match=r"for weight_ensemble, got .* or leave weight_ensemble out"):
        fit(clip, cache(), Prompt(normal(2, 16), "X X {}."), zero_shot="the {}", tau=1.0, weight_ensemble=True, **STILL)
