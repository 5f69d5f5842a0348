"""LoRAs in the files of others: CLIP-LoRA, PEFT for open_clip and for transformers, and whole models."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import open_clip
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_lora import check, drawn, pixels, quick_clip
from tiny import NAMES
from torch import Tensor, nn

from mergetune import FrozenClip, LoRA, Templates, classifier, open_solution, to_clip_lora, to_open_clip, to_peft
from mergetune.solutions import zero_shot_like

TEXTS = [f"a photo of a {name}." for name in NAMES]


def logits(clip: FrozenClip, lora: LoRA) -> Tensor:
    read = pixels() if lora.image_input == "pixels" else clip.encode_image(pixels())
    return classifier(clip, lora).logits(NAMES, read)


def own_logits(clip: FrozenClip, model: nn.Module) -> Tensor:
    """Logits by the forward pass of open_clip's model, also inside PEFT's."""
    with torch.no_grad():
        images, texts = model.encode_image(pixels()), model.encode_text(clip.tokenize(TEXTS))
    return clip.logit_scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def fresh() -> nn.Module:
    """A copy of the frozen model, which PEFT may change."""
    return deepcopy(quick_clip().model)


# -- PEFT and open_clip ------------------------------------------------------------------------------------------------

KINDS = {
    "joint": {"parts": ("qkv", "out", "fc", "proj")},
    "separate": {"parts": ("q", "v")},
    "text": {"parts": ("k", "out"), "tower": "text"},
    "last image block": {"parts": ("q", "k", "v", "fc"), "tower": "image", "last_blocks": 1, "rank": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_logits_of_what_is_written(tmp_path, kind):
    clip = quick_clip()
    lora = drawn(clip, 1, **KINDS[kind])
    to_peft(lora, tmp_path, clip=clip)
    model = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    expected = logits(clip, lora)
    check(own_logits(clip, model.base_model.model), expected, 1e-5)
    check(logits(clip, open_solution(tmp_path)), expected, 1e-5)


def test_ranks_and_scales_may_differ_between_layers(tmp_path):
    clip = quick_clip()
    lora = drawn(clip, 1, parts=("qkv", "fc"))
    scales = {place: 0.3 + 0.1 * i for i, place in enumerate(lora.scales)}
    more = drawn(clip, 2, parts=("qkv", "fc"), rank=5).factors
    odd = {name: more[name] if name.startswith("image.1.fc") else t for name, t in lora.factors.items()}
    lora = replace(lora, factors=odd, scales=scales)
    to_peft(lora, tmp_path, clip=clip)
    model = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    check(own_logits(clip, model.base_model.model), logits(clip, lora), 1e-5)
    found = open_solution(tmp_path)
    check(logits(clip, found), logits(clip, lora), 1e-5)
    assert found.factors["image.1.fc.A"].shape[0] == 5


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trained_is_read(tmp_path, rslora):
    """And written again with the same numbers. PEFT adds the change of the output projection twice."""
    clip = quick_clip()
    target = r".*resblocks\.1\.(attn|mlp\.c_fc)"
    config = peft.LoraConfig(
        target_modules=target, r=4, lora_alpha=6, use_rslora=rslora, rank_pattern={"visual.*attn": 3}
    )
    model = peft.get_peft_model(fresh(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    # Keys of rank_pattern that are regular expressions are not read.
    text = (tmp_path / "adapter_config.json").read_text().replace("visual.*attn", "visual.transformer.resblocks.1.attn")
    (tmp_path / "adapter_config.json").write_text(text)
    found = open_solution(tmp_path)
    assert found.scales["text.1.qkv"] == pytest.approx(6 / math.sqrt(4) if rslora else 6 / 4)
    assert {place: len(found.factors[f"{place}.A"]) for place in ("text.1.qkv", "image.1.out")} == {
        "text.1.qkv": 4,
        "image.1.out": 3,
    }
    check(own_logits(clip, model.base_model.model), logits(clip, found), 1e-5)
    to_peft(found, tmp_path / "again", clip=clip)
    files = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])


# -- PEFT and transformers ---------------------------------------------------------------------------------------------


def test_transformers_and_open_clip_agree_through_peft(tmp_path):
    """One set of weights in both libraries; the adapter goes out to CLIPModel and comes back."""
    transformers = pytest.importorskip("transformers")
    clip, theirs = quick_clip(), clip_model(transformers)
    lora = drawn(clip, 1, parts=("q", "v", "out", "fc", "proj"))
    to_peft(lora, tmp_path, clip=clip, names="transformers")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=pixels()).logits_per_image
    check(found, logits(clip, lora), 1e-5)
    back = open_solution(tmp_path)
    assert list(back.scales) == list(lora.scales)
    assert back.scales == pytest.approx(lora.scales) and all(
        torch.equal(back.factors[name], t) for name, t in lora.factors.items()
    )
    joint = drawn(clip, 2, parts=("qkv",), tower="image")
    to_peft(joint, tmp_path, names="transformers")
    assert list(open_solution(tmp_path).scales)[:3] == ["image.0.q", "image.0.k", "image.0.v"]
    check(logits(clip, open_solution(tmp_path)), logits(clip, joint), 1e-5)


def clip_model(transformers) -> nn.Module:
    """transformers' CLIPModel with the weights of the tiny CLIP."""
    shared = {"hidden_act": "quick_gelu", "num_hidden_layers": 2, "projection_dim": 8}
    config = transformers.CLIPConfig(
        text_config={
            **shared, "vocab_size": 49408, "hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2,
            "max_position_embeddings": 16, "eos_token_id": 49407,
        },
        vision_config={
            **shared, "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3, "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    state, ours = {}, quick_clip().model.state_dict()
    for tower, prefix in (("text", ""), ("vision", "visual.")):
        for i in range(2):
            here, there = f"{prefix}transformer.resblocks.{i}.", f"{tower}_model.encoder.layers.{i}."
            for kind in ("weight", "bias"):
                rows = ours[f"{here}attn.in_proj_{kind}"].chunk(3)
                state |= {f"{there}self_attn.{p}_proj.{kind}": row for p, row in zip("qkv", rows, strict=True)}
                names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
                         "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
                state |= {f"{there}{b}.{kind}": ours[f"{here}{a}.{kind}"] for a, b in names.items()}
    embeddings = {
        "text_model.embeddings.token_embedding.weight": ours["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": ours["positional_embedding"],
        "vision_model.embeddings.class_embedding": ours["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": ours["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": ours["visual.positional_embedding"],
        "text_projection.weight": ours["text_projection"].T,
        "visual_projection.weight": ours["visual.proj"].T,
        "logit_scale": ours["logit_scale"],
    }
    for kind in ("weight", "bias"):
        embeddings[f"text_model.final_layer_norm.{kind}"] = ours[f"ln_final.{kind}"]
        embeddings[f"vision_model.pre_layrnorm.{kind}"] = ours[f"visual.ln_pre.{kind}"]
        embeddings[f"vision_model.post_layernorm.{kind}"] = ours[f"visual.ln_post.{kind}"]
    missing, unexpected = model.load_state_dict(state | embeddings, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora must be off, got True"),
        ({"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'"),
        ({"lora_bias": True}, "lora_bias must be off, got True"),
    ],
    ids=str,
)
def test_adapters_of_other_kinds_are_refused(tmp_path, change, message):
    folder = to_peft(drawn(quick_clip(), 1), tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        open_solution(folder)


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        ("modules_to_save.visual.proj", "got 'modules_to_save.visual.proj': whole tensors"),
        ("base_model.model.visual.transformer.resblocks.0.attn.lora_magnitude_vector", "lora_A and lora_B alone"),
        ("base_model.model.visual.conv1.lora_A.weight", "must hold lora_A and lora_B of every layer"),
        ("visual.transformer.resblocks.0.ln_1.bias", "got 'visual.transformer.resblocks.0.ln_1.bias': whole tensors"),
    ],
)
def test_adapters_with_more_than_factors_are_refused(tmp_path, renamed, message):
    file = to_peft(drawn(quick_clip(), 1), tmp_path) / "adapter_model.safetensors"
    save_file(load_file(file) | {renamed: torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match=message):
        open_solution(tmp_path)


@pytest.mark.parametrize("module", ["visual.conv1", "visual_projection", "vision_model.encoder.layers.0.mlp.fc3"])
def test_adapters_of_other_layers_are_refused(tmp_path, module):
    file = to_peft(drawn(quick_clip(), 1), tmp_path) / "adapter_model.safetensors"
    more = {f"base_model.model.{module}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(load_file(file) | more, file)
    with pytest.raises(ValueError, match=f"must adapt attention and MLP layers of transformer blocks.* got '{module}'"):
        open_solution(tmp_path)


# -- CLIP-LoRA ---------------------------------------------------------------------------------------------------------


def published_file(path, *, encoder="both", position="all", text=2, vision=2, params=("q", "k", "v"), r=2, alpha=1):
    """A file as the published program writes it."""
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
    widths = [16] * text * (encoder != "vision") + [24] * vision * (encoder != "text")
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    weights = {
        f"layer_{i}": {names[p]: {"w_lora_A": drawn(r, width), "w_lora_B": drawn(width, r)} for p in params}
        for i, width in enumerate(widths)
    }
    metadata = {"r": r, "alpha": alpha, "encoder": encoder, "params": list(params), "position": position}
    torch.save({"weights": weights, "metadata": metadata}, path)
    return weights


@pytest.mark.parametrize("params", [("q", "k", "v"), ("q", "o")], ids="".join)
@pytest.mark.parametrize("encoder", ["both", "text", "vision"])
def test_a_published_file_is_read_and_written_again(tmp_path, encoder, params):
    clip, file = quick_clip(), tmp_path / "lora_weights.pt"
    weights = published_file(file, encoder=encoder, params=params)
    lora = open_solution(file)
    assert set(lora.scales.values()) == {1 / math.sqrt(2)} and lora.templates == ("a photo of a {}.",)
    first = {"both": "text.0.q", "text": "text.0.q", "vision": "image.0.q"}[encoder]
    last = {"both": "image.1.q", "text": "text.1.q", "vision": "image.1.q"}[encoder]
    assert torch.equal(lora.factors[f"{first}.A"], weights["layer_0"]["q_proj"]["w_lora_A"])
    assert torch.equal(lora.factors[f"{last}.B"], list(weights.values())[-1]["q_proj"]["w_lora_B"])
    lora.check(clip)
    again = to_clip_lora(lora, tmp_path / "again.pt", clip=clip)
    before, after = (torch.load(f, weights_only=True) for f in (file, again))
    assert after["metadata"] == before["metadata"] and type(after["metadata"]["alpha"]) is int
    for layer, found in before["weights"].items():
        for name, pair in found.items():
            assert all(torch.equal(pair[key], after["weights"][layer][name][key]) for key in pair)


@pytest.mark.parametrize(
    ("position", "text", "vision", "blocks"),
    [
        ("half-up", 6, 6, ([6, 11], [6, 11])),
        ("half-up", 6, 12, ([6, 11], [12, 23])),
        ("half-bottom", 6, 12, ([0, 5], [0, 11])),
        ("all", 12, 24, ([0, 11], [0, 23])),
        ("mid", 4, 4, ([4, 7], [4, 7])),
        ("top3", 3, 3, ([9, 11], [9, 11])),
    ],
)
def test_positions_are_those_of_the_published_towers(tmp_path, position, text, vision, blocks):
    published_file(tmp_path / "a.pt", position=position, text=text, vision=vision)
    lora = open_solution(tmp_path / "a.pt")
    for tower, (first, last) in zip(("text", "image"), blocks, strict=True):
        found = [int(place.split(".")[1]) for place in lora.scales if place.startswith(tower)]
        assert (min(found), max(found)) == (first, last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["metadata"].update(r=3), "must be matrices of rank r = 3"),
        (lambda c: c["metadata"].update(alpha="1"), "positive numbers r and alpha, got 2 and '1'"),
        (lambda c: c["metadata"].update(encoder="audio"), "encoder must be one of text, vision, both, got 'audio'"),
        (lambda c: c["metadata"].update(position="top3"), "position 'top3' must name the 2 blocks"),
        (lambda c: c["weights"].pop("layer_0"), "weights must hold layer_0, layer_1 and so on, got layer_1"),
        (lambda c: c["weights"]["layer_0"].update(k_proj={}), "a layer must hold w_lora_A and w_lora_B"),
        (lambda c: c["weights"]["layer_0"]["q_proj"].update(w_lora_A=torch.full((2, 16), math.nan)), "must be finite"),
        (lambda c: c["weights"]["layer_0"].clear(), "each layer must hold w_lora_A"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, change, message):
    file = tmp_path / "lora_weights.pt"
    published_file(file)
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    with pytest.raises(ValueError, match=f"lora_weights.pt.*{message}"):
        open_solution(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("fc",)}, "solution must adapt q, k, v, out alone for CLIP-LoRA, got 'fc'"),
        ({"last_blocks": 1, "tower": "image", "seeds": (1, 2)}, "one rank and one scale"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, options, message):
    options = dict(options)
    seeds = options.pop("seeds", (1,))
    lora = drawn(quick_clip(), seeds[0], **options)
    if len(seeds) > 1:
        lora = replace(lora, scales=dict(zip(lora.scales, (0.1, *[0.2] * 5), strict=True)))
    with pytest.raises(ValueError, match=message):
        to_clip_lora(lora, tmp_path / "a.pt", clip=quick_clip())
    assert not list(tmp_path.iterdir())


def test_a_lora_that_changes_nothing_has_no_file(tmp_path):
    nothing = zero_shot_like(quick_clip(), drawn(quick_clip(), 1))
    with pytest.raises(ValueError, match="solution must change weights, got a LoRA of rank 0"):
        to_peft(nothing, tmp_path)


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_open_clip_loads_the_whole_model(tmp_path, ending):
    """And computes the logits of the LoRA."""
    clip = quick_clip()
    lora = drawn(clip, 1)
    file = to_open_clip(lora, tmp_path / f"model{ending}", clip=clip)
    model = fresh()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    open_clip.load_checkpoint(model, str(file))
    check(own_logits(clip, model), logits(clip, lora), 1e-5)
    with pytest.raises(ValueError, match="solution must change weights of the towers, got a templates, which changes"):
        to_open_clip(Templates(), tmp_path / "other.pt", clip=clip)


def test_a_later_peft_that_adds_each_change_once_is_read_so(tmp_path):
    lora = drawn(quick_clip(), 1, parts=("qkv", "out"))
    file = to_peft(lora, tmp_path) / "adapter_config.json"
    scales = open_solution(tmp_path).scales
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_version": "0.22.0"}))
    later = open_solution(tmp_path).scales
    assert {place: scales[place] / later[place] for place in ("text.0.qkv", "text.0.out")} == {
        "text.0.qkv": 1,
        "text.0.out": 2,
    }
