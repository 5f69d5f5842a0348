"""The commands, thin over the API. Exit codes: 0 done, 1 something failed, 2 a wrong argument or input."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
        say = (lambda line: None) if as_json else (lambda line: err.print(f"[dim]{line}[/]"))
        result = run_demo(folder, seeds=seeds, report=say)
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
    images: Annotated[Path, typer.Argument(help="Folder of class folders, or a .csv/.json list.")],
    folder: Annotated[Path, typer.Option("--out", help="The caches: one folder each for train, val and test.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    views: Annotated[int, typer.Option(help="Views of each image; all but the first are augmented.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    skip_unreadable: Annotated[bool, typer.Option(help="Leave unreadable images out instead of stopping.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Rebuild a cache of other images or another model.")] = False,
    as_json: Json = False,
) -> None:
    """Encode images once. Interrupted, the same command goes on; under torchrun the ranks share the work."""
    import mergetune as mt

    with _errors():
        data = _read_images(images)
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
    features: Annotated[Path, CACHE],
    tuned: Annotated[
        list[str], typer.Option("--tuned", help="Saved solution or CoOp checkpoint; several for several anchors.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the solution and its report.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    classes: Annotated[str, SPLIT] = "all",
    shots: Annotated[int | None, typer.Option(min=1, help="Images a class; all if not given.")] = None,
    template: Annotated[list[str], typer.Option(help=TEMPLATES)] = ["a photo of a {}."],  # noqa: B006
    lam: Annotated[float, typer.Option(help="Weight of the zero-shot surrogate.")] = 8.0,
    beta: Annotated[list[float], typer.Option(help="Weight of the path to each --tuned.")] = [0.5],  # noqa: B006
    tau: Annotated[float, typer.Option(help="Start: 0 at zero-shot, 1 at the fine-tuned solution.")] = 0.3,
    points: Annotated[int, typer.Option(help="Points on each path.")] = 5,
    grid: Annotated[str, typer.Option(help="even, official or random.")] = "even",
    surrogate: Annotated[str, typer.Option(help="identity, fisher, cosine or l2.")] = "identity",
    space: Annotated[str, typer.Option(help="embedding or parameter.")] = "embedding",
    epochs: Annotated[int, typer.Option()] = 50,
    batch_size: Annotated[int, typer.Option()] = 128,
    lr: Annotated[float, typer.Option()] = 2e-3,
    seed: Annotated[int, typer.Option()] = 1,
    as_json: Json = False,
) -> None:
    """Stage 2, MERGETUNE. Killed, the same command goes on from its last epoch."""
    import mergetune as mt

    with _errors():
        clip = mt.load_clip(backbone, pretrained, device=device)
        data = _open(features, classes, shots=shots, seed=seed)
        result = mt.fit(
            clip, data, [_solution(path) for path in tuned], zero_shot=template, lam=lam, beta=beta if len(beta) > 1
            else beta[0], tau=tau, points=points, grid=grid, surrogate=surrogate, space=space, epochs=epochs,
            batch_size=batch_size, lr=lr, seed=seed, resume=folder,
        )  # fmt: skip
        result.save(folder)
    _finish(as_json, _record(result), f"solution in {folder}", {"train": result.history[-1]})


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
    as_json: Json = False,
) -> None:
    """Accuracy of zero-shot and of saved solutions on cached test features."""
    import mergetune as mt

    with _errors():
        clip = mt.load_clip(backbone, pretrained, device=device)
        entries = {"zero-shot": mt.classifier(clip, template)}
        entries |= {name: mt.classifier(clip, _solution(name)) for name in solution}
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
    as_json: Json = False,
) -> None:
    """Loss, accuracy and barriers on the paths between zero-shot, fine-tuned and merged solution, with a figure."""
    import mergetune as mt

    with _errors():
        clip = mt.load_clip(backbone, pretrained, device=device)
        data = _open(features, classes)
        merged, start = _solution(solution), _solution(tuned)
        head = isinstance(merged, mt.Head)
        zero_shot = (
            mt.Head.zero_shot(clip, data.classnames, template) if head else mt.Prompt.from_template(clip, template)
        )
        walks = mt.connectivity(clip, zero_shot, start, merged, data, points=points, space=space)
        mt.plot({f"{classes} classes": walks}, figure)
    if as_json:
        _print_json({name: walk.to_json() for name, walk in walks.items()})
        return
    table = _table("", "loss at start", "highest", "at end", "barrier")
    for name, walk in walks.items():
        table.add_row(name, *(f"{v:.4f}" for v in (walk.loss[0], max(walk.loss), walk.loss[-1], walk.barrier)))
    out.print(table)
    out.print(f"Figure: {figure}", highlight=False, soft_wrap=True, markup=False)


# -- shared by the commands -------------------------------------------------------------------------------------------


def _read_images(path: Path) -> Any:
    """A folder of class folders, a table, or one of CoOp's split files."""
    import mergetune as mt

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


def _solution(path: str) -> Any:
    """A saved solution, or else a checkpoint of CoOp's family."""
    import mergetune as mt

    return mt.load_solution(path) if (Path(path) / "solution.json").is_file() else mt.Prompt.from_checkpoint(path)


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
