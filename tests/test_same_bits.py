"""tests/slow/same_bits.py: what counts as a difference of two files, and what may differ."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

SCRIPT = Path(__file__).parent / "slow" / "same_bits.py"


@pytest.fixture(scope="module")
def bits():
    spec = importlib.util.spec_from_file_location("same_bits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def compared(bits, tmp_path):
    """Writes two files of a name, and gives what differs between their folders."""

    def compare(name, write, old, new):
        for side, content in (("old", old), ("new", new)):
            (tmp_path / side).mkdir(exist_ok=True)
            write(tmp_path / side / name, content)
        return list(bits.differences(tmp_path / "old", tmp_path / "new"))

    return compare


def as_json(file, content):
    file.write_text(json.dumps(content))


def test_json_differs_in_everything_but_times(compared):
    old = {"timings": {"seconds": 1.0, "steps": 3}, "history": [{"loss": 0.5}, {"loss": float("nan")}]}
    assert not compared("a.json", as_json, old, old | {"timings": {"seconds": 2.0, "steps": 3}})
    (found,) = compared("a.json", as_json, old, old | {"timings": {"seconds": 1.0, "steps": 4}})
    assert found == "a.json: timings/steps: 3 and 4, 1 apart"
    (found,) = compared("a.json", as_json, old, old | {"history": [{"loss": 0.75}, {"loss": float("nan")}]})
    assert found == "a.json: history/0/loss: 0.5 and 0.75, 0.25 apart"
    (found,) = compared("a.json", as_json, {"seconds": 1}, {"seconds": 2})  # not a place where training is timed
    assert "seconds: 1 and 2" in found
    (found,) = compared("a.json", as_json, {"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert "another order of keys" in found
    (found,) = compared("a.json", lambda file, text: file.write_text(text), '{"a": 1}', '{"a":1}')
    assert "another layout" in found


@pytest.mark.parametrize(("name", "write"), [
    ("a.safetensors", lambda file, tensors: save_file(tensors, file)),
    ("a.pt", lambda file, tensors: torch.save(tensors, file)),
    ("model.pth.tar-50", lambda file, tensors: torch.save({"state_dict": tensors, "epoch": 50}, file)),
    ("a.npz", lambda file, tensors: np.savez(file, **{name: t.numpy() for name, t in tensors.items()})),
])  # fmt: skip
def test_tensors_differ_by_the_last_bit(compared, name, write):
    old = {"x": torch.tensor([1.0, float("nan")]), "y": torch.tensor([1.0, 2.0])}
    assert not compared(name, write, old, {key: tensor.clone() for key, tensor in old.items()})
    nearly = old | {"y": torch.tensor([1.0, 2.0 + 2**-22])}
    (found,) = compared(name, write, old, nearly)
    assert "y (and 0 more): largest absolute difference 2.38e-07" in found
    (found,) = compared(name, write, old, old | {"y": torch.tensor([1, 2])})
    assert "torch.float32 [2] and torch.int64 [2]" in found
    (found,) = compared(name, write, old, old | {"z": torch.ones(1)})
    assert "on one side" in found


def test_the_order_of_metadata_is_safetensors_own(compared):
    def write(file, metadata):
        header = json.dumps({"__metadata__": metadata, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))

    assert not compared("a.safetensors", write, {"kind": "head", "scale": "1"}, {"scale": "1", "kind": "head"})
    (found,) = compared("a.safetensors", write, {"kind": "head", "scale": "1"}, {"scale": "2", "kind": "head"})
    assert "scale" in found


def test_tables_differ_in_everything_but_their_seconds(compared):
    def table(accuracy, seconds):
        return f"|  | HM | s | chosen |\n| --- | --- | --- | --- |\n| zero-shot | {accuracy} | {seconds} | |\n"

    def write(file, text):
        file.write_text(text)

    assert not compared("a.md", write, table(67.0, 0.1), table(67.0, 0.2))
    assert compared("a.md", write, table(67.0, 0.1), table(67.1, 0.1)) == ["a.md: line 3 differs"]


def test_other_files_and_missing_ones_differ(compared, tmp_path):
    (found,) = compared("a.png", lambda file, content: file.write_bytes(content), b"abc", b"abd")
    assert found == "a.png: 3 and 3 bytes, the first difference at byte 2"
    (tmp_path / "old" / "more.txt").write_text("")
    assert "more.txt: only OLD has it" in compared("a.png", lambda file, content: file.write_bytes(content), b"", b"")
