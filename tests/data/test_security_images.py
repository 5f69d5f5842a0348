"""Images and other files of strangers: none starts a program, waits for ever, or fills the memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import struct
import subprocess
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_cases import TinyClip
from PIL import EpsImagePlugin, Image, PngImagePlugin
from tiny import prompt
from typer.testing import CliRunner

from mergetune import (
    FeatureCache,
    FitResult,
    Head,
    ImageFolder,
    Prompt,
    cache_features,
    coop_split,
    image_table,
    load_clip,
    load_solution,
    read_features,
)
from mergetune.cli import app
from mergetune.data import CoOpDataset, Dataset, ImageList, load_image
from mergetune.facts.function_options import MAX_PIXELS
from mergetune.io import IMAGE_FORMATS, image_extensions, read_json, read_torchscript
from mergetune.io.pickled_modules import read_module
from mergetune.merging import TensorFile

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def picture(seed: int = 0, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


# -- programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that a Ghostscript of ours makes when anything starts it."""
    made, program = tmp_path / "ghostscript-ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{made}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once per process
    return made


def test_pillow_alone_would_start_ghostscript(tmp_path, marker):
    """What the next tests guard against is real."""
    (tmp_path / "a.png").write_bytes(EPS)
    with Image.open(tmp_path / "a.png") as image, pytest.raises(OSError):
        image.load()
    assert marker.exists()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.eps", "a.ps", "a"])
@pytest.mark.parametrize(
    "header", [b"", struct.pack("<LLLLLLLH", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0, 0, 0xFFFF) + b"\0\0"]
)
def test_no_image_starts_a_program(tmp_path, marker, name, header):
    (tmp_path / name).write_bytes(header + EPS)  # plain, and with the header of a DOS file
    with pytest.raises(ValueError, match=f"cannot read image .*{name}: its content must be JPEG, PNG, "):
        load_image(tmp_path / name)
    assert not marker.exists()


def test_a_cache_of_such_images_starts_none(tmp_path, marker):
    for name in ("a.png", "b.jpg", "c.webp"):
        (tmp_path / name).write_bytes(EPS)
    picture().save(tmp_path / "d.png")
    images = ImageList(tmp_path, ("a.png", "b.jpg", "c.webp", "d.png"), (0, 0, 0, 0), ("thing",))
    with pytest.warns(UserWarning, match="3"):
        cache = cache_features(TinyClip(), images, tmp_path / "cache", workers=1, on_error="skip", progress=False)
    assert cache.files == ("d.png",) and set(cache.skipped) == {"a.png", "b.jpg", "c.webp"}
    assert not marker.exists()


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(IMAGE_FORMATS))
def test_a_format_that_is_read_gives_pillows_pixels(tmp_path, name):
    Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {name}")
    picture().save(tmp_path / "image.png", format=name)  # the content counts, not the extension
    with Image.open(tmp_path / "image.png") as image:
        expected = image.convert("RGB")
    assert load_image(tmp_path / "image.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["AVIF", "ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "MSP", "XBM"])
def test_other_formats_are_refused_whatever_their_extension(tmp_path, name):
    Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {name}")
    mode = {"MSP": "1", "XBM": "1", "ICNS": "RGBA"}.get(name, "RGB")
    picture(size=(32, 32)).convert(mode).save(tmp_path / "image.png", format=name)
    with pytest.raises(ValueError, match=r"image\.png: its content must be JPEG, PNG, .*PPM$"):
        load_image(tmp_path / "image.png")


def test_what_is_listed_is_what_is_read(tmp_path):
    known = {extension for extensions in IMAGE_FORMATS.values() for extension in extensions}
    assert image_extensions() <= known
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".webp", ".ppm"} <= image_extensions()
    for extension in (".png", ".JPG", ".h5", ".mpg", ".fits", ".eps", ".ico"):
        picture().save(tmp_path / "image", format="PNG")
        (tmp_path / "cats").mkdir(exist_ok=True)
        (tmp_path / "image").rename(tmp_path / "cats" / f"a{extension}")
    dataset = ImageFolder(tmp_path, val=0, test=0)
    assert dataset.train.files == ("cats/a.JPG", "cats/a.png")


# -- files that are none ----------------------------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path):
    """A FIFO that nobody writes to. Who waits for a writer all the same is let go, and the test fails."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = subprocess.Popen(["sh", "-c", 'sleep 8; : > "$0"', str(path)])
    yield path
    waited = writer.poll() is not None
    writer.kill()
    writer.wait()
    assert not waited, "the FIFO was opened and waited for"


def link(fifo: Path, name: str) -> Path:
    """The FIFO under another name: what is read has a name of its own."""
    path = fifo.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(fifo)
    return path


def save_features(file: Path) -> Path:
    np.save(file, np.eye(2, dtype=np.float32))
    return file


READERS: dict[str, Callable[[Path], object]] = {
    "load_image": lambda fifo: load_image(link(fifo, "a.png")),
    "image_table csv": lambda fifo: image_table(link(fifo, "a.csv")),
    "image_table json": lambda fifo: image_table(link(fifo, "a.json")),
    "coop_split": lambda fifo: coop_split(fifo.parent, link(fifo, "split_zhou_Food101.json")),
    "few_shot_file": lambda fifo: Dataset("a", ImageList(fifo.parent, ("a",), (0,), ("a",))).few_shot_file(fifo),
    "CoOpDataset": lambda fifo: CoOpDataset("imagenet_a", link(fifo, "imagenet-adversarial/classnames.txt").parents[1]),
    "Head .pt": lambda fifo: Head.from_checkpoint(link(fifo, "a.pt")),
    "Head .npz": lambda fifo: Head.from_checkpoint(link(fifo, "a.npz")),
    "Head .safetensors": lambda fifo: Head.from_checkpoint(link(fifo, "a.safetensors")),
    "Prompt": lambda fifo: Prompt.from_checkpoint(link(fifo, "prompt_learner/model.pth.tar-5").parent),
    "load_solution": lambda fifo: load_solution(link(fifo, "saved/solution.json").parent),
    "FitResult": lambda fifo: FitResult.load(link(fifo, "saved/result.json").parent),
    "FeatureCache": lambda fifo: FeatureCache.open(link(fifo, "cache/manifest.json").parent),
    "features .npy": lambda fifo: read_features(link(fifo, "a.npy"), labels=[0], classnames=["a"]),
    "features .pt": lambda fifo: read_features(link(fifo, "a.pt"), labels=[0], classnames=["a"]),
    "read_module": lambda fifo: read_module(fifo),
    "read_torchscript": lambda fifo: read_torchscript(fifo),
    "TensorFile": lambda fifo: TensorFile(link(fifo, "a.safetensors")),
    "backbone's configuration": lambda fifo: load_clip(f"local-dir:{link(fifo, 'open_clip_config.json').parent}"),
    "Prompt's file": lambda fifo: Prompt.from_checkpoint(link(fifo, "a.pt")),
    "labels": lambda fifo: read_features(save_features(fifo.parent / "a.npy"), labels=link(fifo, "labels.npy")),
    "backbone's weights": lambda fifo: load_clip("ViT-B-32", str(link(fifo, "a.pt"))),
}


WHOLE = ("load_solution", "FitResult", "FeatureCache", "CoOpDataset", "TensorFile")  # which say what must be there
NAMED = [reader for reader in READERS if reader not in WHOLE]


@pytest.mark.parametrize("reader", NAMED)
def test_who_names_a_fifo_is_told_that_it_is_one(fifo, reader):
    with pytest.raises(ValueError, match="must be a regular file, got a FIFO"):
        READERS[reader](fifo)


@pytest.mark.parametrize("reader", ["Head .pt", "Head .npz", "Head .safetensors", "read_module", "backbone's weights"])
def test_who_names_a_folder_is_told_that_it_is_one(tmp_path, reader):
    (tmp_path / "fifo").mkdir()
    with pytest.raises(ValueError, match="must be a regular file, got a folder"):
        READERS[reader](tmp_path / "fifo")


@pytest.mark.parametrize("reader", list(READERS))
def test_a_fifo_is_refused_and_not_waited_for(fifo, reader):
    refused = "must be a regular file, got a FIFO|must be a folder with|must be a safetensors file"
    not_there = "is not complete|without manifest"
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=f"{refused}|{not_there}"):
        READERS[reader](fifo)


def test_the_weights_of_a_saved_solution_are_a_regular_file(fifo):
    prompt().save(fifo.parent / "saved")
    weights = next((fifo.parent / "saved").glob("*.safetensors"))
    weights.unlink()
    weights.symlink_to(fifo)
    with pytest.raises(ValueError, match="must be a regular file, got a FIFO"):
        load_solution(fifo.parent / "saved")


@pytest.mark.parametrize(("kind", "named"), [("socket", "a socket"), ("device", "a device"), ("folder", "a folder")])
def test_sockets_devices_and_folders_are_no_images(tmp_path, monkeypatch, kind, named):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("a.png")
    elif kind == "device":
        Path("a.png").symlink_to("/dev/zero")
    else:
        Path("a.png").mkdir()
    with pytest.raises(ValueError, match=rf"cannot read image a\.png: .*must be a regular file, got {named}"):
        load_image("a.png")


def test_lists_hold_regular_files_alone(fifo):
    """A broken link is listed: it is an image that is lost, and is named when it is read."""
    root = fifo.parent / "images"
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        picture(len(name)).save(root / name / "a.png")
        (root / name / "fifo.png").symlink_to(fifo)
        os.mkfifo(root / name / "own.jpg")
        (root / name / "device.png").symlink_to("/dev/zero")
    assert ImageFolder(root, val=0, test=0).train.files == ("cats/a.png", "dogs/a.png")
    (root / "cats" / "lost.png").symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match="lost.png"):
        ImageFolder(root, val=0, test=0)
    (fifo.parent / "list.csv").write_text("path,label\nimages/cats/a.png,cat\nimages/cats/own.jpg,cat\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .* missing, the first is .*own\.jpg"):
        image_table(fifo.parent / "list.csv")


def test_a_cache_names_what_became_a_fifo(fifo):
    (fifo.parent / "images").mkdir()
    os.mkfifo(fifo.parent / "images" / "a.png")
    images = ImageList(fifo.parent / "images", ("a.png",), (0,), ("thing",))
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"a\.png must be a regular file, got a FIFO"):
            cache_features(TinyClip(), images, fifo.parent / "cache", workers=workers, progress=False)


# -- bytes ------------------------------------------------------------------------------------------------------------


def sparse(name: str, size: int) -> Callable[[Path], Path]:
    """A file that has these bytes, and takes no place on the disk."""

    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        os.truncate(folder / name, size)
        return folder / name

    return make


HUGE: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "load_image": (sparse("a.png", 1 << 33), load_image),
    "image_table csv": (sparse("a.csv", 1 << 33), image_table),
    "image_table json": (sparse("a.json", 1 << 33), image_table),
    "coop_split": (sparse("split.json", 1 << 33), lambda file: coop_split(file.parent, file)),
    "few_shot_file": (
        sparse("shot_1-seed_1.pkl", 1 << 33),
        lambda file: Dataset("a", ImageList(file.parent, ("a",), (0,), ("a",))).few_shot_file(file),
    ),
    "load_solution": (sparse("solution.json", 1 << 33), lambda file: load_solution(file.parent)),
    "FitResult": (sparse("result.json", 1 << 33), lambda file: FitResult.load(file.parent)),
    "FeatureCache": (sparse("manifest.json", 1 << 33), lambda file: FeatureCache.open(file.parent)),
    "read_json": (sparse("a.json", 1 << 33), read_json),
    "read_module": (sparse("a.pkl", 1 << 35), read_module),
    "configuration": (sparse("open_clip_config.json", 1 << 33), lambda file: load_clip(f"local-dir:{file.parent}")),
}


@pytest.mark.parametrize("reader", list(HUGE))
def test_a_huge_file_is_refused_before_it_is_read(tmp_path, reader):
    make, read = HUGE[reader]
    file = make(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.* must have at most [\d,]+ bytes, got [\d,]+"):
            read(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_a_cache_does_not_read_huge_images(tmp_path):
    sparse("a.png", 1 << 42)(tmp_path)
    images = ImageList(tmp_path, ("a.png",), (0,), ("thing",))
    with pytest.raises(ValueError, match=r"a\.png must have at most 268,435,456 bytes, got 4,398,046,511,104"):
        cache_features(TinyClip(), images, tmp_path / "cache", workers=0, progress=False)


def test_images_are_told_apart_whatever_their_size(tmp_path):
    """Split by content: files of one size are read piece by piece."""
    for name in ("cats/a.png", "cats/b.png", "dogs/a.png", "dogs/b.png"):
        sparse(name, 1 << 26)(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            ImageFolder(tmp_path, val=0, test=0.5)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


# -- size -------------------------------------------------------------------------------------------------------------

SIDE = 13_000  # 169 million pixels


def png(width: int, height: int) -> bytes:
    chunk = lambda kind, body: struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))  # noqa: E731
    rows = zlib.compress(bytes(64))  # far too few: who decodes says that it is cut off
    header = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif(screen: int, frame: int) -> bytes:
    """An animation's screen and first frame, each a square."""
    table = bytes(6)
    picture = b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + table + picture


def webp(side: int) -> bytes:
    """An animation's canvas."""
    canvas = (side - 1).to_bytes(3, "little") * 2
    body = b"WEBP" + b"VP8X" + struct.pack("<L", 10) + b"\x02\0\0\0" + canvas
    return b"RIFF" + struct.pack("<L", len(body)) + body


def tiff(image: int, tile: int | None) -> bytes:
    """A square image in one strip, or in square tiles."""
    entries = [(256, 4, image), (257, 4, image), (258, 3, 8), (259, 3, 1), (262, 3, 1)]
    entries += [(273, 4, 8), (278, 4, image), (279, 4, 64)] if tile is None else []
    entries += [(322, 4, tile), (323, 4, tile), (324, 4, 8), (325, 4, 64)] if tile is not None else []
    table = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<L", 8) + struct.pack("<H", len(entries)) + table + bytes(4)


BOMBS = {
    "PNG": png(SIDE, SIDE),
    "a long PNG": png(1, SIDE * SIDE),
    "GIF": gif(SIDE, 1),
    "a GIF's frame": gif(1, SIDE),
    "WEBP": webp(SIDE),
    "TIFF": tiff(SIDE, None),
    "a TIFF's tile": tiff(16, SIDE),
    "BMP": b"BM" + struct.pack("<LLLLLLHHLLLLLL", 54, 0, 54, 40, SIDE, SIDE, 1, 24, 0, 0, 0, 0, 0, 0),
    "PPM": f"P6 {SIDE} {SIDE} 255\n".encode(),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_too_many_pixels_are_seen_in_the_header(tmp_path, name):
    (tmp_path / "a.png").write_bytes(BOMBS[name])
    if name == "WEBP" and "WEBP" not in Image.OPEN:
        pytest.skip("this Pillow has no WEBP")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as refused:
            load_image(tmp_path / "a.png")
    assert str(refused.value) == (
        f"cannot read image {tmp_path / 'a.png'}: an image must have at most {MAX_PIXELS:,} pixels, this one has "
        f"{SIDE * SIDE:,}; max_pixels (on the command line --max-pixels) raises the limit"
    )


@pytest.mark.parametrize("where", ["zTXt", "iTXt", "iCCP"])
def test_texts_of_a_png_are_not_unpacked_without_bound(tmp_path, where):
    zeros = zlib.compress(bytes(1 << 26), 9)
    head = {"zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0", "iCCP": b"a\0\0"}[where]
    info = PngImagePlugin.PngInfo()
    info.add(where.encode(), head + zeros)
    picture().save(tmp_path / "a.png", pnginfo=info)
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            assert load_image(tmp_path / "a.png").size == (8, 6)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def jpeg(scans: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    made = io.BytesIO()
    picture(size=(32, 32)).save(made, "JPEG", progressive=True)
    content = made.getvalue()
    starts = [found.start() for found in re.finditer(rb"\xff\xda", content)]
    last = content[starts[-1] : -2]
    return b"\xff\xd8" + before + content[2:-2] + last * (scans - len(starts)) + b"\xff\xd9" + behind


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_jpeg_has_no_scans_without_number(tmp_path, name):
    """Each takes as long as the whole picture, and has a few bytes."""
    (tmp_path / name).write_bytes(jpeg(101))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: a JPEG must have at most 100 scans, this one has 101$"):
        load_image(tmp_path / name)
    (tmp_path / name).write_bytes(jpeg(100))
    assert load_image(tmp_path / name).size == (32, 32)


def test_what_only_looks_like_scans_is_not_counted(tmp_path):
    """A preview in a segment, as cameras write it, and what stands behind the picture, such as a film."""
    many = b"\xff\xda\0\x02" * 1000
    segment = b"\xff\xe5" + struct.pack(">H", len(many) + 2) + many
    (tmp_path / "a.jpg").write_bytes(jpeg(20, segment, many))
    (tmp_path / "b.jpg").write_bytes(jpeg(20))
    assert load_image(tmp_path / "a.jpg").tobytes() == load_image(tmp_path / "b.jpg").tobytes()
    (tmp_path / "a.jpg").write_bytes(jpeg(101, segment, many))
    with pytest.raises(ValueError, match="this one has 101"):
        load_image(tmp_path / "a.jpg")


def test_the_limit_can_be_moved(tmp_path):
    picture(size=(40, 30)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", max_pixels=1200).size == (40, 30)
    with pytest.raises(ValueError, match="at most 1,199 pixels, this one has 1,200"):
        load_image(tmp_path / "a.png", max_pixels=1199)


def test_pillows_own_limit_neither_holds_nor_changes(tmp_path, monkeypatch):
    picture(size=(40, 30)).save(tmp_path / "a.png")
    for usual in (100, 700, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", usual)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_image(tmp_path / "a.png").size == (40, 30)
            with pytest.raises(ValueError, match="at most 1,000 pixels"):
                load_image(tmp_path / "a.png", max_pixels=1000)
        assert Image.MAX_IMAGE_PIXELS is usual


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_takes_the_limit(tmp_path, workers):
    for name, size in (("a.png", (8, 6)), ("b.png", (40, 30))):
        picture(size=size).save(tmp_path / name)
    images = ImageList(tmp_path, ("a.png", "b.png"), (0, 0), ("thing",))
    common = {"workers": workers, "progress": False}
    with pytest.raises(ValueError, match=r"b\.png: an image must have at most 100 pixels, this one has 1,200"):
        cache_features(TinyClip(), images, tmp_path / "cache", max_pixels=100, **common)
    made = cache_features(TinyClip(), images, tmp_path / "cache", **common)
    again = cache_features(TinyClip(), images, tmp_path / "cache", max_pixels=100, **common)  # nothing is decoded
    assert made.files == again.files == ("a.png", "b.png")
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        cache_features(TinyClip(), images, tmp_path / "cache", max_pixels=0, **common)


def test_the_commands_take_the_limit(tmp_path, monkeypatch):
    for i in range(4):
        for name in ("cats", "dogs"):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            picture(10 * i + len(name) * 100 + ord(name[0]), (40, 30)).save(tmp_path / "images" / name / f"{i}.png")
    monkeypatch.setattr("mergetune.load_clip", lambda *args, **kwargs: TinyClip())
    call = ["cache", str(tmp_path / "images"), "--out", str(tmp_path / "cache"), "--backbone", "icon-clip"]
    refused = CliRunner().invoke(app, [*call, "--max-pixels", "1000"])
    assert refused.exit_code == 2 and "1,200" in refused.stderr and "--max-pixels" in refused.stderr
    done = CliRunner().invoke(app, [*call, "--max-pixels", "1200", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["train"]["images"] > 0
    for command in ("fit", "reproduce"):
        assert "--max-pixels" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
