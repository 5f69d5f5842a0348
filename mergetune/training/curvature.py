"""Diagonals H for the second-order surrogate of the zero-shot path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.data import Batches
from mergetune.solutions import inputs


@torch.no_grad()
def fisher_diagonal(
    features: Batches | Tensor,
    w1: Tensor,
    *,
    scale: float,
    normalize: bool = True,
    unit_mean: bool = True,
    batch_size: int = 4096,
) -> Tensor:
    """Diagonal Gauss-Newton (Fisher) of the zero-shot classifier's cross-entropy, on unlabelled features.

    ``h[c, d] = scale^2 * mean_x p_c (1 - p_c) x_d^2``, for the surrogate normalised to mean 1, so that lam keeps its
    meaning. The labels are not used: the expectation over them is the classifier's own.

    Args:
        features: image features; a tensor is [N, D].
        w1: the zero-shot solution, [C, D].
        scale: logit scale.
        normalize: whether class weights are made unit norm before the product.
        unit_mean: divide h by its mean over classes and dimensions; False gives h itself, as merging wants it.
        batch_size: rows at a time.

    Returns:
        [C, D] float32.

    Raises:
        ValueError: the mean is to be 1, and the classifier is so sure of every image that its Fisher vanishes.
    """
    weights = (F.normalize(w1, dim=-1) if normalize else w1).float()
    total = torch.zeros_like(weights, dtype=torch.float64)
    if isinstance(features, Tensor):
        parts = iter(features.split(batch_size))
    else:
        parts = (rows for rows, _, _ in features.batches(batch_size))
    for part in parts:
        x = inputs(part.to(weights), weights)
        p = (scale * x @ weights.T).softmax(-1)
        total += ((p * (1 - p)).T @ x.square()).double()
    if not unit_mean:
        return (scale**2 / len(features) * total).float()
    mean = total.mean()
    if not mean > 0:
        raise ValueError(f"the Fisher diagonal must have a positive mean, got {mean.item()}: use surrogate='identity'")
    return (total / mean).float()
