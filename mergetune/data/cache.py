"""FeatureCache: image features of a frozen CLIP, on disk or in memory, read row by row.

Shapes: B requested rows, D embedding width, N rows of a cache, V views of each image.

Features of up to ``MAX_MAPPED`` bytes are memory-mapped. Rows of a larger cache are read with ``preadv``: reading a row
through a mapping also loads the pages around the row, so a mapping would soon occupy memory for the whole cache.
docs/cache.md describes the files.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from warnings import warn

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import PRECISIONS
from mergetune.data.cache_blocks import checks_open_file, damaged_rows, refuse_damage
from mergetune.data.cache_documents import FEATURES, Manifest
from mergetune.data.cache_files import (
    ARRAYS,
    MANIFEST,
    PLAN,
    caches_below,
    mend,
    read_manifest,
    read_plan,
    read_records,
)
from mergetune.data.cache_identity import image_identities, refuse_changed
from mergetune.data.cache_version_1 import Manifest1, open_shards, verify_shards
from mergetune.data.image_lists import ImageList, some_of
from mergetune.data.row_reading import ROWS, Extent, FileRows, Rows, TensorRows, UnitNorms
from mergetune.facts.brief import brief
from mergetune.io import require_plain

UNIT_NORM_ATOL = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MAX_MAPPED = 1 << 28  # largest number of bytes of features that are memory-mapped


@brief("path", "classnames", "dim", "dtype", "views", "skipped", images=len)
@dataclass(frozen=True, eq=False)
class FeatureCache:
    """Unit-norm image features with labels, on disk or in memory; only requested rows are read.

    Create a cache with :func:`cache_features`, :meth:`open` or :meth:`from_tensors`. :meth:`select` returns a cache of
    some of the images without copying features.

    Attributes:
        path: folder of the cache; None for features in memory.
        labels: LongTensor [N], class indices.
        classnames: one name per class.
        files: N relative paths; empty if unknown.
        fingerprint: image fingerprint of the model that made the features; empty if unknown.
        backbone: name of that model; empty if unknown.
        dtype: type of the stored features: "float32", "bfloat16" or "float16".
        views: V. View 0 is the evaluation transform; the other views are augmented.
        dim: D.
        skipped: {file: reason} of the images that could not be read.
        stored: LongTensor [N], position of each row in ``source``.
        source: reads stored rows from memory or from the files of the cache.
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
    source: Rows = field(repr=False)
    backbone: str = ""

    @property
    def holds(self) -> str:
        """What is read of each image, see :class:`mergetune.data.Batches`: "feature"."""
        return "feature"

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def open(cls, path: str | Path) -> FeatureCache:
        """Opens a finished cache.

        The checksums of all features are compared if size, times or inode of their file differ from those of the last
        comparison, as after copying the cache, and again if size or times change while the cache is open. Each row's
        norm is checked when the row is first read.

        If the features have more than ``MAX_MAPPED`` bytes, rows are read from the file, and only the batch occupies
        memory.

        Args:
            path: folder of the cache.

        Raises:
            FileNotFoundError: the folder is not a cache.
            ValueError: the cache is unfinished, damaged or of another format; the message names the damaged rows.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if (path / PLAN).is_file():
                plan = read_plan(path)
                done, total = len(read_records(path, plan)), plan.shard_count
                raise ValueError(
                    f"feature cache {path} is unfinished ({done} of {total} blocks): call cache_features again"
                )
            below = " or ".join(map(str, caches_below(path)[:5]))
            way_on = f": give {below}" if below else ""
            raise FileNotFoundError(f"path must be a feature cache, got {path} without {MANIFEST}{way_on}")
        manifest = read_manifest(path)
        skipped = manifest.skipped
        kept = [i for i, file in enumerate(manifest.files) if file not in skipped]
        if isinstance(manifest, Manifest1):
            source, stored = open_shards(path, manifest, most_in_memory=MAX_MAPPED), torch.arange(len(kept))
        else:
            refuse_damage(path, manifest)
            source, stored = _open_array(path, manifest), torch.tensor(kept)
        return cls(
            path=path,
            labels=torch.tensor([manifest.labels[i] for i in kept], dtype=torch.int64),
            classnames=manifest.classnames,
            files=tuple(manifest.files[i] for i in kept),
            fingerprint=manifest.fingerprint,
            dtype=manifest.dtype,
            views=manifest.views,
            dim=manifest.dim,
            skipped=skipped,
            stored=stored,
            source=source,
            backbone=manifest.clip,
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
        """A cache in memory from given features, which are not copied if they are on the CPU in a supported dtype.

        Args:
            features: [N, D] or [V, N, D], unit norm.
            labels: N class indices.
            classnames: one name per class.
            fingerprint: ``clip.image_fingerprint`` of the model that made the features; "" if unknown.
            files: N names of the images; :meth:`select` needs them.
            normalize: scale the rows to unit norm, in a copy.

        Raises:
            ValueError: wrong shapes, no rows, NaN or inf, rows of norm zero or not of unit norm, labels out of range.
        """
        for name, value in {"features": features, "labels": labels}.items():
            if isinstance(value, Tensor):
                require_plain(name, value)
        if features.dim() not in (2, 3) or not features.is_floating_point() or not features.numel():
            raise ValueError(
                "features must be floating point of shape [N, D] or [V, N, D] with at least one row, "
                f"got {features.dtype} {list(features.shape)}"
            )
        features = features.detach().cpu()
        features = features if features.dim() == 3 else features[None]
        features = features if features.dtype in PRECISIONS.values() else features.float()
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
            dtype=next(name for name, dtype in PRECISIONS.items() if dtype == features.dtype),
            views=views,
            dim=dim,
            skipped={},
            stored=torch.arange(count),
            source=TensorRows((features,)),
        )

    def rows(self, index: Tensor, view: int | Tensor = 0) -> Tensor:
        """A copy of some rows as float32. Norms of rows stored in a half dtype are 1 up to the precision of that dtype.

        Args:
            index: LongTensor [B] of rows in [0, N).
            view: one view for all rows, or a LongTensor [B] with a view per row.

        Returns:
            [B, D] float32.

        Raises:
            IndexError: an index or view out of range.
            ValueError: a row of a cache on disk is damaged, or its file was cut off while it is open.
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
            self.source.read(row[part], view[part], out[part])
        return out

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Yields all rows of view 0 in order, ``size`` rows at a time, so that only these rows are in memory.

        Matrix products with the rows may differ in the last bits for another ``size``: keep ``size`` fixed where
        results must have the same bits.

        Yields:
            A copy of the rows, [B, D] float32; their labels, [B]; the slice of the rows in the cache.

        Raises:
            ValueError: a size below 1.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        for begin in range(0, len(self), size):
            part = slice(begin, min(begin + size, len(self)))
            yield self.rows(torch.arange(part.start, part.stop)), self.labels[part], part

    def tensor(self, view: int = 0) -> Tensor:
        """A copy of all rows of a view, [N, D] float32."""
        return self.rows(torch.arange(len(self)), view)

    def select(self, images: ImageList) -> FeatureCache:
        """A cache of these images, with the order, labels and class names of ``images``. Features are not copied.

        Images that were skipped as unreadable when the cache was built are left out with a warning.

        Args:
            images: images whose files are in this cache.

        Raises:
            ValueError: an image is not in the cache, or all images were skipped.
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
            warn(
                f"{len(lacking)} unreadable images of {self._name} are left out: {some_of(lacking, 3)}; the first: "
                f"{reason}",
                stacklevel=2,
            )
            files = tuple(itertools.compress(files, kept.tolist()))
        return replace(
            self, labels=labels[kept], classnames=images.classnames, files=files, stored=self.stored[rows[kept]]
        )

    def select_classes(self, classes: Sequence[int]) -> FeatureCache:
        """A cache of these classes, relabelled from 0 in the given order. Features are not copied.

        Args:
            classes: class indices.

        Raises:
            ValueError: an unknown class, a class twice, or classes without features.
        """
        classes = [int(c) for c in classes]
        if len(set(classes)) != len(classes) or not all(0 <= c < len(self.classnames) for c in classes):
            raise ValueError(f"classes must be different and lie in [0, {len(self.classnames)}), got {classes}")
        new_label = torch.full((len(self.classnames),), -1)
        new_label[classes] = torch.arange(len(classes))
        labels = new_label[self.labels]
        rows = (labels >= 0).nonzero().squeeze(1)
        if not len(rows):
            raise ValueError(f"classes must have features in the cache, got {classes} without any")
        return replace(
            self,
            labels=labels[rows],
            classnames=tuple(self.classnames[c] for c in classes),
            files=tuple(self.files[i] for i in rows.tolist()) if self.files else (),
            stored=self.stored[rows],
        )

    def verify(self, images: ImageList | None = None, *, progress: bool = True) -> None:
        """Compares the checksums of all features; with ``images``, also those of the bytes of each image.

        Args:
            images: the images that were encoded; None checks only the features.
            progress: show a bar on a terminal.

        Raises:
            ValueError: features are damaged, and the message names file and rows; or an image has changed.
        """
        if self.path is None:
            return
        manifest = read_manifest(self.path)
        if isinstance(manifest, Manifest1):
            verify_shards(self.path, manifest, progress=progress)
        else:
            refuse_damage(self.path, manifest, trust=False, progress=progress)
        if images is not None:
            known = zip(manifest.files, image_identities(self.path, manifest), strict=True)
            refuse_changed(self.path, images, known, trust_mtime=False)

    def shared_with(self, other: FeatureCache) -> Tensor:
        """Indices, ascending, [n], of the rows of ``other`` that are also in this cache.

        A row is in both caches if file name and features (view 0) are equal. If one of the caches has no file names,
        only the features are compared. Rows are read in small portions.
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
        """Hash of the bits of each row (view 0), int64 [N]: a dot product with random numbers, two columns per word."""
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(-(2**63), 2**63 - 1, (-(-self.dim // 2),), generator=generator)
        rows = (F.pad(x, (0, self.dim % 2)) for x, _, _ in self.batches(ROWS))
        return torch.cat([(x.view(torch.int64) * factors).sum(1) for x in rows])

    @property
    def digest(self) -> str:
        """SHA-256 of the features, their order and their labels; equal digests give equal training runs.

        All features of these images are read once for it.
        """
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(self.labels.numpy().data)
        for content in self.source.contents(self.stored):
            digest.update(content)
        return digest.hexdigest()

    @property
    def _name(self) -> str:
        return "these features" if self.path is None else f"feature cache {self.path}"


def _open_array(path: Path, manifest: Manifest) -> FileRows:
    """The features of a finished cache."""
    array = manifest.array(FEATURES)
    views, count, width = array.shape
    return FileRows(
        [Extent(path / ARRAYS, array.offset, count)],
        views,
        width,
        array.dtype,
        mapped=array.end - array.offset <= MAX_MAPPED,
        way_on=mend(path),
        norms=UnitNorms(views, count, functools.partial(damaged_rows, path)) if array.unit_norm else None,
        check=checks_open_file(path, manifest),
    )


def _check_range(name: str, value: Tensor, end: int) -> None:
    if value.is_floating_point() or value.dtype == torch.bool:
        raise IndexError(f"{name} must be integers, got {value.dtype}")
    if value.numel():
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= end:
            raise IndexError(f"{name} must lie in [0, {end}), got {low} to {high}")


def _refuse_rows(bad: Tensor, rule: str, norms: Tensor) -> None:
    """Raises ValueError if any row is bad; ``bad`` and ``norms`` are [V, N]."""
    if bad.any():
        view, row = bad.nonzero()[0].tolist()
        raise ValueError(
            f"features must be {rule}, got {int(bad.sum())} rows that are not, the first is row {row} (view {view}) "
            f"of norm {norms[view, row]:.4g}"
        )
