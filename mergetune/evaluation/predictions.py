"""Predictions on cached features, with probabilities: the source of confusion matrix, ECE and lists of wrong answers.

Shapes: N images, C classes, B images of a batch, k answers kept per image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergetune.data import Batches
from mergetune.data.batches import check_batches
from mergetune.evaluation.scores import Classifier, Hits, Report
from mergetune.facts.brief import brief
from mergetune.solutions import inputs

BINS = 15  # of confidence, as in Guo et al. 2017


@brief("ece")
@dataclass(frozen=True)
class Reliability:
    """How well probabilities agree with accuracies: images in bins of equal width by their confidence.

    The confidence of an image is the probability of its predicted class. Bin b holds the confidences in
    (b / bins, (b + 1) / bins]. All values but ``images`` are in percent; a bin without images has None.

    Attributes:
        images: number of images of each bin.
        confidence: mean confidence in each bin.
        accuracy: share of correct answers in each bin.
        ece: expected calibration error (Guo et al. 2017, arXiv 1706.04599): mean over images of the distance between
            confidence and accuracy of their bin.
    """

    images: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    ece: float


@brief(
    "ece", "nll", "temperature",
    images=len, classes=lambda found: len(found.classnames), accuracy=lambda found: found.report.accuracy,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Predictions:
    """The answers of a classifier on N labelled images. Make them with :func:`predict_features`.

    Attributes:
        labels: true class of each image, LongTensor [N].
        classes: most probable classes of each image, best first, LongTensor [N, k].
        probabilities: their probabilities, [N, k] float32.
        true_probabilities: probability of the true class of each image, [N] float32.
        nll: mean negative log-likelihood (cross-entropy) of the true classes.
        temperature: the number that the logits were divided by.
        classnames: C names.
        files: names of the images; empty if unknown.
    """

    labels: Tensor
    classes: Tensor
    probabilities: Tensor
    true_probabilities: Tensor
    nll: float
    temperature: float
    classnames: tuple[str, ...]
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def predicted(self) -> Tensor:
        """The most probable class of each image, LongTensor [N]."""
        return self.classes[:, 0]

    @property
    def right(self) -> Tensor:
        """Whether each image is answered correctly, bool [N]."""
        return self.predicted == self.labels

    @property
    def report(self) -> Report:
        """Accuracy over all images and per class, as :func:`mergetune.accuracy` gives it."""
        count = len(self.classnames)
        found = (torch.bincount(labels, minlength=count) for labels in (self.labels[self.right], self.labels))
        return Hits(*(tuple(counts.tolist()) for counts in found)).report(self.classnames)

    @property
    def top5(self) -> float | None:
        """Share of images whose true class is among the 5 most probable, in percent; None for 5 classes or fewer."""
        if self.classes.shape[1] < 5 or len(self.classnames) <= 5:
            return None
        return 100 * (self.classes[:, :5] == self.labels[:, None]).any(1).double().mean().item()

    @functools.cached_property
    def reliability(self) -> Reliability:
        """Confidence and accuracy in 15 bins of equal width, and the expected calibration error."""
        confidence, right = self.probabilities[:, 0].double(), self.right.double()
        place = (torch.ceil(confidence * BINS).long() - 1).clamp(0, BINS - 1)
        images = torch.bincount(place, minlength=BINS)
        sums = [torch.bincount(place, weights, minlength=BINS) for weights in (confidence, right)]
        means = [
            tuple(100 * s / n if n else None for s, n in zip(x.tolist(), images.tolist(), strict=True)) for x in sums
        ]
        ece = 100 * (sums[0] - sums[1]).abs().sum().item() / len(self)
        return Reliability(tuple(images.tolist()), means[0], means[1], ece)

    @property
    def ece(self) -> float:
        """Expected calibration error in percent, see :class:`Reliability`."""
        return self.reliability.ece

    def wrong(self) -> Tensor:
        """Rows of the wrongly answered images, the most confident answers first, LongTensor [n]."""
        rows = (~self.right).nonzero().squeeze(1)
        return rows[self.probabilities[rows, 0].argsort(descending=True, stable=True)]

    def calibration(self) -> dict[str, Any]:
        """ECE, cross-entropy, top-5 accuracy, temperature and the bins, JSON-able."""
        bins = self.reliability
        found = {"ece": bins.ece, "nll": self.nll, "top5": self.top5, "temperature": self.temperature}
        columns = {"images": bins.images, "confidence": bins.confidence, "accuracy": bins.accuracy}
        return found | {"reliability": {name: list(values) for name, values in columns.items()}}


@torch.no_grad()
def predict_features(
    classify: Classifier, features: Batches, *, temperature: float = 1.0, k: int = 5, batch_size: int = 2048
) -> Predictions:
    """The k most probable classes of each image, with probabilities.

    Probabilities are the softmax of the logits divided by the temperature, also for SigLIP models: each image has one
    of the C classes, so the probabilities of the classes must sum to 1. The bias of SigLIP's sigmoid is equal for all
    classes and has no effect on a softmax. Logits are computed batch by batch and are not kept.

    Args:
        classify: the classifier of a solution, see :func:`mergetune.classifier`.
        features: images with labels; their classes are the label space.
        temperature: see :func:`temperature_of`.
        k: number of answers to keep per image, at most C are kept.
        batch_size: images per batch.

    Example:
        >>> import mergetune as mt, torch
        >>> from mergetune.evaluation import Classifier
        >>> features = mt.FeatureCache.from_tensors(torch.eye(3), [0, 1, 1], ["cat", "dog", "car"])
        >>> found = mt.predict_features(Classifier(lambda names: 2 * torch.eye(3)), features)
        >>> found
        Predictions(ece=12.0319, nll=0.906211, temperature=1, images=3, classes=3, accuracy=66.6667)
        >>> found.predicted.tolist(), found.wrong().tolist(), round(found.ece, 1)
        ([0, 1, 2], [2], 12.0)
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_batches(features)
    weights = classify(features.classnames)
    classes, probabilities, true = [], [], []
    for x, labels, _ in features.batches(batch_size):
        logits = logits_of(classify, weights, x)
        best = _best(logits, min(k, len(features.classnames)))
        logits = logits.double() / temperature
        whole = logits.logsumexp(1, keepdim=True)
        classes.append(best.cpu())
        probabilities.append((logits.gather(1, best) - whole).exp().float().cpu())
        true.append((logits.gather(1, labels.to(logits.device)[:, None]) - whole).squeeze(1).cpu())
    log_true = torch.cat(true)
    return Predictions(
        labels=features.labels,
        classes=torch.cat(classes),
        probabilities=torch.cat(probabilities),
        true_probabilities=log_true.exp().float(),
        nll=-log_true.mean().item(),
        temperature=temperature,
        classnames=tuple(features.classnames),
        files=tuple(features.files),
    )


def logits_of(classify: Classifier, weights: Tensor, x: Tensor) -> Tensor:
    """Logits of a batch, [B, C], as :func:`mergetune.accuracy` compares them.

    Args:
        classify: the classifier.
        weights: its class weights, ``classify(classnames)``, which are computed once for all batches.
        x: inputs of B images.
    """
    x = x.to(weights) if classify.images is None else classify.images(x.to(weights))
    return inputs(x, weights) @ weights.T


def _best(logits: Tensor, k: int) -> Tensor:
    """The k classes with the largest logits, best first; of equal logits the first class, as argmax takes it."""
    left, found = logits.clone(), []
    for _ in range(k):
        found.append(left.argmax(1, keepdim=True))
        left.scatter_(1, found[-1], -torch.inf)
    return torch.cat(found, 1)
