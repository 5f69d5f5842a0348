"""The mode-connectivity report: figures, tables, settings and versions in one self-contained HTML file."""

from __future__ import annotations

import platform
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import open_clip
import torch

from mergetune.evaluation.figures import DPI, plot, plot_plane, plot_spectrum
from mergetune.evaluation.paths import Path
from mergetune.evaluation.planes import Corner, Plane
from mergetune.evaluation.spectra import Spectrum
from mergetune.io import installed_version, write_atomically, writing_to

STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
body { overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; } img { display: block; max-width: 100%; height: auto; background: #fff; }
figcaption, caption { text-align: left; margin: .5rem 0; } caption { font-weight: 600; }
.table { overflow-x: auto; } .table:focus-visible { outline: 2px solid; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8886; text-align: right; overflow-wrap: normal; }
th { font-weight: 600; } th[scope=row], .word { text-align: left; }
@media print {
  :root { color-scheme: light; } body { max-width: none; padding: 0; font-size: 10pt; }
  h2, p { break-after: avoid; } figure, .table { break-inside: avoid; } img { max-height: 15cm; width: auto; }
  .table { overflow: visible; }
}
"""


def report(
    file: str | FilePath,
    paths: Mapping[str, Mapping[str, Path]],
    *,
    planes: Mapping[str, Plane] | None = None,
    spectra: Mapping[str, Spectrum] | None = None,
    title: str = "Mode connectivity",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes paths, planes and curvature as one self-contained HTML file with figures and tables.

    Args:
        file: the HTML file to write.
        paths: name of the images -> name of the path -> path, as :func:`connectivity` returns.
        planes: name of the images -> plane; None leaves the section out.
        spectra: name of the images -> curvature along the paths; None leaves the section out.
        title: heading of the report.
        settings: name -> value of the settings that the report lists, such as the backbone.

    Raises:
        ValueError: a set of images has no path.
    """
    file = FilePath(file)
    if not paths or not all(paths.values()):
        raise ValueError("paths must hold at least one path for every set of images, got none")
    sections = [_paths(paths)]
    sections += [_planes(planes)] if planes else []
    sections += [_spectra(spectra)] if spectra else []
    sections.append(_settings(settings or {}))
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_shown(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_shown(title)}</h1>
{"".join(sections)}</main>
</body>
</html>
"""
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing_to(file):
        write_atomically(file, text.encode())


def _paths(panels: Mapping[str, Mapping[str, Path]]) -> str:
    highest, images, name = max(
        (walked.barrier, images, name) for images, paths in panels.items() for name, walked in paths.items()
    )
    columns = ["images", "path", *(f"loss, {where}" for where in ("start", "highest", "end")), "barrier"]
    columns += [f"accuracy (%), {where}" for where in ("start", "lowest", "end")]
    rows = [
        (images, name, *_ends(walked.loss, max), f"{walked.barrier:.4f}", *_ends(walked.accuracy, min, 2))
        for images, paths in panels.items()
        for name, walked in paths.items()
    ]
    alt = f"Curves of cross-entropy and accuracy along {_listed(_names(panels))}, on {_listed(panels)}. "
    alt += f"The highest barrier is {highest:.4f}, from {name}, on {images}. The table has the figures."
    return f"""<section>
<h2>Straight paths</h2>
<p>The barrier is the largest rise of the loss above the chord between the two ends of a path (Entezari et al., arXiv
2110.06296). Two solutions are
linearly mode-connected if the straight path between them has no barrier, or almost none.</p>
{_figure(plot, panels, alt, "Loss and accuracy along the straight paths.")}
{_table("Cross-entropy and accuracy on the paths", columns, rows, words=2)}</section>
"""


def _planes(panels: Mapping[str, Plane]) -> str:
    rows = []
    for images, found in panels.items():
        loss, accuracy = np.array(found.loss), np.array(found.accuracy)
        points = dict(found.solutions)
        for name, best in (
            ("lowest loss on the grid", loss.argmin()),
            ("highest accuracy on the grid", accuracy.argmax()),
        ):
            y, x = np.unravel_index(best, loss.shape)
            points[name] = Corner(found.xs[x], found.ys[y], loss[y, x], accuracy[y, x])
        rows += [
            (images, name, *map(_number, p[:2]), f"{p.loss:.4f}", f"{p.accuracy:.2f}") for name, p in points.items()
        ]
    names = next(iter(panels.values())).solutions
    columns = ("images", "point", "x", "y", "cross-entropy", "accuracy (%)")
    alt = f"Contours of cross-entropy and accuracy over the plane through {_listed(names)}, on {_listed(panels)}. "
    alt += "The table has the coordinates, and where on the grid loss and accuracy are best."
    return f"""<section>
<h2>The plane through the three solutions</h2>
<p>The first solution is the origin, and the second lies on the x axis. Distances are Euclidean distances between the
interpolated parameters. The dotted triangle shows the straight paths of the first section.</p>
{_figure(plot_plane, panels, alt, "Loss and accuracy over the plane.")}
{_table("Points of the plane", columns, rows, words=2)}</section>
"""


def _spectra(panels: Mapping[str, Spectrum]) -> str:
    top = max(len(found.highest[0]) for found in panels.values())
    columns = ("images", "position", *(f"eigenvalue {k + 1}" for k in range(top)), "smallest", "trace", "± error")
    rows = []
    for images, found in panels.items():
        for i, position in enumerate(found.positions):
            at = found.solutions[int(position)] if position == int(position) else f"{position:.2f}"
            values = (found.lowest[i], found.trace[i], found.trace_error[i], found.gradient[i])
            highest = [*map(_number, found.highest[i])]
            rows.append((images, at, *highest, *[""] * (top - len(highest)), *map(_number, values)))
    sizes = sorted({found.size for found in panels.values()})
    names = next(iter(panels.values())).solutions
    alt = f"Curves of the extreme eigenvalues and the trace of the Hessian on the way through {_listed(names)}, on "
    alt += f"{_listed(panels)}. The table has the figures."
    return f"""<section>
<h2>Curvature on the way</h2>
<p>The eigenvalues are those of the Hessian of the cross-entropy with respect to the interpolated parameters
({_listed(f"{size:,}" for size in sizes)} numbers). The Lanczos method gives the largest and the smallest eigenvalue,
and random vectors give an estimate of the trace, the sum of all eigenvalues. A large eigenvalue belongs to a direction
in which the loss bends up sharply, a negative one to a direction in which the loss bends down. Eigenvalues depend on
the scale of the parameters: compare them along the path only. Positions:
{_shown(", ".join(f"{i} is {name}" for i, name in enumerate(names)))}.</p>
{_figure(plot_spectrum, panels, alt, "Extreme eigenvalues and trace of the Hessian along the way.")}
{_table("Curvature", (*columns, "norm of the gradient"), rows, words=2)}</section>
"""


def _settings(settings: Mapping[str, Any]) -> str:
    versions = {
        "mergetune": installed_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "scipy": installed_version("scipy"),
        "python": platform.python_version(),
    }
    rows = [(name, _setting(value)) for name, value in settings.items()]
    table = _table("Settings", ("setting", "value"), rows, words=2) if rows else ""
    return f"""<section>
<h2>How it was made</h2>
{table}{_table("Versions", ("package", "version"), list(versions.items()), words=2)}</section>
"""


def _figure(draw: Callable[..., None], panels: Mapping[str, Any], alt: str, caption: str) -> str:
    image = BytesIO()
    draw(panels, image)
    data = b64encode(image.getvalue()).decode()
    width, height = (int.from_bytes(image.getvalue()[i : i + 4], "big") * 96 // DPI for i in (16, 20))
    return f"""<figure>
<img alt="{_shown(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">
<figcaption>{_shown(caption)}</figcaption>
</figure>"""


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """An HTML table whose first ``words`` columns are text; the first column holds the headings of the rows."""
    head = "".join(
        f'<th scope="col"{" class=word" * (i < words)}>{_shown(name)}</th>' for i, name in enumerate(columns)
    )
    body = ""
    for row in rows:
        cells = [f"<td{' class=word' * (i < words)}>{_shown(cell)}</td>" for i, cell in enumerate(row)]
        cells[0] = f'<th scope="row">{_shown(row[0])}</th>'
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f"""<div class="table" role="region" aria-label="{_shown(caption)}" tabindex="0">
<table>
<caption>{_shown(caption)}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
</div>
"""


def _ends(values: Sequence[float], extreme: Callable[..., float], digits: int = 4) -> list[str]:
    return [f"{value:.{digits}f}" for value in (values[0], extreme(values), values[-1])]


def _names(panels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for panel in panels.values() for name in panel))


def _listed(names: Iterable[str]) -> str:
    """The names as text: "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _number(value: float) -> str:
    return f"{value:#.4g}"


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _shown(text: str) -> str:
    """A text escaped for HTML; characters that cannot be printed become spaces."""
    return escape("".join(c if c.isprintable() else " " for c in text))
