"""Datasets from own images: a folder of class folders, a table, or a split file of CoOp."""

from __future__ import annotations

import csv
import io
import operator
import os
import posixpath
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetune.data.image_files import brief, image_names, prettify, read_json, require_files, subfolders
from mergetune.data.image_lists import SPLITS, Dataset, ImageList, difference, refuse_repeats, some_of
from mergetune.io import read_regular_text, sha256_regular

VAL_SHARE, TEST_SHARE = 0.2, 0.3  # CoOp's shares for data without an official split


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
        raise ValueError(f"{root} must hold only train, val and test, or only classes, got {some_of(others)} besides")
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
    refuse_repeats(f"path in {path}", listed)
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
    content = read_json(json_file)
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
            f"labels in {json_file} must be 0..{len(names) - 1} without a gap, got {some_of(sorted(names))}"
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
            contents[file] = file if len(same_size) == 1 else sha256_regular(root / file)
    return contents


# -- reading -----------------------------------------------------------------------------------------------------------


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
        rows = read_json(path)
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
    """An entry of CoOp's split file; TypeError or ValueError if it is none."""
    file, label, name = item
    if not (isinstance(item, list) and isinstance(file, str) and isinstance(name, str) and file and prettify(name)):
        raise TypeError
    return file, int(label) if isinstance(label, str) else operator.index(label), prettify(name)


def _relative(file: str, root: Path, where: str) -> str:
    """A listed path relative to root, in one spelling."""
    if posixpath.isabs(file):
        path = Path(file)
        if not path.is_relative_to(root.absolute()):
            raise ValueError(f"{where} must lie below root = {root.absolute()}, got {file!r}")
        file = path.relative_to(root.absolute()).as_posix()
    return posixpath.normpath(file)


# -- checks ------------------------------------------------------------------------------------------------------------


def _refuse_shares(val: float | None, test: float | None, reason: str) -> None:
    if val is not None or test is not None:
        raise ValueError(f"val and test must be None for data that is split already ({reason}), got {val} and {test}")
