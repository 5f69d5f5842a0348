"""What is said once: the backbone that caches and solutions record, names that are nearly right, folders of caches."""

import json
import re
import shlex
import shutil
import sys
import zipfile
from importlib.resources import as_file, files

import open_clip
import pytest
import torch
from tiny import TEXT, VISION, tiny_model
from typer.testing import CliRunner

import mergetune as mt
from mergetune.cli import app
from mergetune.facts.backbones import known_models

CLASSES = ("anchor", "bell", "camera", "heart")
SHORT = ["--epochs", "1", "--classes", "base", "--shots", "4"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which the README's steps have run, with --backbone in the first of them alone."""
    folder = tmp_path_factory.mktemp("work")
    with (
        as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive,
        zipfile.ZipFile(archive) as content,
    ):
        wanted = [name for name in content.namelist() if name.split("/")[1] in CLASSES]
        content.extractall(folder / "images", wanted)
    steps = (
        ["cache", folder / "images", "--out", folder / "cache", "--backbone", "icon-clip"],
        ["tune", "--cache", folder / "cache" / "train", "--out", folder / "coop", *SHORT],
        ["fit", "--cache", folder / "cache" / "train", "--out", folder / "merged", *SHORT, "--tuned", folder / "coop"],
    )
    for step in steps:
        done = invoke(*step)
        assert done.exit_code == 0, done.stderr
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refusal(*arguments):
    """The message of a command that exits with 2."""
    refused = invoke(*arguments)
    assert refused.exit_code == 2, refused.output
    return " ".join(refused.stderr.split())


# -- the backbone is said once -----------------------------------------------------------------------------------------


def test_the_steps_of_the_readme_need_the_backbone_once(work, tmp_path):
    cache = work / "cache"
    residual = ["tune", "--cache", cache, "--out", tmp_path / "top", "--method", "residual", "--base", work / "merged"]
    names = tmp_path / "names.txt"
    names.write_text("anchor\nbell\n")
    for step in (
        [*residual, *SHORT],
        ["eval", "--cache", cache, "--solution", work / "coop", work / "merged", tmp_path / "top", "--base-novel"],
        ["path", "--cache", cache, "--tuned", work / "coop", "--solution", work / "merged", "--classes", "base",
         "--points", 3, "--figure", tmp_path / "paths.png"],
        ["merge", "ties", work / "coop", work / "merged", "--out", tmp_path / "ties"],
        ["export", work / "merged", "--to", "classifier", "--out", tmp_path / "zs.pt", "--classnames", names],
    ):  # fmt: skip
        done = invoke(*step)
        assert done.exit_code == 0, (step, done.stderr)
        owner = f"feature cache {cache}" if "--cache" in step else f"solution {work}"
        assert f"backbone icon-clip, recorded by {owner}" in done.stderr.replace("\n", "")
    recorded = [mt.FeatureCache.open(cache / "train").backbone, mt.load_solution(tmp_path / "top").backbone]
    assert recorded == ["icon-clip", "icon-clip"]


def test_every_next_step_can_be_run_as_it_is_printed(work, tmp_path):
    """Also without a cache of test images, and for a solution that knows half of the classes."""
    train, merged, out = work / "cache" / "train", work / "merged", tmp_path / "out"
    shutil.copytree(train, tmp_path / "alone" / "train")
    icon = next((work / "images" / "test" / "bell").iterdir())
    fit = ["fit", *SHORT, "--tuned", work / "coop"]
    steps = {
        "cache": ["cache", work / "images", "--out", out / "cache", "--backbone", "icon-clip"],
        "tune": ["tune", "--cache", train, "--out", out / "coop", *SHORT],
        "tune head": ["tune", "--cache", train, "--out", out / "head", *SHORT, "--method", "head", "--seed", 2],
        "residual": ["tune", "--cache", train, "--out", out / "top", *SHORT, "--method", "residual", "--base", merged],
        "fit": [*fit, "--cache", train, "--out", out / "merged-1"],
        "fit, folder of caches": [*fit, "--cache", work / "cache", "--out", out / "merged-2"],
        "fit, no test images": [*fit, "--cache", tmp_path / "alone" / "train", "--out", out / "merged-3"],
        "path": ["path", "--cache", work / "cache", "--tuned", work / "coop", "--solution", merged, "--points", 3,
                 "--figure", tmp_path / "paths.png", "--classes", "base"],
        "merge": ["merge", "average", work / "coop", merged, "--out", out / "average"],
        "merge with images": ["merge", "average", work / "coop", merged, "--out", out / "average", "--cache", train],
        **{f"export {form}": ["export", merged, "--to", form, "--out", out / name]
           for form, name in (("coop", "coop-file"), ("head", "a.npz"), ("classifier", "a.pt"), ("hub", "hub"))},
    }  # fmt: skip
    for name, step in steps.items():
        done = invoke(*step)
        assert done.exit_code == 0, (name, done.stderr)
        (line,) = [line for line in done.stderr.splitlines() if "Next: mergetune " in line]
        following = shlex.split(line.split("Next: mergetune ")[1].replace("NEW_PICTURES", str(icon)))
        assert following[0] in ("tune", "fit", "eval", "predict")
        assert ("--backbone" in following) == (name == "export head")  # a file that does not record it
        short = ["--epochs", 1] if following[0] in ("tune", "fit") else []
        done = invoke(*following, *short)
        assert done.exit_code == 0, (name, line, done.stderr)


def test_the_recorded_backbone_and_the_given_one_do_the_same(work):
    measured = ["eval", "--cache", work / "cache" / "test", "--solution", work / "merged", "--json"]
    assert invoke(*measured).stdout == invoke(*measured, "--backbone", "icon-clip").stdout


def test_records_of_the_embedded_model_by_its_folder_still_match(work, tmp_path):
    place = f"local-dir:{mt.__path__[0]}/assets/icon-clip"
    measured = ["eval", "--cache", work / "cache" / "test", "--solution", work / "merged", "--json"]
    assert invoke(*measured, "--backbone", place).stdout == invoke(*measured).stdout
    old = copy_with_backbone(work / "merged", tmp_path / "old", "local-dir:/another/lib/mergetune/assets/icon-clip")
    assert invoke("merge", "average", old, old, "--base", "a photo of a {}.", "--out", tmp_path / "m").exit_code == 0


def copy_with_backbone(solution, target, backbone):
    shutil.copytree(solution, target)
    config = json.loads((target / "solution.json").read_text())
    (target / "solution.json").write_text(json.dumps({**config, "backbone": backbone}))
    return target


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another backbone, in a folder: the embedded model with changed weights in both towers."""
    folder = tmp_path_factory.mktemp("other")
    clip = mt.load_clip("icon-clip")
    changed = {name: tensor + (tensor.dim() == 2) * 1e-3 for name, tensor in clip.model.state_dict().items()}
    shutil.copy(files("mergetune") / "assets" / "icon-clip" / "open_clip_config.json", folder)
    torch.save(changed, folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def test_different_backbones_are_refused_by_name(work, other):
    test, merged = work / "cache" / "test", work / "merged"
    message = refusal("eval", "--cache", test, "--solution", merged, "--backbone", other)
    assert f"feature cache {test} was made with icon-clip, but --backbone names {other}" in message
    message = refusal("export", merged, "--to", "classifier", "--out", work / "x.pt", "--backbone", other)
    assert f"solution {merged} was made with icon-clip, but --backbone names {other}" in message
    cached = invoke("cache", work / "images", "--out", work / "other", "--backbone", other)
    assert cached.exit_code == 0, cached.stderr
    message = refusal("eval", "--cache", work / "other", "--solution", merged)
    assert (
        f"solution {merged} was made with icon-clip, but feature cache {work / 'other' / 'test'} names {other}"
        in message
    )
    assert not re.search("[0-9a-f]{12}", message.replace(str(work), "")), "a hash says nothing to a reader"


def test_records_that_cannot_be_followed_name_the_way_on(work, tmp_path, monkeypatch):
    gone = copy_with_backbone(work / "merged", tmp_path / "gone", "local-dir:/no/such/folder")
    lost = copy_with_backbone(work / "merged", tmp_path / "lost", "ViT-B-32/no/such/file.pt")
    memory = copy_with_backbone(work / "merged", tmp_path / "memory", "my model")
    nobody = copy_with_backbone(work / "merged", tmp_path / "nobody", None)
    for solution, said, way_on in (
        (gone, "local-dir:/no/such/folder, which is no folder any more", "--backbone local-dir:PATH"),
        (lost, "checkpoint no/such/file.pt does not exist any more", "--backbone ViT-B-32 --pretrained PATH"),
        (memory, "my model, which cannot be loaded by this name", "give --backbone"),
        (nobody, "the solution records none", "--backbone"),
    ):
        message = refusal("export", solution, "--to", "classifier", "--out", tmp_path / "x.pt")
        assert str(solution) in message and said in message and way_on in message
    message = refusal("export", gone, "--to", "classifier", "--out", tmp_path / "x.pt", "--pretrained", "openai")
    assert "--pretrained needs --backbone" in message


def test_a_solution_alone_starts_no_download_from_the_hub(work, tmp_path, monkeypatch):
    stranger = copy_with_backbone(work / "merged", tmp_path / "stranger", "hf-hub:stranger/model")
    asked = []
    monkeypatch.setattr("mergetune.clip.backbone_files.hf_hub_download", lambda *names, **more: asked.append(names))
    message = refusal("export", stranger, "--to", "classifier", "--out", tmp_path / "x.pt")
    assert "if you trust this repository, give --backbone hf-hub:stranger/model" in message and not asked


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["vit-b-33"], "--backbone must be a known backbone, got 'vit-b-33': did you mean ViT-B-32"),
        (["vit-b-32"], "--pretrained must name the weights of 'ViT-B-32', got None"),
        (["ViT-B/32", "--pretrained", "opneai"], "got 'opneai': did you mean openai? Tags: openai, laion400m_e31"),
        (["icon-clip", "--pretrained", "openai"], "--pretrained must be left out because 'icon-clip' includes"),
    ],
)
def test_wrong_names_are_refused_before_anything_else(given, message):
    """Also before the images are looked for, which do not exist."""
    assert message in refusal("cache", "no-such-images", "--out", "x", "--backbone", *given)


def test_a_folder_as_backbone_is_told_how_to_write_it(tmp_path):
    message = refusal("cache", "no-such-images", "--out", "x", "--backbone", tmp_path)
    assert f"for a folder write local-dir:{tmp_path}" in message


def test_case_does_not_matter_in_names_and_tags(tmp_path):
    config = tmp_path / "Tiny-Case_Test.json"
    config.write_text(json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(config)
    torch.save(tiny_model().state_dict(), tmp_path / "weights.pt")
    assert mt.load_clip("tiny-case-test", tmp_path / "weights.pt").name.startswith("Tiny-Case_Test/")
    assert mt.load_clip("Icon-CLIP").name == "icon-clip"


def test_models_lists_what_open_clip_has():
    listed = json.loads(invoke("models", "--json").stdout)
    assert listed[0]["name"] == "icon-clip"
    clip = mt.load_clip("icon-clip")
    assert [listed[0]["embed_dim"], listed[0]["image_size"]] == [clip.embed_dim, clip.preprocess_cfg["size"]]
    names = {model["name"]: model["tags"] for model in listed[1:]}
    published = {name: [] for name in known_models()}
    for name, tag in open_clip.list_pretrained():
        published.setdefault(name, []).append(tag)
    assert names == {name: published[name] for name in names} and sum(map(len, names.values())) > 150
    shown = invoke("models", "vit-b-32")
    assert "as ViT-B-32-quickgelu: openai" in shown.stdout and "icon-clip\n" not in shown.stdout
    assert "WORD must be part of a name" in refusal("models", "no-such-word")


def test_models_says_which_models_take_prompts():
    """As the built models have it; a small one of each kind of text tower."""
    for name in ("ViT-S-32-alt", "coca_ViT-B-32"):
        clip = mt.FrozenClip(
            open_clip.create_model(name, load_weights=False), open_clip.get_tokenizer("ViT-B-32"), name
        )
        assert clip.takes_prompts == known_models()[name].takes_prompts


# -- folders -----------------------------------------------------------------------------------------------------------


def test_the_folder_of_the_caches_stands_for_the_one_that_is_meant(work, tmp_path):
    measured = ["eval", "--solution", work / "merged", "--json", "--cache"]
    assert invoke(*measured, work / "cache").stdout == invoke(*measured, work / "cache" / "test").stdout
    message = refusal("merge", "average", work / "coop", "--out", tmp_path / "m", "--cache", work / "cache")
    assert f"give {work / 'cache' / 'test'} or {work / 'cache' / 'train'}" in message
    message = refusal("tune", "--cache", work / "images", "--out", tmp_path / "t")
    assert f"--cache must be a feature cache, got {work / 'images'}, which is none" in message


def test_a_folder_without_a_solution_lists_those_near_it(work, tmp_path):
    message = refusal("eval", "--cache", work / "cache", "--solution", work / "merge")
    assert "solution.json" in message and str(work / "coop") in message and str(work / "merged") in message
    message = refusal(
        "tune", "--cache", work / "cache", "--method", "residual", "--base", work, "--out", tmp_path / "t"
    )
    assert f"solutions near it are {work / 'coop'}" in message


def test_seeds_are_given_alike(monkeypatch):
    asked = []
    monkeypatch.setattr("mergetune.experiments.run_demo", lambda out, seeds, **_: asked.append(seeds) or sys.exit(3))
    for given in (["--seeds", "4", "5"], ["--seed", "4", "--seed", "5"], ["--seeds", "4", "--seeds", "5"]):
        assert invoke("demo", *given).exit_code == 3
    assert asked == [[4, 5]] * 3


# -- dry runs ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_images_size_and_time_and_writes_nothing(work, tmp_path):
    images = mt.ImageFolder(work / "images")
    few = images.base_novel()[0].few_shot(4, 1)
    train = ["--cache", work / "cache" / "train", *SHORT]
    commands = {
        "cache": ["cache", work / "images", "--backbone", "icon-clip", "--views", 3],
        "tune": ["tune", *train, "--epochs", 30],
        "fit": ["fit", *train, "--tuned", work / "coop", "--batch-size", 3],
        "images": ["fit", work / "images", "--backbone", "icon-clip", *SHORT, "--epochs", 7],
    }
    found = {}
    for name, command in commands.items():
        done = invoke(*command, "--out", tmp_path / "out", "--dry-run", "--json")
        assert done.exit_code == 0, done.stderr
        found[name] = json.loads(done.stdout)
        assert found[name]["seconds"] > 0 and str(tmp_path / "out") in found[name]["plan"]
    assert found["cache"]["images"] == {"train": len(images.train), "test": len(images.test)}
    assert found["cache"]["gib"] * 2**30 == (3 * len(images.train) + len(images.test)) * 128 * 4
    assert found["tune"]["steps"] == {"tune": 30} and found["fit"]["steps"] == {"fit": -(-len(few) // 3)}
    encoded = found["images"]["images"]
    assert encoded.keys() == {"training", "validation", "test"} and found["images"]["classes"] == 2
    assert encoded["training"] == len(few) and encoded["test"] == len(images.test)
    assert found["images"]["steps"] == {"tune": 7, "fit": 6 * 7}  # of six settings, one is chosen
    shown = invoke(*commands["images"], "--out", tmp_path / "out", "--dry-run").stdout
    assert "Stage 2: 42 steps" in shown and "Nothing was written." in shown
    unchosen = invoke(*commands["images"], "--out", tmp_path / "out", "--dry-run", "--no-choose").stdout
    assert "Stage 2: 7 steps" in unchosen and "validation" not in unchosen
    assert not (tmp_path / "out").exists()


def test_the_size_in_a_dry_run_is_that_of_the_cache(work, tmp_path):
    done = invoke("cache", work / "images", "--backbone", "icon-clip", "--dry-run", "--json", "--out", tmp_path / "out")
    written = sum((work / "cache" / split / "arrays.bin").stat().st_size for split in ("train", "test"))
    assert json.loads(done.stdout)["gib"] * 2**30 == pytest.approx(written, rel=0.02)


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_says_how_the_model_computes_and_nothing_about_which_it_is(work, tmp_path, precision):
    """A model in half precision takes the caches and solutions of the same model in float32."""
    coarse, exact = mt.load_clip("icon-clip", precision=precision), mt.load_clip("icon-clip")
    for part in ("fingerprint", "image_fingerprint", "text_fingerprint"):
        assert getattr(coarse, part) == getattr(exact, part)
    cached = invoke(
        "cache", work / "images", "--out", tmp_path / "half", "--backbone", "icon-clip", "--precision", precision
    )
    assert cached.exit_code == 0, cached.stderr
    there, here = (mt.FeatureCache.open(folder / "test").tensor() for folder in (tmp_path / "half", work / "cache"))
    assert not torch.equal(there, here)
    torch.testing.assert_close(there, here, atol=3e-2, rtol=0)
    measured = ["eval", "--cache", tmp_path / "half", "--solution", work / "merged", "--precision", precision]
    done = invoke(*measured, "--json")
    assert done.exit_code == 0, done.stderr
    message = refusal("cache", work / "images", "--out", tmp_path / "half", "--backbone", "icon-clip")
    assert f"the precision of the image tower must be {precision}, as when the cache was built, got float32" in message


def test_records_of_rounded_weights_still_match(work, tmp_path):
    """Version 0.1 recorded the fingerprint of the rounded weights."""
    coarse = mt.load_clip("icon-clip", precision="bfloat16")
    rounded = mt.FrozenClip(coarse.model, coarse.tokenizer, coarse.name)
    assert rounded.fingerprint != coarse.fingerprint
    old = mt.FeatureCache.from_tensors(torch.eye(128)[:2], [0, 1], CLASSES[:2], fingerprint=rounded.image_fingerprint)
    assert mt.evaluate(coarse, "an icon of a {}", old).images == 2
    with pytest.raises(ValueError, match="image tower"):
        mt.evaluate(mt.load_clip("icon-clip"), "an icon of a {}", old)
