"""Every family of open_clip's models, small and random but of its own configuration: our features are open_clip's."""

import copy
import functools
import json
import re
from dataclasses import dataclass
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from opaque_cases import TEXT_MODELS, write_text_model
from open_clip.tokenizer import get_clean_fn
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from tiny import encoder
from torch import Tensor, nn

from mergetune import FeatureCache, FrozenClip, Prompt, evaluate, fit, load_clip, tune

NAMES = ("cat", "hot-air balloon", "St. Bernard", "Boeing 737-800")
TEMPLATE = "a photo of a {}."
VOCABULARY = 1000


@dataclass(frozen=True)
class Words:
    """Stands for a tokenizer that open_clip downloads: hashed words, with that one's special tokens and cleaning."""

    context_length: int
    end: int
    pad: int
    start: int | None = None
    last: int | None = None  # always the last token of all, behind the padding
    clean: str = "whitespace"

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        room = (context_length or self.context_length) - (self.last is not None)
        tokens = torch.full((len(texts), room), self.pad)
        for row, text in zip(tokens, texts, strict=True):
            words = re.findall(r"\w+|[^\w\s]", get_clean_fn(self.clean)(text))
            ids = [] if self.start is None else [self.start]
            ids += [10 + crc32(word.encode()) % (VOCABULARY - 11) for word in words]
            ids = [*ids[: room - 1], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens if self.last is None else F.pad(tokens, (0, 1), value=self.last)


@dataclass(frozen=True)
class Family:
    """What is known of a family's texts; ``words`` are the arguments of its stand-in tokenizer, None is CLIP's BPE."""

    length: int = 77
    causal: bool = True
    pool: str = "argmax"
    first: int = 1
    bias: float = 0.0
    words: dict | None = None


SIGLIP = {"end": 1, "pad": 1, "clean": "canonicalize"}
SIGLIP2 = {"end": 1, "pad": 0, "clean": "canonicalize"}
XLM = {"start": 0, "end": 2, "pad": 1}
MT5 = {"end": 1, "pad": 0, "clean": "canonicalize"}
BERT = {"start": 2, "end": 0, "pad": 0, "clean": "lower"}  # its end token is stripped
CLIPS = {"start": 5, "end": 6, "pad": 0, "last": 2, "clean": "lower"}
SIGMOID = {"causal": False, "pool": "last", "first": 0, "bias": -10.0}

FAMILIES = {
    "ViT-B-16": Family(),
    "ViT-L-14-quickgelu": Family(),
    "ViT-bigG-14": Family(),  # heads 80 wide
    "RN50-quickgelu": Family(),
    "RN50x4": Family(),
    "convnext_base_w": Family(),
    "swin_base_patch4_window7_224": Family(),
    "vit_medium_patch16_gap_256": Family(),
    "vit_relpos_medium_patch16_cls_224": Family(),
    "ViTamin-S": Family(),
    "EVA01-g-14": Family(),
    "EVA02-B-16": Family(),
    "MobileCLIP-B": Family(),
    "MobileCLIP-S1": Family(causal=False),
    "MobileCLIP2-L-14": Family(causal=False),
    "MobileCLIP2-S4": Family(causal=False),
    "PE-Core-T-16-384": Family(length=32),
    "PE-Core-bigG-14-448": Family(length=72),
    "ViT-L-14-CLIPA": Family(32, causal=False, pool="last", words=BERT),
    "CLIPS": Family(
        80, causal=False, pool="last", words=CLIPS
    ),  # on the Hub only; its tokenizer ends with the class token
    "ViT-H-14-worldwide": Family(pool="eos", words=XLM),
    "ViT-L-14-worldwide": Family(pool="eos", first=0, words=MT5),
    "ViT-B-16-SigLIP": Family(64, **SIGMOID, words=SIGLIP),
    "ViT-SO400M-14-SigLIP": Family(16, **SIGMOID, words=SIGLIP),  # heads 72 wide, an odd MLP
    "ViT-SO400M-16-SigLIP-i18n-256": Family(64, **SIGMOID, words=SIGLIP),  # no projection
    "ViT-B-16-SigLIP2": Family(64, **SIGMOID, words=SIGLIP2),
    "ViT-gopt-16-SigLIP2-256": Family(64, **SIGMOID, words=SIGLIP2),
}


def small_trunk(name: str, create=timm.create_model, **kwargs) -> nn.Module:
    """timm's image tower of that name with fewer, narrower layers."""
    small: dict = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    if name.startswith("convnext"):
        small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    elif name.startswith("fastvit"):
        stages = 5 if name.endswith(("mci3", "mci4")) else 4
        small = {"layers": (1,) * stages, "embed_dims": (8, 8, 16, 32, 32)[:stages]}
    elif name.startswith("swin"):
        small = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)}
    elif name.startswith(("vitamin", "vit_base_mci")):  # the width is that of their convolutions
        del small["embed_dim"]
    return create(name, **small, **kwargs)


def small_config(name: str) -> dict:
    """open_clip's own configuration with fewer, narrower layers; what makes the family odd is kept."""
    config = open_clip.get_model_config("ViT-L-14-CLIPA" if name == "CLIPS" else name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if name == "CLIPS":
        text.update(context_length=80, act_kwargs={"approximate": "tanh"})
    if "hf_model_name" not in text:
        text.update(width=2 * text["width"] // text["heads"], heads=2, layers=2)
    if text.get("proj_type") == "none":
        text["width"] = 32
    if "timm_model_name" not in vision:
        resnet = isinstance(vision["layers"], list)
        vision.update({"layers": [1] * 4, "width": 8} if resnet else {"layers": 1, "width": 32, "head_width": 16})
    return {**config, "embed_dim": 32}


def make(name: str, config: dict, tokenizer) -> FrozenClip:
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    kind = open_clip.CoCa if "multimodal_cfg" in config else kind
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", small_trunk)
        model = kind(**config)
    with torch.no_grad():  # every text parameter random, so that a bias or scale left out shows
        for key, parameter in model.named_parameters():
            if not key.startswith(("visual.", "logit")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim == 1 else 0.1)
    return FrozenClip(model, tokenizer, name)


@functools.cache
def build(name: str) -> FrozenClip:
    config, words = small_config(name), FAMILIES[name].words
    length = config["text_cfg"]["context_length"]
    if words is None:
        return make(name, config, open_clip.SimpleTokenizer(context_length=length))
    config["text_cfg"]["vocab_size"] = VOCABULARY
    return make(name, config, Words(length, **words))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 56, 3), np.uint8))


def encode_text(clip: FrozenClip, ctx: Tensor, first: int) -> Tensor:
    """open_clip's own features of "<ctx> <name>." through its own blocks: [n, W] or [C, n, W] -> [C, D]."""
    tower, vectors = getattr(clip.model, "text", clip.model), ctx.expand(len(NAMES), -1, -1)
    hook = tower.token_embedding.register_forward_hook(
        lambda module, args, rows: torch.cat([rows[:, :first], vectors, rows[:, first + vectors.shape[1] :]], 1)
    )
    try:
        return clip.model.encode_text(clip.tokenizer([TEMPLATE.format(name) for name in NAMES]))
    finally:
        hook.remove()


def assert_relative(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(got, expected)
    assert error <= tolerance, f"relative error {error}"


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()


def assert_same_features_and_gradient(clip: FrozenClip, first: int, shared: bool) -> None:
    shape = (4, clip.text.width) if shared else (len(NAMES), 4, clip.text.width)
    generator = torch.Generator().manual_seed(1)
    ctx = torch.randn(shape, generator=generator).requires_grad_()
    prompt = Prompt(ctx.detach(), TEMPLATE, classnames=None if shared else NAMES)
    double = SimpleNamespace(model=copy.deepcopy(clip.model).double(), tokenizer=clip.tokenizer)
    ours, plain = encoder(clip, prompt, NAMES)(ctx[None])[0], encode_text(clip, ctx, first)
    true = encode_text(double, ctx.double(), first)
    pull = torch.randn(plain.shape, generator=generator)
    gradients = [torch.autograd.grad((pull * features).sum(), ctx)[0] for features in (ours, plain, true)]
    for got, theirs, expected in ((ours.detach(), plain.detach(), true.detach()), gradients):
        error, rounding = relative_error(got, expected), relative_error(theirs, expected)
        assert error <= max(1e-5, 2 * rounding), f"relative error {error}, open_clip's own in float32 is {rounding}"


# -- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_zero_shot_texts(name):
    clip, family = build(name), FAMILIES[name]
    parts = clip.text
    assert (parts.context_length, parts.causal, parts.pool) == (family.length, family.causal, family.pool)
    assert (clip.first_token, clip.logit_bias, clip.embed_dim) == (family.first, family.bias, 32)
    prompt = Prompt.from_template(clip, TEMPLATE)
    assert prompt.n_ctx == 4
    expected = clip.model.encode_text(clip.tokenizer([TEMPLATE.format(text) for text in NAMES]))
    assert_relative(prompt.class_weights(clip, NAMES), expected)
    assert_relative(prompt.class_embeddings(clip, NAMES), F.normalize(expected, dim=-1))
    assert_relative(clip.class_embeddings(NAMES, TEMPLATE), F.normalize(expected, dim=-1))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_any_context_and_its_gradient(name, shared):
    assert_same_features_and_gradient(build(name), FAMILIES[name].first, shared)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_longest_text_fits_and_one_more_word_does_not(name):
    clip, family = build(name), FAMILIES[name]
    words = family.length - family.first - 1 - (name == "CLIPS")
    fits = " ".join(["cat"] * words)
    assert clip.tokenize([fits, "dog"]).shape == (2, family.length)
    with pytest.raises(ValueError, match=f"fit the text tower's {family.length} tokens, got 'cat cat"):
        clip.tokenize(["dog", f"{fits} cat"])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_images_and_logits(name):
    """From a picture to logits, as open_clip itself does it."""
    clip = build(name)
    own = image_transform_v2(PreprocessCfg(size=clip.model.visual.image_size), is_train=False)
    pixels = torch.stack([own(picture(seed)) for seed in range(2)])
    assert torch.equal(torch.stack([clip.preprocess(picture(seed)) for seed in range(2)]), pixels)
    x, weight = clip.encode_image(pixels), Prompt.from_template(clip, TEMPLATE).class_embeddings(clip, NAMES)
    assert_relative(x, clip.model.encode_image(pixels, normalize=True))
    expected, _ = clip.model.get_logits(pixels, clip.tokenizer([TEMPLATE.format(text) for text in NAMES]))
    assert_relative(clip.logit_scale * x @ weight.T + clip.logit_bias, expected)


def test_every_model_of_open_clip(tmp_path):
    """Whatever open_clip lists: class embeddings are its own. Prompts are, too, or the text tower is named."""
    seen = set()
    for name in open_clip.list_models():
        config = small_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        config["vision_cfg"] = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 8, "head_width": 8}
        if "multimodal_cfg" in config:
            config["multimodal_cfg"] |= {"width": 32, "heads": 2, "layers": 1, "vocab_size": VOCABULARY}
            config["vision_cfg"] |= {key: vision[key] for key in ("attentional_pool", "output_tokens") if key in vision}
        config["text_cfg"] = text = {**text, "vocab_size": VOCABULARY}
        if (key := json.dumps(config, sort_keys=True)) in seen:
            continue
        seen.add(key)
        end = text["eos_id"] if text.get("pool_type") == "eos" else VOCABULARY - 1  # argmax: the highest
        tower = "TextTransformer"
        if hub := text.get("hf_model_name"):
            tower = "HFTextEncoder"
            folder = write_text_model(tmp_path / name, TEXT_MODELS[hub], vocab_size=VOCABULARY)
            text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
        clip = make(name, config, Words(text.get("context_length", 77), start=5, end=end, pad=0))
        expected = clip.model.encode_text(clip.tokenizer([TEMPLATE.format(text) for text in NAMES]))
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert_relative(clip.class_embeddings(NAMES, TEMPLATE), F.normalize(expected, dim=-1))
        assert clip.embed_dim == 32 and clip.takes_prompts == (not hub and "multimodal_cfg" not in config)
        if clip.takes_prompts:
            assert_same_features_and_gradient(clip, 1, shared=True)
        else:
            with pytest.raises(TypeError, match=f"{tower} .*takes no prompts|got {tower}: .*takes no prompts"):
                Prompt.from_template(clip, TEMPLATE)
    assert len(seen) > 30


# -- sigmoid models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2"])
def test_softmax_over_classes_does_not_see_the_bias(name):
    clip, labels = build(name), torch.tensor([0, 1, 2, 3, 0, 1])
    pixels = torch.randn(6, 3, *clip.model.visual.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, _ = clip.model.get_logits(pixels, clip.tokenizer([TEMPLATE.format(text) for text in NAMES]))
    ours = clip.logit_scale * clip.encode_image(pixels) @ clip.class_embeddings(NAMES, TEMPLATE).T
    assert clip.logit_bias == -10.0 and (theirs - ours).mean() == pytest.approx(-10.0, abs=1e-3)
    assert torch.equal(theirs.argmax(1), ours.argmax(1))
    assert F.cross_entropy(ours, labels).item() == pytest.approx(F.cross_entropy(theirs, labels).item(), rel=1e-5)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "RN50-quickgelu"])
def test_tune_and_fit(name):
    clip, generator = build(name), torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(24, clip.embed_dim, generator=generator), dim=-1)
    cache = FeatureCache.from_tensors(x, torch.arange(24) % 4, NAMES, fingerprint=clip.image_fingerprint)
    quick = {"epochs": 3, "batch_size": 8, "lr": 0.05, "warmup_epochs": 0, "precision": "float32"}
    tuned = tune(clip, cache, **quick)
    result = fit(clip, cache, tuned.solution, lam=1.0, **quick)
    for run in (tuned, result):
        assert run.history[-1]["loss"] < run.history[0]["loss"]
    trained, zero_shot = (
        F.cross_entropy(clip.logit_scale * x @ solution.class_embeddings(clip, NAMES).T, cache.labels)
        for solution in (result.solution, Prompt.from_template(clip, TEMPLATE))
    )
    assert trained < zero_shot
    assert evaluate(clip, result.solution, cache).accuracy > 0


# -- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preprocess",
    [
        {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},  # SigLIP
        {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},  # MobileCLIP
        {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},  # PE
        {"resize_mode": "longest", "fill_color": 7},
        {},
    ],
)
def test_preprocessing_is_that_of_the_model(tmp_path, preprocess):
    config = small_config("ViT-B-16")
    config["vision_cfg"].update(image_size=32)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(open_clip.CLIP(**config).state_dict(), tmp_path / "model.safetensors")
    model, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    ours = load_clip(f"local-dir:{tmp_path}")
    assert torch.equal(ours.preprocess(picture()), theirs(picture()))
    assert ours.augment(picture()).shape == (3, 32, 32)
    assert ours.preprocess_cfg == json.loads(json.dumps(ours.preprocess_cfg))
    assert {**ours.preprocess_cfg, **preprocess} == ours.preprocess_cfg
    assert FrozenClip(model, ours.tokenizer, "own").preprocess_cfg == ours.preprocess_cfg
