"""What prompts and heads share: their checks, and how they are saved and loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.io import MAX_SETTINGS, MAX_WEIGHTS, read_regular, read_regular_text, write_atomically

WEIGHTS, CONFIG = "solution.safetensors", "solution.json"
FORMAT_VERSION = 1

Encoder = Callable[[Tensor], Tensor]
"""Parameters of M solutions, [M, ...] -> their class weights, [M, C, D], as the loss takes them."""


def inputs(x: Tensor, weights: Tensor) -> Tensor:
    """Features [B, D] as class weights [..., C, D] take them: with a constant 1 behind where those hold a bias."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1) if weights.shape[-1] == x.shape[-1] + 1 else x


def check_same_classes(argument: str, got: Sequence[str], expected: Sequence[str]) -> None:
    if len(got) != len(expected):
        raise ValueError(
            f"{argument} must be the solution's {len(expected)} classes in its order, got {len(got)} classes"
        )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a != b:
            raise ValueError(
                f"{argument} must be the solution's classes in its order: class {i} must be {b!r}, got {a!r}"
            )


def check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} NaN or infinite values")


class Saved(Protocol):
    """What is written beside the tensors of a solution."""

    kind: ClassVar[str]

    @property
    def classnames(self) -> tuple[str, ...] | None: ...

    @property
    def backbone(self) -> str | None: ...

    @property
    def fingerprint(self) -> str | None: ...

    @property
    def notes(self) -> dict[str, Any]: ...


def write_solution(solution: Saved, path: str | Path, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "format": "mergetune-solution",
        "version": FORMAT_VERSION,
        "kind": solution.kind,
        **extra,
        "classnames": solution.classnames,
        "backbone": solution.backbone,
        "fingerprint": solution.fingerprint,
        "notes": solution.notes,
    }
    weights = serialize({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    config["sha256"] = hashlib.sha256(weights).hexdigest()  # a save that is cut off between the two files is seen
    text = json.dumps(config, indent=2)  # before anything is written: notes may not be JSON
    write_atomically(path / WEIGHTS, weights)
    write_atomically(path / CONFIG, f"{text}\n".encode())


def read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} must be a folder with {CONFIG}, as save() writes it")
    try:
        config = json.loads(read_regular_text(path / CONFIG, limit=MAX_SETTINGS))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "mergetune-solution":
        raise ValueError(f"{path / CONFIG} must have format 'mergetune-solution'")
    if config.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path / CONFIG}: version must be {FORMAT_VERSION}, got {config.get('version')!r}: update mergetune"
        )
    return config


def read_solution(
    path: str | Path, kind: str, needed: set[str], own: Mapping[str, type | UnionType]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_solution` wrote: the fields of ``solution.json``, and the tensors.

    Args:
        path: the folder.
        kind: that it must hold.
        needed: names of tensors that must be there.
        own: the fields that this kind has beside those of all kinds, and their types.
    """
    path = Path(path)
    config = read_config(path)
    if config.get("kind") != kind:
        raise ValueError(f"{path} must hold a {kind}, got {config.get('kind')!r}")
    fields: dict[str, type | UnionType] = {
        "classnames": list | None,
        "backbone": str | None,
        "fingerprint": str | None,
        "notes": dict,
        "sha256": str,
        **own,
    }
    for name, expected in fields.items():
        if name not in config or not isinstance(config[name], expected):
            raise ValueError(f"{path / CONFIG}: {name} must be there and right, got {config.get(name)!r}")
    try:
        weights = read_regular(path / WEIGHTS, limit=MAX_WEIGHTS)
        tensors = deserialize(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / WEIGHTS} cannot be read: {error}") from error
    if hashlib.sha256(weights).hexdigest() != config["sha256"]:
        raise ValueError(
            f"{path / WEIGHTS} must be what {CONFIG} describes, got another checksum: saving was interrupted"
        )
    if missing := needed - tensors.keys():
        raise ValueError(f"{path / WEIGHTS} must hold {', '.join(sorted(missing))}, got {', '.join(sorted(tensors))}")
    return config, tensors


def common_fields(config: dict[str, Any]) -> dict[str, Any]:
    names = config["classnames"]
    return {
        "classnames": None if names is None else tuple(names),
        "backbone": config["backbone"],
        "fingerprint": config["fingerprint"],
        "notes": config["notes"],
    }
