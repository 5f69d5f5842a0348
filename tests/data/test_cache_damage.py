"""Feature caches: damage of any bytes is found at opening, by verify or at the first reading, and mended."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cache_cases import BUILD, ROW_BYTES, NoMoreEncoding, TinyClip, array_bytes, as_version_1, draw_images, resealed

from mergetune.data import FeatureCache, cache_blocks, cache_building, cache_features
from mergetune.data import cache as cache_module
from mergetune.data.cache_blocks import Damage, reopen
from mergetune.data.cache_documents import Identities, Plan, lay_out
from mergetune.data.cache_files import read_manifest

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = {"mapped": 1 << 40, "read": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"), 11)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    """A cache of 11 files in blocks of 4, 4 and 3, two views."""
    return cache_features(TinyClip(), images, tmp_path_factory.mktemp("whole") / "train", **BUILD).path


@pytest.fixture
def cache(whole, tmp_path) -> Path:
    """A copy of the cache that was opened once."""
    path = shutil.copytree(whole, tmp_path / "train")
    FeatureCache.open(path)
    return path


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_MAPPED", WAYS[request.param])


def changed(file: Path, begin: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(begin)
        stream.write(content)


def unnoticed(file: Path, damage: Callable[[Path], object]) -> None:
    """Damages a file like a failing disk does: size, times and inode stay as in the last check."""
    before, checked = file.stat(), file.with_name("checked.json")
    damage(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    if checked.is_file():  # no process can set the time of change
        checked.write_text(checked.read_text().replace(str(before.st_ctime_ns), str(file.stat().st_ctime_ns)))


# -- what is damaged is named, and only that is encoded again ----------------------------------------------------------

NAN = torch.full((6,), float("nan")).numpy().tobytes()
DAMAGES: dict[str, tuple[Callable[[Path], object], str, list[int]]] = {  # message, blocks that are encoded again
    "zeros": (lambda file: changed(file, 5 * ROW_BYTES, bytes(2 * ROW_BYTES)), "damaged: rows 4 to 7 must", [1]),
    "NaN in view 1": (lambda file: changed(file, 20 * ROW_BYTES, NAN), "damaged: rows 8 to 10 must", [2]),
    "one bit": (lambda file: changed(file, 3, b"\x01"), "damaged: rows 0 to 3 must", [0]),
    "over a border": (lambda file: changed(file, 4 * ROW_BYTES - 1, b"12"), "rows 0 to 7 must", [0, 1]),
    "far apart": (
        lambda file: [changed(file, row * ROW_BYTES, b"1234") for row in (0, 10)],
        "rows 0 to 3 and 8 to 10 must",
        [0, 2],
    ),
    "truncated": (
        lambda file: os.truncate(file, 21 * ROW_BYTES),
        "truncated: the file must have 528 bytes, got 504, and rows 8 to 10 must",
        [2],
    ),
    "too long": (lambda file: changed(file, 528, b"more"), "damaged: the file must have 528 bytes, got 532;", []),
    "missing": (lambda file: file.unlink(), "is missing;", [0, 1, 2]),
    "of another cache": (
        lambda file: file.write_bytes(bytes(528 * [7])),
        "damaged: rows 0 to 10 must have the checksums in manifest.json, got others;",
        [0, 1, 2],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_rows_are_named_and_only_they_are_encoded_again(images, whole, cache, name, monkeypatch):
    damage, message, blocks = DAMAGES[name]
    damage(cache / "arrays.bin")
    way_on = f"`mergetune cache IMAGES --out {cache.parent}` with the options as before encodes only these rows again"
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as caught:
            FeatureCache.open(cache)
        assert str(cache / "arrays.bin") in str(caught.value) and str(caught.value).endswith(way_on)
    written, write = [], cache_building.write_block
    monkeypatch.setattr(cache_building, "write_block", lambda *args: [written.append(args[2]), write(*args)])
    with pytest.warns(UserWarning, match="arrays.bin is .*; their images are encoded again"):
        mended = cache_features(TinyClip(), images, cache, **BUILD)
    assert written == blocks
    assert array_bytes(cache) == array_bytes(whole)
    assert torch.equal(mended.tensor(1), FeatureCache.open(whole).tensor(1))
    mended.verify(images)
    cache_features(NoMoreEncoding(), images, cache, **BUILD)


@pytest.mark.parametrize("name", ["zeros", "NaN in view 1"])
@pytest.mark.parametrize("version", [1, 2])
def test_rows_that_a_failing_disk_changed_are_found_when_they_are_read(images, whole, cache, way, name, version):
    damage = DAMAGES[name][0]
    if version == 1:
        as_version_1(cache)
        offset = (cache / "shard-00001.safetensors").stat().st_size - 8 * ROW_BYTES
        row, view = 5, 0 if name == "zeros" else 1
        content = bytes(ROW_BYTES) if name == "zeros" else NAN
        changed(cache / "shard-00001.safetensors", offset + (view * 4 + 1) * ROW_BYTES, content)
    else:
        unnoticed(cache / "arrays.bin", damage)
        row, view = (5, 0) if name == "zeros" else (9, 1)
    opened = FeatureCache.open(cache)
    few = opened.rows(torch.tensor([0, 1]), view)  # whole rows serve
    assert torch.equal(few, FeatureCache.open(whole).rows(torch.tensor([0, 1]), view))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"damaged: each row must have norm 1, got (0|nan) in row {row} of view"):
            opened.tensor(view)
        opened.rows(torch.tensor([2]))
    with pytest.raises(ValueError, match="damaged"):
        opened.verify()
    if version == 2:
        with pytest.raises(ValueError, match=r"rows \d to \d+ must have the checksums"):
            FeatureCache.open(cache)  # the last check counts no more
        with pytest.warns(UserWarning, match="encoded again"):
            cache_features(TinyClip(), images, cache, **BUILD)
        assert array_bytes(cache) == array_bytes(whole)


@pytest.mark.parametrize("seed", range(3))
def test_any_damage_is_found(whole, tmp_path, seed):
    """At opening if the file's state tells, else by verify; a document's at once, except the note of the last check."""
    dice, expected = random.Random(seed), FeatureCache.open(whole).tensor()
    files = {file.name: file.read_bytes() for file in whole.iterdir()}
    kinds = {
        "flip": lambda old, at: old[:at] + bytes([old[at] ^ 1 << dice.randrange(8)]) + old[at + 1 :],
        "zeros": lambda old, at: old[:at] + bytes(len(old[at : at + 64])) + old[at + 64 :],
        "cut": lambda old, at: old[:at],
        "more": lambda old, at: old[:at] + b"0" + old[at:],
    }
    for name, old in files.items():
        for kind, damage in kinds.items():
            cache = shutil.copytree(whole, tmp_path / f"{name}-{kind}")
            FeatureCache.open(cache)
            new = damage(old, dice.randrange(len(old)))
            quietly = dice.random() < 0.5 and len(new) == len(old)
            if new == old:
                continue
            (unnoticed if quietly else lambda file, work: work(file))(
                cache / name, lambda file, new=new: file.write_bytes(new)
            )
            if name == "checked.json":
                assert torch.equal(FeatureCache.open(cache).tensor(), expected)
            elif name == "arrays.bin" and quietly:
                with pytest.raises(ValueError, match="arrays.bin is damaged: rows"):
                    FeatureCache.open(cache).verify()
            else:
                with pytest.raises(ValueError, match=name):
                    opened = FeatureCache.open(cache)
                    cache_features(NoMoreEncoding(), draw_of(opened), cache, views=2)


def draw_of(cache: FeatureCache):
    from mergetune.data import ImageList

    return ImageList(cache.path, cache.files, tuple(cache.labels.tolist()), cache.classnames)


# -- manifests that lie ------------------------------------------------------------------------------------------------


def more_files(manifest: dict) -> None:
    manifest["files"] += [f"more-{i}.png" for i in range(100)]
    manifest["labels"] += [0] * 100


def swapped_arrays(manifest: dict) -> None:
    (array,) = manifest["arrays"]
    manifest["arrays"] = [array | {"name": "raw"}]


LIES: dict[str, tuple[Callable[[dict], object], str]] = {
    "labels reversed": (lambda m: m["labels"].reverse(), ""),
    "class names reversed": (lambda m: m["classnames"].reverse(), ""),
    "100 files too many": (more_files, r"arrays\[0\].shape must be \[2, 111, ...\], views and files"),
    "rows": (lambda m: m.update(rows=12), "rows must be 11, one per file that was not skipped, got 12"),
    "skipped": (lambda m: m.update(skipped={"000.png": "lost"}), "rows must be 10, one per file"),
    "shape": (lambda m: m["arrays"][0].update(shape=[2, 11, 1 << 40]), "bytes must be .*, where the last array ends"),
    "offset": (lambda m: m["arrays"][0].update(offset=4), r"arrays\[0\].offset must be a multiple of 4,096"),
    "another array": (swapped_arrays, "arrays must be a list with an array 'features'"),
    "files twice": (lambda m: m["files"].__setitem__(0, "001.png"), "files must be a list of different names"),
    "blocks": (lambda m: m["arrays"][0]["sha256"].pop(), r"arrays\[0\].sha256 must be a list of 6, one checksum per"),
    "shard_size": (lambda m: m.update(shard_size=1), r"arrays\[0\].sha256 must be a list of 22, one checksum per"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_does_not_fit_is_refused(images, cache, name):
    lie, message = LIES[name]
    manifest = json.loads((cache / "manifest.json").read_text())
    lie(manifest)
    (cache / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    for read in (FeatureCache.open, lambda path: cache_features(NoMoreEncoding(), images, path, **BUILD)):
        with pytest.raises(ValueError, match=r"manifest.json is damaged: its checksum .*; overwrite=True"):
            read(cache)
    if message:  # and with the checksum that fits
        (cache / "manifest.json").write_bytes(resealed(manifest))
        with pytest.raises(ValueError, match=f"manifest.json is damaged: {message}"):
            FeatureCache.open(cache)


# -- when checksums are compared ---------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch):
    """Files whose checksums were compared."""
    found, differing = [], cache_blocks._differing
    monkeypatch.setattr(cache_blocks, "_differing", lambda *args: [found.append(args[0]), differing(*args)][1])
    return found


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_copy_is_compared_once(whole, tmp_path, compared, keep_times):
    copy = shutil.copytree(whole, tmp_path / "copy", copy_function=shutil.copy2 if keep_times else shutil.copyfile)
    for _ in range(3):
        assert torch.equal(FeatureCache.open(copy).tensor(), FeatureCache.open(whole).tensor())
    assert compared == [copy / "arrays.bin"]
    FeatureCache.open(copy).verify()
    assert len(compared) == 2


def test_new_labels_do_not_make_it_read_again(images, cache, compared):
    relabelled = replace(images, labels=(0,) * 11)
    cache_features(NoMoreEncoding(), relabelled, cache, **BUILD)
    assert not FeatureCache.open(cache).labels.any() and not compared


def test_a_folder_that_cannot_be_written_serves(images, whole, tmp_path, compared, monkeypatch):
    copy = shutil.copytree(whole, tmp_path / "copy")

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(cache_blocks, "write_atomically", refuse)
    for _ in range(2):
        assert torch.equal(FeatureCache.open(copy).tensor(), FeatureCache.open(whole).tensor())
    assert len(compared) == 2, "each opening compares, because none can be remembered"


def test_damage_is_not_mended_with_some_of_the_images(images, whole, cache):
    DAMAGES["zeros"][0](cache / "arrays.bin")
    with pytest.raises(ValueError, match="rows 4 to 7 .* encodes only these rows again, given all 11 images"):
        cache_features(NoMoreEncoding(), images.take([0, 1]), cache, **BUILD)
    with pytest.warns(UserWarning, match="rows 4 to 7"):
        cache_features(TinyClip(), images, cache, **BUILD)
    assert array_bytes(cache) == array_bytes(whole)


def test_verify_compares_the_shards_of_version_0_1(images, cache):
    as_version_1(cache)
    changed(cache / "shard-00002.safetensors", (cache / "shard-00002.safetensors").stat().st_size - 3, b"1")
    for work in (
        lambda: cache_features(NoMoreEncoding(), images, cache, **BUILD, verify=True),
        FeatureCache.open(cache).verify,
    ):
        with pytest.raises(ValueError, match=r"shard-00002.*: its checksum .* \(rows from 8 on\); overwrite=True"):
            work()


def test_verify_finds_and_mends_what_the_state_of_the_file_hides(images, whole, cache):
    unnoticed(cache / "arrays.bin", DAMAGES["one bit"][0])
    assert len(cache_features(NoMoreEncoding(), images, cache, **BUILD)) == 11
    with pytest.warns(UserWarning, match="rows 0 to 3 must have the checksums"):
        cache_features(TinyClip(), images, cache, **BUILD, verify=True)
    assert array_bytes(cache) == array_bytes(whole)


class Stopped(BaseException):
    """As a signal would stop the process."""


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Lets some writes and removals happen, and no more."""
    calls = iter(range(steps))

    def counted(original: Callable) -> Callable:
        def work(*args, **settings):
            if next(calls, None) is None:
                raise Stopped
            return original(*args, **settings)

        return work

    for owner, name in ((os, "replace"), (os, "pwrite"), (Path, "unlink")):
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.filterwarnings("ignore:.* encoded again")
def test_mending_may_be_stopped_at_any_step(images, whole, cache, monkeypatch):
    for steps in range(100):
        changed(cache / "arrays.bin", ROW_BYTES, b"1")
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            try:
                finished = cache_features(TinyClip(), images, cache, **BUILD)
            except Stopped:
                finished = None
        cache_features(TinyClip(), images, cache, **BUILD).verify(images)
        assert array_bytes(cache) == array_bytes(whole) and not list(cache.glob("block-*"))
        if finished is not None:
            break
    assert 8 < steps < 99, "every write and removal was a step"


def test_rows_of_an_unfinished_cache_are_compared_too(images, whole, cache):
    manifest = read_manifest(cache)
    cache_blocks.reopen(cache, manifest, cache_blocks.Damage(rows=((8, 10),), text=""))
    changed(cache / "arrays.bin", ROW_BYTES, b"1")
    with pytest.warns(UserWarning, match="rows 0 to 3 of unfinished cache .* are damaged and are encoded again"):
        cache_features(TinyClip(), images, cache, **BUILD)
    assert array_bytes(cache) == array_bytes(whole)


def test_a_file_cut_off_while_it_is_open_is_an_error_and_no_signal(cache, way):
    opened = FeatureCache.open(cache)
    opened.rows(torch.arange(11))
    os.truncate(cache / "arrays.bin", 0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"arrays.bin was truncated while it was open: .*; `mergetune cache"):
            opened.tensor()


# -- the format --------------------------------------------------------------------------------------------------------


def swapped(file: Path) -> None:
    """The features of two images change places, with the norms, the size and the time of modification of before."""
    before, content = file.stat(), file.read_bytes()
    rows = content[ROW_BYTES : 2 * ROW_BYTES] + content[:ROW_BYTES]
    changed(file, 0, rows)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_features_that_are_exchanged_behind_the_times_are_found_at_opening(cache):
    swapped(cache / "arrays.bin")
    with pytest.raises(ValueError, match="damaged: rows 0 to 3 must have the checksums"):
        FeatureCache.open(cache)


def test_features_that_are_exchanged_while_the_cache_is_open_are_found_when_rows_are_read(cache, way):
    opened = FeatureCache.open(cache)
    before, other = opened.tensor(), pickle.loads(pickle.dumps(opened))
    (cache / "arrays.bin").chmod(0o600)  # the contents are compared, and serve
    assert torch.equal(opened.tensor(), before) and torch.equal(other.tensor(), before)
    swapped(cache / "arrays.bin")
    for cache_object in (opened, other):
        for _ in range(2):
            with pytest.raises(
                ValueError, match="rows 0 to 3 must have the checksums in manifest.json, got others since"
            ):
                cache_object.rows(torch.tensor([10]))


def test_a_cache_that_is_rebuilt_still_serves_who_has_opened_it(images, cache, way):
    opened = FeatureCache.open(cache)
    before = opened.tensor()
    cache_features(TinyClip(), images, cache, **BUILD, overwrite=True)
    assert torch.equal(opened.tensor(), before)


LINKED = {
    "a link": lambda file, other: file.symlink_to(other),
    "a file with a second name": lambda file, other: file.hardlink_to(other),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("kind", LINKED)
def test_mending_and_resuming_write_into_no_file_of_another_place(images, whole, tmp_path, kind, finished):
    cache, other = shutil.copytree(whole, tmp_path / "train"), tmp_path / "other"
    if not finished:
        reopen(cache, read_manifest(cache), Damage(((0, 3),), ""))
    (cache / "arrays.bin").rename(other)
    changed(other, 0, b"1234")
    LINKED[kind](cache / "arrays.bin", other)
    names, content = {*os.listdir(cache)} - {"checked.json"}, other.read_bytes()
    with pytest.raises(ValueError, match=f"arrays.bin must be .*, got {kind}.*: put a copy"):
        cache_features(NoMoreEncoding(), images, cache, **BUILD)
    assert other.read_bytes() == content and {*os.listdir(cache)} - {"checked.json"} == names
    (cache / "arrays.bin").unlink()
    with pytest.warns(UserWarning, match="encoded again"):
        cache_features(TinyClip(), images, cache, **BUILD)
    assert other.read_bytes() == content and array_bytes(cache) == array_bytes(whole)


def test_the_lines_in_the_docs_read_a_cache(whole, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "cache.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    shutil.copytree(whole, tmp_path / "cache" / "train")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    cache = FeatureCache.open(whole)
    assert np.array_equal(names["features"][1], cache.tensor(1).numpy())
    assert names["labels"].tolist() == cache.labels.tolist()
    changed(tmp_path / "cache" / "train" / "arrays.bin", 300, b"1")
    with pytest.raises(AssertionError):
        exec(code, {})


def test_other_arrays_stand_beside_the_features(tmp_path):
    """Norms, rows before the projection and tokens, in the same blocks and with the same checks."""
    generator, files = torch.Generator().manual_seed(0), [f"{i}.png" for i in range(7)]
    arrays = {
        "features": F.normalize(torch.randn(2, 7, 5, generator=generator), dim=-1),
        "norms": torch.rand(2, 7, generator=generator),
        "tokens 3": torch.randn(2, 7, 4, 6, generator=generator).bfloat16(),
    }
    layouts = lay_out((name, str(rows.dtype)[6:], rows.shape, name == "features") for name, rows in arrays.items())
    plan = Plan.model_validate({
        "format": "mergetune.features/2", "id": "", "clip": "", "fingerprint": "", "preprocess": {}, "seed": None,
        "dtype": "float32", "views": 2, "dim": 5, "shard_size": 4, "files": files, "labels": [0] * 7,
        "classnames": ["a"], "arrays": layouts, "bytes": layouts[-1].end,
    })  # fmt: skip
    cache_blocks.allocate(tmp_path, plan)
    for number in (0, 1):
        part = {name: rows[:, 4 * number : 4 * number + 4] for name, rows in arrays.items()}
        images = Identities.of([("", 0, 0)] * len(plan.files_of(number)))
        cache_blocks.write_block(tmp_path, plan, number, part, images, {})
    cache_building._finish(tmp_path, plan)
    assert torch.equal(FeatureCache.open(tmp_path).tensor(1), arrays["features"][1])
    content = (tmp_path / "arrays.bin").read_bytes()
    for array in json.loads((tmp_path / "manifest.json").read_text())["arrays"]:
        rows = arrays[array["name"]]
        assert array["shape"] == list(rows.shape) and array["offset"] % 4096 == 0
        found = torch.frombuffer(bytearray(content[array["offset"] :]), dtype=rows.dtype, count=rows.numel())
        assert torch.equal(found.view(rows.shape), rows)
        changed(tmp_path / "arrays.bin", array["offset"] + rows[0, :6].numel() * rows.element_size(), b"1")
        with pytest.raises(ValueError, match="rows 4 to 6 must have the checksums"):
            FeatureCache.open(tmp_path)
        (tmp_path / "arrays.bin").write_bytes(content)
