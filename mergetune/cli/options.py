"""Options that several commands have, as types of their parameters, and options that take several values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperCommand

_BACKBONE = typer.Option("--backbone", help='open_clip model name, "hf-hub:org/repo" or "local-dir:path".')
_CACHE = typer.Option("--cache", help="Feature cache, as `mergetune cache` makes it.")

# What is worked on.
Backbone = Annotated[str, _BACKBONE]
BackboneIfNeeded = Annotated[str | None, _BACKBONE]
Pretrained = Annotated[str | None, typer.Option("--pretrained", help="open_clip tag or a local checkpoint.")]
Device = Annotated[str, typer.Option("--device", help="Where the model runs.")]
Cache = Annotated[Path, _CACHE]
CacheIfNeeded = Annotated[Path | None, _CACHE]
Classes = Annotated[str, typer.Option("--classes", help="all, or the base or novel half of the sorted class names.")]
Shots = Annotated[int | None, typer.Option("--shots", min=1, help="Images a class; all if not given.")]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Of benchmark datasets in CoOp's layout: the images are then one's name, as dtd."),
]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that decode images.")]
MaxPixels = Annotated[
    int, typer.Option("--max-pixels", min=1, help="Largest width times height of an image that is decoded.")
]
AllowTorchscript = Annotated[
    bool,
    typer.Option(
        "--allow-torchscript", help="Run a TorchScript archive whose weights cannot be read otherwise: it is a program."
    ),
]
Templates = Annotated[list[str], typer.Option("--template", help="Zero-shot text with {}; several are ensembled.")]
Position = Annotated[
    str, typer.Option("--position", help="Class name in CoOp checkpoints (CLASS_TOKEN_POSITION): end, middle or front.")
]

# How.
Lam = Annotated[float, typer.Option("--lam", help="Weight of the zero-shot surrogate.")]
Space = Annotated[str, typer.Option("--space", help="embedding or parameter.")]
Seeds = Annotated[list[int], typer.Option("--seeds")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]


class SeveralValues(TyperCommand):
    """Options that may be given several times take several values at once too: ``--seed 1 2 3``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread, current = [], None
        for arg in args:
            if arg.startswith("-"):
                current = arg if arg in several else None
            elif current is not None and spread[-1] != current:
                spread.append(current)
            spread.append(arg)
        return super().parse_args(ctx, spread)
