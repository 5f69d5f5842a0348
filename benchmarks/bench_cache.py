"""The feature cache: images encoded a second, and rows gathered a second from a large cache on disk.

Shapes: B rows asked for, D embedding width, N rows of the cache.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from measure import BATCHES, WIDTH, compare
from safetensors.torch import save_file

from mergetune import FeatureCache, cache_features
from mergetune.data import ImageList, load_image
from mergetune.demo import load_icons
from mergetune.features import FORMAT

ICONS = 512
ROWS = 200_000


def test_encode(benchmark, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decode, encode, write and check the embedded icons with the embedded CLIP."""
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


@pytest.fixture(scope="module", params=[1024, ROWS], ids=["shards-of-1024", "one-shard"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """Random features on disk in the format of :func:`cache_features`, which would need as many images."""
    path, size, shards = tmp_path_factory.mktemp("large"), request.param, []
    generator = torch.Generator().manual_seed(0)
    for number, begin in enumerate(range(0, ROWS, size)):
        rows = min(size, ROWS - begin)
        features = F.normalize(torch.randn(1, rows, WIDTH, generator=generator), dim=-1).half()
        file = path / f"shard-{number:05d}.safetensors"
        save_file({"features": features}, file)
        shards.append({"bytes": file.stat().st_size, "sha256": "", "rows": rows, "images": [], "skipped": {}})
    manifest = {
        "format": FORMAT,
        "fingerprint": "",
        "dtype": "float16",
        "views": 1,
        "dim": WIDTH,
        "files": [str(i) for i in range(ROWS)],
        "labels": [i % 1000 for i in range(ROWS)],
        "classnames": [str(i) for i in range(1000)],
        "shards": shards,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return FeatureCache.open(path)


@pytest.mark.parametrize("batch", [*BATCHES, ROWS // 10])
def test_rows(benchmark, large: FeatureCache, batch: int) -> None:
    """Random rows as float32, from pages that are in memory already."""
    index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:batch]
    resident = torch.cat([shard[0] for shard in large.shards])
    source, target = torch.zeros(batch, WIDTH, dtype=torch.float16), torch.empty(batch, WIDTH)
    compare(
        benchmark,
        f"rows, {batch} of {ROWS} in {len(large.shards)} shards",
        lambda: large.rows(index),
        baselines={"indexing one tensor in memory": lambda: resident[index].float()},
        floors={"copying as many bytes": lambda: target.copy_(source)},
        rounds=31,
        memory=False,
        bytes=batch * WIDTH * 2,
    )
