"""Small files that would fill the memory are refused by their sizes, before their content is read."""

import io
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mergetune as mt
from mergetune import merging
from mergetune.io import convert_module, load_torch

pytestmark = pytest.mark.usefixtures("one_thread")

MOST = 48 << 20  # bytes
GREAT = 72 << 20  # bytes that each file would need: 64 MiB are always allowed


def repeated(**options: bool) -> Callable[[Path], None]:
    return lambda file: torch.save({"w": torch.zeros(1).expand(1 << 10, GREAT >> 12)}, file, **options)


def overlapping(file: Path) -> None:
    numbers = torch.zeros(1 << 16)
    torch.save({f"w{i}": numbers[i : i + (1 << 15)] for i in range(GREAT >> 17)}, file)


def packed(file: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(GREAT >> 2)}, stream)
    with zipfile.ZipFile(stream) as whole, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))


def deflated(file: Path) -> None:
    np.savez_compressed(file, features=np.zeros((GREAT >> 4, 4), "f4"), labels=np.zeros(1, "i8"))


def stated(file: Path) -> None:
    """Headers of arrays whose numbers are missing."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("features", "labels"):
            archive.writestr(f"{name}.npy", header.getvalue())


def parquet(**columns: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet as writer

        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True)
        np.save(folder / "img_emb" / "img_emb_0.npy", np.eye(1, dtype="f4"))
        rows = {"image_path": ["a/b.jpg"], "label": [0]} | columns
        longest = max(map(len, rows.values()))  # pyright: ignore[reportArgumentType]
        table = pa.table({name: list(values) * (longest // len(values)) for name, values in rows.items()})  # pyright: ignore
        writer.write_table(
            table, folder / "metadata" / "metadata_0.parquet", compression="zstd", write_statistics=False
        )

    return make


def convert(file: Path) -> object:
    return convert_module(file, file.with_name("out.safetensors"))


def labelled(folder: Path) -> object:
    return mt.read_features(folder, labels="label", classnames=["a"])


def features(file: Path) -> object:
    return mt.read_features(file, classnames=["a"])


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "one number, repeated": (repeated(), load_torch),
    "one number in the older format": (repeated(_use_new_zipfile_serialization=False), load_torch),
    "one number, to merge": (repeated(), lambda file: dict(merging.open_weights(file))),
    "one number, to convert": (repeated(), convert),
    "views of one storage": (overlapping, load_torch),
    "views of one storage, to convert": (
        overlapping,
        lambda file: convert_module(file, file.with_suffix(".safetensors")),
    ),
    "a packed checkpoint": (packed, load_torch),
    "a deflated table.npz": (deflated, features),
    "sizes in headers.npz": (stated, features),
    "parquet of many rows": (parquet(label=[0] * 50_000), labelled),
    "parquet of a long text": (parquet(image_path=["a" * GREAT]), labelled),
    "parquet of lists": (parquet(label=[[0] * 100_000]), labelled),
}


@pytest.mark.parametrize("name", CASES)
def test_a_small_file_that_grows_is_refused_before_it_is_read(tmp_path, name):
    make, use = CASES[name]
    file = tmp_path / name
    make(file)
    assert sum(path.stat().st_size for path in [file, *file.rglob("*")] if path.is_file()) < GREAT >> 6
    process = os.fork()  # the peak of memory is that of a process
    if not process:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        try:
            use(file)
            outcome = 2
        except ValueError as error:
            outcome = 0 if str(tmp_path) in str(error) else 3
        except BaseException:
            outcome = 4
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        os._exit(outcome or int(grown > MOST))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
