"""Embedded tokens in a checkpoint of CoOp: they tell the backbone of a prompt, and the class of each of its rows.

CoOp saves the embedded texts of its classes beside the context vectors: ``token_prefix`` holds the start token,
``token_suffix`` the tokens of the class names. A prompt keeps a few numbers of both in its notes until it meets a CLIP.

Shapes: C classes, n context vectors, L tokens of a text behind the context vectors, W width of the text tower.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergetune.clip import FrozenClip, fill

START, NAMES = "start_token", "class_tokens"
"""Notes: numbers of the embedded start token, and of the embedded class name of each row of the context vectors."""
KEPT = 16  # numbers of the start token's embedding that are kept
SKETCHED = 8  # columns of the embedding in which class names are compared
SAME_START = 0.02  # most relative difference; bfloat16 makes 0.004, another backbone about 1.4
SAME_NAME = 0.01  # most relative difference; bfloat16 makes 0.003, another last word of nine about 0.04


class OtherClasses(ValueError):
    """Class names are not those of a file, or in another order."""


def token_notes(start: Tensor | None, suffix: Tensor | None) -> dict[str, str]:
    """Notes about the embedded tokens of a checkpoint.

    Args:
        start: embedding of the start token, [W], or None.
        suffix: embedded class names and what follows, [C, L, W]; None for shared context vectors.
    """
    notes = {} if start is None else {START: _encoded(start[:KEPT])}
    return notes if suffix is None else notes | {NAMES: _encoded(_sketch(suffix))}


def check_same_tokens(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Check that what is known of the files of two prompts lets their context vectors be mixed.

    Raises:
        ValueError: the files were made with different backbones, or their class-specific rows may have other orders.
    """
    mine, theirs = (_decoded(_note(notes, START)) for notes in (a, b))
    if mine is not None and theirs is not None and _far(mine, theirs, SAME_START):
        files = " and ".join(str(notes.get("checkpoint", "a merged prompt")) for notes in (a, b))
        raise ValueError(
            f"prompts must be of one backbone, got {files}, whose start tokens have different embeddings: take "
            "checkpoints of one backbone"
        )
    mine, theirs = (_decoded(_note(notes, NAMES)) for notes in (a, b))
    if (mine is not None or theirs is not None) and _far(mine, theirs, SAME_NAME):
        raise OtherClasses(
            "classnames of both prompts must be in one order, got a checkpoint whose order the CLIP alone can tell: "
            "take solution.for_clip(clip); on the command line give --backbone"
        )


def _far(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    return a is None or b is None or a.shape != b.shape or bool((a - b).norm() > tolerance * b.norm())


def _note(notes: Mapping[str, Any], key: str) -> Any:
    """A note of a prompt; that of a merged prompt stands in the notes of its experts."""
    experts = notes.get("experts")
    inside = [expert for expert in experts if isinstance(expert, Mapping)] if isinstance(experts, list) else []
    return next((found[key] for found in (notes, *inside) if key in found), None)


def has_other_start(clip: FrozenClip, notes: Mapping[str, Any]) -> bool:
    """Whether the start token of a prompt's file has another embedding than that of a CLIP. False if unknown."""
    stored = _decoded(_note(notes, START))
    if stored is None or clip.first_token != 1:  # SigLIP has no start token
        return False
    table = clip.text.token_embedding.weight
    here = table[clip.tokenize(["X"])[0, 0]].detach().float().cpu()[:KEPT]
    return _far(stored, here, SAME_START)


def rows_of_names(
    clip: FrozenClip, names: Sequence[str], template: str, n_ctx: int, notes: Mapping[str, Any]
) -> list[int] | None:
    """The row of the file that belongs to each class name, or None if the file does not tell.

    A name that the file does not have keeps its place if all other names are at theirs, or takes the only row that is
    left.

    Raises:
        OtherClasses: no name is one of the file, or it is unclear which rows belong to some of the names.
    """
    stored = _decoded(_note(notes, NAMES))
    if stored is None or len(stored) != SKETCHED * len(names) or clip.first_token != 1:
        return None
    stored = stored.view(len(names), SKETCHED)
    tokens = clip.tokenize([fill(template, name.replace("_", " ")) for name in names])[:, 1 + n_ctx :]
    here = torch.cat([_sketch(clip.text.token_embedding.weight[part]) for part in tokens.split(256)])
    file = notes.get("checkpoint", "the file")
    far = torch.cdist(here, stored) / here.norm(dim=1, keepdim=True)
    rows, left = _assigned(far)
    lost = [name for name, row in zip(names, rows, strict=True) if row is None]
    if len(lost) == len(names):
        raise OtherClasses(
            f"classnames must be those that {file} was trained with, got none of them ({_few(names)}): give the names "
            "of its training run, in any order"
        )
    if all(row in (None, place) for place, row in enumerate(rows)):
        return list(range(len(names)))
    if len(lost) > 1:
        raise OtherClasses(
            f"classnames must be those that {file} was trained with, because their order is another one, got other "
            f"names: {_few(lost)}"
        )
    return [left[0] if row is None else row for row in rows]


def _assigned(far: Tensor) -> tuple[list[int | None], list[int]]:
    """For each name the nearest row within the tolerance, each row once, and the rows that are left.

    Names that occur twice are alike: each keeps its place if it fits there.
    """
    fits, left = far <= SAME_NAME, dict.fromkeys(range(len(far)))
    rows: list[int | None] = [None] * len(far)
    near = (far <= far.min(1, keepdim=True).values + 1e-6) & fits
    for in_place in (True, False):
        for name in range(len(far)):
            if rows[name] is None and (not in_place or near[name, name]):
                row = name if in_place else next((r for r in near[name].nonzero()[:, 0].tolist() if r in left), None)
                if row is not None:
                    rows[name] = row
                    del left[row]
    return rows, list(left)


def _sketch(suffix: Tensor) -> Tensor:
    """A few numbers per text, [C, SKETCHED] float32: sums over the tokens in which the first weigh most."""
    weights = 1 / torch.arange(1, suffix.shape[1] + 1, dtype=torch.float32)
    return torch.einsum("l,clk->ck", weights, suffix.detach()[..., :SKETCHED].float().cpu())


def _few(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:5]) + (", ..." if len(names) > 5 else "")


def _encoded(numbers: Tensor) -> str:
    return base64.b64encode(numbers.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def _decoded(note: Any) -> Tensor | None:
    """The numbers of a note, flat; None for anything else."""
    if not isinstance(note, str):
        return None
    try:
        numbers = torch.frombuffer(bytearray(base64.b64decode(note, validate=True)), dtype=torch.float32)
    except (ValueError, RuntimeError, binascii.Error):
        return None
    return numbers if numbers.isfinite().all() else None
