"""Image features of an edited CLIP, computed from pixels, cached tokens or cached features.

Shapes: M settings computed together (1 if images do not depend on the setting), B images, L tokens, W width of the
image tower, D embedding width, D' width after the image maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mergetune.clip.backbone import FrozenClip
from mergetune.clip.edited_towers import (
    Part,
    at_least_float32,
    block_number,
    blocks_of,
    check_edit,
    part_of,
    privately,
    vision_transformer,
)
from mergetune.clip.edits import Edit
from mergetune.clip.text_tower import pooled
from mergetune.facts.brief import brief

BLOCKS = "visual.transformer.resblocks."
STEM = ("conv1", "class_embedding", "positional_embedding", "ln_pre")  # the modules that turn pixels into tokens
FEATURES = ("feature", "raw feature")

ImageFeatures = Callable[[Edit, Tensor], Tensor]
"""Function of an edit and the inputs of B images that returns unit-norm image features, [M, B, D']."""


@brief()
@dataclass(frozen=True)
class TokensBefore:
    """Image input: the tokens that enter one block of the frozen image tower, [B, L, W].

    A solution that changes only the blocks from ``block`` on can be trained on these cached tokens.

    Attributes:
        block: number of the block, from 0.
    """

    block: int


ImageInput = str | TokensBefore
"""The form of the images that image features are computed from; cached or read once per image.

- "feature": unit-norm features, [B, D];
- "raw feature": the tower's output, not normalised, [B, D];
- "pre-projection": the pooled rows that enter the projection of a VisionTransformer, [B, W];
- ``TokensBefore(k)``: the tokens that enter block k, [B, L, W];
- "pixels": preprocessed images, [B, 3, H, W].
"""


def earliest_input(inputs: Iterable[ImageInput]) -> ImageInput:
    """The image input that stands earliest in the image tower; the other inputs can be computed from it.

    Example:
        >>> from mergetune.clip import TokensBefore, earliest_input
        >>> earliest_input(["feature", TokensBefore(6), TokensBefore(4)])
        TokensBefore(block=4)
    """
    late = ("pre-projection", *reversed(FEATURES))

    def order(image_input: ImageInput) -> tuple[int, int]:
        if isinstance(image_input, TokensBefore):
            return 0, image_input.block
        return (1, late.index(image_input)) if image_input in late else (0, -1)

    return min(inputs, key=order)


def prepare_images(
    clip: FrozenClip, edit: Edit, image_input: ImageInput, *, precision: torch.dtype | None = None
) -> ImageFeatures | None:
    """Make a function for the image features of edits of the form of ``edit``: the same names and hooks, any tensors.

    Args:
        clip: the frozen CLIP.
        edit: one edit of the form.
        image_input: the form in which images are given.
        precision: precision of the image tower; None keeps that of the model.

    Returns:
        A function of an edit and image inputs, differentiable any number of times. None if the inputs are the image
        features already: unit-norm features, and an edit that changes no image features.

    Raises:
        ValueError: the CLIP has no parameter or block of a name in the edit; ``image_input`` stands behind something
            that the edit changes.
        TypeError: this kind of image tower has no such hooks or input.

    Example:
        >>> import mergetune as mt, torch
        >>> from mergetune.clip import Edit, prepare_images
        >>> clip = mt.load_clip("icon-clip")
        >>> edit = Edit(image_maps=(lambda x: x @ torch.eye(128),))
        >>> prepare_images(clip, edit, "feature")(edit, torch.ones(5, 128)).shape  # [M, B, D]
        torch.Size([1, 5, 128])
    """
    check_edit(clip, edit)
    if image_input == "feature":
        if edit.raw_image_map:
            raise ValueError(
                "image_input must be 'raw feature' or earlier for an image map of raw features, got 'feature'"
            )
        if not edit.image_maps and not edit.touches("image"):
            return None
    tower = _tower(clip, edit, image_input, precision)
    map_raw = edit.raw_image_map and bool(edit.image_maps)

    def features(edit: Edit, images: Tensor) -> Tensor:
        x = tower(edit, images[None])
        if image_input != "feature":
            x = at_least_float32(x) if map_raw else _unit(x)
        for i, image_map in enumerate(edit.image_maps):
            found = image_map(x)
            if found.ndim != 3 or found.shape[1] != x.shape[1] or len(x) not in (1, len(found)):
                expected = f"[{'M' if len(x) == 1 else len(x)}, {x.shape[1]}, D]"
                raise ValueError(f"image_maps[{i}] must give features of shape {expected}, got {list(found.shape)}")
            x = _unit(found)
        return x

    return features


@torch.no_grad()
def image_tokens(clip: FrozenClip, pixels: Tensor, block: int) -> Tensor:
    """The tokens that enter a block of the frozen image tower, for the image input ``TokensBefore(block)``.

    Args:
        clip: a CLIP with open_clip's VisionTransformer.
        pixels: preprocessed images, [B, 3, H, W].
        block: number of the block, from 0.

    Returns:
        Tokens, [B, L, W], in the tower's precision.

    Raises:
        ValueError: the tower has no such block.
        TypeError: the image tower is not a VisionTransformer.
    """
    visual = vision_transformer(clip, "image_tokens")
    _check_block(block, len(visual.transformer.resblocks))
    x = _embed(visual, pixels.to(clip.device))
    for one in visual.transformer.resblocks[:block]:
        x = one(x)
    return x


# -- the tower, from an image input to features ------------------------------------------------------------------------

Tower = Callable[[Edit, Tensor], Tensor]
"""Function of an edit and image inputs [1, B, ...] that returns the tower's output, [M, B, D]."""


def _tower(clip: FrozenClip, edit: Edit, image_input: ImageInput, precision: torch.dtype | None) -> Tower:
    visual = cast(nn.Module, clip.model.visual)
    names = {name: f"owner.{name.removeprefix('visual.')}" for name in edit.weights if name.startswith("visual.")}
    if isinstance(visual, VisionTransformer):
        if image_input in FEATURES and not edit.touches("image"):
            return lambda edit, x: x
        return _transformer(privately(visual, precision), edit, image_input, names)
    if image_input == "pixels":
        return part_of(_Function(privately(visual, precision), _encode), names)
    if image_input not in FEATURES:
        raise TypeError(
            f"image_input must be 'pixels' or {' or '.join(map(repr, FEATURES))} for the image tower "
            f"{type(visual).__name__}, got {image_input!r}"
        )
    if names:
        raise _too_late(image_input, next(iter(names)))
    return lambda edit, x: x


def _transformer(visual: VisionTransformer, edit: Edit, image_input: ImageInput, names: dict[str, str]) -> Tower:
    """Tower of a VisionTransformer of K blocks. Places: -1 the stem, k block k, K the pooling, K + 1 the projection."""
    count = len(visual.transformer.resblocks)
    start = _start(image_input, count)
    place = {name: _place(name, count) for name in names}
    changed = {
        **place,
        **{f"block {block}": block for tower, block in (*edit.before, *edit.beside) if tower == "image"},
    }
    for what, position in changed.items():
        if position < start:
            raise _too_late(image_input, what)

    def part(position: int, function: Callable[[Any, Tensor], Tensor]) -> Part:
        taken = {name: own for name, own in names.items() if place[name] == position}
        return part_of(_Function(visual, function), taken)

    embed, pool, project = part(-1, _embed), part(count, _pool), part(count + 1, _project)
    dtype = visual.conv1.weight.dtype
    blocks = blocks_of("image", tuple(visual.transformer.resblocks), edit, BLOCKS)

    def tower(edit: Edit, x: Tensor) -> Tensor:
        if start > count + 1:
            return x
        x = embed(edit, x) if start < 0 else x.to(dtype)
        if start < count:
            x = pool(edit, blocks(edit, x, start=max(start, 0)))
        return project(edit, x)

    return tower


def _start(image_input: ImageInput, count: int) -> int:
    """Place of the first part that runs on this image input."""
    if isinstance(image_input, TokensBefore):
        _check_block(image_input.block, count)
        return image_input.block
    places = {"pixels": -1, "pre-projection": count + 1} | dict.fromkeys(FEATURES, count + 2)
    if image_input not in places:
        raise ValueError(
            f"image_input must be one of {', '.join(map(repr, places))} or TokensBefore(block), got {image_input!r}"
        )
    return places[image_input]


def _place(name: str, count: int) -> int:
    """Place of the part that a parameter belongs to."""
    block, part = block_number(name, BLOCKS), name.split(".")[1]
    return block if block is not None else -1 if part in STEM else count + 1 if part == "proj" else count


def _check_block(block: int, count: int) -> None:
    if block not in range(count):
        raise ValueError(f"block must be one of the image tower's blocks, 0 to {count - 1}, got {block!r}")


def _too_late(image_input: ImageInput, what: str) -> ValueError:
    return ValueError(
        f"image_input must come before what the edit changes in the image tower ({what}), got {image_input!r}: take "
        "'pixels', or TokensBefore(k) with a block k that is not behind it"
    )


# -- the parts of the tower --------------------------------------------------------------------------------------------


class _Function(nn.Module):
    """A function of a module, wrapped as a module: ``functional_call`` replaces the weights of modules only."""

    def __init__(self, owner: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.owner, x)


def _encode(visual: nn.Module, pixels: Tensor) -> Tensor:
    # The weight with the most dimensions is the convolution that takes the pixels. Other parameters may have another
    # dtype: in open_clip's mixed precision, those before the convolution are float32.
    return pooled(visual(pixels.to(max(visual.parameters(), key=Tensor.dim).dtype)))


def _embed(visual: VisionTransformer, pixels: Tensor) -> Tensor:
    return visual._embeds(pixels.to(visual.conv1.weight.dtype))


def _pool(visual: VisionTransformer, tokens: Tensor) -> Tensor:
    return visual._pool(tokens)[0]


def _project(visual: VisionTransformer, rows: Tensor) -> Tensor:
    return rows if visual.proj is None else rows @ visual.proj


def _unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x), dim=-1)
