"""Plain-torch definition of every op: the specification that kernels are held to.

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
    """The LMC objective (arXiv 2601.10497), point by point.

    ``loss = CE(w) + lam * S(w; w1) + sum_k betas[k] * mean_n CE(anchors[k] + alphas[n] * (w - anchors[k]))``, where CE
    takes the logits ``scale * x @ t.T`` and t is the interpolated weight, made unit norm *after* the interpolation
    where ``normalize`` (official code: trainers/kgcoop_coop_LMC.py), and ``S = 1/2 mean_c sum_d curvature[c,d] (t -
    t1)[c,d]^2``. On unit norm and without a curvature, S is the official ``mean_c (1 - cos)``.

    Args:
        x: image features, [B, D].
        labels: class of each, int64 [B].
        w: what is searched, [C, D].
        anchors: fine-tuned solutions, [K, C, D]; K may be 0.
        alphas: points on each path, [N]; 0 is the anchor, 1 is w.
        betas: weight of each path, [K].
        scale: logit scale.
        w1: the zero-shot solution, [C, D]; None leaves S out.
        curvature: diagonal of H, [C, D]; None is the identity.
        lam: weight of S.
        normalize: unit norm per class, as for class embeddings; False for heads.

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
    """Cross-entropy of P points on straight paths, and its gradient, from the products with their ends.

    The logits of point p are ``((1 - alpha[p]) * dots[anchor[p]] + alpha[p] * dots[0]) * rscale[p]``.

    Args:
        dots: ``x @ w.T`` and then ``x @ anchors[k].T``, [K + 1, B, C].
        labels: int64 [B].
        anchor: which row of ``dots`` each path starts from, int64 [P].
        alpha: position on the path, float64 [P].
        weight: weight of each point in the total, float64 [P].
        rscale: logit scale over the norm of the interpolated class weight, [P, C].

    Returns:
        Mean cross-entropy of each point, float64 [P]; gradient of the weighted total to ``dots[0]``, [B, C]; and to
        ``rscale``, [P, C].
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

    Every query sees the whole prefix of its prompt, and of its own sequence what stands before it (all, if not causal).

    Args:
        q: the sequences' queries, one after the other, [M, T, H, d]; or only the last of each, [M, len(lengths), H, d].
        k, v: the sequences' keys and values, [M, T, H, d] with T = sum(lengths).
        prefix_k, prefix_v: the shared prefix of each prompt, [M, S, H, d]; S may be 0.
        lengths: length of each sequence. Runs of equal length are computed together, so sort them.

    Returns:
        Same shape as q.
    """
    total, last_only = sum(lengths), q.shape[1] == len(lengths) != sum(lengths)
    if k.shape[1] != total or (q.shape[1] != total and not last_only):
        raise ValueError(
            f"lengths must sum to the packed tokens, got {total} for q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    runs = _runs(lengths)
    rows = [length * count for length, count in runs]
    query_rows = [count for _, count in runs] if last_only else rows
    # [M, C, H, n, d] a run; the prefix is [M, 1, H, S, d]
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
    """Task vectors trimmed or masked, a sign elected for each element, its deltas added (TIES, arXiv 2306.01708).

    ``base + scale * sum_k weights[k] delta[k]`` over the deltas of the elected sign, divided by the sum of their shares
    where that is not 0. Without a vote all deltas are added and nothing is divided.

    Args:
        base: [n]; None: the experts are the deltas, and nothing is added to the result.
        experts: [K, n]; delta = expert - base.
        weights: [K].
        scale: of what is added to the base.
        limits: the least magnitude that is kept, [K]; smaller deltas count as 0.
        kept: False where a delta counts as 0, bool [K, n].
        vote: elects by the "sum" of deltas, or by the "count" of their signs; 0 elects plus.
        votes: weight of each expert in that, [K]; None is 1.
        shares: what each expert of the elected sign adds to the divisor, [K]; None divides by nothing.

    Returns:
        [n]. NaN is not hidden by an election; an infinite delta is where it is outvoted.
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
    """How many values lie below ``low``, equal it, lie between, equal ``high`` (0 if both are one); those between.

    Args:
        values: [n].
        low, high: may be infinite; low <= high.
        base: what is counted are the magnitudes of the differences from it, [n].

    Returns:
        Four counts, in which NaN is not; and the values between, in their order.
    """
    values = values if base is None else (values - base).abs()
    between = values[(values > low) & (values < high)]
    counts = (values < low).sum(), (values == low).sum(), between.numel(), (values == high).sum() * (low != high)
    return [int(count) for count in counts], between
