"""LoRA adapters in files: their factors, the scales of adapter_config.json, and the configuration of a merged adapter.

Shapes of a layer: A [r, n], B [m, r]; the adapter adds ``scale * B A`` to the weight [m, n]. Convolutions have further
dimensions, which count as part of n.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from mergetune.io import read_json
from mergetune.merging.sources import Source, StateDict, source, title_of
from mergetune.merging.weight_files import open_weights, weights_in

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LARGEST = 1e30
"""Largest rank and alpha: their quotients and roots are finite, in float32 as well."""
_FACTOR = re.compile(r"(?P<layer>(?:.+\.)?)lora_(?P<kind>embedding_)?(?P<factor>[AB])(?P<rest>(?:\.[^.]+){0,2})")
_OTHERS = re.compile(r"lora[_.](down|up)|lora_linear_layer|w_lora_[AB]|lokr_|hada_")
_REFUSED = {  # settings with which the adapter is more than scale * B A
    "use_dora": "DoRA's magnitudes are no part of the product of the factors",
    "lora_bias": "the bias of lora_B is no part of the product of the factors",
    "layer_replication": "its layers are copies of other layers",
    "use_qalora": "its inputs are pooled",
}

_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""init_lora_weights that leave the base weight as it is. With others, such as "pissa", "olora", "corda", "loftq" and
"lora_ga", PEFT changes the base weight when it loads the adapter: the change of the model is another than scale * B A.
"""


@dataclass(frozen=True)
class Layer:
    """The factors of one layer.

    Attributes:
        a, b: names of the tensors.
        rank: r.
        scale: factor of the product; 1 for an adapter without a configuration, whose scale is unknown.
    """

    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        state: its tensors.
        layers: name of the adapted module -> its factors.
        full: names of the other tensors, which replace tensors of the model: ``modules_to_save`` and biases.
        config: content of adapter_config.json; None without such a file.
        title: the adapter in errors.
    """

    state: StateDict
    layers: Mapping[str, Layer]
    full: tuple[str, ...]
    config: Mapping[str, Any] | None
    title: str

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A [r, n, ...] and B [m, r, ...] as float32 or float64."""
        a, b = (self.state[name] for name in (self.layers[layer].a, self.layers[layer].b))
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        return a.to(wide), b.to(wide)

    def product(self, layer: str) -> Source:
        """``scale * B A`` [m, n], computed row by row when it is read."""
        found = self.layers[layer]
        a, b = (part.flatten(1) for part in self.factors(layer))
        n = a.shape[1]

        def read(begin: int, end: int) -> Tensor:
            first = begin // n
            rows = found.scale * (b[first : -(-end // n)] @ a)
            return rows.flatten()[begin - first * n : end - first * n]

        return Source(torch.Size([len(b), n]), a.dtype, a.device, read)


def is_lora(state: StateDict) -> bool:
    """Whether a state dict holds factors of LoRA.

    Raises:
        ValueError: it holds factors under names that are not PEFT's.
    """
    if other := next((name for name in state if _OTHERS.search(name)), None):
        raise ValueError(f"LoRA factors must have PEFT's names, lora_A and lora_B, got {other!r}: convert them first")
    return any(_FACTOR.fullmatch(name) for name in state)


def adapter_folder(path: str | Path) -> Path | None:
    """The folder of an adapter with a configuration; None for other files and folders."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent if path.name.startswith("adapter_model.") else None
    return folder if folder is not None and (folder / CONFIG).is_file() else None


def open_adapter(path: str | Path, state: StateDict | None = None) -> Adapter:
    """Opens an adapter of PEFT: a folder, or a file. adapter_config.json is read from the same folder.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors (or .bin), or a file with LoRA factors.
        state: the opened tensors; None opens them.

    Raises:
        FileNotFoundError, ValueError: as :func:`open_weights`; factors without their partner or of shapes that do not
            fit; a configuration that is damaged, of another kind of adapter, or that does not fit the factors.
    """
    folder = adapter_folder(path)
    state = open_weights(weights_in(folder) if folder else path) if state is None else state
    config = None if folder is None else _read_config(folder / CONFIG)
    title = title_of("adapter", state)
    layers, full = {}, []
    for name in state:
        match = _FACTOR.fullmatch(name)
        if match is None:
            full.append(name)
            continue
        pair = {f: f"{match['layer']}lora_{match['kind'] or ''}{f}{match['rest']}" for f in "AB"}
        if other := next((n for n in pair.values() if n not in state), None):
            raise ValueError(f"{title} must hold lora_A and lora_B of every layer, but {name!r} has no {other!r}")
        layer = match["layer"].removesuffix(".")
        a, b = (source(state, pair[f]).shape for f in "AB")
        if len(a) < 2 or len(b) < 2 or b[1] != a[0] or math.prod(b[2:]) != 1 or 0 in (*a, *b):
            raise ValueError(
                f"{title}: lora_A and lora_B of {layer!r} must have shapes [r, n] and [m, r], "
                f"got {list(a)} and {list(b)}"
            )
        layers[layer] = Layer(pair["A"], pair["B"], a[0], _scale(config, layer, a[0], title))
    if magnitude := next((name for name in full if "lora_" in name), None):
        raise ValueError(
            f"{title} must hold lora_A and lora_B alone, got {magnitude!r}: such adapters cannot be merged"
        )
    return Adapter(state, layers, tuple(full), config, title)


def one_scale(adapter: Adapter) -> float:
    """The scale of all layers of an adapter.

    Raises:
        ValueError: the layers have different scales.
    """
    scales = {layer.scale for layer in adapter.layers.values()}
    if len(scales) != 1:
        raise ValueError(f"{adapter.title} must have one scale in all layers, got {sorted(scales)}")
    return scales.pop()


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold the settings of an adapter, got {type(config).__name__}")
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(
            f"{file}: peft_type must be LORA, got {short(config['peft_type'])}: its factors have no product B A"
        )
    for name, why in _REFUSED.items():
        if config.get(name):
            raise ValueError(
                f"{file}: {name} must be off, got {short(config[name])}: {why}, so the adapter cannot be merged"
            )
    if (begins := config.get("init_lora_weights")) not in _BEGINNINGS:
        raise ValueError(
            f"{file}: init_lora_weights must be true, or a name with which PEFT leaves the base weight as it is, got "
            f"{short(begins)}: save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes it a "
            "plain LoRA"
        )
    for name, kinds in {"r": int, "lora_alpha": (int, float)}.items():
        value = config.get(name, 8)
        if not _is_positive(value, kinds):
            raise ValueError(f"{file}: {name} must be a positive number of at most {LARGEST:g}, got {short(value)}")
    for name, kinds in {"rank_pattern": int, "alpha_pattern": (int, float)}.items():
        values = config.get(name) or {}
        if not isinstance(values, dict) or not all(_is_positive(value, kinds) for value in values.values()):
            raise ValueError(
                f"{file}: {name} must hold positive numbers of at most {LARGEST:g} by the names of layers, got "
                f"{short(values)}"
            )
        if other := next((key for key in values if not re.fullmatch(r"\^?([\w-]|\\?\.)+", key)), None):
            raise ValueError(f"{file}: {name} must hold names of layers, got {short(other)}")
    for name in ("target_modules", "modules_to_save"):
        value = config.get(name) or []
        names = [value] if isinstance(value, str) and name == "target_modules" else value
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise ValueError(f"{file}: {name} must be a list of names, got {short(value)}")
    return config


def _is_positive(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= LARGEST


def _scale(config: Mapping[str, Any] | None, layer: str, rank: int, title: str) -> float:
    """The factor of the product: alpha / r, or alpha / sqrt(r) with use_rslora; 1 without a configuration."""
    if config is None:
        return 1.0
    # PEFT gives the output projection of an nn.MultiheadAttention the rank of the whole attention.
    name = layer.removeprefix("base_model.model.").removesuffix(".base_layer.out_proj")
    r, alpha = (_of_layer(config.get(key) or {}, name) for key in ("rank_pattern", "alpha_pattern"))
    r, alpha = config.get("r", 8) if r is None else r, config.get("lora_alpha", 8) if alpha is None else alpha
    if r != rank:
        raise ValueError(f"{title}: lora_A of {layer!r} must have the rank {r} of {CONFIG}, got {rank}")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _of_layer(pattern: Mapping[str, Any], layer: str) -> Any:
    """The entry of a layer: its name is the key, or ends with a dot and the key. "^" before a key is the whole name."""
    for key, value in pattern.items():
        name = key.removeprefix("^").replace("\\.", ".")
        if layer == name or (not key.startswith("^") and layer.endswith(f".{name}")):
            return value
    return None


def merged_config(adapters: Sequence[Adapter], ranks: Mapping[str, int], full: Sequence[str]) -> dict[str, Any] | None:
    """The configuration of a merged adapter, whose scale is 1 in every layer; None if the adapters have none.

    Args:
        adapters: what was merged.
        ranks: adapted module -> rank in the result.
        full: names of the tensors of ``modules_to_save`` in the result.
    """
    first = adapters[0].config
    if first is None:
        return None
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    special = {re.escape(layer.removeprefix("base_model.model.")): r for layer, r in ranks.items() if r != usual}
    kept = [m for m in first.get("modules_to_save") or [] if any(f".{m}." in f".{name}" for name in full)]
    return {
        **first,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": special,
        "alpha_pattern": special,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _targets(adapters),
        "modules_to_save": kept or None,
    }


def _targets(adapters: Sequence[Adapter]) -> Any:
    """All adapted modules: the union of lists, or a regular expression that matches what one of several does."""
    found = [(adapter.config or {}).get("target_modules") for adapter in adapters]
    if all(targets == found[0] for targets in found):
        return found[0]
    if all(isinstance(targets, list) for targets in found):
        return sorted({name for targets in found for name in targets or ()})
    if all(isinstance(targets, str) for targets in found):
        return "|".join(f"({targets})" for targets in dict.fromkeys(found))
    odd = next(adapter for adapter, targets in zip(adapters, found, strict=True) if type(targets) is not type(found[0]))
    raise ValueError(
        f"target_modules must be of one form to be joined, got a list of names in one {CONFIG} and a text or none in "
        f"another: {adapters[0].title} and {odd.title}"
    )
