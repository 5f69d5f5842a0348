"""Which folders are read as splits, which as classes, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergetune.data import ImageFolder, listed_images


def touch(root: Path, *folders: str, images: int = 4) -> Path:
    """Files that are called pictures, of different bytes; ImageFolder does not decode them."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            (root / folder / f"{i}.png").write_text(f"{folder} {i}")
    return root


def sides(data) -> dict[str, set[str]]:
    lists = {"train": data.full_train, "val": data.full_val, "test": data.full_test}
    return {split: {Path(file).parts[-3] for file in found.files} for split, found in lists.items() if found}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", None, "Testing"),
        ("Train", "Valid", "Test"),
        ("training_set", None, "test_set"),
        ("train", "validation", "test"),
        ("train-images", "dev", "TEST DATA"),
        ("trn", "val", "tst"),
    ],
)
def test_usual_spellings_of_splits(tmp_path, train, val, test):
    spelt = {"train": train, "val": val, "test": test}
    for folder in filter(None, spelt.values()):
        touch(tmp_path, f"{folder}/cat", f"{folder}/dog")
    data = ImageFolder(tmp_path)
    assert data.classnames == ("cat", "dog")
    assert sides(data) == {split: {folder} for split, folder in spelt.items() if folder}


@pytest.mark.parametrize("wrapped", ["photos", "a/b/c", "archive/train data/.."])
def test_one_folder_around_the_classes_is_passed(tmp_path, wrapped):
    inner = (tmp_path / wrapped).resolve() if ".." in wrapped else tmp_path / wrapped
    touch(inner, "cat", "dog")
    if ".." in wrapped:
        inner = tmp_path / "archive"
    data = ImageFolder(tmp_path)
    assert data.classnames == ("cat", "dog") and data.train.root == tmp_path
    assert all((tmp_path / file).is_file() for file in data.train.files)


def test_one_folder_around_the_splits_is_passed(tmp_path):
    touch(tmp_path, "brain/Training/cat", "brain/Training/dog", "brain/Testing/cat", "brain/Testing/dog")
    assert sides(ImageFolder(tmp_path)) == {"train": {"Training"}, "test": {"Testing"}}


@pytest.mark.parametrize("odd", ["train", "test", "val"])
def test_a_class_may_have_the_name_of_a_split(tmp_path, odd):
    touch(tmp_path, "cat", odd)
    assert ImageFolder(tmp_path).classnames == tuple(sorted(("cat", odd)))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("val", "test"), "must hold training images, got only the folders val and test|test and val"),
        (("train", "Training", "test"), "must hold one folder for train, got Training and train"),
        (("fold_1", "fold_2", "fold_3"), "hold the same folders 'cat', 'dog', which look like the classes"),
        (("2019", "2020"), "hold the same folders"),
        (("train", "test", "night"), "must hold only train, val and test, or only classes, got 'night'"),
    ],
)
def test_layouts_that_are_neither_are_refused(tmp_path, folders, message):
    for folder in folders:
        touch(tmp_path, f"{folder}/cat", f"{folder}/dog")
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path)


def test_classes_may_have_folders_inside(tmp_path):
    touch(tmp_path, "cat/left", "cat/right", "dog/left")
    assert ImageFolder(tmp_path).classnames == ("cat", "dog")
    touch(tmp_path, "cat", "dog")  # images beside the folders: these are classes
    touch(tmp_path, "dog/right")
    assert ImageFolder(tmp_path).classnames == ("cat", "dog")


# -- list files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "images", "jpg"])
@pytest.mark.parametrize("name", ["split_zhou_Pets.json", "my split.json"])
def test_split_files_of_coop_find_their_images(tmp_path, monkeypatch, place, name):
    touch(tmp_path / "pets" / place, "cat", "dog")
    rows = [[f"{animal}/{i}.png", label, animal] for label, animal in enumerate(("cat", "dog")) for i in range(4)]
    split = {"train": [row for row in rows if "0" in row[0] or "1" in row[0]], "test": [r for r in rows if "2" in r[0]]}
    (tmp_path / "pets" / name).write_text(json.dumps(split))
    monkeypatch.chdir(tmp_path)
    data = listed_images(f"pets/{name}")
    assert data.classnames == ("cat", "dog") and len(data.train) == 4 and len(data.test) == 2
    assert all(path.is_file() for path in data.train.paths)


def test_other_json_lists_are_tables(tmp_path):
    touch(tmp_path, "cat", "dog")
    rows = [{"path": f"{animal}/{i}.png", "label": animal} for animal in ("cat", "dog") for i in range(4)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert listed_images(tmp_path / "list.json").classnames == ("cat", "dog")
    (tmp_path / "list.json").write_text(json.dumps({"images": rows}))
    with pytest.raises(ValueError, match="must be a list of objects"):
        listed_images(tmp_path / "list.json")
    (tmp_path / "list.json").write_text(json.dumps({"train": [["gone/1.png", 0, "cat"]]}))
    with pytest.raises(FileNotFoundError, match=r"the first is .*gone/1\.png"):
        listed_images(tmp_path / "list.json")
