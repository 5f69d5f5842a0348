"""The embedded CLIP and its icons: a dataset of 100 classes that needs no download."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from mergetune.clip import FrozenClip, load_clip
from mergetune.data import Dataset, ImageFolder, cache_features
from mergetune.experiments.cells import Task

TEMPLATE = "an icon of a {}"
STAGE_1 = {"epochs": 50, "batch_size": 64, "lr": 0.01}
PRECISION = "float32"  # so that the figures do not depend on what the machine is fastest at


def load_icons(folder: Path) -> tuple[FrozenClip, Dataset]:
    """The embedded CLIP, and its images as ordinary files in ``folder``."""
    assets = files("mergetune") / "assets"
    with as_file(assets / "icon-clip") as model:
        clip = load_clip(f"local-dir:{model}")
    images = folder / "images"
    with as_file(assets / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        if not images.is_dir() or sum(1 for _ in images.rglob("*.png")) != len(content.namelist()):
            content.extractall(images)
    return clip, ImageFolder(images)


def icons_task(
    folder: str | Path, *, progress: bool = False, report: Callable[[str], None] = lambda _: None
) -> tuple[FrozenClip, list[Task]]:
    """The embedded CLIP and its icons, encoded in ``folder``."""
    clip, data = load_icons(Path(folder))
    report(f"encoding {len(data.train) + len(data.test)} images once")
    caches = {
        part: cache_features(clip, images, Path(folder) / "cache" / part, progress=progress)
        for part, images in (("train", data.train), ("test", data.test))
    }
    return clip, [Task("icons", **caches, templates=(TEMPLATE,))]
