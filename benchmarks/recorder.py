"""A pytest plugin that writes every result immediately, so that an interrupted run keeps its results.

``pytest -p recorder`` with RECORD=file writes one JSON object when a test begins or ends, and for each Triton program
that is compiled or found in Triton's cache. A worker of pytest-xdist ends itself if its CUDA device does not respond,
so that a new worker runs the following tests.
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
    """Records the tests in the process that reports results: the only process, or the one that leads the workers."""

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
    """Records compiled programs and cache hits of Triton, if the Triton version reports them."""
    try:
        from triton import knobs

        knobs.compilation.listener = lambda *, cache_hit, **_: write(event="program", hit=bool(cache_hit))
    except (ImportError, AttributeError):
        return


def pytest_configure(config: pytest.Config) -> None:
    watch_compiler()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())
