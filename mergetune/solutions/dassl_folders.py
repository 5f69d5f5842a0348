"""Folders of Dassl, the trainer of CoOp's family: which checkpoint a path means, and which checkpoints are near it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mergetune.io import read_regular, require_file
from mergetune.solutions.other_trainers import folder_of_other

LEARNERS = ("prompt_mid_learner", "prompt_learner")
"""Folders of the prompt in the folder of a run, in the order in which they are looked for."""
BEST = "model-best.pth.tar"
NUMBERED = re.compile(r"model\.pth\.tar-(\d+)|model-(\d+)\.pth\.tar")
MOST_FOLDERS, DEEPEST = 2000, 6  # folders that are searched for checkpoints below a folder


def checkpoint_file(path: str | Path) -> Path:
    """Path of the checkpoint file at a path: the file itself, or the file of a folder.

    Args:
        path: a file such as ``model.pth.tar-N`` or ``model-best.pth.tar``, or its folder, or a folder that contains
            ``prompt_learner`` or the official code's ``prompt_mid_learner``. In a folder, the file that Dassl's text
            file ``checkpoint`` names is taken, else the one with the highest epoch.

    Raises:
        FileNotFoundError: no checkpoint at ``path``; the message names the checkpoints near it.
        ValueError: the folder is a run of another trainer.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        found = near_checkpoints(path)
        way_on = f": {found}" if found else ""
        require_file(path, f"path must be a checkpoint or its folder, got {path}, which does not exist{way_on}")
    folder = next((path / learner for learner in LEARNERS if (path / learner).is_dir()), path)
    if (folder / "checkpoint").is_file():
        name = read_regular(folder / "checkpoint").decode("utf-8-sig", errors="replace").strip()
        if named := [file for file in folder.iterdir() if file.name == name]:
            return named[0]
    if numbered := _epochs(folder):
        return numbered[max(numbered)]
    if (folder / BEST).is_file():
        return folder / BEST
    if other := folder_of_other(path):
        raise ValueError(f"path must be a run of CoOp's family, got {path}: {other}")
    found = near_checkpoints(path)
    raise FileNotFoundError(
        f"path must contain model.pth.tar-N or {BEST}, got {path} with neither{f': {found}' if found else ''}"
    )


def near_checkpoints(path: Path) -> str:
    """What to give in place of a path without a checkpoint: epochs beside it, or folders below it; "" for nothing."""
    if not path.is_dir():
        for folder in (path.parent, *(path.parent / learner for learner in LEARNERS)):
            if not folder.is_dir():
                continue
            epochs = sorted(_epochs(folder))
            shown = [str(epoch) for epoch in (epochs if len(epochs) <= 8 else epochs[:4])]
            shown += ["...", *(str(epoch) for epoch in epochs[-3:])] if len(epochs) > 8 else []
            there = [f"epoch{'s' * (len(epochs) > 1)} {', '.join(shown)}"] if epochs else []
            there += [BEST] if (folder / BEST).is_file() else []
            if there:
                return f"{folder} holds {' and '.join(there)}"
        return ""
    below = list(_runs_below(path))
    more = ", ..." if len(below) > 4 else ""
    return f"checkpoints are in {', '.join(map(str, below[:4]))}{more}; give one of them" if below else ""


def _epochs(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by the number of their epoch."""
    found = ((NUMBERED.fullmatch(file.name), file) for file in folder.iterdir())
    return {int(match[1] or match[2]): file for match, file in found if match}


def _runs_below(folder: Path) -> Iterator[Path]:
    """The folders of runs below a folder, at most five, in a search that is bounded."""
    found, depth = 0, len(folder.parts)
    for number, (place, folders, files) in enumerate(os.walk(folder)):
        folders.sort()
        if number >= MOST_FOLDERS or found == 5:
            return
        here = Path(place)
        if len(here.parts) - depth >= DEEPEST:
            folders.clear()
        if here != folder and any(name == BEST or NUMBERED.fullmatch(name) for name in files):
            found += 1
            yield here.parent if here.name in LEARNERS and here.parent != folder else here
