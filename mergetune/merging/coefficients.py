"""Merging with coefficients that are learned on unlabelled inputs: AdaMerging and Expert Merging.

Shapes: K experts, B batch, C classes, N_k inputs of the task of expert k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler
from tqdm.auto import trange

from mergetune.io import hidden
from mergetune.merging.checks import check_choice, per_expert
from mergetune.merging.methods import METHODS, Method
from mergetune.merging.preparation import prepared
from mergetune.merging.sources import StateDict, floating
from mergetune.merging.task_vectors import layerwise

Predict = Callable[[dict[str, Tensor], Tensor, int], Any]
"""Function of weights, inputs [B, ...] and k that returns the logits [B, C] of these weights on the task of expert k.

The logits must be differentiable in the weights."""


def adamerging(base: StateDict, experts: Sequence[StateDict], **options) -> dict[str, Tensor]:
    """AdaMerging (arXiv 2310.02575): task arithmetic with the coefficients of :func:`entropy_coefficients`.

    Needs: unlabelled inputs of every expert's task and the model. Meaningful for one or several experts, any tensors.

    Args:
        options: keyword arguments of :func:`entropy_coefficients`.
    """
    return layerwise(base, experts, coefficients=entropy_coefficients(base, experts, **options))


def expert_merging(base: StateDict, experts: Sequence[StateDict], **options) -> dict[str, Tensor]:
    """Expert Merging (arXiv 2509.25712): task arithmetic with the coefficients of :func:`alignment_coefficients`.

    Needs: unlabelled inputs of every expert's task and the model. Meaningful for one or several experts, any tensors.
    The chunks of layers of Expert Merging++ are not implemented.

    Args:
        options: keyword arguments of :func:`alignment_coefficients`.
    """
    return layerwise(base, experts, coefficients=alignment_coefficients(base, experts, **options))


def entropy_coefficients(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    predict: Predict,
    data: Sequence[Tensor],
    per: str = "tensor",
    start: float = 0.3,
    steps: int = 500,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Learns coefficients in [0, 1] that make the merged model confident on unlabelled inputs (arXiv 2310.02575).

    Adam minimises the entropy ``sum_k mean_x H(softmax(logits_k(x)))`` of the merged model; the coefficients are
    clamped to [0, 1] in the forward pass. The defaults are those of the authors' code (main_layer_wise_adamerging.py),
    except for the batch: the code adds the means of two batches of 16 per task and step, which is twice the mean over
    one batch of 32. Adam does not depend on this factor, so this function uses one batch of 32.

    Args:
        predict: function of weights, inputs and k that returns logits [B, C] for the task of expert k.
        data: K tensors [N_k, ...], the unlabelled inputs of each expert's task. Use validation or test-time images, but
            no images whose accuracy you report.
        per: "tensor" learns one coefficient per tensor and expert (layer-wise), "expert" one per expert.
        start: initial value of every coefficient.
        steps: number of Adam steps.
        batch_size: inputs per task and step.
        lr: learning rate of Adam.
        seed: seed of the batches.

    Returns:
        Name of each floating-point tensor -> K coefficients.
    """

    def loss(coefficients: Tensor, weights: dict[str, Tensor], batches: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=coefficients.device)
        for k, x in enumerate(batches):
            logs = _logits(predict(weights, x, k)).log_softmax(-1)
            total = total - (logs.exp() * logs).sum(-1).mean()
        return total

    return _learn(
        base,
        experts,
        loss,
        METHODS["adamerging"],
        bound=lambda raw: raw.clamp(0, 1),
        start=start,
        data=data,
        per=per,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        prepare=lambda raw: (torch.optim.Adam([raw], lr=lr), None),
    )


def alignment_coefficients(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    predict: Predict,
    data: Sequence[Tensor],
    per: str = "tensor",
    start: float = 0.1,
    steps: int = 50,
    batch_size: int = 16,
    lr: float = 0.5,
    temperature: float = 1.0,
    hidden: float = 1.0,
    stay: float = 5.0,
    task_weights: Sequence[float] | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, list[float]]:
    """Learns coefficients with which the merged model predicts like each expert on its inputs (arXiv 2509.25712).

    With coefficients ``c = sigmoid(raw)``, the loss is::

        mean_k a_k (T^2 CE(softmax(expert_k / T), merged / T) + hidden MSE(features)) + stay sum_k mean |c_k - start|

    AdamW minimises the loss with weight decay 1e-5 and gradients clipped to norm 1. ``lr`` falls to a tenth along a
    cosine within 50 steps, restarts and falls within 100 steps, then 200 and so on. Form and defaults follow the
    authors' code (expert_merging_base.py, InternVL/model_merging.py and parametric_task_vector_model.py); steps and
    batch size are our choice.

    Args:
        predict: function of weights, inputs and k that returns logits [B, C], or (logits, list of hidden features) to
            align the features as well.
        data: K tensors [N_k, ...], the unlabelled inputs of each expert's task.
        per: "tensor" learns one coefficient per tensor and expert, "expert" one per expert.
        start: initial value of every coefficient, within (0, 1).
        steps, batch_size, seed: as in :func:`entropy_coefficients`.
        lr: learning rate of AdamW at the start of each cosine.
        temperature: T, which divides the logits.
        hidden: weight of the mean squared difference of the hidden features, averaged over layers.
        stay: weight of the distance of the coefficients from their start, averaged over tensors.
        task_weights: a_k, one number per expert; None is 1 for all.
        exclude: patterns of tensor names, such as ``"text.*"`` (fnmatch); matching tensors keep the base.

    Returns:
        Name of each floating-point tensor -> K coefficients, which are 0 for excluded tensors.

    Raises:
        ValueError: an argument is out of range, a pattern matches no tensor, or the loss is not finite.
    """
    if not 0 < start < 1:
        raise ValueError(f"start must be within (0, 1), got {start}")
    task_weights = per_expert("task_weights", task_weights, len(experts))

    def loss(coefficients: Tensor, weights: dict[str, Tensor], batches: list[Tensor]) -> Tensor:
        total = stay * (coefficients - start).abs().mean(0).sum()
        for k, x in enumerate(batches):
            with torch.no_grad():
                target = predict(_floats(experts[k]), x, k)
            found = predict(weights, x, k)
            soft = (_logits(target) / temperature).softmax(-1)
            aligned = temperature**2 * F.cross_entropy(_logits(found) / temperature, soft)
            if isinstance(found, tuple) and found[1]:
                pairs = list(zip(found[1], target[1], strict=True))
                aligned = aligned + hidden * sum(F.mse_loss(a, b) for a, b in pairs) / len(pairs)
            total = total + task_weights[k] * aligned / len(batches)
        return total

    def prepare(raw: Tensor) -> tuple[torch.optim.Optimizer, LRScheduler]:
        optimizer = torch.optim.AdamW([raw], lr=lr, weight_decay=1e-5)
        return optimizer, CosineAnnealingWarmRestarts(optimizer, T_0=50, T_mult=2, eta_min=0.1 * lr)

    return _learn(
        base,
        experts,
        loss,
        METHODS["expert_merging"],
        bound=torch.sigmoid,
        start=math.log(start / (1 - start)),
        data=data,
        per=per,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        exclude=exclude,
        prepare=prepare,
        clip=1.0,
    )


def _learn(
    base: StateDict,
    experts: Sequence[StateDict],
    loss: Callable[[Tensor, dict[str, Tensor], list[Tensor]], Tensor],
    method: Method,
    *,
    bound: Callable[[Tensor], Tensor],
    start: float,
    data: Sequence[Tensor],
    per: str,
    steps: int,
    batch_size: int,
    seed: int,
    prepare: Callable[[Tensor], tuple[torch.optim.Optimizer, LRScheduler | None]],
    exclude: Sequence[str] = (),
    clip: float = math.inf,
) -> dict[str, list[float]]:
    """Learns raw coefficients, [tensors, K] or [1, K], by gradient descent.

    ``loss`` takes the coefficients after ``bound``, the merged weights, and one batch per task.
    """
    given = prepared(method, base, experts)
    base, experts = cast("StateDict", given.base), given.experts  # both methods need a base, which is checked
    check_choice("per", per, ("tensor", "expert"))
    if len(data) != len(experts) or not all(len(inputs) for inputs in data):
        raise ValueError(f"data must hold inputs for each of {len(experts)} experts, got {[len(x) for x in data]}")
    names, start_weights = _learned(floating(base), exclude), _floats(base)
    deltas = {name: torch.stack([e[name].to(start_weights[name]) for e in experts]) for name in names}
    deltas = {  # exactly 0 for a tensor that no expert moved, also where its values are infinite
        name: torch.zeros_like(delta) if name in given.stored else delta - start_weights[name]
        for name, delta in deltas.items()
    }
    raw = torch.full((len(names) if per == "tensor" else 1, len(experts)), start)
    raw = raw.to(start_weights[names[0]].device).requires_grad_()
    (optimizer, schedule), generator = prepare(raw), torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in trange(steps, desc=method.name, disable=hidden()):
            coefficients = bound(raw)
            rows = coefficients.expand(len(names), -1)
            weights = start_weights | {
                name: start_weights[name] + torch.einsum("k,k...->...", row.to(deltas[name]), deltas[name])
                for name, row in zip(names, rows, strict=True)
            }
            batches = [x[torch.randperm(len(x), generator=generator)[:batch_size].to(x.device)] for x in data]
            value = loss(coefficients, weights, batches)
            if not value.isfinite():
                raise ValueError(f"the loss of {method.name} must be finite, got {value.item()}")
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_([raw], clip)
            optimizer.step()
            if schedule:
                schedule.step()
    found = dict(zip(names, bound(raw).detach().expand(len(names), -1).tolist(), strict=True))
    return {name: found.get(name, [0.0] * len(experts)) for name in floating(base)}


def _learned(names: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The names of the tensors whose coefficients are learned: those that no pattern matches."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of patterns, got {exclude!r}")
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude must hold patterns of tensor names, got {pattern!r}, which matches no tensor")
    kept = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in exclude)]
    if not kept:
        raise ValueError(f"exclude must leave at least one tensor, got {list(exclude)}, which match every tensor")
    return kept


def _floats(state: StateDict) -> dict[str, Tensor]:
    """Detached tensors: float16 and bfloat16 as float32, other dtypes unchanged."""
    half = (torch.float16, torch.bfloat16)
    return {name: t.detach().float() if t.dtype in half else t.detach() for name, t in state.items()}


def _logits(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found
