"""Merging by evolution: options found by CMA-ES, models evolved by M2N2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from mergetune.merging.checks import check, check_choice
from mergetune.merging.methods import METHODS
from mergetune.merging.plans import facts_of
from mergetune.merging.sources import StateDict, floating
from mergetune.merging.task_vectors import task_arithmetic


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
    axes = [(option, *ends[:2]) for option, ends in space.items() for _ in range(int(ends[2]) if len(ends) == 3 else 1)]
    begin = _start(space, start or {})
    begin += [0.5] * (len(begin) < 2)  # CMA-ES needs two dimensions; a second one may do nothing
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
    value, options = max(scored, key=lambda trial: trial[0])  # of several the first
    return Evolved(options, value, len(scored))


def _start(space: Mapping[str, tuple], start: Mapping[str, float | Sequence[float]]) -> list[float]:
    """Where the search starts, along every axis, 0 to 1 within its range."""
    if unknown := [option for option in start if option not in space]:
        raise ValueError(f"start must hold options of space, {', '.join(space)}, got {unknown[0]!r}")
    found = []
    for option, (low, high, *counts) in space.items():
        count, given = int(counts[0]) if counts else 1, start.get(option, (low + high) / 2)
        several = isinstance(given, Iterable)
        values = list(given) if several else [given] * count
        if several and (not counts or len(values) != count):
            rule = f"a number, or {count} of them" if counts else "a number"
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
        sampler = optuna.samplers.CmaEsSampler(x0=first, seed=seed)  # its first step is 1/6 too
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
