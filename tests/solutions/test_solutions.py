"""Prompt and Head: class embeddings, files that come back bit for bit, and everything that must be refused."""

import json
import os
from dataclasses import replace

import pytest
import torch
from solution_cases import KINDS, TEMPLATE, assert_same, make
from tiny import NAMES, normal, parameter, with_parameter

from mergetune import Head, Prompt, interpolate, load_solution, temperature_of, with_temperature
from mergetune.solutions import write_notes

# -- interpolation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_interpolate(clip, kind, t):
    a = make(clip, kind)
    b = with_parameter(a, normal(*parameter(a).shape, seed=5), notes={"b": 1})
    mixed = interpolate(a, b, t)
    torch.testing.assert_close(parameter(mixed), (1 - t) * parameter(a) + t * parameter(b))
    if t in (0.0, 1.0):
        assert torch.equal(parameter(mixed), parameter(b if t else a))


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_heads_of_two_scales_are_interpolated_by_their_logits(t):
    a, b = Head(normal(3, 8), NAMES, logit_scale=2.0), Head(normal(3, 8, seed=1), NAMES, logit_scale=0.5)
    mixed = interpolate(a, b, t)
    expected = (1 - t) * a.logit_scale * a.weight + t * b.logit_scale * b.weight
    torch.testing.assert_close(mixed.logit_scale * mixed.weight, expected)


def test_prompts_with_other_words_behind_the_name_have_no_line_between_them():
    with pytest.raises(ValueError, match="must end alike"):
        interpolate(Prompt(normal(4, 16), TEMPLATE), Prompt(normal(4, 16), "X X X X {}, a pet."), 0.5)


def test_prompts_with_the_name_elsewhere_have_no_line_between_them():
    with pytest.raises(ValueError, match="must have one position, got end, front"):
        interpolate(Prompt(normal(4, 16), TEMPLATE), Prompt(normal(4, 16), TEMPLATE, position="front"), 0.5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: Prompt(normal(3, 8), TEMPLATE), TypeError, "one kind, got prompt and head"),
        (lambda a: replace(a, weight=normal(3, 7)), ValueError, "equal shapes"),
        (lambda a: replace(a, classnames=("cow", *NAMES[1:])), ValueError, "class 0 must be 'cat', got 'cow'"),
    ],
)
def test_what_cannot_stand_on_one_line_is_refused(clip, change, error, match):
    head = make(clip, "head")
    with pytest.raises(error, match=match):
        interpolate(change(head), head, 0.5)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_bit_for_bit(clip, tmp_path, kind):
    solution = make(clip, kind)
    solution.save(tmp_path / "new" / "folder")
    for load in (type(solution).load, load_solution):
        assert_same(load(tmp_path / "new" / "folder"), solution)
    loaded = load_solution(str(tmp_path / "new" / "folder"))
    loaded.save(tmp_path / "new" / "folder")  # onto the files that it was read from
    assert_same(load_solution(tmp_path / "new" / "folder"), solution)
    assert_same(loaded, solution)
    files = sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    assert files == ["solution.json", "solution.safetensors"]


@pytest.mark.parametrize("stages", [1, 90, 255, 300, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_notes_of_many_stages_leave_a_solution_readable(clip, tmp_path, kind, stages):
    notes = {"settings": {"stage": "tune"}}
    for stage in range(stages):
        notes = {"settings": {"stage": "fit", "number": stage}, "start": notes}
    solution = replace(make(clip, kind), notes=notes)
    solution.save(tmp_path)
    read = load_solution(tmp_path)
    assert_same(replace(read, notes={}), replace(solution, notes={}))
    assert read.notes["settings"]["number"] == stages - 1  # the last stages stay
    assert read.notes == notes or stages > 90
    write_notes(tmp_path, notes)
    assert load_solution(tmp_path).notes == read.notes


def test_saving_writes_nothing_if_the_notes_are_not_json(clip, tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        replace(make(clip, "head"), notes={"tensor": torch.zeros(1)}).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["writing", "first rename", "second rename"])
def test_a_save_that_is_cut_off_leaves_one_whole_solution_or_none(clip, tmp_path, monkeypatch, moment):
    """New weights under the old description would be another model."""
    old, new, renames = make(clip, "shared"), Prompt(normal(4, 16, seed=9), "an icon of the {}"), []
    old.save(tmp_path)

    def fail(*_, **__):
        raise OSError("disk full")

    def rename(source, target, real=os.replace):
        renames.append(target)
        (fail if len(renames) == ("first rename", "second rename").index(moment) + 1 else real)(source, target)

    if moment == "writing":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(OSError, match="disk full"):
        new.save(tmp_path)
    try:
        found = load_solution(tmp_path)
    except ValueError:
        return  # refused is fine: the mixture is not
    assert_same(found, old)


def test_non_contiguous_and_reduced_precision_survive(tmp_path):
    ctx = normal(16, 4).half().T
    Prompt(ctx, TEMPLATE).save(tmp_path)
    assert torch.equal(Prompt.load(tmp_path).ctx, ctx)


def test_a_missing_file_is_named(clip, tmp_path):
    for load in (Prompt.load, Head.load, load_solution):
        with pytest.raises(FileNotFoundError, match="must be a folder with solution.json"):
            load(tmp_path / "missing")
    make(clip, "shared").save(tmp_path)
    (tmp_path / "solution.safetensors").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="solution.safetensors"):
        Prompt.load(tmp_path)


def test_the_wrong_kind_is_refused(clip, tmp_path):
    make(clip, "head").save(tmp_path)
    with pytest.raises(ValueError, match="must hold a prompt, got 'head'"):
        Prompt.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "must be JSON"),
        ("", "must be JSON"),
        (b"\xff\xfe\x00", "must be JSON"),
        ("[]", "the content must be an object, got a list of 0"),
        ("{}", "must have format"),
        ({"format": "something"}, "must have format"),
        ({"version": 2}, "must have version 1, got 2; update mergetune"),
        ({"version": None}, "must have version 1, got null"),
        (
            {"kind": "adapter"},
            "kind must be one of prompt, head, templates, residual, map, lora, parameters, stack, got 'adapter'",
        ),
    ],
)
def test_a_damaged_description_is_refused(clip, tmp_path, content, match):
    make(clip, "shared").save(tmp_path)
    file = tmp_path / "solution.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content})
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=match):
        load_solution(tmp_path)


@pytest.mark.parametrize("change", ["-template", "-classnames", "-backbone", "-notes", "classnames=5", "template=5"])
def test_a_description_that_lacks_something_is_refused(clip, tmp_path, change):
    make(clip, "shared").save(tmp_path)
    config = json.loads((tmp_path / "solution.json").read_text())
    name = change.strip("-").split("=")[0]
    config = {**config, name: 5} if "=" in change else {k: v for k, v in config.items() if k != name}
    (tmp_path / "solution.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="solution.json"):
        load_solution(tmp_path)


def test_files_from_before_the_other_positions_have_the_name_at_the_end(clip, tmp_path):
    make(clip, "shared").save(tmp_path)
    config = json.loads((tmp_path / "solution.json").read_text())
    assert config.pop("position") == "end"
    (tmp_path / "solution.json").write_text(json.dumps(config))
    assert_same(load_solution(tmp_path), make(clip, "shared"))
    for wrong in ("start", 5, ["end"]):
        (tmp_path / "solution.json").write_text(json.dumps({**config, "position": wrong}))
        with pytest.raises(ValueError, match="position must be one of"):
            load_solution(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "another"])
def test_damaged_weights_are_refused(clip, tmp_path, damage):
    make(clip, "shared").save(tmp_path)
    file = tmp_path / "solution.safetensors"
    if damage == "another":
        make(clip, "head").save(tmp_path / "head")
        (tmp_path / "head" / "solution.safetensors").replace(file)
    else:
        file.write_bytes({"truncated": file.read_bytes()[:-8], "empty": b"", "noise": bytes(range(256))}[damage])
    with pytest.raises(ValueError, match="solution.safetensors"):
        load_solution(tmp_path)


@pytest.mark.parametrize("t", [1e-300, 1e-4, 1e4, 1e308, 10**400, float("inf"), float("nan"), 0, -1, True, "1"])
def test_a_temperature_that_floats_cannot_follow_is_refused(t):
    head = Head(torch.eye(2), ("cat", "dog"))
    with pytest.raises(ValueError, match="must be a finite number above 0, from 0.001 to 1000, got"):
        temperature_of(replace(head, notes={"temperature": t}))
    with pytest.raises(ValueError, match="t must be a finite number above 0"):
        with_temperature(head, t)


@pytest.mark.parametrize("scale", [1e-300, 1e-31, 1e31, 1e308, float("inf"), float("nan"), 0.0, -1.0])
def test_a_scale_that_floats_cannot_follow_is_refused(scale):
    with pytest.raises(ValueError, match="logit_scale must be positive and finite, from 1e-12 to 1e"):
        Head(torch.eye(2), ("cat", "dog"), logit_scale=scale)
