"""Candidates: a row of a table, its classifier and what it took. Prompts of one form share calls of the text tower.

Shapes: M solutions, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.evaluation import Classifier, classifier, logit_ensemble, weight_average
from mergetune.solutions import Prompt, Solution


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method with one choice of hyper-parameters.

    Attributes:
        row: the line of the table that it stands for, or competes for.
        classify: class names -> class weights.
        options: its hyper-parameters, JSON-able.
        experts: number of solutions that it is made of.
        data: what it was made with, beside its experts.
        parameters: numbers that must be kept to classify new class names.
        seconds: to make it, without its experts.
    """

    row: str
    classify: Classifier
    options: dict[str, Any] = field(default_factory=dict)
    experts: int = 1
    data: str = "none"
    parameters: int = 0
    seconds: float = 0.0


class Together:
    """Classifiers of many solutions that are encoded together.

    The first call of one of them with new class names gives the class weights of all. Those of the last two lists of
    names are kept, so that mixtures of base and of novel classes cost no further call of the text tower.
    """

    def __init__(self, clip: FrozenClip) -> None:
        self.clip = clip
        self._made: list[Solution | Classifier] = []
        self._kept: dict[tuple[str, ...], list[Tensor]] = {}

    def classifier(self, made: Solution | Classifier | str | Sequence[str]) -> Classifier:
        """The classifier of a solution or of zero-shot templates; of a classifier the same one, remembered."""
        number = len(self._made)
        self._made.append(classifier(self.clip, made) if isinstance(made, str | Sequence) else made)
        self._kept.clear()
        return lambda names: self.encode(names)[number]

    @torch.no_grad()
    def encode(self, names: Sequence[str]) -> list[Tensor]:
        """Class weights of everything, with the logit scale, [C, D] each."""
        names = tuple(names)
        if names not in self._kept:
            for old in list(self._kept)[:-1]:
                del self._kept[old]
            found, groups = {}, {}
            for i, made in enumerate(self._made):
                if isinstance(made, Prompt):
                    groups.setdefault(made.form, []).append(i)
                else:
                    found[i] = (made if callable(made) else classifier(self.clip, made))(names)
            for members in groups.values():
                prompts = [self._made[i] for i in members]
                stacked = torch.stack([prompt.parameter.to(self.clip.device) for prompt in prompts])
                weights = prompts[0].encoder(self.clip, names)(stacked)
                found |= dict(zip(members, self.clip.logit_scale * F.normalize(weights, dim=-1), strict=True))
            self._kept[names] = [found[i] for i in range(len(self._made))]
        return self._kept[names]


def usual(zero_shot: Classifier, tuned: Classifier, merged: Classifier, *, name: str = "tuned") -> list[Candidate]:
    """Zero-shot, a tuned solution, their mixtures half and half, and MERGETUNE."""
    return [
        Candidate("zero-shot", zero_shot),
        Candidate(name, tuned),
        Candidate("weight average", weight_average(zero_shot, tuned)),
        Candidate("logit ensemble", logit_ensemble(zero_shot, tuned)),
        Candidate("MERGETUNE", merged),
    ]
