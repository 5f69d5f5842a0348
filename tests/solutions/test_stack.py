"""Stacks: order, state, files, lines, and what goes through them."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from tiny import NAMES, cache, head, normal, prompt, tiny_clip

from mergetune import (
    FeatureCache,
    LinearMap,
    Residual,
    Stack,
    Templates,
    evaluate,
    fit,
    interpolate,
    load_solution,
    merge_solutions,
    path,
    to_head,
    tune,
)
from mergetune.evaluation import classifier
from mergetune.evaluation.spectra import hessian
from mergetune.solutions import zero_shot_like


def residual(seed: int = 4) -> Residual:
    return Residual(0.3 * normal(3, 8, seed=seed), NAMES)


def linear_map(seed: int = 5) -> LinearMap:
    return LinearMap(torch.eye(8) + 0.2 * normal(8, 8, seed=seed))


def three() -> Stack:
    return Stack(prompt(), linear_map(), residual())


def test_edits_are_applied_from_the_base_up(clip):
    x = F.normalize(normal(6, 8, seed=1), dim=-1)
    first, second = linear_map(5), linear_map(6)
    found = classifier(clip, Stack(prompt(), first, residual(), second)).logits(NAMES, x)
    x = F.normalize(F.normalize(x @ first.matrix, dim=-1) @ second.matrix, dim=-1)
    rows = F.normalize(prompt().class_embeddings(clip, NAMES) + residual().rows, dim=-1)
    torch.testing.assert_close(found, clip.logit_scale * x @ rows.T)


def test_a_stack_on_a_stack_is_one_stack(clip):
    below = Stack(prompt(), linear_map())
    stack = Stack(below, residual())
    assert [part.kind for part in stack.parts] == ["prompt", "map", "residual"]
    assert stack.top.kind == "residual" and stack.base.parts == below.parts
    assert list(stack.state()) == ["residual.rows"] and stack.numbers == 24


def test_the_state_is_the_top_s(clip):
    changed = three().with_state({"residual.rows": torch.zeros(3, 8)}, notes={"a": 1})
    assert changed.notes == {"a": 1} and changed.parts[0].ctx is not None and not changed.top.rows.any()
    torch.testing.assert_close(changed.class_embeddings(clip, NAMES), prompt().class_embeddings(clip, NAMES))


@pytest.mark.parametrize(
    "stack",
    [three(), Stack(head(), residual()), Stack(Templates(("a {}.", "the {}.")), residual(), residual(9))],
    ids=["prompt, map, residual", "head, residual", "templates and two residuals"],
)
def test_it_is_saved_and_loaded_whole(clip, tmp_path, stack):
    stack.save(tmp_path)
    found = load_solution(tmp_path)
    assert [part.kind for part in found.parts] == [part.kind for part in stack.parts]
    x = F.normalize(normal(6, 8, seed=1), dim=-1)
    assert torch.equal(classifier(clip, found).logits(NAMES, x), classifier(clip, stack).logits(NAMES, x))


def test_trained_it_names_its_clip_and_another_is_refused(clip, tmp_path):
    found = tune(clip, cache(), method="residual", base=prompt(), epochs=2, progress=False).solution
    assert found.backbone == "tiny-0" and found.top.fingerprint == clip.image_fingerprint
    other = tiny_clip(seed=1)
    with pytest.raises(ValueError, match="made for .tiny-0., got tiny-1"):
        evaluate(other, found, cache())


def test_a_stack_of_a_residual_is_a_head_for_others(clip, tmp_path):
    stack = Stack(prompt(), residual())
    written = to_head(stack, tmp_path / "head.npz", clip=clip, classnames=NAMES)
    torch.testing.assert_close(written.weight, stack.class_embeddings(clip, NAMES))
    assert written.logit_scale == clip.logit_scale


def test_lines_lead_through_tops_of_one_base(clip):
    base = prompt()
    a, b = Stack(base, residual(1)), Stack(base, residual(2))
    torch.testing.assert_close(interpolate(a, b, 0.25).top.rows, 0.75 * a.top.rows + 0.25 * b.top.rows)
    zero = zero_shot_like(clip, a)
    assert not zero.top.rows.any() and zero.parts[0] is base
    with pytest.raises(ValueError, match="stacks on one path must have the same base"):
        interpolate(a, Stack(prompt(2), residual(2)), 0.5)
    with pytest.raises(TypeError, match="stacks on one path must have tops of the same kind, got residual and map"):
        interpolate(a, Stack(base, linear_map()), 0.5)


def test_tops_are_merged(clip):
    base = prompt()
    a, b = Stack(base, residual(1)), Stack(base, residual(2))
    merged = merge_solutions("average", [a, b])
    torch.testing.assert_close(merged.top.rows, (a.top.rows + b.top.rows) / 2)
    assert merged.base is base


@pytest.mark.parametrize("method", ["fisher_average", "adamerging", "metrics_average"])
@pytest.mark.parametrize("top", [residual, linear_map], ids=["residual", "map"])
def test_methods_that_need_images_take_stacks(clip, method, top):
    base = prompt()
    experts = [Stack(base, top(1)), Stack(base, top(2))]
    merged = merge_solutions(method, experts, base=zero_shot_like(clip, experts[0]), clip=clip, features=cache())
    assert all(tensor.isfinite().all() for tensor in merged.state().values())


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([prompt()], ValueError, "a stack must hold a base and at least one solution on it, got 1"),
        ([prompt(), "map"], TypeError, "parts of a stack must be solutions, got 'map'"),
    ],
)
def test_what_is_no_stack_is_refused(parts, error, message):
    with pytest.raises(error, match=message):
        Stack(*parts)


def test_two_texts_are_refused(clip):
    with pytest.raises(ValueError, match="only the base of a stack may hold class texts"):
        Stack(prompt(), prompt(2)).class_weights(clip, NAMES)


def test_a_part_of_another_kind_in_a_file_is_refused(tmp_path):
    three().save(tmp_path)
    file = tmp_path / "solution.json"
    file.write_text(file.read_text().replace('"kind": "map"', '"kind": "code"'))
    with pytest.raises(ValueError, match="kind must be one of .*, got 'code'"):
        load_solution(tmp_path)


def test_in_space_embedding_a_line_leads_from_any_base_to_its_stack(clip):
    """Class embeddings and image features are interpolated, whatever solution they come from."""
    ends, features = (prompt(2), three()), cache()
    found = path(clip, *ends, features, points=3)
    expected = [evaluate(clip, end, features).accuracy for end in ends]
    assert [found.accuracy[0], found.accuracy[-1]] == pytest.approx(expected)
    with pytest.raises(TypeError, match="solutions on one path must be of one kind, got prompt and stack"):
        path(clip, *ends, features, points=3, space="parameter")
    with pytest.raises(TypeError, match="must be of one kind, got head and stack"):  # of another logit scale
        path(clip, head(), three(), features, points=3)


# -- what a stack must not do in silence -------------------------------------------------------------------------------


def test_another_base_with_the_same_tensors_is_another_run(clip, tmp_path):
    """Class names and scales of a base are part of what a run depends on."""
    common = {"method": "residual", "epochs": 2, "progress": False, "resume": tmp_path}
    tune(clip, cache(), base=Stack(Templates(), Residual(residual().rows, NAMES)), **common)
    with pytest.raises(ValueError, match="holds another run: another base: stack in both, but with other contents"):
        tune(clip, cache(), base=Stack(Templates(), Residual(residual().rows, NAMES[::-1])), **common)


@pytest.mark.parametrize("change", [{"normalize": False}, {"logit_scale": 5.0}])
def test_another_way_to_use_the_same_rows_is_another_run(clip, tmp_path, change):
    """Also of a head that fit goes on from: a cosine classifier's scale is not in its rows."""
    tuned = replace(head(bias=False), normalize=True)
    common = {"epochs": 2, "progress": False, "resume": tmp_path, "zero_shot": tuned, "tau": 1.0}
    fit(clip, cache(), tuned, **common)
    other = replace(tuned, **change)
    with pytest.raises(ValueError, match="holds another run: another "):
        fit(clip, cache(), other, **common | {"zero_shot": other})


def test_a_head_stands_only_at_the_base(clip):
    for parts in ((prompt(), head()), (residual(), head())):
        with pytest.raises(ValueError, match="only the base of a stack may hold rows instead of class embeddings"):
            Stack(*parts).class_weights(clip, NAMES)


def test_a_frozen_map_stays_below_paths_curvature_and_merging(clip):
    """As if the residuals were on features that were mapped before."""
    features, below = cache(), linear_map()
    mapped = FeatureCache.from_tensors(F.normalize(features.tensor() @ below.matrix, dim=-1), features.labels, NAMES)
    a, b = (Stack(prompt(), below, residual(seed)) for seed in (1, 2))
    plain = [Stack(prompt(), residual(seed)) for seed in (1, 2)]
    for space in ("embedding", "parameter"):
        found = path(clip, a, b, features, points=3, space=space)
        expected = path(clip, *plain, mapped, points=3, space=space)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    v = np.random.default_rng(0).standard_normal(24)
    found, expected = (hessian(clip, *pair, space="parameter") @ v for pair in ((a, features), (plain[0], mapped)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())
    merged = [
        merge_solutions("fisher_average", experts, clip=clip, features=images)
        for experts, images in (([a, b], features), (plain, mapped))
    ]
    torch.testing.assert_close(merged[0].top.rows, merged[1].top.rows, atol=1e-5, rtol=1e-4)


def test_features_of_another_width_are_refused(clip):
    narrow = cache(dim=7)
    with pytest.raises(ValueError, match="features must have the embedding's width 8, got 7"):
        evaluate(clip, Stack(Templates(), residual()), narrow)


def test_nothing_to_train_is_refused(clip):
    with pytest.raises(ValueError, match="tuned must have a state to train, got templates"):
        fit(clip, cache(), Templates(), progress=False)
    with pytest.raises(ValueError, match="zero_shot must be None where base is given"):
        tune(clip, cache(), method="map", base=Templates(), zero_shot="a {}.", progress=False)


def test_a_residual_of_none_of_the_classes_is_not_exported(clip, tmp_path):
    with pytest.raises(ValueError, match="classnames must contain a class of the residual"):
        to_head(Stack(prompt(), residual()), tmp_path / "head.npz", clip=clip, classnames=("lion", "tiger"))


def test_a_file_with_a_tensor_of_no_part_is_refused(tmp_path):
    three().save(tmp_path)
    tensors = load_file(tmp_path / "solution.safetensors") | {"other.rows": torch.zeros(2)}
    content = serialize(tensors)
    (tmp_path / "solution.safetensors").write_bytes(content)
    described = json.loads((tmp_path / "solution.json").read_text())
    described["sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "solution.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="belong to a part of the stack, got 'other.rows'"):
        load_solution(tmp_path)
