"""The 15 benchmark datasets in CoOp's layout: true names, splits and draws, stored draws, and every kind of damage."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path, PurePosixPath

import pytest
from coop_cases import CLASSES, COOP, TEST_ONLY, coop_read, coop_run, items_of, spoken
from miniature import IN_A, IN_R, WORDNET, write_miniature

from mergetune.data import (
    DATASETS,
    CoOpDataset,
    Dataset,
    benchmark,
    check_dataset,
    coop_split,
    few_shot_path,
    load_image,
    templates_for,
)
from mergetune.data.benchmarks import missing


@pytest.fixture
def copy(data, tmp_path) -> Callable[[str], Path]:
    """A copy of one dataset under its root, to be damaged; gives the dataset's folder."""

    def make(name: str) -> Path:
        folder = write_miniature(data, name, classes=CLASSES, size=8).name  # where it is; the same bytes again
        shutil.copytree(data / folder, tmp_path / folder, symlinks=True)
        return tmp_path / folder

    return make


# -- reading and drawing -----------------------------------------------------------------------------------------------


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


# -- names and roots ---------------------------------------------------------------------------------------------------


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


# -- damage ------------------------------------------------------------------------------------------------------------


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
        ("dtd", edit_json(lambda s: s["test"].append(["../../a.jpg", 1, "blotchy"])), "must lie below root"),
        ("dtd", edit_json(lambda s: s["test"][0].__setitem__(1, 9)), "must be 0 to 5 without a gap"),
        ("dtd", edit_json(lambda s: s["test"][0].__setitem__(2, "else")), "label 0 .* must have one name"),
        ("dtd", edit_json(lambda s: s["test"].append(s["train"][0])), "must lie in one split, got .* in"),
        ("dtd", edit_json(lambda s: s["test"].append(s["test"][0])), "must not repeat"),
        ("dtd", edit_json(lambda s: s.update(train=s["train"][5:])), "at least one image, got none for 'banded'"),
        ("dtd", lambda f: shutil.rmtree(f / "images/banded"), "10 of 50 images listed in .* the first is .*banded"),
        ("dtd", lambda f: (f / "split_zhou_DescribableTextures.json").write_bytes(b"\xff{"), "must be text in UTF-8"),
        ("dtd", lambda f: (f / "split_zhou_DescribableTextures.json").write_text("[" * 10**5), "must be JSON"),
        ("fgvc_aircraft", edit_text("variants.txt", "707-320\n", ""), "line 1 of .* must be an image and a variant of"),
        ("fgvc_aircraft", edit_text("variants.txt", "707-320", "727-200"), "once, got 5 lines, 4 different"),
        ("fgvc_aircraft", edit_text("variants.txt", "707-320", "1\n707-320"), "got none for '1'"),
        ("fgvc_aircraft", edit_text("images_variant_val.txt", " ", "_"), "line 1 of .*val.txt must be an image and a"),
        ("fgvc_aircraft", edit_text("images_variant_val.txt", " ", "0 "), "1 of 15 images listed in .*val.txt"),
        ("fgvc_aircraft", lambda f: (f / "images_variant_val.txt").write_text(""), "at least one image, got none"),
        ("fgvc_aircraft", lambda f: (f / "variants.txt").write_bytes(b"\xff"), "must be text in UTF-8"),
        ("imagenet", edit_text("classnames.txt", "tench", ""), "line 1 of .* a new folder and its class name"),
        ("imagenet", edit_text("classnames.txt", "n01443537", "n01440764"), "line 2 of .* a new folder and its"),
        ("imagenet", edit_text("classnames.txt", "n01440764", "n1"), "must name every class folder in .*'n01440764'"),
        ("imagenet", lambda f: shutil.rmtree(f / "images/val/n01440764"), "have the class folders of train, but l"),
        ("imagenet", lambda f: (f / "images/val/extra").mkdir(), "class folders of train, but has 'extra' in addition"),
        ("imagenet_a", lambda f: (f / "imagenet-a/extra").mkdir(), "must name every class folder in .*'extra'"),
        ("imagenetv2", lambda f: (f / "imagenetv2-matched-frequency-format-val/5").mkdir(), "but has '5' in addition"),
        ("imagenetv2", edit_text("classnames.txt", "n01440764 tench\n", ""), "folder per line of .*'4' in addition"),
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


# -- miniature ---------------------------------------------------------------------------------------------------------


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
