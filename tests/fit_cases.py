"""Short runs of training that several test files start."""

import json

import torch
import torch.nn.functional as F
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


# -- the unit of a head's lam ------------------------------------------------------------------------------------------


def head_weight(lam: float, features, w1, scale: float) -> float:
    """lam times 32 times the mean of the diagonal of the Hessian at w1, [C, D] or with a bias [C, D + 1], by autograd.

    The labels do not matter: they are all of the first class here.
    """
    x = torch.cat([rows for rows, _, _ in features.batches(64)]).double()
    x = torch.cat([x, torch.ones(len(x), w1.shape[1] - x.shape[1], dtype=x.dtype)], 1)

    def loss(w):
        return F.cross_entropy(scale * x @ w.view(w1.shape).T, torch.zeros(len(x), dtype=torch.long))

    return lam * 32 * torch.autograd.functional.hessian(loss, w1.double().flatten()).diagonal().mean().item()


# -- kill and resume ---------------------------------------------------------------------------------------------------


def epochs_on_disk(folder) -> int:
    if not (folder / STATE).exists():
        return 0
    with safe_open(folder / STATE, "pt") as file:
        return len(json.loads(file.metadata()["run"])["history"])
