"""Ranks of a job under torchrun: work that all ranks do together, and work of rank 0."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

PATIENCE = datetime.timedelta(days=7)  # ranks may finish at very different times; torchrun detects dead ranks


@dataclass(frozen=True)
class Team:
    """The ranks that work together; one rank without torchrun.

    Attributes:
        rank: number of this rank.
        world: number of ranks.
        group: process group of the ranks; None for one rank.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """Does the work on every rank, waits for all ranks and returns their results. If one rank fails, all raise."""
        if self.world == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        outcomes: list[Any] = [None] * self.world
        dist.all_gather_object(outcomes, (result, error and f"{type(error).__name__}: {error}"), group=self.group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise RuntimeError(f"rank {rank} failed: {failure}")
        return [outcome for outcome, _ in outcomes]

    def lead(self, work: Callable[[], Any]) -> Any:
        """Does the work on rank 0 only and returns its result on every rank."""
        return self.each(work if self.rank == 0 else lambda: None)[0]


def _number(name: str, default: int) -> int:
    """A whole number in an environment variable that torchrun sets."""
    value = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", value):
        raise ValueError(
            f"the environment variable {name} must be a whole number, as torchrun sets it, got {value[:60]!r}: unset it"
        )
    return int(value)


@contextlib.contextmanager
def torchrun_team() -> Iterator[Team]:
    """Context manager with the ranks of torch.distributed, which is initialised here under torchrun if necessary."""
    launched = "RANK" in os.environ and _number("WORLD_SIZE", 1) > 1 and _number("RANK", 0) >= 0
    if launched and not dist.is_initialized():
        dist.init_process_group("gloo")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield Team()
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # the caller's group may use NCCL or a short timeout
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)
