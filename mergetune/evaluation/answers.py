"""Which classes are confused, and which images are answered wrongly: matrices, scores per class, lists and their files.

Shapes: C classes.
"""

from __future__ import annotations

import csv
import functools
import io
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mergetune.evaluation.predictions import Predictions
from mergetune.evaluation.scores import distinct_names
from mergetune.facts.brief import brief
from mergetune.io import writing_atomically, writing_to

ROWS = 4096  # images whose values are taken from tensors at once


@brief()
@dataclass(frozen=True)
class ClassScores:
    """How well the images of one class are answered. Shares are in percent, None where the denominator is 0.

    Attributes:
        name: name of the class.
        images: number of images of the class, the support.
        precision: share of correct answers among the images that are answered with this class.
        recall: share of correct answers among the images of this class.
        f1: harmonic mean of both.
    """

    name: str
    images: int
    precision: float | None
    recall: float | None
    f1: float | None


@brief()
@dataclass(frozen=True)
class Mistake:
    """Images of one class that are answered with another class.

    Attributes:
        true, predicted: names of the classes.
        images: number of such images.
        share: their share of the images of the true class, in percent.
    """

    true: str
    predicted: str
    images: int
    share: float


@brief("macro_f1", classes=lambda found: len(found.names), images=lambda found: int(found.counts.sum()))
@dataclass(frozen=True, eq=False)
class Confusion:
    """How often images of each class are answered with each class. Make one with :func:`confusion`.

    Attributes:
        counts: number of images, [C, C] int64; rows are true classes, columns predicted classes.
        names: C names; if several classes have the same name, the class number is added.
        scores: precision, recall and F1 of each class.
    """

    counts: np.ndarray
    names: tuple[str, ...]
    scores: tuple[ClassScores, ...]

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have images, in percent."""
        return statistics.fmean(score.f1 for score in self.scores if score.images and score.f1 is not None)

    @functools.cached_property
    def mistakes(self) -> tuple[Mistake, ...]:
        """All pairs of classes that are confused, the most frequent first, then in class order."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        rows, columns = wrong.nonzero()
        order = np.argsort(-wrong[rows, columns], kind="stable")
        total = self.counts.sum(1)
        return tuple(
            Mistake(self.names[r], self.names[c], int(wrong[r, c]), 100 * float(wrong[r, c] / total[r]))
            for r, c in zip(rows[order], columns[order], strict=True)
        )

    def to_json(self, mistakes: int = 20) -> dict[str, Any]:
        """Scores of all classes, their mean F1, and the most frequent mistakes, JSON-able."""
        return {
            "macro_f1": self.macro_f1,
            "classes": [asdict(score) for score in self.scores],
            "mistakes": [asdict(mistake) for mistake in self.mistakes[:mistakes]],
        }

    def save(self, file: str | Path) -> None:
        """Writes the matrix as CSV: one row per true class, one column per predicted class."""
        rows = ([name, *counts] for name, counts in zip(self.names, self.counts.tolist(), strict=True))
        _write_csv(file, ["true class", *self.names], rows)

    def save_scores(self, file: str | Path) -> None:
        """Writes the scores as CSV: one row per class, with the class that its images are most often taken for."""
        worst: dict[str, Mistake] = {}
        for mistake in self.mistakes:
            worst.setdefault(mistake.true, mistake)
        columns = [field.name for field in fields(ClassScores)]
        rows = (
            [*asdict(score).values(), *((m.predicted, m.images) if (m := worst.get(score.name)) else ("", 0))]
            for score in self.scores
        )
        _write_csv(file, [*columns, "most often taken for", "images taken for it"], rows)


def confusion(predictions: Predictions) -> Confusion:
    """Confusion matrix and scores per class of predictions, computed by scikit-learn.

    Example:
        >>> import mergetune as mt, torch
        >>> from mergetune.evaluation import Classifier
        >>> features = mt.FeatureCache.from_tensors(torch.eye(3), [0, 1, 1], ["cat", "dog", "car"])
        >>> found = mt.confusion(mt.predict_features(Classifier(lambda names: torch.eye(3)), features))
        >>> found
        Confusion(macro_f1=83.3333, classes=3, images=3)
        >>> found.counts.tolist()
        [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
        >>> found.scores[1].precision, found.scores[1].recall, found.mistakes[0].predicted
        (100.0, 50.0, 'car')
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every, names = range(len(predictions.classnames)), distinct_names(predictions.classnames)
    pairs = predictions.labels.numpy(), predictions.predicted.numpy()
    counts = np.asarray(confusion_matrix(*pairs, labels=every), dtype=np.int64)
    undefined: Any = np.nan  # scikit-learn's signature has no types
    shares = precision_recall_fscore_support(*pairs, labels=every, zero_division=undefined)[:3]
    rows = zip(names, counts.sum(1).tolist(), *(np.asarray(values).tolist() for values in shares), strict=True)
    scores = (ClassScores(name, images, *map(_percent, values)) for name, images, *values in rows)
    return Confusion(counts, names, tuple(scores))


@brief()
@dataclass(frozen=True)
class WrongAnswer:
    """A wrongly answered image.

    Attributes:
        file: name of the image; its row in the features if the names are unknown.
        true, predicted: names of the true class and of the most probable class.
        probability: probability of the predicted class.
        second: name of the second most probable class; empty if there is one class.
        second_probability: its probability.
        true_probability: probability of the true class.
    """

    file: str
    true: str
    predicted: str
    probability: float
    second: str
    second_probability: float
    true_probability: float


def wrong_answers(predictions: Predictions) -> Iterator[WrongAnswer]:
    """Yields the wrongly answered images, the most confident answers first; of equal ones the first image.

    Example:
        >>> import mergetune as mt, torch
        >>> from mergetune.evaluation import Classifier
        >>> features = mt.FeatureCache.from_tensors(torch.eye(2), [0, 0], ["cat", "dog"], files=["a.jpg", "b.jpg"])
        >>> found = mt.predict_features(Classifier(lambda names: 3 * torch.eye(2)), features)
        >>> [(wrong.file, wrong.predicted, round(wrong.probability, 2)) for wrong in mt.wrong_answers(found)]
        [('b.jpg', 'dog', 0.95)]
    """
    names = distinct_names(predictions.classnames)
    columns = predictions.labels, predictions.classes, predictions.probabilities, predictions.true_probabilities
    for rows in predictions.wrong().split(ROWS):
        for row, label, (first, *more), (p, *others), true in zip(
            rows.tolist(), *(column[rows].tolist() for column in columns), strict=True
        ):
            yield WrongAnswer(
                file=predictions.files[row] if predictions.files else str(row),
                true=names[label],
                predicted=names[first],
                probability=p,
                second=names[more[0]] if more else "",
                second_probability=others[0] if more else 0.0,
                true_probability=true,
            )


def save_wrong_answers(predictions: Predictions, file: str | Path) -> None:
    """Writes the wrongly answered images as CSV, the most confident answers first, see :class:`WrongAnswer`."""
    rows = (list(asdict(wrong).values()) for wrong in wrong_answers(predictions))
    _write_csv(file, [field.name for field in fields(WrongAnswer)], rows)


def most_confident(predictions: Predictions, count: int) -> list[WrongAnswer]:
    """The ``count`` most confident wrong answers."""
    return list(islice(wrong_answers(predictions), count))


def _write_csv(file: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table in UTF-8, atomically: numbers with six digits, None as an empty cell."""
    with writing_to(file), writing_atomically(Path(file)) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text)
        writer.writerow(header)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
        text.detach()  # writes the remaining text; writing_atomically closes the stream


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * share
