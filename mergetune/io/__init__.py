"""Files and processes: atomic files, JSON, locks, safe reading of images and tensors, and ranks under torchrun."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.io.atomic_files import remove_parts, scratch_folder, write_atomically, writing_atomically
    from mergetune.io.contents import kind_of_content
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
        parse_json,
        read_document,
        read_json,
        write_json,
    )
    from mergetune.io.dtypes import FLOAT_DTYPES, STORED_DTYPES, STORED_NAMES, dtype_name, not_plain, require_plain
    from mergetune.io.files import (
        MAX_IMAGE,
        MAX_LIST,
        MAX_SETTINGS,
        MAX_TABLE,
        MAX_VOCABULARY,
        MAX_WEIGHTS,
        naming_full_disk,
        open_regular,
        read_at,
        read_regular,
        require_file,
        require_output_folder,
        require_regular,
        sha256_regular,
    )
    from mergetune.io.images import (
        IMAGE_FORMATS,
        Picture,
        check_picture,
        decoding_differs,
        image_extensions,
        load_image,
        read_picture,
    )
    from mergetune.io.locks import LOCK, locked, release_locks, remove_dead_locks, writing_in, writing_to
    from mergetune.io.network import CACHED, not_reached, quiet_retries, unreachable
    from mergetune.io.numpy_pickles import PickledObject, plain, read_numpy_pickle, read_object_array
    from mergetune.io.pickled_modules import convert_module, load_tensors_only
    from mergetune.io.picture_colours import FIRST_DECODING, as_rgb, background_colour, decoding_rules
    from mergetune.io.progress import hidden
    from mergetune.io.ranks import torchrun_team
    from mergetune.io.sentences import listing, named, names_file, naming_file, reason, visible
    from mergetune.io.tensor_budgets import require_unpacked
    from mergetune.io.tensor_files import load_tensors, load_torch, read_npz, read_safetensors
    from mergetune.io.text_files import decode_text, lines_of, read_text
    from mergetune.io.torchscript import is_torchscript, read_torchscript
    from mergetune.io.unpickling import Inert, Unpickler
    from mergetune.io.versions import installed_version, own_versions
    from mergetune.io.workers import begin_worker, end_workers, unaware_of_interrupts
    from mergetune.io.wrappers import AVERAGED, BUFFERS, OWNERS, PLAIN, inner_state, unwrapped

__all__ = [
    "AVERAGED",
    "BUFFERS",
    "CACHED",
    "FIRST_DECODING",
    "FLOAT_DTYPES",
    "IMAGE_FORMATS",
    "LOCK",
    "MAX_IMAGE",
    "MAX_LIST",
    "MAX_SETTINGS",
    "MAX_TABLE",
    "MAX_VOCABULARY",
    "MAX_WEIGHTS",
    "OWNERS",
    "PLAIN",
    "STORED_DTYPES",
    "STORED_NAMES",
    "Count",
    "Document",
    "Inert",
    "Items",
    "JsonObject",
    "Number",
    "PickledObject",
    "Picture",
    "Sha256",
    "Size",
    "Unpickler",
    "as_rgb",
    "background_colour",
    "begin_worker",
    "check_document",
    "check_picture",
    "compact_json",
    "convert_module",
    "damaged",
    "decode_text",
    "decoding_differs",
    "decoding_rules",
    "dtype_name",
    "end_workers",
    "fault",
    "hidden",
    "image_extensions",
    "inner_state",
    "installed_version",
    "is_torchscript",
    "jsonable",
    "kind_of_content",
    "lines_of",
    "listing",
    "load_image",
    "load_tensors",
    "load_tensors_only",
    "load_torch",
    "locked",
    "named",
    "names_file",
    "naming_file",
    "naming_full_disk",
    "not_plain",
    "not_reached",
    "open_regular",
    "own_versions",
    "parse_document",
    "parse_json",
    "plain",
    "quiet_retries",
    "read_at",
    "read_document",
    "read_json",
    "read_npz",
    "read_numpy_pickle",
    "read_object_array",
    "read_picture",
    "read_regular",
    "read_safetensors",
    "read_text",
    "read_torchscript",
    "reason",
    "release_locks",
    "remove_dead_locks",
    "remove_parts",
    "require_file",
    "require_output_folder",
    "require_plain",
    "require_regular",
    "require_unpacked",
    "scratch_folder",
    "sha256_regular",
    "torchrun_team",
    "unaware_of_interrupts",
    "unreachable",
    "unwrapped",
    "visible",
    "write_atomically",
    "write_json",
    "writing_atomically",
    "writing_in",
    "writing_to",
]

make_lazy(
    __name__,
    {
        "mergetune.io.atomic_files": "remove_parts scratch_folder write_atomically writing_atomically",
        "mergetune.io.contents": "kind_of_content",
        "mergetune.io.documents": (
            "Count Document Items JsonObject Number Sha256 Size check_document compact_json damaged fault jsonable "
            "parse_document parse_json read_document read_json write_json"
        ),
        "mergetune.io.dtypes": "FLOAT_DTYPES STORED_DTYPES STORED_NAMES dtype_name not_plain require_plain",
        "mergetune.io.files": (
            "MAX_IMAGE MAX_LIST MAX_SETTINGS MAX_TABLE MAX_VOCABULARY MAX_WEIGHTS naming_full_disk open_regular "
            "read_at read_regular require_file require_output_folder require_regular sha256_regular"
        ),
        "mergetune.io.images": (
            "IMAGE_FORMATS Picture check_picture decoding_differs image_extensions load_image read_picture"
        ),
        "mergetune.io.locks": "LOCK locked release_locks remove_dead_locks writing_in writing_to",
        "mergetune.io.network": "CACHED not_reached quiet_retries unreachable",
        "mergetune.io.numpy_pickles": "PickledObject plain read_numpy_pickle read_object_array",
        "mergetune.io.picture_colours": "FIRST_DECODING as_rgb background_colour decoding_rules",
        "mergetune.io.pickled_modules": "convert_module load_tensors_only",
        "mergetune.io.progress": "hidden",
        "mergetune.io.ranks": "torchrun_team",
        "mergetune.io.tensor_budgets": "require_unpacked",
        "mergetune.io.tensor_files": "load_tensors load_torch read_npz read_safetensors",
        "mergetune.io.sentences": "listing named names_file naming_file reason visible",
        "mergetune.io.text_files": "decode_text lines_of read_text",
        "mergetune.io.torchscript": "is_torchscript read_torchscript",
        "mergetune.io.unpickling": "Inert Unpickler",
        "mergetune.io.versions": "installed_version own_versions",
        "mergetune.io.workers": "begin_worker end_workers unaware_of_interrupts",
        "mergetune.io.wrappers": "AVERAGED BUFFERS OWNERS PLAIN inner_state unwrapped",
    },
)
