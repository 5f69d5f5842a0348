"""Image files and folders on disk: reading an image, listing images, and checks that files exist."""

from __future__ import annotations

import functools
import io
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

from mergetune.data.picture_colours import as_rgb
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS
from mergetune.io import MAX_IMAGE, read_regular

# The supported formats, recognised by content and not by file name. Pillow decodes each of them within this process,
# with its code or a codec library, from the pixels of one picture. Formats that Pillow knows but that are left out:
#   EPS, and WMF on Windows: they hand the file to another program or to the system (Ghostscript runs PostScript);
#   BUFR, GRIB, HDF5, MPEG, FITS and other formats of science and film: they need extra handlers or are no photos;
#   ICO, ICNS, CUR, DCX, FLI, PSD, FPX, MIC, IPTC and MCIDAS: containers of several pictures, layers or other files;
#   AVIF: the container may state 8 x 8 pixels for a picture of 16,000 x 16,000, which is still decoded as a whole;
#   BLP, DDS, FTEX, GBR, IM, IMT, MSP, PCD, PCX, PIXAR, QOI, SGI, SPIDER, SUN, XBM, XPM, XV and TGA: old or rare formats
#   with little-tested decoders, some of which recognise a file by only a few bytes.
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
# Most scans of a JPEG: a scan of a few bytes can cover the whole picture. Progressive JPEGs have about 10 scans;
# libtiff allows 100.
MAX_SCANS = 100
_MARKER, _SCAN, _END = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]"), 0xDA, 0xD9


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS, background: str = BACKGROUND) -> Image.Image:
    """Decodes an image as RGB: transparency on a background, greys of more than 8 bits scaled, see :func:`as_rgb`.

    The file must be a regular file in one of :data:`IMAGE_FORMATS`; decoding never starts another program. EXIF
    orientation is not applied, as in open_clip and CoOp, with which published numbers were computed.

    Args:
        path: the file.
        max_pixels: largest width times height: a file of 20 kB can hold an image that fills the memory. The header
            gives this size, and the sizes of TIFF tiles and GIF frames.
        background: colour under transparent pixels, a name or "#rrggbb".

    Raises:
        ValueError: the file is missing, truncated, not a regular file or not an image; the file has over 256 MiB; the
            image has over ``max_pixels`` pixels; a JPEG has over 100 scans. The message names the file.
    """
    try:
        content = read_regular(path, limit=MAX_IMAGE)
        with _open_image(content, max_pixels) as image:
            return as_rgb(image, background)
    except Image.DecompressionBombError as error:
        found = re.search(r"\((\d+) pixels\)", str(error))
        has = f"has {int(found[1]):,}" if found else "has more"
        raise ValueError(
            f"cannot read image {path}: an image must have at most {max_pixels:,} pixels, this one {has}; "
            "max_pixels (on the command line --max-pixels) raises the limit"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read image {path}: its content must be {', '.join(_formats())}") from error
    except (
        Exception
    ) as error:  # decoders raise exceptions of any type: OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"cannot read image {path}: {error or type(error).__name__}") from error


def prettify(name: str) -> str:
    """A folder's name as a class name: ``shopping_cart`` -> "shopping cart"."""
    return " ".join(name.replace("_", " ").split())


def require_files(root: Path, files: Sequence[str], table: Path) -> None:
    """Checks that listed images exist below root. Each folder is listed once, which is faster than a look-up per image.

    Args:
        root: folder that ``files`` are relative to.
        files: paths of the images.
        table: the file that lists the images, for messages.

    Raises:
        FileNotFoundError: images are missing; the message names their number and the first.
    """
    names: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = posixpath.split(file)
        if folder not in names:
            names[folder] = _file_names(os.path.join(root, folder))
        # A file system may accept another spelling of a name (case, Unicode form), so isfile decides.
        if name not in names[folder] and not os.path.isfile(os.path.join(root, file)):
            missing.append(file)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images listed in {table} are missing, the first is {root / missing[0]}"
        )


def subfolders(parent: str | Path) -> list[str]:
    """Sorted names of the folders in ``parent``, without hidden folders."""
    with os.scandir(parent) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


@functools.cache
def image_extensions() -> frozenset[str]:
    """File extensions, in lower case with the dot, of the :data:`IMAGE_FORMATS` that the installed Pillow supports."""
    return frozenset(extension for name in _formats() for extension in IMAGE_FORMATS[name])


def image_names(folder: str | Path) -> list[str]:
    """Sorted names of the images in a folder, recognised by extension, without hidden files.

    FIFOs, devices and sockets are left out. Broken links are included: reading such an image reports the error.
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
    """A pixel limit for Pillow. Pillow warns above its limit and refuses above twice the limit; here both are equal."""

    def __rmul__(self, other: int) -> _Limit:
        return self


_PILLOWS_LIMIT = threading.Lock()


@contextmanager
def _open_image(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Opens an image and reads its header, without decoding. Raises DecompressionBombError above max_pixels."""
    with _PILLOWS_LIMIT:  # Pillow has one limit for the whole process
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _Limit(max_pixels)
        try:
            image = Image.open(io.BytesIO(content), formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = usual
    with image:
        tags = getattr(image, "tag_v2", {})  # the decoder of TIFF allocates memory for a whole tile
        tile = tags.get(TILE_WIDTH, 1) * tags.get(TILE_LENGTH, 1)
        if tile > max_pixels:
            raise Image.DecompressionBombError(f"a tile is too large ({tile} pixels)")
        if image.format in ("JPEG", "MPO") and (scans := _jpeg_scans(content)) > MAX_SCANS:
            raise ValueError(f"a JPEG must have at most {MAX_SCANS} scans, this one has {scans:,}")
        yield image


def _jpeg_scans(content: bytes) -> int:
    """Number of scans that a decoder processes up to the end of the first picture.

    Within a scan, 0xFF begins a marker unless zero or a restart number follows; other segments state their length.
    """
    scans, at = 0, 2
    while found := _MARKER.search(content, at):
        marker, at = found[0][1], found.end()
        if marker == _END:
            break
        scans += marker == _SCAN
        at += int.from_bytes(content[at : at + 2], "big")
    return scans


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # the folder does not exist, or the system does not allow its name
        return set()


def brief(value: Any) -> str:
    return reprlib.repr(value)  # short for values of any depth and length
