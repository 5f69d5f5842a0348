"""merge_solutions() and merge_files(): known numbers, options, refusals."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comparison_cases import (
    NAMES,
    cache,
    short_searches,  # noqa: F401
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import encoder, normal, parameter, prompt

from mergetune import FeatureCache, Head, Prompt, classifier, interpolate, merging, weight_average
from mergetune.experiments import merge_solutions
from mergetune.merging.catalogue import merge_files, parse_options
from mergetune.solutions import space_of, zero_shot_like


def head(seed: int = 1, scale: float = 10.0) -> Head:
    return Head(normal(6, 8, seed=seed), NAMES, normal(6, seed=seed + 9), logit_scale=scale)


def test_options_are_read_as_their_kinds():
    assert parse_options("ties", ["density=0.3", "weights=1,2", "trim=tensor"]) == {
        "density": 0.3, "weights": [1.0, 2.0], "trim": "tensor",
    }  # fmt: skip
    assert parse_options("dare", ["seed=3", "rescale=none"]) == {"seed": 3, "rescale": None}
    assert parse_options("ota-ffg", ["rank_one=true"]) == {"rank_one": True}
    starts = parse_options("evolve", ["start=density:1,weights:0.5:0.25"])
    assert starts == {"start": {"density": 1.0, "weights": [0.5, 0.25]}}
    assert parse_options("expert_merging", ["exclude=b*,x.?"]) == {"exclude": ["b*", "x.?"]}
    with pytest.raises(ValueError, match="start must be name:value.*, got 'density=1'"):
        parse_options("evolve", ["start=density=1"])
    found = parse_options("evolve", ["method=ties", "space=density:0.1:1,weights:0:1:2", "trials=5"])
    assert found["method"] is merging.ties and found["space"] == {"density": (0.1, 1.0), "weights": (0.0, 1.0, 2)}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tise", [], "method must be one of adamerging, average"),
        ("ties", ["densty=0.3"], "ties has no option 'densty'; it has density, scale, weights"),
        ("ties", ["density=half"], "density must be a number, got 'half'"),
        ("dare", ["seed=1.5"], "seed must be a whole number, got '1.5'"),
        ("ties", ["density"], "options must be name=value, got 'density'"),
        ("ties", ["scale=1", "scale=2"], "must not repeat, got 'scale' twice"),
        ("lines", ["layer=x"], "layer of lines cannot be given as text"),
        ("layerwise", ["coefficients=1"], "coefficients of layerwise cannot be given as text"),
    ],
)
def test_wrong_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        parse_options(method, options)


def test_merged_prompts_are_the_method_on_their_contexts(clip):
    zero, a, b = Prompt.from_template(clip), prompt(1), prompt(2)
    merged = merge_solutions("task_arithmetic", [a, b], base=zero, options={"scale": 0.3})
    torch.testing.assert_close(merged.ctx, zero.ctx + 0.3 * (a.ctx + b.ctx - 2 * zero.ctx))
    assert merged.notes["merged"] == "task_arithmetic" and merged.notes["options"] == {"scale": 0.3}
    wise = merge_solutions("wise-ft", [a], base=zero, options={"alpha": 0.25})
    torch.testing.assert_close(wise.ctx, interpolate(zero, a, 0.25).ctx)
    torch.testing.assert_close(merge_solutions("average", [a, b]).ctx, (a.ctx + b.ctx) / 2)
    torch.testing.assert_close(merge_solutions("average", [a, b], base=zero).ctx, (zero.ctx + a.ctx + b.ctx) / 3)
    own = [solution.per_class(NAMES) for solution in (zero, a, b)]
    merged = merge_solutions("ties", own[1:], base=own[0], options={"density": 1.0})
    expected = merging.ties({"ctx": own[0].ctx}, [{"ctx": p.ctx} for p in own[1:]], density=1.0)
    assert torch.equal(merged.ctx, expected["ctx"]) and merged.classnames == NAMES


def test_heads_of_two_logit_scales_are_merged_in_one(clip):
    a, b = head(1), head(2).rescaled(2.5)
    merged = merge_solutions("average", [a, b])
    expected = (parameter(a) + parameter(head(2))) / 2
    torch.testing.assert_close(parameter(merged), expected)
    assert merged.logit_scale == 10 and merged.bias is not None
    zero = zero_shot_like(clip, a)
    assert zero.logit_scale == 10 and (zero.bias == 0).all()
    moved = merge_solutions("wise_ft", [a], base=zero, options={"alpha": 0.5})
    torch.testing.assert_close(parameter(moved), (parameter(a) + parameter(zero)) / 2)


@pytest.mark.parametrize("scale", [0.5, 10.0, 100.0])
def test_wise_ft_of_a_head_is_one_classifier_by_every_way(clip, scale):
    """Of classifiers (robust), of solutions (interpolate) and of weights (compare), in any scale of the head."""
    zero, tuned = zero_shot_like(clip, head()), head(1).rescaled(scale)
    plain = 0.75 * classifier(clip, zero)(NAMES) + 0.25 * classifier(clip, tuned)(NAMES)
    ways = [
        weight_average(classifier(clip, zero), classifier(clip, tuned), 0.25),
        classifier(clip, interpolate(zero, tuned, 0.25)),
        classifier(clip, merge_solutions("wise_ft", [tuned], base=zero, options={"alpha": 0.25})),
    ]
    for classify in ways:
        torch.testing.assert_close(classify(NAMES), plain, rtol=1e-4, atol=1e-4)


def test_fisher_of_a_head_is_the_expected_squared_gradient_in_its_own_scale(clip):
    """By autograd through the head's logits, over all labels and images."""
    from mergetune.experiments import solution_merging as module

    features, solution = cache(8), head(scale=2.5)
    state = {name: t.double().requires_grad_() for name, t in solution.state().items()}
    expected = {name: torch.zeros_like(t) for name, t in state.items()}
    logits = 2.5 * (features.tensor().double() @ state["weight"].T + state["bias"])
    for row in logits.log_softmax(1):
        for value in row:
            gradients = torch.autograd.grad(value, list(state.values()), retain_graph=True)
            for name, gradient in zip(state, gradients, strict=True):
                expected[name] += value.exp().detach() * gradient.square() / len(logits)
    found = module._fisher(space_of(clip, solution, NAMES), solution, solution.state(), clip, features)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-9)


def test_fisher_of_a_prompt_is_the_expected_squared_gradient(clip, monkeypatch):
    """Many drawn labels come near the expectation over all labels, by autograd through the model's own classifier."""
    from mergetune.experiments import solution_merging as module

    features, solution = cache(8), prompt()
    x, ctx = features.tensor(), solution.ctx.clone().requires_grad_()
    encode, expected = encoder(clip, solution, NAMES), torch.zeros_like(solution.ctx)
    logits = clip.logit_scale * x @ F.normalize(encode(ctx[None])[0], dim=-1).T
    for row in logits.log_softmax(1):
        for value in row:
            (gradient,) = torch.autograd.grad(value, ctx, retain_graph=True)
            expected += value.exp().detach() * gradient.square() / len(x)
    many = FeatureCache.from_tensors(x.repeat(60, 1), features.labels.repeat(60), NAMES)
    monkeypatch.setattr(module, "FISHER_IMAGES", 480)
    found = module._fisher(space_of(clip, solution, NAMES), solution, solution.state(), clip, many)["ctx"]
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.97
    assert 0.8 < found.sum() / expected.sum() < 1.25


@pytest.mark.parametrize("solutions", [(prompt(1), prompt(2)), (head(1), head(2))], ids=["prompts", "heads"])
@pytest.mark.parametrize(
    "method", ["fisher_average", "ota_ffg", "adamerging", "expert_merging", "natural_niches", "metrics_average"]
)
def test_methods_that_need_data_take_a_cache_and_are_refused_without(clip, method, solutions):
    base, features = zero_shot_like(clip, solutions[0]), cache()
    options = {"steps": 3} if method in ("adamerging", "expert_merging", "natural_niches") else {}
    merged = merge_solutions(method, solutions, base=base, clip=clip, features=features, options=options)
    assert parameter(merged).shape == parameter(base).shape and parameter(merged).isfinite().all()
    assert merged.notes["data"] != "none"
    with pytest.raises(ValueError, match="needs cached image features"):
        merge_solutions(method, solutions, base=base)


def test_solutions_that_do_not_go_together_are_refused(clip):
    with pytest.raises(TypeError, match="one kind"):
        merge_solutions("average", [prompt(), head()])
    with pytest.raises(ValueError, match="ties of 1 expert.* needs a base"):
        merge_solutions("ties", [prompt()])
    with pytest.raises(ValueError, match="end alike"):
        merge_solutions("average", [prompt(), replace(prompt(2), template="X X X X {} drawn.")])
    with pytest.raises(ValueError, match="layerwise needs the option 'coefficients'"):
        merge_solutions("layerwise", [prompt()], base=prompt(2))
    with pytest.raises(ValueError, match="evolve needs the option 'space'"):
        merge_solutions(
            "evolve", [prompt()], base=prompt(2), clip=clip, features=cache(), options={"method": merging.ties}
        )
    with pytest.raises(ValueError, match="block numbers"):
        merge_solutions("lines", [prompt()], base=prompt(2))


def test_files_are_merged_streamed_or_in_memory(tmp_path):
    states = [{"layer.0.w": normal(3, 4, seed=i), "layer.1.w": normal(5, seed=i + 5)} for i in range(3)]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file, metadata={"kept": "by streaming"})
    merge_files("ties", files[0], files[1:], tmp_path / "out.safetensors", {"density": 0.5})
    expected = merging.ties(states[0], states[1:], density=0.5)
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        assert out.metadata() == {"kept": "by streaming"}
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    fishers = {"fishers": [merging.TensorFile(f) for f in files[:2]]}
    with pytest.raises(ValueError, match="must not be negative"):
        merge_files("fisher_average", None, files[:2], tmp_path / "f.safetensors", fishers)
    with pytest.raises(ValueError, match="fisher_average needs -o fishers="):
        merge_files("fisher_average", None, files[:2], tmp_path / "f.safetensors", {})
    with pytest.raises(ValueError, match="adamerging needs images and a model.*solutions, with --cache"):
        merge_files("adamerging", files[0], files[1:], tmp_path / "f.safetensors", {})
    assert not (tmp_path / "f.safetensors").exists()


def test_lora_factors_are_merged_in_memory(tmp_path):
    states = [{"q.lora_A.weight": normal(2, 6, seed=i), "q.lora_B.weight": normal(5, 2, seed=i + 5)} for i in range(2)]
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    merge_files("lora_lego", None, files, tmp_path / "out.safetensors", {})
    assert load_file(tmp_path / "out.safetensors")["q.lora_A.weight"].shape == (2, 6)


def test_adapters_are_merged_from_zeros(tmp_path):
    states = [{"q.ia3_l": normal(6, seed=i)} for i in range(2)]
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    merge_files("task_arithmetic", "zeros", files, tmp_path / "out.safetensors", {"scale": 0.5})
    got = load_file(tmp_path / "out.safetensors")["q.ia3_l"]
    torch.testing.assert_close(got, (states[0]["q.ia3_l"] + states[1]["q.ia3_l"]) / 2)
