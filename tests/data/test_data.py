"""Image lists and data sets: reading, splitting, sampling as CoOp does, and refusing what is wrong."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mergetune.data import Dataset, ImageFolder, ImageList, coop_split, image_table, load_image
from mergetune.data.class_names import prettify


def draw_image(path: Path, colour: int = 0, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour % 256, colour // 256 % 256, 7)).save(path)
    return path


def draw_classes(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    """A folder per class; every image has other bytes."""
    colours = iter(range(first, first + sum(counts.values())))
    for name, count in counts.items():
        for i in range(count):
            draw_image(root / name / f"{i:02d}.png", next(colours))
    return root


def image_list(labels: list[int], classes: int | None = None, prefix: str = "") -> ImageList:
    names = tuple(f"class {c}" for c in range(classes or max(labels) + 1))
    return ImageList(Path("data"), tuple(f"{prefix}{i}.png" for i in range(len(labels))), tuple(labels), names)


# -- ImageList --------------------------------------------------------------------------------------------------------


def test_image_list_selects_and_relabels_in_the_given_order():
    images = image_list([0, 1, 2, 1, 0])
    chosen = images.select([2, 1])
    assert chosen.files == ("1.png", "2.png", "3.png")
    assert chosen.labels == (1, 0, 1)
    assert chosen.classnames == ("class 2", "class 1")
    assert len(images) == 5 and images.counts == (2, 2, 1) and chosen.classes == (0, 1)
    assert images.take([4, 0]).files == ("4.png", "0.png")
    assert images.paths[0] == Path("data/0.png")


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        ((), (), "files must hold at least one image, got none"),
        (("a.png",), (0, 1), "labels must have one entry per file = 1, got 2"),
        (("a.png", "b.png"), (0, 2), r"labels must lie in \[0, 2\), got 2 for 'b.png'"),
        (("a.png",), (-1,), r"labels must lie in \[0, 2\), got -1"),
        (("a.png", "a.png"), (0, 1), "files must not repeat, got 'a.png' twice"),
        (("/a.png",), (0,), "files must be relative to root"),
        (("../a.png",), (0,), "files must be relative to root = .* and lie below it, got '../a.png'"),
        (("b/../../a.png",), (0,), "files must be relative to root = .* and lie below it"),
    ],
)
def test_image_list_refuses(files, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageList(Path("data"), files, labels, ("cat", "dog"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "at least one class"),
        ([3], r"lie in \[0, 3\), got 3"),
        ([1, 1], "not repeat, got 1 twice"),
        ([2], "class 2"),
    ],
)
def test_select_refuses(classes, message):
    with pytest.raises(ValueError, match=message):
        image_list([0, 1], classes=3).select(classes)


# -- few-shot and base/novel, against CoOp ---------------------------------------------------------------------------


def coop_draw(data_sources: list[tuple[ImageList, int]]) -> list[list[str]]:
    """Dassl's generate_fewshot_dataset with the global stream, written anew from its description."""
    outputs = []
    for images, shots in data_sources:
        tracker = defaultdict(list)
        for file, label in zip(images.files, images.labels, strict=True):
            tracker[label].append(file)
        outputs.append(
            [f for files in tracker.values() for f in (random.sample(files, shots) if len(files) >= shots else files)]
        )
    return outputs


def coop_dataset(classes: int = 7) -> Dataset:
    """Shuffled labels, classes of 2 to 21 images: some have fewer than the shots."""
    shuffle = random.Random(5)
    splits = []
    for split, per_class in (("train", 3), ("val", 1), ("test", 2)):
        labels = [c for c in range(classes) for _ in range(2 + per_class * c)]
        shuffle.shuffle(labels)
        splits.append(image_list(labels, classes, prefix=f"{split}/"))
    return Dataset("toy", *splits)


@pytest.mark.parametrize("shots", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_few_shot_draws_what_coop_draws(shots, seed):
    data = coop_dataset()
    state = random.getstate()
    random.seed(seed)
    train, val = coop_draw([(data.train, shots), (data.val, min(shots, 4))])
    random.setstate(state)
    assert data.few_shot(shots, seed).files == tuple(train)
    assert data.few_shot(shots, seed, split="val").files == tuple(val)
    assert random.getstate() == state

    base, novel = data.base_novel()
    half = math.ceil(7 / 2)
    label_of = dict(zip(data.train.files, data.train.labels, strict=True))
    for part, kept in ((base, range(half)), (novel, range(half, 7))):
        drawn = part.few_shot(shots, seed)
        assert drawn.files == tuple(file for file in train if label_of[file] in kept)
        assert drawn.labels == tuple(label_of[file] - kept.start for file in drawn.files)
        assert drawn.classnames == part.classnames == tuple(f"class {c}" for c in kept)


def test_base_novel_relabels_every_split_and_nests():
    data = coop_dataset(5)
    base, novel = data.base_novel()
    assert base.classnames == ("class 0", "class 1", "class 2") and novel.classnames == ("class 3", "class 4")
    assert novel.test.classes == (0, 1)
    assert len(base.test) + len(novel.test) == len(data.test)
    assert base.base_novel()[1].classnames == ("class 2",)
    assert data.select([4, 0]).base_novel()[0].classnames == ("class 0",), "labels are sorted first"


def test_few_shot_none_gives_all():
    data = coop_dataset()
    assert data.few_shot(None) == data.train
    assert data.few_shot(None, split="val") == data.val


def test_few_shot_and_splits_refuse():
    data = coop_dataset()
    for shots in (0, -1):
        with pytest.raises(ValueError, match=f"shots must be at least 1, got {shots}"):
            data.few_shot(shots)
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        data.few_shot(1, split="test")
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        data.select([0]).base_novel()
    gap = Dataset("gap", image_list([0, 2], classes=3))
    with pytest.raises(ValueError, match="got none for 'class 1'"):
        gap.few_shot(1)
    for split in ("val", "test"):
        with pytest.raises(ValueError, match=f"dataset 'gap' has no {split} split"):
            getattr(gap, split)
    with pytest.raises(ValueError, match="has no val split"):
        gap.few_shot(1, split="val")


def test_dataset_refuses_leaks_and_other_classes():
    with pytest.raises(ValueError, match="a file must lie in one split, got data/0.png in train and test"):
        Dataset("leak", image_list([0, 1]), None, image_list([0, 1]))
    with pytest.raises(ValueError, match="test must have the class names of train, has 'class 2' in addition"):
        Dataset("other", image_list([0, 1]), None, image_list([0, 1, 2], prefix="test/"))


def test_leak_is_seen_through_another_root():
    train = ImageList(Path("data"), ("test/0.png", "1.png"), (0, 1), ("a", "b"))
    test = ImageList(Path("data/test"), ("1.png", "0.png"), (0, 1), ("a", "b"))
    with pytest.raises(ValueError, match="got .*data/test/0.png in train and test"):
        Dataset("leak", train, None, test)
    assert len(Dataset("none", train, None, replace(test, files=("1.png", "2.png"))).test) == 2


def test_dataset_may_have_a_test_split_only():
    data = Dataset("test only", full_test=image_list([0, 1, 2]))
    assert data.classnames == ("class 0", "class 1", "class 2")
    assert data.base_novel()[1].test.files == ("2.png",)
    for call in (lambda: data.train, lambda: data.few_shot(1), lambda: data.few_shot(None)):
        with pytest.raises(ValueError, match="dataset 'test only' has no train split"):
            call()
    no_train = Dataset("val only", None, image_list([0, 1]))
    with pytest.raises(ValueError, match="has no train split"):
        no_train.few_shot(1, split="val")


def test_long_lists_are_neither_copied_nor_printed():
    data = coop_dataset()
    assert data.train is data.full_train
    assert "0.png" not in repr(data)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_folder_with_splits(tmp_path):
    for n, split in enumerate(("train", "val", "test")):
        draw_classes(tmp_path / split, {"shopping_cart": 2, "apple": 1}, first=100 * n)
    draw_image(tmp_path / "train" / "apple" / "deep" / "er" / "x.JPG", 77)
    draw_image(tmp_path / "train" / "apple" / ".hidden.png", 78)
    draw_image(tmp_path / "train" / ".cache" / "y.png", 79)
    (tmp_path / "train" / "apple" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "apple" / "paper.pdf").write_text("Pillow writes PDF, but cannot read it")
    (tmp_path / "README").write_text("beside the splits")
    data = ImageFolder(tmp_path)
    assert data.name == tmp_path.name
    assert data.classnames == ("apple", "shopping cart")
    assert data.train.files == (
        "train/apple/00.png",
        "train/apple/deep/er/x.JPG",
        "train/shopping_cart/00.png",
        "train/shopping_cart/01.png",
    )
    assert data.train.labels == (0, 0, 1, 1)
    assert data.val.files[0] == "val/apple/00.png" and len(data.test) == 3
    assert ImageFolder(tmp_path, classnames={"apple": "a fruit"}).classnames == ("a fruit", "shopping cart")


def test_folder_without_splits_is_stratified(tmp_path):
    draw_classes(tmp_path, {"cat": 10, "dog": 20, "train": 7})
    data = ImageFolder(tmp_path)
    assert data.classnames == ("cat", "dog", "train"), "a class may be called train"
    assert data.train.counts == (5, 10, 3) and data.val.counts == (2, 4, 2) and data.test.counts == (3, 6, 2)
    assert sorted(data.train.files + data.val.files + data.test.files) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")
    )
    assert ImageFolder(tmp_path) == data, "the same seed splits alike"
    assert ImageFolder(tmp_path, seed=1).test != data.test
    draw_classes(tmp_path, {"bird": 9}, first=500)
    assert set(ImageFolder(tmp_path).test.files) > set(data.test.files), "a new class moves no other"
    no_val = ImageFolder(tmp_path, val=0, test=0.5)
    assert no_val.full_val is None and no_val.test.counts == (4, 5, 10, 4)


def test_split_keeps_equal_bytes_on_one_side(tmp_path):
    draw_classes(tmp_path, {"cat": 8, "dog": 8})
    for i in range(8):
        (tmp_path / "cat" / f"copy{i}.png").write_bytes((tmp_path / "cat" / f"{i:02d}.png").read_bytes())
    (tmp_path / "dog" / "stray.png").write_bytes((tmp_path / "cat" / "00.png").read_bytes())
    for seed in range(5):
        data = ImageFolder(tmp_path, seed=seed)
        sides = [{path.read_bytes() for path in images.paths} for images in (data.train, data.val, data.test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_links_are_followed_and_loops_end(tmp_path):
    root = draw_classes(tmp_path / "data", {"cat": 3, "dog": 3})
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "cat" / "up").symlink_to(root)
    draw_image(tmp_path / "elsewhere" / "z.png", 99)
    (root / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    data = ImageFolder(root)
    files = data.train.files + data.val.files + data.test.files
    assert sorted(files)[:3] == ["cat/00.png", "cat/01.png", "cat/02.png"]
    assert "dog/more/z.png" in files and len(files) == 7


def test_folder_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="root must be a folder, got .*nowhere"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one folder per class"):
        ImageFolder(tmp_path)
    root = draw_classes(tmp_path / "empty", {"cat": 3})
    (root / "dog").mkdir()
    (root / "eel").mkdir()
    with pytest.raises(ValueError, match="dog.*, .*eel.* must hold at least one image, got none: add .*, or remove"):
        ImageFolder(root)
    twice = draw_classes(tmp_path / "twice", {"a_cat": 3, "a cat": 3})
    with pytest.raises(ValueError, match="class names must differ, got 'a cat' for 'a cat' and 'a_cat'"):
        ImageFolder(twice)
    assert ImageFolder(twice, classnames={"a_cat": "another cat"}).classnames == ("a cat", "another cat")
    few = draw_classes(tmp_path / "few", {"cat": 3, "dog": 2})
    with pytest.raises(ValueError, match="class 'dog' in .* at least 3 different images .* got 2"):
        ImageFolder(few)
    for shares, message in (
        ({"val": 1.0}, r"val must lie in \[0, 1\), got 1.0"),
        ({"test": -0.1}, r"test must lie in \[0, 1\), got -0.1"),
        ({"val": 0.5, "test": 0.5}, r"val \+ test must be below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFolder(few, **shares)


def test_split_folders_refuse(tmp_path):
    draw_classes(tmp_path / "train", {"cat": 2, "dog": 2})
    assert ImageFolder(tmp_path).full_test is None
    draw_classes(tmp_path / "test", {"cat": 2, "fox": 2}, first=50)
    with pytest.raises(
        ValueError, match="test must have the classes of train in .*lacks 'dog' and has 'fox' in addition"
    ):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="val and test must be None for data that is already split"):
        ImageFolder(tmp_path, val=0.1)
    draw_classes(tmp_path / "night", {"cat": 2})
    with pytest.raises(
        ValueError, match="must hold only train, val and test, or only classes, got 'night' in addition"
    ):
        ImageFolder(tmp_path)


# -- tables -----------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_table_with_splits(tmp_path, kind):
    rows = []
    for i, (label, split) in enumerate([("tea_cup", "train"), ("dog", "train"), ("dog", "test"), ("tea_cup", "test")]):
        path = draw_image(tmp_path / "images" / f"{i}.png", i)
        rows.append({"path": str(path) if i == 0 else f"./images/{i}.png", "label": label, "split": split})
    table = tmp_path / f"list.{kind}"
    if kind == "csv":
        write_csv(table, rows)
    else:
        table.write_text(json.dumps(rows))
    data = image_table(table)
    assert data.name == "list" and data.classnames == ("dog", "tea cup")
    assert data.train.files == ("images/1.png", "images/0.png") and data.train.labels == (0, 1)
    assert data.test.files == ("images/2.png", "images/3.png") and data.full_val is None
    with pytest.raises(ValueError, match="already split"):
        image_table(table, test=0.5)


def test_table_without_splits_is_stratified(tmp_path):
    draw_classes(tmp_path / "images", {"cat": 10, "dog": 10})
    files = sorted(str(path.relative_to(tmp_path / "images")) for path in tmp_path.rglob("*.png"))
    table = write_csv(tmp_path / "list.csv", [{"path": file, "label": file[:3]} for file in files])
    assert image_table(table, root=tmp_path / "images").test == ImageFolder(tmp_path / "images").test


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "photo,kind\nx.png,cat\n", r"must have the header path,label\[,split\], got photo, kind"),
        ("a.csv", "path,label\n", "must list at least one image"),
        ("a.csv", "path,label\nx.png,\n", "row 1 of .* must have a path and a class name"),
        ("a.csv", "path,label\n0.png,cat\n./0.png,dog\n", "must not repeat, got '0.png' twice"),
        ("a.csv", "path,label\n/far/0.png,cat\n", "row 1 of .* must lie below root"),
        ("a.csv", "path,label\n../far/0.png,cat\n", "row 1 of .* must lie below root"),
        ("a.csv", "path,label\ncat/../../0.png,cat\n", "row 1 of .* must lie below root"),
        ("a.json", '[{"path": "../0.png", "label": "cat"}]', "row 1 of .* must lie below root"),
        ("a.csv", "path,label,split\n0.png,cat,night\n", "row 1 of .* a split .train, val or test. .* got 'night'"),
        ("a.csv", "path,label\n0,1.png,cat\n", "row 1 of .* must have 2 values .* got 3: .* in quotes"),
        ("a.csv", "path,label,split\n0.png,cat,test\n", "must have training images, got only test"),
        ("a.json", "{", "must be JSON"),
        ("a.json", '{"path": "0.png"}', "must be a list of objects"),
        ("a.json", '[{"path": "0.png", "label": true}]', "class name as label, got path='0.png', label=True"),
        ("a.json", "[" * 100_000, "must be JSON"),
        ("a.csv", "path,label\n0.png," + "x" * 200_000, "must be CSV in UTF-8: field larger"),
        ("a.txt", "", "must end in .csv, .tsv, .json or .jsonl"),
    ],
)
def test_table_refuses(tmp_path, name, content, message):
    draw_image(tmp_path / "0.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        image_table(tmp_path / name)


def test_table_names_missing_files(tmp_path):
    draw_image(tmp_path / "0.png")
    table = write_csv(tmp_path / "a.csv", [{"path": f"{i}.png", "label": "cat"} for i in range(4)])
    with pytest.raises(FileNotFoundError, match="3 of 4 images listed in .*a.csv are missing, the first is .*1.png"):
        image_table(table)


def test_table_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("path,label\n0.png,\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="a.csv must be text in UTF-8, got other bytes in line 2, probably Latin-1"):
        image_table(tmp_path / "a.csv")


def test_missing_images_in_folders_that_are_no_folders(tmp_path):
    draw_image(tmp_path / "0.png")
    (tmp_path / "1.png").mkdir()
    files = ["0.png", "0.png/1.png", "gone/2.png", "1.png", "x" * 300 + "/3.png", "nul\0/4.png", "\ud800/5.png"]
    (tmp_path / "a.json").write_text(json.dumps([{"path": file, "label": "cat"} for file in files]))
    with pytest.raises(FileNotFoundError, match="6 of 7 images listed in .* missing, the first is .*0.png/1.png"):
        image_table(tmp_path / "a.json")


# -- CoOp's splits ----------------------------------------------------------------------------------------------------


def test_coop_split(tmp_path):
    images = draw_classes(tmp_path / "101_Objects", {"cup": 6, "gerenuk": 6})
    split = {"train": [], "val": [], "test": []}
    for i in range(6):
        for label, name in ((1, "cup"), (0, "gerenuk")):
            split[("train", "val", "test")[i % 3]].append([f"{name}/{i:02d}.png", label, f"big_{name}"])
    (tmp_path / "split_zhou_Toy.json").write_text(json.dumps(split))
    data = coop_split(tmp_path, "split_zhou_Toy.json", "101_Objects")
    assert data.name == "Toy" and data.classnames == ("big gerenuk", "big cup")
    assert data.train.root == images
    assert data.train.files == ("cup/00.png", "gerenuk/00.png", "cup/03.png", "gerenuk/03.png"), "the file's order"
    random.seed(3)
    expected = coop_draw([(data.train, 1), (data.val, 1)])
    assert [list(data.few_shot(1, 3, split).files) for split in ("train", "val")] == expected


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ([], "must be an object with a list under 'train'"),
        ({"test": [["0.png", 0, "cat"]]}, "must be an object with a list under 'train'"),
        ({"train": [["0.png", 0]]}, r"item 1 of 'train' in .* must be \[path, label, class name\]"),
        ({"train": [["0.png", "x", "cat"]]}, "item 1 of 'train'"),
        ({"train": [["0.png", 1, "cat"]]}, r"labels in .* must be 0 to 0 without a gap, got 1"),
        ({"train": [["0.png", 0, "cat"]], "test": [["1.png", 0, "dog"]]}, "label 0 .* one name, got 'cat' and 'dog'"),
        ({"train": [["0.png", 0, "cat"]], "test": [["1.png", 1, "dog"]]}, "at least one image, got none for 'dog'"),
        ({"train": [["0.png", 0, "cat"]], "test": [["0.png", 0, "cat"]]}, "must lie in one split"),
    ],
)
def test_coop_split_refuses(tmp_path, split, message):
    for i in range(2):
        draw_image(tmp_path / f"{i}.png", i)
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match=message):
        coop_split(tmp_path, "split.json")


def test_coop_split_names_missing_files(tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": [["gone.png", 0, "cat"]]}))
    with pytest.raises(
        FileNotFoundError, match=r"1 of 1 images listed in .*split.json are missing, the first is .*gone.png"
    ):
        coop_split(tmp_path, "split.json")


# -- images -----------------------------------------------------------------------------------------------------------


def test_load_image_gives_rgb_and_leaves_exif_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("L", (6, 4), 9).save(tmp_path / "a.jpg", exif=exif)
    image = load_image(tmp_path / "a.jpg")
    assert image.mode == "RGB" and image.size == (6, 4)


def test_load_image_names_what_it_cannot_read(tmp_path):
    whole = draw_image(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    for name, content in (("cut.png", whole[: len(whole) // 2]), ("empty.png", b""), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read image .*{re.escape(name)}"):
            load_image(tmp_path / name)
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match="cannot read image .*a.HEIC: its content must be .*pip install pillow-heif"):
        load_image(tmp_path / "a.HEIC")
    with pytest.raises(ValueError, match="cannot read image .*gone.png"):
        load_image(tmp_path / "gone.png")


def test_prettify():
    assert prettify("shopping_cart") == "shopping cart"
    assert prettify("_tea__cup ") == "tea cup"
