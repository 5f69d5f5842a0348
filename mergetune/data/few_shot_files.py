"""Reading of CoOp's few-shot files, which are pickles of records, without running pickled code."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path

from mergetune.io import Inert, Unpickler, read_regular, reason

DATUM = ("dassl.data.datasets.base_dataset", "Datum")  # class of the records in CoOp's few-shot files
DATUM_OPCODES = re.compile(  # what pickle protocols 2 to 5 need for dicts and lists of such records; none calls code
    "PROTO|FRAME|STOP|MARK|EMPTY_(DICT|LIST|TUPLE)|APPENDS?|SETITEMS?|MEMOIZE|(LONG_)?BIN(PUT|GET)|(SHORT_)?BINUNICODE|"
    "BININT[12]?|(STACK_)?GLOBAL|NEWOBJ|BUILD"
)


def read_few_shot(path: Path, split: str) -> list[tuple[str, int]]:
    """(path, label) of each record under ``split`` in a pickle {split: [Datum, ...]}; no pickled code is run.

    Raises:
        ValueError: the file is not a few-shot file of CoOp.
    """

    content = read_regular(path)
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if not DATUM_OPCODES.fullmatch(opcode.name):
                raise pickle.UnpicklingError(f"it has the opcode {opcode.name}, which such files do not need")
            if opcode.name == "LONG_BINPUT" and (argument is None or argument > len(content)):
                raise pickle.UnpicklingError(
                    "its memo is larger than the file"
                )  # the unpickler would allocate this size
        found = Unpickler(io.BytesIO(content), {DATUM: Inert}, others=None).load()[split]
        records = [(record.state["_impath"], record.state["_label"]) for record in found]
        if not records or not all(isinstance(file, str) and type(label) is int for file, label in records):
            raise TypeError("its records must have a path and a label")
    except Exception as error:  # damaged pickles raise exceptions of any type
        raise ValueError(
            f"{path} must be a few-shot file of CoOp with images under {split!r}: {reason(error)}"
        ) from error
    return records
