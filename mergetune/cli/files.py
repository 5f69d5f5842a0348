"""`mergetune export` writes files for other tools; `mergetune convert` reads pickled modules of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.options import AllowTorchscript, BackboneIfNeeded, Position, Precision, Pretrained
from mergetune.cli.shared import clip_for, errors, tell


def export(
    solution: Annotated[str, typer.Argument(help="Saved solution, CoOp checkpoint or head.")],
    form: Annotated[str, typer.Option("--to", help="Format to write: coop, head, classifier or hub.")],
    target: Annotated[
        Path, typer.Option("--out", help="Folder to write (coop, hub), or file (.safetensors, .npz, .pt).")
    ],
    backbone: BackboneIfNeeded = None,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    precision: Precision = "float32",
    classes: Annotated[
        Path | None, typer.Option("--classnames", help="Text file with one class name per line.")
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="coop: write float16, as CoOp does with its precision fp16.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="hub: also upload the folder to this repository, written as name/repository.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="hub: license named on the model card, for example mit.")] = None,
    position: Position = "end",
) -> None:
    """Write a solution as a CoOp checkpoint, a head, a zero-shot classifier or a Hugging Face folder."""
    from mergetune import solutions
    from mergetune.io import read_regular_text
    from mergetune.solutions import open_solution

    with errors():
        if form not in ("coop", "head", "classifier", "hub"):
            raise ValueError(f"--to must be coop, head, classifier or hub, got {form!r}")
        names = None
        if classes is not None:
            names = [line.strip() for line in read_regular_text(classes).split("\n") if line.strip()]
        found = open_solution(solution, classnames=names, position=position)
        plain = form == "hub" or (form == "head" and found.plain_head() is not None)  # these need no CLIP
        clip: Any = None
        if backbone or not plain:
            clip = clip_for(
                backbone,
                pretrained,
                precision=precision,
                allow_torchscript=allow_torchscript,
                solutions={solution: found},
            )
        if form == "hub":
            solutions.to_hub(found, target, license=license, **({"repo_id": push} if push else {}))
            if push:
                tell(solutions.push_to_hub(found, push, license=license))
        elif form == "head":
            solutions.to_head(found, target, clip=clip, classnames=names)
        elif form == "classifier":
            solutions.zero_shot_classifier(found, clip, names, file=target)
        else:
            solutions.to_coop(found, target, clip=clip, classnames=names, dtype="float16" if half else "float32")
    tell(f"{form}: {target}")


def convert(
    file: Annotated[Path, typer.Argument(help="Pickled module, for example a classification head of WiSE-FT.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    only: Annotated[
        str | None, typer.Option(help="Convert only this submodule, for example classification_head.")
    ] = None,
) -> None:
    """Write the tensors of a pickled module to a .safetensors file without running the pickle.

    The option --tuned of other commands reads the result.
    """
    from mergetune.io import convert_module

    with errors():
        names = convert_module(file, target, only=only)
    tell(f"{', '.join(names)}: {target}")
