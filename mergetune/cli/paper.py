"""`mergetune reproduce` runs the paper's experiments."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.options import (
    AllowTorchscript,
    Backbone,
    Device,
    Fitting,
    Json,
    MaxPixels,
    Overwrite,
    Pretrained,
    Seeds,
    Tuning,
    Workers,
    read_fitting,
    read_tuning,
    said,
)
from mergetune.cli.shared import errors, first_rank, new_table, out, print_json, print_table, tell
from mergetune.facts import FitOptions
from mergetune.facts.function_options import BETA, MAX_PIXELS


def reproduce(
    protocol: Annotated[
        str, typer.Argument(help="Experiment: base-to-novel, cross-dataset, domain, few-shot or robust.")
    ],
    root: Annotated[Path, typer.Option("--root", help="Folder of the datasets in CoOp's layout (DATASETS.md).")],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for results, caches and solutions; finished runs are used again.")
    ],
    backbone: Backbone,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    datasets: Annotated[
        list[str], typer.Option("--datasets", help="Use only these datasets, by CoOp's names; all if not given.")
    ] = [],
    methods: Annotated[
        list[str],
        typer.Option("--method", help="Method of stage 1: coop, kgcoop or head. Default: coop; head for robust."),
    ] = [],
    seeds: Seeds = [1, 2, 3],
    shots: Annotated[
        list[int],
        typer.Option(
            "--shots",
            help="Training images per class. Default: 16; 1, 2, 4, 8 and 16 for few-shot; all images for robust.",
        ),
    ] = [],
    templates: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot templates: coop, kgcoop, official, clip-ensemble or coop-ensemble. "
            "Default: official; clip-ensemble for robust."
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            help="Read stage 1 from this path instead of training; {dataset}, {method}, {shots} and {seed} are "
            "filled in."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Epochs of stage 1 and stage 2. Default: the published number for stage 1, and 50 for stage 2."
        ),
    ] = None,
    views: Annotated[
        int, typer.Option(min=1, help="Views per training image; all but the first are cropped and flipped at random.")
    ] = 1,
    precision: Annotated[
        str, typer.Option(help="Precision of the text tower: float32, bfloat16 or auto (the faster one here).")
    ] = "float32",
    lam: Annotated[float, said(FitOptions, "lam")] = FitOptions.lam,
    beta: Annotated[float, said(FitOptions, "beta")] = BETA,
    tau: Annotated[
        float | None,
        typer.Option(
            help="Where stage 2 starts: 0 is zero-shot, 1 is the fine-tuned solution. Default: 0.3; 1 where stage 1 "
            "starts from random tokens."
        ),
    ] = None,
    tuning: Tuning = [],
    fitting: Fitting = [],
    workers: Workers = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Number of processes that work on runs at the same time.")
    ] = 1,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the work and estimate its time.")] = False,
    as_json: Json = False,
) -> None:
    """Run an experiment of the paper, from images to table and figure.

    If the command is interrupted, run it again: it continues where it stopped. Repeatable options take several values
    at once: --seeds 1 2 3. Under torchrun the ranks share the work.
    """
    import mergetune as mt
    from mergetune import experiments
    from mergetune.experiments import protocols
    from mergetune.training import run_title

    with errors(), ExitStack() as held:
        runs = experiments.plan(protocol, datasets=datasets, methods=methods, seeds=seeds, shots=shots)
        both = {"precision": precision} | ({} if epochs is None else {"epochs": epochs})
        start = {} if tau is None else {"tau": tau}
        usual = "clip-ensemble" if protocol == "robust" else "official"  # as WiSE-FT has it, and the official code
        experiment = experiments.Experiment(
            root=root, out=folder, templates=templates or usual, checkpoints=checkpoints,
            tune=both | read_tuning(tuning), fit=both | {"lam": lam, "beta": beta} | start | read_fitting(fitting),
            cache={"workers": workers, "max_pixels": max_pixels}, views=views,
        )  # fmt: skip
        experiments.check_data(runs, root)  # before the model is loaded
        load = partial(mt.load_clip, backbone, pretrained, device=device, allow_torchscript=allow_torchscript)
        if dry_run:
            _print_forecast(experiments.forecast(runs, experiment, load()), as_json)
            return
        clip = load()
        heads = {run.folder / protocols.RECORD: protocols.head_of(run, experiment, clip) for run in runs}
        folder = experiments.cells_folder(folder, heads, overwrite=overwrite, held=held)
        experiment = replace(experiment, runs=folder)
        records = experiments.reproduce(runs, experiment, load, clip=clip, processes=processes)
        if not first_rank():
            return
        lines = experiments.save_table(records, folder / protocol)
    if as_json:
        print_json([line.to_json() for line in lines])
        return
    _print_lines(lines)
    tell(experiments.caption(records))
    tell(f"Table, figure and runs: {protocol} of {run_title(folder)}")


def _print_lines(lines: list[Any]) -> None:
    """Prints the table; below a row, the paper's values with the difference in brackets."""
    rows = []
    for line in lines:
        style = "bold" if line.row == "MERGETUNE" else None
        shown = {column: line.show(column) for column in line.values}
        rows.append((f"{line.dataset}, {line.method}, {line.row}", shown, style))
        if line.published:
            apart = {c: f"{p:.2f} ({line.values[c] - p:+.2f})" for c, p in line.published.items()}
            rows.append(("  published, eleven datasets", apart, "dim"))
    print_table("dataset, stage 1, solution", rows)


def _print_forecast(found: Any, as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
        return
    table = new_table("cache", "images to encode")
    for name, images in found.images.items():
        table.add_row(name, str(images) if images else "none: cached")
    out.print(table)
    minutes = lambda seconds: f"{seconds / 60:.1f} min"  # noqa: E731
    tell(
        f"{found.runs} runs, {found.finished} of them finished. Encoding takes about "
        f"{minutes(found.seconds_encoding)} and training about {minutes(found.seconds_training)} on this machine, "
        "one run at a time."
    )
