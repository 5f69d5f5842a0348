"""Image files and folders on disk: reading an image, and what must be there."""

from __future__ import annotations

import functools
import io
import json
import os
import posixpath
import re
import reprlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mergetune.facts.function_options import MAX_PIXELS
from mergetune.io import MAX_IMAGE, MAX_LIST, read_regular

# The formats that are read, whatever a file's name says. Pillow decodes each of them within this process, with its own
# code or a codec library, from one picture's pixels. Left out of what Pillow knows are
#   EPS, and WMF on Windows, which hand the file to another program or to the system (Ghostscript runs PostScript);
#   BUFR, GRIB, HDF5, MPEG, FITS and others of science and film, which need a handler from elsewhere or are no photos;
#   ICO, ICNS, CUR, DCX, FLI, PSD, FPX, MIC, IPTC and MCIDAS: containers of several pictures, layers or other files;
#   AVIF, whose container may name 8 x 8 pixels for a picture of 16,000 x 16,000, which is decoded whole all the same;
#   BLP, DDS, FTEX, GBR, IM, IMT, MSP, PCD, PCX, PIXAR, QOI, SGI, SPIDER, SUN, XBM, XPM, XV and TGA: old or rare formats
#   with seldom tested decoders, some of which recognise a file by almost nothing.
IMAGE_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF's tags
# Of a JPEG. A scan of a few bytes can go over the whole picture. Progressive ones have about 10; libtiff allows 100.
MAX_SCANS = 100
_MARKER, _SCAN, _END = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]"), 0xDA, 0xD9


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image as RGB.

    The file must be a regular file of one of :data:`IMAGE_FORMATS`, none of which starts another program. As in
    open_clip and CoOp, EXIF orientation is not applied: published numbers were made that way.

    Args:
        path: the file.
        max_pixels: the largest width times height that is decoded: a file of 20 kB can hold an image that fills the
            memory. The size is read from the header, and so are the sizes of TIFF's tiles and GIF's frames.

    Raises:
        ValueError: the file is missing, truncated, not a regular file, not an image, or too large (256 MiB, whatever
            its pixels are); a JPEG has more than 100 scans; names it.
    """
    try:
        content = read_regular(path, limit=MAX_IMAGE)
        with _open_image(content, max_pixels) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        found = re.search(r"\((\d+) pixels\)", str(error))
        has = f"has {int(found[1]):,}" if found else "has more"
        raise ValueError(
            f"cannot read image {path}: an image must have at most {max_pixels:,} pixels, this one {has}; "
            "max_pixels (on the command line --max-pixels) raises the limit"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read image {path}: its content must be {', '.join(_formats())}") from error
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"cannot read image {path}: {error or type(error).__name__}") from error


def prettify(name: str) -> str:
    """A folder's name as a class name: ``shopping_cart`` -> "shopping cart"."""
    return " ".join(name.replace("_", " ").split())


def require_files(root: Path, files: Sequence[str], table: Path) -> None:
    """Refuse listed images that are missing below root; each folder is listed once rather than each image looked up.

    Raises:
        FileNotFoundError: how many are missing, and the first.
    """
    names: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = posixpath.split(file)
        if folder not in names:
            names[folder] = _file_names(os.path.join(root, folder))
        # A file system may know a name by another spelling (case, Unicode form), so it has the last word.
        if name not in names[folder] and not os.path.isfile(os.path.join(root, file)):
            missing.append(file)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images listed in {table} are missing, the first is {root / missing[0]}"
        )


def subfolders(parent: str | Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(parent) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


@functools.cache
def image_extensions() -> frozenset[str]:
    """Extensions, with the dot and in lower case, of those :data:`IMAGE_FORMATS` that Pillow has here."""
    return frozenset(extension for name in _formats() for extension in IMAGE_FORMATS[name])


def image_names(folder: str | Path) -> list[str]:
    """Names of the images in a folder, by extension, sorted, without hidden ones.

    A FIFO, a device or a socket is no image. A link to nothing is one that cannot be read, rather than none.
    """
    extensions = tuple(image_extensions())
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(extensions)
            and not entry.name.startswith(".")
            and (entry.is_file() or not os.path.exists(entry.path))
        )


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


class _Limit(int):
    """A limit for Pillow, which warns above its limit and refuses above its double: here both are one number."""

    def __rmul__(self, other: int) -> _Limit:
        return self


_PILLOWS_LIMIT = threading.Lock()


@contextmanager
def _open_image(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """An image, its header read, nothing decoded. Raises DecompressionBombError above max_pixels."""
    with _PILLOWS_LIMIT:  # it is one for the whole process
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _Limit(max_pixels)
        try:
            image = Image.open(io.BytesIO(content), formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = usual
    with image:
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose decoder makes room for a whole tile
        tile = tags.get(TILE_WIDTH, 1) * tags.get(TILE_LENGTH, 1)
        if tile > max_pixels:
            raise Image.DecompressionBombError(f"a tile is too large ({tile} pixels)")
        if image.format in ("JPEG", "MPO") and (scans := _jpeg_scans(content)) > MAX_SCANS:
            raise ValueError(f"a JPEG must have at most {MAX_SCANS} scans, this one has {scans:,}")
        yield image


def _jpeg_scans(content: bytes) -> int:
    """How many scans a decoder goes through, up to the end of the first picture.

    Within a scan 0xFF begins a marker unless zero or a restart's number follows; other segments have a length.
    """
    scans, at = 0, 2
    while found := _MARKER.search(content, at):
        marker, at = found[0][1], found.end()
        if marker == _END:
            break
        scans += marker == _SCAN
        at += int.from_bytes(content[at : at + 2], "big")
    return scans


def read_json(path: Path) -> Any:
    content = read_regular(path, limit=MAX_LIST)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # no such folder, or no such name on this system
        return set()


def brief(value: Any) -> str:
    return reprlib.repr(value)  # of any depth and length
