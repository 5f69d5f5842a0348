"""Tensors of pickled modules, read without running them."""

import codecs
import copyreg
import functools
import importlib
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from checkpoint_cases import CLASSES, NAMES, WEIGHT, WIDTH, Hostile, context
from torch import nn

from mergetune import Head
from mergetune.io import convert_module, load_tensors_only, read_torchscript, tensor_pickles, torchscript, unpickling
from mergetune.io.pickled_modules import read_module
from mergetune.solutions import read_head, read_prompt


@pytest.fixture
def wise_ft(monkeypatch):
    """A module of WiSE-FT's classes, pretending that its code is installed; ``forget`` takes it away again."""
    for name in ("src", "src.models", "src.models.modeling"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    room = sys.modules["src.models.modeling"]

    class ClassificationHead(nn.Linear):
        def __init__(self, weight, normalize):
            super().__init__(WIDTH, CLASSES)
            self.normalize = normalize
            self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(torch.zeros(CLASSES))

    class ImageClassifier(nn.Module):
        def __init__(self, encoder, head):
            super().__init__()
            self.image_encoder, self.classification_head, self.val_preprocess = encoder, head, print

    for made in (ClassificationHead, ImageClassifier):
        made.__module__, made.__qualname__ = "src.models.modeling", made.__name__
        setattr(room, made.__name__, made)
    yield room


def forget_wise_ft():
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        del sys.modules[name]


def write_module(module, file, how: str) -> None:
    if how.startswith("pickle"):
        file.write_bytes(pickle.dumps(module, protocol=int(how[-1])))
    else:
        torch.save(module, file, _use_new_zipfile_serialization=how == "zip")


HOW = ["pickle 2", "pickle 4", "pickle 5", "zip", "legacy"]


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", HOW)
def test_wise_fts_head_is_converted_without_its_code(wise_ft, tmp_path, how):
    write_module(wise_ft.ClassificationHead(100 * WEIGHT, True), tmp_path / "head.pt", how)
    forget_wise_ft()
    with pytest.raises(ValueError, match="cannot be read as a checkpoint") as refused:
        Head.from_checkpoint(tmp_path / "head.pt", classnames=NAMES)
    assert "pickled code is never run; `mergetune convert`" in str(refused.value)
    assert convert_module(tmp_path / "head.pt", tmp_path / "head.safetensors").names == ("weight", "bias")
    head = Head.from_checkpoint(tmp_path / "head.safetensors", classnames=NAMES)
    assert torch.equal(head.weight, 100 * WEIGHT) and torch.equal(head.bias, torch.zeros(CLASSES))
    assert head.logit_scale == 1 and "src" not in sys.modules


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_whole_classifier_is_read_as_its_state_dict(wise_ft, tmp_path, how, parallel):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).half()
    model = wise_ft.ImageClassifier(encoder, wise_ft.ClassificationHead(WEIGHT, True))
    model = nn.DataParallel(model) if parallel else model
    write_module(model, tmp_path / "model.pt", how)
    expected = (model.module if parallel else model).state_dict()
    forget_wise_ft()
    found = read_module(tmp_path / "model.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    convert_module(tmp_path / "model.pt", tmp_path / "head.safetensors", only="classification_head")
    assert torch.equal(Head.from_checkpoint(tmp_path / "head.safetensors", classnames=NAMES).weight, WEIGHT)
    with pytest.raises(ValueError, match=r"must hold tensors of logit_head, got image_encoder.0.weight"):
        read_module(tmp_path / "model.pt", only="logit_head")


def test_views_and_dicts_of_tensors_come_back(tmp_path):
    """Transposed, offset and shared memory, 0 dimensions, every dtype."""
    whole = context(4, 6)
    content = {"t": whole.T, "part": whole[1:3, ::2], "scalar": torch.tensor(7), "nested": {"bool": whole > 0}}
    for how in HOW:
        write_module(content, tmp_path / "file", how)
        found = read_module(tmp_path / "file")
        assert torch.equal(found["t"], whole.T) and torch.equal(found["part"], whole[1:3, ::2])
        assert found["scalar"] == 7 and torch.equal(found["nested.bool"], whole > 0)


def test_expanded_tensors_come_back_unless_they_would_fill_the_memory(tmp_path):
    for how in HOW:
        write_module({"mask": torch.ones(1).expand(5, 4)}, tmp_path / "file", how)
        assert torch.equal(read_module(tmp_path / "file")["mask"], torch.ones(5, 4))
        write_module({"mask": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "file", how)
        with pytest.raises(ValueError, match=r"the largest of them shape \[1048576, 1048576\]"):
            read_module(tmp_path / "file")


def test_a_storage_of_another_size_is_refused(tmp_path):
    """All that follows would be other numbers."""
    torch.save({"a": context(5), "b": context(7)}, tmp_path / "file", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "file").read_bytes()
    count, fewer = struct.pack("<q", 5), struct.pack("<q", 4)
    assert whole.count(count) == 1
    (tmp_path / "file").write_bytes(whole.replace(count, fewer))
    with pytest.raises(ValueError, match="must have 5 numbers, got 4"):
        read_module(tmp_path / "file")


def rewritten(file, out, change) -> None:
    """A copy of a zip file with the entries that change(names and contents) returns."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w") as new:
        for name, content in change({name: old.read(name) for name in old.namelist()}).items():
            new.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: {"notes.txt": b"no pickle"}, "the zip file was not written by torch.save"),
        (lambda found: {n: b"big" if n.endswith("byteorder") else c for n, c in found.items()}, "are big-endian"),
    ],
)
def test_zip_files_with_something_else_are_refused(tmp_path, change, said):
    torch.save({"a": context(5)}, tmp_path / "file")
    rewritten(tmp_path / "file", tmp_path / "other", change)
    with pytest.raises(ValueError, match=f"other cannot be read as a pickled module: .*{said}"):
        read_module(tmp_path / "other")
    rewritten(tmp_path / "file", tmp_path / "same", dict)
    assert torch.equal(read_module(tmp_path / "same")["a"], context(5))


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def legacy(content) -> bytes:
    torch.save(content, stream := io.BytesIO(), _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Call(torch.storage._load_from_bytes, "text"), "a storage that is not understood"),
        (Call(torch.storage._load_from_bytes, legacy([1, 2])), "a storage that is not understood"),
        (Call(codecs.encode, "text", "rot13"), "bytes that are not understood"),
        (Call(codecs.encode, b"text", "hex"), "bytes that are not understood"),
        (Call(torch._utils._rebuild_tensor_v2, "text", 0, (1,), (1,), False, None), "a tensor that is not understood"),
    ],
)
def test_known_functions_with_arguments_that_torch_never_writes_are_refused(tmp_path, call, said):
    (tmp_path / "file").write_bytes(pickle.dumps({"a": call}))
    with pytest.raises(ValueError, match=f"file cannot be read as a pickled module: .*{said}"):
        read_module(tmp_path / "file")


@pytest.mark.parametrize(
    "storage", [("storage", torch.FloatStorage, "0", "cpu", 4), ("storage", torch.FloatStorage, 0, "cpu", -4)]
)
def test_a_storage_that_is_in_no_archive_is_refused(tmp_path, storage):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return storage if value == "here" else None

    with open(tmp_path / "file", "wb") as stream:
        Pickler(stream).dump(["here"])
    with pytest.raises(ValueError, match="file cannot be read as a pickled module: .*a storage that is missing"):
        read_module(tmp_path / "file")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize(("limit", "said"), [("MAX_MODULES", "has more than 3 modules"), ("MAX_CODE", "more than 3 b")])
def test_torchscript_archives_are_read_within_limits(tmp_path, monkeypatch, limit, said):
    """Shared modules can multiply, and code is compressed: a small archive could take all memory."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2)))
    torch.jit.trace(model, torch.zeros(1, 2)).save(str(tmp_path / "file"))
    assert read_torchscript(tmp_path / "file").keys() == model.state_dict().keys()
    monkeypatch.setattr(torchscript, limit, 3)
    with pytest.raises(ValueError, match=f"file cannot be read as a TorchScript archive .*{said}"):
        read_torchscript(tmp_path / "file")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_sparse_tensors_come_back(tmp_path):
    sparse = torch.eye(3).to_sparse()
    torch.save({"sparse": sparse, "dense": torch.ones(2)}, tmp_path / "file")
    found = load_tensors_only(tmp_path / "file")
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3)) and torch.equal(found["dense"], torch.ones(2))


def test_a_head_for_other_features_is_refused(wise_ft, tmp_path):
    write_module(wise_ft.ClassificationHead(WEIGHT, False), tmp_path / "head.pt", "pickle 4")
    forget_wise_ft()
    convert_module(tmp_path / "head.pt", tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="features of unit norm, got one with normalize=False"):
        Head.from_checkpoint(tmp_path / "head.safetensors", classnames=NAMES)


@pytest.mark.parametrize("content", [{}, [1, 2], {"a": "text"}, 5, None], ids=repr)
def test_pickles_without_tensors_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="must hold tensors, got none"):
        read_module(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        read_module(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must be a regular file, got a folder"):
        read_module(tmp_path)
    with pytest.raises(ValueError, match="out must be a .safetensors file"):
        convert_module(tmp_path / "file", tmp_path / "out.pt")


@pytest.mark.parametrize("suffix", [".pkl", ".joblib", ".pickle"])
def test_pickles_that_name_code_are_no_heads(tmp_path, suffix):
    (tmp_path / f"head{suffix}").write_bytes(pickle.dumps(Hostile(os.mkdir, str(tmp_path / "executed"))))
    with pytest.raises(ValueError, match="holds posix.mkdir, and pickled code is never run; `mergetune convert`"):
        Head.from_checkpoint(tmp_path / f"head{suffix}", classnames=NAMES)
    assert not (tmp_path / "executed").exists()


class Setter:
    """Is filled with a state, as a hostile file may do with whatever it can name."""

    def __init__(self, target, state):
        self.target, self.state = target, state

    def __reduce__(self):
        return self.target, (), self.state


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("place", ["alone", "beside", "in a module"])
@pytest.mark.parametrize(
    "evil",
    [
        lambda: Hostile(os.system, "touch executed"),
        lambda: Hostile(eval, "open('executed', 'w')"),
        lambda: Hostile(functools.partial(os.mkdir, "executed")),
        lambda: Hostile(getattr, Hostile(importlib.import_module, "hostile_module"), "x"),
        lambda: Hostile(importlib.import_module, "hostile_module"),
        lambda: Hostile(torch.load, "hostile.pt"),
        lambda: Hostile(torch.storage._load_from_bytes, pickle.dumps(Hostile(os.mkdir, "executed"))),
        lambda: Hostile(np.load, "hostile.npy", "r", True),
        lambda: Setter(types.SimpleNamespace, {"__class__": Hostile(os.mkdir, "executed")}),
    ],
    ids=["system", "eval", "partial", "getattr", "import", "torch.load", "storage", "np.load", "state"],
)
def test_nothing_in_a_pickled_module_is_run(tmp_path, monkeypatch, evil, place, how):
    """The tensors beside it are read, or the file is refused; there is no other way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile_module.py").write_text("open('executed', 'w')")
    torch.save(Hostile(os.mkdir, "executed"), tmp_path / "hostile.pt")
    np.save(tmp_path / "hostile.npy", np.array([Hostile(os.mkdir, "executed")]), allow_pickle=True)
    monkeypatch.syspath_prepend(tmp_path)
    there = sorted(file.name for file in tmp_path.iterdir())
    if place == "in a module":
        content = nn.Linear(2, 2)
        content.evil = evil()
    else:
        content = evil() if place == "alone" else {"evil": evil(), "weight": WEIGHT}
    write_module(content, tmp_path / "file", how)
    try:
        found = read_module(tmp_path / "file")
        assert "weight" in found and place != "alone"
    except ValueError as error:
        assert "file" in str(error)
    for read in (read_prompt, read_head):
        with pytest.raises(ValueError):
            read(tmp_path / "file")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*there, "file"])


def test_a_file_changes_nothing_that_outlives_it(tmp_path):
    """A state that is meant for a class or function, not for an object, goes nowhere."""
    for name in (b"posix\nsystem", b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict"):
        (tmp_path / "file").write_bytes(b"\x80\x02c" + name + b"\n}X\x05\x00\x00\x00stateX\x01\x00\x00\x00xsb.")
        with pytest.raises(ValueError, match="must hold tensors, got none"):
            read_module(tmp_path / "file")
    assert unpickling.Inert.state is None and not vars(tensor_pickles.TensorUnpickler.rebuild_tensor)


def test_extension_codes_are_refused(tmp_path, monkeypatch):
    """They stand for objects that another pickle has brought in, past every look at names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._extension_cache, 200, os.mkdir)
    hostile = b"\x80\x02(\x82\xc8X\x08\x00\x00\x00executedo."
    pickle._Unpickler(io.BytesIO(hostile)).load()
    (tmp_path / "executed").rmdir()  # so it does what it should not do here:
    (tmp_path / "file").write_bytes(hostile)
    with pytest.raises(ValueError, match="an instruction that such files do not need"):
        read_module(tmp_path / "file")
    assert not (tmp_path / "executed").exists()


def test_npz_files_with_pickled_objects_are_refused_and_never_run(tmp_path):
    evil = np.array([Hostile(os.mkdir, str(tmp_path / "executed"))], dtype=object)
    np.savez(tmp_path / "head.npz", weight=WEIGHT.numpy(), classes_=evil)
    with pytest.raises(ValueError, match="cannot be read as .npz: .* holds posix.mkdir, and pickled code is never run"):
        Head.from_checkpoint(tmp_path / "head.npz", classnames=NAMES)
    assert not (tmp_path / "executed").exists()
