"""Benchmarks of the feature cache: images encoded per second, and random rows read from a large cache on disk.

The table shows random rows out of 200,000 in float16, from pages already in memory, as medians of one run on one thread
of an AMD EPYC (Zen 5) that other processes used as well. The number of shards does not matter. Reading with preadv
takes about 1 us per row and no memory beyond the batch:

| rows | 196 shards, mapped | one shard, mapped | 196 shards, read | indexing one tensor | copying |
|---|---|---|---|---|---|
| 32 | 37 us | 38 us | 89 us | 9 us | 1 us |
| 128 | 50 us | 49 us | 186 us | 31 us | 5 us |
| 512 | 84 us | 83 us | 576 us | 116 us | 16 us |
| 20,000 | 22 ms | 21 ms | 43 ms | 30 ms | 2 ms |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from measure import BATCHES, TASKS, WIDTH, compare

from mergetune import FeatureCache, cache_features
from mergetune.data import ImageList, cache, cache_building, load_image
from mergetune.data.cache_documents import FORMAT, Plan
from mergetune.experiments.icons import load_icons

ICONS = 512
ROWS = 200_000


def random_cache(path: Path, rows: int, classnames: Sequence[str], *, shard_size: int) -> None:
    """Writes a cache of random features around class centres, in the format of :func:`cache_features`.

    The names of the files are like ImageNet's, in class folders one after the other. No images exist.
    """
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(len(classnames), WIDTH, generator=generator), dim=-1)
    labels = torch.arange(rows) * len(classnames) // rows
    plan = {
        "format": FORMAT,
        "id": "",
        "clip": "",
        "fingerprint": "",
        "preprocess": {},
        "dtype": "float16",
        "views": 1,
        "seed": None,
        "dim": WIDTH,
        "shard_size": shard_size,
        "files": [f"train/n{label:08}/n{label:08}_{i}.JPEG" for i, label in enumerate(labels.tolist())],
        "labels": labels.tolist(),
        "classnames": list(classnames),
    }
    plan = Plan.model_validate(plan)
    path.mkdir(parents=True, exist_ok=True)
    for number, own in enumerate(labels.split(shard_size)):
        noise = torch.randn(len(own), WIDTH, generator=generator) / WIDTH**0.5
        shard = F.normalize(0.5 * centres[own] + noise, dim=-1).half()[None]
        files = plan.files_of(number)
        identities = [(hashlib.sha256(file.encode()).hexdigest(), 110_000, 1_700_000_000_000_000_000) for file in files]
        cache_building._write_shard(path, plan, number, shard, identities, {})
    cache_building._finish(path, plan)


def test_encode(benchmark, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decodes, encodes, writes and checks the embedded icons with the embedded CLIP."""
    folder = tmp_path_factory.mktemp("icons")
    clip, dataset = load_icons(folder)
    images = dataset.train
    few = ImageList(images.root, images.files[:ICONS], images.labels[:ICONS], images.classnames)
    pixels = torch.stack([clip.preprocess(load_image(path)) for path in few.paths])
    compare(
        benchmark,
        f"cache_features, {ICONS} icons",
        lambda: cache_features(clip, few, folder / "cache", overwrite=True, progress=False),
        floors={
            "the image tower alone": lambda: [clip.encode_image(batch) for batch in pixels.split(64)],
            "decoding alone": lambda: [clip.preprocess(load_image(path)) for path in few.paths],
        },
        rounds=5,
        images=ICONS,
    )


@pytest.fixture(
    scope="module",
    params=[(1024, 1 << 40), (ROWS, 1 << 40), (1024, 0)],
    ids=["shards-of-1024", "one-shard", "shards-of-1024-read"],
)
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """A cache of random features on disk, memory-mapped or read with preadv."""
    shard_size, most = request.param
    path = tmp_path_factory.mktemp("large")
    random_cache(path, ROWS, [str(i) for i in range(TASKS["imagenet"])], shard_size=shard_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "MAX_MAPPED", most)
        return FeatureCache.open(path)


@pytest.mark.parametrize("batch", [*BATCHES, ROWS // 10])
def test_rows(benchmark, large: FeatureCache, batch: int) -> None:
    """Reads random rows as float32 from pages that are already in memory."""
    index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:batch]
    resident = torch.cat([shard[0] for shard in large.shards])
    source, target = torch.zeros(batch, WIDTH, dtype=torch.float16), torch.empty(batch, WIDTH)
    way = "mapped" if large.opened is None else "read"
    compare(
        benchmark,
        f"rows, {batch} of {ROWS} in {len(large.shards)} shards, {way}",
        lambda: large.rows(index),
        baselines={"indexing one tensor in memory": lambda: resident[index].float()},
        floors={"copying as many bytes": lambda: target.copy_(source)},
        rounds=31,
        memory=False,
        bytes=batch * WIDTH * 2,
    )
