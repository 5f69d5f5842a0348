"""FeatureCache: what is built is right, survives kills, is shared among ranks, and is refused when it is wrong."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_cases import BUILD, NoMoreEncoding, TinyClip, array_bytes, draw_images
from torch import Tensor
from tqdm.auto import tqdm

import mergetune
from mergetune.data import FeatureCache, ImageFolder, ImageList, cache_features, load_image

ASSETS = Path(mergetune.__file__).parent / "assets"

pytestmark = pytest.mark.usefixtures("one_thread")


# -- what is built -----------------------------------------------------------------------------------------------------


def test_cache_holds_the_features_of_each_image(images, tmp_path):
    clip = TinyClip()
    cache = cache_features(clip, images, tmp_path / "cache", **BUILD)
    expected = clip.encode_image(torch.stack([clip.preprocess(load_image(path)) for path in images.paths]))
    torch.testing.assert_close(cache.tensor(), expected)
    assert len(cache) == 11 and (cache.views, cache.dim, cache.dtype) == (2, 6, "float32")
    assert cache.labels.tolist() == list(images.labels) and cache.labels.dtype == torch.int64
    assert cache.classnames == images.classnames and cache.files == images.files
    assert cache.fingerprint == clip.image_fingerprint and cache.path == tmp_path / "cache"
    names = {"manifest.json", "images.json", "arrays.bin", "checked.json"}
    assert {file.name for file in cache.path.iterdir()} == names, "nothing is left over"
    cache.verify(images)
    again = FeatureCache.open(tmp_path / "cache")
    assert torch.equal(again.tensor(1), cache.tensor(1)) and not torch.equal(cache.tensor(1), cache.tensor(0))


def test_rows_gather_over_blocks_and_views(images, tmp_path):
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
    small, big = ((tmp_path / name / "arrays.bin").stat().st_size for name in ("half", "full"))
    assert (small, big) == (11 * 6 * 2, 11 * 6 * 4)


def test_select_is_a_view_with_the_lists_own_labels(images, tmp_path):
    cache = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
    subset = images.select([2, 0]).take([5, 0, 3])
    chosen = cache.select(subset)
    assert chosen.files == subset.files and chosen.labels.tolist() == list(subset.labels)
    assert chosen.classnames == ("class 2", "class 0")
    assert torch.equal(chosen.tensor(1), cache.tensor(1)[[images.files.index(file) for file in subset.files]])
    assert torch.equal(chosen.select(subset.take([1])).tensor(), chosen.tensor()[1:2]), "views nest"
    assert chosen.source is cache.source
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
    assert array_bytes(tmp_path / "one") == array_bytes(tmp_path / "two")
    backwards = cache_features(clip, images.take(range(10, -1, -1)), tmp_path / "backwards", **BUILD)
    torch.testing.assert_close(backwards.tensor(1).flip(0), one.tensor(1))
    assert torch.equal(two.tensor(1), one.tensor(1))
    other = cache_features(clip, images, tmp_path / "other", **BUILD, seed=1)
    assert torch.equal(other.tensor(0), one.tensor(0)) and not torch.allclose(other.tensor(1), one.tensor(1))


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


# -- kills and company -------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> multiprocessing.Process:
    """Start work in a child, in a process group of its own.

    Bars share a lock among processes, and a child that is killed while it holds this lock would stop all others.
    """
    lock = threading.RLock()
    child = multiprocessing.get_context("fork").Process(target=lambda: (os.setpgrp(), tqdm.set_lock(lock), work()))
    child.start()
    return child


def test_killed_at_any_step_of_writing_it_goes_on_with_the_same_bits(images, tmp_path):
    build = {**BUILD, "shard_size": 6}
    whole = array_bytes(cache_features(TinyClip(), images, tmp_path / "whole", **build).path)

    names = {"manifest.json", "images.json", "arrays.bin", "checked.json"}

    def build_and_die(path: Path, step: int) -> None:
        steps = iter(range(step, -1, -1))
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "pwrite"), (Path, "unlink")):
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
        assert array_bytes(path) == whole, step
        assert {file.name for file in path.iterdir()} == names, "nothing is left over"
    assert step > 20, "every write and removal was a step"


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_with_the_same_bits(tmp_path):
    images = draw_images(tmp_path / "images", 60)
    clip = TinyClip(seconds=0.004)
    build = {"shard_size": 4, "batch_size": 2, "views": 2}
    whole = cache_features(clip, images, tmp_path / "whole", **build)
    moments, kills = random.Random(7), 0
    for _ in range(100):
        child = in_child(lambda: cache_features(clip, images, tmp_path / "cache", **build))
        child.join(moments.uniform(0.02, 0.12) * (1 + kills / 8))  # a busy machine gets as far as a quiet one
        if child.exitcode == 0:
            break
        child.kill()
        child.join()
        kills += 1
    assert child.exitcode == 0 and kills >= 3
    cache_features(NoMoreEncoding(), images, tmp_path / "cache", **build)  # tidies, if the last kill came late
    assert array_bytes(tmp_path / "cache") == array_bytes(whole.path)
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
            with pytest.raises(
                RuntimeError, match=rf"another process \(pid {child.pid}\) works in .*cache: wait until it ends"
            ):
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
    paths = [str(Path(__file__).parents[1]), str(Path(mergetune.__file__).parents[1])]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    one = cache_features(TinyClip(), images, tmp_path / "one", **BUILD)
    assert array_bytes(tmp_path / "ranks") == array_bytes(tmp_path / "one")
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rows, few, messages in reports:
        assert torch.equal(torch.tensor(rows), one.tensor(1)) and few == ["007.png", "002.png"]
        assert "lacks 1 of 12 images, the first is 'gone.png'" in messages[0]
        assert "cannot read image" in messages[1]
    assert reports[1][2][0].startswith("rank 0 failed: ValueError")
    with pytest.raises(ValueError, match=r"is unfinished \(2 of 3 blocks\)"):
        FeatureCache.open(tmp_path / "broken")


if __name__ == "__main__":
    torchrun_script()
