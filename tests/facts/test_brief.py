"""The repr of every public object: one short line with the name of the class and its facts, and no tensors."""

import dataclasses
import importlib
import inspect

import pytest
import torch
from safetensors.torch import save_file
from tiny import NAMES, cache, normal, prompt, tiny_clip

import mergetune
from mergetune import FeatureCache, FitResult, Head, ImageList, LinearMap, LoRA, Residual, Stack, Templates
from mergetune.evaluation import BaseNovel, Path, Report
from mergetune.evaluation.planes import Plane
from mergetune.evaluation.spectra import Spectrum
from mergetune.experiments.comparison_tables import Comparison
from mergetune.experiments.icons import DemoResult
from mergetune.merging import Constant, TensorFile

PACKAGES = ("clip", "data", "ops", "merging", "solutions", "evaluation", "experiments", "training")
RETURNED = (Plane, Spectrum, Comparison, DemoResult)  # what public functions return, besides public classes


def public_classes() -> list[type]:
    rooms = [mergetune, *(importlib.import_module(f"mergetune.{name}") for name in PACKAGES)]
    found = {value for room in rooms for name in room.__all__ if inspect.isclass(value := getattr(room, name))}
    plain = {c for c in found if dataclasses.is_dataclass(c) or hasattr(c, "model_fields")}
    return sorted({*plain, *RETURNED}, key=lambda c: (c.__module__, c.__name__))


UNFRIENDLY = (
    {f"name {i}": normal(4) for i in range(1000)}, "long text\n" * 1000, [["nested"] * 100] * 100, normal(30, 40),
    tuple(map(float, range(1000))), torch.nn.Linear(3, 4), cache, {"a": {"b": ["c" * 1000]}}, tiny_clip(),
)  # fmt: skip
"""Values that must not be printed as a whole."""


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("first", range(3))
def test_every_public_object_has_a_short_repr(cls, first):
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(cls.model_fields)
    values = {name: UNFRIENDLY[(first + number) % len(UNFRIENDLY)] for number, name in enumerate(names)}
    if dataclasses.is_dataclass(cls):
        made = object.__new__(cls)  # whatever its fields hold
        for name, value in values.items():
            object.__setattr__(made, name, value)
    else:
        made = cls.model_construct(**values)
    shown = repr(made)
    assert shown.startswith(f"{cls.__name__}(") and shown.endswith(")")
    assert len(shown) <= 400 and "\n" not in shown and "tensor(" not in shown
    assert repr(object.__new__(cls)).startswith(f"{cls.__name__}(")  # not finished: in a debugger


def examples():
    head = Head(normal(3, 8), NAMES, logit_scale=12.5, backbone="tiny-0")
    report = Report(75.5, {f"class {i}": 50.0 + i for i in range(60)}, 1000)
    state = {"w": normal(2, 2), "b": normal(2)}
    return {
        "FrozenClip(name='tiny-0', model=CLIP, embed_dim=8, device=cpu, takes_prompts=True)": tiny_clip(),
        "Head(weight=float32 [3, 8], bias=None, classnames=['cat', 'fire truck', 'dog'], logit_scale=12.5, "
        "normalize=False, backbone='tiny-0', notes={})": head,
        "classnames=[100: 'a0', 'a1', 'a2', ...]": Head(normal(100, 8), tuple(f"a{i}" for i in range(100))),
        "Prompt(ctx=float32 [4, 16], template=": prompt(1),
        "Residual(rows=float32 [3, 8], classnames=['cat',": Residual(normal(3, 8), NAMES),
        "LinearMap(matrix=float32 [8, 8], ": LinearMap(torch.eye(8)),
        "LoRA(templates=['a photo of a {}.'], backbone=None, notes={}, rank=2, places=1)": LoRA(
            {"text.0.q.A": normal(2, 16), "text.0.q.B": normal(16, 2)}, {"text.0.q": 1.0}
        ),
        "Templates(texts=['a photo of a {}.', 'a {}'], ": Templates(("a photo of a {}.", "a {}")),
        "Stack(parts=[Templates(": Stack(Templates(("a {}",)), Residual(normal(3, 8), NAMES)),
        "FitResult(solution=Head, settings={lam: 8}, timings={}, epochs=2, last={loss: 0.5})": FitResult(
            head, ({"loss": 1.0}, {"loss": 0.5}), {"lam": 8}, {}
        ),
        "dim=8, dtype='float32', views=1, skipped={}, images=30)": cache(),
        "FeatureCache(path=None, classnames=['cat', 'dog'], dim=4": FeatureCache.from_tensors(
            torch.eye(4), [0, 1, 0, 1], ["cat", "dog"]
        ),
        "ImageList(root='/photos', files=['a.png'], classnames=['cat'])": ImageList(
            root="/photos", files=("a.png",), labels=(0,), classnames=("cat",)
        ),
        "Report(accuracy=75.5, images=1000, per_class={60: class 0: 50, class 1: 51, class 2: 52, ...})": report,
        "BaseNovel(base=Report": BaseNovel(report, report),
        "Path(loss=[1, 2.5, 2], accuracy=[60, 40, 50], barrier=1)": Path(
            (0.0, 0.5, 1.0), (1.0, 2.5, 2.0), (60, 40, 50)
        ),
        "Constant(value=1, tensors=2)": Constant(state, 1.0),
    }


def test_a_repr_names_what_a_user_wants_to_know(tmp_path):
    for wanted, made in examples().items():
        assert wanted in repr(made), repr(made)
    save_file({"w": normal(2)}, tmp_path / "w.safetensors")
    assert repr(TensorFile(tmp_path / "w.safetensors")).endswith("w.safetensors', tensors=1)")
