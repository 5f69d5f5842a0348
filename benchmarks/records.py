"""Reading of the file that ``recorder.py`` writes, also from an interrupted run; uses only the standard library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_tests(path: Path) -> dict[str, Any]:
    """Counts of outcomes, slowest tests, failed tests with their messages, and tests that began but never ended."""
    begun: dict[str, bool] = {}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: dict[str, str] = {}
    reasons: dict[str, int] = {}
    slowest: list[tuple[float, str]] = []
    lines = path.read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("}\n")]  # the last line may be cut off
    programs = [event["hit"] for event in events if event["event"] == "program"]
    for event in events:
        if event["event"] == "begin":
            begun[event["test"]] = False
        elif event["event"] == "end":
            begun[event["test"]] = True
            slowest.append((round(event["seconds"], 2), event["test"]))
            if event["outcome"] == "failed":
                failures.setdefault(event["test"], event["why"])
            else:
                counts[event["outcome"]] += 1
            if event["outcome"] == "skipped":
                reasons[event["why"]] = reasons.get(event["why"], 0) + 1
    counts["failed"] = len(failures)
    unended = [test for test, ended in begun.items() if not ended]
    return {
        **counts,
        "never ended": unended,
        "failures": failures,
        "why skipped": reasons,
        "Triton programs found": sum(programs),
        "Triton programs compiled": len(programs) - sum(programs),
        "slowest": sorted(slowest, reverse=True)[:5],
    }
