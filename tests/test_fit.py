"""tune() and fit(): steps recomputed by hand, seeds, choice by val, kill and resume, refusals before any training."""

import functools
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
from copy import deepcopy
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import NAMES, cache, head, normal, prompt, tiny_clip

from mergetune import FeatureCache, FitResult, FrozenClip, Head, Prompt, evaluate, fit, tune
from mergetune.files import write_atomically
from mergetune.fit import Training, fit_job, train_together, tune_job
from mergetune.text_tower import TextEncoder

STATE = "state.safetensors"
QUICK = {"epochs": 3, "batch_size": 8, "precision": "float32"}

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_run(a: FitResult, b: FitResult):
    assert torch.equal(a.solution.parameter, b.solution.parameter)
    assert a.history == b.history and a.settings == b.settings and a.solution.notes == b.solution.notes


# -- the schedule -----------------------------------------------------------------------------------------------------


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


# -- training by hand -------------------------------------------------------------------------------------------------


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
    error = (result.solution.parameter - expected).abs().max()
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
    assert_trained_to(result, start.parameter, *by_hand(clip, features, start.parameter, start, **near))


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
        zero_shot = Head.zero_shot(clip, NAMES, bias="bias" in kind).parameter
        anchors, w1 = [t.parameter * t.logit_scale / clip.logit_scale for t in tuned], zero_shot
    else:
        anchors, zero_shot = [t.parameter for t in tuned], Prompt.from_template(clip).parameter
        w1 = clip.class_embeddings(NAMES)
    tau, grid, beta = kwargs.get("tau", 0.3), kwargs.get("grid", "even"), kwargs.get("beta", 0.5)
    start = (1 - tau) * zero_shot + tau * torch.stack(anchors).mean(0)
    expected = by_hand(
        clip,
        features,
        start,
        tuned[0],
        w1=w1.double(),
        lam=kwargs.get("lam", 8.0),
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
    expected = (1 - tau) * zero_shot.parameter + tau * tuned.parameter
    result = fit(clip, cache(), tuned, tau=tau, **STILL)
    torch.testing.assert_close(result.solution.parameter, expected, atol=1e-7, rtol=1e-6)
    given = fit(clip, cache(), tuned, tau=tau, zero_shot=zero_shot, **STILL)
    assert torch.equal(given.solution.parameter, result.solution.parameter)
    if kind == "head":
        given = fit(clip, cache(), tuned.rescaled(1.0), tau=tau, zero_shot=zero_shot.rescaled(3.0), **STILL)
        torch.testing.assert_close(given.solution.parameter, expected)


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
    monkeypatch.setattr(sys.modules[Training.__module__], "MAX_PRODUCTS", 0)
    made = fit(clip, cache(), tuned, **QUICK)
    assert torch.allclose(kept.solution.parameter, made.solution.parameter, rtol=1e-5, atol=1e-7)


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


# -- seeds, batches, views --------------------------------------------------------------------------------------------


def tune_kgcoop(clip, features, **kwargs):
    return tune(clip, features, method="kgcoop", n_ctx=2, **kwargs)


def fit_random(clip, features, **kwargs):
    return fit(clip, features, [prompt(1), prompt(2)], beta=[0.5, 1.0], grid="random", **kwargs)


@pytest.mark.parametrize("run", [tune_kgcoop, fit_random])
def test_the_seed_decides_every_bit(clip, run):
    features = cache(views=3)
    a, b, other = (run(clip, features, seed=seed, **QUICK) for seed in (4, 4, 5))
    assert_same_run(a, b)
    assert not torch.equal(a.solution.parameter, other.solution.parameter)
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


# -- val --------------------------------------------------------------------------------------------------------------


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


# -- kill and resume --------------------------------------------------------------------------------------------------

RUNS = {"tune": tune_kgcoop, "fit": fit_random}


def long_run(which: str, folder=None, epochs: int = 12) -> FitResult:
    features, val = cache(views=3), cache(12, seed=1)
    return RUNS[which](tiny_clip(), features, epochs=epochs, batch_size=8, lr=0.05, val=val, resume=folder)


def in_child(work) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def epochs_on_disk(folder) -> int:
    if not (folder / STATE).exists():
        return 0
    with safe_open(folder / STATE, "pt") as file:
        return len(json.loads(file.metadata()["run"])["history"])


@pytest.mark.parametrize("which", RUNS)
def test_runs_that_are_killed_at_random_moments_go_on(which, tmp_path):
    tiny_clip()  # before the fork
    whole = long_run(which)
    dice, kills, left = random.Random(which), 0, []
    for attempt in range(100):
        child = in_child(lambda: long_run(which, tmp_path / "run").save(tmp_path / "out"))
        child.join(dice.uniform(0.02, 0.2 + 0.05 * attempt))
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
        left.append(epochs_on_disk(tmp_path / "run"))
        if child.exitcode == 0:
            break
    assert kills and left == sorted(left) and left[-1] == 12
    resumed = FitResult.load(tmp_path / "out")
    assert torch.equal(resumed.solution.parameter, whole.solution.parameter)
    assert resumed.history == whole.history
    assert_same_run(long_run(which, tmp_path / "run"), whole)  # a finished run is read, not trained again
    assert long_run(which, tmp_path / "run").timings["steps"] == 0


@pytest.mark.parametrize("which", RUNS)
@pytest.mark.parametrize("moment", ["before writing", "half written", "before renaming", "after renaming"])
@pytest.mark.parametrize("number", [1, 3])
def test_runs_that_are_killed_while_they_write_go_on(which, moment, number, tmp_path):
    tiny_clip()
    calls = {"write": 0, "replace": 0}

    def write(file, content, real=write_atomically):
        calls["write"] += 1
        if calls["write"] == number and moment == "before writing":
            die()
        real(file, content)

    def sync(descriptor, real=os.fsync):
        if calls["write"] == number and moment == "half written":
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        real(descriptor)

    def rename(source, target, real=os.replace):
        calls["replace"] += 1
        if calls["replace"] == number and moment == "before renaming":
            die()
        real(source, target)
        if calls["replace"] == number and moment == "after renaming":
            die()

    def work():
        module = sys.modules[Training.__module__]  # the name mergetune.fit is the function's
        module.write_atomically, os.fsync, os.replace = write, sync, rename
        long_run(which, tmp_path / "run", epochs=5)

    child = in_child(work)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert epochs_on_disk(tmp_path / "run") == (number if moment == "after renaming" else number - 1)
    assert_same_run(long_run(which, tmp_path / "run", epochs=5), long_run(which, epochs=5))


def test_a_killed_run_leaves_nothing_behind_once_it_is_done(tmp_path):
    (tmp_path / f".{STATE}.999999.part").write_bytes(b"half")
    long_run("tune", tmp_path, epochs=2)
    assert [file.name for file in tmp_path.iterdir()] == [STATE]


CHANGES = {
    "lam": {"lam": 9.0},
    "beta": {"beta": 0.6},
    "tau": {"tau": 0.4},
    "points": {"points": 6},
    "grid": {"grid": "official"},
    "surrogate": {"surrogate": "cosine"},
    "space": {"space": "parameter"},
    "epochs": {"epochs": 4},
    "batch_size": {"batch_size": 9},
    "lr": {"lr": 1e-3},
    "seed": {"seed": 2},
    "precision": {"precision": "bfloat16"},
    "momentum": {"momentum": 0.8},
    "warmup_epochs": {"warmup_epochs": 0},
    "zero_shot": {"zero_shot": "a sketch of a {}."},
    "tuned": {"tuned": prompt(5)},
    "features": {"features": cache(seed=3)},
    "val": {"val": cache(9, seed=3)},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    fit(tiny_clip(), cache(), prompt(), resume=folder, **QUICK)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_with_other_settings_is_not_taken_up(clip, finished, name):
    before = (finished / STATE).read_bytes()
    kwargs = {"features": cache(), "tuned": prompt(), **QUICK, **CHANGES[name]}
    with pytest.raises(ValueError, match=f"holds another run: its {name} is .*, this run's is "):
        fit(clip, resume=finished, **kwargs)
    assert (finished / STATE).read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"method": "head"}, {"class_specific": True}, {"template": "the {}"}, {"kg_weight": 4}]
)
def test_another_tune_is_not_taken_up(clip, tmp_path, change):
    kwargs = {"method": "kgcoop", **QUICK}
    tune(clip, cache(), resume=tmp_path, **kwargs)
    with pytest.raises(ValueError, match=f"its {next(iter(change))} is "):
        tune(clip, cache(), resume=tmp_path, **{**kwargs, **change})
    with pytest.raises(ValueError, match="its stage is 'tune', this run's is 'fit'"):
        fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)


@pytest.mark.parametrize("which", ["features", "views", "val"])
def test_a_run_on_other_features_is_not_taken_up(clip, tmp_path, which):
    known = {"fingerprint": clip.image_fingerprint}
    before = {"features": cache(**known), "val": cache(9, seed=1, **known)}
    after = {
        "features": {**before, "features": cache(seed=3, **known)},
        "views": {**before, "features": cache(views=2, **known)},
        "val": {**before, "val": cache(9, seed=4, **known)},
    }[which]
    fit(clip, tuned=prompt(), resume=tmp_path, **before, **QUICK)
    with pytest.raises(ValueError, match="holds another run"):
        fit(clip, tuned=prompt(), resume=tmp_path, **after, **QUICK)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "no record", "no JSON"])
def test_a_damaged_state_is_refused(clip, finished, tmp_path, damage):
    whole = (finished / STATE).read_bytes()
    metadata = {"no record": None, "no JSON": {"run": "{"}}
    if damage in metadata:
        save_file({"parameter": torch.zeros(2)}, tmp_path / STATE, metadata=metadata[damage])
    else:
        content = {"truncated": whole[:-9], "empty": b"", "noise": random.Random(0).randbytes(500)}[damage]
        (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError, match="resume: .*state.safetensors cannot be read .* delete it to start anew"):
        fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)


@pytest.mark.parametrize("missing", ["settings", "history", "best", "parameter"])
def test_a_state_that_lacks_something_is_refused(clip, finished, tmp_path, missing):
    with safe_open(finished / STATE, "pt") as file:
        record = json.loads(file.metadata()["run"])
        tensors = {name: file.get_tensor(name) for name in ("parameter", "best", "momentum") if name != missing}
    record.pop(missing, None)
    save_file(tensors, tmp_path / STATE, metadata={"run": json.dumps(record)})
    with pytest.raises(ValueError, match="cannot be read"):
        fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)


def test_a_flipped_bit_in_the_state_is_refused(clip, finished, tmp_path):
    content = bytearray((finished / STATE).read_bytes())
    content[-3] ^= 1
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)


# -- several runs in lockstep -----------------------------------------------------------------------------------------

MODULE = sys.modules[Training.__module__]  # the name mergetune.fit is the function's
LOCKSTEP = {"epochs": 4, "batch_size": 8, "lr": 0.05, "precision": "float32", "progress": False}


def lockstep_jobs(folder=None, **changes) -> list:
    """Of both stages, each with something of its own: start, seed, views, val, optimiser, anchors, points, loss."""
    clip, features, views, val = tiny_clip(), cache(), cache(views=3), cache(12, seed=1)
    resume = [None if folder is None else folder / str(i) for i in range(8)]
    settings = LOCKSTEP | changes
    return [
        tune_job(clip, features, seed=2, resume=resume[0], **settings),
        tune_job(clip, views, method="kgcoop", val=val, momentum=0.5, resume=resume[1], **settings),
        tune_job(clip, cache(31, seed=5), n_ctx=4, resume=resume[2], **settings),
        fit_job(clip, features, prompt(1), resume=resume[3], **settings),
        fit_job(clip, features, prompt(1), lam=2.0, tau=1.0, surrogate="l2", resume=resume[4], **settings),
        fit_job(clip, views, [prompt(1), prompt(2)], beta=[0.5, 1.0], grid="random", resume=resume[5], **settings),
        fit_job(clip, features, prompt(2), surrogate="fisher", seed=9, val=val, resume=resume[6], **settings),
        fit_job(clip, features, prompt(2), space="parameter", grid="random", points=2, resume=resume[7], **settings),
    ]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many prompts each call of the text tower for a step has encoded."""
    seen, call = [], TextEncoder.__call__

    def counted(self, ctx):
        seen.extend([len(ctx)] if ctx.requires_grad else [])
        return call(self, ctx)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    return seen


def assert_close_runs(a: FitResult, b: FitResult):
    torch.testing.assert_close(a.solution.parameter, b.solution.parameter, atol=2e-5, rtol=2e-4)
    assert a.settings == b.settings and len(a.history) == len(b.history)
    for ours, other in zip(a.history, b.history, strict=True):
        assert ours == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_runs_in_lockstep_are_the_runs_alone(calls):
    results = train_together(lockstep_jobs())
    assert calls == [7 + 3] * 4 * 3  # one call a step; a run in parameter space has its two points beside itself
    for result, job in zip(results, lockstep_jobs(), strict=True):
        assert_close_runs(result, train_together([job])[0])
    assert len({result.timings["ms_per_step"] for result in results}) == 1


@pytest.mark.parametrize("method", ["coop", "kgcoop"])
@pytest.mark.parametrize("siglip", [False, True])
def test_class_specific_runs_in_lockstep(calls, siglip, method):
    clip, common = tiny_clip(siglip=siglip), {"class_specific": True, "method": method, **LOCKSTEP}
    results = train_together([tune_job(clip, cache(), seed=seed, **common) for seed in (1, 2)])
    assert set(calls) == {2}
    for seed, result in enumerate(results, start=1):
        assert_close_runs(result, tune(clip, cache(), seed=seed, **common))


def test_runs_that_share_no_encoder_are_the_very_runs_alone(clip, calls):
    other = cache(classes=NAMES[::-1])
    runs = [
        (tune_job, (clip, cache()), {}),
        (tune_job, (clip, cache()), {"epochs": 3}),
        (tune_job, (clip, cache()), {"batch_size": 15}),
        (tune_job, (clip, cache()), {"precision": "bfloat16"}),
        (tune_job, (clip, cache()), {"position": "front"}),
        (tune_job, (clip, cache()), {"template": "a photo of a {}, drawn."}),
        (tune_job, (clip, cache()), {"n_ctx": 2}),
        (tune_job, (clip, cache()), {"class_specific": True}),
        (tune_job, (clip, other), {}),
        (tune_job, (tiny_clip(1), cache()), {}),
        (tune_job, (clip, cache()), {"method": "head"}),
        (fit_job, (clip, cache(), head(1)), {}),
        (fit_job, (clip, cache(), head(2)), {}),
    ]
    results = train_together([job(*args, **LOCKSTEP | changes) for job, args, changes in runs])
    assert set(calls) == {1}
    for result, (job, args, changes) in zip(results, runs, strict=True):
        assert_same_run(result, train_together([job(*args, **LOCKSTEP | changes)])[0])


def test_lockstep_keeps_to_what_the_tower_encodes_without_computing_twice(clip, calls, monkeypatch):
    jobs = [fit_job(clip, cache(), prompt(), seed=seed, **LOCKSTEP) for seed in range(5)]
    tokens = sum(len(chunk.rows) for chunk in jobs[0].objective.encode.chunks)
    for room, sizes in ((5 * tokens, [5] * 12), (3 * tokens - 1, [1] * 12 + [2] * 24), (tokens - 1, [1] * 60)):
        monkeypatch.setattr("mergetune.text_tower.CHUNK_TOKENS", room)
        calls.clear()
        train_together(jobs)
        assert sorted(calls) == sizes


class Stopped(BaseException):
    """Whatever ends a process."""


def stop_at_write(monkeypatch, number: int):
    """End the run in lockstep behind so many writes of a state."""
    written = []

    def write(file, content, real=write_atomically):
        real(file, content)
        written.append(file)
        if len(written) == number:
            raise Stopped

    monkeypatch.setattr(MODULE, "write_atomically", write)


def test_a_lockstep_that_was_stopped_between_epochs_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    whole = train_together(lockstep_jobs())
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at_write(patch, 16)
        train_together(lockstep_jobs(tmp_path))
    assert [epochs_on_disk(tmp_path / str(i)) for i in range(8)] == [2] * 8
    for _ in range(2):  # and again from its end
        for resumed, run in zip(train_together(lockstep_jobs(tmp_path)), whole, strict=True):
            assert_same_run(resumed, run)


def test_runs_in_lockstep_that_are_behind_catch_up(tmp_path, monkeypatch, calls):
    whole = train_together(lockstep_jobs())
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at_write(patch, 13)
        train_together(lockstep_jobs(tmp_path))
    assert [epochs_on_disk(tmp_path / str(i)) for i in range(8)] == [2] * 5 + [1] * 3
    calls.clear()
    results = train_together(lockstep_jobs(tmp_path))
    assert calls == [2 + 3] * 3 + [7 + 3] * 2 * 3
    for resumed, run in zip(results, whole, strict=True):
        assert_close_runs(resumed, run)
    assert [result.timings["steps"] for result in results] == [6] * 5 + [9] * 3


def test_a_run_goes_on_alone_or_in_lockstep(tmp_path):
    """The state of a run is the same file either way."""
    train_together(lockstep_jobs(tmp_path)[:4])
    alone = tune(tiny_clip(), cache(), seed=2, resume=tmp_path / "0", **LOCKSTEP)
    assert alone.timings["steps"] == 0 and alone.timings["seconds"] == 0


def test_a_run_that_explodes_in_lockstep_is_named(clip, tmp_path):
    common = {"epochs": 5, "batch_size": 10, "precision": "float32"}
    jobs = [tune_job(clip, cache(), lr=lr, resume=tmp_path / f"{lr}", **common) for lr in (0.01, 1e30)]
    for _ in range(2):
        with pytest.raises(
            FloatingPointError, match=r"the term 'endpoint' of run 2 of 2 \(.*1e\+30\) became nan at step 5 \(epoch 2"
        ):
            train_together(jobs)
        assert [epochs_on_disk(tmp_path / f"{lr}") for lr in (0.01, 1e30)] == [2, 1]


def test_a_run_that_explodes_is_named_by_its_place_among_all(clip):
    """Whatever goes in lockstep with it: a head goes alone, and so does another pace."""
    common = {"batch_size": 10, "precision": "float32"}
    jobs = [tune_job(clip, cache(), method="head", epochs=5, **common), tune_job(clip, cache(), epochs=5, **common)]
    for epochs in (5, 4):
        with pytest.raises(FloatingPointError, match="of run 3 of 3 became nan"):
            train_together([*jobs, tune_job(clip, cache(), lr=1e30, epochs=epochs, **common)])


def test_runs_in_lockstep_need_folders_of_their_own(clip, tmp_path):
    jobs = [tune_job(clip, cache(), seed=seed, resume=tmp_path / "run", **LOCKSTEP) for seed in (1, 2)]
    with pytest.raises(ValueError, match="resume must be a folder for each run, got .*run twice"):
        train_together(jobs)
    tune(clip, cache(), resume=tmp_path / "run", **LOCKSTEP)
    with pytest.raises(ValueError, match="holds another run: its seed is 1, this run's is 2"):
        train_together([tune_job(clip, cache(), **LOCKSTEP), jobs[1]])


# -- runs that go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "term"), [("prompt", "endpoint"), ("head", "surrogate")])
def test_a_run_that_explodes_stops_and_leaves_its_last_good_state(clip, tmp_path, kind, term):
    tuned = prompt() if kind == "prompt" else head()
    kwargs = {"lr": 1e30, "resume": tmp_path, "epochs": 5, "batch_size": 10}
    for _ in range(2):  # and again when it is resumed
        with pytest.raises(FloatingPointError, match=rf"the term '{term}' became (nan|inf) at step 5 \(epoch 2\)"):
            fit(clip, cache(), tuned, **kwargs)
        assert epochs_on_disk(tmp_path) == 1
        with safe_open(tmp_path / STATE, "pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in ("parameter", "best", "momentum"))


def test_features_that_turn_to_nan_after_they_were_checked(clip, tmp_path):
    features = cache()
    broken = replace(features, shards=(torch.full_like(features.shards[0], float("nan")),))
    with pytest.raises(FloatingPointError, match="the term 'endpoint' became nan at step 1"):
        tune(clip, broken, resume=tmp_path / "run", **QUICK)
    assert not epochs_on_disk(tmp_path / "run")


# -- results on disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuned", [prompt(), head()], ids=["prompt", "head"])
def test_a_result_comes_back(clip, tmp_path, tuned):
    result = fit(clip, cache(), tuned, val=cache(9, seed=1), **QUICK)
    result.save(tmp_path / "out")
    loaded = FitResult.load(tmp_path / "out")
    assert_same_run(loaded, result)
    assert loaded.timings == result.timings and loaded.timings["steps"] == 9
    for entry in loaded.history:
        assert set(entry) == {"epoch", "lr", "loss", "endpoint", "surrogate", "path_1", "val_accuracy"}
        total = entry["endpoint"] + 8 * entry["surrogate"] + 0.5 * entry["path_1"]
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
    with pytest.raises(ValueError, match="result.json is not a result of mergetune"):
        FitResult.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        FitResult.load(tmp_path / "missing")


# -- refusals before any training -------------------------------------------------------------------------------------

BAD_TRAINING = [
    ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
    ({"epochs": 1.5}, "epochs must be a whole number"),
    ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ({"lr": 0.0}, "lr must be finite and positive, got 0.0"),
    ({"lr": -1.0}, "lr must be finite and positive"),
    ({"lr": float("nan")}, "lr must be finite and positive, got nan"),
    ({"momentum": -0.1}, "momentum must be finite and not negative"),
    ({"weight_decay": float("inf")}, "weight_decay must be finite"),
    ({"warmup_epochs": -1}, "warmup_epochs must be a whole number of at least 0"),
    ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ({"precision": "int8"}, "precision must be one of auto, float32, bfloat16, got 'int8'"),
    ({"features": cache(fingerprint="x" * 64)}, "features must come from this CLIP's image tower"),
    ({"features": cache(dim=6)}, "features must have the embedding's width 8, got 6"),
    ({"features": cache(classes=("cat",))}, "features must hold at least two classes, got"),
    ({"features": cache().select_classes([0, 1])}, None),
    ({"val": cache(classes=NAMES[::-1])}, "val must have the classes of features"),
    ({"val": cache(fingerprint="x" * 64)}, "val must come from this CLIP's image tower"),
]
BAD_FIT = [
    ({"tau": -0.1}, r"tau must lie in \[0, 1\], got -0.1"),
    ({"tau": 1.1}, r"tau must lie in \[0, 1\]"),
    ({"tau": float("nan")}, r"tau must lie in \[0, 1\]"),
    ({"lam": -1}, "lam must be finite and not negative, got -1"),
    ({"lam": float("inf")}, "lam must be finite"),
    ({"beta": -1}, "beta must be finite and not negative, got -1"),
    ({"beta": float("nan")}, "beta must be finite"),
    ({"beta": [0.5, 0.5]}, "beta must be one number, or one for each of the 1 solutions, got 2"),
    ({"beta": []}, "beta must be one number"),
    ({"tuned": []}, "tuned must hold at least one solution"),
    ({"points": 0}, "points must be .*at least 1, got 0"),
    ({"points": 2.5}, "points must be .*at least 1, got 2.5"),
    ({"grid": "odd"}, "grid must be one of even, official, random or a list of points, got 'odd'"),
    ({"grid": []}, "grid must hold at least one path point"),
    ({"grid": [0.5, 1.5]}, r"grid must hold path points in \[0, 1\], got \[0.5, 1.5\]"),
    ({"grid": [float("nan")]}, r"grid must hold path points in \[0, 1\]"),
    ({"surrogate": "hessian"}, "surrogate must be one of identity, fisher, cosine, l2, got 'hessian'"),
    ({"space": "weights"}, "space must be one of embedding, parameter, got 'weights'"),
    (
        {"tuned": replace(prompt(), ctx=torch.ones(2, 16), template="X X {}.")},
        "give a template with 2 tokens before {}",
    ),
    ({"zero_shot": "no place"}, "exactly one {}"),
    ({"tuned": prompt().per_class(NAMES[::-1])}, "class 0 must be 'dog', got 'cat'"),
    ({"tuned": replace(head(), classnames=NAMES[::-1])}, "class 0 must be 'dog', got 'cat'"),
    ({"tuned": Head(torch.ones(3, 6), NAMES)}, "weight must have the embedding's width 8, got"),
    ({"tuned": Head(torch.ones(2, 8), NAMES[:2])}, "2 classes in its order, got 3"),
    ({"tuned": [prompt(), replace(prompt(), ctx=torch.ones(2, 16))]}, "one shape"),
    ({"tuned": replace(prompt(), fingerprint="x" * 64)}, "clip must be the one that the prompt was made for"),
]
BAD_TUNE = [
    ({"method": "cocoop"}, "method must be one of coop, kgcoop, head, got 'cocoop'"),
    ({"kg_weight": -1}, "kg_weight must be finite and not negative"),
    ({"n_ctx": 0}, "n_ctx must be at least 1, got 0"),
    ({"n_ctx": 40}, "must fit the text tower's 16 tokens"),
    ({"template": "a photo"}, "exactly one {}"),
    ({"template": "{}"}, "at least one word before {}"),
]


@pytest.mark.parametrize("template", ["{} texture.", "a centered satellite photo of {}."])
def test_a_template_of_another_length_is_the_reference_and_the_plain_words_the_start(clip, template):
    run = functools.partial(fit, clip, cache(), prompt(), epochs=1, batch_size=30, precision="float32")
    start = run(zero_shot=template, tau=0.0).settings["start"]
    assert start == run(tau=0.0).settings["start"]  # "a photo of a"
    assert run(zero_shot=template).settings["zero_shot"] != run().settings["zero_shot"]


def gap() -> FeatureCache:
    features = cache()
    return replace(features, labels=features.labels.clamp(max=1))


@pytest.mark.parametrize(("change", "match"), [*BAD_TRAINING, *BAD_FIT])
def test_fit_refuses_before_it_trains(clip, tmp_path, monkeypatch, change, match):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("it trained"))
    kwargs = {"features": cache(), "tuned": head() if match is None else prompt(), **change}
    with pytest.raises(ValueError, match=match or "3 classes in its order, got 2"):
        fit(clip, resume=tmp_path / "run", **kwargs)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "match"), [*(bad for bad in BAD_TRAINING if bad[1]), *BAD_TUNE])
def test_tune_refuses_before_it_trains(clip, tmp_path, monkeypatch, change, match):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=match):
        tune(clip, resume=tmp_path / "run", **{"features": cache(), **change})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("run", [tune_kgcoop, fit_random])
def test_an_empty_class_is_refused(clip, tmp_path, run):
    with pytest.raises(ValueError, match="features must hold images of every class, got none of 'dog'"):
        run(clip, gap(), resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": torch.full((6, 8), float("nan"))}, "features must be finite"),
        ({"features": torch.ones(6, 8)}, "of unit norm"),
        ({"labels": [0, 1, 2, 0, 1, 3]}, r"labels must lie in \[0, 3\), got 0 to 3"),
        ({"labels": [0, 1, 2, 0, 1, -1]}, r"labels must lie in \[0, 3\)"),
    ],
)
def test_features_are_refused_when_they_are_made(change, match):
    kwargs = {"features": F.normalize(torch.ones(6, 8), dim=-1), "labels": [0, 1, 2, 0, 1, 2], "classnames": NAMES}
    with pytest.raises(ValueError, match=match):
        FeatureCache.from_tensors(**{**kwargs, **change})


@pytest.mark.parametrize(
    ("tuned", "zero_shot"), [([prompt(), head()], None), (prompt(), head()), (head(), prompt())], ids=str
)
def test_prompts_and_heads_do_not_mix(clip, tuned, zero_shot):
    with pytest.raises(TypeError, match="prompt"):
        fit(clip, cache(), tuned, zero_shot=zero_shot, **QUICK)


def test_a_path_for_tuned_is_refused_by_name(clip):
    with pytest.raises((TypeError, ValueError), match="tuned"):
        fit(clip, cache(), "out", **QUICK)


def test_an_unknown_argument_is_named(clip):
    with pytest.raises(TypeError, match="epoch"):
        fit(clip, cache(), prompt(), epoch=3)


@pytest.mark.parametrize(
    "tuned", [replace(prompt(), ctx=prompt().ctx.bfloat16()), Head(normal(3, 8).bfloat16(), NAMES)]
)
def test_solutions_in_bfloat16(clip, tuned):
    fit(clip, cache(), tuned, **QUICK)


def test_prompts_of_other_templates_do_not_mix_in_parameter_space(clip):
    other = replace(prompt(2), template="X X X X {}, a type of pet.")
    with pytest.raises(ValueError, match="template"):
        fit(clip, cache(), [prompt(1), other], space="parameter", **QUICK)


def test_a_file_for_resume_is_refused_before_training(clip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="resume"):
        fit(clip, cache(), prompt(), resume=tmp_path / "file", **QUICK)


# -- the progress bar -------------------------------------------------------------------------------------------------


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
