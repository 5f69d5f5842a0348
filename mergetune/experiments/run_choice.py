"""The folder of an experiment's results: other settings with the same ``--out`` get a folder beside the first."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetune.clip import FrozenClip
from mergetune.data import Dataset
from mergetune.experiments.canary import retained_images
from mergetune.experiments.engine import begun, kept
from mergetune.experiments.records import model_of, other_settings
from mergetune.facts import FitOptions, TuneOptions, recorded
from mergetune.facts.function_options import BACKGROUND
from mergetune.io import jsonable, writing_in
from mergetune.solutions import Solution
from mergetune.training.run_folders import (
    FILES,
    PARTS,
    choose_folder,
    numbered_runs,
    read_call,
    recorded_settings,
    refuse_links,
    remove_files,
    walk_folders,
    way_down,
)
from mergetune.training.run_settings import Difference, solution_in_words
from mergetune.training.runs import short_digest

_CACHED = ("clip", "fingerprint", "images", "background")  # what a cache depends on
_CELL_FILES = ("cell.json", "run.json", "class-weights.safetensors", *FILES)


def cells_folder(
    out: str | Path,
    heads: Mapping[Path, Mapping[str, Any]],
    *,
    overwrite: bool = False,
    held: contextlib.ExitStack | None = None,
) -> Path:
    """Returns the folder for the records of cells or runs: ``out``, or a numbered folder in it.

    All records are begun there before the folder is given to another process. More cells with equal settings go to the
    folder of the first ones.

    Args:
        out: folder that the user gave; created if missing.
        heads: record file below the folder -> what it holds before any work, see
            :func:`mergetune.experiments.engine.begun`.
        overwrite: replace the results in ``out`` that share a table with these cells: their records, solutions and
            class weights are deleted. Caches, other runs and files that mergetune did not write stay.
        held: receives the lock of the folder, before another process can choose the folder.

    Raises:
        ValueError: a record in ``out`` is damaged, or ``out`` is a file.
        RuntimeError: another process works in the folder.
    """
    out, heads = Path(out), {file: jsonable(head) for file, head in heads.items()}

    def other(folder: Path) -> list[Difference] | None:
        # Cells beside the wanted ones differ from them in the cell: settings alone tell whether they belong together.
        wanted = {folder / file: head for file, head in heads.items()}
        beside = {found: head for file, head in heads.items() for found in _alike(folder, file) if found not in wanted}
        there = False
        for file, head in (wanted | beside).items():
            record, which = kept(file, model_of(head)), "run" if "run" in head else "cell"
            if record is None:
                continue
            there = True
            if apart := other_settings(record, head if file in wanted else head | {which: record[which]}):
                return apart
        return [] if there else None

    def begin(folder: Path) -> None:
        refuse_links(folder, dict.fromkeys(file.parent for file in heads))
        for file, head in heads.items():
            begun(folder / file, head)

    def replace(folder: Path) -> None:
        refuse_links(folder, dict.fromkeys(file.parent for file in heads))
        with writing_in(folder):
            for found in dict.fromkeys(found for file in heads for found in _alike(folder, file)):
                for inner in list(walk_folders(found.parent)):
                    remove_files(inner, _CELL_FILES)

    return choose_folder(out, other, begin, replace=replace if overwrite else None, held=held)


def _alike(folder: Path, file: Path) -> Sequence[Path]:
    """The records that share a table with a wanted one: all below its first folder, or beside its only folder.

    Records behind links are those of other folders.
    """
    first, *rest = file.parent.parts
    levels = "/".join(["*"] * (len(rest) or 1))
    found = sorted((folder / first if rest else folder).glob(f"{levels}/{file.name}"))
    return [path for path in found if not any(map(Path.is_symlink, way_down(folder, path.parent.relative_to(folder))))]


def dataset_call(
    clip: FrozenClip,
    data: Dataset,
    tuned: Sequence[Solution],
    *,
    method: str,
    tune_options: Mapping[str, Any] | None,
    fit_options: Mapping[str, Any] | None,
    choosing: bool = True,
    retain: Dataset | None = None,
    ignored: Mapping[str, int] | None = None,
    background: str = BACKGROUND,
    **settings: Any,
) -> dict[str, Any]:
    """The settings and descriptions of a call of :func:`fit_dataset`, as arguments of ``run_folder``.

    Args:
        clip, data, tuned, method, tune_options, fit_options, choosing: see :func:`fit_dataset`. ``lam`` and ``tau``
            that are not given and not switched off count as "chosen".
        retain: pictures of other classes, see :func:`fit_dataset`.
        ignored: not used: files that are left out change no result.
        background: colour under transparent pixels, see :func:`mergetune.cache_features`.
        settings: its other settings that the result depends on.

    Raises:
        ValueError: ``retain`` holds classes that are trained, or a single class.
    """
    given = dict(fit_options or {})
    pictures = None if retain is None else retained_images(retain, data.classnames)
    options = recorded(FitOptions(**given)) | {
        name: "chosen" for name in ("lam", "tau") if choosing and name not in given
    }
    stage_1 = {} if tuned else recorded(TuneOptions(**{"method": method, **(tune_options or {})}))
    splits = [images for images in (data.full_train, data.full_val, data.full_test) if images is not None]
    asked = {
        **{name: value for name, value in options.items() if name not in ("zero_shot", "seed")},
        **{f"tune {name}": value for name, value in stage_1.items() if name not in ("method", "zero_shot", "seed")},
        **settings,
        "choosing": choosing,
        **({} if background == BACKGROUND else {"background": background}),
        "retain": None if pictures is None else short_digest(repr((pictures.files, pictures.labels))),
        "method": method,
        "tuned": [short_digest(*solution.whole_identity) for solution in tuned] or None,
        "clip": clip.name,
        "fingerprint": clip.fingerprint,
        "classnames": list(data.classnames),
        "images": short_digest(repr([(images.files, images.labels) for images in splits])),
    }
    in_words = {
        "tuned": [solution_in_words(solution) for solution in tuned],
        "fingerprint": clip.name,
        "images": f"{sum(map(len, splits)):,} of {len(data.classnames):,} classes",
        "retain": None if pictures is None else f"{len(pictures):,} of {len(pictures.classnames):,} other classes",
    }
    return {"asked": asked, "in_words": in_words, "parts": PARTS}


def dataset_cache(out: str | Path, run: Path) -> Path:
    """The folder of the feature caches of a run of :func:`fit_dataset` in ``out``.

    Runs with the same images and CLIP share the caches of the first of them.
    """
    own = read_call(run)
    for folder in (Path(out), *(folder for _, folder in numbered_runs(Path(out)))):
        with contextlib.suppress(ValueError):  # a damaged record is that of no run to share with
            call = read_call(folder)
            there = (recorded_settings(folder) or ({}, {}))[0] if call is None else call.settings
            names = [name for name in _CACHED if name in there or call is not None]
            if own is None or all(there.get(name) == own.settings.get(name) for name in names):
                return folder / "cache"
    return run / "cache"
