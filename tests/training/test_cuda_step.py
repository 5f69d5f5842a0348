"""The training step on a GPU, without one: on torch's device "meta", which is not the CPU and computes nothing.

It raises where a value is needed on the host, which on a GPU is a wait and forbids a CUDA graph, and where devices are
mixed. A graph itself is captured only where there is a GPU.
"""

import contextlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from devices import GPU, marked
from objective_cases import objective_of
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from tiny import parameter
from torch import Tensor, nn

from mergetune import FeatureCache, FrozenClip, Head, Prompt, fit, tune
from mergetune.solutions import space_of
from mergetune.training.objective import Objective, path_points

NAMES = ("cat", "hot-air balloon", "dog", "sea lion")
WIDTH, BATCH = 6, 8


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = open_clip.CLIP(
            WIDTH,
            CLIPVisionCfg(layers=1, width=8, patch_size=8, image_size=8, head_width=8),
            CLIPTextCfg(context_length=16, vocab_size=49408, width=16, heads=2, layers=2),
        )
    return FrozenClip(model, open_clip.get_tokenizer("ViT-B-16"), "tiny")


def there(value: Any) -> Any:
    """A copy with every tensor in it on the other device."""
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, nn.Module):
        return deepcopy(value).to("meta")
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: there(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(there(item) for item in value)
    return value


def objective(
    clip: FrozenClip, kind: str, surrogate: str, space: str, place: Callable[[Any], Any] = lambda value: value
) -> tuple[Objective, Tensor]:
    """An objective of context vectors or of class rows, with all that it holds at a place, and values for them."""
    solution = Prompt.from_template(clip) if kind == "prompt" else Head.zero_shot(clip, NAMES, bias=True)
    values = parameter(solution)
    encode = space_of(clip, solution, NAMES).encoder if kind == "prompt" else nn.Identity()
    anchors = torch.stack([values + 0.1, values - 0.2])
    weights = encode(anchors).detach()
    found = objective_of(
        place(encode),
        scale=100.0,
        normalize=solution.normalize,
        anchors=place(weights if space == "embedding" else anchors),
        betas=place(torch.tensor([0.5, 1.0])),
        alphas=place(path_points("even", 3)),
        points=3,
        space=space,
        w1=place(weights[0] + 0.1),
        lam=8.0,
        surrogate=surrogate,
        curvature=place(torch.ones_like(weights[0])) if surrogate == "fisher" else None,
    )
    return found, values


def step(found: Objective, values: Tensor, *batch: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from mergetune.training.loop import _gradients

    x, labels, known = batch
    loss, terms, (gradient,) = _gradients([found], [{"values": values}], [(x, labels, None, known)])[0]
    return loss, terms, gradient


@pytest.mark.parametrize("kind", ["prompt", "head"])
@pytest.mark.parametrize("surrogate", ["identity", "fisher", "cosine", "l2"])
@pytest.mark.parametrize("space", ["embedding", "parameter"])
def test_a_step_stays_on_the_device(
    clip: FrozenClip, kind: str, surrogate: str, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    for module in ("arguments", "attention"):  # the ops refuse "meta" everywhere else
        monkeypatch.setattr(f"mergetune.ops.{module}.expect_numbers", lambda *_: None)
    found, values = objective(clip, kind, surrogate, space)
    x = F.normalize(torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels, known = torch.arange(BATCH) % len(NAMES), found.anchor_products(x)
    moved, _ = objective(clip, kind, surrogate, space, there)
    loss, terms, gradient = step(moved, there(values).requires_grad_(), *map(there, (x, labels, known)))
    assert {t.device.type for t in (loss, terms, gradient)} == {"meta"}
    assert gradient.shape == values.shape and terms.shape == (4,)


def _flat_gradients(found: Objective, values: Tensor, batches) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The loop's gradients of one run, its only gradient beside loss and terms."""
    return [step(found, values, x, labels, known) for x, labels, _, known in batches]


def test_the_check_sees_a_wait_and_a_mixture() -> None:
    elsewhere = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        elsewhere.sum().item()
    with pytest.raises(RuntimeError, match="device"):
        elsewhere + torch.ones(3)
    with pytest.raises(NotImplementedError, match="meta"):
        elsewhere.nonzero()


def test_a_captured_step_is_the_same_step(clip: FrozenClip, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for streams and graphs: the graph runs the step again on its own buffers."""
    from mergetune.training.loop import _capture

    found, values = objective(clip, "prompt", "identity", "embedding")
    leaf = values.clone().requires_grad_()
    gradients = partial(_flat_gradients, found, leaf)

    class Stream:
        wait_stream = staticmethod(lambda other: None)

    class Graph:
        def replay(self) -> None:
            for place, value in zip(results[0], gradients(buffers[0])[0], strict=True):
                place.copy_(value)

    buffers, results = [], []

    def recorded(batches):
        buffers[:], results[:] = [batches], [tuple(t.clone() for t in gradients(batches)[0])]
        return results

    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def batch(seed: int) -> tuple[Tensor, Tensor, None, Tensor]:
        x = F.normalize(torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)
        return x, (torch.arange(BATCH) + seed) % len(NAMES), None, found.anchor_products(x)

    first = batch(0)
    kept = [None if t is None else t.clone() for t in first]
    replay = _capture(recorded, [first])
    for seed in (0, 1, 2):
        (expected,) = gradients([batch(seed)])
        for ours, true in zip(replay([batch(seed)])[0], expected, strict=True):
            assert torch.equal(ours, true)
    same = [a is b is None or torch.equal(a, b) for a, b in zip(first, kept, strict=True)]
    assert all(same)  # the caller's batch is not written to


def test_a_graph_is_refused_where_there_is_no_gpu(clip: FrozenClip) -> None:
    x = F.normalize(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = FeatureCache.from_tensors(x, torch.arange(8) % 4, NAMES)
    with pytest.raises(
        ValueError, match="cuda_graph must be False unless the CLIP is on a CUDA device, got a CLIP on cpu"
    ):
        tune(clip, features, cuda_graph=True)
    with pytest.raises(
        ValueError, match="cuda_graph must be False unless the CLIP is on a CUDA device, got a CLIP on cpu"
    ):
        fit(clip, features, Prompt.from_template(clip), cuda_graph=True)


@marked(GPU)
@pytest.mark.parametrize("surrogate", ["identity", "l2"])
def test_a_run_with_a_graph_is_the_run_without(clip: FrozenClip, surrogate: str) -> None:
    on_gpu = replace(clip, model=deepcopy(clip.model).cuda())
    x = F.normalize(torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = FeatureCache.from_tensors(x, torch.arange(32) % 4, NAMES)
    settings = {"epochs": 4, "batch_size": 8, "surrogate": surrogate, "precision": "float32", "progress": False}
    runs = [
        fit(on_gpu, features, Prompt.from_template(on_gpu), cuda_graph=graph, **settings) for graph in (False, True)
    ]
    torch.testing.assert_close(runs[0].solution.ctx, runs[1].solution.ctx)
