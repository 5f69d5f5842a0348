"""tune() on a base: which classes the base and the top may know, beside those that are trained."""

import pytest
import torch
from tiny import NAMES, cache, normal, prompt

from mergetune import Head, Prompt, Residual, Stack, tune

PAIR = ("cat", "dog")  # two of NAMES
FEW = cache(20, classes=PAIR)


def unit_head() -> Head:
    return Head(normal(3, 8), NAMES, logit_scale=10.0, normalize=True)


@pytest.mark.parametrize("method", ["residual", "map"])
@pytest.mark.parametrize(
    "base",
    [unit_head(), Stack(prompt(), Residual(normal(1, 8), ("fire truck",)))],
    ids=["head of more classes", "residual of another class"],
)
def test_a_base_may_know_classes_that_are_not_trained(clip, method, base):
    solution = tune(clip, FEW, method=method, base=base, epochs=3, progress=False).solution
    moved = (solution.class_embeddings(clip, NAMES) - base.class_embeddings(clip, NAMES)).norm(dim=1)
    assert moved[NAMES.index("fire truck")] < 1e-6
    others = moved[[NAMES.index(name) for name in PAIR]]
    assert (others > 1e-4).all() if method == "residual" else (others < 1e-6).all()


def test_classes_without_rows_alone_are_those_of_the_base(clip):
    stack = Stack(prompt(), Residual(normal(2, 8), PAIR))
    alone = ("fire truck", "bird")
    torch.testing.assert_close(stack.class_embeddings(clip, alone), prompt().class_embeddings(clip, alone))


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (Head(normal(1, 8), ("cat",)), "among the head's 1 classes, got 'dog'"),
        (Prompt(torch.zeros(3, 4, 16), "X X X X {}.", NAMES), "the 3 classes of the solution in the same order, got 2"),
    ],
)
def test_a_base_must_serve_the_classes_that_are_trained(clip, base, match):
    with pytest.raises(ValueError, match=match):
        tune(clip, FEW, method="residual", base=base, epochs=1, progress=False)
