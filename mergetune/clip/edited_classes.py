"""Class features of an edited CLIP, from templates or a soft prompt and from class rows.

Shapes: M settings computed together, C classes, D embedding width, W width of the text tower, n context tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip.backbone import FrozenClip
from mergetune.clip.edited_texts import edited_text_tower
from mergetune.clip.edited_towers import check_edit
from mergetune.clip.edits import ClassRows, Context, Edit
from mergetune.clip.packed_texts import TextEncoder, arrange, text_encoder
from mergetune.clip.texts import check_classnames, check_same_classes, fill
from mergetune.facts.brief import brief


@brief()
@dataclass(frozen=True, eq=False)
class ClassFeatures:
    """Function of an edit that returns class features for fixed class names. Make one with :func:`prepare_classes`.

    Attributes:
        classnames: C names.
        texts: function of an edit that returns class features before any rows; None if the edit has no texts.
        places: for each entry of ``rows``, the indices of the classes that have a row and the indices of their rows;
            None if the rows are exactly the classes, in order.
        encoder: the packed text tower if the edit has a context and leaves the text tower unchanged, else None.
    """

    classnames: tuple[str, ...]
    texts: Callable[[Edit], Tensor] | None
    places: tuple[tuple[list[int], list[int]] | None, ...]
    encoder: TextEncoder | None

    def __call__(self, edit: Edit) -> Tensor:
        """Class features of the edit: [M, C, D], or [M, C, D + 1] with a bias; float32, not normalised."""
        found = None if self.texts is None else self.texts(edit)
        for rows, place in zip(edit.rows, self.places, strict=True):
            found = _with_rows(found, rows, place, len(self.classnames), unit=edit.normalize)
        assert found is not None  # there are texts or rows
        return found


def prepare_classes(
    clip: FrozenClip,
    edit: Edit,
    classnames: Sequence[str],
    *,
    precision: torch.dtype = torch.float32,
    backend: str | None = None,
) -> ClassFeatures:
    """Make a function for the class features of edits of the form of ``edit``: the same texts and names, any tensors.

    Work that does not depend on the tensors is done once: tokenising and packing the texts. The text tower also runs
    once only, for all calls, if the edit has templates, or if the calls pass the same :class:`Context` object that
    ``edit`` holds (the frozen base of a stack).

    Args:
        clip: the frozen CLIP.
        edit: one edit of the form.
        classnames: C names.
        precision: precision of the text tower.
        backend: "torch" runs the text tower with plain autograd, differentiable any number of times; None runs the
            fused text tower, differentiable once.

    Raises:
        ValueError: class names, texts and rows do not fit together, or the edit does not fit the CLIP.

    Example:
        >>> import mergetune as mt
        >>> from mergetune.clip import Edit, prepare_classes
        >>> clip = mt.load_clip("icon-clip")
        >>> edit = Edit(templates=("an icon of a {}",))
        >>> prepare_classes(clip, edit, ["cat", "dog"])(edit).shape  # [M, C, D]
        torch.Size([1, 2, 128])
    """
    names = check_classnames(classnames)
    check_edit(clip, edit)
    encoder = None
    if edit.touches("text"):
        texts = _from_edited_tower(clip, edit, names, precision)
    else:
        if edit.context is not None:
            encoder = context_encoder(clip, edit.context, names, precision=precision)
            encoder = replace(encoder, backend=backend)
        texts = _prepare_texts(clip, edit, names, encoder, precision)
    if texts is None:
        _check_all_have_rows(edit, names)
    return ClassFeatures(names, texts, tuple(_places(rows, names) for rows in edit.rows), encoder)


# -- texts -------------------------------------------------------------------------------------------------------------


def _prepare_texts(
    clip: FrozenClip, edit: Edit, names: tuple[str, ...], encoder: TextEncoder | None, precision: torch.dtype
) -> Callable[[Edit], Tensor] | None:
    """Function for the class features before any rows; None if the edit has no texts."""
    if encoder is None:
        if not edit.templates:
            return None
        embeddings = clip.class_embeddings(names, edit.templates)[None]
        return lambda edit: embeddings
    first, known = edit.context, []
    assert first is not None  # it has an encoder

    def from_context(edit: Edit) -> Tensor:
        context = edit.context
        assert context is not None  # every edit of this form has a context
        if context is not first or context.vectors.requires_grad:
            return encoder(context.vectors)
        if not known:  # the frozen base of a stack runs once, so it is not rounded to a half type
            exact = context_encoder(
                clip, first, names, precision=precision if precision.itemsize > 4 else torch.float32
            )
            with torch.no_grad():
                known.append(exact(context.vectors))
        return known[0]

    return from_context


def _from_edited_tower(
    clip: FrozenClip, edit: Edit, names: tuple[str, ...], precision: torch.dtype
) -> Callable[[Edit], Tensor] | None:
    """Like :func:`_prepare_texts`, for an edit that changes the text tower. Templates are averaged in the same way."""
    tower = edited_text_tower(clip, edit, precision=precision)
    if edit.context is not None:
        return tower.prepare(*context_texts(clip, edit.context, names))
    if not edit.templates:
        return None
    texts = [clip.tokenize([fill(template, name) for name in names]) for template in edit.templates]
    features = [tower.prepare(tokens) for tokens in texts]
    return lambda edit: F.normalize(
        torch.stack([F.normalize(encode(edit), dim=-1) for encode in features]).mean(0), dim=-1
    )


def context_encoder(
    clip: FrozenClip, context: Context, classnames: Sequence[str], *, precision: torch.dtype = torch.float32
) -> TextEncoder:
    """Function of context vectors that returns class features, [M, C, D] float32, not normalised.

    Args:
        clip: the frozen CLIP.
        context: gives the text and the number of context vectors; the values of ``vectors`` are not used.
        classnames: C names.
        precision: precision of the text tower.
    """
    tokens, places = context_texts(clip, context, classnames)
    text, where = clip.text_as(precision), {"first": clip.first_token, "context": context.vectors.shape[-2]}
    places = None if context.position == "end" else places
    return text_encoder(text, tokens, places=places, shared=context.classnames is None, **where)


def context_texts(clip: FrozenClip, context: Context, classnames: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokenise the texts of a soft prompt, with placeholder tokens for the context vectors.

    Returns:
        Token ids, [C, L], and the positions of the context vectors in each text, ascending, [C, n].

    Raises:
        ValueError: the template does not have one token per context vector; the class names are not those of the
            context.
    """
    if context.classnames is not None:
        check_same_classes("classnames", classnames, context.classnames)
    template, first, count = context.template, clip.first_token, context.vectors.shape[-2]
    words = words_before_name(clip, template)
    if len(words) != count and set(template.split("{}")[0].split()) == {"X"}:
        template = template.replace("X", "a", count)  # some tokenizers split "X" into two tokens, "a" is always one
        words = words_before_name(clip, template)
    tokens = clip.tokenize([fill(template, name) for name in classnames])
    if len(words) != count or (tokens[:, first : first + count] != words).any():
        raise ValueError(
            f"template must hold {count} tokens before {{}}, one for each context vector, got {context.template!r}"
        )
    if context.position != "end":
        ends = _name_ends(clip, template, classnames)
        return arrange(tokens, ends, first=first, context=count, position=context.position)
    return tokens, torch.arange(first, first + count, device=tokens.device).expand(len(tokens), -1)


def words_before_name(clip: FrozenClip, template: str) -> Tensor:
    """Token ids of the words before the class name in a template, without a start token."""
    # The words end where a text without a name and two texts with different names first differ. Two names alone could
    # start with the same token, such as the "▁" of sentencepiece.
    tokens = clip.tokenize([template.split("{}")[0], fill(template, "cat"), fill(template, "dog")])
    return tokens[0, clip.first_token : int((tokens != tokens[0]).any(0).int().argmax())]


def _name_ends(clip: FrozenClip, template: str, classnames: Sequence[str]) -> Tensor:
    """Position of the first token after the class name in the text of each class, [C]."""
    texts = [template.split("{}")[0] + name for name in classnames]
    room = 2 * clip.context_length  # the added word may not fit into the context length
    alone, followed = (clip.tokenizer([text + more for text in texts], context_length=room) for more in ("", " x"))
    return (alone != followed).int().argmax(1).to(clip.device)


# -- rows --------------------------------------------------------------------------------------------------------------


def _places(rows: ClassRows, names: tuple[str, ...]) -> tuple[list[int], list[int]] | None:
    """Indices of the classes that have a row, and of their rows; None if the rows are the classes, in order.

    If two rows have the same name, the first one is taken (None takes both).
    """
    if rows.classnames == names:
        return None
    row = {name: i for i, name in reversed(list(enumerate(rows.classnames)))}
    classes = [c for c, name in enumerate(names) if name in row]
    return classes, [row[names[c]] for c in classes]


def _check_all_have_rows(edit: Edit, names: tuple[str, ...]) -> None:
    """Raise ValueError for a class without a row, in an edit without texts."""
    if not any(not rows.added for rows in edit.rows):
        raise ValueError(
            "class embeddings must come from a prompt, templates or a head, got a solution that only changes them: "
            "put the solution on one of these with mergetune.Stack(base, solution)"
        )
    known = {name for rows in edit.rows if not rows.added for name in rows.classnames}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"classnames must be among the head's {len(known)} classes, got {unknown[0]!r}")


def _with_rows(
    found: Tensor | None, rows: ClassRows, places: tuple[list[int], list[int]] | None, classes: int, *, unit: bool
) -> Tensor:
    """Class features in which these rows replace the class embeddings or are added to them."""
    values = rows.values
    if places is not None:
        values = values[:, places[1]]
    if not rows.added:
        if places is None or len(places[0]) == classes:
            return values
        if found is None:  # a later entry of rows has the other classes
            found = values.new_zeros(len(values), classes, values.shape[-1])
        found, values = _same_width(found, values)
        return _spread(found, values).index_copy(1, _index(places[0], values), _spread(values, found))
    assert found is not None  # checked: there are rows that are not added
    found = F.normalize(found, dim=-1) if unit else found
    found, values = _same_width(found, values)
    if places is None:
        return found + values
    return _spread(found, values).index_add(1, _index(places[0], values), _spread(values, found))


def _spread(a: Tensor, b: Tensor) -> Tensor:
    """``a`` expanded to the number of settings of ``b``, if ``a`` has one setting."""
    return a.expand(max(len(a), len(b)), -1, -1)


def _index(classes: list[int], like: Tensor) -> Tensor:
    return torch.tensor(classes, dtype=torch.int64, device=like.device)


def _same_width(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, padded with a zero bias column if only one of them has a bias."""
    if abs(a.shape[-1] - b.shape[-1]) > 1:
        raise ValueError(f"class rows must have the embedding's width {a.shape[-1]}, got {b.shape[-1]}")
    width = max(a.shape[-1], b.shape[-1])
    return F.pad(a, (0, width - a.shape[-1])), F.pad(b, (0, width - b.shape[-1]))
