"""Other projects' checkpoints: prompts, heads and pickled modules as they are, damaged, and hostile: none must run."""

import copyreg
import functools
import importlib
import io
import os
import pickle
import random
import struct
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergetune import Head, Prompt, pickles
from mergetune.checkpoints import read_head, read_prompt
from mergetune.pickles import convert_module, read_module

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


# -- other prompts ----------------------------------------------------------------------------------------------------


def test_proda_with_one_prompt_is_coops_format_and_with_several_is_refused(tmp_path):
    nc = {"nc_token_prefix": torch.zeros(1, 1, WIDTH), "nc_token_suffix": torch.zeros(1, 72, WIDTH)}
    torch.save({"state_dict": learner(context(1, N_CTX, WIDTH), **nc), "epoch": 5}, tmp_path / "one")
    assert torch.equal(read_prompt(tmp_path / "one").ctx, context(1, N_CTX, WIDTH)[0])
    torch.save({"state_dict": learner(context(8, N_CTX, WIDTH), **nc), "epoch": 5}, tmp_path / "many")
    with pytest.raises(ValueError, match="got ProDA's distribution of 8"):
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


# -- heads ------------------------------------------------------------------------------------------------------------

NAMES = ("ant", "bee", "cat")
WEIGHT, BIAS = context(CLASSES, WIDTH), context(CLASSES)


def save_arrays(file, **arrays) -> None:
    """Arrays and tensors by name, as the suffix says."""
    tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
    if file.suffix == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in tensors.items()})
    elif file.suffix == ".safetensors":
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file)
    else:
        torch.save(tensors, file)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
@pytest.mark.parametrize("layer", ["", "fc.", "head.", "classifier.", "classification_head.", "linear.", "module.fc."])
def test_heads_by_their_usual_names(tmp_path, suffix, layer):
    file, bias = tmp_path / f"head{suffix}", layer not in ("head.", "linear.")
    save_arrays(file, **{f"{layer}weight": WEIGHT}, **({f"{layer}bias": BIAS} if bias else {}))
    head = Head.from_checkpoint(file, classnames=NAMES)
    assert torch.equal(head.weight, WEIGHT) and head.weight.dtype == torch.float32
    assert torch.equal(head.bias, BIAS) if bias else head.bias is None
    assert (head.classnames, head.logit_scale, head.notes) == (NAMES, 1.0, {"checkpoint": file.name})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_heads_of_other_precisions_become_float32(tmp_path, suffix, dtype):
    save_arrays(tmp_path / f"head{suffix}", weight=WEIGHT.to(dtype))
    head = Head.from_checkpoint(tmp_path / f"head{suffix}", classnames=NAMES)
    assert head.weight.dtype == torch.float32 and torch.equal(head.weight, WEIGHT.to(dtype).float())


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrapped_state_dicts_and_bare_tensors(tmp_path, wrapper):
    torch.save({wrapper: nn.Linear(WIDTH, CLASSES).state_dict(), "epoch": 3}, tmp_path / "head.pt")
    assert Head.from_checkpoint(tmp_path / "head.pt", classnames=NAMES).bias is not None
    torch.save(nn.Parameter(WEIGHT), tmp_path / "bare.pt")
    assert torch.equal(Head.from_checkpoint(tmp_path / "bare.pt", classnames=NAMES).weight, WEIGHT)


def test_a_head_in_a_whole_model_must_be_asked_for(tmp_path):
    """Its features are those of the layers that were trained with it."""
    model = {"visual.proj.weight": torch.zeros(2, 2), "head.weight": WEIGHT, "head.bias": BIAS}
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="lost: visual.proj.weight; name='head.weight' takes the head without them"):
        Head.from_checkpoint(tmp_path / "model.pt", classnames=NAMES)
    head = Head.from_checkpoint(tmp_path / "model.pt", classnames=NAMES, name="head.weight")
    assert torch.equal(head.weight, WEIGHT) and torch.equal(head.bias, BIAS)


def test_the_logit_scale_of_a_head(tmp_path):
    save_arrays(tmp_path / "unit.npz", weight=WEIGHT)
    assert Head.from_checkpoint(tmp_path / "unit.npz", classnames=NAMES, logit_scale=100.0).logit_scale == 100.0
    save_arrays(tmp_path / "log.npz", weight=WEIGHT, logit_scale=4.6052)
    with pytest.raises(ValueError, match="holds a logit_scale: give logit_scale="):
        Head.from_checkpoint(tmp_path / "log.npz", classnames=NAMES)
    assert Head.from_checkpoint(tmp_path / "log.npz", classnames=NAMES, logit_scale=100.0).logit_scale == 100.0


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"ctx": WEIGHT}, "must hold one head's weight .* got ctx"),
        ({"weight": WEIGHT, "fc.weight": WEIGHT}, "must hold one head's weight .* got (fc.)?weight, (fc.)?weight"),
        ({"adapter.fc.0.weight": WEIGHT, "adapter.fc.2.weight": WEIGHT}, "got adapter.fc.0.weight, adapter.fc.2"),
        ({"weight": WEIGHT[0]}, r"weight must have shape \[C, D\], got \[16\]"),
        ({"weight": WEIGHT.long()}, "weight must be floating point"),
        ({"weight": WEIGHT, "bias": BIAS[:2]}, r"bias must have shape \[C\] = \[3\], got \[2\]"),
        ({"weight": WEIGHT, "scale": BIAS}, "scale must be a number"),
        ({"weight": WEIGHT, "classes_": torch.arange(2)}, "class for each of the 3 rows, got 2"),
        ({"weight": WEIGHT, "classes_": torch.tensor([0.0, 0.5, 1.0])}, "whole numbers or names"),
        ({"weight": WEIGHT, "classes_": torch.tensor([0, 1, 7])}, None),
        ({"weight": WEIGHT[:2]}, "must name the 2 classes of weight, got 3"),
        ({"weight": WEIGHT.repeat(16, 1)}, "must name the 48 classes of weight, got 3"),  # Tip-Adapter's keys
        ({"weight": WEIGHT * float("nan")}, "weight must be finite"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_what_is_no_head_is_refused(tmp_path, arrays, match, suffix):
    save_arrays(tmp_path / f"head{suffix}", **arrays)
    if match is None:  # three classes of other numbers: by their order
        assert Head.from_checkpoint(tmp_path / f"head{suffix}", classnames=NAMES).classnames == NAMES
        return
    with pytest.raises(ValueError, match=match):
        Head.from_checkpoint(tmp_path / f"head{suffix}", classnames=NAMES)


def test_missing_heads_and_names(tmp_path):
    for name in ("head.pt", "head.npz", "head.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            Head.from_checkpoint(tmp_path / name, classnames=NAMES)
    save_arrays(tmp_path / "head.npz", weight=WEIGHT)
    with pytest.raises(ValueError, match="classnames must be given"):
        Head.from_checkpoint(tmp_path / "head.npz")
    with pytest.raises(ValueError, match="must hold the weight 'fc.weight', got weight"):
        Head.from_checkpoint(tmp_path / "head.npz", classnames=NAMES, name="fc.weight")


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("labels", ["numbers", "names"])
@pytest.mark.parametrize("saved", [True, False])
def test_scikit_learn(tmp_path, classes, labels, saved):
    """The head's softmax is the model's predict_proba, for two classes as for more."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = context(40, WIDTH).double().numpy(), np.arange(40) % classes
    y = np.array(NAMES)[y] if labels == "names" else y + (4 - classes)
    model = linear_model.LogisticRegression(C=0.5).fit(x, y)
    all_names = tuple("0123"[: 4 - classes]) + NAMES[:classes]  # by label number
    given = None if labels == "names" else all_names
    if saved:
        np.savez(tmp_path / "h.npz", coef_=model.coef_, intercept_=model.intercept_, classes_=model.classes_)
        head = Head.from_checkpoint(tmp_path / "h.npz", classnames=given)
    else:
        head = Head.from_sklearn(model, classnames=given)
    assert head.classnames == NAMES[:classes] and head.weight.shape == (classes, WIDTH) and head.logit_scale == 1
    logits = torch.from_numpy(x).float() @ head.weight.T + head.bias
    np.testing.assert_allclose(logits.softmax(-1), model.predict_proba(x), atol=1e-5)


def test_scikit_learns_classes_must_have_names(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression().fit(context(40, WIDTH).numpy(), np.arange(40) % 4)
    with pytest.raises(ValueError, match="must name the labels up to 3, got 3 names"):
        Head.from_sklearn(model, classnames=NAMES)
    with pytest.raises(TypeError, match="model must be fitted, .* got LogisticRegression"):
        Head.from_sklearn(linear_model.LogisticRegression(), classnames=NAMES)
    named = linear_model.LogisticRegression().fit(context(3, WIDTH).numpy(), NAMES)
    with pytest.raises(ValueError, match="classnames must be those of the head, got a difference in ant, dog"):
        Head.from_sklearn(named, classnames=("dog", "bee", "cat"))


# -- pickled modules --------------------------------------------------------------------------------------------------


@pytest.fixture
def wise_ft(monkeypatch):
    """A module of WiSE-FT's classes, pretending that its code is installed; ``forget`` takes it away again."""
    for name in ("src", "src.models", "src.models.modeling"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    room = sys.modules["src.models.modeling"]

    class ClassificationHead(nn.Linear):
        def __init__(self, weight, normalize):
            super().__init__(WIDTH, CLASSES)
            self.normalize = normalize
            self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(torch.zeros(CLASSES))

    class ImageClassifier(nn.Module):
        def __init__(self, encoder, head):
            super().__init__()
            self.image_encoder, self.classification_head, self.val_preprocess = encoder, head, print

    for made in (ClassificationHead, ImageClassifier):
        made.__module__, made.__qualname__ = "src.models.modeling", made.__name__
        setattr(room, made.__name__, made)
    yield room


def forget_wise_ft():
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        del sys.modules[name]


def write_module(module, file, how: str) -> None:
    if how.startswith("pickle"):
        file.write_bytes(pickle.dumps(module, protocol=int(how[-1])))
    else:
        torch.save(module, file, _use_new_zipfile_serialization=how == "zip")


HOW = ["pickle 2", "pickle 4", "pickle 5", "zip", "legacy"]


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", HOW)
def test_wise_fts_head_is_converted_without_its_code(wise_ft, tmp_path, how):
    write_module(wise_ft.ClassificationHead(100 * WEIGHT, True), tmp_path / "head.pt", how)
    forget_wise_ft()
    with pytest.raises(ValueError, match="cannot be read as a checkpoint") as refused:
        Head.from_checkpoint(tmp_path / "head.pt", classnames=NAMES)
    assert "pickled code is never run; mergetune.pickles.convert_module" in str(refused.value)
    assert convert_module(tmp_path / "head.pt", tmp_path / "head.safetensors") == ["weight", "bias"]
    head = Head.from_checkpoint(tmp_path / "head.safetensors", classnames=NAMES)
    assert torch.equal(head.weight, 100 * WEIGHT) and torch.equal(head.bias, torch.zeros(CLASSES))
    assert head.logit_scale == 1 and "src" not in sys.modules


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_whole_classifier_is_read_as_its_state_dict(wise_ft, tmp_path, how, parallel):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).half()
    model = wise_ft.ImageClassifier(encoder, wise_ft.ClassificationHead(WEIGHT, True))
    model = nn.DataParallel(model) if parallel else model
    write_module(model, tmp_path / "model.pt", how)
    expected = model.state_dict()
    forget_wise_ft()
    found = read_module(tmp_path / "model.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    convert_module(tmp_path / "model.pt", tmp_path / "head.safetensors", only="classification_head")
    assert torch.equal(Head.from_checkpoint(tmp_path / "head.safetensors", classnames=NAMES).weight, WEIGHT)
    with pytest.raises(ValueError, match=r"must hold tensors of logit_head, got (module.)?image_encoder.0.weight"):
        read_module(tmp_path / "model.pt", only="logit_head")


def test_views_and_dicts_of_tensors_come_back(tmp_path):
    """Transposed, offset and shared memory, 0 dimensions, every dtype."""
    whole = context(4, 6)
    content = {"t": whole.T, "part": whole[1:3, ::2], "scalar": torch.tensor(7), "nested": {"bool": whole > 0}}
    for how in HOW:
        write_module(content, tmp_path / "file", how)
        found = read_module(tmp_path / "file")
        assert torch.equal(found["t"], whole.T) and torch.equal(found["part"], whole[1:3, ::2])
        assert found["scalar"] == 7 and torch.equal(found["nested.bool"], whole > 0)


def test_expanded_tensors_come_back_unless_they_would_fill_the_memory(tmp_path):
    for how in HOW:
        write_module({"mask": torch.ones(1).expand(5, 4)}, tmp_path / "file", how)
        assert torch.equal(read_module(tmp_path / "file")["mask"], torch.ones(5, 4))
        write_module({"mask": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "file", how)
        with pytest.raises(ValueError, match="in a storage of 1 numbers"):
            read_module(tmp_path / "file")


def test_a_storage_of_another_size_is_refused(tmp_path):
    """All that follows would be other numbers."""
    torch.save({"a": context(5), "b": context(7)}, tmp_path / "file", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "file").read_bytes()
    count, fewer = struct.pack("<q", 5), struct.pack("<q", 4)
    assert whole.count(count) == 1
    (tmp_path / "file").write_bytes(whole.replace(count, fewer))
    with pytest.raises(ValueError, match="must have 5 numbers, got 4"):
        read_module(tmp_path / "file")


def test_a_head_for_other_features_is_refused(wise_ft, tmp_path):
    write_module(wise_ft.ClassificationHead(WEIGHT, False), tmp_path / "head.pt", "pickle 4")
    forget_wise_ft()
    convert_module(tmp_path / "head.pt", tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="features of unit norm, got one with normalize=False"):
        Head.from_checkpoint(tmp_path / "head.safetensors", classnames=NAMES)


@pytest.mark.parametrize("content", [{}, [1, 2], {"a": "text"}, 5, None], ids=repr)
def test_pickles_without_tensors_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="must hold tensors, got none"):
        read_module(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="where there is no file"):
        read_module(tmp_path)
    with pytest.raises(ValueError, match="out must be a .safetensors file"):
        convert_module(tmp_path / "file", tmp_path / "out.pt")


@pytest.mark.parametrize("suffix", [".pkl", ".joblib", ".pickle"])
def test_heads_in_pickles_are_refused_with_advice(tmp_path, suffix):
    (tmp_path / f"head{suffix}").write_bytes(pickle.dumps(Hostile(os.mkdir, str(tmp_path / "executed"))))
    with pytest.raises(ValueError, match=r"never run: save a scikit-learn model with np.savez\('head.npz', coef_="):
        Head.from_checkpoint(tmp_path / f"head{suffix}", classnames=NAMES)
    assert not (tmp_path / "executed").exists()


class Setter:
    """Is filled with a state, as a hostile file may do with whatever it can name."""

    def __init__(self, target, state):
        self.target, self.state = target, state

    def __reduce__(self):
        return self.target, (), self.state


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("place", ["alone", "beside", "in a module"])
@pytest.mark.parametrize(
    "evil",
    [
        lambda: Hostile(os.system, "touch executed"),
        lambda: Hostile(eval, "open('executed', 'w')"),
        lambda: Hostile(functools.partial(os.mkdir, "executed")),
        lambda: Hostile(getattr, Hostile(importlib.import_module, "hostile_module"), "x"),
        lambda: Hostile(importlib.import_module, "hostile_module"),
        lambda: Hostile(torch.load, "hostile.pt"),
        lambda: Hostile(torch.storage._load_from_bytes, pickle.dumps(Hostile(os.mkdir, "executed"))),
        lambda: Hostile(np.load, "hostile.npy", "r", True),
        lambda: Setter(types.SimpleNamespace, {"__class__": Hostile(os.mkdir, "executed")}),
    ],
    ids=["system", "eval", "partial", "getattr", "import", "torch.load", "storage", "np.load", "state"],
)
def test_nothing_in_a_pickled_module_is_run(tmp_path, monkeypatch, evil, place, how):
    """The tensors beside it are read, or the file is refused; there is no other way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile_module.py").write_text("open('executed', 'w')")
    torch.save(Hostile(os.mkdir, "executed"), tmp_path / "hostile.pt")
    np.save(tmp_path / "hostile.npy", np.array([Hostile(os.mkdir, "executed")]), allow_pickle=True)
    monkeypatch.syspath_prepend(tmp_path)
    there = sorted(file.name for file in tmp_path.iterdir())
    if place == "in a module":
        content = nn.Linear(2, 2)
        content.evil = evil()
    else:
        content = evil() if place == "alone" else {"evil": evil(), "weight": WEIGHT}
    write_module(content, tmp_path / "file", how)
    try:
        found = read_module(tmp_path / "file")
        assert "weight" in found and place != "alone"
    except ValueError as error:
        assert "file" in str(error)
    for read in (read_prompt, read_head):
        with pytest.raises(ValueError):
            read(tmp_path / "file")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*there, "file"])


def test_a_file_changes_nothing_that_outlives_it(tmp_path):
    """A state that is meant for a class or function, not for an object, goes nowhere."""
    for name in (b"posix\nsystem", b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict"):
        (tmp_path / "file").write_bytes(b"\x80\x02c" + name + b"\n}X\x05\x00\x00\x00stateX\x01\x00\x00\x00xsb.")
        with pytest.raises(ValueError, match="must hold tensors, got none"):
            read_module(tmp_path / "file")
    assert pickles._Inert.state is None and not vars(pickles._Unpickler.rebuild_tensor)


def test_extension_codes_are_refused(tmp_path, monkeypatch):
    """They stand for objects that another pickle has brought in, past every look at names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._extension_cache, 200, os.mkdir)
    hostile = b"\x80\x02(\x82\xc8X\x08\x00\x00\x00executedo."
    pickle._Unpickler(io.BytesIO(hostile)).load()
    (tmp_path / "executed").rmdir()  # so it does what it should not do here:
    (tmp_path / "file").write_bytes(hostile)
    with pytest.raises(ValueError, match="an instruction that tensors do not need"):
        read_module(tmp_path / "file")
    assert not (tmp_path / "executed").exists()


def test_npz_files_with_pickled_objects_are_refused_and_never_run(tmp_path):
    evil = np.array([Hostile(os.mkdir, str(tmp_path / "executed"))], dtype=object)
    np.savez(tmp_path / "head.npz", weight=WEIGHT.numpy(), classes_=evil)
    with pytest.raises(ValueError, match="cannot be read as .npz: .* allow_pickle"):
        Head.from_checkpoint(tmp_path / "head.npz", classnames=NAMES)
    assert not (tmp_path / "executed").exists()


# -- fuzzing ----------------------------------------------------------------------------------------------------------


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
