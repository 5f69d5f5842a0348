"""The 15 benchmark datasets in the layout of CoOp's DATASETS.md: required files, checks and reading."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from mergetune.data.class_names import prettify
from mergetune.data.image_files import image_names, require_files, subfolders
from mergetune.data.image_lists import SPLITS, Dataset, ImageList, difference
from mergetune.data.own_images import coop_split
from mergetune.facts.brief import brief
from mergetune.io import hidden, lines_of, names_file, read_text

GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
VARIANTS = ("variants.txt", *(f"images_variant_{split}.txt" for split in SPLITS))
CLASSNAMES = "classnames.txt"


@brief()
@dataclass(frozen=True)
class Benchmark:
    """One benchmark dataset and its files below the root, in CoOp's layout.

    Attributes:
        name: CoOp's name, as in ``configs/datasets/<name>.yaml``.
        title: the heading in CoOp's DATASETS.md, and the name in tables of papers.
        folder: folder of the dataset below the root.
        image_dir: folder of the images below ``folder``; listed paths are relative to this folder.
        file: text file below ``folder`` that lists the classes; for kind "split" CoOp's ``split_zhou_*.json``.
        classes: number of classes.
        sizes: numbers of images in train, val and test of the complete dataset; 0 for a missing split.
        kind: "split" (CoOp's split file), "variants" (FGVCAircraft's own lists), "folders" (class folders in train/ and
            val/, where val is the test set) or "test" (class folders of a test set only).
        inside: folders that must exist in the folder of the images.
    """

    name: str
    title: str
    folder: str
    image_dir: str
    file: str
    classes: int
    sizes: tuple[int, int, int]
    kind: str = "split"
    inside: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All text files that the dataset needs below ``folder``."""
        return VARIANTS if self.kind == "variants" else (self.file,)


# In the order of the papers' tables: the eleven datasets of base-to-novel, then ImageNet's four shifted test sets.
_ALL = (
    Benchmark(
        "imagenet", "ImageNet", "imagenet", "images", CLASSNAMES, 1000, (1281167, 0, 50000), "folders", ("train", "val")
    ),
    Benchmark(
        "caltech101", "Caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json",
        100, (4128, 1649, 2465),
    ),
    Benchmark(
        "oxford_pets", "OxfordPets", "oxford_pets", "images", "split_zhou_OxfordPets.json", 37, (2944, 736, 3669)
    ),
    Benchmark(
        "stanford_cars", "StanfordCars", "stanford_cars", "", "split_zhou_StanfordCars.json", 196, (6509, 1635, 8041),
        inside=("cars_train", "cars_test"),
    ),
    Benchmark(
        "oxford_flowers", "Flowers102", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
        102, (4093, 1633, 2463),
    ),
    Benchmark("food101", "Food101", "food-101", "images", "split_zhou_Food101.json", 101, (50500, 20200, 30300)),
    Benchmark(
        "fgvc_aircraft", "FGVCAircraft", "fgvc_aircraft", "images", VARIANTS[0], 100, (3334, 3333, 3333), "variants"
    ),
    Benchmark("sun397", "SUN397", "sun397", "SUN397", "split_zhou_SUN397.json", 397, (15880, 3970, 19850)),
    Benchmark("dtd", "DTD", "dtd", "images", "split_zhou_DescribableTextures.json", 47, (2820, 1128, 1692)),
    Benchmark("eurosat", "EuroSAT", "eurosat", "2750", "split_zhou_EuroSAT.json", 10, (13500, 5400, 8100)),
    Benchmark("ucf101", "UCF101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", 101, (7639, 1898, 3783)),
    Benchmark(
        "imagenetv2", "ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val", CLASSNAMES,
        1000, (0, 0, 10000), "test",
    ),
    Benchmark(
        "imagenet_sketch", "ImageNet-Sketch", "imagenet-sketch", "images", CLASSNAMES, 1000, (0, 0, 50889), "test"
    ),
    Benchmark("imagenet_a", "ImageNet-A", "imagenet-adversarial", "imagenet-a", CLASSNAMES, 200, (0, 0, 7500), "test"),
    Benchmark("imagenet_r", "ImageNet-R", "imagenet-rendition", "imagenet-r", CLASSNAMES, 200, (0, 0, 30000), "test"),
)  # fmt: skip
#: {name: :class:`Benchmark`}, in the order of papers' tables.
DATASETS = {entry.name: entry for entry in _ALL}

OTHER_IMAGE_DIRS = {"imagenet": "", "eurosat": "EuroSAT_RGB", "imagenet_sketch": "sketch"}  # after unpacking archives
DRIVE = "https://drive.google.com/file/d/"
DRIVE_IDS = {  # Google Drive ids of the files that CoOp's DATASETS.md links
    CLASSNAMES: "1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF",
    "split_zhou_Caltech101.json": "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
    "split_zhou_OxfordPets.json": "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
    "split_zhou_StanfordCars.json": "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
    "split_zhou_OxfordFlowers.json": "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
    "split_zhou_Food101.json": "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
    "split_zhou_SUN397.json": "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
    "split_zhou_DescribableTextures.json": "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
    "split_zhou_EuroSAT.json": "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
    "split_zhou_UCF101.json": "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
}


def benchmark(name: str) -> Benchmark:
    """The entry of a dataset, by any of CoOp's names: "oxford_pets", "OxfordPets", "imagenet-adversarial".

    Raises:
        ValueError: an unknown name; the message lists the names.
    """
    entry = _BY_ALIAS.get(_plain(str(name)))
    if entry is None:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    return entry


def missing(name: str, root: str | Path) -> list[str]:
    """The missing folders and text files of a dataset, with the paths where they belong; empty if none is missing.

    Images are not looked up one by one; :func:`CoOpDataset` checks them.

    Raises:
        ValueError: an unknown name.
    """
    entry = benchmark(name)
    folder = _folder(entry, root)
    images = _images(entry, folder)
    folders = [images / inside for inside in entry.inside] or [images]
    files = [_text_file(folder, file) for file in entry.files]
    return [f"folder {path}" for path in folders if not path.is_dir()] + [
        f"file {path}" + (f" (download: {DRIVE}{DRIVE_IDS[path.name]})" if path.name in DRIVE_IDS else "")
        for path in files
        if not path.is_file()
    ]


def check_dataset(name: str, root: str | Path) -> None:
    """Checks that the folders and text files of a dataset exist below the root.

    Raises:
        FileNotFoundError: a folder or file is missing; the message names all missing ones.
        ValueError: an unknown name.
    """
    entry, lacking = benchmark(name), missing(name, root)
    if lacking:
        section = f"{GUIDE}#{entry.title.lower()}"
        raise FileNotFoundError(
            f"dataset {entry.name!r} is not complete below root = {root}; CoOp's layout: {section}\n"
            + "\n".join(f"- missing: {what}" for what in lacking)
        )


def missing_images(data: Dataset) -> str:
    """In words, the splits of a benchmark dataset that hold other numbers of images than published; empty if none does.

    Figures on such a dataset cannot stand beside published ones.

    Args:
        data: a result of :func:`CoOpDataset`.
    """
    own = (data.full_train, data.full_val, data.full_test)
    counts = [0 if images is None else len(images) for images in own]
    pairs = zip(SPLITS, counts, benchmark(data.name).sizes, strict=True)
    return ", ".join(f"{split} {count:,} instead of {wanted:,}" for split, count, wanted in pairs if count != wanted)


def few_shot_path(name: str, root: str | Path, shots: int, seed: int) -> Path:
    """The file in which CoOp stores a few-shot draw; :meth:`Dataset.few_shot_file` reads such a file.

    Args:
        name, root: as for :func:`CoOpDataset`.
        shots: images per class.
        seed: seed of the draw.
    """
    return _folder(benchmark(name), root) / "split_fewshot" / f"shot_{shots}-seed_{seed}.pkl"


@names_file("root")
def CoOpDataset(name: str, root: str | Path) -> Dataset:
    """Reads a benchmark dataset with CoOp's splits, labels and class names.

    Few-shot draws depend on the order of the images. The images have the order of the split file, or of FGVCAircraft's
    lists, so draws equal CoOp's. ImageNet is an exception: CoOp uses the order in which the file system lists the
    images, so its draws differ between machines. Here ImageNet's images are sorted within each class; to use a draw of
    CoOp, read its stored file with :meth:`Dataset.few_shot_file`.

    The test set of ImageNet is its validation set, and ImageNet has no validation split. The shifted ImageNets have
    only a test set.

    Args:
        name: a name in :data:`DATASETS`, or another of CoOp's names.
        root: folder that holds the folders of the datasets (CoOp's ``$DATA``), or the folder of this dataset.

    Raises:
        FileNotFoundError: folders or files are missing (the message names all of them), or listed images are missing
            (the message names the first).
        ValueError: an unknown name, or a file or folder with wrong content.
    """
    check_dataset(name, root)
    entry = benchmark(name)
    folder = _folder(entry, root)
    images = _images(entry, folder)
    if entry.kind == "split":
        return replace(coop_split(folder, entry.file, images.relative_to(folder)), name=entry.name)
    if entry.kind == "variants":
        return _variants(entry.name, folder, images)
    file = _text_file(folder, CLASSNAMES)
    names = _classnames(file)
    if entry.kind == "test":
        folders = subfolders(images)
        if entry.name == "imagenetv2":  # the names of its folders are positions in the file
            names = {str(position): name for position, name in enumerate(names.values())}
            if set(folders) != set(names):
                raise ValueError(f"{images} must have one folder per line of {file}, but {difference(names, folders)}")
            folders = list(names)
        return Dataset(entry.name, full_test=_class_folders(images, "", folders, names, file))
    folders, others = (subfolders(images / split) for split in entry.inside)
    if folders != others:
        raise ValueError(f"{images / 'val'} must have the class folders of train, but {difference(folders, others)}")
    train, test = (_class_folders(images, split, folders, names, file) for split in entry.inside)
    return Dataset(entry.name, train, None, test)


# -- paths -------------------------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# CoOp also names a dataset after its split file; this name differs from the others for DTD and Flowers102.
_BY_ALIAS = {
    _plain(alias): entry
    for entry in _ALL
    for alias in (entry.name, entry.title, entry.folder, re.sub(r"split_zhou_(\w+).json", r"\1", entry.file))
    if alias not in (CLASSNAMES, VARIANTS[0])
}


def _folder(entry: Benchmark, root: str | Path) -> Path:
    """The folder of the dataset: below the root, or the root itself if the root has the folder's name."""
    root = Path(root).expanduser()
    folder = root / entry.folder
    return root if root.name == entry.folder and not folder.is_dir() else folder


def _images(entry: Benchmark, folder: Path) -> Path:
    """The folder of the images: CoOp's, or the folder that the archive unpacks to if only that one exists."""
    coop, other = folder / entry.image_dir, folder / OTHER_IMAGE_DIRS.get(entry.name, entry.image_dir)
    is_there = all((other / inside).is_dir() for inside in entry.inside or ("",))
    return other if is_there and not coop.is_dir() else coop


def _text_file(folder: Path, file: str) -> Path:
    """Path of a text file of a dataset.

    CoOp copies ImageNet's class names to the shifted ImageNets; without the copy the file of ImageNet is used.
    """
    original = folder.parent / "imagenet" / file
    return original if file == CLASSNAMES and not (folder / file).is_file() and original.is_file() else folder / file


# -- reading -----------------------------------------------------------------------------------------------------------


def _classnames(file: Path) -> dict[str, str]:
    """Reads CoOp's classnames.txt as {folder: class name}. Two folders may have the same class name, as in ImageNet."""
    names: dict[str, str] = {}
    for number, line in enumerate(_lines(file), start=1):
        folder, _, name = line.partition(" ")
        if not prettify(name) or folder in names:
            raise ValueError(f"line {number} of {file} must be a new folder and its class name, got {line!r}")
        names[folder] = prettify(name)
    return names


def _class_folders(root: Path, parent: str, folders: Sequence[str], names: dict[str, str], file: Path) -> ImageList:
    """Images in class folders below root/parent, labelled in the order of the folders and sorted within each folder.

    Each folder is listed once and no image is opened: ImageNet has 1.28 million images.
    """
    if not folders:
        raise ValueError(f"{root / parent} must hold one folder per class, got no folders")
    if unknown := [folder for folder in folders if folder not in names]:
        raise ValueError(f"{file} must name every class folder in {root / parent}, but lacks {unknown[0]!r}")
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(
        tqdm(folders, desc=f"list {root / parent}", unit="folder", disable=hidden(), leave=False)
    ):
        place = f"{parent}/{folder}" if parent else folder
        found = image_names(root / place)
        if not found:
            raise ValueError(f"class folder {root / place} must hold at least one image, got none")
        files += [f"{place}/{name}" for name in found]
        labels += [label] * len(found)
    return ImageList(root, tuple(files), tuple(labels), tuple(names[folder] for folder in folders))


def _variants(name: str, folder: Path, images: Path) -> Dataset:
    """Reads FGVCAircraft: classes in the order of variants.txt, images in the order of the three lists."""
    variants, *tables = (_text_file(folder, file) for file in VARIANTS)
    names = _lines(variants)
    label_of = {variant: label for label, variant in enumerate(names)}
    if not names or len(label_of) != len(names):
        raise ValueError(f"{variants} must list each variant once, got {len(names)} lines, {len(label_of)} different")
    lists = []
    for table in tables:
        files, labels = [], []
        for number, line in enumerate(_lines(table), start=1):
            image, _, variant = line.partition(" ")
            if variant not in label_of:
                raise ValueError(f"line {number} of {table} must be an image and a variant of {variants}, got {line!r}")
            files.append(f"{image}.jpg")
            labels.append(label_of[variant])
        require_files(images, files, table)
        lists.append(ImageList(images, tuple(files), tuple(labels), tuple(map(prettify, names))))
    lists[0].require_every_class()
    return Dataset(name, *lists)


def _lines(file: Path) -> list[str]:
    """The stripped lines of a text file, without blank ones."""
    return [line.strip() for line in lines_of(read_text(file)) if line.strip()]
