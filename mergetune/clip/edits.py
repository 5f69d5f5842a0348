"""Edit: a description, as plain data, of what a solution changes in a frozen CLIP. The model itself stays unchanged.

Shapes: M settings (edits of one form that are computed together; 1 for a part that all settings share), C classes,
R class rows, B images, L tokens, W tower width, D embedding width, n context tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mergetune.facts.brief import brief

TOWERS = ("text", "image")

TokenMap = Callable[[Tensor], Tensor]
"""Function of the tokens that enter a block, [M, B, L, W] (texts: [M, C, L, W]), that returns tokens of that shape.

Tokens that no earlier part of the edit changes are shared by all settings: the function receives [1, B, L, W] and may
return [M, B, L, W]. A function before a block of the image tower may change the number of tokens. Tokens have the
precision of the tower; the result is converted to that precision.
"""


@brief()
@dataclass(frozen=True, eq=False)
class Context:
    """A soft prompt: class embeddings come from a text in which context vectors replace the first words.

    Attributes:
        vectors: the context vectors, [M, n, W] if all classes share them, [M, C, n, W] if they are class-specific.
        template: the text; each token before ``{}`` marks the place of one context vector.
        position: place of the class name, see :class:`mergetune.Prompt`.
        classnames: the C classes of class-specific vectors; None for shared vectors.
    """

    vectors: Tensor
    template: str
    position: str = "end"
    classnames: tuple[str, ...] | None = None


@brief()
@dataclass(frozen=True, eq=False)
class ClassRows:
    """One vector per class, for some classes, that replaces the class embedding or is added to it.

    Attributes:
        classnames: R names. Classes with other names keep their embeddings.
        values: the rows, [M, R, D]. Rows that replace embeddings may be [M, R, D + 1]: the last column is a bias.
        added: True adds the rows to the class embeddings (scaled to unit norm first if the edit normalises); False
            replaces the class embeddings.
    """

    classnames: tuple[str, ...]
    values: Tensor
    added: bool = False


@brief()
@dataclass(frozen=True, eq=False)
class Edit:
    """What a solution changes in a frozen CLIP. Every part is optional.

    :meth:`mergetune.solutions.Solution.edit` makes an edit from a stacked state. Edits of one form have the same names,
    places and texts and differ only in tensors; :func:`prepare_images` and :func:`prepare_classes` turn a form into
    functions of an edit. ``weights``, ``before`` and ``beside`` change the towers; the other parts change the features.

    Attributes:
        weights: open_clip parameter name -> tensor that replaces the parameter, with a leading M. (LoRA, for example.)
        before: (tower, block) -> function of the tokens that enter the block; the block gets its result instead.
            ``tower`` is "text" or "image"; ``block`` counts from 0. (Deep prompts.)
        beside: (tower, block) -> function of the tokens that enter the block; its result is added to the block's
            output. (Adapters such as MMA.)
        templates: texts with ``{}`` that the class embeddings come from if ``context`` is None; the unit-norm
            embeddings of several texts are averaged. Empty: all class embeddings stand in ``rows``.
        context: soft prompt that the class embeddings come from instead of ``templates``.
        image_maps: functions of image features, [M, B, D] or [1, B, D] -> [M, B, D'], applied in order. Each takes
            unit-norm features, and its result is scaled to unit norm.
        raw_image_map: whether the first image map takes the tower's output without normalisation.
        rows: class rows, applied in order.
        normalize: whether class embeddings are scaled to unit norm before the product with image features.
        scale: factor on the logits; None takes the logit scale of the CLIP.

    Example:
        >>> import torch
        >>> from mergetune.clip import ClassRows, Edit
        >>> text = Edit(templates=("a photo of a {}.",))
        >>> shift = Edit(rows=(ClassRows(("cat",), torch.zeros(1, 1, 512), added=True),))
        >>> both = text.under(shift)  # class embeddings of the text, and on them the row for "cat"
        >>> both.templates, [rows.classnames for rows in both.rows], both.touches("text")
        (('a photo of a {}.',), [('cat',)], False)
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
        """Whether the edit changes weights or block inputs or outputs of a tower, "text" or "image"."""
        hooks = {place[0] for place in (*self.before, *self.beside)}
        return tower in hooks or any(name.startswith("visual.") == (tower == "image") for name in self.weights)

    def under(self, top: Edit) -> Edit:
        """One edit that applies this edit and then ``top``.

        Raises:
            ValueError: both edits change the same weights or blocks; ``top`` holds class texts, which would replace
                those of this edit; ``top`` maps raw features although this edit has an image map.
        """
        for what in ("weights", "before", "beside"):
            if both := getattr(self, what).keys() & getattr(top, what).keys():
                raise ValueError(f"solutions of a stack must change different {what}, got {sorted(both)[0]!r} twice")
        if any(not rows.added for rows in top.rows):
            raise ValueError("only the base of a stack may hold rows instead of class embeddings, got a head above it")
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
            normalize=self.normalize,
            scale=self.scale,
        )
