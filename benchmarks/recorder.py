"""A pytest plugin that writes every result at once, so that a run that is stopped leaves what it had.

``pytest -p recorder`` with RECORD=file: one JSON object per test that begins or ends, and per Triton program that is
compiled or found in Triton's cache. A worker of pytest-xdist whose CUDA device no longer answers ends itself, so that a
fresh one runs the tests that follow.
"""

from __future__ import annotations

import json
import os
import sys

import pytest


def write(**event: object) -> None:
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(event) + "\n")


class Recorder:
    """Of the process that reports: the only one, or the one that leads the workers."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        write(event="collected", count=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        write(event="begin", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            if report.skipped and isinstance(report.longrepr, (tuple, list)):
                why = report.longrepr[2]
            else:
                why = crash.message if crash else report.longreprtext
            write(event="end", test=report.nodeid, outcome=report.outcome, seconds=report.duration, why=why[:500])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    torch = sys.modules.get("torch")
    if not hasattr(item.config, "workerinput") or torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(70)


def watch_compiler() -> None:
    """Have Triton say what it compiles and what its cache had; of versions that cannot say it, nothing is recorded."""
    try:
        from triton import knobs

        knobs.compilation.listener = lambda *, cache_hit, **_: write(event="program", hit=bool(cache_hit))
    except (ImportError, AttributeError):
        return


def pytest_configure(config: pytest.Config) -> None:
    watch_compiler()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())
