"""What a solution does to classes that the user does not own: concept names without pictures, and retained pictures.

Concept names tell whether the classifier of a solution still keeps several hundred common words apart as zero-shot CLIP
does. No picture is looked at, so the share of names that are recognised as before is no accuracy on pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F

from mergetune.clip import FrozenClip
from mergetune.data import Dataset, ImageList
from mergetune.data.class_names import meaning
from mergetune.evaluation import Classifier

CONCEPTS = "concepts.txt"


@dataclass(frozen=True)
class Recognised:
    """Concept names under a solution, compared with zero-shot CLIP.

    Attributes:
        share: names that are recognised as before, in percent.
        cosine: mean cosine between a name's class embedding under the solution and its zero-shot embedding.
        names: number of names.
    """

    share: float
    cosine: float
    names: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def concept_names(own: Sequence[str] = ()) -> list[str]:
    """The embedded concept names, without those that equal one of the user's class names in any case of letters."""
    text = (files("mergetune") / "assets" / CONCEPTS).read_text(encoding="utf-8")
    taken = {name.strip().casefold() for name in own}
    names = (line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [name for name in names if name.casefold() not in taken]


def tell_apart(clip: FrozenClip, names: Sequence[str], templates: str | Sequence[str]) -> list[str]:
    """The names without those to which zero-shot CLIP gives the embedding of an earlier name: it does not know them."""
    z = clip.class_embeddings(names, templates)
    same = (z @ z.T > 1 - 1e-5).tril(-1).any(1)
    return [name for name, repeated in zip(names, same.tolist(), strict=True) if not repeated]


@torch.no_grad()
def recognised(
    clip: FrozenClip, classify: Classifier, names: Sequence[str], templates: str | Sequence[str]
) -> Recognised:
    """How many concept names a classifier recognises as zero-shot CLIP does.

    The zero-shot embedding z_i of each name stands for a picture of it: it passes through the solution's map of image
    features, if the solution has one. The name is recognised as before if its own class embedding w_i is the nearest to
    z_i of all names'.

    Args:
        clip: the frozen CLIP.
        classify: classifier of the solution.
        names: concept names.
        templates: zero-shot texts.
    """
    zero_shot = clip.class_embeddings(names, templates)
    weights = classify(names)
    classes = F.normalize(weights[:, :-1] if classify.bias else weights, dim=-1)
    pictures = zero_shot if classify.images is None else classify.images(zero_shot)
    cosines = F.normalize(pictures.to(classes), dim=-1) @ classes.T
    same = cosines.argmax(1) == torch.arange(len(names), device=cosines.device)
    return Recognised(100 * same.double().mean().item(), cosines.diagonal().mean().item(), len(names))


def retained_images(data: Dataset, own: Sequence[str]) -> ImageList:
    """All images of a dataset of other classes than the user's own, whatever its splits.

    Args:
        data: the dataset of retained classes.
        own: the user's class names.

    Raises:
        ValueError: a class has the name of one of the user's classes, or there are fewer than two classes.
    """
    taken = set(map(meaning, own))
    if both := [name for name in data.classnames if meaning(name) in taken]:
        raise ValueError(f"retain must hold classes that are not trained, got {both[0]!r}, which is trained")
    if len(data.classnames) < 2:
        raise ValueError(f"retain must hold at least two classes, got {', '.join(data.classnames)}")
    lists = [images for images in (data.full_train, data.full_val, data.full_test) if images is not None]
    if any(images.root != lists[0].root for images in lists):
        lists = lists[-1:]
    listed = ImageList(
        lists[0].root,
        tuple(file for images in lists for file in images.files),
        tuple(label for images in lists for label in images.labels),
        lists[0].classnames,
    )
    return listed.select(data.visible or range(len(listed.classnames)))
