"""Building of feature caches: images are encoded block by block, and a repeated call continues a killed build."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mergetune.clip import PRECISIONS
from mergetune.clip.backbone import check_clip
from mergetune.clip.class_texts import check_texts
from mergetune.data.cache import FeatureCache
from mergetune.data.cache_blocks import (
    allocate,
    find_damage,
    finished_blocks,
    in_words,
    refuse_foreign,
    reopen,
    write_block,
)
from mergetune.data.cache_documents import FEATURES, FORMAT, Identities, Identity, Manifest, Plan, lay_out
from mergetune.data.cache_files import (
    OURS,
    PLAN,
    REBUILD,
    read_manifest,
    read_plan,
    read_records,
    remove_building_files,
    remove_cache_files,
    write_images,
    write_manifest,
    write_plan,
)
from mergetune.data.cache_identity import KEY, examine, image_identity, refuse_changed, refuse_stale, relabelled
from mergetune.data.decoding import decode_in_workers, seeded_view
from mergetune.data.image_lists import ImageList
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS
from mergetune.io import (
    compact_json,
    decoding_rules,
    hidden,
    jsonable,
    read_picture,
    remove_dead_locks,
    torchrun_team,
    writing_in,
)

if TYPE_CHECKING:
    from mergetune.clip import FrozenClip

SHARD_SIZE = 1024  # images per block
SKIP = "on_error='skip' (on the command line --skip-unreadable)"  # for messages
UNIT_NORM_ATOL = 1e-2  # largest distance of an encoded norm from 1


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
    verify: bool = False,
    progress: bool = True,
) -> FeatureCache:
    """Encodes images once into a feature cache on disk, or opens the cache if it exists.

    A call that was interrupted can be repeated: it continues with the first unfinished block. Where rows of an existing
    cache are damaged, only their blocks are encoded again, with a warning.

    A cache is valid for the image weights, the preprocessing, the decoding of pictures, dtype, views, seed, and the
    names and bytes of the images; a call with others is refused. A call may request fewer images than the cache has, in
    another order, or with other labels; new labels of all images replace the stored labels. Images are compared by
    SHA-256, but read again only if the size or modification time differs from the stored one, so a dataset may be
    copied to another machine.

    View 0 is ``clip.preprocess``. Every other view is ``clip.augment`` with a separate random stream from seed, view
    and file name. The same call on the same machine with the same number of threads gives the same bits, for any
    ``workers``, any number of ranks and after interruptions.

    Under torchrun every rank must make the same call. The ranks share the blocks, and must have one file system. A gloo
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
        shard_size: images per block, which has one checksum per view. An interrupted build loses at most one block, and
            damage at least costs one. None is 1,024. An existing cache keeps its own.
        workers: number of processes that decode images; 0 decodes in the calling process.
        max_pixels: largest width times height of an image; a larger image counts as unreadable. Decoding takes about 8
            bytes per pixel in each worker.
        background: colour under transparent pixels, a name or "#rrggbb".
        on_error: "raise" stops the build at an unreadable image and keeps finished blocks; "skip" leaves the image out,
            with a warning and an entry in the manifest.
        overwrite: delete an existing cache at ``path`` and build a new one.
        verify: compare the checksums of an existing cache; otherwise they are compared only if its file has changed
            since the last comparison.
        progress: show a bar on a terminal.

    Returns:
        The cache with exactly ``images`` in their order, without the skipped ones.

    Raises:
        ValueError: an invalid argument, an unreadable image, features that are NaN or inf or not of unit norm, or a
            cache whose documents are damaged or that was built from other images or settings.
        RuntimeError: another process is building the cache, or another rank failed.
        OSError: the disk is full, for example. Finished blocks are kept.
    """
    check_clip(clip)
    if isinstance(images, str | Path) or hasattr(images, "full_train"):
        got = repr(images) if isinstance(images, str) else f"a {type(images).__name__}"
        split = hasattr(images, "full_train")
        way_on = "take its train, val or test" if split else "mergetune.ImageFolder reads a folder"
        raise TypeError(f"images must be an ImageList, got {got}: {way_on}")
    if shard_size is None:
        shard_size = SHARD_SIZE
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
    check_texts(clip, images.classnames)
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
        "arrays": lay_out([(FEATURES, dtype, (views, len(images), clip.embed_dim), True)]),
    }
    fields["bytes"] = fields["arrays"][-1].end
    known = [fields[name] for name in (*KEY, "dim", "shard_size", "files")]
    if clip.image_dtype != torch.float32:  # caches of version 0.1 have no such field
        fields["precision"] = str(clip.image_dtype).removeprefix("torch.")
        known.append(fields["precision"])
    wanted = Plan.model_validate({**fields, "id": hashlib.sha256(compact_json(known)).hexdigest()})
    with torchrun_team() as team, contextlib.ExitStack() as stack:
        job = team.lead(lambda: _begin(path, wanted, images, overwrite=overwrite, trust=not verify, stack=stack))
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
            f"{cache.skipped[unreadable[0]]} ({len(unreadable)} such images when {path} was built); {SKIP} leaves "
            "them out, overwrite=True tries again"
        )
    return cache.select(images)


def _begin(
    path: Path, wanted: Plan, images: ImageList, *, overwrite: bool, trust: bool, stack: contextlib.ExitStack
) -> tuple[Plan, list[int]] | None:
    """The plan and the numbers of the blocks to build, or None if the cache is complete.

    If blocks must be built, the lock of the folder is taken and held until ``stack`` closes.
    """
    if not overwrite and examine(path, wanted, images, trust=trust) == (True, None):
        remove_dead_locks(path)  # of a process that was killed when all was done
        return None
    foreign = [entry.name for entry in path.iterdir() if not OURS.fullmatch(entry.name)] if path.is_dir() else []
    if foreign:
        raise ValueError(
            f"path must be a new folder or hold only a feature cache, got {path} with {foreign[0]!r} in it"
        )
    stack.enter_context(writing_in(path))
    if not overwrite:
        refuse_foreign(path)
        finished, damage = examine(path, wanted, images, trust=trust)
        if finished and damage is None:  # another process has finished the cache meanwhile
            return None
        if damage is not None:
            warn(f"{damage.text}; their images are encoded again", stacklevel=2)
            manifest = read_manifest(path)
            assert isinstance(manifest, Manifest)
            reopen(path, manifest, damage)
    plan, done = None, {}
    if not overwrite and (path / PLAN).is_file():
        plan = read_plan(path)
        refuse_stale(path, plan, wanted)
        if set(plan.files) != set(wanted.files):
            raise ValueError(f"feature cache {path} is unfinished and was started with other images; {REBUILD}")
        done, lost = finished_blocks(path, plan)
        if lost:
            warn(f"{in_words(lost)} of unfinished cache {path} are damaged and are encoded again", stacklevel=2)
        known = zip(
            (file for number in done for file in plan.files_of(number)),
            (identity for record in done.values() for identity in record.images.each()),
            strict=True,
        )
        refuse_changed(path, images, known)
        plan = relabelled(plan, wanted)
    if plan is None:
        remove_cache_files(path)
        plan = wanted
    write_plan(path, plan)
    allocate(path, plan)
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
    """Encodes and writes the blocks with these numbers, in order."""
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
            listed, images, skipped = plan.files_of(number), [], {}
            features = torch.zeros(plan.views, len(listed), plan.dim, dtype=PRECISIONS[plan.dtype])
            for batch in batches[number]:
                pixels, identities, errors = next(loaded)
                files = [plan.files[i] for i in batch]
                for i, reason in errors.items():
                    if on_error == "raise":
                        raise ValueError(f"{reason}; {SKIP} leaves such images out")
                    skipped[files[i]] = reason
                if pixels is not None:
                    rows = [i - number * plan.shard_size for i in batch if plan.files[i] not in skipped]
                    features[:, rows] = _encode(clip, pixels, [listed[row] for row in rows], plan)
                images += identities
                bar.update(len(batch))
            write_block(path, plan, number, {FEATURES: features}, Identities.of(images), skipped)


@torch.no_grad()
def _encode(clip: FrozenClip, pixels: Tensor, files: list[str], plan: Plan) -> Tensor:
    """Encodes a batch of pixels [B, V, 3, H, W] as features [V, B, D] in the dtype of the cache."""
    features = torch.stack([clip.encode_image(view.to(clip.device)).float().cpu() for view in pixels.unbind(1)])
    if features.shape[-1] != plan.dim:
        raise ValueError(f"clip.encode_image must give D = clip.embed_dim = {plan.dim}, got {features.shape[-1]}")
    norms = features.norm(dim=-1)
    finite = features.isfinite().all(-1)
    for bad, rule in ((~finite, "finite"), ((norms - 1).abs() > UNIT_NORM_ATOL, "of unit norm")):
        if bad.any():
            view, row = bad.nonzero()[0].tolist()
            got = f"norm {norms[view, row]:.4g}" if finite[view, row] else "NaN or inf"
            raise ValueError(f"features must be {rule}, got {got} for {files[row]!r} (view {view}) from {clip.name}")
    return features.to(PRECISIONS[plan.dtype])


def _finish(path: Path, plan: Plan) -> None:
    """Writes identities and manifest from the plan and the records, removes these, and checks what lies on the disk."""
    done = read_records(path, plan)
    missing = [number for number in range(plan.shard_count) if number not in done]
    if missing:
        raise RuntimeError(
            f"{len(missing)} blocks of {path} are missing, the first is {missing[0]}: ranks must build on one shared "
            "file system"
        )
    records = [done[number] for number in range(plan.shard_count)]
    skipped = {file: reason for record in records for file, reason in record.skipped.items()}
    if len(skipped) == len(plan.files):
        raise ValueError(f"images must hold at least one readable image, all {len(plan.files)} were skipped")
    arrays = []
    for i, layout in enumerate(plan.arrays):
        checksums = [record.sha256[i][view] for view in range(plan.views) for record in records]
        arrays.append({**dict(layout), "sha256": checksums})
    facts = {"rows": len(plan.files) - len(skipped), "skipped": skipped, "torch": str(torch.__version__)}
    manifest = Manifest.model_validate({**dict(plan), **facts, "arrays": arrays, "checksum": 64 * "0"})
    write_images(path, plan, (identity for record in records for identity in record.images.each()))
    write_manifest(path, manifest)
    remove_building_files(path)
    find_damage(path, manifest)  # the other ranks, and later calls, need not compare the checksums


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
    """Positions of the images of a block, in batches.

    No batch crosses blocks, so the bits of a block do not depend on the rank that builds it.
    """
    first = number * plan.shard_size
    positions = list(range(first, first + len(plan.files_of(number))))
    return [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
