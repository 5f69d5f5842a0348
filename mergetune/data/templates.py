"""Named sets of zero-shot templates for the benchmark datasets: CoOp's, KgCoOp's, the official code's and CLIP's."""

from __future__ import annotations

from collections.abc import Mapping

import open_clip

from mergetune.clip import PLAIN, check_templates
from mergetune.data.benchmarks import DATASETS, benchmark

# CoOp's hand-crafted prompts (trainers/zsclip.py); PLAIN for the other datasets.
_COOP = dict.fromkeys(DATASETS, PLAIN) | {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
}
# KgCoOp's prompts (trainers/kgcoop.py), which differ from CoOp's only for DTD.
_KGCOOP = _COOP | {"dtd": "a photo of a {}, a type of texture."}
_CLIP = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)  # 80
_CLIP_SELECTED = tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES)  # 7 of them

#: {set: {dataset: template, or templates of an ensemble}}.
#:
#: - "coop": CoOp's hand-crafted prompt for each dataset. "kgcoop": the same except for DTD. "official": the prompts
#:   from which the official MERGETUNE code starts and near which it stays (trainers/kgcoop_coop_LMC.py). They are
#:   KgCoOp's; the zero-shot CLIP of the official code (trainers/zsclip.py) uses CoOp's.
#: - "clip-ensemble": CLIP's 80 ImageNet templates for every dataset. "coop-ensemble": the templates of CoOp's
#:   ZeroshotCLIP2: CLIP's 7 selected templates and, except for ImageNet, the dataset's prompt of "coop".
TEMPLATES: Mapping[str, Mapping[str, str | tuple[str, ...]]] = {
    "coop": _COOP,
    "kgcoop": _KGCOOP,
    "official": _KGCOOP,
    "clip-ensemble": dict.fromkeys(DATASETS, _CLIP),
    "coop-ensemble": {
        name: _CLIP_SELECTED if name == "imagenet" else (*_CLIP_SELECTED, own) for name, own in _COOP.items()
    },
}


def templates_for(name: str, set: str = "coop") -> tuple[str, ...]:
    """The templates of a benchmark dataset, each with ``{}`` for the class name.

    Args:
        name: a dataset, by any of CoOp's names.
        set: a key of :data:`TEMPLATES`.

    Raises:
        ValueError: an unknown dataset or set; the message lists the known ones.
    """
    if set not in TEMPLATES:
        raise ValueError(f"set must be one of {', '.join(TEMPLATES)}, got {set!r}")
    return check_templates(TEMPLATES[set][benchmark(name).name])
