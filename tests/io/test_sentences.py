"""What other libraries and files say becomes one sentence: one line of bounded length that names the file."""

import errno
import io
import json
import pickle
import re
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import NAMES, WEIGHT, Hostile
from safetensors import SafetensorError
from safetensors.torch import save, save_file

import mergetune as mt
from mergetune import merging
from mergetune.io import convert_module, load_image, load_torch, reason, visible, write_json, writing_atomically
from mergetune.solutions import read_head, read_prompt

STEERING = "a\x1b[2J\u202e\nb"
ESCAPED = r"a\x1b[2J\u202e\nb"
ADVICE = re.compile(r"weights_only|Traceback|site-packages|MemoryError|miniz|0x[0-9a-f]{6}|\bError\b")


def sentence(error: Exception, file: Path) -> str:
    """The message, after a check that it is one of ours."""
    said = str(error)
    assert isinstance(error, ValueError | FileNotFoundError) and said.isprintable(), said
    assert file.name.replace(STEERING, ESCAPED) in said and len(said) < 900 and not ADVICE.search(said), said
    return said


# -- the clause --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (EOFError(), "it ends too early"),
        (MemoryError(), "it needs more memory than there is"),
        (RecursionError("maximum recursion depth"), "it is nested too deeply"),
        (KeyError("a"), "it is not what such files are (KeyError)"),
        (ValueError(), "it is not what such files are (ValueError)"),
        (OSError(errno.EIO, "Input/output error", "name"), "Input/output error"),
        (
            pickle.UnpicklingError("Weights only load failed. Set `weights_only=False`.\nMore."),
            "Weights only load failed",
        ),
        (RuntimeError("use weights_only=False, it helps"), "it holds more than tensors"),
        (SafetensorError("header \x1b[2J\x00"), r"header \x1b[2J\x00"),
        (
            RuntimeError("Error(s) in loading state_dict for CLIP:\n\tsize mismatch for w: (3)."),
            "size mismatch for w: (3)",
        ),
        (zipfile.BadZipFile("one\n" * 999), "one"),
    ],
)
def test_a_foreign_error_becomes_a_clause(error, said):
    assert reason(error) == said


@pytest.mark.parametrize("text", ["x" * 10**6, "\x00" * 10**6, "\x1b" * 500, STEERING, "\ud800" * 9, "kept"])
def test_any_text_becomes_one_line_of_bounded_length(text):
    shown = visible(text, longest=400)
    assert shown.isprintable() and len(shown) < 460
    assert text != "kept" or shown == text


# -- readers -----------------------------------------------------------------------------------------------------------


def deflated(file: Path) -> None:
    stream = io.BytesIO()
    torch.save({"weight": WEIGHT}, stream)
    with zipfile.ZipFile(stream) as packed, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in packed.namelist():
            archive.writestr(name, packed.read(name))


FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "a web page": lambda file: file.write_bytes(b"<!DOCTYPE html>\n<title>Quota exceeded</title>"),
    "zeros": lambda file: file.write_bytes(b"\0" * 3000),
    "half a zip file": lambda file: file.write_bytes(b"PK\3\4" + b"\x1b" * 300),
    "code": lambda file: torch.save({"weight": Hostile(print, STEERING)}, file),
    "pickled code": lambda file: file.write_bytes(pickle.dumps(Hostile(eval, "1"))),
    "a name of any length": lambda file: torch.save({"x\n\x1b" * 9000: torch.ones(2)}, file),
    "compressed": deflated,
    "a header of another kind": lambda file: file.write_bytes(
        b"\x20\0\0\0\0\0\0\0" + b'{"w":{"dtype":"\x1b","x":1}}' + b" " * 9
    ),
    "an array of objects": lambda file: np.save(file.open("wb"), np.array([{}], dtype=object), allow_pickle=True),
    "recursive": lambda file: file.write_bytes(b"\x80\x02" + b"]" * 9000 + b"a" * 8999 + b"."),
}
READERS: dict[str, Callable[[Path], object]] = {
    ".pt": lambda file: mt.open_solution(file, classnames=NAMES),
    ".pth": load_torch,
    ".tar": read_prompt,
    ".safetensors": read_head,
    ".npz": read_head,
    ".npy": lambda file: mt.read_features(file, labels=[0], classnames=["a"]),
    ".bin": lambda file: dict(merging.open_weights(file)),
    ".pkl": lambda file: convert_module(file, file.with_name("out.safetensors")),
    ".png": load_image,
    ".csv": mt.image_table,
    ".json": lambda file: mt.coop_split(file.parent, file),
}


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_of_another_kind_is_refused_in_one_sentence(tmp_path, suffix):
    refused = 0
    for number, write in enumerate(FILES.values()):
        file = tmp_path / f"{number}{STEERING}{suffix}"
        write(file)
        try:
            READERS[suffix](file)
        except Exception as error:
            sentence(error, file)
            refused += 1
    assert refused >= 8, "few of the contents are right for a reader"


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json"])
def test_names_in_lists_are_shown_and_not_sent(tmp_path, suffix):
    names = {".csv": f'path,label\n"{STEERING}",x\n', ".json": json.dumps([{"path": STEERING, "label": "x"}])}
    file = tmp_path / f"list{suffix}"
    file.write_text(names.get(suffix, STEERING))
    if suffix == ".txt":
        file.write_bytes(b"\xff\xfe" + STEERING.encode("utf-16-le"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        mt.read_features(tmp_path / "x.npy", labels=file) if suffix == ".txt" else mt.image_table(file)
    if suffix != ".txt":
        assert r"\x1b[2J" in sentence(caught.value, file)


# -- a full disk -------------------------------------------------------------------------------------------------------

HEAD = mt.Head(torch.ones(3, 4000), NAMES)
WRITERS: dict[str, Callable[[Path], object]] = {
    "solution": lambda file: HEAD.save(file),
    "head.safetensors": lambda file: mt.to_head(HEAD, file),
    "head.npz": lambda file: mt.to_head(HEAD, file),
    "head.pt": lambda file: mt.to_head(HEAD, file),
    "document.json": lambda file: write_json(file, ["x" * 40_000]),
    "merged.safetensors": lambda file: merging.merge_files(merging.average, None, [file.with_name("w")] * 2, file),
    "stream": lambda file: _pieces(file),
}


def _pieces(file: Path) -> None:
    with writing_atomically(file) as stream:
        for _ in range(50):
            stream.write(b"x" * 1000)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, name):
    (tmp_path / "w").write_bytes(save({"w": torch.ones(9000)}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the system then refuses as a full disk does
    try:
        with pytest.raises(OSError) as caught:
            WRITERS[name](tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename is not None and name in caught.value.filename
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "w"]


def test_the_metadata_of_a_head_may_be_anything(tmp_path):
    file = tmp_path / "h.safetensors"
    for text in ("[" * 100_000, "{}", "1e999", "nan", '"\x1b"', "[1" * 900):
        for key in ("scale", "classnames", "logit_scale", "normalize"):
            save_file({"weight": WEIGHT}, file, {key: text})
            try:
                mt.open_solution(file, classnames=NAMES)
            except Exception as error:
                sentence(error, file)
