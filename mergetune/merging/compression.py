"""ComPEFT: task vectors compressed to signs and one magnitude, and the compressed size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mergetune.facts.brief import brief
from mergetune.merging.methods import METHODS
from mergetune.merging.plans import Merge, method
from mergetune.merging.preparation import prepared
from mergetune.merging.sources import Part, StateDict, floating, over_parts, source
from mergetune.merging.trimming import trim, trim_thresholds


@method
def compeft(base: StateDict, experts: Sequence[StateDict], *, density: float = 0.2, alpha: float = 1.0) -> Merge:
    """ComPEFT: the task vector compressed to signs and one magnitude (arXiv 2311.13171, algorithm 1).

    Elements whose |tau| is among the largest share ``density`` of all tensors together become
    ``base + alpha * std(tau) * sign(tau)``; the other elements keep the base. std is taken over all elements of tau.
    :func:`compeft_size` returns the compressed size. For LoRA factors use a base of zeros, for IA3 vectors one of ones.

    Needs: no data (the paper chooses alpha on validation images). Meaningful for one expert, any tensors. Reads the
    inputs two more times.

    Args:
        density: k of the paper, which tries 5 to 50 %.
        alpha: factor of the magnitude; the paper tries 0.5 to 10.
    """
    thresholds = trim_thresholds(base, experts, density, "global", None)

    def trimmed(part: Part) -> Tensor:
        return trim(part.deltas, thresholds[part.name])

    def moments(part: Part) -> Tensor:
        values = part.deltas.double()
        return torch.stack([values.sum(), values.square().sum()]).cpu()

    count = sum(source(base, name).numel for name in floating(base))
    first, second = sum(over_parts(moments, floating(base), base, experts), torch.zeros(2)).tolist()
    deviation = math.sqrt(max(second - first * first / count, 0.0) / (count - 1)) if count > 1 else 0.0
    return Merge(lambda part: part.base + alpha * deviation * trimmed(part)[0].sign())


@brief()
@dataclass(frozen=True)
class CompressedSize:
    """Sizes of a task vector of n elements, of which a share k is not zero after :func:`compeft`.

    Sizes are in bytes, rounded up. Every compressed form has 16 bits for the magnitude.

    Attributes:
        parameters: n.
        kept: number of elements that are not zero after compression.
        dense: size without compression, with 16 bits per element.
        masks: size as two masks, with 2 bits per element (arXiv 2311.13171).
        golomb: size with a sign bit per kept element and Golomb-coded positions (arXiv 1903.02891, for sparse ternary
            updates): ``b + 1 / (1 - (1 - k)^(2^b))`` bits per position with
            ``b = 1 + floor(log2(log(golden ratio - 1) / log(1 - k)))``.
        entropy: smallest possible size for independent elements, ``-(1 - k) log2(1 - k) - k log2(k / 2)`` bits per
            element.
    """

    parameters: int
    kept: int
    dense: int
    masks: int
    golomb: int
    entropy: int


@torch.no_grad()
def compeft_size(base: StateDict, experts: Sequence[StateDict], *, density: float = 0.2) -> CompressedSize:
    """Sizes of an expert's task vector after :func:`compeft`; tensors equal in base and expert do not count.

    Args:
        base, experts, density: as in :func:`compeft`; ``experts`` holds one expert.
    """
    given = prepared(METHODS["compeft"], base, experts)
    base, experts = cast("StateDict", given.moving_base), given.moving  # compeft needs a base, which is checked
    thresholds = trim_thresholds(base, experts, density, "global", None)
    parameters = sum(source(base, name).numel for name in floating(base))
    count = lambda part: int(trim(part.deltas, thresholds[part.name]).count_nonzero())  # noqa: E731
    kept = sum(over_parts(count, floating(base), base, experts))
    k = kept / max(parameters, 1)
    entropy = sum(-p * math.log2(q) for p, q in ((1 - k, 1 - k), (k, k / 2)) if p > 0)
    golomb = kept * (_golomb_bits(k) + 1)
    bits = 16 * parameters, 2 * parameters + 16, golomb + 16, entropy * parameters + 16
    return CompressedSize(parameters, kept, *(math.ceil(count / 8) for count in bits))


def _golomb_bits(k: float) -> float:
    """Bits per position of a kept element, if a share k of the elements is kept."""
    if k in (0, 1):
        return 0.0
    b = max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log(1 - k))))
    return b + 1 / (1 - (1 - k) ** 2**b)
