"""Which folders are classes and which are splits: spellings of train, val and test, and folders around them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mergetune.data.image_files import image_names, subfolders
from mergetune.data.image_lists import SPLITS, some_of

MAX_WRAPPING = 4  # folders in folders that are passed on the way to the classes
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}  # fmt: skip


def unwrapped(root: Path) -> Path:
    """The folder below ``root`` that holds the classes or splits: folders with nothing but one folder are passed."""
    inner = root
    for _ in range(MAX_WRAPPING):
        folders = subfolders(inner)
        if len(folders) != 1 or image_names(inner) or _split_of(folders[0]):
            break
        below = inner / folders[0]
        if image_names(below) or not subfolders(below):
            break
        inner = below
    if not subfolders(inner):
        where = "it" if inner == root else str(inner)
        raise ValueError(f"root must hold one folder per class, got {root}: {where} holds no folders")
    return inner


def _split_of(folder: str) -> str | None:
    """The split that a folder's name stands for: train for "Training", "train_set", ...; None for other names."""
    word = re.sub(r"[^a-z]", "", folder.lower())
    word = re.sub(r"(set|data|images|split)$", "", word) or word
    return next((split for split, words in SPLIT_NAMES.items() if word in words), None)


def split_folders(parent: Path) -> dict[str, str]:
    """{split: folder}, if the folders in ``parent`` are splits; empty if they are classes."""
    folders, found = subfolders(parent), defaultdict(list)
    for name in folders:
        if split := _split_of(name):
            found[split].append(name)
    named, others = [n for names in found.values() for n in names], [n for n in folders if _split_of(n) is None]
    if not named or (len(named) == 1 and others):  # one name such as "train" among others is a class
        _refuse_repeated(parent, folders)
        return {}
    if others:
        raise ValueError(
            f"{parent} must hold only train, val and test, or only classes, got {some_of(others)} in addition to "
            f"{', '.join(named)}"
        )
    for split, names in found.items():
        if len(names) > 1:
            raise ValueError(f"{parent} must hold one folder for {split}, got {' and '.join(names)}")
    if "train" not in found and len(named) == 1:
        return {}
    if "train" not in found:
        raise ValueError(f"{parent} must hold training images, got only the folders {' and '.join(named)}")
    return {split: found[split][0] for split in SPLITS if split in found}


def _refuse_repeated(parent: Path, folders: Sequence[str]) -> None:
    """Refuse folders that all hold the same two or more subfolders and no images: these are splits or folds."""
    if len(folders) < 2:
        return
    inside = [subfolders(parent / name) for name in folders]
    repeated = len(inside[0]) > 1 and all(names == inside[0] for names in inside)
    if repeated and not any(image_names(parent / name) for name in folders):
        raise ValueError(
            f"{parent} must hold one folder per class, but {some_of(folders)} hold the same folders "
            f"{some_of(inside[0])}, which look like the classes: rename them to train, val and test, or give a .csv "
            "list with the columns path and label"
        )
