"""Packages that import their public names at first use (PEP 562), so that --help and lists need no torch."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class _Face(ModuleType):
    """A package that imports its public names at first use."""

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
        # Importing a submodule sets it on its package. A public name must stay the function of that name.
        if not (isinstance(value, ModuleType) and name in self._origins):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._origins, *self._packages})


def make_lazy(package: str, names: Mapping[str, str], packages: Collection[str] = ()) -> None:
    """Makes a package import its public names at first use.

    Args:
        package: name of the package; its ``__init__`` makes the call.
        names: module -> its public names, separated by spaces. ``public=attribute`` gives the package's name of an
            attribute that has another name in the module.
        packages: names of the package's public submodules.
    """
    face, origins = sys.modules[package], {}
    for module, found in names.items():
        for public in found.split():
            name, _, attribute = public.partition("=")
            origins[name] = module, attribute or name
    vars(face)["_origins"] = origins
    vars(face)["_packages"] = packages
    face.__class__ = _Face
