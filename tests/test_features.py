"""FeatureCache: what is built is right, survives kills, is shared among ranks, and is refused when it is wrong."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergetune import features
from mergetune.curvature import fisher_diagonal
from mergetune.data import ImageFolder, ImageList, load_image
from mergetune.evaluate import accuracy
from mergetune.features import FeatureCache, cache_features

ASSETS = Path(features.__file__).parent / "assets"
SIDE = 8

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class TinyClip:
    """What cache_features needs of a FrozenClip: a random projection of the pixels."""

    name: str = "tiny"
    embed_dim: int = 6
    image_fingerprint: str = "tiny weights"
    preprocess_cfg: dict[str, Any] = field(default_factory=lambda: {"size": (SIDE, SIDE)})
    seconds: float = 0.0
    device: torch.device = torch.device("cpu")

    def preprocess(self, image: Image.Image) -> Tensor:
        pixels = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).tobytes()
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1) / 255

    def augment(self, image: Image.Image) -> Tensor:
        return self.preprocess(image) * torch.rand(3, 1, 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        time.sleep(self.seconds)
        weights = torch.randn(3 * SIDE * SIDE, self.embed_dim, generator=torch.Generator().manual_seed(0))
        return F.normalize(pixels.flatten(1) @ weights, dim=-1)


def draw_images(root: Path, count: int, classes: int = 3) -> ImageList:
    noise = random.Random(0)
    root.mkdir(parents=True, exist_ok=True)
    files = [f"{i:03d}.png" for i in range(count)]
    for file in files:
        Image.frombytes("RGB", (SIDE, SIDE), noise.randbytes(3 * SIDE * SIDE)).save(root / file)
    return ImageList(root, files, [i % classes for i in range(count)], [f"class {c}" for c in range(classes)])


@pytest.fixture
def images(tmp_path):
    return draw_images(tmp_path / "images", 11)


def shard_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(path).glob("shard-*"))}


BUILD = {"shard_size": 4, "batch_size": 3, "views": 2}  # 11 images: shards of 4, 4, 3


# -- what is built ----------------------------------------------------------------------------------------------------


def test_cache_holds_the_features_of_each_image(images, tmp_path):
    clip = TinyClip()
    cache = cache_features(clip, images, tmp_path / "cache", **BUILD)
    expected = clip.encode_image(torch.stack([clip.preprocess(load_image(path)) for path in images.paths]))
    torch.testing.assert_close(cache.tensor(), expected)
    assert len(cache) == 11 and (cache.views, cache.dim, cache.dtype) == (2, 6, "float32")
    assert cache.labels.tolist() == list(images.labels) and cache.labels.dtype == torch.int64
    assert cache.classnames == images.classnames and cache.files == images.files
    assert cache.fingerprint == clip.image_fingerprint and cache.path == tmp_path / "cache"
    names = {"manifest.json", ".lock", *(f"shard-0000{n}.safetensors" for n in range(3))}
    assert {file.name for file in cache.path.iterdir()} == names, "nothing is left over"
    cache.verify(images)
    again = FeatureCache.open(tmp_path / "cache")
    assert torch.equal(again.tensor(1), cache.tensor(1)) and not torch.equal(cache.tensor(1), cache.tensor(0))


def test_rows_gather_over_shards_and_views(images, tmp_path):
    cache = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    index = torch.tensor([10, 0, 4, 3, 10, 7])
    view = torch.tensor([0, 1, 1, 0, 1, 0])
    both = torch.stack([cache.tensor(0), cache.tensor(1)])
    assert torch.equal(cache.rows(index), both[0, index])
    assert torch.equal(cache.rows(index, 1), both[1, index])
    assert torch.equal(cache.rows(index, view), both[view, index])
    assert cache.rows(index[:0]).shape == (0, 6)
    cache.tensor().zero_()
    assert torch.equal(cache.tensor(), both[0]), "copies, so that nobody can spoil the mapping"
    for bad, message in (
        ((torch.tensor([11]),), r"index must lie in \[0, 11\), got 11 to 11"),
        ((torch.tensor([-1]),), r"index must lie in \[0, 11\), got -1"),
        ((index, 2), r"view must lie in \[0, 2\), got 2"),
        ((index, view[:2]), r"view one number or \[B\], got \[6\], \[2\]"),
        ((index > 3,), "index must be integers, got torch.bool"),
    ):
        with pytest.raises(IndexError, match=message):
            cache.rows(*bad)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_is_rounded_once(images, tmp_path, dtype, tolerance):
    full = cache_features(TinyClip(), images, tmp_path / "full").tensor()
    half = cache_features(TinyClip(), images, tmp_path / "half", dtype=dtype)
    assert half.dtype == dtype and half.tensor().dtype == torch.float32
    torch.testing.assert_close(half.tensor(), full, rtol=tolerance, atol=1e-6)
    small, big = ((tmp_path / name / "shard-00000.safetensors").stat().st_size for name in ("half", "full"))
    assert big - small == 11 * 6 * 2


def test_select_is_a_view_with_the_lists_own_labels(images, tmp_path):
    cache = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    subset = images.select([2, 0]).take([5, 0, 3])
    chosen = cache.select(subset)
    assert chosen.files == subset.files and chosen.labels.tolist() == list(subset.labels)
    assert chosen.classnames == ("class 2", "class 0")
    assert torch.equal(chosen.tensor(1), cache.tensor(1)[[images.files.index(file) for file in subset.files]])
    assert torch.equal(chosen.select(subset.take([1])).tensor(), chosen.tensor()[1:2]), "views nest"
    assert chosen.shards[0].data_ptr() == cache.shards[0].data_ptr()
    novel = cache.select_classes([2, 1])
    assert novel.classnames == ("class 2", "class 1") and novel.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert torch.equal(novel.tensor(), cache.tensor()[cache.labels > 0])
    with pytest.raises(ValueError, match="1 of 1 images are not in feature cache .*cache, the first is 'new.png'"):
        cache.select(ImageList(images.root, ["new.png"], [0], ["cat"]))
    for classes in ([3], [1, 1]):
        with pytest.raises(ValueError, match=r"classes must be different and lie in \[0, 3\)"):
            cache.select_classes(classes)


def test_bits_do_not_depend_on_workers_order_or_the_callers_stream(images, tmp_path):
    clip = TinyClip()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = cache_features(clip, images, tmp_path / "one", **BUILD)
    two = cache_features(clip, images, tmp_path / "two", **BUILD, workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    backwards = cache_features(clip, images.take(range(10, -1, -1)), tmp_path / "backwards", **BUILD)
    torch.testing.assert_close(backwards.tensor(1).flip(0), one.tensor(1))
    assert torch.equal(two.tensor(1), one.tensor(1))
    other = cache_features(clip, images, tmp_path / "other", **BUILD, seed=1)
    assert torch.equal(other.tensor(0), one.tensor(0)) and not torch.allclose(other.tensor(1), one.tensor(1))


def test_many_images_make_larger_shards_rather_than_many(images, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_SIZE", 2)
    monkeypatch.setattr(features, "MAX_SHARDS", 3)
    assert len(cache_features(TinyClip(), images, tmp_path / "cache").shards) == 3
    assert len(cache_features(TinyClip(), images.take(range(4)), tmp_path / "few").shards) == 2
    assert len(cache_features(TinyClip(), images, tmp_path / "own", shard_size=1).shards) == 11


def test_nothing_is_printed(images, tmp_path, capfd):
    cache_features(TinyClip(), images, tmp_path / "cache").verify()
    assert capfd.readouterr() == ("", "")


def test_real_clip_end_to_end(tmp_path):
    from mergetune.clip import load_clip

    clip = load_clip(f"local-dir:{ASSETS / 'icon-clip'}")
    with zipfile.ZipFile(ASSETS / "tilted-icons.zip") as archive:
        for split in ("train", "test"):
            names = [name for name in archive.namelist() if name.startswith(split)]
            for name in names[:40]:
                archive.extract(name, tmp_path / "icons")
    data = ImageFolder(tmp_path / "icons")
    few = data.few_shot(3, seed=1)
    cache = cache_features(clip, data.train, tmp_path / "cache", views=2, batch_size=16, shard_size=32)
    assert cache.fingerprint == clip.image_fingerprint
    chosen = cache.select(few)
    pixels = torch.stack([clip.preprocess(load_image(path)) for path in few.paths])
    torch.testing.assert_close(chosen.tensor(), clip.encode_image(pixels), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chosen.tensor(1).norm(dim=-1), torch.ones(len(few)))
    assert not torch.allclose(chosen.tensor(0), chosen.tensor(1), atol=1e-2)
    again = cache_features(clip, few, tmp_path / "cache", views=2)
    assert torch.equal(again.tensor(), chosen.tensor())


# -- reading is mapping -----------------------------------------------------------------------------------------------


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
    shard = (tmp_path / "cache" / "shard-00000.safetensors").resolve()
    assert shard.stat().st_size > 15_000_000
    cache = FeatureCache.open(tmp_path / "cache")
    assert resident_kib(shard) < 5_000, "the kernel maps a few MB around the header"
    assert torch.equal(cache.rows(torch.tensor([50])), expected)
    assert 0 < resident_kib(shard) < 8_000
    cache.tensor()
    assert resident_kib(shard) > 15_000


WAYS = {"mapped": 1 << 40, "read": 0}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Small caches, mapped as they are or read as large ones are."""
    monkeypatch.setattr(features, "MAX_MAPPED", WAYS[request.param])
    return request.param


def uneven_cache(path: Path, dtype: str = "float32", *, views: int = 3, dim: int = 5, seed: int = 0) -> Tensor:
    """Write a cache of 12 shards of up to 4 rows, two of them empty. All its rows [V, N, D]."""
    path.mkdir()
    files = [f"{i}.png" for i in range(45)]
    plan = {"format": features.FORMAT, "id": "", "clip": "", "fingerprint": "", "preprocess": {}, "seed": 0}
    plan |= {"dtype": dtype, "views": views, "dim": dim, "shard_size": 4, "files": files}
    plan |= {"labels": [i % 3 for i in range(45)], "classnames": ["a", "b", "c"]}
    generator, all_rows = torch.Generator().manual_seed(seed), []
    for number in range(12):
        own = features._shard_files(plan, number)
        skipped = {file: "gone" for file in own if number in (4, 11) or file in ("0.png", "13.png", "14.png")}
        rows = torch.randn(views, len(own) - len(skipped), dim, generator=generator).to(features.DTYPES[dtype])
        features._write_shard(path, plan, number, rows, [["", 0, 0]] * len(own), skipped)
        all_rows.append(rows)
    features._finish(path, plan)
    return torch.cat(all_rows, dim=1).float()


@pytest.mark.parametrize("dtype", features.DTYPES)
def test_rows_of_many_shards_are_a_plain_gather(tmp_path, monkeypatch, way, dtype):
    expected = uneven_cache(tmp_path / "cache", dtype)
    cache = FeatureCache.open(tmp_path / "cache")
    assert (cache.opened is None) == (way == "mapped") and len(cache.shards) == 10 and len(cache) == 37
    draw = torch.Generator().manual_seed(1)
    few = cache.select(ImageList(Path(), ["44.png", "1.png", "12.png"][1:], [0, 1], ["x", "y"]))
    views = {
        "all": (cache, torch.arange(37)),
        "classes": (cache.select_classes([2, 0]), (cache.labels != 1).nonzero().squeeze(1)),
        "images": (few, torch.tensor([0, 11])),
    }
    for rows_at_once in (features.ROWS, 4):
        monkeypatch.setattr(features, "ROWS", rows_at_once)
        for name, (view, rows) in views.items():
            assert torch.equal(view.tensor(2), expected[2, rows]), name
            for size in (1, 3, 50):
                index = torch.randint(len(view), (size,), generator=draw)
                which = torch.randint(3, (size,), generator=draw)
                assert torch.equal(view.rows(index), expected[0, rows[index]]), name
                assert torch.equal(view.rows(index, which), expected[which, rows[index]]), name
        assert torch.equal(cache.rows(torch.arange(36, -1, -1), 1), expected[1].flip(0))


def test_rows_that_follow_each_other_are_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_MAPPED", 0)
    expected, preadv, calls = uneven_cache(tmp_path / "cache"), os.preadv, []

    def partly(descriptor, buffers, offset):  # as some file systems do
        calls.append(offset)
        return preadv(descriptor, [buffers[0][:70]], offset)

    monkeypatch.setattr(os, "preadv", partly)
    assert torch.equal(FeatureCache.open(tmp_path / "cache").tensor(), expected[0])
    assert len(calls) == 10 + 8, "one for each shard that has rows, and one more where 80 bytes did not come at once"


def test_features_outlive_their_files(tmp_path, way):
    expected = uneven_cache(tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    other = uneven_cache(tmp_path / "cache", seed=1)
    assert torch.equal(cache.tensor(1), expected[1]) and not torch.equal(other, expected)
    shutil.rmtree(tmp_path / "moved")
    assert torch.equal(cache.tensor(1), expected[1])


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_MAPPED", 0)
    uneven_cache(tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    os.truncate(tmp_path / "cache" / "shard-00010.safetensors", 100)
    cache.rows(torch.arange(33))
    with pytest.raises(ValueError, match="shard-00010.safetensors was truncated while it was open"):
        cache.tensor()


def test_files_are_closed_with_the_last_view(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_MAPPED", 0)
    uneven_cache(tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    part, files = cache.select_classes([1]), list(cache.opened.files)
    cache.tensor()
    part.tensor()
    del cache
    gc.collect()
    assert len(files) == 10 and not any(file.closed for file in files) and len(part.tensor()) == 12
    del part
    gc.collect()
    assert all(file.closed for file in files)


def test_features_are_mapped_where_not_all_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_MAPPED", 0)
    expected = uneven_cache(tmp_path / "cache")
    for limit, is_read in ((20, True), (19, False), (features.resource.RLIM_INFINITY, True)):
        monkeypatch.setattr(features.resource, "getrlimit", lambda which, limit=limit: (limit, 1 << 20))
        cache = FeatureCache.open(tmp_path / "cache")
        assert (cache.opened is not None) == is_read and torch.equal(cache.tensor(), expected[0])


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
    plan = {"format": features.FORMAT, "id": "", "clip": "", "fingerprint": "", "preprocess": {}, "seed": None}
    plan |= {"dtype": "float16", "views": 1, "dim": D_LARGE, "shard_size": 500, "classnames": ["a", "b"]}
    plan |= {"files": [f"{i}.png" for i in range(N_LARGE)], "labels": [i % 2 for i in range(N_LARGE)]}
    identity = [64 * "0", 110_000, 1_700_000_000_000_000_000]
    for number, shard in enumerate(rows.split(500)):
        features._write_shard(path, plan, number, shard[None], [identity] * len(shard), {})
    features._finish(path, plan)
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


def test_opening_leaves_the_identities_of_images_alone(large):
    manifest = (large / "manifest.json").stat().st_size
    tracemalloc.start()
    cache = FeatureCache.open(large)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(cache) == N_LARGE and manifest > 3_000_000
    assert most < 2 * manifest and held < manifest, "all lists and texts of the manifest take 4 times its size"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc to see what a mapping holds")
def test_what_is_read_does_not_stay_in_memory(large, monkeypatch):
    monkeypatch.setattr(features, "MAX_MAPPED", 0)
    cache = FeatureCache.open(large)
    assert len(cache.tensor()) == N_LARGE
    assert len(cache.shards) == 60 and resident_kib(large.resolve()) <= 4 * 60, "a page of each at most"


# -- a second call ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoMoreEncoding(TinyClip):
    """Proof that nothing is encoded again."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise AssertionError("encoded again")


def test_second_call_encodes_nothing(images, tmp_path):
    first = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    order = [5, 2, 9]
    again = cache_features(NoMoreEncoding(), images.take(order), tmp_path / "cache", views=2)
    assert torch.equal(again.tensor(1), first.tensor(1)[order])
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    assert torch.equal(FeatureCache.open(tmp_path / "moved").tensor(), first.tensor())


def test_relabelling_encodes_nothing_and_is_remembered(images, tmp_path):
    cache_features(TinyClip(), images, tmp_path / "cache")
    relabelled = replace(images, labels=tuple(1 - label % 2 for label in images.labels), classnames=("odd", "even"))
    backwards = relabelled.take(range(10, -1, -1))
    cache = cache_features(NoMoreEncoding(), backwards, tmp_path / "cache")
    assert cache.labels.tolist() == list(backwards.labels) and cache.classnames == ("odd", "even")
    opened = FeatureCache.open(tmp_path / "cache")
    assert opened.labels.tolist() == list(relabelled.labels) and opened.classnames == ("odd", "even")
    opened.verify(images)


def test_a_copied_data_set_is_the_same_and_a_changed_image_is_not(images, tmp_path):
    cache_features(TinyClip(), images, tmp_path / "cache")
    shutil.copytree(images.root, tmp_path / "copy", copy_function=shutil.copyfile)
    copied = replace(images, root=tmp_path / "copy")
    cache_features(NoMoreEncoding(), copied, tmp_path / "cache").verify(copied)

    changed = tmp_path / "copy" / "003.png"
    content = bytearray(changed.read_bytes())
    content[-20] ^= 1  # same size
    changed.write_bytes(content)
    message = r"is stale: 1 of 11 images below .* not what was encoded, the first is '003.png'; overwrite=True"
    with pytest.raises(ValueError, match=message):
        cache_features(TinyClip(), copied, tmp_path / "cache")
    cache_features(NoMoreEncoding(), copied.take([0, 1]), tmp_path / "cache")

    stat = (images.root / "003.png").stat()
    (images.root / "003.png").write_bytes(content)
    os.utime(images.root / "003.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match=message):
        FeatureCache.open(tmp_path / "cache").verify(images)
    (images.root / "003.png").unlink()
    with pytest.raises(ValueError, match="missing or not what was encoded, the first is '003.png'"):
        cache_features(TinyClip(), images, tmp_path / "cache")


@pytest.mark.parametrize("asked", [range(11), [2, 5]])
def test_an_image_that_was_only_touched_is_read_once_more_and_never_again(images, tmp_path, monkeypatch, asked):
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    read, sha256 = [], features._sha256
    monkeypatch.setattr(features, "_sha256", lambda path: [read.append(path.name), sha256(path)][1])
    for touched in (["005.png"], [], ["002.png", "005.png"], []):
        for file in touched:
            os.utime(images.root / file)
        cache_features(NoMoreEncoding(), images.take(asked), tmp_path / "cache", views=2)
        assert read == touched
        read.clear()


@pytest.mark.parametrize(
    ("clip", "settings", "message"),
    [
        (
            TinyClip(image_fingerprint="other weights"),
            {},
            "the image weights must be what .*tiny weights, got other weights",
        ),
        (TinyClip(preprocess_cfg={"size": 9}), {}, "the preprocessing must be"),
        (TinyClip(), {"dtype": "float16"}, "dtype must be what it was built with, float32, got float16"),
        (TinyClip(), {"views": 3}, "views must be what it was built with, 2, got 3"),
        (TinyClip(), {"seed": 5}, "the seed of the augmented views must be what it was built with, 0, got 5"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_stale_cache_is_refused_and_rebuilt_on_request(images, tmp_path, clip, settings, message, finished):
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    if not finished:
        unfinish(tmp_path / "cache")
    before = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    settings = {**BUILD, **settings}
    with pytest.raises(ValueError, match=f"is stale: {message}.*; overwrite=True rebuilds it"):
        cache_features(clip, images, tmp_path / "cache", **settings)
    assert {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before
    rebuilt = cache_features(clip, images, tmp_path / "cache", **settings, overwrite=True)
    assert rebuilt.fingerprint == clip.image_fingerprint and rebuilt.views == settings["views"]
    rebuilt.verify(images)


def unfinish(path: Path) -> None:
    """Turn a cache of three shards into one that was killed during the last."""
    manifest = json.loads((path / "manifest.json").read_text())
    for number, shard in enumerate(manifest.pop("shards")[:-1]):
        (path / f"shard-{number:05d}.json").write_text(json.dumps({"plan": manifest["id"], "shard": shard}))
    (path / "building.json").write_text(json.dumps(manifest))
    (path / "manifest.json").unlink()
    (path / "shard-00002.safetensors").unlink()


def test_unfinished_cache_says_so(images, tmp_path):
    whole = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    bits = shard_bytes(tmp_path / "cache")
    unfinish(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"is unfinished \(2 of 3 shards\): call cache_features again"):
        FeatureCache.open(tmp_path / "cache")
    with pytest.raises(ValueError, match="unfinished and was begun for other images"):
        cache_features(TinyClip(), images.take([0]), tmp_path / "cache", **BUILD)
    relabelled = replace(images, labels=(0,) * 11)
    cache = cache_features(TinyClip(), relabelled, tmp_path / "cache", **{**BUILD, "shard_size": 99})
    assert shard_bytes(tmp_path / "cache") == bits and cache.labels.tolist() == [0] * 11
    assert torch.equal(whole.tensor(), cache.tensor())


def test_cache_with_other_images_is_refused(images, tmp_path):
    cache_features(TinyClip(), images.take(range(9)), tmp_path / "cache")
    with pytest.raises(ValueError, match="lacks 2 of 11 images, the first is '009.png'; overwrite=True"):
        cache_features(TinyClip(), images, tmp_path / "cache")


def test_names_may_hold_anything(images, tmp_path):
    """Also what separates the images' identities from the rest of the manifest."""
    names = ['"images":[["x",1,2]],".png', "\\", "]]", '{"images":[[]]}', "ü ☃.png"]
    for file, name in zip(images.files, names, strict=False):
        (images.root / file).rename(images.root / name)
    listed = replace(images, files=(*names, *images.files[len(names) :]), classnames=('"images":[[', "]]", "c"))
    first = cache_features(TinyClip(), listed, tmp_path / "cache", **BUILD)
    relabelled = replace(listed, labels=(0,) * 11)
    cache_features(NoMoreEncoding(), relabelled, tmp_path / "cache", views=2).verify(relabelled)
    opened = FeatureCache.open(tmp_path / "cache")
    assert opened.files == listed.files and opened.classnames == listed.classnames and not opened.labels.any()
    assert torch.equal(opened.tensor(1), first.tensor(1))
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest, indent=1))  # and written by another hand
    FeatureCache.open(tmp_path / "cache").verify(listed)
    (images.root / names[1]).write_bytes(b"")
    with pytest.raises(ValueError, match="is stale: 1 of 11 images"):
        cache_features(TinyClip(), listed, tmp_path / "cache", views=2)


def test_digest_is_that_of_features_order_and_labels(images, tmp_path):
    cache = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    other = cache_features(TinyClip(), images, tmp_path / "other", **{**BUILD, "seed": 1})
    swapped = replace(images, labels=images.labels[::-1])
    found = [cache, other, cache.select(images.take([3, 0])), cache.select(images.take([0, 3])), cache.select(swapped)]
    assert len({view.digest for view in found}) == 5
    again = FeatureCache.open(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert again.digest == cache.digest, "nothing is read for it"


def test_images_of_two_caches_are_found(monkeypatch):
    monkeypatch.setattr(features, "ROWS", 4)
    x = F.normalize(torch.randn(30, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    x[20], names = -x[3], [f"{i}.png" for i in range(30)]

    def cache(rows: list[int], files: list[str] = ()) -> FeatureCache:  # noqa: B006
        return FeatureCache.from_tensors(x[rows].half(), [0] * len(rows), ["a"], files=files)

    first, named = cache([*range(20)]), cache([*range(20)], names[:20])
    rows = [25, 19, 20, 0, 29, 3, 3]
    assert first.shared_with(cache(rows)).tolist() == [1, 3, 5, 6]
    same_names = ["x", names[19], names[3], "y", names[0], names[3] + " ", "z"]
    assert first.shared_with(cache(rows, same_names)).tolist() == [1, 3, 5, 6], "one without names"
    assert named.shared_with(cache(rows, same_names)).tolist() == [1], "another image, or another name"
    assert not len(cache([0]).shared_with(cache([*range(1, 30)]))) and not len(named.shared_with(cache([0], ["new"])))


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_truncated_shard_is_refused(images, tmp_path, finished):
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    if not finished:
        unfinish(tmp_path / "cache")
    size = shard.stat().st_size
    with shard.open("rb+") as file:
        file.truncate(size - 8)
    message = f"shard-00001.safetensors is truncated: it must have {size} bytes, got {size - 8}; overwrite=True"
    with pytest.raises(ValueError, match=message):
        cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    with pytest.raises(ValueError, match=message):
        FeatureCache.open(tmp_path / "cache")
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors is missing"):
        FeatureCache.open(tmp_path / "cache")
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD, overwrite=True).verify(images)


def test_corrupted_files_are_refused(images, tmp_path):
    cache = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    shard = tmp_path / "cache" / "shard-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    FeatureCache.open(cache.path)  # checksums are for verify
    with pytest.raises(ValueError, match="shard-00002.safetensors is damaged: its checksum"):
        cache.verify()
    shard.write_bytes(bytes([255]) * len(content))
    with pytest.raises(ValueError, match="shard-00002.safetensors is damaged"):
        FeatureCache.open(cache.path)
    for text, message in (("{", "manifest.json is damaged"), ('{"format": "x"}', "must have format .* got 'x'")):
        (cache.path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            FeatureCache.open(cache.path)
    with pytest.raises(FileNotFoundError, match="path must be a feature cache, got .*nowhere"):
        FeatureCache.open(tmp_path / "nowhere")


def test_disk_full_leaves_no_bad_shard(images, tmp_path, monkeypatch):
    whole = cache_features(TinyClip(), images, tmp_path / "whole", **BUILD)
    calls, fsync = [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    assert not list((tmp_path / "cache").glob(".*.part"))
    done = shard_bytes(tmp_path / "cache")
    assert done.items() & shard_bytes(whole.path).items() and "shard-00002.safetensors" not in done
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    assert shard_bytes(tmp_path / "cache") == shard_bytes(whole.path)


def test_other_peoples_folders_are_left_alone(images, tmp_path):
    with pytest.raises(ValueError, match="path must be a new folder or a feature cache alone, got .*images with '0"):
        cache_features(TinyClip(), images, images.root, overwrite=True)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_unreadable_image_raises_and_keeps_what_was_built(images, tmp_path):
    bad = images.root / "009.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:40])
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot read image .*009.png"):
            cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
        with pytest.raises(ValueError, match=r"unfinished \(2 of 3 shards\)"):
            FeatureCache.open(tmp_path / "cache")
    bad.write_bytes(whole)
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD).verify(images)


def test_unreadable_images_can_be_skipped(images, tmp_path):
    for i in (1, 8, 9, 10):  # all of the last shard, which is then empty
        (images.root / f"{i:03d}.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="4 unreadable images are left out, the first: cannot read image .*001.png"):
        cache = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD, on_error="skip")
    assert cache.files == tuple(f"{i:03d}.png" for i in (0, 2, 3, 4, 5, 6, 7))
    opened = FeatureCache.open(cache.path)
    assert opened.files == cache.files and set(opened.skipped) == {"001.png", "008.png", "009.png", "010.png"}
    clip = TinyClip()
    expected = clip.encode_image(torch.stack([clip.preprocess(load_image(images.root / file)) for file in cache.files]))
    torch.testing.assert_close(opened.tensor(), expected)
    torch.testing.assert_close(opened.rows(torch.tensor([6, 0])), expected[[6, 0]])
    with pytest.warns(UserWarning, match="1 unreadable images are left out"):
        chosen = opened.select(images.take([1, 2]))
    assert chosen.files == ("002.png",) and chosen.labels.tolist() == [2] and len(chosen) == 1
    with pytest.raises(ValueError, match="all 1 were skipped"):
        opened.select(images.take([1]))
    with pytest.raises(ValueError, match=r"cannot read image .*001.png.* \(4 such images when .*on_error='skip'"):
        cache_features(clip, images, cache.path, **BUILD)
    draw_images(images.root, 11)
    with pytest.raises(ValueError, match="is stale: 4 of 11 images"):
        cache_features(clip, images, cache.path, **BUILD, on_error="skip")


def test_nothing_readable_and_nothing_there(images, tmp_path):
    for path in images.paths:
        path.unlink()
    with pytest.raises(ValueError, match="cannot read image .*000.png"):
        cache_features(TinyClip(), images, tmp_path / "a", workers=1)
    with pytest.raises(ValueError, match="at least one readable image, all 11 were skipped"):
        cache_features(TinyClip(), images, tmp_path / "b", on_error="skip")


@dataclass(frozen=True)
class BrokenClip(TinyClip):
    """A tower that overflows on the third image."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        encoded = super().encode_image(pixels)
        encoded[2] = float("nan")
        return encoded


def test_features_that_are_not_numbers_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"features must be finite, got NaN or inf for '002.png' \(view 0\) from tiny"):
        cache_features(BrokenClip(), images, tmp_path / "cache", on_error="skip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_bad_settings_are_refused(images, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        cache_features(TinyClip(), images, tmp_path / "cache", **settings)
    assert not (tmp_path / "cache").exists()


# -- features made elsewhere ------------------------------------------------------------------------------------------


def test_from_tensors():
    x = F.normalize(torch.randn(2, 5, 4), dim=-1)
    cache = FeatureCache.from_tensors(x, [0, 1, 1, 0, 1], ["cat", "dog"], fingerprint="abc", files=list("vwxyz"))
    assert (cache.views, cache.dim, len(cache), cache.fingerprint, cache.path) == (2, 4, 5, "abc", None)
    assert torch.equal(cache.tensor(1), x[1])
    assert cache.select(ImageList(Path(), ["z", "v"], [0, 0], ["pet"])).tensor().equal(x[0, [4, 0]])
    assert cache.select_classes([1]).files == ("w", "x", "z")
    cache.verify()
    half = FeatureCache.from_tensors(x[0].double() * 3, torch.zeros(5, dtype=torch.int32), ["cat"], normalize=True)
    assert half.dtype == "float32" and half.labels.dtype == torch.int64
    torch.testing.assert_close(half.tensor(), x[0])
    assert FeatureCache.from_tensors(x[0].bfloat16(), [0] * 5, ["cat"]).dtype == "bfloat16"


def test_features_may_lie_anyhow_in_memory():
    whole = F.normalize(torch.randn(6, 4), dim=-1)
    odd = bytearray(1 + 12 * 4)  # as in a file that is mapped from an odd place
    np.frombuffer(odd, dtype=np.float32, offset=1)[:] = whole[:3].flatten().numpy()
    parts = [torch.frombuffer(odd, dtype=torch.float32, offset=1).view(3, 4), whole[3:].T.contiguous().T]
    caches = [FeatureCache.from_tensors(part, [0, 0, 0], ["cat"]) for part in parts]
    both = replace(
        caches[0],
        labels=torch.zeros(6, dtype=torch.int64),
        stored=torch.arange(6),
        shards=caches[0].shards + caches[1].shards,
    )
    index = torch.tensor([5, 0, 3, 2, 2])
    assert parts[0].data_ptr() % 4 == 1 and torch.equal(both.rows(index), whole[index])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: {"features": x[0]}, r"shape \[N, D\] or \[V, N, D\] .* got torch.float32 \[4\]"),
        (lambda x: {"features": x[:0], "labels": []}, r"at least one row, got torch.float32 \[0, 4\]"),
        (lambda x: {"features": x.int()}, "got torch.int32"),
        (lambda x: {"labels": [0, 1]}, r"labels must be integers of shape \[N\] = \[3\], got torch.int64 \[2\]"),
        (lambda x: {"labels": [0.0, 1.0, 1.0]}, "labels must be integers"),
        (lambda x: {"labels": [0, 1, 2]}, r"labels must lie in \[0, 2\), got 0 to 2"),
        (lambda x: {"features": x * torch.tensor([[1], [float("nan")], [1]])}, "finite, got 1 rows .* row 1"),
        (lambda x: {"features": x * torch.tensor([[1], [1], [0]])}, "other than zero, got 1 rows .* row 2"),
        (lambda x: {"features": 2 * x}, r"unit norm \(or normalize=True\), got 3 rows .* of norm 2"),
        (lambda x: {"files": ["a", "b"]}, "files must be N = 3 different names, got 2"),
    ],
)
def test_from_tensors_refuses(spoil: Callable[[Tensor], dict[str, Any]], message):
    x = F.normalize(torch.ones(3, 4), dim=-1)
    with pytest.raises(ValueError, match=message):
        FeatureCache.from_tensors(**{"features": x, "labels": [0, 1, 1], "classnames": ["cat", "dog"], **spoil(x)})


# -- kills and company ------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> multiprocessing.Process:
    """Start work in a child, in a process group of its own."""
    child = multiprocessing.get_context("fork").Process(target=lambda: (os.setpgrp(), work()))
    child.start()
    return child


def test_killed_at_any_step_of_writing_it_goes_on_with_the_same_bits(images, tmp_path):
    build = {**BUILD, "shard_size": 6}
    whole = shard_bytes(cache_features(TinyClip(), images, tmp_path / "whole", **build).path)

    def build_and_die(path: Path, step: int) -> None:
        steps = iter(range(step, -1, -1))
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            original = getattr(owner, name)

            def counted(*args, original=original, **settings):
                if next(steps) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **settings)

            setattr(owner, name, counted)
        cache_features(TinyClip(), images, path, **build)

    for step in range(1000):
        path = tmp_path / f"cache{step}"
        child = in_child(lambda path=path, step=step: build_and_die(path, step))
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        if not (path / "manifest.json").exists():
            with pytest.raises((ValueError, FileNotFoundError), match="is unfinished|without manifest"):
                FeatureCache.open(path)
        cache_features(TinyClip(), images, path, **build).verify(images)
        assert shard_bytes(path) == whole and not (path / "building.json").exists(), "nothing is left over"
    assert step > 20, "every write and removal was a step"


def test_killed_at_random_moments_it_goes_on_with_the_same_bits(tmp_path):
    images = draw_images(tmp_path / "images", 60)
    clip = TinyClip(seconds=0.004)
    build = {"shard_size": 4, "batch_size": 2, "views": 2}
    whole = cache_features(clip, images, tmp_path / "whole", **build)
    moments, kills = random.Random(7), 0
    for _ in range(100):
        child = in_child(lambda: cache_features(clip, images, tmp_path / "cache", **build))
        child.join(moments.uniform(0.02, 0.12))
        if child.exitcode == 0:
            break
        child.kill()
        child.join()
        kills += 1
    assert child.exitcode == 0 and kills >= 3
    cache_features(NoMoreEncoding(), images, tmp_path / "cache", **build)  # tidies, if the last kill came late
    assert shard_bytes(tmp_path / "cache") == shard_bytes(whole.path)
    FeatureCache.open(tmp_path / "cache").verify(images)


@dataclass(frozen=True)
class StuckClip(TinyClip):
    """A tower that says when it is reached, and never comes back."""

    sign: Path = Path()

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.sign.touch()
        time.sleep(60)
        return super().encode_image(pixels)


@pytest.mark.parametrize("workers", [0, 1])
def test_two_builders_do_not_meet(images, tmp_path, workers):
    stuck = StuckClip(sign=tmp_path / "sign")
    child = in_child(lambda: cache_features(stuck, images, tmp_path / "cache", **BUILD, workers=workers))
    try:
        while not stuck.sign.exists():
            assert child.is_alive()
            time.sleep(0.005)
        for overwrite in (False, True):
            with pytest.raises(RuntimeError, match="cache is being built by another process"):
                cache_features(TinyClip(), images, tmp_path / "cache", **BUILD, overwrite=overwrite)
        child.kill()
        child.join()
        cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)  # the dead hold no lock, nor do their workers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


def torchrun_script() -> None:
    """What each rank of the next test does."""
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    images = ImageList(root / "images", *json.loads((root / "list.json").read_text()))
    for _ in range(2):
        cache = cache_features(TinyClip(), images, root / "ranks", **BUILD)
    few = cache_features(TinyClip(), images.take([7, 2]), root / "ranks", **BUILD)
    rank = os.environ["RANK"]
    messages = []
    broken = ImageList(images.root, [*images.files, "gone.png"], [*images.labels, 0], images.classnames)
    for path, listed in ((root / "ranks", broken), (root / "broken", broken)):
        try:
            cache_features(TinyClip(), listed, path, **BUILD)
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    (root / f"rank{rank}.json").write_text(json.dumps([cache.tensor(1).tolist(), few.files, messages]))
    torch.distributed.destroy_process_group()


def test_torchrun_gives_the_bits_of_one_process(images, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([images.files, images.labels, images.classnames]))
    paths = [str(Path(__file__).parent), str(Path(features.__file__).parents[1])]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    one = cache_features(TinyClip(), images, tmp_path / "one", **BUILD)
    assert shard_bytes(tmp_path / "ranks") == shard_bytes(tmp_path / "one")
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rows, few, messages in reports:
        assert torch.equal(torch.tensor(rows), one.tensor(1)) and few == ["007.png", "002.png"]
        assert "lacks 1 of 12 images, the first is 'gone.png'" in messages[0]
        assert "cannot read image" in messages[1]
    assert reports[1][2][0].startswith("rank 0 failed: ValueError")
    with pytest.raises(ValueError, match=r"is unfinished \(2 of 3 shards\)"):
        FeatureCache.open(tmp_path / "broken")


if __name__ == "__main__":
    torchrun_script()
