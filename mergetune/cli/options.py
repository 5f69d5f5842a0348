"""Options shared by several commands, options generated from dataclasses, and options that take several values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from mergetune.cli.shared import errors
from mergetune.facts import FitOptions, Option, TuneOptions, options_of, read_options
from mergetune.facts.backbones import spelled

Command = TypeVar("Command", bound=Callable[..., None])


def _check_names(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Checks --backbone and --pretrained before anything heavy is imported, as soon as both have been read."""
    names = {**context.params, str(parameter.name): value}
    backbone, complete = names.get("backbone"), {"backbone", "pretrained"} <= names.keys()
    if backbone is not None and complete and not context.resilient_parsing:
        with errors():
            spelled(backbone, names["pretrained"], options=("--backbone", "--pretrained"))
    return value


def _check_device(context: typer.Context, value: str) -> str:
    """Checks --device before images, caches or a model are opened; the default needs no check."""
    if value != "cpu" and not context.resilient_parsing:
        with errors():
            from mergetune.clip.loading import check_device

            check_device(value)
    return value


def _check_templates(context: typer.Context, value: list[str]) -> list[str]:
    """Checks --template before anything is opened."""
    if not context.resilient_parsing:
        with errors():
            from mergetune.clip import check_templates

            check_templates(value)
    return value


_MODEL = 'Model: a name that `mergetune models` lists, "hf-hub:org/repo" or "local-dir:path"; icon-clip is embedded.'
_BACKBONE = typer.Option("--backbone", help=_MODEL, callback=_check_names)
_BACKBONE_IF_NEEDED = typer.Option(
    "--backbone", help=f"{_MODEL} Default: the one that a cache or a solution records.", callback=_check_names
)
_CACHE = typer.Option(
    "--cache",
    help="Feature cache: a folder train, val or test that `mergetune cache` wrote, or the folder of these, of which "
    "training commands take train, and measuring commands test.",
)

# Models and data.
Backbone = Annotated[str, _BACKBONE]
BackboneIfNeeded = Annotated[str | None, _BACKBONE_IF_NEEDED]
Pretrained = Annotated[
    str | None,
    typer.Option("--pretrained", help="Weights: an open_clip tag or a local checkpoint.", callback=_check_names),
]
Precision = Annotated[
    str,
    typer.Option("--precision", help="Precision in which the model computes: float32, bfloat16 or float16."),
]
Device = Annotated[
    str,
    typer.Option("--device", help="Device of the model, for example cpu, cuda or cuda:1.", callback=_check_device),
]
Cache = Annotated[Path, _CACHE]
CacheIfNeeded = Annotated[Path | None, _CACHE]
Classes = Annotated[
    str, typer.Option("--classes", help="Classes to use: all, base or novel (the two halves of the class list).")
]
Shots = Annotated[
    int | None, typer.Option("--shots", min=1, help="Training images per class; all images if not given.")
]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root",
        help="Folder of benchmark datasets in CoOp's layout; IMAGES is then a dataset name such as dtd. "
        "For a list: the folder of its images.",
    ),
]
CLASSNAMES_HELP = (
    "Names of the classes: a text file with one name per line in the order of the classes, or with a folder (or label) "
    "and its name per line; or .json {folder: name}. Default: the names of the folders."
)
ClassNames = Annotated[Path | None, typer.Option("--classnames", help=CLASSNAMES_HELP)]
ValShare = Annotated[
    float | None,
    typer.Option(
        "--val-share", min=0, max=1, help="Share of each class for validation if IMAGES is not split. Default: 0.2."
    ),
]
TestShare = Annotated[
    float | None,
    typer.Option("--test-share", min=0, max=1, help="Share of each class for testing if not split. Default: 0.3."),
]
SplitSeed = Annotated[int | None, typer.Option("--split-seed", min=0, help="Seed of this split. Default: 0.")]
Workers = Annotated[
    int,
    typer.Option("--workers", min=0, help="Number of processes that decode images; 0 decodes in the main process."),
]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=1, help="Largest allowed width times height of an image.")]
Background = Annotated[
    str,
    typer.Option("--background", help="Colour under transparent pixels: a name such as black, or #rrggbb."),
]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read. Same as --on-error skip.")
]
AllowTorchscript = Annotated[
    bool,
    typer.Option(
        "--allow-torchscript",
        help="Load weights by running a TorchScript archive if nothing else reads it. The archive is a program: "
        "trust its source.",
    ),
]
Templates = Annotated[
    list[str],
    typer.Option(
        "--template",
        help="Zero-shot template; {} stands for the class name. Several are averaged.",
        callback=_check_templates,
    ),
]
Position = Annotated[
    str,
    typer.Option(
        "--position",
        help="Place of the class name in a CoOp checkpoint (CLASS_TOKEN_POSITION): end, middle or front.",
    ),
]
HeadName = Annotated[
    str | None,
    typer.Option("--name", help="Name of the weight in the file of a head that holds several matrices."),
]
HeadClassNames = Annotated[
    Path | None,
    typer.Option(
        "--classnames",
        help="Class names of heads whose files name none: a text file with one name per line, in the order of the rows "
        "or of the label numbers. Default: the order of the cache, with a warning.",
    ),
]

# Settings and output.
Space = Annotated[
    str,
    typer.Option(
        "--space", help="What a path interpolates: class embeddings (embedding) or trained parameters (parameter)."
    ),
]
Seeds = Annotated[list[int], typer.Option("--seeds", help="Seeds of the runs, one run per seed: --seeds 1 2 3.")]
Tuning = Annotated[
    list[str], typer.Option("--tune", help="Option of mergetune.tune as name=value; repeat for several.")
]
Fitting = Annotated[list[str], typer.Option("--fit", help="Option of mergetune.fit as name=value; repeat for several.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the run in OUT itself; OUT/run-2-... and other files stay. With images their caches are rebuilt.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

# Kind of an option's value -> type of the command's parameter. A list is given by repeating the option.
_TYPES: dict[str, type] = {
    "int": int, "float": float, "bool": bool, "str": str, "strs": list[str], "float or floats": list[float],
    "str or floats": str,
}  # fmt: skip


def takes(options: type, *, but: Collection[str] = ()) -> Callable[[Command], Command]:
    """Returns a decorator that gives a command one option per field of a dataclass of ``function_options``.

    The generated options replace ``**options`` in the command's signature. The command receives their values in
    ``**options``.

    Args:
        options: the dataclass, see :mod:`mergetune.facts.function_options`.
        but: names of fields without a generated option: the command defines them itself or omits them.
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
        default = [] if default is None else list(default) if isinstance(default, tuple) else [default]
    elif option.none:
        kind = kind | None
    names = ["--" + option.name.replace("_", "-")] if kind is bool else []  # the flag alone, without --no-...
    said = typer.Option(*names, help=option.help, min=option.least)
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(option.name, place, default=default, annotation=Annotated[kind, said])


def said(options: type, name: str) -> Any:
    """Returns the Typer option of one field, for a command that defines the parameter itself."""
    option = next(option for option in options_of(options) if option.name == name)
    return typer.Option(help=option.help, min=option.least)


def keywords(options: type, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that a command received as keyword arguments of the function.

    A list with one element becomes that element, an empty list becomes None, and texts of kind "str or floats" are
    parsed.
    """
    found = dict(given)
    for option in options_of(options):
        if option.name in given and option.kind in ("strs", "float or floats"):
            values = list(given[option.name])
            found[option.name] = values if len(values) > 1 else values[0] if values else None
        elif option.name in given and option.kind == "str or floats":
            found |= read_options("the command", [option], [f"{option.name}={given[option.name]}"])
    return found


def read_tuning(given: list[str], *, but: Collection[str] = ()) -> dict[str, Any]:
    """Returns the keyword arguments in ``--tune name=value``.

    Args:
        given: texts ``name=value``.
        but: names that the command sets through an option; they are refused in ``--tune``.
    """
    found = read_options("mergetune.tune", options_of(TuneOptions), given)
    if taken := [name for name in found if name in but]:
        name = taken[0]
        raise ValueError(f"--tune must not hold {name}, got {found[name]!r}: use --{name.replace('_', '-')} instead")
    return found


def read_fitting(given: list[str]) -> dict[str, Any]:
    """Returns the keyword arguments in ``--fit name=value``."""
    return read_options("mergetune.fit", options_of(FitOptions), given)


class SeveralValues(TyperCommand):
    """A command whose repeatable options also take several values at once: ``--seeds 1 2 3``."""

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
