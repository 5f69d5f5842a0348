"""One file of ``--benchmark-json`` as the README's Markdown table, with the machine, and each bar as met or missed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from measure import show_bytes, show_seconds


@dataclass(frozen=True)
class Bar:
    """What a ratio has to reach: ``at_most`` times a floor, or ``at_least`` times as fast as a baseline."""

    title: str
    other: str
    at_most: float | None = None
    at_least: float | None = None

    def text(self) -> str:
        return f"≤ {self.at_most:g}" if self.at_least is None else f"≥ {self.at_least:g}"

    def met(self, own: float, other: float) -> bool:
        return own / other <= self.at_most if self.at_least is None else other / own >= self.at_least


TOWER_500, TOWER_50 = "text tower, 500 names, bfloat16", "text tower, 50 names, bfloat16"
LOSS, POINTS = "lmc_loss, B 256, C 500, D 512, N 8, K 2", "lmc_loss, B 256, C 500, D 512, N 16, K 1"
STEP = "training step, 50 names, B 128, N 5"
BARS = (
    Bar(TOWER_500, "its GEMMs", at_most=1.6),
    Bar(TOWER_500, "open_clip, longest class", at_least=10),
    Bar(f"{TOWER_500}, against 77 tokens", "open_clip, 77 tokens", at_least=60),
    Bar(TOWER_50, "its GEMMs", at_most=2.0),
    Bar(POINTS, "N 1", at_most=2.0),
    Bar(LOSS, "a loop over the points", at_least=8),
    Bar(LOSS, "torch.compile of the loop", at_least=3),
    Bar(f"{STEP}, bfloat16", "the official step", at_least=500),
    Bar(f"{STEP}, float32", "the official step", at_least=500),
)


def table(results: dict[str, Any], statistic: str = "seconds") -> str:
    """The Markdown of a benchmark run; ``statistic`` is "seconds" for medians or "fastest"."""
    found = {info["title"]: info for bench in results["benchmarks"] if "title" in (info := bench["extra_info"])}
    rows = ["| measured | time | against | its time | ratio | bar | |", "|---|---|---|---|---|---|---|"]
    for title, info in found.items():
        own, peak, first = info[statistic][title], info["peak_bytes"], True
        for name in (*info["baselines"], *info["floors"]):
            other = info[statistic][name]
            baseline = name in info["baselines"]
            ratio = f"{show_ratio(other / own)} x as fast" if baseline else f"{show_ratio(own / other)} x its time"
            bar = next((bar for bar in BARS if (bar.title, bar.other) == (title, name)), None)
            verdict = ("", "") if bar is None else (bar.text(), "met" if bar.met(own, other) else "**missed**")
            mine = (title, f"{show_seconds(own)}{show_bytes(peak.get(title))}") if first else ("", "")
            theirs = (name, f"{show_seconds(other)}{show_bytes(peak.get(name))}", ratio)
            rows.append(f"| {' | '.join((*mine, *theirs, *verdict))} |")
            first = False
    rows += [f"| {bar.title} | not run | {bar.other} | | | {bar.text()} | |" for bar in BARS if bar.title not in found]
    return "\n".join([machine(results, [info["other_cpus"] for info in found.values()], statistic), "", *rows])


def show_ratio(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}" if ratio < 1 else f"{ratio:.3g}"


def machine(results: dict[str, Any], other_cpus: list[float | None], statistic: str) -> str:
    info = results["machine_info"]
    cpu = info["cpu"]
    parts = [f"{cpu.get('brand_raw', info['processor'])}, {cpu.get('count')} cores, threads used: {info['threads']}"]
    parts += [info["gpu"]] if info["gpu"] else []
    parts += [f"torch {info['torch']}", f"Python {info['python_version']}", results["datetime"][:10]]
    known = [cpus for cpus in other_cpus if cpus is not None]
    if known:
        parts.append(f"other processes used {min(known):.1f} to {max(known):.1f} CPUs meanwhile")
    return f"{'; '.join(parts)}. {'Medians' if statistic == 'seconds' else 'The fastest of all rounds'}."


def main(
    file: Annotated[Path, typer.Argument(help="What pytest wrote with --benchmark-json.", exists=True)],
    fastest: Annotated[bool, typer.Option(help="The fastest round, for a machine that others use too.")] = False,
) -> None:
    """Print the table."""
    typer.echo(table(json.loads(file.read_text()), "fastest" if fastest else "seconds"))


if __name__ == "__main__":
    typer.run(main)
