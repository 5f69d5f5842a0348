"""Plain-torch definition of every op: the specification with which implementations are compared.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path, P all points (endpoint and paths),
M prompts encoded together, T packed tokens, H heads. For merging: K experts, n elements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lmc_loss(
    x: Tensor,
    labels: Tensor,
    w: Tensor,
    anchors: Tensor,
    alphas: Tensor,
    betas: Tensor,
    *,
    scale: float,
    w1: Tensor | None = None,
    curvature: Tensor | None = None,
    lam: float = 0.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """The LMC objective (arXiv 2601.10497): loss of w, surrogate loss to w1, and loss on the paths to the anchors.

    ``loss = CE(w) + lam * S(w; w1) + sum_k betas[k] * mean_n CE(anchors[k] + alphas[n] * (w - anchors[k]))``. CE(t) is
    the cross-entropy of the logits ``scale * x @ unit(t).T``. With ``normalize``, ``unit`` scales every row to unit
    norm, so points on a path are normalised *after* the interpolation (official code: trainers/kgcoop_coop_LMC.py);
    otherwise ``unit`` changes nothing. The surrogate is
    ``S(w; w1) = 1/2 mean_c sum_d curvature[c,d] (unit(w) - unit(w1))[c,d]^2``, which is the official
    ``mean_c (1 - cos)`` with ``normalize`` and without a curvature.

    Args:
        x: image features, [B, D].
        labels: class of each image, int64 [B].
        w: class weights of the trained solution, [C, D].
        anchors: class weights of the fine-tuned solutions, [K, C, D]; K may be 0.
        alphas: points on each path, [N]; 0 is the anchor, 1 is w.
        betas: weight of each path, [K].
        scale: logit scale.
        w1: class weights of the zero-shot solution, [C, D]; None leaves S out.
        curvature: diagonal of the curvature matrix, [C, D]; None is the identity.
        lam: weight of S.
        normalize: True for class embeddings, which have unit norm per class; False for heads.

    Returns:
        The loss, and its terms without their weights: [2 + K] = (CE(w), S, mean CE on each path).
    """
    unit = (lambda t: F.normalize(t, dim=-1)) if normalize else (lambda t: t)

    def cross_entropy(t: Tensor) -> Tensor:
        return F.cross_entropy(scale * x @ unit(t).T, labels)

    surrogate = w.new_zeros(())
    if w1 is not None:
        squares = (unit(w) - unit(w1)) ** 2
        surrogate = 0.5 * (squares if curvature is None else curvature * squares).sum(-1).mean()
    paths = [torch.stack([cross_entropy(a + t * (w - a)) for t in alphas]).mean() for a in anchors]
    terms = torch.stack([cross_entropy(w), surrogate, *paths])
    weights = torch.cat([terms.new_tensor([1.0, lam]), betas.to(terms)])
    return (weights * terms).sum(), terms.detach()


def path_cross_entropy(
    dots: Tensor, labels: Tensor, anchor: Tensor, alpha: Tensor, weight: Tensor, rscale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of P points on straight paths, and its gradients, from the products of features and path ends.

    The logits of point p are ``((1 - alpha[p]) * dots[anchor[p]] + alpha[p] * dots[0]) * rscale[p]``.

    Args:
        dots: ``x @ w.T``, followed by ``x @ anchors[k].T``, [K + 1, B, C].
        labels: class of each image, int64 [B].
        anchor: index in ``dots`` of the end where each point's path starts, int64 [P]; 0 is w.
        alpha: position of each point on its path, float64 [P].
        weight: weight of each point in the total loss, float64 [P].
        rscale: logit scale divided by the norm of the interpolated class weight, [P, C].

    Returns:
        Mean cross-entropy of each point, float64 [P], and the gradients of the weighted total with respect to
        ``dots[0]``, [B, C], and to ``rscale``, [P, C].
    """
    with torch.enable_grad():
        dots_w, rscale = dots[0].detach().requires_grad_(), rscale.detach().requires_grad_()
        losses = []
        for p in range(len(anchor)):
            a = alpha[p].to(dots)
            start = dots_w if anchor[p] == 0 else dots[anchor[p]].detach()
            mixed = dots_w if a == 1 else (1 - a) * start + a * dots_w
            losses.append(F.cross_entropy(mixed * rscale[p], labels))
        loss = torch.stack(losses).double()
        d_dots, d_rscale = torch.autograd.grad((weight.to(loss) * loss).sum(), (dots_w, rscale))
    return loss.detach(), d_dots, d_rscale


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool = True,
) -> Tensor:
    """Attention of packed sequences that all begin with the same prefix.

    Every query attends to the whole prefix of its prompt and to its sequence: if causal, up to the query's token, else
    to all tokens of the sequence.

    Args:
        q: queries of the sequences, one sequence after the other, [M, T, H, d]; or only the query of each sequence's
            last token, [M, len(lengths), H, d].
        k, v: keys and values of the sequences, [M, T, H, d] with T = sum(lengths).
        prefix_k, prefix_v: keys and values of the prefix of each prompt, [M, S, H, d]; S may be 0.
        lengths: length of each sequence. Adjacent sequences of equal length are computed together, so sort by length.
        causal: whether a token attends only to itself and to earlier tokens of its sequence.

    Returns:
        The attention output, in the shape of q.
    """
    total, last_only = sum(lengths), q.shape[1] == len(lengths) != sum(lengths)
    if k.shape[1] != total or (q.shape[1] != total and not last_only):
        raise ValueError(
            f"lengths must sum to the packed tokens, got {total} for q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    runs = _runs(lengths)
    rows = [length * count for length, count in runs]
    query_rows = [count for _, count in runs] if last_only else rows
    # each run is [M, C, H, n, d]; the prefix is [M, 1, H, S, d]
    split = lambda t, sizes: [  # noqa: E731
        part.unflatten(1, (count, -1)).transpose(2, 3) for part, (_, count) in zip(t.split(sizes, 1), runs, strict=True)
    ]
    prefix_k, prefix_v = prefix_k.transpose(1, 2).unsqueeze(1), prefix_v.transpose(1, 2).unsqueeze(1)
    size, out = prefix_k.shape[-2], []
    for q_run, k_run, v_run in zip(split(q, query_rows), split(k, rows), split(v, rows), strict=True):
        q_run = q_run * q.shape[-1] ** -0.5
        own = q_run @ k_run.transpose(-1, -2)
        if causal:
            n_q, n_k = own.shape[-2:]
            own = own.masked_fill(
                torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).triu(n_k - n_q + 1), float("-inf")
            )
        scores = torch.cat([q_run @ prefix_k.transpose(-1, -2), own], -1).softmax(-1)
        mixed = scores[..., :size] @ prefix_v + scores[..., size:] @ v_run
        out.append(mixed.transpose(2, 3).flatten(1, 2))
    return torch.cat(out, 1)


def _runs(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(length, count) of each run of equal lengths."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


def merge_deltas(
    base: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    *,
    scale: float = 1.0,
    limits: Tensor | None = None,
    kept: Tensor | None = None,
    vote: str | None = None,
    votes: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Merges task vectors: trims or masks them, elects a sign per element, and adds the deltas with this sign.

    The result is ``base + scale * sum_k weights[k] delta[k] / divisor`` over the deltas of the elected sign (TIES,
    arXiv 2306.01708). The divisor is the sum of the shares of these experts, or 1 if that sum is 0. Without a vote all
    deltas are added and not divided.

    Args:
        base: [n]. None means that the experts are the deltas and that the result is the scaled sum alone.
        experts: [K, n]; delta = expert - base.
        weights: weight of each expert, [K].
        scale: factor of the sum that is added to the base.
        limits: smallest magnitude of each expert that is kept, [K]; smaller deltas count as 0.
        kept: bool [K, n]; deltas count as 0 where False.
        vote: elects the sign of the "sum" of the deltas, or of the sum of their signs ("count"); 0 elects plus. None
            elects no sign.
        votes: weight of each expert in the election, [K]; None is 1.
        shares: contribution of each expert of the elected sign to the divisor, [K]; None does not divide.

    Returns:
        Merged tensor, [n]. A NaN delta always gives NaN; an infinite delta has no effect where its sign is not elected.
    """
    delta = experts if base is None else experts - base
    if limits is not None:
        delta = delta.masked_fill(delta.abs() < limits[:, None], 0)
    if kept is not None:
        delta = delta.masked_fill(~kept, 0)
    column = lambda values: values.to(delta)[:, None]  # noqa: E731
    against, divisor = torch.zeros_like(delta, dtype=torch.bool), None
    if vote is not None:
        ballots = delta if vote == "sum" else delta.sign()
        elected = (ballots if votes is None else column(votes) * ballots).sum(0)
        against = torch.where(elected >= 0, delta, -delta) <= 0
        if shares is not None:
            divisor = column(shares).expand_as(delta).masked_fill(against, 0).sum(0)
    merged = (column(weights) * delta).masked_fill(against, 0).sum(0)
    if divisor is not None:
        merged = merged / torch.where(divisor == 0, 1, divisor)
    return scale * merged if base is None else base + scale * merged


def count_around(values: Tensor, low: float, high: float, *, base: Tensor | None = None) -> tuple[list[int], Tensor]:
    """Counts of values below ``low``, equal to ``low``, between the bounds, and equal to ``high``; and those between.

    Args:
        values: [n].
        low, high: bounds with low <= high; they may be infinite. If low equals high, the last count is 0.
        base: [n]; if given, the magnitudes of ``values - base`` are counted instead of the values.

    Returns:
        The four counts, without NaN values; and the values between the bounds in their order.
    """
    values = values if base is None else (values - base).abs()
    between = values[(values > low) & (values < high)]
    counts = (values < low).sum(), (values == low).sum(), between.numel(), (values == high).sum() * (low != high)
    return [int(count) for count in counts], between
