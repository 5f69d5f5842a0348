"""Templates of the benchmark datasets."""

import open_clip
import pytest
from coop_cases import TEST_ONLY

from mergetune.clip import fill
from mergetune.data import DATASETS, TEMPLATES, templates_for


def test_template_sets_differ_where_their_projects_do():
    assert templates_for("caltech101") == ("a photo of a {}.",)
    assert templates_for("Food101") == ("a photo of {}, a type of food.",)
    assert templates_for("EuroSAT", "official") == ("a centered satellite photo of {}.",)
    assert templates_for("dtd", "coop") == ("{} texture.",)
    for name in ("kgcoop", "official"):
        assert templates_for("dtd", name) == ("a photo of a {}, a type of texture.",)
        assert [d for d in DATASETS if TEMPLATES[name][d] != TEMPLATES["coop"][d]] == ["dtd"]
    assert {d for d in DATASETS if TEMPLATES["coop"][d] == "a photo of a {}."} == {
        *("imagenet", "caltech101", "stanford_cars", "sun397"),
        *TEST_ONLY,
    }


def test_every_set_has_every_dataset_and_fills():
    for name in TEMPLATES:
        assert list(TEMPLATES[name]) == list(DATASETS)
        for dataset in DATASETS:
            for template in templates_for(dataset, name):
                assert fill(template, "shopping cart").count("shopping cart") == 1


def test_ensembles_are_clips():
    eighty = templates_for("ucf101", "clip-ensemble")
    assert len(set(eighty)) == 80 and eighty[0] == "a bad photo of a {}."
    assert [fill(template, "cat") for template in eighty] == [f("cat") for f in open_clip.OPENAI_IMAGENET_TEMPLATES]
    seven = templates_for("imagenet", "coop-ensemble")
    assert len(seven) == 7 and set(seven) < set(eighty) and "itap of a {}." in seven
    assert templates_for("ucf101", "coop-ensemble") == (*seven, "a photo of a person doing {}.")
    assert templates_for("imagenetv2", "coop-ensemble") == (*seven, "a photo of a {}.")


def test_an_unknown_template_set_says_the_list():
    with pytest.raises(ValueError, match="set must be one of coop, kgcoop, .*clip-ensemble.*, got 'clip'"):
        templates_for("dtd", "clip")
