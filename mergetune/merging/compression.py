"""Task vectors compressed to signs and one magnitude (ComPEFT), and their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetune.merging.checks import check
from mergetune.merging.methods import METHODS
from mergetune.merging.plans import Merge, method
from mergetune.merging.sources import Part, StateDict, floating, over_parts, source
from mergetune.merging.trimming import trim, trim_thresholds


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
    """Bits for the place of each of the elements that are kept, a share of k."""
    if k in (0, 1):
        return 0.0
    b = max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log(1 - k))))
    return b + 1 / (1 - (1 - k) ** 2**b)
