"""Writes the benchmark's icons in four domains, tilted, clean, noisy and badge, as folders of PNG files."""

import shutil
import zipfile
import zlib
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine, pil_to_tensor, to_pil_image
from tqdm import tqdm

# An image is float [3, H, W] in 0..1, dark on white.


def noisy(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turn the icon by up to 20 degrees, darken it with a coarse coloured texture, and add noise."""
    image = _moved(image, generator, degrees=20, sizes=(0.6, 0.9), shift=0.15, around=torch.ones(3))
    texture = torch.rand(1, 3, 8, 8, generator=generator)
    texture = F.interpolate(texture, size=image.shape[1:], mode="bicubic")[0].clamp(0, 1)
    return image * (0.45 + 0.55 * texture) + 0.12 * torch.randn(image.shape, generator=generator)


def badge(image: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the icon in white on a dark tile of a random colour, as an app's icon."""
    tile = 0.7 * torch.rand(3, generator=generator)
    paper = image.mean(0)  # 1 where nothing is drawn
    image = paper * tile[:, None, None] + (1 - paper)
    return _moved(image, generator, degrees=10, sizes=(0.6, 0.8), shift=0.1, around=tile)


def _moved(
    image: Tensor,
    generator: torch.Generator,
    *,
    degrees: float,
    sizes: tuple[float, float],
    shift: float,
    around: Tensor,
) -> Tensor:
    """Turn, shrink and shift an image at random.

    Args:
        image: what is moved.
        generator: decides how.
        degrees: largest angle.
        sizes: the smallest and the largest size; 1 keeps it.
        shift: largest shift to each side, in half widths of the shrunk image.
        around: colour of what becomes free, [3].
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    angle, size = uniform(-degrees, degrees), uniform(*sizes)
    pixels = [size * uniform(-shift, shift) * side / 2 for side in (image.shape[2], image.shape[1])]
    around = around[:, None, None]  # affine puts zero outside, so this colour must be zero while it resamples
    return affine(image - around, angle, pixels, size, [0.0], InterpolationMode.BILINEAR) + around


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"noisy": noisy, "badge": badge}


def write_changed(clean: Path, folder: Path, change: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Write every PNG file below ``clean`` changed into ``folder``. What is drawn depends on the file's name alone."""
    for file in tqdm(sorted(clean.rglob("*.png")), desc=folder.name, unit="icon", disable=None):
        name = file.relative_to(clean)
        generator = torch.Generator().manual_seed(zlib.crc32(name.as_posix().encode()))
        with Image.open(file) as icon:
            image = pil_to_tensor(icon.convert("RGB")) / 255
        out = folder / name
        out.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image((255 * change(image, generator)).round().clamp(0, 255).to(torch.uint8)).save(out)


def main(
    out: Annotated[Path, typer.Argument(help="folder for the domains; each domain is written once")],
    icons: Annotated[
        Path | None,
        typer.Option(help="clean-icons.zip of ../icon_clip/downstream.py, or its folder; without it: only tilted"),
    ] = None,
) -> None:
    """Write OUT/tilted, and from clean icons OUT/clean, OUT/noisy and OUT/badge: train/CLASS and test/CLASS in each."""
    if icons is not None and not icons.exists():
        raise typer.BadParameter(f"--icons must be a zip file or a folder, got {icons}: it does not exist")
    with as_file(files("mergetune") / "assets" / "tilted-icons.zip") as tilted:
        _write_once(out / "tilted", lambda folder: _unpack(tilted, folder))
    if icons is not None:
        _write_once(out / "clean", lambda folder: _unpack(icons, folder))
        for name, change in CHANGES.items():
            _write_once(out / name, lambda folder, change=change: write_changed(out / "clean", folder, change))


def _write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under another name and rename it, so that a folder is never half written."""
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        part.rename(folder)
    typer.echo(f"{folder}: {sum(1 for _ in folder.rglob('*.png'))} icons")


def _unpack(icons: Path, folder: Path) -> None:
    if icons.is_dir():
        shutil.copytree(icons, folder, dirs_exist_ok=True)
        return
    with zipfile.ZipFile(icons) as archive:
        archive.extractall(folder)


if __name__ == "__main__":
    typer.run(main)
