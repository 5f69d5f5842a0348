"""Options that several commands have, options that are generated from data, and options that take several values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from mergetune.facts import FitOptions, Option, TuneOptions, options_of, read_options

Command = TypeVar("Command", bound=Callable[..., None])

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
Space = Annotated[str, typer.Option("--space", help="embedding or parameter.")]
Seeds = Annotated[list[int], typer.Option("--seeds")]
Tuning = Annotated[list[str], typer.Option("--tune", help="name=value, of mergetune.tune.")]
Fitting = Annotated[list[str], typer.Option("--fit", help="name=value, of mergetune.fit.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]

# Kind of an option's value -> type of the command's parameter. Lists are given as an option that is repeated.
_TYPES: dict[str, type] = {
    "int": int, "float": float, "bool": bool, "str": str, "strs": list[str], "float or floats": list[float],
    "str or floats": str,
}  # fmt: skip


def takes(options: type, *, but: Collection[str] = ()) -> Callable[[Command], Command]:
    """Decorator: one command-line option for each field of a dataclass of :mod:`mergetune.facts.function_options`.

    The options take the place of the command's ``**options``, which are keyword arguments of the function that the
    dataclass belongs to.

    Args:
        options: the dataclass.
        but: the options that the command writes down itself, or that it does not have.
    """

    def generate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        generated = [_parameter(option) for option in options_of(options) if option.name not in but]
        order = sorted([*own, *generated], key=lambda p: p.default is not p.empty)  # those without a default first
        vars(command)["__signature__"] = signature.replace(parameters=order)  # what typer reads
        return command

    return generate


def _parameter(option: Option) -> inspect.Parameter:
    kind, default = _TYPES[option.kind], option.default
    if kind in (list[str], list[float]):
        default = [] if default is None else [default]
    elif option.none:
        kind = kind | None
    names = ["--" + option.name.replace("_", "-")] if kind is bool else []  # the flag alone, without --no-...
    said = typer.Option(*names, help=option.help, min=option.least)
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(option.name, place, default=default, annotation=Annotated[kind, said])


def said(options: type, name: str) -> Any:
    """The command-line option of a field, for a command that writes the parameter down itself."""
    option = next(option for option in options_of(options) if option.name == name)
    return typer.Option(help=option.help, min=option.least)


def keywords(options: type, given: dict[str, Any]) -> dict[str, Any]:
    """What a command was given -> keyword arguments: one value for a list of one, None for an empty one."""
    found = dict(given)
    for option in options_of(options):
        if option.name in given and option.kind in ("strs", "float or floats"):
            values = list(given[option.name])
            found[option.name] = values if len(values) > 1 else values[0] if values else None
        elif option.name in given and option.kind == "str or floats":
            found |= read_options("the command", [option], [f"{option.name}={given[option.name]}"])
    return found


def read_tuning(given: list[str], *, but: Collection[str] = ()) -> dict[str, Any]:
    """``--tune name=value``, but for what has an option of the command."""
    found = read_options("mergetune.tune", options_of(TuneOptions), given)
    if taken := [name for name in found if name in but]:
        raise ValueError(f"--tune must not hold {taken[0]}: the command's own options say it")
    return found


def read_fitting(given: list[str]) -> dict[str, Any]:
    """``--fit name=value``."""
    return read_options("mergetune.fit", options_of(FitOptions), given)


class SeveralValues(TyperCommand):
    """Options that may be given several times take several values at once too: ``--seed 1 2 3``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # a context of click, which some typers bring along
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread, current = [], None
        for arg in args:
            if arg.startswith("-"):
                current = arg if arg in several else None
            elif current is not None and spread[-1] != current:
                spread.append(current)
            spread.append(arg)
        return super().parse_args(ctx, spread)
