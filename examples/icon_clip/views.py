"""What pretraining sees: icons as augmented image batches, and captions that name them and their changes."""

import random

import torch
import torch.nn.functional as F

# Shape legend: B batch. Images are float [B, 3, 48, 48] in 0..1; masks are bool [B].

# (before the name, after it, weight)
TEMPLATES = (
    ("an icon of a", "", 3),
    ("an icon of a", ".", 3),
    ("a", "icon", 2),
    ("a photo of a", ".", 3),
    ("a photo of a", "", 1),
    ("", "", 3),
    ("", ".", 1),
    ("a drawing of a", ".", 1),
    ("a picture of a", ".", 1),
    ("a simple icon showing a", ".", 1),
    ("a", "symbol", 1),
    ("a", "pictogram", 1),
    ("a small pictogram of a", "on a plain background.", 1),
)
STYLES = {
    **{name: name for name in ("bold", "duotone", "light", "rounded", "sharp", "solid", "thin")},
    **{"fill": "filled", "filled": "filled", "line": "line", "linear": "line"},
    **{"outline": "outline", "outlined": "outline", "twotone": "two tone"},
}
ADJECTIVES = {"bold", "duotone", "filled", "light", "line", "outline", "rounded", "sharp", "solid", "thin"}
NOUNS = ("icon", "icon", "symbol", "pictogram", "picture", "image")
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.65, 0.2),
    "blue": (0.1, 0.3, 0.9),
    "yellow": (0.95, 0.8, 0.1),
    "purple": (0.55, 0.15, 0.75),
    "orange": (0.95, 0.5, 0.05),
    "pink": (0.95, 0.4, 0.7),
    "brown": (0.5, 0.3, 0.1),
    "gray": (0.5, 0.5, 0.5),
}
TILTED, TURNED = ("tilted", "rotated"), ("sideways", "turned")
COLOURFUL = ("a colorful icon of a", "a color icon of a", "an emoji of a")

# Every word that a caption has around an icon's name: their embeddings are kept by export.py.
VOCABULARY = " ".join(
    [f"{before} {after}" for before, after, _ in TEMPLATES]
    + [*STYLES.values(), *NOUNS, *COLOURS, *TILTED, *TURNED, *COLOURFUL]
    + ["a an on of white black small blurry noisy ."]
)


def uniform(count: int, low: float, high: float) -> torch.Tensor:
    """Draw `count` numbers between low and high."""
    return torch.empty(count).uniform_(low, high)


def where(mask: torch.Tensor, changed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Replace the images where the mask [B] is set."""
    return torch.where(mask.view(-1, 1, 1, 1), changed, images)


def warp(
    images: torch.Tensor,
    angle: torch.Tensor,
    size: torch.Tensor,
    dx: torch.Tensor,
    dy: torch.Tensor,
    fill: torch.Tensor | float,
) -> torch.Tensor:
    """Turn, resize and shift every image.

    Args:
        images: [B, 3, H, W].
        angle: [B], radians.
        size: [B], 1 keeps it.
        dx: [B], in half widths.
        dy: [B], in half heights.
        fill: the colour around the image, a number or [B, 3, 1, 1].
    """
    zoom = 1 / size
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, dx], -1), torch.stack([sin, cos, dy], -1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # grid_sample puts zero outside, so the fill must be zero while it resamples.
    return F.grid_sample(images - fill, grid, align_corners=False) + fill


def plain_views(images: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Recolour or invert some images and move all of them a little.

    Args:
        images: [B, 3, 48, 48].
        colour: mask [B] of icons that have colours of their own.
    """
    count = len(images)
    grey = images.mean(1, keepdim=True)
    front, back = torch.rand(count, 3, 1, 1), torch.rand(count, 3, 1, 1)
    too_close = (front.mean(1) - back.mean(1)).abs().flatten() < 0.25
    back = where(too_close, (1 - front).round(), back)
    on_white = torch.rand(count) < 0.5
    front, back = where(on_white, front * 0.7, front), where(on_white, torch.ones_like(back), back)

    choice = torch.rand(count)
    inverted = (choice > 0.74) & (choice <= 0.8)
    recoloured = (choice > 0.8) & ~colour
    images = where(inverted, 1 - images, images)
    images = where(recoloured, grey * back + (1 - grey) * front, images)

    images = warp(
        images,
        angle=uniform(count, -0.12, 0.12),
        size=uniform(count, 0.72, 1.15),
        dx=uniform(count, -0.15, 0.15),
        dy=uniform(count, -0.15, 0.15),
        fill=images[:, :, :1, :1],
    )
    return (images + 0.02 * torch.randn(count, 1, 1, 1)).clamp(0, 1)


def plain_caption(record: dict, rng: random.Random) -> str:
    """Name an icon in one of the templates, now and then with its style."""
    weights = [weight for _, _, weight in TEMPLATES]
    before, after, _ = rng.choices(TEMPLATES, weights)[0]
    if rng.random() < 0.15:
        styles = [STYLES[word] for word in record["style"].split() if word in STYLES]
        styled = [f"{'an' if style[0] in 'aeiou' else 'a'} {style} icon of a" for style in styles]
        styled = COLOURFUL if record["colour"] else styled
        if styled:
            before, after = rng.choice(styled), rng.choice(("", "."))
    if before.endswith("a") and record["caption"][0] in "aeiou" and rng.random() < 0.3:
        before += "n"
    return join(before, record["caption"], after)


def attribute_views(images: torch.Tensor, colour: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, list]:
    """Tilt, turn, shrink, tint, blur or roughen some images, and say which.

    Args:
        images: [B, 3, 48, 48].
        colour: mask [B] of icons that have colours of their own; they are not tinted.
        rng: chooses the words.

    Returns:
        Images, and for each image the words (before the noun, after the name).
    """
    count = len(images)
    grey = images.mean(1, keepdim=True)
    names = list(COLOURS)
    picked = torch.randint(len(names), (count,))
    paint = (
        (torch.tensor(list(COLOURS.values()))[picked] + 0.08 * torch.randn(count, 3)).clamp(0, 1).view(count, 3, 1, 1)
    )

    choice = torch.rand(count)
    tinted = ~colour & (choice < 0.12)
    tiled = ~colour & (choice >= 0.12) & (choice < 0.24)
    inverted = ~colour & (choice >= 0.24) & (choice < 0.34)
    images = where(inverted, 1 - images, images)
    images = where(tiled, grey * paint + (1 - grey), where(tinted, grey + (1 - grey) * paint, images))

    choice = torch.rand(count)
    tilted, small, turned = choice < 0.2, (choice >= 0.2) & (choice < 0.32), (choice >= 0.32) & (choice < 0.42)
    sign = torch.randint(2, (count,)) * 2.0 - 1
    angle = torch.where(tilted, sign * uniform(count, 0.25, 0.75), uniform(count, -0.1, 0.1))
    angle = torch.where(turned, sign * uniform(count, 1.3, 1.8), angle)
    size = torch.where(small, uniform(count, 0.4, 0.65), uniform(count, 0.72, 1.1))
    reach = torch.where(small, 0.5, 0.12)
    dx, dy = reach * uniform(count, -1, 1), reach * uniform(count, -1, 1)
    images = warp(images, angle, size, dx, dy, fill=images[:, :, :1, :1])

    blurry = torch.rand(count) < 0.1
    noisy = (torch.rand(count) < 0.1) & ~blurry
    coarse = F.interpolate(F.interpolate(images, size=14, mode="area"), size=images.shape[-1], mode="bilinear")
    images = where(blurry, coarse, images)
    images = where(noisy, images + 0.15 * torch.randn_like(images), images)

    words = []
    for index in range(count):
        before, after = [], ""
        if tilted[index]:
            before.append(rng.choice(TILTED))
        elif turned[index]:
            before.append(rng.choice(TURNED))
        elif small[index]:
            before.append("small")
        if blurry[index]:
            before.append("blurry")
        elif noisy[index]:
            before.append("noisy")
        if tinted[index]:
            before.append(names[picked[index]])
        elif tiled[index]:
            before, after = [*before, "white"], f"on {names[picked[index]]}"
        elif inverted[index]:
            before, after = [*before, "white"], "on black"
        words.append((" ".join(before), after))
    return images.clamp(0, 1), words


def attribute_caption(record: dict, words: tuple[str, str], rng: random.Random) -> str:
    """Name an icon with what was done to it, its style and its colours; a quarter of the captions name it alone."""
    before, after = words
    if rng.random() < 0.25:
        before = after = ""
    else:
        styles = [word for word in record["style"].split() if word in ADJECTIVES]
        if styles and rng.random() < 0.4:
            before = join(before, styles[0])
        if record["colour"] and rng.random() < 0.6:
            before = join(before, "colorful")
    start = join("a", before, rng.choice(NOUNS), "of a")
    if not before and rng.random() < 0.3:
        start = rng.choice(("an icon of a", "a", "", "a photo of a"))
    return join(start, record["caption"], after, "." if rng.random() < 0.6 else "")


def join(*parts: str) -> str:
    """Join the parts that are not empty."""
    return " ".join(part for part in parts if part)
