"""Self-test of the ops: compares each default backend with the definition on a small random case in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergetune.ops.attention import prefix_attention
from mergetune.ops.path_loss import lmc_loss, path_cross_entropy
from mergetune.ops.task_vectors import count_around, merge_deltas


def self_test() -> dict[str, float]:
    """Name of each op -> largest relative difference from its definition, on a small random float64 case on the CPU."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, labels = torch.nn.functional.normalize(draw(33, 24), dim=-1), torch.arange(33) % 7
    w, anchors, w1, rscale = draw(7, 24), draw(2, 7, 24), draw(7, 24), draw(5, 7).abs()
    alphas, betas = torch.tensor([0.0, 0.4]), torch.tensor([0.5, 2.0])
    heads = [draw(2, rows, 3, 8) for rows in (8, 8, 8, 5, 5)]
    points = (
        torch.tensor([0, 1, 1, 2, 2]),
        torch.tensor([1.0, 0.0, 0.4, 0.0, 0.4]),
        torch.tensor([1.0, 0.3, 0.3, 1.0, 1.0]),
    )

    def lmc(backend: str | None) -> Tensor:
        leaf = w.clone().requires_grad_()
        loss, terms = lmc_loss(x, labels, leaf, anchors, alphas, betas, scale=10.0, w1=w1, lam=4.0, backend=backend)
        return torch.cat([torch.autograd.grad(loss, leaf)[0].flatten(), terms])

    def rows(backend: str | None) -> Tensor:
        dots = x @ torch.cat([w[None], anchors]).mT
        return torch.cat([t.flatten() for t in path_cross_entropy(dots, labels, *points, rscale, backend=backend)])

    def attention(backend: str | None) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in heads]
        out = prefix_attention(*leaves, lengths=(1, 2, 2, 3), backend=backend)
        return torch.cat([t.flatten() for t in (out, *torch.autograd.grad(out.square().sum(), leaves))])

    def merging(backend: str | None) -> Tensor:
        experts, limits = draw(3, 999).unbind(), [0.1, 0.2, 0.3]
        return merge_deltas(
            draw(999), experts, [1, 2, 0.5], limits=limits, vote="sum", shares=[1, 1, 1], backend=backend
        )

    def counting(backend: str | None) -> Tensor:
        counts, between = count_around(draw(999), 0.1, 0.7, base=draw(999), backend=backend)
        return torch.cat([torch.tensor(counts), between])

    def apart(run: Callable[[str | None], Tensor]) -> float:
        found = []
        for backend in (None, "torch"):
            generator.manual_seed(1)
            found.append(run(backend))
        return ((found[0] - found[1]).abs().max() / found[1].abs().max()).item()

    runs = {"lmc_loss": lmc, "path_cross_entropy": rows, "prefix_attention": attention}
    return {name: apart(run) for name, run in (runs | {"merge_deltas": merging, "count_around": counting}).items()}
