"""What the rooms above build on: documents, dtypes, places in files, locks, versions and the unpickler."""

import collections
import errno
import hashlib
import io
import os
import pickle
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save

from mergetune.io import (
    FLOAT_DTYPES,
    STORED_DTYPES,
    STORED_NAMES,
    Count,
    Document,
    Inert,
    Items,
    Number,
    Unpickler,
    compact_json,
    dtype_name,
    installed_version,
    jsonable,
    locked,
    read_at,
    read_document,
    read_json,
    read_npz,
    read_regular,
    read_text,
    release_locks,
    sha256_regular,
    torchrun_team,
    write_json,
)

# -- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [1, 2])
def test_a_document_comes_back_as_jsonable_says(tmp_path, indent):
    value = {"a": (1, 2.5, None), 3: "ü", "deep": [{"b": True}]}
    write_json(tmp_path / "a.json", value, indent=indent)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == jsonable(value) and text.endswith("}\n")
    assert f'\n{" " * indent}"a"' in text and [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_value_that_json_cannot_hold_leaves_the_old_document(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", [object()])
    assert read_json(tmp_path / "a.json") == [1]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000])
def test_a_damaged_document_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json must be JSON, got "):
        read_json(tmp_path / "a.json")


class Point(Document, frozen=True):
    """A document of this test."""

    version: Literal[3]
    name: str
    at: Items[Number]
    more: dict[str, Count] = {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"at": [1, "2"]}, r"is damaged: at\[1\] must be a number, got '2'; draw it again"),
        ({"at": [float("nan")]}, r"is damaged: at\[0\] must be a finite number, got nan; draw it again"),
        ({"at": ["x"] * 10**6}, r"is damaged: at\[0\] must be a number, got 'x'; draw it again"),
        ({"name": None}, "is damaged: name must be a text, got null; draw it again"),
        ({"more": {"a b": -1}}, r"is damaged: more\['a b'\] must be at least 0, got -1; draw it again"),
        ({"more": {"a": True}}, "is damaged: more.a must be a whole number, got true; draw it again"),
        ({"more": {"a": 1 << 70}}, "is damaged: more.a must be at most 9007199254740992, got 118059162071741130.*"),
        ({"name": [1, 2], "version": 2}, "must have version 3, got 2; draw it again"),
        ({"name": [1, 2], "version": 10}, "must have version 3, got 10; update mergetune"),
        ({"version": True}, "must have version 3, got true; draw it again"),
        ({"extra": {}}, "is damaged: extra must not be there, got an object of 0; draw it again"),
    ],
)
def test_a_document_that_differs_from_its_model_is_refused_in_one_sentence(tmp_path, change, said):
    write_json(tmp_path / "a.json", {"version": 3, "name": "p", "at": [1, 2.5]} | change)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a\.json {said}$") as raised:
        read_document(tmp_path / "a.json", Point, way_on="draw it again")
    assert raised.value.__cause__ is None


def test_a_document_is_read_as_its_model(tmp_path):
    write_json(tmp_path / "a.json", {"version": 3, "name": "\udc80", "at": [1, 2.5]})
    point = read_document(tmp_path / "a.json", Point, way_on="draw it again")
    assert point == Point(version=3, name="\udc80", at=(1, 2.5)) and type(point.at[0]) is int
    with pytest.raises(ValueError, match=r"a\.json must have at most 10 bytes, got \d+; draw it again"):
        read_document(tmp_path / "a.json", Point, way_on="draw it again", limit=10)
    with pytest.raises(ValueError, match="must be a regular file, got a folder; draw it again"):
        read_document(tmp_path, Point, way_on="draw it again")


def test_a_byte_order_mark_and_a_missing_document(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(str(tmp_path / "a.json")) == [1]
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


def test_a_file_is_read_whole_within_its_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", limit=5) == b"12345" and read_text(tmp_path / "a", limit=5) == "12345"
    assert read_json(tmp_path / "a", limit=5) == 12345
    for reader in (read_regular, read_text, read_json, sha256_regular):
        with pytest.raises(ValueError, match="a must have at most 4 bytes, got 5"):
            reader(tmp_path / "a", limit=4)
    assert sha256_regular(tmp_path / "a") == hashlib.sha256(b"12345").hexdigest()


def test_a_file_that_grows_is_refused(tmp_path, monkeypatch):
    """The limit holds for what is read, and not for what the file said before."""
    (tmp_path / "a").write_bytes(b"12345")
    stat = os.fstat

    def growing(descriptor):
        found = stat(descriptor)
        with (tmp_path / "a").open("ab") as file:
            file.write(b"6" * 100)
        return found

    monkeypatch.setattr(os, "fstat", growing)
    with pytest.raises(ValueError, match="a must not change while it is read"):
        read_regular(tmp_path / "a")


def test_packed_arrays_are_not_larger_than_the_file_by_far(tmp_path):
    """A .npz file may be packed, and zeros shrink a thousand times."""
    np.savez_compressed(tmp_path / "bomb.npz", **{f"a{i}": np.zeros(1 << 23, np.uint8) for i in range(9)})
    with pytest.raises(ValueError, match=r"bomb\.npz cannot be read as \.npz: .*its arrays have 75,4"):
        read_npz(tmp_path / "bomb.npz")
    numbers = np.random.default_rng(0).normal(size=(1000, 512)).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", weight=numbers, empty=np.zeros(1 << 23, np.uint8))
    assert np.array_equal(read_npz(tmp_path / "a.npz")["weight"], numbers)


def test_compact_json_has_no_spaces():
    assert compact_json({"a": [1, 2]}) == b'{"a":[1,2]}'


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_the_names_of_dtypes_are_those_of_torch_and_safetensors():
    for name, dtype in STORED_DTYPES.items():
        assert f'"dtype":"{name}"'.encode() in save({"t": torch.zeros(2, dtype=dtype)})
        assert getattr(torch, dtype_name(dtype)) is dtype and STORED_NAMES[dtype_name(dtype)] == name
    assert all(getattr(torch, name) is dtype and name in STORED_NAMES for name, dtype in FLOAT_DTYPES.items())


# -- places in files ---------------------------------------------------------------------------------------------------


def test_a_place_of_a_file_is_read_whole_or_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with (tmp_path / "file").open("rb") as file:
        buffer = bytearray(40)
        read_at(file.fileno(), memoryview(buffer), 60)
        assert buffer == bytes(range(60, 100)) and file.tell() == 0
        read_at(file.fileno(), memoryview(b""), 1000)
        for offset in (61, 100, 5000):
            with pytest.raises(EOFError, match="too early"):
                read_at(file.fileno(), memoryview(buffer), offset)


def test_what_the_system_gives_in_pieces_is_put_together(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    given = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: given(fd, [buffers[0][:7]], offset))
    with (tmp_path / "file").open("rb") as file:
        buffer = bytearray(40)
        read_at(file.fileno(), memoryview(buffer), 3)
    assert buffer == bytes(range(3, 43))


# -- locks -------------------------------------------------------------------------------------------------------------

TRY = """
import sys
from pathlib import Path
from mergetune.io import locked
try:
    with locked(Path(sys.argv[1]), busy="somebody works here"):
        print("held")
except RuntimeError as error:
    print(error)
"""


def other_process(file) -> str:
    done = subprocess.run([sys.executable, "-c", TRY, str(file)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    with locked(tmp_path / ".lock", busy="not this one"):
        assert other_process(tmp_path / ".lock") == "somebody works here"
        assert other_process(tmp_path / "another") == "held"
    assert other_process(tmp_path / ".lock") == "held"


def test_a_process_that_lets_go_of_its_locks_can_leave_them(tmp_path):
    with locked(tmp_path / ".lock", busy="not this one"):
        release_locks()
        assert other_process(tmp_path / ".lock") == "held"


def test_a_file_system_without_locks_is_said_and_does_not_stop_the_work(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.warns(UserWarning, match=r"is on a file system without locks .*No locks available.*two processes"),
        locked(tmp_path / ".lock", busy="not this one"),
    ):
        (tmp_path / "done").touch()
    assert (tmp_path / "done").exists()


# -- versions ----------------------------------------------------------------------------------------------------------


def test_versions_of_packages_that_are_there_and_that_are_not():
    assert installed_version("safetensors") == safetensors.__version__
    assert installed_version("no-such-package") == "unknown"
    assert installed_version("no-such-package", otherwise="none") == "none"


# -- the unpickler -----------------------------------------------------------------------------------------------------


class Record:
    def __init__(self) -> None:
        self.name, self.parts = "a", [1, {"b": 2}]


def read(value, known=None, **options):
    return Unpickler(io.BytesIO(pickle.dumps(value)), known or {}, **options).load()


def test_the_unpickler_makes_stand_ins_of_what_it_does_not_know():
    found = read({"plain": [1, "x", 2.5, None], "other": Record(), "called": collections.Counter("aab")})
    assert found["plain"] == [1, "x", 2.5, None] and type(found["other"]) is Inert
    assert found["other"].state == {"name": "a", "parts": [1, {"b": 2}]} and Inert.state is None
    assert isinstance(found["called"], Inert)


def test_the_unpickler_makes_what_it_is_told_or_refuses():
    class Datum(Inert):
        """Of this test alone."""

    known = {(Record.__module__, "Record"): Datum}
    assert type(read([Record()], known, others=None)[0]) is Datum
    with pytest.raises(pickle.UnpicklingError, match=r"it holds collections\.Counter, and pickled code is never run"):
        read(collections.Counter("a"), known, others=None)


@pytest.mark.parametrize("variables", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "x"}])
def test_ranks_that_are_no_numbers_are_refused_by_name(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = "variable (RANK|WORLD_SIZE) must be a whole number, .* got 'x': unset it"
    with pytest.raises(ValueError, match=said), torchrun_team():
        raise AssertionError
