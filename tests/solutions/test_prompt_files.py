"""What a prompt's file tells beside the context vectors: its backbone, its classes, and that it is no prompt's."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from tiny import NAMES, cache, normal, tiny_clip
from torch import Tensor

import mergetune as mt
from mergetune.solutions import open_solution, open_taskres, to_coop
from mergetune.solutions.origins import check_origins

FILE, N_CTX, WIDTH = "model.pth.tar-50", 4, 16
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def embedded(clip, names=NAMES, *, repeat: int = 1, dtype=torch.float32) -> dict[str, Tensor]:
    """The buffers of a prompt learner of this CLIP."""
    tokens = clip.tokenize([f"X X X X {name.replace('_', ' ')}." for name in names]).repeat(repeat, 1)
    texts = clip.text.token_embedding.weight[tokens].detach().to(dtype)
    return {"token_prefix": texts[:, :1].clone(), "token_suffix": texts[:, 1 + N_CTX :].clone()}


def write(state: dict, file: str = FILE) -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "epoch": 50}, path)
    return path


# -- the backbone ------------------------------------------------------------------------------------------------------

USES = {
    "evaluate": lambda clip, prompt: mt.evaluate(clip, prompt, cache()),
    "classifier": lambda clip, prompt: mt.classifier(clip, prompt)(NAMES),
    "class_embeddings": lambda clip, prompt: prompt.class_embeddings(clip, NAMES),
    "Predictor": lambda clip, prompt: mt.Predictor(clip, prompt, NAMES),
    "fit": lambda clip, prompt: mt.fit(clip, cache(), prompt, epochs=1, progress=False),
    "tune on it": lambda clip, prompt: mt.tune(clip, cache(), method="residual", base=prompt, epochs=1, progress=False),
    "path": lambda clip, prompt: mt.path(clip, prompt, prompt, cache()),
    "a command": lambda clip, prompt: check_origins(clip, "--backbone", [], {FILE: prompt}),
    "to_coop": lambda clip, prompt: to_coop(prompt, "out", clip=clip, classnames=NAMES),
    "saved": lambda clip, prompt: (prompt.save("saved"), mt.evaluate(clip, mt.load_solution("saved"), cache())),
    "merged": lambda clip, prompt: mt.evaluate(clip, mt.merge_solutions("average", [prompt, prompt]), cache()),
}


@pytest.mark.parametrize("use", USES)
def test_a_prompt_of_another_backbone_of_the_same_width_is_refused(use):
    mine, other = tiny_clip(0), tiny_clip(1)
    prompt = open_solution(write({"ctx": normal(N_CTX, WIDTH), **embedded(other)}))
    with pytest.raises(ValueError, match="do not belong together") as refused:
        USES[use](mine, prompt)
    said = str(refused.value)
    assert "tiny-0" in said and "MODEL.BACKBONE.NAME" in said and len(said) < 600
    assert use == "merged" or FILE in said
    USES[use](other, prompt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_not_another_backbone(dtype):
    clip = tiny_clip(0)
    prompt = open_solution(write({"ctx": normal(N_CTX, WIDTH).to(dtype), **embedded(clip, dtype=dtype)}))
    mt.evaluate(clip, prompt, cache())
    unknown = {name: torch.zeros_like(texts) for name, texts in embedded(clip).items()}
    for buffers in ({}, unknown, {"token_prefix": torch.ones(3)}):  # a fork's, which say nothing
        mt.evaluate(tiny_clip(1), open_solution(write({"ctx": normal(N_CTX, WIDTH), **buffers})), cache())


def test_prompts_of_two_backbones_are_not_mixed():
    a, b = (
        open_solution(write({"ctx": normal(N_CTX, WIDTH), **embedded(tiny_clip(n))}, f"{n}/{FILE}")) for n in (0, 1)
    )
    with pytest.raises(ValueError, match="must be of one backbone"):
        mt.interpolate(a, b, 0.5)


# -- the order of the classes ------------------------------------------------------------------------------------------


def specific(names, *, dtype=torch.float32, clip=None) -> Path:
    ctx = torch.stack([normal(N_CTX, WIDTH, seed=hash_of(name)) for name in names])
    return write({"ctx": ctx.to(dtype), **embedded(clip or tiny_clip(0), names, dtype=dtype)})


def hash_of(name: str) -> int:
    return sum(map(ord, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))][1:4], ids=str)
def test_class_specific_vectors_follow_the_given_names(order, dtype):
    clip, trained = tiny_clip(0), [NAMES[place] for place in order]
    file = specific(trained, dtype=dtype)
    expected = open_solution(file, classnames=trained)
    given = open_solution(file, classnames=NAMES)
    with pytest.raises(ValueError, match=rf"must be in the order of {FILE}, .* solution\.for_clip\(clip\)"):
        given.check(clip)
    assert torch.equal(given.for_clip(clip).ctx[list(order)], expected.ctx)
    assert torch.equal(mt.classifier(clip, given)(NAMES)[list(order)], mt.classifier(clip, expected)(trained))
    given.save("saved")
    assert torch.equal(mt.load_solution("saved").for_clip(clip).ctx, given.for_clip(clip).ctx)
    with pytest.raises(ValueError, match="take solution.for_clip"):
        mt.interpolate(given, given.for_clip(clip), 0.5)
    stack = mt.Stack(given, mt.Residual.zeros(clip, NAMES)).for_clip(clip)
    assert torch.equal(stack.parts[0].ctx, given.for_clip(clip).ctx) and stack.for_clip(clip) is stack


def test_names_that_are_alike_or_new_keep_their_places():
    clip, trained = tiny_clip(0), ("fire truck", "crane", "fire engine", "crane", "a b c d e", "a b c d f")
    file = specific(trained)
    same = open_solution(file, classnames=trained).for_clip(clip)
    assert torch.equal(same.ctx, open_solution(file, classnames=trained).ctx)
    turned = open_solution(file, classnames=trained[::-1]).for_clip(clip).ctx
    assert torch.equal(turned[[0, 1, 3, 5]], same.ctx[[5, 4, 2, 0]])
    renamed = ("engine", "crane", "fire_engine", "crane", "a b c d e", "new")  # known ones are in place
    assert torch.equal(open_solution(file, classnames=renamed).for_clip(clip).ctx, same.ctx)
    one_new = ("crane", "new", "fire engine", "crane", "a b c d e", "a b c d f")  # the row that is left
    assert torch.equal(open_solution(file, classnames=one_new).for_clip(clip).ctx[1], same.ctx[0])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("one", "two", "three"), "got none of them (one, two, three): give the names of its training run"),
        (("one", "cat", "three"), "because their order is another one, got other names: one, three"),
    ],
)
def test_names_of_other_classes_are_refused(names, said):
    prompt = open_solution(specific(NAMES), classnames=names)
    for use in (lambda: prompt.for_clip(tiny_clip(0)), lambda: USES["a command"](tiny_clip(0), prompt)):
        with pytest.raises(ValueError, match=re.escape(said)):
            use()


def test_shared_vectors_serve_other_classes_than_those_of_the_file():
    clip = tiny_clip(0)
    prompt = open_solution(write({"ctx": normal(N_CTX, WIDTH), **embedded(clip, ("bee", "ant"))}))
    assert prompt.for_clip(clip) is prompt and mt.evaluate(clip, prompt, cache())


@pytest.mark.parametrize("shape", [(4,), (3,), (1,), (2,), (3, 4)], ids=str)
def test_plots_several_prompts_per_class_are_refused(shape):
    """Three classes: also as many prompts as classes, one prompt, and class-specific ones."""
    state = {"ctx": normal(*shape, N_CTX, WIDTH), **embedded(tiny_clip(0), repeat=shape[-1])}
    for buffers in (("token_prefix", "token_suffix"), ("token_prefix",), ("token_suffix",)):
        with pytest.raises(ValueError, match="PLOT's several prompts per class, which no prompt equals"):
            open_solution(write({name: state[name] for name in ("ctx", *buffers)}), classnames=NAMES)


# -- wrappers ----------------------------------------------------------------------------------------------------------

PREFIXES = [
    "prompt_learner.module.", "module.prompt_learner.", "model.prompt_learner.", "_orig_mod.", "module.module.",
    "model._orig_mod.prompt_learner.module.", "net.",
]  # fmt: skip
KEYS = [("model",), ("model_state_dict",), ("net",), ("state_dict", "model"), ("model", "state_dict"), ("module",)]


def around(state: dict, keys=(), prefix: str = "") -> dict:
    content = {f"{prefix}{name}": value for name, value in state.items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 7}
    return content


def read_prompt(content: dict) -> Tensor:
    torch.save(content, FILE)
    return open_solution(FILE).ctx


def read_head(content: dict) -> Tensor:
    torch.save(content, "head.pt")
    return open_solution("head.pt", classnames=NAMES).weight


def read_map(content: dict) -> Tensor:
    torch.save(content, "map.pt")
    return mt.LinearMap.from_file("map.pt").matrix


def read_residual(content: dict) -> Tensor:
    torch.save(content, FILE)
    return open_taskres(FILE, classnames=NAMES, factor=1.0).top.state()["rows"]


SIBLINGS = {
    "prompt": (read_prompt, "ctx", lambda: {"ctx": normal(N_CTX, WIDTH)}),
    "head": (read_head, "weight", lambda: {"weight": normal(3, 8), "bias": normal(3)}),
    "map": (read_map, "matrix", lambda: {"matrix": normal(8, 8)}),
    "residual": (
        read_residual,
        "text_feature_residuals",
        lambda: {"base_text_features": normal(3, 8), "text_feature_residuals": normal(3, 8, seed=1)},
    ),
}


@pytest.mark.parametrize("kind", SIBLINGS)
def test_every_kind_is_read_out_of_every_wrapper(kind):
    read, name, make = SIBLINGS[kind]
    state = make()
    cases = [((), prefix) for prefix in PREFIXES] + [(keys, "") for keys in KEYS] + [(("state_dict",), "model.module.")]
    for keys, prefix in cases:
        assert torch.equal(read(around(state, keys, prefix)), state[name]), (keys, prefix)


# -- files and folders of other trainers -------------------------------------------------------------------------------

CTX = {"ctx": torch.zeros(N_CTX, WIDTH)}
OTHERS = {
    "MaPLe": {"prompt_learner.ctx": CTX["ctx"], "prompt_learner.compound_prompts_text.0": torch.zeros(2)},
    "PromptSRC": {"prompt_learner.ctx": CTX["ctx"]}
    | {f"text_encoder.transformer.resblocks.{n}.VPT_shallow": torch.zeros(2) for n in range(500)},
    "PromptKD": {"image_encoder.VPT": torch.zeros(2), "VPT_image_trans.conv1.0.weight": torch.zeros(2)},
    "MMA": {"text_adapter.5.down.0.weight": torch.zeros(2), "shared_adapter.5.0.weight": torch.zeros(2)},
    "ProVP": {"prompt_embeddings": torch.zeros(12, 2, 4)},
    "CoCoOp": {**CTX, "meta_net.linear1.weight": torch.zeros(2)},
    "TaskRes": {"base_text_features": torch.zeros(3, 8), "text_feature_residuals": torch.zeros(3, 8)},
    "CLIP-Adapter": {"fc.0.weight": torch.zeros(2, 8), "fc.2.weight": torch.zeros(8, 2)},
    "a whole model": {"prompt_learner.ctx": CTX["ctx"]}
    | {f"image_encoder.{'x' * 300}{n}": torch.zeros(2) for n in range(300)},
}


@pytest.mark.parametrize("trainer", OTHERS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_files_of_other_trainers_are_named_in_a_short_sentence(trainer, prefix):
    state = {f"{prefix}{name}": value for name, value in OTHERS[trainer].items()}
    with pytest.raises(ValueError, match=re.escape(trainer)) as refused:
        open_solution(write(state), classnames=NAMES)
    assert len(str(refused.value)) < 600 and FILE in str(refused.value)


@pytest.mark.parametrize(
    ("name", "trainer"),
    [
        ("VLPromptLearner/model.pth.tar-20", "PromptSRC"),
        ("MultiModalPromptLearner/model.pth.tar-5", "MaPLe"),
        ("adapter_learner/model.pth.tar-5", "MMA"),
        ("clip_adapter/model.pth.tar-5", "CLIP-Adapter"),
        ("best_F_16shots.pt", "Tip-Adapter"),
    ],
)
def test_run_folders_of_other_trainers_are_named(name, trainer):
    write({"x": torch.zeros(2)}, f"run/{name}")
    with pytest.raises(ValueError, match=rf"run: {name.split('/')[0]} holds .*{trainer}") as refused:
        open_solution("run")
    assert len(str(refused.value)) < 600


def test_a_path_without_a_checkpoint_names_those_near_it():
    for epoch in (5, 10, 50):
        write(CTX, f"out/pets/seed1/prompt_learner/model.pth.tar-{epoch}")
    write(CTX, "out/pets/seed1/prompt_learner/model-best.pth.tar")
    write(CTX, "out/cars/seed2/prompt_learner/model.pth.tar-5")
    known = r"out/pets/seed1/prompt_learner holds epochs 5, 10, 50 and model-best\.pth\.tar"
    for missing in ("prompt_learner/model.pth.tar-100", "model.pth.tar-50", "prompt_learner/model.pth.tar"):
        with pytest.raises(FileNotFoundError, match=f"which does not exist: {known}"):
            open_solution(f"out/pets/seed1/{missing}")
    for above, below in (("out/pets", "out/pets/seed1"), ("out", "out/cars/seed2, out/pets/seed1")):
        with pytest.raises(FileNotFoundError, match=f"with neither: checkpoints are in {below}; give one of them"):
            open_solution(above)
    for n in range(300):
        write(CTX, f"many/{'x' * 60}{n}/model.pth.tar-{n}")
    with pytest.raises(FileNotFoundError, match=r", \.\.\.; give one of them") as refused:
        open_solution("many")
    assert len(str(refused.value)) < 600
