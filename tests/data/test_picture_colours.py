"""Pictures of every kind of pixel look like their plain twin of 8 bits."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from cache_cases import as_version_1
from PIL import Image

import mergetune as mt
from mergetune.data import load_image

NOISE = np.random.default_rng(0).integers(20, 236, (24, 24), dtype=np.uint8)
INK = np.where(np.add.outer(np.arange(24), np.arange(24)) % 7 < 3, 255, 0).astype(np.uint8)  # opaque where 255


def opened(tmp_path, picture: Image.Image, suffix: str, **options) -> np.ndarray:
    file = tmp_path / f"picture{suffix}"
    picture.save(file)
    return np.asarray(load_image(file, **options)).astype(int)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (NOISE.astype(np.uint16) * 257, ".png"),
        (NOISE.astype(np.uint16) * 257, ".tif"),
        (NOISE.astype(np.uint16) * 257, ".pgm"),
        (np.round(NOISE * (4095 / 255)).astype(np.uint16), ".png"),  # 12 bits in 16
        (np.round(NOISE * (1023 / 255)).astype(np.uint16), ".tif"),  # 10 bits in 16
        (NOISE.astype(np.uint16), ".png"),  # 8 bits in 16
        (NOISE.astype(np.int32), ".tif"),
        (NOISE.astype(np.int32) * 257, ".tif"),
        (NOISE.astype(np.float32), ".tif"),
        (NOISE.astype(np.float32) / 255, ".tif"),
    ],
    ids=lambda value: f"{value.dtype}-{value.max()}" if isinstance(value, np.ndarray) else value[1:],
)
def test_greys_of_any_depth_equal_their_twin_of_8_bits(tmp_path, values, suffix):
    found = opened(tmp_path, Image.fromarray(values), suffix)
    assert np.abs(found - NOISE[..., None].astype(int)).max() <= 1


def deep(colours: np.ndarray, suffix: str) -> bytes:
    """A file with 16 bits per colour, which Pillow does not write: colours [H, W, 3 or 4] of uint16."""
    height, width, bands = colours.shape
    if suffix == ".ppm":
        return b"P6 %d %d 65535\n" % (width, height) + colours.astype(">u2").tobytes()
    if suffix == ".tif":
        tags = [
            (256, width),
            (257, height),
            (258, 16),
            (259, 1),
            (262, 2),
            (273, 0),
            (277, bands),
            (279, colours.nbytes),
        ]
        bits = struct.pack("<3H", 16, 16, 16)
        start = 8 + 2 + 12 * len(tags) + 4
        rows = b""
        for tag, value in tags:
            value, count = {258: (start, 3), 273: (start + len(bits), 1)}.get(tag, (value, 1))
            rows += struct.pack("<HHII", tag, 3 if tag == 258 else 4, count, value)
        head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
        return head + rows + bytes(4) + bits + colours.astype("<u2").tobytes()
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colours)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if bands == 3 else 6, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize(("suffix", "bands"), [(".png", 3), (".png", 4), (".tif", 3), (".ppm", 3)])
def test_colours_of_16_bits_are_read_or_refused_but_never_black(tmp_path, suffix, bands):
    colours = np.stack([NOISE, NOISE[::-1], NOISE.T, np.full_like(NOISE, 255)][:bands], -1).astype(np.uint16)
    for bits, factor in ((16, 257), (12, 16), (10, 4), (8, 1)):
        stored = colours * factor
        stored[..., 3:] = 65535
        (tmp_path / f"a{suffix}").write_bytes(deep(stored, suffix))
        if bits == 16:
            found = np.asarray(load_image(tmp_path / f"a{suffix}")).astype(int)
            assert np.abs(found - colours[..., :3]).max() <= 1
        else:
            with pytest.raises(ValueError, match="16 bits per colour, .* would become black: convert it to 8 bits"):
                load_image(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("scale", [-1000, 70_000])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_outside_every_range_are_scaled_from_smallest_to_largest(tmp_path, scale, dtype):
    values = (NOISE.astype(np.int64) * abs(scale) + min(scale, 0)).astype(dtype)
    found = opened(tmp_path, Image.fromarray(values), ".tif")
    assert found.min() == 0 and found.max() == 255
    assert np.corrcoef(found[..., 0].ravel(), NOISE.ravel())[0, 1] > 0.9999


def with_alpha(mode: str) -> tuple[Image.Image, str]:
    black = Image.new("RGBA", (24, 24), (0, 0, 0, 255))
    black.putalpha(Image.fromarray(INK))
    if mode == "P":
        picture = Image.fromarray((INK // 255), "P")
        picture.putpalette([255, 0, 0, 0, 0, 0])
        picture.info["transparency"] = 0
        return picture, ".png"
    if mode == "gif":
        picture = Image.fromarray((INK // 255), "P")
        picture.putpalette([255, 0, 0, 0, 0, 0])
        picture.info["transparency"] = 0
        return picture, ".gif"
    if mode == "tRNS":
        picture = Image.fromarray(np.where(INK, 0, 77).astype(np.uint8))
        picture.info["transparency"] = 77
        return picture, ".png"
    return black.convert(mode) if mode != "webp" else black, ".webp" if mode == "webp" else ".png"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "gif", "tRNS", "webp"])
def test_transparent_pixels_have_the_colour_of_the_background(tmp_path, mode):
    picture, suffix = with_alpha(mode)
    options = {"transparency": picture.info["transparency"]} if "transparency" in picture.info else {}
    file = tmp_path / f"ink{suffix}"
    picture.save(file, **options, **({"lossless": True} if mode == "webp" else {}))
    plain = 255 - INK.astype(int)
    assert np.array_equal(np.asarray(load_image(file)), np.repeat(plain[..., None], 3, 2)), "black ink on white"
    grey = np.asarray(load_image(file, background="#808080"))
    assert set(np.unique(grey)) == {0, 128}


def test_opaque_pictures_keep_their_bits(tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    opaque = np.dstack([colours, np.full((24, 24), 255, np.uint8)])
    for values in (colours, opaque):
        assert np.array_equal(opened(tmp_path, Image.fromarray(values), ".png"), colours)


def test_a_decoding_that_destroys_a_picture_is_refused(tmp_path):
    white = Image.new("RGBA", (24, 24), (255, 255, 255, 255))
    white.putalpha(Image.fromarray(INK))
    with pytest.raises(ValueError, match=r"picture\.png: .*becomes one colour on a white background: .*--background"):
        opened(tmp_path, white, ".png")
    assert np.array_equal(opened(tmp_path, white, ".png", background="black")[..., 0], INK)
    for value in (np.nan, np.inf):
        broken = NOISE.astype(np.float32)
        broken[3, 4] = value
        with pytest.raises(ValueError, match="finite values, got NaN or infinity"):
            opened(tmp_path, Image.fromarray(broken), ".tif")
    with pytest.raises(ValueError, match="background must be a colour .* got 'whitish'"):
        opened(tmp_path, white, ".png", background="whitish")


def test_a_cache_of_another_decoding_is_not_continued(tmp_path):
    clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
    for name in ("cat", "dog"):
        for i in range(2):
            ink = Image.new("RGBA", (24, 24), (0, 0, 40 * i, 255))
            ink.putalpha(Image.fromarray(np.roll(INK, i + (name == "dog") * 5, 1)))
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            ink.save(tmp_path / "images" / name / f"{i}.png")
    images = mt.ImageFolder(tmp_path / "images", val=0, test=0.5).train
    on_white = mt.cache_features(clip, images, tmp_path / "cache")
    with pytest.raises(
        ValueError, match="decoding of pictures must be transparency on white.*got transparency on black"
    ):
        mt.cache_features(clip, images, tmp_path / "cache", background="black")
    on_black = mt.cache_features(clip, images, tmp_path / "cache", background="black", overwrite=True)
    assert (on_white.tensor() * on_black.tensor()).sum(-1).max() < 0.9
    assert torch.equal(
        mt.cache_features(clip, images, tmp_path / "cache", background="black").tensor(), on_black.tensor()
    )


@pytest.mark.parametrize("kind", ["photo", "opaque", "ink", "deep"])
def test_a_finished_cache_of_version_0_1_serves_if_its_pictures_look_the_same(tmp_path, kind):
    clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
    for i, name in enumerate(("cat", "dog", "cat", "dog")):
        noise = np.random.default_rng(i).integers(0, 255, (24, 24, 4), dtype=np.uint8)
        noise[..., 3] = INK if kind == "ink" and i == 3 else 255
        picture = Image.fromarray(noise[..., :3] if kind == "photo" else noise)
        if kind == "deep" and i == 3:
            picture = Image.fromarray(NOISE.astype(np.uint16) * 257)
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "images" / name / f"{i}.png")
    images = mt.ImageFolder(tmp_path / "images", val=0, test=0.5).train
    both = [mt.ImageFolder(tmp_path / "images", val=0, test=0.5).test, images]
    for number, listed in enumerate(both):
        folder = tmp_path / f"cache-{number}"
        mt.cache_features(clip, listed, folder)
        as_version_1(folder)
        odd = kind in ("ink", "deep") and any(file.endswith("3.png") for file in listed.files)
        if odd:
            with pytest.raises(ValueError, match="decoding of pictures must be transparency dropped"):
                mt.cache_features(clip, listed, folder)
        else:
            mt.cache_features(clip, listed, folder)
            assert "greys scaled" in json.loads((folder / "manifest.json").read_text())["decoding"]
