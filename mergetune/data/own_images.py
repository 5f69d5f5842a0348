"""Datasets from a user's images: a folder of class folders, a table, or a split file of CoOp."""

from __future__ import annotations

import operator
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetune.data.folder_layouts import split_folders, unwrapped
from mergetune.data.image_files import (
    brief,
    folder_identity,
    images_below,
    leaves_root,
    prettify,
    require_files,
    subfolders,
)
from mergetune.data.image_lists import SPLITS, Dataset, ImageList, difference, refuse_repeats, some_of
from mergetune.data.stratified_split import stratify
from mergetune.io import MAX_LIST, csv_rows, names_file, read_json, read_regular_text


def ImageFolder(
    root: str | Path,
    *,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
    classnames: Mapping[str, str] | None = None,
) -> Dataset:
    """Reads a dataset from a folder with one subfolder per class.

    Two layouts are possible: ``root/{train,val,test}/<class>/**/image``, where val and test may be missing, or
    ``root/<class>/**/image``, which is split here. Usual spellings of the three names count (``Training``, ``valid``,
    ``test_set``). If ``root`` holds one folder and nothing else, the folder below counts. Images are recognised by
    extension, see :func:`image_extensions`. Hidden files and folders, FIFOs, devices and sockets are left out. Links
    are followed, except for loops.

    The split is drawn per class with a seed: the images are ordered by a hash of their content and cut at the shares.
    Adding or removing an image moves at most one other image across each cut; renaming moves none, and classes do not
    depend on each other. Files with the same bytes go to the same split, so no test image is also a training image
    under another name.

    Args:
        root: the folder.
        val: share of each class for validation, only in the layout without splits. Default: 0.2; 0 for no validation.
        test: share of each class for testing, only in the layout without splits. Default: 0.3.
        seed: seed of the split.
        classnames: {folder name: class name}. Without an entry, ``shopping_cart`` becomes "shopping cart".

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no class folders, a class without images, different classes between splits, two folders with the
            same class name, other folders beside train, val and test, folders that repeat the names of their
            subfolders, too few images to split, or val or test given for data that is already split.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root must be a folder, got {root}")
    inner = unwrapped(root)
    folders = split_folders(inner)
    if folders:
        _refuse_shares(val, test, f"{inner} holds the folders {', '.join(folders.values())}")
        splits = {split: _class_files(root, inner / name) for split, name in folders.items()}
    else:
        splits = stratify(root, _class_files(root, inner), val=val, test=test, seed=seed)
    return _dataset(root.resolve().name, root, splits, classnames)


@names_file("path")
def image_table(
    path: str | Path,
    *,
    root: str | Path | None = None,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
    classnames: Mapping[str, str] | None = None,
) -> Dataset:
    """Reads a dataset from a table of images: a CSV file with a header, or a JSON list of objects.

    Columns or keys are ``path`` (relative to ``root``, or absolute and below ``root``), ``label`` (a class name), and
    optionally ``split`` (train, val or test). Without ``split`` the images are split as in :func:`ImageFolder`. Classes
    are sorted by label.

    Args:
        path: the ``.csv`` or ``.json`` file.
        root: folder of the images. Default: the folder of the table.
        val: share of each class for validation, only for a table without splits. Default: 0.2; 0 for no validation.
        test: share of each class for testing, only for a table without splits. Default: 0.3.
        seed: seed of the split.
        classnames: {label: class name}. Without an entry, ``shopping_cart`` becomes "shopping cart".

    Raises:
        FileNotFoundError: the table does not exist, or listed images are missing (the message names the first).
        ValueError: the file is not such a table (the message names the row), or one of the errors of
            :func:`ImageFolder`.
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
            raise ValueError(f"{where} must have a split (train, val or test) if any row has one, got {split!r}")
        files = splits.setdefault(split or "all", {}).setdefault(label, [])
        files.append(_relative(file, root, where))
    listed = [file for classes in splits.values() for files in classes.values() for file in files]
    refuse_repeats(f"path in {path}", listed)
    require_files(root, listed, path)
    if has_splits:
        _refuse_shares(val, test, f"{path} has a split column")
    else:
        splits = stratify(root, dict(sorted(splits["all"].items())), val=val, test=test, seed=seed)
    return _dataset(path.stem, root, splits, classnames)


@names_file("path")
def listed_images(path: str | Path) -> Dataset:
    """Reads a dataset from a list file: a table of :func:`image_table`, or a split file of :func:`coop_split`.

    A split file is recognised by its content. Its images lie relative to its folder, or to a folder beside it, such as
    ``images/``.

    Raises:
        FileNotFoundError: the file does not exist, or listed images are missing (the message names the first).
        ValueError: the file is no such list.
    """
    path = Path(path)
    content = read_json(path, limit=MAX_LIST) if path.suffix.lower() == ".json" else None
    if not (isinstance(content, dict) and isinstance(content.get("train"), list)):
        return image_table(path)
    folder = path.absolute().parent
    places = ["", "images", *(name for name in subfolders(folder) if name != "images")]
    item = content["train"][0] if content["train"] else None
    first = item[0] if item and isinstance(item, list) else None
    found = (place for place in places if isinstance(first, str) and os.path.isfile(folder / place / first))
    return coop_split(folder, path.name, next(found, ""))


@names_file("json_file")
def coop_split(root: str | Path, json_file: str | Path, image_dir: str | Path = "") -> Dataset:
    """Reads a dataset from one of CoOp's ``split_zhou_*.json``.

    The file holds {"train": [[path, label, class name], ...], "val": ..., "test": ...}. Labels are taken from the file;
    underscores in class names become spaces, as in CoOp.

    Args:
        root: folder of the dataset, such as ``data/caltech-101``.
        json_file: the split file, relative to ``root`` or absolute.
        image_dir: folder that the listed paths are relative to; itself relative to ``root``, or absolute.

    Raises:
        FileNotFoundError: the file does not exist, or listed images are missing (the message names the first).
        ValueError: the file is not a split file, a label has two names, or a label has no images in train.
    """
    json_file, images = Path(root, json_file), Path(root, image_dir)
    content = read_json(json_file, limit=MAX_LIST)
    if not isinstance(content, dict) or not isinstance(content.get("train"), list) or not content["train"]:
        raise ValueError(f"{json_file} must be an object with a list under 'train', got {brief(content)}")
    names: dict[int, str] = {}
    splits: dict[str, list[tuple[str, int]]] = {}
    for split in SPLITS:
        items = content.get(split) or []
        if not isinstance(items, list):
            raise ValueError(f"{json_file} must have a list under {split!r}, got {brief(items)}")
        for number, item in enumerate(items, start=1):
            try:
                file, label, name = _split_item(item)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"item {number} of {split!r} in {json_file} must be [path, label, class name], got {brief(item)}"
                ) from error
            file = _relative(file, images, f"item {number} of {split!r} in {json_file}")
            if names.setdefault(label, name) != name:
                raise ValueError(f"label {label} in {json_file} must have one name, got {names[label]!r} and {name!r}")
            splits.setdefault(split, []).append((file, label))
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"labels in {json_file} must be 0 to {len(names) - 1} without a gap, got {some_of(sorted(names))}"
        )
    require_files(images, [file for items in splits.values() for file, _ in items], json_file)
    classnames = tuple(names[label] for label in range(len(names)))
    lists = {
        split: ImageList(images, tuple(file for file, _ in items), tuple(label for _, label in items), classnames)
        for split, items in splits.items()
    }
    lists["train"].require_every_class()
    return Dataset(json_file.stem.removeprefix("split_zhou_"), lists.get("train"), lists.get("val"), lists.get("test"))


# -- reading -----------------------------------------------------------------------------------------------------------


def _dataset(
    name: str, root: Path, splits: Mapping[str, Mapping[str, list[str]]], classnames: Mapping[str, str] | None
) -> Dataset:
    """The dataset of {split: {folder or label: files}}; classes are sorted by folder or label."""
    if "train" not in splits:
        raise ValueError(f"{root} must have training images, got only {', '.join(splits)}")
    keys = sorted(splits["train"])
    for split, classes in splits.items():
        if sorted(classes) != keys:
            raise ValueError(f"{split} must have the classes of train in {root}, but {difference(keys, classes)}")
    names = _class_names(keys, classnames or {})
    lists = {}
    for split, classes in splits.items():
        pairs = [(file, label) for label, key in enumerate(keys) for file in classes[key]]
        lists[split] = ImageList(root, tuple(file for file, _ in pairs), tuple(label for _, label in pairs), names)
    return Dataset(name, *(lists.get(split) for split in SPLITS))


def _class_names(keys: Sequence[str], given: Mapping[str, str]) -> tuple[str, ...]:
    """Class names of folders or labels.

    Two names may be equal only if ``given`` sets both (some usual names of ImageNet's classes are equal).
    """
    owner: dict[str, str] = {}
    for key in keys:
        name = given.get(key, prettify(key))
        other = owner.setdefault(name, key)
        if other != key and not (key in given and other in given):
            raise ValueError(f"class names must differ, got {name!r} for {other!r} and {key!r}: rename with classnames")
    return tuple(given.get(key, prettify(key)) for key in keys)


def _class_files(root: Path, parent: Path) -> dict[str, list[str]]:
    """{class folder in parent: sorted paths of its images relative to root}."""
    above = {folder_identity(root), folder_identity(parent)}
    classes = {}
    for name in subfolders(parent):
        files = images_below(parent / name, above)
        if not files:
            raise ValueError(f"class folder {parent / name} must hold at least one image, got none")
        classes[name] = sorted(path.relative_to(root).as_posix() for path in files)
    if not classes:
        raise ValueError(f"{parent} must hold one folder per class, got no folders")
    return classes


def _table_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".json":
        rows = read_json(path, limit=MAX_LIST)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} must be a list of objects with path and label, got {brief(rows)}")
    elif path.suffix.lower() == ".csv":
        rows = list(csv_rows(read_regular_text(path), name=path, columns=("path", "label"), optional=("split",)))
    else:
        raise ValueError(f"path must end in .csv or .json, got {path}")
    if not rows:
        raise ValueError(f"{path} must list at least one image, got none")
    return rows


def _split_item(item: Any) -> tuple[str, int, str]:
    """(path, label, class name) of an entry in CoOp's split file; TypeError or ValueError for other values."""
    file, label, name = item
    if not (isinstance(item, list) and isinstance(file, str) and isinstance(name, str) and file and prettify(name)):
        raise TypeError
    return file, int(label) if isinstance(label, str) else operator.index(label), prettify(name)


def _relative(file: str, root: Path, where: str) -> str:
    """A listed path relative to root, normalised so that each file has one spelling."""
    above, path = posixpath.normpath(root.absolute().as_posix()), posixpath.normpath(file)
    found = posixpath.relpath(path, above) if posixpath.isabs(path) else path
    if leaves_root(found):
        raise ValueError(f"{where} must lie below root = {above}, got {file!r}")
    return found


# -- checks ------------------------------------------------------------------------------------------------------------


def _refuse_shares(val: float | None, test: float | None, reason: str) -> None:
    if val is not None or test is not None:
        raise ValueError(f"val and test must be None for data that is already split ({reason}), got {val} and {test}")
