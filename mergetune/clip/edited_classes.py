"""Class features of an edited CLIP: from templates, from a soft prompt, from class rows.

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


@dataclass(frozen=True, eq=False)
class ClassFeatures:
    """Class features of edits of one form, for fixed class names. Make one with :func:`prepare_classes`.

    Attributes:
        classnames: C names.
        texts: an edit -> its class features before any rows; None where classes have no texts.
        places: for each part of ``rows``: which classes have a row, and which rows these are; None where the rows are
            the classes, in their order.
        encoder: the packed text tower, where every call runs it.
    """

    classnames: tuple[str, ...]
    texts: Callable[[Edit], Tensor] | None
    places: tuple[tuple[list[int], list[int]] | None, ...]
    encoder: TextEncoder | None

    def __call__(self, edit: Edit) -> Tensor:
        """Class features [M, C, D], or [M, C, D + 1] with a bias, float32, not normalised."""
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
    """A function for the class features of edits that have the form of ``edit``: same texts, same names, other tensors.

    What does not depend on the tensors is done once: the texts are tokenised and packed, and where an edit holds the
    very :class:`Context` object that ``edit`` holds, or templates, the text tower is run once for all calls.

    Args:
        clip: the frozen CLIP.
        edit: an edit of the form.
        classnames: C names.
        precision: of the text tower.
        backend: "torch": plain autograd in the text tower, differentiable any number of times.

    Raises:
        ValueError: class names, texts or rows that do not fit together, or to the CLIP.
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
        texts = _prepare_texts(clip, edit, names, encoder)
    if texts is None:
        _check_all_have_rows(edit, names)
    return ClassFeatures(names, texts, tuple(_places(rows, names) for rows in edit.rows), encoder)


# -- texts -------------------------------------------------------------------------------------------------------------


def _prepare_texts(
    clip: FrozenClip, edit: Edit, names: tuple[str, ...], encoder: TextEncoder | None
) -> Callable[[Edit], Tensor] | None:
    """A function for the class features before any rows; None where the edit has no texts."""
    if encoder is None:
        if not edit.templates:
            return None
        embeddings = clip.class_embeddings(names, edit.templates)[None]
        return lambda edit: embeddings
    first, known = edit.context, []

    def from_context(edit: Edit) -> Tensor:
        context = edit.context
        assert context is not None  # the form has one
        if context is not first or context.vectors.requires_grad:
            return encoder(context.vectors)
        if not known:  # the part of a stack that is not trained
            with torch.no_grad():
                known.append(encoder(context.vectors))
        return known[0]

    return from_context


def _from_edited_tower(
    clip: FrozenClip, edit: Edit, names: tuple[str, ...], precision: torch.dtype
) -> Callable[[Edit], Tensor] | None:
    """Of an edited text tower. Class embeddings from templates are what :meth:`FrozenClip.class_embeddings` gives."""
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
    """The text tower packed for these classes: context vectors -> class features, [M, C, D] float32, not normalised.

    Args:
        clip: the frozen CLIP.
        context: its ``vectors`` say only how many they are.
        classnames: C names.
        precision: of the text tower.
    """
    tokens, places = context_texts(clip, context, classnames)
    text, where = clip.text_as(precision), {"first": clip.first_token, "context": context.vectors.shape[-2]}
    places = None if context.position == "end" else places
    return text_encoder(text, tokens, places=places, shared=context.classnames is None, **where)


def context_texts(clip: FrozenClip, context: Context, classnames: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The texts of a soft prompt, with stand-ins where its context vectors go.

    Returns:
        Token ids, [C, L], and the places of the context vectors in each text, ascending, [C, n].

    Raises:
        ValueError: a template without one token for each context vector; class names that are not the context's.
    """
    if context.classnames is not None:
        check_same_classes("classnames", classnames, context.classnames)
    template, first, count = context.template, clip.first_token, context.vectors.shape[-2]
    words = words_before_name(clip, template)
    if len(words) != count and set(template.split("{}")[0].split()) == {"X"}:
        template = template.replace("X", "a", count)  # "X" is two tokens for some tokenizers, "a" is one
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
    """Token ids of a template before its class name."""
    # With no name and with two names: two words may begin alike, as a sentencepiece "▁" before each.
    tokens = clip.tokenize([template.split("{}")[0], fill(template, "cat"), fill(template, "dog")])
    return tokens[0, clip.first_token : int((tokens != tokens[0]).any(0).int().argmax())]


def _name_ends(clip: FrozenClip, template: str, classnames: Sequence[str]) -> Tensor:
    """Where each class name ends in the template's texts: the position of the first token behind it, [C]."""
    texts = [template.split("{}")[0] + name for name in classnames]
    room = 2 * clip.context_length  # the texts themselves fit; a further word need not
    alone, followed = (clip.tokenizer([text + more for text in texts], context_length=room) for more in ("", " x"))
    return (alone != followed).int().argmax(1).to(clip.device)


# -- rows --------------------------------------------------------------------------------------------------------------


def _places(rows: ClassRows, names: tuple[str, ...]) -> tuple[list[int], list[int]] | None:
    """Which classes have a row, and which rows these are; None where the rows are the classes, in their order.

    Of two rows with one name the first is taken, unless the rows are asked for as they are.
    """
    if rows.classnames == names:
        return None
    row = {name: i for i, name in reversed(list(enumerate(rows.classnames)))}
    classes = [c for c, name in enumerate(names) if name in row]
    return classes, [row[names[c]] for c in classes]


def _check_all_have_rows(edit: Edit, names: tuple[str, ...]) -> None:
    """Refuse classes that have neither a text nor a row."""
    if not any(not rows.added for rows in edit.rows):
        raise ValueError(
            "class embeddings must come from a prompt, templates or a head, got a solution that only changes them: "
            "put it on one with mergetune.Stack(base, solution)"
        )
    known = {name for rows in edit.rows if not rows.added for name in rows.classnames}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"classnames must be among the head's {len(known)} classes, got {unknown[0]!r}")


def _with_rows(
    found: Tensor | None, rows: ClassRows, places: tuple[list[int], list[int]] | None, classes: int, *, unit: bool
) -> Tensor:
    """Class features with these rows in them, or added to them."""
    values = rows.values
    if places is not None:
        values = values[:, places[1]]
    if not rows.added:
        if places is None or len(places[0]) == classes:
            return values
        if found is None:  # a later part has the others
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
    """``a`` with as many settings as ``b``, if it has one for all."""
    return a.expand(max(len(a), len(b)), -1, -1)


def _index(classes: list[int], like: Tensor) -> Tensor:
    return torch.tensor(classes, dtype=torch.int64, device=like.device)


def _same_width(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with a column for the bias, if one of them has it."""
    if abs(a.shape[-1] - b.shape[-1]) > 1:
        raise ValueError(f"class rows must have the embedding's width {a.shape[-1]}, got {b.shape[-1]}")
    width = max(a.shape[-1], b.shape[-1])
    return F.pad(a, (0, width - a.shape[-1])), F.pad(b, (0, width - b.shape[-1]))
