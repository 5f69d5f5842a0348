"""Image files and folders on disk: listing images, counting other files, and checks that files exist."""

from __future__ import annotations

import functools
import os
import posixpath
import reprlib
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetune.io import image_extensions
from mergetune.io.images import HEIC, HEIC_HINT

# Folders that systems and storages make beside images: copies of metadata, thumbnails, and what was deleted.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__")
)


def leaves_root(file: str) -> bool:
    """Whether a path in a list is absolute, or leads out of the folder that it is relative to."""
    return posixpath.isabs(file) or (".." in file and posixpath.normpath(file).split("/", 1)[0] == "..")


def require_files(root: Path, files: Sequence[str], table: Path, *, way_on: str = "") -> None:
    """Checks that listed images exist below root.

    Args:
        root: folder that ``files`` are relative to.
        files: paths of the images.
        table: the file that lists the images, for messages.
        way_on: what to do about missing images, for messages.

    Raises:
        FileNotFoundError: images are missing; the message names their number and the first.
    """
    if missing := missing_files(root, files):
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images listed in {table} are missing, the first is {root / missing[0]}"
            + (f": {way_on}" if way_on else "")
        )


def missing_files(root: Path, files: Sequence[str]) -> list[str]:
    """The paths below root without a file. Each folder is listed once, which is faster than a look-up per image."""
    names: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = posixpath.split(file)
        if folder not in names:
            names[folder] = _file_names(os.path.join(root, folder))
        # A file system may accept another spelling of a name (case, Unicode form), so isfile decides.
        if name not in names[folder] and not os.path.isfile(os.path.join(root, file)):
            missing.append(file)
    return missing


def subfolders(parent: str | Path) -> list[str]:
    """Sorted names of the folders in ``parent``, without hidden ones and those of systems."""
    with os.scandir(parent) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name))


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder.lower() in SYSTEM_FOLDERS


def image_names(folder: str | Path) -> list[str]:
    """Sorted names of the images in a folder, recognised by extension, without hidden files.

    FIFOs, devices and sockets are left out. Broken links are included: reading such an image reports the error.
    """
    extensions = _extensions()
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(extensions)
            and not entry.name.startswith(".")
            and (entry.is_file() or not os.path.exists(entry.path))
        )


@functools.cache
def _extensions() -> tuple[str, ...]:
    return tuple(image_extensions())


def has_images(folder: str | Path) -> bool:
    """Whether a folder or one of its subfolders holds an image; looks no further than the first. Links are followed."""
    seen, left = set(), [os.fspath(folder)]
    while left:
        here = left.pop()
        if (identity := folder_identity(here)) in seen:
            continue
        seen.add(identity)
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir():
                    left += [] if _is_hidden(entry.name) else [entry.path]
                elif entry.name.lower().endswith(_extensions()) and not entry.name.startswith("."):
                    return True
    return False


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
            if not _is_hidden(name) and identity not in seen:
                seen.add(identity)
                fresh.append(name)
        folders[:] = fresh
        found += [Path(here, name) for name in image_names(here)]
    return found


def ignored_files(folder: str | Path, used: Collection[str] | None = None) -> dict[str, int]:
    """Files in a folder that are no images, or not used: type, such as ".txt", -> number. Links are not followed.

    Hidden files are counted as hidden, devices and FIFOs as not regular. Hidden folders and those of systems are not
    entered.

    Args:
        folder: the folder.
        used: paths of the images that are used, relative to ``folder``; None counts no image.
    """
    found: Counter[str] = Counter()
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in names:
            path = os.path.join(here, name)
            if kind := _kind_of_ignored(path, name):
                found[kind] += 1
            elif used is not None and os.path.relpath(path, folder) not in used:
                found["image in no class folder"] += 1
    return dict(sorted(found.items()))


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """One line about ignored files, the most frequent types first; empty text if there are none."""
    if not ignored:
        return ""
    kinds = sorted(ignored.items(), key=lambda pair: (-pair[1], pair[0]))
    line = f"ignored {sum(ignored.values()):,}: {', '.join(f'{kind} ({number:,})' for kind, number in kinds)}"
    if any(kind in HEIC for kind in ignored):
        line += f"; {HEIC_HINT}"
    return line


def _kind_of_ignored(path: str, name: str) -> str:
    """The type of a file that is no image; empty text for an image."""
    if name.startswith("."):
        return "hidden"
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        regular = True  # a broken link: where its name says that it is an image, reading it reports the error
    if not regular:
        return "not a regular file"
    extension = os.path.splitext(name)[1].lower()
    return "" if extension in _extensions() else extension or "without extension"


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
