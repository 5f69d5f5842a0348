"""The Fisher diagonal."""

import pytest
import torch
from objective_cases import CLASSES, NAMES, WIDTH, draw, fisher_by_hand, unit
from torch import Tensor

from mergetune import FeatureCache, fisher_diagonal


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_fisher_diagonal_is_its_formula(bias, normalize):
    x, w1 = unit(draw(17, WIDTH, seed=1)), draw(CLASSES, WIDTH + bias, seed=2)
    got = fisher_diagonal(x, w1, scale=3.0, normalize=normalize)
    assert got.dtype == torch.float32
    assert got.mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(got.double(), fisher_by_hand(x, w1, 3.0, normalize), rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_fisher_diagonal_as_a_mean_over_images(bias):
    x, w1 = unit(draw(17, WIDTH, seed=1)), draw(CLASSES, WIDTH + bias, seed=2)
    got = fisher_diagonal(x, w1, scale=3.0, normalize=False, unit_mean=False, batch_size=5)
    expected = fisher_by_hand(x, w1, 3.0, False, unit_mean=False)
    assert got.dtype == torch.float32 and not 0.5 < expected.mean() < 2
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=0)


def test_fisher_diagonal_of_a_cache_in_batches():
    x, w1 = unit(draw(17, WIDTH, seed=1)), draw(CLASSES, WIDTH, seed=2)
    cache = FeatureCache.from_tensors(x.float(), torch.arange(17) % CLASSES, NAMES)
    for batch_size in (1, 5, 17, 100):
        got = fisher_diagonal(cache, w1, scale=3.0, batch_size=batch_size)
        assert torch.allclose(got.double(), fisher_by_hand(x, w1, 3.0, True), rtol=1e-5)


def test_fisher_diagonal_is_that_of_the_exact_hessian():
    """Of the cross-entropy that the classifier itself expects, in the weights that meet the features."""
    x, w1, scale = unit(draw(17, WIDTH, seed=1)), draw(CLASSES, WIDTH, seed=2), 3.0
    labels = (scale * x @ w1.T).softmax(1)

    def expected_loss(w: Tensor) -> Tensor:
        return -(labels * (scale * x @ w.T).log_softmax(1)).sum(1).mean()

    hessian = torch.func.hessian(expected_loss)(w1).flatten(2).flatten(0, 1)
    diagonal = hessian.diagonal().view_as(w1)
    got = fisher_diagonal(x, w1, scale=scale, normalize=False)
    assert torch.allclose(got.double(), diagonal / diagonal.mean(), rtol=1e-5)


def test_fisher_diagonal_of_a_certain_classifier_is_refused():
    x = torch.eye(3).repeat(2, 1)
    with pytest.raises(
        ValueError, match="the Fisher diagonal must have a positive mean, got 0.0: use surrogate='identity'"
    ):
        fisher_diagonal(x, torch.eye(3), scale=1e4)
    assert torch.equal(fisher_diagonal(x, torch.eye(3), scale=1e4, unit_mean=False), torch.zeros(3, 3))
