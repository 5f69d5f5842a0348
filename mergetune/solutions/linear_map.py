"""LinearMap: one matrix that maps image features, for all classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergetune.clip import Edit, FrozenClip
from mergetune.facts.brief import brief
from mergetune.solutions.base import Solution
from mergetune.solutions.head_files import read_arrays
from mergetune.solutions.solution_folders import Description
from mergetune.solutions.states import State, check_finite


class LinearMapDescription(Description, frozen=True):
    """A saved map."""

    classnames: None


@brief("matrix", "classnames", "backbone", "notes")
@dataclass(frozen=True, eq=False)
class LinearMap(Solution):
    """A linear map of image features, ``x' = normalise(x A)`` (the linear adapter of ProLIP, arXiv 2410.05270).

    The map belongs to no class, so classes without training images use it, too. A map makes no class embeddings: put
    it on a solution that does, with :class:`mergetune.Stack`.

    Attributes:
        matrix: A, [D, D] float32; the identity matrix changes nothing.
        backbone: name of the CLIP that the map was made for, or None.
        fingerprint: SHA-256 of the weights of that CLIP's image tower, or None; a CLIP with other weights is refused.
        notes: settings and origin, JSON-able; saved with the map.

    Example:
        >>> import mergetune as mt, torch
        >>> mt.Stack(mt.Templates(), mt.LinearMap(torch.eye(512))).numbers
        262144
    """

    matrix: Tensor
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    classnames: None = None

    kind: ClassVar[str] = "map"
    tensors: ClassVar[tuple[str, ...]] = ("matrix",)
    description: ClassVar[type[Description]] = LinearMapDescription

    def __post_init__(self) -> None:
        check_finite("matrix", self.matrix)
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1] or not self.matrix.numel():
            raise ValueError(f"matrix must have shape [D, D], got {list(self.matrix.shape)}")

    @classmethod
    def identity_map(cls, clip: FrozenClip) -> LinearMap:
        """The identity map, the start of training: it changes nothing."""
        matrix = torch.eye(clip.embed_dim, device=clip.device)
        return cls(matrix, backbone=clip.name or None, fingerprint=clip.image_fingerprint or None)

    @classmethod
    def from_file(cls, path: str | Path, *, transposed: bool = False) -> LinearMap:
        """Read a map from a .pt, .pth, .npz or .safetensors file that holds one square matrix. No code is run.

        Args:
            path: the file.
            transposed: whether the file holds the transpose of A, as the weight of a ``torch.nn.Linear`` does.

        Raises:
            ValueError: the file holds no square matrix, or other arrays, which would be lost.
        """
        found = read_arrays(Path(path))
        square = {name: value for name, value in found.items() if value.ndim == 2 and value.shape[0] == value.shape[1]}
        if len(square) != 1 or len(found) != 1:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items()) or "nothing"
            raise ValueError(f"{path} must hold one square matrix [D, D] alone, got {shapes}")
        ((name, matrix),) = square.items()
        return cls(matrix.T.contiguous() if transposed else matrix, notes={"file": Path(path).name, "name": name})

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """An edit with one image map: x -> x A."""
        return Edit(image_maps=(lambda x: x @ states["matrix"].to(x),))

    def zero_shot_points(
        self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]
    ) -> list[LinearMap]:
        """The identity map: it leaves the solution below unchanged."""
        return [replace(self, matrix=torch.eye(len(self.matrix)).to(self.matrix))]

    def distance(self, states: State, to: State) -> Tensor:
        """Squared Frobenius distance, [M], without the factor 1/2, as in ProLIP's ``|A - I|^2``."""
        return (states["matrix"] - to["matrix"]).square().sum((-2, -1))

    def check_width(self, clip: FrozenClip) -> None:
        if len(self.matrix) != clip.embed_dim:
            raise ValueError(f"matrix must have the embedding's width {clip.embed_dim}, got {list(self.matrix.shape)}")

    def card(self) -> tuple[str, str, str]:
        return "Image feature map for CLIP", "image-map", f"{list(self.matrix.shape)}, on unit-norm image features."
