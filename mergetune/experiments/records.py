"""The records of cells and runs as documents: ``cell.json`` of compare and demo, ``run.json`` of the protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from mergetune.io import Count, Document, Items, JsonObject, Number, Size, fault
from mergetune.training.run_settings import Difference, differences

if TYPE_CHECKING:
    from typing_extensions import Self

HOME = {"seen": "base", "unseen": "novel"}  # parts in the joint label space have the images and classes of others

Percent = Annotated[Number, Field(ge=0, le=100)]
Seconds = Annotated[Number, Field(ge=0)]


class CellFile(Document, frozen=True):
    """Which cell a record is of, see :class:`mergetune.experiments.cells.Cell`."""

    task: str
    partition: Count | None
    seed: Count


class RunFile(Document, frozen=True):
    """Which run a record is of, see :class:`mergetune.experiments.protocol_plans.Run`."""

    protocol: str
    source: str
    method: str
    shots: Size | None
    seed: Count
    targets: Items[str]


class CandidateFile(Document, frozen=True, extra="ignore"):
    """A candidate of a cell: the facts of :class:`mergetune.experiments.engine.Candidate`, and its validation scores.

    Attributes:
        score: the harmonic mean over base and novel classes, or the accuracy on all classes.
        scores: part -> accuracy; version 0.1 wrote none.
    """

    row: str
    options: JsonObject
    experts: Count
    data: str
    parameters: Count
    seconds: Seconds
    score: Percent
    scores: dict[str, Percent] = {}


class AccuracyFile(Document, frozen=True, extra="ignore"):
    """The accuracy of a solution on a target."""

    accuracy: Percent
    images: Size
    standard_error: Number = 0


class RecordFile(Document, frozen=True, extra="ignore"):
    """Fields of all records: settings, and later the counts of :func:`mergetune.experiments.engine.counted`.

    Attributes:
        settings: everything that the results depend on.
        in_words: descriptions of the settings whose values are checksums; version 0.1 wrote none.
        classes: part -> numbers of its classes.
        images: part -> images per class.
        right: row -> part -> right answers per class.
    """

    settings: JsonObject
    in_words: JsonObject = {}
    classes: dict[str, Items[Count]] = {}
    images: dict[str, Items[Count]] = {}
    right: dict[str, dict[str, Items[Count]]] = {}

    @model_validator(mode="after")
    def _right_answers_are_of_the_images(self) -> Self:
        for row, parts in self.right.items():
            for part, right in parts.items():
                of = self.images.get(HOME.get(part, part))
                if of is None or len(of) != len(right):
                    known = "images has no such part" if of is None else f"a list of {len(of):,}, one entry per class"
                    raise fault(("right", row, part), known if of else "a part of images", right)
                wrong = next((i for i, (n, all_) in enumerate(zip(right, of, strict=True)) if n > all_), None)
                if wrong is not None:
                    raise fault(("right", row, part, wrong), f"at most {of[wrong]:,}, the images", right[wrong])
        return self


class CellRecord(RecordFile, frozen=True, extra="ignore"):
    """``cell.json``. The demo's cells have times and paths; those of compare have candidates and the chosen ones.

    Attributes:
        select: classes whose validation images chose: "base", "both" or "all"; version 0.1 did not say "both".
    """

    cell: CellFile
    candidates: Items[CandidateFile] = ()
    left_out: dict[str, str] = {}
    chosen: dict[str, Count] = {}
    select: Literal["base", "both", "all"] = "both"
    milliseconds: dict[str, Seconds] = {}
    paths: dict[str, dict[str, JsonObject]] = {}

    @model_validator(mode="after")
    def _chosen_are_candidates(self) -> Self:
        for row, number in self.chosen.items():
            if number >= len(self.candidates):
                raise fault(("chosen", row), f"below {len(self.candidates):,}, the candidates", number)
        return self


class RunRecordFile(RecordFile, frozen=True, extra="ignore"):
    """``run.json``. Version 0.1 wrote results without counts.

    Attributes:
        incomplete: dataset -> which of its splits have other numbers of images than published.
    """

    run: RunFile
    results: dict[str, dict[str, AccuracyFile]] = {}
    mixes: dict[str, dict[str, Items[Percent]]] = {}
    incomplete: dict[str, str] = {}
    seconds: Seconds = 0


def model_of(names: Mapping[str, Any] | Sequence[str]) -> type[RecordFile]:
    """The model of a record with these fields."""
    return RunRecordFile if "run" in names else CellRecord


def other_settings(record: Mapping[str, Any], head: Mapping[str, Any]) -> list[Difference]:
    """The settings in which a record differs from the head of the wanted one."""
    which = "run" if "run" in head else "cell"
    return differences(
        {**record["settings"], **record[which]},
        {**head["settings"], **head[which]},
        there_in_words=record.get("in_words", {}),
        here_in_words=head.get("in_words", {}),
    )
