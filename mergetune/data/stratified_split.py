"""Splits of images into train, val and test: by class, by a hash of the content, stable when images come or go."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergetune.data.image_lists import SPLITS
from mergetune.io import open_regular, sha256_regular

VAL_SHARE, TEST_SHARE = 0.2, 0.3  # CoOp's shares for data without an official split
BEGINNING = 1 << 16  # bytes of a file by which images are ordered

Content = tuple[str, str]
"""Size and checksum of the first bytes; checksum of the whole file, or "" if no other file begins so."""


def stratify(
    root: Path, classes: Mapping[str, list[str]], *, val: float | None, test: float | None, seed: int
) -> dict[str, dict[str, list[str]]]:
    """Splits the files of each class. Files with the same bytes go to the same split, also across classes."""
    shares = {"test": TEST_SHARE if test is None else test, "val": VAL_SHARE if val is None else val}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {share}")
    if sum(shares.values()) >= 1:
        raise ValueError(f"val + test must be below 1, got {shares['val']} + {shares['test']}")
    shares = {name: share for name, share in shares.items() if share}
    bytes_of = _identify(root, [file for files in classes.values() for file in files])
    side: dict[Content, str] = {}  # content -> split
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS if split in shares or split == "train"}
    for name, files in classes.items():
        twins: dict[Content, int] = Counter(bytes_of[file] for file in files)
        got = dict.fromkeys([*shares, "train"], 0)
        for content, number in twins.items():
            if content in side:  # the same bytes are in a class before
                got[side[content]] += number
        free = sorted(
            (content for content in twins if content not in side),
            key=lambda content: (hashlib.sha256(f"{seed}/{content[0]}".encode()).digest(), content[1]),
        )
        wanted = _counts(shares, len(files))
        for left, content in zip(range(len(free), 0, -1), free, strict=True):
            bare = [split for split in got if not got[split]]
            short = [split for split in shares if got[split] < wanted[split]]
            side[content] = (bare if left <= len(bare) else [*short, "train"])[0]
            got[side[content]] += twins[content]
        if not all(got.values()):
            raise ValueError(
                f"class {name!r} in {root} must have at least {len(got)} different images to be split into "
                f"{', '.join(splits)}, got {len(twins)}: add images, or make folders train and test "
                "yourself; in Python val=0 of mergetune.ImageFolder needs one image less"
            )
        for split in splits:
            splits[split][name] = [file for file in files if side[bytes_of[file]] == split]
    return splits


def _counts(shares: Mapping[str, float], images: int) -> dict[str, int]:
    """Images per split. The ends of the splits are rounded, so that one more image moves each end by 0 or 1."""
    counts, end, share = {}, 0, 0.0
    for split in shares:
        share += shares[split]
        begin, end = end, max(end + 1, round(share * images))
        counts[split] = end - begin
    return counts


def _identify(root: Path, files: Iterable[str]) -> dict[str, Content]:
    """{file: content}, equal for files with the same bytes and for no others.

    The whole file is read only if it begins as another one does.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for file in files:
        alike[_beginning(root / file)].append(file)
    contents = {}
    for beginning, names in alike.items():
        for file in names:
            contents[file] = beginning, sha256_regular(root / file) if len(names) > 1 else ""
    return contents


def _beginning(file: Path) -> str:
    try:
        with open_regular(file) as opened:
            return f"{os.fstat(opened.fileno()).st_size}/{hashlib.sha256(opened.read(BEGINNING)).hexdigest()}"
    except OSError:
        if not file.is_file():
            raise
        return f"{file.stat().st_size}/{file}"  # a file that cannot be read is reported when it is encoded
