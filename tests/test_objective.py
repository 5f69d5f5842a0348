"""The whole objective, by hand and as fit() builds it, against a few independent lines of float64 autograd."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from mergetune import FeatureCache, FrozenClip, Head, Prompt, fisher_diagonal
from mergetune.clip import TextParts
from mergetune.fit import fit_job
from mergetune.objective import Objective, path_points
from mergetune.options import PATH_GRIDS, SPACES, SURROGATES
from mergetune.text_tower import text_encoder

DOUBLE = torch.float64
BATCH, CLASSES, WIDTH = 9, 4, 6
NAMES = ("cat", "hot-air balloon", "dog", "sea lion")
GRID_POINTS = {"even": [0, 0.25, 0.5, 0.75], "official": [0.1, 0.35, 0.6, 0.85], "own": [1.0, 0.2, 0.0]}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def unit(t: Tensor) -> Tensor:
    return t / t.norm(dim=-1, keepdim=True)


# -- the independent implementation -----------------------------------------------------------------------------------


@dataclass
class Expected:
    """L(w) = CE(w) + lam S(w; w1) + sum_k beta_k mean_n CE(w2_k + a_n (w - w2_k)), in float64.

    ``logits`` of class weights t are ``scale * x @ t.T``; ``encode`` turns one parameter into class weights.
    """

    encode: Callable[[Tensor], Tensor]
    scale: float
    normalize: bool
    anchors: list[Tensor]  # parameters
    betas: list[float]
    alphas: list[float]
    w1: Tensor
    lam: float
    surrogate: str
    space: str
    curvature: Tensor | None = None

    def __call__(self, parameter: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        weights = self.encode(parameter)
        terms = [self.cross_entropy(weights, x, labels), self.distance(weights)]
        for anchor in self.anchors:
            points = []
            for a in self.alphas:
                if self.space == "parameter":
                    t = self.encode((1 - a) * anchor + a * parameter)
                else:
                    t = (1 - a) * self.encode(anchor) + a * weights
                points.append(self.cross_entropy(t, x, labels))
            terms.append(sum(points) / len(points))
        loss = terms[0] + self.lam * terms[1] + sum(b * t for b, t in zip(self.betas, terms[2:], strict=True))
        return loss, terms

    def cross_entropy(self, t: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        x = x if x.shape[1] == t.shape[1] else F.pad(x, (0, 1), value=1.0)  # the bias is the weight of a constant 1
        logits = self.scale * x @ (unit(t) if self.normalize else t).T
        return -logits.log_softmax(1)[torch.arange(len(x)), labels].mean()

    def distance(self, t: Tensor) -> Tensor:
        t1 = self.w1
        if self.surrogate == "cosine":
            return (1 - (unit(t) * unit(t1)).sum(1)).mean()
        apart = unit(t) - unit(t1) if self.normalize else t - t1
        if self.surrogate == "l2":
            return apart.norm(dim=1).mean()
        return (0.5 * (1 if self.surrogate == "identity" else self.curvature) * apart**2).sum(1).mean()


def assert_agree(
    objective: Objective,
    expected: Expected,
    parameter: Tensor,
    x: Tensor,
    labels: Tensor,
    tolerance: float,
    draws: torch.Generator | None = None,
) -> None:
    """Loss, terms and the gradient to the parameter."""
    leaf, truth = parameter.clone().requires_grad_(), parameter.double().requires_grad_()
    loss, terms = objective(leaf, x, labels, draws)
    expected_loss, expected_terms = expected(truth, x.double(), labels)
    assert len(terms) == len(expected_terms) == len(objective.term_names)
    pairs = {
        "loss": (loss, expected_loss),
        "terms": (terms, torch.stack(expected_terms)),
        "gradient": (torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected_loss, truth)[0]),
    }
    for name, (got, value) in pairs.items():
        assert got.shape == value.shape
        error = ((got.detach() - value.detach()).abs().max() / value.detach().abs().max()).item()
        assert error <= tolerance, f"{name}: relative error {error}"
    assert not terms.requires_grad


# -- by hand, with a tiny encoder in float64 --------------------------------------------------------------------------


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
    objective = Objective(
        encode=encode,
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


def batch(seed: int = 40) -> tuple[Tensor, Tensor]:
    return unit(draw(BATCH, WIDTH, seed=seed)), torch.randint(CLASSES, (BATCH,), generator=generator(seed))


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
    object.__setattr__(objective, "backend", backend)
    assert_agree(objective, expected, parameter, *batch(), 1e-12)


def test_without_anchors_and_zero_shot_it_is_cross_entropy():
    _, expected, parameter = build("prompt", "identity", "embedding", 1, None)
    x, labels = batch()
    objective = Objective(encode=tiny_encode, scale=4.0, normalize=True)
    loss, terms = objective(parameter, x, labels)
    assert objective.term_names == ("endpoint", "surrogate")
    assert loss.item() == pytest.approx(expected.cross_entropy(tiny_encode(parameter[None])[0], x, labels).item())
    assert terms.tolist() == [pytest.approx(loss.item()), 0]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_kgcoop_is_cross_entropy_and_a_surrogate(surrogate):
    objective, expected, parameter = build("prompt", surrogate, "embedding", 1, None)
    object.__setattr__(objective, "anchors", None)
    expected.anchors, expected.betas = [], []
    assert_agree(objective, expected, parameter, *batch(), 1e-12)


def test_term_names_count_the_anchors():
    objective, *_ = build("head", "identity", "parameter", 3, None)
    assert objective.term_names == ("endpoint", "surrogate", "path_1", "path_2", "path_3")


def test_at_the_zero_shot_solution_no_surrogate_pulls():
    """Where w is w1, all but the l2 norm, which has no derivative there, leave the gradient alone and finite."""
    for surrogate in SURROGATES:
        objective, _, parameter = build("head", surrogate, "embedding", 1, path_points("even", 2))
        w1 = objective.w1.clone().requires_grad_()
        loss, terms = objective(w1, *batch())
        (gradient,) = torch.autograd.grad(loss, w1)
        object.__setattr__(objective, "lam", 0.0)
        (without,) = torch.autograd.grad(objective(w1, *batch())[0], w1)
        assert terms[1].abs() < 1e-14
        assert torch.allclose(gradient, without, atol=1e-13)


# -- a real prompt encoder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=16, head_width=16, patch_size=8, image_size=8)
    text = CLIPTextCfg(context_length=16, vocab_size=49408, width=16, heads=2, layers=2)
    model = open_clip.CLIP(WIDTH, vision, text)
    with torch.no_grad():
        for parameter in (*model.transformer.parameters(), model.positional_embedding, model.text_projection):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=16), "tiny")


class DoubleParts(TextParts):
    """A text tower in float64 whose features stay in float64."""

    def project(self, x: Tensor) -> Tensor:
        return self.ln_final(x) @ self.projection


def open_clip_encode(clip: FrozenClip, tokens: Tensor, first: int) -> Callable[[Tensor], Tensor]:
    """One prompt's class features in float64 from open_clip's encode_text, embeddings replaced."""
    model = deepcopy(clip.model).double()
    embed, context = model.token_embedding.forward, {}

    def replaced(ids: Tensor) -> Tensor:
        ctx = context["ctx"].expand(len(ids), -1, -1)
        embedded = embed(ids)
        return torch.cat([embedded[:, :first], ctx, embedded[:, first + ctx.shape[1] :]], 1)

    model.token_embedding.forward = replaced

    def encode(ctx: Tensor) -> Tensor:
        context["ctx"] = ctx
        return model.encode_text(tokens)

    return encode


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_real_prompt_encoder_in_float64(clip, surrogate, space):
    tokens = clip.tokenize([f"X X X {name}." for name in NAMES])
    parts = clip.text.astype(DOUBLE)
    encode = text_encoder(DoubleParts(**vars(parts)), tokens, first=1, context=3)
    anchors, w1 = draw(2, 3, clip.text.width, seed=60), draw(CLASSES, WIDTH, seed=61)
    curvature = draw(CLASSES, WIDTH, seed=62).abs() if surrogate == "fisher" else None
    alphas = path_points("official", 3)
    shared = {"scale": 5.0, "normalize": True, "w1": w1, "lam": 2.0, "surrogate": surrogate, "space": space}
    objective = Objective(
        encode=encode,
        anchors=encode(anchors) if space == "embedding" else anchors,
        betas=torch.tensor([0.5, 2.0], dtype=DOUBLE),
        alphas=alphas,
        points=3,
        curvature=curvature,
        **shared,
    )
    expected = Expected(
        encode=open_clip_encode(clip, tokens, 1),
        anchors=list(anchors),
        betas=[0.5, 2.0],
        alphas=alphas.tolist(),
        curvature=curvature,
        **shared,
    )
    assert_agree(objective, expected, draw(3, clip.text.width, seed=63), *batch(), 1e-11)


# -- as fit() builds it -----------------------------------------------------------------------------------------------


@pytest.fixture
def built(clip) -> Callable[..., tuple[Objective, Prompt | Head]]:
    """The objective and the start of a fit() before its first step."""

    def build(tuned, features, **settings):
        job = fit_job(clip, features, tuned, **settings)
        return job.objective, job.start

    return build


@pytest.fixture(scope="module")
def features() -> FeatureCache:
    count = 12
    x = unit(draw(count, WIDTH, seed=70)).float()
    return FeatureCache.from_tensors(x, torch.arange(count) % CLASSES, NAMES)


def fisher_by_hand(x: Tensor, w1: Tensor, scale: float, normalize: bool, unit_mean: bool = True) -> Tensor:
    """h[c,d] = scale^2 mean_x p_c (1 - p_c) x_d^2, mean 1 or as it is."""
    x = x if x.shape[1] == w1.shape[1] else F.pad(x, (0, 1), value=1.0)
    h = torch.zeros_like(w1)
    for image in x:
        p = (scale * (unit(w1) if normalize else w1) @ image).softmax(0)
        for c in range(len(w1)):
            for d in range(w1.shape[1]):
                h[c, d] += scale**2 * p[c] * (1 - p[c]) * image[d] ** 2 / len(x)
    return h / h.mean() if unit_mean else h


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("k", [1, 3])
def test_fit_of_prompts(clip, built, features, k, surrogate, space):
    template = "a photo of a {}."
    zero_shot = Prompt.from_template(clip, template)
    tuned = [Prompt(zero_shot.ctx + 0.1 * draw(*zero_shot.ctx.shape, seed=80 + i).float(), template) for i in range(k)]
    betas = [0.5, 2.0, 1.0][:k]
    settings = {"lam": 3.0, "beta": betas, "tau": 0.3, "points": 4, "surrogate": surrogate, "space": space}
    objective, start = built(tuned, features, precision="float32", **settings)
    tokens = clip.tokenize([template.format(name) for name in NAMES])
    encode = open_clip_encode(clip, tokens, 1)
    x, labels, scale = features.tensor().double(), features.labels, clip.model.logit_scale.double().exp().item()
    w1 = encode(zero_shot.ctx.double())
    expected = Expected(
        encode=encode,
        scale=scale,
        normalize=True,
        anchors=[prompt.ctx.double() for prompt in tuned],
        betas=betas,
        alphas=GRID_POINTS["even"],
        w1=w1,
        lam=3.0,
        surrogate=surrogate,
        space=space,
        curvature=fisher_by_hand(x, w1, scale, True) if surrogate == "fisher" else None,
    )
    middle = sum(prompt.ctx for prompt in tuned) / k
    assert torch.allclose(start.parameter, 0.7 * zero_shot.ctx + 0.3 * middle, atol=1e-7)
    assert_agree(objective, expected, start.parameter, x.float(), labels, 1e-5)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logit_scale", [1.0, 20.0])
def test_fit_of_heads(clip, built, features, logit_scale, bias, surrogate, space):
    """Whatever factor a head comes with, its logits are kept and its weights take the CLIP's unit."""
    scale = clip.model.logit_scale.double().exp().item()
    heads = [
        Head(
            weight=draw(CLASSES, WIDTH, seed=90 + i).float(),
            classnames=NAMES,
            bias=draw(CLASSES, seed=92 + i).float() if bias else None,
            logit_scale=logit_scale,
        )
        for i in range(2)
    ]
    settings = {"lam": 3.0, "beta": 0.5, "tau": 0.3, "points": 4, "surrogate": surrogate, "space": space}
    objective, start = built(heads, features, grid="official", **settings)
    x, labels = features.tensor().double(), features.labels
    w1 = clip.class_embeddings(NAMES).double()
    anchors = [head.weight.double() * logit_scale / scale for head in heads]
    if bias:
        w1 = F.pad(w1, (0, 1))
        pairs = zip(anchors, heads, strict=True)
        anchors = [torch.cat([t, head.bias.double()[:, None] * logit_scale / scale], 1) for t, head in pairs]
    expected = Expected(
        encode=lambda parameter: parameter,
        scale=scale,
        normalize=False,
        anchors=anchors,
        betas=[0.5, 0.5],
        alphas=GRID_POINTS["official"],
        w1=w1,
        lam=3.0,
        surrogate=surrogate,
        space=space,
        curvature=fisher_by_hand(x, w1, scale, False) if surrogate == "fisher" else None,
    )
    assert torch.allclose(start.parameter.double(), 0.7 * w1 + 0.3 * sum(anchors) / 2, atol=1e-6)
    assert_agree(objective, expected, start.parameter, x.float(), labels, 1e-5)
    logits = start.with_parameter(anchors[0])
    got = logits.logit_scale * (x.float() @ logits.weight.T + (logits.bias if bias else 0))
    own = logit_scale * (x.float() @ heads[0].weight.T + (heads[0].bias if bias else 0))
    assert torch.allclose(got, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_fit_starts_where_tau_says(clip, built, features, tau):
    zero_shot = Prompt.from_template(clip)
    tuned = Prompt(draw(*zero_shot.ctx.shape, seed=95).float(), zero_shot.template)
    _, start = built(tuned, features, tau=tau)
    assert torch.equal(start.parameter, tuned.ctx if tau else zero_shot.ctx)


# -- grids ------------------------------------------------------------------------------------------------------------


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


# -- the Fisher diagonal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_fisher_diagonal_is_its_formula(bias, normalize):
    x, w1 = unit(draw(17, WIDTH, seed=1)), draw(CLASSES, WIDTH + bias, seed=2)
    got = fisher_diagonal(x, w1, scale=3.0, normalize=normalize)
    assert got.dtype == torch.float32
    assert got.mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(got.double(), fisher_by_hand(x, w1, 3.0, normalize), rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_fisher_diagonal_as_a_mean_over_images(bias):
    x, w1 = unit(draw(17, WIDTH, seed=1)), draw(CLASSES, WIDTH + bias, seed=2)
    got = fisher_diagonal(x, w1, scale=3.0, normalize=False, unit_mean=False, batch_size=5)
    expected = fisher_by_hand(x, w1, 3.0, False, unit_mean=False)
    assert got.dtype == torch.float32 and not 0.5 < expected.mean() < 2
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=0)


def test_fisher_diagonal_of_a_cache_in_batches():
    x, w1 = unit(draw(17, WIDTH, seed=1)), draw(CLASSES, WIDTH, seed=2)
    cache = FeatureCache.from_tensors(x.float(), torch.arange(17) % CLASSES, NAMES)
    for batch_size in (1, 5, 17, 100):
        got = fisher_diagonal(cache, w1, scale=3.0, batch_size=batch_size)
        assert torch.allclose(got.double(), fisher_by_hand(x, w1, 3.0, True), rtol=1e-5)


def test_fisher_diagonal_is_that_of_the_exact_hessian():
    """Of the cross-entropy that the classifier itself expects, in the weights that meet the features."""
    x, w1, scale = unit(draw(17, WIDTH, seed=1)), draw(CLASSES, WIDTH, seed=2), 3.0
    labels = (scale * x @ w1.T).softmax(1)

    def expected_loss(w: Tensor) -> Tensor:
        return -(labels * (scale * x @ w.T).log_softmax(1)).sum(1).mean()

    hessian = torch.func.hessian(expected_loss)(w1).flatten(2).flatten(0, 1)
    diagonal = hessian.diagonal().view_as(w1)
    got = fisher_diagonal(x, w1, scale=scale, normalize=False)
    assert torch.allclose(got.double(), diagonal / diagonal.mean(), rtol=1e-5)


def test_fisher_diagonal_of_a_certain_classifier_is_refused():
    x = torch.eye(3).repeat(2, 1)
    with pytest.raises(
        ValueError, match="the Fisher diagonal must have a positive mean, got 0.0: use surrogate='identity'"
    ):
        fisher_diagonal(x, torch.eye(3), scale=1e4)
    assert torch.equal(fisher_diagonal(x, torch.eye(3), scale=1e4, unit_mean=False), torch.zeros(3, 3))
