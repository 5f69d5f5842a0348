"""Loading CoCa and text models of Hugging Face: their own names, folders, repositories; no code of theirs runs."""

import json
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from backbone_cases import COMMIT, WORDS, as_repository, write_tokenizer
from opaque_cases import ATTENTIONAL, SIZES, coca, write_text_model
from safetensors.torch import save_file
from tiny import TEXT, VISION

from mergetune import FrozenClip, load_clip

NAMES = ("cat", "fire truck")
HUB = {"hf_model_name": "org/text", "hf_tokenizer_name": "org/text", "hf_proj_type": "linear", "context_length": 12}
COCA_TEXT = {**TEXT, "embed_cls": True, "output_tokens": True}


def text_model(folder: Path, kind: str = "bert", **config) -> Path:
    """A repository of a text model: its configuration and its tokenizer."""
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    write_text_model(folder, kind, vocab_size=len(WORDS))
    edit(folder, **config)
    return folder


def edit(folder: Path, **config) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def backbone(folder: Path, model: torch.nn.Module, model_cfg: dict) -> Path:
    """open_clip's own files beside what the folder holds."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def hugging_face(folder: Path, kind: str = "bert", text: dict = HUB, **config) -> tuple[torch.nn.Module, Path]:
    """A model, and a folder that holds all of it."""
    text_model(folder, kind, **config)
    torch.manual_seed(0)
    here = {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}
    model = open_clip.CustomTextCLIP(8, VISION, here)
    return model, backbone(folder, model, {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": text})


def same(clip: FrozenClip, model: torch.nn.Module) -> None:
    expected = FrozenClip(model, clip.tokenizer, "expected")
    assert clip.fingerprint == expected.fingerprint
    assert torch.equal(clip.class_embeddings(NAMES), expected.class_embeddings(NAMES))
    pixels = torch.ones(1, 3, 16, 16)
    assert torch.equal(clip.encode_image(pixels), expected.encode_image(pixels))


@pytest.fixture
def builtin(tmp_path, monkeypatch):
    """Makes a model one of open_clip's own, with a name and a file of weights."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))

    def add(model: torch.nn.Module, config: dict) -> tuple[str, Path]:
        (tmp_path / "tiny-test.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "tiny-test.json")
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        return "tiny-test", tmp_path / "weights.pt"

    return add


# -- text models of Hugging Face ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SIZES))
def test_a_folder_brings_its_text_models_own_configuration(tmp_path, kind):
    model, folder = hugging_face(tmp_path / "clip", kind)
    clip = load_clip(f"local-dir:{folder}")
    same(clip, model)
    assert clip.context_length == clip.tokenize(["cat " * 11]).shape[1] == 12
    with pytest.raises(ValueError, match="texts must fit the text tower's 12 tokens, got 'cat cat"):
        clip.tokenize(["cat " * 12])
    with pytest.raises(TypeError, match="HFTextEncoder: this CLIP takes no prompts"):
        _ = clip.text


@pytest.mark.parametrize("own", [True, False])
def test_a_repository_names_its_text_model(tmp_path, own):
    """Of its own commit, or of another repository."""
    text = {**HUB, "hf_model_name": "org/clip"} if own else HUB
    model, folder = hugging_face(tmp_path / "clip", text=text)
    as_repository(text_model(tmp_path / "text"), tmp_path / "cache", "org/text")
    if not own:
        edit(folder, model_type="not looked at")
    as_repository(folder, tmp_path / "cache")
    same(load_clip("hf-hub:org/clip", cache_dir=tmp_path / "cache"), model)


@pytest.mark.parametrize("kind", list(SIZES))
def test_a_name_of_open_clips(tmp_path, builtin, kind):
    model, folder = hugging_face(tmp_path / "clip", kind)
    as_repository(text_model(tmp_path / "text", kind), tmp_path / "cache", "org/text")
    name, weights = builtin(model, {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": HUB})
    same(load_clip(name, weights, cache_dir=tmp_path / "cache"), model)
    assert load_clip(name, weights, cache_dir=tmp_path / "cache", precision="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["roberta-ViT-B-32", "coca_roberta-ViT-B-32", "mt5-xl-ViT-H-14", "nllb-clip-base"])
def test_without_a_network_one_sentence_tells_what_is_missed_before_weights_are_fetched(name, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: pytest.fail("fetches the weights"))
    named = open_clip.get_model_config(name)["text_cfg"]["hf_model_name"]
    (tmp_path / "weights.pt").touch()
    tag, *_ = [*open_clip.list_pretrained_tags_by_model(name), tmp_path / "weights.pt"]  # some models have no tags
    with pytest.raises(RuntimeError, match=f"the text model of {name!r} needs the configuration of {named!r}") as error:
        load_clip(name, tag, cache_dir=tmp_path)
    assert f"config.json of hf-hub:{named} could not be downloaded" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_was_not_fetched_is_missed(tmp_path, builtin):
    """Where it finds a configuration and no vocabulary, transformers makes a tokenizer to which all words are one."""
    model, _ = hugging_face(tmp_path / "clip")
    as_repository(write_text_model(tmp_path / "text", "bert", vocab_size=len(WORDS)), tmp_path / "cache", "org/text")
    name, weights = builtin(model, {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": HUB})
    with pytest.raises(
        RuntimeError, match="tokenizer of 'tiny-test' must have a vocabulary, got the same tokens for 'cat' and 'dog'"
    ):
        load_clip(name, weights, cache_dir=tmp_path / "cache")


def test_nothing_is_fetched_for_a_folder(tmp_path, monkeypatch):
    _, folder = hugging_face(tmp_path / "clip")
    monkeypatch.setattr(
        "huggingface_hub.file_download._hf_hub_download_to_cache_dir", lambda **_: pytest.fail("fetched")
    )
    load_clip(f"local-dir:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"must hold config\.json, the configuration of its text model, got none: copy the file from 'org/",
    ):
        load_clip(f"local-dir:{folder}")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    _, folder = hugging_face(tmp_path / "clip")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="needs a package: pip install transformers"):
        load_clip(f"local-dir:{folder}")


# -- CoCa --------------------------------------------------------------------------------------------------------------


def test_coca_of_a_folder_a_repository_and_a_name(tmp_path, builtin):
    model = coca()
    config = {"embed_dim": 8, "vision_cfg": ATTENTIONAL, "text_cfg": COCA_TEXT, "custom_text": True}
    config["multimodal_cfg"] = {**TEXT, "layers": 1}
    (tmp_path / "clip").mkdir()
    folder = backbone(tmp_path / "clip", model, config)
    as_repository(folder, tmp_path / "cache")
    name, weights = builtin(model, config)
    for clip in (
        load_clip(f"local-dir:{folder}"),
        load_clip("hf-hub:org/clip", cache_dir=tmp_path / "cache"),
        load_clip(name, weights),
    ):
        same(clip, model)
        assert isinstance(clip.model, open_clip.CoCa)
        with pytest.raises(TypeError, match=r"TextTransformer .*class token \(CoCa\).*this CLIP takes no prompts"):
            _ = clip.text


# -- what a text model's configuration may say -------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that code of a stranger would make. Nor is anybody asked whether it may run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "code-ran"


def hostile(folder: Path, marker: Path, **config) -> None:
    (folder / "hostile.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import BertConfig, BertModel\n"
        "class Config(BertConfig): model_type = 'hostile'\n"
        "class Model(BertModel): config_class = Config\n"
    )
    edit(folder, auto_map={"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}, **config)


def load(folder: Path, how: str) -> FrozenClip:
    """By the folder's own path; as a repository; or as a repository that names another, of the same files."""
    if how == "local-dir":
        return load_clip(f"local-dir:{folder}")
    for repo in ("org/clip", "org/text"):
        as_repository(folder, folder.parent / "cache", repo)
    return load_clip("hf-hub:org/clip", cache_dir=folder.parent / "cache")


HOW = pytest.mark.parametrize("how", ["local-dir", "hf-hub"])


def test_open_clip_alone_would_run_the_text_models_code(tmp_path, marker, monkeypatch):
    """What is guarded against is real: by who answers at the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    hostile(text_model(tmp_path / "text"), marker, model_type="hostile")
    with pytest.raises(Exception):  # noqa: B017 - open_clip does not know the architecture, but that is too late
        open_clip.hf_model.HFTextEncoder(str(tmp_path / "text"), 8, pretrained=False)
    assert marker.exists()


@HOW
def test_code_of_a_text_model_is_never_run(tmp_path, marker, how):
    model, folder = hugging_face(tmp_path / "clip")
    hostile(folder, marker, _attn_implementation="org/kernel", attn_implementation="org/kernel", _name_or_path="/etc")
    same(load(folder, how), model)
    edit(folder, model_type="hostile")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    with pytest.raises(ValueError, match=r"config\.json: model_type must be one of bert, roberta, .*got 'hostile'"):
        load(folder, how)
    assert not marker.exists()


@pytest.mark.parametrize("how", ["hf-hub", "built-in"])
def test_a_folder_here_is_not_taken_for_a_text_models_repository(tmp_path, marker, monkeypatch, builtin, how):
    model, folder = hugging_face(tmp_path / "clip")
    (tmp_path / "org").mkdir()
    hostile(text_model(tmp_path / "org" / "text"), marker)
    as_repository(folder, tmp_path / "cache")
    name, weights = builtin(model, {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": HUB})
    monkeypatch.chdir(tmp_path)
    arguments = ("hf-hub:org/clip",) if how == "hf-hub" else (name, weights)
    with pytest.raises(RuntimeError, match="'org/text'|org/text could not be downloaded"):
        load_clip(*arguments, cache_dir=tmp_path / "cache")
    assert not marker.exists()


@HOW
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt2"),
        ("model_type", ["bert"]),
        ("model_type", None),
        ("hidden_act", "xielu"),
        ("hidden_act", {"a": 1}),
        ("hidden_size", [16]),
        ("hidden_size", "16"),
        ("hidden_size", -16),
        ("num_hidden_layers", 257),
        ("vocab_size", 10**12),
        ("layer_norm_eps", float("nan")),
        ("max_position_embeddings", float("inf")),
    ],
)
def test_a_configuration_of_another_form_is_refused_by_file_and_key(tmp_path, how, key, value):
    _, folder = hugging_face(tmp_path / "clip")
    edit(folder, **{key: value})
    with pytest.raises(ValueError, match=rf"config\.json: {key} must be"):
        load(folder, how)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_configurations_are_named(tmp_path, content):
    _, folder = hugging_face(tmp_path / "clip")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json must"):
        load_clip(f"local-dir:{folder}")


@pytest.mark.parametrize("change", [{"hidden_size": 7}, {"num_attention_heads": 0}, {"pad_token_id": 99}])
def test_settings_that_do_not_fit_are_one_error(tmp_path, change):
    _, folder = hugging_face(tmp_path / "clip")
    edit(folder, **change)
    with pytest.raises(ValueError, match=r"config\.json must describe a text model that can be built, got"):
        load_clip(f"local-dir:{folder}")


LARGE = {
    "bert": {"hidden_size": 1 << 14, "num_hidden_layers": 64},
    "roberta": {"max_position_embeddings": 1 << 22},
    "xlm-roberta": {"vocab_size": 1 << 22},
    "mt5": {"d_kv": 1 << 22},
    "m2m_100": {"decoder_ffn_dim": 1 << 22},
}


@pytest.mark.parametrize("kind", list(LARGE))
def test_a_text_model_is_not_far_larger_than_the_weights(tmp_path, monkeypatch, kind):
    _, folder = hugging_face(tmp_path / "clip", kind)
    edit(folder, **LARGE[kind])
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("room was made for it"))
    with pytest.raises(ValueError, match="model_cfg must describe the network of its weights, got one of at least"):
        load_clip(f"local-dir:{folder}")


def test_the_configuration_is_of_the_commit_that_was_checked(tmp_path, monkeypatch):
    """The repository changes as soon as its first file was read; its text model is in the same one."""
    from mergetune.clip import backbone_files

    model, folder = hugging_face(tmp_path / "clip", text={**HUB, "hf_model_name": "org/clip"})
    as_repository(folder, tmp_path / "cache")
    edit(folder, num_hidden_layers=2)
    download = backbone_files.hf_hub_download

    def changing(*args, **kwargs):
        found = download(*args, **kwargs)
        if not (tmp_path / "cache" / "models--org--clip" / "snapshots" / ("b" * 40)).exists():
            as_repository(folder, tmp_path / "cache", commit="b" * 40)
        return found

    monkeypatch.setattr(backbone_files, "hf_hub_download", changing)
    as_repository(text_model(tmp_path / "text"), tmp_path / "cache", "org/text")
    same(load_clip("hf-hub:org/clip", cache_dir=tmp_path / "cache"), model)
    assert (tmp_path / "cache" / "models--org--clip" / "refs" / "main").read_text() != COMMIT
