"""Lists of images from other programs: encodings, separators, columns, and spellings of paths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mergetune.data import ImageFolder, find_pictures, image_table, listed_images
from mergetune.data.class_names import read_names
from mergetune.data.feature_files import read_features
from mergetune.io import read_json

FILES = [f"images/{animal}/{i}.png" for animal in ("cat", "dog") for i in range(4)]


def label(file: str) -> str:
    return file.split("/")[1]


def draw(root: Path) -> Path:
    for file in FILES:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
    return root


def lines(separator: str, *, header: str = "path label", quote: str = "", end: str = "\n", slash: str = "/") -> str:
    rows = [header.split()] if header else []
    rows += [[file.replace("/", slash), label(file)] for file in FILES]
    return end.join(separator.join(f"{quote}{cell}{quote}" for cell in row) for row in rows) + end


def records(**more: str) -> list[dict]:
    return [{"path": file, "label": label(file), **more} for file in FILES]


CAFE = "path,label\n" + "".join(f"{file},caf\xe9 {label(file)}\n" for file in FILES)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", lines(",")),
        ("a.csv", lines(";", end="\r\n")),
        ("a.csv", "\ufeff" + lines(";", quote='"', end="\r\n")),
        ("a.csv", "sep=;\r\n" + lines(";")),
        ("a.tsv", lines("\t")),
        ("a.csv", lines(",", header="")),
        ("a.csv", lines("\t", header="", quote='"')),
        ("a.csv", lines(", ")),
        ("a.csv", lines(",", slash="\\")),
        ("a.csv", lines(",", header="file_name class")),
        ("a.csv", lines(",", header="Image Category")),
        ("a.json", json.dumps(records())),
        ("a.json", "\ufeff" + json.dumps(records(split="Training"))),
        ("a.jsonl", "\n".join(json.dumps({"file_name": row["path"], "label": row["label"]}) for row in records())),
        ("a.json", json.dumps({"train": [[f.replace("/", "\\"), int(label(f) == "dog"), label(f)] for f in FILES]})),
    ],
)  # fmt: skip
def test_lists_of_other_programs_are_read(tmp_path, name, content):
    draw(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    data = listed_images(tmp_path / name)
    assert data.classnames == ("cat", "dog")
    found = [images for images in (data.full_train, data.full_val, data.full_test) if images is not None]
    listed = {str(path.relative_to(tmp_path)): images.classnames[label] for images in found
              for path, label in zip(images.paths, images.labels, strict=True)}  # fmt: skip
    assert listed == {file: label(file) for file in FILES}


def test_columns_of_kaggle_and_their_spelling_of_splits(tmp_path):
    draw(tmp_path)
    rows = [f"{i},{file},{label(file)},{('train', 'train', 'valid', 'TEST')[i % 4]},x" for i, file in enumerate(FILES)]
    (tmp_path / "a.csv").write_text("\n".join(["class id,filepaths,labels,data set,scientific name", *rows]))
    data = image_table(tmp_path / "a.csv")
    assert (len(data.train), len(data.val), len(data.test)) == (4, 2, 2) and data.classnames == ("cat", "dog")


READERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "table": (".csv", image_table, CAFE),
    "JSON": (".json", listed_images, json.dumps(records(), ensure_ascii=False).replace("cat", "ca\xe9")),
    "JSON lines": (".jsonl", image_table, CAFE),
    "settings": (".json", read_json, '{"caf\xe9": 1}'),
    "class names": (".txt", read_names, "caf\xe9\ndog\n"),
    "names of folders": (".txt", lambda file: ImageFolder(file.parent / "images", classnames=file), "caf\xe9\ndog\n"),
    "labels": (".txt", lambda file: read_features(file.parent / "x.npy", labels=file), "caf\xe9\ndog\n"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "UTF-16, .*iconv -f UTF-16 "),
        ("utf-16-le", "UTF-16, .*iconv -f UTF-16LE "),
        ("utf-32", "UTF-32, .*iconv -f UTF-32 "),
        ("latin-1", "other bytes in line .*, probably Latin-1 .*iconv -f WINDOWS-1252 "),
    ],
)
def test_other_encodings_are_named_with_the_way_on(tmp_path, reader, encoding, message):
    import numpy as np

    draw(tmp_path)
    np.save(tmp_path / "x.npy", np.eye(2, dtype=np.float32))
    suffix, read, text = READERS[reader]
    file = tmp_path / f"list{suffix}"
    file.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=f"list{suffix} must be text in UTF-8, got {message}-t UTF-8"):
        read(file)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json"])
def test_lists_of_pictures_obey_the_same_rules(tmp_path, suffix):
    draw(tmp_path)
    paths = [file.replace("/", "\\") for file in FILES]
    forms = {
        ".txt": ["\r\n".join(paths), "\r".join(paths)],
        ".csv": ["\n".join([header, *paths]) for header in ("path", "File_Name", "")]
        + [lines(";", header="image class")],
        ".json": [json.dumps(paths), json.dumps([{"image": path} for path in paths])],
    }
    file = tmp_path / f"a{suffix}"
    for text in forms[suffix]:
        file.write_text("\ufeff" + text, encoding="utf-8", newline="")
        assert [found.file for found in find_pictures([file])] == [str(tmp_path / name) for name in FILES]
    file.write_text(forms[suffix][0], encoding="utf-16")
    with pytest.raises(ValueError, match=f"a{suffix} must be text in UTF-8, got UTF-16"):
        list(find_pictures([file]))


def test_a_name_with_a_backslash_is_taken_as_it_is(tmp_path):
    draw(tmp_path)
    (tmp_path / "images\\cat\\0.png").write_text("odd")
    (tmp_path / "a.csv").write_text(lines(",", slash="\\"))
    data = image_table(tmp_path / "a.csv", val=0)
    files = {*data.train.files, *data.test.files}
    assert "images\\cat\\0.png" in files and "images/cat/1.png" in files and len(files) == len(FILES)


@pytest.mark.parametrize("root", ["real/images", "link", "real/../link", "other/../real/images"])
@pytest.mark.parametrize("way", ["real/images", "link", "real/../real/images", "other/../link"])
def test_absolute_paths_below_a_root_with_links_and_dots(tmp_path, root, way):
    draw(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "images")
    (tmp_path / "other").mkdir()
    rows = [f"{tmp_path}/{way}/{file.removeprefix('images/')},{label(file)}" for file in FILES]
    (tmp_path / "a.csv").write_text("\n".join(["path,label", *rows]))
    data = image_table(tmp_path / "a.csv", root=tmp_path / root)
    assert data.classnames == ("cat", "dog") and all(path.is_file() for path in data.train.paths)


@pytest.mark.parametrize(
    "path", ["/far/0.png", "../far/0.png", "C:\\far\\0.png", "\\\\server\\far\\0.png", "..\\0.png"]
)
def test_paths_elsewhere_are_refused_with_the_way_on(tmp_path, path):
    draw(tmp_path)
    (tmp_path / "a.csv").write_text(f"path,label\n{path},cat\n")
    with pytest.raises(ValueError, match="row 1 of .* must lie below root = .*write paths relative to root.*--root"):
        image_table(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "Datei,Klasse\n0.png,cat\n"),
        ("a.csv", "Datei;Klasse;Split\n0.png;cat;train\n"),
        ("a.json", '[{"Datei": "0.png", "Klasse": "cat"}]'),
        ("a.jsonl", '{"Datei": "0.png", "label": "cat"}'),
    ],
)
def test_unknown_columns_are_answered_with_the_accepted_names(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as refused:
        image_table(tmp_path / name)
    said = str(refused.value)
    assert "got Datei, " in said and "path may be path, filepath, " in said and "label may be classname, " in said
    if ";" in content:
        assert "got Datei, Klasse, Split: " in said
