"""The 15 benchmark datasets in CoOp's layout: true names, splits and draws, stored draws, and every kind of damage."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path, PurePosixPath

import open_clip
import pytest
from miniature import IN_A, IN_R, WORDNET, write_few_shot, write_miniature

from mergetune.clip import fill
from mergetune.data import Dataset, coop_split, image_table, load_image
from mergetune.datasets import DATASETS, CoOpDataset, benchmark, check_dataset, few_shot_path, missing
from mergetune.templates import TEMPLATES, templates_for

CLASSES = 5
TEST_ONLY = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """All fifteen, never changed by a test."""
    root = tmp_path_factory.mktemp("data")
    for name in DATASETS:
        write_miniature(root, name, classes=CLASSES, size=8)
    return root


@pytest.fixture
def copy(data, tmp_path) -> Callable[[str], Path]:
    """A copy of one dataset under its root, to be damaged; gives the dataset's folder."""

    def make(name: str) -> Path:
        folder = write_miniature(data, name, classes=CLASSES, size=8).name  # where it is; the same bytes again
        shutil.copytree(data / folder, tmp_path / folder, symlinks=True)
        return tmp_path / folder

    return make


# -- CoOp's procedure, written down anew: items are (path, label, class name) ----------------------------------------

COOP = {  # {dataset: (folder, image folder, split file)}
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": ("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "oxford_flowers": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": ("food-101", "images", "split_zhou_Food101.json"),
    "fgvc_aircraft": ("fgvc_aircraft", "images", ""),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
    "imagenet": ("imagenet", "images", ""),
    "imagenetv2": ("imagenetv2", "imagenetv2-matched-frequency-format-val", ""),
    "imagenet_sketch": ("imagenet-sketch", "images", ""),
    "imagenet_a": ("imagenet-adversarial", "imagenet-a", ""),
    "imagenet_r": ("imagenet-rendition", "imagenet-r", ""),
}


def coop_read(root: Path, name: str) -> dict[str, list[tuple[str, int, str]]]:
    folder, image_dir, split_file = COOP[name]
    base, images = os.path.join(root, folder), os.path.join(root, folder, image_dir)
    if split_file:
        with open(os.path.join(base, split_file)) as file:
            content = json.load(file)
        return {
            split: [(os.path.join(images, path), int(label), word) for path, label, word in content[split]]
            for split in ("train", "val", "test")
        }
    if name == "fgvc_aircraft":
        with open(os.path.join(base, "variants.txt")) as file:
            variants = [line.strip() for line in file]
        splits = {}
        for split in ("train", "val", "test"):
            with open(os.path.join(base, f"images_variant_{split}.txt")) as file:
                rows = [line.strip().split(" ") for line in file]
            words = [" ".join(row[1:]) for row in rows]
            paths = [os.path.join(images, row[0] + ".jpg") for row in rows]
            splits[split] = [(path, variants.index(word), word) for path, word in zip(paths, words, strict=True)]
        return splits
    with open(os.path.join(base, "classnames.txt")) as file:
        words = dict(line.strip().split(" ", 1) for line in file)

    def listed(place: str) -> list[tuple[str, int, str]]:
        folders = sorted(f for f in os.listdir(place) if os.path.isdir(os.path.join(place, f)))
        if name == "imagenetv2":
            folders = [str(label) for label in range(len(words))]
        items = []
        for label, f in enumerate(folders):
            word = list(words.values())[label] if name == "imagenetv2" else words[f]
            items += [
                (os.path.join(place, f, image), label, word) for image in sorted(os.listdir(os.path.join(place, f)))
            ]
        return items

    if name == "imagenet":
        return {"train": listed(os.path.join(images, "train")), "test": listed(os.path.join(images, "val"))}
    return {"test": listed(images)}


def coop_few_shot(items: list[tuple[str, int, str]], shots: int) -> list[tuple[str, int, str]]:
    tracker = defaultdict(list)
    for item in items:
        tracker[item[1]].append(item)
    drawn = []
    for own in tracker.values():
        drawn.extend(random.sample(own, shots) if len(own) >= shots else own)
    return drawn


def coop_run(root: Path, name: str, shots: int, seed: int, subsample: str) -> dict[str, list[tuple[str, int, str]]]:
    """What CoOp trains and tests on: seeded once, train drawn first, then val; classes dropped at the end."""
    splits = coop_read(root, name)
    state = random.getstate()
    random.seed(seed)
    splits["train"] = coop_few_shot(splits["train"], shots)
    if "val" in splits:
        splits["val"] = coop_few_shot(splits["val"], min(shots, 4))
    random.setstate(state)
    if subsample == "all":
        return splits
    labels = sorted({label for _, label, _ in splits["train"]})
    half = math.ceil(len(labels) / 2)
    chosen = labels[:half] if subsample == "base" else labels[half:]
    return {
        split: [(path, chosen.index(label), word) for path, label, word in items if label in chosen]
        for split, items in splits.items()
    }


def items_of(images) -> list[tuple[str, int, str]]:
    return [
        (str(path), label, images.classnames[label]) for path, label in zip(images.paths, images.labels, strict=True)
    ]


def spoken(items: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """With the names as CoOp's trainers put them into prompts."""
    return [(path, label, word.replace("_", " ")) for path, label, word in items]


# -- reading and drawing ----------------------------------------------------------------------------------------------


def test_there_are_fifteen_in_the_order_of_the_papers():
    assert ", ".join(list(DATASETS)[:11]) == (
        "imagenet, caltech101, oxford_pets, stanford_cars, oxford_flowers, food101, fgvc_aircraft, sun397, dtd, "
        "eurosat, ucf101"
    )
    assert tuple(DATASETS)[11:] == TEST_ONLY
    assert {name: (entry.folder, entry.image_dir) for name, entry in DATASETS.items()} == {
        name: facts[:2] for name, facts in COOP.items()
    }


@pytest.mark.parametrize("name", list(DATASETS))
def test_reads_what_coop_reads(data, name):
    ours, expected = CoOpDataset(name, data), coop_read(data, name)
    assert ours.name == name and len(ours.classnames) == CLASSES
    for split in ("train", "val", "test"):
        if split in expected:
            assert items_of(getattr(ours, split)) == spoken(expected[split])
            assert load_image(getattr(ours, split).paths[0]).size == (8, 8)
        else:
            with pytest.raises(ValueError, match=f"dataset '{name}' has no {split} split"):
                getattr(ours, split)


@pytest.mark.parametrize(
    ("name", "classnames"),
    [
        ("imagenet", ("tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark")),
        ("caltech101", ("face", "leopard", "motorbike", "accordion", "airplane")),
        ("oxford_pets", ("abyssinian", "american bulldog", "american pit bull terrier", "basset hound", "beagle")),
        ("eurosat", ("Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road")),
        ("ucf101", ("Apply Eye Makeup", "Apply Lipstick", "Archery", "Baby Crawling", "Balance Beam")),
        ("stanford_cars", ("2000 AM General Hummer SUV", "2012 Acura RL Sedan")),
        ("imagenetv2", ("tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark")),
        ("imagenet_a", tuple(WORDNET[wnid] for wnid in IN_A[:CLASSES])),
        ("imagenet_r", tuple(WORDNET[wnid] for wnid in IN_R[:CLASSES])),
    ],
)
def test_class_names_are_those_of_coop(data, name, classnames):
    assert CoOpDataset(name, data).classnames[: len(classnames)] == classnames


def test_all_ten_classes_of_the_names_with_spaces_and_slashes(tmp_path):
    for name, rest in (
        ("sun397", ("outdoor apartment building", "indoor apse")),
        ("fgvc_aircraft", ("DC-10", "F/A-18", "Spitfire")),
    ):
        write_miniature(tmp_path, name, classes=10, images_per_class=4, size=4)
        assert CoOpDataset(name, tmp_path).classnames[-len(rest) :] == rest


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in TEST_ONLY])
@pytest.mark.parametrize(("shots", "seed"), [(1, 1), (2, 2), (2, 3), (16, 1)])
def test_draws_what_coop_draws(data, name, shots, seed):
    whole = CoOpDataset(name, data)
    base, novel = whole.base_novel()
    for part, subsample in ((whole, "all"), (base, "base"), (novel, "new")):
        expected = coop_run(data, name, shots, seed, subsample)
        assert items_of(part.few_shot(shots, seed)) == spoken(expected["train"])
        assert items_of(part.test) == spoken(expected["test"])
        if "val" in expected:
            assert items_of(part.few_shot(shots, seed, split="val")) == spoken(expected["val"])


def test_order_of_first_appearance_is_not_that_of_the_labels(data):
    """Otherwise the draws above would not tell the one from the other."""
    for name in ("stanford_cars", "oxford_flowers"):
        labels = list(dict.fromkeys(CoOpDataset(name, data).train.labels))
        assert labels != sorted(labels)


def test_test_only_sets_split_into_halves_but_draw_nothing(data):
    base, novel = CoOpDataset("imagenet_a", data).base_novel()
    assert len(base.classnames) == 3 and len(novel.test) == 20
    with pytest.raises(ValueError, match="dataset 'imagenet_a' has no train split"):
        base.few_shot(1)
    with pytest.raises(ValueError, match="dataset 'imagenet' has no val split"):
        CoOpDataset("imagenet", data).few_shot(1, split="val")


def test_two_imagenet_classes_may_have_one_name(copy):
    folder = copy("imagenet")
    (folder / "classnames.txt").write_text((folder / "classnames.txt").read_text().replace("goldfish", "tench"))
    assert CoOpDataset("imagenet", folder.parent).classnames[:2] == ("tench", "tench")


def test_imagenet_is_listed_once_per_folder_and_sorted(data, monkeypatch):
    seen = []
    scandir, stat = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or nullcontext([*scandir(path)][::-1]))
    monkeypatch.setattr(os, "stat", lambda path, **options: [stat(path, **options), "JPEG" in str(path) and 1 / 0][0])
    images = CoOpDataset("imagenet", data).train
    assert len(seen) == 2 * CLASSES + 2 == len(set(seen))  # train and val themselves too
    assert list(images.files) == sorted(images.files)


def test_listed_images_are_checked_by_one_listing_per_folder(data, monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr(os.path, "isfile", lambda path: 1 / 0)
    coop_split(data / "dtd", "split_zhou_DescribableTextures.json", "images")
    assert len(listed) == CLASSES


def test_hidden_files_and_strays_are_not_images(copy):
    folder = copy("imagenet_sketch") / "images"
    count = len(CoOpDataset("imagenet_sketch", folder.parent.parent).test)
    (folder / "n01440764" / "._sketch_0.JPEG").touch()
    (folder / "n01440764" / "Thumbs.db").touch()
    (folder / ".cache").mkdir()
    assert len(CoOpDataset("imagenet_sketch", folder.parent.parent).test) == count


# -- names and roots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("OxfordPets", "oxford_pets"),
        ("oxford-pets", "oxford_pets"),
        ("Flowers102", "oxford_flowers"),
        ("OxfordFlowers", "oxford_flowers"),
        ("DescribableTextures", "dtd"),
        ("caltech-101", "caltech101"),
        ("ImageNetV2", "imagenetv2"),
        ("ImageNetSketch", "imagenet_sketch"),
        ("imagenet-adversarial", "imagenet_a"),
        ("ImageNet-R", "imagenet_r"),
        ("ImageNet", "imagenet"),
        ("FGVCAircraft", "fgvc_aircraft"),
    ],
)
def test_names_of_coop_are_taken(alias, name):
    assert benchmark(alias).name == name


@pytest.mark.parametrize("name", ["cifar10", "", "classnames.txt", None])
def test_an_unknown_name_says_the_list(data, name):
    for call in (lambda: CoOpDataset(name, data), lambda: missing(name, data), lambda: templates_for(name)):
        with pytest.raises(ValueError, match=f"name must be one of imagenet, caltech101, .*imagenet_r, got {name!r}"):
            call()


def test_an_empty_root_lacks_everything_in_one_message(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        CoOpDataset("stanford_cars", tmp_path)
    text = str(caught.value)
    assert f"dataset 'stanford_cars' is not complete below root = {tmp_path}" in text
    assert "CoOp/blob/main/DATASETS.md#stanfordcars" in text
    for place in ("cars_train", "cars_test", "split_zhou_StanfordCars.json"):
        assert str(tmp_path / "stanford_cars" / place) in text
    assert "https://drive.google.com/file/d/1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT" in text
    assert len(missing("fgvc_aircraft", tmp_path)) == 5
    for name in DATASETS:
        with pytest.raises(FileNotFoundError, match="not complete"):
            check_dataset(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", list(DATASETS))
def test_what_is_missing_is_named_and_nothing_else(data, copy, name):
    assert missing(name, data) == []
    folder = copy(name)
    entry = DATASETS[name]
    needed = [entry.files[-1], *(str(PurePosixPath(entry.image_dir, inside)) for inside in entry.inside or ("",))]
    for count, place in enumerate(needed, start=1):
        path = folder / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        lacking = missing(name, folder.parent)
        assert len(lacking) == count and any(re.search(rf"(file|folder) {re.escape(str(path))}\b", s) for s in lacking)
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            CoOpDataset(name, folder.parent)


def test_a_missing_split_file_is_told_with_its_source(copy):
    folder = copy("dtd")
    (folder / "split_zhou_DescribableTextures.json").unlink()
    assert missing("dtd", folder.parent) == [
        f"file {folder / 'split_zhou_DescribableTextures.json'} "
        "(download: https://drive.google.com/file/d/1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x)"
    ]


def test_root_may_be_relative_or_at_home(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    monkeypatch.setenv("HOME", str(data.parent))
    for name in ("dtd", "stanford_cars", "fgvc_aircraft", "imagenet"):
        whole = CoOpDataset(name, data)
        for root in (data.name, f"~/{data.name}"):
            assert CoOpDataset(name, root).test.files == whole.test.files
            assert CoOpDataset(name, root).test.paths[0].is_file()


def test_the_datasets_own_folder_will_do_as_root(data, tmp_path):
    assert CoOpDataset("caltech101", data / "caltech-101") == CoOpDataset("caltech101", data)
    root = shutil.copytree(data, tmp_path / "dtd")  # a root may be called as one of its datasets
    assert CoOpDataset("dtd", root).test.paths[0].is_relative_to(root / "dtd")
    assert few_shot_path("caltech101", data, 16, 1) == data / "caltech-101" / "split_fewshot" / "shot_16-seed_1.pkl"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("eurosat", "2750", "EuroSAT_RGB"), ("imagenet_sketch", "images", "sketch"), ("imagenet", "images/{}", "{}")],
)
def test_folders_as_archives_unpack_them(data, copy, name, old, new):
    folder = copy(name)
    for inside in ("train", "val") if name == "imagenet" else ("",):
        (folder / old.format(inside)).rename(folder / new.format(inside))
    shutil.rmtree(folder / "images", ignore_errors=True)
    ours = CoOpDataset(name, folder.parent)
    assert ours.full_test.files == CoOpDataset(name, data).full_test.files
    assert ours.full_test.paths[0].is_file()
    if name == "eurosat":  # CoOp's name goes first
        (folder / "2750").mkdir()
        with pytest.raises(FileNotFoundError, match="images listed in .* are missing, the first is .*2750"):
            CoOpDataset(name, folder.parent)


def test_imagenets_class_names_need_no_copy(data, copy):
    folder = copy("imagenet_r")
    (folder / "classnames.txt").unlink()
    assert len(missing("imagenet_r", folder.parent)) == 1
    shutil.copytree(data / "imagenet-adversarial", folder.parent / "imagenet")  # has all the names
    assert CoOpDataset("imagenet_r", folder.parent) is not None


# -- damage -----------------------------------------------------------------------------------------------------------


def edit_json(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob("split_zhou_*.json")
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


def edit_text(file: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("dtd", edit_json(lambda s: s.update(val=7)), "must have a list under 'val', got 7"),
        ("dtd", edit_json(lambda s: s.update(train={})), "must be an object with a list under 'train'"),
        ("dtd", edit_json(lambda s: s["train"].append(3)), r"must be \[path, label, class name\], got 3"),
        ("dtd", edit_json(lambda s: s["test"].append("abc")), r"must be \[path, label, class name\], got 'abc'"),
        ("dtd", edit_json(lambda s: s["test"].append(["a.jpg", 1.5, "x"])), r"\[path, label, class name\]"),
        ("dtd", edit_json(lambda s: s["test"].append(["a.jpg", 1, None])), r"\[path, label, class name\]"),
        ("dtd", edit_json(lambda s: s["test"].append(["a.jpg", 1, "_"])), r"\[path, label, class name\]"),
        ("dtd", edit_json(lambda s: s["test"].append(["/a.jpg", 1, "blotchy"])), "must lie below root"),
        ("dtd", edit_json(lambda s: s["test"][0].__setitem__(1, 9)), "must be 0..5 without a gap"),
        ("dtd", edit_json(lambda s: s["test"][0].__setitem__(2, "else")), "label 0 .* must have one name"),
        ("dtd", edit_json(lambda s: s["test"].append(s["train"][0])), "must lie in one split, got .* in"),
        ("dtd", edit_json(lambda s: s["test"].append(s["test"][0])), "must not repeat"),
        ("dtd", edit_json(lambda s: s.update(train=s["train"][5:])), "at least one image, got none for 'banded'"),
        ("dtd", lambda f: shutil.rmtree(f / "images/banded"), "10 of 50 images listed in .* the first is .*banded"),
        ("dtd", lambda f: (f / "split_zhou_DescribableTextures.json").write_bytes(b"\xff{"), "must be JSON"),
        ("dtd", lambda f: (f / "split_zhou_DescribableTextures.json").write_text("[" * 10**5), "must be JSON"),
        ("fgvc_aircraft", edit_text("variants.txt", "707-320\n", ""), "line 1 of .* must be an image and a variant of"),
        ("fgvc_aircraft", edit_text("variants.txt", "707-320", "727-200"), "each once, got 5, 4 different"),
        ("fgvc_aircraft", edit_text("variants.txt", "707-320", "1\n707-320"), "got none for '1'"),
        ("fgvc_aircraft", edit_text("images_variant_val.txt", " ", "_"), "line 1 of .*val.txt must be an image and a"),
        ("fgvc_aircraft", edit_text("images_variant_val.txt", " ", "0 "), "1 of 15 images listed in .*val.txt"),
        ("fgvc_aircraft", lambda f: (f / "images_variant_val.txt").write_text(""), "at least one image, got none"),
        ("fgvc_aircraft", lambda f: (f / "variants.txt").write_bytes(b"\xff"), "must be text in UTF-8"),
        ("imagenet", edit_text("classnames.txt", "tench", ""), "line 1 of .* a folder, new, and its class name"),
        ("imagenet", edit_text("classnames.txt", "n01443537", "n01440764"), "line 2 of .* a folder, new, and its"),
        ("imagenet", edit_text("classnames.txt", "n01440764", "n1"), "must name every class folder in .*'n01440764'"),
        ("imagenet", lambda f: shutil.rmtree(f / "images/val/n01440764"), "must have the class folders of train, it l"),
        ("imagenet", lambda f: (f / "images/val/extra").mkdir(), "class folders of train, it has 'extra' besides"),
        ("imagenet_a", lambda f: (f / "imagenet-a/extra").mkdir(), "must name every class folder in .*'extra'"),
        ("imagenetv2", lambda f: (f / "imagenetv2-matched-frequency-format-val/5").mkdir(), "it has '5' besides"),
        ("imagenetv2", edit_text("classnames.txt", "n01440764 tench\n", ""), "one folder per line of .*'4' besides"),
    ],
)  # fmt: skip
def test_damage_is_refused(copy, name, damage, message):
    folder = copy(name)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CoOpDataset(name, folder.parent)


@pytest.mark.parametrize(("name", "place"), [("imagenet", "images/train"), ("imagenet_r", "imagenet-r")])
def test_class_folders_without_images_are_refused(copy, name, place):
    folder = copy(name)
    wnid = sorted(os.listdir(folder / place))[-1]
    for file in (folder / place / wnid).iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(ValueError, match=f"class folder .*{wnid} must hold at least one image, got none"):
        CoOpDataset(name, folder.parent)
    shutil.rmtree(folder)
    (folder / place).mkdir(parents=True)
    (folder / "images/val").mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("n01440764 tench\n")
    with pytest.raises(ValueError, match="must hold one folder per class, got no folders"):
        CoOpDataset(name, folder.parent)


# -- stored draws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["/home/kaiyang/data/dtd/images", r"D:\data\dtd\images", ""])
def test_stored_draw_is_read(data, tmp_path, protocol, place):
    whole = CoOpDataset("dtd", data)
    stored = coop_run(data, "dtd", 2, 1, "all")
    images = str(data / "dtd" / "images")
    moved = {
        split: [((place + path.removeprefix(images)).lstrip("/" if not place else ""), *rest) for path, *rest in items]
        for split, items in stored.items()
    }
    if "\\" in place:
        moved = {split: [(path.replace("/", "\\"), *rest) for path, *rest in items] for split, items in moved.items()}
    path = write_few_shot(tmp_path / "shot_2-seed_1.pkl", moved, protocol=protocol)
    base, novel = whole.base_novel()
    for part, subsample in ((whole, "all"), (base, "base"), (novel, "new")):
        for split in ("train", "val"):
            expected = coop_run(data, "dtd", 2, 1, subsample)[split]
            assert items_of(part.few_shot_file(path, split)) == spoken(expected)


def test_stored_draw_of_imagenet_has_only_train(data, tmp_path):
    stored = coop_run(data, "imagenet", 2, 1, "all")["train"]
    random.Random(0).shuffle(stored)  # an order that no file system here has
    path = write_few_shot(tmp_path / "shot_2-seed_1.pkl", {"train": stored})
    assert items_of(CoOpDataset("imagenet", data).few_shot_file(path)) == stored
    with pytest.raises(ValueError, match="dataset 'imagenet' has no val split"):
        CoOpDataset("imagenet", data).few_shot_file(path, "val")


def test_stored_draw_must_fit_the_dataset(data, tmp_path):
    whole = CoOpDataset("dtd", data)
    good = coop_run(data, "dtd", 1, 1, "all")
    cases = [
        ({"val": good["val"]}, "must be a few-shot file of CoOp with images under 'train': KeyError"),
        ({"train": []}, "must be a few-shot file of CoOp"),
        ({"train": good["test"]}, "must list images of 'dtd', got '.*jpg', which is not in train"),
        ({"train": [(p, (y + 1) % 5, n) for p, y, n in good["train"]]}, "must have the labels of 'dtd', got 1 for"),
        ({"train": [*good["train"], good["train"][0]]}, r"images in .*pkl must not repeat, got '.*jpg' twice"),
        ({"train": good["train"][1:]}, "at least one image, got none for 'banded'"),
        ({"train": [(p, str(y), n) for p, y, n in good["train"]]}, "must have a path and a label"),
        ({"train": [(p, None, n) for p, _, n in good["train"]]}, "the opcode NONE, which such files have no need of"),
    ]
    for number, (content, message) in enumerate(cases):
        path = write_few_shot(tmp_path / f"{number}.pkl", content)
        with pytest.raises(ValueError, match=message):
            whole.few_shot_file(path)
    with pytest.raises(FileNotFoundError):
        whole.few_shot_file(tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        whole.few_shot_file(path, "test")


def touches(path: Path) -> object:
    """Unpickled, it would create a file."""
    return type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(path),))})()


def hostile(trap: Path) -> dict[str, bytes]:
    made = f"V{trap}\n".encode()
    return {
        **{f"reduce {p}": pickle.dumps({"train": [touches(trap)]}, protocol=p) for p in range(6)},
        "after stop of the records": pickle.dumps([touches(trap), {"train": []}]),
        "global": b"cposix\nmkdir\n(" + made + b"tR.",
        "inst": b"(" + made + b"iposix\nmkdir\n.",
        "obj": b"(cposix\nmkdir\n" + made + b"o.",
        "newobj": b"\x80\x02cposix\nmkdir\n(" + made + b"t\x81.",
        "eval": b"cbuiltins\neval\n(Vopen('" + str(trap).encode() + b"','w')\ntR.",
        "dotted": b"\x80\x04\x8c\x23dassl.data.datasets.base_dataset\x8c\x15Datum.__init__.__globals__\x93.",
        "import": b"\x80\x02ctrapped_module\nx\n.",
        "extension": b"\x82\x01.",
        "persistent": b"Pposix.mkdir\n.",
        "out of band": b"\x80\x05\x97.",
        "memo bomb": b"\x80\x02]r\xff\xff\xff\x7f.",
        "byte array bomb": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "text bomb": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
        "class spoiled": b"\x80\x02cdassl.data.datasets.base_dataset\nDatum\nN}X\x05\x00\x00\x00labelK\x01s\x86b.",
    }


def test_hostile_pickles_do_nothing(data, tmp_path, monkeypatch):
    whole = CoOpDataset("dtd", data)
    trap = tmp_path / "trap"
    (tmp_path / "trapped_module.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, content in hostile(trap).items():
        path = tmp_path / "shot_1-seed_1.pkl"
        path.write_bytes(content)
        reason = {"memo bomb": "its memo is larger than the file", "import": "it holds trapped_module.x, and pick"}
        with pytest.raises(ValueError, match=f"must be a few-shot file of CoOp.*{reason.get(name, '')}"):
            whole.few_shot_file(path)
        assert not trap.exists(), name
    for name in ("reduce 4", "inst", "import"):
        pickle.loads(hostile(trap)[name])
        trap.rmdir()  # the traps work where pickles are run
    del sys.modules["trapped_module"]


def test_one_file_cannot_spoil_the_next(data, tmp_path):
    """BUILD on the record class itself would set its attributes for good, were the class not made anew."""
    whole = CoOpDataset("dtd", data)
    good = write_few_shot(tmp_path / "good.pkl", coop_run(data, "dtd", 1, 1, "all"))
    before = whole.few_shot_file(good)
    for content in hostile(tmp_path / "trap").values():
        (tmp_path / "bad.pkl").write_bytes(content)
        with pytest.raises(ValueError):
            whole.few_shot_file(tmp_path / "bad.pkl")
    assert whole.few_shot_file(good) == before


# -- fuzz -------------------------------------------------------------------------------------------------------------

JUNK = [None, True, -1, 10**20, 0.5, "", "x", "\0", "\ud800", "../..", [], [[]], {}, {"train": 1}, ["a", 0, "b"]]


def spoil_bytes(content: bytes, stream: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(stream.randint(1, 6)):
        at = stream.randrange(len(content))
        kind = stream.randrange(4)
        if kind == 0:
            content[at] = stream.randrange(256)
        elif kind == 1:
            del content[at : at + stream.randint(1, 30)]
        elif kind == 2:
            content[at:at] = stream.randbytes(stream.randint(1, 8))
        else:
            start = stream.randrange(len(content))
            content[at : at + 9] = content[start : start + 9]
        if not content:
            return b""
    return bytes(content)


def spoil_json(value: object, stream: random.Random) -> object:
    """One place somewhere inside is replaced, dropped or doubled."""
    if isinstance(value, (list, dict)) and value and stream.random() < 0.9:
        key = stream.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if stream.random() < 0.15:
            del value[key]
        elif stream.random() < 0.15 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = spoil_json(value[key], stream)
        return value
    return stream.choice(JUNK)


def survives(call: Callable[[], object], path: Path) -> bool:
    """Whether the file was read; if not, the error must be ours and name the file, or the place it leads to."""
    try:
        call()
    except Exception as error:
        assert type(error) in (ValueError, FileNotFoundError), (type(error), path.read_bytes())
        assert re.search(r"must|missing|cannot", str(error)), error
        return False
    return True


def test_a_thousand_spoiled_files_raise_only_our_errors(data, tmp_path):
    stream = random.Random(20)
    dtd, aircraft, imagenet = (tmp_path / folder for folder in ("dtd", "fgvc_aircraft", "imagenet"))
    for folder in (dtd, aircraft, imagenet):
        folder.mkdir()
        (folder / "images").symlink_to(data / folder.name / "images")
    table = [{"path": f"images/{path}", "label": "a_b", "split": "train"} for path in os.listdir(data / "dtd/images")]
    names = ["split_zhou_DescribableTextures.json", "shot.pkl", "variants.txt", "images_variant_val.txt"]
    whole = CoOpDataset("dtd", data)
    split = (data / "dtd" / names[0]).read_bytes()
    stored = write_few_shot(tmp_path / "good.pkl", coop_run(data, "dtd", 2, 1, "all")).read_bytes()
    read = 0
    for turn in range(250):
        file = dtd / names[0]
        file.write_bytes(spoil_bytes(split, stream))
        read += survives(partial(CoOpDataset, "dtd", tmp_path), file)
        file.write_text(json.dumps(spoil_json(json.loads(split), stream)))
        read += survives(partial(CoOpDataset, "dtd", tmp_path), file)

        file = tmp_path / names[1]
        file.write_bytes(spoil_bytes(stored, stream))
        read += survives(partial(whole.few_shot_file, file, stream.choice(["train", "val"])), file)

        if turn % 3 == 0:
            for name in ("variants.txt", *(f"images_variant_{s}.txt" for s in ("train", "val", "test"))):
                shutil.copy(data / "fgvc_aircraft" / name, aircraft / name)
            file = aircraft / stream.choice(names[2:])
            file.write_bytes(spoil_bytes(file.read_bytes(), stream))
            read += survives(partial(CoOpDataset, "fgvc_aircraft", tmp_path), file)
        elif turn % 3 == 1:
            file = imagenet / "classnames.txt"
            file.write_bytes(spoil_bytes((data / "imagenet" / file.name).read_bytes(), stream))
            read += survives(partial(CoOpDataset, "imagenet", tmp_path), file)
        else:
            file = tmp_path / stream.choice(["table.json", "table.csv"])
            if file.suffix == ".json":
                file.write_text(json.dumps(spoil_json(json.loads(json.dumps(table)), stream)))
            else:
                rows = "path,label,split\n" + "".join(f"{row['path']},a,train\n" for row in table)
                file.write_bytes(spoil_bytes(rows.encode(), stream))
            read += survives(partial(image_table, file), file)
    assert 10 < read < 900, "some of the damage does not matter, most does"


# -- miniature --------------------------------------------------------------------------------------------------------


def test_miniature_is_the_same_every_time(data, tmp_path):
    for name in ("stanford_cars", "imagenetv2", "fgvc_aircraft"):
        folder = write_miniature(tmp_path, name, classes=CLASSES, size=8)
        for path in folder.rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (data / path.relative_to(tmp_path)).read_bytes()
    with pytest.raises(ValueError, match="classes must be 1 to 10"):
        write_miniature(tmp_path, "dtd", classes=11)


def test_dataset_needs_one_split():
    with pytest.raises(ValueError, match="dataset 'none' must have a train, val or test split, got none"):
        Dataset("none")


# -- templates --------------------------------------------------------------------------------------------------------


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
