"""The commands on a LoRA of the embedded CLIP's text tower: tune on cached features, and export in every form."""

import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mergetune import ImageList, LoRA, cache_features, classifier, load_clip, load_solution, open_solution
from mergetune.cli import app

NAMES = ("cat", "dog")


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LoRA of rank 1 with random factors."""
    folder, clip = tmp_path_factory.mktemp("lora"), load_clip("icon-clip")
    lora = LoRA.start(clip, rank=1, tower="text", templates=("an icon of a {}",))
    generator = torch.Generator().manual_seed(1)
    lora = lora.with_state({name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in lora.state().items()})
    lora.save(folder)
    return folder, lora, clip


def test_a_lora_goes_into_every_file_and_comes_back(saved, tmp_path):
    folder, lora, clip = saved
    expected = classifier(clip, lora)(NAMES)
    for form, target in (("peft", "a"), ("peft-transformers", "b"), ("clip-lora", "lora.pt")):
        invoke("export", folder, "--to", form, "--out", tmp_path / target)
        found = open_solution(tmp_path / target, template="an icon of a {}")
        torch.testing.assert_close(classifier(clip, found)(NAMES), expected, rtol=1e-4, atol=1e-4)
    invoke("export", folder, "--to", "open-clip", "--out", tmp_path / "model.safetensors")
    model = load_clip("icon-clip").model
    open_clip.load_checkpoint(model, str(tmp_path / "model.safetensors"))
    texts = model.encode_text(clip.tokenize([f"an icon of a {name}" for name in NAMES]), normalize=True)
    torch.testing.assert_close(clip.logit_scale * texts, expected, rtol=1e-4, atol=1e-4)


def test_tune_trains_a_lora_on_cached_features(saved, tmp_path):
    for name in NAMES:
        Image.new("RGB", (20, 20), {"cat": "red", "dog": "blue"}[name]).save(tmp_path / f"{name}.png")
    images = ImageList(tmp_path, tuple(f"{name}.png" for name in NAMES), (0, 1), NAMES)
    cache_features(saved[2], images, tmp_path / "cache", progress=False)
    invoke(
        "tune", "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--backbone", "icon-clip", "--method", "lora",
        "--tower", "text", "--parts", "q", "--parts", "out", "--rank", 3, "--last-blocks", 1, "--epochs", 1,
        "--template", "an icon of a {}",
    )  # fmt: skip
    found = load_solution(tmp_path / "out")
    assert list(found.scales) == ["text.3.q", "text.3.out"] and found.rank == 3
