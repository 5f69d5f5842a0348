"""The Fisher diagonal H of the second-order surrogate of the zero-shot path."""

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
    """Diagonal of the Fisher (Gauss-Newton) matrix of a zero-shot classifier's cross-entropy, on unlabelled features.

    With the class probabilities p of the classifier, ``h[c, d] = scale^2 * mean_x p_c (1 - p_c) x_d^2``. Labels are not
    used: the expectation over labels is taken under p.

    Args:
        features: image features x; a tensor must be [N, D].
        w1: class weights of the zero-shot solution, [C, D].
        scale: logit scale.
        normalize: whether class weights are scaled to unit norm before the product.
        unit_mean: divide h by its mean over classes and dimensions, so that ``lam`` of :func:`mergetune.fit` has the
            same meaning for all surrogates. False returns h, which merging needs.
        batch_size: images per batch.

    Returns:
        h, [C, D] float32.

    Raises:
        ValueError: ``unit_mean`` is set and h is 0, because the classifier is certain of every image.

    Example:
        >>> import mergetune as mt, torch
        >>> h = mt.fisher_diagonal(torch.eye(3), torch.eye(3)[:2], scale=10.0)
        >>> h.shape, round(h.mean().item(), 4)
        (torch.Size([2, 3]), 1.0)
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
