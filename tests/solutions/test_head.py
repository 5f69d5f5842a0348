"""Heads: their weights, scales and biases."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from solution_cases import KINDS, TEMPLATE, assert_same, make
from tiny import NAMES, cache, normal, parameter, with_parameter

from mergetune import Head, fit, interpolate, merge_solutions


@pytest.mark.parametrize("bias", [False, True])
def test_zero_shot_head(clip, bias):
    head = Head.zero_shot(clip, NAMES, [TEMPLATE, "the {}"], bias=bias)
    assert torch.equal(head.weight, clip.class_embeddings(NAMES, [TEMPLATE, "the {}"]))
    assert head.logit_scale == clip.logit_scale and (head.bias is not None) == bias
    assert (head.backbone, head.fingerprint) == (clip.name, clip.image_fingerprint)
    assert parameter(head).shape == (3, 9 if bias else 8)


@pytest.mark.parametrize("kind", ["head", "head with bias"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 0.03])
def test_rescaled_keeps_the_logits(clip, kind, scale):
    head, x = make(clip, kind), F.normalize(normal(5, 8, seed=2), dim=-1)

    def logits(head):
        return head.logit_scale * (x @ head.weight.T + (0 if head.bias is None else head.bias))

    rescaled = head.rescaled(scale)
    assert rescaled.logit_scale == scale and rescaled.notes == head.notes
    torch.testing.assert_close(logits(rescaled), logits(head))


@pytest.mark.parametrize("kind", ["head", "head with bias"])
def test_rows_of_a_head_go_by_name(clip, kind):
    head = make(clip, kind)
    assert torch.equal(head.class_weights(clip, ("dog", "cat")), parameter(head)[[2, 0]])
    torch.testing.assert_close(head.class_embeddings(clip, ("dog",)), F.normalize(head.weight[2:], dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_with_parameter_is_a_copy_of_what_is_given(clip, kind):
    solution = make(clip, kind)
    values = normal(*parameter(solution).shape, seed=7).double()
    changed = with_parameter(solution, values, notes={})
    assert torch.equal(parameter(changed), values.float()) and changed.notes == {}
    values.zero_()
    assert parameter(changed).abs().sum() > 0
    assert_same(with_parameter(solution, parameter(solution)), solution)


def test_two_classes_may_have_one_name(clip):
    """CLIP's names for ImageNet have "missile" and "sunglasses" twice."""
    names = ("cat", "dog", "cat")
    prompt = make(clip, "shared").class_embeddings(clip, names)
    assert torch.equal(prompt[0], prompt[2])
    head = replace(make(clip, "head"), classnames=names)
    assert torch.equal(head.class_weights(clip, names), parameter(head))
    assert torch.equal(head.class_weights(clip, ("dog", "cat")), parameter(head)[[1, 0]])  # the first of the two


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weight": torch.full((3, 8), float("inf"))}, ValueError, "weight must be finite"),
        ({"weight": torch.zeros(3, 8).long()}, TypeError, "weight must be floating point"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have shape \[C, D\], got \[3\]"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \[C\] = \[3\], got \[2\]"),
        ({"bias": torch.full((3,), float("nan"))}, ValueError, "bias must be finite"),
        ({"classnames": ("a", "b")}, ValueError, "must name the 3 classes of weight, got 2"),
        ({"classnames": ("a", "b", "")}, ValueError, "must be non-empty texts"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be positive"),
    ],
)
def test_heads_that_make_no_sense_are_refused(changes, error, match):
    with pytest.raises(error, match=match):
        Head(**{"weight": torch.zeros(3, 8), "classnames": NAMES, **changes})


@pytest.mark.parametrize("kind", ["head", "head with bias"])
def test_heads_in_another_class_order_are_one_head(clip, kind):
    """Lines, merges and stage 2 go by class name, and not by row."""
    head = make(clip, kind)
    other = head.in_order_of(NAMES[::-1]).rescaled(25.0)
    assert other.classnames == NAMES[::-1] and head.in_order_of(NAMES) is head
    assert_same(other.in_form_of(head), head)
    assert_same(interpolate(other, head, 0.5), head)
    assert torch.equal(parameter(merge_solutions("average", [head, other])), parameter(head))
    assert head.in_order_of(("cat", "dog")) is head is head.in_order_of(("cat", "cat", "dog"))
    x = cache(12)
    one, two = (fit(clip, x, tuned, epochs=1, precision="float32", progress=False) for tuned in (head, other))
    torch.testing.assert_close(parameter(two.solution), parameter(one.solution))
