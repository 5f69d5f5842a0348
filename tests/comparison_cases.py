"""Small tasks and short searches of the tests of merging and comparing."""

import pytest
import torch
import torch.nn.functional as F
from tiny import normal

from mergetune import FeatureCache
from mergetune.experiments.comparison_candidates import MERGE_GRIDS

NAMES = ("bird", "cat", "dog", "fire truck", "fish", "red bus")


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    for method in ("adamerging", "expert_merging", "natural_niches"):
        monkeypatch.setitem(MERGE_GRIDS, method, {"steps": (2,)})
    monkeypatch.setattr("mergetune.experiments.solution_merging.FISHER_IMAGES", 8)


def cache(count: int = 60, *, seed: int = 0, names=NAMES) -> FeatureCache:
    x = F.normalize(normal(count, 8, seed=seed), dim=-1)
    files = [f"{seed}/{i}.png" for i in range(count)]
    return FeatureCache.from_tensors(x, torch.arange(count) % len(names), names, files=files)
