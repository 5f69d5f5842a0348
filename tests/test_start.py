"""Start-up: help, version and lists need no torch; the package's names are imported at their first use."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mergetune
from mergetune import clip, data, merging, solutions
from mergetune.merging.methods import METHODS

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # any import of it fails
sys.argv = ["mergetune", *sys.argv[1:]]
runpy.run_module("mergetune", run_name="__main__")
"""


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["merge", "--list"], ["fit", "--help"], ["compare", "--help"]],
    ids=" ".join,
)
def test_help_version_and_lists_need_no_torch(arguments):
    shown = python("-c", WITHOUT_TORCH, *arguments)
    assert {"--version": mergetune.__version__, "merge": "arXiv 2306.01708"}.get(arguments[0], "Usage") in shown


def test_facts_need_no_torch():
    blocked = "import sys; sys.modules['torch'] = None\n"
    python(
        "-c",
        blocked
        + "import mergetune.facts, mergetune.facts.function_options, mergetune.merging.methods, mergetune.io.files",
    )


def test_help_and_facts_need_no_models_of_documents():
    """Nothing of ours imports pydantic for them; a version of typer may, for the help of a command."""
    blocked = "import sys; sys.modules['pydantic'] = None\n"
    python("-c", blocked + "import mergetune.facts.function_options, mergetune.merging.methods, mergetune.cli")
    for argument in ("--help", "--version"):
        python("-c", blocked + WITHOUT_TORCH, argument)


def test_facts_do_not_depend_on_docstrings():
    listed = python("-m", "mergetune", "merge", "--list")
    assert all(f"{name} {facts.title}" in " ".join(listed.split()) for name, facts in METHODS.items())
    assert python("-OO", "-m", "mergetune", "merge", "--list") == listed
    assert python("-OO", "-m", "mergetune", "--version") == f"{mergetune.__version__}\n"


def test_one_method_is_listed_with_its_options():
    shown = " ".join(python("-m", "mergetune", "merge", "wise-ft", "--list").split())
    assert shown.startswith("wise_ft WiSE-FT, arXiv 2109.01903") and shown.endswith(
        "alpha=0.5 Weight of the expert: 0 is the base, 1 the expert."
    )


@pytest.mark.parametrize("package", [mergetune, clip, data, merging, solutions], ids=lambda package: package.__name__)
def test_public_names_are_those_that_type_checkers_see(package):
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in checked.body:
        seen |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    assert set(package.__all__) == set(seen) and package.__all__ == sorted(
        seen, key=lambda n: (not n.isupper(), n[0].islower(), n)
    )
    assert not [name for name in package.__all__ if name.startswith("_")]
    for name, (module, inside) in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), inside), name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        package.fitt  # noqa: B018


@pytest.mark.parametrize("package", [clip, data, solutions], ids=lambda package: package.__name__)
def test_each_public_name_is_documented(package):
    """Functions and classes have a docstring; other names a comment ``#:`` above them, or a text below."""
    for name in package.__all__:
        value = getattr(package, name)
        if callable(value) and getattr(value, "__module__", "").startswith("mergetune."):
            assert (value.__doc__ or "").strip() and not value.__doc__.startswith(f"{name}("), name
            continue
        (source,) = [
            lines
            for file in Path(package.__file__).parent.glob("*.py")
            for lines in [file.read_text(encoding="utf-8").splitlines()]
            if any(re.match(rf"{name}\b.* = ", line) for line in lines)
        ]
        (at,) = [i for i, line in enumerate(source) if re.match(rf"{name}\b.* = ", line)]
        assert source[at - 1].startswith("#:") or source[at + 1].startswith('"""'), name
