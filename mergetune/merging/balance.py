"""Merging of task vectors by competition and balance between experts and parameters: PCB, SCE, DELTA, OTA-FFG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mergetune import ops
from mergetune.merging.checks import check_choice, check_fraction, check_states, column
from mergetune.merging.order_statistics import order_statistics
from mergetune.merging.plans import Merge, method
from mergetune.merging.sources import Part, StateDict, floating, over_parts, source
from mergetune.merging.trimming import SCOPES, reach, scope_groups, trim_thresholds


@method
def pcb(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    ratio: float = 0.1,
    scale: float = 1.0,
    scope: str = "global",
    clip: float = 1e-4,
    between: str = "raw",
) -> Merge:
    """PCB-Merging: parameters compete within and between experts (arXiv 2410.02396; authors' code: pcb-merging.py).

    With ``a_k = |tau_k|`` clamped to its ``clip`` and ``1 - clip`` quantiles and ``norm`` the map of an expert's values
    to [0, 1]::

        balance_k = exp(K norm(a_k)^2) * between_k                                 within, between
        share_k   = norm(max(balance_k, its 1 - ratio quantile))                   the rest drops to 0
        merged    = base + scale * sum_k share_k sign(tau_k) a_k / sum_k share_k

    Needs: no data. Meaningful for several experts, any tensors; of one expert it keeps what moved most. Four
    passes more, for the order statistics.

    Args:
        ratio: of the elements of an expert, what keeps a share.
        scale: lambda; the paper searches it, also one for each expert.
        scope: quantiles and ``norm`` "global" over all tensors of an expert (authors' code), or in each "tensor".
        clip: 0.01 % there, 1 % in the code for CLIP.
        between: "raw", ``tanh(tau_k sum_j tau_j)``, depends on the scale of tau. The authors' code for CLIP has, with
            ``n_k = sign(tau_k) norm(a_k)``, "normalized", ``tanh(tau_k sum_j n_j)`` (vision_source_code/pcb.py, ratio
            0.05 and scale 1.2), and where it searches lambdas "pairs", ``sum_j tanh(n_k n_j)`` (pcb_ES.py).
    """
    check_fraction("ratio", ratio)
    check_choice("scope", scope, SCOPES)
    check_choice("between", between, ("raw", "normalized", "pairs"))
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip must be in [0, 0.5), got {clip}")
    limits: dict[str, list[list[float]]] = {}  # name -> [4][K]: a's lowest and highest, balance's quantile and highest

    def magnitude(part: Part) -> Tensor:
        low, high = (column(row, part.experts) for row in limits[part.name][:2])
        return part.deltas.abs().clamp(low, high)

    def balance(part: Part) -> Tensor:
        deltas = part.deltas
        within = _unit(magnitude(part), *limits[part.name][:2])
        signed = deltas.sign() * within
        if between == "pairs":
            against = torch.stack([torch.tanh(row * signed).sum(0) for row in signed])
        else:
            against = torch.tanh(deltas * (deltas if between == "raw" else signed).sum(0))
        return (len(experts) * within.square()).exp() * against

    for group in scope_groups(base, scope):
        total = sum(source(base, name).numel for name in group)
        ranks = [int(total * clip), int(total * (1 - clip) - 1)]
        ends = order_statistics(None, group, base, experts, ranks)
        limits |= dict.fromkeys(group, ends)
        ranks = [min(int(total * (1 - ratio)), total - 1), total - 1]
        limits |= dict.fromkeys(group, ends + order_statistics(balance, group, base, experts, ranks))

    def merge(part: Part) -> Tensor:
        low, high = limits[part.name][2:]
        shares = _unit(balance(part).maximum(column(low, part.experts)), low, high)
        mixed = (shares * part.deltas.sign() * magnitude(part)).sum(0) / shares.sum(0).clamp(min=1e-12)
        return part.base + scale * mixed

    return Merge(merge)


def _unit(values: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    """[K, n] from low to high -> from 0 to 1; 0 where both are the same."""
    least, most = column(low, values), column(high, values)
    return (values - least) / torch.where(most > least, most - least, math.inf)


@method
def sce(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    density: float = 0.1,
    scale: float = 1.0,
    select: str = "vectors",
) -> Merge:
    """SCE: select, calculate, erase, in each tensor (FuseChat, arXiv 2408.07990; authors' code: sce_merging.py).

    Select: the ``density`` of elements with the highest variance over the experts, of those where it is not zero.
    Calculate: each expert's weight is the mean square of its selected tau_k. Erase: values against the sign of
    ``sum_k tau_k`` drop out. ``merged = base + scale * sum_k weight_k tau_k / sum_k weight_k`` over what is left.

    Needs: no data. Meaningful for several experts (one alone has no variance), any tensors. Reads each tensor four
    times more.

    Args:
        density: the authors' configuration has 10 %.
        scale: 1 is the paper's.
        select: what the selection holds for: the "vectors" (paper, mergekit) or only the "weights" (authors' code).
    """
    check_fraction("density", density)
    check_choice("select", select, ("vectors", "weights"))

    def variance(part: Part) -> Tensor:
        deltas = part.deltas
        return (deltas - deltas.mean(0)).square().mean(0, keepdim=True)  # torch.var is 50 times slower over so few rows

    def selected(part: Part, threshold: float) -> Tensor:
        return (variance(part) >= threshold).expand(len(experts), -1)

    def statistics(name: str) -> tuple[float, list[float]]:
        """The least variance that is selected, and the experts' weights."""
        threshold, numel = 0.0, source(base, name).numel
        if density < 1:
            moved = sum(over_parts(lambda part: int(variance(part).count_nonzero()), [name], base, experts))
            keep = int(density * moved)
            threshold = order_statistics(variance, [name], base, experts, [numel - keep])[0][0] if keep else math.inf
        square = lambda part: (part.deltas * selected(part, threshold)).double().square().sum(1)  # noqa: E731
        found = over_parts(square, [name], base, experts)
        squares = sum(found, torch.zeros(len(experts), dtype=torch.float64, device=source(base, name).device))
        total = squares.sum()
        weights = squares / total if total > 0 else torch.full_like(squares, 1 / len(experts))
        return threshold, weights.tolist()

    known = {name: statistics(name) for name in floating(base)}

    def merge(part: Part) -> Tensor:
        threshold, weights = known[part.name]
        kept = selected(part, threshold) if select == "vectors" else None
        return ops.merge_deltas(
            part.stored_base, part.stored, weights, kept=kept, vote="sum", shares=weights, scale=scale
        )

    return Merge(merge)


@method
def delta_guided(base: StateDict, experts: Sequence[StateDict], *, power: float = 1.0, per: str = "tensor") -> Merge:
    """Delta-guided fusion (CoDiEmb, arXiv 2508.11442): who moved a parameter further has more say in it.

    Computed: ``base + sum_k w_k tau_k`` with ``w_k = |tau_k|^power / sum_j |tau_j|^power``, |.| the L2 norm of the
    tensor, or the magnitude of the element. The paper weights checkpoints for each learnable parameter by its deviation
    from the pretrained value; its exact formula was not at hand and the authors' code has no such step: this is our
    reading of it.

    Needs: no data. Meaningful for several experts, any tensors. Two passes with per="tensor".

    Args:
        power: 0 is the plain average, large takes who moved furthest.
        per: "tensor" or "element".
    """
    check_choice("per", per, ("tensor", "element"))
    if not power >= 0:
        raise ValueError(f"power must be at least 0, got {power}")

    squares: dict[str, Tensor] = {}
    if per == "tensor":
        square = lambda part: (part.name, part.deltas.double().square().sum(1))  # noqa: E731
        for name, found in over_parts(square, floating(base), base, experts):
            squares[name] = squares.get(name, torch.zeros_like(found)) + found

    def merge(part: Part) -> Tensor:
        deltas = part.deltas
        moved = (deltas.abs().double() if per == "element" else squares[part.name].sqrt()[:, None]).pow(power)
        weights = torch.where(moved.sum(0) > 0, moved / moved.sum(0), 1 / len(experts))
        return part.base + (weights.to(deltas) * deltas).sum(0)

    return Merge(merge)


@method
def ota_ffg(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    second_moments: Sequence[StateDict],
    density: float = 0.4,
    power: float = 0.5,
    epsilon: float = 1e-26,
    trim: str = "global",
    rank_one: bool = False,
) -> Merge:
    """OTA merging with Fast Fisher Grafting (arXiv 2509.11167; authors' code: mergekit/merge_methods/ota.py).

    Grafting: of each tau_k the ``density`` with the highest saliency ``v_k tau_k^2``, if it is not 0, stays, m_k.
    Aggregation of each element: ``base + sum_k m_k p_k tau_k / sum_k m_k p_k`` with ``p_k = v_k^power + epsilon``;
    where nothing stays, the base.

    Needs: Adam's second moments ``exp_avg_sq`` of each expert's training, or squared gradients taken again (data).
    Meaningful for one expert (grafting alone) or several; any tensors. Two passes more.

    Args:
        second_moments: v_k, one state dict for each expert, of its names and shapes, not negative.
        density: the authors set a threshold for each expert instead, the highest that keeps its accuracy; they show
            40 %.
        power: 0.5 makes Adam's preconditioner; authors' default.
        epsilon: authors' configuration.
        trim: "global" over all tensors of an expert, or in each "tensor".
        rank_one: replace v_k of matrices by ``rows columns' / total``, its sums, as Adafactor does (the paper's
            memory-light form).
    """
    check_states("second_moments", second_moments, experts)
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}")

    @lru_cache(maxsize=len(experts))
    def sums(name: str, k: int) -> tuple[Tensor, Tensor, Tensor]:
        v = second_moments[k][name].double()
        return v.sum(1), v.sum(0), v.sum()

    def moments(part: Part) -> Tensor:
        v = part.of("second_moments", second_moments)
        if v.numel() and v.min() < 0:
            raise ValueError(f"second_moments must not be negative, got {v.min().item()} in {part.name!r}")
        if rank_one and len(part.shape) == 2:
            place = torch.arange(part.begin, part.end)
            for k, row in enumerate(v):
                rows, columns, total = sums(part.name, k)
                if total > 0:
                    row.copy_(rows[place // part.shape[1]] * columns[place % part.shape[1]] / total)
        return v

    thresholds = trim_thresholds(base, experts, density, trim, lambda part: moments(part) * part.deltas.square())

    def merge(part: Part) -> Tensor:
        v, deltas = moments(part), part.deltas
        saliency = v * deltas.square()
        weights = (v.pow(power) + epsilon) * reach(saliency, thresholds[part.name]) * saliency.sign()
        total = weights.sum(0)
        return part.base + (weights * deltas).sum(0) / torch.where(total > 0, total, 1.0)

    return Merge(merge)
