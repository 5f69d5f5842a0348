"""Graphs from images to logits: they give the solution's logits elsewhere, and say what their users must know."""

import json
import os
import runpy
import subprocess
import sys
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import torch
from PIL import Image
from tiny import NAMES, TEXT, head, normal, prompt, tiny_clip, tiny_model

import mergetune as mt
from mergetune import FrozenClip, LinearMap, Residual, Stack, Templates
from mergetune.data import load_image
from mergetune.serving import facts_of

ASSETS = Path(str(files("mergetune") / "assets"))
PIXELS = normal(5, 3, 16, 16, seed=3)


def siglip() -> FrozenClip:
    """A shrunk SigLIP: timm's tower with attention pooling, a text tower without causal mask, a logit bias."""
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, depth=1, embed_dim=32, num_heads=2))
        vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
        torch.manual_seed(0)
        text = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        model = open_clip.CustomTextCLIP(32, {**vision, "image_size": 224}, text, init_logit_bias=-10.0)
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=16), "ViT-B-16-SigLIP//home/me/siglip.pt")


def stack(dim: int = 8) -> Stack:
    residual = Residual(0.1 * normal(2, dim), NAMES[:2])
    return Stack(Templates(("a photo of a {}.",)), LinearMap(torch.eye(dim) + 0.3 * normal(dim, dim)), residual)


def session(file: Path) -> tuple[onnxruntime.InferenceSession, dict]:
    opened = onnxruntime.InferenceSession(str(file))
    return opened, {name: json.loads(text) for name, text in opened.get_modelmeta().custom_metadata_map.items()}


def logits(clip: FrozenClip, solution, names, pixels: torch.Tensor) -> np.ndarray:
    return mt.classifier(clip, solution).logits(names, clip.encode_image(pixels)).numpy()


def no_path_of_this_computer(content: bytes) -> bool:
    here = (str(Path(mt.__path__[0]).parent), "site-packages", "/home/me", os.sep + "tmp" + os.sep)
    return not any(place.encode() in content for place in here)


# -- ONNX -------------------------------------------------------------------------------------------------------------


def test_onnxruntime_gives_the_logits_of_the_solution_for_any_number_of_images(tmp_path, clip):
    """A VisionTransformer and some classes of a head with a bias."""
    solution, names = head(), NAMES[::-2]
    file = mt.to_onnx(solution, tmp_path / "new" / "a.onnx", clip=clip, classnames=names)
    opened, facts = session(file)
    (pixels,), (output,) = opened.get_inputs(), opened.get_outputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(float)", ["batch", 3, 16, 16])
    assert (output.name, output.type, output.shape) == ("logits", "tensor(float)", ["batch", 2])
    for batch in (1, 5):
        (got,) = opened.run(None, {"pixels": PIXELS[:batch].numpy()})
        np.testing.assert_allclose(got, logits(clip, solution, names, PIXELS[:batch]), atol=1e-3)
    assert facts["classnames"] == list(names) and facts["backbone"] == "tiny-0" and facts["logit_scale"] == 10
    assert facts["temperature"] == 1 and facts["logit_bias"] == 0
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.onnx", "predict_onnx.py"]
    assert no_path_of_this_computer(file.read_bytes())


def test_logits_of_siglip_are_ready_for_softmax_and_sigmoid_at_the_temperature(tmp_path):
    clip = siglip()
    solution = Stack(prompt(), LinearMap(torch.eye(32)), notes={"temperature": 2.0})
    pixels = normal(2, 3, 224, 224)
    expected = (logits(clip, solution, NAMES, pixels) - 10.0) / 2
    file = mt.to_onnx(solution, tmp_path / "a.onnx", clip=clip, classnames=NAMES, separate_weights=True)
    opened, facts = session(file)
    np.testing.assert_allclose(opened.run(None, {"pixels": pixels.numpy()})[0], expected, atol=1e-3)
    assert facts["logit_bias"] == -10 and facts["temperature"] == 2 and facts["probabilities"] == "softmax"
    assert facts["backbone"] is None and facts["mergetune"] == mt.__version__
    weights = sum(tensor.numel() * 4 for tensor in clip.model.visual.parameters())
    assert file.stat().st_size < weights / 10 and (tmp_path / "a.onnx.data").stat().st_size >= weights


def test_the_predictor_needs_no_torch_and_agrees_on_200_pictures(tmp_path):
    """The embedded ResNet with attention pooling, an image map and a residual that has no row for some classes."""
    with as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        names = [name for name in content.namelist() if name.startswith("test/") and name.endswith(".png")][::9][:200]
        content.extractall(tmp_path, names)
    clip, pictures = mt.load_clip(f"local-dir:{ASSETS / 'icon-clip'}"), [str(tmp_path / name) for name in names]
    classes = sorted({Path(name).parent.name for name in names})
    residual, image_map = Residual(0.1 * normal(2, 128), tuple(classes[:2])), torch.eye(128) + 0.03 * normal(128, 128)
    solution = Stack(Templates(("an icon of a {}",)), LinearMap(image_map), residual)
    file = mt.to_onnx(solution, tmp_path / "icons.onnx", clip=clip, classnames=classes)
    assert no_path_of_this_computer(file.read_bytes())
    alone = "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'torchvision', 'open_clip', 'mergetune']); "
    alone += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", alone, str(tmp_path / "predict_onnx.py"), str(file), *pictures]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 200 and [picture for picture, _, _ in rows] == pictures
    pixels = torch.stack([clip.preprocess(Image.open(picture)) for picture in pictures])
    expected = logits(clip, solution, classes, pixels)
    np.testing.assert_allclose(session(file)[0].run(None, {"pixels": pixels.numpy()})[0], expected, atol=1e-3)
    best = torch.from_numpy(expected).softmax(-1).max(-1)
    assert [label for _, label, _ in rows] == [classes[i] for i in best.indices]
    np.testing.assert_allclose([float(p) for _, _, p in rows], best.values, atol=1e-3)


@pytest.mark.parametrize(
    "cfg",
    [
        {"size": 32},
        {"size": 31, "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)},
        {"size": (32, 24), "interpolation": "bilinear"},
        {"size": (24, 32), "resize_mode": "squash"},
        {"size": 33, "resize_mode": "longest", "fill_color": 7},
        {"size": (20, 33), "resize_mode": "longest"},
    ],
)
def test_the_predictors_pixels_are_those_of_the_clip(cfg):
    clip = FrozenClip(tiny_model(), open_clip.SimpleTokenizer(context_length=16), "tiny", preprocess_cfg=cfg)
    settings = json.loads(json.dumps(facts_of(clip, Templates(), NAMES)["preprocess"]))
    pixels_of = runpy.run_path(str(ASSETS / "predict_onnx.py"))["pixels_of"]
    noise = np.random.default_rng(0)
    for width, height in ((32, 32), (57, 40), (40, 57), (101, 33), (33, 150), (5, 7), (300, 12)):
        picture = Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))
        assert np.array_equal(pixels_of(picture, **settings), clip.preprocess(picture).numpy()), (width, height)


def odd_pictures() -> dict[str, Image.Image]:
    """Pictures that Pillow's own conversion to RGB destroys: transparency, and greys of more than 8 bits."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 4), np.uint8)
    rgba, grey = Image.fromarray(noise), noise[..., 0].astype(np.uint16)
    palette = Image.fromarray(noise[..., 0] % 4, "P")
    palette.putpalette(list(range(12)))
    palette.info["transparency"] = 2
    return {
        "rgba.png": rgba,
        "la.png": rgba.convert("LA"),
        "palette.png": palette,
        "deep.png": Image.fromarray(grey * 257),
        "bits12.tif": Image.fromarray(grey * 16),
        "int.tif": Image.fromarray(grey.astype(np.int32) * 1000 - 70_000),
        "unit.tif": Image.fromarray(grey.astype(np.float32) / 255),
        "float.tif": Image.fromarray(grey.astype(np.float32) * 3 - 100),
    }


def test_the_predictor_decodes_every_kind_of_pixel_as_mergetune_does(tmp_path, clip):
    predictor = runpy.run_path(str(ASSETS / "predict_onnx.py"))
    settings = json.loads(json.dumps(facts_of(clip, Templates(), NAMES)["preprocess"]))
    for name, picture in odd_pictures().items():
        picture.save(tmp_path / name, **{k: v for k, v in picture.info.items() if k == "transparency"})
        with Image.open(tmp_path / name) as image:
            for background in ("white", "#204060"):
                got = predictor["pixels_of"](predictor["as_rgb"](image, background), **settings)
                expected = clip.preprocess(load_image(tmp_path / name, background=background)).numpy()
                assert np.array_equal(got, expected), (name, background)
    white = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    white.putpixel((0, 0), (255, 255, 255, 255))
    for picture in (white, Image.fromarray(np.full((4, 4), np.nan, np.float32))):
        with pytest.raises(ValueError, match="one colour on a white background|finite values, got NaN"):
            predictor["as_rgb"](picture, "white")


def test_the_predictor_answers_the_other_pictures_and_says_what_cannot_be_read(tmp_path, clip):
    """The background of the export reaches the script."""
    file = mt.to_onnx(Templates(), tmp_path / "a.onnx", clip=clip, classnames=NAMES, background="black")
    for name, picture in odd_pictures().items():
        picture.save(tmp_path / name, **{k: v for k, v in picture.info.items() if k == "transparency"})
    (tmp_path / "broken.png").write_text("no picture")
    pictures = [str(tmp_path / name) for name in ("missing.png", "rgba.png", "broken.png", "palette.png", "la.png")]
    script = [sys.executable, str(tmp_path / "predict_onnx.py")]
    done = subprocess.run([*script, str(file), *pictures], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [pictures[0], pictures[2]]
    answers = [line.split("\t") for line in done.stdout.splitlines()]
    expected = mt.Predictor(clip, Templates(), NAMES, background="black")(*(p for p in pictures if p[-7:] != "ing.png"))
    expected = [found for found in expected if found.error is None]
    assert [answer[:2] for answer in answers] == [[found.file, found.label] for found in expected]
    np.testing.assert_allclose([float(p) for *_, p in answers], [found.probability for found in expected], atol=1e-3)
    usage = subprocess.run(script, capture_output=True, text=True)
    assert usage.returncode == 1 and usage.stderr.startswith("usage: python predict_onnx.py MODEL.onnx PICTURE")


# -- torch.export -----------------------------------------------------------------------------------------------------


def test_a_program_of_torch_export_gives_the_logits_of_the_solution(tmp_path):
    clip, extra = tiny_clip(), {"mergetune.json": ""}
    file = mt.to_torch_export(stack(), tmp_path / "new" / "a.pt2", clip=clip, classnames=NAMES)
    module = torch.export.load(file, extra_files=extra).module()
    for pixels in (PIXELS, PIXELS[:1]):
        np.testing.assert_allclose(module(pixels).numpy(), logits(clip, stack(), NAMES, pixels), atol=1e-3)
    facts = json.loads(extra["mergetune.json"])
    assert facts["classnames"] == list(NAMES) and facts["solution"] == "stack" and facts["backbone"] == "tiny-0"
    assert [path.name for path in file.parent.iterdir()] == ["a.pt2"]
    with zipfile.ZipFile(file) as content:
        assert all(no_path_of_this_computer(content.read(name)) for name in content.namelist())


# -- what cannot be written -------------------------------------------------------------------------------------------


class Elsewhere(open_clip.CLIP):
    """A CLIP whose image features are not those of its image tower."""

    def encode_image(self, image, normalize=False):
        return super().encode_image(image, normalize).flip(-1)


class Counting(torch.nn.Module):
    """An image tower whose path depends on the pixels."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def other_clip(kind: type, tower: type | None = None) -> FrozenClip:
    model = tiny_model(kind)
    if tower is not None:
        model.visual = tower(model.visual)
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=16), "odd", preprocess_cfg={"size": 16})


def test_another_program_of_the_predictors_name_is_not_replaced(clip, tmp_path):
    (tmp_path / "predict_onnx.py").write_text("print('mine')")
    with pytest.raises(ValueError, match=r"without another predict_onnx.py, .* rename it or choose another folder"):
        mt.to_onnx(head(), tmp_path / "a.onnx", clip=clip)
    assert [path.name for path in tmp_path.iterdir()] == ["predict_onnx.py"]
    assert (tmp_path / "predict_onnx.py").read_text() == "print('mine')"


@pytest.mark.parametrize(("write", "file"), [(mt.to_onnx, "a.onnx"), (mt.to_torch_export, "a.pt2")])
def test_a_file_with_other_logits_is_not_left_behind(tmp_path, write, file):
    (tmp_path / file).write_text("before")
    with pytest.raises(RuntimeError, match="does not give the logits of the solution"):
        write(head(), tmp_path / file, clip=other_clip(Elsewhere))
    with pytest.raises(RuntimeError, match="the image tower of odd cannot be written as one graph"):
        write(head(), tmp_path / file, clip=other_clip(open_clip.CLIP, Counting))
    assert (tmp_path / file).read_text() == "before" and [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(("write", "suffix"), [(mt.to_onnx, ".onnx"), (mt.to_torch_export, ".pt2")])
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, clip, write, suffix):
    file = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match=f"file must end in {suffix}, got 'a.bin'"):
        write(head(), tmp_path / "a.bin", clip=clip)
    with pytest.raises(ValueError, match="classnames must be given for a prompt that serves any classes"):
        write(prompt(), file, clip=clip)
    with pytest.raises(ValueError, match="matrix must have the embedding's width 8"):
        write(Stack(prompt(), LinearMap(torch.eye(9))), file, clip=clip, classnames=NAMES)
    with pytest.raises(TypeError, match="solution must be a solution, got 'a photo of a {}'"):
        write("a photo of a {}", file, clip=clip, classnames=NAMES)
    half = FrozenClip(tiny_model().bfloat16(), clip.tokenizer, "half")
    with pytest.raises(ValueError, match="clip must be a float32 model on the CPU, got torch.bfloat16 on cpu"):
        write(head(), file, clip=half)
    with pytest.raises(ValueError, match="background must be a colour .* got 'whitish'"):
        write(head(), file, clip=clip, background="whitish")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is not installed: pip install 'mergetune\[onnx\]'"):
        mt.to_onnx(head(), tmp_path / "a.onnx", clip=clip)
    assert not list(tmp_path.iterdir())
