"""The modules of a tower, called with the weights and hooks of an edit, for many settings at once.

Tokens keep a leading 1 up to the first module that differs between settings, so shared work is done once. The modules
are private copies that share the model's tensors, so the model never changes. Results are differentiable any number of
times.

Shapes: M settings computed together, m = M or 1 (shared by all settings), B images or texts, L tokens, W width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from open_clip.transformer import LayerNorm, LayerNormFp32, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergetune.clip.backbone import FrozenClip
from mergetune.clip.edits import TOWERS, Edit, TokenMap
from mergetune.clip.text_tower import checked_model, text_tower

Module = TypeVar("Module", bound=nn.Module)


def check_edit(clip: FrozenClip, edit: Edit) -> None:
    """Check that the CLIP has a parameter or block for each of the edit's weights and hooks.

    Raises:
        ValueError: an unknown parameter or block, a wrong shape, or weights of different numbers of settings.
        TypeError: a hook for a tower that is not made of transformer blocks.
    """
    known = clip.model.state_dict(keep_vars=True) if edit.weights else {}
    settings = 1
    for name, weight in edit.weights.items():
        if name in ("logit_scale", "logit_bias"):
            raise ValueError(f"weights must not hold {name}: give the factor on the logits as the edit's scale")
        if name not in known:
            raise ValueError(f"weights must name parameters of the model {clip.name}, got {name!r}")
        if not known[name].dtype.is_floating_point:
            raise ValueError(f"weights must be of floating point in the model, got {name!r} of {known[name].dtype}")
        if weight.ndim != known[name].ndim + 1 or weight.shape[1:] != known[name].shape or not len(weight):
            expected = ", ".join(map(str, ("M", *known[name].shape)))
            raise ValueError(f"weights[{name!r}] must have shape [{expected}], got {list(weight.shape)}")
        if settings > 1 and len(weight) not in (1, settings):
            raise ValueError(f"weights must all be of {settings} settings or of one, got {len(weight)} for {name!r}")
        settings = max(settings, len(weight))
    for argument in ("before", "beside"):
        for tower, block in getattr(edit, argument):
            if tower not in TOWERS:
                raise ValueError(f"{argument} must name a tower, one of {', '.join(TOWERS)}, got {tower!r}")
            blocks = clip.text.blocks if tower == "text" else vision_transformer(clip, argument).transformer.resblocks
            count = len(blocks)
            if block not in range(count):
                raise ValueError(f"{argument} must name blocks of the {tower} tower, 0 to {count - 1}, got {block!r}")


def vision_transformer(clip: FrozenClip, argument: str) -> VisionTransformer:
    """The image tower as a VisionTransformer; for another tower, a TypeError that names ``argument`` and the tower."""
    visual = clip.model.visual
    if not isinstance(visual, VisionTransformer):
        raise TypeError(
            f"{argument} needs an image tower made of transformer blocks, open_clip's VisionTransformer, got "
            f"{type(visual).__name__}: only its weights can be edited"
        )
    return visual


def block_prefix(clip: FrozenClip, tower: str) -> str:
    """What open_clip's parameter names of a tower's blocks start with, for example "visual.transformer.resblocks.".

    Args:
        clip: the frozen CLIP.
        tower: "text" or "image".

    Raises:
        TypeError: the tower is not made of open_clip's transformer blocks.
    """
    if tower == "image":
        vision_transformer(clip, "an edit of image blocks")
        return "visual.transformer.resblocks."
    whole = text_tower(checked_model(clip.model)) is clip.model
    return f"{'' if whole else 'text.'}transformer.resblocks."


# -- one part of a tower -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """A module of a tower that is called with the weights of an edit. Make one with :func:`part_of`.

    Attributes:
        module: the module.
        names: one entry per edited parameter: name in open_clip's model, name in the module, dtype.
    """

    module: nn.Module
    names: tuple[tuple[str, str, torch.dtype], ...] = ()

    def __call__(self, edit: Edit, x: Tensor, **options: Any) -> Tensor:
        """Call the module for every setting, [m, B, ...] -> [m, B, ...].

        Args:
            edit: gives the weights.
            x: input, with a leading 1 if all settings share it.
            **options: keyword arguments of the module.

        Raises:
            ValueError: x and the weights have different numbers of settings.
        """
        weights = {own: edit.weights[name].to(dtype) for name, own, dtype in self.names}
        stacked = {own: weight for own, weight in weights.items() if len(weight) > 1}
        same = {own: weight[0] for own, weight in weights.items() if own not in stacked}
        if len(x) > 1 and (other := [len(weight) for weight in stacked.values() if len(weight) != len(x)]):
            raise ValueError(f"an edit must have one number of settings, got hooks of {len(x)}, weights of {other[0]}")

        def call(stacked: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.module, {**same, **stacked}, (x,), options)

        with torch.autocast(x.device.type, enabled=False), _attention(differentiable=bool(stacked)):
            if not stacked:  # equal weights for all settings: one batch
                return call({}, x.flatten(0, 1)).unflatten(0, x.shape[:2])
            shared = len(x) == 1
            return vmap(call, in_dims=(0, None if shared else 0))(stacked, x[0] if shared else x)


def part_of(module: nn.Module, names: Mapping[str, str]) -> Part:
    """A part that takes some parameters of a module from edits.

    Args:
        module: a private copy of a module, see :func:`privately`.
        names: name in open_clip's model -> name in the module, for each parameter that edits replace.
    """
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    return Part(module, tuple((name, own, tensors[own].dtype) for name, own in names.items()))


def privately(module: Module, dtype: torch.dtype | None = None) -> Module:
    """A copy of a frozen module: calls with other weights leave the original unchanged.

    Args:
        module: a module of the model.
        dtype: precision of the copy; None keeps that of the module, which may be mixed.

    Returns:
        A copy that shares the tensors of the module if they have the wanted precision.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if dtype is not None and any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors):
        copied = deepcopy(module).to(dtype)
    else:
        copied = deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for name, part in list(copied.named_modules()):
        if isinstance(part, nn.MultiheadAttention):
            # MultiheadAttention's inference kernel supports neither vmap nor derivatives. Training mode avoids that
            # kernel and, without dropout, gives the same values.
            part.training, part.dropout = True, 0.0
        elif name and isinstance(part, LayerNormFp32) and part.weight.dtype != torch.float32:
            plain = LayerNorm(list(part.normalized_shape), part.eps)  # in the precision of the tower
            plain.weight, plain.bias = part.weight, part.bias
            copied.set_submodule(name, plain)
    return copied


def _attention(*, differentiable: bool) -> Any:
    """Context that selects plain attention, which supports vmap and second derivatives, if one of the two is needed."""
    return sdpa_kernel(SDPBackend.MATH) if differentiable or torch.is_grad_enabled() else nullcontext()


# -- the blocks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Blocks:
    """The transformer blocks of a tower, run with the weights and hooks of an edit.

    Attributes:
        tower: "text" or "image".
        parts: the blocks, in order.
    """

    tower: str
    parts: tuple[Part, ...]

    def __call__(self, edit: Edit, x: Tensor, *, start: int = 0, **options: Any) -> Tensor:
        """The tokens after the last block, [m, B, L, W].

        Args:
            edit: gives the weights and hooks.
            x: tokens that enter block ``start``, [m, B, L, W].
            start: the first block that runs.
            **options: keyword arguments of every block.

        Raises:
            ValueError: a hook returns a tensor of the wrong shape.
        """
        for block, part in enumerate(self.parts[start:], start):
            place = self.tower, block
            if place in edit.before:
                # Only images may gain tokens: a text is pooled at a fixed position.
                x = _hooked("before", place, edit.before[place], x, may_grow=self.tower == "image")
            added = _hooked("beside", place, edit.beside[place], x) if place in edit.beside else None
            x = part(edit, x, **options)
            x = x if added is None else x + added
        return x


def blocks_of(tower: str, blocks: Sequence[nn.Module], edit: Edit, prefix: str) -> Blocks:
    """The blocks of a tower for edits of a form. open_clip names the parameters of block k ``{prefix}{k}.…``."""
    names: list[dict[str, str]] = [{} for _ in blocks]
    for name in edit.weights:
        if (number := block_number(name, prefix)) is not None:
            names[number][name] = name.removeprefix(f"{prefix}{number}.")
    return Blocks(tower, tuple(part_of(block, taken) for block, taken in zip(blocks, names, strict=True)))


def block_number(name: str, prefix: str) -> int | None:
    """Number of the block that a parameter belongs to; None if the parameter belongs to no block."""
    found = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
    return None if found is None else int(found[1])


def _hooked(argument: str, place: tuple[str, int], hook: TokenMap, x: Tensor, *, may_grow: bool = False) -> Tensor:
    found = hook(x)
    m, batch, length, width = x.shape
    fits = found.ndim == 4 and found.shape[1] == batch and found.shape[3] == width and m in (1, len(found))
    if not fits or (found.shape[2] != length and not may_grow):
        expected = f"[{'M' if m == 1 else m}, {batch}, {'L' if may_grow else length}, {width}]"
        raise ValueError(f"{argument}[{place!r}] must give tokens of shape {expected}, got {list(found.shape)}")
    return found.to(x.dtype)


# -- features ----------------------------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; a float64 tensor stays float64."""
    return x if x.dtype == torch.float64 else x.float()
