"""Weight averages: plain, WiSE-FT, spherical, Model Stock, by metrics and by Fisher information.

K is the number of experts, tau_k = expert_k - base the task vector of expert k.
"""

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

    Needs: no data. Meaningful for any number of experts and any tensors. The base is not part of the average; to
    include it, pass it as one of the experts.

    Args:
        base: state dict that gives only the dtypes and the order of names; None takes both from the first expert.
        weights: one number per expert; None weights all experts equally.
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
        alpha: 0 gives the base, 1 the expert; the paper recommends 0.5 if alpha cannot be chosen on data. Values
            outside [0, 1] extrapolate.
    """
    return Merge(lambda part: ((1 - alpha) * part.base).add_(part.experts[0], alpha=alpha))


@method
def slerp(base: StateDict | None, experts: Sequence[StateDict], *, t: float = 0.5) -> Merge:
    """Spherical interpolation of two models, tensor by tensor (Shoemake, SIGGRAPH 1985).

    With tensors a and b as vectors and w the angle between them, the result is
    ``sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b``. As in mergekit, a and b are not normalised, and
    ``(1 - t) a + t b`` is used where ``|cos w| > 0.9995``; here also where a or b is zero. A base and its fine-tuned
    model are usually that close, so for them slerp gives the result of :func:`wise_ft`.

    Needs: no data. Meaningful for two models: base (t = 0) and one expert (t = 1), or no base and two experts. Reads
    the inputs twice.

    Args:
        t: position on the way from the first model (0) to the second (1).
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
    """Model Stock: the mean of the experts, pulled to the base (arXiv 2403.19522; mergekit: model_stock.py).

    In each tensor, with cos the mean cosine over all pairs of task vectors::

        t      = K cos / (1 + (K - 1) cos)
        merged = base + t * mean_k tau_k

    The paper states the formula for two experts, and for several with equal angles; the mean over pairs is mergekit's.
    As in mergekit, a product of two norms below 1e-6 is replaced by 1e-6, so tensors that hardly moved stay near the
    base, and opposing experts (cos < 0) give a negative t. Where the denominator is (nearly) zero or negative, the
    base is returned.

    Needs: no data. Meaningful for two or more experts fine-tuned from one base in the same way, for example with
    several seeds; any tensors. Reads the inputs twice.
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
    """t of :func:`model_stock`, from the inner products of the task vectors, [K, K]."""
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
    """Metrics-weighted average of checkpoints (MWA, arXiv 2504.18580): better or later checkpoints weigh more.

    The result is ``sum_k w_k expert_k`` with ``w_k = m_k^penalty / sum_j m_j^penalty`` if higher metrics m are better
    (steps, accuracy), and with ``-penalty`` as the exponent otherwise (losses). The paper weights by training loss or
    steps with one penalty factor. This power law is our reading: we did not have the exact formula.

    Needs: one number per expert, no data. Meaningful for several checkpoints of one run, any tensors.

    Args:
        base: state dict that gives only the dtypes and the order of names; None takes both from the first expert.
        metrics: one positive number per expert: a training loss, or with ``higher_is_better`` steps or accuracy.
        higher_is_better: whether a larger metric gives a larger weight.
        penalty: 0 gives the plain average, a large penalty the best checkpoint alone.
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

    ``sum_k c_k max(F_k, floor) expert_k / sum_k c_k max(F_k, floor)``, where ``F_k`` is the diagonal Fisher information
    of expert k and ``c_k = weights_k``, or ``weights_k / |F_k|`` (authors' code: model_merging/merging.py).

    Needs: the Fisher diagonals, which need data (:func:`mergetune.fisher_diagonal` for class weights, with
    ``unit_mean=False``). Meaningful for several experts, including the zero-shot solution; any tensors.

    Args:
        base: state dict that gives only the dtypes and the order of names; None takes both from the first expert.
        fishers: F_k, one state dict per expert with the expert's names and shapes; values must not be negative.
        weights: lambda of the paper, one number per expert, not negative; None is 1 for all.
        floor: smaller Fisher values are raised to this value before ``normalize`` applies (authors' code: 1e-6).
        favor_first: True raises only the Fisher values of the first expert to ``floor`` (authors' code). Elements
            without Fisher information in any expert then take the first expert's value, or the average by ``weights``
            if the first weight is 0. False raises the values of all experts; such elements take the average by
            ``weights``.
        normalize: "norm" divides each weight by the L2 norm of F_k over all tensors, so that no expert dominates
            through the scale of its gradients; this reads the Fisher diagonals once more. It is the default of the
            authors' script. None is the paper's formula.
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
