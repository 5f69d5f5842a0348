"""What a newcomer reads: errors that name options, help in a narrow terminal, and warnings."""

import inspect

import pytest
from miniature import write_miniature
from typer.testing import CliRunner

import mergetune as mt
from mergetune.cli import app
from mergetune.cli.shared import warn_of_few
from mergetune.data import ImageList


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "tune --cache {gone} --out {out} --backbone {icons}",
            "--cache must be a feature cache, got {gone}, which does not exist: `mergetune cache IMAGES",
        ),
        *(
            (command, f"{option} must be a solution (a folder with solution.json, a checkpoint of CoOp, or the file of")
            for command, option in (
                ("export {gone} --to classifier --out {out}.pt", "SOLUTION"),
                ("predict {gone} {cache}", "SOLUTION"),
                ("merge ties {gone} {gone}-2 --out {out}", "EXPERTS"),
                ("merge ties {gone} {gone}-2 --out {out} --device cpu --base {gone}-3", "EXPERTS"),
                ("fit --cache {cache} --out {out} --backbone {icons} --tuned {gone}", "--tuned"),
                ("eval --cache {cache} --solution {gone}", "--solution"),
                ("path --cache {cache} --tuned {gone} --solution {gone}-2", "--solution"),
                ("tune --cache {cache} --out {out} --method residual --base {gone}", "--base"),
            )
        ),
        ("predict {gone} {cache} --device cuda:99", "--device must be a device of this machine"),
        ("demo --seeds 1 1 --out {out}", "--seeds must not repeat, got [1, 1]"),
        ("demo --seeds -1 --out {out}", "--seeds must be 0 or more, got -1"),
        ("compare {gone} --seeds 1 1 --out {out}", "--seeds must not repeat, got [1, 1]"),
        ("tune --cache {gone} --out {out} --backbone {icons} --device cuda:99", "--device must be a device of this"),
        ("tune --cache {gone} --out {out} --backbone {icons} --device gpu", "--device must be a device of torch such"),
        (
            "tune --cache {gone} --out {out} --backbone ViT-B-32",
            "--pretrained must name the weights of 'ViT-B-32'",
        ),
        ("tune --cache {cache} --out {out} --backbone {icons} --momentum -1", "--momentum must be finite and not"),
        ("tune --cache {cache} --out {out} --backbone {icons} --method head --n-ctx 4", "--n-ctx must be left out for"),
        ("tune --cache {cache} --out {out} --backbone {icons} --kg-weight 4", "--kg-weight must be left out for"),
        (
            "tune --cache {cache} --out {out} --backbone {icons} --method map --position front",
            "--position must be left out for method 'map', which does not use it, got 'front'",
        ),
        (
            "fit {cache} --out {out} --backbone {icons}",
            "IMAGES must hold one folder per class, got {cache}: it holds no",
        ),
    ],
)
def test_an_error_names_the_option(places, tmp_path, arguments, message):
    places = places | {"icons_folder": places["icons"].removeprefix("local-dir:")}
    places |= {"gone": str(tmp_path / "gone"), "out": str(tmp_path / "out")}
    assert f"error: {message.format(**places)}" in said(*arguments.format(**places).split())
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The embedded CLIP, and a cache of a few images."""
    folder, icons = tmp_path_factory.mktemp("features"), f"local-dir:{mt.__path__[0]}/assets/icon-clip"
    write_miniature(folder, "eurosat", images_per_class=8, classes=2, size=48)
    done = invoke("cache", "EuroSAT", "--root", folder, "--out", folder / "cache", "--backbone", icons)
    assert done.exit_code == 0, done.stderr
    return {"icons": icons, "cache": str(folder / "cache" / "train")}


@pytest.mark.parametrize("command", [info.name or info.callback.__name__ for info in app.registered_commands])
def test_help_in_a_narrow_terminal_cuts_no_name_short(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    words = shown.stdout.replace(",", " ").split()
    found = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    options = {word.strip("│,") for word in found.stdout.replace(",", " ").split() if word.startswith("--")}
    assert shown.exit_code == 0 and "…" not in shown.stdout and options <= set(words), options - set(words)
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_more_shots_than_images_are_told(capsys):
    drawn = ImageList(root="x", files=("a", "b", "c", "d"), labels=(0, 0, 0, 1), classnames=("cat", "dog"))
    for shots, message in ((None, ""), (1, ""), (2, "1 of 2 classes have fewer than --shots 2 images: 1")):
        warn_of_few(shots, drawn)
        assert message in capsys.readouterr().err
    warn_of_few(100_000, drawn)
    assert "every class has fewer than --shots 100000 images: 1 to 3" in " ".join(capsys.readouterr().err.split())


def test_the_summary_of_every_command_is_a_whole_sentence():
    """The first paragraph of a docstring stands in the list of commands."""
    summaries = {found.callback: inspect.getdoc(found.callback).split("\n\n")[0] for found in app.registered_commands}
    assert len(summaries) > 10
    assert [text for text in summaries.values() if not text.endswith(".")] == []
