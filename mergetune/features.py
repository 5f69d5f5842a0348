"""FeatureCache: image features of a frozen CLIP on disk; build, resume, check and memory-map them.

Shapes: B rows asked for, D embedding width, N rows of a cache, V views of each image.

A cache is a folder. ``manifest.json`` says what was encoded and how; ``shard-00000.safetensors`` and so on hold the
features [V, n, D] of consecutive images. While it is being built there is a ``building.json`` instead of the manifest,
and beside each finished shard a ``.json`` with its checksum. Every file appears by an atomic rename after it has
reached the disk, so a build can be killed at any moment and goes on where it was.

A cache of up to ``MAX_MAPPED`` bytes is mapped whole. Of a larger one, rows are read into the batch by ``preadv``: the
kernel maps far more around a row than the row, so that a mapping would soon be resident as a whole.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mergetune.data import ImageList, load_image
from mergetune.files import jsonable, open_regular, read_regular, write_atomically
from mergetune.options import MAX_PIXELS

if TYPE_CHECKING:
    from mergetune.clip import FrozenClip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # safetensors' names
UNIT_NORM_ATOL = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MAX_MAPPED = 1 << 28  # bytes of features that may become resident
SHARD_SIZE, MAX_SHARDS = 1024, 256  # of a new cache: images at least, and files at most, so that all can stay open
ROWS = 4096  # at a time, where all are worked through

FORMAT = "mergetune.features/1"
MANIFEST, PLAN, LOCK = "manifest.json", "building.json", ".lock"
OURS = re.compile(r"manifest\.json|building\.json|shard-\d+\.(safetensors|json)|\..*")  # and hidden files
REBUILD = "overwrite=True rebuilds it, another path keeps it"

# What features depend on, and the words for it. Labels and class names are not among them.
KEY = {
    "fingerprint": "the image weights",
    "preprocess": "the preprocessing",
    "dtype": "dtype",
    "views": "views",
    "seed": "the seed of the augmented views",
}
PATIENCE = datetime.timedelta(days=7)  # ranks may finish far apart; a rank that died is torchrun's to notice


@dataclass(frozen=True, eq=False)
class FeatureCache:
    """Unit-norm image features with labels, on disk or in memory: only rows that are asked for are read.

    Made by :func:`cache_features`, :meth:`open` or :meth:`from_tensors`; :meth:`select` gives a view on some images.

    Attributes:
        path: the folder, None for features in memory.
        labels: LongTensor [N], class indices.
        classnames: one name per class.
        files: N relative paths; empty if the features came without.
        fingerprint: the image fingerprint of the model that made them; empty if unknown.
        dtype: of the stored features: "float32", "bfloat16" or "float16".
        views: V. View 0 is the evaluation transform, the others are augmented.
        dim: D.
        skipped: {file: reason} of the images that could not be read.
        stored: LongTensor [N], where each row lies in the shards, counted through.
        shards: the stored features, each [V, n, D]; of a cache on disk mapped.
        opened: the shards' files, if rows are to be read from them and not from the mapping.
        checksums: SHA-256 of each shard's file; none for features in memory.
    """

    path: Path | None
    labels: Tensor = field(repr=False)
    classnames: tuple[str, ...] = field(repr=False)
    files: tuple[str, ...] = field(repr=False)
    fingerprint: str
    dtype: str
    views: int
    dim: int
    skipped: Mapping[str, str] = field(repr=False)
    stored: Tensor = field(repr=False)
    shards: tuple[Tensor, ...] = field(repr=False)
    opened: _Files | None = field(default=None, repr=False)
    checksums: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def open(cls, path: str | Path) -> FeatureCache:
        """Open a finished cache. Sizes are checked, checksums are not: see :meth:`verify`.

        Rows of more than ``MAX_MAPPED`` bytes of features are read, not mapped, and take no memory but the batch's.
        That needs a file descriptor for each shard: where they are more than half of what the process may have
        (``ulimit -n``), the features are mapped none the less.

        Raises:
            FileNotFoundError: there is no cache.
            ValueError: it is unfinished, damaged or of another format.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if (path / PLAN).is_file():
                plan = _read_document(path / PLAN)
                done, total = len(_finished(path, plan)), _shard_count(plan)
                raise ValueError(
                    f"feature cache {path} is unfinished ({done} of {total} shards): call cache_features again to go on"
                )
            raise FileNotFoundError(f"path must be a feature cache, got {path} without {MANIFEST}")
        manifest = _read_document(path / MANIFEST, images=False)
        shards = {
            path / _shard_name(number): _map_shard(path, number, shard, manifest)
            for number, shard in enumerate(manifest["shards"])
        }
        shards = {file: shard for file, shard in shards.items() if shard.numel()}
        large = sum(shard.nbytes for shard in shards.values()) > MAX_MAPPED
        skipped = _skipped(manifest)
        kept = [i for i, file in enumerate(manifest["files"]) if file not in skipped]
        return cls(
            path=path,
            labels=torch.tensor([manifest["labels"][i] for i in kept], dtype=torch.int64),
            classnames=tuple(manifest["classnames"]),
            files=tuple(manifest["files"][i] for i in kept),
            fingerprint=manifest["fingerprint"],
            dtype=manifest["dtype"],
            views=manifest["views"],
            dim=manifest["dim"],
            skipped=skipped,
            stored=torch.arange(len(kept)),
            shards=tuple(shards.values()),
            opened=_Files(shards) if large and _may_open(len(shards)) else None,
            checksums=tuple(shard["sha256"] for shard in manifest["shards"]),
        )

    @classmethod
    def from_tensors(
        cls,
        features: Tensor,
        labels: Tensor | Sequence[int],
        classnames: Sequence[str],
        *,
        fingerprint: str = "",
        files: Sequence[str] = (),
        normalize: bool = False,
    ) -> FeatureCache:
        """Features that were made elsewhere, in memory and not copied.

        Args:
            features: [N, D] or [V, N, D], unit norm.
            labels: N class indices.
            classnames: one name per class.
            fingerprint: ``clip.image_fingerprint`` of the model that made them; "" if unknown.
            files: N names, if :meth:`select` is to be used.
            normalize: scale the rows to unit norm first.

        Raises:
            ValueError: wrong shapes; no rows; NaN or inf; rows that are zero or not unit norm; labels out of range.
        """
        if features.dim() not in (2, 3) or not features.is_floating_point() or not features.numel():
            raise ValueError(
                "features must be floating point of shape [N, D] or [V, N, D] with at least one row, "
                f"got {features.dtype} {list(features.shape)}"
            )
        features = features.detach().cpu()
        features = features if features.dim() == 3 else features[None]
        features = features if features.dtype in DTYPES.values() else features.float()
        labels = torch.as_tensor(labels).cpu()
        views, count, dim = features.shape
        if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be integers of shape [N] = [{count}], got {labels.dtype} {list(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= len(classnames):
            raise ValueError(f"labels must lie in [0, {len(classnames)}), got {labels.min()} to {labels.max()}")
        if files and (len(files) != count or len(set(files)) != count):
            raise ValueError(
                f"files must be N = {count} different names, got {len(files)} ({len(set(files))} different)"
            )
        parts = [slice(begin, begin + ROWS) for begin in range(0, count, ROWS)]
        norms = torch.cat([features[:, part].float().norm(dim=-1) for part in parts], dim=1)
        _refuse_rows(~norms.isfinite(), "finite", norms)
        _refuse_rows(norms == 0, "other than zero", norms)
        if normalize:
            given, features = features, torch.empty_like(features)
            for part in parts:
                features[:, part] = given[:, part].float() / norms[:, part, None]
        else:
            far = (norms - 1).abs() > UNIT_NORM_ATOL[features.dtype]
            _refuse_rows(far, "of unit norm (or normalize=True)", norms)
        return cls(
            path=None,
            labels=labels.long(),
            classnames=tuple(classnames),
            files=tuple(files),
            fingerprint=fingerprint,
            dtype=next(name for name, dtype in DTYPES.items() if dtype == features.dtype),
            views=views,
            dim=dim,
            skipped={},
            stored=torch.arange(count),
            shards=(features,),
        )

    def rows(self, index: Tensor, view: int | Tensor = 0) -> Tensor:
        """Some rows, as stored: in a half dtype their norms are 1 only to its precision.

        Args:
            index: LongTensor [B], each in [0, N).
            view: one view, or a LongTensor [B] with one for each row.

        Returns:
            [B, D] float32, a copy.

        Raises:
            IndexError: an index or view out of range.
        """
        index, view = torch.as_tensor(index).cpu(), torch.as_tensor(view).cpu()
        _check_range("index", index, len(self))
        _check_range("view", view, self.views)
        if index.dim() != 1 or view.shape not in ((), index.shape):
            raise IndexError(
                f"index must be [B] and view one number or [B], got {list(index.shape)}, {list(view.shape)}"
            )
        row, view = self.stored[index], view.expand(index.shape)
        out = torch.empty(len(index), self.dim)
        for begin in range(0, len(index), ROWS):
            part = slice(begin, begin + ROWS)
            self._rows.read(row[part], view[part], out[part])
        return out

    def tensor(self, view: int = 0) -> Tensor:
        """All rows of a view, [N, D] float32, a copy."""
        return self.rows(torch.arange(len(self)), view)

    def select(self, images: ImageList) -> FeatureCache:
        """The features of these images, in their order, with their labels and class names. Nothing is copied.

        Images that were skipped as unreadable are left out again, with a warning.

        Raises:
            ValueError: an image that is not in the cache, or none left.
        """
        row_of = {file: row for row, file in enumerate(self.files)}
        rows = torch.tensor([row_of.get(file, -1) for file in images.files])
        files, labels, kept = images.files, torch.tensor(images.labels), rows >= 0
        if not kept.all():
            lacking = [files[i] for i in (~kept).nonzero().squeeze(1).tolist()]
            if unknown := [file for file in lacking if file not in self.skipped]:
                raise ValueError(
                    f"{len(unknown)} of {len(images)} images are not in {self._name}, the first is {unknown[0]!r}: "
                    "cache_features must be given all images that will be selected"
                )
            if len(lacking) == len(images):
                raise ValueError(f"images must hold at least one readable image, all {len(images)} were skipped")
            reason = self.skipped[lacking[0]]
            warn(f"{len(lacking)} unreadable images are left out, the first: {reason}", stacklevel=2)
            files = tuple(itertools.compress(files, kept.tolist()))
        return replace(
            self, labels=labels[kept], classnames=images.classnames, files=files, stored=self.stored[rows[kept]]
        )

    def select_classes(self, classes: Sequence[int]) -> FeatureCache:
        """The features of these classes, relabelled from 0 in the given order. Nothing is copied.

        Raises:
            ValueError: an unknown class, a class twice, or no features left.
        """
        classes = [int(c) for c in classes]
        if len(set(classes)) != len(classes) or not all(0 <= c < len(self.classnames) for c in classes):
            raise ValueError(f"classes must be different and lie in [0, {len(self.classnames)}), got {classes}")
        new_label = torch.full((len(self.classnames),), -1)
        new_label[classes] = torch.arange(len(classes))
        labels = new_label[self.labels]
        rows = (labels >= 0).nonzero().squeeze(1)
        if not len(rows):
            raise ValueError(f"classes must have features here, got {classes} without any")
        return replace(
            self,
            labels=labels[rows],
            classnames=tuple(self.classnames[c] for c in classes),
            files=tuple(self.files[i] for i in rows.tolist()) if self.files else (),
            stored=self.stored[rows],
        )

    def verify(self, images: ImageList | None = None, *, progress: bool = True) -> None:
        """Read every shard and compare checksums; with ``images``, read those too and see whether they are the same.

        Raises:
            ValueError: a shard is damaged, naming it; an image has other bytes now, naming it.
        """
        if self.path is None:
            return
        manifest = _read_document(self.path / MANIFEST, images=False)
        shards = tqdm(manifest["shards"], desc="verify shards", unit="shard", disable=None if progress else True)
        for number, shard in enumerate(shards):
            file = self.path / _shard_name(number)
            if _sha256(file) != shard["sha256"]:
                raise ValueError(f"{file} is damaged: its checksum is not the manifest's; {REBUILD}")
        if images is not None:
            _refuse_changed(self.path, manifest, images, _identities(self.path, manifest), trust_mtime=False)

    def shared_with(self, other: FeatureCache) -> Tensor:
        """The rows of ``other`` that are here too, [n], ascending: of the same features (view 0) under the same name.

        Where either has no names the features alone decide. Rows are read a few at a time.
        """
        if self.files and other.files:
            row_of = {file: row for row, file in enumerate(other.files)}
            pairs = sorted((row_of[file], row) for row, file in enumerate(self.files) if file in row_of)
            theirs, mine = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
        else:
            hashes, order = self._hashes().sort()
            wanted = other._hashes()
            place = torch.searchsorted(hashes, wanted).clamp(max=len(hashes) - 1)
            theirs = (hashes[place] == wanted).nonzero().squeeze(1)
            mine = order[place[theirs]]
        parts = zip(mine.split(ROWS), theirs.split(ROWS), strict=True)
        return theirs[torch.cat([(self.rows(a) == other.rows(b)).all(1) for a, b in parts])]

    def _hashes(self) -> Tensor:
        """A number for the bits of each row (view 0), int64 [N]: their product with random ones, two columns a word."""
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(-(2**63), 2**63 - 1, (-(-self.dim // 2),), generator=generator)
        rows = (self.rows(part) for part in torch.arange(len(self)).split(ROWS))
        return torch.cat([(F.pad(x, (0, self.dim % 2)).view(torch.int64) * factors).sum(1) for x in rows])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the features, their order and their labels: what a training run depends on."""
        digest = hashlib.sha256()
        for tensor in (self.labels, self.stored):
            digest.update(tensor.numpy())
        digest.update("".join(self.checksums).encode())
        if not self.checksums:
            for shard in self.shards:
                digest.update(shard.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @functools.cached_property
    def _rows(self) -> _Rows:
        return _Rows(self.shards, self.opened)

    @property
    def _name(self) -> str:
        return "these features" if self.path is None else f"feature cache {self.path}"


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
    on_error: str = "raise",
    overwrite: bool = False,
    progress: bool = True,
) -> FeatureCache:
    """Encode images once; later calls open what is there, and go on with what was interrupted.

    A cache belongs to the image weights, the preprocessing, dtype, views, seed and the images' names and bytes, and is
    refused for any other. It may be asked for fewer images than it holds, in another order, or with other labels; new
    labels of all its images replace the old ones. An image is known by its SHA-256, but read again only if its size or
    modification time is not the recorded one; so a data set may be copied to another machine.

    View 0 is ``clip.preprocess``. Each other view is ``clip.augment`` with a random stream of its own, made from seed,
    view and file name. The same call on the same machine with the same number of threads gives the same bits, whatever
    ``workers``, the number of ranks, and interruptions.

    Under torchrun every rank must make the same call: ranks share the shards among them, and need one file system. A
    gloo process group is made, and stays, if there is none.

    Args:
        clip: the model.
        images: what to encode; give the whole split, and :meth:`FeatureCache.select` few-shot or base/novel subsets.
        path: the cache's folder; made if missing.
        dtype: stored as "float32", "float16" (relative error below 5e-4) or "bfloat16" (below 4e-3).
        views: V >= 1, the evaluation view and V - 1 augmented ones.
        seed: of the augmented views.
        batch_size: images per call of the image tower.
        shard_size: images per file: the most that a kill can lose, and the portion of a rank. None is 1,024, or more
            where that would make over 256 files. An unfinished cache goes on with its own.
        workers: processes that decode images; 0 decodes in this one.
        max_pixels: an image with more pixels is unreadable: decoding takes about 8 bytes per pixel in each worker.
        on_error: an unreadable image stops the build ("raise"; finished shards are kept) or is left out, with a
            warning and a note in the manifest ("skip").
        overwrite: throw away what is at ``path`` and build anew.
        progress: show a bar on a terminal.

    Returns:
        The cache, with exactly ``images`` in their order, less the skipped ones.

    Raises:
        ValueError: a bad argument; an unreadable image; features that are NaN or inf; a stale or damaged cache.
        RuntimeError: another process is building it; another rank failed.
        OSError: the disk is full, or the like. Finished shards are kept.
    """
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
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    path = Path(path)
    wanted = {
        "format": FORMAT,
        "clip": clip.name,
        "fingerprint": clip.image_fingerprint,
        "preprocess": jsonable(clip.preprocess_cfg),
        "dtype": dtype,
        "views": views,
        "seed": seed if views > 1 else None,
        "dim": clip.embed_dim,
        "shard_size": shard_size,
        "files": list(images.files),
        "labels": list(images.labels),
        "classnames": list(images.classnames),
    }
    wanted["id"] = hashlib.sha256(_json([wanted[name] for name in (*KEY, "dim", "shard_size", "files")])).hexdigest()
    with torchrun_team() as team, contextlib.ExitStack() as stack:
        job = team.lead(lambda: _begin(path, wanted, images, overwrite=overwrite, stack=stack))
        if job is not None:
            plan, pending = job
            mine = pending[team.rank :: team.world]
            show = progress and team.rank == 0
            reading: dict[str, Any] = {"workers": workers, "max_pixels": max_pixels, "on_error": on_error}
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


# -- one build --------------------------------------------------------------------------------------------------------


def _begin(
    path: Path, wanted: dict[str, Any], images: ImageList, *, overwrite: bool, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], list[int]] | None:
    """What is to be done: the plan and the shards to build, or None if the cache is complete.

    Takes the lock, held until the stack closes, if there is anything to build.
    """
    if not overwrite and _is_complete(path, wanted, images):
        return None
    foreign = [entry.name for entry in path.iterdir() if not OURS.fullmatch(entry.name)] if path.is_dir() else []
    if foreign:
        raise ValueError(f"path must be a new folder or a feature cache alone, got {path} with {foreign[0]!r} in it")
    path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_locked(path))
    if not overwrite and _is_complete(path, wanted, images):  # by another process, since the first look
        return None
    plan = None
    if not overwrite and (path / PLAN).is_file():
        plan = _read_document(path / PLAN)
        _refuse_stale(path, plan, wanted)
        if set(plan["files"]) != set(wanted["files"]):
            raise ValueError(f"feature cache {path} is unfinished and was begun for other images; {REBUILD}")
        done = _finished(path, plan)
        _refuse_changed(path, plan, images, ((number, shard["images"]) for number, shard in done.items()))
        plan |= {"labels": _reordered(plan, wanted), "classnames": wanted["classnames"]}
    if plan is None:
        _clear(path)
        plan, done = wanted, {}
    for leftover in path.glob(".*.part"):
        leftover.unlink()
    write_atomically(path / PLAN, _json(plan))
    return plan, [number for number in range(_shard_count(plan)) if number not in done]


def _build(
    clip: FrozenClip,
    root: Path,
    path: Path,
    plan: dict[str, Any],
    numbers: list[int],
    *,
    batch_size: int,
    workers: int,
    max_pixels: int,
    on_error: str,
    progress: bool,
) -> None:
    """Encode these shards, in order."""
    if not numbers:
        return
    batches = {number: _batches(plan, number, batch_size) for number in numbers}
    loader = DataLoader(
        _Views(root, plan, clip.preprocess, clip.augment if plan["views"] > 1 else None, max_pixels),
        batch_sampler=[batch for number in numbers for batch in batches[number]],
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_release_locks,
        generator=torch.Generator(),  # the loader draws a seed, which must not come from the caller's stream
    )
    bar = tqdm(
        total=sum(len(batch) for number in numbers for batch in batches[number]),
        desc="encode images",
        unit="image",
        disable=None if progress else True,
    )
    loaded = iter(loader)
    with bar:
        for number in numbers:
            encoded, images, skipped = [], [], {}
            for batch in batches[number]:
                pixels, identities, errors = next(loaded)
                files = [plan["files"][i] for i in batch]
                for i, reason in errors.items():
                    if on_error == "raise":
                        raise ValueError(reason)
                    skipped[files[i]] = reason
                if pixels is not None:
                    readable = [file for file in files if file not in skipped]
                    encoded.append(_encode(clip, pixels, readable, plan))
                images += identities
                bar.update(len(batch))
            empty = torch.empty(plan["views"], 0, plan["dim"], dtype=DTYPES[plan["dtype"]])
            _write_shard(path, plan, number, torch.cat([empty, *encoded], dim=1), images, skipped)


@torch.no_grad()
def _encode(clip: FrozenClip, pixels: Tensor, files: list[str], plan: dict[str, Any]) -> Tensor:
    """Features of a batch. pixels [B, V, 3, H, W] -> [V, B, D] in the cache's dtype."""
    features = torch.stack([clip.encode_image(view.to(clip.device)).float().cpu() for view in pixels.unbind(1)])
    if features.shape[-1] != plan["dim"]:
        raise ValueError(f"clip.encode_image must give D = clip.embed_dim = {plan['dim']}, got {features.shape[-1]}")
    bad = ~features.isfinite().all(-1)
    if bad.any():
        view, row = bad.nonzero()[0].tolist()
        raise ValueError(f"features must be finite, got NaN or inf for {files[row]!r} (view {view}) from {clip.name}")
    return features.to(DTYPES[plan["dtype"]])


def _write_shard(
    path: Path, plan: dict[str, Any], number: int, features: Tensor, images: list[list[Any]], skipped: dict[str, str]
) -> None:
    """A shard, and then the record that makes it count."""
    content = safetensors.torch.save({"features": features.contiguous()}, metadata={"format": "pt"})
    record = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": features.shape[1],
        "images": images,
        "skipped": skipped,
    }
    write_atomically(path / _shard_name(number), content)
    write_atomically(path / _record_name(number), _json({"plan": plan["id"], "shard": record}))


def _finish(path: Path, plan: dict[str, Any]) -> None:
    """Turn plan and records into the manifest."""
    done = _finished(path, plan)
    missing = [number for number in range(_shard_count(plan)) if number not in done]
    if missing:
        raise RuntimeError(
            f"{len(missing)} shards of {path} are not there, the first is {_shard_name(missing[0])}: ranks must build "
            "on one shared file system"
        )
    shards = [done[number] for number in range(_shard_count(plan))]
    if not any(shard["rows"] for shard in shards):
        raise ValueError(f"images must hold at least one readable image, all {len(plan['files'])} were skipped")
    write_atomically(path / MANIFEST, _json({**plan, "torch": torch.__version__, "shards": shards}))
    _tidy(path)


class _Views(torch.utils.data.Dataset):
    """Decoded images: item i is (pixels [V, 3, H, W] or None, identity, reason why not)."""

    def __init__(
        self, root: Path, plan: dict[str, Any], preprocess: Callable, augment: Callable | None, max_pixels: int
    ) -> None:
        self.root, self.files = root, plan["files"]
        self.views, self.seed = plan["views"], plan["seed"]
        self.preprocess, self.augment, self.max_pixels = preprocess, augment, max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor | None, list[Any], str | None]:
        path = self.root / self.files[i]
        identity = _image_identity(path)
        try:
            image = load_image(path, max_pixels=self.max_pixels)
        except ValueError as error:
            return None, identity, str(error)
        views = [self.preprocess(image)]
        with torch.random.fork_rng(devices=[]):
            for view in range(1, self.views):
                stream = f"{self.seed}\0{view}\0{self.files[i]}".encode(errors="surrogateescape")
                torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(stream).digest()[:8], "big"))
                views.append(self.augment(image))
        return torch.stack(views), identity, None


def _collate(items: list[tuple[Tensor | None, list[Any], str | None]]) -> tuple[Tensor | None, list, dict[int, str]]:
    pixels = [views for views, _, _ in items if views is not None]
    errors = {i: reason for i, (_, _, reason) in enumerate(items) if reason is not None}
    return torch.stack(pixels) if pixels else None, [identity for _, identity, _ in items], errors


def _batches(plan: dict[str, Any], number: int, batch_size: int) -> list[list[int]]:
    """Positions of a shard's images, in batches. No batch crosses shards, so that who builds a shard changes no bit."""
    first = number * plan["shard_size"]
    positions = list(range(first, first + len(_shard_files(plan, number))))
    return [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]


# -- is it the cache that is wanted? ----------------------------------------------------------------------------------


def _is_complete(path: Path, wanted: dict[str, Any], images: ImageList) -> bool:
    """Whether the cache is there. Raises ValueError if it is another one.

    Takes over new labels of the same images, and new modification times, for the next open, and tidies up after a
    build that was killed when all but that was done.
    """
    if not (path / MANIFEST).is_file():
        return False
    manifest = _read_document(path / MANIFEST, images=False)
    _refuse_stale(path, manifest, wanted)
    lacking = set(wanted["files"]).difference(manifest["files"])
    if lacking:
        first = next(file for file in wanted["files"] if file in lacking)
        raise ValueError(
            f"feature cache {path} lacks {len(lacking)} of {len(images)} images, the first is {first!r}; {REBUILD}"
        )
    moved = _refuse_changed(path, manifest, images, _identities(path, manifest))
    fresh = dict(manifest)
    if len(wanted["files"]) == len(manifest["files"]):
        fresh |= {"labels": _reordered(manifest, wanted), "classnames": wanted["classnames"]}
    if moved or fresh != manifest or (path / PLAN).exists():
        # A convenience: where the folder is read-only or someone rebuilds it, what is there does as well.
        with contextlib.suppress(OSError, RuntimeError), _locked(path):
            if _read_document(path / MANIFEST, images=False) == manifest:
                for number, identities in _identities(path, manifest):
                    manifest["shards"][number]["images"] = moved.get(number, identities)
                write_atomically(path / MANIFEST, _json({**fresh, "shards": manifest["shards"]}))
                _tidy(path)
    return True


def _refuse_stale(path: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, words in KEY.items():
        if recorded[name] != wanted[name]:
            raise ValueError(
                f"feature cache {path} is stale: {words} must be what it was built with, {recorded[name]}, "
                f"got {wanted[name]}; {REBUILD}"
            )


def _refuse_changed(
    path: Path,
    recorded: dict[str, Any],
    images: ImageList,
    identities: Iterable[tuple[int, list[list[Any]]]],
    *,
    trust_mtime: bool = True,
) -> dict[int, list[list[Any]]]:
    """Raise ValueError unless each image still has the bytes that were encoded.

    Args:
        recorded: a manifest or a plan.
        identities: number and images' identities of each shard to look at.
        trust_mtime: whether an image of the recorded size and modification time need not be read.

    Returns:
        The identities of the shards in which a modification time is another one today.
    """
    listed, changed, moved = set(images.files), [], {}
    for number, known in identities:
        today = []
        for file, (sha256, size, mtime) in zip(_shard_files(recorded, number), known, strict=True):
            if file in listed:
                now = _stat(os.path.join(images.root, file))
                same = now == [size, mtime] and trust_mtime
                if not same and (now[0] != size or _sha256(images.root / file) != sha256):
                    changed.append(file)
                mtime = now[1]
            today.append([sha256, size, mtime])
        if today != known:
            moved[number] = today
    if changed:
        raise ValueError(
            f"feature cache {path} is stale: {len(changed)} of {len(images)} images below {images.root} are missing or "
            f"not what was encoded, the first is {changed[0]!r}; {REBUILD}"
        )
    return moved


def _reordered(recorded: dict[str, Any], wanted: dict[str, Any]) -> list[int]:
    """The wanted labels in the order of the recorded files."""
    label_of = dict(zip(wanted["files"], wanted["labels"], strict=True))
    return [label_of[file] for file in recorded["files"]]


def _image_identity(path: Path) -> list[Any]:
    """[SHA-256, bytes, modification time in ns] of a file; Nones if it cannot be read."""
    stat = _stat(path)  # before reading: a file that changes meanwhile must look changed later
    return [_sha256(path), *stat]


def _stat(path: str | Path) -> list[int | None]:
    try:
        stat = os.stat(path)
    except OSError:
        return [None, None]
    return [stat.st_size, stat.st_mtime_ns]


def _sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


# -- files of a cache -------------------------------------------------------------------------------------------------


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def _shard_files(plan: dict[str, Any], number: int) -> list[str]:
    first = number * plan["shard_size"]
    return plan["files"][first : first + plan["shard_size"]]


def _shard_count(plan: dict[str, Any]) -> int:
    return -(-len(plan["files"]) // plan["shard_size"])


def _skipped(manifest: dict[str, Any]) -> dict[str, str]:
    return {file: reason for shard in manifest["shards"] for file, reason in shard["skipped"].items()}


def _finished(path: Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """{number: record} of the shards of an unfinished cache that are there. A damaged one is refused."""
    done = {}
    for number in range(_shard_count(plan)):
        if (path / _record_name(number)).is_file():
            record = _read_json(path / _record_name(number))
            if record["plan"] == plan["id"]:
                _check_size(path / _shard_name(number), record["shard"]["bytes"])
                done[number] = record["shard"]
    return done


def _read_document(file: Path, *, images: bool = True) -> dict[str, Any]:
    """A manifest or a plan, of this format; on request without the images' identities, two thirds of a manifest."""
    content = read_regular(file)
    if not images:
        kept, end = [], 0
        for begin, after in _images_in(content):
            kept.append(content[end:begin] + b"[]")
            end = after
        content = b"".join([*kept, content[end:]])
    document = _parse(content, file)
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} must have format {FORMAT!r}, got {found!r}; {REBUILD}")
    return document


def _identities(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[int, list[list[Any]]]]:
    """Number and images' identities of each shard in a manifest, one after the other: all at once take long lists."""
    content = read_regular(path / MANIFEST)
    places = list(_images_in(content))
    if len(places) == len(manifest["shards"]):
        yield from ((number, json.loads(content[begin:end])) for number, (begin, end) in enumerate(places))
    else:  # not as we write it
        yield from enumerate(shard["images"] for shard in json.loads(content)["shards"])


def _images_in(content: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each list of images' identities in a manifest."""
    mark, end = b'"images":[[', 0  # which no name can hold: the quotes in a name are escaped
    while (found := content.find(mark, end)) >= 0 and (last := content.find(b"]]", found)) >= 0:
        begin, end = found + len(mark) - 2, last + 2
        yield begin, end


def _map_shard(path: Path, number: int, shard: dict[str, Any], manifest: dict[str, Any]) -> Tensor:
    """A shard's features [V, n, D], mapped. Nothing is read but the header, and that not through the mapping."""
    file = path / _shard_name(number)
    _check_size(file, shard["bytes"])
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            header = content.get_slice("features")
            names, shape, dtype = list(content.keys()), header.get_shape(), header.get_dtype()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}; {REBUILD}") from error
    expected = [manifest["views"], shard["rows"], manifest["dim"]]
    if names != ["features"] or shape != expected or dtype != STORED[manifest["dtype"]]:
        raise ValueError(
            f"{file} is damaged: it must hold {STORED[manifest['dtype']]} {expected}, got {dtype} {shape}; {REBUILD}"
        )
    stored = DTYPES[manifest["dtype"]]
    begin = shard["bytes"] - math.prod(shape) * stored.itemsize
    return torch.from_file(str(file), size=shard["bytes"], dtype=torch.uint8)[begin:].view(stored).view(shape)


def _check_size(file: Path, size: int) -> None:
    found = _stat(file)[0]
    if found != size:
        state = "missing" if found is None else "truncated" if found < size else "damaged"
        raise ValueError(f"{file} is {state}: it must have {size} bytes, got {found}; {REBUILD}")


def _read_json(file: Path) -> Any:
    return _parse(read_regular(file), file)


def _parse(content: bytes, file: Path) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; {REBUILD}") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _tidy(path: Path) -> None:
    """Remove what only an unfinished cache needs, the plan last: it tells that there is something to tidy."""
    for file in [*path.glob("shard-*.json"), *path.glob(PLAN)]:
        file.unlink()


def _clear(path: Path) -> None:
    """Remove a cache's own files, the manifest first, so that what is left never passes for complete."""
    (path / MANIFEST).unlink(missing_ok=True)
    _tidy(path)
    for file in path.glob("shard-*.safetensors"):
        file.unlink()


# -- reading rows -----------------------------------------------------------------------------------------------------


class _Files:
    """The shards' files, open until the last view of the cache is gone: even of a rebuilt cache the old ones."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths, self.files = tuple(paths), []
        for path in self.paths:
            self.files.append(path.open("rb", buffering=0))

    def __del__(self) -> None:
        for file in self.files:
            file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Files, (self.paths,)  # another process opens its own


def _may_open(count: int) -> bool:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return hasattr(os, "preadv") and (limit == resource.RLIM_INFINITY or count <= limit // 2)


class _Rows:
    """Where the rows of some shards lie; reads any of them in one go, however many shards they come from."""

    def __init__(self, shards: Sequence[Tensor], opened: _Files | None) -> None:
        self.given = shards, opened
        self.counts = torch.tensor([shard.shape[1] for shard in shards])
        self.first = self.counts.cumsum(0) - self.counts
        self.dim, self.dtype, self.opened = shards[0].shape[-1], shards[0].dtype, opened
        size = self.dtype.itemsize
        if opened is not None:  # where each shard's features begin, in bytes of its file
            self.descriptors = [file.fileno() for file in opened.files]
            self.begin = torch.tensor([shard.storage_offset() * size for shard in shards])
            return
        # All shards as one tensor from the lowest address to the highest, of overlapping rows, one at each element: a
        # row's place is then one number. What lies between the shards is not ours, may not exist, and is never read.
        self.shards = [s.contiguous() if s.data_ptr() % size == 0 else s.clone().contiguous() for s in shards]
        address = torch.tensor([shard.data_ptr() for shard in self.shards])
        lowest = int(address.argmin())
        self.begin = (address - address[lowest]) // size
        last = int((self.begin + self.counts * self.shards[0].shape[0] * self.dim).max()) - self.dim
        words = self.shards[lowest].view({2: torch.int16, 4: torch.int32}[size]).numpy()
        overlapping = np.lib.stride_tricks.as_strided(words, (last + 1, self.dim), (size, size))
        self.window = torch.from_numpy(overlapping).view(self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Rows, self.given  # the window must never be copied

    def read(self, row: Tensor, view: Tensor, out: Tensor) -> None:
        """Fill out [B, D] float32 with these stored rows [B], of these views [B]."""
        shard = torch.searchsorted(self.first, row, right=True) - 1
        place = (view * self.counts[shard] + row - self.first[shard]) * self.dim  # elements from the shard's begin
        raw = out if self.dtype == out.dtype else torch.empty(out.shape, dtype=self.dtype)
        if self.opened is None:
            torch.index_select(self.window, 0, self.begin[shard] + place, out=raw)
        else:
            self._read_files(shard, self.begin[shard] + place * raw.itemsize, raw)
        if raw is not out:
            out.copy_(raw)

    def _read_files(self, shard: Tensor, begin: Tensor, out: Tensor) -> None:
        """Fill out [B, D] from these bytes of the shards' files. Rows that follow each other are read at once."""
        width = self.dim * out.itemsize
        breaks = (shard.diff() != 0) | (begin.diff() != width)
        runs = torch.cat([torch.zeros(1, dtype=torch.int64), breaks.nonzero().squeeze(1) + 1])
        starts, buffer = (runs * width).tolist(), memoryview(out.view(torch.uint8).numpy().reshape(-1))
        ends = [*starts[1:], len(buffer)]
        for number, offset, a, b in zip(shard[runs].tolist(), begin[runs].tolist(), starts, ends, strict=True):
            while a < b:
                count = os.preadv(self.descriptors[number], (buffer[a:b],), offset)
                if not count:
                    raise ValueError(f"{self.opened.paths[number]} was truncated while it was open; {REBUILD}")
                a, offset = a + count, offset + count


# -- processes --------------------------------------------------------------------------------------------------------


_held: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the cache's lock. The system frees it when the process dies, however it dies."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _lock(descriptor, path)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"feature cache {path} is being built by another process: wait for it, or use another path"
        ) from None
    except OSError as error:
        warn(
            f"{path} lies on a file system without locks ({error}): two builds at once would disturb each other",
            stacklevel=2,
        )


def _release_locks(worker: int) -> None:
    """In a decoding process: let go of an inherited lock, which would otherwise outlive a killed parent."""
    while _held:
        os.close(_held.pop())


@dataclass(frozen=True)
class Team:
    """The ranks that build together; one rank where there is no torchrun."""

    rank: int = 0
    world: int = 1
    group: Any = None

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """Do the work on every rank and wait for all: their results. If one fails, all raise."""
        if self.world == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        outcomes: list[Any] = [None] * self.world
        dist.all_gather_object(outcomes, (result, error and f"{type(error).__name__}: {error}"), group=self.group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise RuntimeError(f"rank {rank} failed: {failure}")
        return [outcome for outcome, _ in outcomes]

    def lead(self, work: Callable[[], Any]) -> Any:
        """Do the work on rank 0 alone and share its result."""
        return self.each(work if self.rank == 0 else lambda: None)[0]


@contextlib.contextmanager
def torchrun_team() -> Iterator[Team]:
    """The ranks of torch.distributed, joined here if torchrun started us and nobody did so yet."""
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if launched and not dist.is_initialized():
        dist.init_process_group("gloo")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield Team()
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # the caller's own may be NCCL, or in a hurry
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_range(name: str, value: Tensor, end: int) -> None:
    if value.is_floating_point() or value.dtype == torch.bool:
        raise IndexError(f"{name} must be integers, got {value.dtype}")
    if value.numel():
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= end:
            raise IndexError(f"{name} must lie in [0, {end}), got {low} to {high}")


def _refuse_rows(bad: Tensor, rule: str, norms: Tensor) -> None:
    """Raise if any row [V, N] is bad."""
    if bad.any():
        view, row = bad.nonzero()[0].tolist()
        raise ValueError(
            f"features must be {rule}, got {int(bad.sum())} rows that are not, the first is row {row} (view {view}) "
            f"of norm {norms[view, row]:.4g}"
        )
