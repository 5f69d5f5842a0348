"""`mergetune merge` merges trained solutions; `mergetune compare` compares such merges with MERGETUNE."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from mergetune.cli.clip_choice import clip_for
from mergetune.cli.options import (
    AllowTorchscript,
    BackboneIfNeeded,
    CacheIfNeeded,
    Classes,
    Device,
    Fitting,
    HeadClassNames,
    HeadName,
    Json,
    Overwrite,
    Precision,
    Pretrained,
    Seeds,
    Templates,
    Tuning,
    read_fitting,
    read_tuning,
    said,
)
from mergetune.cli.running import suggest
from mergetune.cli.shared import (
    announce,
    errors,
    names_of_rows,
    open_cache,
    out,
    print_json,
    print_table,
    read_solution,
    suggest_use,
    tell,
)
from mergetune.facts import CompareOptions
from mergetune.facts.function_options import MERGETUNE_GRID, TABLE_PRECISION
from mergetune.merging.methods import METHODS, Method, find


def merge(
    method: Annotated[
        str | None, typer.Argument(help="Merging method; `mergetune merge --list` shows all of them.")
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to merge: saved solutions, CoOp checkpoints and files of heads, which are merged by class name; "
            "or weights of models and adapters: files, indices of sharded checkpoints (*.index.json) and folders."
        ),
    ] = None,
    out_path: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the merged solution, or .safetensors file for merged weights. Weights from folders may go "
            "to a folder, with the settings of the first; a merged head may go to a file: .safetensors, .npz, .pt, "
            ".pth.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base of the task vectors: a zero-shot template with {}, a saved solution or weights. "
            'Solutions default to "a photo of a {}." where the method needs a base. '
            "LoRA adapters need none; for IA3 adapters use ones."
        ),
    ] = None,
    option: Annotated[
        list[str], typer.Option("-o", "--option", help="Option of the method as name=value; repeat for several.")
    ] = [],
    missing: Annotated[
        str,
        typer.Option(
            help="With weights: what happens to tensors that not every model has in the same shape: refuse, base (keep "
            "those of the base, or of the first model) or drop (leave them out)."
        ),
    ] = "refuse",
    ema: Annotated[
        bool, typer.Option("--ema", help="With weights: take the moving averages from checkpoints that hold both.")
    ] = False,
    lora: Annotated[
        str | None,
        typer.Option(
            help="With LoRA adapters: factors (merge A and B, as PEFT's linear, ties and dare), svd (merge the "
            "products) or cat (join A and B). Default: factors for task_arithmetic, ties and dare, else svd."
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="With --lora svd: rank of the result; the largest rank if not given.")
    ] = None,
    backbone: BackboneIfNeeded = None,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    precision: Precision = "float32",
    weight: HeadName = None,
    names: HeadClassNames = None,
    features: CacheIfNeeded = None,
    classes: Classes = "all",
    shots: Annotated[
        int | None, typer.Option(help="With --cache: images per class to draw; all images if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --shots: seed of the draw.")] = 1,
    listing: Annotated[
        bool,
        typer.Option(
            "--list",
            help="Show all methods, or the one named, with requirements, suitable inputs, source and options.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge trained solutions, or state dicts in files, with TIES, DARE, WiSE-FT or another method.

    mergetune merge ties coop-1 coop-2 kgcoop --out merged --base "a photo of a {}." -o density=0.3
    """
    if listing:
        with errors():
            _print_methods([find(method)] if method else list(METHODS.values()), as_json)
        return

    from mergetune import experiments
    from mergetune.io import require_output_folder
    from mergetune.merging import catalogue
    from mergetune.solutions import to_head, zero_shot_like
    from mergetune.solutions.exports import HEAD_SUFFIXES

    with errors():
        if not (method and experts and out_path):
            raise ValueError("give a method, at least one solution or file, and --out; --list shows the methods")
        _refuse_input(out_path, [*experts, *([] if base is None else [base])])
        options = catalogue.parse_options(method, option)
        weights = {"missing": missing, "ema": ema, "lora": lora, "lora_rank": lora_rank}
        files = [_is_weights(path, out_path) for path in experts]
        if any(files) and not all(files):
            raise ValueError(f"experts must be all solutions or all weights, got {', '.join(experts)}")
        if all(files):
            if features is not None:
                raise ValueError(f"--cache must not be given with weights, got {features}: leave it out")
            catalogue.merge_files(method, base, experts, out_path, options, **weights)
            notes: dict[str, Any] = {"merged": find(method).name, "base": base, "experts": experts}
        else:
            unused = {"missing": "refuse", "ema": False, "lora": None, "lora_rank": None}
            if given := [name for name in weights if weights[name] != unused[name]]:
                raise ValueError(f"--{given[0].replace('_', '-')} must not be given with solutions: it is for weights")
            if out_path.suffix not in HEAD_SUFFIXES:
                require_output_folder(out_path)
            data = None if features is None else open_cache(features, classes, shots=shots, seed=seed)
            opened = partial(read_solution, features=data, classnames=names_of_rows(names), name=weight)
            solutions = [opened(path) for path in experts]
            _check_place(out_path, solutions[0])
            start: Any = None
            if base is not None and "{}" not in base:
                start = opened(base)
            needed = start is None and (base or catalogue.needs_base(method, len(solutions), options))
            clip: Any = None
            if backbone or needed or data is not None:
                used = dict(zip(experts, solutions, strict=True)) | ({} if start is None else {str(base): start})
                clip = clip_for(
                    backbone, pretrained, device=device, precision=precision, allow_torchscript=allow_torchscript,
                    caches=[] if data is None else [data], solutions=used, only_heads=not needed,
                )  # fmt: skip
            if needed:
                start = zero_shot_like(clip, solutions[0], base or "a photo of a {}.")
            merged = experiments.merge_solutions(
                method, solutions, base=start, clip=clip, features=data, options=options, names=experts
            )
            if out_path.suffix in HEAD_SUFFIXES:
                to_head(merged, out_path)
            else:
                merged.save(out_path)
            suggest_use(out_path, features, classes)
            notes = merged.notes | {"base": base, "experts": experts}
    if as_json:
        print_json(notes | {"out": str(out_path)})
    else:
        tell(f"{notes['merged']} of {len(experts)}: {out_path}")


def _is_weights(path: str, out_path: Path) -> bool:
    """Whether an input of a merge is weights of a model or adapter, and no solution: the rows of heads have names."""
    from mergetune.merging import catalogue
    from mergetune.solutions.head_files import is_head

    if (Path(path) / "solution.json").is_file():
        return False
    return (out_path.suffix == ".safetensors" or catalogue.is_weights(path)) and not is_head(path)


def _check_place(out_path: Path, first: Any) -> None:
    """Raises ValueError if the ending of --out promises a file in which a merged solution is not written."""
    from mergetune.merging.stream import UNWRITTEN
    from mergetune.solutions.exports import HEAD_SUFFIXES

    if out_path.suffix in HEAD_SUFFIXES and first.plain_head() is not None:
        if out_path.is_dir():
            raise ValueError(f"--out must be the path of a file, got the folder {out_path}")
        return
    if out_path.suffix in (*HEAD_SUFFIXES, *UNWRITTEN):
        what = f"{', '.join(HEAD_SUFFIXES)} or a folder" if first.plain_head() is not None else "a folder"
        raise ValueError(f"--out must be {what} for a merged {first.kind}, got {out_path}")


def _refuse_input(out_path: Path, inputs: list[str]) -> None:
    """Raises ValueError if an input would be replaced: the same command could not be run again."""
    target = out_path.resolve()
    for given in inputs:
        place = Path(given).resolve()
        inside = target.exists() and target.parent == place
        around = place.suffix == ".safetensors" and place.is_file() and target == place.parent
        if place.exists() and (target == place or inside and target.is_file() or around):
            raise ValueError(f"--out must not replace an input, got {out_path}, where {given} is: choose another place")


def _print_methods(methods: list[Method], as_json: bool) -> None:
    """Prints the methods; for a single method also the help of each option."""
    if as_json:
        fields = ("name", "title", "needs", "meaningful", "source")
        print_json([{f: getattr(method, f) for f in fields} | {"options": method.shown()} for method in methods])
        return
    for method in methods:
        shown = method.shown()
        options = ", ".join(f"{name}={default}" for name, default in shown.items())
        out.print(f"[bold]{method.name}[/] {escape(method.title)}, {method.source}", highlight=False)
        needs = f"needs: {method.needs}\nfor: {method.meaningful}"
        if len(methods) > 1 or not shown:
            needs += f"\noptions: {options or 'none'}"
        out.print(Padding(escape(needs), (0, 0, 0, 4)), highlight=False)
    (first, *others) = methods
    if first.options and not others:
        shown, table = first.shown(), Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for option in first.options:
            choices = f" One of {', '.join([*option.choices, *(['none'] * option.none)])}." if option.choices else ""
            table.add_row(f"{option.name}={shown[option.name]}", escape(option.help + choices))
        out.print(Padding(table, (0, 0, 0, 4)), highlight=False)


def compare(
    caches: Annotated[
        list[Path] | None,
        typer.Argument(help="One folder per dataset, with caches train and test (and val) of all classes."),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for cells, table and figure; finished cells in it are used again.")
    ] = Path("out/compare"),
    embedded: Annotated[bool, typer.Option("--demo", help="Use the embedded CLIP and icons.")] = False,
    backbone: BackboneIfNeeded = None,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    precision: Precision = "float32",
    experts: Annotated[
        list[str],
        typer.Option(
            "--expert",
            help="Solution to merge: METHOD:NUMBER trains one (coop:1, coop:2, kgcoop:1), heads (head:1, head:2) with "
            "heads only; or a saved solution.",
        ),
    ] = ["coop:1", "coop:2", "coop:3", "kgcoop:1"],
    partitions: Annotated[
        list[int],
        typer.Option("--partition", min=0, help="Split into base and novel classes: 0 is CoOp's, others are random."),
    ] = [0],
    all_classes: Annotated[
        bool, typer.Option("--all-classes", help="Train and test on all classes, without base and novel ones.")
    ] = False,
    seeds: Seeds = [1, 2, 3],
    shots: Annotated[int, said(CompareOptions, "shots")] = 16,
    template: Templates = ["a photo of a {}."],
    tuning: Tuning = [],
    fitting: Fitting = [],
    lam: Annotated[list[float], typer.Option(help="Values of lam to try for MERGETUNE.")] = list(MERGETUNE_GRID["lam"]),
    tau: Annotated[list[float], typer.Option(help="Values of tau to try for MERGETUNE.")] = list(MERGETUNE_GRID["tau"]),
    choose: Annotated[str, said(CompareOptions, "choose")] = CompareOptions.choose,
    select: Annotated[str, said(CompareOptions, "select")] = CompareOptions.select,
    reference: Annotated[
        str, typer.Option(help="Row of the table with which all rows are compared.")
    ] = "MERGETUNE, chosen [1]",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare zero-shot CLIP, tuned solutions, every merge, ensembles and MERGETUNE on the same cells.

    A cell is one dataset, partition and seed. Hyper-parameters are chosen on validation images, never on test images.
    If the command is interrupted, run it again: it continues where it stopped.
    """
    from mergetune import experiments
    from mergetune.experiments import compare as run_comparison
    from mergetune.experiments import comparison, icons_task
    from mergetune.experiments.cells import check_seeds
    from mergetune.training import run_title

    with errors(), ExitStack() as held:
        check_seeds(seeds)
        exact = {"precision": TABLE_PRECISION}
        tune, fit = exact | read_tuning(tuning), exact | read_fitting(fitting)
        trained = [":" in expert and not Path(expert).exists() for expert in experts]
        if any(trained) and not all(trained):
            raise ValueError(
                f"--expert must be METHOD:NUMBER each time or a saved solution each time, got {', '.join(experts)}"
            )
        setup = CompareOptions(
            experts=tuple(experts) if all(trained) else ("coop:1",),  # saved ones are put in their place below
            shots=shots, tune=tune, fit=fit, grid={"lam": tuple(lam), "tau": tuple(tau)}, choose=choose,
            select=select,
        )  # fmt: skip
        if embedded and not caches and not backbone:
            from mergetune.experiments import icons

            if precision != "float32":
                raise ValueError(f"--precision cannot be used with --demo, got {precision}: leave it out")
            clip, tasks = icons_task(folder, report=announce(as_json))
            setup = replace(setup, tune=icons.STAGE_1 | tune)
        elif caches and not embedded:
            clip, tasks = None, [_task(cache, template) for cache in caches]
        else:
            raise ValueError("give folders of caches, or --demo without caches and --backbone")
        saved = {} if all(trained) else {path: read_solution(path, tasks[0].train, way_on="") for path in experts}
        if clip is None:
            clip = clip_for(
                backbone, pretrained, device=device, precision=precision, allow_torchscript=allow_torchscript,
                caches=[cache for task in tasks for cache in (task.train, task.val, task.test) if cache is not None],
                solutions=saved,
            )  # fmt: skip
        if saved:
            setup = replace(setup, experts={path: expert.for_clip(clip) for path, expert in saved.items()})
        wanted = (None,) if all_classes else tuple(partitions)
        heads = comparison.heads(clip, tasks, setup, wanted, seeds)
        folder = experiments.cells_folder(folder, heads, overwrite=overwrite, held=held)
        found = run_comparison(
            clip, tasks, folder, setup=setup, partitions=wanted,
            seeds=tuple(seeds), reference=reference, report=announce(as_json),
        )  # fmt: skip
        found.save(folder)
    if as_json:
        print_json(found.to_json())
        return
    suggest("runs", folder)
    _print_comparison(found)
    said = f"{found.caption()} ± is the standard error over classes, brackets hold the 95 % interval over classes. "
    tell(f"{said}More columns and the figure: {run_title(folder)}")
    for method, why in found.left_out.items():
        announce(as_json)(f"left out: {method}: {why}")


def _task(caches: Path, templates: list[str]) -> Any:
    """Returns the task of one dataset from the folder that `mergetune cache` wrote."""
    import mergetune as mt
    from mergetune.experiments import Task

    train, test = mt.FeatureCache.open(caches / "train"), mt.FeatureCache.open(caches / "test")
    val = mt.FeatureCache.open(caches / "val") if (caches / "val").is_dir() else None
    return Task(caches.resolve().name, train, test, val, tuple(templates))


def _print_comparison(found: Any) -> None:
    """Prints one row per method: every measure, and the difference to the reference in the main measure."""
    rows = []
    for line in found.lines:
        cells = {column: f"{value:.1f} ± {line.errors[column]:.1f}" for column, value in line.values.items()}
        difference = line.differences.get(found.main)
        about = "{:+.1f} ({:+.1f} to {:+.1f})".format(difference.mean, *difference.classes) if difference else ""
        cells[f"{found.main} difference"] = about
        rows.append((line.row, cells, "bold" if line.row.startswith("MERGETUNE") else None))
    print_table("", rows)
