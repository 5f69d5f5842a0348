"""Stacks: order, state, files, lines, and what goes through them."""

import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, cache, head, normal, prompt, tiny_clip

from mergetune import (
    LinearMap,
    Residual,
    Stack,
    Templates,
    evaluate,
    interpolate,
    load_solution,
    merge_solutions,
    to_head,
    tune,
)
from mergetune.evaluation import classifier
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
    with pytest.raises(ValueError, match="made for .tiny-0, .* got tiny-1"):
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
