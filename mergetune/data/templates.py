"""Named sets of zero-shot templates for the benchmark datasets: CoOp's, KgCoOp's, the official code's and CLIP's."""

from __future__ import annotations

from collections.abc import Mapping

import open_clip

from mergetune.clip import PLAIN, check_templates
from mergetune.data.benchmarks import DATASETS, benchmark

# CoOp: trainers/zsclip.py, its hand-crafted prompts; PLAIN for the others.
_COOP = dict.fromkeys(DATASETS, PLAIN) | {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
}
# KgCoOp: trainers/kgcoop.py. It differs from CoOp's for DTD only.
_KGCOOP = _COOP | {"dtd": "a photo of a {}, a type of texture."}
_CLIP = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)  # 80
_CLIP_SELECTED = tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES)  # 7 of them

#: {set: {dataset: template, or templates of an ensemble}}.
#:
#: - "coop": one hand-crafted prompt for each dataset. "kgcoop": the same but for DTD. "official": what the official
#:   MERGETUNE code starts from and stays near (trainers/kgcoop_coop_LMC.py), which are KgCoOp's; its zero-shot CLIP
#:   (trainers/zsclip.py) has CoOp's.
#: - "clip-ensemble": CLIP's 80 ImageNet templates for every dataset. "coop-ensemble": CoOp's ZeroshotCLIP2, CLIP's 7
#:   selected ones and, except for ImageNet itself, the dataset's own of "coop".
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
        name: a dataset, by any of CoOp's names for it.
        set: one of :data:`TEMPLATES`.

    Raises:
        ValueError: an unknown dataset or set; says the list.
    """
    if set not in TEMPLATES:
        raise ValueError(f"set must be one of {', '.join(TEMPLATES)}, got {set!r}")
    return check_templates(TEMPLATES[set][benchmark(name).name])
