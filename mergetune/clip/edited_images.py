"""Image features of an edited CLIP, from pixels, from cached tokens, or from cached features.

Shapes: M settings computed together (1 where images do not depend on the setting), B images, L tokens, W width of the
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

BLOCKS = "visual.transformer.resblocks."
STEM = ("conv1", "class_embedding", "positional_embedding", "ln_pre")  # what makes tokens of pixels
FEATURES = ("feature", "raw feature")

ImageFeatures = Callable[[Edit, Tensor], Tensor]
"""An edit and what is read of B images -> their features [M, B, D'], unit norm."""


@dataclass(frozen=True)
class TokensBefore:
    """What is read of an image: the tokens that enter a block of the frozen image tower, [B, L, W].

    Attributes:
        block: its number, from 0.
    """

    block: int


ImageInput = str | TokensBefore
"""What is read of images, of which features are made.

- "feature": unit norm features, [B, D];
- "raw feature": features as they leave the tower, [B, D];
- "pre-projection": the pooled rows that enter a VisionTransformer's projection, [B, W];
- ``TokensBefore(k)``: tokens that enter block k, [B, L, W];
- "pixels": [B, 3, H, W].
"""


def earliest_input(inputs: Iterable[ImageInput]) -> ImageInput:
    """The earliest of what is read of images: the others are made of it.

    Example:
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
    """A function for the image features of edits that have the form of ``edit``: same names and hooks, other tensors.

    Args:
        clip: the frozen CLIP.
        edit: an edit of the form.
        image_input: what is read of each image.
        precision: of the image tower; None is the model's own.

    Returns:
        A function of an edit and what is read of the images, differentiable any number of times. None where unit norm
        features are read and the edit has no image maps: these are the image features already.

    Raises:
        ValueError: weights or hooks that the CLIP has no place for; an input that lies behind what the edit changes.
        TypeError: hooks, or an input, that this kind of image tower does not have.
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
    """The tokens that enter a block of the frozen image tower: what ``TokensBefore(block)`` reads.

    Args:
        clip: a CLIP with open_clip's VisionTransformer.
        pixels: [B, 3, H, W].
        block: its number, from 0.

    Returns:
        [B, L, W] in the tower's precision.

    Raises:
        ValueError: a block that the tower does not have.
        TypeError: another image tower.
    """
    visual = vision_transformer(clip, "image_tokens")
    _check_block(block, len(visual.transformer.resblocks))
    x = _embed(visual, pixels.to(clip.device))
    for one in visual.transformer.resblocks[:block]:
        x = one(x)
    return x


# -- the tower, from what is read to its features ----------------------------------------------------------------------

Tower = Callable[[Edit, Tensor], Tensor]
"""An edit and what is read of images, [1, B, ...] -> features as they leave the tower, [M, B, D]."""


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
    """Of open_clip's VisionTransformer. Its parts have places: -1 the stem, k the block k, then pooling, projection."""
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
    """The place of the first part that is run."""
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
    """The place of the part that a tensor belongs to."""
    block, part = block_number(name, BLOCKS), name.split(".")[1]
    return block if block is not None else -1 if part in STEM else count + 1 if part == "proj" else count


def _check_block(block: int, count: int) -> None:
    if block not in range(count):
        raise ValueError(f"block must be one of the image tower's, which are 0 to {count - 1}, got {block!r}")


def _too_late(image_input: ImageInput, what: str) -> ValueError:
    return ValueError(
        f"image_input must come before what is changed in the image tower ({what}), got {image_input!r}: take 'pixels' "
        "or TokensBefore(block) with a block that is not behind it"
    )


# -- its parts ---------------------------------------------------------------------------------------------------------


class _Function(nn.Module):
    """A function of a module, as a module: torch puts other weights into modules alone."""

    def __init__(self, owner: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.owner, x)


def _encode(visual: nn.Module, pixels: Tensor) -> Tensor:
    # The convolution that takes the pixels: in open_clip's mixed precision the parameters before it are float32.
    return pooled(visual(pixels.to(max(visual.parameters(), key=Tensor.dim).dtype)))


def _embed(visual: VisionTransformer, pixels: Tensor) -> Tensor:
    return visual._embeds(pixels.to(visual.conv1.weight.dtype))


def _pool(visual: VisionTransformer, tokens: Tensor) -> Tensor:
    return visual._pool(tokens)[0]


def _project(visual: VisionTransformer, rows: Tensor) -> Tensor:
    return rows if visual.proj is None else rows @ visual.proj


def _unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x), dim=-1)
