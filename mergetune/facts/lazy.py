"""Packages whose public names are imported at their first use (PEP 562), so that light uses need no torch."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class _Face(ModuleType):
    """A package with public names that are imported at their first use."""

    _origins: Mapping[str, tuple[str, str]] = {}
    _packages: Collection[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name in self._origins:
            module, attribute = self._origins[name]
            value = getattr(import_module(module), attribute)
        elif name in self._packages:
            value = import_module(f"{self.__name__}.{name}")
        else:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a submodule on its package when it is imported; a public name stays the function.
        if not (isinstance(value, ModuleType) and name in self._origins):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._origins, *self._packages})


def make_lazy(package: str, names: Mapping[str, str], packages: Collection[str] = ()) -> None:
    """Make a package import its public names at their first use.

    Args:
        package: its name; it is being imported.
        names: module -> the public names that come from it, with spaces between; ``public=attribute`` where
            the package has another name for it than the module.
        packages: submodules that are public themselves.
    """
    face, origins = sys.modules[package], {}
    for module, found in names.items():
        for public in found.split():
            name, _, attribute = public.partition("=")
            origins[name] = module, attribute or name
    vars(face)["_origins"] = origins
    vars(face)["_packages"] = packages
    face.__class__ = _Face
