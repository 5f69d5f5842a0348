"""Writing the graph of a classifier as a file: ONNX with a small predictor beside it, or a program of torch.export."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mergetune.clip import FrozenClip
from mergetune.facts.function_options import BACKGROUND
from mergetune.io import (
    background_colour,
    naming_full_disk,
    read_regular,
    scratch_folder,
    write_atomically,
    writing_to,
)
from mergetune.serving.graphs import check_logits, facts_of, traced
from mergetune.solutions import Solution

PREDICTOR = "predict_onnx.py"
WRITERS = ("onnx", "onnxscript")  # the packages that torch's exporter needs
ONE_FILE = 1 << 30  # bytes of weights that stay in the .onnx file, which can hold 2 GB
FACTS = "mergetune.json"  # the facts in a program of torch.export


def to_onnx(
    solution: Solution,
    file: str | Path,
    *,
    clip: FrozenClip,
    classnames: Sequence[str] | None = None,
    separate_weights: bool | None = None,
    background: str = BACKGROUND,
) -> Path:
    """Write a solution as one ONNX graph from images to logits, and ``predict_onnx.py`` beside it.

    Input ``pixels``: float32 [N, 3, H, W], any N, preprocessed. Output ``logits``: float32 [N, C]. Class embeddings and
    image maps are constants of the graph; the text tower is left out. The logits contain logit scale, bias and
    temperature: their softmax gives the probabilities of ``mergetune predict``, and so does their sigmoid for
    ``--activation sigmoid``, which SigLIP models allow. The file's metadata holds, as JSON, the class names, the scale
    and the preprocessing; ``predict_onnx.py`` reads them with numpy, Pillow and onnxruntime alone, and decodes pictures
    as ``mergetune predict`` does. Before the file
    takes its place, onnxruntime runs it on random pixels, and the logits must be those of the solution to 1e-3.

    Args:
        solution: a solution of any kind that takes image features.
        file: path that ends in .onnx. An existing file is replaced, and so is mergetune's ``predict_onnx.py`` in its
            folder.
        clip: the CLIP that the solution was made for, in float32 on the CPU.
        classnames: C names, of any classes that the solution serves; None takes the classes of the solution.
        separate_weights: write the weights into a second file, ``FILE.data``, which must stay beside the first. None
            does so from 1 GiB of weights on, because one ONNX file holds at most 2 GB.
        background: colour under transparent pixels, a name or "#rrggbb": the one that the features were cached with.

    Returns:
        The path of the file.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: another file ending, missing class names, another CLIP, one in half precision, or another program
            called ``predict_onnx.py`` in the folder.
        RuntimeError: the image tower cannot be exported, or the file gives other logits; nothing is written.

    Example:
        >>> import mergetune as mt, os, tempfile
        >>> clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
        >>> file = os.path.join(tempfile.mkdtemp(), "animals.onnx")
        >>> mt.to_onnx(mt.Templates(("an icon of a {}",)), file, clip=clip, classnames=["cat", "dog"]).name
        'animals.onnx'
        >>> sorted(os.listdir(os.path.dirname(file)))
        ['animals.onnx', 'predict_onnx.py']
    """
    file = checked_file(file, "onnx")
    predictor = (files("mergetune") / "assets" / PREDICTOR).read_bytes()
    _refuse_another_program(file.parent / PREDICTOR, predictor)
    require_packages("onnx")
    background_colour(background)  # refuses a colour that does not exist
    program, names = traced(clip, solution, classnames)
    facts = facts_of(clip, solution, names, background)
    made = _onnx_program(program, clip.name)
    for node in made.model.graph:
        node.metadata_props.clear()  # names the files of this machine
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])
    made.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    size = sum(value.const_value.nbytes for value in made.model.graph.initializers.values())
    apart = size > ONE_FILE if separate_weights is None else separate_weights
    with _staged(file) as part:
        made.save(part, external_data=apart)
        if _installed("onnxruntime"):
            check_logits(_onnx_runner(part), clip, solution, names, "ONNX file")
        else:
            warnings.warn(
                f"{file.name} was written but not run: `pip install onnxruntime` lets mergetune check it", stacklevel=2
            )
        write_atomically(file.parent / PREDICTOR, predictor)
    return file


def to_torch_export(
    solution: Solution,
    file: str | Path,
    *,
    clip: FrozenClip,
    classnames: Sequence[str] | None = None,
    background: str = BACKGROUND,
) -> Path:
    """Write a solution as one program of torch.export from images to logits, for torch without mergetune and open_clip.

    ``torch.export.load(file).module()(pixels)`` gives the logits: float32 [N, 3, H, W] -> [N, C], any N. The graph is
    that of :func:`to_onnx`, and so are the facts about classes, scale and preprocessing, in the extra file
    "mergetune.json": ``torch.export.load(file, extra_files=extra)`` with ``extra = {"mergetune.json": ""}`` reads it.

    Args:
        solution: a solution of any kind that takes image features.
        file: path that ends in .pt2. An existing file is replaced.
        clip: the CLIP that the solution was made for, in float32 on the CPU.
        classnames: C names, of any classes that the solution serves; None takes the classes of the solution.
        background: colour under transparent pixels, for the facts.

    Returns:
        The path of the file.

    Raises:
        ValueError: another file ending, missing class names, another CLIP, or one in half precision.
        RuntimeError: the image tower cannot be exported, or the file gives other logits; nothing is written.

    Example:
        >>> import mergetune as mt, os, tempfile, torch
        >>> clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
        >>> file = os.path.join(tempfile.mkdtemp(), "animals.pt2")
        >>> _ = mt.to_torch_export(mt.Templates(), file, clip=clip, classnames=["cat", "dog"])
        >>> torch.export.load(file).module()(torch.zeros(5, 3, 48, 48)).shape  # [N, C]
        torch.Size([5, 2])
    """
    file = checked_file(file, "torch-export")
    background_colour(background)  # refuses a colour that does not exist
    program, names = traced(clip, solution, classnames)
    facts = facts_of(clip, solution, names, background)
    with _staged(file) as part:
        torch.export.save(program, part, extra_files={FACTS: json.dumps(facts)})
        check_logits(torch.export.load(part).module(), clip, solution, names, "program")
    return file


def checked_file(file: str | Path, form: str) -> Path:
    """The path of a file to write; raises ValueError for another ending than the form's, "onnx" or "torch-export"."""
    file, suffix = Path(file), {"onnx": ".onnx", "torch-export": ".pt2"}[form]
    if file.suffix != suffix:
        raise ValueError(f"file must end in {suffix}, got {file.name!r}")
    if file.is_dir():
        raise ValueError(f"file must be the path of a file, got the folder {file}")
    return file


def _refuse_another_program(place: Path, ours: bytes) -> None:
    """Refuses to replace a program of the same name that does not begin as ours does."""
    first = ours.split(b"\n", 1)[0]
    if os.path.lexists(place) and not (place.is_file() and read_regular(place).startswith(first)):
        raise ValueError(
            f"file must be in a folder without another {PREDICTOR}, which is written there, got {place}, which "
            "mergetune did not write: rename it or choose another folder"
        )


def require_packages(form: str) -> None:
    """Raise ImportError if a package is missing that writes the form."""
    missing = [name for name in WRITERS if not _installed(name)] if form == "onnx" else []
    if missing:
        raise ImportError(
            f"an ONNX file is written by the packages {' and '.join(WRITERS)}, and {' and '.join(missing)} is not "
            "installed: pip install 'mergetune[onnx]'"
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def _staged(file: Path) -> Iterator[Path]:
    """A path in an empty folder beside the file; what is written there takes its place at the end, if nothing fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing_to(file), naming_full_disk(file), scratch_folder(file) as folder:
        part = folder / file.name
        yield part
        for made in sorted(folder.iterdir(), key=lambda path: path == part):  # the graph last, after its weights
            os.replace(made, file.parent / made.name)


def _onnx_program(program: ExportedProgram, name: str) -> Any:
    """The program in torch's ONNX form. Messages of the exporter are kept for the error."""
    said = io.StringIO()
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                program, (), input_names=["pixels"], output_names=["logits"], dynamo=True, verbose=False
            )
    except Exception as error:  # the exporter raises many types of error
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(
            f"the image tower of {name} cannot be written as ONNX: {reason}. The form torch-export may work."
        ) from error
    finally:
        logger.setLevel(level)


def _onnx_runner(file: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
