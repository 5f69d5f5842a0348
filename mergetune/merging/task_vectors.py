"""Merging of task vectors, the differences of experts from their common base: arithmetic, trimming, signs, balance.

Shapes: K experts, n elements of a stretch; tau_k = expert_k - base, computed in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune import ops
from mergetune.merging.methods import METHODS
from mergetune.merging.tensors import (
    Merge,
    Part,
    StateDict,
    check,
    check_choice,
    check_fraction,
    check_states,
    column,
    floating,
    method,
    order_statistics,
    over_parts,
    per_expert,
    source,
    stretches,
)

SCOPES = ("global", "tensor")


@method
def task_arithmetic(
    base: StateDict, experts: Sequence[StateDict], *, scale: float = 0.4, weights: Sequence[float] | None = None
) -> Merge:
    """Task arithmetic (arXiv 2212.04089): ``base + scale * sum_k weights_k tau_k``.

    Needs: no data (scale may be chosen on validation images). Meaningful for one or several experts, any tensors.

    Args:
        scale: 0.4 is what the TIES paper takes for several experts without validation; 1 gives one expert back.
        weights: one for each expert; None is 1 for all.
    """
    weights = per_expert("weights", weights, len(experts))
    return Merge(lambda part: ops.merge_deltas(part.stored_base, part.stored, weights, scale=scale))


@method
def negate(base: StateDict, experts: Sequence[StateDict], *, scale: float = 1.0) -> Merge:
    """Forgetting by task-vector negation (arXiv 2212.04089, forgetting): ``base - scale * sum_k tau_k``.

    Needs: no data (the paper chooses scale so that a control task keeps 95 % of its accuracy). Meaningful for one
    expert or several, all of which are forgotten; any tensors.
    """
    return task_arithmetic.plan(base, experts, scale=-scale)


@method
def layerwise(base: StateDict, experts: Sequence[StateDict], *, coefficients: Mapping[str, Sequence[float]]) -> Merge:
    """Task arithmetic with coefficients for each tensor: ``base[name] + sum_k coefficients[name][k] tau_k[name]``.

    Layer-wise AdaMerging's form (arXiv 2310.02575), for coefficients that :func:`entropy_coefficients` or
    :func:`alignment_coefficients` have learned, or others.

    Needs: the coefficients, no data. Meaningful for one or several experts, any tensors.

    Args:
        coefficients: name of each floating-point tensor -> one number for each expert.
    """
    if missing := [name for name in floating(base) if name not in coefficients]:
        raise ValueError(f"coefficients must be there for every tensor, {missing[0]!r} has none")
    rows = {n: per_expert(f"coefficients[{n!r}]", coefficients[n], len(experts)) for n in floating(base)}
    return Merge(lambda part: ops.merge_deltas(part.stored_base, part.stored, rows[part.name]))


@method
def ties(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    trim: str = "global",
    sign: str = "sum",
    divide: str = "count",
) -> Merge:
    """TIES: trim, elect signs, average those that agree (arXiv 2306.01708, algorithm 1).

    Of each tau_k the ``density`` of largest magnitude stays; the sign of ``sum_k tau_k`` is elected for each element;
    the kept values of that sign are averaged and added to the base, times ``scale``. Values that equal the threshold
    all stay (the authors' code keeps one more). Where the sum is exactly zero the positive sign is elected, as in peft
    and mergekit (the authors' code takes the sign that most elements have).

    Needs: no data. Meaningful for several experts, any tensors; of one expert it only trims. Two passes more.

    Args:
        density: of the elements, what stays (the paper's k = 20 %).
        scale: lambda; 1 is the paper's choice without validation.
        weights: one for each expert; None is 1 for all.
        trim: "global" over all tensors of an expert together (authors' code), "tensor" in each (peft, mergekit).
        sign: elected by "sum" of values (paper), or by "count" of signs.
        divide: by the "count" of values that agree (paper, peft), by their "weight" (mergekit), or by nothing, "none"
            (mergekit's normalize=false). For the last two the signs are those of the weighted values, as there.
    """
    thresholds = _thresholds(base, experts, density, trim, None)
    election = _election(weights, len(experts), sign, divide)
    return Merge(
        lambda part: ops.merge_deltas(
            part.stored_base, part.stored, limits=thresholds[part.name], scale=scale, **election
        )
    )


@method
def dare(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    density: float = 0.1,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    rescale: str | None = "density",
    consensus: str | None = None,
    divide: str = "count",
    seed: int = 0,
) -> Merge:
    """DARE: drop at random and rescale (arXiv 2311.03099), then task arithmetic or TIES' election.

    ``base + scale * sum_k weights_k m_k tau_k / density`` with independent ``m_k ~ Bernoulli(density)``.

    Needs: no data. Meaningful for one or several experts, any tensors; for small tau only (the paper: below 0.002). The
    mask depends on seed, tensor name, expert and place alone, so the same tensor gets the same one in any
    state dict. Permuting experts changes the masks.

    Args:
        density: what stays, 1 - p; the paper drops p = 90 % and more.
        scale: the paper searches 0.5 to 1.
        weights: one for each expert; None is 1 for all.
        rescale: "density" divides by it (paper); "l1", "l2", "linf" restore that norm of each tensor's tau_k (mergekit;
            tensors are then taken whole); None leaves the rest as it is.
        consensus: None adds; "sum" or "count" elects signs as :func:`ties` does (peft's DARE-TIES; mergekit's is
            ``consensus="sum", divide="none", rescale="l1"``). The authors trim as TIES does between the two: that is
            :func:`ties` of ``dare(base, [expert], seed=k)`` for each expert k, with another seed for each, as the
            masks are told apart by the place among the experts.
        divide: with a consensus, as in :func:`ties`.
        seed: of the masks.
    """
    check_fraction("density", density)
    check_choice("rescale", rescale, (None, "density", *_NORMS))
    check_choice("consensus", consensus, (None, "sum", "count"))
    election = _election(weights, len(experts), consensus, divide)
    factor = scale / density if rescale == "density" else scale

    def merge(part: Part) -> Tensor:
        masks = torch.stack([_random_mask(seed, part, k, density) for k in range(len(experts))])
        kept = masks.to(part.stored[0].device)
        if rescale not in _NORMS:
            return ops.merge_deltas(part.stored_base, part.stored, kept=kept, scale=factor, **election)
        base, rows = part.base.flatten(), part.experts.reshape(len(experts), -1)
        before = rows - base
        after = before * kept
        lengths = (torch.linalg.vector_norm(t, _NORMS[rescale], dim=1) for t in (before, after))
        after *= torch.where((after != 0).any(1), torch.div(*lengths), 1.0)[:, None]
        return base + ops.merge_deltas(None, after, scale=scale, **election)

    return Merge(merge, whole=rescale in _NORMS)


_NORMS = {"l1": 1, "l2": 2, "linf": math.inf}


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

    for group in _groups(base, scope):
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
    low, high = column(low, values), column(high, values)
    return (values - low) / torch.where(high > low, high - low, math.inf)


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
        shares = {"weights": weights, "shares": weights}
        return ops.merge_deltas(part.stored_base, part.stored, kept=kept, vote="sum", scale=scale, **shares)

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
            squares[name] = squares.get(name, 0) + found

    def merge(part: Part) -> Tensor:
        deltas = part.deltas
        moved = (deltas.abs().double() if per == "element" else squares[part.name].sqrt()[:, None]).pow(power)
        weights = torch.where(moved.sum(0) > 0, moved / moved.sum(0), 1 / len(experts))
        return part.base + (weights.to(deltas) * deltas).sum(0)

    return Merge(merge)


@method
def lines(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    alpha: float | None = None,
    beta: float | None = None,
    layer: Callable[[str], tuple[int, int] | None] | None = None,
) -> Merge:
    """LiNeS: shallow layers keep more of the base (arXiv 2410.17146; authors' code: src/eval/eval.py).

    ``base + (alpha + beta * l / (L - 1)) * sum_k tau_k`` in block l = 0 .. L - 1; tensors outside the blocks take
    alpha. To apply it to another method's result, pass that as the one expert: ``lines(base, [ties(base, experts)])``.

    Needs: no data (the paper chooses one of alpha, beta on validation images). Meaningful for one or several experts
    whose names hold block numbers; prompts and heads have none and are refused.

    Args:
        alpha: of the first block. None is 0.5 for one expert (the paper chooses it), and 1 / K for several, the paper's
            rule for their sum. Its rule for another merge of them: the L1 norm of ``sum_k tau_k`` over K times that of
            the merged task vector.
        beta: None is ``1 - alpha`` for one expert, so that the last block is taken whole. Of several it must be given:
            the authors search it, for the sum in (0, 1], for TIES in 0.1 .. 1.5.
        layer: name -> (l, L), or None outside the blocks. By default the first number between two dots in a name is l,
            and L counts those behind the same beginning, so that two towers are counted each on its own.
    """
    names = floating(base)
    depths = {name: (layer or _depth_of(names))(name) for name in names}
    if not any(depths.values()):
        raise ValueError(f"lines needs names with block numbers such as 'resblocks.3.', got {', '.join(names[:3])}")
    if beta is None and len(experts) > 1:
        raise ValueError(f"beta must be given for {len(experts)} experts (the paper searches it), got None")
    alpha = (1 / len(experts) if len(experts) > 1 else 0.5) if alpha is None else alpha
    beta = 1 - alpha if beta is None else beta
    scales = {name: alpha + beta * d[0] / max(d[1] - 1, 1) if d else alpha for name, d in depths.items()}
    ones = [1.0] * len(experts)
    return Merge(lambda part: ops.merge_deltas(part.stored_base, part.stored, ones, scale=scales[part.name]))


def _depth_of(names: Sequence[str]) -> Callable[[str], tuple[int, int] | None]:
    found = {name: match for name in names if (match := re.search(r"(?:^|\.)(\d+)(?=\.)", name))}
    blocks: dict[str, int] = {}
    for name, match in found.items():
        prefix = name[: match.start(1)]
        blocks[prefix] = max(blocks.get(prefix, 0), int(match[1]) + 1)
    return lambda name: (int(found[name][1]), blocks[name[: found[name].start(1)]]) if name in found else None


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

    thresholds = _thresholds(base, experts, density, trim, lambda part: moments(part) * part.deltas.square())

    def merge(part: Part) -> Tensor:
        v, deltas = moments(part), part.deltas
        saliency = v * deltas.square()
        weights = (v.pow(power) + epsilon) * _reach(saliency, thresholds[part.name]) * saliency.sign()
        total = weights.sum(0)
        return part.base + (weights * deltas).sum(0) / torch.where(total > 0, total, 1.0)

    return Merge(merge)


@method
def compeft(base: StateDict, experts: Sequence[StateDict], *, density: float = 0.2, alpha: float = 1.0) -> Merge:
    """ComPEFT: the tuned residual as signs and one number (arXiv 2311.13171, algorithm 1).

    ``base + alpha * std(tau) * sign(tau)`` where |tau| is among the largest ``density`` of all tensors together, the
    base elsewhere; std is that of the whole tau. :func:`compeft_size` says what the residual takes then. For LoRA the
    residual are the factors themselves, so its base is zeros; for IA3 it is ones.

    Needs: no data (the paper chooses alpha on validation). Meaningful for one expert, any tensors. Two passes more.

    Args:
        density: k of the paper, which tries 5 to 50 %.
        alpha: the paper tries 0.5 to 10.
    """
    thresholds = _thresholds(base, experts, density, "global", None)

    def trimmed(part: Part) -> Tensor:
        return _trimmed(part.deltas, thresholds[part.name])

    def moments(part: Part) -> Tensor:
        values = part.deltas.double()
        return torch.stack([values.sum(), values.square().sum()]).cpu()

    count = sum(source(base, name).numel for name in floating(base))
    first, second = sum(over_parts(moments, floating(base), base, experts), torch.zeros(2)).tolist()
    deviation = math.sqrt(max(second - first * first / count, 0.0) / (count - 1)) if count > 1 else 0.0
    return Merge(lambda part: part.base + alpha * deviation * trimmed(part)[0].sign())


@dataclass(frozen=True)
class CompressedSize:
    """What a residual takes, in bytes, rounded up.

    Attributes:
        parameters: its elements.
        kept: those that are not zero after compression.
        dense: 16 bits for each element, as it is stored without compression.
        masks: two bits for each element, and 16 for the one number (arXiv 2311.13171).
        golomb: with the places of what is kept in Golomb code, ``b + 1 / (1 - (1 - k)^(2^b))`` bits each where
            ``b = 1 + floor(log2(log(golden ratio - 1) / log(1 - k)))``, a sign each, and 16 (as arXiv 1903.02891 has it
            for sparse ternary updates).
        entropy: the least for independent elements, ``-(1 - k) log2(1 - k) - k log2(k / 2)`` bits each, and 16.
    """

    parameters: int
    kept: int
    dense: int
    masks: int
    golomb: int
    entropy: int


@torch.no_grad()
def compeft_size(base: StateDict, experts: Sequence[StateDict], *, density: float = 0.2) -> CompressedSize:
    """The size of the one expert's residual after :func:`compeft`."""
    check(METHODS["compeft"], base, experts)
    thresholds = _thresholds(base, experts, density, "global", None)
    parameters = sum(source(base, name).numel for name in floating(base))
    count = lambda part: int(_trimmed(part.deltas, thresholds[part.name]).count_nonzero())  # noqa: E731
    kept = sum(over_parts(count, floating(base), base, experts))
    k = kept / max(parameters, 1)
    entropy = sum(-p * math.log2(q) for p, q in ((1 - k, 1 - k), (k, k / 2)) if p > 0)
    golomb = kept * (_golomb_bits(k) + 1)
    bits = 16 * parameters, 2 * parameters + 16, golomb + 16, entropy * parameters + 16
    return CompressedSize(parameters, kept, *(math.ceil(count / 8) for count in bits))


def _golomb_bits(k: float) -> float:
    """Bits for the place of each of the elements that are kept, a share of k."""
    if k in (0, 1):
        return 0.0
    b = max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log(1 - k))))
    return b + 1 / (1 - (1 - k) ** 2**b)


# -- trimming and election ---------------------------------------------------------------------------------------------


def _groups(base: StateDict, scope: str) -> list[list[str]]:
    """Names of the tensors that are trimmed together."""
    names = [name for name in floating(base) if source(base, name).numel]
    return [names] if scope == "global" and names else [[name] for name in names]


def _thresholds(
    base: StateDict, experts: Sequence[StateDict], density: float, scope: str, measure: Callable[[Part], Tensor] | None
) -> dict[str, list[float]]:
    """For each tensor and expert the least of the largest ``int(density * elements)`` values of a measure.

    Args:
        measure: part -> [K, n], not negative; None: the magnitudes of the deltas.
    """
    check_fraction("density", density)
    check_choice("trim", scope, SCOPES)
    found: dict[str, list[float]] = {}
    for group in _groups(base, scope):
        total = sum(source(base, name).numel for name in group)
        keep = int(density * total)
        if keep in (0, total):
            thresholds = [0.0 if keep else math.inf] * len(experts)
        else:
            (thresholds,) = order_statistics(measure, group, base, experts, [total - keep])
        found |= dict.fromkeys(group, thresholds)
    return found


def _trimmed(deltas: Tensor, thresholds: Sequence[float]) -> Tensor:
    """[K, n] with 0 in place of what does not reach its expert's threshold in magnitude."""
    rows = zip(deltas, _below(thresholds, deltas), strict=True)
    return torch.stack([F.hardshrink(row, limit.item()) for row, limit in rows])


def _reach(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """1 where [K, n] reach their expert's threshold, else 0. By arithmetic, much faster on a CPU than by booleans."""
    return (values - _below(thresholds, values)[:, None]).relu_().sign_()


def _below(thresholds: Sequence[float], like: Tensor) -> Tensor:
    """The next numbers below thresholds, [K]: what is above them reaches the thresholds."""
    limits = torch.tensor(thresholds, dtype=like.dtype, device=like.device)
    return torch.nextafter(limits, torch.full_like(limits, -math.inf))


def _election(weights: Sequence[float] | None, count: int, sign: str | None, divide: str) -> dict[str, Any]:
    """What :func:`mergetune.ops.merge_deltas` is to be told of weights, votes and division; see :func:`ties`."""
    weights = per_expert("weights", weights, count)
    check_choice("sign", sign, (None, "sum", "count"))
    check_choice("divide", divide, ("count", "weight", "none"))
    if sign is None:
        return {"weights": weights}
    if divide == "weight" and min(weights) < 0:
        raise ValueError(f"weights must not be negative with divide='weight', got {weights}")
    votes = None if divide == "count" else [math.copysign(w != 0, w) for w in weights] if sign == "count" else weights
    shares = {"count": [1.0] * count, "weight": weights, "none": None}[divide]
    return {"weights": weights, "vote": sign, "votes": votes, "shares": shares}


def _random_mask(seed: int, part: Part, k: int, density: float) -> Tensor:
    """[n] random bits that depend on seed, tensor name, expert and place only."""
    kept = np.ones(part.end - part.begin, np.bool_)
    limit, rest = divmod(density * 2**16, 1)
    for begin, end in stretches(len(kept)) if density < 1 else ():
        key = hashlib.blake2b(f"{seed}/{k}/{part.begin + begin}/{part.name}".encode(), digest_size=16).digest()
        random = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
        words = random.integers(0, 2**64, (end - begin + 3) // 4, np.uint64).view(np.uint16)[: end - begin]
        np.less(words, np.uint16(limit), out=kept[begin:end])
        ties = begin + np.flatnonzero(words == np.uint16(limit))  # 16 bits decide, but for these
        kept[ties] = random.random(len(ties)) < rest
    return torch.from_numpy(kept)
