"""Training runs that are killed and resumed."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from fit_cases import QUICK, STATE, assert_same_run, epochs_on_disk, fit_random, tune_kgcoop
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import NAMES, cache, head, parameter, prompt, tiny_clip

from mergetune import FitResult, FrozenClip, fit, tune
from mergetune.io import write_atomically
from mergetune.training import fit_job, older_settings_of, run_folder, settings_of, train_together, tune_job
from mergetune.training.runs import short_digest, training_in

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.slow
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
    assert torch.equal(parameter(resumed.solution), parameter(whole.solution))
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
        from mergetune.training import runs

        runs.write_atomically, os.fsync, os.replace = write, sync, rename
        long_run(which, tmp_path / "run", epochs=5)

    child = in_child(work)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert epochs_on_disk(tmp_path / "run") == (number if moment == "after renaming" else number - 1)
    assert_same_run(long_run(which, tmp_path / "run", epochs=5), long_run(which, epochs=5))


def test_a_killed_run_leaves_nothing_behind_once_it_is_done(tmp_path):
    (tmp_path / f".{STATE}.999999.part").write_bytes(b"half")
    long_run("tune", tmp_path, epochs=2)
    assert {file.name for file in tmp_path.iterdir()} == {STATE}


CHANGES = {
    "lam 8 there, 9 here": {"lam": 9.0},
    "beta 0.5 there, 0.6 here": {"beta": 0.6},
    "tau 0.3 there, 0.4 here": {"tau": 0.4},
    "points 5 there, 6 here": {"points": 6},
    "grid even there, official here": {"grid": "official"},
    "surrogate identity there, cosine here": {"surrogate": "cosine"},
    "space embedding there, parameter here": {"space": "parameter"},
    "epochs 3 there, 4 here": {"epochs": 4},
    "batch_size 8 there, 9 here": {"batch_size": 9},
    "lr 0.002 there, 0.001 here": {"lr": 1e-3},
    "seed 1 there, 2 here": {"seed": 2},
    "precision float32 there, bfloat16 here": {"precision": "bfloat16"},
    "momentum 0.9 there, 0.8 here": {"momentum": 0.8},
    "warmup_epochs 1 there, 0 here": {"warmup_epochs": 0},
    "another zero-shot solution: 'a photo of a {}.' there, 'a sketch of a {}.' here": {
        "zero_shot": "a sketch of a {}."
    },
    "another fine-tuned solution: prompt in both, but with other contents": {"tuned": prompt(5)},
    "another fine-tuned solution: prompt there, prompt by coop, lam 3, seed 2 here": {
        "tuned": prompt(5).with_state(prompt(5).state(), notes={"settings": {"method": "coop", "seed": 2, "lam": 3}})
    },
    "other training images: 30 of 3 classes in both, but with other contents": {"features": cache(seed=3)},
    "other training images: 30 of 3 classes there, 33 of 3 classes here": {"features": cache(33)},
    "other validation images: none there, 9 of 3 classes here": {"val": cache(9, seed=3)},
    "other classes: 3 with dog there, 3 with wolf here": {"features": cache(classes=(*NAMES[:2], "wolf"))},
    "another CLIP: tiny-0 there, tiny-1 here": {"clip": tiny_clip(1)},
    "stage fit there, tune here": {"stage": "tune"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    fit(tiny_clip(), cache(), prompt(), resume=folder, **QUICK)
    return folder


@pytest.mark.parametrize("words", CHANGES)
def test_a_run_with_other_settings_is_not_taken_up_and_both_values_are_named(clip, finished, words):
    before = (finished / STATE).read_bytes()
    kwargs = {"clip": clip, "features": cache(), "tuned": prompt(), **QUICK, **CHANGES[words]}
    train = fit
    if kwargs.pop("stage", "fit") == "tune":
        del kwargs["tuned"]
        train = tune
    with pytest.raises(ValueError) as caught:
        train(resume=finished, **kwargs)
    message = str(caught.value)
    assert f"resume: {finished} holds another run: {words}" in message, message
    assert message.endswith("; give another folder, or delete its files to train anew")
    assert (finished / STATE).read_bytes() == before
    assert not re.search("[0-9a-f]{8}", message), message


def test_a_state_without_descriptions_is_refused_in_words_too(clip, finished, tmp_path):
    """Version 0.1 recorded checksums alone."""
    shutil.copytree(finished, tmp_path / "run")
    with safe_open(tmp_path / "run" / STATE, "pt") as file:
        tensors, record = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["run"])  # noqa: SIM118
    del record["in_words"]
    save_file(tensors, tmp_path / "run" / STATE, metadata={"run": json.dumps(record)})
    with pytest.raises(ValueError, match="other training images: not recorded there, 33 of 3 classes here"):
        fit(clip, cache(33), prompt(), resume=tmp_path / "run", **QUICK)
    assert_same_run(
        fit(clip, cache(), prompt(), resume=tmp_path / "run", **QUICK), fit(clip, cache(), prompt(), **QUICK)
    )


def test_two_processes_do_not_train_one_run(clip, tmp_path):
    with (
        ThreadPoolExecutor() as other,
        training_in(tmp_path),
        pytest.raises(RuntimeError, match=f"another thread of this process works in {tmp_path}: wait until it ends"),
    ):
        other.submit(fit, clip, cache(), prompt(), resume=tmp_path, **QUICK).result()
    assert fit(clip, cache(), prompt(), resume=tmp_path, **QUICK).history[-1]["epoch"] == QUICK["epochs"]


def test_a_finished_run_keeps_the_seconds_of_its_training_on_disk(clip, tmp_path):
    first = fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)
    first.save(tmp_path)
    again = fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)
    again.save(tmp_path)
    assert first.timings["steps"] == 9 and again.timings["steps"] == 0
    assert FitResult.load(tmp_path).timings == first.timings


@pytest.mark.parametrize(
    "change", [{"method": "head"}, {"class_specific": True}, {"template": "the {}"}, {"kg_weight": 4}]
)
def test_another_tune_is_not_taken_up(clip, tmp_path, change):
    kwargs = {"method": "kgcoop", **QUICK}
    tune(clip, cache(), resume=tmp_path, **kwargs)
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name} .* there, .* here"):
        tune(clip, cache(), resume=tmp_path, **{**kwargs, **change})
    with pytest.raises(ValueError, match="stage tune there, fit here"):
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
        save_file({"state.ctx": torch.zeros(2)}, tmp_path / STATE, metadata=metadata[damage])
    else:
        content = {"truncated": whole[:-9], "empty": b"", "noise": random.Random(0).randbytes(500)}[damage]
        (tmp_path / STATE).write_bytes(content)
    with pytest.raises(
        ValueError, match="resume: .*state.safetensors (must|is damaged: ).*, got .*; delete it to start anew"
    ):
        fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)


@pytest.mark.parametrize("missing", ["settings", "history", "best_epoch", "digest", "best.ctx", "state.ctx"])
def test_a_state_that_lacks_something_is_refused(clip, finished, tmp_path, missing):
    with safe_open(finished / STATE, "pt") as file:
        record = json.loads(file.metadata()["run"])
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != missing}  # noqa: SIM118
    record.pop(missing, None)
    if "." in missing:
        record["digest"] = short_digest(*(tensors[name] for name in sorted(tensors)))
    save_file(tensors, tmp_path / STATE, metadata={"run": json.dumps(record)})
    with pytest.raises(ValueError, match=rf"state\.safetensors .*{missing} .*got (no such field|none); delete it"):
        fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)


def test_a_flipped_bit_in_the_state_is_refused(clip, finished, tmp_path):
    content = bytearray((finished / STATE).read_bytes())
    content[-3] ^= 1
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError, match="digest must be that of its tensors"):
        fit(clip, cache(), prompt(), resume=tmp_path, **QUICK)


# -- other processors --------------------------------------------------------------------------------------------------

JOBS = {
    "prompt": lambda clip: fit_job(clip, cache(), prompt(), **QUICK),
    "head": lambda clip: fit_job(clip, cache(), head(), **QUICK),
    "several templates": lambda clip: fit_job(
        clip, cache(), prompt(), zero_shot=["a photo of a {}.", "a sketch of a {}."], **QUICK
    ),
    "stage 1, head": lambda clip: tune_job(clip, cache(), method="head", **QUICK),
    "stage 1, kgcoop": lambda clip: tune_job(clip, cache(), method="kgcoop", **QUICK),
}


def rounded_otherwise(monkeypatch) -> None:
    """Class embeddings get the last bits of another processor."""
    compute = FrozenClip.class_embeddings
    monkeypatch.setattr(FrozenClip, "class_embeddings", lambda *given, **more: (1 + 2**-22) * compute(*given, **more))


@pytest.mark.parametrize("name", JOBS)
def test_a_run_is_the_same_where_another_processor_rounds_what_it_starts_from(monkeypatch, name):
    here = JOBS[name](tiny_clip())
    rounded_otherwise(monkeypatch)
    there = JOBS[name](tiny_clip())
    computed = [older_settings_of(job) for job in (here, there)]
    assert settings_of(here) == settings_of(there)
    assert computed[0] != computed[1] or name == "stage 1, kgcoop"  # whose start is made of words, not computed
    assert settings_of(JOBS[name](tiny_clip(1))) != settings_of(here)  # other weights are another run


@pytest.mark.parametrize("name", ["prompt", "head", "stage 1, head"])
def test_runs_that_recorded_computed_numbers_are_taken_up(tmp_path, name):
    job = replace(JOBS[name](tiny_clip()), resume=tmp_path)
    (first,) = train_together([job])
    with safe_open(tmp_path / STATE, "pt") as file:
        tensors, record = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["run"])  # noqa: SIM118
    record["settings"] = older_settings_of(job)
    save_file(tensors, tmp_path / STATE, metadata={"run": json.dumps(record)})
    (again,) = train_together([job])
    assert again.timings["steps"] == 0 and torch.equal(parameter(again.solution), parameter(first.solution))
    assert again.settings == record["settings"]  # the run goes on as it was begun
    called = run_folder(tmp_path / "out", record["settings"])
    assert run_folder(tmp_path / "out", settings_of(job), older=older_settings_of(job)) == called
