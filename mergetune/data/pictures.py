"""Pictures without labels, for predictions: paths, folders, lists in files, and pictures in memory."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mergetune.data.image_files import describe_ignored, ignored_files, images_below
from mergetune.data.image_lists import Dataset, ImageList
from mergetune.data.list_files import cells, columns_of, with_slashes
from mergetune.facts.brief import brief
from mergetune.io import (
    MAX_TABLE,
    check_picture,
    decode_text,
    image_extensions,
    lines_of,
    names_file,
    parse_json,
    read_regular,
    require_file,
    require_plain,
)

LISTS = (".txt", ".csv", ".json")


@brief()
@dataclass(frozen=True)
class FoundPicture:
    """A picture that was found in the inputs; it is not read yet.

    Attributes:
        file: the path, or None for a picture in memory.
        value: a picture in memory: a PIL image, an array, or preprocessed pixels [3, H, W]. None if ``file`` is given.
    """

    file: str | None
    value: Any = None


def find_pictures(inputs: Iterable[Any]) -> Iterator[FoundPicture]:
    """The pictures in the inputs, in the order of the inputs. No picture is read here, so none is refused as damaged.

    An input is one of these:

    - the path of a file: one picture;
    - the path of a folder: all images in it and in its subfolders, sorted by path, recognised by extension; hidden
      files and folders, FIFOs, devices and sockets are left out, links are followed, except for loops;
    - the path of a list: a ``.txt`` file with one path per line; a ``.csv`` file with a column ``path`` (or ``file``,
      ``image``), or paths alone; a ``.json`` file with a list of paths, or of objects with ``path``. Paths are relative
      to the folder of the list; backslashes count as separators;
    - a PIL image, or an array of uint8, [H, W, 3] or [H, W];
    - a floating-point tensor of preprocessed pixels, [3, H, W], or [B, 3, H, W] for B pictures;
    - an :class:`ImageList`;
    - a list, tuple or iterator of inputs. An iterator is read piece by piece.

    Raises:
        TypeError: an input of another type.
        ValueError: an array or tensor of another shape or dtype, a folder or list without pictures, or a list that
            cannot be read.
        OSError: a folder or list cannot be read.
    """
    for given in inputs:
        if isinstance(given, FoundPicture):
            yield given
        elif isinstance(given, Tensor):
            yield from _pixels(given)
        elif isinstance(given, Image.Image | np.ndarray):
            check_picture(given)
            yield FoundPicture(None, given)
        elif isinstance(given, str | os.PathLike):
            yield from map(FoundPicture, _files(os.fsdecode(given)))
        elif isinstance(given, ImageList):
            yield from (FoundPicture(str(path)) for path in given.paths)
        elif isinstance(given, Iterable) and not isinstance(given, Mapping | bytes | bytearray):
            yield from find_pictures(given)
        else:
            raise _no_input(given)


def _no_input(given: Any) -> TypeError:
    way_on = ""
    if isinstance(given, Dataset):
        way_on = ": give one of its lists, such as data.test"
    elif isinstance(given, bytes | bytearray):
        way_on = ": give PIL.Image.open(io.BytesIO(data))"
    return TypeError(
        "an input must be a path, a PIL image, a numpy array, a tensor of pixels, an ImageList, or a list of these, "
        f"got {type(given).__name__}{way_on}"
    )


def is_one_picture(given: Any) -> bool:
    """Whether an input of :func:`find_pictures` is a single picture, and not a folder, a list or several."""
    if isinstance(given, Tensor):
        return given.ndim == 3
    if isinstance(given, str | os.PathLike):
        path = os.fsdecode(given)
        return not (os.path.isdir(path) or path.lower().endswith(LISTS))
    return isinstance(given, Image.Image | np.ndarray)


def _pixels(pixels: Tensor) -> Iterator[FoundPicture]:
    """The pictures of a tensor of preprocessed pixels."""
    require_plain("a tensor of pixels", pixels)
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3 or not pixels.dtype.is_floating_point:
        way_on = "" if pixels.dtype.is_floating_point else "; give pictures of uint8 as numpy arrays [H, W, 3]"
        raise ValueError(
            "a tensor must hold preprocessed pixels, [3, H, W] or [B, 3, H, W] of floating point, as clip.preprocess "
            f"gives them, got {list(pixels.shape)} of {pixels.dtype}{way_on}"
        )
    for row in (pixels if pixels.ndim == 4 else pixels[None]).detach().cpu():
        yield FoundPicture(None, row)


def _files(path: str) -> list[str]:
    """The pictures of a path: of a folder, of a list, or the file itself."""
    if os.path.isdir(path):
        return _images_of(path)
    if path.lower().endswith(LISTS):
        return _listed(path)
    return [path]


def _images_of(folder: str) -> list[str]:
    found = sorted(path.as_posix() for path in images_below(folder))
    if not found:
        got = describe_ignored(ignored_files(folder)) or "no files"
        raise ValueError(
            f"folder {folder} must hold at least one image ({', '.join(sorted(image_extensions()))}), got {got}"
        )
    return found


@names_file("path")
def _listed(path: str) -> list[str]:
    """The paths in a list, relative to the folder of the list."""
    require_file(path, f"a list of pictures must exist, and there is no file {path}")
    content = read_regular(path, limit=MAX_TABLE)
    text = decode_text(path, content, errors="surrogateescape")  # names of files may be any bytes
    entries = {".txt": _lines, ".csv": _column, ".json": _entries}[os.path.splitext(path)[1].lower()](path, text)
    if not entries:
        raise ValueError(f"list {path} must name at least one picture, got none")
    folder = Path(path).parent
    return [str(folder / with_slashes(entry, folder)) for entry in entries]


def _lines(path: str, text: str) -> list[str]:
    return [line for line in lines_of(text) if line.strip()]


def _column(path: str, text: str) -> list[str]:
    return _texts(path, [row["path"] for row in cells(Path(path), text, ("path",))])


def _entries(path: str, text: str) -> list[str]:
    rows = parse_json(text, name=path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a list of paths, or of objects with path, got {type(rows).__name__}")
    return _texts(path, [_path_of(row) if isinstance(row, dict) else row for row in rows])


def _path_of(row: dict[str, Any]) -> Any:
    """The path in an object, by any of its usual names."""
    columns = columns_of(list(row), ("path",))
    return None if columns is None else row[columns["path"]]


def _texts(path: str, entries: list[Any]) -> list[str]:
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"row {number} of {path} must have a path, got {reprlib.repr(entry)}")
    return entries
