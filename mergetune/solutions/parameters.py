"""Parameters: fine-tuned values of any named parameters of a CLIP, up to the whole model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mergetune.clip import PLAIN, Edit, FrozenClip, ImageInput, check_templates
from mergetune.facts.brief import brief
from mergetune.io import Items, Number, listing, named, names_file
from mergetune.merging import open_weights
from mergetune.solutions.base import Solution
from mergetune.solutions.solution_folders import Description
from mergetune.solutions.states import State, check_finite, check_same_shapes

if TYPE_CHECKING:
    from typing_extensions import Self

SCALES = ("logit_scale", "logit_bias")  # parameters of the logits, not of a tower


class ParametersDescription(Description, frozen=True):
    """Saved parameters."""

    classnames: None
    templates: Items[str]
    logit_scale: Number | None


@brief("templates", "logit_scale", "backbone", "notes", tensors=lambda found: len(found.values))
@dataclass(frozen=True, eq=False)
class Parameters(Solution):
    """Fine-tuned values of named parameters: the layer norms, one tower, or a whole fine-tuned CLIP (WiSE-FT, FLYP).

    The zero-shot point has the pretrained values, and lines are straight.

    Attributes:
        values: open_clip's name of a parameter -> its value, float32.
        templates: texts of the class embeddings. Empty for parameters on a solution that makes them, in a
            :class:`mergetune.Stack`.
        logit_scale: factor on the logits; None takes the logit scale of the CLIP.
        backbone: name of the CLIP that the parameters belong to, or None.
        fingerprint: SHA-256 of the pretrained weights of that CLIP's towers, or None; a CLIP with other weights is
            refused.
        notes: settings and origin, JSON-able; saved with the parameters.

    Example:
        >>> import mergetune as mt, torch
        >>> mt.Parameters({"visual.ln_post.weight": torch.ones(16)}).image_input
        'pixels'
    """

    values: State
    templates: tuple[str, ...] = (PLAIN,)
    logit_scale: float | None = None
    backbone: str | None = None
    fingerprint: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    classnames: None = None

    kind: ClassVar[str] = "parameters"
    tensors: ClassVar[tuple[str, ...]] = ()
    changes_weights: ClassVar[bool] = True
    description: ClassVar[type[Description]] = ParametersDescription

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", check_templates(self.templates) if self.templates else ())
        if not self.values:
            raise ValueError("values must hold at least one parameter, got none")
        for name, tensor in self.values.items():
            check_finite(f"values[{name}]", tensor)

    @classmethod
    def start(cls, clip: FrozenClip, names: Sequence[str], *, templates: Sequence[str] = (PLAIN,)) -> Parameters:
        """The pretrained values of some parameters: they change nothing.

        Args:
            clip: the frozen CLIP.
            names: open_clip's names of the parameters, for example those of :func:`layer_norms`.
            templates: texts of the class embeddings.

        Raises:
            ValueError: the CLIP has no parameter of a name.
        """
        known = _known(clip)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"names must be those of parameters of {clip.name}, got {unknown[0]!r}")
        made = cls({name: known[name].detach().float().clone() for name in names}, tuple(templates))
        return replace(made, **made.origin(clip))

    @property
    def tower(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The towers that the values depend on; templates need the text tower."""
        images = [name.startswith("visual.") for name in self.values]
        return "both" if any(images) and (self.templates or not all(images)) else "image" if any(images) else "text"

    @property
    def image_input(self) -> ImageInput:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "pixels" if any(name.startswith("visual.") for name in self.values) else "feature"

    def edit(self, clip: FrozenClip, states: State) -> Edit:
        """An edit that replaces the parameters by the values."""
        return Edit(weights=states, templates=self.templates, scale=self.logit_scale)

    def zero_shot_points(
        self, clip: FrozenClip, classnames: Sequence[str], templates: Sequence[str]
    ) -> list[Parameters]:
        """The pretrained values, with the logit scale of the tuned ones: a line has one scale."""
        known = _known(clip)
        return [replace(self, values={name: known[name].detach().float().clone() for name in self.values})]

    def check_line(self, other: Solution, *, space: str = "parameter") -> None:
        """Check that a line joins two sets of values: the same parameters, texts and logit scale."""
        if space == "embedding":
            return
        assert isinstance(other, Parameters)  # of the same kind
        check_same_shapes(self, other)
        for name in ("templates", "logit_scale"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                raise ValueError(f"parameters on one path must have the same {name}, got {here} and {there}")

    def check_width(self, clip: FrozenClip) -> None:
        known = _known(clip)
        for name, value in self.values.items():
            if name not in known or known[name].shape != value.shape:
                there = "no such parameter" if name not in known else f"{list(known[name].shape)}"
                raise ValueError(
                    f"values must be those of {clip.name}, which has {there} at {name!r}, got {list(value.shape)}"
                )

    # -- as a solution -------------------------------------------------------------------------------------------------

    def state(self) -> State:
        return dict(self.values)

    def with_state(self, state: State, **changes: Any) -> Self:
        values = {name: tensor.detach().float().clone().contiguous() for name, tensor in state.items()}
        return replace(self, values=values, **changes)

    def settings(self) -> dict[str, Any]:
        return {"templates": list(self.templates), "logit_scale": self.logit_scale}

    @classmethod
    def restore(cls, description: Description, tensors: State) -> Self:
        return cls(values=tensors, **dict(description))

    @property
    def identity(self) -> tuple[Tensor | str, ...]:
        return *self.values.values(), json.dumps([list(self.values), self.settings()])

    def card(self) -> tuple[str, str, str]:
        return "Fine-tuned parameters for CLIP", "fine-tuned", f"{len(self.values)} tensors, {self.numbers:,} numbers."


def layer_norms(clip: FrozenClip, tower: str = "both") -> tuple[str, ...]:
    """Names of the weights and biases of all layer norms of a CLIP, which 2SFS tunes (arXiv 2503.11609).

    Args:
        clip: the frozen CLIP.
        tower: "text", "image" or "both".

    Raises:
        ValueError: another tower, or a tower without layer norms.
    """
    if tower not in ("text", "image", "both"):
        raise ValueError(f"tower must be one of text, image, both, got {tower!r}")
    owners = [name for name, module in clip.model.named_modules() if isinstance(module, nn.LayerNorm)]
    names = [f"{owner}.{part}" for owner in owners for part in ("weight", "bias")]
    found = [
        n for n in names if n in _known(clip) and (tower == "both" or n.startswith("visual.") == (tower == "image"))
    ]
    if not found:
        raise ValueError(f"tower must have layer norms, got {tower!r}, whose tower in {clip.name} has none")
    return tuple(found)


@names_file("path")
def read_model(path: str | Path, *, templates: Sequence[str] = (PLAIN,), ema: bool = False) -> Parameters:
    """Read a whole fine-tuned model: ``epoch_N.pt`` of open_clip's trainer, or any state dict with open_clip's names.

    Prefixes of DistributedDataParallel and torch.compile are removed. No code in the file is run.

    Args:
        path: a .pt, .bin or .safetensors file, or a folder with one.
        templates: texts of the class embeddings, which the file does not hold.
        ema: take the moving average of the weights from a file that holds both.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no state dict of an open_clip model.
    """
    path = Path(path)
    weights = open_weights(path, ema=ema)
    if not is_model(weights):
        raise ValueError(
            f"{path} must hold the weights of an open_clip model, with both towers, got {listing(weights, most=3)}"
        )
    values = {name: weights[name] for name in weights if name not in SCALES}
    floats = {name: tensor.float() for name, tensor in values.items() if tensor.is_floating_point()}
    scale = None
    if "logit_scale" in weights:
        stored = weights["logit_scale"].float()
        if stored.numel() != 1 or not 0 < (scale := float(stored.exp())) < torch.inf:
            found = named(stored.flatten()[:3].tolist())
            raise ValueError(f"{path} must hold one number as logit_scale, the logarithm of the scale, got {found}")
    try:
        return Parameters(floats, tuple(templates), scale, notes={"checkpoint": path.name})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error


def is_model(names: Any) -> bool:
    """Whether these are the names of an open_clip model's tensors."""
    return any(f"{prefix}token_embedding.weight" in names for prefix in ("", "text.")) and any(
        name.startswith("visual.") for name in names
    )


def _known(clip: FrozenClip) -> dict[str, torch.Tensor]:
    """The tensors of a CLIP that can have other values, by name."""
    state = clip.model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if t.is_floating_point() and name not in SCALES}
