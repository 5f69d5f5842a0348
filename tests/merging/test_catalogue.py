"""Merging methods by name, as the command line calls them: what they need, and what text cannot give."""

import pytest

from mergetune.merging.catalogue import merge_files, needs_base, parse_options
from mergetune.merging.methods import METHODS


@pytest.mark.parametrize("experts", [1, 3])
def test_evolve_needs_a_base_where_the_method_that_it_tunes_does(experts: int):
    for name in METHODS.keys() - {"evolve"}:
        options = parse_options("evolve", [f"method={name}"])
        assert needs_base("evolve", experts, options) == needs_base(name, experts), name


def test_evolve_of_its_usual_method_needs_a_base():
    assert needs_base("evolve", 3) and needs_base("evolve", 3, {})


def test_an_option_that_cannot_be_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="layerwise needs coefficients, which cannot be given as text: call mergetune"):
        merge_files("layerwise", tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", {})
