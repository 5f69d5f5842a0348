"""What the commands print: tables of base and novel classes on wide and on narrow terminals."""

import pytest

from mergetune.cli import shared

HALVES = ("base", "novel", "HM", "seen", "unseen", "joint HM")


@pytest.mark.parametrize(("width", "tables"), [(120, 1), (80, 2)])
def test_the_joint_label_space_stands_below_where_the_terminal_is_too_narrow(width, tables, monkeypatch, capsys):
    monkeypatch.setattr(shared.out, "_width", width)
    rows = [
        ("zero-shot", {column: "61.25 ± 2.50" for column in HALVES}, None),
        ("published", {column: "70.75" for column in HALVES[:3]}, "dim"),
    ]
    shared.print_table("solution", rows, title="Accuracy")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and "Accuracy" in lines[0]
    heads = [line.strip("┃").split("┃") for line in lines if "solution" in line]
    assert len(heads) == tables and [cell.strip() for head in heads for cell in head[1:]] == list(HALVES)
    assert sum(line.count("61.25 ± 2.50") for line in lines) == len(HALVES)
    assert sum("published" in line for line in lines) == 1 and sum(line.count("70.75") for line in lines) == 3
