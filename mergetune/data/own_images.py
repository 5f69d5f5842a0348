"""Datasets from a user's images: a folder of class folders, a table, or a split file of CoOp."""

from __future__ import annotations

import csv
import io
import operator
import posixpath
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetune.data.image_files import brief, folder_identity, images_below, prettify, require_files, subfolders
from mergetune.data.image_lists import SPLITS, Dataset, ImageList, difference, refuse_repeats, some_of
from mergetune.io import MAX_LIST, read_json, read_regular_text, sha256_regular

VAL_SHARE, TEST_SHARE = 0.2, 0.3  # CoOp's shares for data without an official split


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
    ``root/<class>/**/image``, which is split here. ``root`` has the first layout if it holds a folder ``train`` and no
    folders except these three. Images are recognised by extension, see :func:`image_extensions`. Hidden files and
    folders, FIFOs, devices and sockets are left out. Links are followed, except for loops.

    The split is drawn per class with a seed; adding a class does not change the split of other classes. Files with the
    same bytes go to the same split, so no test image is also a training image under another name.

    Args:
        root: the folder.
        val: share of each class for validation, only in the layout without splits. Default: 0.2; 0 for no validation.
        test: share of each class for testing, only in the layout without splits. Default: 0.3.
        seed: seed of the split.
        classnames: {folder name: class name}. Without an entry, ``shopping_cart`` becomes "shopping cart".

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no class folders, a class without images, different classes between splits, two folders with the
            same class name, other folders beside train, val and test, too few images to split, or val or test given
            for data that is already split.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root must be a folder, got {root}")
    folders = subfolders(root)
    if not folders:
        raise ValueError(f"root must hold one folder per class, got no folders in {root}")
    others = sorted(set(folders) - set(SPLITS))
    if "train" in folders and others and set(folders) & {"val", "test", "valid", "validation"}:
        raise ValueError(
            f"{root} must hold only train, val and test, or only classes, got {some_of(others)} in addition to train"
        )
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
        splits = _stratify(root, dict(sorted(splits["all"].items())), val=val, test=test, seed=seed)
    return _dataset(path.stem, root, splits, classnames)


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


# -- sampling and splitting --------------------------------------------------------------------------------------------


def _stratify(
    root: Path, classes: Mapping[str, list[str]], *, val: float | None, test: float | None, seed: int
) -> dict[str, dict[str, list[str]]]:
    """Splits the files of each class. Files with the same bytes go to the same split, also across classes."""
    shares = {"test": TEST_SHARE if test is None else test, "val": VAL_SHARE if val is None else val}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {share}")
    if sum(shares.values()) >= 1:
        raise ValueError(f"val + test must be below 1, got {shares['val']} + {shares['test']}")
    shares = {name: share for name, share in shares.items() if share}
    bytes_of = _identify(root, [file for files in classes.values() for file in files])
    side: dict[str, str] = {}  # content -> split
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
        random.Random(f"{seed}/{name}").shuffle(free)  # one stream per class: a new class does not change the others
        for content in free:
            bare = [split for split in got if not got[split]]
            short = [split for split in shares if got[split] < wanted[split]]
            side[content] = (bare or short or ["train"])[0]
            got[side[content]] += len(twins[content])
        if not all(got.values()):
            raise ValueError(
                f"class {name!r} in {root} must have at least {len(got)} different images to be split into "
                f"{', '.join(splits)}, got {len(twins)}: make the splits yourself, or set val=0"
            )
        for split in splits:
            splits[split][name] = [file for file in files if side[bytes_of[file]] == split]
    return splits


def _identify(root: Path, files: Iterable[str]) -> dict[str, str]:
    """{file: key}, with equal keys for files with the same bytes. Only files of equal size are read."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for file in files:
        by_size[(root / file).stat().st_size].append(file)
    contents = {}
    for same_size in by_size.values():
        for file in same_size:
            contents[file] = file if len(same_size) == 1 else sha256_regular(root / file)
    return contents


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


def _split_item(item: Any) -> tuple[str, int, str]:
    """(path, label, class name) of an entry in CoOp's split file; TypeError or ValueError for other values."""
    file, label, name = item
    if not (isinstance(item, list) and isinstance(file, str) and isinstance(name, str) and file and prettify(name)):
        raise TypeError
    return file, int(label) if isinstance(label, str) else operator.index(label), prettify(name)


def _relative(file: str, root: Path, where: str) -> str:
    """A listed path relative to root, normalised so that each file has one spelling."""
    if posixpath.isabs(file):
        path = Path(file)
        if not path.is_relative_to(root.absolute()):
            raise ValueError(f"{where} must lie below root = {root.absolute()}, got {file!r}")
        file = path.relative_to(root.absolute()).as_posix()
    return posixpath.normpath(file)


# -- checks ------------------------------------------------------------------------------------------------------------


def _refuse_shares(val: float | None, test: float | None, reason: str) -> None:
    if val is not None or test is not None:
        raise ValueError(f"val and test must be None for data that is already split ({reason}), got {val} and {test}")
