"""The plain-torch definitions: against loops written from the formulas, autograd, Hessians and torch's attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.ops import reference

DOUBLE = torch.float64
SHAPES = [(1, 2, 1), (1, 1, 3), (5, 3, 4), (6, 4, 7)]  # B, C, D


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def problem(b: int, c: int, d: int, k: int, n: int) -> dict[str, Tensor]:
    return {
        "x": F.normalize(draw(b, d, seed=1), dim=-1),
        "labels": torch.randint(c, (b,), generator=generator(2)),
        "w": draw(c, d, seed=3),
        "anchors": draw(k, c, d, seed=4),
        "alphas": torch.linspace(0, 1, n, dtype=DOUBLE),
        "betas": 0.1 + torch.rand(k, generator=generator(5), dtype=DOUBLE),
    }


def by_hand(
    x, labels, w, anchors, alphas, betas, *, scale, w1=None, curvature=None, lam=0.0, normalize=True
) -> tuple[Tensor, list[Tensor]]:
    """L(w) = CE(w) + lam S(w; w1) + sum_k beta_k mean_n CE(w2_k + a_n (w - w2_k)), image by image."""

    def unit(t: Tensor) -> Tensor:
        return t / t.norm(dim=1, keepdim=True) if normalize else t

    def cross_entropy(t: Tensor) -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for image, label in zip(x, labels, strict=True):
            logits = torch.stack([scale * (image * row).sum() for row in unit(t)])
            total = total + F.cross_entropy(logits[None], label[None])
        return total / len(x)

    surrogate = torch.zeros((), dtype=DOUBLE)
    if w1 is not None:
        for c, (t, t1) in enumerate(zip(unit(w), unit(w1), strict=True)):
            h = 1.0 if curvature is None else curvature[c]
            surrogate = surrogate + 0.5 * (h * (t - t1) ** 2).sum() / len(w)
    loss, paths = cross_entropy(w) + lam * surrogate, []
    for w2, beta in zip(anchors, betas, strict=True):
        paths.append(sum(cross_entropy(w2 + a * (w - w2)) for a in alphas) / len(alphas))
        loss = loss + beta * paths[-1]
    return loss, [cross_entropy(w), surrogate, *paths]


def assert_close(got: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= rtol * max(1.0, expected.abs().max())


# -- lmc_loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("surrogate", ["none", "identity", "diagonal"])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_lmc_loss_is_the_formula(shape, k, n, surrogate, normalize):
    tensors = problem(*shape, k, n)
    options = {"scale": 7.0, "lam": 4.0, "normalize": normalize}
    if surrogate != "none":
        options["w1"] = draw(*shape[1:], seed=6)
    if surrogate == "diagonal":
        options["curvature"] = draw(*shape[1:], seed=7).abs()
    tensors["w"].requires_grad_()
    loss, terms = reference.lmc_loss(**tensors, **options)
    expected, expected_terms = by_hand(**tensors, **options)
    assert_close(loss.detach(), expected.detach())
    assert_close(terms, torch.stack(expected_terms).detach())
    assert not terms.requires_grad
    gradients = [torch.autograd.grad(value, tensors["w"])[0] for value in (loss, expected)]
    assert_close(*gradients)


@pytest.mark.parametrize("normalize", [True, False])
def test_lmc_loss_gradcheck(normalize):
    tensors = problem(2, 2, 2, 1, 2)
    w, w1, curvature = tensors.pop("w").requires_grad_(), draw(2, 2, seed=6), draw(2, 2, seed=7).abs()

    def loss(w: Tensor) -> Tensor:
        options = {"scale": 3.0, "w1": w1, "curvature": curvature, "lam": 2.0, "normalize": normalize}
        return reference.lmc_loss(w=w, **tensors, **options)[0]

    assert torch.autograd.gradcheck(loss, w)
    assert torch.autograd.gradgradcheck(loss, w, fast_mode=True)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_surrogate_has_the_curvature_that_is_asked_for(normalize, diagonal):
    """At w1 the surrogate and its gradient vanish, and its Hessian is H / C; on unit norm, along the sphere only."""
    c, d = 3, 4
    tensors = problem(5, c, d, 0, 1)
    w1 = F.normalize(draw(c, d, seed=6), dim=-1)
    curvature = draw(c, d, seed=7).abs() if diagonal else torch.ones(c, d, dtype=DOUBLE)

    def surrogate(w: Tensor) -> Tensor:
        given = {**tensors, "w": w}
        options = {"scale": 3.0, "w1": w1, "curvature": curvature if diagonal else None, "normalize": normalize}
        return reference.lmc_loss(**given, lam=1.0, **options)[0] - reference.lmc_loss(**given, lam=0.0, **options)[0]

    assert surrogate(w1).abs() < 1e-14
    assert torch.func.grad(surrogate)(w1).abs().max() < 1e-14
    hessian = torch.func.hessian(surrogate)(w1)  # [C, D, C, D]
    expected = torch.zeros(c, d, c, d, dtype=DOUBLE)
    for i in range(c):
        tangent = torch.eye(d, dtype=DOUBLE) - (torch.outer(w1[i], w1[i]) if normalize else 0)
        expected[i, :, i] = tangent @ curvature[i].diag() @ tangent / c
    assert_close(hessian, expected)


def test_identity_on_unit_norm_is_one_minus_cosine():
    tensors, w1 = problem(2, 6, 9, 0, 1), 3 * draw(6, 9, seed=6)
    _, terms = reference.lmc_loss(**tensors, scale=1.0, w1=w1, lam=1.0)
    assert_close(terms[1], (1 - F.cosine_similarity(tensors["w"], w1, dim=-1)).mean())


def test_path_ends_are_the_anchor_and_w():
    tensors = problem(9, 4, 5, 1, 1)
    for alpha, end in ((0.0, tensors["anchors"][0]), (1.0, tensors["w"])):
        _, terms = reference.lmc_loss(**{**tensors, "alphas": torch.tensor([alpha], dtype=DOUBLE)}, scale=5.0)
        logits = 5.0 * tensors["x"] @ F.normalize(end, dim=-1).T
        assert_close(terms[2], F.cross_entropy(logits, tensors["labels"]))


# -- path_cross_entropy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize(("b", "c"), [(1, 1), (1, 4), (6, 2), (11, 7)])
def test_path_cross_entropy_against_autograd(b, c, k):
    points = 6
    anchor = torch.randint(k + 1, (points,), generator=generator(1))
    alpha = torch.rand(points, generator=generator(2), dtype=DOUBLE)
    alpha[0], alpha[1] = 0.0, 1.0
    weight = torch.rand(points, generator=generator(3), dtype=DOUBLE)
    labels = torch.randint(c, (b,), generator=generator(4))
    dots, rscale = draw(k + 1, b, c, seed=5).requires_grad_(), draw(points, c, seed=6).abs().requires_grad_()
    expected = torch.zeros(points, dtype=DOUBLE)
    for p in range(points):
        logits = ((1 - alpha[p]) * dots[anchor[p]] + alpha[p] * dots[0]) * rscale[p]
        expected[p] = F.cross_entropy(logits, labels)
    d_dots, d_rscale = torch.autograd.grad((weight * expected).sum(), (dots, rscale))
    loss, got_dots, got_rscale = reference.path_cross_entropy(dots, labels, anchor, alpha, weight, rscale)
    assert_close(loss, expected.detach())
    assert_close(got_dots, d_dots[0])
    assert_close(got_rscale, d_rscale)


def test_path_cross_entropy_ignores_the_alpha_of_the_endpoint():
    """A point that starts at w stays there, whatever its alpha."""
    dots, rscale = draw(2, 5, 3), torch.ones(2, 3, dtype=DOUBLE)
    labels, anchor = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 0])
    alpha, weight = torch.tensor([1.0, 0.25], dtype=DOUBLE), torch.tensor([0.5, 0.5], dtype=DOUBLE)
    loss, d_dots, _ = reference.path_cross_entropy(dots, labels, anchor, alpha, weight, rscale)
    alone = reference.path_cross_entropy(dots[:1], labels, anchor[:1], alpha[:1], 2 * weight[:1], rscale[:1])
    assert_close(loss, alone[0].expand(2))
    assert_close(d_dots, alone[1])


# -- prefix_attention -------------------------------------------------------------------------------------------------


def whole_sequences(q, k, v, prefix_k, prefix_v, lengths, causal) -> Tensor:
    """torch's attention over [prefix | sequence], one prompt and one sequence at a time; the sequence's rows of it."""
    out, size = torch.empty_like(q), prefix_k.shape[1]
    for m in range(len(q)):
        begin = 0
        for length in lengths:
            own = slice(begin, begin + length)
            keys, values = torch.cat([prefix_k[m], k[m, own]]), torch.cat([prefix_v[m], v[m, own]])
            mask = torch.ones(length, size + length, dtype=torch.bool)
            mask = mask.tril(size) if causal else mask
            heads_first = [t.transpose(0, 1) for t in (q[m, own], keys, values)]
            out[m, own] = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1)
            begin += length
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("lengths", [(4,), (1, 1, 1), (3, 1, 2, 2)])
def test_prefix_attention_is_attention_on_whole_sequences(lengths, prefix, prompts, last_only, causal):
    heads, width, total = 2, 3, sum(lengths)
    q, k, v = (draw(prompts, total, heads, width, seed=i).requires_grad_() for i in range(3))
    prefix_k, prefix_v = (draw(prompts, prefix, heads, width, seed=i).requires_grad_() for i in (3, 4))
    expected = whole_sequences(q, k, v, prefix_k, prefix_v, lengths, causal)
    last = torch.tensor(lengths).cumsum(0) - 1 if last_only else torch.arange(total)
    expected = expected[:, last]
    got = reference.prefix_attention(q[:, last], k, v, prefix_k, prefix_v, lengths, causal=causal)
    assert_close(got.detach(), expected.detach())

    pull, leaves = draw(*expected.shape, seed=5), (q, k, v, prefix_k, prefix_v)
    gradients = [torch.autograd.grad((pull * out).sum(), leaves) for out in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        if a.numel():
            assert_close(a, b)


def test_prefix_attention_scale_is_that_of_the_head():
    q, k, v = draw(1, 2, 1, 16, seed=1), draw(1, 2, 1, 16, seed=2), draw(1, 2, 1, 16, seed=3)
    got = reference.prefix_attention(q, k, v, k[:, :0], v[:, :0], (2,), causal=False)
    scores = (q[0, :, 0] @ k[0, :, 0].T / math.sqrt(16)).softmax(-1)
    assert_close(got[0, :, 0], scores @ v[0, :, 0])


def test_prefix_attention_refuses_lengths_that_do_not_sum():
    q = draw(1, 4, 1, 2)
    with pytest.raises(ValueError, match="lengths must sum to the packed tokens, got 5"):
        reference.prefix_attention(q, q, q, q[:, :0], q[:, :0], (2, 3))
