"""Predictions of pictures: those on cached features, for every kind of input, in its order, with errors as rows."""

import itertools
import json
import os
import zipfile
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hard_kinds import Adapter, DeepPrompt, Lora, clip_of
from PIL import EpsImagePlugin, Image
from tiny import NAMES, cache, head, prompt, tiny_clip, tiny_model

import mergetune as mt
from mergetune.clip import image_tokens
from mergetune.evaluation import temperature_of
from mergetune.solutions import known_classes

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("anchor", "bell", "camera", "heart")


@pytest.fixture(scope="module")
def icon_clip():
    with as_file(files("mergetune") / "assets" / "icon-clip") as folder:
        return mt.load_clip(f"local-dir:{folder}")


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    """A folder without classes: 60 embedded icons of four classes."""
    folder = tmp_path_factory.mktemp("icons")
    with as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        names = sorted(name for name in content.namelist() if name.split("/")[1] in CLASSES)[:60]
        for name in names:
            (folder / name.replace("/", "-")).write_bytes(content.read(name))
    assert len(list(folder.iterdir())) == 60
    return folder


@pytest.fixture(scope="module")
def features(icon_clip, icons, tmp_path_factory):
    listed = sorted(path.name for path in icons.iterdir())
    images = mt.ImageList(icons, listed, [CLASSES.index(name.split("-")[1]) for name in listed], CLASSES)
    return mt.cache_features(icon_clip, images, tmp_path_factory.mktemp("cache") / "all", progress=False)


@pytest.fixture(scope="module")
def solutions(icon_clip, features):
    """A trained solution of every kind that classifies alone."""
    epochs = {"epochs": 2, "progress": False, "precision": "float32"}
    tuned = mt.tune(icon_clip, features, template="an icon of a {}", **epochs).solution
    found = {
        "prompt": tuned,
        "class-specific": mt.tune(icon_clip, features, class_specific=True, **epochs).solution,
        "head": mt.tune(icon_clip, features, method="head", **epochs).solution,
        "residual": mt.tune(icon_clip, features, method="residual", base=tuned, **epochs).solution,
        "map": mt.tune(icon_clip, features, method="map", zero_shot="an icon of a {}", **epochs).solution,
    }
    found["residual on a head"] = mt.tune(icon_clip, features, method="residual", base=found["head"], **epochs).solution
    found["fit"] = mt.fit(icon_clip, features, tuned, **epochs).solution
    return found


KINDS = ["prompt", "class-specific", "head", "residual", "map", "residual on a head", "fit"]


def probabilities(predictions, classnames):
    """[N, C] in the order of the classes, from predictions of all classes."""
    return torch.tensor([[found.probabilities[found.labels.index(c)] for c in classnames] for found in predictions])


# -- the same numbers as elsewhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_files_equal_those_on_cached_features(icon_clip, icons, features, solutions, kind):
    found = mt.Predictor(icon_clip, solutions[kind], top=99, batch_size=7)(icons)
    expected = mt.classifier(icon_clip, solutions[kind]).logits(CLASSES, features.tensor()).softmax(-1)
    assert [os.path.basename(each.file) for each in found] == list(features.files)
    torch.testing.assert_close(probabilities(found, CLASSES), expected, atol=1e-5, rtol=0)
    assert [each.label for each in found] == [CLASSES[i] for i in expected.argmax(-1)]
    assert all(each.probability == max(each.probabilities) for each in found)


def test_every_form_of_a_picture_gives_the_same(icon_clip, icons, tmp_path):
    predictor = mt.Predictor(icon_clip, "an icon of a {}", CLASSES)
    file = min(icons.iterdir())
    image = Image.open(file).convert("RGB")
    pixels = icon_clip.preprocess(image)
    expected = predictor(str(file))
    for form in (file, image, Image.open(file), np.asarray(image), pixels):
        assert predictor(form).probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    grey = np.asarray(image.convert("L"))
    assert predictor(grey).probabilities == predictor(image.convert("L")).probabilities
    for several in ([file], pixels[None], icons.parent / icons.name):
        assert isinstance(predictor(several), list)


def test_encode_image_takes_pictures_as_preprocess_by_hand_does(icon_clip, icons):
    paths = sorted(icons.iterdir())[:5]
    images = [Image.open(path) for path in paths]
    pixels = torch.stack([icon_clip.preprocess(image) for image in images])
    expected = icon_clip.encode_image(pixels)
    mixed = [paths[0], str(paths[1]), images[2], np.asarray(images[3].convert("RGB")), pixels[4]]
    for given in (paths, images, mixed, list(pixels)):
        torch.testing.assert_close(icon_clip.encode_image(given, batch_size=2), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(icon_clip.encode_image(paths[0]), expected[:1], atol=1e-6, rtol=0)
    assert icon_clip.encode_image([]).shape == (0, icon_clip.embed_dim)
    with pytest.raises(ValueError, match="nowhere.png"):
        icon_clip.encode_image([paths[0], "nowhere.png"])
    for wrong, name in ((17, "int"), (b"data", "bytes.*BytesIO"), ([None], "NoneType")):
        with pytest.raises(TypeError, match=f"a picture must be a path, .* got {name}"):
            icon_clip.encode_image(wrong)


@pytest.mark.parametrize("kind", [Lora, Adapter, DeepPrompt], ids=lambda kind: kind.kind)
def test_a_kind_that_changes_a_tower_is_applied_to_the_pixels(kind):
    clip = clip_of(dtype=torch.float32)
    solution = kind.drawn(clip, seed=1)
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    read = {"pixels": pixels, "feature": clip.encode_image(pixels)}
    x = read.get(solution.image_input) if isinstance(solution.image_input, str) else image_tokens(clip, pixels, 1)
    expected = mt.classifier(clip, solution).logits(NAMES, x).float().softmax(-1)
    found = probabilities(mt.Predictor(clip, solution, NAMES)(pixels), NAMES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_temperature_divides_the_logits(icon_clip, icons, features, solutions):
    solution = replace(solutions["prompt"], notes={**solutions["prompt"].notes, "temperature": 2.5})
    predictor = mt.Predictor(icon_clip, solution, top=4)
    logits = mt.classifier(icon_clip, solution).logits(CLASSES, features.tensor())
    torch.testing.assert_close(probabilities(predictor(icons), CLASSES), (logits / 2.5).softmax(-1), atol=1e-5, rtol=0)
    assert predictor.temperature == temperature_of(solution) == 2.5 and "temperature 2.5" in repr(predictor)
    assert temperature_of(solutions["prompt"]) == 1
    with pytest.raises(ValueError, match="temperature .* above 0, from 0.001 to 1000, got -1"):
        mt.Predictor(icon_clip, replace(solution, notes={"temperature": -1}), CLASSES)


def test_siglip_has_a_sigmoid_with_the_bias_of_the_model():
    model = tiny_model()
    model.logit_bias = torch.nn.Parameter(torch.tensor(-3.0))
    clip = mt.FrozenClip(model, open_clip.SimpleTokenizer(context_length=16), "tiny SigLIP")
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = clip.logit_scale * clip.encode_image(pixels) @ clip.class_embeddings(NAMES).T
    for activation, expected in (("sigmoid", (logits - 3).sigmoid()), ("softmax", logits.softmax(-1))):
        predictor = mt.Predictor(clip, "a photo of a {}.", NAMES, activation=activation)
        torch.testing.assert_close(probabilities(predictor(pixels), NAMES), expected)
        assert activation in predictor.describe()
    with pytest.raises(ValueError, match="activation must be softmax .* got sigmoid"):
        mt.Predictor(tiny_clip(), prompt(), NAMES, activation="sigmoid")


def test_a_threshold_gives_none_and_keeps_the_classes(icon_clip, icons):
    plain = mt.Predictor(icon_clip, "an icon of a {}", CLASSES)(icons)
    border = sorted(found.probability for found in plain)[30]
    found = mt.Predictor(icon_clip, "an icon of a {}", CLASSES, threshold=border)(icons)
    assert sum(each.label == "none" for each in found) == 30
    for before, after in zip(plain, found, strict=True):
        assert after.label == ("none" if before.probability < border else before.label)
        assert (after.labels, after.probabilities) == (before.labels, before.probabilities)


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_solution_knows_its_classes(icon_clip, icons, solutions, tmp_path, kind):
    solutions[kind].save(tmp_path)
    predictor = mt.Predictor(icon_clip, tmp_path)
    assert predictor.classnames == CLASSES == known_classes(mt.load_solution(tmp_path))
    assert len(predictor(min(icons.iterdir())).labels) == 4


def test_solutions_that_version_0_1_saved_know_their_classes():
    folder = Path(__file__).parents[1] / "files" / "v0.1"
    for name in ("tune", "tune-head", "fit", "fit-head", "merged", "coop"):
        assert known_classes(mt.load_solution(folder / name)) == CLASSES


def test_a_merged_prompt_knows_the_classes_of_its_experts(solutions):
    merged = mt.merge_solutions("average", [solutions["prompt"], solutions["fit"]])
    assert known_classes(merged) == CLASSES
    assert known_classes(mt.merge_solutions("average", [prompt(1), prompt(2)])) is None


@pytest.mark.parametrize("kind", ["prompt", "residual", "map", "fit"])
def test_solutions_on_texts_take_new_classes(icon_clip, icons, features, solutions, kind):
    names = ("tree", "heart", "an unknown thing")
    found = mt.Predictor(icon_clip, solutions[kind], names)(icons)
    expected = mt.classifier(icon_clip, solutions[kind]).logits(names, features.tensor()).softmax(-1)
    torch.testing.assert_close(probabilities(found, names), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["head", "class-specific", "residual on a head"])
def test_a_head_takes_a_selection_of_its_classes_and_no_others(icon_clip, icons, features, solutions, kind):
    names = ("heart", "anchor")
    found = mt.Predictor(icon_clip, solutions[kind], names)(icons)
    logits = mt.classifier(icon_clip, solutions[kind]).logits(CLASSES, features.tensor())
    torch.testing.assert_close(probabilities(found, names), logits[:, [3, 0]].softmax(-1), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="among the 4 classes of the .*, got 'tree': .* to make a new class from. Use"):
        mt.Predictor(icon_clip, solutions[kind], ["tree", "heart"])


def test_without_any_class_names_the_error_asks_for_them(clip):
    for solution in (prompt(), "a photo of a {}."):
        with pytest.raises(ValueError, match="classnames must be given .*--classnames FILE"):
            mt.Predictor(clip, solution)


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def predictor(clip):
    return mt.Predictor(clip, prompt(), NAMES)


def draw(path, seed=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_a_folder_gives_all_images_below_it_in_order(predictor, tmp_path):
    for name in ("b.png", "a/z.jpg", "a/b/c.PNG", "x.jpg/inside.png"):
        draw(tmp_path / name)
    for name in ("notes.txt", ".hidden.png", "a/.git/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = predictor(tmp_path)
    assert [os.path.relpath(each.file, tmp_path) for each in found] == [
        "a/b/c.PNG", "a/z.jpg", "b.png", "x.jpg/inside.png"
    ]  # fmt: skip
    assert not any(each.error for each in found)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "a.png\r\n\nsub/b.png\na.png\n lost.png\n"),
        ("list.csv", 'label,path\ncat,a.png\ndog,sub/b.png\ncat,a.png\ndog," lost.png"\n'),
        ("list.json", json.dumps(["a.png", {"path": "sub/b.png", "label": "dog"}, "a.png", " lost.png"])),
    ],
)
def test_a_list_gives_its_pictures_in_order_also_twice_and_missing(predictor, tmp_path, name, content):
    draw(tmp_path / "a.png"), draw(tmp_path / "sub" / "b.png", 1)
    (tmp_path / name).write_text("\ufeff" + content if name.endswith("csv") else content)
    found = predictor(tmp_path / name)
    assert [os.path.relpath(each.file, tmp_path).strip() for each in found] == [
        "a.png", "sub/b.png", "a.png", "lost.png"
    ]  # fmt: skip
    assert [each.error is None for each in found] == [True, True, True, False]
    assert found[0] == found[2] and found[0].probabilities != found[1].probabilities


@pytest.mark.parametrize("workers", [0, 2])
def test_mixed_inputs_keep_their_order_and_an_unreadable_one_is_a_row(predictor, tmp_path, workers):
    good, other = draw(tmp_path / "good.png"), draw(tmp_path / "folder" / "other.png", 1)
    bad = {
        "text.png": lambda path: path.write_text("no picture"),
        "cut.png": lambda path: path.write_bytes(good.read_bytes()[:200]),
        "empty.png": lambda path: path.write_bytes(b""),
        "fifo.png": os.mkfifo,
        "device.png": lambda path: path.symlink_to("/dev/zero"),
        "narrow.png": lambda path: Image.new("1", (1, 1 << 20)).save(path),
        "large.png": lambda path: Image.new("1", (1 << 11, 1 << 10)).save(path),
        "lost.png": lambda path: None,
        "zero\0.png": lambda path: None,
    }  # fmt: skip
    for name, make in bad.items():
        make(tmp_path / name)
    lazy = Image.open(tmp_path / "cut.png") if (tmp_path / "cut.png").exists() else None
    array = np.full((9, 7), 200, np.uint8)
    mt_images = mt.ImageList(tmp_path, ("good.png",), (0,), ("thing",))
    several = mt.Predictor(predictor.clip, prompt(), NAMES, workers=workers, batch_size=3, max_pixels=1 << 20)
    inputs = [good, *(tmp_path / name for name in bad), lazy, array, tmp_path / "folder", (mt_images, [str(good)])]
    found = several(*inputs)
    assert [each.error is None for each in found] == [True, *[False] * (len(bad) + 1), True, True, True, True]
    assert [each.file for each in found] == [
        str(good), *(str(tmp_path / name) for name in bad), None, None, str(other), str(good), str(good)
    ]  # fmt: skip
    for each in found[1:-4]:
        assert each.error.startswith("cannot read image") and each.label is each.probability is None
        assert each.labels == () and "error=" in repr(each) and json.loads(json.dumps(each.to_json()))["error"]
    alone = predictor(good).probabilities
    assert all(found[i].probabilities == pytest.approx(alone, abs=1e-6) for i in (0, -2, -1))


def test_an_endless_iterator_streams(predictor):
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield np.full((4, 4), i % 256, np.uint8)

    found = list(itertools.islice(mt.Predictor(predictor.clip, prompt(), NAMES, batch_size=2).stream(endless()), 7))
    assert len(found) == 7 and len(taken) <= 12 and not any(each.error for each in found)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, "PIL"),
        (np.zeros((8, 8, 1), np.uint8), ValueError, r"array\[\.\.\., 0\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), ValueError, r"list\(array\)"),
        (np.zeros((8, 8, 3), np.float32), ValueError, "255"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, "floating point.*uint8"),
        (torch.zeros(8, 8), ValueError, "preprocessed pixels"),
        (torch.zeros(3, 8, 8), ValueError, r"\[3, 16, 16\], got \[3, 8, 8\]"),
        (b"bytes", TypeError, "BytesIO"),
        (17, TypeError, "got int"),
        ({"a.png": 1}, TypeError, "got dict"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_way_on(predictor, wrong, error, message):
    with pytest.raises(error, match=message):
        predictor(wrong)
    with pytest.raises(error, match=message):
        predictor([np.zeros((8, 8), np.uint8), wrong])


def test_a_folder_or_list_without_pictures_is_refused_with_what_it_has(predictor, tmp_path):
    with pytest.raises(ValueError, match="at least one image .* got no files"):
        predictor(tmp_path)
    (tmp_path / "a.txt").write_text("\n \n")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"at least one image .* got ignored 2: \.txt \(2\)"):
        predictor(tmp_path)
    for name, content in (("a.txt", "\n"), ("a.csv", "path\n"), ("a.json", "[]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="at least one picture, got none"):
            predictor(tmp_path / name)
    for name, content, message in (
        ("a.csv", "photo\nx,a.png\n", "column path"), ("a.csv", "path,b\n,2\n", "row 1"), ("a.json", "{", "be JSON"),
        ("a.json", "{}", "list of paths"), ("a.json", "[1]", "row 1"), ("a.json", '[{"b": 1}]', "row 1"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            predictor(tmp_path / name)
    os.mkfifo(tmp_path / "fifo.txt")
    with pytest.raises(ValueError, match="regular file, got a FIFO"):
        predictor(tmp_path / "fifo.txt")
    with pytest.raises(FileNotFoundError):
        predictor(tmp_path / "lost.txt")
    with pytest.raises(ValueError, match="at least one input"):
        predictor()
    assert predictor([]) == []


def test_a_picture_in_memory_starts_no_program(predictor, tmp_path, monkeypatch):
    """Pillow would hand an EPS to Ghostscript when its pixels are first used."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{started}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.eps").write_bytes(eps)
    found = predictor(Image.open(tmp_path / "a.eps"))
    assert "another program would decode it" in found.error and not started.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"top": 0}, "top must be at least 1"),
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\]"),
        ({"threshold": float("nan")}, r"threshold must lie in \[0, 1\]"),
        ({"activation": "relu"}, "activation must be one of softmax, sigmoid"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"classnames": []}, "classnames must hold at least one name"),
    ],
)
def test_options_out_of_range_are_refused(clip, option, message):
    with pytest.raises(ValueError, match=message):
        mt.Predictor(clip, prompt(), **({"classnames": NAMES} | option))


def test_top_and_one_class(clip):
    picture = np.zeros((8, 8), np.uint8)
    assert len(mt.Predictor(clip, prompt(), NAMES, top=2)(picture).labels) == 2
    assert set(mt.Predictor(clip, prompt(), NAMES, top=50)(picture).labels) == set(NAMES)
    with pytest.raises(ValueError, match="classnames must hold at least two names for softmax, .* got only 'cat'"):
        mt.Predictor(clip, prompt(), ["cat"])


def test_features_that_are_not_finite_are_an_error_of_their_picture(clip):
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[1] = float("nan")
    fine, bad = mt.Predictor(clip, head())(pixels)
    assert fine.error is None and "finite" in bad.error


def test_another_clip_is_refused(icon_clip, solutions):
    with pytest.raises(ValueError, match="must be the one|must have the"):
        mt.Predictor(tiny_clip(), solutions["prompt"])
    assert len(cache().classnames) == 3


def test_a_class_name_that_is_given_twice_is_refused_with_both_positions(clip, tmp_path):
    """The names that a solution brings may repeat, as ImageNet's do."""
    twice, said = ["cat", "dog", "cat"], "classnames must not repeat, got 'cat' at positions 1 and 3"
    solution, own = mt.Templates(("a photo of a {}.",)), mt.Head(torch.eye(8)[:3], ("crane", "dog", "crane"))
    for call in (
        lambda: mt.Predictor(clip, solution, twice),
        lambda: mt.Predictor(clip, "a photo of a {}.", twice),
        lambda: mt.to_head(solution, tmp_path / "a.npz", clip=clip, classnames=twice),
        lambda: mt.zero_shot_classifier(solution, clip, twice),
        lambda: mt.to_onnx(solution, tmp_path / "a.onnx", clip=clip, classnames=twice),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert not list(tmp_path.iterdir())
    assert mt.Predictor(clip, own).classnames == mt.Predictor(clip, own, own.classnames).classnames == own.classnames
    assert mt.to_head(own, tmp_path / "a.npz").classnames == own.classnames
