"""The curvature of a zero-shot classifier's loss: the surrogate's Fisher diagonal, and the unit of a head's lam."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.data import Batches
from mergetune.solutions import inputs

LAM_UNIT = 32.0
"""Factor in the unit of a head's ``lam``, with which 8 is a good default; fixed on icons, see docs/method.md."""


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


@torch.no_grad()
def curvature_trace(features: Batches, w1: Tensor, *, scale: float, batch_size: int = 4096) -> float:
    """Trace of the Hessian of a linear classifier's mean cross-entropy in its class weights, in closed form.

    With the class probabilities p of an image x, the Hessian of the image's loss is the Kronecker product
    ``scale^2 (diag(p) - p p^T) (x) x x^T``. It does not depend on the label, so it equals the Gauss-Newton matrix. Its
    trace is ``scale^2 * sum_c p_c (1 - p_c) * |x|^2``. One pass over the images gives the mean; nothing is derived.

    Args:
        features: images with features x; labels are not used.
        w1: class weights, [C, D]; or [C, D + 1] with a bias in the last column, and then x ends with 1.
        scale: logit scale.
        batch_size: images per batch.

    Example:
        >>> import mergetune as mt, torch
        >>> from mergetune.training.curvature import curvature_trace
        >>> features = mt.FeatureCache.from_tensors(torch.eye(2), [0, 1], ["cat", "dog"])
        >>> curvature_trace(features, torch.zeros(2, 2), scale=10.0)  # p = 1/2: 100 * (1/4 + 1/4)
        50.0
    """
    total, weights = 0.0, w1.double()
    for rows, _, _ in features.batches(batch_size):
        x = inputs(rows.to(weights), weights)
        p = (scale * x @ weights.T).softmax(-1)
        total += ((p * (1 - p)).sum(-1) * x.square().sum(-1)).sum().item()
    return scale**2 * total / len(features)


def head_lam(lam: float, features: Batches, w1: Tensor, *, scale: float) -> float:
    """The weight of a head's surrogate: ``lam * LAM_UNIT * tr H(w1) / (C D)``, to six digits.

    The rows of a head have a free length: its logits are ``s x . w``, and a head with the rows ``k w`` and the scale
    ``s / k`` is the same classifier, with a k^2 times as large distance between rows. The trace of H is k^2 times
    smaller, so with this weight the surrogate is the same for both. It also follows the classifier's own certainty.

    Args:
        lam: the number that the user gives.
        features, w1, scale: see :func:`curvature_trace`.
    """
    weight = lam * LAM_UNIT * curvature_trace(features, w1, scale=scale) / w1.numel()
    return float(f"{weight:.6g}")  # rounded: a run that continues with other threads must find the same number
