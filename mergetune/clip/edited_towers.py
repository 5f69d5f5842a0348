"""Parts of a tower run with the weights and hooks of an edit: any number of settings, any number of derivatives.

Tokens have a leading 1 until the first part that differs between the settings, so that nothing is computed M times
without need. Plain modules of the model are called; the model itself is never changed.

Shapes: M settings computed together, m = M or 1 (the same for all settings), B images or texts, L tokens, W width.
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

Module = TypeVar("Module", bound=nn.Module)


def check_edit(clip: FrozenClip, edit: Edit) -> None:
    """Refuse weights and hooks that the CLIP has no place for.

    Raises:
        ValueError: an unknown parameter or block, a shape that differs, different numbers of settings.
        TypeError: hooks in a tower that is not made of transformer blocks.
    """
    known = clip.model.state_dict(keep_vars=True) if edit.weights else {}
    settings = 1
    for name, weight in edit.weights.items():
        if name in ("logit_scale", "logit_bias"):
            raise ValueError(f"weights must not hold {name}: the factor on the logits is the edit's scale")
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
                raise ValueError(
                    f"{argument} must name blocks of the {tower} tower, which are 0 to {count - 1}, got {block!r}"
                )


def vision_transformer(clip: FrozenClip, argument: str) -> VisionTransformer:
    """The image tower; one that is not made of transformer blocks is refused by name, as is the argument that asks."""
    visual = clip.model.visual
    if not isinstance(visual, VisionTransformer):
        raise TypeError(
            f"{argument} needs an image tower made of transformer blocks, open_clip's VisionTransformer, got "
            f"{type(visual).__name__}: only its weights can be edited"
        )
    return visual


# -- one part of a tower -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a tower that is called with the weights of an edit. Make one with :func:`part_of`.

    Attributes:
        module: the part.
        names: for each edited weight of the part: open_clip's name, the module's name, the precision.
    """

    module: nn.Module
    names: tuple[tuple[str, str, torch.dtype], ...] = ()

    def __call__(self, edit: Edit, x: Tensor, **options: Any) -> Tensor:
        """The part's result for every setting, [m, B, ...] -> [m, B, ...]; the options are those of the module.

        Raises:
            ValueError: a leading size that is not that of the weights.
        """
        weights = {own: edit.weights[name].to(dtype) for name, own, dtype in self.names}
        stacked = {own: weight for own, weight in weights.items() if len(weight) > 1}
        same = {own: weight[0] for own, weight in weights.items() if own not in stacked}
        if len(x) > 1 and (other := [len(weight) for weight in stacked.values() if len(weight) != len(x)]):
            raise ValueError(f"an edit must be of one number of settings, got hooks of {len(x)}, weights of {other[0]}")

        def call(stacked: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.module, {**same, **stacked}, (x,), options)

        with torch.autocast(x.device.type, enabled=False), _attention(differentiable=bool(stacked)):
            if not stacked:  # settings that have the same weights are one batch
                return call({}, x.flatten(0, 1)).unflatten(0, x.shape[:2])
            shared = len(x) == 1
            return vmap(call, in_dims=(0, None if shared else 0))(stacked, x[0] if shared else x)


def part_of(module: nn.Module, names: Mapping[str, str]) -> Part:
    """A part that takes tensors from edits.

    Args:
        module: a module of the model, see :func:`privately`.
        names: open_clip's name -> the module's name, of the tensors that the part takes.
    """
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    return Part(module, tuple((name, own, tensors[own].dtype) for name, own in names.items()))


def privately(module: Module, dtype: torch.dtype | None = None) -> Module:
    """A copy of a frozen module: a call with other weights changes no one else's module.

    Args:
        module: a module of the model.
        dtype: precision of the copy; None is the module's own, as the model's mixed precision has it.

    Returns:
        A copy that shares the tensors, unless they have another precision.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if dtype is not None and any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors):
        copied = deepcopy(module).to(dtype)
    else:
        copied = deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for name, part in list(copied.named_modules()):
        if isinstance(part, nn.MultiheadAttention):
            # Its kernel for inference knows no vmap and has no derivative. In training mode it is not taken, and
            # without dropout nothing else is different.
            part.training, part.dropout = True, 0.0
        elif name and isinstance(part, LayerNormFp32) and part.weight.dtype != torch.float32:
            plain = LayerNorm(list(part.normalized_shape), part.eps)  # in the precision of the tower
            plain.weight, plain.bias = part.weight, part.bias
            copied.set_submodule(name, plain)
    return copied


def _attention(*, differentiable: bool) -> Any:
    """The attention that can be differentiated twice and runs under vmap; where neither is needed, torch's choice."""
    return sdpa_kernel(SDPBackend.MATH) if differentiable or torch.is_grad_enabled() else nullcontext()


# -- the blocks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a tower with the weights and hooks of an edit.

    Attributes:
        tower: "text" or "image".
        parts: the blocks.
    """

    tower: str
    parts: tuple[Part, ...]

    def __call__(self, edit: Edit, x: Tensor, *, start: int = 0, **options: Any) -> Tensor:
        """The tokens after the last block.

        Args:
            edit: an edit of the form.
            x: tokens that enter the block ``start``, [m, B, L, W].
            start: the first block that is run.
            **options: of every block.

        Raises:
            ValueError: a hook whose result has another shape than it must have.
        """
        for block, part in enumerate(self.parts[start:], start):
            place = self.tower, block
            if place in edit.before:
                # The pooled token of a text has its place; images may get tokens.
                x = _hooked("before", place, edit.before[place], x, may_grow=self.tower == "image")
            added = _hooked("beside", place, edit.beside[place], x) if place in edit.beside else None
            x = part(edit, x, **options)
            x = x if added is None else x + added
        return x


def blocks_of(tower: str, blocks: Sequence[nn.Module], edit: Edit, prefix: str) -> Blocks:
    """The blocks of a tower, see :func:`privately`; open_clip keeps their tensors under ``prefix`` and their number."""
    names: list[dict[str, str]] = [{} for _ in blocks]
    for name in edit.weights:
        if (number := block_number(name, prefix)) is not None:
            names[number][name] = name.removeprefix(f"{prefix}{number}.")
    return Blocks(tower, tuple(part_of(block, taken) for block, taken in zip(blocks, names, strict=True)))


def block_number(name: str, prefix: str) -> int | None:
    """The block that a tensor belongs to; None if it belongs to none."""
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
    """The values in float32, or in float64 where they have it."""
    return x if x.dtype == torch.float64 else x.float()
