"""Class names of folders, labels and files: spelling, order, names that are refused, and names that say nothing."""

from __future__ import annotations

import json
import os
import random
import re
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_cases import BUILD, NoMoreEncoding, TinyClip, draw_images

from mergetune.data import FeatureCache, ImageFolder, cache_features, image_table, read_features
from mergetune.data.class_names import meaning, read_names
from mergetune.data.image_lists import ImageList


def folders(root: Path, *names: str, images: int = 4) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i}.png").write_text(f"{name!a} {i}")
    return root


def table(root: Path, labels: list, kind: str = "csv") -> Path:
    """Four files of each label, and a list of them."""
    rows = [{"path": f"{place}-{i}.png", "label": label} for place, label in enumerate(labels) for i in range(4)]
    root.mkdir(exist_ok=True)
    for row in rows:
        (root / row["path"]).write_text(row["path"])
    file = root / f"list.{kind}"
    lines = ["path,label", *(f"{row['path']},{row['label']}" for row in rows)]
    file.write_text(json.dumps(rows) if kind == "json" else "\n".join(lines))
    return file


# -- order -------------------------------------------------------------------------------------------------------------

NUMBERS = [str(number) for number in random.Random(0).sample(range(12), 12)]


def of_folders(root: Path, labels: list[str]) -> tuple[str, ...]:
    return ImageFolder(folders(root, *labels)).classnames


def of_a_table(root: Path, labels: list[str]) -> tuple[str, ...]:
    return image_table(table(root, labels)).classnames


def of_json_numbers(root: Path, labels: list[str]) -> tuple[str, ...]:
    return image_table(table(root, [int(label) for label in labels], "json")).classnames


def of_arrays(root: Path, labels: list[str]) -> tuple[str, ...]:
    root.mkdir()
    np.savez(root / "a.npz", features=np.eye(len(labels), dtype=np.float32), labels=np.array(labels))
    return read_features(root / "a.npz", progress=False).classnames


@pytest.mark.filterwarnings("ignore:.*class names are numbers")
@pytest.mark.parametrize("classes_of", [of_folders, of_a_table, of_json_numbers, of_arrays])
def test_whole_numbers_are_in_the_order_of_numbers(tmp_path, classes_of):
    assert classes_of(tmp_path / "a", NUMBERS) == tuple(map(str, range(12)))
    if classes_of is not of_json_numbers:
        mixed = [*NUMBERS, "zebra"]
        assert classes_of(tmp_path / "b", mixed) == tuple(sorted(mixed)), "other names are sorted as text"


def test_labels_stay_with_their_images_when_a_cache_with_another_order_goes_on(tmp_path):
    """Version 0.1 sorted numbers as text. A cache of that order opens, is taken, and is continued without mixing."""
    images = draw_images(tmp_path / "images", 24, classes=12)
    number_of = dict(zip(images.files, images.labels, strict=True))
    by_text = sorted(map(str, range(12)))
    old = replace(
        images,
        labels=tuple(by_text.index(str(number)) for number in images.labels),
        classnames=tuple(by_text),
    )
    new = replace(images, classnames=tuple(map(str, range(12)))).take(range(23, -1, -1))

    def right(cache: FeatureCache) -> bool:
        names = [cache.classnames[label] for label in cache.labels]
        return [int(name) for name in names] == [number_of[file] for file in cache.files]

    cache_features(TinyClip(), old, tmp_path / "whole", **BUILD)
    opened = FeatureCache.open(tmp_path / "whole")
    assert opened.classnames == tuple(by_text) and right(opened)
    again = cache_features(NoMoreEncoding(), new, tmp_path / "whole", views=2)
    assert again.classnames == new.classnames and right(again) and right(FeatureCache.open(tmp_path / "whole"))

    (tmp_path / "images" / images.files[-1]).rename(tmp_path / "away")
    with pytest.raises(ValueError, match="cannot read image"):
        cache_features(TinyClip(), old, tmp_path / "part", **BUILD)
    (tmp_path / "away").rename(tmp_path / "images" / images.files[-1])
    continued = cache_features(TinyClip(), new, tmp_path / "part", **BUILD)
    assert right(continued) and right(FeatureCache.open(tmp_path / "part"))


# -- names that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Apple", "apple"),
        (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")),
        ("ABC", "\uff21\uff22\uff23"),  # full width
        ("tea_cup", "tea cup "),
        ("tea\u00a0cup", "tea cup"),
        ("ice\u200bcream", "icecream"),  # a space without width
    ],
)
def test_names_that_a_text_tower_reads_alike_are_refused_and_can_be_renamed(tmp_path, one, other):
    assert meaning(one) == meaning(other)
    for read, given in (
        (ImageFolder, folders(tmp_path / "a", one, other)),
        (image_table, table(tmp_path, [one, other])),
    ):
        keys = (one, other) if read is ImageFolder else (one.strip(), other.strip())
        with pytest.raises(ValueError, match="class names must differ, got .*--classnames FILE"):
            read(given)
        renamed = read(given, classnames=dict(zip(keys, ("red", "green"), strict=True)))
        assert sorted(renamed.classnames) == ["green", "red"]


@pytest.mark.parametrize("name", ["_", "__ _", "\u200b"])
def test_an_empty_name_says_which_folder_or_row(tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(f"class folder {name!r} must give a class name, got ")):
        ImageFolder(folders(tmp_path / "a", name, "dog"))
    with pytest.raises(ValueError, match=re.escape(f"label {name!r} must give a class name")):
        image_table(table(tmp_path / "b", ["dog", name]))
    with pytest.raises(ValueError, match="classnames must be non-empty texts, got '' for class 1"):
        ImageList(tmp_path, ["0.png"], [0], ["dog", ""])


def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match="class folder .* must be text in UTF-8, got other bytes"):
        ImageFolder(folders(tmp_path, name, "dog"))
    assert ImageFolder(tmp_path, classnames={name: "café"}).classnames == ("café", "dog")


# -- names that say nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["n01440764", "n01443537"], "WordNet ids"),
        (["n02085620-Chihuahua", "n02085782-Japanese_spaniel"], "WordNet ids"),
        (["001.Black_footed_Albatross", "002.Laysan_Albatross"], "numbered"),
        (["01 tench", "02 goldfish"], "numbered"),
        (["0", "1", "2"], "numbers"),
        (["3d_printer", "4_leaf_clover"], None),
        (["n", "north"], None),
        (["route 66", "cat"], None),
    ],
)
def test_identifiers_as_names_are_hinted_at_once(tmp_path, names, kind):
    folders(tmp_path, *names)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ImageFolder(tmp_path)
    assert [kind in str(warning.message) and "--classnames FILE" in str(warning.message) for warning in said] == (
        [True] if kind else []
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = ["a cat", "a dog", "a cow"][: len(names)]
        assert ImageFolder(tmp_path, classnames=words).classnames == tuple(words)


# -- names in files ---------------------------------------------------------------------------------------------------

IDS = ("n01440764", "n01443537")


@pytest.mark.filterwarnings("ignore:.*names the classes in their order")
@pytest.mark.parametrize(
    ("file", "content", "names"),
    [
        ("a.txt", "tench\ngold_fish\n", ("tench", "gold fish")),
        ("a.txt", "\ufefftench\r\n\r\ngold fish\r\n", ("tench", "gold fish")),
        ("a.txt", "n01443537 gold_fish\nn01440764 tench, Tinca tinca\nn9 x\n", ("tench, Tinca tinca", "gold fish")),
        ("a.txt", "n01440764\ttench\nn01443537: goldfish\n", ("tench", "goldfish")),
        ("a.csv", "n01440764,tench\nn01443537,goldfish\n", ("tench", "goldfish")),
        ("a.json", '{"n01443537": "gold_fish", "n01440764": "tench", "n9": "x"}', ("tench", "gold fish")),
        ("a.json", '{"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench"]}', ("tench", "goldfish")),
        ("a.json", '["tench", "goldfish"]', ("tench", "goldfish")),
        ("a.txt", "fish\nfish\n", ("fish", "fish")),  # as ImageNet has some names twice
    ],
)
def test_class_names_are_taken_from_a_file(tmp_path, file, content, names):
    folders(tmp_path / "images", *IDS)
    (tmp_path / file).write_text(content, encoding="utf-8", newline="")
    assert ImageFolder(tmp_path / "images", classnames=tmp_path / file).classnames == names


@pytest.mark.filterwarnings("ignore:.*names the classes in their order")
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "a.txt",
            "tench\n",
            r"must hold one name for each of the 2 classes, in their order \('n01440764' first\), got 1",
        ),
        ("a.txt", "n01440764 tench\nfoo bar\n", "must name every class, .* lacks 'n01443537'"),
        ("a.txt", "Fish\nfish\n", "class names must differ"),
        ("a.txt", " \n", "without a name"),
        ("a.txt", "tench\n__\n", "name 2 in .* must give a class name"),
        ("a.json", '["tench", "__"]', "classnames of 'n01443537' must give a class name, got ''"),
        ("a.json", '{"n01443537": " "}', "classnames of 'n01443537' must give a class name, got ''"),
        ("a.json", '["tench", "\\ud800"]', "classnames of 'n01443537' must be text in UTF-8"),
        ("a.json", '{"0": [[], "tench"]}', "must be an object {folder: name}, or a list of names"),
        ("a.json", "3", "must be an object {folder: name}, or a list of names"),
        ("a.json", '{"n01440764": 3}', "must be an object {folder: name}, or a list of names"),
        ("a.json", '{"cat": "a cat"}', "must name the classes by folder or label, such as 'n01440764', got 'cat'"),
    ],
)
def test_a_file_that_does_not_name_the_classes_is_refused(tmp_path, file, content, message):
    folders(tmp_path / "images", *IDS)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        ImageFolder(tmp_path / "images", classnames=tmp_path / file)
    assert str(tmp_path / file) in str(refused.value)
    with pytest.raises(FileNotFoundError, match="classnames must be a .*file"):
        ImageFolder(tmp_path / "images", classnames=tmp_path / f"gone-{file}")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.txt", "tench\ngold fish\nray\nhen\n", "'0' is 'tench', '1' is 'gold fish', '10' is 'ray' and so on for 4"),
        ("a.json", '["tench", "gold fish", "ray", "hen"]', "'0' is 'tench', .* and so on for 4 classes"),
        ("a.txt", "0 tench\n1 gold fish\n10 ray\n11a hen\n", None),
        ("a.txt", "0\n1\n10\n11A\n", None),
    ],
)
def test_names_that_are_given_by_their_order_alone_are_shown_beside_the_folders(tmp_path, file, content, said):
    folders(tmp_path / "images", "0", "1", "10", "11a")
    (tmp_path / file).write_text(content)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ImageFolder(tmp_path / "images", classnames=tmp_path / file)
    shown = [str(warning.message) for warning in found if "in their order" in str(warning.message)]
    assert len(shown) == (said is not None) and all(re.search(said, line) for line in shown)


def test_names_have_one_spelling_wherever_they_come_from(tmp_path):
    """A folder, a label, a label in an array and a line of a file that say the same are the same class."""
    (tmp_path / "names.txt").write_text("shopping_cart\n  tea__cup \n")
    names = ("shopping cart", "tea cup")
    assert tuple(read_names(tmp_path / "names.txt")) == names
    assert ImageFolder(folders(tmp_path / "a", "shopping_cart", "tea__cup")).classnames == names
    assert image_table(table(tmp_path / "b", ["shopping_cart", " tea_cup"])).classnames == names
    labels, features = ["tea_cup", "shopping_cart"], np.eye(2, dtype=np.float32)
    np.save(tmp_path / "x.npy", features)
    assert read_features(tmp_path / "x.npy", labels=labels, progress=False).classnames == names
    given = read_features(tmp_path / "x.npy", labels=labels, classnames=names, progress=False)
    assert given.labels.tolist() == [1, 0], "labels as written belong to names as shown"
