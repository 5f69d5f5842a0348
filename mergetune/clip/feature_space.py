"""FeatureSpace: the embedding space of a CLIP whose towers are not loaded, which is enough for heads."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import nn

from mergetune.clip.backbone import FrozenClip
from mergetune.facts.brief import brief

NO_TOWERS = (
    "clip must have towers for this, got a FeatureSpace, which serves heads on cached features only: "
    "mergetune.load_clip(NAME, WEIGHTS) loads a CLIP"
)


class _NoTowers(nn.Module):
    """Stands for the model of a FeatureSpace."""


@brief("name", "embed_dim", "logit_scale", "device")
class FeatureSpace(FrozenClip):
    """The embedding space of a CLIP without its towers, for heads on cached features.

    A function that works on heads and cached features alone (:func:`mergetune.tune` with ``method="head"``,
    :func:`mergetune.fit`, :func:`mergetune.evaluate`) takes a FeatureSpace in place of the CLIP, so that no weights are
    loaded. Zero-shot templates need the text tower: the zero-shot solution must then be a head. What needs a tower
    raises TypeError.

    Args:
        embed_dim: D, width of the image features.
        logit_scale: factor on the logits of the CLIP, such as 100 for OpenAI's models. It gives the learning rate and
            the weight ``lam`` their meaning for heads.
        name: name of the CLIP, which is saved with solutions; empty if it is unknown.
        fingerprint: ``image_fingerprint`` of the CLIP; with an empty text, features and solutions are not checked
            against it.
        device: device on which heads are trained.

    Example:
        >>> import mergetune as mt, torch
        >>> x, names = torch.eye(4), ["cat", "dog", "car", "tree"]
        >>> features = mt.FeatureCache.from_tensors(x, range(4), names)
        >>> start = mt.Head(torch.rand(4, 4), names, logit_scale=100.0)
        >>> space = mt.FeatureSpace(4, logit_scale=100.0)
        >>> found = mt.tune(space, features, method="head", zero_shot=start, lr=0.1, epochs=20, progress=False)
        >>> mt.evaluate(space, found.solution, features).accuracy
        100.0
    """

    def __init__(
        self,
        embed_dim: int,
        logit_scale: float,
        *,
        name: str = "",
        fingerprint: str = "",
        device: str | torch.device = "cpu",
    ) -> None:
        if isinstance(embed_dim, bool) or not isinstance(embed_dim, int) or embed_dim < 1:
            raise ValueError(f"embed_dim must be a whole number of at least 1, got {embed_dim!r}")
        if not 0 < logit_scale < float("inf"):
            raise ValueError(f"logit_scale must be positive and finite, got {logit_scale!r}")
        fields: dict[str, Any] = {
            "model": _NoTowers(), "tokenizer": self.tokenize, "name": name, "preprocess_cfg": {},
            "fingerprints": {part: fingerprint for part in ("both", "image", "text")},
        }  # fmt: skip
        known = {"embed_dim": embed_dim, "logit_scale": float(logit_scale), "logit_bias": 0.0, "takes_prompts": False}
        vars(self).update(fields, **known, _device=torch.device(device))

    @property
    def device(self) -> torch.device:
        """Device on which heads are trained."""
        return vars(self)["_device"]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of class features: those of heads are float32."""
        return torch.float32

    def _fingerprint_of(self, part: str) -> str:
        return self.fingerprints["image"]

    def has_fingerprint(self, part: str, wanted: str) -> bool:
        """Whether ``wanted`` may identify the image tower; True if the fingerprint is unknown."""
        return part == "image" and self.fingerprints["image"] in ("", wanted)

    @cached_property
    def _model(self) -> NoReturn:
        raise TypeError(NO_TOWERS)

    def tokenize(self, texts: Any, **_: Any) -> NoReturn:
        """Raises TypeError: a FeatureSpace has no text tower."""
        raise TypeError(NO_TOWERS)

    def class_embeddings(self, classnames: Any, templates: Any = ()) -> NoReturn:
        """Raises TypeError: zero-shot templates need the text tower."""
        raise TypeError(
            "zero_shot must be a head where clip is a FeatureSpace, got templates, which need the text tower: give a "
            "head, or load the CLIP with mergetune.load_clip(NAME, WEIGHTS)"
        )
