"""Versions of installed packages."""

import platform
from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str = "mergetune", *, otherwise: str = "unknown") -> str:
    """The version of an installed package, or ``otherwise`` if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def own_versions() -> dict[str, str]:
    """The versions of Python, mergetune and the packages that compute, for records of results."""
    packages = ("mergetune", "torch", "open_clip_torch")
    return {"python": platform.python_version(), **{name: installed_version(name) for name in packages}}
