"""Other projects' checkpoints: Dassl's files as they are, damaged ones, and hostile ones that must never run."""

import functools
import importlib
import os
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergetune import Prompt
from mergetune.checkpoints import read_prompt

N_CTX, WIDTH, CLASSES = 4, 16, 3
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


def context(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape or (N_CTX, WIDTH), generator=torch.Generator().manual_seed(0)).to(dtype)


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


# -- Dassl's files ----------------------------------------------------------------------------------------------------


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


# -- folders ----------------------------------------------------------------------------------------------------------


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


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "must hold a dict, got list"),
        (torch.zeros(2), "must hold a dict, got Tensor"),
        ({"state_dict": [1]}, "must hold a state_dict, got list"),
        ({"state_dict": {1: torch.zeros(2)}}, "state_dict"),
        ({"state_dict": {}}, "context vectors 'ctx' .* got nothing"),
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
            r"lost: compound_prompts_text.0, proj.weight",
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


# -- hostile and damaged files ----------------------------------------------------------------------------------------


class Hostile:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


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
