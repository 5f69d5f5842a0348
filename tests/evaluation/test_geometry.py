"""Planes, curvature and the report: against exact Hessians, points made by hand, and a parser of HTML."""

import base64
import functools
import io
import json
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import NAMES, TEXT, VISION, cache, head, parameter, prompt, tiny_model, with_parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

import mergetune
from mergetune import FeatureCache, FrozenClip, Head, evaluate, path
from mergetune.cli import app, measuring
from mergetune.evaluation import (
    Path,
    connectivity,
    plane,
    plot,
    plot_plane,
    plot_spectrum,
    report,
    spectrum,
)
from mergetune.evaluation.planes import Corner, Plane
from mergetune.evaluation.spectra import Spectrum, hessian

SPACES = ("embedding", "parameter")


@functools.cache
def build_clip() -> FrozenClip:
    model = tiny_model()
    with torch.no_grad():
        for tensor in model.transformer.parameters():  # biases and scales that matter
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
        model.ln_final.weight.add_(torch.randn(16), alpha=0.3)
        model.ln_final.bias.add_(torch.randn(16), alpha=0.3)
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=16), "tiny")


@pytest.fixture
def clip():
    return build_clip()


@functools.cache
def features(count: int = 60) -> FeatureCache:
    return cache(count)


KINDS = {"prompt": prompt, "class-specific": lambda seed=1: prompt(seed).per_class(NAMES), "head": head}


# -- the Hessian ------------------------------------------------------------------------------------------------------


def exact_loss(clip: FrozenClip, solution, space: str):
    """Cross-entropy as a function of what is interpolated, and the point: open_clip's own tower, float64."""
    x, labels = features().tensor().double(), features().labels
    if isinstance(solution, Head):
        x = torch.cat([x, torch.ones(len(x), 1)], 1) if solution.bias is not None else x
        return lambda w: F.cross_entropy(solution.logit_scale * x @ w.T, labels), parameter(solution).double()
    model = deepcopy(clip.model).double()
    tokens = clip.tokenize([f"X X X X {name}." for name in NAMES])

    def encode(ctx: torch.Tensor) -> torch.Tensor:
        texts = model.token_embedding(tokens)
        texts = torch.cat([texts[:, :1], ctx.expand(len(tokens), 4, 16), texts[:, 5:]], 1) + model.positional_embedding
        out = model.ln_final(model.transformer(texts, attn_mask=model.attn_mask))
        return out[torch.arange(len(tokens)), tokens.argmax(-1)] @ model.text_projection

    def loss(weights: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(clip.logit_scale * x @ F.normalize(weights, dim=-1).T, labels)

    if space == "embedding":  # class weights that are interpolated are float32
        return loss, solution.class_weights(clip, NAMES).double()
    return lambda ctx: loss(encode(ctx)), solution.ctx.double()


@functools.cache
def exact(kind: str, space: str, seed: int = 1) -> np.ndarray:
    loss, point = exact_loss(build_clip(), KINDS[kind](seed), space)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        found = torch.autograd.functional.hessian(loss, point)
    return found.reshape(point.numel(), point.numel()).numpy()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_hessian_is_the_exact_one(clip, kind, space):
    expected = exact(kind, space)
    if (kind, space) == ("head", "parameter"):  # the state is the weight, then the bias; not row by row
        order = np.arange(27).reshape(3, 9)
        order = np.concatenate([order[:, :8].ravel(), order[:, 8]])
        expected = expected[np.ix_(order, order)]
    operator = hessian(clip, KINDS[kind](), features(), space=space)
    assert operator.shape == expected.shape and operator.dtype == np.float64
    found, close = operator @ np.eye(len(expected)), 1e-9 * abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=close)
    np.testing.assert_allclose(found, found.T, rtol=0, atol=close)
    v = np.random.default_rng(0).standard_normal(len(expected))
    for size in (1e-6, 1.0, 1e6):
        np.testing.assert_allclose(operator @ (size * v), size * expected @ v, rtol=0, atol=30 * size * close)
    assert not (operator @ np.zeros(len(v))).any()


def test_the_hessian_in_parts_of_the_images(clip, monkeypatch):
    monkeypatch.setattr("mergetune.evaluation.spectra.ROWS", 7)
    found = hessian(clip, prompt(), features(), space="parameter") @ np.eye(64)
    expected = exact("prompt", "parameter")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * abs(expected).max())


def test_the_hessian_through_a_tower_with_a_linear_projection(clip):
    """A last layer norm that works in float32 alone, and a projection with a bias."""
    model = open_clip.CustomTextCLIP(8, VISION, {**TEXT, "proj_bias": True}, cast_dtype=torch.bfloat16)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.text.text_projection.bias)
    other = FrozenClip(model, clip.tokenizer, "linear")
    found = hessian(other, prompt(), features(), space="parameter") @ np.eye(64)
    assert abs(found - found.T).max() < 1e-12 * abs(found).max()  # rounded to float32 anywhere, it is no such thing


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["prompt", "head"])
def test_the_spectrum_is_that_of_the_exact_hessian(clip, kind, space):
    way = {name: KINDS[kind](seed) for name, seed in (("one", 1), ("two", 2), ("three", 3))}
    found = spectrum(clip, way, features(), points=2, top=4, tol=1e-7, probes=8, space=space)
    assert found.positions == (0, 1, 2) and found.solutions == ("one", "two", "three")
    for i, seed in enumerate((1, 2, 3)):
        values = np.linalg.eigvalsh(exact(kind, space, seed))
        extent = values[-1] - values[0]
        np.testing.assert_allclose(found.highest[i], values[:-5:-1], atol=1e-5 * extent)
        assert found.lowest[i] == pytest.approx(values[0], abs=1e-5 * extent)
        assert abs(found.trace[i] - values.sum()) < 5 * found.trace_error[i]
        loss, point = exact_loss(clip, KINDS[kind](seed), space)
        slope = torch.autograd.functional.jacobian(loss, point).norm().item()
        assert found.gradient[i] == pytest.approx(slope, rel=1e-5)
    assert found.size == len(values) and json.loads(json.dumps(found.to_json()))["size"] == found.size


def test_the_trace_is_unbiased_and_its_error_is_true(clip):
    way = {"a": prompt(1), "b": prompt(2)}
    truth = np.trace(exact("prompt", "parameter"))
    few = [spectrum(clip, way, features(), points=2, probes=4, space="parameter", seed=seed) for seed in range(5)]
    off = np.array([found.trace[0] - truth for found in few])
    assert (off > 0).any() and (off < 0).any()
    error = np.mean([found.trace_error[0] for found in few])
    assert 0.3 * error < np.sqrt((off**2).mean()) < 3 * error
    again = spectrum(clip, way, features(), points=2, probes=4, space="parameter", seed=4)
    assert again == few[4]


def test_between_two_solutions_the_spectrum_is_that_of_their_mixture(clip):
    a, b = head(1), head(2, scale=5.0)
    found = spectrum(clip, {"a": a, "b": b}, features(), points=5, top=1, tol=1e-7)
    assert found.positions == (0, 0.25, 0.5, 0.75, 1)
    mixed = mergetune.interpolate(a, b, 0.25)
    operator = hessian(clip, mixed, features())
    assert found.highest[1][0] == pytest.approx(np.linalg.eigvalsh(operator @ np.eye(27))[-1], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solutions": {"a": prompt()}}, "solutions must be at least 2, got 1"),
        ({"points": 1}, "points must be at least 2, for both ends, got 1"),
        ({"probes": 1}, "probes must be at least 2, got 1"),
        ({"top": 0, "space": "parameter"}, r"top must lie in \[1, 63\], below the number of eigenvalues, got 0"),
        ({"top": 24}, r"top must lie in \[1, 23\]"),
        ({"space": "weights"}, "space must be one of embedding, parameter, got 'weights'"),
    ],
)
def test_spectra_that_make_no_sense_are_refused(clip, arguments, message):
    with pytest.raises(ValueError, match=message):
        spectrum(clip, **{"solutions": {"a": prompt(1), "b": prompt(2)}, "features": features(), **arguments})


def test_lanczos_that_does_not_converge_says_what_to_do(clip, monkeypatch):
    monkeypatch.setattr("mergetune.evaluation.spectra.RESTARTS", 1)
    with pytest.raises(RuntimeError, match="tol must be larger, got 1e-14"):
        spectrum(clip, {"a": prompt(1), "b": prompt(2)}, features(), tol=1e-14, space="parameter")


# -- planes -----------------------------------------------------------------------------------------------------------


def point_of(clip, solution, space) -> torch.Tensor:
    return (solution.class_weights(clip, NAMES) if space == "embedding" else parameter(solution)).double()


def values_at(clip, like, point, space) -> tuple[float, float]:
    """Loss and accuracy of a point, by the library's own solutions, one at a time."""
    if isinstance(like, Head):
        x = torch.cat([features().tensor(), torch.ones(60, 1)], 1).double()
        logits = like.logit_scale * x @ point.T
    else:
        weights = point if space == "embedding" else with_parameter(like, point).class_weights(clip, NAMES).double()
        logits = clip.logit_scale * features().tensor().double() @ F.normalize(weights, dim=-1).T
    right = (logits.argmax(-1) == features().labels).double().mean()
    return F.cross_entropy(logits, features().labels).item(), 100 * right.item()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plane_is_what_its_coordinates_say(clip, kind, space):
    """Every grid point is rebuilt from the three solutions by its coordinates, and measured by itself."""
    three = {name: KINDS[kind](seed) for name, seed in (("zero-shot", 1), ("tuned", 2), ("merged", 3))}
    found = plane(clip, three, features(), points=4, space=space, margin=0.5)
    ends = [point_of(clip, solution, space) for solution in three.values()]
    corners = np.array([corner[:2] for corner in found.solutions.values()])
    for i, j in ((0, 1), (1, 2), (2, 0)):  # distances are kept
        assert np.linalg.norm(corners[i] - corners[j]) == pytest.approx((ends[i] - ends[j]).norm().item(), rel=1e-5)
    assert corners[0].tolist() == [0, 0] and corners[1, 0] > 0 and corners[1, 1] == 0 and corners[2, 1] > 0
    for name, solution in three.items():
        assert found.solutions[name].accuracy == evaluate(clip, solution, features()).accuracy
    weights = np.linalg.inv(np.vstack([corners.T, np.ones(3)]))  # barycentric
    for row, y in enumerate(found.ys):
        for column, x in enumerate(found.xs):
            mixed = sum(w * end for w, end in zip(weights @ (x, y, 1), ends, strict=True))
            loss, accuracy = values_at(clip, list(three.values())[-1], mixed, space)
            assert found.loss[row][column] == pytest.approx(loss, rel=1e-4)
            assert found.accuracy[row][column] == pytest.approx(accuracy, abs=100 / 60 + 1e-9)  # one image at a tie


def test_the_grid_is_square_and_holds_the_triangle(clip):
    three = {"a": prompt(1), "b": prompt(2), "c": prompt(3)}
    found = plane(clip, three, features(), points=5, margin=0.25)
    steps = np.diff(found.xs), np.diff(found.ys)
    np.testing.assert_allclose(np.concatenate(steps), steps[0][0])
    assert min(*steps[0], *steps[1]) > 0
    corners = np.array([corner[:2] for corner in found.solutions.values()])
    extent = np.ptp(corners, 0).max()
    room = [corners.min(0)[0] - found.xs[0], corners.min(0)[1] - found.ys[0]]
    room += [found.xs[-1] - corners.max(0)[0], found.ys[-1] - corners.max(0)[1]]
    assert min(room) == pytest.approx(0.25 * extent)
    told = json.loads(json.dumps(found.to_json()))
    assert told["solutions"]["b"]["x"] == found.solutions["b"].x and len(told["loss"]) == 5


def test_the_corners_of_a_plane_are_the_ends_of_the_paths(clip):
    a, b, c = prompt(1), prompt(2), prompt(3)
    found = plane(clip, {"a": a, "b": b, "c": c}, features(), points=2)
    walked = path(clip, a, b, features(), points=2)
    assert walked.loss == pytest.approx([found.solutions[name].loss for name in "ab"], rel=1e-6)


def test_planes_and_paths_do_not_depend_on_the_chunks(clip, monkeypatch):
    three = {"a": prompt(1), "b": prompt(2), "c": prompt(3)}
    whole = plane(clip, three, features(), points=5, space="parameter")
    monkeypatch.setattr("mergetune.solutions.space.CHUNK", 2 * 3 * 8)  # two points at a time
    monkeypatch.setattr("mergetune.solutions.space.ROWS", 7)
    parts = plane(clip, three, features(), points=5, space="parameter")
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)
    assert parts.accuracy == whole.accuracy


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solutions": {"a": prompt(1), "b": prompt(2)}}, ValueError, "solutions must hold three solutions, got 2"),
        ({"points": 1}, ValueError, "points must be at least 2 per side, got 1"),
        ({"margin": -0.1}, ValueError, "margin must be at least 0 and finite, got -0.1"),
        ({"margin": float("nan")}, ValueError, "margin must be at least 0 and finite, got nan"),
        ({"solutions": {"a": prompt(1), "b": prompt(2), "c": head()}}, TypeError, "one kind, got prompt and head"),
        (
            {"solutions": {"a": prompt(1), "b": prompt(2), "c": replace(prompt(), template="X X X X {}, a pet.")}},
            ValueError,
            "must end alike",
        ),
    ],
)
def test_planes_that_make_no_sense_are_refused(clip, arguments, error, message):
    three = {"a": prompt(1), "b": prompt(2), "c": prompt(3)}
    with pytest.raises(error, match=message):
        plane(clip, **{"solutions": three, "features": features(), "space": "parameter", **arguments})


@pytest.mark.parametrize("third", ["an average", "beyond", "the first", "no length"])
def test_solutions_on_one_line_span_no_plane(clip, third):
    a, b = prompt(1), prompt(2)
    t = {"an average": 0.3, "beyond": 4.0, "the first": 0.0, "no length": 1.0}[third]
    three = {"a": a, "b": a if third == "no length" else b, "c": mergetune.interpolate(a, b, t)}
    with pytest.raises(ValueError, match="must span a plane, got three on one line: a, b, c"):
        plane(clip, three, features(), space="parameter")


# -- figures and report -----------------------------------------------------------------------------------------------

NASTY = "<b>&\"$x_{$'\n\x07</td>"


@functools.cache
def measured(name: str = "base"):
    """Paths, plane and spectrum of one set of images, made by hand."""
    walk = Path((0, 0.5, 1), (1.25, 2.5, 1.75), (80.0, 60.5, 75.25))
    flat = Path((0, 1), (1.0, 2.0), (50.0, 40.0))
    grid = tuple(tuple(1.0 + x * x + y for x in range(3)) for y in range(3))
    corners = {"zero-shot": Corner(0, 0, 1.111, 51), name: Corner(1, 0, 2, 52), "MERGETUNE": Corner(0.5, 1, 3, 53)}
    square = Plane((-1, 0.5, 2), (-1, 0.25, 1.5), grid, tuple(tuple(90 - v for v in row) for row in grid), corners)
    curved = Spectrum(
        (0, 0.5, 1), (name, "MERGETUNE"), ((3.5, 2.5),) * 3, (-0.125,) * 3, (7.75,) * 3, (0.5,) * 3, (0.25,) * 3, 1234
    )
    return {name: {"zero-shot to tuned": walk, name: flat}}, {name: square}, {name: curved}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("i", range(3))
def test_every_figure_is_drawn_whatever_the_names(tmp_path, i):
    draw, panels = (plot, plot_plane, plot_spectrum)[i], {name: measured(name)[i][name] for name in ("base", NASTY)}
    draw(panels, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.filterwarnings("error")
def test_a_plane_without_any_height_is_drawn(tmp_path):
    flat = replace(measured()[1]["base"], loss=((2.0,) * 3,) * 3, accuracy=((100.0,) * 3,) * 3)
    plot_plane({"flat": flat}, tmp_path / "flat.png")


def test_a_plane_is_drawn_the_right_way_up(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, real = [], Axes.contourf
    monkeypatch.setattr(Axes, "contourf", lambda self, *a, **k: drawn.append(a) or real(self, *a, **k))
    found = measured()[1]["base"]
    plot_plane({"base": found}, tmp_path / "plane.png")
    for (xs, ys, values, levels), expected in zip(drawn, (found.loss, found.accuracy), strict=True):
        assert (xs, ys) == (found.xs, found.ys) and np.array_equal(values, expected)
        assert levels[0] <= values.min() + 1e-9 and levels[-1] >= values.max() - 1e-9 and (np.diff(levels) > 0).all()
    dense = [np.diff(levels) for *_, levels in drawn]
    assert dense[0][0] < dense[0][-1] and dense[1][0] > dense[1][-1]  # where loss is low, accuracy high


class Reader(HTMLParser):
    """The elements of a page: tag, attributes and text; tags must close in order."""

    VOID = {"meta", "img"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.found, self.declared = [], [], None
        self.feed(page)
        self.close()
        assert not self.open

    def handle_decl(self, decl):
        self.declared = decl

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.found.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [element for element in self.found if element["tag"] == tag]


def read(file) -> Reader:
    return Reader(file.read_text(encoding="utf-8"))


def test_the_report_holds_figures_and_numbers(tmp_path):
    paths, planes, spectra = measured()
    file = tmp_path / "new" / "report.html"
    report(file, paths, planes=planes, spectra=spectra, title="Icons", settings={"lam": 8.0, "seeds": [1, 2]})
    page = read(file)
    assert page.declared == "DOCTYPE html" and page.all("html")[0]["lang"] == "en"
    assert {"charset"} <= page.all("meta")[0].keys() and page.all("meta")[1]["name"] == "viewport"
    assert page.all("title")[0]["text"] == page.all("h1")[0]["text"] == "Icons"
    images = page.all("img")
    assert len(images) == 3
    for image in images:
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))))
        assert picture.format == "PNG" and len(image["alt"]) > 50
        assert int(image["width"]) / int(image["height"]) == pytest.approx(picture.width / picture.height, abs=0.01)
    rows = [row["text"] for row in page.all("tr")]
    assert any(row.removeprefix("base") == "zero-shot to tuned1.25002.50001.75001.000080.0060.5075.25" for row in rows)
    assert any(row.removeprefix("base") == "zero-shot0.0000.0001.111051.00" for row in rows)
    assert any(row.removeprefix("base") == "lowest loss on the grid-1.000-1.0001.000089.00" for row in rows)
    assert any(row.removeprefix("base") == "highest accuracy on the grid-1.000-1.0001.000089.00" for row in rows)
    assert any(row.removeprefix("base") == "0.503.5002.500-0.12507.7500.50000.2500" for row in rows)
    assert "lam8.0" in rows and "seeds1, 2" in rows and f"mergetune{mergetune.__version__}" in rows
    assert f"torch{torch.__version__}" in rows and any(row.startswith("scipy") for row in rows)
    assert "1,234 numbers" in " ".join(page.all("p")[-1]["text"].split())


def test_the_tables_are_whole_and_read_aloud(tmp_path):
    paths, planes, spectra = measured()
    report(tmp_path / "r.html", paths, planes=planes, spectra=spectra)
    page = read(tmp_path / "r.html")
    widths, current = [], None
    for element in page.found:
        if element["tag"] == "tr":
            widths.append(0)
            current = element
        elif element["tag"] in ("td", "th") and current is not None:
            widths[-1] += 1
    heads = [i for i, row in enumerate(page.all("tr")) if row["text"].startswith(("images", "setting", "package"))]
    for begin, end in zip(heads, [*heads[1:], len(widths)], strict=True):
        assert end - begin > 1 and len(set(widths[begin:end])) == 1
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) == len(heads)
    assert [len(page.all(tag)) for tag in ("main", "h1", "figcaption")] == [1, 1, 3]


def test_the_report_needs_nothing_from_elsewhere(tmp_path):
    paths, planes, spectra = measured()
    report(tmp_path / "r.html", paths, planes=planes, spectra=spectra)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert not {"script", "link", "iframe", "object", "a"} & {element["tag"] for element in page.found}
    assert all(element["src"].startswith("data:") for element in page.found if "src" in element)
    style = page.all("style")[0]["text"]
    assert "@import" not in style and "url(" not in style and "http" not in style and "@media print" in style


def test_names_cannot_break_the_report(tmp_path):
    paths, planes, spectra = measured(NASTY)
    report(
        tmp_path / "r.html", paths, planes=planes, spectra=spectra, title=NASTY, settings={NASTY: NASTY, "n": "\ud800"}
    )
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert not page.all("b") and "\x07" not in text
    shown = NASTY.replace("\n", " ").replace("\x07", " ")
    assert page.all("h1")[0]["text"] == shown and shown in page.all("img")[0]["alt"]
    assert sum(shown in cell["text"] for cell in page.all("th") + page.all("td")) > 10


def test_a_report_of_paths_alone(tmp_path):
    report(tmp_path / "r.html", measured()[0])
    page = read(tmp_path / "r.html")
    assert len(page.all("img")) == 1 and len(page.all("table")) == 2
    with pytest.raises(ValueError, match="at least one path for every set of images, got none"):
        report(tmp_path / "none.html", {"base": {}})
    assert not (tmp_path / "none.html").exists()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(clip, monkeypatch, tmp_path):
    """`mergetune path` on the tiny CLIP."""
    solutions = {"coop": prompt(1), "merged": prompt(2)}
    monkeypatch.setattr(mergetune, "load_clip", lambda *args, **kwargs: clip)
    monkeypatch.setattr(measuring, "open_cache", lambda *args, **kwargs: features())
    monkeypatch.setattr(measuring, "read_solution", lambda path, *args, **_: solutions[path])

    def run(*arguments):
        fixed = ["path", "--cache", "c", "--tuned", "coop", "--solution", "merged", "--backbone", "icon-clip"]
        fixed += ["--template", "a big red {}.", "--points", "3", "--figure", tmp_path / "paths.png"]
        monkeypatch.setattr(mergetune.Prompt, "from_template", lambda *args, **kwargs: prompt(3))
        return CliRunner().invoke(app, [str(argument) for argument in [*fixed, *arguments]])

    return run


def test_path_makes_plane_and_report(clip, command, tmp_path):
    space = "parameter"
    files = ["--plane", tmp_path / "plane.svg", "--report", tmp_path / "report.html", "--space", space]
    result = command(*files, "--curvature", 2, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    walks = connectivity(clip, prompt(3), prompt(1), prompt(2), features(), points=3, space=space)
    assert {name: told[name]["loss"] for name in walks} == {name: list(walk.loss) for name, walk in walks.items()}
    assert list(told["plane"]["solutions"]) == ["zero-shot", "fine-tuned", "MERGETUNE"]
    length = (prompt(1).ctx - prompt(3).ctx).norm().item()
    assert told["plane"]["solutions"]["fine-tuned"]["x"] == pytest.approx(length, rel=1e-5)
    ends = [walks["zero-shot to fine-tuned"].loss[0], walks["zero-shot to fine-tuned"].loss[-1]]
    ends.append(walks["zero-shot to MERGETUNE"].loss[-1])
    assert [corner["loss"] for corner in told["plane"]["solutions"].values()] == pytest.approx(ends, rel=1e-6)
    assert told["curvature"]["positions"] == [0, 1, 2] and told["curvature"]["size"] == 64
    assert told["curvature"]["solutions"] == ["zero-shot", "MERGETUNE", "fine-tuned"]
    page = read(tmp_path / "report.html")
    assert len(page.all("img")) == 3 and any(row["text"] == "spaceparameter" for row in page.all("tr"))
    assert (tmp_path / "plane.svg").read_bytes().startswith(b"<?xml")


def test_the_report_of_a_weight_average_goes_without_the_plane(command, monkeypatch, tmp_path):
    average = mergetune.interpolate(prompt(3), prompt(1), 0.5)
    solutions = {"coop": prompt(1), "merged": average}
    monkeypatch.setattr(measuring, "read_solution", lambda path, *args, **_: solutions[path])
    arguments = ["--report", tmp_path / "r.html", "--space", "parameter", "--curvature", 0]
    result = command(*arguments)
    assert result.exit_code == 0 and "the report has no plane" in result.stderr and "Report: " in result.stdout
    assert len(read(tmp_path / "r.html").all("img")) == 1
    refused = command(*arguments, "--plane", tmp_path / "plane.png")
    assert refused.exit_code == 2 and "three on one line" in " ".join(refused.stderr.split())


def test_path_alone_makes_neither(command, tmp_path):
    result = command("--json")
    assert result.exit_code == 0 and len(json.loads(result.stdout)) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["paths.png"]
    refused = command("--report", tmp_path / "r.html", "--curvature", 1)
    assert refused.exit_code == 2 and "--curvature must be 0 or at least 2" in " ".join(refused.stderr.split())
