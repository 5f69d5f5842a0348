"""Damaged files of the benchmark datasets: one clear error, or the right data."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from coop_cases import coop_run
from miniature import write_few_shot

from mergetune.data import CoOpDataset, image_table

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
