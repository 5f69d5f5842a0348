"""Which folders are read as splits, which as classes, and which are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from mergetune.data import ImageFolder, listed_images
from mergetune.data.image_files import describe_ignored, ignored_files


def touch(root: Path, *folders: str, images: int = 4) -> Path:
    """Files that are called pictures, of different bytes; ImageFolder does not decode them."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            (root / folder / f"{i}.png").write_text(f"{folder} {i}")
    return root


def sides(data) -> dict[str, set[str]]:
    lists = {"train": data.full_train, "val": data.full_val, "test": data.full_test}
    return {split: {Path(file).parts[0] for file in found.files} for split, found in lists.items() if found}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", None, "Testing"),
        ("Train", "Valid", "Test"),
        ("training_set", None, "test_set"),
        ("train", "validation", "test"),
        ("train-images", "dev", "TEST DATA"),
        ("trn", "val", "tst"),
        ("seg_train/seg_train", None, "seg_test/seg_test"),  # each split wrapped once more, as archives unpack
        ("training_set/training_set", None, "test_set/test_set"),
        ("train2017", "val2017", None),
        ("training", "validation", "evaluation"),
        ("asl_alphabet_train", None, "asl_alphabet_test"),
    ],
)
def test_usual_spellings_of_splits(tmp_path, train, val, test):
    spelt = {"train": train, "val": val, "test": test}
    for folder in filter(None, spelt.values()):
        touch(tmp_path, f"{folder}/cat", f"{folder}/dog")
    data = ImageFolder(tmp_path)
    assert data.classnames == ("cat", "dog")
    assert sides(data) == {split: {folder.split("/")[0]} for split, folder in spelt.items() if folder}


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
    assert sides(ImageFolder(tmp_path)) == {"train": {"brain"}, "test": {"brain"}}
    assert {Path(file).parts[1] for file in ImageFolder(tmp_path).test.files} == {"Testing"}


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


def write(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("no image")


@pytest.mark.parametrize(
    ("classes", "others"),
    [
        ("dtd/images", ("dtd/labels/train1.txt", "dtd/imdb/imdb.mat")),
        ("food-101/images", ("food-101/meta/train.txt", "food-101/README.txt")),
        ("101_ObjectCategories", ("Annotations/cat/annotation_0001.mat",)),
        ("CUB_200_2011/images", ("CUB_200_2011/attributes/a.txt", "CUB_200_2011/parts/p.txt", "attributes.txt")),
        ("2750", ("__MACOSX/2750/cat/._1.png", ".git/config")),
        ("data", ("README.md", ".gitattributes")),
    ],
)
def test_published_layouts_are_read(tmp_path, classes, others):
    touch(tmp_path / classes, "cat", "dog")
    write(tmp_path, *others)
    data = ImageFolder(tmp_path)
    assert data.classnames == ("cat", "dog")
    assert len(data.train) + len(data.val) + len(data.test) == 8


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("images", "annotations/trimaps"), "with 'annotations', 'images', which are parts of a dataset"),  # pets
        (("jpg",), "with 'jpg', which are parts of a dataset"),  # flowers
        (("cars_train", "cars_test"), "cars_train must hold one folder per class, got images without class folders"),
        (("train/cat", "train/dog", "test"), "test must hold one folder per class, got images without class folders"),
        (("train/cat", "train/dog", "val/images"), "val must hold one folder per class, got images without class"),
        (("EuroSAT/cat", "EuroSAT/dog", "Bands/cat", "Bands/dog"), "hold the same folders 'cat', 'dog'"),
    ],
)
def test_layouts_without_class_folders_are_refused(tmp_path, folders, message):
    touch(tmp_path, *folders)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("name", ["split_zhou_OxfordPets.json", "metadata.csv", "labels.tsv"])
def test_a_list_beside_images_without_class_folders_is_named(tmp_path, name):
    touch(tmp_path, "images", "annotations")
    write(tmp_path, name)
    with pytest.raises(ValueError, match=f"{name} may be such a list: give it instead of the folder"):
        ImageFolder(tmp_path)


def test_the_folder_of_all_benchmarks_is_no_dataset(tmp_path):
    touch(tmp_path, "dtd/images/cat", "eurosat/2750/dog")
    write(tmp_path, "dtd/split_zhou_DescribableTextures.json", "eurosat/split_zhou_EuroSAT.json")
    with pytest.raises(ValueError, match="with the benchmark datasets 'dtd', 'eurosat': give the name of one"):
        ImageFolder(tmp_path)
    with pytest.warns(UserWarning, match="split_zhou_EuroSAT.json is not used: give this file instead"):
        ImageFolder(touch(tmp_path / "eurosat", "2750/cat"))


def test_names_that_contain_a_split_are_classes(tmp_path):
    names = ("bullet_train", "crash_test", "freight_train", "test_tube")
    assert ImageFolder(touch(tmp_path, *names)).classnames == tuple(name.replace("_", " ") for name in names)


def test_deeper_folders_are_hinted_at(tmp_path):
    touch(tmp_path, "a/abbey", "a/airport", "b/bar", "b/beach", "b/bridge")
    with pytest.warns(UserWarning, match="the classes are the 2 folders in .* such as 'abbey', are no classes"):
        assert ImageFolder(tmp_path).classnames == ("a", "b")


@pytest.mark.parametrize("folder", ["@eaDir", "__MACOSX", "$RECYCLE.BIN", ".thumbnails"])
def test_folders_of_systems_are_no_classes_and_hold_no_images(tmp_path, folder):
    touch(tmp_path, "cat", "dog", folder, f"cat/{folder}")
    data = ImageFolder(tmp_path)
    assert data.classnames == ("cat", "dog")
    assert len(data.train) + len(data.val) + len(data.test) == 8


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_may_lack_in_val_and_test_but_not_in_train(tmp_path, split):
    touch(tmp_path, "train/cat", "train/dog", f"{split}/cat")
    with pytest.warns(UserWarning, match=f"{split} in .* has no images of 'dog': left out there"):
        data = ImageFolder(tmp_path)
    assert getattr(data, split).counts == (4, 0) and data.classnames == ("cat", "dog")
    touch(tmp_path, f"{split}/fox")
    with pytest.raises(ValueError, match="must have the classes of train .* has 'fox' in addition"):
        ImageFolder(tmp_path)


def test_split_files_name_classes_that_lack_in_test(tmp_path):
    touch(tmp_path, "cat", "dog")
    rows = [[f"{animal}/{i}.png", label, animal] for label, animal in enumerate(("cat", "dog")) for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps({"train": rows[:2] + rows[4:], "test": rows[2:4]}))
    with pytest.warns(UserWarning, match="test in .*a.json has no images of 'dog': left out there"):
        assert listed_images(tmp_path / "a.json").test.counts == (2, 0)


def test_ignored_files_are_counted_in_one_line(tmp_path):
    touch(tmp_path, "cat", "dog")
    write(tmp_path, "cat/a.heic", "dog/b.HEIC", "notes.txt", "loose.png", "__MACOSX/x.txt", "cat/.DS_Store")
    data = ImageFolder(tmp_path)
    used = {*data.train.files, *data.val.files, *data.test.files}
    line = describe_ignored(ignored_files(tmp_path, used))
    assert line.startswith("ignored 5: .heic (2), .txt (1), hidden (1), image in no class folder (1)")
    assert "pip install pillow-heif" in line and "pillow" not in describe_ignored({".txt": 1})
    assert describe_ignored({}) == ""


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


@pytest.mark.parametrize(
    ("places", "taken", "warns"),
    [
        ({"a-thumbs": 1, "photos": 6}, "photos", True),
        ({"": 6, "photos": 6}, "", False),
        ({"": 1, "images": 6, "a-thumbs": 5}, "images", False),
        ({"images": 2, "photos": 5}, "photos", True),
    ],
)
def test_the_folder_with_most_images_of_a_split_file_is_taken(tmp_path, places, taken, warns):
    """Also where other folders hold the first images of the list."""
    files = [f"{animal}/{i}.jpg" for animal in ("cat", "dog") for i in range(3)]
    for place, count in places.items():
        for file in files[:count]:
            (tmp_path / place / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place / file).touch()
    items = [[file, int(file.startswith("dog")), file[:3]] for file in files]
    (tmp_path / "split_zhou_Pets.json").write_text(json.dumps({"train": items[::3], "test": [*items[1:3], *items[4:]]}))
    whole = max(places.values()) == len(files)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if whole:
            assert listed_images(tmp_path / "split_zhou_Pets.json").train.root == tmp_path / taken
        else:
            with pytest.raises(FileNotFoundError, match="1 of 6 images .* are missing, .*photos/.*--root FOLDER"):
                listed_images(tmp_path / "split_zhou_Pets.json")
    assert [f"are taken from {tmp_path / taken}, which holds" in str(warning.message) for warning in said] == (
        [True] if warns else []
    )
