"""`mergetune cache` encodes images and saves their features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from mergetune.cli.clip_choice import clip_for
from mergetune.cli.dry_runs import DryRun, print_forecast
from mergetune.cli.options import (
    AllowTorchscript,
    BackboneIfNeeded,
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
from mergetune.cli.shared import (
    announce,
    errors,
    finish,
    ignored_in,
    open_images,
    refuse_out_inside,
)
from mergetune.facts import CacheOptions

SPLITS = ("train", "val", "test")


@takes(CacheOptions)
def cache(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the caches train, val and test.")],
    images: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of class folders, or a .csv/.json list; with --root the name of a benchmark. "
            "With --verify and without IMAGES, the caches in --out are only checked."
        ),
    ] = None,
    backbone: BackboneIfNeeded = None,
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

    If the command is interrupted, run it again: it continues where it stopped. Where features are damaged, it encodes
    only the damaged rows again. Under torchrun the ranks share the work.
    """
    import mergetune as mt
    from mergetune.clip.class_texts import check_texts
    from mergetune.data.image_files import describe_ignored
    from mergetune.experiments.own_forecast import forecast_caches
    from mergetune.experiments.own_plan import require_classes

    with errors():
        options |= {"on_error": "skip"} if skip_unreadable else {}
        if images is None:
            if not options["verify"]:
                raise ValueError("IMAGES must be given, got none: only --verify does without")
            finish(as_json, _verified(folder), f"feature caches in {folder} are whole", {})
            return
        if root is None:
            refuse_out_inside(images, folder)
        data = open_images(images, root, classnames=classnames, val=val_share, test=test_share, seed=split_seed)
        require_classes(data.classnames)
        ignored = ignored_in(images, data) if root is None else {}
        if ignored and first_rank():
            announce(as_json)(describe_ignored(ignored))
        clip = clip_for(
            backbone, pretrained, device=device, precision=precision, allow_torchscript=allow_torchscript,
            caches=_recorded(folder) if backbone is None else (),
        )  # fmt: skip
        check_texts(clip, data.classnames)
        report, views = {}, options.pop("views")
        splits = [split for split in SPLITS if getattr(data, f"full_{split}") is not None]
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


def _caches_in(folder: Path) -> list[Path]:
    """The caches in the folder, also unfinished ones, or the folder itself."""
    from mergetune.data.cache_files import is_cache

    return [path for path in (folder, *(folder / split for split in SPLITS)) if is_cache(path)]


def _recorded(folder: Path) -> Sequence[Any]:
    """What the caches in the folder record of their backbone; the features are not read."""
    from mergetune.data.cache_files import read_manifest

    found = []
    for path in _caches_in(folder):
        with suppress(ValueError):  # what is damaged or unfinished is said when it is opened
            manifest = read_manifest(path)
            origin = {"backbone": manifest.clip, "fingerprint": manifest.fingerprint, "dim": manifest.dim}
            found.append(SimpleNamespace(path=path, **origin))
    return found


def _verified(folder: Path) -> dict[str, Any]:
    """Compares the checksums of all caches in the folder; ValueError names everything that is damaged."""
    import mergetune as mt

    report, damage = {}, []
    for path in _caches_in(folder):
        try:
            cache = mt.FeatureCache.open(path)
            cache.verify()
            report[path.name] = {"images": len(cache), "classes": len(cache.classnames), "skipped": len(cache.skipped)}
        except ValueError as error:
            damage.append(str(error))
    if damage:
        more = f" ({len(damage)} caches in {folder} are damaged, this is the first)" if len(damage) > 1 else ""
        raise ValueError(damage[0] + more)
    if not report:
        raise FileNotFoundError(f"--out must hold feature caches, got {folder} without any")
    return report
