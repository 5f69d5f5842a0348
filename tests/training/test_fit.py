"""tune() and fit(): steps recomputed by hand, seeds, choice by val, kill and resume, refusals before any training."""

import io
import json
import math
import sys
from copy import deepcopy
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from fit_cases import QUICK, STATE, assert_same_run, epochs_on_disk, fit_random, head_weight, tune_kgcoop
from safetensors import safe_open
from tiny import NAMES, cache, head, normal, parameter, prompt, tiny_clip

from mergetune import FeatureCache, FitResult, FrozenClip, Head, Prompt, evaluate, fit, tune
from mergetune.data.row_reading import TensorRows
from mergetune.training.jobs import Training

pytestmark = pytest.mark.usefixtures("one_thread")


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "warmup", "lr"), [(50, 1, 2e-3), (5, 2, 0.1), (3, 0, 2e-3), (1, 1, 2e-3), (2, 5, 1.0)]
)
def test_the_rate_of_each_epoch_is_dassls(epochs, warmup, lr):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(epochs))
    expected = []
    for epoch in range(epochs):
        expected.append(1e-5 if epoch < warmup else cosine.get_last_lr()[0])
        optimizer.step()
        if epoch >= warmup:  # Dassl's warm-up scheduler steps its successor only after the warm-up
            cosine.step()
    training = Training(epochs=epochs, batch_size=1, lr=lr, warmup_epochs=warmup)
    assert [training.lr_at(epoch) for epoch in range(epochs)] == pytest.approx(expected, rel=1e-12)


def test_history_has_the_rates(clip):
    history = fit(clip, cache(), prompt(), epochs=4).history
    expected = [1e-5, *(2e-3 * 0.5 * (1 + math.cos(math.pi * e / 4)) for e in range(3))]
    assert [entry["lr"] for entry in history] == pytest.approx(expected)
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4]


# -- training by hand --------------------------------------------------------------------------------------------------


def text_tower(clip: FrozenClip, template: str):
    """Context vectors -> class features, by open_clip's own parts in float64, class by class."""
    model = deepcopy(clip.model).double()
    tower = model.text if isinstance(model, open_clip.CustomTextCLIP) else model
    tokens = clip.tokenizer([template.format(name) for name in NAMES])

    def encode(ctx):
        n, own = ctx.shape[-2], ctx if ctx.ndim == 3 else ctx.expand(len(NAMES), -1, -1)
        x = tower.token_embedding(tokens)
        x = torch.cat([x[:, :1], own, x[:, 1 + n :]], 1) + tower.positional_embedding
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
        if tower.attn_mask is None:
            return tower.text_projection(x[:, -1])
        return x[torch.arange(len(NAMES)), tokens.argmax(-1)] @ tower.text_projection

    return encode


def by_hand(
    clip, features, start, solution, *, w1=None, lam=0.0, surrogate="", anchors=(), betas=(), alphas=(), space=""
):
    """Two epochs of one step each, at the published rates 1e-5 and 2e-3, momentum .9 and weight decay 5e-4."""
    x, y = features.tensor().double(), features.labels
    if isinstance(solution, Head):
        encode, unit = (lambda p: p), (lambda w: w)
        x = torch.cat([x, torch.ones(len(x), 1)], 1) if solution.bias is not None else x
    else:
        encode, unit = text_tower(clip, solution.template), (lambda w: F.normalize(w, dim=-1))
    scale = clip.logit_scale

    def ce(w):
        return F.cross_entropy(scale * x @ unit(w).T, y)

    def zero_shot_term(w):
        if surrogate == "cosine":
            return (1 - F.cosine_similarity(w, w1, dim=-1)).mean()
        if surrogate == "l2":
            return (unit(w) - unit(w1)).norm(dim=-1).mean()
        h = torch.ones(())
        if surrogate == "fisher":
            p = (scale * x @ unit(w1).T).softmax(-1)
            h = scale**2 * torch.stack([(q * (1 - q) * x.T**2).mean(1) for q in p.T])
            h = h / h.mean()
        return 0.5 * (h * (unit(w) - unit(w1)) ** 2).sum(-1).mean()

    def point(parameter, anchor, a):
        if space == "parameter":
            return encode(anchor + a * (parameter - anchor))
        return encode(anchor) + a * (encode(parameter) - encode(anchor))

    parameter, velocity, losses = start.double(), 0.0, []
    for lr in (1e-5, 2e-3):
        parameter = parameter.detach().requires_grad_()
        loss = ce(encode(parameter)) + (lam * zero_shot_term(encode(parameter)) if surrogate else 0.0)
        for beta, anchor in zip(betas, anchors, strict=True):
            loss = loss + beta * sum(ce(point(parameter, anchor.double(), a)) for a in alphas) / len(alphas)
        (gradient,) = torch.autograd.grad(loss, parameter)
        velocity = 0.9 * velocity + gradient + 5e-4 * parameter
        parameter = (parameter - lr * velocity).detach()
        losses.append(loss.item())
    return parameter, losses


def assert_trained_to(result: FitResult, start, expected, losses):
    assert [entry["loss"] for entry in result.history] == pytest.approx(losses, rel=1e-5)
    moved = expected - start.double()
    assert moved.abs().max() > 1e-5, "there must be something to see"
    error = (parameter(result.solution) - expected).abs().max()
    assert error < 1e-3 * moved.abs().max() + 2e-7


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("method", ["coop", "class-specific coop", "kgcoop", "head"])
def test_two_steps_of_tune_by_hand(method, siglip):
    clip, features = tiny_clip(siglip=siglip), cache()
    result = tune(
        clip, features, method=method.split()[-1], class_specific="class" in method, epochs=2, precision="float32"
    )
    start = Prompt.from_template(clip)
    start = start.per_class(NAMES) if "class" in method else start
    start = Head.zero_shot(clip, NAMES) if method == "head" else start
    near = {}
    if method == "kgcoop":
        near = {"w1": clip.class_embeddings(NAMES).double(), "lam": 8.0, "surrogate": "cosine"}
    assert_trained_to(result, parameter(start), *by_hand(clip, features, parameter(start), start, **near))


FIT_CASES = {
    "defaults": {},
    "official": {"lam": 10, "surrogate": "cosine", "beta": 1.0, "tau": 1.0, "grid": "official"},
    "own points": {"grid": [0.0, 0.2, 1.0]},
    "l2": {"surrogate": "l2"},
    "fisher": {"surrogate": "fisher", "lam": 50},
    "from the zero-shot solution": {"tau": 0.0},
    "two anchors": {"anchors": 2, "beta": [0.5, 2.0]},
    "one beta for two": {"anchors": 2, "beta": 0.7},
    "parameter space": {"space": "parameter", "anchors": 2, "beta": [0.5, 2.0]},
}
GRIDS = {"even": [0, 0.2, 0.4, 0.6, 0.8], "official": [0.1, 0.3, 0.5, 0.7, 0.9]}


@pytest.mark.parametrize("kind", ["prompt", "class-specific", "siglip", "head", "head with bias"])
@pytest.mark.parametrize("case", FIT_CASES)
def test_two_steps_of_fit_by_hand(kind, case):
    clip, features, kwargs = tiny_clip(siglip=kind == "siglip"), cache(), dict(FIT_CASES[case])
    is_head, count = kind.startswith("head"), kwargs.pop("anchors", 1)
    tuned = [head(k, bias="bias" in kind) if is_head else prompt(k) for k in range(1, count + 1)]
    if kind == "class-specific":
        tuned = [replace(p, ctx=0.3 * normal(3, 4, 16, seed=k), classnames=NAMES) for k, p in enumerate(tuned)]
    result = fit(clip, features, tuned[0] if count == 1 else tuned, epochs=2, precision="float32", **kwargs)

    if is_head:  # all in the CLIP's own scale
        zero_shot = parameter(Head.zero_shot(clip, NAMES, bias="bias" in kind))
        anchors, w1 = [parameter(t) * t.logit_scale / clip.logit_scale for t in tuned], zero_shot
    else:
        anchors, zero_shot = [parameter(t) for t in tuned], parameter(Prompt.from_template(clip))
        w1 = clip.class_embeddings(NAMES)
    lam = kwargs.get("lam", 8.0)
    if is_head:  # in the unit of the head's loss
        lam = head_weight(lam, features, zero_shot, clip.logit_scale)
        assert result.settings["lam_effective"] == pytest.approx(lam, rel=1e-5)
    tau, grid, beta = kwargs.get("tau", 0.3), kwargs.get("grid", "even"), kwargs.get("beta", 0.5)
    start = (1 - tau) * zero_shot + tau * torch.stack(anchors).mean(0)
    expected = by_hand(
        clip,
        features,
        start,
        tuned[0],
        w1=w1.double(),
        lam=lam,
        surrogate=kwargs.get("surrogate", "identity"),
        anchors=anchors,
        betas=beta if isinstance(beta, list) else [beta] * count,
        alphas=GRIDS.get(grid, grid) if isinstance(grid, str) else grid,
        space=kwargs.get("space", "embedding"),
    )
    assert_trained_to(result, start, *expected)


STILL = {"epochs": 1, "lr": 1e-30, "warmup_lr": 1e-30}  # rates that move nothing


@pytest.mark.parametrize("tau", [0, 0.3, 1])
@pytest.mark.parametrize("kind", ["prompt", "class-specific", "head"])
def test_where_tau_starts(clip, tau, kind):
    tuned = head(scale=clip.logit_scale) if kind == "head" else prompt()
    tuned = tuned.per_class(NAMES) if kind == "class-specific" else tuned
    zero_shot = Head.zero_shot(clip, NAMES, bias=True) if kind == "head" else Prompt.from_template(clip)
    expected = (1 - tau) * parameter(zero_shot) + tau * parameter(tuned)
    result = fit(clip, cache(), tuned, tau=tau, **STILL)
    torch.testing.assert_close(parameter(result.solution), expected, atol=1e-7, rtol=1e-6)
    given = fit(clip, cache(), tuned, tau=tau, zero_shot=zero_shot, **STILL)
    assert torch.equal(parameter(given.solution), parameter(result.solution))
    if kind == "head":
        given = fit(clip, cache(), tuned.rescaled(1.0), tau=tau, zero_shot=zero_shot.rescaled(3.0), **STILL)
        torch.testing.assert_close(parameter(given.solution), expected)


def test_tau_1_takes_templates_of_any_length(clip):
    result = fit(clip, cache(), prompt(), tau=1, zero_shot=["the {}", "one {} outdoors"], **STILL)
    assert torch.equal(result.solution.ctx, prompt().ctx)


def test_tau_1_takes_templates_with_nothing_before_the_name(clip):
    fit(clip, cache(), prompt(), tau=1, zero_shot="{} outdoors", **STILL)


def test_the_result_keeps_the_kind_and_the_template(clip):
    tuned = prompt().per_class(NAMES)
    solution = fit(clip, cache(), tuned, **QUICK).solution
    assert (solution.template, solution.classnames, solution.backbone) == (tuned.template, NAMES, clip.name)
    merged = fit(clip, cache(), head(scale=1.0), **QUICK).solution
    assert merged.classnames == NAMES and merged.logit_scale == pytest.approx(clip.logit_scale)


@pytest.mark.parametrize("kind", ["prompt", "head"])
def test_the_result_knows_its_clip(clip, kind):
    solution = fit(clip, cache(), prompt() if kind == "prompt" else head(), **QUICK).solution
    assert solution.fingerprint == (clip.text_fingerprint if kind == "prompt" else clip.image_fingerprint)


@pytest.mark.parametrize("tuned", [[prompt(1), prompt(2)], [head(1, bias=True)]], ids=["prompts", "head"])
def test_products_with_the_anchors_are_made_once(clip, monkeypatch, tuned):
    """Kept or made at every step, they are the same products."""
    kept = fit(clip, cache(), tuned, **QUICK)
    monkeypatch.setattr("mergetune.training.loop.MAX_PRODUCTS", 0)
    made = fit(clip, cache(), tuned, **QUICK)
    assert torch.allclose(parameter(kept.solution), parameter(made.solution), rtol=1e-5, atol=1e-7)


def test_the_precision_of_the_tower_is_the_machine_s_own_or_as_asked(clip):
    """bfloat16 in the tower only: what comes out is float32, and near what float32 makes of it."""
    runs = {name: fit(clip, cache(), prompt(), epochs=3, precision=name) for name in ("float32", "bfloat16", "auto")}
    auto = runs["auto"].settings["precision"]
    able = torch.cpu.get_capabilities()
    assert auto == ("bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32")
    assert torch.equal(runs["auto"].solution.ctx, runs[auto].solution.ctx)
    half, whole = runs["bfloat16"].solution.ctx, runs["float32"].solution.ctx
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    assert torch.allclose(half, whole, atol=0.05)


# -- seeds, batches, views ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [tune_kgcoop, fit_random])
def test_the_seed_decides_every_bit(clip, run):
    features = cache(views=3)
    a, b, other = (run(clip, features, seed=seed, **QUICK) for seed in (4, 4, 5))
    assert_same_run(a, b)
    assert not torch.equal(parameter(a.solution), parameter(other.solution))
    torch.manual_seed(99)  # the global generator is neither used ...
    before = torch.get_rng_state()
    assert_same_run(run(clip, features, seed=4, **QUICK), a)
    assert torch.equal(torch.get_rng_state(), before)  # ... nor moved


def test_every_image_comes_once_an_epoch_and_views_are_drawn(clip, monkeypatch):
    seen, rows = [], FeatureCache.rows
    monkeypatch.setattr(
        FeatureCache, "rows", lambda self, i, view=0: seen.append((self, i, view)) or rows(self, i, view)
    )
    features, val = cache(30, views=3), cache(9, seed=1, views=2)
    result = tune(clip, features, epochs=2, batch_size=7, val=val)
    batches = [(index, view) for which, index, view in seen if which is features and len(index) == 7]
    assert len(batches) == 8 and result.timings["steps"] == 8  # whole batches only
    for epoch in (batches[:4], batches[4:]):
        assert len(set(torch.cat([index for index, _ in epoch]).tolist())) == 28
    assert torch.cat([view for _, view in batches]).unique().tolist() == [0, 1, 2]
    assert all(int(torch.as_tensor(view).max()) == 0 for which, _, view in seen if which is val)
    assert not torch.equal(batches[0][0], batches[4][0])


def test_fewer_images_than_a_batch(clip):
    assert fit(clip, cache(5), prompt(), epochs=2, batch_size=128).timings["steps"] == 2


# -- val ---------------------------------------------------------------------------------------------------------------


def test_val_chooses_the_epoch_and_nothing_else(clip):
    features = cache()
    x = F.normalize(features.tensor() + 0.01 * normal(30, 8, seed=8), dim=-1)
    val = FeatureCache.from_tensors(x, (features.labels + 1) % 3, NAMES)  # gets worse by training
    kwargs = {"epochs": 8, "batch_size": 8, "lr": 0.5, "seed": 1, "precision": "float32"}
    plain, chosen = tune(clip, features, **kwargs), tune(clip, features, val=val, **kwargs)
    scores = [entry["val_accuracy"] for entry in chosen.history]
    best = max(scores)
    assert chosen.solution.notes["best_epoch"] == scores.index(best) + 1 < 8  # the first of the best
    assert evaluate(clip, chosen.solution, val).accuracy == pytest.approx(best)
    assert scores[-1] == pytest.approx(evaluate(clip, plain.solution, val).accuracy)
    assert [{**e, "val_accuracy": 0} for e in chosen.history] == [{**e, "val_accuracy": 0} for e in plain.history]
    assert plain.solution.notes["best_epoch"] == 8 and not torch.equal(plain.solution.ctx, chosen.solution.ctx)


def test_the_first_of_equally_good_epochs_is_chosen(clip):
    result = fit(clip, cache(), prompt(), val=cache(9, seed=1), **{**STILL, "epochs": 3})
    assert len({entry["val_accuracy"] for entry in result.history}) == 1 and result.solution.notes["best_epoch"] == 1


@pytest.mark.parametrize("named", [True, False])
def test_val_that_shares_images_is_refused(clip, tmp_path, named):
    features = cache(files=[f"{i}.png" for i in range(30)] if named else ())
    rows = torch.cat([F.normalize(normal(1, 8, seed=9), dim=-1), features.tensor()[:8]])
    files = ["other.png", *features.files[:8]] if named else ()
    val = FeatureCache.from_tensors(rows, torch.arange(9) % 3, NAMES, files=files)
    with pytest.raises(ValueError, match="val must not share images with features, got 8 in both"):
        fit(clip, features, prompt(), val=val, resume=tmp_path / "run")
    with pytest.raises(ValueError, match="val must not share images with features, got 30 in both"):
        tune(clip, features, val=features, resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_val_from_another_folder_may_have_the_same_file_names(clip):
    files = [f"cat/{i}.png" for i in range(30)]
    fit(clip, cache(files=files), prompt(), val=cache(seed=1, files=files), **QUICK)


# -- runs that go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "term"), [("prompt", "endpoint"), ("head", "surrogate")])
def test_a_run_that_explodes_stops_and_leaves_its_last_good_state(clip, tmp_path, kind, term):
    tuned = prompt() if kind == "prompt" else head()
    kwargs = {"lr": 1e30, "resume": tmp_path, "epochs": 5, "batch_size": 10}
    for _ in range(2):  # and again when it is resumed
        with pytest.raises(FloatingPointError, match=rf"the term '{term}' became (nan|inf) at step 5 \(epoch 2\)"):
            fit(clip, cache(), tuned, **kwargs)
        assert epochs_on_disk(tmp_path) == 1
        with safe_open(tmp_path / STATE, "pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


def test_features_that_turn_to_nan_after_they_were_checked(clip, tmp_path):
    features = cache()
    broken = replace(features, source=TensorRows([torch.full((1, len(features), features.dim), float("nan"))]))
    with pytest.raises(FloatingPointError, match="the term 'endpoint' became nan at step 1"):
        tune(clip, broken, resume=tmp_path / "run", **QUICK)
    assert not epochs_on_disk(tmp_path / "run")


# -- results on disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuned", [prompt(), head()], ids=["prompt", "head"])
def test_a_result_comes_back(clip, tmp_path, tuned):
    result = fit(clip, cache(), tuned, val=cache(9, seed=1), **QUICK)
    result.save(tmp_path / "out")
    loaded = FitResult.load(tmp_path / "out")
    assert_same_run(loaded, result)
    assert loaded.timings == result.timings and loaded.timings["steps"] == 9
    weight = loaded.settings.get("lam_effective", 8)
    for entry in loaded.history:
        assert set(entry) == {"epoch", "lr", "loss", "endpoint", "surrogate", "path_1", "val_accuracy"}
        total = entry["endpoint"] + weight * entry["surrogate"] + 0.5 * entry["path_1"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["versions"].keys() == {
        "python",
        "mergetune",
        "torch",
        "open_clip_torch",
    }


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"history": [], "settings": {}}'])
def test_a_damaged_result_is_refused(clip, tmp_path, content):
    fit(clip, cache(), prompt(), **QUICK).save(tmp_path)
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match="result.json is damaged: .*; load_solution"):
        FitResult.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        FitResult.load(tmp_path / "missing")


# -- the progress bar --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(io.StringIO, True, False), (Terminal, True, True), (Terminal, False, False)]
)
def test_the_bar_is_for_terminals(clip, monkeypatch, capsys, stream, progress, shown):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    fit(clip, cache(), prompt(), progress=progress, **QUICK)
    assert bool(stderr.getvalue()) == shown and not capsys.readouterr().out
    assert not shown or "mergetune" in stderr.getvalue()
