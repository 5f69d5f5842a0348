"""A clone that was not built in place: its Triton kernels, and the compiled core of the installed mergetune.

After ``pip install .``, Python in the clone imports the source folder, where the core is missing and the kernels lie
elsewhere. The core that was installed is used if it was built from the C++ sources of the clone. This file imports
nothing of mergetune, because setup.py runs it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

SOURCES = (".cpp", ".h", ".cu")


def source_tree() -> Path | None:
    """Returns the folder of the clone that this package is imported from; None if the package is installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "csrc").is_dir() and (root / "CMakeLists.txt").is_file() else None


def digest_of_sources(root: Path) -> str:
    """Returns a digest of all files that the core is built from: CMakeLists.txt and csrc without its tests."""
    files = [file for file in (root / "csrc").rglob("*") if file.suffix in SOURCES]
    inside = {file.relative_to(root).as_posix(): file for file in [root / "CMakeLists.txt", *files]}
    digest = hashlib.sha256()
    for name in sorted(name for name in inside if not name.startswith("csrc/tests/")):
        digest.update(name.encode() + b"\0" + hashlib.sha256(inside[name].read_bytes()).digest())
    return digest.hexdigest()[:16]


def complete_source_tree() -> None:
    """Makes ``mergetune._C`` and ``mergetune.kernels`` importable in a clone; does nothing in an installed package."""
    if source_tree() and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def check_core(core: ModuleType) -> None:
    """Checks that a core from outside the clone was built from the C++ sources of the clone.

    Raises:
        ImportError: the core was built from other sources.
    """
    root = source_tree()
    if root is None or Path(str(core.__file__)).resolve().is_relative_to(root / "mergetune"):
        return
    if core.build_info().get("sources") != digest_of_sources(root):
        raise ImportError(
            f"mergetune is imported from the source folder {root}, whose C++ files differ from those of the installed "
            f"core {core.__file__}. Run `pip install .` again in {root}, or start Python in another folder to use the "
            "installed version."
        )


def why_no_core(error: ImportError) -> str:
    """Returns the message for a core that cannot be imported."""
    root = source_tree()
    if root is not None and find_spec("mergetune._C") is None:
        return (
            f"mergetune is imported from the source folder {root}, which has no compiled core, and no mergetune is "
            f"installed for this Python ({sys.executable}). Run `pip install .` in {root}; this needs only a C++17 "
            "compiler."
        )
    return (
        f"mergetune's native core could not be loaded ({error}). Build it with `pip install .` in the source tree "
        "(this needs only a C++17 compiler), or reinstall the wheel: `pip install --force-reinstall mergetune`."
    )


class _Finder(MetaPathFinder):
    """The last finder: it is asked for what is neither in the source folder nor in an editable installation."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "mergetune._C":
            return _installed_core()
        if fullname == "mergetune.kernels" and (root := source_tree()):
            folder = root / "kernels"
            return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])
        return None


def _installed_core() -> ModuleSpec | None:
    """The core for this Python in the first installed mergetune on sys.path."""
    here = Path(__file__).resolve().parents[1]
    folders = [Path(entry or ".").resolve() / "mergetune" for entry in sys.path]
    return PathFinder.find_spec("mergetune._C", [str(folder) for folder in folders if folder != here])
