"""Names of backbones: the embedded model, open_clip's names and tags, and the parts of a recorded name; torch-free.

A backbone is recorded in one text: "icon-clip", "ViT-B-32/laion2b_s34b_b79k" (name and tag), "ViT-B-32/weights.pt"
(name and checkpoint), "hf-hub:org/repo" or "local-dir:path".
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePath
from typing import Any

ICON_CLIP = "icon-clip"
HUB, FOLDER = "hf-hub:", "local-dir:"
SHOWN_TAGS = 10  # tags that an error lists
SHOWN_NAMES = 3  # names that an error suggests
PLACE = PurePath("mergetune", "assets", ICON_CLIP).parts  # where an installation holds the embedded model


def is_complete(name: str) -> bool:
    """Returns whether a name includes its weights, so that no tag or checkpoint goes with it."""
    return name == ICON_CLIP or name.startswith((HUB, FOLDER))


def recorded_parts(recorded: str) -> tuple[str, str | None]:
    """Returns the name and the weights in a recorded backbone; weights are None for a name that includes them.

    The folder of the embedded model in any installation, by which older files record that model, becomes "icon-clip".

    Example:
        >>> from mergetune.facts.backbones import recorded_parts
        >>> recorded_parts("ViT-B-32/openai"), recorded_parts("hf-hub:org/repo")
        (('ViT-B-32', 'openai'), ('hf-hub:org/repo', None))
    """
    if recorded.startswith(FOLDER) and PurePath(recorded.removeprefix(FOLDER)).parts[-len(PLACE) :] == PLACE:
        return ICON_CLIP, None
    if is_complete(recorded):
        return recorded, None
    name, _, weights = recorded.partition("/")
    return name, weights or None


@dataclass(frozen=True)
class KnownModel:
    """A model that open_clip can build.

    Attributes:
        name: name of the model.
        tags: tags of its published weights.
        quickgelu: those of the tags whose weights were trained with QuickGELU while the model has GELU: the model of
            that name with "-quickgelu" is the right one for them.
        config: file of open_clip that describes the network; None if another part of the program registered the model.
    """

    name: str
    tags: tuple[str, ...]
    quickgelu: tuple[str, ...] = ()
    config: Path | None = None

    @cached_property
    def _description(self) -> dict[str, Any]:
        return {} if self.config is None else json.loads(self.config.read_text(encoding="utf-8"))

    @property
    def embed_dim(self) -> int | None:
        """D, width of image features and class embeddings."""
        return self._description.get("embed_dim")

    @property
    def image_size(self) -> int | None:
        """Height and width of the images that the model takes, or the larger of both."""
        size = self._description.get("vision_cfg", {}).get("image_size", 224)
        return max(size) if isinstance(size, list) else size

    @property
    def takes_prompts(self) -> bool:
        """Whether prompts can be trained; not in the text towers of CoCa and of Hugging Face."""
        text = self._description.get("text_cfg", {})
        return "hf_model_name" not in text and not text.get("embed_cls")


@cache
def known_models() -> Mapping[str, KnownModel]:
    """Returns all models of the installed open_clip by name. Only its tables are read: the package is not imported."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("open_clip is not installed: pip install open_clip_torch")
    (folder, *_) = spec.submodule_search_locations
    # The table of tags under a package of another name, since importing open_clip itself takes seconds.
    package = types.ModuleType("mergetune_open_clip_tables")
    package.__path__ = [folder]
    sys.modules.setdefault(package.__name__, package)
    tables = importlib.import_module(f"{package.__name__}.pretrained")
    found = {}
    for config in sorted(Path(folder, "model_configs").glob("*.json"), key=lambda file: file.stem.lower()):
        name = config.stem
        tags = {tag: tables.get_pretrained_cfg(name, tag) for tag in tables.list_pretrained_tags_by_model(name)}
        right = KnownModel(name, (), config=config)
        wrong = [tag for tag, cfg in tags.items() if cfg.get("quick_gelu") and not _has_quickgelu(right)]
        found[name] = KnownModel(name, tuple(tags), tuple(wrong), config)
    return found


def _has_quickgelu(model: KnownModel) -> bool:
    return bool(model._description.get("quick_gelu"))


def tags_by_model() -> Mapping[str, Sequence[str]]:
    """Returns the tags of each model that open_clip knows; also of those that the program registered."""
    loaded: Any = sys.modules.get("open_clip")
    if loaded is None:
        return {name: model.tags for name, model in known_models().items()}
    return {name: loaded.list_pretrained_tags_by_model(name) for name in loaded.list_models()}


def spelled(
    name: str, pretrained: str | None, *, options: tuple[str, str] = ("name", "pretrained")
) -> tuple[str, str | None]:
    """Returns a backbone as it is spelled in open_clip's lists: upper case and lower case, - and _ count as equal.

    Args:
        name: name of the backbone.
        pretrained: tag or checkpoint file; None for a name that includes the weights.
        options: what the caller calls both arguments, for errors.

    Raises:
        ValueError: an unknown name or tag (the message suggests near ones), or missing or doubly given weights.
    """
    first, second = options
    if name.lower() == ICON_CLIP:
        name = ICON_CLIP
    if is_complete(name):
        if pretrained is not None:
            raise ValueError(f"{second} must be left out because {name!r} includes the weights, got {pretrained!r}")
        return name, None
    known = tags_by_model()
    found = _find(name.replace("/", "-"), known)  # open_clip reads slashes so, too
    if found is None:
        raise ValueError(f"{first} must be a known backbone, got {name!r}{_near(name, {ICON_CLIP: (), **known})}")
    tags = known[found]
    if pretrained is None:
        raise ValueError(
            f"{second} must name the weights of {found!r}, got None: give a tag or a local checkpoint. {_tags(tags)}"
        )
    tag = _find(pretrained, tags)
    if tag is None and not Path(pretrained).exists():
        near = difflib.get_close_matches(pretrained.lower(), tags, SHOWN_NAMES, 0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(
            f"{second} must be a tag of {found!r} or a local checkpoint, got {pretrained!r}{hint} {_tags(tags)}"
        )
    return found, tag or pretrained


def _find(wanted: str, names: Mapping[str, Any] | Sequence[str]) -> str | None:
    """The name that is spelled so, or the only one that is spelled so up to case and - and _."""
    if wanted in names:
        return wanted
    plain = wanted.lower().replace("_", "-")
    same = [name for name in names if name.lower().replace("_", "-") == plain]
    return same[0] if len(same) == 1 else None


def _near(wanted: str, tags: Mapping[str, Sequence[str]]) -> str:
    """Suggestions: the names that are spelled most alike, of those the ones with the most tags."""
    if Path(wanted).is_dir():
        return f": for a folder write {FOLDER}{wanted}"
    plain, way_on = wanted.lower().replace("/", "-"), "`mergetune models` lists all names"
    alike = {name: difflib.SequenceMatcher(None, plain, name.lower()).ratio() for name in tags}
    near = [name for name, ratio in alike.items() if ratio > 0.6 or plain in name.lower()]
    near = sorted(near, key=lambda name: (-alike[name], -len(tags[name])))[:SHOWN_NAMES]
    return f": did you mean {' or '.join(near)}? {way_on}" if near else f": {way_on}"


def _tags(tags: Sequence[str]) -> str:
    if not tags:
        return "It has no tags."
    more = f" and {len(tags) - SHOWN_TAGS} more" if len(tags) > SHOWN_TAGS else ""
    return f"Tags: {', '.join(tags[:SHOWN_TAGS])}{more}"
