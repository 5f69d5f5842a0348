"""What a file of tensors is, from its first bytes: the ending of a name says nothing about the content."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

from mergetune.io.files import open_regular

ZIP, NPY, GZIP = b"PK\x03\x04", b"\x93NUMPY", b"\x1f\x8b"
LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number at the start of torch's older format
OLD_PICKLE = (b"c", b"(", b"}", b"]")  # first instruction of an object, a tuple, a dict and a list, without a protocol
KIND_OF_ENDING = {
    ".safetensors": "safetensors", ".npz": "npz", ".npy": "npy", ".pkl": "pickle", ".pickle": "pickle",
    ".joblib": "pickle",
}  # fmt: skip


def kind_of_content(file: str | Path) -> str:
    """The format of a file: "safetensors", "npz", "npy", "torch", "pickle" or "compressed pickle" (of joblib).

    Content without a known beginning, such as that of a damaged file, has the format that the ending promises, "torch"
    for other endings: the reader of that format says what is wrong.

    Raises:
        OSError, ValueError: see :func:`mergetune.io.open_regular`.
    """
    with open_regular(file) as stream:
        start, size = stream.read(32), os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - 1))
        end = stream.read(1)
        if start.startswith(ZIP):
            return "npz" if _holds_arrays(stream) else "torch"
    if start.startswith(NPY):
        return "npy"
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    if start.startswith(LEGACY_TORCH):
        return "torch"
    if start.startswith(b"\x80") or (start[:1] in OLD_PICKLE and end == b"."):
        return "pickle"
    if start.startswith(GZIP) or (start[:1] == b"\x78" and int.from_bytes(start[:2], "big") % 31 == 0):
        return "compressed pickle"
    return KIND_OF_ENDING.get(Path(file).suffix.lower(), "torch")


def _holds_arrays(stream: BinaryIO) -> bool:
    """Whether a zip file holds numpy's arrays and nothing else; False for a damaged one."""
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many kinds on damaged files
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)
