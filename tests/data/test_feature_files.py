"""Others' feature files as caches: each format as its project writes it, mapped and not copied, damaged, hostile."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mergetune import FeatureCache
from mergetune.data import feature_files, read_features

N, D, NAMES = 12, 8, ("ant", "bee", "cat")
LABELS = [i % 3 for i in range(N)]


def features(count: int = N, *, unit: bool = True) -> Tensor:
    x = torch.randn(count, D, generator=torch.Generator().manual_seed(0))
    return F.normalize(x, dim=-1) if unit else 10 * x


def assert_holds(cache: FeatureCache, expected: Tensor, labels=LABELS, names=NAMES) -> None:
    assert torch.equal(cache.tensor(), expected.float())
    assert (cache.labels.tolist(), cache.classnames, cache.dim, cache.views) == (list(labels), tuple(names), D, 1)
    some = torch.tensor([len(expected) - 1, 0, 3])
    assert torch.equal(cache.rows(some), expected.float()[some])


def mapped(cache: FeatureCache, file) -> bool:
    """Whether the features lie in a mapping of the file, as Linux tells."""
    maps, where = Path("/proc/self/maps"), cache.source.tensors[0].data_ptr()
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    for line in maps.read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= where < end:
            return str(file) in line
    return False


# -- formats ----------------------------------------------------------------------------------------------------------


def test_lpclip(tmp_path):
    """Lists of Python floats, as its extractor collects them, not normalised."""
    x = features(unit=False)
    np.savez(tmp_path / "train", feature_list=[row.tolist() for row in x], label_list=LABELS)
    with pytest.raises(
        ValueError, match=r"train.npz, rows from 0: features must be of unit norm \(or normalize=True\)"
    ):
        read_features(tmp_path / "train.npz", classnames=NAMES)
    cache = read_features(tmp_path / "train.npz", classnames=NAMES, normalize=True, fingerprint="abc")
    torch.testing.assert_close(cache.tensor(), F.normalize(x, dim=-1))
    assert cache.labels.tolist() == LABELS and cache.fingerprint == "abc" and cache.dtype == "float32"


@pytest.mark.parametrize("legacy", [False, True])
def test_tip_adapter(tmp_path, legacy):
    x = features().half()
    one_hot = F.one_hot(torch.tensor(LABELS)).half()
    contents = {"keys_16shots.pt": x.T, "values_16shots.pt": one_hot, "test_f.pt": x, "test_l.pt": torch.tensor(LABELS)}
    for name, tensor in contents.items():
        torch.save(tensor, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    for name in ("keys_16shots.pt", "test_f.pt"):
        cache = read_features(tmp_path / name, classnames=NAMES)
        assert_holds(cache, x)
        assert cache.dtype == "float16"
    assert legacy or mapped(read_features(tmp_path / "test_f.pt", classnames=NAMES), tmp_path / "test_f.pt")


def test_tip_adapters_keys_are_columns_even_where_they_are_square(tmp_path):
    x = features(D)
    torch.save(x.T.contiguous(), tmp_path / "keys_2shots.pt")
    torch.save(F.one_hot(torch.tensor(LABELS[:D])), tmp_path / "values_2shots.pt")
    assert_holds(read_features(tmp_path / "keys_2shots.pt", classnames=NAMES), x, LABELS[:D])


@pytest.mark.parametrize("name", ["keys_16shots.pt", "test_f.pt"])
def test_tip_adapters_labels_must_be_beside_the_features(tmp_path, name):
    torch.save(features().T if "keys" in name else features(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="values_16shots.pt|test_l.pt"):
        read_features(tmp_path / name, classnames=NAMES)
    assert_holds(read_features(tmp_path / name, labels=LABELS, classnames=NAMES), features())


@pytest.mark.parametrize("bad", [torch.ones(N, 3), torch.zeros(N, 3), F.one_hot(torch.tensor(LABELS)) * 2])
def test_values_that_are_not_one_hot_are_refused(tmp_path, bad):
    torch.save(features().T, tmp_path / "keys_1shots.pt")
    torch.save(bad, tmp_path / "values_1shots.pt")
    with pytest.raises(ValueError, match="must be one-hot"):
        read_features(tmp_path / "keys_1shots.pt", classnames=NAMES)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_npy_is_mapped_and_not_copied(tmp_path, dtype):
    x = features().numpy().astype(dtype)
    np.save(tmp_path / "f.npy", x)
    cache = read_features(tmp_path / "f.npy", labels=LABELS, classnames=NAMES)
    assert_holds(cache, torch.from_numpy(x.astype(np.float32)))
    assert cache.dtype == ("float16" if dtype == "float16" else "float32")
    assert mapped(cache, tmp_path / "f.npy") == (dtype in ("float16", "float32"))
    before = (tmp_path / "f.npy").read_bytes()
    cache.source.tensors[0].zero_()  # a private mapping: the file stays
    assert (tmp_path / "f.npy").read_bytes() == before


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_a_mapped_file_that_is_cut_off_is_an_error_and_no_signal(tmp_path, suffix):
    file = tmp_path / f"f{suffix}"
    if suffix == ".npy":
        np.save(file, features().numpy())
    else:
        (torch.save if suffix == ".pt" else save_file)({"features": features()}, file)
    cache = read_features(file, labels=LABELS, classnames=NAMES)
    content = pickle.dumps(cache)
    whole = cache.tensor()
    os.truncate(file, 1)
    for read in (cache.tensor, lambda: cache.digest):
        with pytest.raises(ValueError, match=f"f{suffix} was truncated while it was open: the file must have"):
            read()
    file.unlink()
    assert torch.equal(pickle.loads(content).tensor(), whole), "a copy is in memory"


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize(("feature", "label"), [("features", "labels"), ("image_features", "targets")])
def test_features_and_labels_in_one_file(tmp_path, suffix, feature, label):
    content = {feature: features(), label: torch.tensor(LABELS), "logits": torch.zeros(3)}
    file = tmp_path / f"f{suffix}"
    if suffix == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in content.items()})
    else:
        (save_file if suffix == ".safetensors" else torch.save)(content, file)
    assert_holds(read_features(file, classnames=NAMES), features())
    other = [2 - label for label in LABELS]
    assert_holds(read_features(file, labels=other, classnames=NAMES), features(), other)


def test_bfloat16(tmp_path):
    save_file({"features": features().bfloat16(), "labels": torch.tensor(LABELS)}, tmp_path / "f.safetensors")
    cache = read_features(tmp_path / "f.safetensors", classnames=NAMES)
    assert cache.dtype == "bfloat16" and mapped(cache, tmp_path / "f.safetensors")
    assert_holds(cache, features().bfloat16())


@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize("normalize", [True, False])
def test_portions_change_nothing(tmp_path, monkeypatch, rows, normalize):
    monkeypatch.setattr(feature_files, "ROWS", rows)
    np.save(tmp_path / "f.npy", features(unit=not normalize).numpy())
    cache = read_features(tmp_path / "f.npy", labels=LABELS, classnames=NAMES, normalize=normalize)
    assert len(cache.source.tensors) == -(-N // rows)
    torch.testing.assert_close(cache.tensor(), features())
    assert cache.select_classes([2, 0]).labels.tolist() == [0 if label == 2 else 1 for label in LABELS if label != 1]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        labels = [*LABELS[:-1], 3]
        read_features(tmp_path / "f.npy", labels=labels, classnames=NAMES, normalize=normalize)
    x = features()
    x[7] *= 2
    np.save(tmp_path / "g.npy", x.numpy())
    with pytest.raises(ValueError, match=f"rows from {7 // rows * rows}: .* the first is row {7 % rows} "):
        read_features(tmp_path / "g.npy", labels=LABELS, classnames=NAMES)


# -- clip-retrieval ---------------------------------------------------------------------------------------------------

PATHS = [f"/data/{NAMES[label]}/{i}.jpg" for i, label in enumerate(LABELS)]


@pytest.fixture
def retrieval(tmp_path):
    """Parts of 5, 4 and 3 images; their numbers sort as numbers only."""
    (tmp_path / "img_emb").mkdir()
    for number, part in zip((0, 2, 10), features().half().split([5, 4, 3]), strict=True):
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", part.numpy())
    (tmp_path / "img_emb" / "notes.txt").write_text("")
    return tmp_path


def write_metadata(folder, **columns) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "metadata").mkdir(exist_ok=True)
    start = 0
    for number, count in ((0, 5), (2, 4), (10, 3)):
        part = {name: values[start : start + count] for name, values in columns.items()}
        parquet.write_table(pa.table(part), folder / "metadata" / f"metadata_{number}.parquet")
        start += count


def test_clip_retrieval_with_labels_given_needs_no_metadata(retrieval):
    for labels in (LABELS, [NAMES[label] for label in LABELS]):
        cache = read_features(retrieval, labels=labels, classnames=NAMES)
        assert_holds(cache, features().half())
        assert len(cache.source.tensors) == 3 and mapped(cache, retrieval / "img_emb" / "img_emb_0.npy")


def test_clip_retrieval_takes_the_class_folders(retrieval):
    write_metadata(retrieval, image_path=PATHS, caption=["a"] * N)
    for names in (None, NAMES):
        cache = read_features(retrieval, classnames=names)
        assert_holds(cache, features().half())
        assert cache.files == tuple(PATHS)


@pytest.mark.parametrize("column", ["numbers", "names"])
def test_clip_retrieval_takes_a_column(retrieval, column):
    write_metadata(retrieval, image_path=["x"] * N, numbers=LABELS, names=[NAMES[label] for label in LABELS])
    cache = read_features(retrieval, labels=column, classnames=NAMES)
    assert_holds(cache, features().half())
    assert cache.files == ()  # not different: select() would be wrong


def test_metadata_that_does_not_fit_is_refused(retrieval):
    write_metadata(retrieval, image_path=["000001"] * N, mixed=[None, *LABELS[1:]])
    with pytest.raises(ValueError, match="labels must be given: .* image_path '000001' has no class folder"):
        read_features(retrieval)
    with pytest.raises(ValueError, match="must have column 'klass', got image_path, mixed"):
        read_features(retrieval, labels="klass")
    with pytest.raises(
        ValueError, match="labels must name a column of whole numbers only or of names only, got 'mixed'"
    ):
        read_features(retrieval, labels="mixed", classnames=NAMES)
    file = retrieval / "metadata" / "metadata_2.parquet"
    whole = file.read_bytes()
    (retrieval / "metadata" / "metadata_0.parquet").replace(file)
    (retrieval / "metadata" / "metadata_0.parquet").write_bytes(whole)
    with pytest.raises(ValueError, match="metadata_0.parquet cannot be read: the table must have a row for each of"):
        read_features(retrieval)
    file.unlink()
    (retrieval / "metadata" / "metadata_0.parquet").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="metadata_0.parquet cannot be read"):
        read_features(retrieval)


def test_missing_metadata_and_missing_pyarrow(retrieval, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="needs pyarrow: pip install pyarrow, or give the labels yourself"):
        read_features(retrieval)
    monkeypatch.undo()
    pytest.importorskip("pyarrow")
    with pytest.raises(FileNotFoundError, match="metadata_0.parquet with the labels must exist"):
        read_features(retrieval)


def test_a_folder_without_features_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold img_emb/img_emb_N.npy"):
        read_features(tmp_path)


# -- labels -----------------------------------------------------------------------------------------------------------


ANYWHERE = [".npy", ".npz", ".txt", "list", "array", "objects", "objects.npy", "objects.npz"]


@pytest.mark.parametrize(
    ("suffix", "names"),
    [(s, n) for s in ANYWHERE for n in (True, False)] + [(s, False) for s in (".pt", ".safetensors", "tensor")],
)
def test_labels_from_anywhere(tmp_path, names, suffix):
    np.save(tmp_path / "f.npy", features().numpy())
    values = [NAMES[label] for label in LABELS] if names else LABELS
    given = tmp_path / f"labels{suffix}"
    if suffix.startswith("objects"):  # as pandas has texts
        values = np.array(values, dtype=object)
    if suffix.endswith(".npy"):
        np.save(given, values)
    elif suffix.endswith(".npz"):
        np.savez(given, labels=values)
    elif suffix == ".txt":
        given.write_text("\n".join(map(str, values)) + "\n\n")
    elif suffix == ".pt":
        torch.save(torch.tensor(values), given)
    elif suffix == ".safetensors":
        save_file({"labels": torch.tensor(values)}, given)
    else:
        given = {"list": list, "objects": np.array, "tensor": torch.tensor, "array": np.array}[suffix](values)
    assert_holds(read_features(tmp_path / "f.npy", labels=given, classnames=NAMES), features())
    if names:
        assert read_features(tmp_path / "f.npy", labels=given).classnames == NAMES


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"labels": None}, "labels must be given, got None: .*f.npy holds no labels"),
        ({"labels": LABELS[:-1]}, "labels must be one for each of the 12 features of .*f.npy, got 11"),
        ({"labels": [*LABELS[:-1], 3]}, r"labels must lie in \[0, 3\)"),
        ({"labels": [*LABELS[:-1], -1]}, r"labels must lie in \[0, 3\)"),
        ({"labels": [0.5] * N}, "labels must be N whole numbers or names, got float64"),
        ({"labels": [*LABELS[:-1], None]}, "labels must be N whole numbers or names, got object"),
        ({"labels": ["dog"] * N}, "labels must be among the 3 classnames, got 'dog'"),
        ({"classnames": None}, "classnames must be given, got None: the labels are numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, arguments, match):
    np.save(tmp_path / "f.npy", features().numpy())
    with pytest.raises(ValueError, match=match):
        read_features(tmp_path / "f.npy", **{"labels": LABELS, "classnames": NAMES, **arguments})


def test_missing_files(tmp_path):
    np.save(tmp_path / "f.npy", features().numpy())
    with pytest.raises(FileNotFoundError, match="path must be a file or folder of features"):
        read_features(tmp_path / "g.npy", labels=LABELS)
    with pytest.raises(FileNotFoundError, match="labels must be an existing file, got .*l.txt"):
        read_features(tmp_path / "f.npy", labels=tmp_path / "l.txt")
    (tmp_path / "f.csv").write_text("1,2")
    with pytest.raises(ValueError, match="f.csv must be .npy, .npz, .pt, .pth, .safetensors or a folder"):
        read_features(tmp_path / "f.csv", labels=LABELS)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"features": features()[0]}, r"floating-point features \[N, D\], got torch.float32 \[8\]"),
        ({"features": features().long()}, r"got torch.int64 \[12, 8\]"),
        ({"features": "text"}, "got str"),
        ({"x": features()}, "must hold one of feature_list, features, image_features, got x"),
        ({"features": features(), "feature_list": features()}, "must hold one of"),
        ([features()], "got list"),
        ({"features": features() * float("nan")}, "features must be finite"),
    ],
)
def test_what_holds_no_features_is_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "f.pt")
    with pytest.raises(ValueError, match=match):
        read_features(tmp_path / "f.pt", labels=LABELS, classnames=NAMES)


# -- damaged and hostile files ----------------------------------------------------------------------------------------


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("role", ["features", "labels"])
@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "pickle.npy", "pickle.npz", "pickle.pt"])
def test_pickled_objects_are_refused_and_never_run(tmp_path, role, kind):
    evil, file = Hostile(tmp_path / "executed"), tmp_path / f"f.{kind.split('.')[-1]}"
    if kind.startswith("pickle"):
        file.write_bytes(pickle.dumps(evil))
    elif kind == "npy":
        np.save(file, np.array([evil], dtype=object), allow_pickle=True)
    elif kind == "npz":
        np.savez(file, features=np.array([evil], dtype=object), labels=np.array([evil], dtype=object))
    else:
        torch.save({"features": evil, "labels": evil}, file)
    np.save(tmp_path / "good.npy", features().numpy())
    with pytest.raises(ValueError, match="cannot be read"):
        if role == "features":
            read_features(file, labels=LABELS, classnames=NAMES)
        else:
            read_features(tmp_path / "good.npy", labels=file, classnames=NAMES)
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "legacy.pt", "safetensors", "parquet"])
def test_fuzzed_files_load_or_raise_our_errors(tmp_path, kind):
    """60 damaged files of each kind: bytes changed, pieces cut out, ends cut off."""
    content = {"features": features(), "labels": torch.tensor(LABELS)}
    path = file = tmp_path / f"f.{kind.split('.')[-1]}"
    labels = LABELS if kind == "npy" else None
    if kind == "npy":
        np.save(file, features().numpy())
    elif kind == "npz":
        np.savez(file, **{name: value.numpy() for name, value in content.items()})
    elif kind == "safetensors":
        save_file(content, file)
    elif kind == "parquet":
        (tmp_path / "img_emb").mkdir()
        for number, part in zip((0, 2, 10), features().split([5, 4, 3]), strict=True):
            np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", part.numpy())
        write_metadata(tmp_path, image_path=PATHS)
        path, file = tmp_path, tmp_path / "metadata" / "metadata_2.parquet"
    else:
        torch.save(content, file, _use_new_zipfile_serialization="legacy" not in kind)
    whole, dice, refused = file.read_bytes(), random.Random(kind), 0
    read_features(path, labels=labels, classnames=NAMES)
    for i in range(60):
        spoilt, at = bytearray(whole), dice.randrange(len(whole))
        if i % 3 == 0:
            del spoilt[at:]
        elif i % 3 == 1:
            del spoilt[at : at + dice.randint(1, 64)]
        else:
            for _ in range(dice.randint(1, 6)):
                spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
        file.unlink()  # the last one may still be mapped
        file.write_bytes(spoilt)
        try:
            read_features(path, labels=labels, classnames=NAMES).tensor()
        except ValueError:
            refused += 1
    assert refused > 15


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors", ".pt", ".features", ""])
@pytest.mark.parametrize("content", [".npy", ".npz", ".safetensors", ".pt"])
def test_the_ending_does_not_decide_what_a_file_is(tmp_path, content, ending):
    x, first = features(), tmp_path / f"first{content}"
    save = {
        ".npy": lambda: np.save(first, x.numpy()),
        ".npz": lambda: np.savez(first, features=x.numpy()),
        ".safetensors": lambda: save_file({"features": x}, first),
        ".pt": lambda: torch.save(x, first),
    }
    save[content]()
    assert_holds(read_features(first.rename(tmp_path / f"f{ending}"), labels=LABELS, classnames=NAMES), x)
