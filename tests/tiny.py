"""A CLIP so small that it trains in seconds; solutions and cached features for it; all the same every time."""

from __future__ import annotations

import functools

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergetune import FeatureCache, FrozenClip, Head, Prompt
from mergetune.solutions import Solution, space_of

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
SIGLIP = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
NAMES = ("cat", "fire truck", "dog")


def tiny_model(kind: type = open_clip.CLIP, text: dict = TEXT, *, dim: int = 8, seed: int = 0) -> nn.Module:
    """An open_clip model of one of its classes, whose words matter."""
    torch.manual_seed(seed)
    model = kind(dim, VISION, text)
    with torch.no_grad():
        getattr(model, "text", model).token_embedding.weight.mul_(10)
    return model


@functools.cache
def tiny_clip(seed: int = 0, *, siglip: bool = False, width: int = 16, dim: int = 8) -> FrozenClip:
    """One for all tests of a process; with a linear projection and no causal mask, as SigLIP's."""
    kind, text = (open_clip.CustomTextCLIP, SIGLIP) if siglip else (open_clip.CLIP, TEXT)
    model = tiny_model(kind, {**text, "width": width}, dim=dim, seed=seed)
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=TEXT["context_length"]), f"tiny-{seed}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cache(count: int = 30, *, seed: int = 0, views: int = 1, classes=NAMES, dim: int = 8, **kwargs) -> FeatureCache:
    """Random features of images whose labels go round the classes."""
    x = F.normalize(normal(views, count, dim, seed=seed), dim=-1)
    return FeatureCache.from_tensors(x, torch.arange(count) % len(classes), classes, **kwargs)


def parameter(solution: Solution) -> Tensor:
    """A solution's only tensor; of a head with a bias its rows with the bias behind them."""
    first, *rest = solution.state().values()
    return torch.cat([first, *(bias[:, None] for bias in rest)], 1) if rest else first


def state_of(solution: Solution, values: Tensor) -> dict[str, Tensor]:
    """The state that :func:`parameter` gives ``values`` of, with their leading dimensions."""
    names = list(solution.state())
    return {names[0]: values} if len(names) == 1 else {"weight": values[..., :-1], "bias": values[..., -1]}


def with_parameter(solution: Solution, values: Tensor, **changes) -> Solution:
    return solution.with_state(state_of(solution, values), **changes)


def encoder(clip: FrozenClip, solution: Solution, classnames=NAMES, **precision):
    """Stacked values of :func:`parameter` -> class features."""
    space = space_of(clip, solution, classnames, **precision)
    return lambda values: space.classes(state_of(solution, values))


def prompt(seed: int = 1, template: str = "X X X X {}.") -> Prompt:
    return Prompt(0.3 * normal(4, 16, seed=seed), template)


def head(seed: int = 1, bias: bool = True, scale: float = 10.0) -> Head:
    return Head(normal(3, 8, seed=seed), NAMES, normal(3, seed=seed + 9) if bias else None, logit_scale=scale)
