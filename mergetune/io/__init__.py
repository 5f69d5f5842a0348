"""Files and processes: atomic files, JSON documents, locks, safe reading of tensor files, and ranks under torchrun."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.io.documents import (
        Count,
        Document,
        Items,
        JsonObject,
        Number,
        Sha256,
        Size,
        check_document,
        compact_json,
        damaged,
        fault,
        jsonable,
        parse_document,
        read_document,
        read_json,
        write_json,
    )
    from mergetune.io.dtypes import FLOAT_DTYPES, STORED_DTYPES, STORED_NAMES, dtype_name
    from mergetune.io.files import (
        MAX_IMAGE,
        MAX_LIST,
        MAX_SETTINGS,
        MAX_TABLE,
        MAX_VOCABULARY,
        MAX_WEIGHTS,
        open_regular,
        read_at,
        read_regular,
        read_regular_text,
        remove_parts,
        require_file,
        require_output_folder,
        require_regular,
        sha256_regular,
        write_atomically,
        writing_atomically,
    )
    from mergetune.io.locks import locked, release_locks
    from mergetune.io.pickled_modules import convert_module, is_torchscript, load_tensors_only, read_torchscript
    from mergetune.io.ranks import torchrun_team
    from mergetune.io.tensor_files import load_tensors, load_torch, read_npz, read_safetensors
    from mergetune.io.unpickling import Inert, Unpickler
    from mergetune.io.versions import installed_version

__all__ = [
    "FLOAT_DTYPES",
    "MAX_IMAGE",
    "MAX_LIST",
    "MAX_SETTINGS",
    "MAX_TABLE",
    "MAX_VOCABULARY",
    "MAX_WEIGHTS",
    "STORED_DTYPES",
    "STORED_NAMES",
    "Count",
    "Document",
    "Inert",
    "Items",
    "JsonObject",
    "Number",
    "Sha256",
    "Size",
    "Unpickler",
    "check_document",
    "compact_json",
    "convert_module",
    "damaged",
    "dtype_name",
    "fault",
    "installed_version",
    "is_torchscript",
    "jsonable",
    "load_tensors",
    "load_tensors_only",
    "load_torch",
    "locked",
    "open_regular",
    "parse_document",
    "read_at",
    "read_document",
    "read_json",
    "read_npz",
    "read_regular",
    "read_regular_text",
    "read_safetensors",
    "read_torchscript",
    "release_locks",
    "remove_parts",
    "require_file",
    "require_output_folder",
    "require_regular",
    "sha256_regular",
    "torchrun_team",
    "write_atomically",
    "write_json",
    "writing_atomically",
]

make_lazy(
    __name__,
    {
        "mergetune.io.documents": (
            "Count Document Items JsonObject Number Sha256 Size check_document compact_json damaged fault jsonable "
            "parse_document read_document read_json write_json"
        ),
        "mergetune.io.dtypes": "FLOAT_DTYPES STORED_DTYPES STORED_NAMES dtype_name",
        "mergetune.io.files": (
            "MAX_IMAGE MAX_LIST MAX_SETTINGS MAX_TABLE MAX_VOCABULARY MAX_WEIGHTS open_regular read_at read_regular "
            "read_regular_text remove_parts require_file require_output_folder require_regular sha256_regular "
            "write_atomically writing_atomically"
        ),
        "mergetune.io.locks": "locked release_locks",
        "mergetune.io.pickled_modules": "convert_module is_torchscript load_tensors_only read_torchscript",
        "mergetune.io.ranks": "torchrun_team",
        "mergetune.io.tensor_files": "load_tensors load_torch read_npz read_safetensors",
        "mergetune.io.unpickling": "Inert Unpickler",
        "mergetune.io.versions": "installed_version",
    },
)
