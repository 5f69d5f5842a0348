"""The benchmark: 100 concepts in icon sets that pretraining never saw, as PNG class folders in one zip."""

import io
import json
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from icons import CHOICES, family
from PIL import Image
from tqdm import tqdm
from views import warp

CLASSES = 100
TRAIN, TEST = 24, 20  # most images a class may have on either side
SHOTS = 16  # every class keeps at least this many training images


def choose(records: list[dict]) -> list[tuple[int, str, str]]:
    """Choose the benchmark's images: the best covered concepts, split so that a family stays on one side per class.

    Args:
        records: one dict an icon (`set`, `caption`, `held_out`), in the order of the images.

    Returns:
        `(index into records, class name, "train" or "test")`, by class, train before test.
    """
    by_class = defaultdict(list)
    concepts = set(CHOICES["concepts"])
    for index, record in enumerate(records):
        if record["held_out"] and record["caption"] in concepts:
            by_class[record["caption"]].append(index)
    names = sorted(sorted(by_class, key=lambda name: (-len(by_class[name]), name))[:CLASSES])

    rng = np.random.default_rng(0)
    chosen = []
    for name in names:
        members = defaultdict(list)
        for index in by_class[name]:
            members[family(records[index]["set"])].append(index)
        families = sorted(members)
        rng.shuffle(families)
        total = len(by_class[name])
        wanted = min(TEST, max(12, total - SHOTS - 2))
        train, test = [], []
        for one in families:
            fits = len(test) < wanted and total - len(test) - len(members[one]) >= SHOTS
            (test if fits else train).extend(members[one])
        chosen += [(int(index), name, "train") for index in rng.permutation(train)[:TRAIN]]
        chosen += [(int(index), name, "test") for index in rng.permutation(test)[:TEST]]
    return chosen


def tilt(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rotate by up to 40 degrees, shrink to 60-90 % and shift, on white: the tilted domain.

    Args:
        images: uint8 [N, 48, 48, 3]. Their order matters: the n-th image gets the seed's n-th pose.
        seed: of the poses.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(x), generator=generator) * (high - low) + low

    angle = uniform(-40, 40) * 3.14159 / 180  # not math.pi: the published archive was drawn with these digits
    size = uniform(0.6, 0.9)
    dx, dy = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    x = warp(x, angle, size, dx, dy, fill=1.0)  # on white
    return (x * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def png(image: np.ndarray) -> bytes:
    """Encode a uint8 [H, W, 3] image as a small PNG, greyscale where it is grey."""
    grey = (image == image[..., :1]).all()
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if grey else image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    """Write a zip whose bytes depend on the files alone: sorted, undated, each stored or deflated, the smaller."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            deflates = len(zlib.compress(data, 9, wbits=-15)) < len(data)
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED if deflates else zipfile.ZIP_STORED, 9)


def main(
    data: Annotated[Path, typer.Argument(help="folder that icons.py wrote")],
    out: Annotated[Path, typer.Argument(help="folder for clean-icons.zip and tilted-icons.zip")],
) -> None:
    """Write the benchmark, clean and tilted: train/<class>/<set>--<icon>.png and test/<class>/... in a zip each."""
    records = json.loads((data / "icons.json").read_text(encoding="utf-8"))
    chosen = choose(records)
    indices = [index for index, _, _ in chosen]
    names = [f"{side}/{name}/{records[index]['set']}--{records[index]['icon']}.png" for index, name, side in chosen]
    clean = np.load(data / "images.npy", mmap_mode="r")[indices]

    out.mkdir(parents=True, exist_ok=True)
    for domain, images in (("clean", clean), ("tilted", tilt(clean))):
        files = {name: png(image) for name, image in zip(names, tqdm(images, domain, disable=None), strict=True)}
        write_archive(out / f"{domain}-icons.zip", files)
        typer.echo(f"{out / f'{domain}-icons.zip'}: {len(files)} images")


if __name__ == "__main__":
    typer.run(main)
