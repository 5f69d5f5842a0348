"""`mergetune cache` encodes images and saves their features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.dry_runs import DryRun, print_forecast
from mergetune.cli.options import (
    AllowTorchscript,
    Backbone,
    ClassNames,
    Device,
    Json,
    Precision,
    Pretrained,
    Root,
    SkipUnreadable,
    SplitSeed,
    TestShare,
    ValShare,
    takes,
)
from mergetune.cli.running import first_rank, suggest
from mergetune.cli.shared import announce, errors, finish, ignored_in, open_images, refuse_out_inside
from mergetune.facts import CacheOptions


@takes(CacheOptions)
def cache(
    images: Annotated[
        Path,
        typer.Argument(help="Folder of class folders, or a .csv/.json list; with --root the name of a benchmark."),
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the caches train, val and test.")],
    backbone: Backbone,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    precision: Precision = "float32",
    root: Root = None,
    classnames: ClassNames = None,
    val_share: ValShare = None,
    test_share: TestShare = None,
    split_seed: SplitSeed = None,
    skip_unreadable: SkipUnreadable = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Encode images once and save their features.

    If the command is interrupted, run it again: it continues where it stopped. Under torchrun the ranks share the work.
    """
    import mergetune as mt
    from mergetune.clip.class_texts import check_texts
    from mergetune.data.image_files import describe_ignored
    from mergetune.experiments.own_forecast import forecast_caches
    from mergetune.experiments.own_plan import require_classes

    with errors():
        options |= {"on_error": "skip"} if skip_unreadable else {}
        if root is None:
            refuse_out_inside(images, folder)
        data = open_images(images, root, classnames=classnames, val=val_share, test=test_share, seed=split_seed)
        require_classes(data.classnames)
        ignored = ignored_in(images, data) if root is None else {}
        if ignored and first_rank():
            announce(as_json)(describe_ignored(ignored))
        clip = mt.load_clip(
            backbone, pretrained, device=device, precision=precision, allow_torchscript=allow_torchscript
        )
        check_texts(clip, data.classnames)
        report, views = {}, options.pop("views")
        splits = [split for split in ("train", "val", "test") if getattr(data, f"full_{split}") is not None]
        parts = {split: (getattr(data, split), views if split == "train" else 1) for split in splits}
        if dry_run:
            found = forecast_caches(clip, parts, dtype=options["dtype"], workers=options["workers"])
            print_forecast(found, as_json, f"Would encode {images} with {clip.name} into {folder}.")
            return
        for split, (listed, own) in parts.items():
            made = mt.cache_features(clip, listed, folder / split, views=own, **options)
            report[split] = {"images": len(made), "classes": len(made.classnames), "skipped": len(made.skipped)}
    if "train" in report:
        suggest("tune", "--cache", folder / "train", "--out", folder.parent / "tuned")
    finish(as_json, report, f"feature caches in {folder}", report)
