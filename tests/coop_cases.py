"""The benchmark datasets in miniature, and CoOp's procedure written down anew."""

import json
import math
import os
import random
from collections import defaultdict
from pathlib import Path

CLASSES = 5
TEST_ONLY = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")

COOP = {  # {dataset: (folder, image folder, split file)}
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": ("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "oxford_flowers": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": ("food-101", "images", "split_zhou_Food101.json"),
    "fgvc_aircraft": ("fgvc_aircraft", "images", ""),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
    "imagenet": ("imagenet", "images", ""),
    "imagenetv2": ("imagenetv2", "imagenetv2-matched-frequency-format-val", ""),
    "imagenet_sketch": ("imagenet-sketch", "images", ""),
    "imagenet_a": ("imagenet-adversarial", "imagenet-a", ""),
    "imagenet_r": ("imagenet-rendition", "imagenet-r", ""),
}


def coop_read(root: Path, name: str) -> dict[str, list[tuple[str, int, str]]]:
    folder, image_dir, split_file = COOP[name]
    base, images = os.path.join(root, folder), os.path.join(root, folder, image_dir)
    if split_file:
        with open(os.path.join(base, split_file)) as file:
            content = json.load(file)
        return {
            split: [(os.path.join(images, path), int(label), word) for path, label, word in content[split]]
            for split in ("train", "val", "test")
        }
    if name == "fgvc_aircraft":
        with open(os.path.join(base, "variants.txt")) as file:
            variants = [line.strip() for line in file]
        splits = {}
        for split in ("train", "val", "test"):
            with open(os.path.join(base, f"images_variant_{split}.txt")) as file:
                rows = [line.strip().split(" ") for line in file]
            words = [" ".join(row[1:]) for row in rows]
            paths = [os.path.join(images, row[0] + ".jpg") for row in rows]
            splits[split] = [(path, variants.index(word), word) for path, word in zip(paths, words, strict=True)]
        return splits
    with open(os.path.join(base, "classnames.txt")) as file:
        words = dict(line.strip().split(" ", 1) for line in file)

    def listed(place: str) -> list[tuple[str, int, str]]:
        folders = sorted(f for f in os.listdir(place) if os.path.isdir(os.path.join(place, f)))
        if name == "imagenetv2":
            folders = [str(label) for label in range(len(words))]
        items = []
        for label, f in enumerate(folders):
            word = list(words.values())[label] if name == "imagenetv2" else words[f]
            items += [
                (os.path.join(place, f, image), label, word) for image in sorted(os.listdir(os.path.join(place, f)))
            ]
        return items

    if name == "imagenet":
        return {"train": listed(os.path.join(images, "train")), "test": listed(os.path.join(images, "val"))}
    return {"test": listed(images)}


def coop_few_shot(items: list[tuple[str, int, str]], shots: int) -> list[tuple[str, int, str]]:
    tracker = defaultdict(list)
    for item in items:
        tracker[item[1]].append(item)
    drawn = []
    for own in tracker.values():
        drawn.extend(random.sample(own, shots) if len(own) >= shots else own)
    return drawn


def coop_run(root: Path, name: str, shots: int, seed: int, subsample: str) -> dict[str, list[tuple[str, int, str]]]:
    """What CoOp trains and tests on: seeded once, train drawn first, then val; classes dropped at the end."""
    splits = coop_read(root, name)
    state = random.getstate()
    random.seed(seed)
    splits["train"] = coop_few_shot(splits["train"], shots)
    if "val" in splits:
        splits["val"] = coop_few_shot(splits["val"], min(shots, 4))
    random.setstate(state)
    if subsample == "all":
        return splits
    labels = sorted({label for _, label, _ in splits["train"]})
    half = math.ceil(len(labels) / 2)
    chosen = labels[:half] if subsample == "base" else labels[half:]
    return {
        split: [(path, chosen.index(label), word) for path, label, word in items if label in chosen]
        for split, items in splits.items()
    }


def items_of(images) -> list[tuple[str, int, str]]:
    return [
        (str(path), label, images.classnames[label]) for path, label in zip(images.paths, images.labels, strict=True)
    ]


def spoken(items: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """With the names as CoOp's trainers put them into prompts."""
    return [(path, label, word.replace("_", " ")) for path, label, word in items]
