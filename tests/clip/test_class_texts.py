"""What the texts of classes alone decide: too long for the tower, and alike for its tokenizer."""

from __future__ import annotations

import warnings

import pytest
from tiny import TEXT, tiny_clip

from mergetune.clip import FrozenClip
from mergetune.clip.class_texts import check_texts

LONG = "very " * TEXT["context_length"] + "long"


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["cat", LONG], "{}", "texts must fit the text tower's 16 tokens, got 'very very"),
        (["cat", "very " * 8 + "long"], ["{}", "a photo of a small {} on a table."], "texts must fit .* 16 tokens"),
        (["cat", " "], "{}", "classnames must be non-empty texts, got ' '"),
        (["cat", "dog"], "a photo", "exactly one {}"),
        ([], "{}", "classnames must hold at least one name"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_with_the_way_on(names, templates, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_texts(tiny_clip(), names, templates)
    assert "fit" not in message or "--classnames FILE" in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "pair", [("Apple", "apple"), ("AT&amp;T", "AT&T"), ("ice  cream", "ice cream"), ("ﬁsh", "fish"), ("fish", "fish")]
)
def test_names_with_the_same_tokens_are_told_once_per_model(pair):
    clip = FrozenClip(tiny_clip().model, tiny_clip().tokenizer, "tiny")
    names = ["dog", *pair]
    with pytest.warns(UserWarning, match=f"reads {pair[0]!r} and {pair[1]!r} alike"):
        check_texts(clip, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_texts(clip, names)
        check_texts(clip, ["dog", "cat", "cats"])
