"""An edit of a frozen CLIP: what a solution changes in it, as data. Nothing is injected into the model.

Shapes: M settings that are computed together (1 where a part is the same for all of them), C classes, R class rows,
B images, L tokens, W width of a tower, D embedding width, n context tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

TOWERS = ("text", "image")

TokenMap = Callable[[Tensor], Tensor]
"""Tokens of one block, [M, B, L, W] (for texts [M, C, L, W]) -> tokens of the same shape.

As long as the tokens are the same for all settings, they come as [1, B, L, W]. The result may have a leading M then.
Before a block of the image tower it may have another number of tokens. Tokens come in the precision of the tower, and
the result is brought to it.
"""


@dataclass(frozen=True, eq=False)
class Context:
    """Context vectors around the class name: the class embeddings are those of a soft prompt.

    Attributes:
        vectors: [M, n, W], or [M, C, n, W] where each class has vectors of its own.
        template: the text; the words before ``{}`` hold the places of the context vectors.
        position: place of the class name, see :class:`mergetune.Prompt`.
        classnames: the classes of class-specific vectors, else None.
    """

    vectors: Tensor
    template: str
    position: str = "end"
    classnames: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class ClassRows:
    """Rows for some classes: instead of their class embeddings, or added to them.

    Attributes:
        classnames: R names. Classes with other names keep the embeddings that they have without these rows.
        values: [M, R, D]; rows that are not added may be [M, R, D + 1], with the bias as the weight of a constant 1.
        added: whether the rows are added to class embeddings (of unit norm, where the edit normalises them).
    """

    classnames: tuple[str, ...]
    values: Tensor
    added: bool = False


@dataclass(frozen=True, eq=False)
class Edit:
    """What a solution changes in a frozen CLIP. Every part is optional, and parts are applied in the order below.

    Attributes:
        weights: open_clip parameter name -> the tensor that is used instead, with a leading M.
        before: (tower, block) -> function of the tokens that enter the block; its result enters instead. ``tower`` is
            "text" or "image", ``block`` counts from 0.
        beside: (tower, block) -> function of the tokens that enter the block; its result is added to what leaves it.
        templates: texts of the class embeddings where there is no context; several are averaged as unit embeddings.
            Empty: classes have no text, their embeddings are in ``rows``.
        context: a soft prompt; the class embeddings come from it instead of ``templates``.
        image_maps: functions of image features, [M, B, D] or [1, B, D] -> [M, B, D'], one after the other. Each takes
            unit norm features, and the result is made unit norm.
        raw_image_map: whether the first image map takes the features as they leave the tower instead.
        rows: class rows, one after the other.
        normalize: whether class embeddings are made unit norm before the product with image features.
        scale: factor on the logits; None is the CLIP's.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    before: Mapping[tuple[str, int], TokenMap] = field(default_factory=dict)
    beside: Mapping[tuple[str, int], TokenMap] = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    context: Context | None = None
    image_maps: tuple[Callable[[Tensor], Tensor], ...] = ()
    raw_image_map: bool = False
    rows: tuple[ClassRows, ...] = ()
    normalize: bool = True
    scale: float | None = None

    def touches(self, tower: str) -> bool:
        """Whether the blocks or weights of a tower, "text" or "image", are changed."""
        hooks = {place[0] for place in (*self.before, *self.beside)}
        return tower in hooks or any(name.startswith("visual.") == (tower == "image") for name in self.weights)

    def under(self, top: Edit) -> Edit:
        """This edit with ``top`` applied after it.

        Raises:
            ValueError: both change the same weights or blocks, or both hold texts: one of them would be lost. A map of
                raw features above another map.
        """
        for what in ("weights", "before", "beside"):
            if both := getattr(self, what).keys() & getattr(top, what).keys():
                raise ValueError(f"solutions of a stack must not change the same {what}, got {sorted(both)[0]!r} twice")
        if top.templates or top.context is not None:
            raise ValueError("only the base of a stack may hold class texts, got a prompt or templates above it")
        if self.image_maps and top.raw_image_map:
            raise ValueError("only the first image map of a stack may take raw features, got one above another map")
        return Edit(
            weights={**self.weights, **top.weights},
            before={**self.before, **top.before},
            beside={**self.beside, **top.beside},
            templates=self.templates,
            context=self.context,
            image_maps=self.image_maps + top.image_maps,
            raw_image_map=self.raw_image_map or top.raw_image_map,
            rows=self.rows + top.rows,
            normalize=self.normalize and top.normalize,
            scale=self.scale if top.scale is None else top.scale,
        )
