"""Datasets from a user's images: a folder of class folders, a table, or a split file of CoOp."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import warn

from mergetune.data.class_names import GivenNames, class_names, hint_at_names, in_order, prettify
from mergetune.data.folder_layouts import class_parent, split_folders, unwrapped
from mergetune.data.image_files import brief, folder_identity, images_below, missing_files, require_files, subfolders
from mergetune.data.image_lists import SPLITS, Dataset, ImageList, difference, refuse_repeats, some_of
from mergetune.data.list_files import paths_below, table_rows
from mergetune.data.stratified_split import stratify
from mergetune.io import MAX_LIST, listing, names_file, read_json

ROOT_WAY_ON = "root (on the command line --root FOLDER) is the folder that the paths in a list are relative to"


def ImageFolder(
    root: str | Path,
    *,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
    classnames: Mapping[str, str] | Sequence[str] | str | Path | None = None,
) -> Dataset:
    """Reads a dataset from a folder with one subfolder per class.

    Two layouts are possible: ``root/{train,val,test}/<class>/**/image``, where val and test may be missing, or
    ``root/<class>/**/image``, which is split here. Usual spellings of the three names count (``Training``, ``valid``,
    ``test_set``, ``seg_train``). If ``root`` holds one folder and nothing else, or images in the folders of one of its
    folders only, that folder counts. Images are recognised by extension, see :func:`image_extensions`. Hidden files and
    folders, folders that systems make (``__MACOSX``), FIFOs, devices and sockets are left out. Links are followed,
    except for loops.

    Classes are sorted by folder; folders that all have whole numbers as names are sorted by number. A class may lack
    images in val or test, with a warning. Folders whose names a text tower cannot tell apart (``Apple`` and ``apple``)
    are refused. Names that are identifiers (WordNet ids, numbers) lead to a warning.

    The split is drawn per class with a seed: the images are ordered by a hash of their content and cut at the shares.
    Adding or removing an image moves at most one other image across each cut; renaming moves none, and classes do not
    depend on each other. Files with the same bytes go to the same split, so no test image is also a training image
    under another name.

    Args:
        root: the folder.
        val: share of each class for validation, only in the layout without splits. Default: 0.2; 0 for no validation.
        test: share of each class for testing, only in the layout without splits. Default: 0.3.
        seed: seed of the split.
        classnames: {folder name: class name}, or one name per class in their order, or a file with either (.json; .txt
            with a name, or a folder and its name, per line). Without an entry, ``shopping_cart`` becomes "shopping
            cart".

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no class folders, a class without images, a split with classes that train lacks, two folders with
            the same class name, an empty class name, other folders with images beside train, val and test, folders that
            repeat the names of their subfolders, folders that are parts of a dataset (images, annotations), too few
            images to split, or val or test given for data that is already split.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root must be a folder, got {root}")
    inner = unwrapped(root)
    folders = split_folders(inner)
    if folders:
        _refuse_shares(val, test, f"{inner} holds the folders {', '.join(folders.values())}")
        splits = {split: _class_files(root, class_parent(inner / name)) for split, name in folders.items()}
    else:
        splits = stratify(root, _class_files(root, inner), val=val, test=test, seed=seed)
    return _dataset(root.resolve().name, root, splits, classnames, what="class folder")


@names_file("path")
def image_table(
    path: str | Path,
    *,
    root: str | Path | None = None,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
    classnames: Mapping[str, str] | Sequence[str] | str | Path | None = None,
) -> Dataset:
    """Reads a dataset from a table of images: a CSV file, a JSON list of objects, or JSON lines.

    Columns or keys are ``path`` (relative to ``root``, or absolute and below ``root``), ``label`` (a class name or
    number), and optionally ``split`` (train, val or test, in a usual spelling). Other usual names of columns, such as
    ``file_name`` and ``category``, count as well. A CSV file may have commas, semicolons or tabs, and no header if its
    columns are path, label and perhaps split. Without ``split`` the images are split as in :func:`ImageFolder`, whose
    rules for class names and their order hold here, too.

    Args:
        path: the ``.csv``, ``.tsv``, ``.json`` or ``.jsonl`` file, in UTF-8.
        root: folder of the images. Default: the folder of the table.
        val: share of each class for validation, only for a table without splits. Default: 0.2; 0 for no validation.
        test: share of each class for testing, only for a table without splits. Default: 0.3.
        seed: seed of the split.
        classnames: {label: class name}, or another form of :func:`ImageFolder`. Without an entry, ``shopping_cart``
            becomes "shopping cart".

    Raises:
        FileNotFoundError: the table does not exist, or listed images are missing (the message names the first).
        ValueError: the file is not such a table (the message names the row), or one of the errors of
            :func:`ImageFolder`.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    rows, below = table_rows(path), paths_below(root)
    splits: dict[str, dict[str, list[str]]] = {}
    has_splits = "split" in rows[0]
    for number, row in enumerate(rows, start=1):
        files = splits.setdefault(row.get("split", "all"), {}).setdefault(row["label"], [])
        files.append(below(row["path"], f"row {number} of {path}"))
    listed = [file for classes in splits.values() for files in classes.values() for file in files]
    refuse_repeats(f"path in {path}", listed)
    require_files(root, listed, path, way_on=ROOT_WAY_ON)
    if has_splits:
        _refuse_shares(val, test, f"{path} has a split column")
    else:
        by_label = {label: splits["all"][label] for label in in_order(splits["all"])}
        splits = stratify(root, by_label, val=val, test=test, seed=seed)
    return _dataset(path.stem, root, splits, classnames, what="label")


@names_file("path")
def listed_images(
    path: str | Path,
    *,
    root: str | Path | None = None,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
    classnames: Mapping[str, str] | Sequence[str] | str | Path | None = None,
) -> Dataset:
    """Reads a dataset from a list file: a table of :func:`image_table`, or a split file of :func:`coop_split`.

    A split file is recognised by its content. Its images lie relative to its folder, or to a folder beside it, such as
    ``images/``: the folder that holds most of them is taken, with a warning if it is another one than these.

    Args:
        path: the list file.
        root: folder of the images. Default: the folder of the list, for a split file also one beside it.
        val, test, seed: shares and seed of the split of a table without splits, see :func:`image_table`.
        classnames: names in place of those in the list, see :func:`ImageFolder`.

    Raises:
        FileNotFoundError: the file does not exist, or listed images are missing (the message names the first).
        ValueError: the file is no such list, or shares are given for a list that is already split.
    """
    path = Path(path)
    content = read_json(path, limit=MAX_LIST) if path.suffix.lower() == ".json" else None
    if not (isinstance(content, dict) and isinstance(content.get("train"), list)):
        return image_table(path, root=root, val=val, test=test, seed=seed, classnames=classnames)
    _refuse_shares(val, test, f"{path} holds train, val and test")
    folder = path.absolute().parent
    place = _place_of(folder, path, content) if root is None else Path(root).absolute()
    return _renamed(_coop_split(folder, path.name, place, way_on=ROOT_WAY_ON), classnames)


def _place_of(folder: Path, path: Path, content: Mapping[str, Any]) -> str:
    """The subfolder that holds most images of a split file, the first of equals; "" for the folder itself."""
    lists = [content[split] for split in SPLITS if isinstance(content.get(split), list)]
    paths = [item[0] for items in lists for item in items if isinstance(item, list) and item]
    files = [path.replace("\\", "/") for path in paths if isinstance(path, str) and path]
    places = ["", "images", *(name for name in subfolders(folder) if name != "images")]
    place, fewest = "", len(files)
    for other in places:
        if (missing := len(missing_files(folder / other, files))) < fewest:
            place, fewest = other, missing
        if not fewest:
            break
    if place not in ("", "images"):
        warn(
            f"images in {path} are taken from {folder / place}, which holds {len(files) - fewest:,} of {len(files):,}: "
            "root (on the command line --root) names another folder",
            stacklevel=4,
        )
    return place


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
    return _coop_split(root, json_file, image_dir)


def _coop_split(root: str | Path, json_file: str | Path, image_dir: str | Path, *, way_on: str = "") -> Dataset:
    json_file, images = Path(root, json_file), Path(root, image_dir)
    content = read_json(json_file, limit=MAX_LIST)
    if not isinstance(content, dict) or not isinstance(content.get("train"), list) or not content["train"]:
        raise ValueError(f"{json_file} must be an object with a list under 'train', got {brief(content)}")
    names: dict[int, str] = {}
    splits: dict[str, list[tuple[str, int]]] = {}
    below = paths_below(images)
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
            file = below(file, f"item {number} of {split!r} in {json_file}")
            if names.setdefault(label, name) != name:
                raise ValueError(f"label {label} in {json_file} must have one name, got {names[label]!r} and {name!r}")
            splits.setdefault(split, []).append((file, label))
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"labels in {json_file} must be 0 to {len(names) - 1} without a gap, got {some_of(sorted(names))}"
        )
    require_files(images, [file for items in splits.values() for file, _ in items], json_file, way_on=way_on)
    classnames = tuple(names[label] for label in range(len(names)))
    lists = {
        split: ImageList(images, tuple(file for file, _ in items), tuple(label for _, label in items), classnames)
        for split, items in splits.items()
    }
    lists["train"].require_every_class()
    for split, images in lists.items():
        _warn_of_lacking([name for name, n in zip(classnames, images.counts, strict=True) if not n], split, json_file)
    return Dataset(json_file.stem.removeprefix("split_zhou_"), lists.get("train"), lists.get("val"), lists.get("test"))


# -- reading -----------------------------------------------------------------------------------------------------------


def _dataset(
    name: str, root: Path, splits: Mapping[str, Mapping[str, list[str]]], given: GivenNames, *, what: str
) -> Dataset:
    """The dataset of {split: {folder or label: files}}; ``what`` says which of both, for messages."""
    if "train" not in splits:
        raise ValueError(f"{root} must have training images, got only {', '.join(splits)}")
    keys = in_order(splits["train"])
    for split, classes in splits.items():
        if not classes.keys() <= set(keys):
            raise ValueError(f"{split} must have the classes of train in {root}, but {difference(keys, classes)}")
        _warn_of_lacking([key for key in keys if key not in classes], split, root)
    names = class_names(keys, given, what=what)
    hint_at_names(names)
    lists = {}
    for split, classes in splits.items():
        pairs = [(file, label) for label, key in enumerate(keys) for file in classes.get(key, ())]
        lists[split] = ImageList(root, tuple(file for file, _ in pairs), tuple(label for _, label in pairs), names)
    return Dataset(name, *(lists.get(split) for split in SPLITS))


def _renamed(data: Dataset, given: GivenNames) -> Dataset:
    """The dataset of a split file with other class names; {key: name} has the names before as keys.

    Without names that are given, those of the file are taken as they are.
    """
    names = data.classnames if given is None else class_names(data.classnames, given, what="class")
    hint_at_names(names)
    lists = {f"full_{split}": getattr(data, f"full_{split}") for split in SPLITS}
    return replace(data, **{split: images and replace(images, classnames=names) for split, images in lists.items()})


def _class_files(root: Path, parent: Path) -> dict[str, list[str]]:
    """{class folder in parent: sorted paths of its images relative to root}."""
    above = {folder_identity(root), folder_identity(parent)}
    classes = {}
    for name in subfolders(parent):
        files = images_below(parent / name, above)
        classes[name] = sorted(path.relative_to(root).as_posix() for path in files)
    if empty := [str(parent / name) for name, files in classes.items() if not files]:
        raise ValueError(
            f"class folder {listing(empty, most=3)} must hold at least one image, got none: add images, or remove the "
            "folder"
        )
    if not classes:
        raise ValueError(f"{parent} must hold one folder per class, got no folders")
    return classes


def _split_item(item: Any) -> tuple[str, int, str]:
    """(path, label, class name) of an entry in CoOp's split file; TypeError or ValueError for other values."""
    file, label, name = item
    if not (isinstance(item, list) and isinstance(file, str) and isinstance(name, str) and file and prettify(name)):
        raise TypeError
    return file, int(label) if isinstance(label, str) else operator.index(label), prettify(name)


def _warn_of_lacking(classes: Sequence[str], split: str, where: Path) -> None:
    """Warn about classes without images in val or test; accuracies are computed without them."""
    if classes:
        warn(f"{split} in {where} has no images of {some_of(classes)}: left out there", stacklevel=4)


# -- checks ------------------------------------------------------------------------------------------------------------


def _refuse_shares(val: float | None, test: float | None, reason: str) -> None:
    if val is not None or test is not None:
        raise ValueError(f"val and test must be None for data that is already split ({reason}), got {val} and {test}")
