"""The whole objective, by hand and as fit() builds it, against a few independent lines of float64 autograd."""

from dataclasses import replace

import pytest
import torch
from objective_cases import (
    CLASSES,
    DOUBLE,
    GRID_POINTS,
    WIDTH,
    Expected,
    assert_agree,
    batch,
    draw,
    generator,
    objective_of,
)
from torch import Tensor

from mergetune.facts.function_options import PATH_GRIDS, SPACES, SURROGATES
from mergetune.training.objective import path_points

# -- by hand, with a tiny encoder in float64 ---------------------------------------------------------------------------


def tiny_encode(parameters: Tensor) -> Tensor:
    """[M, 2, 3] -> class weights [M, C, D], not linear."""
    mixing = draw(6, CLASSES * WIDTH, seed=20)
    return (parameters.flatten(1) @ mixing).tanh().unflatten(1, (CLASSES, WIDTH)) + draw(CLASSES, WIDTH, seed=21)


def head_encode(parameters: Tensor) -> Tensor:
    return parameters


PARAMETERS = {
    # encoder, shape of a parameter, class weights have unit norm
    "prompt": (tiny_encode, (2, 3), True),
    "head": (head_encode, (CLASSES, WIDTH), False),
    "head with bias": (head_encode, (CLASSES, WIDTH + 1), False),
}


def build(kind: str, surrogate: str, space: str, k: int, alphas: Tensor | None, points: int = 4):
    """The objective and its expectation, which shares nothing with it but the encoder."""
    encode, shape, normalize = PARAMETERS[kind]
    anchors = draw(k, *shape, seed=30)
    w1 = encode(draw(1, *shape, seed=31))[0]
    curvature = draw(*w1.shape, seed=32).abs() if surrogate == "fisher" else None
    betas = [0.5, 1.5, 0.25][:k]
    objective = objective_of(
        encode,
        scale=4.0,
        normalize=normalize,
        anchors=encode(anchors) if space == "embedding" else anchors,
        betas=torch.tensor(betas, dtype=DOUBLE),
        alphas=alphas,
        points=points,
        space=space,
        w1=w1,
        lam=3.0,
        surrogate=surrogate,
        curvature=curvature,
    )
    expected = Expected(
        encode=lambda parameter: encode(parameter[None])[0],
        scale=4.0,
        normalize=normalize,
        anchors=list(anchors),
        betas=betas,
        alphas=[] if alphas is None else alphas.tolist(),
        w1=w1,
        lam=3.0,
        surrogate=surrogate,
        space=space,
        curvature=curvature,
    )
    return objective, expected, draw(*shape, seed=33)


@pytest.mark.parametrize("kind", list(PARAMETERS))
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_and_space(surrogate, space, k, kind):
    objective, expected, parameter = build(kind, surrogate, space, k, torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE))
    assert_agree(objective, expected, parameter, *batch(), 1e-12)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("grid", list(GRID_POINTS))
def test_every_fixed_grid(grid, space):
    points = GRID_POINTS[grid]
    alphas = path_points(points if grid == "own" else grid, 4)
    objective, expected, parameter = build("prompt", "identity", space, 2, alphas)
    expected.alphas = points
    assert_agree(objective, expected, parameter, *batch(), 1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_random_grid_is_drawn_from_the_generator_at_every_step(space):
    objective, expected, parameter = build("prompt", "identity", space, 2, path_points("random", 5), points=5)
    draws, same = generator(50), generator(50)
    seen = []
    for _ in range(2):
        expected.alphas = torch.rand(5, generator=same, dtype=DOUBLE).tolist()
        assert_agree(objective, expected, parameter, *batch(), 1e-12, draws)
        seen.append(expected.alphas)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_backends_agree(backend):
    objective, expected, parameter = build("prompt", "fisher", "embedding", 2, path_points("even", 3))
    objective = replace(objective, backend=backend)
    assert_agree(objective, expected, parameter, *batch(), 1e-12)


def test_without_anchors_and_zero_shot_it_is_cross_entropy():
    _, expected, parameter = build("prompt", "identity", "embedding", 1, None)
    x, labels = batch()
    objective = objective_of(tiny_encode, scale=4.0, normalize=True)
    loss, terms = objective({"values": parameter}, x, labels)
    assert objective.term_names == ("endpoint", "surrogate")
    assert loss.item() == pytest.approx(expected.cross_entropy(tiny_encode(parameter[None])[0], x, labels).item())
    assert terms.tolist() == [pytest.approx(loss.item()), 0]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_kgcoop_is_cross_entropy_and_a_surrogate(surrogate):
    objective, expected, parameter = build("prompt", surrogate, "embedding", 1, None)
    objective = replace(objective, anchors=None)
    expected.anchors, expected.betas = [], []
    assert_agree(objective, expected, parameter, *batch(), 1e-12)


def test_term_names_count_the_anchors():
    objective, *_ = build("head", "identity", "parameter", 3, None)
    assert objective.term_names == ("endpoint", "surrogate", "path_1", "path_2", "path_3")


def test_at_the_zero_shot_solution_no_surrogate_pulls():
    """Where w is w1, all but the l2 norm, which has no derivative there, leave the gradient alone and finite."""
    for surrogate in SURROGATES:
        objective, _, parameter = build("head", surrogate, "embedding", 1, path_points("even", 2))
        w1 = objective.near.classes.clone().requires_grad_()
        loss, terms = objective({"values": w1}, *batch())
        (gradient,) = torch.autograd.grad(loss, w1)
        objective = replace(objective, near=replace(objective.near, lam=0.0))
        (without,) = torch.autograd.grad(objective({"values": w1}, *batch())[0], w1)
        assert terms[1].abs() < 1e-14
        assert torch.allclose(gradient, without, atol=1e-13)


# -- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "points", "expected"),
    [
        ("even", 1, [0]),
        ("even", 5, [0, 0.2, 0.4, 0.6, 0.8]),
        ("even", 10, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("official", 1, [0.1]),
        ("official", 2, [0.1, 0.6]),
        ("official", 5, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("official", 10, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ([0.25], 5, [0.25]),
        ((1, 0), 5, [1, 0]),
        (torch.tensor([0.5, 0.75]), 5, [0.5, 0.75]),
    ],
)
def test_grid_values(grid, points, expected):
    got = path_points(grid, points)
    assert got.dtype == DOUBLE
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_random_grid_has_no_fixed_points():
    assert path_points("random", 5) is None
    assert "random" in PATH_GRIDS


@pytest.mark.parametrize(
    ("grid", "points", "message"),
    [
        ("uniform", 5, "grid must be one of even, official, random or a list of points, got 'uniform'"),
        ("even", 0, "points must be a whole number of at least 1, got 0"),
        ("random", -1, "points must be a whole number of at least 1, got -1"),
        ("official", 2.5, "points must be a whole number of at least 1, got 2.5"),
        ([], 5, "grid must hold at least one path point"),
        ([0.5, 1.01], 5, r"grid must hold path points in \[0, 1\], got \[0.5, 1.01\]"),
        ([-0.1], 5, r"path points in \[0, 1\]"),
        ([float("nan")], 5, r"path points in \[0, 1\]"),
    ],
)
def test_bad_grids_are_refused(grid, points, message):
    with pytest.raises(ValueError, match=message):
        path_points(grid, points)


@pytest.mark.parametrize(("points", "count", "last"), [(5, 5, 0.9), (11, 11, 1.1 - 1 / 11), (20, 19, 1.0)])
def test_official_grid_as_the_official_code_has_it(points, count, last):
    """arange(0.1, 1.01, 1 / N) is not N points for every N, and may end a little beyond w."""
    got = path_points("official", points)
    assert len(got) == count
    assert got[-1].item() == pytest.approx(last)
