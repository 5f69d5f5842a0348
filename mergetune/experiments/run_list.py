"""A list of runs: what is in a folder of results, how far each run is, what differs, and what came of it."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mergetune.experiments.engine import kept
from mergetune.experiments.records import HOME, CellRecord, RunRecordFile
from mergetune.facts.brief import brief
from mergetune.io import Document, JsonObject, Number, damaged, read_document
from mergetune.training.run_folders import CALL, WAY_ON, read_call, recorded_settings, walk_folders
from mergetune.training.run_settings import flat, is_digest, shown
from mergetune.training.runs import RESULT, STATE, ResultFile, read_state

CELL, RUN, REPORT = "cell.json", "run.json", "report.json"
_RECORDS = (CELL, RUN, CALL, STATE, RESULT)
_NOT_RUNS = ("cache", "images")  # folders of OUT that hold no runs
_DEPTH = 8  # levels of folders that are searched
_HIDDEN = ("start", "precision", "fingerprint")  # settings that follow from others


class _ReportEntry(Document, frozen=True, extra="ignore"):
    accuracy: Number


class _Measured(Document, frozen=True, extra="ignore"):
    base: _ReportEntry
    novel: _ReportEntry
    hm: Number


class _ReportFile(Document, frozen=True, extra="ignore"):
    """``report.json`` of fit on images.

    Attributes:
        reports: part of the test images -> row -> accuracy, and more.
        row: row of the saved solution; version 0.1 wrote none.
        measured: row -> the accuracies of the measuring run; None without this run.
        seconds: part of the work -> seconds of the last call.
    """

    reports: dict[str, dict[str, JsonObject]] = {}
    row: str | None = None
    measured: dict[str, _Measured] | None = None
    seconds: dict[str, Number] = {}


@brief()
@dataclass(frozen=True)
class RunRow:
    """One run in a list of runs.

    Attributes:
        name: folder below the one that was listed; "." is that folder itself.
        number: number of the run in its OUT; None for cells of an experiment.
        state: "finished", "epoch 12 of 50", "started" or "damaged".
        settings: the settings that differ between the runs of the list.
        results: accuracies and losses by column, in percent and nats.
        when: local time of the last change.
        seconds: seconds of the whole run; of its training alone where nothing else is recorded; None without a record.
        error: what is wrong with a damaged run.
    """

    name: str
    number: int | None
    state: str
    settings: dict[str, str] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    when: str = ""
    seconds: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def list_runs(out: str | Path, *, sort: str | None = None) -> list[RunRow]:
    """Returns the runs in a folder and below it.

    Works on the ``out`` of tune, fit, fit_dataset, run_demo, compare and reproduce, on a folder that holds several of
    them, and on folders of version 0.1. A run whose record is damaged is a row with its error.

    Args:
        out: the folder.
        sort: column to sort by: a setting, a result, "name", "state", "when" or "seconds"; the best results come first.
            None sorts by folder and number.

    Raises:
        FileNotFoundError: ``out`` is no folder.
        ValueError: no run has the column ``sort``.
    """
    out = Path(out)
    if not out.is_dir():
        raise FileNotFoundError(f"OUT must be a folder, and {out} does not exist or is a file")
    found = [_row(folder, out) for folder in _run_folders(out, _DEPTH)]
    rows = [replace(row, settings=settings) for (row, _), settings in zip(found, _differing(found), strict=True)]
    rows.sort(key=lambda row: _natural(row.name))
    return rows if sort is None else _sorted(rows, sort)


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yields folders with the record of a run. Below one of them only its numbered runs are looked for."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # its row says why
        yield folder
        return
    there = any(name in _RECORDS for name in names)
    if there:
        yield folder
    if not depth:
        return
    for inner in (folder / name for name in names):
        if inner.is_symlink() or not inner.is_dir() or inner.name.startswith(".") or inner.name in _NOT_RUNS:
            continue
        if not there or re.fullmatch(r"run-[0-9]+(-.*)?", inner.name):
            yield from _run_folders(inner, depth - 1)


def _row(folder: Path, out: Path) -> tuple[RunRow, dict[str, Any]]:
    """The row of a run without its settings, and the settings of the run with descriptions in place of checksums."""
    name = folder.relative_to(out).as_posix()
    match = re.fullmatch(r"run-([0-9]+)(-.*)?", folder.name)
    row = RunRow(name, number=int(match[1]) if match else None, state="")
    try:
        os.listdir(folder)  # a folder that cannot be read is no run without records
        row = replace(row, when=_when(folder))
        if (folder / CELL).exists() or (folder / RUN).exists():
            return _cell_row(row, folder)
        return _training_row(replace(row, number=row.number or 1), folder)
    except (ValueError, OSError) as error:
        return replace(row, state="damaged", error=str(error)), {}
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:  # a value of another type than ours
        return replace(row, state="damaged", error=f"the records in {folder} are damaged: {error!r}; {WAY_ON}"), {}


def _training_row(row: RunRow, folder: Path) -> tuple[RunRow, dict[str, Any]]:
    """The row of tune, fit or fit_dataset."""
    call, recorded = read_call(folder), recorded_settings(folder)
    settings, words = (call.settings, call.in_words) if call is not None else recorded or ({}, {})
    result = read_document(folder / RESULT, ResultFile, way_on=WAY_ON) if (folder / RESULT).exists() else None
    parts = [folder, *(folder / part for part in (call.parts if call is not None else ()))]
    state, results = "started", {}
    for where in parts:
        if not (where / STATE).exists() and not (where / RESULT).exists():
            continue
        own, _ = read_state(where / STATE) if (where / STATE).exists() else (None, None)
        history = own.history if own is not None else result.history if result is not None else ()
        epochs = (own.settings if own is not None else {}).get("epochs", len(history))
        if isinstance(epochs, bool) or not isinstance(epochs, int):
            raise damaged(where / STATE, ("settings", "epochs"), "be a whole number", epochs, way_on=WAY_ON)
        state = "finished" if len(history) >= epochs and where == folder else f"epoch {len(history)} of {epochs}"
        state = state if where == folder else f"{where.name}: {state}"
        if where == folder and history:
            results = {"loss": history[-1]["loss"]} if "loss" in history[-1] else {}
            scores = [entry["val_accuracy"] for entry in history if "val_accuracy" in entry]
            results |= {"val_accuracy": max(scores)} if scores else {}
        break
    if (folder / REPORT).exists():
        report = read_document(folder / REPORT, _ReportFile, way_on="delete it and run the command again")
        found = {part: _report_rows(found, folder) for part, found in report.reports.items()}
        results = _accuracies(found, report.row) | _measured(report) | results
    else:
        report = _ReportFile()
    seconds = None if result is None else result.timings.get("seconds")
    if seconds is not None and report.seconds:  # a call of a finished run takes little time and trains nothing
        seconds = max(sum(report.seconds.values()), _seconds_of_training(parts))
    return replace(row, state=state, results=results, seconds=seconds), _in_words(settings, words)


def _measured(report: _ReportFile) -> dict[str, float]:
    """Accuracies of the saved row in the measuring run, where the saved solution itself knows all classes."""
    found = (report.measured or {}).get(report.row or "")
    if found is None or "all" not in report.reports:
        return {}
    return {"your classes": found.base.accuracy, "new classes": found.novel.accuracy, "HM": found.hm}


def _seconds_of_training(parts: Sequence[Path]) -> float:
    """Seconds of all trainings that are recorded in the folder of a run and in those of its parts."""
    below = [folder for part in parts[1:] if part.is_dir() for folder in walk_folders(part)]
    files = [folder / RESULT for folder in (parts[0], *below) if (folder / RESULT).is_file()]
    read = [read_document(file, ResultFile, way_on=WAY_ON) for file in files]
    return sum(record.timings.get("seconds", 0.0) for record in read)


def _report_rows(found: Mapping[str, Any], folder: Path) -> dict[str, float]:
    rows = {}
    for name, entry in found.items():
        try:
            rows[name] = _ReportEntry.model_validate(entry).accuracy
        except ValueError:
            raise ValueError(f"{folder / REPORT} is damaged: {name!r} must have a number accuracy") from None
    return rows


def _cell_row(row: RunRow, folder: Path) -> tuple[RunRow, dict[str, Any]]:
    """The row of a cell of compare and demo, or of a run of a protocol."""
    if (folder / CELL).exists():
        record, which = kept(folder / CELL, CellRecord) or {}, "cell"
    else:
        record, which = kept(folder / RUN, RunRecordFile) or {}, "run"
    found: dict[str, dict[str, float]] = {}
    for name, parts in record.get("right", {}).items():
        for part, right in parts.items():
            images = sum(record["images"][HOME.get(part, part)])
            found.setdefault(part, {})[name] = 100 * sum(right) / max(1, images)
    for part, rows in record.get("results", {}).items():
        found.setdefault(part, {name: entry["accuracy"] for name, entry in rows.items()})
    state = "finished" if found else "validated" if "candidates" in record else "started"
    settings = _in_words({**record["settings"], **record[which]}, record.get("in_words", {}))
    return replace(row, state=state, results=_accuracies(found), seconds=record.get("seconds")), settings


def _accuracies(parts: Mapping[str, Mapping[str, float]], row: str | None = None) -> dict[str, float]:
    """Accuracy on each part of the test images, and the harmonic mean of base and novel classes.

    Args:
        parts: part -> row -> accuracy.
        row: the wanted row; None, or a row that a part lacks, takes MERGETUNE, or else the last row.
    """
    found = {}
    for part, rows in parts.items():
        if rows and part not in HOME:
            usual = next((name for name in rows if name.startswith("MERGETUNE")), list(rows)[-1])
            found["accuracy" if part == "all" else part] = rows.get(row or "", rows[usual])
    if found.keys() >= {"base", "novel"}:
        total = found["base"] + found["novel"]
        found["HM"] = 2 * found["base"] * found["novel"] / total if total else 0.0
    return found


def _in_words(settings: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """Settings on one level; a checksum becomes a pair of it and its description."""
    words = flat(words)
    return {
        name: (value, words.get(name)) if is_digest(value) else value
        for name, value in flat(settings).items()
        if name not in _HIDDEN
    }


def _differing(found: Sequence[tuple[RunRow, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """For each run the settings that differ between runs, in words; things with equal descriptions are numbered."""
    columns: dict[str, dict[int, str]] = {}
    for name in dict.fromkeys(name for _, settings in found for name in settings):
        values = {i: settings[name] for i, (_, settings) in enumerate(found) if name in settings}
        distinct = list({repr(value): value for value in values.values()})
        if len(distinct) > 1:
            columns[name] = {i: _text(value, distinct.index(repr(value)) + 1) for i, value in values.items()}
    return [{name: column[i] for name, column in columns.items() if i in column} for i in range(len(found))]


def _text(value: Any, number: int) -> str:
    if not isinstance(value, tuple):
        return shown(value)
    _, words = value
    said = ", ".join(map(str, words)) if isinstance(words, list) else shown(words) if isinstance(words, dict) else words
    return f"{said} ({number})" if said else f"({number})"


def _sorted(rows: list[RunRow], column: str) -> list[RunRow]:
    def value(row: RunRow) -> Any:
        if column in row.results:
            return row.results[column] * (1 if column == "loss" else -1)
        if column in ("name", "state", "when", "seconds"):
            return getattr(row, column)
        return row.settings.get(column)

    known = [row for row in rows if value(row) is not None]
    if not known:
        columns = dict.fromkeys(name for row in rows for name in (*row.settings, *row.results))
        names = ", ".join(["name", "state", *columns, "when", "seconds"])
        raise ValueError(f"--sort must be one of {names}, got {column!r}")

    def key(row: RunRow) -> Any:
        found = value(row)
        return [(0, found, "")] if isinstance(found, float | int) else _natural(found)

    return sorted(known, key=key) + [row for row in rows if row not in known]


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sorts numbers in a text by their value: run-10 stands behind run-2."""
    parts = re.findall(r"[0-9]+(?:\.[0-9]+)?|[^0-9]+", "" if text == "." else text)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


def _when(folder: Path) -> str:
    times = [(folder / name).stat().st_mtime for name in (*_RECORDS, REPORT) if (folder / name).is_file()]
    return f"{datetime.datetime.fromtimestamp(max(times)):%Y-%m-%d %H:%M}" if times else ""
