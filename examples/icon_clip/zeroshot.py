"""Zero-shot accuracy of a CLIP on the benchmark: base classes, novel classes and all of them."""

import io
import json
import zipfile
from pathlib import Path
from typing import Annotated

import open_clip
import torch
import typer
from PIL import Image

TEMPLATE = "an icon of a {}"


def load_images(archive: Path, preprocess, side: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read one side of a benchmark zip.

    Args:
        archive: a zip of `<side>/<class>/<name>.png`.
        preprocess: the model's own transform, from PIL image to tensor.
        side: "train" or "test".

    Returns:
        Images [N, 3, H, W], labels [N] and the sorted class names [C].
    """
    with zipfile.ZipFile(archive) as file:
        members = [name for name in sorted(file.namelist()) if name.startswith(f"{side}/")]
        if not members:
            raise ValueError(f"side must name a folder of {archive}, got {side!r}")
        images = torch.stack([preprocess(Image.open(io.BytesIO(file.read(name)))) for name in members])
    classes = [name.split("/")[1] for name in members]
    names = sorted(set(classes))
    return images, torch.tensor([names.index(name) for name in classes]), names


@torch.inference_mode()
def zero_shot(model_dir: Path, archive: Path, side: str = "test") -> dict[str, float]:
    """Measure base, novel and all-class accuracy in per cent.

    The first half of the sorted class names is base, the second novel; each half is classified among its own names.

    Args:
        model_dir: folder that open_clip reads as `local-dir:`.
        archive: benchmark zip.
        side: "train" or "test".
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_dir}")
    model.eval()
    images, labels, names = load_images(archive, preprocess, side)
    tokens = open_clip.get_tokenizer(f"local-dir:{model_dir}")([TEMPLATE.format(name) for name in names])
    text = model.encode_text(tokens, normalize=True)
    features = torch.cat([model.encode_image(batch, normalize=True) for batch in images.split(256)])
    logits = features @ text.T

    half = len(names) // 2
    base, novel = labels < half, labels >= half
    hits = {
        "base": logits[base, :half].argmax(1) == labels[base],
        "novel": logits[novel, half:].argmax(1) == labels[novel] - half,
        "all": logits.argmax(1) == labels,
    }
    return {name: 100 * hit.float().mean().item() for name, hit in hits.items()}


def main(
    model_dir: Annotated[Path, typer.Argument(help="folder in open_clip's local-dir layout")],
    archives: Annotated[list[Path], typer.Argument(help="benchmark zips")],
    side: Annotated[str, typer.Option(help="train (the few-shot pool) or test")] = "test",
) -> None:
    """Print the zero-shot accuracy on each zip as one line of JSON."""
    for archive in archives:
        scores = {name: round(score, 2) for name, score in zero_shot(model_dir, archive, side).items()}
        typer.echo(json.dumps({"archive": archive.name, "side": side, **scores}))


if __name__ == "__main__":
    typer.run(main)
