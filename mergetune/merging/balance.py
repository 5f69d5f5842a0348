"""Merging of task vectors with a weight for each element or tensor: PCB, SCE, delta-guided fusion, OTA-FFG.

K is the number of experts, tau_k = expert_k - base the task vector of expert k.
"""

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
    """PCB-Merging: elements compete within and between experts (arXiv 2410.02396; authors' code: pcb-merging.py).

    ``a_k`` is ``|tau_k|`` clamped to its ``clip`` and ``1 - clip`` quantiles; ``norm`` maps the values of an expert
    linearly to [0, 1]::

        balance_k = exp(K norm(a_k)^2) * between_k               competition within and between experts
        share_k   = norm(max(balance_k, its 1 - ratio quantile))       elements below the quantile get share 0
        merged    = base + scale * sum_k share_k sign(tau_k) a_k / sum_k share_k

    Needs: no data. Meaningful for several experts, any tensors; for one expert it keeps the elements that moved most.
    Reads the inputs four more times for the quantiles.

    Args:
        ratio: share of an expert's elements that keep a share above 0.
        scale: lambda of the paper, which searches it, also with one value per expert.
        scope: "global" takes quantiles and ``norm`` over all tensors of an expert (authors' code), "tensor" over each
            tensor alone.
        clip: quantile of the clamping; 0.01 % in the authors' code, 1 % in their code for CLIP.
        between: competition between experts. "raw" is ``tanh(tau_k sum_j tau_j)``, which depends on the scale of tau.
            The authors' code for CLIP uses ``n_k = sign(tau_k) norm(a_k)``: "normalized" is ``tanh(tau_k sum_j n_j)``
            (vision_source_code/pcb.py, with ratio 0.05 and scale 1.2), "pairs" is ``sum_j tanh(n_k n_j)`` (pcb_ES.py,
            which searches lambda).
    """
    check_fraction("ratio", ratio)
    check_choice("scope", scope, SCOPES)
    check_choice("between", between, ("raw", "normalized", "pairs"))
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip must be in [0, 0.5), got {clip}")
    # name -> [4][K]: lowest and highest a, then quantile and maximum of the balance
    limits: dict[str, list[list[float]]] = {}

    most = math.log(torch.finfo(torch.float32).max / (len(experts) if between == "pairs" else 1))
    many = len(experts) > math.floor(most)  # exp(K) exceeds float32
    shift = max(len(experts) - 700, 0)  # exp(700) is near the largest float64; a common factor changes no share

    def moved(part: Part) -> Tensor:
        return part.deltas.double() if many else part.deltas

    def magnitude(part: Part) -> Tensor:
        deltas = moved(part)
        low, high = (column(row, deltas) for row in limits[part.name][:2])
        return deltas.abs().clamp(low, high)

    def balance(part: Part) -> Tensor:
        deltas = moved(part)
        within = _unit(magnitude(part), *limits[part.name][:2])
        signed = deltas.sign() * within
        if between == "pairs":
            against = torch.stack([torch.tanh(row * signed).sum(0) for row in signed])
        else:
            against = torch.tanh(deltas * (deltas if between == "raw" else signed).sum(0))
        return (len(experts) * within.square() - shift).exp() * against

    for group in scope_groups(base, scope):
        total = sum(source(base, name).numel for name in group)
        ranks = [int(total * clip), int(total * (1 - clip) - 1)]
        ends = order_statistics(None, group, base, experts, ranks)
        limits |= dict.fromkeys(group, ends)
        ranks = [min(int(total * (1 - ratio)), total - 1), total - 1]
        limits |= dict.fromkeys(group, ends + order_statistics(balance, group, base, experts, ranks))

    def merge(part: Part) -> Tensor:
        low, high = limits[part.name][2:]
        balances = balance(part)
        shares = _unit(balances.maximum(column(low, balances)), low, high)
        mixed = (shares * part.deltas.sign() * magnitude(part)).sum(0) / shares.sum(0).clamp(min=1e-12)
        return part.base + scale * mixed

    return Merge(merge)


def _unit(values: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    """Maps row k of values [K, n] linearly from [low_k, high_k] to [0, 1]; 0 if low_k equals high_k."""
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
    """SCE: select, calculate and erase in each tensor (FuseChat, arXiv 2408.07990; authors' code: sce_merging.py).

    Select: of the elements whose variance over the experts is not zero, the share ``density`` with the highest
    variance. Calculate: the weight of each expert is the mean square of its selected tau_k. Erase: values whose sign
    differs from that of ``sum_k tau_k`` are dropped. The result is
    ``base + scale * sum_k weight_k tau_k / sum_k weight_k`` over the remaining values.

    Needs: no data. Meaningful for several experts (one alone has no variance), any tensors. Reads each tensor four
    more times.

    Args:
        density: share of elements to select; 10 % in the authors' configuration.
        scale: factor of the merged task vector; 1 in the paper.
        select: where the selection applies: to the merged "vectors" (paper, mergekit), or only to the "weights"
            (authors' code).
    """
    check_fraction("density", density)
    check_choice("select", select, ("vectors", "weights"))

    def variance(part: Part) -> Tensor:
        deltas = part.deltas
        return (deltas - deltas.mean(0)).square().mean(0, keepdim=True)  # torch.var is 50 times slower over few rows

    def selected(part: Part, threshold: float) -> Tensor:
        return (variance(part) >= threshold).expand(len(experts), -1)

    def statistics(name: str) -> tuple[float, list[float]]:
        """The smallest selected variance, and the weights of the experts."""
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
    """Delta-guided fusion (CoDiEmb, arXiv 2508.11442): experts that moved a parameter further weigh more in it.

    The result is ``base + sum_k w_k tau_k`` with ``w_k = |tau_k|^power / sum_j |tau_j|^power``, where |.| is the L2
    norm of the tensor or the magnitude of the element. The paper weights checkpoints for each learnable parameter by
    the deviation from the pretrained value. This formula is our reading: we did not have the paper's exact formula, and
    the authors' code has no such step.

    Needs: no data. Meaningful for several experts, any tensors. Reads the inputs twice with per="tensor".

    Args:
        power: 0 gives the plain average, a large power the expert that moved furthest.
        per: "tensor" for one weight per tensor, "element" for one weight per element.
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
        lengths = deltas.abs().double() if per == "element" else squares[part.name].sqrt()[:, None]
        moved = lengths.pow(power)
        most, total = lengths.amax(0), moved.sum(0)
        beyond = (most > 0) & ((total == 0) | ~total.isfinite())  # the powers leave float64: those of the ratios do not
        moved = torch.where(beyond, (lengths / most).pow(power), moved)
        total = torch.where(beyond, moved.sum(0), total)
        weights = torch.where(total > 0, moved / total, 1 / len(experts))
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

    Grafting: the mask m_k keeps the share ``density`` of elements of tau_k with the highest saliency ``v_k tau_k^2``;
    elements with saliency 0 are never kept. Aggregation: each element is
    ``base + sum_k m_k p_k tau_k / sum_k m_k p_k`` with ``p_k = v_k^power + epsilon``, or the base if no expert keeps
    the element.

    Needs: Adam's second moments ``exp_avg_sq`` of each expert's training, or squared gradients computed on data.
    Meaningful for one expert (grafting alone) or several; any tensors. Reads the inputs two more times.

    Args:
        second_moments: v_k, one state dict per expert with the expert's names and shapes; values must not be negative.
        density: share of elements to keep. The authors choose one threshold per expert instead, the highest that keeps
            the expert's accuracy; they report 40 %.
        power: 0.5 gives Adam's preconditioner; authors' default.
        epsilon: added to the weights; the default is the authors' value.
        trim: "global" compares saliencies over all tensors of an expert, "tensor" within each tensor.
        rank_one: replace v_k of a matrix by ``rows columns' / total`` with its row sums, column sums and total sum,
            as Adafactor does (the memory-saving form of the paper).
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
