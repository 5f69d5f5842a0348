"""`mergetune demo` shows the method on embedded data; `mergetune doctor` checks the installation."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from mergetune.cli.options import Json, Overwrite, Seeds
from mergetune.cli.running import suggest
from mergetune.cli.shared import HALVES, announce, err, errors, out, plain, print_json, print_table, tell


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for images, caches, solutions and results.")] = Path(
        "out/demo"
    ),
    seeds: Seeds = [1, 2, 3],
    seed: Annotated[list[int], typer.Option("--seed", hidden=True)] = [],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tune and repair the embedded CLIP on the embedded icons; table and figure take a few minutes."""
    from mergetune.experiments import run_demo

    seeds = seed or seeds  # --seed is the name in version 0.1
    with errors():
        result = run_demo(folder, seeds=seeds, overwrite=overwrite, report=announce(as_json))
    if as_json:
        print_json(result.to_json())
        return
    suggest("fit", "PHOTOS", "--backbone", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k")
    several = len(seeds) > 1
    over = f"mean ± deviation over {len(seeds)} seeds" if several else f"seed {seeds[0]}"
    rows = []
    for row in result.rows:
        cells = {column: (getattr(row, name), getattr(row, f"{name}_std")) for column, name in HALVES.items()}
        shown = {c: f"{mean:.1f} ± {std:.1f}" if several else f"{mean:.1f}" for c, (mean, std) in cells.items()}
        rows.append((row.name, shown, "bold" if row.name == "MERGETUNE" else None))
    print_table("", rows, title=f"Accuracy on tilted icons, {over} (%)")
    tell(
        f"Standard error from the number of test images: {result.rows[0].base_error:.1f} (base), "
        f"{result.rows[0].novel_error:.1f} (novel). "
        f"Seen and unseen are the same images among all classes. Figure: {result.figure}. "
        f"Everything: {result.figure.with_name('results.json')}."
    )


def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Check and time every kernel on every GPU (without a GPU: on the CPU) and save the results.",
        ),
    ] = False,
    limit: Annotated[
        float, typer.Option("--limit", min=1, help="With --kernels: time limit in seconds per device.")
    ] = 240.0,
    as_json: Json = False,
) -> None:
    """Show versions, devices and backends, and test each op. The command fails if an op is wrong."""
    import open_clip
    import torch

    from mergetune import __version__, ops

    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    report: dict[str, Any] = {
        "mergetune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda devices": [torch.cuda.get_device_name(device) for device in gpus],
        "native core": ops.build_info(),
        "backends": list(ops.available_backends()),
        "self-test": ops.self_test(),
    }
    verdicts = {}
    if kernels:
        devices = ", ".join(map(str, gpus)) or "the CPU"
        announce(as_json)(
            f"comparing every kernel with its definition and timing it on {devices}; this takes minutes, at most "
            f"{limit:.0f} s per device (--limit). On a CPU only Triton's interpreter can run the GPU kernels, slowly."
        )
        verdicts = {device: _verify(device, limit, as_json) for device in gpus or [torch.device("cpu")]}
    elif gpus:
        verdicts = {device: ops.kept_verdicts(device) for device in gpus}
    healthy = all(error < 1e-9 for error in report["self-test"].values())
    if as_json:
        found = {str(device): verdict and verdict.model_dump() for device, verdict in verdicts.items()}
        print_json(report | {"kernels": found, "healthy": healthy})
    else:
        table = Table(show_header=False, box=None)
        for name, value in report.items():
            if name == "self-test":
                value = ", ".join(f"{op} {'ok' if e < 1e-9 else 'WRONG'} ({e:.1e})" for op, e in value.items())
            elif isinstance(value, dict):
                value = ", ".join(f"{k} {plain(v)}" for k, v in value.items())
            table.add_row(name, plain(value))
        out.print(table)
        for device, verdict in verdicts.items():
            _print_verdicts(device, verdict)
    raise typer.Exit(0 if healthy else 1)


def _verify(device: Any, limit: float, as_json: bool) -> Any:
    """Checks and times every kernel on one device, saves the verdict and returns it."""
    from mergetune import ops

    with errors(), Progress(console=err, transient=True, disable=as_json) as bar:
        task = bar.add_task(f"verifying on {device}", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"verifying on {device}: {what}")

        found = ops.verify(device, limit=limit, progress=show)
        ops.keep(device, found)
    return found


def _print_verdicts(device: Any, verdict: Any) -> None:
    """Prints the verdict of one device: one line per op, dtype and size."""
    if verdict is None:
        tell(
            f"kernels on {device}: not verified, so plain PyTorch is used. `mergetune doctor --kernels` verifies them."
        )
        return
    table = Table("op", "dtype", "size", "used", "tried", title_justify="left")
    table.title = f"Kernels on {device} ({verdict.facts.device}), verified in {verdict.seconds:.0f} s"
    for row in verdict.verdicts:
        tried = ", ".join(
            f"{t.backend} {t.seconds * 1e6:.0f} us" if t.seconds else f"{t.backend} {t.status.upper()} ({t.detail})"
            for t in row.trials
        )
        table.add_row(row.op, row.dtype.removeprefix("torch."), row.shape_class, row.chosen, escape(tried))
    out.print(table)
