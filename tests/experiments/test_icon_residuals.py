"""The example icon_residuals: its domains, one short cell of it, and its table on hand-made cells."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mergetune as mt
from mergetune.experiments.icons import TEMPLATE, load_icons

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "icon_residuals"


@pytest.fixture
def example(monkeypatch):
    """The example's scripts by name, as Python finds them when one of them is started."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("domains", "run", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import domains
    import run
    import tables

    return {"domains": domains, "run": run, "tables": tables}


def test_domains_have_the_files_of_the_clean_icons_and_look_the_same_every_time(example, tmp_path):
    icon = np.full((48, 48, 3), 255, np.uint8)
    icon[12:36, 20:28] = 0
    for name in ("train/anchor/a.png", "train/anchor/b.png", "test/anchor/c.png"):
        (tmp_path / "icons" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(icon).save(tmp_path / "icons" / name)
    domains, out = example["domains"], tmp_path / "out"
    domains.main(out, icons=tmp_path / "icons")
    assert sorted(folder.name for folder in out.iterdir()) == ["badge", "clean", "noisy", "tilted"]
    assert len(list((out / "tilted").rglob("*.png"))) == 4137
    for name, change in {"noisy": domains.noisy, "badge": domains.badge}.items():
        domains.write_changed(out / "clean", tmp_path / "again" / name, change)
        files = sorted(file.relative_to(out / name) for file in (out / name).rglob("*.png"))
        assert files == sorted(file.relative_to(tmp_path / "icons") for file in (tmp_path / "icons").rglob("*.png"))
        drawn = [(out / name / file).read_bytes() for file in files]
        assert drawn == [(tmp_path / "again" / name / file).read_bytes() for file in files]
        assert len(set(drawn)) == 3  # each file's name decides how it is drawn
    badge = np.asarray(Image.open(out / "badge" / "test" / "anchor" / "c.png"), int)
    assert badge.max() > 240 and (badge[0, 0] == badge[0, -1]).all() and badge[0, 0].max() <= 179  # on one dark colour
    noisy = np.asarray(Image.open(out / "noisy" / "test" / "anchor" / "c.png"), int)
    assert noisy.std() > 40


def test_one_short_cell(example, tmp_path):
    run = example["run"]
    clip, icons = load_icons(tmp_path)
    images = icons.select(range(0, 100, 17))  # 6 classes
    short = run.Settings(shots=4, prompts={"epochs": 1}, repair={"epochs": 1}, tops={"epochs": 20, "lam": 0.0})
    some = {"partitions": [1], "seeds": [1], "settings": short}
    results = run.run(clip, images, tmp_path / "out", **some)
    texts = ("zero-shot", "CoOp", "KgCoOp", "WiSE-FT a=.5", "MERGETUNE")
    tops = ("", " + map", " + residual", " + map + residual")
    assert list(results["rows"]) == [*(text + top for text in texts for top in tops), "logit ensemble"]
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 2 + 21
    for text in texts:  # a residual of the learned classes leaves the others as they are
        for top in ("", " + map"):
            plain, residual = (results["rows"][text + top + more]["mean"] for more in ("", " + residual"))
            assert residual["novel"] == plain["novel"]
    assert all(row["mean"]["seen"] <= row["mean"]["base"] for row in results["rows"].values())

    (file,) = (tmp_path / "out" / "cells").iterdir()
    written = file.stat().st_mtime_ns
    assert run.run(clip, images, tmp_path / "out", **some) == results
    assert file.stat().st_mtime_ns == written  # a cell that is there is not measured again
    with pytest.raises(ValueError, match="partition-1-seed-1.json was measured with other settings: give another"):
        run.run(clip, images, tmp_path / "out", **some | {"settings": run.Settings()})

    names = ("anchor", "apple", "archive")
    coop = mt.Prompt.from_template(clip, TEMPLATE)
    head = run.wise_ft(clip, mt.Templates(("a {}",)), coop, names)
    ends = [solution.class_embeddings(clip, names) for solution in (mt.Templates(("a {}",)), coop)]
    expected = torch.nn.functional.normalize(ends[0] + ends[1], dim=1)
    torch.testing.assert_close(head.class_embeddings(clip, names), expected)


# -- the table ---------------------------------------------------------------------------------------------------------


def cell(seed: int, base: list[int], **right: list[int]) -> dict:
    """A cell of four classes with ten test images each; right answers by row, one more wrong per class in "joint"."""
    return {
        "partition": 0, "seed": seed, "base": base, "images": [10] * 4, "backbone": "", "template": "", "settings": {},
        "right": {row: {"half": found, "joint": [n - 1 for n in found]} for row, found in right.items()},
    }  # fmt: skip


def hand_made(example) -> list[dict]:
    t = example["tables"]
    others = {name: [5, 5, 5, 5] for name in (t.WISE, t.MERGETUNE, t.REFERENCES[3])}
    return [
        cell(seed, [0, 1], **{"zero-shot": [6 + up, 8 + up, 7, 7], t.KGCOOP: [6, 8, 7, 7], **others})
        for seed, up in ((1, 0), (2, 1), (3, 2))
    ]


def test_means_and_paired_differences(example):
    row = example["tables"].summarise(hand_made(example))["rows"]["zero-shot"]
    hm = [70.0, 2 * 80 * 70 / 150, 2 * 90 * 70 / 160]
    joint = [60.0, 2 * 70 * 60 / 130, 2 * 80 * 60 / 140]
    for column, expected in {
        "base": 80,
        "novel": 70,
        "HM": sum(hm) / 3,
        "seen": 70,
        "joint HM": sum(joint) / 3,
    }.items():
        assert row["mean"][column] == pytest.approx(expected)
    found = row["differences"]["KgCoOp"]["HM"]
    above = [value - 70 for value in hm]
    mean = sum(above) / 3
    reach = 4.302653 * (sum((value - mean) ** 2 for value in above) / 2 / 3) ** 0.5  # t of 2 degrees of freedom
    assert found["mean"] == pytest.approx(mean)
    assert found["cells"] == pytest.approx([mean - reach, mean + reach])
    assert found["higher"] == 2
    assert found["classes"][0] <= mean <= found["classes"][1]
    assert found["classes"][0] >= 0  # no draw of classes turns the difference round


def test_domains_stand_side_by_side(example, tmp_path, capsys):
    tables = example["tables"]
    rows = [text + top for text in tables.TEXTS for top in tables.TOPS]
    right = {row: [6, 6, 6, 6] for row in rows} | {tables.MERGETUNE: [8, 8, 8, 8]}
    for domain, cells in (("one", 1), ("two", 2)):
        (tmp_path / domain).mkdir()
        results = tables.summarise([cell(seed, [0, 1], **right) for seed in range(cells)])
        (tmp_path / domain / "results.json").write_text(json.dumps(results))
    tables.main([tmp_path / "one", tmp_path / "two"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | one | two |"
    assert lines[2] == "| MERGETUNE, to KgCoOp: HM | +20.00; +20.00 to +20.00 | +20.00 ± 0.00; +20.00 to +20.00 |"


def test_rows_above_mergetune_are_bold(example):
    tables = example["tables"]
    lines = tables.markdown(tables.summarise(hand_made(example))).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| **zero-shot**", "| **KgCoOp**", "| WiSE-FT a=.5", "| MERGETUNE", "| MERGETUNE + map + residual",
    ]  # fmt: skip
    assert lines[2].split(" | ")[1] == "80.0 / 70.0 / 74.47"


def test_one_cell_has_no_interval_over_cells(example):
    tables = example["tables"]
    results = tables.summarise(hand_made(example)[1:2])
    assert results["rows"]["zero-shot"]["differences"]["KgCoOp"]["HM"]["cells"] is None
    assert "±" not in tables.markdown(results)
