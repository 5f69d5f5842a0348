"""Merging of matrices by columns, singular vectors, projections and LoRA ranks: WIDEN, TSV-Merge, OPCM, LoRA-LEGO.

Shapes: K experts, [m, n] a matrix, r the rank of the matrix or of LoRA factors; tau_k = expert_k - base.
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
    """WIDEN: columns whose magnitude or direction moved more weigh more (arXiv 2408.03092; authors' code).

    Each column of a matrix has a norm and a direction. Within expert k, columns are ranked (0 to 1) by the change of
    the norm, and by ``1 - cos`` between the new and the base's direction. Each ranking gives scores: the softmax over
    the experts, replaced by ``calibration`` where the rank is above ``ratio`` times the expert's mean rank. With s_k
    the mean of both scores, ``merged = base + scale * sum_k s_k tau_k``. For vectors and scalars, |tau_k| replaces the
    rank.

    The authors' scores have no fixed sum over the experts: the sum is about ``K * calibration / 2 + 0.45``. The authors
    merge two experts. With four similar experts the merged task vector is 2.5 times as long as that of one expert,
    and the merged model collapses. Use a smaller ``scale`` or ``normalize`` in this case.

    Needs: no data. Meaningful for several experts with matrices and vectors; tensors with more dimensions count as
    matrices [m, n x ...].

    Args:
        ratio: t of the paper.
        calibration: s of the paper.
        scale: factor of the merged task vector; 1 in the authors' code.
        normalize: divide the scores by their sum over the experts, so that with ``scale`` 1 the result stays between
            the experts; needs a positive ``calibration``.
        rows: name endings of matrices that are ranked by row instead of by column, as token embeddings are. You can add
            other names, for example ``ctx`` of a soft prompt, whose rows are token embeddings.
    """
    if normalize and not calibration > 0:
        raise ValueError(f"calibration must be positive with normalize=True, got {calibration}")

    def scores(significance: Tensor, high: Tensor) -> Tensor:
        return torch.where(high, calibration, significance.softmax(0))

    def by_rank(moved: Tensor) -> Tensor:
        """Scores [K, n] of n rows or columns, from the distances [K, n] that they moved."""
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
    """TSV-Merge: makes the singular vectors of all tasks orthogonal (arXiv 2412.00081; authors' code: TSVM_utils.py).

    Each matrix tau_k keeps its first ``min(m, n) // K`` singular triples. The kept U of all experts, side by side, are
    replaced by the nearest matrix with orthonormal columns (``U = P S Q' -> P Q'``), and so are the V. The result is
    ``base + scale * U diag(S) V'``. Other tensors, and matrices with fewer than K rows or columns, take
    ``base + scale * mean_k tau_k``.

    Needs: no data. Meaningful for several experts with matrices. The authors average CLIP's ``text_projection``; this
    function treats it like any other matrix.

    Args:
        scale: alpha of the paper; 1 is the paper's choice without validation.
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
    """OPCM: merges experts one after the other, each projected away from the merge so far (arXiv 2501.09522).

    With ``D_1 = tau_1`` and ``U S V'`` the singular value decomposition of D_(t-1)::

        M      = U' tau_t V with the diagonal set to 0 and the top left q x q block set to 0, where
                 S_1 + .. + S_q is at most ``alpha`` times the sum of S
        D_t    = D_(t-1) + U M V'                                   D_(t-1) + tau_t for tensors without projection
        merged = base + D_K * mean_t |tau_t| / |D_K|                norms over all tensors together

    The projection changes only the part of tau_t that lies in both the row and the column space of D_(t-1). Directions
    in which D_(t-1) is zero (up to rounding) have no defined singular vectors and are not changed. The reference
    implementation is fusion_bench.

    Needs: no data. Meaningful for several experts with matrices; the order of the experts matters. Each decomposition
    is computed twice, for the norm and for the result.

    Args:
        alpha: share of the sum of singular values that is protected; 0.5 in the authors' configuration.
        project: function from a tensor name to whether this matrix is projected; None projects every matrix.
            fusion_bench projects the weights of ``nn.Linear`` only: neither embeddings nor other two-dimensional
            parameters.
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
    """LoRA-LEGO: clusters the ranks of several LoRAs (arXiv 2409.16167).

    Unit i of a LoRA layer is row i of A joined with column i of B. For each layer, k-means clusters the units of all
    experts; the centroids mu_c are the rows of A and columns of B of the merged LoRA. Two corrections follow, because
    averaging reduces norms and the variance of the output grows with the rank. Their formulas come from public
    reimplementations: we did not have the paper's text::

        norms:   mu_c *= mean_(i in c) max|u_i| / max|mu_c|      over the whole unit u_i = [a_i; b_i]
        outputs: B *= sqrt(r / rank)                             r is the largest rank of the experts

    Needs: no data; scikit-learn. Meaningful for several experts that hold only LoRA factors, in pairs of ``*lora_A*``
    [r, n] and ``*lora_B*`` [m, r] (PEFT's names); ranks may differ. A state dict does not contain LoRA's factor
    alpha / r: pass ``scales`` if the experts differ in it. The method merges pairs of tensors, so :func:`merge_files`
    does not take it.

    Args:
        base: must be None: LoRA factors have no base checkpoint.
        rank: number of clusters, which is the rank of the result; None takes r.
        scales: positive factor alpha / r of each expert. A and B are multiplied by its square root, so the factor of
            the result is 1: set alpha of the result to its rank. None changes nothing: the result has the experts'
            common factor.
        norms, outputs: whether to apply the corrections above.
        seed: seed of k-means.

    Returns:
        Merged factors with the first expert's names and dtypes.

    Raises:
        ValueError: the experts hold tensors that are not pairs of LoRA factors, or an argument is out of range.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("lora_lego needs scikit-learn: pip install scikit-learn") from error
    if base is not None:
        raise ValueError("base must be None for lora_lego, got a state dict")
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
            raise ValueError(f"rank must be from 1 to the sum of the experts' ranks, {len(units)}, got {clusters}")
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
    """Names of A and B of each LoRA layer, after a check that all experts have them with fitting shapes."""
    for k, expert in enumerate(experts):
        if different := sorted(experts[0].keys() ^ expert.keys()):
            raise ValueError(f"experts[{k}] must hold the tensors of experts[0], but they differ in {different[0]!r}")
        for name in expert:
            other = name.replace("lora_A", "lora_#").replace("lora_B", "lora_A").replace("lora_#", "lora_B")
            if other == name or other not in expert or len(source(expert, name).shape) != 2:
                raise ValueError(
                    f"experts[{k}] must hold only LoRA factors, in pairs of matrices lora_A and lora_B, got {name!r}"
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
