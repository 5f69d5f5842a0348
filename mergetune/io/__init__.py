"""Files and processes: atomic files, tensors of others' files read without running code, and ranks."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.io.files import (
        jsonable,
        open_regular,
        read_regular,
        read_regular_text,
        remove_parts,
        require_regular,
        write_atomically,
        writing_atomically,
    )
    from mergetune.io.pickled_modules import convert_module, is_torchscript, load_tensors_only, read_torchscript
    from mergetune.io.ranks import torchrun_team
    from mergetune.io.tensor_files import load_tensors, load_torch, read_npz, read_safetensors

__all__ = [
    "convert_module",
    "is_torchscript",
    "jsonable",
    "load_tensors",
    "load_tensors_only",
    "load_torch",
    "open_regular",
    "read_npz",
    "read_regular",
    "read_regular_text",
    "read_safetensors",
    "read_torchscript",
    "remove_parts",
    "require_regular",
    "torchrun_team",
    "write_atomically",
    "writing_atomically",
]

make_lazy(
    __name__,
    {
        "mergetune.io.files": (
            "jsonable open_regular read_regular read_regular_text remove_parts require_regular write_atomically "
            "writing_atomically"
        ),
        "mergetune.io.pickled_modules": "convert_module is_torchscript load_tensors_only read_torchscript",
        "mergetune.io.ranks": "torchrun_team",
        "mergetune.io.tensor_files": "load_tensors load_torch read_npz read_safetensors",
    },
)
