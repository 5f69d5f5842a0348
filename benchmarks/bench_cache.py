"""Benchmarks of the feature cache: images encoded per second, and random rows read from a large cache on disk.

The table shows random rows out of 200,000 in float16, width 512, from pages already in memory, on one thread of an
Intel Xeon that other processes used as well: ratios of the fastest rounds to those of two ways to index one tensor.

| rows | mapped: indexing, index_select | read: indexing, index_select |
|---|---|---|
| 32 | 4.1, 8.3 | 9.6, 19 |
| 512 | 1.4, 3.0 | 3.6, 8.5 |
| 20,000 | 0.8, 1.1 | 2.2, 2.6 |

The checks of arguments cost about 40 us per call. Checking the norms of 200,000 rows that are read for the first time
costs 20 to 60 ms of CPU time, which is 20 to 70 % of reading them from memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from measure import BATCHES, TASKS, WIDTH, compare

from mergetune import FeatureCache, cache_features
from mergetune.data import ImageList, cache, cache_blocks, cache_building, load_image
from mergetune.data.cache_documents import FEATURES, FORMAT, Identities, Plan, lay_out
from mergetune.data.cache_files import ARRAYS
from mergetune.experiments.icons import load_icons

ICONS = 512
ROWS = 200_000


def random_cache(path: Path, rows: int, classnames: Sequence[str]) -> None:
    """Writes a cache of random features around class centres, in the format of :func:`cache_features`.

    The names of the files are like ImageNet's, in class folders one after the other. No images exist.
    """
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(len(classnames), WIDTH, generator=generator), dim=-1)
    labels = torch.arange(rows) * len(classnames) // rows
    layouts = lay_out([(FEATURES, "float16", (1, rows, WIDTH), True)])
    plan = Plan.model_validate({
        "format": FORMAT,
        "id": "",
        "clip": "",
        "fingerprint": "",
        "preprocess": {},
        "dtype": "float16",
        "views": 1,
        "seed": None,
        "dim": WIDTH,
        "shard_size": 1024,
        "files": [f"train/n{label:08}/n{label:08}_{i}.JPEG" for i, label in enumerate(labels.tolist())],
        "labels": labels.tolist(),
        "classnames": list(classnames),
        "arrays": layouts,
        "bytes": layouts[-1].end,
    })  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    cache_blocks.allocate(path, plan)
    for number, own in enumerate(labels.split(plan.shard_size)):
        noise = torch.randn(len(own), WIDTH, generator=generator) / WIDTH**0.5
        block = F.normalize(0.5 * centres[own] + noise, dim=-1).half()[None]
        files = plan.files_of(number)
        identities = [(hashlib.sha256(file.encode()).hexdigest(), 110_000, 1_700_000_000_000_000_000) for file in files]
        cache_blocks.write_block(path, plan, number, {FEATURES: block}, Identities.of(identities), {})
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


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cache of random features."""
    path = tmp_path_factory.mktemp("large")
    random_cache(path, ROWS, [str(i) for i in range(TASKS["imagenet"])])
    return path


@pytest.mark.parametrize("way", ["mapped", "read"])
@pytest.mark.parametrize("batch", [*BATCHES, ROWS // 10])
def test_rows(benchmark, path: Path, monkeypatch: pytest.MonkeyPatch, way: str, batch: int) -> None:
    """Gathers random rows as float32 from pages that are already in memory, through a mapping or with preadv.

    The norms of the rows are checked when they are first read, before any round that is timed.
    """
    monkeypatch.setattr(cache, "MAX_MAPPED", 1 << 40 if way == "mapped" else 0)
    large = FeatureCache.open(path)
    index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:batch]
    resident = torch.from_numpy(np.fromfile(path / ARRAYS, np.float16).reshape(ROWS, WIDTH))
    source, target = torch.zeros(batch, WIDTH, dtype=torch.float16), torch.empty(batch, WIDTH)
    compare(
        benchmark,
        f"rows, {batch} of {ROWS}, {way}",
        lambda: large.rows(index),
        baselines={
            "indexing one tensor in memory": lambda: resident[index].float(),
            "index_select from one tensor in memory": lambda: resident.index_select(0, index).float(),
        },
        floors={"copying as many bytes": lambda: target.copy_(source)},
        rounds=31,
        memory=False,
        bytes=batch * WIDTH * 2,
    )


@pytest.mark.parametrize("state", ["checked before", "copied"])
def test_open(benchmark, path: Path, state: str) -> None:
    """Opens a cache whose checksums were compared before, or compares them all, as after copying."""

    def opened() -> FeatureCache:
        if state == "copied":
            cache_blocks.forget_check(path)
        return FeatureCache.open(path)

    hashed = (path / ARRAYS).read_bytes()
    floors = {"SHA-256 of as many bytes, one thread": lambda: hashlib.sha256(hashed).digest()}
    compare(
        benchmark,
        f"open, {ROWS} images, {state}",
        opened,
        floors=floors if state == "copied" else {},
        rounds=5,
        memory=False,
        bytes=len(hashed),
    )
