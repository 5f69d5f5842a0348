"""CoOp's stored draws of few-shot images."""

import os
import pickle
import random
import sys
from pathlib import Path

import pytest
from coop_cases import coop_run, items_of, spoken
from miniature import write_few_shot

from mergetune.data import CoOpDataset


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
        ({"val": good["val"]}, "must be a few-shot file of CoOp with images under 'train': .*KeyError"),
        ({"train": []}, "must be a few-shot file of CoOp"),
        ({"train": good["test"]}, "must list images of 'dtd', got '.*jpg', which is not in train"),
        ({"train": [(p, (y + 1) % 5, n) for p, y, n in good["train"]]}, "must have the labels of 'dtd', got 1 for"),
        ({"train": [*good["train"], good["train"][0]]}, r"images in .*pkl must not repeat, got '.*jpg' twice"),
        ({"train": good["train"][1:]}, "at least one image, got none for 'banded'"),
        ({"train": [(p, str(y), n) for p, y, n in good["train"]]}, "must have a path and a label"),
        ({"train": [(p, None, n) for p, _, n in good["train"]]}, "the opcode NONE, which such files do not need"),
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
