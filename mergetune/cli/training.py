"""`mergetune tune` and `mergetune fit`: stage 1 and stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.options import (
    AllowTorchscript,
    Backbone,
    Cache,
    Classes,
    Device,
    Json,
    Lam,
    MaxPixels,
    Position,
    Pretrained,
    Root,
    Shots,
    Space,
    Templates,
    Workers,
)
from mergetune.cli.shared import (
    announce,
    errors,
    finish,
    first_rank,
    new_table,
    open_cache,
    open_images,
    out,
    print_json,
    read_solution,
    tell,
)
from mergetune.data import MAX_PIXELS


def tune(
    features: Cache,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the solution and its report.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    method: Annotated[str, typer.Option(help="coop, kgcoop or head.")] = "coop",
    classes: Classes = "all",
    shots: Shots = None,
    template: Annotated[str, typer.Option(help="Text with {} for the class name.")] = "a photo of a {}.",
    n_ctx: Annotated[int | None, typer.Option(min=1, help="Random start with so many context tokens.")] = None,
    epochs: int = 50,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 1,
    as_json: Json = False,
) -> None:
    """Stage 1: fine-tune a prompt (CoOp, KgCoOp) or a linear head on cached features."""
    import mergetune as mt

    with errors():
        clip = mt.load_clip(backbone, pretrained, device=device, allow_torchscript=allow_torchscript)
        data = open_cache(features, classes, shots=shots, seed=seed)
        result = mt.tune(
            clip, data, method=method, template=template, n_ctx=n_ctx, epochs=epochs, batch_size=batch_size, lr=lr,
            seed=seed, resume=folder,
        )  # fmt: skip
        result.save(folder)
    _finish(as_json, result, folder)


def fit(
    backbone: Backbone,
    images: Annotated[
        Path | None,
        typer.Argument(help="Folder of class folders, or a .csv/.json list: the whole way, in one command."),
    ] = None,
    features: Annotated[Path | None, typer.Option("--cache", help="Instead of images: a feature cache.")] = None,
    tuned: Annotated[
        list[str],
        typer.Option(
            "--tuned",
            help="Saved solution or CoOp checkpoint; several for several anchors. "
            "With images none is needed: stage 1 makes it.",
        ),
    ] = [],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the solution and its report; out/NAME OF THE IMAGES.")
    ] = None,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    classes: Classes = "all",
    shots: Shots = None,
    template: Templates = ["a photo of a {}."],
    position: Position = "end",
    method: Annotated[str, typer.Option(help="Stage 1 on images: coop, kgcoop or head.")] = "coop",
    lam: Lam = 8.0,
    beta: Annotated[list[float], typer.Option(help="Weight of the path to each --tuned.")] = [0.5],
    tau: Annotated[float, typer.Option(help="Start: 0 at zero-shot, 1 at the fine-tuned solution.")] = 0.3,
    points: Annotated[int, typer.Option(help="Points on each path.")] = 5,
    grid: Annotated[str, typer.Option(help="even, official or random.")] = "even",
    surrogate: Annotated[str, typer.Option(help="identity, fisher, cosine or l2.")] = "identity",
    space: Space = "embedding",
    epochs: Annotated[int, typer.Option(help="Of stage 1 too, where it is run.")] = 50,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 1,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="On a GPU: capture a step, replay it.")] = False,
    root: Root = None,
    workers: Workers = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    as_json: Json = False,
) -> None:
    """Stage 2, MERGETUNE: on a feature cache, or on a folder of images with everything before and after it.

    mergetune fit photos/ --backbone ViT-B-32 --pretrained laion2b_s34b_b79k --shots 16

    caches the images, fine-tunes, repairs, tests, and leaves solution, report and figure. Killed, the same command goes
    on from its last epoch.
    """
    import mergetune as mt

    options = {
        "lam": lam, "beta": beta if len(beta) > 1 else beta[0], "tau": tau, "points": points, "grid": grid,
        "surrogate": surrogate, "space": space, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "cuda_graph": cuda_graph,
    }  # fmt: skip
    with errors():
        if (images is None) == (features is None):
            raise ValueError(f"give a folder of images or --cache, one of them, got {images} and {features}")
        if images is None and not (tuned and folder):
            raise ValueError("--tuned and --out are needed with --cache")
        folder = folder or Path("out") / (images.resolve().stem if images else "")
        data = open_images(images, root) if images else open_cache(features, classes, shots=shots, seed=seed)
        clip = mt.load_clip(backbone, pretrained, device=device, allow_torchscript=allow_torchscript)
        learned = data.base_novel()[0] if images and classes == "base" else data
        solutions = [read_solution(path, learned, position) for path in tuned]
        if images is None:
            result = mt.fit(clip, data, solutions, zero_shot=template, seed=seed, resume=folder, **options)
            result.save(folder)
        else:
            found = mt.fit_dataset(
                clip, data, folder, tuned=solutions, method=method, classes=classes, shots=shots,
                template=template[0] if len(template) == 1 else template, seed=seed, tune_options={"epochs": epochs},
                fit_options=options, cache_options={"workers": workers, "max_pixels": max_pixels},
                report=announce(as_json),
            )  # fmt: skip
    if images is None:
        _finish(as_json, result, folder)
    elif not first_rank():
        return
    elif as_json:
        print_json(found.to_json())
    else:
        _print_reports(found.reports, folder)


def _finish(as_json: bool, result: Any, folder: Path) -> None:
    record = {"settings": result.settings, "history": result.history, "timings": result.timings}
    finish(as_json, record, f"solution in {folder}", {"train": result.history[-1]})


def _print_reports(reports: dict[str, Any], folder: Path) -> None:
    """A row for each solution, a column for each set of classes that it was tested on."""
    table = new_table("accuracy on test images (%)", *reports)
    for name in next(iter(reports.values())):
        style = "bold" if name == "MERGETUNE" else None
        table.add_row(name, *(f"{report[name].accuracy:.2f}" for report in reports.values()), style=style)
    out.print(table)
    tell(f"Solution, report.json, paths.png: {folder}")
