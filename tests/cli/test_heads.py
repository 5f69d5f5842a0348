"""Heads on the command line: merged by class name, chosen by name, written as their ending says, without a backbone."""

import json
import pickle

import numpy as np
import pytest
import torch
from cache_cases import TinyClip, draw_images
from safetensors.torch import save_file
from typer.testing import CliRunner

import mergetune as mt
from mergetune.cli import app
from mergetune.io import kind_of_content

FORMS = [".safetensors", ".npz", ".pt", ".bin", ".pkl", ".joblib", ""]  # "": the folder of a solution
CLASSES = ("class 0", "class 1", "class 2")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments):
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A feature cache of a CLIP that cannot be loaded, and two heads on it."""
    folder = tmp_path_factory.mktemp("heads")
    images = draw_images(folder / "images", 12)
    features = mt.cache_features(TinyClip(), images, folder / "cache", progress=False)
    rows = torch.stack([features.tensor()[features.labels == c].mean(0) for c in range(3)])
    for name, count in (("zero", 1.0), ("tuned", 3.0)):
        mt.to_head(mt.Head(count * rows, CLASSES, logit_scale=20.0), folder / f"{name}.safetensors")
    return folder


def head(scale=10.0):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    return mt.Head(weight, CLASSES, bias, logit_scale=scale)


def write(found, file, names=True):
    """A head in the form that the ending says; in a pickle as a dict of arrays."""
    if not file.suffix:
        found.save(file)
        return file
    tensors = {"weight": found.weight, "bias": found.bias}
    about = {"classnames": list(found.classnames), "scale": found.logit_scale} if names else {}
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata={name: json.dumps(value) for name, value in about.items()})
    elif file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()}, **about)
    elif file.suffix in (".pkl", ".joblib"):
        file.write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in tensors.items()} | about))
    else:
        torch.save(tensors | about, file)
    return file


@pytest.mark.parametrize(
    ("form", "other", "out"),
    [
        *zip(FORMS, [*FORMS[1:], FORMS[0]], [".safetensors", ".npz", ".pt", ".pth", "", ".npz", ".pt"], strict=True),
        (".safetensors", ".safetensors", ".safetensors"),
        ("", "", ""),
    ],
)
def test_heads_are_merged_by_class_name_whatever_their_files(tmp_path, form, other, out):
    """The average of a head with itself, in another class order and with another scale, is the head."""
    one, order = head(), ("class 2", "class 0", "class 1")
    a = write(one, tmp_path / f"a{form}")
    b = write(one.in_order_of(order).rescaled(2.0), tmp_path / f"b{other}")
    run("merge", "average", a, b, "--out", tmp_path / f"merged{out}")
    merged = mt.open_solution(tmp_path / f"merged{out}").in_form_of(one)
    assert merged.classnames == CLASSES
    torch.testing.assert_close(merged.weight, one.weight)
    torch.testing.assert_close(merged.bias, one.bias)
    if out:
        assert kind_of_content(tmp_path / f"merged{out}") == {".pt": "torch", ".pth": "torch"}.get(out, out[1:])


@pytest.mark.parametrize("form", [".safetensors", ".pt", ".bin", ".pkl"])
def test_heads_without_class_names_are_merged_with_given_names_only(tmp_path, form):
    a, b = (write(head(), tmp_path / f"{name}{form}", names=False) for name in "ab")
    merge = ("merge", "average", a, b, "--out", tmp_path / "merged.safetensors")
    assert "--classnames must be given for a head whose file does not name its classes" in refusal(*merge)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    run(*merge, "--classnames", tmp_path / "names.txt")
    torch.testing.assert_close(mt.open_solution(tmp_path / "merged.safetensors").weight, head().weight)
    others = write(mt.Head(head().weight, ("x", "y", "z"), head().bias), tmp_path / f"c{form}")
    named = (*merge[:3], others, *merge[4:], "--classnames", tmp_path / "names.txt")
    assert "--classnames must be those of the file, got other names" in refusal(*named)


UNNAMED = "names no classes: its rows are taken in the order of the cache (class 0, class 1, class 2)"


@pytest.mark.parametrize("form", [".safetensors", ".npz", ".pt", ".pkl"])
def test_the_order_of_rows_without_names_is_said_and_can_be_given(work, tmp_path, form):
    order = ("class 2", "class 0", "class 1")
    tuned = mt.open_solution(work / "tuned.safetensors").rescaled(1.0)
    tuned = mt.Head(tuned.weight, CLASSES, torch.zeros(3))
    named = write(tuned, tmp_path / f"named{form}")
    plain = write(tuned.in_order_of(order), tmp_path / f"plain{form}", names=False)
    (tmp_path / "names.txt").write_text("\n".join(order))
    names, cache = ("--classnames", tmp_path / "names.txt"), ("--cache", work / "cache")
    train = (*cache, "--epochs", 1, "--out")
    right = run("eval", *cache, "--solution", named)[str(named)]
    commands = [
        ("eval", *cache, "--solution", plain),
        ("tune", "--method", "head", "--zero-shot", plain, *train, tmp_path / "tune"),
        ("fit", "--tuned", plain, "--zero-shot", named, *train, tmp_path / "fit"),
        ("merge", "average", plain, plain, *cache, "--out", tmp_path / "merged.npz"),
    ]
    for command in commands if form == ".pkl" else commands[:1]:
        said = invoke(*command, "--json")
        assert said.exit_code == 0 and json.loads(said.stdout), said.stderr
        assert f"{plain} {UNNAMED}; --classnames FILE" in " ".join(said.stderr.split()), command
        if command[0] == "eval":
            assert json.loads(said.stdout)[str(plain)]["accuracy"] < right["accuracy"]
        given = invoke(*command, *names, "--json", *([] if command[0] in ("eval", "merge") else ["--overwrite"]))
        assert given.exit_code == 0 and "names no classes" not in given.stderr, given.stderr
        if command[0] == "eval":
            assert json.loads(given.stdout)[str(plain)]["accuracy"] == right["accuracy"]
    assert "names no classes" not in invoke("eval", *cache, "--solution", named).stderr


def test_heads_of_all_classes_are_measured_on_halves(tmp_path):
    """With names in the file or without, the rows of the half are taken."""
    images = draw_images(tmp_path / "images", 16, classes=4)
    features = mt.cache_features(TinyClip(), images, tmp_path / "cache", progress=False)
    rows = torch.stack([features.tensor()[features.labels == c].mean(0) for c in range(4)])
    one = mt.Head(rows, features.classnames, torch.zeros(4))
    files = [write(one, tmp_path / f"named{form}") for form in ("", ".npz", ".pkl")]
    files += [write(one, tmp_path / f"plain{form}", names=False) for form in (".npz", ".safetensors")]
    solutions = [word for file in files for word in ("--solution", file)]
    for part in (["--classes", "base"], ["--classes", "novel"], ["--base-novel"]):
        found = run("eval", "--cache", tmp_path / "cache", *solutions, *part)
        assert all(found[str(file)] == found[str(files[0])] for file in files), part


def test_a_missing_bias_counts_as_zeros_and_heads_that_do_not_fit_are_named(tmp_path):
    one = head()
    a, b = write(one, tmp_path / "a.npz"), write(mt.Head(one.weight, CLASSES, logit_scale=10.0), tmp_path / "b")
    for pair in ((a, b), (b, a)):
        run("merge", "average", *pair, "--out", tmp_path / "merged.npz")
        torch.testing.assert_close(mt.open_solution(tmp_path / "merged.npz").bias, one.bias / 2)
    mt.Head(one.weight[:2], CLASSES[:2]).save(tmp_path / "two")
    mt.Prompt(torch.zeros(4, 6), "X X X X {}.").save(tmp_path / "prompt")
    for other in ("two", "prompt"):
        said = refusal("merge", "average", a, tmp_path / other, "--out", tmp_path / "no")
        assert f"{a} and {tmp_path / other} cannot be merged: " in said


def test_a_merged_solution_is_never_written_below_the_ending_of_another_format(tmp_path):
    mt.Prompt(torch.zeros(4, 6), "X X X X {}.").save(tmp_path / "prompt")
    a = write(head(), tmp_path / "a.npz")
    for suffix in (".pt", ".safetensors", ".npz", ".pkl", ".ckpt", ".onnx"):
        out = tmp_path / f"out{suffix}"
        assert f"--out must be a folder for a merged prompt, got {out}" in refusal(
            "merge", "average", tmp_path / "prompt", tmp_path / "prompt", "--out", out
        )
    for suffix in (".pkl", ".joblib", ".ckpt", ".bin"):
        out = tmp_path / f"out{suffix}"
        assert f"or a folder for a merged head, got {out}" in refusal("merge", "average", a, a, "--out", out)
        for command in (("tune", "--method", "head"), ("fit", "--tuned", a)):
            assert f"--out must be a folder, got {out}" in refusal(*command, "--cache", tmp_path, "--out", out)
    assert not list(tmp_path.glob("out*"))


def test_tensors_of_heads_are_not_merged_row_by_row(tmp_path):
    """mergetune.merging works on bare tensors: it refuses heads whose rows stand for other things."""
    one = head()
    for suffix in (".safetensors", ".pt"):
        a = write(one, tmp_path / f"a{suffix}")
        for other in (one.in_order_of(CLASSES[::-1]), one.rescaled(2.0)):
            b = write(other, tmp_path / f"b{suffix}")
            with pytest.raises(ValueError, match="got another (classnames|scale) in .*b.* than in .*merge_solutions"):
                mt.merging.merge_files(mt.merging.average, None, [a, b], tmp_path / "out.safetensors")
        mt.merging.merge_files(mt.merging.average, None, [a, a], tmp_path / "out.safetensors")


def test_the_name_of_a_weight_chooses_among_several(work, tmp_path):
    rows = mt.open_solution(work / "tuned.safetensors").weight
    file = tmp_path / "probes.pt"
    torch.save({"model": {"first.weight": -rows, "second.weight": rows}, "classnames": list(CLASSES)}, file)
    both = r"first.weight [3, 6], second.weight [3, 6]"
    for command in (
        ("eval", "--cache", work / "cache", "--solution", file),
        ("fit", "--cache", work / "cache", "--tuned", file, "--out", tmp_path / "fit"),
        ("merge", "average", file, file, "--out", tmp_path / "merged"),
        ("predict", file, work / "images"),
        ("export", file, "--to", "head", "--out", tmp_path / "head.npz"),
    ):
        assert both in refusal(*command), command
        assert "--name must be that of a weight" in refusal(*command, "--name", "third.weight"), command
    found = run("eval", "--cache", work / "cache", "--solution", file, "--name", "second.weight")
    expected = run("eval", "--cache", work / "cache", "--solution", work / "tuned.safetensors")
    assert found[str(file)]["accuracy"] == expected[str(work / "tuned.safetensors")]["accuracy"]
    run("merge", "average", file, file, "--out", tmp_path / "merged", "--name", "first")
    assert torch.equal(mt.open_solution(tmp_path / "merged").weight, -rows)


def test_heads_need_no_backbone(work, tmp_path):
    """The cache's backbone cannot be loaded, and nothing asks for one: tune, fit, eval and merge."""
    zero, common = work / "zero.safetensors", ("--cache", work / "cache", "--epochs", 2, "--out")
    run("tune", "--method", "head", "--zero-shot", zero, *common, tmp_path / "tuned")
    run("fit", "--tuned", tmp_path / "tuned", "--zero-shot", zero, *common, tmp_path / "fit")
    found = run("eval", "--cache", work / "cache", "--solution", tmp_path / "fit", "--solution", zero)
    assert list(found) == [str(tmp_path / "fit"), str(zero)]
    fitted = mt.load_solution(tmp_path / "fit")
    assert (fitted.backbone, fitted.fingerprint, fitted.logit_scale) == ("tiny", "tiny weights", 20.0)
    run("merge", "fisher-average", tmp_path / "fit", zero, "--cache", work / "cache", "--out", tmp_path / "merged")
    for command in (
        ("tune", "--method", "head", *common, tmp_path / "a"),
        ("fit", "--tuned", tmp_path / "tuned", *common, tmp_path / "b"),
    ):
        assert "records the backbone" in refusal(*command)  # templates need the text tower
