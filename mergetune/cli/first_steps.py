"""`mergetune demo` and `mergetune doctor`: does it work here, and what does it do?"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mergetune.cli.options import Json
from mergetune.cli.shared import announce, errors, new_table, out, plain, print_json, tell


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where images, caches, solutions and results go.")] = Path(
        "out/demo"
    ),
    seeds: Annotated[list[int], typer.Option("--seed", help="May be given several times.")] = [1, 2, 3],
    as_json: Json = False,
) -> None:
    """Fine-tune and repair the embedded CLIP on the embedded icons: table and figure in about a minute."""
    from mergetune.demo import run_demo

    with errors():
        result = run_demo(folder, seeds=seeds, report=announce(as_json))
    if as_json:
        print_json(result.to_json())
        return
    table = new_table("", "base", "novel", "HM")
    table.title = f"Accuracy on tilted icons, mean ± deviation over {len(seeds)} seeds (%)"
    for row in result.rows:
        style = "bold" if row.name == "MERGETUNE" else None
        cells = ((row.base, row.base_std), (row.novel, row.novel_std), (row.hm, row.hm_std))
        table.add_row(row.name, *(f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in cells), style=style)
    out.print(table)
    tell(
        f"Standard error from the number of test images: {result.rows[0].base_error:.1f} (base), "
        f"{result.rows[0].novel_error:.1f} (novel). Figure: {result.figure}. Everything: {folder / 'results.json'}."
    )


def doctor(as_json: Json = False) -> None:
    """Versions, devices, the backends built, and a self-test of each op. Fails if an op is wrong."""
    import open_clip
    import torch

    from mergetune import __version__, ops

    report: dict[str, Any] = {
        "mergetune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native core": ops.build_info(),
        "backends": list(ops.available_backends()),
        "self-test": ops.self_test(),
    }
    healthy = all(error < 1e-9 for error in report["self-test"].values())
    if as_json:
        print_json(report | {"healthy": healthy})
    else:
        table = Table(show_header=False, box=None)
        for name, value in report.items():
            if name == "self-test":
                value = ", ".join(f"{op} {'ok' if e < 1e-9 else 'WRONG'} ({e:.1e})" for op, e in value.items())
            elif isinstance(value, dict):
                value = ", ".join(f"{k} {plain(v)}" for k, v in value.items())
            table.add_row(name, plain(value))
        out.print(table)
    raise typer.Exit(0 if healthy else 1)
