"""The files of PEFT: LoRA adapters of open_clip's models and of transformers' CLIPModel, in and out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.clip import PLAIN, FrozenClip, block_prefix
from mergetune.io import names_file, write_atomically, write_json
from mergetune.merging.adapters import CONFIG, WEIGHTS, open_adapter
from mergetune.solutions.base import Solution
from mergetune.solutions.lora import LoRA
from mergetune.solutions.lora_files import checked_lora, in_thirds, lora_of, whole_number

BEFORE = "base_model.model."
OUT = ".base_layer.out_proj"  # PEFT's name of the output projection in an adapted nn.MultiheadAttention
TWICE_UNTIL = "0.21.2"
"""PEFT up to this version adds the change of an nn.MultiheadAttention's output projection twice, in each forward pass
and in merge_and_unload (github.com/huggingface/peft/pull/3774). Files are read and written as these versions compute.
"""
_OPEN_CLIP = re.compile(
    r"(?:(visual)\.|text\.)?transformer\.resblocks\.(\d+)\.(attn|attn\.base_layer\.out_proj|mlp\.c_\w+)"
)
_TRANSFORMERS = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+)")
OPEN_CLIP_PARTS = {"attn": "qkv", f"attn{OUT}": "out", "mlp.c_fc": "fc", "mlp.c_proj": "proj"}
TRANSFORMERS_PARTS = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.out_proj": "out",
    "mlp.fc1": "fc", "mlp.fc2": "proj",
}  # fmt: skip


@names_file("path")
def read_peft(path: str | Path, *, templates: Sequence[str] = (PLAIN,)) -> LoRA:
    """Read a LoRA adapter of PEFT for open_clip's models or for transformers' CLIPModel.

    Args:
        path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the second file.
        templates: texts of the class embeddings, which the adapter does not hold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an adapter of another kind (DoRA, biases, ``modules_to_save``), of other layers than those of
            transformer blocks, or without a configuration, which holds the scale.
    """
    path = Path(path)
    adapter = open_adapter(path)
    if adapter.config is None:
        raise ValueError(f"{path} must have {CONFIG} beside it, which says the scale of the adapter")
    if adapter.full:
        raise ValueError(
            f"{path} must hold lora_A and lora_B alone, got {adapter.full[0]!r}: whole tensors (modules_to_save, "
            "biases) are no part of a LoRA"
        )
    twice = _numbers(adapter.config.get("peft_version") or TWICE_UNTIL) <= _numbers(TWICE_UNTIL)
    factors, scales = {}, {}
    for layer, found in adapter.layers.items():
        place = _place_of(path, layer.removeprefix(BEFORE))
        factors[f"{place}.A"], factors[f"{place}.B"] = adapter.factors(layer)
        scales[place] = 2 * found.scale if twice and layer.endswith(OUT) else found.scale
    return lora_of(path, factors, scales, templates)


def _numbers(version: object) -> list[int]:
    """The first three numbers of a version, for comparisons."""
    return [int(number) for number in re.findall(r"\d{1,9}", str(version))[:3]]


def _place_of(path: Path, module: str) -> str:
    """The place of an adapted module."""
    if match := _OPEN_CLIP.fullmatch(module):
        tower, part = "image" if match[1] else "text", OPEN_CLIP_PARTS.get(match[3])
    elif match := _TRANSFORMERS.fullmatch(module):
        tower, part = "text" if match[1] == "text" else "image", TRANSFORMERS_PARTS.get(match[3])
    else:
        match, tower, part = None, "", None
    if match is None or part is None:
        raise ValueError(
            f"{path} must adapt attention and MLP layers of transformer blocks, of open_clip or of transformers' "
            f"CLIPModel, got {module!r}"
        )
    return f"{tower}.{match[2]}.{part}"


def to_peft(
    solution: Solution,
    folder: str | Path,
    *,
    clip: FrozenClip | None = None,
    names: Literal["open_clip", "transformers"] = "open_clip",
) -> Path:
    """Write a LoRA as an adapter of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

    PEFT adapts the joint projection of open_clip's attention with one A, always together with the output projection.
    So q, k and v become one adapter with the sum of their ranks, and an output projection without a LoRA gets B = 0.
    PEFT up to 0.21.2 adds the change of that output projection twice; with names "open_clip" its B is halved, so that
    these versions compute the logits of the LoRA, and the configuration records the version.

    Args:
        solution: a LoRA.
        folder: the folder to write.
        clip: the CLIP that the LoRA was made for. None takes the names of open_clip's ``CLIP``; those of its
            ``CustomTextCLIP`` begin with ``text.``.
        names: "open_clip" for open_clip's models, "transformers" for transformers' CLIPModel.

    Returns:
        The folder.

    Raises:
        TypeError: another kind of solution.
        ValueError: unknown ``names``, or a CLIP of other weights.

    Example:
        >>> import mergetune as mt, tempfile, torch
        >>> factors = {"image.0.q.A": torch.ones(2, 16), "image.0.q.B": torch.ones(16, 2)}
        >>> folder = mt.to_peft(mt.LoRA(factors, {"image.0.q": 0.5}), tempfile.mkdtemp())
        >>> mt.open_solution(folder).scales
        {'image.0.qkv': 0.5, 'image.0.out': 1.0}
    """
    folder, lora = Path(folder), checked_lora(solution)
    if names not in ("open_clip", "transformers"):
        raise ValueError(f"names must be open_clip or transformers, got {names!r}")
    if clip is not None:
        lora.check(clip)
    modules = _transformers_modules(lora) if names == "transformers" else _open_clip_modules(lora, clip)
    tensors, shapes = {}, {}
    for module, (a, b, scale) in modules.items():
        tensors |= {f"{BEFORE}{module}.lora_{x}.weight": t.cpu().contiguous() for x, t in (("A", a), ("B", b))}
        shapes[module.removesuffix(OUT)] = len(a), whole_number(scale * len(a))
    usual = max(set(shapes.values()), key=list(shapes.values()).count)
    others = {f"^{re.escape(module)}": shape for module, shape in shapes.items() if shape != usual}
    config = {
        "peft_type": "LORA",
        "peft_version": TWICE_UNTIL,
        "base_model_name_or_path": lora.backbone,
        "task_type": None,
        "inference_mode": True,
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": {module: rank for module, (rank, _) in others.items()},
        "alpha_pattern": {module: alpha for module, (_, alpha) in others.items()},
        "use_rslora": False,
        "target_modules": "|".join(re.escape(module) for module in shapes),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, serialize(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config, indent=2)
    return folder


Modules = dict[str, tuple[Tensor, Tensor, float]]
"""PEFT's name of a module -> A, B and the scale."""


def _transformers_modules(lora: LoRA) -> Modules:
    names, factors = {part: name for name, part in TRANSFORMERS_PARTS.items()}, in_thirds(lora.factors)
    found = {}
    for place in dict.fromkeys(name[:-2] for name in factors):
        tower, block, part = place.split(".")
        module = f"{'text' if tower == 'text' else 'vision'}_model.encoder.layers.{block}.{names[part]}"
        scale = lora.scales.get(place) or lora.scales[f"{tower}.{block}.qkv"]
        found[module] = factors[f"{place}.A"], factors[f"{place}.B"], scale
    return found


def _open_clip_modules(lora: LoRA, clip: FrozenClip | None) -> Modules:
    usual = {"text": "transformer.resblocks.", "image": "visual.transformer.resblocks."}
    found: Modules = {}
    for block in dict.fromkeys(place.rpartition(".")[0] for place in lora.scales):
        tower, number = block.split(".")
        prefix = (usual[tower] if clip is None else block_prefix(clip, tower)) + number
        parts = {part: f"{block}.{part}" for part in ("q", "k", "v", "qkv", "out") if f"{block}.{part}" in lora.scales}
        if parts:
            found |= _attention(f"{prefix}.attn", lora, parts)
        for part, name in (("fc", "c_fc"), ("proj", "c_proj")):
            if (place := f"{block}.{part}") in lora.scales:
                found[f"{prefix}.mlp.{name}"] = (
                    lora.factors[f"{place}.A"],
                    lora.factors[f"{place}.B"],
                    lora.scales[place],
                )
    return found


def _attention(module: str, lora: LoRA, parts: Mapping[str, str]) -> Modules:
    """The joint projection and the output projection of one attention layer, of one rank and one scale."""
    first = next(iter(parts.values()))
    scale, width = lora.scales[first], lora.factors[f"{first}.A"].shape[1]
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"in": [], "out": []}
    for part, place in parts.items():
        a, b = lora.factors[f"{place}.A"], lora.factors[f"{place}.B"]
        b = b * (lora.scales[place] / scale / (2 if part == "out" else 1))
        if part in ("q", "k", "v"):
            third = "qkv".index(part)
            b = F.pad(b, (0, 0, third * width, (2 - third) * width))
        pairs["out" if part == "out" else "in"].append((a, b))
    ranks = {name: sum(len(a) for a, _ in found) for name, found in pairs.items()}
    rank, found = max(1, *ranks.values()), {}
    for name, rows in (("in", 3 * width), ("out", width)):
        a = torch.cat([a for a, _ in pairs[name]] + [torch.zeros(rank - ranks[name], width)])
        b = torch.cat([b for _, b in pairs[name]] + [torch.zeros(rows, rank - ranks[name])], 1)
        found[module if name == "in" else f"{module}{OUT}"] = a, b, scale
    return found
