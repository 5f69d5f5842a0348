"""Several training runs in lockstep."""

import pytest
import torch
from fit_cases import assert_same_run, epochs_on_disk
from tiny import NAMES, cache, head, parameter, prompt, tiny_clip

from mergetune import FitResult, tune
from mergetune.clip import TextEncoder
from mergetune.io import write_atomically
from mergetune.training import fit_job, train_together, tune_job

pytestmark = pytest.mark.usefixtures("one_thread")

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
    torch.testing.assert_close(parameter(a.solution), parameter(b.solution), atol=2e-5, rtol=2e-4)
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
    tokens = sum(len(chunk.rows) for chunk in jobs[0].objective.space.encoder.chunks)
    for room, sizes in ((5 * tokens, [5] * 12), (3 * tokens - 1, [1] * 12 + [2] * 24), (tokens - 1, [1] * 60)):
        monkeypatch.setattr("mergetune.clip.packed_texts.CHUNK_TOKENS", room)
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

    monkeypatch.setattr("mergetune.training.runs.write_atomically", write)


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
    with pytest.raises(ValueError, match="resume must be a different folder for each run, got .*run twice"):
        train_together(jobs)
    tune(clip, cache(), resume=tmp_path / "run", **LOCKSTEP)
    with pytest.raises(ValueError, match="holds another run: seed 1 there, 2 here"):
        train_together([tune_job(clip, cache(), **LOCKSTEP), jobs[1]])
