"""What the texts of classes alone decide: names that are too long for a text tower, and names that it reads alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from warnings import warn

from mergetune.clip.backbone import FrozenClip
from mergetune.clip.texts import check_classnames, check_templates, fill


def check_texts(clip: Any, classnames: Sequence[str], templates: str | Sequence[str] = "{}") -> None:
    """Checks the texts of classes before the work that needs them. A CLIP checks the same texts once.

    A warning names classes whose texts have the same tokens: no class embedding tells them apart.

    Args:
        clip: the CLIP; an object that only encodes images is not asked.
        classnames: C names.
        templates: one or more texts with ``{}`` in the place of the class name; "{}" checks the bare names.

    Raises:
        ValueError: no name, an empty name, a template without exactly one ``{}``, or a text with too many tokens.
    """
    names, templates = check_classnames(classnames), check_templates(templates)
    if not isinstance(clip, FrozenClip) or (names, templates) in clip._checked_texts:
        return
    longest = max(templates, key=len)  # the others are checked when they are encoded
    tokens = clip.tokenize([fill(longest, name) for name in names]).cpu()
    clip._checked_texts.add((names, templates))
    first: dict[bytes, int] = {}
    alike = [
        (other, place)
        for place, row in enumerate(tokens.numpy())
        if (other := first.setdefault(row.tobytes(), place)) != place
    ]
    if alike:
        a, b = (names[place] for place in alike[0])
        more = f" and {len(alike) - 1} more pairs" if len(alike) > 1 else ""
        warn(
            f"class names should differ for the text tower of {clip.name}, which reads {a!r} and {b!r}{more} alike: "
            "only a head that is trained on images can tell such classes apart",
            stacklevel=3,
        )
