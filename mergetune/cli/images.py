"""`mergetune cache`: images to features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergetune.cli.options import (
    AllowTorchscript,
    Backbone,
    Device,
    Json,
    MaxPixels,
    Pretrained,
    Root,
    Workers,
)
from mergetune.cli.shared import errors, finish, open_images
from mergetune.data import MAX_PIXELS


def cache(
    images: Annotated[Path, typer.Argument(help="Folder of class folders, a .csv/.json list; with --root a name.")],
    folder: Annotated[Path, typer.Option("--out", help="The caches: one folder each for train, val and test.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    views: Annotated[int, typer.Option(help="Views of each image; all but the first are augmented.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    root: Root = None,
    workers: Workers = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    skip_unreadable: Annotated[bool, typer.Option(help="Leave unreadable images out instead of stopping.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Rebuild a cache of other images or another model.")] = False,
    as_json: Json = False,
) -> None:
    """Encode images once. Interrupted, the same command goes on; under torchrun the ranks share the work."""
    import mergetune as mt

    with errors():
        data = open_images(images, root)
        clip = mt.load_clip(backbone, pretrained, device=device, allow_torchscript=allow_torchscript)
        report = {}
        for split in ("train", "val", "test"):
            if getattr(data, f"full_{split}") is None:
                continue
            made = mt.cache_features(
                clip,
                getattr(data, split),
                folder / split,
                dtype=dtype,
                views=views if split == "train" else 1,
                batch_size=batch_size,
                workers=workers,
                max_pixels=max_pixels,
                on_error="skip" if skip_unreadable else "raise",
                overwrite=overwrite,
            )
            report[split] = {"images": len(made), "classes": len(made.classnames), "skipped": len(made.skipped)}
    finish(as_json, report, f"feature caches in {folder}", report)
