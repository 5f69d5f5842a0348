"""Folders of runs: other settings with the same ``--out`` get a folder beside the first run, equal settings their own.

The first run lives in OUT itself; the next ones live in ``OUT/run-2-lam-4`` and so on, named by their number and by the
settings that differ from those of the first run. ``call.json`` in such a folder records the settings of the call. A
folder without that file, as version 0.1 and :func:`mergetune.fit` leave it, is known by the settings in its state or
result.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from mergetune.io import (
    LOCK,
    Document,
    Items,
    JsonObject,
    fault,
    jsonable,
    locked,
    read_document,
    scratch_folder,
    torchrun_team,
    write_json,
    writing_in,
)
from mergetune.training.run_settings import Difference, differences
from mergetune.training.runs import RESULT, STATE, ResultFile, read_state

CALL = "call.json"
_NUMBERED = re.compile(r"run-([0-9]+)(?:-(.+))?", re.DOTALL)
_FEW = 1_000_000  # larger numbers are hardly ours: the next run is not numbered from them
_IN_NAME = 3  # most differences in the name of a folder
_FORMAT = "mergetune.call/1"
WAY_ON = "delete it to start the run anew"
SOLUTION = ("solution.json", "solution.safetensors")
FILES = (STATE, RESULT, *SOLUTION, "report.json", "paths.png")
"""The files of a run; replacing a run deletes these and no others."""


PARTS = ("tuned", "measure", "mergetune")
"""Folders below a run's folder in which its earlier stages keep their files."""


def _known_parts(names: tuple[str, ...]) -> tuple[str, ...]:
    for i, name in enumerate(names):
        if name not in PARTS:  # files are deleted there: it must be a folder that mergetune made
            raise fault((i,), f"one of {', '.join(PARTS)}", name)
    return names


class CallFile(Document, frozen=True, extra="ignore"):
    """``call.json``: what a run was asked to do.

    Attributes:
        format: name and version of the format.
        settings: everything that tells the run from others.
        in_words: descriptions of the settings whose values are checksums.
        parts: those of ``PARTS`` that the run has.
        started: local time of the first call.
    """

    format: Literal["mergetune.call/1"]
    settings: JsonObject
    in_words: JsonObject = {}
    parts: Annotated[Items[str], AfterValidator(_known_parts)] = ()
    started: str


def run_folder(
    out: str | Path,
    asked: Mapping[str, Any],
    *,
    in_words: Mapping[str, Any] = {},
    older: Mapping[str, Any] | None = None,
    parts: Sequence[str] = (),
    overwrite: bool = False,
    held: contextlib.ExitStack | None = None,
) -> Path:
    """Returns the folder of the run with these settings: ``out``, or a numbered folder in it.

    Processes that call at once are served one after the other, so different settings never share a folder. Under
    torchrun rank 0 decides for all ranks.

    Args:
        out: folder that the user gave; created if missing.
        asked: the settings of the call, JSON-able; equal settings are the same run.
        in_words: descriptions of the settings whose values are checksums, for messages and lists.
        older: the settings as earlier versions recorded them, if these are others; such a run is the same run.
        parts: those of ``PARTS`` that the run has. They must not be links, and must hold no link to a folder.
        overwrite: replace the run in ``out`` by this one. ``FILES`` of that run and of its parts are deleted; caches,
            other runs and files that mergetune did not write stay.
        held: receives the lock of the folder, before another process can choose the folder.

    Raises:
        ValueError: the record of the run in ``out`` is damaged, ``out`` is a file, or a part is a link.
        RuntimeError: another process works in the folder, or with ``overwrite`` in ``out``.
    """
    out = Path(out)
    call = {"format": _FORMAT, "settings": jsonable(asked), "in_words": jsonable(in_words), "parts": list(parts)}

    def other(folder: Path) -> list[Difference] | None:
        found = _differences(folder, asked, in_words)
        return [] if found and older is not None and _differences(folder, older, in_words) == [] else found

    def begin(folder: Path) -> None:
        refuse_links(folder, parts)
        if not (folder / CALL).exists() and not _has_state(folder):
            write_json(folder / CALL, call | {"started": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"})

    def replace(folder: Path) -> None:
        refuse_links(folder, parts)
        _remove_run(folder)

    return choose_folder(out, other, begin, replace=replace if overwrite else None, held=held)


def choose_folder(
    out: Path,
    other: Callable[[Path], list[Difference] | None],
    begin: Callable[[Path], None],
    *,
    replace: Callable[[Path], None] | None = None,
    held: contextlib.ExitStack | None = None,
) -> Path:
    """Returns the first folder of a run that fits, or a new one, under a lock and on rank 0 for all ranks.

    Args:
        out: folder that the user gave.
        other: how the run in a folder differs: an empty list if it is the wanted one, None if there is no run.
        begin: records the wanted run in its folder, so that no other process takes the folder.
        replace: removes the run in ``out``, which is then free; None keeps it.
        held: receives the lock of the folder, which is taken before ``begin``.
    """
    with torchrun_team() as team:
        return team.lead(lambda: _choose(out, other, begin, replace, held))


def _choose(
    out: Path,
    other: Callable[[Path], list[Difference] | None],
    begin: Callable[[Path], None],
    replace: Callable[[Path], None] | None,
    held: contextlib.ExitStack | None,
) -> Path:
    def take(folder: Path) -> None:
        if held is not None:
            held.enter_context(writing_in(folder))

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".runs.lock", busy="", wait=True):
        if replace is not None:
            replace(out)
        first = other(out)
        if not first:  # no run, or the wanted one
            take(out)
            begin(out)
            return out
        for _, folder in numbered_runs(out):
            with contextlib.suppress(ValueError):  # a damaged record is that of no run that can be continued
                if other(folder) == []:
                    take(folder)
                    begin(folder)  # cells that are new
                    return folder
        name = f"run-{_free_number(out)}-{'_'.join(found.short for found in first[:_IN_NAME])}"
        with scratch_folder(out / name) as place:  # the folder appears with its record
            made = place / name
            made.mkdir()
            begin(made)
            made.rename(out / name)
        take(out / name)
        return out / name


def _free_number(out: Path) -> int:
    """The number after the last one that a file or folder in ``out`` has."""
    taken = {int(match[1]) for name in os.listdir(out) if (match := _NUMBERED.fullmatch(name))}
    number = max((n for n in taken if n < _FEW), default=1) + 1
    while number in taken:
        number += 1
    return max(number, 2)


def numbered_runs(out: Path) -> list[tuple[int, Path]]:
    """The numbered folders of runs in ``out`` with their numbers, in their order."""
    found = [(match, folder) for folder in out.iterdir() if (match := _NUMBERED.fullmatch(folder.name))]
    return sorted((int(match[1]), folder) for match, folder in found if folder.is_dir() and not folder.is_symlink())


@contextlib.contextmanager
def forgotten_if_refused(folder: Path) -> Iterator[None]:
    """Context manager for work that checks its input late: a run that is refused before it trains leaves no record.

    So the corrected command works in the same folder, instead of beside a run that never was.
    """
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError):
        call = read_call(folder) if os.environ.get("RANK", "0") == "0" else None
        if call is not None and not _has_state(folder):
            (folder / CALL).unlink()
            if _NUMBERED.fullmatch(folder.name):  # in OUT itself the corrected command goes on from earlier stages
                places = [inner for part in call.parts for inner in walk_folders(folder / part)]
                for place in (*reversed(places), folder):
                    remove_files(place, (*FILES, LOCK))
                    with contextlib.suppress(OSError):  # a folder with other files stays
                        place.rmdir()
        raise


def _has_state(folder: Path) -> bool:
    """Whether a run has trained in the folder itself."""
    return (folder / STATE).exists() or (folder / RESULT).exists()


def has_begun(folder: Path) -> bool:
    """Whether a run has trained in its folder or in one of its parts. Other runs below the folder do not count."""
    return _has_state(folder) or any(any((folder / part).glob(f"**/{STATE}")) for part in PARTS)


def finished_epochs(folder: Path) -> int:
    """How many epochs the run that trains in this folder has finished; 0 if none, or if its state is damaged."""
    if not (folder / STATE).exists():
        return 0
    try:
        record, _ = read_state(folder / STATE)
    except ValueError:  # reading it for training says what is wrong
        return 0
    return len(record.history)


def run_title(folder: Path) -> str:
    """Number and settings of a run, for people: "run 2 (lam 4) in out/run-2-lam-4"."""
    match = _NUMBERED.fullmatch(folder.name)
    if match is None:
        return f"run 1 in {folder}"
    changed = [re.sub("(?<![0-9]e)-", " ", part) for part in (match[2] or "").split("_") if part]
    settings = f" ({', '.join(changed)})" if changed else ""
    return f"run {int(match[1])}{settings} in {folder}"


def read_call(folder: Path) -> CallFile | None:
    """What a run was asked to do; None without ``call.json``."""
    return read_document(folder / CALL, CallFile, way_on=WAY_ON) if (folder / CALL).exists() else None


def recorded_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings of the run in a folder without ``call.json``, and their descriptions; None if there is no run."""
    found: dict[str, Any] = {}
    words: dict[str, Any] = {}
    for part, prefix in (("tuned", "tune "), ("", "")):  # as fit on images leaves them
        here = folder / part
        if (here / STATE).exists():
            record, _ = read_state(here / STATE)
            settings, words = record.settings, record.in_words
        elif (here / RESULT).exists():
            settings = read_document(here / RESULT, ResultFile, way_on=WAY_ON).settings
        else:
            continue
        found |= {prefix + name: value for name, value in settings.items()}
    return (found, words) if found else None


def _differences(folder: Path, asked: Mapping[str, Any], in_words: Mapping[str, Any]) -> list[Difference] | None:
    call = read_call(folder)
    if call is not None:
        return differences(call.settings, asked, there_in_words=call.in_words, here_in_words=in_words)
    found = recorded_settings(folder)
    if found is None:
        return None
    settings, words = found
    # A training run is compared whole. A call of several stages is compared with what its last stages recorded.
    stages = "stage" not in asked
    return differences(settings, asked, there_in_words=words, here_in_words=in_words, shared_only=stages)


def _remove_run(out: Path) -> None:
    """Deletes the files of the run in ``out``, if there is one: first the record, so that the rest is no run."""
    try:
        call = read_call(out)
        if call is None and recorded_settings(out) is None:
            return
    except ValueError:  # a run whose record is damaged can be replaced
        call = None
    parts = ("tuned",) if call is None and (out / "report.json").is_file() else call.parts if call else ()
    with writing_in(out):
        (out / CALL).unlink(missing_ok=True)
        remove_files(out, FILES)
        for part in parts:
            for folder in list(walk_folders(out / part)):
                remove_files(folder, FILES)


def remove_files(folder: Path, names: Sequence[str]) -> None:
    """Deletes files by their names; links and folders of these names, and folders behind links, stay."""
    if folder.is_symlink():
        return
    for name in names:
        if (folder / name).is_file() and not (folder / name).is_symlink():
            (folder / name).unlink()


def walk_folders(folder: Path, *, skip: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a folder and all folders below it, without hidden ones, those named in ``skip`` and those behind links.

    Nothing is yielded for a link or a folder that is not there.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    yield folder
    for name in sorted(os.listdir(folder)):
        if not name.startswith(".") and name not in skip:
            yield from walk_folders(folder / name, skip=skip)


def refuse_links(folder: Path, below: Iterable[str | Path]) -> None:
    """Refuses to write into folders behind links: what is written there, and deleted later, is not in ``folder``.

    Args:
        folder: the folder of a run, which may be a link itself.
        below: paths from the folder; neither their folders nor the folders in them may be links.

    Raises:
        ValueError: one of them is a link.
    """
    for path in map(Path, below):
        inside = (inner for place in walk_folders(folder / path) for inner in place.iterdir() if inner.is_dir())
        for place in (*way_down(folder, path), *inside):
            if place.is_symlink():
                raise ValueError(
                    f"--out must hold its own folders, and {place} is a link to another one: remove the link"
                )


def way_down(folder: Path, below: Path) -> list[Path]:
    """The folders from a folder down to the path ``below`` in it, without the folder itself."""
    return [folder.joinpath(*below.parts[:depth]) for depth in range(1, len(below.parts) + 1)]
