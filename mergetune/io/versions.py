"""Versions of installed packages."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str = "mergetune", *, otherwise: str = "unknown") -> str:
    """The version of an installed package, or ``otherwise`` if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise
