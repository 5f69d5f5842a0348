"""`mergetune export` writes files for other tools; `mergetune convert` reads pickled modules of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.clip_choice import clip_for
from mergetune.cli.options import AllowTorchscript, BackboneIfNeeded, HeadName, Position, Precision, Pretrained
from mergetune.cli.running import suggest
from mergetune.cli.shared import (
    errors,
    read_names,
    read_solution,
    tell,
)
from mergetune.facts.function_options import BACKGROUND

SUFFIXES = {
    "classifier": (".pt", ".pth"),
    "head": (".safetensors", ".npz", ".pt", ".pth"),
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "open-clip": (".safetensors", ".pt", ".pth"),
    "clip-lora": (".pt", ".pth"),
    "peft": (),
    "peft-transformers": (),
    "coop": (),
    "hub": (),
}
"""Forms of an export -> endings of the file to write; none for a folder."""
MOST_LEFT_OUT = 8  # parts of a file that `mergetune convert` names one by one
GRAPHS = ("onnx", "torch-export")
ADAPTERS: dict[str, Any] = {
    "peft": "open_clip",
    "peft-transformers": "transformers",
}  # forms of PEFT -> names of the layers
OF_LORA = ("open-clip", "clip-lora", *ADAPTERS)  # forms without class names


def export(
    solution: Annotated[str, typer.Argument(help="Saved solution, CoOp checkpoint, head or classifier.")],
    form: Annotated[
        str,
        typer.Option(
            "--to",
            help="Format to write: classifier, head, onnx, torch-export, coop or hub; of a LoRA also open-clip, peft, "
            "peft-transformers or clip-lora.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder to write (coop, hub, peft), or file (.onnx, .pt2, .safetensors, .npz, .pt)."
        ),
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
    weight: HeadName = None,
    background: Annotated[
        str | None,
        typer.Option(help="onnx, torch-export: colour under transparent pixels, as in `mergetune predict`; white."),
    ] = None,
) -> None:
    """Write a solution for other programs.

    onnx and torch-export are one graph from images to logits, without mergetune and open_clip; beside an ONNX file
    stands a small predictor. classifier is open_clip's matrix, head a linear layer, coop a checkpoint of CoOp,
    and hub a folder for Hugging Face. Of a LoRA, open-clip is the whole model with its changes; peft, peft-transformers
    (names of CLIPModel) and clip-lora are the changes alone. The backbone is the one that the solution records, unless
    --backbone is given.
    """
    from mergetune import serving, solutions
    from mergetune.evaluation import classes_of

    with errors():
        _check_options(form, target, half=half, push=push, license=license, background=background)
        names = None if classes is None else read_names(classes)
        if form == "onnx":
            serving.require_packages(form)
        found = read_solution(solution, position=position, classnames=names, name=weight)
        if names is not None:
            classes_of(found, names)  # refuses names that a head does not know, before the model is loaded
        needs_clip = form != "hub" and not (form == "head" and found.plain_head() is not None)
        if form in ADAPTERS:
            needs_clip = bool(found.backbone)
        missing = []
        if needs_clip and not (backbone or found.backbone):
            missing.append("--backbone (the solution records none)")
        if form not in ("hub", *OF_LORA) and names is None and solutions.known_classes(found) is None:
            missing.append("--classnames (the solution serves any classes)")
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given to export the {found.kind} {solution} to {form}")
        if form in GRAPHS:
            serving.check_supported(found)
        clip: Any = None
        if needs_clip or backbone:
            clip = clip_for(
                backbone, pretrained, precision=precision, allow_torchscript=allow_torchscript,
                solutions={solution: found},
            )  # fmt: skip
        if form == "hub":
            metrics = solutions.recorded_metrics(solution)
            solutions.to_hub(found, target, license=license, metrics=metrics, **({"repo_id": push} if push else {}))
            if push:
                tell(solutions.push_to_hub(found, push, license=license, metrics=metrics))
        elif form == "head":
            solutions.to_head(found, target, clip=clip, classnames=names)
        elif form in ADAPTERS:
            solutions.to_peft(found, target, clip=clip, names=ADAPTERS[form])
        else:
            assert clip is not None  # needed by all other forms
            if form == "coop":
                dtype = "float16" if half else "float32"
                solutions.to_coop(found, target, clip=clip, classnames=names, dtype=dtype)
            elif form == "open-clip":
                solutions.to_open_clip(found, target, clip=clip)
            elif form == "clip-lora":
                solutions.to_clip_lora(found, target, clip=clip)
            elif form == "classifier":
                solutions.zero_shot_classifier(found, clip, names, file=target)
            else:
                write = serving.to_onnx if form == "onnx" else serving.to_torch_export
                write(found, target, clip=clip, classnames=names, background=background or BACKGROUND)
        if form not in (*GRAPHS, "open-clip"):
            _suggest_use(target, found.backbone if clip is None else clip.name)
    tell(f"{form}: {target}")
    if form == "onnx":
        tell(f"try: python {target.parent / serving.PREDICTOR} {target} PICTURE ...")


def _suggest_use(target: Path, backbone: str | None) -> None:
    """Suggests to classify pictures with an exported file; the backbone is named if the file does not record it."""
    from mergetune.facts.backbones import recorded_parts

    name = weights = None
    if backbone and not read_solution(str(target)).backbone:
        name, weights = recorded_parts(backbone)
    suggest("predict", target, "NEW_PICTURES", ("--backbone", name), ("--pretrained", weights))


def _check_options(
    form: str, target: Path, *, half: bool, push: str | None, license: str | None, background: str | None
) -> None:
    """Raises ValueError for what the options alone show to be wrong."""
    if form not in SUFFIXES:
        raise ValueError(f"--to must be {', '.join(list(SUFFIXES)[:-1])} or {list(SUFFIXES)[-1]}, got {form!r}")
    for option, given, owner in (("--half", half, "coop"), ("--push", push, "hub"), ("--license", license, "hub")):
        if given and form != owner:
            raise ValueError(f"{option} is an option of --to {owner}, got it with --to {form}: leave it out")
    if background is not None and form not in GRAPHS:
        owners = " or ".join(GRAPHS)
        raise ValueError(f"--background is an option of --to {owners}, got it with --to {form}: leave it out")
    suffixes = SUFFIXES[form]
    if suffixes and (target.suffix not in suffixes or target.is_dir()):
        what = "a folder" if target.is_dir() else f"{target.name!r}"
        raise ValueError(f"--out must be a file that ends in {' or '.join(suffixes)} for --to {form}, got {what}")
    if not suffixes and target.is_file():
        raise ValueError(f"--out must be a folder for --to {form}, got the file {target}")


def convert(
    file: Annotated[Path, typer.Argument(help="Pickled module, for example a classification head of WiSE-FT.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    only: Annotated[
        str | None, typer.Option(help="Convert only this submodule, for example classification_head.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also write optimiser states and other tensors that are no weights.")
    ] = False,
) -> None:
    """Write the tensors of a pickled module or checkpoint to a .safetensors file without running the pickle.

    The option --tuned of other commands reads the result. The names of the tensors are those of the model; with --only,
    those inside the submodule. What is not written is named.
    """
    from mergetune.io import convert_module

    with errors():
        done = convert_module(file, target, only=only, everything=everything)
    for part in done.left_out[:MOST_LEFT_OUT]:
        tell(f"left out: {part}")
    if len(done.left_out) > MOST_LEFT_OUT:
        tell(f"left out: {len(done.left_out) - MOST_LEFT_OUT:,} more; --all writes them, too")
    shown = f"{', '.join(done.names[:8])}{', ...' if len(done.names) > 8 else ''}"
    tell(f"{shown}: {target}")
    tell(f"read {len(done.names):,} tensor{'s' * (len(done.names) > 1)} with {done.numbers:,} numbers")
