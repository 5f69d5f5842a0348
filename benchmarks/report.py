"""Benchmark results as Markdown: measurements with their targets (bars), the machine, and the parts of a GPU run.

This file uses only Python's standard library, so that a report can be written before anything is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """Target of a ratio: at most ``at_most`` times a floor, or at least ``at_least`` times as fast as a baseline."""

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


def measurements(infos: Iterable[Mapping[str, Any]], statistic: str = "seconds", bars: Sequence[Bar] = BARS) -> str:
    """The table of the records of ``measure.compare``; ``statistic`` is "seconds" for medians, or "fastest"."""
    found = {info["title"]: info for info in infos}
    rows = ["| measured | time | against | its time | ratio | bar | |", "|---|---|---|---|---|---|---|"]
    for title, info in found.items():
        own, peak, first = info[statistic][title], info["peak_bytes"], True
        for name in (*info["baselines"], *info["floors"]):
            other = info[statistic][name]
            baseline = name in info["baselines"]
            ratio = f"{show_ratio(other / own)} x as fast" if baseline else f"{show_ratio(own / other)} x its time"
            bar = next((bar for bar in bars if (bar.title, bar.other) == (title, name)), None)
            verdict = ("", "") if bar is None else (bar.text(), "met" if bar.met(own, other) else "**missed**")
            mine = (title, f"{show_seconds(own)}{show_bytes(peak.get(title))}") if first else ("", "")
            theirs = (name, f"{show_seconds(other)}{show_bytes(peak.get(name))}", ratio)
            rows.append(f"| {' | '.join((*mine, *theirs, *verdict))} |")
            first = False
        if first:  # without baselines and floors
            rows.append(f"| {title} | {show_seconds(own)}{show_bytes(peak.get(title))} | | | | | |")
    rows += [f"| {bar.title} | not run | {bar.other} | | | {bar.text()} | |" for bar in bars if bar.title not in found]
    return "\n".join(rows)


def parts(outcomes: Iterable[Mapping[str, Any]]) -> str:
    """The table of the parts of a run."""
    rows = ["| part | result | time | |", "|---|---|---|---|"]
    for outcome in outcomes:
        good = outcome["status"] in ("passed", "not supported")
        status = outcome["status"] if good else f"**{outcome['status']}**"
        remark = "; ".join(filter(None, (outcome["detail"], *map(_fact, outcome["facts"].items()))))
        rows.append(f"| {outcome['name']} | {status} | {outcome['seconds']:.1f} s | {cell(remark)} |")
    return "\n".join(rows)


def _fact(item: tuple[str, Any]) -> str:
    """A fact as text for a table cell; lists and dicts as their size (the JSON file has the whole)."""
    name, value = item
    if isinstance(value, (list, dict)):
        return f"{name}: {len(value)}" if value else ""
    return f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:600]


def table(results: Mapping[str, Any], statistic: str = "seconds") -> str:
    """Machine and measurements of a ``--benchmark-json`` file as Markdown."""
    infos = [info for bench in results["benchmarks"] if "title" in (info := bench["extra_info"])]
    return f"{machine(results, infos, statistic)}\n\n{measurements(infos, statistic)}"


def machine(results: Mapping[str, Any], infos: Iterable[Mapping[str, Any]], statistic: str) -> str:
    info = results["machine_info"]
    cpu = info["cpu"]
    found = [f"{cpu.get('brand_raw', info['processor'])}, {cpu.get('count')} cores, threads used: {info['threads']}"]
    found += [info["gpu"]] if info["gpu"] else []
    found += [f"torch {info['torch']}", f"Python {info['python_version']}", results["datetime"][:10]]
    known = [one["other_cpus"] for one in infos if one["other_cpus"] is not None]
    if known:
        found.append(f"other processes used {min(known):.1f} to {max(known):.1f} CPUs meanwhile")
    return f"{'; '.join(found)}. {'Medians' if statistic == 'seconds' else 'The fastest of all rounds'}."


def show_ratio(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}" if ratio < 1 else f"{ratio:.3g}"


def show_seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def show_bytes(count: int | None) -> str:
    return "" if count is None else f", peak {count / 2**20:.1f} MiB"
