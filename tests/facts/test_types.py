"""Values of a wrong type: one sentence that names the argument, from the table of options."""

import re

import numpy as np
import pytest
import torch
import tqdm.auto
import tqdm.notebook
from tiny import NAMES, cache, normal, prompt, tiny_clip

import mergetune as mt
from mergetune.facts import FitOptions, TuneOptions, options_of
from mergetune.facts.function_options import check_types, used_by
from mergetune.io import hidden

NUMBERS = [
    (options, option.name) for options in (TuneOptions, FitOptions) for option in options_of(options)
    if option.kind in ("int", "float", "float or floats", "bool")
]  # fmt: skip


@pytest.mark.parametrize(("options", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_text_is_no_number(options, name):
    for wrong in ("8", [["8"]], object()):
        with pytest.raises(TypeError, match=rf"^{name} must be (a|true)"):
            check_types(options(**{name: wrong}))


def test_numbers_of_other_libraries_are_numbers():
    for right in (8, 8.0, np.float32(8), np.int64(8), torch.tensor(8.0)):
        check_types(FitOptions(lam=right, beta=[right, 0.5]))
    check_types(FitOptions(beta=np.array([0.5, 0.1]), grid=[0, 0.5], cuda_graph=True))


def test_functions_check_the_types():
    clip, features = tiny_clip(), cache()
    with pytest.raises(TypeError, match=re.escape("lam must be a number, got '8' (str)")):
        mt.fit(clip, features, prompt(1), lam="8", progress=False)
    with pytest.raises(TypeError, match="epochs must be a whole number, got '3'"):
        mt.tune(clip, features, epochs="3", progress=False)


def test_options_are_given_to_the_methods_that_use_them():
    given = {"kg_weight": 4.0, "position": "front", "epochs": 3}
    assert used_by("kgcoop", TuneOptions, given) == given
    assert used_by("coop", TuneOptions, given) == {"position": "front", "epochs": 3}
    assert used_by("head", TuneOptions, given) == {"epochs": 3}


def test_the_term_of_a_residual_is_its_distance():
    clip, quick = tiny_clip(), {"epochs": 1, "precision": "float32", "progress": False}
    for method, term in (("residual", "distance"), ("map", "distance"), ("kgcoop", "surrogate")):
        (entry,) = mt.tune(clip, cache(), method=method, **quick).history
        assert term in entry and len({"distance", "surrogate"} & entry.keys()) == 1


def test_logits_say_what_they_need():
    classify = mt.classifier(tiny_clip(), "a {}")
    assert classify.logits(NAMES, normal(2, 8)).shape == (2, 3)
    with pytest.raises(TypeError, match="classnames must be a list of class names, got Tensor: call logits"):
        classify.logits(normal(2, 8))
    with pytest.raises(TypeError, match=r"x must be image inputs of B images, a tensor \[B, D\], got NoneType"):
        classify.logits(NAMES)


def test_bars_are_for_terminals_and_notebooks(monkeypatch):
    assert hidden(False) is True and hidden() is None  # None: shown if stderr is a terminal
    monkeypatch.setattr(tqdm.auto, "tqdm", tqdm.notebook.tqdm)
    assert hidden(False) is True and hidden() is False
