"""Opaque text towers (CoCa, Hugging Face, a stranger's): all but prompts works, and those are refused by name."""

import functools
import tempfile
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from comparison_cases import short_searches  # noqa: F401
from miniature import write_miniature
from opaque_cases import SIZES, Stranger, coca, text_cfg
from tiny import TEXT, VISION, cache, encoder, head, prompt

from mergetune import (
    FeatureCache,
    FrozenClip,
    Head,
    ImageFolder,
    Prompt,
    cache_features,
    evaluate,
    experiments,
    fit,
    fit_dataset,
    tune,
)
from mergetune.facts import CompareOptions
from mergetune.solutions import open_solution, to_coop, to_head, zero_shot_like

NAMES = ("cat", "fire truck", "dog")
TEMPLATES = ("a photo of a {}.", "{} outdoors")
QUICK = {"epochs": 3, "batch_size": 10, "lr": 0.05, "warmup_epochs": 0, "precision": "float32"}


def hugging_face(kind: str, **text) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        return open_clip.CustomTextCLIP(8, VISION, text_cfg(Path(folder), kind, **text), init_logit_bias=-10.0)


def coca_roberta() -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        return coca(text_cfg(Path(folder), "roberta", output_tokens=True))


LAST = functools.partial(hugging_face, "bert", hf_pooler_type="cls_last_hidden_state_pooler")
MODELS = {  # how it is made, the name of its text tower
    **{kind: (functools.partial(hugging_face, kind), "HFTextEncoder") for kind in SIZES},
    "BERT as in BiomedCLIP": (LAST, "HFTextEncoder"),
    "CoCa": (coca, "TextTransformer"),
    "CoCa with RoBERTa": (coca_roberta, "HFTextEncoder"),
    "CoCa with a bias": (functools.partial(coca, init_logit_bias=-3.0, nonscalar_logit_scale=True), "TextTransformer"),
    "stranger": (Stranger, "Stranger"),
}
ALL = pytest.mark.parametrize("name", list(MODELS))


@functools.cache
def opaque(name: str) -> FrozenClip:
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    with torch.random.fork_rng([]):
        return FrozenClip(MODELS[name][0](), tokenizer, name, {"size": (16, 16)})


def own_texts(clip: FrozenClip, texts: list[str]) -> torch.Tensor:
    """The model's own unit features of each text alone."""
    with torch.no_grad():
        found = [clip.model.encode_text(clip.tokenizer([text])) for text in texts]
    return torch.cat([F.normalize(one[0] if isinstance(one, tuple) else one, dim=-1) for one in found])


# -- what works --------------------------------------------------------------------------------------------------------


@ALL
def test_class_embeddings_are_the_models_own(name):
    clip = opaque(name)
    each = torch.stack([own_texts(clip, [template.format(name) for name in NAMES]) for template in TEMPLATES])
    torch.testing.assert_close(clip.class_embeddings(NAMES, TEMPLATES[0]), each[0], atol=1e-5, rtol=1e-5)
    mean = F.normalize(each.mean(0), dim=-1)
    torch.testing.assert_close(clip.class_embeddings(NAMES, TEMPLATES), mean, atol=1e-5, rtol=1e-5)
    texts = [TEMPLATES[0].format(name) for name in NAMES]
    unit = F.normalize(clip.encode_text(texts, batch_size=2), dim=-1)
    torch.testing.assert_close(unit, each[0], atol=1e-5, rtol=1e-5)
    assert not (each[0][0] - each[0][1]).abs().max() < 1e-4  # words matter


@ALL
def test_images_and_logits_are_the_models_own(name):
    clip = opaque(name)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = clip.model.encode_image(pixels)
        texts = own_texts(clip, [TEMPLATES[0].format(name) for name in NAMES])
        expected = clip.model.logit_scale.exp() * F.normalize(own, dim=-1) @ texts.T
    bias = getattr(clip.model, "logit_bias", None)
    assert clip.logit_bias == (0.0 if bias is None else bias.item())
    x = clip.encode_image(pixels)
    torch.testing.assert_close(clip.logit_scale * x @ clip.class_embeddings(NAMES).T, expected, atol=1e-4, rtol=1e-4)


@ALL
def test_what_is_known_of_a_model(name):
    clip = opaque(name)
    assert (clip.embed_dim, clip.context_length, clip.first_token) == (8, TEXT["context_length"], 1)
    assert (clip.dtype, clip.device) == (torch.float32, torch.device("cpu")) and not clip.takes_prompts
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert not any(module.training for module in clip.model.modules())
    assert len({clip.fingerprint, clip.image_fingerprint, clip.text_fingerprint}) == 3


@ALL
def test_the_longest_text_fits_and_one_more_token_does_not(name):
    clip = opaque(name)
    fits = " ".join(["cat"] * (TEXT["context_length"] - 2))
    assert clip.tokenize([fits, "cat"]).shape == (2, TEXT["context_length"])
    for call in (clip.tokenize, clip.encode_text, clip.class_embeddings):
        with pytest.raises(ValueError, match="texts must fit the text tower's 16 tokens, got '.*cat cat"):
            call([f"{fits} cat"])


@pytest.mark.parametrize("tell", [(), ("tokenizer",), ("model",), ("tokenizer", "model")])
def test_the_context_is_the_least_that_is_told(tell):
    def tokenizer(texts, context_length):
        return open_clip.SimpleTokenizer()(texts, context_length)

    model = Stranger()
    if "tokenizer" in tell:
        tokenizer.context_length = 12
    if "model" in tell:
        model.context_length = 20
    clip = FrozenClip(model, tokenizer, "stranger", {"size": (16, 16)})
    if not tell:
        with pytest.raises(
            TypeError, match="tokenizer must have context_length because the text tower Stranger has none"
        ):
            clip.encode_text(["cat"])
        return
    assert clip.tokenize(["cat"]).shape[1] == clip.context_length == (12 if "tokenizer" in tell else 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_half_precision_is_close(name, dtype):
    whole = opaque(name)
    with torch.random.fork_rng([]):
        model = MODELS[name][0]()
    half = FrozenClip(model.to(dtype), whole.tokenizer, name, {"size": (16, 16)})
    assert half.dtype == dtype
    got, pixels = half.class_embeddings(NAMES), torch.ones(1, 3, 16, 16)
    assert got.dtype == half.encode_image(pixels).dtype == torch.float32
    torch.testing.assert_close(got, whole.class_embeddings(NAMES), atol=5e-2, rtol=0)


@ALL
def test_a_head_is_trained_tested_saved_and_written(name, tmp_path):
    clip, features = opaque(name), cache()
    zero_shot = Head.zero_shot(clip, NAMES, TEMPLATES)
    tuned = tune(clip, features, method="head", **QUICK)
    result = fit(clip, features, tuned.solution, lam=1.0, **QUICK)
    for run in (tuned, result):
        assert run.history[-1]["loss"] < run.history[0]["loss"]
    result.save(tmp_path)
    kept = open_solution(tmp_path)
    assert evaluate(clip, kept, features).accuracy == evaluate(clip, result.solution, features).accuracy
    assert evaluate(clip, list(TEMPLATES), features).accuracy == evaluate(clip, zero_shot, features).accuracy
    assert torch.equal(to_head(kept, tmp_path / "head.npz").weight, kept.weight)
    assert zero_shot_like(clip, kept).weight.shape == kept.weight.shape


def test_heads_are_compared(tmp_path):
    setup = CompareOptions(experts=("head:1",), shots=4, tune=QUICK, fit=QUICK, grid={"lam": (1.0,), "tau": (0.3,)})
    files = [f"{i}.png" for i in range(30)]
    task = experiments.Task("tiny", cache(files=files), cache(seed=1, files=[f"test-{file}" for file in files]))
    found = experiments.compare(opaque("bert"), task, tmp_path, setup=setup, partitions=(None,), progress=False)
    assert {"zero-shot", "linear head 1"} <= {line.row for line in found.lines}


def images(folder: Path) -> Path:
    place = write_miniature(folder, "dtd", images_per_class=8, classes=3, size=16)
    return place / "images"


def test_images_are_cached_and_a_head_is_trained_on_them(tmp_path):
    clip = opaque("CoCa")
    data = ImageFolder(images(tmp_path))
    found = fit_dataset(
        clip, data, tmp_path / "out", method="head", shots=2, tune_options=QUICK, fit_options=QUICK, progress=False,
        cache_options={"workers": 0},
    )  # fmt: skip
    assert set(found.reports["all"]) >= {"zero-shot", "MERGETUNE"}
    features = cache_features(clip, data.test, tmp_path / "out" / "cache" / "test", progress=False)
    assert isinstance(features, FeatureCache) and features.dim == clip.embed_dim


# -- what is refused ---------------------------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Path:
    """A prompt as CoOp keeps it."""
    file = folder / "prompt_learner" / "model.pth.tar-5"
    file.parent.mkdir()
    torch.save({"state_dict": {"ctx": torch.ones(4, 16)}, "epoch": 5}, file)
    return file


WAYS = {
    "tune, CoOp": lambda clip, folder: tune(clip, cache(), method="coop", **QUICK),
    "tune, KgCoOp": lambda clip, folder: tune(clip, cache(), method="kgcoop", **QUICK),
    "tune, random": lambda clip, folder: tune(clip, cache(), n_ctx=4, class_specific=True, **QUICK),
    "from_template": lambda clip, folder: Prompt.from_template(clip),
    "random": lambda clip, folder: Prompt.random(clip, 4),
    "encoder": lambda clip, folder: encoder(clip, prompt()),
    "class_embeddings": lambda clip, folder: prompt().class_embeddings(clip, NAMES),
    "evaluate": lambda clip, folder: evaluate(clip, prompt(), cache()),
    "fit": lambda clip, folder: fit(clip, cache(), prompt(), **QUICK),
    "fit, CoOp's checkpoint": lambda clip, folder: fit(clip, cache(), open_solution(checkpoint(folder)), **QUICK),
    "zero_shot_like": lambda clip, folder: zero_shot_like(clip, prompt()),
    "to_coop": lambda clip, folder: to_coop(prompt(), folder / "coop", clip=clip, classnames=NAMES),
    "to_head": lambda clip, folder: to_head(prompt(), folder / "head.npz", clip=clip, classnames=NAMES),
    "text": lambda clip, folder: clip.text,
    "text_as": lambda clip, folder: clip.text_as(torch.bfloat16),
    "own images": lambda clip, folder: fit_dataset(clip, ImageFolder(images(folder)), folder / "out"),
    "own images, tuned": lambda clip, folder: fit_dataset(
        clip, ImageFolder(images(folder)), folder / "out", method="head", tuned=[head(), prompt()]
    ),
    "compare": lambda clip, folder: experiments.compare(
        clip, experiments.Task("tiny", cache(60, files=[f"{i}.png" for i in range(60)]), cache(seed=1)), folder,
        setup=CompareOptions(experts=("kgcoop:1", "coop:1"), shots=4), partitions=(None,), progress=False,
    ),
    "the paper's": lambda clip, folder: experiments.reproduce(
        experiments.plan("few-shot", datasets=["DTD"], seeds=[1], shots=[1]),
        experiments.Experiment(root=images(folder).parent.parent, out=folder / "out"), lambda: clip, progress=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", ["roberta", "CoCa", "stranger"])
def test_prompts_are_refused_by_the_towers_name_before_anything_is_encoded(name, way, tmp_path, monkeypatch):
    clip, tower = opaque(name), MODELS[name][1]
    assert clip.embed_dim == 8  # a model that does not tell it encodes one text, once
    for side in ("encode_image", "encode_text"):
        monkeypatch.setattr(clip.model, side, lambda *_, **__: pytest.fail("something was encoded"))
    with pytest.raises(TypeError) as error:
        WAYS[way](clip, tmp_path)
    assert str(error.value).startswith("text tower ") and tower in str(error.value)
    assert str(error.value).endswith(
        ": this CLIP takes no prompts. Its zero-shot templates and heads work: train a head with method='head' (on the "
        "command line --method head)"
    )
    assert not list(tmp_path.rglob("*.safetensors"))
