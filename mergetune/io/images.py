"""Images: decoding of a file or of a picture in memory as RGB, without running code and within limits of memory."""

from __future__ import annotations

import functools
import io
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS
from mergetune.io.files import MAX_IMAGE, read_regular
from mergetune.io.picture_colours import as_rgb
from mergetune.io.sentences import names_file, reason

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""A picture: the path of a file, a PIL image, or an array of pixels, [H, W, 3] or [H, W] (grey), uint8."""

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
HEIC = (".heic", ".heif")  # photos of phones, which Pillow alone does not read
HEIC_HINT = "convert HEIC photos to .jpg, for example with the package pillow-heif (pip install pillow-heif)"
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF's tags
# Most scans of a JPEG: a scan of a few bytes can cover the whole picture. Progressive JPEGs have about 10 scans;
# libtiff allows 100.
MAX_SCANS = 100
_MARKER, _SCAN, _END = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]"), 0xDA, 0xD9
MAX_RESIZED = MAX_PIXELS  # most pixels of a picture that is resized before it is cropped


@names_file("path")
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
        if not content:
            raise ValueError("it is empty")
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
        way_on = f"; {HEIC_HINT}" if str(path).lower().endswith(HEIC) else ""
        raise ValueError(f"cannot read image {path}: its content must be {', '.join(_formats())}{way_on}") from error
    except (
        Exception
    ) as error:  # decoders raise exceptions of any type: OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"cannot read image {path}: {reason(error)}") from error


def decoding_differs(path: str | Path) -> bool:
    """Whether a readable image looks different since transparency and deep greys are decoded right.

    Headers decide about most images; the pixels are decoded only if an image has transparency.
    """
    try:
        with _open_image(read_regular(path, limit=MAX_IMAGE), MAX_PIXELS) as image:
            if image.mode.startswith(("I", "F")):
                return True
            return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)
    except Exception:  # decoders raise exceptions of any type; reading the image tells what is wrong
        return False


def check_picture(picture: Any) -> None:
    """Checks that a value is a :data:`Picture`; the file or the pixels are not read.

    Raises:
        TypeError: the value is of another type.
        ValueError: an array of another shape or dtype. The message says how to convert it.
    """
    if isinstance(picture, str | os.PathLike | Image.Image):
        return
    if not isinstance(picture, np.ndarray):
        way_on = ": use PIL.Image.open(io.BytesIO(data))" if isinstance(picture, bytes | bytearray | memoryview) else ""
        raise TypeError(f"a picture must be a path, a PIL image or a numpy array, got {type(picture).__name__}{way_on}")
    shape = picture.shape
    if picture.dtype == np.uint8 and (picture.ndim == 2 or picture.ndim == 3 and shape[2] == 3):
        return
    if picture.dtype != np.uint8:
        way_on = "numbers from 0 to 1 become uint8 by (255 * array).round().astype('uint8')"
    elif picture.ndim == 4:
        way_on = "give several arrays as a list, list(array)"
    elif picture.ndim == 3 and shape[0] == 3:
        way_on = "move the colours to the end by array.transpose(1, 2, 0)"
    elif picture.ndim == 3 and shape[2] == 1:
        way_on = "give array[..., 0]"
    else:
        way_on = "convert another kind of picture with PIL.Image"
    raise ValueError(
        f"an array must be a picture [H, W, 3] or [H, W] of uint8, got {list(shape)} of {picture.dtype}: {way_on}"
    )


def read_picture(
    picture: Picture,
    *,
    preprocess_cfg: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
    background: str = BACKGROUND,
) -> Image.Image:
    """A picture as an RGB image. A path is read with :func:`load_image`.

    Args:
        picture: a path, a PIL image or an array, see :data:`Picture`.
        preprocess_cfg: settings of the preprocessing that follows, as open_clip names them. A picture so narrow that
            the preprocessing would fill the memory is refused.
        max_pixels: largest width times height.
        background: colour under transparent pixels, a name or "#rrggbb".

    Raises:
        TypeError, ValueError: the errors of :func:`check_picture` and :func:`load_image`; a PIL image that cannot be
            decoded, or that Pillow would hand to another program.
    """
    check_picture(picture)
    if isinstance(picture, np.ndarray | Image.Image):
        name = "an array" if isinstance(picture, np.ndarray) else f"a PIL image of format {picture.format}"
        with _named(name):
            image = _rgb(picture, max_pixels, background)
    else:
        name = str(picture)
        if name.startswith(("http://", "https://")):
            raise ValueError(f"cannot read image {name}: a picture must be a file; download this one first")
        image = load_image(name, max_pixels=max_pixels, background=background)
    if preprocess_cfg is not None:
        with _named(name):
            _check_resize(image.size, preprocess_cfg, max_pixels)
    return image


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns any error into a ValueError that names the image: decoders raise exceptions of any type."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot read image {name}: {reason(error)}") from error


def _rgb(picture: np.ndarray | Image.Image, max_pixels: int, background: str) -> Image.Image:
    if isinstance(picture, np.ndarray):
        _check_size((picture.shape[1], picture.shape[0]), max_pixels)
        return Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")
    _check_size(picture.size, max_pixels)
    # Pillow decodes a file when its pixels are first used: EPS with Ghostscript, stubs with a handler.
    if isinstance(picture, ImageFile.StubImageFile) or (picture.format == "EPS" and getattr(picture, "tile", None)):
        raise ValueError("another program would decode it; call its load() yourself if you trust the file")
    return as_rgb(picture, background)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raises ValueError for an empty image, and for an image that is too large."""
    shown = f"{size[0]:,} x {size[1]:,}"
    if not min(size):
        raise ValueError(f"an image must have at least one pixel, got {shown}")
    if size[0] * size[1] > max_pixels:
        raise ValueError(
            f"an image must have at most {max_pixels:,} pixels, got {shown}; max_pixels (on the command line "
            "--max-pixels) raises the limit"
        )


def _check_resize(size: tuple[int, int], preprocess_cfg: Mapping[str, Any], max_pixels: int) -> None:
    """Raises ValueError for an image so narrow that it fills the memory when its short side is resized.

    The preprocessing of most CLIPs brings the short side to a fixed length and then cuts out the middle. An image of
    1 x 1,000,000 pixels would have 224 x 224,000,000 pixels in between.
    """
    if preprocess_cfg.get("resize_mode", "shortest") != "shortest":
        return
    (short, long), sides = sorted(size), preprocess_cfg["size"]
    side = max(sides) if isinstance(sides, list | tuple) else sides
    limit = max(max_pixels, MAX_RESIZED)
    if (resized := side * (side * long // short)) > limit:
        raise ValueError(
            f"an image must have at most {limit:,} pixels when its short side is resized to {side}, got {resized:,} "
            f"from {size[0]:,} x {size[1]:,}"
        )


@functools.cache
def image_extensions() -> frozenset[str]:
    """File extensions, in lower case with the dot, of the :data:`IMAGE_FORMATS` that the installed Pillow supports."""
    return frozenset(extension for name in _formats() for extension in IMAGE_FORMATS[name])


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
