"""What reaches the terminal: no control character of a file or a name, and no message of any length."""

import warnings

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mergetune as mt
from mergetune.cli import app, shared
from mergetune.training import run_folder

STEERING = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202e\nnext"
ESCAPED = r"\x1b[31mred\x1b]0;title\x07 \x9b2J \u202e\nnext"


def assert_harmless(text: str) -> None:
    assert ESCAPED in text
    assert all(letter.isprintable() for letter in text.replace("\n", ""))
    assert not any(line.startswith("next") for line in text.splitlines())


def fail():
    with shared.errors():
        raise ValueError(f"the file {STEERING} is no file")


def warn():
    warnings.warn(f"the file {STEERING} is left out", stacklevel=1)


@pytest.mark.parametrize(
    "show",
    [
        lambda: shared.tell(f"Solution: {STEERING}"),
        lambda: shared.announce(False)(f"encoding {STEERING}"),
        lambda: shared.complain("damaged", STEERING),
        lambda: shared.print_table("solution", [(STEERING, {"accuracy": "61.2", "[/]": STEERING}, None)]),
        lambda: shared.print_table("solution", [("a", {STEERING: "61.2"}, None)]),
    ],
)
def test_control_characters_are_escaped(show, capsys, monkeypatch):
    monkeypatch.setattr(shared.out, "_width", 200)
    monkeypatch.setattr(shared.err, "_width", 200)
    show()
    assert_harmless("".join(capsys.readouterr()))


def test_control_characters_in_errors_and_records_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(shared.out, "_width", 200)
    refused = CliRunner().invoke(app, ["runs", str(tmp_path / STEERING)])
    assert refused.exit_code == 2
    assert_harmless(refused.stderr)
    for lam in (STEERING, "b"):
        run_folder(tmp_path, {"lam": lam, "images": f"{len(lam):016x}"}, in_words={"images": STEERING})
    assert_harmless(CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout)


@pytest.mark.filterwarnings("default")
def test_control_characters_in_warnings_are_escaped(capsys):
    from mergetune.cli.terminal import visible_warnings

    with visible_warnings():
        print(warnings.formatwarning(UserWarning(STEERING), UserWarning, "file.py", 1))
    assert_harmless(capsys.readouterr().out)


def test_a_long_message_lacks_its_middle(tmp_path):
    run_folder(tmp_path, {"lam": 8})
    refused = CliRunner().invoke(app, ["runs", str(tmp_path), "--sort", "y" * 3_000_000 + "end"])
    assert refused.exit_code == 2 and len(refused.stderr) < 2_200
    assert "--sort must be one of" in refused.stderr and "characters ...]" in refused.stderr
    assert refused.stderr.rstrip().endswith("end'")


def test_a_long_name_in_a_table_lacks_its_middle(capsys):
    shared.print_table("solution", [("x" * 3_000_000, {"accuracy": "61.2"}, None)])
    assert "61.2" in (shown := capsys.readouterr().out) and shown.count("x") == 300


@pytest.mark.parametrize("name", ["local-dir:/etc", "local-dir:/gone", "no-such-model/x", "local-dir:\x1b[31m"])
def test_a_recorded_backbone_that_cannot_be_loaded_is_named_with_its_record(tmp_path, name):
    mt.Head(torch.eye(2), ("cat", "dog"), backbone=name).save(tmp_path / "head")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    refused = CliRunner().invoke(app, ["predict", str(tmp_path / "head"), str(tmp_path / "a.png")])
    said = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and "records the backbone" in said and "--backbone" in said
    assert "head" in said and "\x1b" not in refused.stderr


def test_predict_refuses_an_unknown_position(tmp_path):
    refused = CliRunner().invoke(app, ["predict", "a photo of a {}.", "a.png", "--position", "x"])
    assert refused.exit_code == 2 and "--position must be one of end, middle, front, got 'x'" in refused.stderr
