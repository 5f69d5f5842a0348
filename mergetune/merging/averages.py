"""Averages of weights: plain, WiSE-FT, spherical, Model Stock, by metrics, by Fisher information. K experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergetune import ops
from mergetune.merging.checks import check_choice, check_states, column, per_expert
from mergetune.merging.plans import Merge, method
from mergetune.merging.sources import Part, StateDict, floating, over_parts


@method
def average(base: StateDict | None, experts: Sequence[StateDict], *, weights: Sequence[float] | None = None) -> Merge:
    """Weight average (uniform soup, arXiv 2203.05482): ``sum_k weights_k expert_k / sum_k weights_k``.

    Needs: no data. Meaningful for any number of experts and any tensors. The base is not averaged; put it among the
    experts if it shall be.

    Args:
        base: gives dtype and names, nothing else; may be None.
        weights: one for each expert; None is 1 for all.
    """
    weights = per_expert("weights", weights, len(experts))
    total = sum(weights)
    if not total > 0:
        raise ValueError(f"weights must have a positive sum, got {weights}")
    weights = [weight / total for weight in weights]
    return Merge(lambda part: ops.merge_deltas(None, part.stored, weights))


@method
def wise_ft(base: StateDict, experts: Sequence[StateDict], *, alpha: float = 0.5) -> Merge:
    """WiSE-FT (arXiv 2109.01903): ``(1 - alpha) base + alpha expert``.

    Needs: no data (alpha may be chosen on validation images). Meaningful for the zero-shot base and one expert.

    Args:
        alpha: 0 is the base, 1 the expert; the paper recommends 0.5 where nothing is known. Outside [0, 1] it
            extrapolates.
    """
    return Merge(lambda part: ((1 - alpha) * part.base).add_(part.experts[0], alpha=alpha))


@method
def slerp(base: StateDict | None, experts: Sequence[StateDict], *, t: float = 0.5) -> Merge:
    """Spherical interpolation of each tensor a, b with angle w between them, taken as vectors.

    ``sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b`` (Shoemake, SIGGRAPH 1985; per tensor and without normalising a
    and b, as mergekit does); ``(1 - t) a + t b`` where ``|cos w| > 0.9995``, as there, or where one is zero. A base and
    its fine-tune are usually that close: there it is :func:`wise_ft`.

    Needs: no data. Meaningful for two: base (t 0) and one expert (t 1), or no base and two experts. Two passes.
    """
    if len(experts) + (base is not None) != 2:
        raise ValueError(
            f"slerp needs a base and one expert, or no base and two experts, got {'a' if base is not None else 'no'} "
            f"base and {len(experts)}"
        )
    ends = [base, *experts] if base is not None else list(experts)
    scales = {name: _slerp_scales(name, ends, t) for name in floating(ends[0])}

    def merge(part: Part) -> Tensor:
        rows = part.stored if part.stored_base is None else [part.stored_base, *part.stored]
        return ops.merge_deltas(None, rows, scales[part.name])

    return Merge(merge)


def _slerp_scales(name: str, ends: Sequence[StateDict], t: float) -> tuple[float, float]:
    products = over_parts(lambda part: (part.experts @ part.experts.T).cpu().double(), [name], None, ends)
    gram = sum(products, torch.zeros(2, 2).double())
    norms = gram.diagonal().sqrt()
    cosine = (gram[0, 1] / norms.prod()).item() if norms.all() else 1.0
    if abs(cosine) > 0.9995:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@method
def model_stock(base: StateDict, experts: Sequence[StateDict]) -> Merge:
    """Model Stock: the experts' mean, pulled to the base by their angle (arXiv 2403.19522; mergekit: model_stock.py).

    In each tensor, with tau_k = expert_k - base and cos the mean of the cosines between two of them::

        t      = K cos / (1 + (K - 1) cos)
        merged = base + t * mean_k tau_k

    The paper has this for two experts and for one angle between any two of several; the mean over pairs is mergekit's.
    As there, a product of norms below 1e-6 counts as that, so tensors that hardly moved stay near the base, and
    experts that go against each other (cos < 0) take t below 0. Where the denominator vanishes the base stays.

    Needs: no data. Meaningful for two or more experts fine-tuned from one base alike, such as with several seeds; any
    tensors. Two passes.
    """
    grams: dict[str, Tensor] = {}
    for name, gram in over_parts(_gram_of_deltas, floating(base), base, experts):
        grams[name] = grams.get(name, torch.zeros_like(gram)) + gram
    steps = {name: _stock_step(gram) for name, gram in grams.items()}
    return Merge(lambda part: part.base.add(part.deltas.mean(0), alpha=steps[part.name]))


def _gram_of_deltas(part: Part) -> tuple[str, Tensor]:
    deltas = part.deltas
    return part.name, (deltas @ deltas.T).cpu().double()


def _stock_step(gram: Tensor) -> float:
    """Products of task vectors [K, K] -> t."""
    count, norms = len(gram), gram.diagonal().sqrt()
    cosines = (gram / torch.outer(norms, norms).clamp(min=1e-6)).clamp(-1, 1)
    cosine = cosines[(*torch.triu_indices(count, count, 1),)].mean().item()
    below = 1 + (count - 1) * cosine
    return count * cosine / below if below > 1e-6 else 0.0


@method
def metrics_average(
    base: StateDict | None,
    experts: Sequence[StateDict],
    *,
    metrics: Sequence[float],
    higher_is_better: bool = False,
    penalty: float = 1.0,
) -> Merge:
    """Metrics-weighted averaging of checkpoints (MWA, arXiv 2504.18580): better or later checkpoints count more.

    Computed: ``sum_k w_k expert_k`` with ``w_k = m_k^penalty / sum_j m_j^penalty`` where more is better (steps,
    accuracy), and ``m_k^-penalty`` for losses. The paper weights by training loss or steps with one penalty factor;
    its exact formula was not at hand, this power law is our reading of it.

    Needs: one number for each expert, no data. Meaningful for several checkpoints of one run, any tensors.

    Args:
        metrics: positive numbers: training losses, or with ``higher_is_better`` steps or accuracies.
        penalty: 0 is the plain average, large takes the best alone.
    """
    numbers = per_expert("metrics", metrics, len(experts))
    if min(numbers) <= 0:
        raise ValueError(f"metrics must be positive, got {numbers}")
    if not penalty >= 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    logs = torch.tensor(numbers, dtype=torch.float64).log()
    weights = (penalty * (logs if higher_is_better else -logs)).softmax(0).tolist()
    return average.plan(base, experts, weights=weights)


@method
def fisher_average(
    base: StateDict | None,
    experts: Sequence[StateDict],
    *,
    fishers: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    favor_first: bool = True,
    normalize: str | None = None,
) -> Merge:
    """Fisher-weighted average (arXiv 2111.09832), element by element.

    ``sum_k c_k max(F_k, floor) expert_k / sum_k c_k max(F_k, floor)`` with the diagonal Fisher information ``F_k`` of
    each expert and ``c_k = weights_k``, or ``weights_k / |F_k|`` (authors' code: model_merging/merging.py).

    Needs: the Fisher diagonals, which need data (:func:`mergetune.fisher_diagonal` for class weights, with
    ``unit_mean=False``). Meaningful for several experts, the zero-shot solution may be one of them; any tensors.

    Args:
        base: gives dtype and names, nothing else; may be None.
        fishers: one state dict for each expert, of its names and shapes, not negative.
        weights: lambda of the paper, one for each expert, not negative; None is 1 for all.
        floor: Fisher values below it count as it (authors' code: 1e-6), as they are given, before ``normalize``.
        favor_first: only the first expert's values are raised to ``floor`` (authors' code), so that it stays where no
            Fisher has anything; else everybody's, and there the weighted average is taken. That is also where nothing
            is left since the first one's weight is 0.
        normalize: "norm" divides each weight by the L2 norm of F_k over all tensors (a first pass over the diagonals),
            so that an expert does not outweigh another by the scale of its gradients. The authors' script does so by
            default; None is the paper's formula.
    """
    weights = per_expert("weights", weights, len(experts))
    check_choice("normalize", normalize, (None, "norm"))
    check_states("fishers", fishers, experts)
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must not be negative, nor all zero, got {weights}")
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")
    coefficients = weights
    if normalize:
        norms = lambda part: part.of("fishers", fishers).double().square().sum(1).cpu()  # noqa: E731
        found = over_parts(norms, floating(experts[0]), None, experts[:1])
        squares = sum(found, torch.zeros(len(experts), dtype=torch.float64))
        coefficients = [w / (norm or 1.0) for w, norm in zip(weights, squares.sqrt().tolist(), strict=True)]
    floored = 1 if favor_first else len(experts)

    def merge(part: Part) -> Tensor:
        fisher = part.of("fishers", fishers)
        if fisher.min() < 0:
            raise ValueError(f"fishers must not be negative, got {fisher.min().item()} in {part.name!r}")
        fisher[:floored].clamp_(min=floor)
        fisher *= column(coefficients, fisher)
        fisher = torch.where(fisher.sum(0) > 0, fisher, column(weights, fisher))
        return (fisher * part.experts).sum(0) / fisher.sum(0)

    return Merge(merge)
