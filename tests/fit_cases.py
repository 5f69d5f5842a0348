"""Short runs of training that several test files start."""

import json

import torch
from safetensors import safe_open
from tiny import parameter, prompt

from mergetune import FitResult, fit, tune

STATE = "state.safetensors"
QUICK = {"epochs": 3, "batch_size": 8, "precision": "float32"}


def assert_same_run(a: FitResult, b: FitResult):
    assert torch.equal(parameter(a.solution), parameter(b.solution))
    assert a.history == b.history and a.settings == b.settings and a.solution.notes == b.solution.notes


# -- seeds, batches, views ---------------------------------------------------------------------------------------------


def tune_kgcoop(clip, features, **kwargs):
    return tune(clip, features, method="kgcoop", n_ctx=2, **kwargs)


def fit_random(clip, features, **kwargs):
    return fit(clip, features, [prompt(1), prompt(2)], beta=[0.5, 1.0], grid="random", **kwargs)


# -- kill and resume ---------------------------------------------------------------------------------------------------


def epochs_on_disk(folder) -> int:
    if not (folder / STATE).exists():
        return 0
    with safe_open(folder / STATE, "pt") as file:
        return len(json.loads(file.metadata()["run"])["history"])
