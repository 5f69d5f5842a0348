"""The file of CLIP-LoRA, lora_weights.pt, in and out; and what it shares with the files of PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from mergetune.clip import PLAIN, FrozenClip
from mergetune.io import listing, load_torch, named, names_file, not_plain, write_atomically
from mergetune.merging.adapters import LARGEST
from mergetune.solutions.base import Solution
from mergetune.solutions.lora import LoRA, blocks_of, place_order
from mergetune.solutions.states import State
from mergetune.solutions.written_files import checked_suffix, torch_bytes

PUBLISHED = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "out"}
"""CLIP-LoRA's name of a layer -> part. Its option "params" has the first letters: q, k, v and o."""
ENCODERS = {"text": ("text",), "vision": ("image",), "both": ("text", "image")}
LAST = {"top": 1, "top1": 1, "top2": 2, "top3": 3}  # positions of the last blocks, in towers of 12 blocks


def positions(blocks: int) -> dict[str, range]:
    """CLIP-LoRA's names of positions -> the adapted blocks of a tower of this many blocks."""
    third, half = blocks // 3, blocks // 2
    found = {
        "all": range(blocks), "half-up": range(blocks - half, blocks), "half-bottom": range(half),
        "bottom": range(third), "mid": range(third, 2 * third), "up": range(2 * third, blocks),
    }  # fmt: skip
    return found | {name: range(blocks - count, blocks) for name, count in LAST.items() if blocks == 12}


def is_clip_lora(path: Path) -> bool:
    """Whether a .pt file is one of CLIP-LoRA. False for a file that cannot be read."""
    try:
        content = load_torch(path, mmap=True)
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and {"weights", "metadata"} <= content.keys()


@names_file("path")
def read_clip_lora(path: str | Path, *, templates: Sequence[str] = (PLAIN,)) -> LoRA:
    """Read a file of CLIP-LoRA, ``lora_weights.pt``. No code in the file is run.

    The file numbers the adapted blocks, those of the text tower first. Its position says which blocks they are.

    Args:
        path: the file.
        templates: texts of the class embeddings, which the file does not hold. CLIP-LoRA's are "a photo of a {}.".

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no file of CLIP-LoRA, or its parts do not fit together.
    """
    path = Path(path)
    content = load_torch(path)
    weights, metadata = (content.get(name) if isinstance(content, dict) else None for name in ("weights", "metadata"))
    if not isinstance(weights, dict) or not isinstance(metadata, dict):
        raise ValueError(f"{path} must hold 'weights' and 'metadata', as CLIP-LoRA writes them")
    rank, alpha = (metadata.get(name) for name in ("r", "alpha"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not (rank > 0 and 0 < alpha <= LARGEST):
        raise ValueError(f"{path}: metadata must hold positive numbers r and alpha, got {rank!r} and {alpha!r}")
    if weights.keys() != {f"layer_{i}" for i in range(len(weights))} or not weights:
        raise ValueError(f"{path}: weights must hold layer_0, layer_1 and so on, got {listing(weights)}")
    layers = [weights[f"layer_{i}"] for i in range(len(weights))]
    factors: State = {}
    for (tower, block), layer in zip(_blocks_of_layers(path, layers, metadata), layers, strict=True):
        for name, found in layer.items():
            if name not in PUBLISHED or not isinstance(found, dict) or found.keys() != {"w_lora_A", "w_lora_B"}:
                raise ValueError(
                    f"{path}: a layer must hold w_lora_A and w_lora_B of {', '.join(PUBLISHED)}, got {named(name)}"
                )
            a, b = found["w_lora_A"], found["w_lora_B"]
            if not (_is_matrix(a) and _is_matrix(b)) or len(a) != rank:
                raise ValueError(f"{path}: w_lora_A and w_lora_B of {name!r} must be matrices of rank r = {rank}")
            place = f"{tower}.{block}.{PUBLISHED[name]}"
            factors |= {f"{place}.A": a.float(), f"{place}.B": b.float()}
    scales = dict.fromkeys((name[:-2] for name in factors if name.endswith("A")), alpha / math.sqrt(rank))
    return lora_of(path, factors, scales, templates)


def _is_matrix(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point() and not not_plain(value)


def _blocks_of_layers(path: Path, layers: Sequence[Any], metadata: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Tower and block of each adapted layer of a file of CLIP-LoRA."""
    encoder, position = metadata.get("encoder"), metadata.get("position")
    if not isinstance(encoder, str) or encoder not in ENCODERS:
        raise ValueError(f"{path}: encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}")
    widths = []
    for layer in layers:
        first = next(iter(layer.values()), None) if isinstance(layer, dict) else None
        a = first.get("w_lora_A") if isinstance(first, dict) else None
        if not _is_matrix(a):
            raise ValueError(f"{path}: each layer must hold w_lora_A, [r, n]")
        widths.append(a.shape[1])
    texts = next((i for i, width in enumerate(widths) if width != widths[0]), len(widths))
    counts = [texts, len(widths) - texts] if encoder == "both" else [len(widths)]
    found = []
    for tower, count in zip(ENCODERS[encoder], counts, strict=True):
        towers = {12, count, 2 * count, 3 * count}  # of so many blocks, the position may name this many
        blocks = next((b for n in sorted(towers) if len(b := positions(n).get(str(position), ())) == count > 0), None)
        if blocks is None:
            raise ValueError(
                f"{path}: position {position!r} must name the {count} blocks of the {tower} tower in the file"
            )
        found += [(tower, block) for block in blocks]
    return found


def to_clip_lora(solution: Solution, file: str | Path, *, clip: FrozenClip) -> Path:
    """Write a LoRA as a file of CLIP-LoRA.

    Args:
        solution: a LoRA of the attention layers with one rank and one scale.
        file: path that ends in .pt or .pth; CLIP-LoRA's name is ``lora_weights.pt``.
        clip: the CLIP that the LoRA was made for.

    Returns:
        The path.

    Raises:
        TypeError: another kind of solution.
        ValueError: a LoRA that the format cannot hold; the message says why.
    """
    file, lora = checked_suffix(file, (".pt", ".pth")), checked_lora(solution)
    lora.check(clip)
    factors = in_thirds(lora.factors)
    ranks, scales = {len(t) for name, t in factors.items() if name.endswith("A")}, set(lora.scales.values())
    if len(ranks) > 1 or len(scales) > 1:
        raise ValueError(
            f"solution must have one rank and one scale for CLIP-LoRA, got {sorted(ranks)}, {sorted(scales)}"
        )
    by_block: dict[tuple[str, int], dict[str, Any]] = {}
    names = {part: name for name, part in PUBLISHED.items()}
    for place in dict.fromkeys(name[:-2] for name in factors):
        tower, block, part = place.split(".")
        if part not in names:
            raise ValueError(f"solution must adapt {', '.join(names)} alone for CLIP-LoRA, got {part!r}")
        pair = {f"w_lora_{factor}": factors[f"{place}.{factor}"].cpu() for factor in "AB"}
        by_block.setdefault((tower, int(block)), {})[names[part]] = pair
    if len({tuple(layer) for layer in by_block.values()}) > 1:
        raise ValueError("solution must adapt the same parts in every block for CLIP-LoRA, got several")
    blocks = {tower: sorted(block for t, block in by_block if t == tower) for tower in lora.adapted}
    known = {tower: positions(len(blocks_of(clip, tower))) for tower in blocks}
    shared = [name for name in LAST | positions(0) if all(list(known[t].get(name, ())) == blocks[t] for t in blocks)]
    if not shared:
        raise ValueError(f"solution must adapt blocks that CLIP-LoRA has a position for in both towers, got {blocks}")
    rank = ranks.pop()
    alpha = whole_number(scales.pop() * math.sqrt(rank))
    metadata = {
        "r": rank,
        "alpha": alpha,
        "encoder": next(name for name, towers in ENCODERS.items() if towers == lora.adapted),
        "params": [name[0] for name in names if names[name] in next(iter(by_block.values()))],
        "position": "all" if "all" in shared else shared[-1],
    }
    layers = [by_block[tower, block] for tower in blocks for block in blocks[tower]]
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"layer_{i}": layer for i, layer in enumerate(layers)}
    write_atomically(file, torch_bytes({"weights": weights, "metadata": metadata}))
    return file


# -- shared with PEFT --------------------------------------------------------------------------------------------------


def in_thirds(factors: State) -> State:
    """The factors with q, k and v in the place of qkv: the same A with a third of the rows of B."""
    found = {}
    for name, tensor in factors.items():
        place, _, factor = name.rpartition(".")
        if not place.endswith(".qkv"):
            found[name] = tensor
            continue
        parts = tensor.chunk(3) if factor == "B" else [tensor] * 3
        found |= {
            f"{place.removesuffix('qkv')}{part}.{factor}": t.clone() for part, t in zip("qkv", parts, strict=True)
        }
    return found


def checked_lora(solution: Solution) -> LoRA:
    """A LoRA without its places of rank 0, which change nothing; for another solution a TypeError."""
    if not isinstance(solution, LoRA):
        raise TypeError(f"solution must be a LoRA, got a {solution.kind}")
    scales = {place: s for place, s in solution.scales.items() if len(solution.factors[f"{place}.A"])}
    if not scales:
        raise ValueError("solution must change weights, got a LoRA of rank 0")
    factors = {f"{place}.{factor}": solution.factors[f"{place}.{factor}"] for place in scales for factor in "AB"}
    return replace(solution, factors=factors, scales=scales)


def lora_of(path: Path, factors: State, scales: dict[str, float], templates: Sequence[str]) -> LoRA:
    """The LoRA in a file; what is wrong with it is said with the name of the file."""
    places = sorted(scales, key=place_order)
    factors = {f"{place}.{factor}": factors[f"{place}.{factor}"] for place in places for factor in "AB"}
    try:
        return LoRA(
            factors, {place: scales[place] for place in places}, tuple(templates), notes={"checkpoint": path.name}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a LoRA: {error}") from error


def whole_number(number: float) -> float | int:
    """A number as an int if it is one up to rounding, as the programs of others write it."""
    return round(number) if abs(number - round(number)) < 1e-9 and round(number) else number
