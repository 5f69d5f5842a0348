"""Benchmark of the LMC loss with gradient, against a plain or compiled loop over the path points and lower bounds.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from measure import BATCHES, DEVICE, TASKS, WIDTH, Work, compare
from torch import Tensor

from mergetune import ops

SCALE, LAM, BETA = 100.0, 8.0, 0.5
BACKEND = None if DEVICE == "cpu" or "cuda" not in ops.available_backends() else "cuda"


@dataclass(frozen=True)
class Case:
    """A batch of features, and class weights with distances like those between prompts."""

    batch: int = 256
    classes: int = 500
    points: int = 8
    anchors: int = 2

    @property
    def title(self) -> str:
        return f"lmc_loss, B {self.batch}, C {self.classes}, D {WIDTH}, N {self.points}, K {self.anchors}"

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        """x, labels, w, anchors, w1, alphas, betas."""
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, WIDTH, generator=generator)  # noqa: E731
        w1 = draw(self.classes)
        w, anchors = w1 + 0.3 * draw(self.classes), w1 + 0.5 * draw(self.anchors, self.classes)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        x = F.normalize(F.normalize(w1, dim=-1)[labels] + 0.1 * draw(self.batch), dim=-1)
        alphas, betas = torch.arange(self.points) / self.points, torch.full((self.anchors,), BETA)
        return tuple(t.to(DEVICE) for t in (x, labels, w, anchors, w1, alphas, betas))

    def fused(self, anchor_dots: Tensor | None = None, backend: str | None = BACKEND) -> Tensor:
        x, labels, w, anchors, w1, alphas, betas = self.data
        leaf, more = w.detach().requires_grad_(), {"anchor_dots": anchor_dots, "backend": backend}
        loss, _ = ops.lmc_loss(x, labels, leaf, anchors, alphas, betas, scale=SCALE, w1=w1, lam=LAM, **more)
        loss.backward()
        return leaf.grad

    def loop(self, loss: Work | None = None) -> Work:
        """A function that computes the gradient of :func:`naive_loss`, or of ``loss``."""
        x, labels, w, anchors, w1, alphas, betas = self.data
        points, weights, loss = alphas.tolist(), betas.tolist(), loss or naive_loss

        def run() -> Tensor:
            leaf = w.detach().requires_grad_()
            loss(x, labels, leaf, anchors, w1, points, weights).backward()
            return leaf.grad

        return run

    def floors(self) -> dict[str, Work]:
        x, _, w, anchors, *_ = self.data
        ends = [w, *anchors]
        dots = x.new_empty(len(ends), self.batch, self.classes)
        d_dots, grad = torch.randn_like(dots[0]), torch.empty_like(w)
        moved = (len(dots) + 1) * d_dots.numel()  # the pass reads every product and writes one gradient
        source = x.new_zeros(moved // 2)
        target, powers = torch.empty_like(source), torch.empty_like(d_dots)

        def gemms() -> None:
            for end, out in zip(ends, dots, strict=True):
                torch.mm(x, end.T, out=out)
            torch.mm(d_dots.T, x, out=grad)

        def exponentials() -> None:
            for _ in range(1 + self.points * self.anchors):
                torch.exp(d_dots, out=powers)

        return {
            "its GEMMs": gemms,
            "copying what its pass moves": lambda: target.copy_(source),
            "torch.exp of every logit": exponentials,
        }


def naive_loss(
    x: Tensor, labels: Tensor, w: Tensor, anchors: Tensor, w1: Tensor, points: list[float], weights: list[float]
) -> Tensor:
    """The objective as the paper writes it, with one cross-entropy per path point."""
    loss = F.cross_entropy(SCALE * x @ F.normalize(w, dim=-1).T, labels)
    loss = loss + LAM * (1 - F.cosine_similarity(w, w1, dim=-1)).mean()
    for anchor, weight in zip(anchors, weights, strict=True):
        for point in points:
            mixed = F.normalize(anchor + point * (w - anchor), dim=-1)
            loss = loss + weight / len(points) * F.cross_entropy(SCALE * x @ mixed.T, labels)
    return loss


def test_forward_and_gradient(benchmark) -> None:
    case = Case()
    naive, compiled = case.loop(), case.loop(torch.compile(naive_loss))
    expected = naive()
    for gradient in (case.fused(), compiled() if benchmark.enabled else expected):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()
    compare(
        benchmark,
        case.title,
        case.fused,
        baselines={"a loop over the points": naive, "torch.compile of the loop": compiled},
        floors=case.floors(),
        rounds=31,
    )


def test_more_points(benchmark) -> None:
    """16 points should take little more time than one, because the products are shared."""
    many, one = Case(points=16, anchors=1), Case(points=1, anchors=1)
    compare(benchmark, many.title, many.fused, floors={"N 1": one.fused, **many.floors()}, rounds=31)


def test_anchors_known(benchmark) -> None:
    """Times the loss with given products of features and anchors, which do not change during training."""
    case = Case()
    x, _, _, anchors, *_ = case.data
    dots = x @ anchors.mT
    compare(
        benchmark,
        f"{case.title}, anchors' products given",
        lambda: case.fused(dots),
        baselines={"making them": case.fused, "a loop over the points": case.loop()},
        rounds=31,
    )


def test_memory(benchmark) -> None:
    """Measures memory with a large batch: logits for every point, [P, B, C], would take 133 MiB, products take 16."""
    case = Case(batch=4096, points=16, anchors=1)
    logits = 4 * case.batch * case.classes * (1 + case.points * case.anchors)
    baselines = {"a loop over the points": case.loop()}
    compare(benchmark, case.title, case.fused, baselines=baselines, rounds=3, one_logit_per_point_bytes=logits)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_tasks(benchmark, task: str, batch: int) -> None:
    """Times the paper's setting, N = 5 and one anchor, for all tasks and batch sizes."""
    case = Case(batch=batch, classes=TASKS[task], points=5, anchors=1)
    compare(benchmark, case.title, case.fused, floors=case.floors(), memory=False)
