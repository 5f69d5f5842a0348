"""Class residuals: what they add, to which classes, how they are trained, saved and read from TaskRes."""

import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, cache, head, normal, prompt, tiny_clip

from mergetune import Head, LinearMap, Residual, Stack, Templates, evaluate, fit, load_solution, open_taskres, tune
from mergetune.evaluation import classifier


@pytest.fixture
def residual() -> Residual:
    return Residual(0.3 * normal(2, 8, seed=4), ("dog", "cat"))


def test_rows_are_added_to_unit_class_embeddings_by_name(clip, residual):
    base = prompt()
    below = base.class_embeddings(clip, NAMES)
    expected = below + torch.stack([residual.rows[1], torch.zeros(8), residual.rows[0]])
    torch.testing.assert_close(Stack(base, residual).class_weights(clip, NAMES), expected)


def test_a_class_without_a_row_falls_back_to_the_base(clip, residual):
    stack = Stack(prompt(), residual)
    others = ("fire truck", "sea lion")
    torch.testing.assert_close(stack.class_embeddings(clip, others), prompt().class_embeddings(clip, others))


def test_on_a_head_rows_are_added_as_they_are_and_the_bias_stays(clip, residual):
    base = head()
    expected = base.class_weights(clip, NAMES)
    expected[[2, 0], :8] += residual.rows
    torch.testing.assert_close(Stack(base, residual).class_weights(clip, NAMES), expected)


def test_without_class_embeddings_below_it_is_refused(clip, residual):
    with pytest.raises(ValueError, match=r"put the solution on one of these with mergetune.Stack\(base, solution\)"):
        residual.class_weights(clip, ("cat", "dog"))


def by_hand(x, labels, below, scale, lam, steps, lr):
    """min_r CE + lam mean_c 1/2 |r_c|^2 by Adam with a cosine, written out in float64."""
    r = torch.zeros_like(below).requires_grad_()
    optimizer = torch.optim.Adam([r], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logits = scale * x @ F.normalize(below + r, dim=-1).T
        loss = F.cross_entropy(logits, labels) + lam * 0.5 * r.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return r.detach()


@pytest.mark.parametrize("base", [None, prompt()], ids=["zero-shot", "prompt"])
def test_it_is_trained_by_the_published_recipe(clip, base):
    features = cache(30)
    result = tune(clip, features, method="residual", base=base, epochs=40, lam=2.0, progress=False)
    below = (base or Templates()).class_embeddings(clip, NAMES).double()
    expected = by_hand(features.tensor().double(), features.labels, below, clip.logit_scale, 2.0, 40, 1e-3)
    torch.testing.assert_close(result.solution.top.rows.double(), expected, atol=2e-5, rtol=1e-3)
    assert result.settings["epochs"] == 40 and result.settings["lr"] == 1e-3 and result.settings["optimizer"] == "adam"


def test_the_base_stays_and_training_helps(clip):
    features = cache(30)
    base = prompt()
    found = tune(clip, features, method="residual", base=base, progress=False, lam=0.1).solution
    assert found.base is base and found.classnames is None
    assert evaluate(clip, found, features).accuracy > evaluate(clip, base, features).accuracy


@pytest.mark.parametrize("space", ["embedding", "parameter"])
def test_fit_goes_on_from_a_residual_near_zero(clip, space):
    """lam S + beta path, with w1 = 0: the first step by hand."""
    features, base = cache(30), prompt()
    tuned = Stack(base, Residual(0.2 * normal(3, 8, seed=5), NAMES))
    settings = {"epochs": 1, "warmup_epochs": 0, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 30}
    found = fit(clip, features, tuned, lam=3.0, beta=0.5, tau=0.3, points=4, space=space, progress=False, **settings)
    below = base.class_embeddings(clip, NAMES).double()
    x, labels, scale = features.tensor().double(), features.labels, clip.logit_scale
    r2, r = tuned.top.rows.double(), (0.3 * tuned.top.rows).double().requires_grad_()

    def entropy(rows):
        return F.cross_entropy(scale * x @ F.normalize(below + rows, dim=-1).T, labels)

    path = sum(entropy(r2 + t * (r - r2)) for t in (0, 0.25, 0.5, 0.75)) / 4
    loss = entropy(r) + 3.0 * 0.5 * r.square().sum(1).mean() + 0.5 * path
    (gradient,) = torch.autograd.grad(loss, r)
    expected = (r - 0.1 * gradient).detach()
    torch.testing.assert_close(found.solution.top.rows.double(), expected, atol=1e-5, rtol=1e-4)


def test_taskres_checkpoints_open(clip, tmp_path):
    folder = tmp_path / "prompt_learner"
    folder.mkdir()
    base, rows = F.normalize(normal(3, 8, seed=6), dim=-1), normal(3, 8, seed=7)
    state = {"base_text_features": base.half(), "text_feature_residuals": rows.half()}
    torch.save({"state_dict": state, "epoch": 100}, folder / "model.pth.tar-100")
    found = open_taskres(tmp_path, classnames=NAMES, factor=0.5)
    x = F.normalize(normal(5, 8, seed=8), dim=-1)
    expected = 100 * x @ F.normalize(base.half().float() + 0.5 * rows.half().float(), dim=-1).T
    got = classifier(clip, found).logits(NAMES, x)
    torch.testing.assert_close(got, expected, atol=0.02, rtol=2e-3)  # the file's embeddings are unit norm in half only
    assert isinstance(found.base, Head) and found.notes == {"checkpoint": "model.pth.tar-100", "factor": 0.5}


@pytest.mark.parametrize("state", [{"ctx": normal(4, 16)}, {"base_text_features": normal(3, 8)}])
def test_other_checkpoints_are_refused(tmp_path, state):
    torch.save({"state_dict": state}, tmp_path / "model-best.pth.tar")
    with pytest.raises(ValueError, match="must hold base_text_features and text_feature_residuals of one shape"):
        open_taskres(tmp_path, classnames=NAMES)


def test_it_is_saved_and_loaded_alone(tmp_path, residual):
    residual.save(tmp_path)
    found = load_solution(tmp_path)
    assert isinstance(found, Residual) and torch.equal(found.rows, residual.rows)
    assert found.classnames == residual.classnames


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3)}, r"rows must have shape \[R, D\], got \[3\]"),
        ({"rows": torch.full((2, 8), float("nan"))}, "rows must be finite"),
        ({"classnames": ("cat",)}, "classnames must name the 2 classes of rows, got 1"),
    ],
)
def test_what_is_no_residual_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Residual(**{"rows": torch.zeros(2, 8), "classnames": ("cat", "dog")} | change)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"method": "coop", "lam": 1.0},
            ValueError,
            "lam must be left out for method 'coop', which does not use it, got 1.0: it is for residual and map",
        ),
        (
            {"method": "coop", "base": prompt()},
            ValueError,
            "base must be None unless method is residual or map, got a base for coop",
        ),
        ({"method": "residual", "base": "out/fit"}, TypeError, "base must be a solution, got .out/fit.: load a file"),
        ({"method": "residual", "lam": -1.0}, ValueError, "lam must be finite and not negative, got -1.0"),
        (
            {"method": "residual", "n_ctx": 4},
            ValueError,
            "must be left out for method",
        ),
    ],
)
def test_options_that_the_method_has_not_are_refused(clip, arguments, error, message):
    with pytest.raises(error, match=message):
        tune(clip, cache(), progress=False, **arguments)


def test_another_clip_is_refused(residual):
    other = tiny_clip(width=24, dim=24)
    with pytest.raises(ValueError, match="rows must have the embedding's width 24"):
        Stack(Templates(), residual).class_weights(other, NAMES)
    with pytest.raises(ValueError, match="matrix must have the embedding's width 24"):
        classifier(other, Stack(Templates(), LinearMap(torch.eye(8))))
