"""Facts and options are data: the tables need no torch, and say what the functions do."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from tiny import normal, prompt
from torch import Tensor
from typer.main import get_command

import mergetune
from mergetune import FeatureCache, merging
from mergetune.cli import app
from mergetune.data import cache_identity
from mergetune.experiments.comparison_candidates import MERGE_GRIDS
from mergetune.facts import CacheOptions, FitOptions, Option, TuneOptions, options_of, read_options, recorded
from mergetune.facts.function_options import MERGETUNE_GRID
from mergetune.facts.option_kinds import KINDS, REQUIRED
from mergetune.merging.methods import LABELLED, METHODS, UNLABELLED, find

OPTIONS_OF = {  # the functions that take the options of methods with **options
    "adamerging": merging.entropy_coefficients,
    "expert_merging": merging.alignment_coefficients,
    "evolve": merging.evolve_options,
}
ANNOTATIONS = {  # kind of value -> how a signature says it
    "int": {"int"},
    "float": {"float"},
    "bool": {"bool"},
    "str": {"str"},
    "floats": {"Sequence[float]"},
    "strs": {"Sequence[str]"},
    "states": {"Sequence[StateDict]"},
    "method": {"Callable"},
    "ranges": {"Mapping[str, tuple[float, float] | tuple[float, float, int]]"},
    "starts": {"Mapping[str, float | Sequence[float]]"},
    "object": {
        "Predict", "Sequence[Tensor]", "Mapping[str, Any]", "Mapping[str, Sequence[float]]",
        "Callable[[dict[str, Tensor]], float]", "Callable[[dict[str, Tensor]], Tensor]", "Callable[[str], bool]",
        "Callable[[str], tuple[int, int] | None]",
    },
}  # fmt: skip


def keywords(name: str) -> list[inspect.Parameter]:
    """The keyword-only parameters of a method."""
    signature = inspect.signature(OPTIONS_OF.get(name, getattr(merging, name)))
    return [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]


def state(value: float) -> dict[str, Tensor]:
    return {"blocks.0.w": torch.full((3, 2), value), "blocks.1.w": torch.full((3, 2), 2 * value)}


# -- the table of merging methods -------------------------------------------------------------------------------------


def test_every_merging_function_is_in_the_table():
    merge = []
    for name in merging.__all__:
        function = getattr(merging, name)
        parameters = list(inspect.signature(function).parameters) if inspect.isfunction(function) else []
        if parameters[:2] == ["base", "experts"] and "dict[str, Tensor]" in inspect.get_annotations(function)["return"]:
            merge.append(name)
    assert merge == list(METHODS) == sorted(METHODS)
    assert all(METHODS[name].load() is getattr(merging, name) for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_options_of_a_method_are_those_of_its_signature(name):
    facts, found = METHODS[name], keywords(name)
    assert [option.name for option in facts.options] == [parameter.name for parameter in found]
    for option, parameter in zip(facts.options, found, strict=True):
        annotation = parameter.annotation.removesuffix(" | None")
        assert annotation in ANNOTATIONS[option.kind] and option.none == parameter.annotation.endswith(" | None")
        default = REQUIRED if parameter.default is parameter.empty else parameter.default
        default = default.__name__ if inspect.isfunction(default) else default
        assert option.default == default and type(option.default) is type(default)
        assert option.help.endswith(".") and option.kind in {*KINDS, "states", "method"}


CHOICES = [(name, option) for name, facts in METHODS.items() for option in facts.options if option.choices]


@pytest.mark.parametrize(("name", "option"), CHOICES, ids=lambda value: getattr(value, "name", value))
def test_choices_are_those_that_a_method_accepts(name, option):
    needed = {
        "fishers": [state(1.0)] * 2, "second_moments": [state(1.0)] * 2, "data": [torch.ones(2, 2)] * 2,
        "predict": lambda weights, x, k: x @ weights["blocks.0.w"].T, "score": lambda weights: 1.0,
        "space": {"scale": (0.0, 1.0)},
    }  # fmt: skip
    given = {key: needed[key] for key in METHODS[name].missing([])}
    given |= {"steps": 1} if "steps" in {o.name for o in METHODS[name].options} else {}
    given |= {"trials": 1} if name == "evolve" else {}
    given |= {"consensus": "sum"} if (name, option.name) == ("dare", "divide") else {}
    experts = [state(1.0), state(3.0)]
    for choice in (*option.choices, *([None] if option.none else [])):
        assert METHODS[name].load()(state(0.0), experts, **given | {option.name: choice}).keys() == state(0).keys()
    with pytest.raises(ValueError, match="must be one of") as error:
        METHODS[name].load()(state(0.0), experts, **given | {option.name: "other"})
    listed = re.search(r"must be one of (.*), got 'other'", str(error.value))[1].split(", ")
    assert set(listed) - {"None"} == set(option.choices)


def test_sources_are_those_of_the_docstrings():
    for name, facts in METHODS.items():
        text = " ".join(inspect.getdoc(getattr(merging, name)).split())
        assert facts.source in text and "Needs:" in text, name


def test_what_is_computed_from_images_is_an_option():
    for facts in METHODS.values():
        names = {option.name for option in facts.options}
        assert set(facts.from_images) <= names and bool(facts.from_images) == (facts.images in (LABELLED, UNLABELLED))
        assert set(facts.missing([])) >= set(facts.from_images) and not facts.missing(names)


def test_a_method_is_found_by_its_name_with_dashes():
    assert find("wise-ft") is METHODS["wise_ft"]
    with pytest.raises(ValueError, match="method must be one of adamerging, average.*got 'tise'"):
        find("tise")


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "3", 3),
        ("float", "1e-3", 1e-3),
        ("bool", "True", True),
        ("bool", "0", False),
        ("str", "a photo of a {}, a pet.", "a photo of a {}, a pet."),
        ("floats", "1,0.5", [1.0, 0.5]),
        ("float or floats", "0.5", 0.5),
        ("float or floats", "0.5,1", [0.5, 1.0]),
        ("str or floats", "even", "even"),
        ("str or floats", "0,0.5", [0.0, 0.5]),
        ("strs", "a,b", ["a", "b"]),
        ("starts", "a:1,b:0:1", {"a": 1.0, "b": [0.0, 1.0]}),
        ("ranges", "a:0:1,b:0:1:3", {"a": (0.0, 1.0), "b": (0.0, 1.0, 3)}),
    ],
)
def test_a_value_is_read_by_its_kind(kind, text, value):
    found = read_options("this", [Option("x", kind)], [f"x={text}"])["x"]
    assert found == value and type(found) is type(value)
    assert read_options("this", [Option("x", kind, none=True)], ["x=None"]) == {"x": None}
    if kind not in ("str", "strs", "str or floats"):
        with pytest.raises(ValueError, match=re.escape(f"x must be {KINDS[kind].rule}, got 'no value'")):
            read_options("this", [Option("x", kind)], ["x=no value"])


def test_texts_that_are_no_options_are_refused():
    options = [Option("x", "int"), Option("f", "object")]
    for given, message in (
        (["x"], "options must be name=value, got 'x'"),
        (["y=1"], "this has no option 'y'; it has x, f"),
        (["x=1", "x=2"], "options must not repeat, got 'x' twice"),
        (["f=1"], "f of this cannot be given as text"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options("this", options, given)


# -- the options of functions and commands ----------------------------------------------------------------------------

FUNCTIONS = {"tune": TuneOptions, "fit": FitOptions, "cache_features": CacheOptions}
NOT_OPTIONS = {  # keywords that are no options as data, and the command-line options that stand for them
    "clip": "--backbone",  # and --pretrained, --device
    "features": "--cache",
    "images": "images",
    "path": "--out",
    "tuned": "--tuned",
    "base": "--base",
    "val": "--val",
    "resume": "--out",
    "progress": None,  # a bar is shown on terminals only
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_of_a_function_are_its_options(name):
    parameters = inspect.signature(getattr(mergetune, name)).parameters
    options = {option.name: option for option in options_of(FUNCTIONS[name])}
    assert parameters.keys() - NOT_OPTIONS.keys() == options.keys()
    for key, option in options.items():
        default = parameters[key].default
        assert option.default == default and type(option.default) is type(default), key
        assert option.none == parameters[key].annotation.endswith(" | None") and option.help.endswith(".")
        assert parameters[key].annotation == FUNCTIONS[name].__dataclass_fields__[key].type


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_command_takes_what_its_function_takes(name):
    command = get_command(app).commands[name.removesuffix("_features")]
    there = {text for parameter in command.params for text in (parameter.opts or [parameter.name])}
    for keyword in inspect.signature(getattr(mergetune, name)).parameters:
        wanted = NOT_OPTIONS.get(keyword, "--" + keyword.replace("_", "-"))
        assert wanted is None or wanted in there, keyword
    defaults = {parameter.name: parameter.default for parameter in command.params}
    for option in options_of(FUNCTIONS[name]):
        if option.name != "zero_shot":  # its default is written out on the command line
            several = [*option.default] if isinstance(option.default, tuple) else [option.default]
            assert defaults[option.name] in (option.default, several), option.name


@pytest.mark.parametrize("options", [TuneOptions, FitOptions])
def test_what_is_not_recorded_changes_rounding_at_most(options):
    names = [option.name for option in options_of(options)]
    flags = {option.name: True for option in options_of(options) if option.kind == "bool"}  # some are recorded if set
    assert set(names) - recorded(options(**flags)).keys() == {"backend", "cuda_graph"}
    assert recorded(options(seed=3), precision="float32") | {"seed": 1, "precision": "auto"} == recorded(options())
    with pytest.raises(ValueError, match="got speed"):
        recorded(options(), speed=1)


def test_what_a_cache_is_recorded_with_decides_whether_it_is_stale():
    of_options = cache_identity.KEY.keys() - {"fingerprint", "preprocess", "decoding"} | {"background"}
    assert of_options == recorded(CacheOptions()).keys(), "the words of the decoding hold the background"


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, options in FUNCTIONS.items() for option in options_of(options) if option.choices],
    ids=lambda value: getattr(value, "name", value),
)
def test_other_choices_are_refused_with_those_there_are(clip, name, option):
    images = FeatureCache.from_tensors(F.normalize(normal(4, 8), dim=-1), torch.arange(4) % 2, ("bird", "cat"))
    arguments = {"tune": (clip, images), "fit": (clip, images, prompt()), "cache_features": (clip, [], "nowhere")}[name]
    with pytest.raises(ValueError, match=f"{option.name} must be") as error:
        method = {"method": option.methods[0]} if option.methods else {}
        getattr(mergetune, name)(*arguments, **method, **{option.name: "other"})
    assert str(error.value).endswith("got 'other'") and all(choice in str(error.value) for choice in option.choices)


def test_what_compare_tries_starts_with_the_default():
    assert all(values[0] == getattr(FitOptions, name) for name, values in MERGETUNE_GRID.items())
    for name, grid in MERGE_GRIDS.items():
        assert all(values[0] == METHODS[name].option(option).default for option, values in grid.items()), name
