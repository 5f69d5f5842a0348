"""Labelled image lists and datasets: few-shot sampling and the base/novel split."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from mergetune.data.few_shot_files import read_few_shot
from mergetune.data.image_files import leaves_root
from mergetune.facts.brief import brief

SPLITS = ("train", "val", "test")

VAL_SHOTS = 4  # most validation images per class that CoOp draws


@brief("root", "files", "classnames")
@dataclass(frozen=True)
class ImageList:
    """Labelled images below one folder, of C classes. A class may have no images in the list.

    Attributes:
        root: the folder that ``files`` are relative to.
        files: relative paths with forward slashes, without repetition.
        labels: one class index in [0, C) per file.
        classnames: C names, in the form in which prompts use them.

    Raises:
        ValueError: no files, an empty class name, different lengths, a label out of range, a repeated file, or a path
            that leads out of root.
    """

    root: Path
    files: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    classnames: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "files", tuple(self.files))
        object.__setattr__(self, "labels", tuple(map(operator.index, self.labels)))
        object.__setattr__(self, "classnames", tuple(self.classnames))
        if not self.files:
            raise ValueError("files must hold at least one image, got none")
        for number, name in enumerate(self.classnames):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"classnames must be non-empty texts, got {name!r} for class {number}")
        if len(self.labels) != len(self.files):
            raise ValueError(f"labels must have one entry per file = {len(self.files)}, got {len(self.labels)}")
        if min(self.labels) < 0 or max(self.labels) >= len(self.classnames):
            file, label = next(
                pair for pair in zip(self.files, self.labels, strict=True) if not 0 <= pair[1] < len(self.classnames)
            )
            raise ValueError(f"labels must lie in [0, {len(self.classnames)}), got {label} for {file!r}")
        for file in self.files:
            if leaves_root(file):
                raise ValueError(f"files must be relative to root = {self.root} and lie below it, got {file!r}")
        refuse_repeats("files", self.files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def paths(self) -> list[Path]:
        """Full path of each image."""
        return [self.root / file for file in self.files]

    @property
    def counts(self) -> tuple[int, ...]:
        """Images per class, C entries."""
        counts = [0] * len(self.classnames)
        for label in self.labels:
            counts[label] += 1
        return tuple(counts)

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes with at least one image, in ascending order."""
        return tuple(sorted(set(self.labels)))

    def take(self, positions: Iterable[int]) -> ImageList:
        """A list of the images at these positions, in this order; labels and class names do not change."""
        positions = list(positions)
        return replace(
            self,
            files=tuple(self.files[i] for i in positions),
            labels=tuple(self.labels[i] for i in positions),
        )

    def select(self, classes: Sequence[int]) -> ImageList:
        """A list of the images of these classes, in their order here, relabelled from 0 in the order of ``classes``.

        Raises:
            ValueError: no class, an unknown class, a repeated class, or classes without images.
        """
        classes = _check_classes(classes, len(self.classnames))
        if classes == tuple(range(len(self.classnames))):
            return self  # saves a copy of ImageNet's long list
        new_label = {old: new for new, old in enumerate(classes)}
        kept = [i for i, label in enumerate(self.labels) if label in new_label]
        if not kept:
            empty = [self.classnames[c] for c in new_label]
            raise ValueError(f"classes must have at least one image, got none for {some_of(empty)}")
        return ImageList(
            root=self.root,
            files=tuple(self.files[i] for i in kept),
            labels=tuple(new_label[self.labels[i]] for i in kept),
            classnames=tuple(self.classnames[c] for c in new_label),
        )

    def require_every_class(self) -> ImageList:
        """Returns this list if each class has an image.

        Raises:
            ValueError: a class has no image; the message names such classes.
        """
        empty = [name for name, count in zip(self.classnames, self.counts, strict=True) if not count]
        if empty:
            raise ValueError(f"every class must have at least one image, got none for {some_of(empty)}")
        return self


@brief()
@dataclass(frozen=True)
class Dataset:
    """Training, validation and test images of the same classes, of which some may be hidden.

    ``train``, ``val``, ``test`` and ``classnames`` contain only the visible classes, labelled from 0. The dataset also
    stores the full lists, because CoOp draws few-shot images from all classes before it removes the novel ones. One or
    two of the three splits may be missing.

    Attributes:
        name: name for tables and messages.
        full_train: training images of all classes, or None.
        full_val: validation images of all classes, or None.
        full_test: test images of all classes, or None.
        visible: indices of the visible classes in the order of their new labels; None shows all classes.

    Raises:
        ValueError: no split, different class names between splits, a file in two splits, or an unknown visible class.
    """

    name: str
    full_train: ImageList | None = None
    full_val: ImageList | None = None
    full_test: ImageList | None = None
    visible: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        lists = {split: getattr(self, f"full_{split}") for split in SPLITS}
        lists = {split: images for split, images in lists.items() if images is not None}
        if not lists:
            raise ValueError(f"dataset {self.name!r} must have a train, val or test split, got none")
        first, names = next((split, images.classnames) for split, images in lists.items())
        for split, images in lists.items():
            if images.classnames != names:
                raise ValueError(
                    f"{split} must have the class names of {first}, {difference(names, images.classnames)}"
                )
        visible = range(len(names)) if self.visible is None else self.visible
        object.__setattr__(self, "visible", _check_classes(visible, len(names)))
        _refuse_shared(lists)

    @property
    def classnames(self) -> tuple[str, ...]:
        """Names of the visible classes."""
        names = next(images for images in (self.full_train, self.full_val, self.full_test) if images).classnames
        return tuple(names[c] for c in self._shown)

    @functools.cached_property
    def train(self) -> ImageList:
        """Training images of the visible classes. Raises ValueError if the dataset has none."""
        return self._full("train").select(self._shown)

    @functools.cached_property
    def val(self) -> ImageList:
        """Validation images of the visible classes. Raises ValueError if the dataset has none."""
        return self._full("val").select(self._shown)

    @functools.cached_property
    def test(self) -> ImageList:
        """Test images of the visible classes. Raises ValueError if the dataset has none."""
        return self._full("test").select(self._shown)

    def select(self, classes: Sequence[int]) -> Dataset:
        """A dataset of some of the classes that this dataset shows, relabelled from 0 in the given order.

        Images of other classes are left out. Selections nest.

        Args:
            classes: positions in :attr:`classnames`.
        """
        return replace(self, visible=tuple(self._shown[c] for c in _check_classes(classes, len(self._shown))))

    def base_novel(self) -> tuple[Dataset, Dataset]:
        """Two datasets of CoOp's base and novel classes, each labelled from 0.

        The base classes are the first ceil(C / 2) of the C visible classes; the novel classes are the others.

        Raises:
            ValueError: fewer than two visible classes.
        """
        count = len(self._shown)
        if count < 2:
            raise ValueError(f"base_novel needs at least 2 classes, got {count} in {self.name!r}: {self.classnames}")
        half = math.ceil(count / 2)
        ordered = sorted(range(count), key=self._shown.__getitem__)
        return self.select(ordered[:half]), self.select(ordered[half:])

    def few_shot(self, shots: int | None, seed: int = 1, split: str = "train") -> ImageList:
        """The few-shot images that CoOp draws with this seed, of the visible classes.

        The sampling equals Dassl's: ``random.Random(seed)`` draws ``random.sample`` of ``shots`` images for each class,
        in the order in which classes first appear in the full training list. A class with fewer images gives all of
        them, without a draw (Dassl's ``repeat=False``). For ``split="val"`` the same random stream then draws
        min(shots, 4) images per class from the validation list. Classes are hidden after the draw, so base and novel
        classes have one common draw.

        Args:
            shots: images per class; None returns the whole split.
            seed: ``SEED`` of CoOp.
            split: "train" or "val".

        Raises:
            ValueError: shots below 1, another split, or a visible class without images.
        """
        _check_few_shot_split(split)
        if shots is not None and operator.index(shots) < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        images = self._full(split)
        everything = (self.train if split == "train" else self.val).require_every_class()
        if shots is None:
            return everything
        stream = random.Random(operator.index(seed))
        positions = _draw(self._full("train"), shots, stream)
        if split == "val":
            positions = _draw(images, min(shots, VAL_SHOTS), stream)
        return images.take(positions).select(self._shown)

    def few_shot_file(self, path: str | Path, split: str = "train") -> ImageList:
        """The few-shot images in a file that CoOp stored, of the visible classes.

        The file is a pickle of Dassl's records. No pickled code is run: only plain values and these records are read.
        The paths in the file are those of the machine that wrote the file, so images are found by the ends of the
        paths.

        Args:
            path: the file, such as ``split_fewshot/shot_16-seed_1.pkl``.
            split: "train" or "val".

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a few-shot file of CoOp, or was drawn from other images or labels.
        """
        _check_few_shot_split(split)
        path, images = Path(path), self._full(split)
        stored = read_few_shot(path, split)
        ends = [_path_ends(file) for file, _ in stored]
        wanted = {end for candidates in ends for end in candidates}
        position_of = {file: i for i, file in enumerate(images.files) if file in wanted}
        positions = [next((position_of[end] for end in candidates if end in position_of), -1) for candidates in ends]
        for (file, label), position in zip(stored, positions, strict=True):
            if position < 0:
                raise ValueError(f"{path} must list images of {self.name!r}, got {file!r}, which is not in {split}")
            if label != images.labels[position]:
                raise ValueError(
                    f"{path} must have the labels of {self.name!r}, got {label} for {file!r} "
                    f"instead of {images.labels[position]}: it was drawn from another split"
                )
        refuse_repeats(f"images in {path}", [file for file, _ in stored])
        return images.take(positions).select(self._shown).require_every_class()

    @property
    def _shown(self) -> tuple[int, ...]:
        """``visible`` for type checkers: ``__post_init__`` replaces None by all classes."""
        return cast(tuple[int, ...], self.visible)

    def _full(self, split: str) -> ImageList:
        images = getattr(self, f"full_{split}")
        if images is None:
            raise ValueError(f"dataset {self.name!r} has no {split} split")
        return images


def difference(expected: Iterable[str], got: Iterable[str]) -> str:
    """Describes how the names ``got`` differ from the names ``expected``, for messages."""
    expected, got = list(expected), list(got)
    lacking, extra = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    parts = [f"lacks {some_of(lacking)}"] * bool(lacking) + [f"has {some_of(extra)} in addition"] * bool(extra)
    return " and ".join(parts) or "has them in another order"


def _draw(images: ImageList, shots: int, stream: random.Random) -> list[int]:
    """Positions of ``shots`` images per class, drawn as Dassl's generate_fewshot_dataset draws them."""
    of_label: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(images.labels):
        of_label[label].append(position)
    drawn: list[int] = []
    for positions in of_label.values():
        drawn += stream.sample(positions, shots) if len(positions) >= shots else positions
    return drawn


def _path_ends(file: str) -> list[str]:
    """All ends of a path, longest first: "a/b/c" -> "a/b/c", "b/c", "c"."""
    parts = file.replace("\\", "/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_classes(classes: Iterable[int], count: int) -> tuple[int, ...]:
    classes = tuple(map(operator.index, classes))
    if not classes:
        raise ValueError("classes must name at least one class, got none")
    for c in classes:
        if not 0 <= c < count:
            raise ValueError(f"classes must lie in [0, {count}), got {c}")
    refuse_repeats("classes", classes)
    return classes


def refuse_repeats(what: str, values: Sequence[Any]) -> None:
    if len(set(values)) == len(values):
        return
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} must not repeat, got {value!r} twice")
        seen.add(value)


def _refuse_shared(lists: Mapping[str, ImageList]) -> None:
    """Refuses an image in two splits. Sets are made of the shorter lists only: ImageNet's training list is long."""
    one_root = len({images.root for images in lists.values()}) == 1
    names = {split: images.files if one_root else [*map(str, images.paths)] for split, images in lists.items()}
    for first, second in itertools.combinations(names, 2):
        short, long = sorted((names[first], names[second]), key=len)
        if not set(short).isdisjoint(long):
            path = lists[first].root / min(set(short).intersection(long))
            raise ValueError(f"a file must lie in one split, got {path} in {first} and {second}")


def _check_few_shot_split(split: str) -> None:
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")


def some_of(values: Sequence[Any], limit: int = 5) -> str:
    shown = ", ".join(map(repr, values[:limit]))
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"
