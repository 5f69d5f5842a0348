"""Merging of task vectors, the differences of experts from their common base: arithmetic, trimming, signs, balance.

Shapes: K experts, n elements of a stretch; tau_k = expert_k - base, computed in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergetune import ops
from mergetune.merging.checks import check_choice, check_fraction, per_expert
from mergetune.merging.plans import Merge, method
from mergetune.merging.sources import Part, StateDict, floating, stretches
from mergetune.merging.trimming import trim_thresholds


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
    thresholds = trim_thresholds(base, experts, density, trim, None)
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
        return base + ops.merge_deltas(None, after.unbind(), scale=scale, **election)

    return Merge(merge, whole=rescale in _NORMS)


_NORMS = {"l1": 1, "l2": 2, "linf": math.inf}


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


# -- trimming and election ---------------------------------------------------------------------------------------------


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
