"""Labelled image lists: folders, tables and CoOp splits; few-shot sampling and the base/novel split."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import itertools
import json
import math
import operator
import os
import pickle
import pickletools
import posixpath
import random
import re
import reprlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from mergetune.files import open_regular, read_regular, read_regular_text
from mergetune.options import MAX_PIXELS

# The formats that are read, whatever a file's name says. Pillow decodes each of them within this process, with its own
# code or a codec library, from one picture's pixels. Left out of what Pillow knows are
#   EPS, and WMF on Windows, which hand the file to another program or to the system (Ghostscript runs PostScript);
#   BUFR, GRIB, HDF5, MPEG, FITS and others of science and film, which need a handler from elsewhere or are no photos;
#   ICO, ICNS, CUR, DCX, FLI, PSD, FPX, MIC, IPTC and MCIDAS: containers of several pictures, layers or other files;
#   BLP, DDS, FTEX, GBR, IM, IMT, MSP, PCD, PCX, PIXAR, QOI, SGI, SPIDER, SUN, XBM, XPM, XV and TGA: old or rare formats
#   with seldom tested decoders, some of which recognise a file by almost nothing.
IMAGE_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF's tags

SPLITS = ("train", "val", "test")
VAL_SHARE, TEST_SHARE = 0.2, 0.3  # CoOp's shares for data without an official split
VAL_SHOTS = 4  # CoOp never draws more validation images per class than this
DATUM = ("dassl.data.datasets.base_dataset", "Datum")  # what CoOp's few-shot files are made of
DATUM_OPCODES = re.compile(  # what pickle protocols 2 to 5 need for dicts and lists of such records; none calls code
    "PROTO|FRAME|STOP|MARK|EMPTY_(DICT|LIST|TUPLE)|APPENDS?|SETITEMS?|MEMOIZE|(LONG_)?BIN(PUT|GET)|(SHORT_)?BINUNICODE|"
    "BININT[12]?|(STACK_)?GLOBAL|NEWOBJ|BUILD"
)


@dataclass(frozen=True)
class ImageList:
    """Labelled images below one folder. C classes, some of which may have no image here.

    Attributes:
        root: the folder that ``files`` are relative to.
        files: relative paths with forward slashes, no file twice.
        labels: one class index in [0, C) per file.
        classnames: C names, as they go into a prompt.

    Raises:
        ValueError: no files; lengths differ; a label out of range; a file twice; an absolute path.
    """

    root: Path
    files: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    classnames: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "files", tuple(self.files))
        object.__setattr__(self, "labels", tuple(map(operator.index, self.labels)))
        object.__setattr__(self, "classnames", tuple(self.classnames))
        if not self.files:
            raise ValueError("files must hold at least one image, got none")
        if len(self.labels) != len(self.files):
            raise ValueError(f"labels must have one entry per file = {len(self.files)}, got {len(self.labels)}")
        if min(self.labels) < 0 or max(self.labels) >= len(self.classnames):
            file, label = next(
                pair for pair in zip(self.files, self.labels, strict=True) if not 0 <= pair[1] < len(self.classnames)
            )
            raise ValueError(f"labels must lie in [0, {len(self.classnames)}), got {label} for {file!r}")
        for file in self.files:
            if file.startswith("/"):
                raise ValueError(f"files must be relative to root = {self.root}, got {file!r}")
        _refuse_repeats("files", self.files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def paths(self) -> list[Path]:
        """Where each image lies."""
        return [self.root / file for file in self.files]

    @property
    def counts(self) -> tuple[int, ...]:
        """Images per class, C entries."""
        counts = [0] * len(self.classnames)
        for label in self.labels:
            counts[label] += 1
        return tuple(counts)

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes that have an image here, ascending."""
        return tuple(sorted(set(self.labels)))

    def take(self, positions: Iterable[int]) -> ImageList:
        """The images at these positions, in this order; labels and class names stay."""
        positions = list(positions)
        return replace(
            self,
            files=tuple(self.files[i] for i in positions),
            labels=tuple(self.labels[i] for i in positions),
        )

    def select(self, classes: Sequence[int]) -> ImageList:
        """The images of these classes, relabelled from 0 in the given order; the images keep their order.

        Raises:
            ValueError: no class, an unknown class, a class twice, or no image left.
        """
        classes = _check_classes(classes, len(self.classnames))
        if classes == tuple(range(len(self.classnames))):
            return self  # ImageNet's list is long
        new_label = {old: new for new, old in enumerate(classes)}
        kept = [i for i, label in enumerate(self.labels) if label in new_label]
        if not kept:
            empty = [self.classnames[c] for c in new_label]
            raise ValueError(f"classes must have at least one image, got none for {_some(empty)}")
        return ImageList(
            root=self.root,
            files=tuple(self.files[i] for i in kept),
            labels=tuple(new_label[self.labels[i]] for i in kept),
            classnames=tuple(self.classnames[c] for c in new_label),
        )

    def require_every_class(self) -> ImageList:
        """This list, if each class has an image.

        Raises:
            ValueError: naming the classes that have none.
        """
        empty = [name for name, count in zip(self.classnames, self.counts, strict=True) if not count]
        if empty:
            raise ValueError(f"every class must have at least one image, got none for {_some(empty)}")
        return self


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test images over the same classes, of which some are visible. Each may be missing.

    ``train``, ``val``, ``test`` and ``classnames`` show the visible classes, labelled from 0. The whole lists are
    remembered, because CoOp draws few-shot images from all classes before it drops the novel ones.

    Attributes:
        name: for tables and messages.
        full_train: training images of all classes, if there are any.
        full_val: validation images of all classes, if there are any.
        full_test: test images of all classes, if there are any.
        visible: which of all classes are visible, and their order; None shows all.

    Raises:
        ValueError: no split; class names differ between splits; a file in two splits; an unknown visible class.
    """

    name: str
    full_train: ImageList | None = None
    full_val: ImageList | None = None
    full_test: ImageList | None = None
    visible: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        lists = {split: getattr(self, f"full_{split}") for split in SPLITS}
        lists = {split: images for split, images in lists.items() if images is not None}
        if not lists:
            raise ValueError(f"dataset {self.name!r} must have a train, val or test split, got none")
        first, names = next((split, images.classnames) for split, images in lists.items())
        for split, images in lists.items():
            if images.classnames != names:
                raise ValueError(
                    f"{split} must have the class names of {first}, {difference(names, images.classnames)}"
                )
        visible = range(len(names)) if self.visible is None else self.visible
        object.__setattr__(self, "visible", _check_classes(visible, len(names)))
        _refuse_shared(lists)

    @property
    def classnames(self) -> tuple[str, ...]:
        """Names of the visible classes."""
        names = next(images for images in (self.full_train, self.full_val, self.full_test) if images).classnames
        return tuple(names[c] for c in self.visible)

    @functools.cached_property
    def train(self) -> ImageList:
        """Training images of the visible classes. Raises ValueError where there are none."""
        return self._full("train").select(self.visible)

    @functools.cached_property
    def val(self) -> ImageList:
        """Validation images of the visible classes. Raises ValueError where there are none."""
        return self._full("val").select(self.visible)

    @functools.cached_property
    def test(self) -> ImageList:
        """Test images of the visible classes. Raises ValueError where there are none."""
        return self._full("test").select(self.visible)

    def select(self, classes: Sequence[int]) -> Dataset:
        """Only these of the visible classes, relabelled from 0 in the given order."""
        return replace(self, visible=tuple(self.visible[c] for c in _check_classes(classes, len(self.visible))))

    def base_novel(self) -> tuple[Dataset, Dataset]:
        """CoOp's halves: the first ceil(C / 2) visible classes are base, the others novel, each labelled from 0.

        Raises:
            ValueError: fewer than two classes.
        """
        count = len(self.visible)
        if count < 2:
            raise ValueError(f"base_novel needs at least 2 classes, got {count} in {self.name!r}: {self.classnames}")
        half = math.ceil(count / 2)
        ordered = sorted(range(count), key=self.visible.__getitem__)
        return self.select(ordered[:half]), self.select(ordered[half:])

    def few_shot(self, shots: int | None, seed: int = 1, split: str = "train") -> ImageList:
        """The images that CoOp draws with this seed, of the visible classes.

        Exactly Dassl's sampling: a stream ``random.Random(seed)``; for each class, in order of first appearance in the
        whole training list, ``random.sample`` of ``shots`` images, or all of them where there are fewer (Dassl's
        ``repeat=False``, which draws nothing). ``split="val"`` continues that stream with min(shots, 4) images per
        class of the validation list. Classes are hidden afterwards, so base and novel share one draw.

        Args:
            shots: images per class; None gives the whole split.
            seed: CoOp's ``SEED``.
            split: "train" or "val".

        Raises:
            ValueError: shots < 1; another split; a visible class without images.
        """
        _check_few_shot_split(split)
        if shots is not None and operator.index(shots) < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        images = self._full(split)
        everything = (self.train if split == "train" else self.val).require_every_class()
        if shots is None:
            return everything
        stream = random.Random(operator.index(seed))
        positions = _draw(self._full("train"), shots, stream)
        if split == "val":
            positions = _draw(images, min(shots, VAL_SHOTS), stream)
        return images.take(positions).select(self.visible)

    def few_shot_file(self, path: str | Path, split: str = "train") -> ImageList:
        """The images that CoOp drew and stored, of the visible classes: ``split_fewshot/shot_16-seed_1.pkl``.

        The file is a pickle of Dassl's records. Nothing in it is run: only plain values and these records are read.
        Its paths are those of the machine where it was written; here an image is found by the end of its path.

        Args:
            path: the file.
            split: "train" or "val".

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, or drawn from other images or labels.
        """
        _check_few_shot_split(split)
        path, images = Path(path), self._full(split)
        stored = _read_few_shot(path, split)
        ends = [_path_ends(file) for file, _ in stored]
        wanted = {end for candidates in ends for end in candidates}
        position_of = {file: i for i, file in enumerate(images.files) if file in wanted}
        positions = [next((position_of[end] for end in candidates if end in position_of), -1) for candidates in ends]
        for (file, label), position in zip(stored, positions, strict=True):
            if position < 0:
                raise ValueError(f"{path} must list images of {self.name!r}, got {file!r}, which is not in {split}")
            if label != images.labels[position]:
                raise ValueError(
                    f"{path} must have the labels of {self.name!r}, got {label} for {file!r} "
                    f"instead of {images.labels[position]}: it was drawn from another split"
                )
        _refuse_repeats(f"images in {path}", [file for file, _ in stored])
        return images.take(positions).select(self.visible).require_every_class()

    def _full(self, split: str) -> ImageList:
        images = getattr(self, f"full_{split}")
        if images is None:
            raise ValueError(f"dataset {self.name!r} has no {split} split")
        return images


def ImageFolder(
    root: str | Path,
    *,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
    classnames: Mapping[str, str] | None = None,
) -> Dataset:
    """Read a folder of images, one folder per class.

    Two layouts: ``root/{train,val,test}/<class>/**/image``, of which val and test may be missing; or
    ``root/<class>/**/image``, which is then split. The first is meant where ``root`` holds a folder ``train`` and no
    folders but these three. Images are known by their extension, see :func:`image_extensions`; hidden files and
    folders are left out, and so are FIFOs, devices and sockets; links are followed, loops are not.

    The split is made per class with a seed; a class that is added later leaves the others' split alone. Files with the
    same bytes stay on one side, so that no test image was trained on under another name.

    Args:
        root: the folder.
        val: share of each class for validation, only for the layout without splits; default 0.2, 0 for none.
        test: share of each class for testing, likewise; default 0.3.
        seed: of that split.
        classnames: {folder name: class name}. Without an entry, ``shopping_cart`` becomes "shopping cart".

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders; a class without images; classes differ between splits; two folders with one class
            name; split folders beside others; too few images to split; val or test given for data already split.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root must be a folder, got {root}")
    folders = subfolders(root)
    if not folders:
        raise ValueError(f"root must hold one folder per class, got no folders in {root}")
    others = sorted(set(folders) - set(SPLITS))
    if "train" in folders and others and set(folders) & {"val", "test", "valid", "validation"}:
        raise ValueError(f"{root} must hold only train, val and test, or only classes, got {_some(others)} besides")
    if "train" in folders and not others:
        _refuse_shares(val, test, f"{root} holds the folders {', '.join(folders)}")
        splits = {split: _class_files(root, root / split) for split in SPLITS if split in folders}
    else:
        splits = _stratify(root, _class_files(root, root), val=val, test=test, seed=seed)
    return _dataset(root.resolve().name, root, splits, classnames)


def image_table(
    path: str | Path,
    *,
    root: str | Path | None = None,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
    classnames: Mapping[str, str] | None = None,
) -> Dataset:
    """Read a list of images from a CSV file with a header, or from a JSON list of objects.

    Columns or keys: ``path``, relative to ``root`` (or absolute, below it); ``label``, a class name; and optionally
    ``split``, one of train, val, test. Without ``split`` the images are split as in :func:`ImageFolder`. Classes are
    sorted by label.

    Args:
        path: the ``.csv`` or ``.json`` file.
        root: the images' folder; default the file's own.
        val: share of each class for validation, where the table has no splits; default 0.2, 0 for none.
        test: share of each class for testing, likewise; default 0.3.
        seed: of that split.
        classnames: {label: class name}. Without an entry, ``shopping_cart`` becomes "shopping cart".

    Raises:
        FileNotFoundError: no such table; images that are listed but missing, how many and the first.
        ValueError: not such a table, naming the row; otherwise as :func:`ImageFolder`.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    rows = _table_rows(path)
    splits: dict[str, dict[str, list[str]]] = {}
    has_splits = "split" in rows[0]
    for number, row in enumerate(rows, start=1):
        file, label, split = (row.get(key) for key in ("path", "label", "split"))
        where = f"row {number} of {path}"
        if not (isinstance(file, str) and file and isinstance(label, str) and label):
            raise ValueError(f"{where} must have a path and a class name as label, got path={file!r}, label={label!r}")
        if has_splits != (split is not None) or (has_splits and split not in SPLITS):
            raise ValueError(f"{where} must have a split of train, val or test as every other row, got {split!r}")
        files = splits.setdefault(split or "all", {}).setdefault(label, [])
        files.append(_relative(file, root, where))
    listed = [file for classes in splits.values() for files in classes.values() for file in files]
    _refuse_repeats(f"path in {path}", listed)
    require_files(root, listed, path)
    if has_splits:
        _refuse_shares(val, test, f"{path} has a split column")
    else:
        splits = _stratify(root, dict(sorted(splits["all"].items())), val=val, test=test, seed=seed)
    return _dataset(path.stem, root, splits, classnames)


def coop_split(root: str | Path, json_file: str | Path, image_dir: str | Path = "") -> Dataset:
    """Read one of CoOp's ``split_zhou_*.json``: {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    Labels are the file's own and class names get spaces for underscores, as in CoOp.

    Args:
        root: the dataset's folder, such as ``data/caltech-101``.
        json_file: the split file, relative to ``root`` or absolute.
        image_dir: the folder that the paths are relative to, relative to ``root`` or absolute.

    Raises:
        FileNotFoundError: no such file; images that are listed but missing, how many and the first.
        ValueError: not such a file; a label with two names; a label without images in train.
    """
    json_file, images = Path(root, json_file), Path(root, image_dir)
    content = _read_json(json_file)
    if not isinstance(content, dict) or not isinstance(content.get("train"), list) or not content["train"]:
        raise ValueError(f"{json_file} must be an object with a list under 'train', got {_brief(content)}")
    names: dict[int, str] = {}
    splits: dict[str, list[tuple[str, int]]] = {}
    for split in SPLITS:
        items = content.get(split) or []
        if not isinstance(items, list):
            raise ValueError(f"{json_file} must have a list under {split!r}, got {_brief(items)}")
        for number, item in enumerate(items, start=1):
            try:
                file, label, name = _split_item(item)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"item {number} of {split!r} in {json_file} must be [path, label, class name], got {_brief(item)}"
                ) from error
            file = _relative(file, images, f"item {number} of {split!r} in {json_file}")
            if names.setdefault(label, name) != name:
                raise ValueError(f"label {label} in {json_file} must have one name, got {names[label]!r} and {name!r}")
            splits.setdefault(split, []).append((file, label))
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"labels in {json_file} must be 0..{len(names) - 1} without a gap, got {_some(sorted(names))}")
    require_files(images, [file for items in splits.values() for file, _ in items], json_file)
    classnames = tuple(names[label] for label in range(len(names)))
    lists = {
        split: ImageList(images, tuple(file for file, _ in items), tuple(label for _, label in items), classnames)
        for split, items in splits.items()
    }
    lists["train"].require_every_class()
    return Dataset(json_file.stem.removeprefix("split_zhou_"), *(lists.get(split) for split in SPLITS))


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image as RGB.

    The file must be a regular file of one of :data:`IMAGE_FORMATS`, none of which starts another program. As in
    open_clip and CoOp, EXIF orientation is not applied: published numbers were made that way.

    Args:
        path: the file.
        max_pixels: the largest width times height that is decoded: a file of 20 kB can hold an image that fills the
            memory. The size is read from the header, and so are the sizes of TIFF's tiles and GIF's frames.

    Raises:
        ValueError: the file is missing, truncated, not a regular file, not an image, or too large; names it.
    """
    try:
        with open_regular(path) as file, _open_image(file, max_pixels) as image:
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


def difference(expected: Iterable[str], got: Iterable[str]) -> str:
    """How a list of names differs from another, for messages."""
    expected, got = list(expected), list(got)
    lacking, extra = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    parts = [f"lacks {_some(lacking)}"] * bool(lacking) + [f"has {_some(extra)} besides"] * bool(extra)
    return " and ".join(parts) or "has them in another order"


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
def _open_image(file: BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    """The image in a file, its header read, nothing decoded. Raises DecompressionBombError above max_pixels."""
    with _PILLOWS_LIMIT:  # it is one for the whole process
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _Limit(max_pixels)
        try:
            image = Image.open(file, formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = usual
    with image:
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose decoder makes room for a whole tile
        tile = tags.get(TILE_WIDTH, 1) * tags.get(TILE_LENGTH, 1)
        if tile > max_pixels:
            raise Image.DecompressionBombError(f"a tile is too large ({tile} pixels)")
        yield image


# -- sampling and splitting -------------------------------------------------------------------------------------------


def _draw(images: ImageList, shots: int, stream: random.Random) -> list[int]:
    """Positions of ``shots`` images per class, by Dassl's generate_fewshot_dataset."""
    of_label: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(images.labels):
        of_label[label].append(position)
    drawn: list[int] = []
    for positions in of_label.values():
        drawn += stream.sample(positions, shots) if len(positions) >= shots else positions
    return drawn


def _stratify(
    root: Path, classes: Mapping[str, list[str]], *, val: float | None, test: float | None, seed: int
) -> dict[str, dict[str, list[str]]]:
    """Split each class's files; files with the same bytes stay together, across classes too."""
    shares = {"test": TEST_SHARE if test is None else test, "val": VAL_SHARE if val is None else val}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {share}")
    if sum(shares.values()) >= 1:
        raise ValueError(f"val + test must be below 1, got {shares['val']} + {shares['test']}")
    shares = {name: share for name, share in shares.items() if share}
    bytes_of = _identify(root, [file for files in classes.values() for file in files])
    side: dict[str, str] = {}  # of each content
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS if split in shares or split == "train"}
    for name, files in classes.items():
        wanted = {split: max(1, round(share * len(files))) for split, share in shares.items()}
        twins: dict[str, list[str]] = defaultdict(list)
        for file in files:
            twins[bytes_of[file]].append(file)
        got = dict.fromkeys([*shares, "train"], 0)
        for content in twins:
            if content in side:
                got[side[content]] += len(twins[content])
        free = sorted(content for content in twins if content not in side)
        random.Random(f"{seed}/{name}").shuffle(free)  # one stream per class: a new class moves no other
        for content in free:
            bare = [split for split in got if not got[split]]
            short = [split for split in shares if got[split] < wanted[split]]
            side[content] = (bare or short or ["train"])[0]
            got[side[content]] += len(twins[content])
        if not all(got.values()):
            raise ValueError(
                f"class {name!r} in {root} must have at least {len(got)} different images to be split into "
                f"{', '.join(splits)}, got {len(twins)}; give the splits yourself, or val=0"
            )
        for split in splits:
            splits[split][name] = [file for file in files if side[bytes_of[file]] == split]
    return splits


def _identify(root: Path, files: Iterable[str]) -> dict[str, str]:
    """{file: content}, equal for files with the same bytes. Only files of equal size are read."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for file in files:
        by_size[(root / file).stat().st_size].append(file)
    contents = {}
    for same_size in by_size.values():
        for file in same_size:
            contents[file] = file if len(same_size) == 1 else hashlib.sha256(read_regular(root / file)).hexdigest()
    return contents


# -- reading ----------------------------------------------------------------------------------------------------------


def _dataset(
    name: str, root: Path, splits: Mapping[str, Mapping[str, list[str]]], classnames: Mapping[str, str] | None
) -> Dataset:
    """A dataset of {split: {folder or label: files}}; classes are sorted by that key."""
    if "train" not in splits:
        raise ValueError(f"{root} must have training images, got only {', '.join(splits)}")
    keys = sorted(splits["train"])
    for split, classes in splits.items():
        if sorted(classes) != keys:
            raise ValueError(f"{split} must have the classes of train in {root}, {difference(keys, classes)}")
    names = _class_names(keys, classnames or {})
    lists = {}
    for split, classes in splits.items():
        pairs = [(file, label) for label, key in enumerate(keys) for file in classes[key]]
        lists[split] = ImageList(root, tuple(file for file, _ in pairs), tuple(label for _, label in pairs), names)
    return Dataset(name, *(lists.get(split) for split in SPLITS))


def _class_names(keys: Sequence[str], given: Mapping[str, str]) -> tuple[str, ...]:
    """Class names of folders, which may be equal only if the user says so (ImageNet's usual names have such pairs)."""
    owner: dict[str, str] = {}
    for key in keys:
        name = given.get(key, prettify(key))
        other = owner.setdefault(name, key)
        if other != key and not (key in given and other in given):
            raise ValueError(f"class names must differ, got {name!r} for {other!r} and {key!r}; classnames= renames")
    return tuple(given.get(key, prettify(key)) for key in keys)


def _class_files(root: Path, parent: Path) -> dict[str, list[str]]:
    """{class folder in parent: its images, sorted, relative to root}."""
    above = {_identity(root), _identity(parent)}
    classes = {}
    for name in subfolders(parent):
        files = _images_below(parent / name, above)
        if not files:
            raise ValueError(f"class folder {parent / name} must hold at least one image, got none")
        classes[name] = sorted(path.relative_to(root).as_posix() for path in files)
    if not classes:
        raise ValueError(f"{parent} must hold one folder per class, got no folders")
    return classes


def _images_below(folder: Path, above: set[tuple[int, int]]) -> list[Path]:
    """Images in a folder and its folders; a folder that was seen is not entered again, so that links cannot loop."""
    seen = above | {_identity(folder)}
    found = []
    for here, folders, _ in os.walk(folder, followlinks=True):
        fresh = []
        for name in sorted(folders):
            identity = _identity(Path(here, name))
            if not name.startswith(".") and identity not in seen:
                seen.add(identity)
                fresh.append(name)
        folders[:] = fresh
        found += [Path(here, name) for name in image_names(here)]
    return found


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _table_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".json":
        rows = _read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} must be a list of objects with path and label, got {_brief(rows)}")
    elif path.suffix.lower() == ".csv":
        try:
            reader = csv.DictReader(io.StringIO(read_regular_text(path), newline=""), skipinitialspace=True)
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be CSV in UTF-8: {error}") from error
        missing = {"path", "label"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} must have the header path,label[,split], got {reader.fieldnames}")
    else:
        raise ValueError(f"path must end in .csv or .json, got {path}")
    if not rows:
        raise ValueError(f"{path} must list at least one image, got none")
    return rows


def _read_json(path: Path) -> Any:
    content = read_regular(path)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error


def _split_item(item: Any) -> tuple[str, int, str]:
    """An entry of CoOp's split file; TypeError or ValueError if it is none."""
    file, label, name = item
    if not (isinstance(item, list) and isinstance(file, str) and isinstance(name, str) and file and prettify(name)):
        raise TypeError
    return file, int(label) if isinstance(label, str) else operator.index(label), prettify(name)


def _read_few_shot(path: Path, split: str) -> list[tuple[str, int]]:
    """(path, label) of each record under ``split`` in a pickle {split: [Datum, ...]}, without running anything."""

    class Datum:  # made anew for every file, so that nothing a file does to it stays
        def __setstate__(self, state: dict[str, Any]) -> None:
            self.file, self.label = state["_impath"], state["_label"]

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> type:
            if (module, name) != DATUM:
                raise pickle.UnpicklingError(f"it holds {module}.{name}, and pickled code is never run")
            return Datum

    content = read_regular(path)
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if not DATUM_OPCODES.fullmatch(opcode.name):
                raise pickle.UnpicklingError(f"it has the opcode {opcode.name}, which such files have no need of")
            if opcode.name == "LONG_BINPUT" and argument > len(content):
                raise pickle.UnpicklingError("its memo is larger than the file")  # the reader would allocate it
        records = [(record.file, record.label) for record in Reader(io.BytesIO(content)).load()[split]]
        if not records or not all(isinstance(file, str) and type(label) is int for file, label in records):
            raise TypeError("its records must have a path and a label")
    except Exception as error:  # pickles that are damaged raise whatever they like
        raise ValueError(
            f"{path} must be a few-shot file of CoOp with images under {split!r}: {type(error).__name__}: {error}"
        ) from error
    return records


def _path_ends(file: str) -> list[str]:
    """The path without its first parts, longest first: "a/b/c" -> "a/b/c", "b/c", "c"."""
    parts = file.replace("\\", "/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # no such folder, or no such name on this system
        return set()


def _relative(file: str, root: Path, where: str) -> str:
    """A listed path relative to root, in one spelling."""
    if posixpath.isabs(file):
        path = Path(file)
        if not path.is_relative_to(root.absolute()):
            raise ValueError(f"{where} must lie below root = {root.absolute()}, got {file!r}")
        file = path.relative_to(root.absolute()).as_posix()
    return posixpath.normpath(file)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_classes(classes: Iterable[int], count: int) -> tuple[int, ...]:
    classes = tuple(map(operator.index, classes))
    if not classes:
        raise ValueError("classes must name at least one class, got none")
    for c in classes:
        if not 0 <= c < count:
            raise ValueError(f"classes must lie in [0, {count}), got {c}")
    _refuse_repeats("classes", classes)
    return classes


def _refuse_repeats(what: str, values: Sequence[Any]) -> None:
    if len(set(values)) == len(values):
        return
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} must not repeat, got {value!r} twice")
        seen.add(value)


def _refuse_shared(lists: Mapping[str, ImageList]) -> None:
    """Refuse an image in two splits. Sets of the shorter lists only: ImageNet's training list is long."""
    one_root = len({images.root for images in lists.values()}) == 1
    names = {split: images.files if one_root else [*map(str, images.paths)] for split, images in lists.items()}
    for first, second in itertools.combinations(names, 2):
        short, long = sorted((names[first], names[second]), key=len)
        if not set(short).isdisjoint(long):
            path = lists[first].root / min(set(short).intersection(long))
            raise ValueError(f"a file must lie in one split, got {path} in {first} and {second}")


def _check_few_shot_split(split: str) -> None:
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")


def _refuse_shares(val: float | None, test: float | None, reason: str) -> None:
    if val is not None or test is not None:
        raise ValueError(f"val and test must be None for data that is split already ({reason}), got {val} and {test}")


def _some(values: Sequence[Any], limit: int = 5) -> str:
    shown = ", ".join(map(repr, values[:limit]))
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"


def _brief(value: Any) -> str:
    return reprlib.repr(value)  # of any depth and length
