"""Pictures of every kind of pixel as RGB: transparency, and greys of more than 8 bits.

Pillow's ``convert("RGB")`` clips greys above 255 and drops transparency, so that a microscope's picture becomes white
and black ink on a transparent ground becomes black on black. Here greys are scaled and transparency is laid on a
background.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageColor

from mergetune.facts.function_options import BACKGROUND

FIRST_DECODING = "transparency dropped, greys clipped (mergetune 0.1)"  # what caches without a record were built with
LEAST_DEEP = 16  # largest value of the upper 8 bits below which a picture of 16 bits per colour holds 12 or fewer
DEPTHS = (8, 10, 12, 14, 16)  # bits of grey that cameras and microscopes store in 16 bits


def as_rgb(image: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """Returns a decoded picture as RGB.

    - Transparency: the picture is laid on the background.
    - Greys of 16 or 32 bits: values from 0 to 65,535 are scaled by the smallest of 8, 10, 12, 14 and 16 bits that holds
      the largest one. Values below 0 or above are scaled from smallest to largest.
    - Floating-point greys: values from 0 to 1 and values from 0 to 255 are read as such, others are scaled from
      smallest to largest.
    - Colours of 16 bits: Pillow keeps the upper 8. A picture that hardly uses these (10 or 12 bits of a camera in 16)
      would become black, and is refused.
    - Everything else is converted by Pillow.

    Args:
        image: the picture, of any mode.
        background: colour under transparent pixels, a name or "#rrggbb".

    Raises:
        ValueError: an unknown colour; values that are NaN or infinite; a picture of many colours that becomes
            one colour; colours of 16 bits that hardly use the upper 8.
    """
    colour = background_colour(background)
    deep = _has_deep_colours(image)  # known only before the pixels are decoded
    found = _flat(image, colour, background)
    if deep and (most := max(high for _, high in _ranges(found))) < LEAST_DEEP:
        raise ValueError(
            f"the picture has 16 bits per colour, but its values use less than 13 of them (the upper 8 are at most "
            f"{most}), so that it would become black: convert it to 8 bits per colour"
        )
    return found


def _flat(image: Image.Image, colour: tuple[int, int, int], background: str) -> Image.Image:
    """The decoded picture as RGB, on a background of this colour; ``background`` is its name for messages."""
    if image.mode.startswith(("I", "F")):
        return _scaled(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    ground = Image.new("RGBA", picture.size, (*colour, 255))
    flat = Image.alpha_composite(ground, picture).convert("RGB")
    if _uniform(flat) and not _uniform(picture):
        raise ValueError(
            f"the picture has several colours or degrees of transparency, but becomes one colour on a {background} "
            "background: choose another background (on the command line --background)"
        )
    return flat


def decoding_rules(background: str) -> str:
    """Returns the rules of this file in words. They are recorded with cached features and compared: rules that change
    must change these words.
    """
    background_colour(background)
    return f"transparency on {background}, greys scaled"


def background_colour(background: str) -> tuple[int, int, int]:
    """Returns the red, green and blue value of a colour, 0 to 255, given by name or as "#rrggbb"."""
    try:
        return ImageColor.getrgb(background)[:3]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"background must be a colour such as white, black or #808080, got {background!r}") from error


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the picture must have finite values, got NaN or infinity")
    if image.mode.startswith("F"):
        usual = [0.0, 1.0] if high <= 1 else [0.0, 255.0]
        first, last = usual if low >= 0 and high <= 255 else [low, high]
    elif low >= 0 and high < 1 << DEPTHS[-1]:
        first, last = 0.0, float((1 << next(bits for bits in DEPTHS if high < 1 << bits)) - 1)
    else:
        first, last = low, high
    grey = values.astype(np.float32)
    grey -= first
    grey *= 255 / max(last - first, np.finfo(np.float32).tiny)
    return Image.fromarray(np.rint(grey, out=grey).astype(np.uint8))


def _has_deep_colours(image: Image.Image) -> bool:
    """Whether a file that is not decoded yet stores its colours in 16 bits each; greys are another mode."""
    if image.mode not in ("RGB", "RGBA", "RGBX"):
        return False
    for codec, _, _, form in getattr(image, "tile", None) or []:  # how a decoder reads; for PPM with the largest value
        if ";16" in str(form) or (codec == "ppm" and isinstance(form, tuple) and form[-1] > 255):
            return True
    return False


def _uniform(picture: Image.Image) -> bool:
    return all(low == high for low, high in _ranges(picture))


def _ranges(picture: Image.Image) -> list[tuple[int, int]]:
    """Smallest and largest value of each band of 8 bits."""
    return [band.getextrema() for band in picture.split()]  # pyright: ignore[reportReturnType]
