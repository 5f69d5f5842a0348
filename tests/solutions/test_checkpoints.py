"""Other projects' checkpoints: prompts, heads and pickled modules as they are, damaged, and hostile: none must run."""

import functools
import importlib
import math
import os
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from checkpoint_cases import BIAS, CLASSES, N_CTX, NAMES, WEIGHT, WIDTH, Hostile, context
from safetensors.torch import save_file
from torch import Tensor, nn

from mergetune import Prompt
from mergetune.io.pickled_modules import read_module
from mergetune.solutions import read_head, read_prompt

FILE = "model.pth.tar-50"


class _Warmup(torch.optim.lr_scheduler.LRScheduler):
    """Dassl's warm-up scheduler, which keeps its successor, which keeps the optimiser."""

    def __init__(self, optimizer, successor, warmup_epoch, cons_lr):
        self.cons_lr, self.successor, self.warmup_epoch = cons_lr, successor, warmup_epoch
        super().__init__(optimizer)

    def get_lr(self):
        return [self.cons_lr for _ in self.base_lrs]


@pytest.fixture
def dassl(monkeypatch):
    """Pretends that Dassl is installed, until it is called to take it away."""
    names = ("dassl", "dassl.optim", "dassl.optim.lr_scheduler")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("ConstantWarmupScheduler", "LinearWarmupScheduler"):
        made = type(name, (_Warmup,), {"__module__": names[-1], "__qualname__": name})
        setattr(sys.modules[names[-1]], name, made)
    yield sys.modules[names[-1]]


def forget_dassl():
    for name in [name for name in sys.modules if name.split(".")[0] == "dassl"]:
        del sys.modules[name]
    with pytest.raises(ImportError):
        importlib.import_module("dassl")


def learner(ctx: Tensor, *, kgcoop: bool = False, **more: Tensor) -> dict[str, Tensor]:
    """The state dict of a prompt learner: its parameters and CoOp's buffers of one set of classes."""
    state = {"ctx": ctx, **({"bias_vectors": torch.zeros(1, 512)} if kgcoop else {}), **more}
    buffers = {"token_prefix": torch.zeros(CLASSES, 1, WIDTH), "token_suffix": torch.zeros(CLASSES, 72, WIDTH)}
    return {**state, **buffers}


def dassl_content(ctx: Tensor, *, epoch: int = 50, warmup="ConstantWarmupScheduler", optimizer="SGD", **state) -> dict:
    """What Dassl's save_checkpoint gets, after a step of training; the module ``dassl`` must be there."""
    parameter = nn.Parameter(ctx.float().clone())
    kwargs = {"momentum": 0.9, "weight_decay": 5e-4} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)([parameter], lr=2e-3, **kwargs)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 50.0)
    if warmup:
        scheduler = getattr(sys.modules["dassl.optim.lr_scheduler"], warmup)(optim, scheduler, 1, 1e-5)
    parameter.sum().backward()
    optim.step()
    scheduler.step()
    return {
        "state_dict": learner(ctx, **state),
        "epoch": epoch,
        "optimizer": optim.state_dict(),
        "scheduler": scheduler.state_dict(),
        "val_result": np.float64(81.5),
    }


def plain_content(ctx: Tensor, epoch: int = 50) -> dict:
    return {"state_dict": learner(ctx), "epoch": epoch}


# -- Dassl's files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [None, "ConstantWarmupScheduler", "LinearWarmupScheduler"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("kgcoop", [False, True])
def test_a_file_of_dassl_is_read_without_dassl(dassl, tmp_path, warmup, optimizer, kgcoop):
    ctx = context()
    torch.save(dassl_content(ctx, warmup=warmup, optimizer=optimizer, kgcoop=kgcoop), tmp_path / FILE)
    forget_dassl()
    found = read_prompt(tmp_path / FILE)
    assert torch.equal(found.ctx, ctx) and (found.epoch, found.file) == (50, tmp_path / FILE)
    assert "dassl" not in sys.modules


def test_a_scheduler_that_is_a_pickled_object_is_read_without_its_class(dassl, tmp_path):
    """Some forks save the scheduler itself."""
    content = dassl_content(context())
    content["scheduler"] = dassl.ConstantWarmupScheduler(
        torch.optim.SGD([nn.Parameter(context())], lr=0.1), None, 1, 1e-5
    )
    torch.save(content, tmp_path / FILE)
    assert b"ConstantWarmupScheduler" in (tmp_path / FILE).read_bytes()
    forget_dassl()
    assert torch.equal(read_prompt(tmp_path / FILE).ctx, context())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("value", [None, 81.5, np.float64(81.5), np.float32(81.5)], ids=lambda v: type(v).__name__)
def test_val_result_may_be_a_numpy_scalar(tmp_path, value, zipped):
    content = {**plain_content(context()), "val_result": value}
    torch.save(content, tmp_path / FILE, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_prompt(tmp_path / FILE).ctx, context())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    torch.save(plain_content(context(dtype=dtype)), tmp_path / FILE)
    found = read_prompt(tmp_path / FILE).ctx
    assert found.dtype == torch.float32 and torch.equal(found, context(dtype=dtype).float())


@pytest.mark.parametrize("prefix", ["module.", "prompt_learner.", "module.prompt_learner."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    state = {prefix + name: value for name, value in learner(context(), kgcoop=True).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / FILE)
    assert torch.equal(read_prompt(tmp_path / FILE).ctx, context())


def test_a_bare_state_dict_has_no_epoch(tmp_path):
    torch.save(learner(context()), tmp_path / "prompt.pt")
    found = read_prompt(str(tmp_path / "prompt.pt"))
    assert torch.equal(found.ctx, context()) and found.epoch is None


def test_class_specific_contexts_need_their_class_names(tmp_path):
    ctx = context(CLASSES, N_CTX, WIDTH)
    torch.save(plain_content(ctx), tmp_path / FILE)
    prompt = Prompt.from_checkpoint(tmp_path / FILE, classnames=["a", "b", "c"])
    assert torch.equal(prompt.ctx, ctx) and prompt.classnames == ("a", "b", "c") and prompt.n_ctx == N_CTX
    with pytest.raises(ValueError, match="classnames must be given"):
        Prompt.from_checkpoint(tmp_path / FILE)
    with pytest.raises(ValueError, match="classnames must name the 3 classes"):
        Prompt.from_checkpoint(tmp_path / FILE, classnames=["a", "b"])


def test_the_prompt_remembers_where_it_came_from(tmp_path):
    torch.save(plain_content(context()), tmp_path / FILE)
    prompt = Prompt.from_checkpoint(tmp_path / FILE)
    assert prompt.template == "X X X X {}." and prompt.notes == {"checkpoint": FILE, "epoch": 50}
    assert Prompt.from_checkpoint(tmp_path / FILE, template="a photo of a {}.").template == "a photo of a {}."


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "named", "expected"),
    [
        (["model.pth.tar-9", "model.pth.tar-10"], None, "model.pth.tar-10"),  # by number, not by letter
        (["model-9.pth.tar", "model-10.pth.tar"], None, "model-10.pth.tar"),
        (["model.pth.tar-9", "model.pth.tar-10"], "model.pth.tar-9\n", "model.pth.tar-9"),
        (["model.pth.tar-9", "model-best.pth.tar"], "model-best.pth.tar\n", "model-best.pth.tar"),
        (["model.pth.tar-9", "model-best.pth.tar"], None, "model.pth.tar-9"),
        (["model-best.pth.tar"], None, "model-best.pth.tar"),
        (["model-best.pth.tar"], "", "model-best.pth.tar"),
        (["model.pth.tar-9"], "../../outside", "model.pth.tar-9"),  # the text file names files of its own folder only
        (["model.pth.tar-9"], "\x00", "model.pth.tar-9"),
    ],
)
@pytest.mark.parametrize("learner_folder", ["", "prompt_learner", "prompt_mid_learner"])
def test_folders(tmp_path, files, named, expected, learner_folder):
    torch.save(plain_content(context() + 100), tmp_path / "outside")
    folder = tmp_path / "run" / "seed1" / learner_folder
    folder.mkdir(parents=True)
    for i, file in enumerate(files):
        torch.save(plain_content(context() + i, epoch=i), folder / file)
    (folder / "log.txt").write_text("model.pth.tar-99")
    if named is not None:
        (folder / "checkpoint").write_text(named)
    found = read_prompt(tmp_path / "run" / "seed1")
    assert found.file == folder / expected and torch.equal(found.ctx, context() + files.index(expected))


def test_a_text_file_checkpoint_with_anything_in_it(tmp_path):
    torch.save(plain_content(context()), tmp_path / FILE)
    (tmp_path / "checkpoint").write_text("x" * 300)
    assert read_prompt(tmp_path).file == tmp_path / FILE


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        read_prompt(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="model.pth.tar-N"):
        read_prompt(tmp_path)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "must hold a dict, got list"),
        (torch.zeros(2), "must hold a dict, got Tensor"),
        ({"state_dict": [1]}, "must hold a state_dict, got list"),
        ({"state_dict": {1: torch.zeros(2)}}, "state_dict"),
        ({"state_dict": {}}, "context vectors 'ctx' .* got none"),
        ({"state_dict": {"weight": torch.zeros(2, 2)}}, "got weight"),
        ({"state_dict": {"ctx": "text"}}, "context vectors"),
        ({"state_dict": {"ctx": torch.zeros(4)}}, r"got ctx \[4\]"),
        ({"state_dict": {"ctx": torch.zeros(1, 2, 3, 4)}}, r"got ctx \[1, 2, 3, 4\]"),
        ({"state_dict": {"ctx": torch.zeros(4, 4).int()}}, "context vectors"),
        ({"state_dict": learner(context(), visual_ctx=torch.zeros(1))}, "parameters that would be lost: visual_ctx"),
        (
            {
                "state_dict": learner(
                    context(), **{"compound_prompts_text.0": torch.zeros(1), "proj.weight": torch.zeros(1)}
                )
            },
            r"got MaPLe.s prompts inside the towers, .* \(such as compound_prompts_text.0\)",
        ),
    ],
)
def test_what_is_no_prompt_of_coops_form_is_refused(tmp_path, content, match):
    torch.save(content, tmp_path / FILE)
    with pytest.raises(ValueError, match=match):
        read_prompt(tmp_path / FILE)


def test_cocoop_is_refused(tmp_path):
    meta_net = {"meta_net.linear1.weight": torch.ones(1, WIDTH), "meta_net.linear1.bias": torch.ones(1)}
    torch.save({"state_dict": learner(context(), **meta_net), "epoch": 10}, tmp_path / FILE)
    with pytest.raises(ValueError, match="meta_net"):
        read_prompt(tmp_path / FILE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_contexts_that_are_not_finite_are_refused(tmp_path, value):
    torch.save(plain_content(torch.full((N_CTX, WIDTH), value)), tmp_path / FILE)
    with pytest.raises(ValueError, match="ctx must be finite"):
        Prompt.from_checkpoint(tmp_path / FILE)


# -- hostile and damaged files -----------------------------------------------------------------------------------------


def write_raw_pickle(content, file):
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, write_raw_pickle], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("place", ["root", "state_dict", "scheduler", "val_result"])
@pytest.mark.parametrize("how", ["os.system", "os.mkdir", "eval", "partial"])
def test_pickled_code_is_refused_and_never_run(tmp_path, monkeypatch, write, place, how):
    monkeypatch.chdir(tmp_path)
    evil = {
        "os.system": Hostile(os.system, "touch executed"),
        "os.mkdir": Hostile(os.mkdir, "executed"),
        "eval": Hostile(eval, "open('executed', 'w')"),
        "partial": Hostile(functools.partial(os.mkdir, "executed")),
    }[how]
    state = {"ctx": context().tolist() if write is write_raw_pickle else context()}
    content = {"state_dict": state, "epoch": 1, "scheduler": {}, "val_result": None}
    content = [evil] if place == "root" else {**content, place: evil}
    write(content, tmp_path / FILE)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_prompt(tmp_path / FILE)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_the_refusal_names_the_foreign_object(tmp_path):
    torch.save({"state_dict": {}, "scheduler": Hostile(os.mkdir, "executed")}, tmp_path / FILE)
    with pytest.raises(ValueError, match="holds an object of posix.mkdir, and pickled code is never run"):
        read_prompt(tmp_path / FILE)


def test_stand_ins_can_not_be_called_to_reach_anything(tmp_path, dassl):
    """An allowed name gives an inert object, whatever arguments and state the file has for it."""
    stand_in = type("ConstantWarmupScheduler", (), {"__module__": "dassl.optim.lr_scheduler"})
    dassl.ConstantWarmupScheduler = stand_in
    holder = stand_in()
    holder.__dict__ = {"__class__": "x", "step": Hostile(os.mkdir, str(tmp_path / "executed"))}
    torch.save({**plain_content(context()), "scheduler": holder}, tmp_path / FILE)
    forget_dassl()
    with pytest.raises(ValueError, match="pickled code is never run"):
        read_prompt(tmp_path / FILE)
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("damage", ["truncated", "bytes", "block", "noise"])
def test_damaged_files_raise_nothing_but_value_errors(dassl, tmp_path, kind, damage):
    content = dassl_content(context())
    torch.save(content, tmp_path / FILE, _use_new_zipfile_serialization=kind == "zip")
    forget_dassl()
    whole = (tmp_path / FILE).read_bytes()
    dice = random.Random(f"{kind} {damage}")
    refused = 0
    for _ in range(60):
        spoilt = bytearray(whole)
        at = dice.randrange(len(spoilt))
        if damage == "truncated":
            del spoilt[at:]
        elif damage == "bytes":
            for _ in range(dice.randint(1, 8)):
                spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
        elif damage == "block":
            spoilt[at : at + 64] = dice.randbytes(64)
        else:
            spoilt = dice.randbytes(at)
        (tmp_path / FILE).write_bytes(spoilt)
        try:
            assert read_prompt(tmp_path / FILE).ctx.dtype == torch.float32
        except ValueError as error:
            assert FILE in str(error)
            refused += 1
    assert refused >= (60 if damage in ("truncated", "noise") else 1)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


# -- other prompts -----------------------------------------------------------------------------------------------------


def test_proda_with_one_prompt_is_coops_format_and_with_several_is_refused(tmp_path):
    nc = {"nc_token_prefix": torch.zeros(1, 1, WIDTH), "nc_token_suffix": torch.zeros(1, 72, WIDTH)}
    torch.save({"state_dict": learner(context(1, N_CTX, WIDTH), **nc), "epoch": 5}, tmp_path / "one")
    assert torch.equal(read_prompt(tmp_path / "one").ctx, context(1, N_CTX, WIDTH)[0])
    torch.save({"state_dict": learner(context(8, N_CTX, WIDTH), **nc), "epoch": 5}, tmp_path / "many")
    with pytest.raises(ValueError, match="got a distribution of 8"):
        read_prompt(tmp_path / "many")


def test_the_official_mid_learner(dassl, tmp_path):
    """It has KgCoOp's bias vectors without its meta-net, and comes before the prompt_learner that it started from."""
    for name, shift in (("prompt_learner", 0), ("prompt_mid_learner", 1)):
        (tmp_path / name).mkdir()
        torch.save(dassl_content(context() + shift, kgcoop=shift == 1), tmp_path / name / "model.pth.tar-100")
    forget_dassl()
    assert torch.equal(Prompt.from_checkpoint(tmp_path).ctx, context() + 1)


def test_the_position_is_an_argument(tmp_path):
    torch.save(plain_content(context()), tmp_path / FILE)
    assert Prompt.from_checkpoint(tmp_path / FILE).position == "end"
    assert Prompt.from_checkpoint(tmp_path / FILE, position="front").position == "front"
    with pytest.raises(ValueError, match="position must be one of end, middle, front, got 'start'"):
        Prompt.from_checkpoint(tmp_path / FILE, position="start")


# -- fuzzing -----------------------------------------------------------------------------------------------------------


def spoil(whole: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, a block of noise or of the file itself put in, a piece cut out, or the end cut off."""
    spoilt, at = bytearray(whole), dice.randrange(len(whole))
    match dice.randrange(6):
        case 0:
            del spoilt[at:]
        case 1:
            spoilt[at : at + 64] = dice.randbytes(64)
        case 2:
            del spoilt[at : at + dice.randint(1, 64)]
        case 3:
            source = dice.randrange(len(whole))
            spoilt[at:at] = whole[source : source + dice.randint(1, 200)]
        case _:
            for _ in range(dice.randint(1, 6)):
                spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
    return bytes(spoilt)


def restructure(content, dice: random.Random):
    """The same content with one value somewhere replaced, dropped, renamed or wrapped."""
    if not isinstance(content, dict) or not content or dice.random() < 0.1:
        odd = [None, 7, "text", [], {}, [content], {"x": content}, torch.zeros(0), torch.zeros(2, 3, 4), np.float64(3)]
        return dice.choice(odd)
    name = dice.choice(sorted(content, key=str))
    rest = {key: value for key, value in content.items() if key != name}
    match dice.randrange(4):
        case 0:
            return rest
        case 1:
            return {**rest, dice.choice([f"{name}s", f"module.{name}", 3, ""]): content[name]}
        case _:
            return {**rest, name: restructure(content[name], dice)}


FUZZED = {
    "prompt, zip": (lambda file, c: torch.save(c, file), read_prompt),
    "prompt, legacy": (lambda file, c: torch.save(c, file, _use_new_zipfile_serialization=False), read_prompt),
    "head.pt": (lambda file, c: torch.save(c, file), read_head),
    "head.npz": (lambda file, c: np.savez(file.open("wb"), **c), read_head),
    "head.safetensors": (lambda file, c: save_file(c, file, metadata={"scale": "3.5"}), read_head),
    "pickle": (lambda file, c: file.write_bytes(pickle.dumps(c)), read_module),
    "pickle 2": (lambda file, c: file.write_bytes(pickle.dumps(c, protocol=2)), read_module),
    "module, zip": (lambda file, c: torch.save(c, file), read_module),
    "module, legacy": (lambda file, c: torch.save(c, file, _use_new_zipfile_serialization=False), read_module),
}


def fuzzed_content(kind: str):
    if kind.startswith("prompt"):
        return {**plain_content(context()), "val_result": np.float64(3), "optimizer": {"state": {0: context(3)}}}
    if kind == "head.npz":
        return {"weight": WEIGHT.numpy(), "bias": BIAS.numpy(), "classes_": np.array(NAMES), "scale": np.array(2.0)}
    if kind.startswith("head"):
        return {"weight": WEIGHT, "bias": BIAS}
    return {"epoch": 3, "model": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "weight": WEIGHT.half()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FUZZED)
def test_fuzzed_files_load_or_raise_our_errors(tmp_path, kind):
    """130 damaged files of each kind, one in four with another structure: nearly 1,200 in all."""
    write, read = FUZZED[kind]
    content, dice, refused = fuzzed_content(kind), random.Random(kind), 0
    file = tmp_path / (kind if kind.startswith("head") else "file")
    write(file, content)
    whole = file.read_bytes()
    assert read(file)
    for i in range(130):
        if i % 4 or kind in ("head.npz", "head.safetensors"):
            file.write_bytes(spoil(whole, dice))
        else:
            write(file, restructure(content, dice))
        try:
            read(file)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert refused > 30
    assert [found.name for found in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({"token_prefix": torch.full((CLASSES, 1, WIDTH), math.nan)}, "token_prefix must be finite"),
        ({"token_suffix": torch.full((CLASSES, 72, WIDTH), math.inf)}, "token_suffix must be finite"),
        ({"token_suffix": torch.zeros(5)}, "token_suffix must be embedded texts"),
        ({"token_prefix": torch.zeros(CLASSES, 2, WIDTH)}, "token_prefix must be one start token per class"),
        ({"token_prefix": torch.zeros(CLASSES + 1, 1, WIDTH)}, "must have one text per class"),
    ],
)
def test_embedded_texts_that_tell_nothing_are_named_in_one_warning(tmp_path, texts, told):
    torch.save({"state_dict": learner(context()) | texts, "epoch": 5}, tmp_path / "odd")
    with pytest.warns(UserWarning, match=f"odd: .*{told}.*cannot be checked") as caught:
        found = read_prompt(tmp_path / "odd")
    assert len(caught) == 1 and torch.equal(found.ctx, context()) and found.start is None and found.suffix is None


@pytest.mark.parametrize("name", ["token_prefix", "token_suffix"])
def test_embedded_texts_of_another_width_are_of_another_backbone(tmp_path, name):
    texts = {name: torch.zeros(CLASSES, 1, WIDTH + 1)}
    torch.save({"state_dict": learner(context()) | texts, "epoch": 5}, tmp_path / "odd")
    with pytest.raises(ValueError, match=f"odd must hold {name} of the width of ctx.*different backbones"):
        read_prompt(tmp_path / "odd")
