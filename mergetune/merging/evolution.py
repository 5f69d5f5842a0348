"""Merging by evolution: CMA-ES searches the options of a method, M2N2 evolves a population of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from mergetune.facts.brief import brief
from mergetune.io import hidden
from mergetune.merging.checks import check, check_choice
from mergetune.merging.methods import METHODS
from mergetune.merging.plans import facts_of
from mergetune.merging.preparation import prepared
from mergetune.merging.sources import StateDict
from mergetune.merging.task_vectors import task_arithmetic


@brief()
@dataclass(frozen=True)
class Evolved:
    """Best options that :func:`evolve_options` found.

    Attributes:
        options: option of the method -> best value; a list where ``space`` gives a count.
        score: score of the model merged with these options.
        trials: number of scored models.
    """

    options: dict[str, float | list[float]]
    score: float
    trials: int


def evolve(
    base: StateDict | None, experts: Sequence[StateDict], *, method: Callable = task_arithmetic, **options
) -> dict[str, Tensor]:
    """Evolutionary merging (arXiv 2403.13187, parameter space): a merging method with searched options.

    Merges with ``method`` and the options that :func:`evolve_options` finds.

    Needs: a score, which needs labelled validation data. Meaningful for the same inputs as ``method``.

    Args:
        method: any method of this package.
        options: keyword arguments of :func:`evolve_options`.
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
    """Searches the options with which a merging method scores best, by CMA-ES (arXiv 2403.13187, parameter space).

    The paper searches the weights and densities of DARE-TIES for each layer with optuna's CMA-ES. This function
    searches any numeric options of any method, for example
    ``space={"weights": (0, 1, len(experts)), "density": (0.1, 1)}`` of :func:`ties`.

    Args:
        score: function from merged weights to a number; larger is better. Compute the score on validation data.
        space: option -> range (low, high) of a number, or (low, high, count) of a list of ``count`` numbers.
        fixed: options that are not searched -> their values.
        start: option -> value where the search starts, one number or one per element of a list. Other options start in
            the middle of their ranges. mergekit-evolve starts at weights 1 / K and density 1.
        trials: number of merged models to score; the start is scored first. The initial step size is a sixth of the
            range (paper).
        backend: "cma" or "optuna" (which also needs ``cmaes``).
        seed: seed of the search.

    Raises:
        ValueError: an argument is out of range, or a score is not finite.
        ImportError: the package of ``backend`` is not installed.
    """
    check(facts_of(method), base, experts)
    check_choice("backend", backend, ("cma", "optuna"))
    if not space or any(len(ends) not in (2, 3) or not ends[0] < ends[1] for ends in space.values()):
        raise ValueError(f"space must hold options with (low, high) or (low, high, count), low < high, got {space}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    axes = [(option, *ends[:2]) for option, ends in space.items() for _ in range(int(ends[2]) if len(ends) == 3 else 1)]
    begin = _start(space, start or {})
    begin += [0.5] * (len(begin) < 2)  # CMA-ES needs two dimensions; the second one may have no effect
    scored: list[tuple[float, dict[str, Any]]] = []

    def cost(point: Sequence[float]) -> float:
        options: dict[str, Any] = {option: [] for option in space}
        for (option, low, high), x in zip(axes, point, strict=False):
            options[option].append(low + (high - low) * float(x))
        options = {option: found if space[option][2:] else found[0] for option, found in options.items()}
        value = float(score(method(base, experts, **(fixed or {}), **options)))
        if not math.isfinite(value):
            raise ValueError(f"score must be finite, got {value} for {options}")
        scored.append((value, options))
        return -value

    search = _cma if backend == "cma" else _optuna
    search(cost, begin, trials, seed)
    value, options = max(scored, key=lambda trial: trial[0])  # the first of equal scores
    return Evolved(options, value, len(scored))


def _start(space: Mapping[str, tuple], start: Mapping[str, float | Sequence[float]]) -> list[float]:
    """Start of the search along every axis, scaled from the option's range to [0, 1]."""
    if unknown := [option for option in start if option not in space]:
        raise ValueError(f"start must hold options of space, {', '.join(space)}, got {unknown[0]!r}")
    found = []
    for option, (low, high, *counts) in space.items():
        count, given = int(counts[0]) if counts else 1, start.get(option, (low + high) / 2)
        several = isinstance(given, Iterable)
        values = list(given) if several else [given] * count
        if several and (not counts or len(values) != count):
            rule = f"a number or {count} numbers" if counts else "a number"
            raise ValueError(f"start[{option!r}] must be {rule}, got {given}")
        if not all(low <= value <= high for value in values):
            raise ValueError(f"start[{option!r}] must be within its range, {low} to {high}, got {given}")
        found += [(value - low) / (high - low) for value in values]
    return found


def _cma(cost: Callable[[Sequence[float]], float], begin: list[float], trials: int, seed: int) -> None:
    try:
        import cma
    except ImportError as error:
        raise ImportError("evolve with backend='cma' needs pycma: pip install cma") from error
    options = {"bounds": [0, 1], "seed": seed + 1, "verbose": -9}  # pycma takes the time as seed if the seed is 0
    strategy = cma.CMAEvolutionStrategy(begin, 1 / 6, options)
    cost(begin)
    trials -= 1
    while trials > 0:  # pycma's stopping rules are ignored: ``trials`` fixes the budget
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
        sampler = optuna.samplers.CmaEsSampler(x0=first, seed=seed)  # its initial step size is 1/6 as well
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
    """M2N2: evolves a population of models that compete for examples (arXiv 2508.16204).

    Member p has scores s_p on N examples and the shares ``f_p = s_p / (sum_q s_q)^alpha`` of them. In each step parent
    a is drawn with probability proportional to ``sum f_a``, and parent b to ``sum max(0, f_b - f_a)``, so b solves
    examples that a does not. The child interpolates the concatenated parameters of a and b spherically, with weight w
    before a random split point and 1 - w after the split point. If the population is full, the model with the smallest
    ``sum f`` (possibly the child) is removed.

    The steps follow the authors' code (natural_niches_fn.py) with two differences. Children with score 0 stay until the
    population is full; in the authors' code the next child replaces them. If all weights of a draw are 0, the draw is
    uniform; in the authors' code 0 / 0 gives NaN.

    Needs: a score for each of N labelled examples, none of which may be used for reported results. Meaningful for two
    or more models, including the base if given; any tensors. Holds ``population`` models in float32 in memory.

    Args:
        base: a further member of the first population, or None.
        score: function from merged weights to the scores of N examples, not negative; for example 1 for a right answer
            and 0 for a wrong one.
        population: maximum number of members, P; authors' default.
        steps: number of children; the authors' default is 50,000 for a small network.
        alpha: strength of the competition; 0 is no competition.
        mutation: standard deviation of the noise added to children; the authors use 0.01 for models trained from
            scratch, and none for fine-tuned models.
        seed: seed of all random draws.

    Returns:
        The member with the highest mean score.

    Raises:
        ValueError: fewer than 2 or more than ``population`` models, or scores that are negative or not finite.
    """
    given = prepared(METHODS["natural_niches"], base, experts)
    seeds = ([] if given.base is None else [given.base]) + given.experts
    if not 2 <= len(seeds) <= population:
        raise ValueError(f"natural_niches needs 2 to {population} (population) models, base included, got {len(seeds)}")
    names = [name for name in seeds[0] if name not in given.stored]
    if not names:  # all models are equal
        return {name: tensor.clone() for name, tensor in seeds[0].items()}

    def model(vector: Tensor) -> dict[str, Tensor]:
        pieces = dict(zip(names, vector.split([seeds[0][name].numel() for name in names]), strict=True))
        return {n: pieces[n].reshape(t.shape).to(t) if n in pieces else t.clone() for n, t in seeds[0].items()}

    def scores(vector: Tensor) -> Tensor:
        found = torch.as_tensor(score(model(vector))).detach().cpu().double()
        if found.ndim != 1 or not found.isfinite().all() or (found < 0).any():
            raise ValueError(f"score must give numbers [N], finite and not negative, got {list(found.shape)} {found}")
        return found

    generator = torch.Generator().manual_seed(seed)
    archive = [torch.cat([state[name].detach().float().reshape(-1) for name in names]) for state in seeds]
    solved = torch.stack([scores(vector) for vector in archive])  # [P, N]
    for _ in trange(steps, desc="natural_niches", disable=hidden()):
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
    """Spherical interpolation of two vectors.

    The weight of b is ``weight`` before index ``split`` and ``1 - weight`` from there on.
    """
    cosine = (a.double() @ b.double() / (a.double().norm() * b.double().norm())).item()
    angle = math.acos(min(1.0, max(-1.0, cosine))) if math.isfinite(cosine) else 0.0

    def scales(t: float) -> tuple[float, float]:
        if not math.sin(angle) > 1e-6:
            return 1 - t, t
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    (a1, b1), (a2, b2) = scales(weight), scales(1 - weight)
    return torch.cat([a1 * a[:split] + b1 * b[:split], a2 * a[split:] + b2 * b[split:]])


def _shares(solved: Tensor, alpha: float) -> Tensor:
    """Each member's shares of the examples, [P, N], from the scores [P, N]."""
    total = solved.sum(0)
    return solved / torch.where(total > 0, total, 1.0).pow(alpha)


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    weights = weights if weights.sum() > 0 else torch.ones_like(weights)
    return int(torch.multinomial(weights, 1, generator=generator))
