"""Parameters: named weights of a CLIP with other values, in the files of open_clip's trainer."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_lora import LABELS, TEXTS, batches, check, pixels, quick_clip
from test_lora_files import own_logits
from tiny import NAMES, tiny_clip

from mergetune import Parameters, Templates, classifier, fit, interpolate, load_solution, open_solution, to_open_clip
from mergetune.solutions import layer_norms, read_model, zero_shot_like


def tuned_model(seed: int = 1):
    """The tiny CLIP with other weights and another logit scale."""
    model = deepcopy(quick_clip().model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model


def trainer_file(path, model, prefix: str = "module."):
    """A file of open_clip's trainer."""
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 10, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    return path


def logits(clip, solution):
    return classifier(clip, solution).logits(NAMES, pixels())


@pytest.mark.parametrize("prefix", ["module.", "", "_orig_mod.module."])
def test_a_file_of_the_trainer_gives_the_logits_of_its_model(tmp_path, prefix):
    clip, model = quick_clip(), tuned_model()
    found = open_solution(trainer_file(tmp_path / "epoch_10.pt", model, prefix))
    expected = own_logits(clip, model) * float(model.logit_scale.exp()) / clip.logit_scale
    check(logits(clip, found), expected, 1e-5)
    assert found.kind == "parameters" and found.notes == {"checkpoint": "epoch_10.pt"}
    found.save(tmp_path / "saved")
    assert torch.equal(logits(clip, load_solution(tmp_path / "saved")), logits(clip, found))


def test_the_zero_shot_point_has_the_pretrained_values_and_lines_are_straight(tmp_path):
    clip, model = quick_clip(), tuned_model()
    tuned = replace(read_model(trainer_file(tmp_path / "a.pt", model)), logit_scale=None)
    w1 = zero_shot_like(clip, tuned)
    plain = classifier(clip, Templates(TEXTS)).logits(NAMES, clip.encode_image(pixels()))
    torch.testing.assert_close(logits(clip, w1), plain, rtol=1e-4, atol=1e-4)
    half = deepcopy(clip.model)
    with torch.no_grad():
        for own, other in zip(half.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 0.5)
    check(logits(clip, interpolate(w1, tuned, 0.5)), own_logits(clip, half), 1e-4)


def test_a_step_on_the_layer_norms_is_that_of_plain_training(tmp_path):
    clip = quick_clip()
    names = layer_norms(clip)
    assert len(names) == 2 * (2 * 2 + 1 + 2 * 2 + 2) and set(layer_norms(clip, "image")) < set(names)
    start = Parameters.start(clip, names)
    step = {"lr": 0.01, "weight_decay": 0.0, "epochs": 1, "warmup_epochs": 0, "batch_size": 6, "progress": False}
    found = fit(clip, batches(), start, lam=0.0, beta=0.0, tau=1.0, **step).solution
    model = deepcopy(clip.model).requires_grad_(True)
    texts = model.encode_text(clip.tokenize([TEXTS[0].format(name) for name in NAMES]))
    images = model.encode_image(pixels())
    loss = F.cross_entropy(clip.logit_scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T, LABELS)
    loss.backward()
    for name, value in found.values.items():
        parameter = model.get_parameter(name)
        assert parameter.grad.abs().max() > 1e-6
        check(value - parameter.detach(), -0.01 * parameter.grad, 1e-3)


def test_a_model_goes_out_as_it_came_in(tmp_path):
    clip, model = quick_clip(), tuned_model()
    found = open_solution(trainer_file(tmp_path / "a.pt", model))
    again = open_solution(to_open_clip(found, tmp_path / "b.safetensors", clip=clip))
    assert all(torch.equal(found.values[name], again.values[name]) for name in found.values)


def test_what_does_not_fit_is_refused(tmp_path):
    clip = quick_clip()
    with pytest.raises(ValueError, match="names must be those of parameters of quick, got 'logit_scale'"):
        Parameters.start(clip, ["logit_scale"])
    with pytest.raises(ValueError, match=r"which has \[16\] at 'visual.ln_post.weight', got \[24\]"):
        replace(Parameters.start(clip, ["visual.ln_post.weight"]), fingerprint=None).check(tiny_clip())
    with pytest.raises(ValueError, match="values must hold at least one parameter, got none"):
        Parameters({})
    with pytest.raises(ValueError, match="tower must be one of text, image, both, got 'audio'"):
        layer_norms(clip, "audio")
    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must hold the weights of an open_clip model, with both towers, got a, b"):
        read_model(tmp_path / "a.pt")
    a, b = Parameters.start(clip, ["visual.proj"]), Parameters.start(clip, ["visual.proj"], templates=("a {}",))
    with pytest.raises(ValueError, match="parameters on one path must have the same templates"):
        interpolate(a, b, 0.5)
