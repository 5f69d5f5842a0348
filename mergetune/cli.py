"""The commands, thin over the API. Exit codes: 0 done, 1 something failed, 2 a wrong argument or input."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from typer.core import TyperCommand

app = typer.Typer(
    help="Give a fine-tuned CLIP its zero-shot ability back (MERGETUNE, arXiv 2601.10497).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)

BACKBONE = typer.Option("--backbone", help='open_clip model name, "hf-hub:org/repo" or "local-dir:path".')
PRETRAINED = typer.Option("--pretrained", help="open_clip tag or a local checkpoint.")
DEVICE = typer.Option("--device", help="Where the model runs.")
JSON = typer.Option("--json", help="Print the result as JSON, for machines.")
CACHE = typer.Option("--cache", help="Feature cache, as `mergetune cache` makes it.")
SOLUTION = typer.Option("--solution", help="Folder of a saved solution.")
SPLIT = typer.Option("--classes", help="all, or the base or novel half of the sorted class names.")
TEMPLATES = "Zero-shot text with {}; several are ensembled."
Backbone = Annotated[str, BACKBONE]
Pretrained = Annotated[str | None, PRETRAINED]
Device = Annotated[str, DEVICE]
Json = Annotated[bool, JSON]
Position = Annotated[
    str, typer.Option("--position", help="Class name in CoOp checkpoints (CLASS_TOKEN_POSITION): end, middle or front.")
]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Of benchmark datasets in CoOp's layout: the images are then one's name, as dtd."),
]


@contextmanager
def _errors() -> Iterator[None]:
    """Errors as one line: 2 for what the user can mend in the call, 1 for the rest."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
    except (RuntimeError, FloatingPointError, OSError) as error:
        err.print(f"[bold red]failed:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where images, caches, solutions and results go.")] = Path(
        "out/demo"
    ),
    seeds: Annotated[list[int], typer.Option("--seed", help="May be given several times.")] = [1, 2, 3],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Fine-tune and repair the embedded CLIP on the embedded icons: table and figure in about a minute."""
    from mergetune.demo import run_demo

    with _errors():
        result = run_demo(folder, seeds=seeds, report=_say(as_json))
    if as_json:
        _print_json(result.to_json())
        return
    table = _table("", "base", "novel", "HM")
    table.title = f"Accuracy on tilted icons, mean ± deviation over {len(seeds)} seeds (%)"
    for row in result.rows:
        style = "bold" if row.name == "MERGETUNE" else None
        cells = [
            f"{v:.1f} ± {s:.1f}"
            for v, s in ((row.base, row.base_std), (row.novel, row.novel_std), (row.hm, row.hm_std))
        ]
        table.add_row(row.name, *cells, style=style)
    out.print(table)
    out.print(
        f"Standard error from the number of test images: {result.rows[0].base_error:.1f} (base), "
        f"{result.rows[0].novel_error:.1f} (novel). Figure: {result.figure}. Everything: {folder / 'results.json'}.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, the backends built, and a self-test of each op. Fails if an op is wrong."""
    import open_clip
    import torch

    from mergetune import __version__, ops

    build = ops.build_info()
    report: dict[str, Any] = {
        "mergetune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native core": build,
        "backends": list(ops.available_backends()),
        "self-test": ops.self_test(),
    }
    healthy = all(error < 1e-9 for error in report["self-test"].values())
    if as_json:
        _print_json(report | {"healthy": healthy})
    else:
        table = Table(show_header=False, box=None)
        for name, value in report.items():
            if name == "self-test":
                value = ", ".join(f"{op} {'ok' if e < 1e-9 else 'WRONG'} ({e:.1e})" for op, e in value.items())
            elif isinstance(value, dict):
                value = ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
            table.add_row(name, _plain(value))
        out.print(table)
    raise typer.Exit(0 if healthy else 1)


@app.command()
def cache(
    images: Annotated[Path, typer.Argument(help="Folder of class folders, a .csv/.json list; with --root a name.")],
    folder: Annotated[Path, typer.Option("--out", help="The caches: one folder each for train, val and test.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    views: Annotated[int, typer.Option(help="Views of each image; all but the first are augmented.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    root: Root = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    skip_unreadable: Annotated[bool, typer.Option(help="Leave unreadable images out instead of stopping.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Rebuild a cache of other images or another model.")] = False,
    as_json: Json = False,
) -> None:
    """Encode images once. Interrupted, the same command goes on; under torchrun the ranks share the work."""
    import mergetune as mt

    with _errors():
        data = _read_images(images, root)
        clip = mt.load_clip(backbone, pretrained, device=device)
        report = {}
        for split in ("train", "val", "test"):
            if getattr(data, f"full_{split}") is None:
                continue
            made = mt.cache_features(
                clip,
                getattr(data, split),
                folder / split,
                dtype=dtype,
                views=views if split == "train" else 1,
                batch_size=batch_size,
                workers=workers,
                on_error="skip" if skip_unreadable else "raise",
                overwrite=overwrite,
            )
            report[split] = {"images": len(made), "classes": len(made.classnames), "skipped": len(made.skipped)}
    _finish(as_json, report, f"feature caches in {folder}", report)


@app.command()
def tune(
    features: Annotated[Path, CACHE],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the solution and its report.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    method: Annotated[str, typer.Option(help="coop, kgcoop or head.")] = "coop",
    classes: Annotated[str, SPLIT] = "all",
    shots: Annotated[int | None, typer.Option(min=1, help="Images a class; all if not given.")] = None,
    template: Annotated[str, typer.Option(help="Text with {} for the class name.")] = "a photo of a {}.",
    n_ctx: Annotated[int | None, typer.Option(min=1, help="Random start with so many context tokens.")] = None,
    epochs: Annotated[int, typer.Option()] = 50,
    batch_size: Annotated[int, typer.Option()] = 32,
    lr: Annotated[float, typer.Option()] = 2e-3,
    seed: Annotated[int, typer.Option()] = 1,
    as_json: Json = False,
) -> None:
    """Stage 1: fine-tune a prompt (CoOp, KgCoOp) or a linear head on cached features."""
    import mergetune as mt

    with _errors():
        clip = mt.load_clip(backbone, pretrained, device=device)
        data = _open(features, classes, shots=shots, seed=seed)
        result = mt.tune(
            clip, data, method=method, template=template, n_ctx=n_ctx, epochs=epochs, batch_size=batch_size, lr=lr,
            seed=seed, resume=folder,
        )  # fmt: skip
        result.save(folder)
    _finish(as_json, _record(result), f"solution in {folder}", {"train": result.history[-1]})


@app.command()
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
            help="Saved solution or CoOp checkpoint; several for several anchors. With images none "
            "is needed: stage 1 makes it.",
        ),
    ] = [],  # noqa: B006
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the solution and its report; out/NAME OF THE IMAGES.")
    ] = None,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    classes: Annotated[str, SPLIT] = "all",
    shots: Annotated[int | None, typer.Option(min=1, help="Images a class; all if not given.")] = None,
    template: Annotated[list[str], typer.Option(help=TEMPLATES)] = ["a photo of a {}."],  # noqa: B006
    position: Position = "end",
    method: Annotated[str, typer.Option(help="Stage 1 on images: coop, kgcoop or head.")] = "coop",
    lam: Annotated[float, typer.Option(help="Weight of the zero-shot surrogate.")] = 8.0,
    beta: Annotated[list[float], typer.Option(help="Weight of the path to each --tuned.")] = [0.5],  # noqa: B006
    tau: Annotated[float, typer.Option(help="Start: 0 at zero-shot, 1 at the fine-tuned solution.")] = 0.3,
    points: Annotated[int, typer.Option(help="Points on each path.")] = 5,
    grid: Annotated[str, typer.Option(help="even, official or random.")] = "even",
    surrogate: Annotated[str, typer.Option(help="identity, fisher, cosine or l2.")] = "identity",
    space: Annotated[str, typer.Option(help="embedding or parameter.")] = "embedding",
    epochs: Annotated[int, typer.Option(help="Of stage 1 too, where it is run.")] = 50,
    batch_size: Annotated[int, typer.Option()] = 128,
    lr: Annotated[float, typer.Option()] = 2e-3,
    seed: Annotated[int, typer.Option()] = 1,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="On a GPU: capture a step, replay it.")] = False,
    root: Root = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
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
    with _errors():
        if (images is None) == (features is None):
            raise ValueError(f"give a folder of images or --cache, one of them, got {images} and {features}")
        if images is None and not (tuned and folder):
            raise ValueError("--tuned and --out are needed with --cache")
        folder = folder or Path("out") / (images.resolve().stem if images else "")
        data = _read_images(images, root) if images else _open(features, classes, shots=shots, seed=seed)
        clip = mt.load_clip(backbone, pretrained, device=device)
        learned = data.base_novel()[0] if images and classes == "base" else data
        solutions = [_solution(path, learned, position) for path in tuned]
        if images is None:
            result = mt.fit(clip, data, solutions, zero_shot=template, seed=seed, resume=folder, **options)
            result.save(folder)
        else:
            found = mt.fit_dataset(
                clip, data, folder, tuned=solutions, method=method, classes=classes, shots=shots,
                template=template[0] if len(template) == 1 else template, seed=seed, tune_options={"epochs": epochs},
                fit_options=options, cache_options={"workers": workers}, report=_say(as_json),
            )  # fmt: skip
    if images is None:
        _finish(as_json, _record(result), f"solution in {folder}", {"train": result.history[-1]})
    elif os.environ.get("RANK", "0") != "0":
        return
    elif as_json:
        _print_json(found.to_json())
    else:
        table = _table("accuracy on test images (%)", *found.reports)
        for name in next(iter(found.reports.values())):
            style = "bold" if name == "MERGETUNE" else None
            table.add_row(name, *(f"{reports[name].accuracy:.2f}" for reports in found.reports.values()), style=style)
        out.print(table)
        out.print(f"Solution, report.json, paths.png: {folder}", highlight=False, soft_wrap=True, markup=False)


@app.command("eval")
def evaluate(
    features: Annotated[Path, CACHE],
    backbone: Backbone,
    solution: Annotated[list[str], SOLUTION] = [],  # noqa: B006
    pretrained: Pretrained = None,
    device: Device = "cpu",
    classes: Annotated[str, SPLIT] = "all",
    base_novel: Annotated[bool, typer.Option("--base-novel", help="Base and novel classes apart, and HM.")] = False,
    template: Annotated[list[str], typer.Option(help=TEMPLATES)] = ["a photo of a {}."],  # noqa: B006
    position: Position = "end",
    as_json: Json = False,
) -> None:
    """Accuracy of zero-shot and of saved solutions on cached test features."""
    import mergetune as mt

    with _errors():
        clip = mt.load_clip(backbone, pretrained, device=device)
        entries = {"zero-shot": mt.classifier(clip, template)}
        known = _open(features, "base" if base_novel else classes)
        entries |= {name: mt.classifier(clip, _solution(name, known, position)) for name in solution}
        report: dict[str, Any] = {}
        if base_novel:
            base, novel = _open(features, "base"), _open(features, "novel")
            for name, classify in entries.items():
                found = mt.base_to_novel(classify, base, novel)
                report[name] = {"base": found.base.to_json(), "novel": found.novel.to_json(), "hm": found.hm}
        else:
            test = _open(features, classes)
            report = {
                name: mt.accuracy(classify(test.classnames), test).to_json() for name, classify in entries.items()
            }
    if as_json:
        _print_json(report)
        return
    table = _table("", "base", "novel", "HM") if base_novel else _table("", "accuracy", "mean of classes", "images")
    for name, found in report.items():
        if base_novel:
            cells = [found["base"]["accuracy"], found["novel"]["accuracy"], found["hm"]]
            table.add_row(escape(name), *(f"{cell:.2f}" for cell in cells))
        else:
            table.add_row(
                escape(name), f"{found['accuracy']:.2f}", f"{found['mean_per_class']:.2f}", str(found["images"])
            )
    out.print(table)


@app.command()
def path(
    features: Annotated[Path, CACHE],
    tuned: Annotated[str, typer.Option("--tuned", help="Fine-tuned solution or CoOp checkpoint.")],
    solution: Annotated[str, SOLUTION],
    backbone: Backbone,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    classes: Annotated[str, SPLIT] = "all",
    template: Annotated[str, typer.Option(help="Zero-shot text with {}.")] = "a photo of a {}.",
    points: Annotated[int, typer.Option(min=2)] = 21,
    space: Annotated[str, typer.Option(help="embedding or parameter.")] = "embedding",
    figure: Annotated[Path, typer.Option(help="Where the figure goes: .png, .pdf or .svg.")] = Path("paths.png"),
    plane: Annotated[
        Path | None, typer.Option(help="Also a figure of the plane through the three: .png, .pdf or .svg.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also paths, plane and curvature as one HTML file.")] = None,
    curvature: Annotated[
        int, typer.Option(min=0, help="Of the report: points on each path where the Hessian is looked at; 0 for none.")
    ] = 5,
    position: Position = "end",
    as_json: Json = False,
) -> None:
    """Loss, accuracy and barriers on the paths between zero-shot, fine-tuned and merged solution, with a figure."""
    import mergetune as mt
    from mergetune import geometry
    from mergetune.solutions import zero_shot_like

    with _errors():
        if curvature == 1:
            raise ValueError("curvature must be 0, or at least 2 points with both ends of a path, got 1")
        clip = mt.load_clip(backbone, pretrained, device=device)
        data = _open(features, classes)
        merged, start = _solution(solution, data, position), _solution(tuned, data, position)
        zero_shot = zero_shot_like(clip, merged, template)
        walks = mt.connectivity(clip, zero_shot, start, merged, data, points=points, space=space)
        images, way = f"{classes} classes", {"zero-shot": zero_shot, "MERGETUNE": merged, "fine-tuned": start}
        mt.plot({images: walks}, figure)
        found = {name: walk.to_json() for name, walk in walks.items()}
        planes, spectra = {}, {}
        if plane or report:
            three = {name: way[name] for name in ("zero-shot", "fine-tuned", "MERGETUNE")}
            try:
                planes[images] = geometry.plane(clip, three, data, space=space)
                found["plane"] = planes[images].to_json()
            except ValueError as error:  # a weight average lies on the line of the other two
                if plane:
                    raise
                _say(as_json)(f"the report goes without the plane: {error}")
        if plane:
            geometry.plot_plane(planes, plane)
        if report and curvature:
            spectra[images] = geometry.spectrum(clip, way, data, points=curvature, space=space)
            found["curvature"] = spectra[images].to_json()
        if report:
            settings = {
                "backbone": clip.name, "cache": features, "images": len(data), "classes": len(data.classnames),
                "fine-tuned": tuned, "MERGETUNE": solution, "template": template, "space": space,
            }  # fmt: skip
            geometry.report(report, {images: walks}, planes=planes, spectra=spectra, settings=settings)
    if as_json:
        _print_json(found)
        return
    table = _table("", "loss at start", "highest", "at end", "barrier")
    for name, walk in walks.items():
        table.add_row(name, *(f"{v:.4f}" for v in (walk.loss[0], max(walk.loss), walk.loss[-1], walk.barrier)))
    out.print(table)
    for name, file in (("Figure", figure), ("Plane", plane), ("Report", report)):
        if file:
            out.print(f"{name}: {file}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def export(
    solution: Annotated[str, typer.Argument(help="Saved solution, CoOp checkpoint or head.")],
    form: Annotated[str, typer.Option("--to", help="coop, head, classifier or hub.")],
    target: Annotated[Path, typer.Option("--out", help="Folder (coop, hub) or file (.safetensors, .npz, .pt).")],
    backbone: Annotated[str | None, BACKBONE] = None,
    pretrained: Pretrained = None,
    classes: Annotated[Path | None, typer.Option("--classnames", help="Text file, one class name a line.")] = None,
    half: Annotated[bool, typer.Option("--half", help="coop: float16, as CoOp's own precision fp16.")] = False,
    push: Annotated[str | None, typer.Option(help="hub: upload too, to this repository: name/repository.")] = None,
    license: Annotated[str | None, typer.Option(help="hub: the card's, as mit.")] = None,
    position: Position = "end",
) -> None:
    """Write a solution for other tools: CoOp's checkpoint, a head, a zero-shot classifier, a Hugging Face folder."""
    import mergetune as mt
    from mergetune import exports
    from mergetune.solutions import open_solution

    with _errors():
        if form not in ("coop", "head", "classifier", "hub"):
            raise ValueError(f"--to must be coop, head, classifier or hub, got {form!r}")
        names = None if classes is None else classes.read_text(encoding="utf-8").split("\n")
        names = None if names is None else [name.strip() for name in names if name.strip()]
        found = open_solution(solution, classnames=names, position=position)
        clip = mt.load_clip(backbone, pretrained) if backbone else None
        if clip is None and (form in ("coop", "classifier") or (form == "head" and found.kind == "prompt")):
            raise ValueError(f"--backbone is needed for {form}: it encodes the class names")
        if form == "coop":
            exports.to_coop(found, target, clip=clip, classnames=names, dtype="float16" if half else "float32")
        elif form == "head":
            exports.to_head(found, target, clip=clip, classnames=names)
        elif form == "classifier":
            exports.zero_shot_classifier(found, clip, names, file=target)
        else:
            exports.to_hub(found, target, license=license, **({"repo_id": push} if push else {}))
            if push:
                out.print(exports.push_to_hub(found, push, license=license), highlight=False, markup=False)
    out.print(f"{form}: {target}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A pickled module, as WiSE-FT's classification head.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    only: Annotated[str | None, typer.Option(help="A part of it: classification_head.")] = None,
) -> None:
    """The tensors of a pickled module as .safetensors, without running the pickle. `--tuned` reads the result."""
    from mergetune.pickles import convert_module

    with _errors():
        names = convert_module(file, target, only=only)
    out.print(f"{', '.join(names)}: {target}", highlight=False, soft_wrap=True, markup=False)


class _Lists(TyperCommand):
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


@app.command(cls=_Lists)
def reproduce(
    protocol: Annotated[str, typer.Argument(help="base-to-novel, cross-dataset, domain, few-shot or robust.")],
    root: Annotated[Path, typer.Option("--root", help="The datasets' folders, in CoOp's layout (DATASETS.md).")],
    folder: Annotated[Path, typer.Option("--out", help="Results, caches and solutions. What is there is used again.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    datasets: Annotated[list[str], typer.Option("--datasets", help="Some only, by CoOp's names.")] = [],  # noqa: B006
    methods: Annotated[list[str], typer.Option("--method", help="coop, kgcoop, head.")] = [],  # noqa: B006
    seeds: Annotated[list[int], typer.Option("--seeds")] = [1, 2, 3],  # noqa: B006
    shots: Annotated[list[int], typer.Option("--shots", help="Images a class.")] = [],  # noqa: B006
    templates: Annotated[
        str | None,
        typer.Option(
            help="coop, kgcoop, official, clip-ensemble or coop-ensemble. official; clip-ensemble for robust."
        ),
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Stage 1 from files: a path with {dataset}, {method}, {shots}, {seed} in it.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of both stages, instead of 50.")] = None,
    lam: Annotated[float, typer.Option(help="Weight of the zero-shot surrogate.")] = 8.0,
    beta: Annotated[float, typer.Option(help="Weight of the path to the tuned solution.")] = 0.5,
    tau: Annotated[float, typer.Option(help="Start: 0 at zero-shot, 1 at the tuned solution.")] = 0.3,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Runs at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and how long it takes.")] = False,
    as_json: Json = False,
) -> None:
    """An experiment of the paper, from images to table and figure. Interrupted, the same command goes on.

    Options that may be repeated take several values: --seeds 1 2 3. Under torchrun the ranks share the work.
    """
    import mergetune as mt
    from mergetune import protocols

    with _errors():
        runs = protocols.plan(protocol, datasets=datasets, methods=methods, seeds=seeds, shots=shots)
        both = {} if epochs is None else {"epochs": epochs}
        usual = "clip-ensemble" if protocol == "robust" else "official"  # as WiSE-FT has it, and the official code
        experiment = protocols.Experiment(
            root=root, out=folder, templates=templates or usual, checkpoints=checkpoints, tune=both,
            fit=both | {"lam": lam, "beta": beta, "tau": tau}, cache={"workers": workers},
        )  # fmt: skip
        protocols.check_data(runs, root)  # before the model is loaded
        load = partial(mt.load_clip, backbone, pretrained, device=device)
        if dry_run:
            found = protocols.forecast(runs, experiment, load())
            _forecast(found, as_json)
            return
        records = protocols.reproduce(runs, experiment, load, processes=processes)
        if os.environ.get("RANK", "0") != "0":
            return
        lines = protocols.save_table(records, folder / protocol)
    if as_json:
        _print_json([line.to_json() for line in lines])
        return
    columns = list(lines[0].values)
    table = _table("dataset, stage 1, solution", *columns)
    for line in lines:
        style = "bold" if line.solution == "MERGETUNE" else None
        table.add_row(f"{line.dataset}, {line.method}, {line.solution}", *map(line.show, columns), style=style)
        if line.published:
            apart = {c: f"{p:.2f} ({line.values[c] - p:+.2f})" for c, p in line.published.items()}
            table.add_row("  published, eleven datasets", *(apart.get(c, "") for c in columns), style="dim")
    out.print(table)
    out.print(f"Table, figure and runs: {folder / protocol}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def merge(
    method: Annotated[str | None, typer.Argument(help="One of `mergetune merge --list`.")] = None,
    experts: Annotated[
        list[str] | None, typer.Argument(help="Solutions: saved folders, CoOp checkpoints; or .safetensors files.")
    ] = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Folder for the solution, or .safetensors file.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help='Zero-shot text with {}, a saved folder, or a file. "a photo of a {}." if needed.'),
    ] = None,
    option: Annotated[list[str], typer.Option("-o", "--option", help="name=value, of the method.")] = [],  # noqa: B006
    backbone: Annotated[str | None, BACKBONE] = None,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    features: Annotated[Path | None, CACHE] = None,
    classes: Annotated[str, SPLIT] = "all",
    shots: Annotated[int | None, typer.Option(help="Of the cache, images a class.")] = None,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 1,
    listing: Annotated[bool, typer.Option("--list", help="The methods: needs, meaningful on, source.")] = False,
    as_json: Json = False,
) -> None:
    """Merge solutions, or state dicts in files, afterwards: TIES, DARE, WiSE-FT and the others.

    mergetune merge ties coop-1 coop-2 kgcoop --out merged --base "a photo of a {}." --backbone ... -o density=0.3
    """
    import mergetune as mt
    from mergetune import catalogue
    from mergetune.solutions import zero_shot_like

    if listing:
        entries = catalogue.catalogue()
        if as_json:
            _print_json([asdict(entry) for entry in entries])
            return
        for entry in entries:
            options = ", ".join(f"{name}={default}" for name, default in entry.options.items())
            out.print(f"[bold]{entry.name}[/] {escape(entry.title)}, {entry.source}", highlight=False)
            needs = f"needs: {entry.needs}\nfor: {entry.meaningful}\noptions: {options or 'none'}"
            out.print(Padding(escape(needs), (0, 0, 0, 4)), highlight=False)
        return
    with _errors():
        if not (method and experts and out_path):
            raise ValueError("a method, at least one solution or file, and --out are needed; --list shows the methods")
        options = catalogue.parse_options(method, option)
        files = [path.endswith(".safetensors") for path in experts]
        if any(files) and not all(files):
            raise ValueError(f"experts must be all solutions or all .safetensors files, got {', '.join(experts)}")
        if all(files):
            if features is not None:
                raise ValueError("--cache goes with solutions, not with files of tensors")
            catalogue.merge_files(method, base, experts, out_path, options)
            notes: dict[str, Any] = {"merged": catalogue.find(method), "base": base, "experts": experts}
        else:
            data = None if features is None else _open(features, classes, shots=shots, seed=seed)
            solutions = [_solution(path, data) for path in experts]
            start: Any = None
            if base is not None and "{}" not in base:
                start = _solution(base, data)
            needed = start is None and (base or catalogue.needs_base(method, len(solutions), options))
            clip = mt.load_clip(backbone, pretrained, device=device) if backbone else None
            if (needed or data is not None) and clip is None:
                raise ValueError("--backbone is needed for a zero-shot base from a template, and for --cache")
            if needed:
                start = zero_shot_like(clip, solutions[0], base or "a photo of a {}.")
            merged = catalogue.merge_solutions(method, solutions, base=start, clip=clip, features=data, options=options)
            merged.save(out_path)
            notes = merged.notes | {"base": base, "experts": experts}
    if as_json:
        _print_json(notes | {"out": str(out_path)})
    else:
        out.print(f"{notes['merged']} of {len(experts)}: {out_path}", highlight=False, soft_wrap=True, markup=False)


@app.command(cls=_Lists)
def compare(
    caches: Annotated[
        list[Path] | None, typer.Argument(help="Datasets: folders with caches train, test (and val), all classes.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Cells, table and figure. What is there is used again.")] = Path(
        "out/compare"
    ),
    embedded: Annotated[bool, typer.Option("--demo", help="On the embedded CLIP and icons.")] = False,
    backbone: Annotated[str | None, BACKBONE] = None,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    experts: Annotated[
        list[str], typer.Option("--expert", help="coop:1, coop:2, kgcoop:1, head:1 are trained; or saved solutions.")
    ] = ["coop:1", "coop:2", "coop:3", "kgcoop:1"],  # noqa: B006
    partitions: Annotated[
        list[int], typer.Option("--partition", min=0, help="Base and novel classes: 0 is CoOp's, 1, 2, ... are random.")
    ] = [0],  # noqa: B006
    all_classes: Annotated[bool, typer.Option("--all-classes", help="Train and test on all classes.")] = False,
    seeds: Annotated[list[int], typer.Option("--seeds")] = [1, 2, 3],  # noqa: B006
    shots: Annotated[int, typer.Option(min=1, help="Images a class.")] = 16,
    template: Annotated[list[str], typer.Option(help=TEMPLATES)] = ["a photo of a {}."],  # noqa: B006
    tuning: Annotated[list[str], typer.Option("--tune", help="name=value, of mergetune.tune.")] = [],  # noqa: B006
    fitting: Annotated[list[str], typer.Option("--fit", help="name=value, of mergetune.fit.")] = [],  # noqa: B006
    lam: Annotated[list[float], typer.Option(help="What is tried for MERGETUNE.")] = [8.0, 4.0, 16.0],  # noqa: B006
    tau: Annotated[list[float], typer.Option(help="What is tried for MERGETUNE.")] = [0.3, 0.6],  # noqa: B006
    choose: Annotated[str, typer.Option(help="Hyper-parameters: on validation images, or on the others' ones.")] = (
        "validation"
    ),
    reference: Annotated[str, typer.Option(help="The line that differences are to.")] = "MERGETUNE, chosen [1]",
    as_json: Json = False,
) -> None:
    """Zero-shot, tuned, every merge, the ensembles and MERGETUNE on the same cells: datasets, partitions and seeds.

    Hyper-parameters are chosen on validation images, never on test images. Interrupted, the same command goes on.
    """
    import inspect

    import mergetune as mt
    from mergetune.catalogue import parse_keywords
    from mergetune.compare import Plan, Task, icons_task
    from mergetune.compare import compare as run_comparison

    with _errors():
        options = [
            parse_keywords(f"mergetune.{function.__name__}", inspect.signature(function).parameters, given)
            for function, given in ((mt.tune, tuning), (mt.fit, fitting))
        ]
        if embedded == bool(caches) or embedded == bool(backbone):
            raise ValueError("give folders of caches and --backbone, or --demo")
        trained = [":" in expert and not Path(expert).exists() for expert in experts]
        if any(trained) and not all(trained):
            raise ValueError(f"experts must be all trained here or all saved, got {', '.join(experts)}")
        if embedded:
            from mergetune import demo as icons

            clip, tasks = icons_task(folder, report=_say(as_json))
            precision = {"precision": icons.PRECISION}
            options = [icons.STAGE_1 | precision | options[0], precision | options[1]]
        else:
            clip = mt.load_clip(backbone, pretrained, device=device)
            parts = [{part: cache / part for part in ("train", "test", "val")} for cache in caches]
            tasks = [
                Task(
                    cache.resolve().name, mt.FeatureCache.open(part["train"]), mt.FeatureCache.open(part["test"]),
                    mt.FeatureCache.open(part["val"]) if part["val"].is_dir() else None, tuple(template),
                )
                for cache, part in zip(caches, parts, strict=True)
            ]  # fmt: skip
        plan = Plan(
            experts=tuple(experts) if all(trained) else {path: _solution(path, tasks[0].train) for path in experts},
            shots=shots, tune=options[0], fit=options[1], grid={"lam": tuple(lam), "tau": tuple(tau)}, choose=choose,
        )  # fmt: skip
        found = run_comparison(
            clip, tasks, folder, plan=plan, partitions=(None,) if all_classes else tuple(partitions),
            seeds=tuple(seeds), reference=reference, report=_say(as_json),
        )  # fmt: skip
        found.save(folder)
    if as_json:
        _print_json(found.to_json())
        return
    columns = list(found.lines[0].values)
    table = _table("", *columns, f"{columns[-1]} difference")
    for line in found.lines:
        difference = line.differences.get(columns[-1])
        about = ""
        if difference:
            about = "{:+.1f} ({:+.1f} to {:+.1f})".format(difference.mean, *difference.classes)
        values = [f"{line.values[c]:.1f} ± {line.errors[c]:.1f}" for c in columns]
        style = "bold" if line.row.startswith("MERGETUNE") else None
        table.add_row(escape(line.row), *values, about, style=style)
    out.print(table)
    said = f"Differences are to {found.reference}; {len(found.cells)} cells; ± is the standard error, in brackets the "
    said += f"95 % interval, over classes. Hyper-parameters: chosen on {found.choose}. More columns, figure: {folder}"
    out.print(said, highlight=False, soft_wrap=True, markup=False)
    for method, why in found.left_out.items():
        err.print(f"[dim]left out: {escape(method)}: {escape(why)}[/]", soft_wrap=True, highlight=False)


def _forecast(found: Any, as_json: bool) -> None:
    if as_json:
        _print_json(found.to_json())
        return
    table = _table("cache", "images to encode")
    for name, images in found.images.items():
        table.add_row(name, str(images) if images else "is there")
    out.print(table)
    minutes = lambda seconds: f"{seconds / 60:.1f} min"  # noqa: E731
    out.print(
        f"{found.runs} runs, {found.finished} of them finished. Encoding about {minutes(found.seconds_encoding)}, "
        f"training about {minutes(found.seconds_training)}, one after the other on this machine.",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


# -- shared by the commands -------------------------------------------------------------------------------------------


def _say(as_json: bool) -> Callable[[str], None]:
    """Tells what is about to be done, to people."""
    return (lambda line: None) if as_json else (lambda line: err.print(f"[dim]{escape(line)}[/]"))


def _read_images(path: Path, root: Path | None = None) -> Any:
    """A folder of class folders, a table, one of CoOp's split files, or with a root the name of a benchmark dataset."""
    import mergetune as mt

    if root is not None:
        return mt.CoOpDataset(str(path), root)
    if path.is_dir():
        return mt.ImageFolder(path)
    if path.suffix == ".json" and path.name.startswith("split_zhou_"):
        return mt.coop_split(path.parent, path)
    return mt.image_table(path)


def _open(folder: Path, classes: str, *, shots: int | None = None, seed: int = 1) -> Any:
    """A feature cache, of all classes or one of CoOp's halves, and of it the images that CoOp draws."""
    import mergetune as mt

    if classes not in ("all", "base", "novel"):
        raise ValueError(f"classes must be all, base or novel, got {classes!r}")
    cache = mt.FeatureCache.open(folder)
    listed = mt.ImageList(
        root=folder, files=cache.files, labels=tuple(cache.labels.tolist()), classnames=cache.classnames
    )
    data = mt.Dataset(name=folder.name, full_train=listed)
    if classes != "all":
        data = data.base_novel()[classes == "novel"]
    return cache.select(data.few_shot(shots, seed))


def _solution(path: str, features: Any = None, position: str = "end") -> Any:
    """A saved solution, a checkpoint of CoOp's family, or a head's file; features name the classes if it does not."""
    from mergetune.solutions import open_solution

    return open_solution(path, classnames=None if features is None else features.classnames, position=position)


def _record(result: Any) -> dict[str, Any]:
    return {"settings": result.settings, "history": result.history, "timings": result.timings}


def _finish(as_json: bool, record: dict[str, Any], done: str, rows: dict[str, dict[str, Any]]) -> None:
    if os.environ.get("RANK", "0") != "0":  # under torchrun one rank speaks
        return
    if as_json:
        _print_json(record)
        return
    for name, row in rows.items():
        out.print(f"[bold]{name}[/] " + ", ".join(f"{k} {_plain(v)}" for k, v in row.items()), highlight=False)
    out.print(done, highlight=False, soft_wrap=True, markup=False)


def _table(first: str, *numbers: str) -> Table:
    table = Table(title_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
