"""A linear map of image features: what it does, how it is trained, saved and read."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import NAMES, cache, head, normal, prompt

from mergetune import LinearMap, Stack, Templates, evaluate, fit, load_solution, path, to_head, tune
from mergetune.evaluation import classifier, logit_ensemble, weight_average

MATRIX = torch.eye(8) + 0.2 * normal(8, 8, seed=3)


@pytest.mark.parametrize("base", [prompt(), head(), Templates()], ids=lambda base: base.kind)
def test_logits_are_those_of_mapped_features(clip, base):
    x = F.normalize(normal(6, 8, seed=1), dim=-1)
    plain = classifier(clip, base)
    expected = plain.logits(NAMES, F.normalize(x @ MATRIX, dim=-1))
    found = classifier(clip, Stack(base, LinearMap(MATRIX)))
    torch.testing.assert_close(found.logits(NAMES, x), expected)
    torch.testing.assert_close(
        classifier(clip, Stack(base, LinearMap(torch.eye(8)))).logits(NAMES, x), plain.logits(NAMES, x)
    )


def by_hand(x, labels, classes, scale, lam, steps, lr):
    """min_A CE + lam |A - I|^2 by Adam with a cosine, written out in float64."""
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    matrix = eye.clone().requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logits = scale * F.normalize(x @ matrix, dim=-1) @ classes.T
        loss = F.cross_entropy(logits, labels) + lam * (matrix - eye).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return matrix.detach()


def test_it_is_trained_by_the_published_recipe(clip):
    features = cache(30)
    result = tune(clip, features, method="map", base=prompt(), epochs=40, progress=False)
    classes = prompt().class_embeddings(clip, NAMES).double()
    expected = by_hand(features.tensor().double(), features.labels, classes, clip.logit_scale, 0.5, 40, 1e-3)
    torch.testing.assert_close(result.solution.top.matrix.double(), expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("space", ["embedding", "parameter"])
def test_fit_goes_on_from_a_map_near_the_identity(clip, space):
    """The path is one of image features: both spaces are the same, since a map is linear. The first step by hand."""
    features, base = cache(30), prompt()
    tuned = Stack(base, LinearMap(MATRIX))
    settings = {"epochs": 1, "warmup_epochs": 0, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 30}
    found = fit(clip, features, tuned, lam=3.0, beta=0.5, tau=0.3, points=4, space=space, progress=False, **settings)
    classes, scale = base.class_embeddings(clip, NAMES).double(), clip.logit_scale
    x, labels, eye = features.tensor().double(), features.labels, torch.eye(8, dtype=torch.float64)
    a2, a = MATRIX.double(), (0.7 * eye + 0.3 * MATRIX.double()).requires_grad_()

    def entropy(images):
        return F.cross_entropy(scale * F.normalize(images, dim=-1) @ classes.T, labels)

    def point(t):
        if space == "parameter":
            return x @ (a2 + t * (a - a2))
        ends = (F.normalize(x @ matrix, dim=-1) for matrix in (a2, a))
        first, second = ends
        return first + t * (second - first)

    paths = sum(entropy(point(t)) for t in (0, 0.25, 0.5, 0.75)) / 4
    loss = entropy(x @ a) + 3.0 * (a - eye).square().sum() + 0.5 * paths
    (gradient,) = torch.autograd.grad(loss, a)
    torch.testing.assert_close(found.solution.top.matrix.double(), (a - 0.1 * gradient).detach(), atol=1e-5, rtol=1e-4)


def test_a_path_of_maps_ends_at_its_ends(clip):
    a, b = (Stack(prompt(), LinearMap(m)) for m in (torch.eye(8), MATRIX))
    features = cache(30)
    for space in ("embedding", "parameter"):
        walked = path(clip, a, b, features, points=3, space=space)
        assert walked.accuracy[0] == pytest.approx(evaluate(clip, a, features).accuracy)
        assert walked.accuracy[-1] == pytest.approx(evaluate(clip, b, features).accuracy)


def test_ensembles_keep_each_end_s_image_features(clip):
    x = F.normalize(normal(6, 8, seed=1), dim=-1)
    a, b = classifier(clip, head()), classifier(clip, Stack(prompt(), LinearMap(MATRIX)))
    for first, second in ((a, b), (b, a)):
        expected = 0.75 * first.logits(NAMES, x) + 0.25 * second.logits(NAMES, x)
        torch.testing.assert_close(logit_ensemble(first, second, 0.25).logits(NAMES, x), expected)
    with pytest.raises(ValueError, match="classifiers must take the same image features for a weight average"):
        weight_average(a, b)


def test_files_for_others_have_no_place_for_it(clip, tmp_path):
    with pytest.raises(ValueError, match="solution must leave image features unchanged, got a stack"):
        to_head(Stack(prompt(), LinearMap(MATRIX)), tmp_path / "head.npz", clip=clip, classnames=NAMES)
    assert not (tmp_path / "head.npz").exists()


def test_files_are_read(tmp_path):
    torch.save(MATRIX, tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", A=MATRIX.numpy())
    save_file({"weight": MATRIX.T.contiguous()}, tmp_path / "c.safetensors")
    assert torch.equal(LinearMap.from_file(tmp_path / "a.pt").matrix, MATRIX)
    assert torch.equal(LinearMap.from_file(tmp_path / "b.npz").matrix, MATRIX)
    found = LinearMap.from_file(tmp_path / "c.safetensors", transposed=True)
    assert torch.equal(found.matrix, MATRIX) and found.notes == {"file": "c.safetensors", "name": "weight"}
    found.save(tmp_path / "saved")
    assert torch.equal(load_solution(tmp_path / "saved").matrix, MATRIX)


@pytest.mark.parametrize(
    "arrays", [{"A": normal(8, 4)}, {"A": MATRIX, "b": normal(8)}, {"A": MATRIX, "B": MATRIX}], ids=len
)
def test_other_files_are_refused(tmp_path, arrays):
    save_file({name: value.clone() for name, value in arrays.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"must hold one square matrix \[D, D\] alone, got A \[8, "):
        LinearMap.from_file(tmp_path / "a.safetensors")


def test_what_is_no_map_is_refused():
    with pytest.raises(ValueError, match=r"matrix must have shape \[D, D\], got \[8, 4\]"):
        LinearMap(normal(8, 4))
