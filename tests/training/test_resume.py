"""Training runs that are killed and resumed."""

import json
import multiprocessing
import os
import random
import signal

import pytest
import torch
from fit_cases import QUICK, STATE, assert_same_run, epochs_on_disk, fit_random, tune_kgcoop
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import cache, parameter, prompt, tiny_clip

from mergetune import FitResult, fit, tune
from mergetune.io import write_atomically
from mergetune.training.runs import short_digest

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
