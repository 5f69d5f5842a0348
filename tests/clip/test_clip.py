"""FrozenClip: loading, open_clip's own features from both of its classes, class embeddings, fingerprints, refusals."""

import functools
import json
import math
import warnings
from copy import deepcopy
from dataclasses import FrozenInstanceError
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import save_file
from tiny import SIGLIP, TEXT, VISION, encoder

import mergetune
from mergetune import FrozenClip, Prompt, load_clip
from mergetune.clip.loading import warn_quickgelu

ICON = f"local-dir:{Path(mergetune.__file__).parent / 'assets' / 'icon-clip'}"
NAMES = ["cat", "fire truck", "dog"]


tokenizer = functools.cache(lambda: open_clip.SimpleTokenizer(context_length=TEXT["context_length"]))


def build(kind: str = "clip"):
    return deepcopy(_built(kind))


@functools.cache
def _built(kind: str):
    torch.manual_seed(0)
    if kind == "clip":
        return open_clip.CLIP(8, VISION, TEXT)
    if kind == "custom":
        return open_clip.CustomTextCLIP(8, VISION, TEXT)
    return open_clip.CustomTextCLIP(8, VISION, SIGLIP, init_logit_scale=math.log(10), init_logit_bias=-10.0)


def frozen(model) -> FrozenClip:
    return FrozenClip(model, tokenizer(), "tiny")


@pytest.fixture
def tiny_name(tmp_path, monkeypatch):
    """A built-in model name of open_clip's, with its QuickGELU twin."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    (tmp_path / "tiny-test-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path)
    return "tiny-test"


def save_torchscript(path: Path) -> Path:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    return path


# -- loading ----------------------------------------------------------------------------------------------------------


def test_local_dir_is_open_clips_own_model():
    clip = load_clip(ICON)
    theirs = open_clip.create_model(ICON).eval()
    tokens = open_clip.get_tokenizer(ICON)(["an icon of a cat"])
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert (clip.name, clip.embed_dim, clip.text.width, clip.text.context_length) == (ICON, 128, 128, 32)
    assert clip.preprocess_cfg["mean"] == [0.85, 0.85, 0.85] and clip.preprocess_cfg["std"] == [0.3, 0.3, 0.3]
    json.dumps(clip.preprocess_cfg)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(["an icon of a cat"]), theirs.encode_text(tokens))
        torch.testing.assert_close(clip.encode_image(pixels), theirs.encode_image(pixels, normalize=True))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_built_in_name_with_a_local_checkpoint(tiny_name, tmp_path, suffix):
    weights, path = build().state_dict(), tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(weights, path)
    clip = load_clip(tiny_name, path)  # a Path will do
    assert clip.name == f"{tiny_name}/{path}"
    loaded = clip.model.state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert clip.fingerprint == frozen(build()).fingerprint


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_is_that_of_the_weights_and_features_stay_float32(tiny_name, tmp_path, precision):
    torch.save(build().state_dict(), tmp_path / "weights.pt")
    clip = load_clip(tiny_name, tmp_path / "weights.pt", precision=precision)
    assert clip.dtype == getattr(torch, precision)
    weights = clip.class_embeddings(NAMES)
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(3))
    assert weights.dtype == clip.encode_image(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
    torch.testing.assert_close(weights, frozen(build()).class_embeddings(NAMES), atol=3e-2, rtol=0)


def test_precision_leaves_the_logit_scale_alone(tiny_name, tmp_path):
    torch.save(build().state_dict(), tmp_path / "weights.pt")
    clip = load_clip(tiny_name, tmp_path / "weights.pt", precision="bfloat16")
    assert clip.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (("ViT-B-16",), {}, ValueError, "pretrained must name the weights of 'ViT-B-16'"),
        ((ICON, "openai"), {}, ValueError, "pretrained must be left out"),
        ((ICON,), {"precision": "int8"}, ValueError, "precision must be one of float32, bfloat16, float16, got 'int8'"),
        (("ViT-Z-16", "openai"), {}, ValueError, "must be a known backbone, got .ViT-Z-16.: did you mean ViT-B-16"),
        (("ViT-B-16", "opneai"), {}, ValueError, "got .opneai.: did you mean openai."),
        (("local-dir:/does/not/exist",), {}, Exception, "/does/not/exist"),
    ],
)
def test_wrong_names_are_refused(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        load_clip(*args, **kwargs)


def test_slashes_in_names_are_read_as_open_clip_does(tiny_name, tmp_path):
    torch.save(build().state_dict(), tmp_path / "weights.pt")
    clip = load_clip("tiny/test", tmp_path / "weights.pt")
    assert clip.name.startswith("tiny-test/") and clip.tokenizer(["cat"]).shape == (1, TEXT["context_length"])


def test_a_missing_package_for_the_tokenizer_is_named(tiny_name, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'transformers'")

    torch.save(build().state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(open_clip, "get_tokenizer", missing)
    with pytest.raises(RuntimeError, match="tokenizer of 'tiny-test' needs a package: pip install transformers"):
        load_clip(tiny_name, tmp_path / "weights.pt")


def test_another_models_weights_are_refused(tiny_name, tmp_path):
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match="state_dict"):
        load_clip(tiny_name, tmp_path / "other.pt")
    torch.save(open_clip.CLIP(8, VISION, {**TEXT, "width": 32}).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(RuntimeError, match="wide.pt do not fit the model 'tiny-test': text pos_embed width"):
        load_clip(tiny_name, tmp_path / "wide.pt")


# -- the frozen view --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "causal", "pool"), [("clip", True, "argmax"), ("custom", True, "argmax"), ("siglip", False, "last")]
)
def test_features_are_open_clips_own(kind, causal, pool):
    model = build(kind)
    clip = frozen(model)
    texts = [f"a photo of a {name}." for name in NAMES]
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(texts), model.encode_text(clip.tokenizer(texts)))
        torch.testing.assert_close(clip.encode_text(texts, batch_size=2), clip.encode_text(texts))
        torch.testing.assert_close(clip.encode_image(pixels), model.encode_image(pixels, normalize=True))
    assert (clip.text.causal, clip.text.pool, clip.text.heads, len(clip.text.blocks)) == (causal, pool, 2, 2)
    assert (clip.embed_dim, clip.text.width, clip.text.context_length, clip.first_token) == (8, 16, 16, 1)


@pytest.mark.parametrize("kind", ["clip", "custom", "siglip"])
def test_nothing_can_be_trained(kind):
    clip = frozen(build(kind).train())
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert not any(module.training for module in clip.model.modules())
    assert not clip.class_embeddings(NAMES).requires_grad
    assert not clip.encode_image(torch.zeros(1, 3, 16, 16)).requires_grad
    half = clip.text_as(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and clip.text.dtype == torch.float32 and clip.text_as(torch.bfloat16) is half
    assert not any(parameter.requires_grad for block in half.blocks for parameter in block.parameters())
    with pytest.raises(FrozenInstanceError):
        clip.name = "another"


def test_logit_scale_and_bias():
    assert frozen(build()).logit_scale == pytest.approx(1 / 0.07)
    assert frozen(build()).logit_bias == 0.0
    siglip = frozen(build("siglip"))
    assert (siglip.logit_scale, siglip.logit_bias) == (pytest.approx(10), -10.0)


def test_class_embeddings_of_one_and_several_templates():
    model = build()
    clip = frozen(model)
    templates = ["a photo of a {}.", "a drawing of the {}", "{} outdoors"]

    @torch.no_grad()
    def direct(name):
        unit = [F.normalize(model.encode_text(clip.tokenizer([t.format(name)]))[0], dim=0) for t in templates[:count]]
        return F.normalize(torch.stack(unit).mean(0), dim=0)

    for count in (1, 3):
        expected = torch.stack([direct(name) for name in NAMES])
        torch.testing.assert_close(clip.class_embeddings(NAMES, templates[:count]), expected)
    torch.testing.assert_close(clip.class_embeddings(NAMES, templates[0]), clip.class_embeddings(NAMES))
    torch.testing.assert_close(clip.class_embeddings(NAMES[::-1]), clip.class_embeddings(NAMES).flip(0))


@pytest.mark.parametrize(
    ("names", "templates", "match"),
    [
        ([], "a {}.", "classnames must hold at least one name"),
        (NAMES, [], "templates must hold at least one text"),
        (NAMES, "a photo", "exactly one {} for the class name, got 'a photo'"),
        (NAMES, ["a {}.", "{} and {}"], "exactly one {} for the class name, got '{} and {}'"),
        (["cat", "very " * 15 + "long"], "a {}.", "must fit the text tower's 16 tokens, got 'a very very"),
    ],
)
def test_unusable_texts_are_refused(names, templates, match):
    with pytest.raises(ValueError, match=match):
        frozen(build()).class_embeddings(names, templates)


def test_other_braces_in_a_template_are_refused_or_kept():
    frozen(build()).class_embeddings(NAMES, "a {} in {place}")


def test_one_string_for_classnames_is_refused():
    with pytest.raises((TypeError, ValueError), match="classnames"):
        frozen(build()).class_embeddings("cat")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_longest_text_fits_and_one_more_token_does_not(kind):
    clip = frozen(build(kind))
    fits = " ".join(["cat"] * 14)  # and a start and an end token
    assert clip.tokenize([fits, "cat"]).shape == (2, 16)
    with pytest.raises(ValueError, match="16 tokens"):
        clip.tokenize(["cat", fits + " cat"])


def test_texts_whose_words_begin_alike():
    """Sentencepiece may put the same piece before every word; it is no start token."""

    def pieces(texts, context_length=16):
        ids = [[i for word in text.split() for i in (7, *map(ord, word))] + [1] for text in texts]
        return torch.tensor([(own + [0] * context_length)[:context_length] for own in ids])

    clip = FrozenClip(build("siglip"), pieces, "tiny")
    assert pieces(["cat", "dog"])[:, 0].tolist() == [7, 7] and clip.first_token == 0


# -- towers with options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_towers_that_give_their_tokens_too(kind):
    model = kind(8, {**VISION, "output_tokens": True}, {**TEXT, "output_tokens": True}).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip, (expected, _) = frozen(model), model.encode_image(pixels)
    torch.testing.assert_close(clip.encode_image(pixels), F.normalize(expected, dim=-1))
    text = model.encode_text(clip.tokenizer(NAMES))
    torch.testing.assert_close(clip.encode_text(NAMES), text if kind is open_clip.CLIP else text[0])


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_bf16"])
@pytest.mark.parametrize("vision", [VISION, {**VISION, "layers": [1, 1, 1, 1], "image_size": 32}])
def test_models_that_open_clip_made_in_a_half_type(vision, precision, tmp_path):
    """In its mixed precision some parameters are float32, among them the first of a ViT."""
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    half, whole = frozen(open_clip.create_model(f"local-dir:{tmp_path}", precision=precision)), frozen(model)
    pixels = torch.randn(2, 3, *[vision["image_size"]] * 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(half.encode_image(pixels), whole.encode_image(pixels), atol=2e-2, rtol=0)
    expected = whole.class_embeddings(NAMES)
    torch.testing.assert_close(half.class_embeddings(NAMES), expected, atol=3e-2, rtol=0)
    prompt = Prompt.from_template(half)
    for dtype in (torch.float32, torch.bfloat16):
        features = encoder(half, prompt, NAMES, precision=dtype)(prompt.ctx[None])[0]
        torch.testing.assert_close(F.normalize(features, dim=-1), expected, atol=5e-2, rtol=0)


# -- preprocessing ----------------------------------------------------------------------------------------------------


def test_the_preprocessing_is_the_models_own_or_what_is_given():
    model = build()
    assert frozen(model).preprocess_cfg["size"] in (16, [16, 16])
    open_clip.set_model_preprocess_cfg(model, {"size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    own = frozen(model)
    assert (own.preprocess_cfg["mean"], own.preprocess_cfg["std"]) == ([0.5] * 3, [0.25] * 3)
    assert own.preprocess_cfg["interpolation"] == "bicubic"
    given = FrozenClip(model, tokenizer(), "tiny", {"size": 12, "resize_mode": "squash"})
    assert given.preprocess(Image.new("RGB", (40, 30))).shape == (3, 12, 12)
    assert own.preprocess(Image.new("RGB", (40, 30), (255, 255, 255))).max() == 2.0


SIGLIP_PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}


@pytest.mark.parametrize(
    ("tags", "taken"),
    [
        ({"webli": SIGLIP_PIXELS, "more": {**SIGLIP_PIXELS, "size": 99}}, True),
        ({"webli": SIGLIP_PIXELS, "openai": {}}, False),  # they differ: the file could be either
        ({"openai": {}}, False),
        ({}, False),
    ],
)
def test_a_local_checkpoint_takes_the_preprocessing_of_all_tags(tiny_name, tmp_path, monkeypatch, tags, taken):
    torch.save(build().state_dict(), tmp_path / "weights.pt")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_name, tags)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cfg = load_clip(tiny_name, tmp_path / "weights.pt").preprocess_cfg
    told = [str(w.message) for w in seen if "preprocessing" in str(w.message)]
    assert bool(told) == taken and cfg["size"] in (16, [16, 16])
    default = json.loads(json.dumps(PreprocessCfg().mean))
    assert (cfg["mean"], cfg["resize_mode"]) == (([0.5] * 3, "squash") if taken else (default, "shortest"))
    if taken:
        assert "weights.pt does not record" in told[0] and "resize_mode squash" in told[0] and " size " not in told[0]


def test_a_tag_brings_its_own_preprocessing(tiny_name, monkeypatch):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_name, {"webli": SIGLIP_PIXELS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="could not be loaded"):  # there is nothing to download
            load_clip(tiny_name, "webli")


# -- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "custom"])
@pytest.mark.parametrize("tower", ["image", "text", "scale"])
def test_one_weight_changes_the_fingerprint_of_its_tower_alone(kind, tower):
    before, model = frozen(build(kind)), build(kind)
    text = model.text if kind == "custom" else model
    weight = {"image": model.visual.proj, "text": text.positional_embedding, "scale": model.logit_scale}[tower]
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
    after = frozen(model)
    assert after.fingerprint != before.fingerprint
    assert (after.image_fingerprint != before.image_fingerprint) == (tower == "image")
    assert (after.text_fingerprint != before.text_fingerprint) == (tower != "image")


def test_fingerprints_do_not_depend_on_what_is_called():
    a, b = frozen(build()), frozen(build())
    a.class_embeddings(NAMES), a.text_as(torch.bfloat16)
    assert (a.fingerprint, a.image_fingerprint, a.text_fingerprint) == (
        b.fingerprint,
        b.image_fingerprint,
        b.text_fingerprint,
    )


# -- QuickGELU --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("name", "file", "torchscript", "warned"),
    [
        ("ViT-B-16", "weights.pt", True, True),
        ("ViT-B-16-quickgelu", "weights.pt", True, False),
        ("ViT-B-16", "weights.pt", False, False),
        ("ViT-B-16", "ViT-B-16-openai.pt", False, True),
        ("ViT-B-16-SigLIP", "weights.pt", True, False),  # there is no QuickGELU twin
    ],
)
def test_openai_weights_under_a_gelu_name_warn(tmp_path, name, file, torchscript, warned):
    if torchscript:
        save_torchscript(tmp_path / file)
    else:
        torch.save({"weight": torch.zeros(2, 2)}, tmp_path / file)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_quickgelu(name, str(tmp_path / file))
    told = [str(w.message) for w in seen if "QuickGELU" in str(w.message)]
    assert bool(told) == warned and (not warned or "'ViT-B-16-quickgelu'" in told[0])


def test_load_clip_warns_before_it_loads(tiny_name, tmp_path):
    torch.save(build().state_dict(), tmp_path / "openai.pt")
    with pytest.warns(UserWarning, match="Load it as 'tiny-test-quickgelu'"):
        load_clip(tiny_name, tmp_path / "openai.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_clip("tiny-test-quickgelu", tmp_path / "openai.pt")


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:'torch.load' received", "ignore:Converting a tensor"
)
def test_openais_own_archive_can_be_loaded(tiny_name, tmp_path):
    inputs, model = (torch.zeros(1, 3, 16, 16), tokenizer()(["cat"])), build().eval()
    mask = model._buffers.pop("attn_mask")
    model.attn_mask = mask  # theirs is no buffer, but these numbers are
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(16))
    archive = torch.jit.trace(model, inputs, strict=False, check_trace=False)
    torch.jit.save(archive, tmp_path / "ViT-B-16.pt")
    assert load_clip("tiny-test-quickgelu", tmp_path / "ViT-B-16.pt").fingerprint == frozen(build()).fingerprint


# -- towers that are changed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda text: setattr(text, "pool_type", "first"), "must pool by argmax, eos or last, got 'first'"),
        (lambda text: setattr(text, "use_pad_mask", True), "padding mask"),
        (lambda text: text.attn_mask[0, 3:].zero_(), "the causal attention mask or none"),
        (lambda text: setattr(text, "transformer", torch.nn.Identity()), "must be open_clip's TextTransformer"),
        (
            lambda text: text.transformer.resblocks.append(torch.nn.Identity()),
            "made of ResidualAttentionBlock, got Identity",
        ),
    ],
)
def test_prompts_are_refused_for_a_text_tower_that_is_not_understood(spoil, match):
    model = build("custom")
    spoil(model.text)
    clip = frozen(model)
    assert not clip.takes_prompts
    with pytest.raises(TypeError, match=match):
        _ = clip.text


@pytest.mark.parametrize("templates", ["a photo of a {}.", ["a {}", "{} seen from very far away", "the {}"]])
def test_class_embeddings_are_open_clips_own_and_remembered(templates, monkeypatch):
    clip = frozen(build())
    names = ("cat", "hot-air balloon", "a dog on a very long leash", "cat")
    listed = [templates] if isinstance(templates, str) else templates
    each = [F.normalize(clip.encode_text([t.replace("{}", n) for n in names]), dim=-1) for t in listed]
    expected = F.normalize(torch.stack(each).mean(0), dim=-1)
    found = clip.class_embeddings(names, templates)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.zero_()  # what is remembered is not the caller's
    monkeypatch.setattr(type(clip), "tokenize", lambda *_: pytest.fail("it was encoded again"))
    torch.testing.assert_close(clip.class_embeddings(list(names), templates), expected, atol=1e-5, rtol=1e-5)


def test_the_latest_class_embeddings_are_remembered(monkeypatch):
    clip = frozen(build())
    for i in range(40):
        clip.class_embeddings((f"thing {i}",))
    assert len(clip._embedded) == 16 and (("thing 39",), ("a photo of a {}.",)) in clip._embedded
