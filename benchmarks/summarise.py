"""Prints benchmark results as a Markdown table and compares them with the stored ratios of the device.

The program reads files of ``--benchmark-json`` and JSON files of ``gpu.py --stage speed``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from ratios import LIMIT, Baseline, Comparison, best_of, compare, device_of, file_of, ratios_of
from report import table


def main(
    files: Annotated[
        list[Path], typer.Argument(help="Result files of one device; the best ratio of all files counts.", exists=True)
    ],
    fastest: Annotated[
        bool, typer.Option(help="Show the fastest round instead of the median, for a machine with other users.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Folder of baselines to compare with: exit code 1 if a ratio is worse, 2 without a baseline."
        ),
    ] = None,
    save_baseline: Annotated[
        Path | None, typer.Option(help="Folder in which to save the ratios as the baseline of this device.")
    ] = None,
    repeat: Annotated[
        Path | None,
        typer.Option(help="With --against: file in which to list the tests with worse ratios, one per line."),
    ] = None,
) -> None:
    """Print the table of the first file; compare and save ratios."""
    runs = [json.loads(path.read_text()) for path in files]
    if len(devices := {device_of(run["machine_info"]) for run in runs}) > 1:
        raise typer.BadParameter(f"FILES must come from one device, got {', '.join(sorted(devices))}")
    (device,), ratios = devices, best_of(map(ratios_of, map(infos, runs)))
    typer.echo(table(runs[0], "fastest" if fastest else "seconds"))
    if save_baseline is not None:
        typer.echo(f"\nBaseline: {baseline(runs, device, ratios).write(save_baseline)}")
    if against is None:
        return
    path = file_of(against, device)
    if not path.exists():
        typer.echo(
            f"\nNo baseline for {device}: {path} does not exist. "
            f"To save one: python benchmarks/summarise.py {' '.join(map(str, files))} --save-baseline {against}",
            err=True,
        )
        raise typer.Exit(2)
    kept = Baseline.read(path)
    found = compare(ratios, kept.ratios)
    typer.echo("\n" + verdict(found, kept, path))
    if repeat is not None:
        titles = {one.title for one in found.worse}
        tests = [b["fullname"] for run in runs for b in run["benchmarks"] if b["extra_info"].get("title") in titles]
        repeat.write_text("".join(f"{test}\n" for test in dict.fromkeys(tests)))
    if not found.compared:
        typer.echo("Nothing was compared: the results and the baseline have no row in common.", err=True)
    if found.worse or not found.compared:
        raise typer.Exit(1)


def infos(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [info for bench in run["benchmarks"] if "title" in (info := bench["extra_info"])]


def baseline(runs: list[dict[str, Any]], device: str, ratios: dict[str, dict[str, float]]) -> Baseline:
    cpus = [info["other_cpus"] for run in runs for info in infos(run) if info["other_cpus"] is not None]
    others = (round(min(cpus), 2), round(max(cpus), 2)) if cpus else None
    return Baseline(device, runs[0]["datetime"][:10], runs[0]["machine_info"]["torch"], others, ratios)


def verdict(found: Comparison, kept: Baseline, path: Path, limit: float = LIMIT) -> str:
    """The comparison as text: the baseline, and every ratio that is worse, missing or new."""
    lines = [f"{found.compared} ratios compared with {path.name} of {kept.date}, torch {kept.torch}."]
    if kept.other_cpus is not None:
        least, most = kept.other_cpus
        lines.append(f"Other processes used {least:.1f} to {most:.1f} CPUs when the baseline was recorded.")
    lines += [f"WORSE: {one.text(limit)}" for one in found.worse]
    lines += [f"missing, not compared: {row}" for row in found.missing]
    lines += [f"new, not compared: {row}" for row in found.new]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
