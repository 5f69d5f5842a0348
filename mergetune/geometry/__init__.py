"""The loss around solutions: along straight paths, over planes, its curvature, the figures and the report of them."""

from mergetune.geometry.figures import plot, plot_plane, plot_spectrum
from mergetune.geometry.html import report
from mergetune.geometry.paths import Path, connectivity, cross_entropy, path
from mergetune.geometry.planes import Plane, plane
from mergetune.geometry.spectra import Spectrum, hessian, spectrum

__all__ = [
    "Path",
    "Plane",
    "Spectrum",
    "connectivity",
    "cross_entropy",
    "hessian",
    "path",
    "plane",
    "plot",
    "plot_plane",
    "plot_spectrum",
    "report",
    "spectrum",
]
