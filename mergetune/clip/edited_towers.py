"""Image features of an edited CLIP.

Shapes: M settings computed together, B images, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from mergetune.clip.backbone import FrozenClip
from mergetune.clip.edits import Edit


def prepare_images(
    clip: FrozenClip, edit: Edit, image_input: str = "feature"
) -> Callable[[Edit, Tensor], Tensor] | None:
    """A function for the image features of edits of one form; None where cached features do not depend on the edit.

    Returns:
        (edit, features [B, D]) -> unit-norm features [M, B, D'].
    """
    if not edit.image_maps:
        return None

    def mapped(edit: Edit, x: Tensor) -> Tensor:
        for image_map in edit.image_maps:
            x = F.normalize(image_map(x), dim=-1)
        return x

    return mapped
