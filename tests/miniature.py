"""Miniature trees of the 15 benchmark datasets, laid out, named and ordered as the real ones are under CoOp."""

from __future__ import annotations

import json
import pickle
import random
import sys
import types
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

# {dataset: (folder, images' folder, split file, ((name in paths, class name), ...))}, ten classes each, real ones.
SPLIT_KIND = {
    "caltech101": (
        "caltech-101",
        "101_ObjectCategories",
        "split_zhou_Caltech101.json",
        "Faces=face Leopards=leopard Motorbikes=motorbike accordion=accordion airplanes=airplane anchor=anchor ant=ant "
        "barrel=barrel bass=bass car_side=car_side",
    ),
    "oxford_pets": (
        "oxford_pets",
        "images",
        "split_zhou_OxfordPets.json",
        "Abyssinian=abyssinian american_bulldog=american_bulldog american_pit_bull_terrier=american_pit_bull_terrier "
        "basset_hound=basset_hound beagle=beagle Bengal=bengal Birman=birman Bombay=bombay boxer=boxer "
        "British_Shorthair=british_shorthair",
    ),
    "stanford_cars": (
        "stanford_cars",
        "",
        "split_zhou_StanfordCars.json",
        "=2000~AM~General~Hummer~SUV =2012~Acura~RL~Sedan =2012~Acura~TL~Sedan =2008~Acura~TL~Type-S "
        "=2012~Acura~TSX~Sedan =2001~Acura~Integra~Type~R =2012~Acura~ZDX~Hatchback "
        "=2012~Aston~Martin~V8~Vantage~Convertible =2012~Aston~Martin~V8~Vantage~Coupe "
        "=2012~Aston~Martin~Virage~Convertible",
    ),
    "oxford_flowers": (
        "oxford_flowers",
        "jpg",
        "split_zhou_OxfordFlowers.json",
        "=pink~primrose =hard-leaved~pocket~orchid =canterbury~bells =sweet~pea =english~marigold =tiger~lily "
        "=moon~orchid =bird~of~paradise =monkshood =globe~thistle",
    ),
    "food101": (
        "food-101",
        "images",
        "split_zhou_Food101.json",
        "apple_pie=apple_pie baby_back_ribs=baby_back_ribs baklava=baklava beef_carpaccio=beef_carpaccio "
        "beef_tartare=beef_tartare beet_salad=beet_salad beignets=beignets bibimbap=bibimbap "
        "bread_pudding=bread_pudding breakfast_burrito=breakfast_burrito",
    ),
    "sun397": (
        "sun397",
        "SUN397",
        "split_zhou_SUN397.json",
        "a/abbey=abbey a/airplane_cabin=airplane_cabin a/airport_terminal=airport_terminal a/alley=alley "
        "a/amphitheater=amphitheater a/amusement_arcade=amusement_arcade a/amusement_park=amusement_park "
        "a/anechoic_chamber=anechoic_chamber a/apartment_building/outdoor=outdoor~apartment_building "
        "a/apse/indoor=indoor~apse",
    ),
    "dtd": (
        "dtd",
        "images",
        "split_zhou_DescribableTextures.json",
        "banded=banded blotchy=blotchy braided=braided bubbly=bubbly bumpy=bumpy chequered=chequered "
        "cobwebbed=cobwebbed cracked=cracked crosshatched=crosshatched crystalline=crystalline",
    ),
    "eurosat": (
        "eurosat",
        "2750",
        "split_zhou_EuroSAT.json",
        "AnnualCrop=Annual~Crop~Land Forest=Forest HerbaceousVegetation=Herbaceous~Vegetation~Land "
        "Highway=Highway~or~Road Industrial=Industrial~Buildings Pasture=Pasture~Land "
        "PermanentCrop=Permanent~Crop~Land Residential=Residential~Buildings River=River SeaLake=Sea~or~Lake",
    ),
    "ucf101": (
        "ucf101",
        "UCF-101-midframes",
        "split_zhou_UCF101.json",
        "Apply_Eye_Makeup=Apply_Eye_Makeup Apply_Lipstick=Apply_Lipstick Archery=Archery Baby_Crawling=Baby_Crawling "
        "Balance_Beam=Balance_Beam Band_Marching=Band_Marching Baseball_Pitch=Baseball_Pitch Basketball=Basketball "
        "Basketball_Dunk=Basketball_Dunk Bench_Press=Bench_Press",
    ),
}
AIRCRAFT = ("707-320", "727-200", "737-200", "A300B4", "ATR-42", "BAE 146-200", "Beechcraft 1900", "DC-10", "F/A-18")
AIRCRAFT += ("Spitfire",)
WORDNET = dict(  # of ImageNet, in its order, with CLIP's names
    line.split(" ", 1)
    for line in """n01440764 tench
n01443537 goldfish
n01484850 great white shark
n01491361 tiger shark
n01494475 hammerhead shark
n01496331 electric ray
n01498041 stingray
n01514668 rooster
n01514859 hen
n01518878 ostrich
n01530575 brambling
n01531178 goldfinch
n01532829 house finch
n01534433 junco
n01537544 indigo bunting
n01558993 American robin
n01560419 bulbul
n01580077 jay
n01582220 magpie
n01592084 chickadee
n01614925 bald eagle
n01616318 vulture
n01630670 smooth newt
n01631663 newt
n01641577 American bullfrog
n01669191 box turtle""".splitlines()
)
IN_A = [f"n0{n}" for n in (1498041, 1531178, 1534433, 1558993, 1580077, 1614925, 1616318, 1631663, 1641577, 1669191)]
IN_R = [f"n0{n}" for n in (1443537, 1484850, 1494475, 1498041, 1514859, 1518878, 1531178, 1534433, 1614925, 1616318)]


def write_miniature(
    root: str | Path, name: str, *, images_per_class: int = 10, classes: int = 4, size: int = 32
) -> Path:
    """Write a dataset of few, small images below root; the same bytes for the same arguments.

    Args:
        root: CoOp's ``$DATA``.
        name: a dataset, as ``configs/datasets/<name>.yaml`` is called.
        images_per_class: in all splits together, at least 4: half, a fifth and the rest are train, val and test (a
            third each for FGVCAircraft). ImageNet has so many in train, and half as many in val.
        classes: 1 to 10, the first ones; ImageNet, -V2 and -Sketch have more, all of WORDNET, and -A and -R some of
            those.
        size: side of the images in pixels. Each class has its colour, with noise.

    Returns:
        The dataset's folder.
    """
    most = len(WORDNET) if name in ("imagenet", "imagenetv2", "imagenet_sketch") else 10
    if not 1 <= classes <= most or images_per_class < 4:
        raise ValueError(
            f"classes must be 1 to {most} and images_per_class at least 4, got {classes}, {images_per_class}"
        )
    root = Path(root)
    if name in SPLIT_KIND:
        return _write_split_kind(root, name, images_per_class, classes, size)
    if name == "fgvc_aircraft":
        return _write_aircraft(root / "fgvc_aircraft", images_per_class, classes, size)
    return _write_imagenet(root, name, images_per_class, classes, size)


def write_few_shot(
    path: str | Path, splits: Mapping[str, Iterable[tuple[str, int, str]]], *, protocol: int = pickle.HIGHEST_PROTOCOL
) -> Path:
    """CoOp's ``split_fewshot/shot_K-seed_S.pkl``: {split: [Dassl's Datum, ...]} of (path, label, class name)."""
    names = ("dassl", "dassl.data", "dassl.data.datasets", "dassl.data.datasets.base_dataset")
    module = types.ModuleType(names[-1])
    module.Datum = type("Datum", (), {"__module__": names[-1]})
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names, module))
    try:
        data = {}
        for split, items in splits.items():
            data[split] = []
            for file, label, name in items:
                datum = module.Datum()
                datum.__dict__ = {"_impath": str(file), "_label": label, "_domain": 0, "_classname": name}
                data[split].append(datum)
        content = pickle.dumps(data, protocol=protocol)
    finally:
        for name, old in before.items():
            sys.modules.pop(name) if old is None else sys.modules.update({name: old})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# -- the nine with a split file ---------------------------------------------------------------------------------------


def _write_split_kind(root: Path, name: str, images_per_class: int, classes: int, size: int) -> Path:
    folder, image_dir, split_file, listed = SPLIT_KIND[name]
    folder = root / folder
    kinds = [tuple(entry.replace("~", " ").split("=")) for entry in listed.split()][:classes]
    stream = random.Random(f"{name} {images_per_class} {classes}")

    # CoOp made its splits class by class. Where it met the classes by an official list, they are not in order.
    order = list(range(classes))
    if name in ("oxford_flowers", "stanford_cars"):
        stream.shuffle(order)
    train_count, val_count = round(images_per_class * 0.5), round(images_per_class * 0.2)
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
    for label in order:
        own = [(label, i) for i in range(images_per_class)]
        stream.shuffle(own)
        splits["train"] += own[:train_count]
        splits["val"] += own[train_count : train_count + val_count]
        splits["test"] += own[train_count + val_count :]
    if name == "stanford_cars":
        stream.shuffle(splits["test"])  # the official test list mixes the classes
    else:
        splits["test"].sort(key=lambda pair: order.index(pair[0]))

    content: dict[str, list[list[object]]] = {}
    for split, pairs in splits.items():
        content[split] = []
        for label, i in pairs:
            file = _file_of(name, kinds[label][0], label, i, split, images_per_class)
            _draw(folder / image_dir / file, kinds[label][1], size)
            content[split].append([file, label, kinds[label][1]])
    _write(folder / split_file, json.dumps(content, indent=4, separators=(",", ": ")))
    for file, text in _besides(name, kinds, content).items():
        _write(folder / file, text)
    if name == "caltech101":  # in the archive, but not used
        for unused in ("BACKGROUND_Google", "Faces_easy"):
            _draw(folder / image_dir / unused / "image_0001.jpg", unused, size)
    return folder


def _file_of(name: str, key: str, label: int, i: int, split: str, images_per_class: int) -> str:
    number = label * images_per_class + i + 1
    return {
        "caltech101": f"{key}/image_{i + 1:04d}.jpg",
        "oxford_pets": f"{key}_{i + 1}.jpg",
        "stanford_cars": f"cars_{'test' if split == 'test' else 'train'}/{number:05d}.jpg",
        "oxford_flowers": f"image_{number:05d}.jpg",
        "food101": f"{key}/{1000000 + 37 * number}.jpg",
        "sun397": f"{key}/sun_a{zlib.crc32(f'{key}{i}'.encode()):08x}.jpg",
        "dtd": f"{key}/{key}_{i + 2:04d}.jpg",
        "eurosat": f"{key}/{key}_{i + 1}.jpg",
        "ucf101": f"{key}/v_{key.replace('_', '')}_g{i // 4 + 1:02d}_c{i % 4 + 1:02d}.jpg",
    }[name]


def _besides(name: str, kinds: list[tuple[str, str]], content: dict[str, list]) -> dict[str, str]:
    """What else the archives bring. Nobody reads it here, so MATLAB files are empty."""
    trainval, test = ([item[0] for item in items] for items in (content["train"] + content["val"], content["test"]))
    if name == "oxford_pets":
        lists = {
            f"annotations/{part}.txt": "".join(f"{Path(f).stem} {label + 1} 1 1\n" for f, label, _ in items)
            for part, items in (("trainval", content["train"] + content["val"]), ("test", content["test"]))
        }
        return {**lists, "annotations/README": "", "images/Abyssinian_100.mat": ""}
    if name == "stanford_cars":
        files = ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
        return dict.fromkeys(files, "")
    if name == "oxford_flowers":
        names = {str(label + 1): flower for label, (_, flower) in enumerate(kinds)}
        return {"cat_to_name.json": json.dumps(names), "imagelabels.mat": ""}
    if name == "food101":
        return {
            "license_agreement.txt": "",
            "README.txt": "",
            "meta/classes.txt": "\n".join(key for key, _ in kinds),
            "meta/test.txt": "\n".join(f.removesuffix(".jpg") for f in test),
        }
    if name == "sun397":
        return {
            "ClassName.txt": "".join(f"/{key}\n" for key, _ in kinds),
            "Training_01.txt": "".join(f"/{f}\n" for f in trainval),
            "Testing_01.txt": "".join(f"/{f}\n" for f in test),
        }
    if name == "dtd":
        return {"imdb/imdb.mat": "", "labels/train1.txt": "\n".join(trainval), "images/banded/.directory": ""}
    return {}


# -- the others -------------------------------------------------------------------------------------------------------


def _write_aircraft(folder: Path, images_per_class: int, classes: int, size: int) -> Path:
    stream = random.Random(f"aircraft {images_per_class} {classes}")
    numbers = stream.sample(range(10000, 3000000), images_per_class * classes)
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    third = images_per_class // 3
    for label, variant in enumerate(AIRCRAFT[:classes]):
        for i, number in enumerate(numbers[label * images_per_class : (label + 1) * images_per_class]):
            split = "val" if i < third else "test" if i < 2 * third else "train"
            lists[split].append(f"{number:07d} {variant}\n")
            _draw(folder / "images" / f"{number:07d}.jpg", variant, size)
    for split, lines in lists.items():
        stream.shuffle(lines) if split == "test" else None
        _write(folder / f"images_variant_{split}.txt", "".join(lines))
    _write(folder / "images_variant_trainval.txt", "".join(lists["train"] + lists["val"]))
    _write(folder / "variants.txt", "".join(f"{variant}\n" for variant in AIRCRAFT[:classes]))
    _write(folder / "families.txt", "Boeing 707\n")
    return folder


def _write_imagenet(root: Path, name: str, images_per_class: int, classes: int, size: int) -> Path:
    folder, images, ids, named = {
        "imagenet": ("imagenet", "images", [*WORDNET], classes),
        "imagenetv2": ("imagenetv2", "imagenetv2-matched-frequency-format-val", [*WORDNET], classes),
        "imagenet_sketch": ("imagenet-sketch", "images", [*WORDNET], classes),
        "imagenet_a": ("imagenet-adversarial", "imagenet-a", IN_A, len(WORDNET)),  # 200 classes beside 1,000 names
        "imagenet_r": ("imagenet-rendition", "imagenet-r", IN_R, len(WORDNET)),
    }[name]
    folder, ids = root / folder, ids[:classes]
    images = folder / images
    stream = random.Random(f"{name} {images_per_class} {classes}")
    for label, wnid in enumerate(ids):
        for i in range(images_per_class):
            number, word = stream.randrange(10**6), WORDNET[wnid]
            file = {
                "imagenet": f"train/{wnid}/{wnid}_{number}.JPEG",
                "imagenetv2": f"{label}/{stream.getrandbits(160):040x}.jpeg",
                "imagenet_sketch": f"{wnid}/sketch_{i}.JPEG",
                "imagenet_a": f"{wnid}/0.{number:06d}_{word} _ {word}_0.{number:06d}.jpg",
                "imagenet_r": f"{wnid}/art_{i}.jpg",
            }[name]
            _draw(images / file, word, size)
            if name == "imagenet" and i < images_per_class // 2:
                _draw(images / f"val/{wnid}/ILSVRC2012_val_{label * images_per_class + i + 1:08d}.JPEG", word, size)
    _write(folder / "classnames.txt", "".join(f"{wnid} {word}\n" for wnid, word in [*WORDNET.items()][:named]))
    if name in ("imagenet_a", "imagenet_r"):
        _write(images / "README.txt", "")
    return folder


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _draw(path: Path, class_name: str, size: int) -> None:
    """A square in the class's colour with noise of the file's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng(zlib.crc32(class_name.encode())).integers(32, 224, 3)
    noise = np.random.default_rng(zlib.crc32(path.name.encode())).integers(-31, 32, (size, size, 3))
    Image.fromarray((colour + noise).astype(np.uint8)).save(path, format="JPEG")
