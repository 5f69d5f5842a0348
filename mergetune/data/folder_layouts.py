"""Which folders are classes and which are splits: spellings of train, val and test, and folders around them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from warnings import warn

from mergetune.data.image_files import has_images, image_names, subfolders
from mergetune.data.image_lists import SPLITS, some_of

MAX_WRAPPING = 4  # folders in folders that are passed on the way to the classes
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst", "evaluation", "eval"),
}  # fmt: skip
_ENDINGS = re.compile(r"(sets?|data|dataset|images?|imgs?|pictures|photos|split|folder)$")
# Names of folders that hold the parts of a dataset; alone or together they are no classes.
PARTS = {
    *("data", "dataset", "image", "images", "img", "imgs", "jpg", "jpeg", "jpegs", "photos", "pictures", "png"),
    *("annotation", "annotations", "label", "labels", "list", "lists", "mask", "masks", "meta", "metadata"),
    *("segmentation", "segmentations", "trimaps"),
}
COOP_SPLITS = "split_zhou_*.json"


def unwrapped(root: Path) -> Path:
    """The folder below ``root`` that holds the classes or splits.

    A folder with one folder in it is passed. So is one in which a single folder holds images, in folders of its own,
    and all others hold only other files, such as annotations.
    """
    _refuse_benchmarks(root)
    inner = root
    for _ in range(MAX_WRAPPING):
        folders = subfolders(inner)
        if not folders or image_names(inner) or _splits_among(folders):
            break
        held = folders if len(folders) == 1 else _with_images_alone(inner, folders)
        if len(held) != 1 or image_names(inner / held[0]) or not subfolders(inner / held[0]):
            break
        inner = inner / held[0]
    folders = subfolders(inner)
    if not folders:
        where = "it" if inner == root else str(inner)
        raise ValueError(
            f"root must hold one folder per class, got {root}: {where} holds no folders{_lists_in(inner, root)}"
        )
    if all(_plain(name) in PARTS for name in folders):
        raise ValueError(
            f"root must hold one folder per class, got {root} with {some_of(folders)}, which are parts of a dataset: "
            f"give a list with the columns path and label{_lists_in(inner, root)}"
        )
    _warn_of_lists(root)
    return inner


def split_of(name: str) -> str | None:
    """The split that a folder's name or a word in a table stands for: train for "Training", "train_set", ...; or None.

    Numbers do not count: "train2017" is train.
    """
    word = re.sub(r"[^a-z]", "", name.lower())
    while word not in SPLIT_OF and (shorter := _ENDINGS.sub("", word)) not in ("", word):
        word = shorter
    return SPLIT_OF.get(word)


SPLIT_OF = {word: split for split, words in SPLIT_NAMES.items() for word in words}


def split_folders(parent: Path) -> dict[str, str]:
    """{split: folder}, if the folders in ``parent`` are splits; empty if they are classes."""
    folders = subfolders(parent)
    named = _splits_among(folders)
    others = [name for name in folders if name not in named]
    if len(named) == 1 and others:  # one name such as "train" among others is a class, unless the others hold nothing
        others = [name for name in others if has_images(parent / name)]
    if not named or (len(named) == 1 and others):
        _check_depth(parent, folders)
        return {}
    if others := [name for name in others if has_images(parent / name)]:
        raise ValueError(
            f"{parent} must hold only train, val and test, or only classes, got {some_of(others)} in addition to "
            f"{', '.join(named)}"
        )
    found = defaultdict(list)
    for name, split in named.items():
        found[split].append(name)
    for split, names in found.items():
        if len(names) > 1:
            raise ValueError(f"{parent} must hold one folder for {split}, got {' and '.join(names)}")
    if "train" not in found and len(named) == 1:
        return {}
    if "train" not in found:
        raise ValueError(f"{parent} must hold training images, got only the folders {' and '.join(named)}")
    return {split: found[split][0] for split in SPLITS if split in found}


def class_parent(folder: Path) -> Path:
    """The folder with the classes of a split: the split's folder, or the one in it that repeats its name.

    Raises:
        ValueError: the folder holds images in no folders, so their classes are unknown.
    """
    folders = subfolders(folder)
    if len(folders) == 1 and not image_names(folder):
        (name,) = folders
        if (name == folder.name or split_of(name) or _plain(name) in PARTS) and subfolders(folder / name):
            return folder / name
    if not folders or all(_plain(name) in PARTS for name in folders):
        raise ValueError(
            f"{folder} must hold one folder per class, got {'images' if has_images(folder) else 'none'} without class "
            "folders: images without labels belong elsewhere (`mergetune predict` classifies them); labelled ones need "
            f"a list with the columns path, label and split{_lists_in(folder)}"
        )
    return folder


def _splits_among(folders: Sequence[str]) -> dict[str, str]:
    """{folder: split} of the folders that are splits: Training and Testing, or seg_train and seg_test."""
    plain = {name: split for name in folders if (split := split_of(name))}
    if plain:
        return plain
    by_beginning: dict[str, dict[str, str]] = defaultdict(dict)
    for name in folders:
        beginning, _, end = re.sub(r"[^a-z]+", " ", name.lower()).strip().rpartition(" ")
        if beginning and (split := split_of(end)):
            by_beginning[beginning][name] = split
    return next((found for found in by_beginning.values() if {"train"} < set(found.values())), {})


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _with_images_alone(parent: Path, folders: Sequence[str]) -> list[str]:
    """The folders with images, if all others hold other files; folders that hold nothing may be classes."""
    held = [name for name in folders if has_images(parent / name)]
    others = (parent / name for name in folders if name not in held)
    return held if all(any(files for _, _, files in os.walk(folder)) for folder in others) else []


def _check_depth(parent: Path, folders: Sequence[str]) -> None:
    """Check that classes do not lie one level deeper, in folders that all hold two or more folders and no images.

    Equal names inside are splits or folds, and are refused. With other names a warning says what the classes are, as
    for SUN397's folders a/abbey.
    """
    inside = [subfolders(parent / name) for name in folders]
    if not all(len(names) > 1 for names in inside) or any(image_names(parent / name) for name in folders):
        return
    if len(folders) > 1 and all(names == inside[0] for names in inside):
        raise ValueError(
            f"{parent} must hold one folder per class, but {some_of(folders)} hold the same folders "
            f"{some_of(inside[0])}, which look like the classes: rename them to train, val and test, or give a .csv "
            "list with the columns path and label"
        )
    warn(
        f"the classes are the {len(folders)} folders in {parent}, such as {folders[0]!r}; the folders in them, such as "
        f"{inside[0][0]!r}, are no classes: give a list with the columns path and label if they should be",
        stacklevel=4,
    )


# -- benchmark datasets and lists beside the folders -------------------------------------------------------------------


def _refuse_benchmarks(root: Path) -> None:
    """Refuse CoOp's folder of all datasets, whose folders are no classes."""
    folders = [name for name in subfolders(root) if _plain(name) not in PARTS]
    if found := [name for name in folders if any((root / name).glob(COOP_SPLITS))]:
        raise ValueError(
            f"root must hold one folder per class, got {root} with the benchmark datasets {some_of(found)}: give the "
            f"name of one, with --root {root}; in Python mergetune.CoOpDataset(NAME, root)"
        )


def _lists(*folders: Path) -> list[Path]:
    patterns = (COOP_SPLITS, "*.csv", "*.tsv", "*.jsonl")
    return [path for folder in dict.fromkeys(folders) for pattern in patterns for path in sorted(folder.glob(pattern))]


def _lists_in(*folders: Path) -> str:
    """What a message adds where a list of the images may lie in the folder."""
    found = _lists(*folders)
    return f"; {found[0]} may be such a list: give it instead of the folder" if found else ""


def _warn_of_lists(root: Path) -> None:
    if found := sorted(root.glob(COOP_SPLITS)):
        warn(f"{found[0]} is not used: give this file instead of the folder for the published split", stacklevel=4)
