"""The examples in docstrings run as they stand: each imports what it needs and prints what it says.

Each example gets an empty namespace. The embedded CLIP is loaded once per process.
"""

import doctest
import functools
import importlib
import pkgutil
import tempfile

import pytest
import torch

import mergetune

# Every name of ``mergetune.__all__`` that comes from these rooms has an example, unless WITHOUT says why not.
ROOMS = ("clip", "solutions", "evaluation", "training")
WITHOUT = {
    "connectivity_report": "writes a page with figures",
    "open_taskres": "needs the checkpoint of another project",
    "plane": "measures a grid of points",
    "plot": "draws a figure",
    "plot_confusion": "draws a figure",
    "plot_plane": "draws a figure",
    "plot_spectrum": "draws a figure",
    "plot_wrong_answers": "draws a figure",
    "push_to_hub": "needs a network",
    "to_clip_lora": "writes a file of another project",
}


def examples() -> dict[str, doctest.DocTest]:
    """The docstrings with examples, by their full names."""
    found = {}
    for module in pkgutil.walk_packages(mergetune.__path__, "mergetune."):
        if "assets" in module.name or module.name.split(".")[1] in ("_C", "__main__", "kernels"):
            continue
        for test in doctest.DocTestFinder().find(importlib.import_module(module.name), globs={}):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def load_clip():
    return functools.cache(mergetune.load_clip)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name, load_clip, monkeypatch, tmp_path):
    monkeypatch.setattr(mergetune, "load_clip", load_clip)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where examples write
    test, told = EXAMPLES[name], []
    torch.manual_seed(0)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=told.append)
    assert not result.failed, "".join(told)


def test_names_that_a_newcomer_meets_have_an_example():
    public = {name: getattr(mergetune, name) for name in mergetune.__all__}
    rooms = tuple(f"mergetune.{room}." for room in ROOMS)
    met = {name: value for name, value in public.items() if getattr(value, "__module__", "").startswith(rooms)}
    assert len(met) > len(WITHOUT)
    assert {name for name, value in met.items() if ">>>" not in (value.__doc__ or "")} == WITHOUT.keys()
