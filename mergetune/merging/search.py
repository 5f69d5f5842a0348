"""Merging by search: coefficients learned on unlabelled inputs, options found by CMA-ES, models evolved by M2N2.

All of these call the model many times and hold base and experts in memory. What the learned and found coefficients are
can be had on its own, for :func:`mergetune.merging.layerwise` and the methods that were searched.

Shapes: K experts, B batch, C classes, N examples, P members of a population.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler
from tqdm import trange

from mergetune.merging.methods import METHODS, Method
from mergetune.merging.task_vectors import layerwise, task_arithmetic
from mergetune.merging.tensors import StateDict, check, check_choice, facts_of, floating, per_expert

Predict = Callable[[dict[str, Tensor], Tensor, int], Any]
"""Weights, inputs [B, ...] of expert k's task, k -> logits [B, C], differentiable in the weights."""


def adamerging(base: StateDict, experts: Sequence[StateDict], **options) -> dict[str, Tensor]:
    """AdaMerging (arXiv 2310.02575): task arithmetic with the coefficients of :func:`entropy_coefficients`.

    Needs: unlabelled inputs of every expert's task and the model. Meaningful for one or several experts, any tensors.

    Args:
        options: of :func:`entropy_coefficients`.
    """
    return layerwise(base, experts, coefficients=entropy_coefficients(base, experts, **options))


def expert_merging(base: StateDict, experts: Sequence[StateDict], **options) -> dict[str, Tensor]:
    """Expert Merging (arXiv 2509.25712): task arithmetic with the coefficients of :func:`alignment_coefficients`.

    Needs: unlabelled inputs of every expert's task and the model. Meaningful for one or several experts, any tensors.
    Without the chunks of layers of Expert Merging++.

    Args:
        options: of :func:`alignment_coefficients`.
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
    """Coefficients in [0, 1] that make the merged model sure of unlabelled inputs (AdaMerging, arXiv 2310.02575).

    Adam on ``sum_k mean_x H(softmax(logits_k(x)))``; coefficients are clamped as they are used. The defaults are those
    of the authors' code (main_layer_wise_adamerging.py). It adds the means of two batches of 16 for each task and step:
    twice the mean over 32, and Adam's steps do not depend on that factor. So there is one batch of 32 here.

    Args:
        predict: weights, inputs, k -> logits [B, C] for expert k's task.
        data: inputs of each expert's task, [N_k, ...], K of them; no labels. Use validation or test-time images that
            no figure is reported on.
        per: "tensor" learns one coefficient for each tensor and expert (layer-wise), "expert" one for each expert.
        start: of every coefficient.
        steps: of Adam.
        batch_size: inputs of each task at a step.
        lr: Adam's.
        seed: of the batches.

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
    """Coefficients with which the merged model answers each expert's inputs as the expert does (arXiv 2509.25712).

    With ``c = sigmoid(raw)``, what is minimised is::

        mean_k a_k (T^2 CE(softmax(expert_k / T), merged / T) + hidden MSE(features)) + stay sum_k mean |c_k - start|

    by AdamW with weight decay 1e-5, gradients clipped to norm 1, and ``lr`` falling to its tenth along a cosine within
    50 steps, then again within 100, 200 and so on. Form and defaults follow the authors' code (expert_merging_base.py,
    InternVL/model_merging.py and parametric_task_vector_model.py); steps and batch size are ours.

    Args:
        predict: weights, inputs, k -> logits [B, C], or (logits, list of hidden features) to align those too.
        data: inputs of each expert's task, [N_k, ...], K of them; no labels.
        per: "tensor" or "expert".
        start: of every coefficient, within (0, 1).
        steps, batch_size, seed: as in :func:`entropy_coefficients`.
        lr: AdamW's, at the start of each cosine.
        temperature: T, of the logits.
        hidden: weight of the mean squared difference of the features, mean over layers.
        stay: weight of the coefficients' distance from their start, mean over tensors.
        task_weights: a_k, one for each expert; None is 1 for all.
        exclude: patterns of names, such as ``"text.*"`` (fnmatch), whose tensors keep the base.

    Returns:
        Name of each floating-point tensor -> K coefficients, zeros for those excluded.
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
    """Learn coefficients [tensors or 1, K]; ``loss`` takes them bounded, the merged weights, and a batch a task."""
    check(method, base, experts)
    check_choice("per", per, ("tensor", "expert"))
    if len(data) != len(experts) or not all(len(inputs) for inputs in data):
        raise ValueError(f"data must hold inputs for each of {len(experts)} experts, got {[len(x) for x in data]}")
    names, start_weights = _learned(floating(base), exclude), _floats(base)
    deltas = {name: torch.stack([e[name].to(start_weights[name]) for e in experts]) for name in names}
    deltas = {name: delta - start_weights[name] for name, delta in deltas.items()}
    raw = torch.full((len(names) if per == "tensor" else 1, len(experts)), start)
    raw = raw.to(start_weights[names[0]].device).requires_grad_()
    (optimizer, schedule), generator = prepare(raw), torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in trange(steps, desc=method.name, disable=None):
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
    """The names that no pattern matches."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of patterns, got {exclude!r}")
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude must hold patterns of the tensors' names, got {pattern!r}, which matches none")
    kept = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in exclude)]
    if not kept:
        raise ValueError(f"exclude must leave something to learn, got {list(exclude)}, which match every tensor")
    return kept


def _floats(state: StateDict) -> dict[str, Tensor]:
    """Half types as float32, everything else as it is."""
    half = (torch.float16, torch.bfloat16)
    return {name: t.detach().float() if t.dtype in half else t.detach() for name, t in state.items()}


def _logits(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


@dataclass(frozen=True)
class Evolved:
    """What :func:`evolve_options` found.

    Attributes:
        options: for the method; lists where several values were asked for.
        score: with them.
        trials: how many were scored.
    """

    options: dict[str, float | list[float]]
    score: float
    trials: int


def evolve(
    base: StateDict | None, experts: Sequence[StateDict], *, method: Callable = task_arithmetic, **options
) -> dict[str, Tensor]:
    """Evolutionary merging (arXiv 2403.13187, parameter space): a method with what :func:`evolve_options` finds for it.

    Needs: a score, which needs labelled validation data. Meaningful for what the method is meaningful for.

    Args:
        method: any method of this package.
        options: of :func:`evolve_options`.
    """
    fixed = dict(options.get("fixed") or {})
    found = evolve_options(base, experts, method=method, **options)
    return method(base, experts, **fixed, **found.options)


def evolve_options(
    base: StateDict | None,
    experts: Sequence[StateDict],
    *,
    score: Callable[[dict[str, Tensor]], float],
    space: Mapping[str, tuple[float, float] | tuple[float, float, int]],
    method: Callable = task_arithmetic,
    fixed: Mapping[str, Any] | None = None,
    start: Mapping[str, float | Sequence[float]] | None = None,
    trials: int = 100,
    backend: str = "cma",
    seed: int = 0,
) -> Evolved:
    """Options of a merging method that score best, by CMA-ES (arXiv 2403.13187, parameter space).

    The paper searches weights and densities of DARE-TIES for each layer with optuna's CMA-ES; here any numeric options
    of any method, such as ``space={"weights": (0, 1, len(experts)), "density": (0.1, 1)}`` of :func:`ties`.

    Args:
        score: merged weights -> what is to be large. Take it on validation data.
        space: option -> (low, high), or (low, high, count) for a list of numbers.
        fixed: further options, as they are.
        start: option -> where its search starts, one number for all values of a list or one for each; options that are
            not named, and None, start in the middle of their ranges. mergekit-evolve starts at weights 1 / K and
            density 1.
        trials: merged models to score, the start first; steps begin at a sixth of the range (paper).
        backend: "cma" or "optuna" (which needs ``cmaes`` too).
        seed: of the search.
    """
    check(facts_of(method), base, experts)
    check_choice("backend", backend, ("cma", "optuna"))
    if not space or any(len(ends) not in (2, 3) or not ends[0] < ends[1] for ends in space.values()):
        raise ValueError(f"space must hold options with (low, high) or (low, high, count), low < high, got {space}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    axes = [(option, *ends[:2]) for option, ends in space.items() for _ in range(int(ends[2]) if ends[2:] else 1)]
    begin = _start(space, start or {})
    begin += [0.5] * (len(begin) < 2)  # CMA-ES needs two dimensions; a second one may do nothing
    best: Evolved | None = None

    def cost(point: Sequence[float]) -> float:
        nonlocal best
        options: dict[str, Any] = {option: [] for option in space}
        for (option, low, high), x in zip(axes, point, strict=False):
            options[option].append(low + (high - low) * float(x))
        options = {option: found if space[option][2:] else found[0] for option, found in options.items()}
        value = float(score(method(base, experts, **(fixed or {}), **options)))
        if not math.isfinite(value):
            raise ValueError(f"score must be finite, got {value} for {options}")
        trials_so_far = best.trials + 1 if best else 1
        better = best is None or value > best.score
        best = Evolved(options if better else best.options, value if better else best.score, trials_so_far)
        return -value

    search = _cma if backend == "cma" else _optuna
    search(cost, begin, trials, seed)
    return best


def _start(space: Mapping[str, tuple], start: Mapping[str, float | Sequence[float]]) -> list[float]:
    """Where the search starts, along every axis, 0 to 1 within its range."""
    if unknown := [option for option in start if option not in space]:
        raise ValueError(f"start must hold options of space, {', '.join(space)}, got {unknown[0]!r}")
    found = []
    for option, (low, high, *counts) in space.items():
        count, given = int(counts[0]) if counts else 1, start.get(option, (low + high) / 2)
        several = hasattr(given, "__len__")
        if several and (not counts or len(given) != count):
            rule = f"a number, or {count} of them" if counts else "a number"
            raise ValueError(f"start[{option!r}] must be {rule}, got {given}")
        values = list(given) if several else [given] * count
        if not all(low <= value <= high for value in values):
            raise ValueError(f"start[{option!r}] must be within its range, {low} to {high}, got {given}")
        found += [(value - low) / (high - low) for value in values]
    return found


def _cma(cost: Callable[[Sequence[float]], float], begin: list[float], trials: int, seed: int) -> None:
    try:
        import cma
    except ImportError as error:
        raise ImportError("evolve with backend='cma' needs pycma: pip install cma") from error
    options = {"bounds": [0, 1], "seed": seed + 1, "verbose": -9}  # 0 would be the time
    strategy = cma.CMAEvolutionStrategy(begin, 1 / 6, options)
    cost(begin)
    trials -= 1
    while trials > 0:  # its own stopping rules aside: the budget is given
        points = strategy.ask()
        costs = [cost(point) for point in points[:trials]]
        trials -= len(costs)
        if len(costs) == len(points):
            strategy.tell(points, costs)


def _optuna(cost: Callable[[Sequence[float]], float], begin: list[float], trials: int, seed: int) -> None:
    try:
        import cmaes  # noqa: F401
        import optuna
    except ImportError as error:
        raise ImportError("evolve with backend='optuna' needs optuna and cmaes: pip install optuna cmaes") from error
    first, verbosity = {f"x{i}": x for i, x in enumerate(begin)}, optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.CmaEsSampler(first, seed=seed)  # its first step is 1/6 too
        study = optuna.create_study(sampler=sampler)
        study.enqueue_trial(first)
        study.optimize(lambda trial: cost([trial.suggest_float(name, 0, 1) for name in first]), n_trials=trials)
    finally:
        optuna.logging.set_verbosity(verbosity)


@torch.no_grad()
def natural_niches(
    base: StateDict | None,
    experts: Sequence[StateDict],
    *,
    score: Callable[[dict[str, Tensor]], Tensor],
    population: int = 20,
    steps: int = 1000,
    alpha: float = 1.0,
    mutation: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """M2N2: models compete for examples, attract those who solve others, and mate at a split point (arXiv 2508.16204).

    With s_p the scores of member p on the examples and ``f_p = s_p / (sum_q s_q)^alpha`` its shares of them: parent a
    is drawn by ``sum f_a``, parent b by ``sum max(0, f_b - f_a)``. The child interpolates all their parameters in a row
    spherically, with weight w up to a random split point and 1 - w behind it. It replaces the member with the smallest
    ``sum f`` if it is better itself. Follows the authors' code (natural_niches_fn.py) but for two things: children
    that score nothing stay until the population is full (there the next child takes their place), and where nobody
    attracts or scores the draw is uniform (there 0 / 0 gives NaN).

    Needs: a score for each of N labelled examples (not those that are reported). Meaningful for two or more models, the
    base among them if it is given; any tensors. Holds ``population`` models in float32.

    Args:
        score: merged weights -> scores of N examples, not negative, such as 0 or 1 for right.
        population: P; authors' default.
        steps: children; the authors' default is 50,000 for a small network.
        alpha: of the competition; 0 is none.
        mutation: standard deviation of noise on children; the authors use 0.01 from scratch, none for trained models.
        seed: of everything drawn.

    Returns:
        The member with the highest mean score.
    """
    check(METHODS["natural_niches"], base, experts)
    seeds = ([] if base is None else [base]) + list(experts)
    if not 2 <= len(seeds) <= population:
        raise ValueError(f"natural_niches needs 2 to {population} (population) models, base included, got {len(seeds)}")
    names = floating(seeds[0])

    def model(vector: Tensor) -> dict[str, Tensor]:
        pieces = dict(zip(names, vector.split([seeds[0][name].numel() for name in names]), strict=True))
        return {n: pieces[n].reshape(t.shape).to(t) if n in pieces else t.clone() for n, t in seeds[0].items()}

    def scores(vector: Tensor) -> Tensor:
        found = torch.as_tensor(score(model(vector))).detach().cpu().double()
        if found.ndim != 1 or not found.isfinite().all() or (found < 0).any():
            raise ValueError(f"score must give numbers [N], not negative, got {list(found.shape)} {found}")
        return found

    generator = torch.Generator().manual_seed(seed)
    archive = [torch.cat([state[name].detach().float().reshape(-1) for name in names]) for state in seeds]
    solved = torch.stack([scores(vector) for vector in archive])  # [P, N]
    for _ in trange(steps, desc="natural_niches", disable=None):
        shares = _shares(solved, alpha)
        a = _draw(shares.sum(1), generator)
        b = _draw((shares - shares[a]).clamp(min=0).sum(1), generator)
        split = int(torch.randint(len(archive[0]), (), generator=generator))
        child = mate(archive[a], archive[b], torch.rand((), generator=generator).item(), split)
        if mutation:
            child = child + mutation * torch.randn(len(child), generator=generator).to(child)
        extended = torch.cat([solved, scores(child)[None]])
        archive.append(child)
        worst = int(_shares(extended, alpha).sum(1).argmin()) if len(archive) > population else None
        keep = [p for p in range(len(archive)) if p != worst]
        archive, solved = [archive[p] for p in keep], extended[keep]
    return model(archive[int(solved.mean(1).argmax())])


def mate(a: Tensor, b: Tensor, weight: float, split: int) -> Tensor:
    """Spherical interpolation of two vectors: ``weight`` is b's share before the split point, a's from there on."""
    cosine = (a.double() @ b.double() / (a.double().norm() * b.double().norm())).item()
    angle = math.acos(min(1.0, max(-1.0, cosine))) if math.isfinite(cosine) else 0.0

    def scales(t: float) -> tuple[float, float]:
        if not math.sin(angle) > 1e-6:
            return 1 - t, t
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    (a1, b1), (a2, b2) = scales(weight), scales(1 - weight)
    return torch.cat([a1 * a[:split] + b1 * b[:split], a2 * a[split:] + b2 * b[split:]])


def _shares(solved: Tensor, alpha: float) -> Tensor:
    """Scores [P, N] -> each member's shares of the examples."""
    total = solved.sum(0)
    return solved / torch.where(total > 0, total, 1.0).pow(alpha)


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    weights = weights if weights.sum() > 0 else torch.ones_like(weights)
    return int(torch.multinomial(weights, 1, generator=generator))
