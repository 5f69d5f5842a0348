"""Feature caches: rows are mapped or read, and nothing else."""

import copy
import gc
import os
import pickle
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cache_cases import TinyClip, as_version_1, draw_images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergetune.clip import PRECISIONS
from mergetune.data import FeatureCache, ImageList, cache_blocks, cache_building, cache_features, row_reading
from mergetune.data import cache as cache_module
from mergetune.data.cache_blocks import write_block
from mergetune.data.cache_documents import FORMAT, Identities, Plan, lay_out
from mergetune.data.row_reading import FileRows
from mergetune.evaluation import accuracy
from mergetune.training import fisher_diagonal

pytestmark = pytest.mark.usefixtures("one_thread")


def resident_kib(path: Path) -> int:
    """How much of a mapped file, or of a folder's mapped files, is in memory, by the kernel's account."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            inside = str(path) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc to see what a mapping holds")
def test_opening_maps_and_rows_touch_only_what_is_asked(tmp_path):
    images = draw_images(tmp_path / "images", 60)
    clip = TinyClip(embed_dim=2**16)
    built = cache_features(clip, images, tmp_path / "cache", batch_size=30)
    expected = built.rows(torch.tensor([50]))
    del built
    file = (tmp_path / "cache" / "arrays.bin").resolve()
    assert file.stat().st_size > 15_000_000
    cache = FeatureCache.open(tmp_path / "cache")
    assert resident_kib(file) < 5_000, "the kernel maps a few MB around the header"
    assert torch.equal(cache.rows(torch.tensor([50])), expected)
    assert 0 < resident_kib(file) < 8_000
    cache.tensor()
    assert resident_kib(file) > 15_000


WAYS = {"mapped": 1 << 40, "read": 0}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Small caches, mapped as they are or read as large ones are."""
    monkeypatch.setattr(cache_module, "MAX_MAPPED", WAYS[request.param])
    return request.param


def uneven_cache(path: Path, dtype: str = "float32", *, views: int = 3, dim: int = 5, seed: int = 0) -> Tensor:
    """Write a cache of 12 blocks of 4 files, of two blocks none is readable. All its readable rows [V, N, D]."""
    path.mkdir()
    files = [f"{i}.png" for i in range(45)]
    lost = {"0.png", "13.png", "14.png", *files[16:20], *files[44:]}
    plan = planned(files, dtype, views=views, dim=dim, shard_size=4, labels=[i % 3 for i in range(45)], seed=0)
    cache_blocks.allocate(path, plan)
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(views, 45, dim, generator=generator), dim=-1)
    rows[:, [i for i, file in enumerate(files) if file in lost]] = 0
    for number, part in enumerate(rows.split(4, dim=1)):
        own = plan.files_of(number)
        skipped = {file: "gone" for file in own if file in lost}
        write_block(path, plan, number, {"features": part}, Identities.of([("", 0, 0)] * len(own)), skipped)
    cache_building._finish(path, plan)
    return rows[:, [i for i, file in enumerate(files) if file not in lost]].to(PRECISIONS[dtype]).float()


def planned(files: list[str], dtype: str, *, views: int, dim: int, labels: list[int], **more: Any) -> Plan:
    """A plan with as many classes as labels."""
    arrays = lay_out([("features", dtype, (views, len(files), dim), True)])
    fields = {"format": FORMAT, "id": "", "clip": "", "fingerprint": "", "preprocess": {}, "dtype": dtype}
    fields |= {
        "views": views,
        "dim": dim,
        "files": files,
        "labels": labels,
        "classnames": ["a", "b", "c"][: max(labels) + 1],
    }
    return Plan.model_validate({**fields, "arrays": arrays, "bytes": arrays[-1].end, **more})


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rows_are_a_plain_gather(tmp_path, monkeypatch, way, dtype, version):
    """Version 0.1 has a file per block, of which two are empty."""
    expected = uneven_cache(tmp_path / "cache", dtype)
    if version == 1:
        as_version_1(tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    assert isinstance(cache.source, FileRows) == (version == 2 or way == "read") and len(cache) == 37
    draw = torch.Generator().manual_seed(1)
    few = cache.select(ImageList(Path(), ["44.png", "1.png", "12.png"][1:], [0, 1], ["x", "y"]))
    views = {
        "all": (cache, torch.arange(37)),
        "classes": (cache.select_classes([2, 0]), (cache.labels != 1).nonzero().squeeze(1)),
        "images": (few, torch.tensor([0, 11])),
    }
    for rows_at_once in (cache_module.ROWS, 4):
        monkeypatch.setattr(cache_module, "ROWS", rows_at_once)
        for name, (view, rows) in views.items():
            assert torch.equal(view.tensor(2), expected[2, rows]), name
            for size in (1, 3, 50):
                index = torch.randint(len(view), (size,), generator=draw)
                which = torch.randint(3, (size,), generator=draw)
                assert torch.equal(view.rows(index), expected[0, rows[index]]), name
                assert torch.equal(view.rows(index, which), expected[which, rows[index]]), name
        assert torch.equal(cache.rows(torch.arange(36, -1, -1), 1), expected[1].flip(0))


@pytest.mark.parametrize("size", [1, 10, 37, 100])
def test_batches_are_all_rows_in_their_order(tmp_path, way, size):
    expected = uneven_cache(tmp_path / "cache")[0]
    cache = FeatureCache.open(tmp_path / "cache")
    parts = list(cache.batches(size))
    assert [len(rows) for rows, _, _ in parts] == [min(size, 37 - begin) for begin in range(0, 37, size)]
    assert torch.equal(torch.cat([rows for rows, _, _ in parts]), expected)
    for rows, labels, part in parts:
        assert torch.equal(rows, expected[part]) and torch.equal(labels, cache.labels[part])


@pytest.mark.parametrize("size", [0, -1])
def test_batches_need_a_size(tmp_path, size):
    uneven_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"size must be at least 1, got {size}"):
        next(FeatureCache.open(tmp_path / "cache").batches(size))


def test_rows_that_follow_each_other_are_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_MAPPED", 0)
    expected, preadv, calls = uneven_cache(tmp_path / "cache"), os.preadv, []

    def partly(descriptor, buffers, offset):  # as some file systems do
        calls.append(offset)
        return preadv(descriptor, [buffers[0][:70]], offset)

    monkeypatch.setattr(os, "preadv", partly)
    assert torch.equal(FeatureCache.open(tmp_path / "cache").tensor(), expected[0])
    runs = [4 * 5 * count for count in (12, 1, 24)]  # bytes of rows between those that were skipped
    assert len(calls) == sum(-(-size // 70) for size in runs), "each run is read at once, if it comes at once"


def test_features_outlive_their_files(tmp_path, way):
    expected = uneven_cache(tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    other = uneven_cache(tmp_path / "cache", seed=1)
    assert torch.equal(cache.tensor(1), expected[1]) and not torch.equal(other, expected)
    shutil.rmtree(tmp_path / "moved")
    assert torch.equal(cache.tensor(1), expected[1])


@pytest.mark.parametrize("version", [1, 2])
def test_files_are_closed_with_the_last_view(tmp_path, monkeypatch, version):
    monkeypatch.setattr(cache_module, "MAX_MAPPED", 0)
    uneven_cache(tmp_path / "cache")
    if version == 1:
        as_version_1(tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    part, files = cache.select_classes([1]), list(cache.source.files)
    cache.tensor()
    part.tensor()
    del cache
    gc.collect()
    assert (
        len(files) == (1 if version == 2 else 10)
        and not any(file.closed for file in files)
        and len(part.tensor()) == 12
    )
    del part
    gc.collect()
    assert all(file.closed for file in files)


def test_features_are_in_memory_where_not_all_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_MAPPED", 0)
    expected = uneven_cache(tmp_path / "cache")
    as_version_1(tmp_path / "cache")
    for limit, is_read in ((20, True), (19, False), (row_reading.resource.RLIM_INFINITY, True)):
        monkeypatch.setattr(row_reading.resource, "getrlimit", lambda which, limit=limit: (limit, 1 << 20))
        cache = FeatureCache.open(tmp_path / "cache")
        assert isinstance(cache.source, FileRows) == is_read and torch.equal(cache.tensor(), expected[0])


def test_copies_of_a_cache_give_the_same_rows(tmp_path, way):
    expected = uneven_cache(tmp_path / "cache", "bfloat16")
    cache = FeatureCache.open(tmp_path / "cache").select_classes([0, 1])
    rows = expected[0, [i for i, c in enumerate(FeatureCache.open(tmp_path / "cache").labels) if c < 2]]
    assert torch.equal(cache.tensor(), rows)  # and what it needed for that is not copied
    for other in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert torch.equal(other.tensor(), rows) and other.digest == cache.digest


class Allocations(TorchDispatchMode):
    """The sizes of the tensors that torch makes meanwhile, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.sizes.append(made.untyped_storage().nbytes())
        return result


N_LARGE, D_LARGE = 30_000, 63  # the whole is 7.5 MB as float32; ROWS of it are 1 MB
MOST_LARGE = 4096 * 64 * 4 + N_LARGE * 8
WHOLE = torch.full((N_LARGE, D_LARGE), D_LARGE**-0.5, dtype=torch.float16)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("large")
    rows = F.normalize(torch.randn(N_LARGE, D_LARGE, generator=torch.Generator().manual_seed(0)), dim=-1).half()
    files, labels = [f"{i}.png" for i in range(N_LARGE)], [i % 2 for i in range(N_LARGE)]
    plan = planned(files, "float16", views=1, dim=D_LARGE, shard_size=500, labels=labels, seed=None)
    cache_blocks.allocate(path, plan)
    identity = (64 * "0", 110_000, 1_700_000_000_000_000_000)
    for number, part in enumerate(rows.split(500)):
        write_block(path, plan, number, {"features": part[None]}, Identities.of([identity] * len(part)), {})
    cache_building._finish(path, plan)
    return path


@pytest.mark.parametrize(
    "work",
    [
        lambda cache: cache.rows(torch.randperm(len(cache))[:4096]),
        lambda cache: accuracy(torch.eye(2, D_LARGE), cache),
        lambda cache: fisher_diagonal(cache, torch.eye(2, D_LARGE), scale=1.0),
        lambda cache: cache.shared_with(cache.select_classes([1])),
        lambda cache: cache.shared_with(replace(cache, files=())),
        lambda cache: FeatureCache.open(cache.path).digest,
        lambda cache: FeatureCache.from_tensors(WHOLE, [0] * N_LARGE, ["a"]),
    ],
    ids=["rows", "accuracy", "fisher", "shared, named", "shared", "open", "from_tensors"],
)
def test_no_work_holds_all_features_at_once(large, way, work):
    cache = FeatureCache.open(large)
    with Allocations() as made:
        work(cache)
    assert max(made.sizes) <= MOST_LARGE, "a part of the features, or a number for each image"


def test_all_features_are_held_once_where_they_are_asked_for(large, way):
    cache = FeatureCache.open(large)
    with Allocations() as made:
        cache.tensor()
    assert [size for size in made.sizes if size > MOST_LARGE] == [N_LARGE * D_LARGE * 4]


@pytest.mark.parametrize("version", [1, 2])
def test_opening_leaves_the_identities_of_images_alone(large, tmp_path, version):
    if version == 1:
        large = as_version_1(shutil.copytree(large, tmp_path / "old"))
    manifest = sum(file.stat().st_size for file in large.glob("[mi]*.json"))
    tracemalloc.start()
    cache = FeatureCache.open(large)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(cache) == N_LARGE and manifest > 3_000_000
    assert most < 2 * manifest and held < manifest, "all lists and texts of the manifest take 4 times its size"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc to see what a mapping holds")
def test_what_is_read_does_not_stay_in_memory(large, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_MAPPED", 0)
    cache = FeatureCache.open(large)
    assert len(cache.tensor()) == N_LARGE
    assert resident_kib(large.resolve()) <= 8, "a page at most"
