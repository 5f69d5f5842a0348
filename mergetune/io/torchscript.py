"""TorchScript archives, read without running them: an archive is a program, of which only the pickle is read."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergetune.io.files import open_regular, require_regular
from mergetune.io.sentences import names_file, reason
from mergetune.io.tensor_pickles import (
    Found,
    Piece,
    Refused,
    TensorUnpickler,
    make_tensors,
    pickle_in,
    storages_beside,
    stored_content,
)

MAX_MODULES = 1 << 16  # most modules of a TorchScript archive, counted per use: shared modules can multiply
MAX_CODE = 1 << 26  # most bytes of a TorchScript archive's code after decompression


def is_torchscript(file: str | Path) -> bool:
    """Whether a file is a TorchScript archive: a zip file with code and constants. False for a damaged zip file."""
    with open_regular(file) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                names = archive.namelist()
        except Exception:  # zipfile raises many kinds on other and on damaged files
            return False
    return any("/code/" in name or name.rpartition("/")[2] == "constants.pkl" for name in names)


@names_file("file")
def read_torchscript(file: str | Path) -> dict[str, Tensor]:
    """The state dict of a traced or scripted module, without running the archive as ``torch.jit.load`` would.

    The headers of the archive's classes say which attributes are parameters and buffers; other code is not read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a TorchScript archive, has modules that restore themselves by running code, or its
            tensors are much larger than the file because they repeat its numbers.
    """
    require_regular(file)
    try:
        pieces, _ = read_script(file)
        return make_tensors(pieces, os.stat(file).st_size)
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(
            f"{file} cannot be read as a TorchScript archive without running it: {reason(error)}"
        ) from error


def read_script(file: str | Path) -> tuple[dict[str, Piece], dict[str, Any]]:
    """The parameters and buffers of an archive by name, and what else may hold tensors: attributes and constants."""
    with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
        pickled, names = pickle_in(archive), archive.namelist()
        folder = pickled.removesuffix("data.pkl")

        def content(name: str) -> bytes:
            with open_regular(file) as again, zipfile.ZipFile(again) as opened:
                return stored_content(opened, name)

        root = TensorUnpickler(io.BytesIO(content(pickled)), storages_beside(content, pickled)).load()
        pieces = dict(_walk_script(root, _script_classes(archive, f"{folder}code/"), (), iter(range(MAX_MODULES))))
        rest: dict[str, Any] = {"attributes": root}
        if (constants := f"{folder}constants.pkl") in names:
            numbers = storages_beside(content, constants, folder="constants")
            rest["constants"] = TensorUnpickler(io.BytesIO(content(constants)), numbers).load()
    return pieces, rest


_HEADER = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.MULTILINE
)


def _script_classes(archive: zipfile.ZipFile, folder: str) -> dict[str, tuple[set[str], set[str]]]:
    """{name of a module's class: (names of its parameters, names of its buffers)}."""
    files = [info for info in archive.infolist() if info.filename.startswith(folder) and info.filename.endswith(".py")]
    if sum(info.file_size for info in files) > MAX_CODE:
        raise ValueError(f"the archive's code has more than {MAX_CODE} bytes")
    classes = {}
    for info in files:
        module = info.filename.removeprefix(folder).removesuffix(".py").replace("/", ".")
        for name, *lists in _HEADER.findall(archive.read(info).decode()):
            parameters, buffers = ({json.loads(word) for word in re.findall(r'"[^"]*"', names)} for names in lists)
            classes[f"{module}.{name}"] = parameters, buffers
    return classes


def _walk_script(
    module: Any,
    classes: Mapping[str, tuple[set[str], set[str]]],
    above: tuple[Any, ...],
    budget: Iterator[int],
    prefix: str = "",
) -> Iterator[tuple[str, Piece]]:
    """Yields name and description of the parameters and buffers below a module, in the order of its state dict."""
    place = prefix.removesuffix(".") or "it"
    if not isinstance(module, Found) or module.name not in classes or any(module is other for other in above):
        raise ValueError(f"{place} is no module, or is inside itself")
    if len(module.states) != 1 or not isinstance(module.states[0], dict):
        raise ValueError(f"{place} is a {module.name}, which can only be restored by running its code")
    if next(budget, None) is None:
        raise ValueError(f"the archive has more than {MAX_MODULES} modules")
    inside = module.states[0]
    for own in classes[module.name]:
        for key, value in inside.items():
            if key in own and isinstance(value, Refused):
                raise ValueError(f"{prefix}{key} is {value.what}")
            if key in own and isinstance(value, Piece):
                yield f"{prefix}{key}", value
    for key, value in inside.items():
        if isinstance(value, Found) and value.name in classes:
            yield from _walk_script(value, classes, (*above, module), budget, f"{prefix}{key}.")
