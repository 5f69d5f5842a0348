"""Icons and their captions: what names mean, which sets may be used, which are held out, and their rasters."""

import hashlib
import io
import json
import random
import re
from collections import defaultdict
from multiprocessing import Pool
from pathlib import Path
from typing import Annotated

import numpy as np
import resvg_py
import typer
from PIL import Image
from tqdm import tqdm

SIZE = 48  # pixels
LICENCES = {"MIT", "Apache-2.0", "CC0-1.0", "ISC", "BSD-3-Clause", "OFL-1.1", "Unlicense"}

CHOICES = json.loads(Path(__file__).with_name("choices.json").read_text(encoding="utf-8"))
# Brands, flags and notations: their names say nothing about what is drawn.
SKIPPED_CATEGORIES = {"Logos", "Programming"}
SKIPPED_SETS = set(CHOICES["skipped_sets"])
# Never seen in pretraining; the benchmark is drawn from them.
HELD_OUT = set(CHOICES["held_out"])
# Words of an icon's name that say how it is drawn, not what it shows.
STYLE_WORDS = set(CHOICES["style_words"])
LEADING_STYLES = {"ios", "md", "baseline", "twotone"}

# Sets that draw the same shapes in several styles. They stay on one side of every split.
FAMILIES = (
    ("fluent-emoji",),
    ("icon-park",),
    ("ion", "famicons"),
    ("heroicons", "sidekickicons"),
    ("uil", "uim", "uit", "uis"),
)

# Of equal drawings the first set's is kept. Larger sets go first; these two go before a set that shares their drawings.
GOES_BEFORE = {"famicons": "ion", "heroicons-solid": "heroicons-outline"}


def family(name: str) -> str:
    """Name the family of an icon set: sets of one family share their drawings."""
    for members in FAMILIES:
        if name in members or name.startswith(members[0] + "-"):
            return members[0]
    return name


def caption(icon: str, prefixes: list[str], suffixes: list[str]) -> tuple[str, str]:
    """Split an icon's name into what it shows and how it is drawn.

    >>> caption("credit-card-outline-24", prefixes=[], suffixes=["24"])
    ('credit card', '24 outline')

    Args:
        icon: name in its set.
        prefixes: style prefixes that the set declares.
        suffixes: style suffixes that the set declares.

    Returns:
        The caption and the style words, each joined by spaces.
    """
    styles = []
    for prefix in sorted(filter(None, prefixes), key=len, reverse=True):
        if icon.startswith(f"{prefix}-") and len(icon) > len(prefix) + 1:
            styles, icon = [prefix], icon[len(prefix) + 1 :]
            break
    for suffix in sorted(filter(None, suffixes), key=len, reverse=True):
        if icon.endswith(f"-{suffix}") and len(icon) > len(suffix) + 1:
            styles, icon = [*styles, suffix], icon[: -len(suffix) - 1]
            break
    words = [word for word in re.split("[-_]+", icon) if word]
    if len(words) > 1 and words[0] in LEADING_STYLES:
        styles.append(words.pop(0))
    while len(words) > 1 and (words[-1] in STYLE_WORDS or re.fullmatch(r"\d{1,2}(px|dp)?", words[-1])):
        styles.append(words.pop())
    if words and re.fullmatch("[a-z]{3,}[1-6]", words[-1]):  # camera2 is another camera
        words[-1] = words[-1][:-1]
    return " ".join(words), " ".join(styles)


def rasterise(body: str, left: float, top: float, width: float, height: float) -> np.ndarray | None:
    """Draw an SVG body in black on white, centred in a square.

    Returns:
        uint8 [48, 48, 3], or None where it cannot be drawn or leaves nothing to see.
    """
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{box}" color="#000">{body}</svg>'
    )
    try:
        data = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except ValueError:  # a few icons are not valid SVG
        return None
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return image if image.shape == (SIZE, SIZE, 3) and image.min() <= 200 else None


def read_set(path: Path) -> tuple[list[dict], np.ndarray]:
    """Read and draw one icon set, at most three or four drawings a caption.

    Returns:
        One record an icon (`set`, `icon`, `caption`, `style`, `colour`) and the images, uint8 [N, 48, 48, 3].
    """
    icon_set = json.loads(path.read_text(encoding="utf-8"))
    by_caption = defaultdict(list)
    for name, icon in icon_set["icons"].items():
        text, style = caption(name, list(icon_set.get("prefixes") or ()), list(icon_set.get("suffixes") or ()))
        # Emoji in several skin colours would crowd out the rest.
        if "skin" not in name and re.search("[a-z]{2}", text) and len(text) <= 40:
            by_caption[text].append((name, style, icon))

    rng = random.Random(path.stem)
    most = 3 if len(icon_set["icons"]) > 5000 else 4
    records, images = [], []
    for text, icons in by_caption.items():
        rng.shuffle(icons)
        for name, style, icon in icons[:most]:
            image = rasterise(
                body=icon["body"],
                left=icon.get("left", 0),
                top=icon.get("top", 0),
                width=icon.get("width", icon_set.get("width", 16)),
                height=icon.get("height", icon_set.get("height", 16)),
            )
            if image is not None:
                colour = bool(np.ptp(image.astype(int), axis=-1).max() > 40)
                records.append({"set": path.stem, "icon": name, "caption": text, "style": style, "colour": colour})
                images.append(image)
    return records, np.stack(images) if images else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def usable_sets(package: Path) -> dict[str, dict]:
    """Choose the icon sets whose licence is permissive and whose names describe what is drawn.

    Returns:
        By set, in the order of drawing: name, author, licence, spdx, number of icons and whether it is held out.
    """
    collections = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    chosen = {}
    for name, info in sorted(collections.items()):
        if info["license"].get("spdx") not in LICENCES:
            continue
        if info.get("category") in SKIPPED_CATEGORIES or name in SKIPPED_SETS:
            continue
        chosen[name] = {
            "name": info["name"],
            "author": info["author"]["name"],
            "licence": info["license"]["title"],
            "spdx": info["license"]["spdx"],
            "held_out": name in HELD_OUT,
            "total": info["total"],
        }

    def place(name: str) -> tuple:
        return -chosen[GOES_BEFORE.get(name, name)]["total"], name not in GOES_BEFORE, name

    return {name: chosen[name] for name in sorted(chosen, key=place)}


def main(
    package: Annotated[Path, typer.Argument(help="unpacked @iconify/json package", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Argument(help="folder for images.npy, icons.json and sets.json")],
    processes: Annotated[int, typer.Option(help="worker processes")] = 2,
) -> None:
    """Draw every usable icon once and write images [N, 48, 48, 3] with one record each."""
    sets = usable_sets(package)
    paths = [package / "json" / f"{name}.json" for name in sets]
    records, images, seen = [], [], set()
    with Pool(processes) as pool:
        # In order, so that the first of several equal drawings is the same on every machine.
        for some, drawn in tqdm(pool.imap(read_set, paths), "icon sets", total=len(paths), disable=None):
            keep = []
            for index, image in enumerate(drawn):
                digest = hashlib.md5(image.tobytes()).digest()
                if digest not in seen:
                    seen.add(digest)
                    keep.append(index)
            records += [{**some[index], "held_out": sets[some[index]["set"]]["held_out"]} for index in keep]
            images.append(drawn[keep])

    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "images.npy", np.concatenate(images))
    (out / "icons.json").write_text(json.dumps(records))
    (out / "sets.json").write_text(json.dumps(sets, indent=1))
    held_out = sum(record["held_out"] for record in records)
    used = len({record["set"] for record in records})
    typer.echo(f"{len(records)} icons of {used} sets: {len(records) - held_out} to pretrain on, {held_out} held out")


if __name__ == "__main__":
    typer.run(main)
