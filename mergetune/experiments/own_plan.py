"""What work on own images consists of: the images to encode, the halves to measure, and what is chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergetune.clip import FrozenClip, check_templates
from mergetune.data import Dataset, ImageList
from mergetune.experiments.canary import retained_images
from mergetune.experiments.cells import LEAST_CLASSES, Fold, halves_of
from mergetune.experiments.choosing import too_few
from mergetune.experiments.making import HEAD, KINDS, MERGETUNE, ON_MERGETUNE, TUNED
from mergetune.experiments.measuring import other_images
from mergetune.facts.function_options import FIT_METHODS
from mergetune.solutions import Solution, check_same_shapes

NEED_PROMPTS = (TUNED, ON_MERGETUNE)  # kinds that auto leaves out where stage 1 trains a head


@dataclass(frozen=True, eq=False)
class OwnImages:
    """The images of one call, and the halves of the classes that are measured.

    Attributes:
        training: few-shot images of the learned classes.
        validation: images to choose on; None if nothing is chosen or there are none.
        test: test images of all classes.
        retained: pictures of other classes; None if there are none.
        halves: "base" and "novel" -> class numbers; empty if nothing is measured.
        left_out: what is not done -> the reason.
    """

    training: ImageList
    validation: ImageList | None
    test: ImageList
    retained: ImageList | None
    halves: dict[str, list[int]]
    left_out: dict[str, str]

    @property
    def parts(self) -> dict[str, ImageList]:
        """The images to encode, by name."""
        parts = {
            "training": self.training, "validation": self.validation, "test": self.test, "retained": self.retained,
        }  # fmt: skip
        return {name: images for name, images in parts.items() if images}


def require_classes(classnames: Sequence[str], what: str = "images") -> None:
    """Raise ValueError unless there are at least two classes, which an accuracy needs to mean something."""
    if len(classnames) < 2:
        raise ValueError(
            f"{what} must hold at least two classes, got only {', '.join(map(repr, classnames)) or 'none'}"
        )


def check_names(
    data: Dataset,
    *,
    tuned: Sequence[Solution] = (),
    classes: str = "all",
    template: str | Sequence[str],
    retain: Dataset | None = None,
) -> tuple[str, ...]:
    """Check what names and labels alone decide, before a CLIP is loaded. Returns the training classes.

    Args:
        data, tuned, classes, template, retain: see :func:`mergetune.fit_dataset`.

    Raises:
        ValueError: a template without ``{}``, fewer than two classes, no training or test images, retained classes that
            are trained, or solutions of other classes or of different shapes.
    """
    check_templates(template)
    for split in ("train", "test"):
        if getattr(data, f"full_{split}") is None:
            raise ValueError(
                f"data must have {split} images, got none in {data.name!r}: images without folders train and test, or "
                "without a column split, are split by mergetune itself"
            )
    if classes == "base" and len(data.classnames) < LEAST_CLASSES:
        raise ValueError(
            f"classes must be 'all' for fewer than {LEAST_CLASSES} classes, two per half, got 'base' for "
            f"{len(data.classnames)}"
        )
    require_classes(data.classnames, "data")
    learned = (data.base_novel()[0] if classes == "base" else data).classnames
    for solution in tuned:
        try:
            solution.check_classes(learned)
        except ValueError as error:
            raise ValueError(f"tuned must have the {len(learned)} classes of the images: {error}") from None
        check_same_shapes(tuned[0], solution)
    if retain is not None:
        retained_images(retain, data.classnames)
    return learned


def plan_images(
    data: Dataset,
    *,
    tuned: Sequence[Solution],
    classes: str,
    shots: int | None,
    seed: int,
    measuring: bool,
    choosing: bool,
    retain: Dataset | None,
) -> OwnImages:
    """Draw the images of one call; the arguments are those of :func:`mergetune.fit_dataset`."""
    halves, left_out = _halves(data, classes, seed, measuring=measuring, tuned=tuned)
    learned = data.select(halves["base"]) if classes == "base" else data
    training = learned.few_shot(shots, seed)
    return OwnImages(
        training,
        other_images(data, training, seed) if halves and choosing else None,
        data.test,
        None if retain is None else retained_images(retain, data.classnames),
        halves,
        left_out,
    )


def stage_1_of(clip: FrozenClip, tuned: Sequence[Solution], method: str, classes: str) -> str:
    """Returns the method of stage 1.

    Raises:
        ValueError: an unknown ``classes`` or ``method``, or the CLIP does not take them or the given solutions.
    """
    if classes not in ("all", "base"):
        raise ValueError(f"classes must be all or base, got {classes!r}")
    if method not in FIT_METHODS:
        raise ValueError(f"method must be one of {', '.join(FIT_METHODS)}, got {method!r}")
    for solution in tuned:
        solution.check(clip)
    found = method
    if method == "auto":
        found = "coop" if clip.takes_prompts else HEAD
    if not tuned and found != HEAD:
        _ = clip.text  # raises for a CLIP that takes no prompts
    return found


def _halves(
    data: Dataset, classes: str, seed: int, *, measuring: bool, tuned: Sequence[Solution]
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The halves of the classes that are measured, and why there are none.

    The half is drawn at random, not by the alphabet: names that begin alike often mean things that look alike, and new
    classes are to be like the others.
    """
    count = len(data.classnames)
    if classes == "base":
        position = {c: i for i, c in enumerate(data.visible or range(count))}
        base, novel = (half.visible or () for half in data.base_novel())
        return {"base": [position[c] for c in base], "novel": [position[c] for c in novel]}, {}
    reason = ""
    if not measuring:
        reason = "measuring is switched off"
    elif tuned:
        reason = "the given fine-tuned solution has learned all classes, so that no new classes are left"
    elif count < LEAST_CLASSES:
        reason = f"measuring needs at least {LEAST_CLASSES} classes, two per half, got {count}"
    return ({}, {"measuring": reason}) if reason else (halves_of(count, seed + 1), {})


def why_not(fold: Fold | None, left_out: Mapping[str, str], *, choosing: bool) -> str:
    """Returns why nothing is chosen; empty if something is.

    Args:
        fold: images of the measuring run; None without one.
        left_out: why there is none, see :class:`OwnImages`.
        choosing: whether to choose if that is possible.
    """
    if not choosing:
        return "choosing is switched off"
    if fold is None:
        return f"choosing needs the measuring run: {left_out['measuring']}"
    if any(len(images.classnames) < 2 for images in fold.val.values()):
        return f"choosing needs at least {LEAST_CLASSES} classes, two per half"
    return too_few({part: images.labels for part, images in fold.val.items()})


def kinds_of(method: str, stage_1: str) -> tuple[str, ...]:
    """Returns the kinds of solution to choose from, for a ``method`` of :func:`fit_dataset` and that of stage 1."""
    if method != "auto":
        return (MERGETUNE,)
    return tuple(kind for kind in KINDS if stage_1 != HEAD or kind not in NEED_PROMPTS)
