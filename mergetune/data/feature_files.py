"""Reading of other projects' feature files as FeatureCache: lpclip, Tip-Adapter, clip-retrieval, plain arrays.

Files are memory-mapped, not copied, where the format allows. Shapes: N images, C classes, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mergetune.data.cache import FeatureCache
from mergetune.data.class_names import class_names, in_order, prettify
from mergetune.data.row_reading import OpenFile, TensorRows, may_open
from mergetune.io import (
    hidden,
    kind_of_content,
    lines_of,
    listing,
    load_torch,
    names_file,
    not_plain,
    open_regular,
    read_npz,
    read_object_array,
    read_safetensors,
    read_text,
    reason,
    require_file,
    require_regular,
    require_unpacked,
)

FEATURES = ("feature_list", "features", "image_features")  # lpclip's name first
LABELS = ("label_list", "labels", "targets")
ROWS = 1 << 16  # rows checked at once

Labels = Sequence[int] | Sequence[str] | Tensor | np.ndarray | str | Path


@names_file("path")
def read_features(
    path: str | Path,
    *,
    labels: Labels | None = None,
    classnames: Sequence[str] | None = None,
    normalize: bool = False,
    fingerprint: str = "",
    progress: bool = True,
) -> FeatureCache:
    """Reads image features that another project has saved, as a feature cache.

    | ``path`` | made by | labels |
    |---|---|---|
    | ``train.npz`` | lpclip (CoOp's linear probe): ``feature_list``, ``label_list`` | in the same file |
    | ``keys_16shots.pt`` [D, N] | Tip-Adapter | ``values_16shots.pt``, one-hot [N, C], in the same folder |
    | ``test_f.pt`` [N, D] | Tip-Adapter | ``test_l.pt`` in the same folder |
    | a folder with ``img_emb/img_emb_*.npy`` | clip-retrieval | ``metadata/*.parquet``: a column, or class folders |
    | ``.npy``, or ``features`` in ``.npz``, ``.pt``, ``.safetensors`` | any tool | ``labels`` in the file, or given |

    ``.npy``, ``.safetensors`` and ``.pt`` are memory-mapped; all rows are read once to check them. Pickled objects are
    refused.

    Args:
        path: the file or folder.
        labels: N class numbers or names, or a file with them (.npy, .npz, .pt, .safetensors, or .txt with one label per
            line), or the name of a column in clip-retrieval's metadata. None takes the labels named in the table.
        classnames: C names in the order of the class numbers. If the labels are names, None takes the sorted labels,
            whole numbers by number, in the spelling of :class:`mergetune.ImageFolder`: "shopping cart" for
            ``shopping_cart``.
        normalize: scale the rows to unit norm, in a copy; features of lpclip need this. With False, rows that are not
            of unit norm are refused.
        fingerprint: ``clip.image_fingerprint`` of the model that made the features. "" means unknown; the model is then
            never checked.
        progress: show a bar if stderr is a terminal.

    Returns:
        A feature cache in memory or on memory-mapped files.

    Raises:
        FileNotFoundError: the file, or the file of the labels, does not exist.
        ValueError: the file has another format, is damaged or holds pickled objects; features and labels do not fit;
            rows are not of unit norm.
        ImportError: clip-retrieval's metadata is needed, but pyarrow is not installed.
    """
    path = Path(path)
    files: tuple[str, ...] = ()
    if not path.is_dir():
        require_file(path, f"path must be a file or folder of features, got {path}, which does not exist")
    mapped = [path]
    if path.is_dir():
        parts, found, files = _clip_retrieval(path, labels)
        mapped = _embedded(path)
    elif kind_of_content(path) == "npy":
        parts, found = [_floats(path, _map_npy(path))], labels
    else:
        content = _content(path)
        features = _pick(path, content, FEATURES)
        found = _companion(path, content) if labels is None else labels
        columns = path.name.startswith("keys_") and not isinstance(content, dict)  # Tip-Adapter stores [D, N]
        parts = [_floats(path, features).T.contiguous() if columns else _floats(path, features)]
    if found is None:
        raise ValueError(f"labels must be given, got None: {path} holds no labels")
    if isinstance(found, str | Path):
        found = _read_labels(Path(found))
    numbers, names = _numbers(found, classnames)
    if normalize or path.suffix == ".npz" or not may_open(len(mapped)):
        mapped = []  # the rows are copies
    return _cache(path, parts, numbers, names, files, normalize, fingerprint, progress, mapped)


def _cache(
    path: Path,
    parts: list[Tensor],
    labels: Tensor,
    classnames: tuple[str, ...],
    files: tuple[str, ...],
    normalize: bool,
    fingerprint: str,
    progress: bool,
    mapped: Sequence[Path],
) -> FeatureCache:
    """The cache of these features, checked in portions of rows so that memory stays bounded."""
    count = sum(map(len, parts))
    if len(labels) != count:
        raise ValueError(f"labels must be one for each of the {count} features of {path}, got {len(labels)}")
    if len({(part.shape[1], part.dtype) for part in parts}) != 1:
        raise ValueError(f"{path} must hold features of one width and dtype, got {[list(p.shape) for p in parts][:3]}")
    caches, start = [], 0
    portions = [portion for part in parts for portion in part.split(ROWS)]
    for portion in tqdm(portions, desc="check features", disable=hidden(progress and len(portions) > 1)):
        here = labels[start : start + len(portion)]
        try:
            cache = FeatureCache.from_tensors(portion, here, classnames, normalize=normalize, fingerprint=fingerprint)
        except ValueError as error:
            raise ValueError(f"{path}, rows from {start}: {error}") from error
        caches.append(cache)
        start += len(portion)
    tensors = [tensor for cache in caches if isinstance(cache.source, TensorRows) for tensor in cache.source.tensors]
    source = TensorRows(tensors, files=[OpenFile(file) for file in mapped])
    return replace(caches[0], labels=labels, files=files, stored=torch.arange(count), source=source)


# -- labels ------------------------------------------------------------------------------------------------------------


def _numbers(labels: Any, classnames: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers [N] and the names by number, from numbers, names or one-hot rows."""
    if isinstance(labels, Tensor):
        if kind := not_plain(labels):
            raise ValueError(f"labels must be N whole numbers or names, got {kind}")
        labels = labels.detach().cpu().to(torch.float32 if labels.is_floating_point() else labels.dtype).numpy()
    texts = _texts(labels)
    if texts is not None:
        keys = in_order(set(texts)) if classnames is None else list(classnames)
        names = class_names(keys, None, what="label") if classnames is None else tuple(classnames)
        number = {name: i for keys in (map(prettify, names), keys) for i, name in enumerate(keys)}
        found = [number.get(label, number.get(prettify(label))) for label in texts]
        if None in found:
            unknown = texts[found.index(None)]
            raise ValueError(f"labels must be among the {len(names)} classnames, got {unknown!r}")
        return torch.tensor(found), names
    labels = np.asarray(labels)
    if labels.ndim == 1 and labels.dtype.hasobject and all(type(label) is int for label in labels):
        labels = np.array(labels.tolist())
    if labels.ndim == 2:  # Tip-Adapter's values
        if labels.dtype.kind not in "biuf" or not ((labels != 0).sum(1) == 1).all() or not (labels.max(1) == 1).all():
            raise ValueError(f"labels [N, C] must be one-hot, got other rows in {list(labels.shape)}")
        labels = labels.argmax(1)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be N whole numbers or names, got {labels.dtype} {list(labels.shape)}")
    if classnames is None:
        raise ValueError("classnames must be given, got None: the labels are numbers")
    return torch.from_numpy(labels.astype(np.int64)), tuple(classnames)


def _texts(labels: Any) -> list[str] | None:
    """The names if the labels are N names in a list or an array, also in one of Python objects, as pandas has them."""
    if not isinstance(labels, list | tuple):
        array = np.asarray(labels)
        labels = array.tolist() if array.ndim == 1 and array.dtype.kind in "UO" else ()
    return list(labels) if labels and all(isinstance(label, str) for label in labels) else None


def _read_labels(file: Path) -> Any:
    require_file(file, f"labels must be an existing file, got {file}, which does not exist")
    if file.suffix == ".txt":
        lines = [line.strip() for line in lines_of(read_text(file)) if line.strip()]
        return [int(line) for line in lines] if all(re.fullmatch(r"\d{1,9}", line) for line in lines) else lines
    return _npy_labels(file) if kind_of_content(file) == "npy" else _pick(file, _content(file), LABELS)


def _npy_labels(file: Path) -> np.ndarray:
    with open_regular(file) as stream:
        objects = b"'|O'" in stream.read(128)  # the header, which says the dtype
        if not objects:
            return _map_npy(file)
        try:
            stream.seek(0)
            return read_object_array(stream, file.name, stored=file.stat().st_size)
        except Exception as error:  # a damaged pickle raises many kinds
            raise ValueError(f"{file} cannot be read as .npy: {reason(error)}") from error


def _companion(path: Path, content: Any) -> Any:
    """The labels of features: those in the same content, or the path of Tip-Adapter's file of labels, or None."""
    if isinstance(content, dict):
        return next((content[name] for name in LABELS if name in content), None)
    if path.name.startswith("keys_"):
        return path.with_name(f"values_{path.name.removeprefix('keys_')}")
    return path.with_name(f"{path.stem.removesuffix('_f')}_l{path.suffix}") if path.stem.endswith("_f") else None


# -- files -------------------------------------------------------------------------------------------------------------


def _content(file: Path) -> Any:
    """Content of a file: arrays by name, or one tensor."""
    kind = kind_of_content(file)
    if kind == "npz":
        return read_npz(file)
    if kind == "safetensors":
        return read_safetensors(file)
    if kind.endswith("pickle"):
        raise ValueError(f"{file} cannot be read as features: it is a pickle, which could run code")
    if kind == "torch":
        try:
            return load_torch(file, mmap=True)
        except ValueError:
            if file.suffix in (".pt", ".pth"):
                raise
    raise ValueError(f"{file} must be .npy, .npz, .pt, .pth, .safetensors or a folder of clip-retrieval's")


def _pick(file: Path, content: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(content, dict):
        return content
    found = [name for name in names if name in content]
    if len(found) != 1:
        raise ValueError(f"{file} must hold one of {', '.join(names)}, got {listing(content)}")
    return content[found[0]]


def _map_npy(file: Path) -> np.ndarray:
    try:
        require_regular(file)
        return np.load(file, mmap_mode="c", allow_pickle=False)  # "c": torch expects writable memory
    except Exception as error:  # numpy raises many kinds on damaged files
        raise ValueError(f"{file} cannot be read as .npy: {reason(error)}") from error


def _floats(file: Path, features: Any) -> Tensor:
    """Features [N, D] as a tensor that shares their memory; refuses other shapes and types."""
    if isinstance(features, np.ndarray) and features.dtype.kind == "f" and features.dtype.itemsize <= 8:
        features = torch.from_numpy(features.astype(features.dtype.newbyteorder("="), copy=False))
    if (
        not isinstance(features, Tensor)
        or not features.is_floating_point()
        or not_plain(features) is not None
        or features.ndim != 2
        or not features.numel()
    ):
        what = f"{features.dtype} {list(features.shape)}" if hasattr(features, "shape") else type(features).__name__
        raise ValueError(f"{file} must hold floating-point features [N, D], got {what}")
    return features


def _clip_retrieval(folder: Path, labels: Labels | None) -> tuple[list[Tensor], Any, tuple[str, ...]]:
    """Features, labels and files of ``img_emb/img_emb_N.npy`` with ``metadata/metadata_N.parquet``."""
    embedded = _embedded(folder)
    parts = [_floats(file, _map_npy(file)) for file in embedded]
    column = labels if isinstance(labels, str) and not Path(labels).is_file() else None
    if labels is not None and column is None:
        return parts, labels, ()
    found, paths = [], []
    for file, part in zip(embedded, parts, strict=True):
        metadata = folder / "metadata" / file.name.replace("img_emb", "metadata").replace(".npy", ".parquet")
        table = _read_parquet(metadata, ["image_path"] if column is None else ["image_path", column], len(part))
        paths += table["image_path"]
        folders = [PurePosixPath(str(name)).parent.name for name in table["image_path"]]
        found += folders if column is None else table[column]
    if column is None and "" in found:
        raise ValueError(f"labels must be given: {folder}'s image_path {paths[found.index('')]!r} has no class folder")
    if column is not None and any(type(value) is not type(found[0]) for value in found):
        raise ValueError(f"labels must name a column of whole numbers only or of names only, got {column!r}")
    unique = all(isinstance(name, str) for name in paths) and len(set(paths)) == len(paths)
    return parts, found, tuple(paths) if unique else ()


def _embedded(folder: Path) -> list[Path]:
    """The files ``img_emb/img_emb_N.npy`` in the order of N."""
    numbered = {}
    for file in folder.glob("img_emb/img_emb_*.npy"):
        if match := re.fullmatch(r"img_emb_(\d+)\.npy", file.name):
            numbered[file] = int(match[1])
    if not numbered:
        raise FileNotFoundError(f"{folder} must hold img_emb/img_emb_N.npy, as clip-retrieval writes them")
    return sorted(numbered, key=numbered.__getitem__)


def _read_parquet(file: Path, columns: list[str], rows: int) -> dict[str, list[Any]]:
    """Columns of whole numbers or texts, whose sizes are checked first: repeated values need no space in a file."""
    try:
        import pyarrow.parquet as parquet
        import pyarrow.types as types
    except ImportError as error:
        raise ImportError(f"{file} needs pyarrow: pip install pyarrow, or give the labels yourself") from error
    require_file(file, f"{file} with the labels must exist, got no such file: or pass labels")
    try:
        schema = parquet.read_schema(file)
        if missing := [name for name in columns if name not in schema.names]:
            raise ValueError(f"the table must have column {missing[0]!r}, got {listing(schema.names)}")
        if nested := next((name for name in columns if types.is_nested(schema.field(name).type)), None):
            raise ValueError(f"column {nested!r} must hold whole numbers or texts, got {schema.field(nested).type}")
        texts = [name for name in columns if not types.is_integer(schema.field(name).type)]
        found = parquet.ParquetFile(file, read_dictionary=texts)
        facts = found.metadata
        if facts.num_rows != rows:
            raise ValueError(f"the table must have a row for each of the {rows:,} features, got {facts.num_rows:,}")
        places = [i for i in range(facts.num_columns) if facts.schema.column(i).path in columns]
        groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
        unpacked = sum(group.column(place).total_uncompressed_size for group in groups for place in places)
        require_unpacked(unpacked, file.stat().st_size)
        table = found.read(columns=columns)
        return {name: _values(table.column(name)) for name in columns}
    except Exception as error:  # pyarrow raises many kinds
        raise ValueError(f"{file} cannot be read: {reason(error)}") from error


def _values(column: Any) -> list[Any]:
    """The values of a column; equal texts of a dictionary are one object."""
    found: list[Any] = []
    for chunk in column.chunks:
        if hasattr(chunk, "dictionary"):
            words = chunk.dictionary.to_pylist()
            found += [None if place is None else words[place] for place in chunk.indices.to_pylist()]
        else:
            found += chunk.to_pylist()
    return found
