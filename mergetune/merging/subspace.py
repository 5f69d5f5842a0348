"""Merging of matrices: magnitudes and directions of columns, singular vectors, projections, LoRA's ranks.

Shapes: K experts, [m, n] a matrix, r its rank or that of its LoRA factors; tau_k = expert_k - base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mergetune.merging.checks import check_fraction, per_expert
from mergetune.merging.plans import Merge, method
from mergetune.merging.sources import Part, StateDict, floating, source, whole


@method
def widen(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    ratio: float = 1.0,
    calibration: float = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rows: Sequence[str] = ("model.embed_tokens.weight", "token_embedding.weight"),
) -> Merge:
    """WIDEN: columns whose magnitude or direction moved more count more (arXiv 2408.03092; authors' code).

    A matrix is split into its columns' norms and directions. Within expert k, columns are ranked (0 to 1) by how
    far the norm moved, and by ``1 - cos`` to the base's direction. Either ranking gives scores: softmax over the
    experts, and ``calibration`` where the rank is above ``ratio`` times the expert's mean rank. With s_k the mean of
    both scores, ``merged = base + scale * sum_k s_k tau_k``. In vectors and scalars |tau_k| itself takes the place of
    the rank.

    The authors' scores have no fixed sum: over K experts it is about ``K * calibration / 2 + 0.45``. They merge two;
    four experts that are alike step 2.5 times as far as one of them, and such a sum of task vectors collapses. Then
    make ``scale`` smaller, or ``normalize``.

    Needs: no data. Meaningful for several experts; matrices, for tensors of more dimensions [m, n x ...], and vectors.

    Args:
        ratio: the paper's t.
        calibration: the paper's s.
        scale: of the step; 1 is the authors'.
        normalize: divide the scores by their sum over the experts, so that with ``scale`` 1 the result stays between
            the experts; needs a positive ``calibration``.
        rows: names (their ends) of matrices whose rows are the units, as token embeddings' are. Others can be added:
            the ``ctx`` of a soft prompt is rows of the token table, too.
    """
    if normalize and not calibration > 0:
        raise ValueError(f"calibration must be positive with normalize=True, got {calibration}")

    def scores(significance: Tensor, high: Tensor) -> Tensor:
        return torch.where(high, calibration, significance.softmax(0))

    def by_rank(moved: Tensor) -> Tensor:
        """How far each of n units moved, [K, n] -> their scores."""
        ranks, n = moved.argsort(dim=1, stable=True).argsort(dim=1), moved.shape[1]
        return scores(ranks.to(moved) / n, ranks > ratio * (n - 1) / 2)

    def step(weights: Tensor, deltas: Tensor) -> Tensor:
        return scale * (weights / weights.sum(0) if normalize else weights).mul(deltas).sum(0)

    def merge(part: Part) -> Tensor:
        if len(part.shape) < 2:
            deltas = part.deltas.reshape(len(experts), -1)
            moved = deltas.abs()
            high = moved > ratio * moved.mean(1, keepdim=True)
            return part.base.flatten() + step(scores(moved, high), deltas)
        unit = 1 if part.name.endswith(tuple(rows)) else 0  # the dimension along which norms are taken
        before, after = part.base.flatten(1), part.experts.flatten(2)
        magnitudes = by_rank((after.norm(dim=unit + 1) - before.norm(dim=unit)).abs())
        directions = by_rank(1 - torch.cosine_similarity(after, before[None], dim=unit + 1))
        return before + step((magnitudes + directions).unsqueeze(unit + 1) / 2, after - before)

    return Merge(merge, whole=True)


@method
def tsv_m(base: StateDict, experts: Sequence[StateDict], *, scale: float = 1.0) -> Merge:
    """TSV-Merge: task singular vectors made orthogonal to each other (arXiv 2412.00081; authors' code: TSVM_utils.py).

    Of each matrix tau_k the first ``min(m, n) // K`` singular triples are kept; all U and all V side by side are
    replaced by the nearest matrices with orthonormal columns (``U = P S Q' -> P Q'``), and
    ``merged = base + scale * U diag(S) V'``. Other tensors take the mean of tau_k, and so do matrices with fewer rows
    or columns than there are experts.

    Needs: no data. Meaningful for several experts that share matrices. The authors average CLIP's ``text_projection``
    too, here it is a matrix like any other.

    Args:
        scale: alpha; 1 is the paper's choice without validation.
    """

    def merge(part: Part) -> Tensor:
        deltas, keep = part.deltas, min(part.shape) // len(experts) if len(part.shape) == 2 else 0
        if not keep:
            return part.base + scale * deltas.mean(0)
        triples = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
        left = _orthonormal(torch.cat([u[:, :keep] for u, _, _ in triples], 1))
        right = _orthonormal(torch.cat([v[:keep] for _, _, v in triples]))
        return part.base + scale * (left * torch.cat([s[:keep] for _, s, _ in triples])) @ right

    return Merge(merge, whole=True)


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows (polar factor)."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


@method
def opcm(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    alpha: float = 0.5,
    project: Callable[[str], bool] | None = None,
) -> Merge:
    """OPCM: experts one after the other, each projected away from what is merged (arXiv 2501.09522; fusion_bench).

    With ``D_1 = tau_1`` and ``U S V'`` the singular value decomposition of D_(t-1)::

        M = U' tau_t V, its diagonal set to 0, and its first q rows in its first q columns, where
            S_1 .. S_q is what stays within ``alpha`` of the sum of S
        D_t    = D_(t-1) + U M V'                                   tensors that are not projected: D_(t-1) + tau_t
        merged = base + D_K * mean_t |tau_t| / |D_K|                norms over all tensors together

    Only the part of tau_t that lies in both spaces of D_(t-1) is changed. Directions in which D_(t-1) is zero (up to
    rounding) have no defined singular vectors and are left alone.

    Needs: no data. Meaningful for several experts that share matrices; their order counts. Each decomposition is made
    twice, for the norm and for the result.

    Args:
        alpha: 0.5 in the authors' configuration.
        project: whether the tensor of a name is projected, if it is a matrix; None is all of them. fusion_bench
            projects the weights of ``nn.Linear`` only: neither embeddings nor raw parameters with two dimensions.
    """
    check_fraction("alpha", alpha, zero=True)

    def chosen(part: Part) -> bool:
        return len(part.shape) == 2 and (project is None or project(part.name))

    def combined(part: Part) -> Tensor:
        deltas = part.deltas
        total = deltas[0]
        for delta in deltas[1:]:
            total = total + (_projected(delta, total, alpha) if chosen(part) else delta)
        return total

    squares, merged = torch.zeros(len(experts), dtype=torch.float64), 0.0
    for part in (whole(name, base, experts) for name in floating(base)):
        squares += part.deltas.reshape(len(experts), -1).double().square().sum(1).cpu()
        merged += combined(part).double().square().sum().item()
    factor = squares.sqrt().mean().item() / math.sqrt(merged) if merged else 1.0
    return Merge(lambda part: part.base + factor * combined(part), whole=True)


def _projected(delta: Tensor, merged: Tensor, alpha: float) -> Tensor:
    u, s, v = torch.linalg.svd(merged, full_matrices=False)
    if not len(s) or not s[0] > 0:
        return delta
    split = int((s.cumsum(0) / s.sum() > alpha).int().argmax())
    within = u.T @ delta @ v.T
    defined = s > s[0] * max(merged.shape) * torch.finfo(s.dtype).eps
    removed = torch.diag(within.diagonal() * defined)
    removed[:split, :split] = within[:split, :split]
    return delta - u @ removed @ v


@torch.no_grad()
def lora_lego(
    base: None,
    experts: Sequence[StateDict],
    *,
    rank: int | None = None,
    scales: Sequence[float] | None = None,
    norms: bool = True,
    outputs: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """LoRA-LEGO: ranks of several LoRAs, clustered (arXiv 2409.16167).

    The i-th row of A and the i-th column of B, side by side, are one unit. The units of all experts at one place are
    clustered by k-means; the centroids mu_c are the rows and columns of the merged factors. They are then scaled
    twice, against the loss of norm in averaging and the growth of variance with the rank, as public reimplementations
    have it; the paper's text was not at hand::

        norms:   mu_c *= mean_(i in c) max|u_i| / max|mu_c|      over the whole unit u_i = [a_i; b_i]
        outputs: B *= sqrt(r / rank)                             r the largest rank of an expert

    Needs: no data; scikit-learn. Meaningful for several experts that hold LoRA factors only, ``*lora_A*`` [r, n] and
    ``*lora_B*`` [m, r] in pairs (PEFT's names), also of different ranks. LoRA's own factor alpha / r is not in a
    state dict: give it as ``scales`` where experts differ in it. Works on pairs, so it is not for :func:`merge_files`.

    Args:
        base: None; LoRA factors are differences already.
        rank: clusters, the rank of the result; None is r.
        scales: alpha / r of each expert, positive. A and B are multiplied by its square root, so the result's own
            factor is 1: set its alpha to its rank. None multiplies by nothing, and the result keeps the experts' one.
        norms, outputs: whether to scale so.
        seed: of k-means.

    Returns:
        Factors in the first expert's dtype.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("lora_lego needs scikit-learn: pip install scikit-learn") from error
    if base is not None:
        raise ValueError("lora_lego takes no base: pass None")
    if isinstance(experts, Mapping) or len(experts) < 2:
        raise ValueError(f"lora_lego needs a list of at least 2 experts, got {len(experts)}")
    factors = per_expert("scales", scales, len(experts))
    if min(factors) <= 0:
        raise ValueError(f"scales must be positive, got {factors}")
    pairs = _lora_pairs(experts)
    merged: dict[str, Tensor] = {}
    for a, b in pairs:
        like = experts[0][a]
        units = [torch.cat([e[a].float(), e[b].float().T], 1) for e in experts]
        units = torch.cat([math.sqrt(f) * unit for f, unit in zip(factors, units, strict=True)]).cpu()  # [all r, n + m]
        largest = max(len(e[a]) for e in experts)
        clusters = largest if rank is None else rank
        if not 1 <= clusters <= len(units):
            raise ValueError(f"rank must be from 1 to the experts' ranks together, {len(units)}, got {clusters}")
        means = KMeans(
            clusters,
            n_init=10,  # pyright: ignore[reportArgumentType]  # the stubs know the default "auto" alone, not numbers
            random_state=seed,
        )
        labels = torch.from_numpy(means.fit(units.double().numpy()).labels_)
        member = torch.nn.functional.one_hot(labels.long(), clusters).T.float()  # [clusters, sum of r]
        member = member / member.sum(1, keepdim=True).clamp(min=1)
        centroids = member @ units
        if norms:
            height, wanted = centroids.abs().amax(1, keepdim=True), member @ units.abs().amax(1, keepdim=True)
            centroids = centroids * torch.where(height > 0, wanted / height, 1.0)
        scale = math.sqrt(largest / clusters) if outputs else 1.0
        merged[a] = centroids[:, : like.shape[1]].to(like).contiguous()
        merged[b] = (scale * centroids[:, like.shape[1] :].T).to(experts[0][b]).contiguous()
    return {name: merged[name] for name in experts[0]}


def _lora_pairs(experts: Sequence[StateDict]) -> list[tuple[str, str]]:
    """Names of A and B at each place, after checking that all experts have them and that they fit."""
    for k, expert in enumerate(experts):
        if different := sorted(experts[0].keys() ^ expert.keys()):
            raise ValueError(f"experts[{k}] must hold the tensors of experts[0], they differ in {different[0]!r}")
        for name in expert:
            other = name.replace("lora_A", "lora_#").replace("lora_B", "lora_A").replace("lora_#", "lora_B")
            if other == name or other not in expert or len(source(expert, name).shape) != 2:
                raise ValueError(
                    f"lora_lego needs LoRA factors, matrices in pairs of lora_A and lora_B, and nothing else, got "
                    f"{name!r} in experts[{k}]"
                )
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in experts[0] if "lora_A" in name]
    for a, b in pairs:
        for k, expert in enumerate(experts):
            (r, n), (m, again) = expert[a].shape, expert[b].shape
            if r != again or n != experts[0][a].shape[1] or m != experts[0][b].shape[0]:
                raise ValueError(
                    f"experts[{k}][{a!r}] and its lora_B must have shapes [r, {experts[0][a].shape[1]}] and "
                    f"[{experts[0][b].shape[0]}, r], got {[r, n]} and {[m, again]}"
                )
    return pairs
