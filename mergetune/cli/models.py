"""`mergetune models` lists the backbones that --backbone and --pretrained name."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.padding import Padding

from mergetune.cli.options import Json
from mergetune.cli.shared import errors, out, print_json, tell
from mergetune.facts.backbones import ICON_CLIP, known_models

EMBEDDED: dict[str, Any] = {
    "name": ICON_CLIP, "tags": [], "quickgelu": [], "embed_dim": 128, "image_size": 48, "takes_prompts": True
}  # fmt: skip


def models(
    word: Annotated[
        str | None, typer.Argument(help="Part of a name or of a tag, in any case; all models if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the backbones: the embedded icon-clip, then open_clip's models, with the tags of their weights below.

    Beside a name stand the width of its image features and the height of the images that it takes. In models without
    prompts, heads, residuals and maps can be trained. Names that begin with WORD come first. Nothing is downloaded.
    """
    with errors():
        listed = [EMBEDDED] + [
            {name: getattr(model, name) for name in EMBEDDED} | {"tags": [*model.tags], "quickgelu": [*model.quickgelu]}
            for model in known_models().values()
        ]
        found = [model for model in listed if _has(model, word)]
        if word:  # names that begin with the word come first
            found.sort(key=lambda model: not model["name"].lower().startswith(word.lower()))
        if not found:
            raise ValueError(f"WORD must be part of a name or of a tag, got {word!r}: `mergetune models` lists all")
    if as_json:
        print_json(found)
        return
    for model in found:
        facts = f"{model['embed_dim']} wide, {model['image_size']} px{'' if model['takes_prompts'] else ', no prompts'}"
        out.print(f"[bold]{model['name']}[/] [dim]{facts}[/]", highlight=False)
        tags = [tag for tag in model["tags"] if tag not in model["quickgelu"]]
        lines = [", ".join(tags)] if tags else []
        if model["quickgelu"]:
            lines.append(f"as {model['name']}-quickgelu: {', '.join(model['quickgelu'])}")
        if not model["tags"] and model is not EMBEDDED:
            lines.append("no tags: a local checkpoint")
        for line in lines:
            out.print(Padding(line, (0, 0, 0, 4)), highlight=False)
    tell(
        "A name is for --backbone, a tag for --pretrained. icon-clip needs no tag, nor do "
        "hf-hub:ORG/REPOSITORY and local-dir:FOLDER."
    )


def _has(model: dict[str, Any], word: str | None) -> bool:
    wanted = (word or "").lower()
    return any(wanted in text.lower() for text in (model["name"], *model["tags"]))
