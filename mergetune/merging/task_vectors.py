"""Merging of task vectors, the differences between experts and base: task arithmetic, TIES, DARE and LiNeS.

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
from mergetune.merging.sources import Part, StateDict, floating, stretches, whole_of
from mergetune.merging.trimming import trim_thresholds


@method
def task_arithmetic(
    base: StateDict, experts: Sequence[StateDict], *, scale: float = 0.4, weights: Sequence[float] | None = None
) -> Merge:
    """Task arithmetic (arXiv 2212.04089): ``base + scale * sum_k weights_k tau_k``.

    Needs: no data (scale may be chosen on validation images). Meaningful for one or several experts, any tensors.

    Args:
        scale: factor of the sum; the TIES paper uses 0.4 for several experts without validation. With a single expert,
            1 returns the expert.
        weights: one number per expert; None is 1 for all.
    """
    weights = per_expert("weights", weights, len(experts))
    return Merge(lambda part: ops.merge_deltas(part.stored_base, part.stored, weights, scale=scale))


@method
def negate(base: StateDict, experts: Sequence[StateDict], *, scale: float = 1.0) -> Merge:
    """Makes the base forget the experts' tasks by negated task vectors: ``base - scale * sum_k tau_k``.

    The method is from arXiv 2212.04089.

    Needs: no data (the paper chooses scale so that a control task keeps 95 % of its accuracy). Meaningful for one or
    several experts whose tasks are to be forgotten; any tensors.

    Args:
        scale: factor of the subtracted task vectors.
    """
    return task_arithmetic.plan(base, experts, scale=-scale)


@method
def layerwise(base: StateDict, experts: Sequence[StateDict], *, coefficients: Mapping[str, Sequence[float]]) -> Merge:
    """Task arithmetic with coefficients for each tensor: ``base[name] + sum_k coefficients[name][k] tau_k[name]``.

    This is the form of layer-wise AdaMerging (arXiv 2310.02575). :func:`entropy_coefficients` and
    :func:`alignment_coefficients` learn such coefficients.

    Needs: coefficients, no data. Meaningful for one or several experts, any tensors.

    Args:
        coefficients: name of each floating-point tensor -> one number per expert.
    """
    if missing := [name for name in floating(base) if name not in coefficients]:
        raise ValueError(f"coefficients must hold every floating-point tensor, but {missing[0]!r} is missing")
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
    """TIES: trims task vectors, elects a sign per element, and averages the agreeing values (arXiv 2306.01708, alg. 1).

    Each tau_k keeps the share ``density`` of its elements with the largest magnitudes; the others become 0. The elected
    sign of an element is the sign of ``sum_k tau_k``. The kept values with this sign are averaged, multiplied by
    ``scale`` and added to the base. All values equal to the trimming threshold are kept (the authors' code keeps one
    more). If the sum is exactly zero, the positive sign is elected, as in peft and mergekit (the authors' code takes
    the sign of the majority of elements).

    Needs: no data. Meaningful for several experts, any tensors; one expert is only trimmed. Reads the inputs two more
    times for the thresholds.

    Args:
        density: share of elements that each expert keeps (k of the paper, 20 %).
        scale: lambda of the paper; 1 is the paper's choice without validation.
        weights: one number per expert; None is 1 for all.
        trim: "global" trims all tensors of an expert together (authors' code), "tensor" each tensor separately (peft,
            mergekit).
        sign: how the sign is elected: by the "sum" of values (paper), or by the "count" of signs.
        divide: divisor of the summed values: the "count" of agreeing values (paper, peft), their "weight" (mergekit),
            or "none" (mergekit with normalize=false). With "weight" and "none" the signs of the weighted values are
            elected, as in mergekit.
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
    """DARE: drops random elements of task vectors, rescales the others, and merges (arXiv 2311.03099).

    The result is ``base + scale * sum_k weights_k m_k tau_k / density`` with independent masks
    ``m_k ~ Bernoulli(density)``. ``consensus`` replaces the sum by the sign election of TIES.

    Needs: no data. Meaningful for one or several experts, any tensors; for small tau only (the paper: below 0.002). The
    mask of an element depends only on the seed, the tensor name, the expert's number and the element's index. The same
    tensor therefore gets the same mask in any state dict, and permuting the experts changes the masks.

    Args:
        density: share of elements that each expert keeps, 1 - p; the paper drops p = 90 % and more.
        scale: factor of the merged task vector; the paper searches 0.5 to 1.
        weights: one number per expert; None is 1 for all.
        rescale: "density" divides the kept elements by ``density`` (paper). "l1", "l2" and "linf" restore this norm of
            tau_k in each tensor (mergekit; whole tensors are then held in memory). None does not rescale.
        consensus: None adds the task vectors; "sum" or "count" elects signs as :func:`ties` does. This is peft's
            DARE-TIES; mergekit's is ``consensus="sum", divide="none", rescale="l1"``. The DARE authors also trim: for
            their version pass ``dare(base, [expert], seed=k)`` of each expert k to :func:`ties`. The seeds must differ,
            because each of these calls has only one expert, number 0.
        divide: divisor with a consensus, as in :func:`ties`.
        seed: seed of the masks.
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

    In block l = 0 .. L - 1 the result is ``base + (alpha + beta * l / (L - 1)) * sum_k tau_k``; tensors outside the
    blocks have the scale alpha. To apply LiNeS to the result of another method, pass the result as the only expert:
    ``lines(base, [ties(base, experts)])``.

    Needs: no data (the paper chooses alpha or beta on validation images). Meaningful for one or several experts whose
    tensor names hold block numbers. Prompts and heads have no block numbers and are refused.

    Args:
        alpha: scale of the first block. None is 0.5 for one expert (the paper chooses alpha on validation images), and
            1 / K for several, the paper's rule for the sum of task vectors. For the result of another merging method,
            the paper uses the L1 norm of ``sum_k tau_k`` divided by K times the L1 norm of the merged task vector.
        beta: amount by which the scale grows from the first block to the last. None is ``1 - alpha`` for one expert,
            which keeps the whole task vector in the last block. For several experts beta must be given: the authors
            search it, in (0, 1] for the sum and in 0.1 .. 1.5 for TIES.
        layer: function from a tensor name to (l, L), or to None outside the blocks. By default l is the first number
            between two dots in a name, and L is the number of blocks whose names have the same beginning, so two towers
            are counted separately.

    Raises:
        ValueError: no tensor name holds a block number, or beta is missing for several experts.
    """
    names = floating(whole_of(base))  # a block counts even where no expert moved it
    depths = {name: (layer or _depth_of(names))(name) for name in names}
    if not any(depths.values()):
        raise ValueError(f"lines needs names with block numbers such as 'resblocks.3.', got {', '.join(names[:3])}")
    if beta is None and len(experts) > 1:
        raise ValueError(f"beta must be given for {len(experts)} experts, got None: the paper searches it in (0, 1]")
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
    """Keyword arguments of :func:`mergetune.ops.merge_deltas` for weights, votes and division; see :func:`ties`."""
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
    """Random mask [n] of expert k, which depends only on seed, tensor name, k and the elements' indices."""
    kept = np.ones(part.end - part.begin, np.bool_)
    limit, rest = divmod(density * 2**16, 1)
    for begin, end in stretches(len(kept)) if density < 1 else ():
        key = hashlib.blake2b(f"{seed}/{k}/{part.begin + begin}/{part.name}".encode(), digest_size=16).digest()
        random = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
        words = random.integers(0, 2**64, (end - begin + 3) // 4, np.uint64).view(np.uint16)[: end - begin]
        np.less(words, np.uint16(limit), out=kept[begin:end])
        ties = begin + np.flatnonzero(words == np.uint16(limit))  # 16 bits do not decide these elements
        kept[ties] = random.random(len(ties)) < rest
    return torch.from_numpy(kept)
