"""Feature caches: a second call, stale and unfinished caches."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cache_cases import BUILD, NoMoreEncoding, TinyClip, array_bytes, as_version_1

from mergetune.data import FeatureCache, cache_features, cache_identity
from mergetune.data import cache as cache_module
from mergetune.data.cache_blocks import Damage, reopen
from mergetune.data.cache_files import read_manifest

pytestmark = pytest.mark.usefixtures("one_thread")


# -- a second call -----------------------------------------------------------------------------------------------------


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
    message = r"is stale: 1 of 11 images below .* differ from the encoded ones, the first is '003.png'; overwrite=True"
    with pytest.raises(ValueError, match=message):
        cache_features(TinyClip(), copied, tmp_path / "cache")
    cache_features(NoMoreEncoding(), copied.take([0, 1]), tmp_path / "cache")

    stat = (images.root / "003.png").stat()
    (images.root / "003.png").write_bytes(content)
    os.utime(images.root / "003.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match=message):
        FeatureCache.open(tmp_path / "cache").verify(images)
    (images.root / "003.png").unlink()
    with pytest.raises(ValueError, match="missing or differ from the encoded ones, the first is '003.png'"):
        cache_features(TinyClip(), images, tmp_path / "cache")


@pytest.mark.parametrize("asked", [range(11), [2, 5]])
def test_an_image_that_was_only_touched_is_read_once_more_and_never_again(images, tmp_path, monkeypatch, asked):
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    read, sha256 = [], cache_identity.file_sha256
    monkeypatch.setattr(cache_identity, "file_sha256", lambda path: [read.append(path.name), sha256(path)][1])
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
            "the image weights must be those of tiny, as when the cache was built, got tiny with other weights",
        ),
        (TinyClip(preprocess_cfg={"size": 9}), {}, "the preprocessing must be"),
        (TinyClip(), {"dtype": "float16"}, "dtype must be float32, as when the cache was built, got float16"),
        (TinyClip(), {"views": 3}, "views must be 2, as when the cache was built, got 3"),
        (TinyClip(), {"seed": 5}, "the seed of the augmented views must be 0, as when the cache was built, got 5"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_stale_cache_is_refused_and_rebuilt_on_request(images, tmp_path, clip, settings, message, finished):
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    if not finished:
        unfinish(tmp_path / "cache")
    before = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    settings = {**BUILD, **settings}
    with pytest.raises(ValueError, match=f"is stale: {message}.*; overwrite=True \\(--overwrite\\) rebuilds the cache"):
        cache_features(clip, images, tmp_path / "cache", **settings)
    assert {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before
    rebuilt = cache_features(clip, images, tmp_path / "cache", **settings, overwrite=True)
    assert rebuilt.fingerprint == clip.image_fingerprint and rebuilt.views == settings["views"]
    rebuilt.verify(images)


def unfinish(path: Path) -> None:
    """Turn a cache of three blocks into one that was killed during the last."""
    manifest = read_manifest(path)
    reopen(path, manifest, Damage(rows=((8, 10),), text=""))
    with (path / "arrays.bin").open("r+b") as file:
        for array in manifest.arrays:
            for view in range(manifest.views):
                file.seek(array.place(view, 8))
                file.write(bytes(3 * array.row_bytes))


def test_unfinished_cache_says_so(images, tmp_path):
    whole = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    bits = array_bytes(tmp_path / "cache")
    unfinish(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"is unfinished \(2 of 3 blocks\): call cache_features again"):
        FeatureCache.open(tmp_path / "cache")
    with pytest.raises(ValueError, match="unfinished and was started with other images"):
        cache_features(TinyClip(), images.take([0]), tmp_path / "cache", **BUILD)
    relabelled = replace(images, labels=(0,) * 11)
    cache = cache_features(TinyClip(), relabelled, tmp_path / "cache", **{**BUILD, "shard_size": 99})
    assert array_bytes(tmp_path / "cache") == bits and cache.labels.tolist() == [0] * 11
    assert torch.equal(whole.tensor(), cache.tensor())


def test_an_unfinished_cache_of_version_0_1_is_not_continued(images, tmp_path):
    path = tmp_path / "cache"
    path.mkdir()
    (path / "building.json").write_text('{"format":"mergetune.features/1","clip":"tiny"}')
    for work in (FeatureCache.open, lambda path: cache_features(TinyClip(), images, path, **BUILD)):
        with pytest.raises(ValueError, match="is unfinished and was started by version 0.1; overwrite=True"):
            work(path)
    cache_features(TinyClip(), images, path, **BUILD, overwrite=True).verify(images)


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
    as_version_1(tmp_path / "cache")
    for indent in (None, 1):  # also written by another hand
        manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
        (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest, indent=indent))
        FeatureCache.open(tmp_path / "cache").verify(listed)
    (images.root / names[1]).write_bytes(b"")
    with pytest.raises(ValueError, match="is stale: 1 of 11 images"):
        cache_features(TinyClip(), listed, tmp_path / "cache", views=2)


def test_digest_is_that_of_features_order_and_labels(images, tmp_path):
    """The bytes decide, not the blocks or files that hold them."""
    cache = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    other = cache_features(TinyClip(), images, tmp_path / "other", **{**BUILD, "seed": 1})
    swapped = replace(images, labels=images.labels[::-1])
    found = [cache, other, cache.select(images.take([3, 0])), cache.select(images.take([0, 3])), cache.select(swapped)]
    assert len({view.digest for view in found}) == 5
    blocks = cache_features(TinyClip(), images, tmp_path / "blocks", **{**BUILD, "shard_size": 3, "batch_size": 1})
    both = torch.stack([cache.tensor(0), cache.tensor(1)])
    memory = FeatureCache.from_tensors(both, cache.labels, cache.classnames)
    assert torch.equal(blocks.tensor(1), both[1])
    assert {view.digest for view in (cache, blocks, memory, FeatureCache.open(tmp_path / "cache"))} == {found[0].digest}


def test_images_of_two_caches_are_found(monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS", 4)
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


def test_disk_full_leaves_no_bad_block(images, tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match=r"unfinished \([12] of 3 blocks\)"):
        FeatureCache.open(tmp_path / "cache")
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    assert array_bytes(tmp_path / "cache") == array_bytes(whole.path)


def test_other_peoples_folders_are_left_alone(images, tmp_path):
    with pytest.raises(
        ValueError, match="path must be a new folder or hold only a feature cache, got .*images with '0"
    ):
        cache_features(TinyClip(), images, images.root, overwrite=True)
