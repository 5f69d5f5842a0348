"""Heads from others' files."""

import pickle

import numpy as np
import pytest
import torch
from checkpoint_cases import BIAS, CLASSES, NAMES, WEIGHT, WIDTH, context
from safetensors.torch import save_file
from torch import nn

from mergetune import Head, open_solution


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
    several = (
        r"holds several, got None: visual.proj.weight \[2, 2\], head.weight \[3, 16\]; for example name='head.weight'"
    )
    with pytest.raises(ValueError, match=several):
        Head.from_checkpoint(tmp_path / "model.pt", classnames=NAMES)
    for name in ("head.weight", "head"):
        head = Head.from_checkpoint(tmp_path / "model.pt", classnames=NAMES, name=name)
        assert torch.equal(head.weight, WEIGHT) and torch.equal(head.bias, BIAS)
    torch.save({"stem.weight": torch.zeros(2, 3, 4, 4), "head.weight": WEIGHT}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"lost: stem.weight \[2, 3, 4, 4\]; name='head.weight' takes the head without"
    ):
        Head.from_checkpoint(tmp_path / "model.pt", classnames=NAMES)


def test_the_logit_scale_of_a_head(tmp_path):
    save_arrays(tmp_path / "unit.npz", weight=WEIGHT)
    assert Head.from_checkpoint(tmp_path / "unit.npz", classnames=NAMES, logit_scale=100.0).logit_scale == 100.0
    save_arrays(tmp_path / "log.npz", weight=WEIGHT, logit_scale=4.6052)
    with pytest.raises(ValueError, match="logit_scale must be given for"):
        Head.from_checkpoint(tmp_path / "log.npz", classnames=NAMES)
    assert Head.from_checkpoint(tmp_path / "log.npz", classnames=NAMES, logit_scale=100.0).logit_scale == 100.0


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"ctx": WEIGHT}, "must hold one head's weight .* got ctx"),
        (
            {"weight": WEIGHT, "fc.weight": WEIGHT},
            r"holds several, got None: (fc.)?weight \[3, 16\], (fc.)?weight \[3, 16\]",
        ),
        (
            {"adapter.fc.0.weight": WEIGHT, "adapter.fc.2.weight": WEIGHT},
            r"several, got None: adapter.fc.0.weight \[3, 16\], adapter.fc.2",
        ),
        ({"weight": WEIGHT[0]}, r"weight must have shape \[C, D\], got \[16\]"),
        ({"weight": WEIGHT.long()}, "weight must be floating point"),
        ({"weight": WEIGHT, "bias": BIAS[:2]}, r"bias must have shape \[C\] = \[3\], got \[2\]"),
        ({"weight": WEIGHT, "scale": BIAS}, "scale must be a number"),
        ({"weight": WEIGHT, "classes_": torch.arange(2)}, "as many as the 3 rows of the weight, got 2"),
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


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
@pytest.mark.parametrize("key", ["fc.weight", "out"])
def test_a_transposed_weight_is_turned_where_bias_or_names_say_so(tmp_path, suffix, key):
    bias_key = "fc.bias" if key == "fc.weight" else "offset"
    save_arrays(tmp_path / f"a{suffix}", **{key: WEIGHT.T, bias_key: BIAS})
    head = Head.from_checkpoint(tmp_path / f"a{suffix}", classnames=NAMES)
    assert torch.equal(head.weight, WEIGHT) and torch.equal(head.bias, BIAS)
    save_arrays(tmp_path / f"b{suffix}", **{key: WEIGHT.T, "classes_": torch.arange(CLASSES)})
    assert torch.equal(Head.from_checkpoint(tmp_path / f"b{suffix}", classnames=NAMES).weight, WEIGHT)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (WEIGHT, r"classnames must be given for a head .*: context vectors .* tensor \[3, 16\] .* {'ctx': tensor}"),
        ({"net": {"learner": {"ctx": WEIGHT}}}, "got net.learner.ctx: .* --only net.learner` takes them out"),
        ({"own.learner.ctx": WEIGHT}, "got own.learner.ctx: .* --only own.learner` takes them out"),
        ({"state_dict": {"ctx": WEIGHT * float("nan")}}, "ctx must be finite, got 48 NaN"),
        ({"epoch": 3}, "must hold context vectors .* got epoch: nor is it the weight"),
        ({"ctx": WEIGHT[0]}, r"'ctx' .* got ctx \[16\]"),
    ],
)
def test_a_file_that_is_no_solution_is_answered_in_one_sentence(tmp_path, content, said):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said) as refused:
        open_solution(tmp_path / "a.pt")
    assert str(refused.value).count("a.pt") == 1 and str(refused.value).count("must hold") <= 1


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
    with pytest.raises(ValueError, match="must name the labels 0 to 3 of the head, got 3 names"):
        Head.from_sklearn(model, classnames=NAMES)
    with pytest.raises(TypeError, match="model must be fitted .* got LogisticRegression"):
        Head.from_sklearn(linear_model.LogisticRegression(), classnames=NAMES)
    named = linear_model.LogisticRegression().fit(context(3, WIDTH).numpy(), NAMES)
    with pytest.raises(ValueError, match="classnames must be those of the file, got other names: ant, dog"):
        Head.from_sklearn(named, classnames=("dog", "bee", "cat"))


WEIGHTS = ["probe.weight", "0.weight", "_orig_mod.fc.weight", "model.head.weight", "module.net.last.weight", "W", "odd"]


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("wrapped", [(), ("model",), ("state_dict", "model"), ("probe", "inner")])
def test_the_only_weight_of_a_file_is_the_head_whatever_its_name(tmp_path, key, wrapped):
    bias = {"W": "b", "odd": "offset"}.get(key, key.replace("weight", "bias"))
    content = {key: WEIGHT, bias: BIAS}
    for wrapper in wrapped:
        content = {wrapper: content}
    moments = {"state": {0: {"momentum_buffer": WEIGHT}}}
    torch.save({**content, "epoch": 3, "optimizer": moments, "classes": list(NAMES)}, tmp_path / "a.file")
    head = open_solution(tmp_path / "a.file")
    assert torch.equal(head.weight, WEIGHT) and torch.equal(head.bias, BIAS) and head.classnames == NAMES


@pytest.mark.parametrize(
    "about",
    [
        {"classes_": np.array(NAMES, dtype=object)},
        {"classnames": np.array(NAMES, dtype=object)},
        {"classes": np.array(NAMES)},
        {"class_names": list(NAMES)},
        {"class_to_idx": {name: i for i, name in enumerate(NAMES)}},
    ],
    ids=lambda about: f"{next(iter(about))} {type(next(iter(about.values()))).__name__}",
)
def test_names_in_a_file_are_those_of_its_rows(tmp_path, about):
    """Object arrays are pickles: in a .npz file, in a pickle and in a file of torch.save."""
    content = {"weight": WEIGHT.numpy(), **about}
    (tmp_path / "pickle").write_bytes(pickle.dumps(content))
    names = ["pickle"]
    if not any(isinstance(value, dict) for value in about.values()):
        np.savez((tmp_path / "npz").open("wb"), **content)
        names.append("npz")
    if not any(isinstance(value, np.ndarray) for value in about.values()):
        torch.save(content | {"weight": WEIGHT}, tmp_path / "torch")
        names.append("torch")
    for name in names:
        head = open_solution(tmp_path / name)
        assert torch.equal(head.weight, WEIGHT) and head.classnames == NAMES, name


@pytest.mark.parametrize("ending", [".pt", ".npz", ".safetensors", ".pkl", ".joblib", ".bin", ""])
@pytest.mark.parametrize("content", [".pt", ".npz", ".safetensors"])
def test_the_ending_does_not_decide_what_a_file_is(tmp_path, ending, content):
    save_arrays(tmp_path / f"head{content}", weight=WEIGHT, bias=BIAS)
    file = (tmp_path / f"head{content}").rename(tmp_path / f"renamed{ending}")
    head = open_solution(file, classnames=NAMES)
    assert torch.equal(head.weight, WEIGHT) and torch.equal(head.bias, BIAS)


def test_a_name_chooses_among_several_weights(tmp_path):
    torch.save({"model": {"a.weight": WEIGHT, "b.weight": -WEIGHT, "b.bias": BIAS}}, tmp_path / "two.pt")
    listed = r"holds several, got None: a.weight \[3, 16\], b.weight \[3, 16\]"
    with pytest.raises(ValueError, match=listed):
        open_solution(tmp_path / "two.pt", classnames=NAMES)
    for name in ("b", "b.weight", "model.b.weight"):
        head = open_solution(tmp_path / "two.pt", classnames=NAMES, name=name)
        assert torch.equal(head.weight, -WEIGHT) and torch.equal(head.bias, BIAS)
    with pytest.raises(ValueError, match=r"must hold the weight 'c', got a.weight \[3, 16\], b.weight"):
        open_solution(tmp_path / "two.pt", classnames=NAMES, name="c")
    Head(WEIGHT, NAMES).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="name must be None for a solution that mergetune saved, got 'a'"):
        open_solution(tmp_path / "saved", name="a")
