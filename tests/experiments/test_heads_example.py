"""The example heads: one cell on made-up features, and its tables on hand-made records."""

import importlib
import sys
from pathlib import Path

import pytest
from comparison_cases import NAMES, cache

from mergetune.experiments import Task

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "heads"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("domains", "run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))  # run.py adds the folder of the domains
    found = importlib.import_module("run")
    yield found
    sys.modules.pop("run", None)  # the examples' scripts share this name


def test_a_cell_has_every_row_and_column(run, clip, monkeypatch):
    task, cell = Task("task", cache(seed=1), cache(seed=2)), run.Cell(1, classes=2, shots=2, lr=0.01, seed=1)
    own, new = run.classes_of(len(NAMES), cell)
    assert len(own) == len(new) == 2 and not set(own) & set(new)
    record = run.run_cell(clip, task, [cache(seed=3)], cell, "table")
    plain = ["MERGETUNE", "MERGETUNE, weight 8", "MERGETUNE, as weight 8 at scale 100"]
    assert list(record["rows"])[-6:] == plain + [f"{row} + WE" for row in plain]
    assert all(tuple(row) == run.COLUMNS and 0 <= row["mean"] <= 100 for row in record["rows"].values())
    monkeypatch.setattr(run, "GRID", (0.0, 8.0))
    assert list(run.run_cell(clip, task, [cache(seed=3)], cell, "rule")["rows"])[-2:] == ["lam 0", "lam 8"]


def test_stages_share_no_partition_and_tables_say_what_is_surely_ahead(run):
    stages = [{cell.partition for cell in run.cells_of(stage)} for stage in ("rule", "table")]
    assert stages == [{0, 1}, {2, 3}]
    rows = {"MERGETUNE": 70.0, "better": 71.0, "worse": 69.0}
    records = [
        {
            "cell": {"partition": partition, "seed": 1, "classes": classes},
            "rows": {row: dict.fromkeys(run.COLUMNS, value + 0.1 * partition) for row, value in rows.items()},
        }
        for partition in (2, 3)
        for classes in (50, 12, 5)
    ]
    table = run.final_table(records)
    assert "| **better** | 71.25 | 71.25 | 71.25 | 71.25 | +1.00 (+1.00 to +1.00) |" in table
    assert "| worse |" in table and "| MERGETUNE | 70.25 | 70.25 | 70.25 | 70.25 |  |" in table
    assert "| better | 71.25 | 71.25 | 71.25 | 71.25 |" in run.rule_table(records)
