"""The engine of all experiments: candidates are scored on the parts of a cell, and one record per cell is written.

A cell is a set of training images, a seed, and parts of test images ("base", "novel"); all methods are compared on it.
The record of a cell is one JSON document. A later call with the same settings reads the record; others are refused:

    {"cell": ..., "settings": ..., "classes": {part: [class, ...]}, "images": {part: [number, ...]},
     "right": {row: {part: [number, ...]}}}

Images and right answers are counted per class; :mod:`mergetune.experiments.tables` computes everything from them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.data import FeatureCache
from mergetune.evaluation import Classifier, Hits, Report, classifier, logit_ensemble, score, weight_average
from mergetune.experiments.records import HOME, RecordFile, model_of, other_settings
from mergetune.io import MAX_TABLE, jsonable, names_file, read_document, write_json
from mergetune.solutions import Solution, space_of, stack_states
from mergetune.training.runs import NAMED

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method with one choice of hyper-parameters.

    Attributes:
        row: name of the row in the table. If several candidates have the same row, one of them is chosen.
        classify: the classifier.
        options: hyper-parameters, JSON-able.
        experts: number of solutions that the candidate is made of.
        data: data that the method needs in addition to the experts.
        parameters: number of values that must be stored to classify new class names.
        seconds: time to make the candidate, without the time for its experts.
        solution: the solution that classifies; None if the classifier is not a single solution.
    """

    row: str
    classify: Classifier
    options: dict[str, Any] = field(default_factory=dict)
    experts: int = 1
    data: str = "none"
    parameters: int = 0
    seconds: float = 0.0
    solution: Solution | None = None


class Together:
    """Makes classifiers that share calls of the text tower: one call serves all prompts of the same form.

    The first call of a classifier with new class names computes the class weights of all classifiers. The weights for
    the last two lists of names are stored, so that mixtures of classifiers on base and novel classes need no new call.
    """

    def __init__(self, clip: FrozenClip) -> None:
        self.clip = clip
        self._made: list[Solution | Classifier] = []
        self._kept: dict[tuple[str, ...], list[Tensor]] = {}

    def classifier(self, made: Solution | Classifier | str | Sequence[str]) -> Classifier:
        """Returns a classifier, with stored weights, of a solution, of zero-shot templates or of another classifier."""
        whole, number = made if isinstance(made, Classifier) else classifier(self.clip, made), len(self._made)
        self._made.append(made if isinstance(made, Solution) else whole)
        self._kept.clear()
        return replace(whole, weights=lambda names: self.encode(names)[number])

    def candidate(self, row: str, solution: Solution, **facts: Any) -> Candidate:
        """Returns the candidate of a solution; ``facts`` are further attributes of :class:`Candidate`."""
        return Candidate(row, self.classifier(solution), parameters=solution.numbers, solution=solution, **facts)

    @torch.no_grad()
    def encode(self, names: Sequence[str]) -> list[Tensor]:
        """Returns the class weights of all classifiers, multiplied by the logit scale, each [C, D]."""
        names = tuple(names)
        if names not in self._kept:
            for old in list(self._kept)[:-1]:
                del self._kept[old]
            found: dict[int, Tensor] = {}
            groups: dict[Hashable, dict[int, Solution]] = {}
            for i, made in enumerate(self._made):
                if isinstance(made, Solution) and made.plain_head() is None:
                    groups.setdefault(made.form, {})[i] = made
                else:
                    found[i] = (made if isinstance(made, Classifier) else classifier(self.clip, made))(names)
            for members in groups.values():
                space = space_of(self.clip, next(iter(members.values())), names)
                states = stack_states([solution.state() for solution in members.values()], self.clip.device)
                weights = space.scale * space.unit(space.classes(states))
                # Solutions that change only the images have equal class weights, which are computed once.
                found |= dict(zip(members, weights.expand(len(members), -1, -1), strict=True))
            self._kept[names] = [found[i] for i in range(len(self._made))]
        return self._kept[names]


def usual(zero_shot: Classifier, tuned: Classifier, merged: Classifier, *, name: str = "tuned") -> list[Candidate]:
    """Returns the candidates zero-shot, tuned, MERGETUNE, and equal mixtures of zero-shot and tuned.

    The weight average is left out if zero-shot and tuned take different image features.
    """
    found = [Candidate("zero-shot", zero_shot), Candidate(name, tuned)]
    if zero_shot.images is tuned.images:
        found.append(Candidate("weight average", weight_average(zero_shot, tuned)))
    return [*found, Candidate("logit ensemble", logit_ensemble(zero_shot, tuned)), Candidate("MERGETUNE", merged)]


def tested(candidates: Sequence[Candidate], tests: Mapping[str, FeatureCache]) -> dict[str, dict[str, Hits]]:
    """Returns row -> part -> right answers, counted by :func:`mergetune.evaluation.score`."""
    found = {}
    for candidate in candidates:
        weights = {part: candidate.classify(images.classnames) for part, images in tests.items()}
        found[candidate.row] = score(weights, tests, images=candidate.classify.images)
    return found


def counted(found: Mapping[str, Mapping[str, Hits]], classes: Mapping[str, Sequence[int]] | None = None) -> Record:
    """Returns the counts of a record.

    Args:
        found: row -> part -> right answers.
        classes: part -> numbers of its classes in the dataset; None if no class belongs to several parts.
    """
    parts = next(iter(found.values()))
    images = {part: list(hits.images) for part, hits in parts.items() if part not in HOME}
    number = count()
    numbers = {part: list(islice(number, len(own))) for part, own in images.items()}
    right = {row: {part: list(hits.right) for part, hits in parts.items()} for row, parts in found.items()}
    return {"classes": {**(classes or numbers)}, "images": images, "right": right}


def reports(record: Record, names: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Report]]:
    """Returns row -> part -> the accuracies of a record; ``names`` holds the class names of each part."""
    found: dict[str, dict[str, Report]] = {}
    for row, parts in record["right"].items():
        for part, right in parts.items():
            home = HOME.get(part) or part
            counts = Hits(tuple(right), tuple(record["images"][home]))
            found.setdefault(row, {})[part] = counts.report(names[home])
    return found


@names_file("file")
def begun(file: Path, head: Mapping[str, Any]) -> Record:
    """The record of a cell: as an earlier call left it, or its head, which is kept before any work.

    Args:
        file: of the record.
        head: the "cell" or "run", the "settings" that its results depend on, and "in_words", descriptions of those
            that are checksums.

    Raises:
        ValueError: the file is damaged, or it has another head.
    """
    wanted: Record = jsonable(head)
    record = kept(file, model_of(head))
    if record is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
        return wanted
    if other := other_settings(record, wanted):
        said = "; ".join(found.words for found in other[:NAMED])
        raise ValueError(
            f"out: {file.parent} holds results of other settings: {said}; choose another --out, or delete {file.name} "
            "there to run it again"
        )
    return record


def kept(file: Path, model: type[RecordFile]) -> Record | None:
    """The record of a cell or run, with the fields that its file has; None if there is no file."""
    if not file.exists():
        return None
    record = read_document(file, model, way_on="delete it to run it again", limit=MAX_TABLE)
    return jsonable(record.model_dump(exclude_unset=True))


def finish(file: Path, record: Record, found: Record) -> Record:
    """Keep a record with what was found; as it comes back from its file."""
    record = jsonable(record | found)
    write_json(file, record)
    return record
