"""The public face as text: names, signatures and defaults of the library, options of the commands.

    python docs/api.py            prints it
    python docs/api.py --write    writes docs/api.txt
    python docs/api.py --check    compares with docs/api.txt; exits with 1 if they differ, and says how

A name is public if it stands in the `__all__` of one of `PACKAGES`. Help texts are left out: they may change freely.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path, PurePath
from typing import Any

FILE = Path(__file__).with_name("api.txt")
PACKAGES = ("mergetune", *(f"mergetune.{name}" for name in ("clip", "data", "ops", "merging", "solutions")))
SPECIAL = ("__call__", "__getitem__", "__iter__", "__len__")  # methods that users call by other means
SEPARATOR = "\0"  # of parameters, until it is known whether they fit into a line
WIDTH = 120  # a longer signature has a line for each parameter, so that a change is a line
SHOWN = 20  # lines of a difference


def text() -> str:
    """The whole file."""
    known: dict[int, str] = {}
    parts = [list(describe(import_module(name), known)) for name in PACKAGES]
    (command,) = entry_points(group="console_scripts", name="mergetune")
    parts.append(list(describe_commands("mergetune", command.load())))
    return "\n".join("\n".join([*lines, ""]) for lines in parts if lines)


# -- the library ------------------------------------------------------------------------------------------------------


def describe(module: types.ModuleType, known: dict[int, str] | None = None) -> Iterator[str]:
    """The lines of a module: each name of its `__all__`, sorted; none if it has no `__all__`.

    Args:
        module: a public package.
        known: identity of objects -> the name that they are described under; another name of theirs refers to it.
    """
    known = {} if known is None else known
    for name in sorted(getattr(module, "__all__", ())):
        value, title = getattr(module, name), f"{module.__name__}.{name}"
        if callable(value) and id(value) in known:
            yield f"{title} is {known[id(value)]}"
            continue
        known[id(value)] = title
        yield from map(_wrapped, _lines(title, value))


def _wrapped(line: str) -> str:
    """A line whose parameters stand beside or, where they are too long, below each other."""
    beside = line.replace(SEPARATOR, ", ")
    if len(beside) <= WIDTH or SEPARATOR not in line:
        return beside
    indent = " " * (len(line) - len(line.lstrip()))
    head, _, rest = line.partition("(")
    inside, _, tail = rest.rpartition(")")
    rows = "".join(f"{indent}    {part}\n" for part in inside.split(SEPARATOR))
    return f"{head}(\n{rows}{indent}){tail}"


def _lines(title: str, value: Any) -> Iterator[str]:
    if isinstance(value, types.ModuleType):
        yield f"module {title}"
    elif inspect.isclass(value) and not isinstance(value, types.GenericAlias):
        yield from _class_lines(title, value)
    elif typing.get_origin(value) is not None or isinstance(value, types.UnionType):
        yield f"alias {title} = {_annotation(value)}"
    elif callable(value):
        yield f"function {title}{_signature(value)}"
    else:
        yield f"value {title}: {_type(value)}"


def _class_lines(title: str, value: type) -> Iterator[str]:
    made = "__dataclass_params__" in vars(value)  # a subclass may have a constructor of its own
    kind = "dataclass" if made else "class"
    bases = [base.__name__ for base in value.__bases__ if base is not object]
    yield f"{kind} {title}{_bases(bases)}"
    if made:
        for field in dataclasses.fields(value):
            if not field.name.startswith("_"):
                yield f"    field {field.name}: {_annotation(field.type)}{_field_default(field)}"
    elif "__init__" in vars(value):
        yield f"    __init__{_signature(value.__init__)}"
    members: dict[str, Any] = {}
    for base in reversed(value.__mro__):
        if base.__module__.split(".")[0] == value.__module__.split(".")[0]:
            members |= vars(base)
    for name in sorted(members):
        if name.startswith("_") and name not in SPECIAL:
            continue
        member = members[name]
        if isinstance(member, property) or hasattr(member, "func") and not callable(member):  # cached_property
            getter = member.fget if isinstance(member, property) else member.func
            yield f"    property {name}: {_annotation(inspect.signature(getter).return_annotation)}"
        elif isinstance(member, classmethod | staticmethod):
            yield f"    {type(member).__name__} {name}{_signature(getattr(value, name))}"
        elif inspect.isfunction(member):
            yield f"    method {name}{_signature(member)}"


def _bases(names: Sequence[str]) -> str:
    return f"({', '.join(names)})" if names else ""


def _field_default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {_value(field.default)}"
    return "" if field.default_factory is dataclasses.MISSING else " = <made anew>"


def _signature(function: Any) -> str:
    """A signature, whose annotations are as the source has them."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a built-in
        return "(...)"
    parts, kinds = [], inspect.Parameter
    last = None
    for parameter in signature.parameters.values():
        if last is kinds.POSITIONAL_ONLY and parameter.kind is not last:
            parts.append("/")
        if parameter.kind is kinds.KEYWORD_ONLY and last not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL):
            parts.append("*")
        last = parameter.kind
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        part = f"{stars}{parameter.name}"
        if parameter.annotation is not kinds.empty:
            part += f": {_annotation(parameter.annotation)}"
        if parameter.default is not kinds.empty:
            part += f" = {_value(parameter.default)}"
        parts.append(part)
    if last is kinds.POSITIONAL_ONLY:
        parts.append("/")
    returns = signature.return_annotation
    arrow = "" if returns is inspect.Signature.empty else f" -> {_annotation(returns)}"
    return f"({SEPARATOR.join(parts)}){arrow}"


def _annotation(annotation: Any) -> str:
    """An annotation as the source has it, or without the modules of its names."""
    if annotation is inspect.Signature.empty:
        return "?"
    if isinstance(annotation, str):
        return annotation
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation))


def _value(value: Any) -> str:
    """A default, the same on every machine and Python."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, PurePath):
        return f"Path({value.as_posix()!r})"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_value, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_value, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_value(k)}: {_value(v)}' for k, v in value.items())}}}"
    if hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    shown = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in shown else shown


def _type(value: Any) -> str:
    """The type of a constant; of texts and numbers what they are, of collections of names these names."""
    if value is None or isinstance(value, str | int | float):
        return f"{type(value).__name__} = {value!r}"
    names = list(value) if isinstance(value, Mapping | tuple | list) else []
    if names and all(isinstance(name, str) for name in names):
        return f"{type(value).__name__} of {', '.join(names)}"
    return type(value).__name__


# -- the commands -----------------------------------------------------------------------------------------------------


def describe_commands(title: str, app: Any) -> Iterator[str]:
    """The lines of a Typer application: each command with its arguments and options, in the order of `--help`.

    Words come from the parsed commands; types, bounds and defaults from the functions, as every Typer has them.
    """
    import typer

    group = typer.main.get_command(app)
    for info in app.registered_commands:
        name = info.name or info.callback.__name__.replace("_", "-")
        parameters = {parameter.name: parameter for parameter in getattr(group, "commands", {name: group})[name].params}
        yield f"command {title} {name}"
        for argument, parameter in inspect.signature(info.callback, eval_str=True).parameters.items():
            hint, extras = parameter.annotation, getattr(parameter.annotation, "__metadata__", ())
            if hint is typer.Context:  # no option: what the command knows of its call
                continue
            parsed = parameters[argument]
            is_option = parsed.param_type_name == "option"
            words = "/".join([*parsed.opts, *parsed.secondary_opts]) if is_option else argument.upper()
            bounds = [
                f" {sign} {getattr(extra, end)}"
                for extra in extras
                for end, sign in (("min", ">="), ("max", "<="))
                if getattr(extra, end, None) is not None
            ]
            kind = _annotation(typing.get_args(hint)[0] if extras else hint)
            default = ", required" if parsed.required else f" = {_value(parameter.default)}"
            yield f"    {words}: {kind}{''.join(bounds)}{default}"


# -- comparing --------------------------------------------------------------------------------------------------------


def check(now: str, file: Path) -> list[str]:
    """What to tell a person where `file` does not hold the text `now`; empty where it does."""
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    if before == now:
        return []
    lines = difflib.unified_diff(before.splitlines(), now.splitlines(), n=0, lineterm="")
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    rest = [f"... and {len(changed) - SHOWN} more lines"] if len(changed) > SHOWN else []
    todo = f"The public face is not that of {file.name}: run `python docs/api.py --write`, and note it in CHANGELOG.md."
    return [*changed[:SHOWN], *rest, todo]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The public face of mergetune as text.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"write docs/{FILE.name}")
    what.add_argument("--check", action="store_true", help=f"compare with docs/{FILE.name}")
    given = parser.parse_args(arguments)
    now = text()
    if given.check:
        told = check(now, FILE)
        sys.stderr.writelines(f"{line}\n" for line in told)
        return 1 if told else 0
    if given.write:
        FILE.write_text(now, encoding="utf-8")
    else:
        sys.stdout.write(now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
