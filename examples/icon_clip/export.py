"""Publish trained weights: fp16 in open_clip's local-dir layout, with a model card and the icons' attribution."""

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from icons import CHOICES
from pretrain import BATCH, CONFIG, END, PREPROCESS, STAGES, START, common_captions, tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from views import VOCABULARY
from zeroshot import TEMPLATE, zero_shot

HERE = Path(__file__).parent
LEARNABLE = 2  # pretraining sets that must share a caption for the embeddings of its words to be kept

ATTRIBUTION = """# Attribution

The images in `tilted-icons.zip` are drawn from the icons counted under *benchmark*: rasterised at 48 pixels, then
rotated, resized and shifted. The model in `icon-clip/` was trained on rasters of the icons counted under *pretraining*;
these are not part of this package. Names, authors and licences are those that the npm package `@iconify/json` 2.2.535
states for each set. Each icon belongs to the author of its set.

| set | name | author | licence | benchmark | pretraining |
|---|---|---|---|---|---|"""


def used_rows(records: list[dict]) -> Tensor:
    """Rows of the token embedding that shared captions, the benchmark's concepts and the templates need."""
    texts = [*common_captions(records, LEARNABLE), *CHOICES["concepts"], VOCABULARY]
    tokens = {token for text in texts for token in tokenizer().encode(text)}
    return torch.tensor(sorted(tokens | {0, START, END}))


def half_precision(weights: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Cast to fp16 and zero the embedding rows that are not used, so that the file compresses to less than half."""
    embedding = torch.zeros_like(weights["token_embedding.weight"])
    embedding[rows] = weights["token_embedding.weight"][rows]
    weights = {**weights, "token_embedding.weight": embedding}
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


def write_model(weights: dict[str, Tensor], folder: Path) -> None:
    """Write what `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "open_clip_model.safetensors")
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def attribution(records: list[dict], sets: dict[str, dict], archive: Path) -> str:
    """List every icon set used, with its author, its licence and how many of its icons are used for what."""
    pretraining = Counter(record["set"] for record in records if not record["held_out"])
    with zipfile.ZipFile(archive) as file:
        benchmark = Counter(Path(name).name.split("--")[0] for name in file.namelist())
    lines = [ATTRIBUTION]
    for key in sorted(pretraining | benchmark):
        cells = [key, *(sets[key][field] for field in ("name", "author", "licence"))]
        lines.append(f"| {' | '.join(cells)} | {benchmark[key] or '-'} | {pretraining[key] or '-'} |")
    return "\n".join(lines) + "\n\n" + (HERE / "licences.md").read_text(encoding="utf-8")


def results(models: dict[str, Path], archives: list[Path]) -> str:
    """Measure every model on both sides of every archive: a markdown table of per cent."""
    lines = ["| weights | images | side | base | novel | all |", "|---|---|---|---|---|---|"]
    for name, folder in models.items():
        for archive in archives:
            for side in ("train", "test"):
                scores = zero_shot(folder, archive, side)
                cells = " | ".join(f"{scores[key]:.2f}" for key in ("base", "novel", "all"))
                lines.append(f"| {name} | {archive.stem.removesuffix('-icons')} | {side} | {cells} |")
    return "\n".join(lines)


def main(
    data: Annotated[Path, typer.Argument(help="folder that icons.py wrote")],
    weights: Annotated[Path, typer.Argument(help="safetensors file that pretrain.py wrote")],
    archives: Annotated[Path, typer.Argument(help="folder that downstream.py wrote")],
    out: Annotated[Path, typer.Argument(help="folder for icon-clip/, MODEL_CARD.md and ATTRIBUTION.md")],
    origin: Annotated[str, typer.Option(help="where the weights come from")] = "Trained with `examples/icon_clip/`.",
    other: Annotated[Path | None, typer.Option(help="local-dir folder of other weights to compare")] = None,
) -> None:
    """Write the model, its card with measured zero-shot accuracy, and the attribution."""
    records = json.loads((data / "icons.json").read_text(encoding="utf-8"))
    sets = json.loads((data / "sets.json").read_text(encoding="utf-8"))
    rows = used_rows(records)
    published = half_precision(load_file(weights), rows)
    write_model(published, out / "icon-clip")

    zips = [archives / "clean-icons.zip", archives / "tilted-icons.zip"]
    (out / "ATTRIBUTION.md").write_text(attribution(records, sets, zips[1]), encoding="utf-8")

    seen = [record for record in records if not record["held_out"]]
    sizes = {name: value.numel() for name, value in published.items() if value.is_floating_point()}
    image = sum(size for name, size in sizes.items() if name.startswith("visual."))
    facts = {
        "origin": origin,
        "results": results({"shipped": out / "icon-clip"} | ({"other": other} if other else {}), zips),
        "template": TEMPLATE,
        "images": f"{len(seen):,}",
        "captions": f"{len({record['caption'] for record in seen}):,}",
        "sets": len({record["set"] for record in seen}),
        "held_out": len({record["set"] for record in records if record["held_out"]}),
        "batch": BATCH,
        "names_steps": f"{STAGES[0].steps:,}",
        "attributes_steps": f"{STAGES[1].steps:,}",
        "image_parameters": f"{image / 1e6:.1f} M",
        "text_parameters": f"{(sum(sizes.values()) - image) / 1e6:.1f} M",
        "rows": f"{len(rows):,}",
        "megabytes": f"{(out / 'icon-clip' / 'open_clip_model.safetensors').stat().st_size / 1e6:.1f}",
    }
    (out / "MODEL_CARD.md").write_text((HERE / "card.md").read_text(encoding="utf-8").format(**facts), encoding="utf-8")
    typer.echo(f"{out}: {len(rows)} embedding rows kept")


if __name__ == "__main__":
    typer.run(main)
