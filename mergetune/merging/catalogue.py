"""Merging methods by name: reading their options from text, and applying them to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetune import merging
from mergetune.facts import Kind, read_options
from mergetune.merging.methods import find
from mergetune.merging.plans import facts_of, plan_of
from mergetune.merging.stream import write_merged
from mergetune.merging.weight_files import FOLDER_WEIGHTS, INDEX, open_weights

AVERAGES = ("average", "metrics_average", "fisher_average")  # for solutions, a base is one of the averaged models


# -- options from text -------------------------------------------------------------------------------------------------


def parse_options(method: str, given: Sequence[str]) -> dict[str, Any]:
    """Parses the options of a method: ``["scale=0.3", "weights=1,2"]`` -> ``{"scale": 0.3, "weights": [1.0, 2.0]}``.

    Values are numbers, text, or lists with commas; "none" stands for None. State dicts are given as safetensors files
    (``fishers=a.safetensors,b.safetensors``). ``evolve`` takes the name of a method,
    ``space=density:0.1:1,weights:0:1:2`` and ``start=density:1,weights:0.5:0.5``.

    Raises:
        ValueError: a text without ``=``, an option that the method does not have, or a value of another kind; the
            message lists the options of the method.
    """
    facts = find(method)
    options = read_options(facts.name, facts.options, given, _KINDS)
    if "method" in options:
        options["method"] = find(options["method"]).load()
    return options


_KINDS = {
    "states": Kind(
        "safetensors files with commas between", lambda text: [open_weights(file) for file in text.split(",")]
    ),
    "method": Kind("a merging method", str),
}


# -- files -------------------------------------------------------------------------------------------------------------


def merge_files(
    method: str,
    base: str | Path | None,
    experts: Sequence[str | Path],
    out: str | Path,
    options: Mapping[str, Any],
    **more: Any,
) -> None:
    """Merges files or folders of weights into a safetensors file, or into a folder like that of the first input.

    The files are read and written in pieces if the method works tensor by tensor; otherwise they are held in memory.

    Args:
        method: name of a method, see :func:`mergetune.merging.methods.find`.
        base: a file; "zeros", or "ones" for IA3 vectors, which are relative to such a base; or None. LoRA adapters need
            none.
        experts: files or folders to merge.
        out: file or folder to write.
        options: keyword arguments of the method.
        more: ``missing``, ``ema``, ``lora`` and ``lora_rank`` of :func:`mergetune.merging.merge_files`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the method needs images and a model, or refuses these files.
    """
    facts = find(method)
    if needed := facts.missing(options):
        why = f"-o {needed[0]}=..."
        if needed[0] in facts.from_images and facts.option(needed[0]).kind == "object":
            why = "images and a model, which files of weights do not have: merge solutions, with --cache"
        elif facts.option(needed[0]).kind == "object":
            why = f"{needed[0]}, which cannot be given as text: call mergetune.merging from Python"
        raise ValueError(f"{facts.name} needs {why} ({facts.needs})")
    function = facts.load()
    start = {"zeros": 0.0, "ones": 1.0}.get(base, base) if isinstance(base, str) else base
    if plan_of(function):
        merging.merge_files(function, start, experts, out, **more, **options)
        return
    if given := [name for name in ("lora", "lora_rank") if more.get(name) is not None]:
        raise ValueError(f"{given[0]} must be None for {facts.name}, which merges the factors of LoRA in its own way")
    kept = {name: more[name] for name in ("missing", "ema") if name in more}
    write_merged(function, start, experts, out, options, **kept)


def is_weights(path: str | Path) -> bool:
    """Whether a path names weights of a model or adapter, and not a solution or a file that a solution is read from."""
    path = Path(path)
    if path.is_dir():
        named = ("open_clip_config.json", "adapter_config.json", *FOLDER_WEIGHTS)
        return any((path / name).is_file() for name in named) and not (path / "solution.json").exists()
    return path.name.endswith((".safetensors", INDEX))


def needs_base(method: str, experts: int, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a method needs a base for this number of experts; the options matter for ``evolve`` only."""
    facts = find(method)
    if facts.name == "evolve" and options and "method" in options:
        facts = facts_of(options["method"])
    elif facts.name == "evolve":
        facts = find(facts.option("method").default)
    return bool(facts.base) or (facts.base is None and experts < 2)
