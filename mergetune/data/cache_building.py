"""Building of feature caches: images are encoded shard by shard, and a repeated call continues a killed build."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mergetune.clip import PRECISIONS
from mergetune.clip.backbone import check_clip
from mergetune.data.cache import FeatureCache
from mergetune.data.cache_documents import FORMAT, Identity, Manifest, Plan, Shard, ShardRecord
from mergetune.data.cache_files import (
    MANIFEST,
    OURS,
    PLAN,
    REBUILD,
    cache_lock,
    finished_shards,
    read_plan,
    record_name,
    remove_building_files,
    remove_cache_files,
    shard_name,
)
from mergetune.data.cache_identity import KEY, image_identity, is_complete, refuse_changed, refuse_stale, relabelled
from mergetune.data.decoding import decode_in_workers, seeded_view
from mergetune.data.image_lists import ImageList
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS
from mergetune.io import compact_json, decoding_rules, hidden, jsonable, read_picture, torchrun_team, write_atomically

if TYPE_CHECKING:
    from mergetune.clip import FrozenClip

SHARD_SIZE, MAX_SHARDS = 1024, 256  # least images per shard, most shards per cache: all shards can stay open


def cache_features(
    clip: FrozenClip,
    images: ImageList,
    path: str | Path,
    *,
    dtype: str = "float32",
    views: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int | None = None,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    background: str = BACKGROUND,
    on_error: str = "raise",
    overwrite: bool = False,
    progress: bool = True,
) -> FeatureCache:
    """Encodes images once into a feature cache on disk, or opens the cache if it exists.

    A call that was interrupted can be repeated: it continues with the first unfinished shard.

    A cache is valid for the image weights, the preprocessing, the decoding of pictures, dtype, views, seed, and the
    names and bytes of the images; a call with others is refused. A call may request fewer images than the cache has, in
    another order, or with other labels; new labels of all images replace the stored labels. Images are compared by
    SHA-256, but read again only if the size or modification time differs from the stored one, so a dataset may be
    copied to another machine.

    View 0 is ``clip.preprocess``. Every other view is ``clip.augment`` with a separate random stream from seed, view
    and file name. The same call on the same machine with the same number of threads gives the same bits, for any
    ``workers``, any number of ranks and after interruptions.

    Under torchrun every rank must make the same call. The ranks share the shards, and must have one file system. A gloo
    process group is created if none exists; it stays afterwards.

    Args:
        clip: the model.
        images: images to encode. Pass the whole split, and take few-shot or base/novel subsets with
            :meth:`FeatureCache.select`.
        path: folder of the cache; created if missing.
        dtype: type of the stored features: "float32", "float16" (relative error below 5e-4) or "bfloat16" (below 4e-3).
        views: V >= 1: the evaluation view and V - 1 augmented views.
        seed: seed of the augmented views.
        batch_size: images per call of the image tower.
        shard_size: images per file. An interrupted build loses at most one shard, and ranks share whole shards. None is
            1,024, or more if the cache would have over 256 files. An unfinished cache must be continued with the same
            size.
        workers: number of processes that decode images; 0 decodes in the calling process.
        max_pixels: largest width times height of an image; a larger image counts as unreadable. Decoding takes about 8
            bytes per pixel in each worker.
        background: colour under transparent pixels, a name or "#rrggbb".
        on_error: "raise" stops the build at an unreadable image and keeps finished shards; "skip" leaves the image out,
            with a warning and an entry in the manifest.
        overwrite: delete an existing cache at ``path`` and build a new one.
        progress: show a bar on a terminal.

    Returns:
        The cache with exactly ``images`` in their order, without the skipped ones.

    Raises:
        ValueError: an invalid argument, an unreadable image, features that are NaN or inf, or a cache that is damaged
            or was built from other images or settings.
        RuntimeError: another process is building the cache, or another rank failed.
        OSError: the disk is full, for example. Finished shards are kept.
    """
    check_clip(clip)
    if isinstance(images, str | Path) or hasattr(images, "full_train"):
        got = repr(images) if isinstance(images, str) else f"a {type(images).__name__}"
        split = hasattr(images, "full_train")
        way_on = "take its train, val or test" if split else "mergetune.ImageFolder reads a folder"
        raise TypeError(f"images must be an ImageList, got {got}: {way_on}")
    if shard_size is None:
        shard_size = max(SHARD_SIZE, -(-len(images) // MAX_SHARDS))
    for name, value, least in (
        ("views", views, 1),
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("workers", workers, 0),
        ("max_pixels", max_pixels, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {dtype!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    path = Path(path)
    fields = {
        "format": FORMAT,
        "clip": clip.name,
        "fingerprint": clip.image_fingerprint,
        "preprocess": jsonable(clip.preprocess_cfg),
        "decoding": decoding_rules(background),
        "dtype": dtype,
        "views": views,
        "seed": seed if views > 1 else None,
        "dim": clip.embed_dim,
        "shard_size": shard_size,
        "files": images.files,
        "labels": images.labels,
        "classnames": images.classnames,
    }
    known = [fields[name] for name in (*KEY, "dim", "shard_size", "files")]
    if clip.image_dtype != torch.float32:  # recorded only then, so that other caches stay as version 0.1 writes them
        fields["precision"] = str(clip.image_dtype).removeprefix("torch.")
        known.append(fields["precision"])
    wanted = Plan.model_validate({**fields, "id": hashlib.sha256(compact_json(known)).hexdigest()})
    with torchrun_team() as team, contextlib.ExitStack() as stack:
        job = team.lead(lambda: _begin(path, wanted, images, overwrite=overwrite, stack=stack))
        if job is not None:
            plan, pending = job
            mine = pending[team.rank :: team.world]
            show = progress and team.rank == 0
            reading: dict[str, Any] = {
                "workers": workers, "max_pixels": max_pixels, "background": background, "on_error": on_error,
            }  # fmt: skip
            team.each(
                lambda: _build(clip, images.root, path, plan, mine, batch_size=batch_size, progress=show, **reading)
            )
            team.lead(lambda: _finish(path, plan))
    cache = FeatureCache.open(path)
    unreadable = [file for file in images.files if file in cache.skipped]
    if unreadable and on_error == "raise":
        raise ValueError(
            f"{cache.skipped[unreadable[0]]} ({len(unreadable)} such images when {path} was built); on_error='skip' "
            "leaves them out, overwrite=True tries again"
        )
    return cache.select(images)


def _begin(
    path: Path, wanted: Plan, images: ImageList, *, overwrite: bool, stack: contextlib.ExitStack
) -> tuple[Plan, list[int]] | None:
    """The plan and the numbers of the shards to build, or None if the cache is complete.

    If shards must be built, the lock of the folder is taken and held until ``stack`` closes.
    """
    if not overwrite and is_complete(path, wanted, images):
        return None
    foreign = [entry.name for entry in path.iterdir() if not OURS.fullmatch(entry.name)] if path.is_dir() else []
    if foreign:
        raise ValueError(
            f"path must be a new folder or hold only a feature cache, got {path} with {foreign[0]!r} in it"
        )
    path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(cache_lock(path))
    if not overwrite and is_complete(path, wanted, images):  # another process has finished the cache meanwhile
        return None
    plan, done = None, {}
    if not overwrite and (path / PLAN).is_file():
        plan = read_plan(path)
        refuse_stale(path, plan, wanted)
        if set(plan.files) != set(wanted.files):
            raise ValueError(f"feature cache {path} is unfinished and was started with other images; {REBUILD}")
        done = finished_shards(path, plan)
        refuse_changed(path, plan, images, ((number, shard.images) for number, shard in done.items()))
        plan = relabelled(plan, wanted)
    if plan is None:
        remove_cache_files(path)
        plan = wanted
    for leftover in path.glob(".*.part"):
        leftover.unlink()
    write_atomically(path / PLAN, compact_json(plan.model_dump()))
    return plan, [number for number in range(plan.shard_count) if number not in done]


def _build(
    clip: FrozenClip,
    root: Path,
    path: Path,
    plan: Plan,
    numbers: list[int],
    *,
    batch_size: int,
    workers: int,
    max_pixels: int,
    background: str,
    on_error: str,
    progress: bool,
) -> None:
    """Encodes and writes the shards with these numbers, in order."""
    if not numbers:
        return
    batches = {number: _batches(plan, number, batch_size) for number in numbers}
    loaded = decode_in_workers(
        _Views(root, plan, clip, max_pixels=max_pixels, background=background),
        [batch for number in numbers for batch in batches[number]],
        collate=_collate,
        workers=workers,
    )
    bar = tqdm(
        total=sum(len(batch) for number in numbers for batch in batches[number]),
        desc="encode images",
        unit="image",
        disable=hidden(progress),
    )
    with bar:
        for number in numbers:
            encoded, images, skipped = [], [], {}
            for batch in batches[number]:
                pixels, identities, errors = next(loaded)
                files = [plan.files[i] for i in batch]
                for i, reason in errors.items():
                    if on_error == "raise":
                        raise ValueError(reason)
                    skipped[files[i]] = reason
                if pixels is not None:
                    readable = [file for file in files if file not in skipped]
                    encoded.append(_encode(clip, pixels, readable, plan))
                images += identities
                bar.update(len(batch))
            empty = torch.empty(plan.views, 0, plan.dim, dtype=PRECISIONS[plan.dtype])
            _write_shard(path, plan, number, torch.cat([empty, *encoded], dim=1), images, skipped)


@torch.no_grad()
def _encode(clip: FrozenClip, pixels: Tensor, files: list[str], plan: Plan) -> Tensor:
    """Encodes a batch of pixels [B, V, 3, H, W] as features [V, B, D] in the dtype of the cache."""
    features = torch.stack([clip.encode_image(view.to(clip.device)).float().cpu() for view in pixels.unbind(1)])
    if features.shape[-1] != plan.dim:
        raise ValueError(f"clip.encode_image must give D = clip.embed_dim = {plan.dim}, got {features.shape[-1]}")
    bad = ~features.isfinite().all(-1)
    if bad.any():
        view, row = bad.nonzero()[0].tolist()
        raise ValueError(f"features must be finite, got NaN or inf for {files[row]!r} (view {view}) from {clip.name}")
    return features.to(PRECISIONS[plan.dtype])


def _write_shard(
    path: Path, plan: Plan, number: int, features: Tensor, images: Sequence[Identity], skipped: dict[str, str]
) -> None:
    """Writes a shard, and then its record, which marks the shard as finished."""
    content = safetensors.torch.save({"features": features.contiguous()}, metadata={"format": "pt"})
    shard = Shard(
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        rows=features.shape[1],
        images=tuple(images),
        skipped=skipped,
    )
    write_atomically(path / shard_name(number), content)
    write_atomically(path / record_name(number), compact_json(ShardRecord(plan=plan.id, shard=shard).model_dump()))


def _finish(path: Path, plan: Plan) -> None:
    """Writes the manifest from the plan and the records, and removes these."""
    done = finished_shards(path, plan)
    missing = [number for number in range(plan.shard_count) if number not in done]
    if missing:
        raise RuntimeError(
            f"{len(missing)} shards of {path} are missing, the first is {shard_name(missing[0])}: ranks must build "
            "on one shared file system"
        )
    shards = [done[number] for number in range(plan.shard_count)]
    if not any(shard.rows for shard in shards):
        raise ValueError(f"images must hold at least one readable image, all {len(plan.files)} were skipped")
    manifest = Manifest.model_validate({**dict(plan), "torch": str(torch.__version__), "shards": shards})
    write_atomically(path / MANIFEST, compact_json(manifest.model_dump()))
    remove_building_files(path)


class _Views(torch.utils.data.Dataset):
    """Decoded images: item i is (pixels [V, 3, H, W], identity, None), or (None, identity, reason) if unreadable."""

    def __init__(self, root: Path, plan: Plan, clip: FrozenClip, *, max_pixels: int, background: str) -> None:
        self.root, self.files = root, plan.files
        self.views, self.seed = plan.views, plan.seed
        self.preprocess, self.augment = clip.preprocess, clip.augment if plan.views > 1 else None
        self.reading = {
            "preprocess_cfg": clip.preprocess_cfg, "max_pixels": max_pixels, "background": background,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor | None, Identity, str | None]:
        path = self.root / self.files[i]
        identity = image_identity(path)
        try:
            image = read_picture(path, **self.reading)
        except ValueError as error:
            return None, identity, str(error)
        views = [self.preprocess(image)]
        if self.augment is not None:
            for view in range(1, self.views):
                views.append(seeded_view(self.augment, image, seed=self.seed, view=view, file=self.files[i]))
        return torch.stack(views), identity, None


def _collate(items: list[tuple[Tensor | None, Identity, str | None]]) -> tuple[Tensor | None, list, dict[int, str]]:
    pixels = [views for views, _, _ in items if views is not None]
    errors = {i: reason for i, (_, _, reason) in enumerate(items) if reason is not None}
    return torch.stack(pixels) if pixels else None, [identity for _, identity, _ in items], errors


def _batches(plan: Plan, number: int, batch_size: int) -> list[list[int]]:
    """Positions of a shard's images, in batches.

    No batch crosses shards, so the bits of a shard do not depend on the rank that builds it.
    """
    first = number * plan.shard_size
    positions = list(range(first, first + len(plan.files_of(number))))
    return [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
