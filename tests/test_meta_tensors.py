"""Tensors without numbers, on the device meta, are refused by name wherever tensors are taken."""

from collections.abc import Callable

import pytest
import torch
from tiny import NAMES, cache, head, normal, prompt, tiny_clip
from torch import Tensor

import mergetune as mt
from mergetune import ops

Call = Callable[..., object]
LABELS = torch.tensor([0, 1, 2, 0])
LOSS = {
    "x": normal(4, 8), "labels": LABELS, "w": normal(3, 8), "anchors": normal(1, 3, 8), "alphas": torch.tensor([0.5]),
    "betas": torch.ones(1), "w1": normal(3, 8), "curvature": normal(3, 8).abs(), "anchor_dots": normal(1, 4, 3),
}  # fmt: skip
PATH = {
    "dots": normal(2, 4, 3), "labels": LABELS, "anchor": torch.tensor([0]), "alpha": torch.tensor([0.5]),
    "weight": torch.ones(1), "rscale": torch.ones(1, 3),
}  # fmt: skip
ROWS = {name: normal(1, 5, 2, 4) for name in ("q", "k", "v", "prefix_k", "prefix_v")}
FUNCTIONS: dict[str, tuple[Call, dict[str, Tensor]]] = {
    "lmc_loss": (lambda **given: ops.lmc_loss(**given, scale=10.0), LOSS),
    "lmc_loss by torch": (lambda **given: ops.lmc_loss(**given, scale=10.0, backend="torch"), LOSS),
    "path_cross_entropy": (ops.path_cross_entropy, PATH),
    "prefix_attention": (lambda **given: ops.prefix_attention(**given, lengths=[5]), ROWS),
    "prefix_attention by torch": (lambda **given: ops.prefix_attention(**given, lengths=[5], backend="torch"), ROWS),
    "prefix_attention_backward": (
        lambda **given: ops.prefix_attention_backward(**given, lengths=[5]), {"d_out": normal(1, 5, 2, 4), **ROWS}
    ),
    "merge_deltas": (
        lambda values, kept: ops.merge_deltas(None, [values], [1.0], kept=kept),
        {"values": normal(6), "kept": torch.ones(1, 6, dtype=torch.bool)},
    ),
    "count_around": (lambda values: ops.count_around(values, 0.0, 1.0), {"values": normal(6)}),
    "from_tensors": (
        lambda **given: mt.FeatureCache.from_tensors(**given, classnames=["a"], normalize=True),
        {"features": normal(2, 8), "labels": torch.zeros(2, dtype=torch.int64)},
    ),
    "head": (lambda **given: mt.Head(classnames=NAMES, **given), {"weight": normal(3, 8), "bias": normal(3)}),
    "prompt": (lambda ctx: mt.Prompt(ctx, "X X X X {}."), {"ctx": normal(4, 16)}),
    "residual": (lambda rows: mt.Residual(rows, NAMES), {"rows": normal(3, 8)}),
    "map": (mt.LinearMap, {"matrix": torch.eye(8)}),
    "with_state": (lambda ctx: prompt().with_state({"ctx": ctx}), {"ctx": normal(4, 16)}),
    "accuracy": (lambda weights: mt.accuracy(weights, cache()), {"weights": normal(3, 8)}),
    "logits": (lambda x: mt.classifier(tiny_clip(), head()).logits(NAMES, x), {"x": normal(2, 8)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_on_meta_is_refused_by_the_name_of_its_argument(name):
    call, given = FUNCTIONS[name]
    for argument, tensor in given.items():
        named = "values" if argument == "values" else argument
        with pytest.raises(ValueError, match=rf"^{named} must .*on the device meta, which has no"):
            call(**given | {argument: tensor.to("meta")})
