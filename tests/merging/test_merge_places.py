"""Where `mergetune merge` writes: not in place of an input, and not over another model."""

import json
import os
import socket

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mergetune.cli import app
from mergetune.io import LOCK


def folder_of(path, **settings):
    path.mkdir()
    save_file({"w": torch.ones(3)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings))
    return path


def merge(out, *inputs):
    return CliRunner().invoke(app, ["merge", "average", *map(str, inputs), "--out", str(out)])


@pytest.fixture
def inputs(tmp_path):
    return [folder_of(tmp_path / name, hidden=3) for name in ("a", "b")]


@pytest.mark.parametrize("there", [("config.json",), ("model.safetensors",), ("config.json", "model.safetensors")])
def test_another_model_in_out_is_kept(inputs, tmp_path, there):
    out = folder_of(tmp_path / "theirs", hidden=4)
    for name in {"config.json", "model.safetensors"} - set(there):
        (out / name).unlink()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    refused = merge(out, *inputs)
    assert refused.exit_code == 2 and "of another model: choose another folder" in " ".join(refused.stderr.split())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_earlier_result_is_replaced(inputs, tmp_path):
    for _ in range(2):
        assert merge(tmp_path / "out", *inputs).exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("moment", ["before the settings", "before the weights", "at the end"])
def test_a_merge_that_was_killed_can_be_run_again(inputs, tmp_path, monkeypatch, moment):
    """The settings come first: weights without settings would be those of another model."""

    def die(part, file):
        if file.name == {"before the settings": "config.json", "before the weights": "model.safetensors"}.get(moment):
            raise KeyboardInterrupt
        return replace(part, file)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        stopped = merge(tmp_path / "out", *inputs)
        assert (stopped.exit_code == 0) == (moment == "at the end")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / ".model.safetensors.99999999-0123abcd.part").write_bytes(b"half")
    (tmp_path / "out" / LOCK).write_text(f"99999999 {socket.gethostname()}\n")
    assert merge(tmp_path / "out", *inputs).exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["a", "a/model.safetensors", "b", "b/../b"])
def test_an_input_is_not_replaced(inputs, tmp_path, name):
    before = (tmp_path / name).stat()
    for given in (inputs, [folder / "model.safetensors" for folder in inputs]):
        refused = merge(tmp_path / name, *given)
        assert refused.exit_code == 2 and "--out must" in refused.stderr, refused.output
    assert (tmp_path / name).stat().st_mtime_ns == before.st_mtime_ns
