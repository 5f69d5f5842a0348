"""Feature caches: bad input, and features made elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cache_cases import BUILD, TinyClip, draw_images
from torch import Tensor

from mergetune.data import FeatureCache, ImageList, cache_features, load_image
from mergetune.data.row_reading import TensorRows

pytestmark = pytest.mark.usefixtures("one_thread")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_unreadable_image_raises_and_keeps_what_was_built(images, tmp_path):
    bad = images.root / "009.png"
    whole = bad.read_bytes()
    for content, why in ((whole[:40], ".*"), (b"", "it is empty")):
        bad.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"cannot read image .*009.png: {why}; on_error='skip' .*--skip-unreadable"
        ):
            cache_features(TinyClip(), images, tmp_path / "cache", **BUILD)
        with pytest.raises(ValueError, match=r"unfinished \(2 of 3 blocks\)"):
            FeatureCache.open(tmp_path / "cache")
    bad.write_bytes(whole)
    cache_features(TinyClip(), images, tmp_path / "cache", **BUILD).verify(images)


def test_unreadable_images_can_be_skipped(images, tmp_path):
    for i in (1, 8, 9, 10):  # all of the last block
        (images.root / f"{i:03d}.png").write_bytes(b"not an image")
    named = "'001.png', '008.png', '009.png' and 1 more"
    with pytest.warns(
        UserWarning, match=f"4 unreadable .* are left out: {named}; the first: cannot read image .*001.png"
    ):
        cache = cache_features(TinyClip(), images, tmp_path / "cache", **BUILD, on_error="skip")
    assert cache.files == tuple(f"{i:03d}.png" for i in (0, 2, 3, 4, 5, 6, 7))
    opened = FeatureCache.open(cache.path)
    assert opened.files == cache.files and set(opened.skipped) == {"001.png", "008.png", "009.png", "010.png"}
    clip = TinyClip()
    expected = clip.encode_image(torch.stack([clip.preprocess(load_image(images.root / file)) for file in cache.files]))
    torch.testing.assert_close(opened.tensor(), expected)
    torch.testing.assert_close(opened.rows(torch.tensor([6, 0])), expected[[6, 0]])
    with pytest.warns(UserWarning, match="1 unreadable images of .* are left out: '001.png'; the"):
        chosen = opened.select(images.take([1, 2]))
    with pytest.raises(FileNotFoundError, match=f"got {tmp_path} without manifest.json: give {cache.path}"):
        FeatureCache.open(tmp_path)
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


# -- features made elsewhere -------------------------------------------------------------------------------------------


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
        source=TensorRows([*caches[0].source.tensors, *caches[1].source.tensors]),
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
