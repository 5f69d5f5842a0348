"""merge and compare: known numbers on hand-made cells, what the chooser can see, resume, refusals, the commands."""

import functools
import itertools
import json
import math
import os
import zipfile
from dataclasses import replace
from importlib.resources import as_file, files

import pytest
import torch
import torch.nn.functional as F
from comparison_cases import (
    NAMES,
    cache,
    short_searches,  # noqa: F401
)
from tiny import normal, prompt
from typer.testing import CliRunner

from mergetune import FeatureCache, Head, Prompt, accuracy, classifier, interpolate, load_solution
from mergetune.cli import app
from mergetune.experiments import Task, compare, merge_solutions
from mergetune.experiments.cells import Cell, Fold
from mergetune.experiments.comparison import WEIGHTS, choose, prepare
from mergetune.experiments.comparison_candidates import candidates
from mergetune.experiments.comparison_tables import summarise
from mergetune.experiments.tables import t_interval
from mergetune.facts import CompareOptions
from mergetune.merging.methods import METHODS
from mergetune.solutions import LinearMap, Stack

QUICK = {"epochs": 1, "precision": "float32"}


def task(name: str = "task", **kwargs) -> Task:
    return Task(name, cache(seed=1), cache(seed=2), **kwargs)


def quick(**kwargs) -> CompareOptions:
    return CompareOptions(
        **{"experts": ("coop:1", "kgcoop:1"), "shots": 4, "tune": QUICK, "fit": QUICK, "grid": {"lam": (8.0,)}} | kwargs
    )


# -- statistics --------------------------------------------------------------------------------------------------------


def test_t_interval_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for count in (2, 3, 4, 7, 12, 41):
        values = normal(count, seed=count).tolist()
        expected = stats.t.interval(0.95, count - 1, sum(values) / count, stats.sem(values))
        assert t_interval(values) == pytest.approx(expected, abs=1e-9)
    assert t_interval([1.0]) is None


def record(right: dict, *, name="a", partition=0, seed=1, scores=None) -> dict:
    """A measured cell: two base and two novel classes of ten images; row -> right answers, base and novel."""
    rows = list(right)
    entries = [
        {"row": row, "options": {}, "experts": 1, "data": "none", "parameters": 4, "seconds": 1.0, "score": 50.0}
        for row in rows
    ]
    return {
        "cell": {"task": name, "partition": partition, "seed": seed},
        "candidates": entries,
        "left_out": {},
        "chosen": {row: i for i, row in enumerate(rows)},
        "classes": {"base": [0, 1], "novel": [2, 3]},
        "images": {"base": [10, 10], "novel": [10, 10]},
        "right": {row: {"base": list(b), "novel": list(n)} for row, (b, n) in right.items()},
    }


def test_a_table_of_known_numbers():
    """Base 80 % and novel 60 % against 70 and 60, then 90 and 60 against 70 and 60, then another dataset."""
    cells = [
        record({"ref": ((7, 7), (6, 6)), "row": ((8, 8), (6, 6))}),
        record({"ref": ((7, 7), (6, 6)), "row": ((9, 9), (6, 6))}, seed=2),
        record({"ref": ((7, 7), (6, 6)), "row": ((7, 7), (6, 6))}, name="b"),
    ]
    found = summarise(cells, reference="ref", resamples=200)
    ref, row = found.lines
    assert ref.values == pytest.approx({"base": 70, "novel": 60, "HM": 2 * 70 * 60 / 130}) and not ref.differences
    assert row.values["base"] == pytest.approx(80) and row.spread["base"] == pytest.approx(10)
    hms = [2 * b * 60 / (b + 60) for b in (80, 90, 70)]
    assert row.values["HM"] == pytest.approx(sum(hms) / 3)
    base = row.differences["base"]
    assert base.mean == pytest.approx(10)
    assert base.cells == pytest.approx(
        (10 - 4.302652729749464 * 10 / math.sqrt(3), 10 + 4.302652729749464 * 10 / math.sqrt(3))
    )
    assert base.datasets == pytest.approx((7.5 - 12.706204736174698 * 7.5, 7.5 + 12.706204736174698 * 7.5))
    assert base.classes == pytest.approx((10, 10))  # every class has moved alike
    assert row.errors == pytest.approx({"base": 0, "novel": 0, "HM": 0}, abs=1e-9)
    assert "| row | 80.0 ± 0.0 | 60.0 ± 0.0 |" in found.markdown()


def test_the_joint_label_space_stands_beside_the_separate_ones():
    cell = record({"ref": ((7, 7), (6, 6)), "row": ((8, 8), (6, 6))})
    for row, (seen, unseen) in {"ref": ((6, 6), (2, 4)), "row": ((6, 6), (4, 4))}.items():
        cell["right"][row] |= {"seen": list(seen), "unseen": list(unseen)}
    found = summarise([cell], reference="ref", resamples=200)
    _, line = found.lines
    joint = {"seen": 60, "unseen": 40, "joint HM": 2 * 60 * 40 / 100}
    assert line.values == pytest.approx({"base": 80, "novel": 60, "HM": 2 * 80 * 60 / 140} | joint)
    assert line.differences["unseen"].mean == pytest.approx(10) and line.differences["seen"].classes == (0, 0)
    assert found.main == "HM" and "joint HM" in found.markdown()
    old = record({"ref": ((7, 7), (6, 6)), "row": ((8, 8), (6, 6))}, seed=2)
    assert list(summarise([cell, old], reference="ref").lines[0].values) == ["base", "novel", "HM"]


def test_the_class_bootstrap_sees_that_one_class_carries_a_gain():
    """Two classes, 100 % and 60 % against 60 % both: drawn twice, once or never, the gain is 40, 20 or 0."""
    found = summarise([record({"ref": ((6, 6), (6, 6)), "row": ((10, 6), (6, 6))})], reference="ref", resamples=4000)
    difference = found.lines[1].differences
    assert difference["base"].mean == pytest.approx(20) and difference["base"].classes == pytest.approx((0, 40))
    assert difference["novel"].classes == pytest.approx((0, 0)) and difference["base"].cells is None
    # Of draws that hold a base class, four of four classes: the gain of one of two is 20 +- 20 or so.
    assert 12 < found.lines[1].errors["base"] < 18


def test_lines_that_a_cell_lacks_are_left_out_and_the_reference_must_be_there():
    cells = [record({"ref": ((7, 7), (6, 6)), "row": ((8, 8), (6, 6))}), record({"ref": ((7, 7), (6, 6))}, seed=2)]
    assert [line.row for line in summarise(cells, reference="ref").lines] == ["ref"]
    with pytest.raises(ValueError, match="reference must be one of ref, got 'row'"):
        summarise(cells, reference="row")


# -- choosing ----------------------------------------------------------------------------------------------------------


def scored(name: str, scores: dict) -> dict:
    entries = [
        {"row": "m", "options": {"t": t}, "score": score, "scores": {"base": score}} for t, score in scores.items()
    ]
    return {"cell": {"task": name, "partition": 0, "seed": 1}, "candidates": entries}


def test_the_best_on_validation_is_chosen_and_of_equals_the_default():
    cells = [scored("a", {0.5: 60, 0.1: 60, 0.9: 59}), scored("b", {0.5: 50, 0.1: 70, 0.9: 59})]
    assert choose(cells) == [{"m": 0}, {"m": 1}]
    assert choose(cells, "others") == [{"m": 1}, {"m": 0}]  # each by the other's scores
    with pytest.raises(ValueError, match="at least two datasets"):
        choose(cells[:1], "others")


def test_select_base_uses_no_label_of_a_novel_class():
    """The best on base classes, or the best harmonic mean of both; on all classes there is nothing to select."""
    cell = scored("a", {0.5: 60, 0.1: 70})
    for entry, (base, novel) in zip(cell["candidates"], ((80, 48), (70, 70)), strict=True):
        entry["scores"] = {"base": base, "novel": novel}
    assert choose([cell]) == choose([cell], select="base") == [{"m": 0}] and choose([cell], select="both") == [{"m": 1}]
    for entry, novel in itertools.product(cell["candidates"], (0, 100)):
        entry["scores"]["novel"] = novel
        assert choose([cell], select="base") == [{"m": 0}]
    whole = scored("a", {0.5: 60, 0.1: 70})
    whole["cell"]["partition"] = None
    assert choose([whole]) == [{"m": 1}]
    for entry in cell["candidates"]:
        del entry["scores"]
    with pytest.raises(ValueError, match="select must be both for the cell a/partition-0/seed-1, got base: an earlier"):
        choose([cell])


def test_a_fold_holds_no_test_image_and_no_image_twice(clip):
    for partition in (0, 1, 2):
        whole = task()
        fold = whole.fold(partition, 4, 1)
        halves = whole.halves(partition)
        drawn, rest = set(fold.train.files), [set(val.files) for val in fold.val.values()]
        assert not drawn & rest[0] and not rest[0] & rest[1] and not (drawn | rest[0] | rest[1]) & set(whole.test.files)
        assert [len(half) for half in halves.values()] == [3, 3] and sorted(halves["base"] + halves["novel"]) == list(
            range(6)
        )
        assert fold.train.classnames == tuple(NAMES[c] for c in halves["base"]) == fold.val["base"].classnames
        assert len(fold.train) == 12 and len(rest[1]) == 30
    assert task().halves(0)["base"] == [0, 1, 2] and task().halves(1) != task().halves(0)
    for name, parts in (("test", (1, 1)), ("test", (1, 2, 2)), ("val", (1, 2, 1))):
        with pytest.raises(ValueError, match=f"{name} must share no image"):
            Task("leak", *(cache(seed=part) for part in parts))
    with pytest.raises(ValueError, match="val must hold images of the base classes .* fewer than 10 shots"):
        task().fold(0, 10, 1)
    given = task(val=cache(seed=3)).fold(1, 10, 1)  # of its own, and features without names
    assert all(len(val) == 30 and val.files[0].startswith("3/") for val in given.val.values())
    nameless = [replace(cache(seed=seed), files=()) for seed in (1, 2)]
    fold = Task("nameless", *nameless).fold(0, 4, 1)
    assert torch.equal(fold.train.tensor(), task().fold(0, 4, 1).train.tensor())


def test_choices_do_not_depend_on_test_images(clip, tmp_path):
    """With other test images a cell has the same candidates, scores and choices; and prepare never reads them."""
    cell, prepared = Cell("task", 0, 1), []

    class Unreadable(FeatureCache):
        def rows(self, index, *args):
            assert not len(index), "test images were read"
            return super().rows(index, *args)

    for number in range(2):
        test = cache(seed=2 + number)
        hidden = Unreadable(**vars(test)) if number else test
        whole = Task("task", cache(seed=1), hidden)
        prepared.append(prepare(clip, whole, cell, quick(), tmp_path / str(number)))
    scores = [[entry["score"] for entry in found["candidates"]] for found in prepared]
    assert scores[0] == scores[1] and choose(prepared)[0] == choose(prepared)[1]
    assert "right" not in prepared[0]
    assert set(Fold.__dataclass_fields__) == {"train", "val", "templates", "seed"}  # all that candidates() is given


# -- compare -----------------------------------------------------------------------------------------------------------


def test_one_call_of_the_tower_gives_each_candidates_own_weights(clip, tmp_path):
    fold = task().fold(0, 4, 1)
    experts = {"far": prompt(1), "away": prompt(2)}
    made = candidates(clip, fold, quick(experts=experts), tmp_path)
    names = fold.val["novel"].classnames
    weights, _ = made.class_weights(names)
    zero = clip.class_embeddings(names)
    own = [solution.class_embeddings(clip, names) for solution in experts.values()]
    by_row = {}
    for candidate, w in zip(made.found, weights, strict=True):
        by_row.setdefault(candidate.row, []).append(w / clip.logit_scale)
    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    close(by_row["zero-shot"][0], zero)
    for row, expected in zip(experts, own, strict=True):
        close(by_row[row][0], expected)
    merged = load_solution(tmp_path / "mergetune-2" / "lam-8")
    close(by_row["MERGETUNE, chosen [2]"][0], merged.class_embeddings(clip, names))
    mean = interpolate(Prompt.from_template(clip), merged, 0.5).class_embeddings(clip, names)
    close(by_row["MERGETUNE + WE, chosen [2]"][0], mean)
    close(by_row["WiSE-FT, class embeddings [1]"][0], F.normalize(zero + own[0], dim=-1))
    close(by_row["logit ensemble with zero-shot [2]"][1], 0.75 * zero + 0.25 * (own[0] + own[1]) / 2)
    close(by_row["Weight average, class embeddings [2]"][0], F.normalize(own[0] + own[1], dim=-1))
    for method in ("TIES", "DARE", "OPCM", "WIDEN", "AdaMerging", "Fisher-weighted average with zero-shot"):
        assert f"{method}, context vectors [2]" in by_row
    assert made.left_out["lines [1]"].startswith("lines needs names with block numbers")
    assert "LoRA" in made.left_out["lora_lego [2]"] and "least 2" in made.left_out["tsv_m [1]"]


def test_compare_repeats_resumes_and_refuses_other_settings(clip, tmp_path, monkeypatch):
    arguments = {"setup": quick(), "partitions": (0, 1), "seeds": (1,)}
    found = compare(clip, task(), tmp_path, **arguments)
    rows = {line.row: line for line in found.lines}
    assert {"zero-shot", "CoOp 1", "KgCoOp 1", "MERGETUNE, chosen [1]", "MERGETUNE, defaults [2]"} < rows.keys()
    assert rows["CoOp 1"].parameters == 64 and rows["logit ensemble with zero-shot [2]"].parameters == 128
    assert rows["zero-shot"].parameters == 0 and rows["MERGETUNE, chosen [1]"].data == "training images, labelled"
    assert rows["TIES, context vectors [2]"].tried == 4 and sum(rows["TIES, context vectors [2]"].options.values()) == 2
    # A line against the library's own evaluation of the saved solution
    cell, whole = tmp_path / "task" / "partition-0" / "seed-1", task()
    solution, test = load_solution(cell / "coop-1"), whole.test.select_classes([3, 4, 5])
    answers = (test.tensor() @ solution.class_embeddings(clip, test.classnames).T).argmax(1)
    saved = json.loads((cell / "cell.json").read_text())
    assert sum(saved["right"]["CoOp 1"]["novel"]) == int((answers == test.labels).sum())
    assert found.to_json()["reference"] == "MERGETUNE, chosen [1]"
    found.save(tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000 and json.loads(
        (tmp_path / "comparison.json").read_text()
    )

    def no_training(*args, **kwargs):
        raise AssertionError("trained again")

    from mergetune.experiments import comparison_candidates

    for job in ("tune_job", "fit_job"):
        monkeypatch.setattr(comparison_candidates, job, no_training)
    assert compare(clip, task(), tmp_path, **arguments).to_json() == found.to_json()
    for file in tmp_path.rglob("cell.json"):  # a record of an earlier version, which chose on both
        old = json.loads(file.read_text())
        assert old.pop("select") == found.select == "base" and "labels of novel" not in found.caption()
        assert found.caption().endswith("Text tower in training: float32.")
        for entry in old["candidates"]:
            del entry["scores"]
        file.write_text(json.dumps(old))
    assert compare(clip, task(), tmp_path, **arguments).to_json() == found.to_json()
    both = compare(clip, task(), tmp_path, **arguments | {"setup": quick(select="both")})
    assert both.select == "both" and "labels of novel classes were used" in both.markdown()
    assert {json.loads(file.read_text())["select"] for file in tmp_path.rglob("cell.json")} == {"both"}
    with pytest.raises(
        ValueError, match="holds results of other settings: shots 4 there, 3 here; choose another --out"
    ):
        compare(clip, task(), tmp_path, **arguments | {"setup": quick(shots=3)})


def test_cells_of_the_same_classes_are_trained_together(clip, tmp_path, monkeypatch):
    """For each of two partitions the experts of both its seeds' cells, then their MERGETUNE runs."""
    from mergetune.training import loop

    groups, train = [], loop._train
    monkeypatch.setattr(loop, "_train", lambda runs: (groups.append(len(runs)), train(runs)))
    grid = quick(grid={"lam": (8.0, 4.0), "tau": (0.3,)})
    found = compare(clip, task(), tmp_path / "all", setup=grid, partitions=(0, 1), seeds=(1, 2))
    assert groups == [2 * 2, 2 * 2 * 2] * 2
    apart = [
        compare(clip, task(), tmp_path / "apart", setup=grid, partitions=(partition,), seeds=(seed,))
        for partition in (0, 1)
        for seed in (1, 2)
    ]
    assert groups[4:] == [2, 2 * 2] * 4 and [cell for part in apart for cell in part.cells] == list(found.cells)
    for cell in found.cells:
        for name in ("coop-1", "kgcoop-1", "mergetune-1/lam-8-tau-0.3", "mergetune-2/lam-4-tau-0.3"):
            pair = [load_solution(tmp_path / folder / cell.folder / name).ctx for folder in ("all", "apart")]
            torch.testing.assert_close(*pair, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weights_kept", [True, False])
def test_a_cell_of_version_0_1_is_not_run_again(clip, tmp_path, monkeypatch, weights_kept):
    """Its file has no joint label space: that is added where the class weights are still there."""
    found = compare(clip, task(), tmp_path, setup=quick())
    folder = tmp_path / Cell("task", 0, 1).folder
    record = json.loads((folder / "cell.json").read_text())
    for parts in record["right"].values():
        del parts["seen"], parts["unseen"]
    (folder / "cell.json").write_text(json.dumps(record))
    if not weights_kept:
        (folder / WEIGHTS).unlink()
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("it trained"))
    again = compare(clip, task(), tmp_path, setup=quick())
    for line, before in zip(again.lines, found.lines, strict=True):
        columns = list(before.values)[: 6 if weights_kept else 3]
        assert line.values == {column: before.values[column] for column in columns}
    assert again.main == "HM" and (again == found) == weights_kept


class Stopped(BaseException):
    """Whatever ends a process."""


@pytest.mark.parametrize("moment", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("experts", "runs")), "cells"])
def test_cells_that_were_stopped_go_on(clip, tmp_path, monkeypatch, moment):
    """While experts are trained, or before MERGETUNE is, or with one of two cells done."""
    from mergetune.experiments import comparison, comparison_candidates
    from mergetune.training import runs

    longer = QUICK | {"epochs": 2}
    arguments = {"setup": quick(tune=longer, fit=longer), "seeds": (1, 2)}
    module, name, number = {
        "experts": (runs, "write_atomically", 3),
        "runs": (comparison_candidates, "fit_job", 1),
        "cells": (comparison, "validated", 2),
    }[moment]
    calls, real = [], getattr(module, name)

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise Stopped
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module, name, stopped)
        compare(clip, task(), tmp_path, **arguments)
    cells = [tmp_path / "task" / "partition-0" / f"seed-{seed}" for seed in (1, 2)]
    trained = {file: file.stat().st_mtime_ns for cell in cells for file in cell.rglob("result.json")}
    assert len(trained) == {"experts": 0, "runs": 4, "cells": 8}[moment]
    states = [len(list(cell.rglob("state.safetensors"))) for cell in cells]
    assert states == {"experts": [2, 0], "runs": [2, 2], "cells": [4, 4]}[moment]
    done = [WEIGHTS in [file.name for file in cell.iterdir()] for cell in cells]
    assert done == [moment == "cells", False]
    found = compare(clip, task(), tmp_path, **arguments)
    assert all(file.stat().st_mtime_ns == before for file, before in trained.items())
    whole = compare(clip, task(), tmp_path / "whole", **arguments)
    assert [(line.row, line.values) for line in found.lines] == [(line.row, line.values) for line in whole.lines]


def test_heads_are_compared_on_all_classes(clip, tmp_path):
    found = compare(clip, task(), tmp_path, setup=quick(experts=("head:1", "head:2")), partitions=(None,))
    rows = {line.row: line for line in found.lines}
    assert list(rows["zero-shot"].values) == ["all"] and "TIES, weights [2]" in rows
    assert not any("class embeddings" in row for row in rows)
    with pytest.raises(ValueError, match="know only their own classes"):
        compare(clip, task(), tmp_path / "halves", setup=quick(experts=("head:1",)))


def test_given_solutions_are_compared_in_one_cell(clip, tmp_path):
    given = quick(experts={"mine": prompt(1), "other": prompt(2)})
    found = compare(clip, task(), tmp_path, setup=given)
    assert {"mine", "other", "MERGETUNE, chosen [2]"} < {line.row for line in found.lines}
    right, test = json.loads((tmp_path / Cell("task", 0, 1).folder / "cell.json").read_text())["right"], task().test
    for row, solution in given.experts.items():
        for part, classes in task().halves(0).items():
            half = test.select_classes(classes)
            answers = (half.tensor() @ solution.class_embeddings(clip, half.classnames).T).argmax(1)
            assert sum(right[row][part]) == int((answers == half.labels).sum())
    with pytest.raises(ValueError, match="belong to one cell, got 2 cells"):
        compare(clip, task(), tmp_path, setup=given, seeds=(1, 2))


def test_stacks_that_map_image_features_are_compared(clip, tmp_path):
    """Each candidate is tested on its own image features, those of MERGETUNE as well, and again from disk."""
    stack = Stack(prompt(1), LinearMap(torch.eye(8) + 0.5 * normal(8, 8, seed=3)))
    given = quick(experts={"mapped": stack})
    found = compare(clip, task(), tmp_path, setup=given)
    assert not any("class embeddings" in line.row for line in found.lines)  # they mean other image features
    folder = tmp_path / Cell("task", 0, 1).folder
    record, test = json.loads((folder / "cell.json").read_text()), task().test
    merged = load_solution(folder / "mergetune-1" / "lam-8")
    for row, solution in (("mapped", stack), ("MERGETUNE, chosen [1]", merged)):
        for part, classes in task().halves(0).items():
            half = test.select_classes(classes)
            report = accuracy(classifier(clip, solution), half)
            assert 100 * sum(record["right"][row][part]) / len(half) == pytest.approx(report.accuracy)
    del record["chosen"]
    (folder / "cell.json").write_text(json.dumps(record))
    assert compare(clip, task(), tmp_path, setup=given) == found


def test_choosing_on_other_datasets(clip, tmp_path):
    tasks = [task("one"), Task("two", cache(seed=5), cache(seed=6))]
    found = compare(clip, tasks, tmp_path, setup=quick(experts=("coop:1",), choose="others"))
    assert found.choose == "others" and {cell.task for cell in found.cells} == {"one", "two"}
    assert found.lines[0].differences["HM"].datasets is not None
    saved = [
        json.loads((tmp_path / name / "partition-0" / "seed-1" / "cell.json").read_text()) for name in ("one", "two")
    ]
    assert [record["chosen"] for record in saved] == choose(saved, "others")
    with pytest.raises(ValueError, match="needs at least two datasets"):
        compare(clip, tasks[0], tmp_path / "x", setup=quick(choose="others"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": ("coop",)}, "experts must be like coop:1"),
        ({"experts": ("coop:0",)}, "experts must be like coop:1"),
        ({"experts": ("coop:1", "coop:1")}, "must not repeat"),
        ({"experts": ()}, "at least one"),
        ({"experts": ("coop:1", "head:1")}, "experts must be of one kind, all heads or all prompts"),
        ({"experts": ("head:1", "head:2", "kgcoop:1")}, "experts must be of one kind, all heads or all prompts"),
        (
            {"experts": {"p": Prompt(torch.zeros(4, 8), "X X X X {}."), "h": Head(torch.eye(2), ("a", "b"))}},
            r"experts must be of one kind, got p \(prompt\), h \(head\)",
        ),
        ({"choose": "test"}, "choose must be validation or others, got 'test'"),
        ({"select": "novel"}, "select must be base or both, got 'novel'"),
        ({"fit": {"weight_ensemble": True}}, "the rows 'MERGETUNE [+] WE' have it"),
    ],
)
def test_a_wrong_plan_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        quick(**change)


# -- the commands ------------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_merge_command_on_solutions_files_and_refusals(clip, tmp_path):
    for number in (1, 2):
        prompt(number).save(tmp_path / f"p{number}")
    Prompt.from_template(clip).save(tmp_path / "zero")
    solutions = [tmp_path / "p1", tmp_path / "p2"]
    done = invoke(
        "merge",
        "task-arithmetic",
        *solutions,
        "--base",
        tmp_path / "zero",
        "--out",
        tmp_path / "m",
        "-o",
        "scale=0.3",
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    merged = load_solution(tmp_path / "m")
    expected = merge_solutions(
        "task_arithmetic", [prompt(1), prompt(2)], base=Prompt.from_template(clip), options={"scale": 0.3}
    )
    assert torch.equal(merged.ctx, expected.ctx) and merged.notes["merged"] == "task_arithmetic"
    assert json.loads(done.stdout)["experts"] == [str(path) for path in solutions]
    listed = invoke("merge", "--list")
    assert listed.exit_code == 0 and "arXiv 2306.01708" in listed.stdout and "widen" in listed.stdout
    assert len(json.loads(invoke("merge", "--list", "--json").stdout)) == len(METHODS)
    for arguments, message in (
        (["ties", *solutions], "--backbone is needed: no backbone is recorded by solution"),
        (["ties", *solutions, "--base", tmp_path / "zero", "-o", "densty=1"], "it has density, scale"),
        (["fisher-average", *solutions, "--base", tmp_path / "zero"], "give --cache"),
        (["ties", tmp_path / "p1", tmp_path / "x.safetensors"], "EXPERTS must be all solutions or all weights"),
        (["average"], "a method, at least one solution or file, and --out"),
    ):
        refused = invoke("merge", *arguments, "--out", tmp_path / "no")
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), refused.stderr
    assert not (tmp_path / "no").exists()


def test_compare_command_wants_data_and_says_so():
    refused = invoke("compare", "--out", "nowhere")
    assert refused.exit_code == 2 and "give folders of caches, or --demo" in refused.stderr
    refused = invoke("compare", "--demo", "--tune", "epoch=3")
    assert refused.exit_code == 2 and "mergetune.tune has no option 'epoch'" in refused.stderr
    refused = invoke("compare", "--demo", "--out", "nowhere", "--expert", "coop:1", "head:1")
    assert refused.exit_code == 2 and "--expert must be of one kind, all heads or all prompts" in refused.stderr
    assert not os.path.exists("nowhere")


def test_from_images_to_a_merge_with_data_and_a_table(tmp_path):
    """The commands one after the other on the embedded CLIP and four of its icons."""
    classes, backbone = ("anchor", "bell", "camera", "heart"), ["--backbone"]
    with as_file(files("mergetune") / "assets") as assets, zipfile.ZipFile(assets / "tilted-icons.zip") as content:
        backbone.append(f"local-dir:{assets / 'icon-clip'}")
        wanted = [name for name in content.namelist() if name.split("/")[1] in classes]
        content.extractall(tmp_path / "images", wanted)
        made = invoke("cache", tmp_path / "images", "--out", tmp_path / "icons", *backbone)
        assert made.exit_code == 0, made.stderr
        arguments = [
            "compare", tmp_path / "icons", *backbone, "--out", tmp_path / "out", "--expert", "coop:1", "kgcoop:1",
            "--seeds", 1, "--shots", 8, "--tune", "epochs=1", "lr=0.01", "--fit", "epochs=1", "--lam", 8, "--tau", 0.3,
            "--template", "an icon of a {}",
        ]  # fmt: skip
        shown = invoke(*arguments)
        assert shown.exit_code == 0 and "MERGETUNE" in shown.stdout and "left out: lines [1]" in shown.stderr
        found = json.loads((tmp_path / "out" / "comparison.json").read_text())
        saved = [tmp_path / "out" / "icons" / "partition-0" / "seed-1" / name for name in ("coop-1", "kgcoop-1")]
        merged = invoke(
            "merge", "adamerging", *saved, "--base", "an icon of a {}", "--cache", tmp_path / "icons" / "train",
            "--classes", "base", "-o", "steps=2", "--out", tmp_path / "merged", *backbone,
        )  # fmt: skip
        assert merged.exit_code == 0, merged.stderr
    columns = ["base", "novel", "HM", "seen", "unseen", "joint HM"]
    assert found["lines"][0]["row"] == "zero-shot" and list(found["lines"][0]["values"]) == columns
    assert load_solution(tmp_path / "merged").notes["data"] == "images without labels"
