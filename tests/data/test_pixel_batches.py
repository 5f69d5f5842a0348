"""Pixels that are decoded when they are read: the same bits in any order, with any number of worker processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NAMES, tiny_clip

from mergetune.data import ImageList, PixelBatches
from mergetune.data.batches import random_views


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = tuple(f"{i}.png" for i in range(7))
    for file in files:
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / file)
    return ImageList(folder, files, tuple(i % 3 for i in range(7)), NAMES)


def test_rows_are_the_preprocessed_pictures(images):
    clip = tiny_clip()
    pixels = PixelBatches.of(clip, images)
    expected = torch.stack([clip.preprocess(Image.open(path).convert("RGB")) for path in images.paths])
    assert torch.equal(pixels.rows(torch.tensor([3, 0])), expected[[3, 0]])
    assert torch.equal(pixels.labels, torch.arange(7) % 3) and pixels.classnames == NAMES


def test_batches_are_small_and_in_order(images):
    pixels = PixelBatches.of(tiny_clip(), images, batch_size=3)
    found = list(pixels.batches(2048))
    assert [len(x) for x, _, _ in found] == [3, 3, 1]
    assert torch.equal(torch.cat([x for x, _, _ in found]), pixels.rows(torch.arange(7)))
    assert torch.equal(torch.cat([labels for _, labels, _ in found]), pixels.labels)
    assert [part for _, _, part in found] == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_a_view_has_the_same_bits_whenever_and_wherever_it_is_read(images):
    one = PixelBatches.of(tiny_clip(), images, views=1000, seed=3)
    index, view = torch.tensor([5, 1, 5]), torch.tensor([700, 2, 0])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    expected = one.rows(index, view)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(replace(one, workers=2).rows(index, view), expected)
    streamed = list(replace(one, workers=2).stream([(index, view), (index[1:], view[1:])]))
    assert torch.equal(streamed[0], expected) and torch.equal(streamed[1], expected[1:])
    assert torch.equal(expected[2], one.rows(torch.tensor([5]))[0])
    assert not torch.equal(expected[0], expected[2])
    assert not torch.equal(replace(one, seed=4).rows(index, view)[0], expected[0])
    parts = torch.arange(6).split(3)
    drawn = [list(random_views(one, parts, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert all(map(torch.equal, drawn[0], drawn[1])) and not torch.equal(drawn[0][0], drawn[2][0])


def test_the_digest_is_that_of_everything_the_pixels_depend_on(images, tmp_path):
    one = PixelBatches.of(tiny_clip(), images)
    for file in images.files:
        (tmp_path / file).write_bytes((images.root / file).read_bytes())
    moved = replace(one, images=replace(images, root=tmp_path), workers=2, batch_size=5)
    assert moved.digest == one.digest
    others = [
        replace(one, views=2),
        replace(one, seed=1),
        replace(one, background="black"),
        replace(one, images=replace(images, labels=(0,) * 7)),
        replace(one, preprocess_cfg=one.preprocess_cfg | {"mean": (0.0, 0.0, 0.0)}),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 6
    (tmp_path / "0.png").write_bytes((images.root / "1.png").read_bytes())
    changed = replace(moved)
    assert changed.digest != one.digest
    assert one.shared_with(changed).tolist() == [1, 2, 3, 4, 5, 6]


def test_what_cannot_be_read_is_named(images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pixels = PixelBatches.of(tiny_clip(), ImageList(tmp_path, ("broken.png",), (0,), NAMES))
    with pytest.raises(ValueError, match=r"broken\.png"):
        pixels.rows(torch.tensor([0]))
    for options, message in (
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"background": "nowhere"}, "background must be"),
    ):
        with pytest.raises(ValueError, match=message):
            PixelBatches.of(tiny_clip(), images, **options)
    with pytest.raises(TypeError, match="images must be an ImageList, got a PosixPath: mergetune.ImageFolder reads"):
        PixelBatches.of(tiny_clip(), tmp_path)
