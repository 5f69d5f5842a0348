"""Exports: what other projects read in them, and what comes back bit for bit."""

import functools
import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import TEXT, normal, parameter, tiny_model
from torch import Tensor, nn

from mergetune import FrozenClip, Head, LinearMap, Prompt, Stack, load_solution, open_solution, solutions
from mergetune.solutions import hub, known_classes

NAMES = ("cat", "fire truck", "hot-air balloon")


@functools.cache
def build_clip(siglip: bool = False) -> FrozenClip:
    model = tiny_model(text={**TEXT, "context_length": 77})
    tokenizer = open_clip.SimpleTokenizer()
    if siglip:  # no start token
        return FrozenClip(model, lambda texts, context_length=77: tokenizer(texts, context_length + 1)[:, 1:], "tiny")
    return FrozenClip(model, tokenizer, "ViT-B-16-quickgelu/openai")


@pytest.fixture
def clip():
    return build_clip()


def make(kind: str):
    known = {"backbone": build_clip().name, "notes": {"origin": "test"}}
    if "prompt" in kind:
        specific = kind == "class-specific prompt"
        ctx, names = (normal(3, 4, 16), NAMES) if specific else (normal(4, 16), None)
        position = "front" if kind == "front prompt" else "end"
        text = build_clip().text_fingerprint
        return Prompt(ctx, "a photo of a {}.", names, fingerprint=text, position=position, **known)
    bias = normal(3, seed=1) if kind == "head with bias" else None
    return Head(normal(3, 8), NAMES, bias, 12.34, fingerprint=build_clip().image_fingerprint, **known)


PROMPTS = ["prompt", "class-specific prompt", "front prompt"]
HEADS = ["head", "head with bias"]


def logits(solution, clip: FrozenClip) -> Tensor:
    """As :func:`mergetune.classifier` makes them."""
    x, weights = F.normalize(normal(7, 8, seed=5), dim=-1), solution.class_weights(clip, NAMES)
    weights = F.normalize(weights, dim=-1) if solution.normalize else weights
    x = torch.cat([x, torch.ones(7, 1)], 1) if weights.shape[1] == 9 else x
    return (solution.logit_scale or clip.logit_scale) * (x @ weights.T)


# -- CoOp -------------------------------------------------------------------------------------------------------------


class CoOpLearner(nn.Module):
    """CoOp's prompt learner as far as its checkpoints go: a parameter and two buffers, in this order."""

    def __init__(self, clip: FrozenClip, ctx: Tensor, names: tuple[str, ...], n_ctx: int) -> None:
        super().__init__()
        self.ctx = nn.Parameter(torch.zeros_like(ctx))
        texts = [" ".join(["X"] * n_ctx) + " " + name + "." for name in names]
        with torch.no_grad():
            embedding = clip.model.token_embedding(open_clip.SimpleTokenizer()(texts))
        self.register_buffer("token_prefix", embedding[:, :1, :])
        self.register_buffer("token_suffix", embedding[:, 1 + n_ctx :, :])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_checkpoint_has_exactly_coops_keys_shapes_and_dtypes(clip, tmp_path, kind, dtype):
    prompt = make(kind)
    file = solutions.to_coop(prompt, tmp_path, clip=clip, classnames=NAMES, epoch=7, dtype=dtype)
    assert file == tmp_path / "prompt_learner" / "model.pth.tar-7"
    assert (tmp_path / "prompt_learner" / "checkpoint").read_text() == "model.pth.tar-7\n"
    content = torch.load(file)
    assert list(content) == ["state_dict", "epoch", "optimizer", "scheduler", "val_result"]
    assert content["epoch"] == 7 and content["optimizer"] is content["scheduler"] is content["val_result"] is None
    learner = CoOpLearner(clip, prompt.ctx, NAMES, 4)
    learner = learner.half() if dtype == "float16" else learner
    state = content["state_dict"]
    assert type(state) is OrderedDict and list(state) == list(learner.state_dict())
    for name, value in learner.state_dict().items():
        assert state[name].dtype == value.dtype and state[name].shape == value.shape
        assert name == "ctx" or torch.equal(state[name], value)
    learner.load_state_dict(state)  # strictly, as Dassl does it
    assert torch.equal(learner.ctx, prompt.ctx.to(learner.ctx.dtype))


def test_underscores_in_names_are_spaces_as_in_coop(clip, tmp_path):
    files = [
        solutions.to_coop(make("prompt"), tmp_path / name, clip=clip, classnames=["cat", name])
        for name in ("fire truck", "fire_truck")
    ]
    assert torch.equal(*(torch.load(file)["state_dict"]["token_suffix"] for file in files))


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_checkpoint_comes_back_with_the_same_logits(clip, tmp_path, kind):
    prompt = make(kind)
    solutions.to_coop(prompt, tmp_path, clip=clip, classnames=NAMES)
    back = Prompt.from_checkpoint(tmp_path, classnames=prompt.classnames, position=prompt.position)
    assert back.notes.items() >= {"checkpoint": "model.pth.tar-50", "epoch": 50}.items()
    assert torch.equal(logits(back, clip), logits(prompt, clip))


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_file_beside_a_checkpoint_gives_names_text_and_origin_back(clip, tmp_path, kind):
    prompt = replace(make(kind), notes={"temperature": 1.5})
    file = solutions.to_coop(prompt, tmp_path, clip=clip, classnames=NAMES)
    for path in (tmp_path, file):
        back = open_solution(path)
        assert torch.equal(back.ctx, prompt.ctx) and torch.equal(logits(back, clip), logits(prompt, clip))
        for name in ("template", "position", "classnames", "backbone", "fingerprint"):
            assert getattr(back, name) == getattr(prompt, name), name
        assert known_classes(back) == NAMES and back.notes["temperature"] == 1.5
    assert open_solution(file, template="X X X X {}.").template == "X X X X {}."
    with pytest.raises(ValueError, match=f"position must be '{prompt.position}', as .*json says, got 'middle'"):
        open_solution(file, position="middle")
    if prompt.classnames:
        with pytest.raises(ValueError, match="classnames must be those of the file, got other names: bird"):
            open_solution(file, classnames=["bird", *NAMES[1:]])


def test_a_file_beside_another_export_is_refused(clip, tmp_path):
    first = solutions.to_coop(make("prompt"), tmp_path / "a", clip=clip, classnames=NAMES)
    second = solutions.to_coop(make("front prompt"), tmp_path / "b", clip=clip, classnames=NAMES[:2])
    first.with_name(f"{first.name}.mergetune.json").replace(second.with_name(f"{second.name}.mergetune.json"))
    with pytest.raises(ValueError, match=r"must describe model.pth.tar-50 beside it, got the checksum of another file"):
        open_solution(tmp_path / "b")
    assert open_solution(tmp_path / "a").template == "X X X X {}."  # as CoOp leaves it: the file alone


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"solution": make("head")}, TypeError, "solution must be a prompt, the only kind that CoOp has, got a head"),
        ({"solution": Prompt(normal(4, 16), "a photo of a {}")}, ValueError, "must have '.' after the class name"),
        ({"solution": Prompt(normal(4, 16), "a photo of a {}, a pet.")}, ValueError, "must have '.' after"),
        ({"classnames": None}, ValueError, "classnames must be given for a prompt that serves any classes"),
        ({"dtype": "bfloat16"}, ValueError, "dtype must be float32 or float16, got 'bfloat16'"),
        ({"epoch": 0}, ValueError, "epoch must be at least 1, got 0"),
        ({"solution": Prompt(normal(5, 16), "a photo of a {}.")}, ValueError, "template must hold 5 tokens"),
        ({"classnames": ("cat", "very " * 80)}, ValueError, "must fit the text tower's 77 tokens"),
        (
            {"solution": make("class-specific prompt"), "classnames": ("a", "b", "c")},
            ValueError,
            "class 0 must be 'cat'",
        ),
    ],
)
def test_what_coop_could_not_run_is_refused_and_nothing_written(clip, tmp_path, change, error, match):
    arguments = {"solution": make("prompt"), "classnames": NAMES, **change}
    with pytest.raises(error, match=match):
        solutions.to_coop(arguments.pop("solution"), tmp_path, clip=clip, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_tower_without_start_token_is_not_coops(tmp_path):
    prompt = replace(make("prompt"), fingerprint=None)
    with pytest.raises(ValueError, match="clip must have one start token before a text, as in CoOp, got 0"):
        solutions.to_coop(prompt, tmp_path, clip=build_clip(siglip=True), classnames=NAMES)


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth"])
@pytest.mark.parametrize("kind", PROMPTS + HEADS)
@pytest.mark.parametrize("fold", [False, True])
def test_a_head_comes_back_with_the_same_logits(clip, tmp_path, kind, suffix, fold):
    solution, file = make(kind), tmp_path / "new" / f"head{suffix}"
    written = solutions.to_head(solution, file, clip=clip, classnames=NAMES, fold_scale=fold)
    back = Head.from_checkpoint(file)
    assert back.classnames == NAMES and back.logit_scale == written.logit_scale
    assert torch.equal(logits(back, clip), logits(written, clip))
    if fold:
        assert back.logit_scale == 1
        torch.testing.assert_close(logits(back, clip), logits(solution, clip))
    else:
        assert torch.equal(logits(back, clip), logits(solution, clip))


def test_others_read_a_plain_head(clip, tmp_path):
    """Weight and bias under their usual names, in the formats' own readers, without pickled objects."""
    head = make("head with bias")
    for suffix in (".safetensors", ".npz", ".pt"):
        solutions.to_head(head, tmp_path / f"head{suffix}", fold_scale=True)
    linear, expected = nn.Linear(8, 3), head.rescaled(1.0)
    linear.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(linear.weight, expected.weight) and torch.equal(linear.bias, expected.bias)
    with np.load(tmp_path / "head.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["weight"], expected.weight) and arrays["weight"].dtype == np.float32
        assert arrays["classnames"].tolist() == list(NAMES)
    content = torch.load(tmp_path / "head.pt", weights_only=True)
    assert torch.equal(content["bias"], expected.bias) and content["classnames"] == list(NAMES)


def test_heads_that_can_not_be_written_are_refused(clip, tmp_path):
    with pytest.raises(ValueError, match="file must end in .safetensors, .npz, .pt, .pth, got 'head.bin'"):
        solutions.to_head(make("head"), tmp_path / "head.bin")
    with pytest.raises(ValueError, match="clip must be given for a prompt"):
        solutions.to_head(make("prompt"), tmp_path / "head.pt", classnames=NAMES)
    with pytest.raises(ValueError, match="classnames must be given for a prompt that serves any classes"):
        solutions.to_head(make("prompt"), tmp_path / "head.pt", clip=clip)
    with pytest.raises(ValueError, match="classnames must be the 3 classes of the head"):
        solutions.to_head(make("head"), tmp_path / "head.pt", classnames=NAMES[:2])
    assert not list(tmp_path.iterdir())


# -- open_clip --------------------------------------------------------------------------------------------------------


def test_a_zero_shot_classifier_is_what_open_clip_builds(clip):
    expected = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, NAMES, ["a photo of a {}."])
    got = solutions.zero_shot_classifier(Prompt.from_template(clip), clip, NAMES)
    assert got.shape == expected.shape == (8, 3) and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [*PROMPTS, "head"])
def test_a_zero_shot_classifier_gives_the_solutions_logits(clip, tmp_path, kind):
    solution, x = make(kind), F.normalize(normal(7, 8, seed=5), dim=-1)
    got = solutions.zero_shot_classifier(solution, clip, NAMES, file=tmp_path / "new" / "classifier.pt")
    assert torch.equal(torch.load(tmp_path / "new" / "classifier.pt", weights_only=True), got)
    torch.testing.assert_close(clip.logit_scale * x @ got, logits(solution, clip))
    if isinstance(solution, Prompt):
        assert torch.equal(got.T, solution.class_embeddings(clip, NAMES))
    subset = solutions.zero_shot_classifier(make("head"), clip, NAMES[::-2])
    assert torch.equal(subset, solutions.zero_shot_classifier(make("head"), clip)[:, [2, 0]])


@pytest.mark.parametrize("kind", [*PROMPTS, "head"])
def test_a_zero_shot_classifier_comes_back_with_names_and_scale(clip, tmp_path, kind):
    solution, file = replace(make(kind), notes={"temperature": 1.5}), tmp_path / "classifier.pt"
    solutions.zero_shot_classifier(solution, clip, NAMES, file=file)
    back = open_solution(file)
    assert back.classnames == NAMES and back.fingerprint == clip.image_fingerprint and back.backbone == clip.name
    torch.testing.assert_close(logits(back, clip), logits(solution, clip) / 1.5)
    assert open_solution(file, classnames=NAMES[::-1]).classnames == NAMES
    with pytest.raises(ValueError, match="classnames must be those of the file, got other names: cat, dog"):
        open_solution(file, classnames=["dog", *NAMES[1:]])
    moved = file.rename(tmp_path / "moved.bin")  # without the file beside it
    assert (
        torch.equal(open_solution(moved).weight, back.weight) and open_solution(moved).logit_scale == back.logit_scale
    )
    with pytest.raises(ValueError, match="classnames must be those of the file, got other names: cat, dog"):
        open_solution(moved, classnames=["dog", *NAMES[1:]])


def test_open_clips_matrix_is_read_with_class_names(tmp_path):
    """It is stored as [D, C], without names."""
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.save(weight.T.contiguous(), tmp_path / "classifier.pt")
    assert torch.equal(open_solution(tmp_path / "classifier.pt", classnames=NAMES).weight, weight)
    with pytest.raises(ValueError, match="classnames must be given for a head whose file does not name its classes"):
        open_solution(tmp_path / "classifier.pt")
    with pytest.raises(ValueError, match="must name the 16 classes of weight, got 2"):
        open_solution(tmp_path / "classifier.pt", classnames=NAMES[:2])


def test_a_temperature_is_part_of_a_heads_scale(clip, tmp_path):
    solution = replace(make("head"), notes={"temperature": 2.0})
    solutions.to_head(solution, tmp_path / "head.npz")
    torch.testing.assert_close(logits(open_solution(tmp_path / "head.npz"), clip), logits(solution, clip) / 2)
    with pytest.raises(
        ValueError,
        match="the temperature in the solution's notes must be a finite number above 0, from 0.001 to 1000, got 0",
    ):
        solutions.to_head(replace(solution, notes={"temperature": 0}), tmp_path / "head.npz")


def test_names_that_a_solution_was_trained_on_are_exported(clip, tmp_path):
    trained = replace(make("prompt"), notes={"settings": {"classnames": list(NAMES)}})
    solutions.to_head(trained, tmp_path / "head.pt", clip=clip)
    assert open_solution(tmp_path / "head.pt").classnames == NAMES


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_graph_is_no_solution(tmp_path, suffix):
    with pytest.raises(ValueError, match="must be a solution, got a graph from images to logits"):
        open_solution(tmp_path / f"a{suffix}")


def test_a_bias_has_no_place_in_a_zero_shot_classifier(clip):
    with pytest.raises(ValueError, match="got a head with a bias: use to_head"):
        solutions.zero_shot_classifier(make("head with bias"), clip)


# -- the Hub ----------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict:
    yaml = pytest.importorskip("yaml")
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("kind", PROMPTS + HEADS)
def test_a_hub_folder_is_a_solution_with_a_card(clip, tmp_path, kind):
    solution = make(kind)
    solutions.to_hub(solution, tmp_path / "hub", license="mit")
    assert sorted(file.name for file in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "solution.json",
        "solution.safetensors",
    ]
    back = load_solution(tmp_path / "hub")
    assert torch.equal(parameter(back), parameter(solution)) and torch.equal(logits(back, clip), logits(solution, clip))
    card = (tmp_path / "hub" / "README.md").read_text()
    found = front_matter(card)
    assert found["library_name"] == "mergetune" and found["license"] == "mit" and "clip" in found["tags"]
    assert found["pipeline_tag"] == "zero-shot-image-classification"
    assert "mt.load_clip('ViT-B-16-quickgelu', pretrained='openai')" in card
    assert ("Classes: cat, fire truck, hot-air balloon" in card) == (solution.classnames is not None)
    assert found["base_model"] == "timm/vit_base_patch16_clip_224.openai" and "model-index" not in found
    names = "" if solution.classnames else ', classnames=["cat", "dog"]'
    assert f"mt.Predictor(clip, solution{names})" in card
    json.loads((tmp_path / "hub" / "solution.json").read_text())


def test_a_card_names_the_base_model_where_the_hub_has_it(tmp_path):
    solutions.to_hub(replace(make("prompt"), backbone="hf-hub:timm/some-clip"), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert front_matter(card)["base_model"] == "timm/some-clip" and "license" not in front_matter(card)
    assert "mt.load_clip('hf-hub:timm/some-clip')" in card
    solutions.to_hub(replace(make("prompt"), backbone=None), tmp_path)
    assert "an unrecorded CLIP" in (tmp_path / "README.md").read_text()


def test_a_card_has_the_results_that_stand_beside_the_solution(tmp_path):
    rows = {"zero-shot": {"accuracy": 50.0}, "MERGETUNE": {"accuracy": 91.254}}
    (tmp_path / "report.json").write_text(json.dumps({"reports": {"base": rows, "novel": rows}}))
    (tmp_path / "result.json").write_text(json.dumps({"history": [{"val_accuracy": 80.0}, {"val_accuracy": 82.5}]}))
    metrics = solutions.recorded_metrics(tmp_path)
    assert metrics == {"test images, base classes": 91.254, "test images, novel classes": 91.254}
    solutions.to_hub(make("prompt"), tmp_path / "hub", metrics=metrics)
    card = (tmp_path / "hub" / "README.md").read_text()
    (index,) = front_matter(card)["model-index"]
    assert [result["dataset"]["name"] for result in index["results"]] == list(metrics)
    assert all(result["metrics"][0]["value"] == 91.25 for result in index["results"])
    assert "| test images, novel classes | 91.25 |" in card
    (tmp_path / "report.json").write_text(json.dumps({"reports": {"all": rows}, "row": "zero-shot"}))
    assert solutions.recorded_metrics(tmp_path) == {"test images": 50.0}
    (tmp_path / "report.json").unlink()
    assert solutions.recorded_metrics(tmp_path) == {"validation images": 82.5}
    (tmp_path / "result.json").write_text("[1, 2]")
    assert solutions.recorded_metrics(tmp_path) == solutions.recorded_metrics(tmp_path / "nowhere") == {}


LOCAL = [
    ("local-dir:/home/zoe/clip", 'mt.load_clip("local-dir:PATH/TO/CLIP")'),
    ("local-dir:../clip", 'mt.load_clip("local-dir:PATH/TO/CLIP")'),
    ("ViT-B-32//home/zoe/x.pt", "mt.load_clip('ViT-B-32', pretrained=\"PATH/TO/WEIGHTS.pt\")"),
    ("ViT-B-32//home/zoe/weights", "mt.load_clip('ViT-B-32', pretrained=\"PATH/TO/WEIGHTS.pt\")"),
    ("ViT-B-32/me.safetensors", "mt.load_clip('ViT-B-32', pretrained=\"PATH/TO/WEIGHTS.pt\")"),
    ("ViT-B-32/C:\\zoe\\x.pt", "mt.load_clip('ViT-B-32', pretrained=\"PATH/TO/WEIGHTS.pt\")"),
    ("local-dir:/opt/python/site-packages/mergetune/assets/icon-clip", "mt.load_clip('icon-clip')"),
]


@pytest.mark.parametrize(("backbone", "code"), LOCAL)
def test_a_hub_folder_holds_no_path_of_this_computer(clip, tmp_path, backbone, code):
    notes = {
        "settings": {"clip": backbone, "classnames": ["and/or"]},
        "from": ["/home/zoe/a b/head.pt", {"x": "~/zoe/y"}],
    }
    base = replace(make("prompt"), backbone=backbone, notes=notes)
    solution = Stack(base, LinearMap(torch.eye(8), notes={"said": "made of /home/zoe/x.pt, as in http://a.b/c"}))
    solutions.to_hub(solution, tmp_path)
    back, said = load_solution(tmp_path), "".join(path.read_text() for path in tmp_path.glob("*[nd]"))
    assert not [part for part in ("/home", "/opt", "~", "../", "C:", "zoe/", "local-dir:/") if part in said]
    assert code in (tmp_path / "README.md").read_text()
    assert back.fingerprint == solution.fingerprint and torch.equal(back.parts[0].ctx, base.ctx)
    assert back.parts[0].notes["settings"]["classnames"] == ["and/or"]
    assert back.parts[0].notes["from"] == ["head.pt", {"x": "y"}]
    assert back.parts[1].notes["said"] == "made of x.pt, as in http://a.b/c"
    assert base.backbone == backbone  # the solution itself stays as it is


def test_push_to_hub(clip, tmp_path, monkeypatch):
    """Offline: what the Hub's client is asked for, and that the folder it gets is complete."""
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, commit_message))
            assert torch.equal(parameter(load_solution(folder_path)), parameter(make("prompt")))
            assert "snapshot_download('me/prompt')" in (tmp_path / folder_path / "README.md").read_text()

    monkeypatch.setattr(hub, "HfApi", Api)
    url = solutions.push_to_hub(make("prompt"), "me/prompt", private=True, token="secret", commit_message="first")
    assert url == "https://huggingface.co/me/prompt"
    assert calls == [
        ("token", "secret"),
        ("create", "me/prompt", {"private": True, "exist_ok": True}),
        ("upload", "me/prompt", "first"),
    ]
