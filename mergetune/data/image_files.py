"""Image files and folders on disk: listing images, and checks that files exist."""

from __future__ import annotations

import os
import posixpath
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mergetune.io import image_extensions


def prettify(name: str) -> str:
    """A folder's name as a class name: ``shopping_cart`` -> "shopping cart"."""
    return " ".join(name.replace("_", " ").split())


def leaves_root(file: str) -> bool:
    """Whether a path in a list is absolute, or leads out of the folder that it is relative to."""
    return posixpath.isabs(file) or (".." in file and posixpath.normpath(file).split("/", 1)[0] == "..")


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


def images_below(folder: str | Path, above: Collection[tuple[int, int]] = ()) -> list[Path]:
    """Images in a folder and its subfolders, without hidden folders. Links are followed.

    Args:
        folder: the folder.
        above: identities of folders that are not entered. No folder is entered twice, so links cannot form loops.

    Raises:
        OSError: a folder cannot be listed.
    """
    seen = {*above, folder_identity(folder)}
    found = []
    for here, folders, _ in os.walk(folder, followlinks=True, onerror=_raise):
        fresh = []
        for name in sorted(folders):
            identity = folder_identity(os.path.join(here, name))
            if not name.startswith(".") and identity not in seen:
                seen.add(identity)
                fresh.append(name)
        folders[:] = fresh
        found += [Path(here, name) for name in image_names(here)]
    return found


def folder_identity(folder: str | Path) -> tuple[int, int]:
    """Device and number of a folder: equal for two paths of one folder."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _raise(error: OSError) -> None:
    raise error


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # the folder does not exist, or the system does not allow its name
        return set()


def brief(value: Any) -> str:
    return reprlib.repr(value)  # short for values of any depth and length
