"""Predictor: the classes of new pictures, with probabilities. Pictures are files, folders, lists, images or arrays.

Shapes: C classes, B pictures of a batch, D embedding width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mergetune.clip import FrozenClip, prepare_images
from mergetune.clip.backbone import check_clip
from mergetune.clip.class_texts import check_texts
from mergetune.data import FoundPicture, decode_pictures, find_pictures, is_one_picture
from mergetune.evaluation.classifiers import classifier
from mergetune.facts.brief import brief
from mergetune.facts.function_options import ACTIVATIONS, BACKGROUND, MAX_PIXELS
from mergetune.io import background_colour, hidden
from mergetune.solutions import Solution, Stack, inputs, known_classes, open_solution, stacked, temperature_of
from mergetune.solutions.kinds import given_names

NONE = "none"


@brief("file", "label", "labels", "probabilities", "error")
@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one picture, or the reason why the picture cannot be read.

    Attributes:
        file: path of the picture; None for a picture in memory.
        label: the most probable class; "none" if its probability is below the threshold of the predictor; None if the
            picture cannot be read.
        labels: the most probable classes, best first, whatever their probability.
        probabilities: probability of each of ``labels``.
        error: why the picture cannot be read; None if it can.

    Example:
        >>> from mergetune import Prediction
        >>> Prediction("a.jpg", "cat", ("cat", "dog"), (0.9, 0.1))
        Prediction(file='a.jpg', label='cat', labels=['cat', 'dog'], probabilities=[0.9, 0.1], error=None)
    """

    file: str | None
    label: str | None
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    @property
    def probability(self) -> float | None:
        """Probability of the most probable class; None if the picture cannot be read."""
        return self.probabilities[0] if self.probabilities else None

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return {
            "file": self.file,
            "label": self.label,
            "labels": list(self.labels),
            "probabilities": list(self.probabilities),
            "error": self.error,
        }


class Predictor:
    """Classifies pictures with a solution or with zero-shot templates. The class weights are computed once.

    The predictor takes pictures in any mixture, see :meth:`stream`. One picture gives a :class:`Prediction`; a folder,
    a list or several inputs give a list in the order of the input. A picture that cannot be read gives a prediction
    with an error and stops nothing.

    Args:
        clip: the CLIP that the solution was made for.
        solution: a solution of any kind; the path of one, see :func:`mergetune.open_solution`; or one or more templates
            with ``{}``.
        classnames: C class names. None takes those that the solution knows: the classes of its tensors or those that it
            was trained on. Prompts, templates, and residuals and maps on these take any names; a head takes any
            selection of its classes.
        top: classes to return per picture; all classes if there are fewer.
        threshold: a picture whose best probability is below this value gets the label "none"; None keeps all labels.
        activation: how logits become probabilities. "softmax": exactly one class is in the picture, and probabilities
            sum to 1. "sigmoid": each class is in the picture or not, independently; only for CLIPs with a logit bias
            (SigLIP). Solutions are trained with softmax.
        batch_size: pictures per call of the image tower.
        workers: number of processes that decode files; 0 decodes in the calling process.
        max_pixels: largest width times height of a picture; a larger picture cannot be read.
        background: colour under transparent pixels, a name or "#rrggbb".

    Attributes:
        classnames: the C class names.
        activation: "softmax" or "sigmoid".
        logit_scale: factor on the logits.
        temperature: number that the logits are divided by, see :func:`mergetune.evaluation.temperature_of`.

    Raises:
        ValueError: the solution was made for another CLIP, knows no classes, or cannot make the named ones; an option
            is out of range.

    Example:
        >>> import mergetune as mt, numpy as np
        >>> clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
        >>> predictor = mt.Predictor(clip, "an icon of a {}", ["cat", "square", "tree"], top=2)
        >>> picture = np.full((48, 48, 3), 255, np.uint8)  # or "photo.jpg", or an image of PIL
        >>> picture[12:36, 12:36] = 0
        >>> predictor(picture).label
        'square'
        >>> [len(found.labels) for found in predictor([picture, picture.copy()])]
        [2, 2]
    """

    def __init__(
        self,
        clip: FrozenClip,
        solution: Solution | str | os.PathLike[str] | Sequence[str],
        classnames: Sequence[str] | None = None,
        *,
        top: int = 5,
        threshold: float | None = None,
        activation: str = "softmax",
        batch_size: int = 64,
        workers: int = 0,
        max_pixels: int = MAX_PIXELS,
        background: str = BACKGROUND,
    ) -> None:
        check_clip(clip)
        background_colour(background)  # refuses a colour that does not exist
        for name, value, least in (
            ("top", top, 1), ("batch_size", batch_size, 1), ("workers", workers, 0), ("max_pixels", max_pixels, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], as probabilities do, got {threshold}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if activation == "sigmoid" and not clip.logit_bias:
            raise ValueError(
                f"activation must be softmax for a CLIP without a logit bias, got sigmoid for {clip.name}: only SigLIP "
                "models have this bias"
            )
        if isinstance(solution, os.PathLike) or (isinstance(solution, str) and "{}" not in solution):
            solution = open_solution(os.fspath(solution), classnames=classnames)
        self.clip, self.solution = clip, solution
        self.classnames = classes_of(solution, classnames, activation=activation)
        self.top, self.threshold, self.activation = top, threshold, activation
        self.batch_size, self.workers, self.max_pixels = batch_size, workers, max_pixels
        self.background = background
        self.temperature = temperature_of(solution)
        scale = solution.logit_scale if isinstance(solution, Solution) else None
        self.logit_scale: float = clip.logit_scale if scale is None else scale
        classify = classifier(clip, solution)
        fixed = _fixed_classes(solution)
        if fixed is None:
            check_texts(clip, self.classnames)
        with torch.no_grad():
            self._weights = classify(self.classnames if fixed is None else fixed)
        if fixed is not None and fixed != self.classnames:
            place = {name: row for row, name in reversed(list(enumerate(fixed)))}
            self._weights = self._weights[[place[name] for name in self.classnames]]
        self._map, self._from_pixels = classify.images, None
        if isinstance(solution, Solution) and solution.image_input != "feature":
            edit = solution.edit(clip, stacked(solution.state(), clip.device))
            made = prepare_images(clip, edit, "pixels")
            self._from_pixels = None if made is None else lambda pixels: made(edit, pixels)[0]

    def __call__(self, *pictures: Any, progress: bool = False) -> Any:
        """The prediction of one picture, or a list of predictions in the order of the input.

        Args:
            pictures: one input or several, see :meth:`stream`.
            progress: show a bar on a terminal.

        Returns:
            A :class:`Prediction` for one path of a file, PIL image, array or tensor [3, H, W]. A list of predictions
            for any other input, also for a list of one picture.

        Raises:
            TypeError, ValueError, OSError: see :meth:`stream`; or no input.
        """
        if not pictures:
            raise ValueError("pictures must hold at least one input, got none")
        found = list(self.stream(*pictures, progress=progress))
        return found[0] if len(pictures) == 1 and is_one_picture(pictures[0]) else found

    def stream(self, *pictures: Any, progress: bool = False) -> Iterator[Prediction]:
        """Predictions one by one, in the order of the input. Memory is bounded for any number of pictures.

        Args:
            pictures: inputs of these kinds, in any mixture:

                - the path of a file; of a folder, with all images in it and below, sorted by path; or of a list:
                  ``.txt`` with one path per line, ``.csv`` with a column ``path``, ``.json`` with paths or with objects
                  that have ``path``. Paths in a list are relative to the folder of the list;
                - a PIL image, or an array of uint8, [H, W, 3] or [H, W] (grey);
                - a tensor of preprocessed pixels, [3, H, W] or [B, 3, H, W], as ``clip.preprocess`` gives them;
                - an :class:`mergetune.ImageList`, or a list of inputs. An iterator is read piece by piece, so it may be
                  longer than memory.
            progress: show a bar on a terminal.

        Raises:
            TypeError: an input of another type.
            ValueError: an array or tensor of another shape or dtype; a folder or list without pictures; a list that
                cannot be read.
            OSError: a folder or list cannot be read.
        """
        found: Iterable[FoundPicture] = find_pictures(pictures)
        total = None
        if not any(isinstance(given, Iterator) for given in pictures):
            found = list(found)
            total = len(found)
        batches = decode_pictures(
            map(self._sized, found), self.clip.preprocess, self.clip.preprocess_cfg,
            batch_size=self.batch_size, workers=self.workers, max_pixels=self.max_pixels, background=self.background,
        )  # fmt: skip
        with tqdm(total=total, desc="predict", unit="picture", disable=hidden(progress)) as bar:
            for batch in batches:
                labels, values = self._best(batch.pixels)
                rows = iter(zip(labels, values, strict=True))
                for i, picture in enumerate(batch.pictures):
                    if i in batch.errors:
                        yield Prediction(picture.file, None, error=batch.errors[i])
                    else:
                        yield self._prediction(picture.file, *next(rows))
                bar.update(len(batch.pictures))

    def _sized(self, picture: FoundPicture) -> FoundPicture:
        """The picture; raises ValueError for a tensor of another size than the CLIP takes."""
        if isinstance(picture.value, Tensor):
            sides = self.clip.preprocess_cfg["size"]
            height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
            if list(picture.value.shape) != [3, height, width]:
                raise ValueError(
                    f"pixels must have the size that {self.clip.name} takes, [3, {height}, {width}], got "
                    f"{list(picture.value.shape)}: give arrays of uint8 or PIL images of any size"
                )
        return picture

    @torch.no_grad()
    def _best(self, pixels: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """The most probable classes and their probabilities."""
        if not len(pixels):
            return [], []
        weights = self._weights
        if self._from_pixels is not None:
            x = self._from_pixels(pixels.to(self.clip.device)).to(weights)
        else:
            x = self.clip.encode_image(pixels).to(weights)
            x = x if self._map is None else self._map(x)
        logits = (inputs(x, weights) @ weights.T).float()
        if self.activation == "sigmoid":
            probabilities = ((logits + self.clip.logit_bias) / self.temperature).sigmoid()
        else:
            probabilities = (logits / self.temperature).softmax(-1)
        values, classes = probabilities.topk(min(self.top, len(self.classnames)), dim=-1)
        return classes.tolist(), values.tolist()

    def _prediction(self, file: str | None, classes: list[int], values: list[float]) -> Prediction:
        if any(value != value for value in values):
            return Prediction(file, None, error="the image features must be finite, got NaN or inf")
        labels = tuple(self.classnames[c] for c in classes)
        unsure = self.threshold is not None and values[0] < self.threshold
        return Prediction(file, NONE if unsure else labels[0], labels, tuple(values))

    def describe(self) -> str:
        """One line: the number of classes, and how logits become probabilities."""
        return (
            f"{len(self.classnames):,} {'class' if len(self.classnames) == 1 else 'classes'}, {self.activation} at "
            f"logit scale {self.logit_scale:.4g} and temperature {self.temperature:.4g}"
        )

    def __repr__(self) -> str:
        kind = self.solution.kind if isinstance(self.solution, Solution) else "templates"
        return f"Predictor({self.clip.name}, {kind}: {self.describe()})"


def classes_of(
    solution: Solution | str | Sequence[str],
    classnames: Sequence[str] | None = None,
    *,
    activation: str | None = None,
) -> tuple[str, ...]:
    """The classes that a predictor of this solution answers: the named ones, or those that the solution knows.

    Args:
        solution: a solution, or zero-shot templates.
        classnames: the wanted class names, or None.
        activation: how the predictor makes probabilities; "softmax" needs at least two classes.

    Raises:
        ValueError: no class names are given and the solution knows none; it has no text for one of the names; or a
            single name for softmax.
    """
    found = _classes_of(solution, classnames)
    if activation == "softmax" and len(found) == 1:
        raise ValueError(
            "classnames must hold at least two names for softmax, whose probabilities sum to 1, got only "
            f"{found[0]!r}: add what else the pictures may show"
        )
    return found


def _classes_of(solution: Solution | str | Sequence[str], classnames: Sequence[str] | None) -> tuple[str, ...]:
    if classnames is None:
        found = known_classes(solution) if isinstance(solution, Solution) else None
        if found is None:
            kind = f"a {solution.kind}" if isinstance(solution, Solution) else "a template"
            raise ValueError(
                f"classnames must be given (on the command line --classnames FILE) for {kind} that records no classes, "
                "got None"
            )
        return found
    names, fixed = given_names(solution, classnames), _fixed_classes(solution)
    unknown = [name for name in names if name not in fixed] if fixed is not None else []
    if fixed is not None and unknown:
        base = solution.parts[0] if isinstance(solution, Stack) else solution
        what = "head" if getattr(base, "kind", "") == "head" else "class-specific prompt"
        why = "a head has no text" if what == "head" else "such a prompt has context vectors for its classes only"
        raise ValueError(
            f"classnames must be among the {len(fixed)} classes of the {what}, got {unknown[0]!r}: {why} to make a new "
            "class from. Use a prompt that all classes share, or a residual or map on it (mergetune tune --method "
            "residual --base PROMPT)"
        )
    return names


def _fixed_classes(solution: Solution | str | Sequence[str]) -> tuple[str, ...] | None:
    """The only classes that a solution can answer; None if it makes class embeddings of any name."""
    base = solution.parts[0] if isinstance(solution, Stack) else solution
    if not isinstance(base, Solution) or base.kind == "residual":  # a residual alone is refused by its edit
        return None
    return base.classnames
