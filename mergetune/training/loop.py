"""The training loop of both stages, for one run or for several runs that train together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mergetune.io import hidden
from mergetune.solutions import State
from mergetune.training.jobs import Job
from mergetune.training.objective import Batch, Objective, products_with, together
from mergetune.training.runs import FitResult, TrainingRun, training_in

MAX_PRODUCTS = 1 << 28  # most bytes for the cached products of anchors and features


def train_together(jobs: Sequence[Job]) -> list[FitResult]:
    """Train several runs. Runs with equal ``pace`` train together: one text-tower call per step serves all of them.

    Each run keeps its loss, batches, optimiser, ``val`` and ``resume``. Up to rounding, a run gives the same result as
    when it is trained alone. If the process is killed, the same call continues: runs that are behind catch up first.

    Args:
        jobs: results of :func:`tune_job` and :func:`fit_job`.

    Returns:
        One result per job, in the same order.

    Raises:
        ValueError: two jobs have the same ``resume`` folder, or a folder holds another run.
        RuntimeError: another process works in a ``resume`` folder.
        FloatingPointError: a loss became NaN or infinite, see :func:`fit`; the message names the run.
    """
    folders = [Path(job.resume).resolve() for job in jobs if job.resume is not None]
    if repeated := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"resume must be a different folder for each run, got {repeated[0]} twice")
    with ExitStack() as stack:
        for job in jobs:
            if job.resume is not None:
                stack.enter_context(training_in(Path(job.resume)))
        runs = [
            TrainingRun(job, _which(jobs, i)) for i, job in enumerate(jobs)
        ]  # reads and checks all folders before any run trains
        for group in _groups(runs):
            _train(group)
        return [run.result() for run in runs]


def _which(jobs: Sequence[Job], i: int) -> str:
    """Description of run i for errors; empty if there is one run."""
    if len(jobs) == 1:
        return ""
    return f" of run {i + 1} of {len(jobs)}" + ("" if jobs[i].resume is None else f" ({jobs[i].resume})")


def _groups(runs: Sequence[TrainingRun]) -> Iterator[list[TrainingRun]]:
    """The unfinished runs, in groups that train together."""
    by_pace: dict[Hashable, list[TrainingRun]] = {}
    for run in runs:
        if len(run.history) < run.job.training.epochs:
            by_pace.setdefault(run.job.pace, []).append(run)
    for alike in by_pace.values():
        parts = 1
        encoder = alike[0].job.objective.space.encoder
        if len(alike) > 1 and encoder is not None:
            # Beyond this many states the encoder recomputes activations, which costs what training together saves.
            settings = max(run.job.objective.settings for run in alike)
            parts = math.ceil(len(alike) / max(1, encoder.at_once // settings))
        for part in range(parts):
            yield alike[part::parts]


def _train(runs: Sequence[TrainingRun]) -> None:
    """Train a group of runs together, from the epoch that each run has reached."""
    job = runs[0].job
    products = {run: _anchor_products(run.job, MAX_PRODUCTS // len(runs)) for run in runs}
    epochs = range(min(len(run.history) for run in runs), job.training.epochs)
    label = job.settings.get("method", "mergetune") + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
    captured = None
    with tqdm(epochs, desc=label, unit="epoch", disable=hidden(job.progress), leave=False) as bar:
        for epoch in bar:
            began, active = time.perf_counter(), [run for run in runs if len(run.history) == epoch]
            records = [run.begin(epoch) for run in active]
            gradients = partial(_gradients, [r.job.objective for r in active], [r.state for r in active])
            for step, batches in enumerate(zip(*(run.batches(epoch, products[run]) for run in active), strict=True)):
                if job.cuda_graph and captured is None:
                    captured = _capture(gradients, batches)
                for run, record, found in zip(active, records, (captured or gradients)(batches), strict=True):
                    loss, terms, gradient = found
                    for parameter, own in zip(run.state.values(), gradient, strict=True):
                        parameter.grad = own
                    run.optimizer.step()
                    record[step] = torch.cat([loss[None], terms])
            for run, record in zip(active, records, strict=True):
                run.end(epoch, record)
            spent = time.perf_counter() - began
            for run in active:
                run.seconds += spent / len(active)
            bar.set_postfix(loss=f"{active[0].history[-1]['loss']:.3f}")


def _gradients(
    objectives: Sequence[Objective], states: Sequence[State], batches: Sequence[Batch]
) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """Loss, terms and gradients of each run on its batch, with one backward pass for all runs."""
    losses, terms = zip(*together(objectives, states, batches), strict=True)
    gradients = iter(torch.autograd.grad(losses, [tensor for state in states for tensor in state.values()]))
    own = [[next(gradients) for _ in state] for state in states]
    return list(zip([loss.detach() for loss in losses], terms, own, strict=True))


def _capture(gradients: Callable[..., list], batches: Sequence[Batch]) -> Callable[..., list]:
    """Capture ``gradients`` as a CUDA graph; the returned function copies batches into its inputs and replays it.

    The results stay in the same tensors. Optimiser steps are not captured, so learning rates may change.
    """

    def tensors(batch: Sequence[object]) -> list[Tensor]:
        return [t for t in batch if isinstance(t, Tensor)]  # without the generator (not used) and None

    static = [tuple(t.clone() if isinstance(t, Tensor) else t for t in batch) for batch in batches]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries choose algorithms and allocate workspaces
        for _ in range(3):
            gradients(static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gradients(static)

    def replay(batches: Sequence[Batch]) -> list:
        for places, batch in zip(static, batches, strict=True):
            for place, new in zip(tensors(places), tensors(batch), strict=True):
                place.copy_(new, non_blocking=True)
        graph.replay()
        return results

    return replay


def _anchor_products(job: Job, most: int) -> Tensor | None:
    """Products of the anchors with all features, [K, N, C]; None if these vary per step or need too much memory."""
    objective, features, device = job.objective, job.features, job.clip.device
    if objective.anchors is None or features.views > 1:
        return None
    shape = len(objective.anchors), len(features), len(features.classnames)
    if objective.anchors.state is not None or objective.space.images is not None or 4 * math.prod(shape) > most:
        return None
    products = torch.empty(shape, device=device)
    for x, _, part in features.batches(4096):
        products[:, part] = products_with(objective.anchors.classes, x.to(device))
    return products
