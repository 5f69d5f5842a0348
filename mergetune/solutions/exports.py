"""Exports to formats of other projects: a plain linear head and open_clip's classifier.

Shapes: C classes, D embedding width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.io import write_atomically, writing_to
from mergetune.solutions.base import Solution
from mergetune.solutions.head import Head
from mergetune.solutions.kinds import given_names, known_classes
from mergetune.solutions.published import public_backbone
from mergetune.solutions.sidecars import with_description, write_sidecar
from mergetune.solutions.space import image_features, span
from mergetune.solutions.temperatures import temperature_of
from mergetune.solutions.written_files import checked_suffix, plain_tensor, torch_bytes

HEAD_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
CLASSIFIER_SUFFIXES = (".pt", ".pth")


def to_head(
    solution: Solution,
    file: str | Path,
    *,
    clip: FrozenClip | None = None,
    classnames: Sequence[str] | None = None,
    fold_scale: bool = False,
) -> Head:
    """Write a solution as a plain linear head: ``weight`` [C, D], ``bias`` [C] if any, ``classnames`` and ``scale``.

    The logits of unit-norm image features x are ``scale * (x @ weight.T + bias)``; the scale is divided by the
    temperature of the solution, if it has one. A .npz, .pt or .pth file holds the
    four as entries; a .safetensors file holds class names and scale as JSON in its metadata.
    ``Head.from_checkpoint`` reads all of them.

    Args:
        solution: a head, or another solution that leaves image features unchanged: its class embeddings become the
            weight.
        file: path that ends in .safetensors, .npz, .pt or .pth.
        clip: the CLIP that the solution was made for; a plain head needs none.
        classnames: C names, for a solution that serves any classes. All classes of a head are written.
        fold_scale: multiply weight and bias by the scale and write scale 1: ``logits = x @ weight.T + bias``.

    Returns:
        The head that was written.

    Raises:
        ValueError: another file ending; ``clip`` or ``classnames`` is missing; the solution changes image features.

    Example:
        >>> import mergetune as mt, os, tempfile
        >>> clip = mt.load_clip("icon-clip")
        >>> prompt = mt.Prompt.from_template(clip, "a photo of a {}.")
        >>> file = os.path.join(tempfile.mkdtemp(), "head.safetensors")
        >>> head = mt.to_head(prompt, file, clip=clip, classnames=["cat", "dog"])
        >>> head.weight.shape, mt.Head.from_checkpoint(file).classnames
        (torch.Size([2, 128]), ('cat', 'dog'))
    """
    file = checked_suffix(file, HEAD_SUFFIXES)
    head = as_head(solution, clip, classnames)
    notes = {
        name: value for name, value in head.notes.items() if name != "temperature"
    }  # part of the scale from here on
    head = replace(head, logit_scale=head.logit_scale / temperature_of(solution), notes=notes)
    head = head.rescaled(1.0) if fold_scale else head
    tensors = {"weight": plain_tensor(head.weight)} | ({} if head.bias is None else {"bias": plain_tensor(head.bias)})
    extras = {"classnames": list(head.classnames), "scale": head.logit_scale}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        content = serialize(tensors, metadata={name: json.dumps(value) for name, value in extras.items()})
    elif file.suffix == ".npz":
        stream = io.BytesIO()
        np.savez(stream, **{name: tensor.numpy() for name, tensor in tensors.items()}, **extras)
        content = stream.getvalue()
    else:
        content = torch_bytes({**tensors, **extras})
    with writing_to(file):
        write_atomically(file, content)
    return head


def zero_shot_classifier(
    solution: Solution, clip: FrozenClip, classnames: Sequence[str] | None = None, *, file: str | Path | None = None
) -> Tensor:
    """A classifier matrix [D, C] in the format of ``open_clip.build_zero_shot_classifier``.

    ``clip.logit_scale * image_features @ classifier`` gives the logits of the solution. The columns of a prompt have
    unit norm; the columns of a head have the norms that keep its logits. The matrix names no classes: with ``file``,
    the archive that torch.save writes also holds the class names, and the scale, which is divided by the temperature of
    the solution, and so does a second file ``FILE.mergetune.json``. ``mergetune.open_solution`` reads the file as a
    head; open_clip and torch see the matrix alone.

    Args:
        solution: a solution that leaves image features unchanged: a prompt, a head without bias, a residual on one.
        clip: the CLIP that the solution was made for.
        classnames: C names; None takes the classes of the solution.
        file: path that ends in .pt or .pth, to which the matrix is also saved with ``torch.save``.

    Raises:
        ValueError: a head with a bias, which this format cannot hold; a solution that changes image features; another
            file ending.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip("icon-clip")
        >>> mt.zero_shot_classifier(mt.Templates(("an icon of a {}",)), clip, ["cat", "dog"]).shape  # [D, C]
        torch.Size([128, 2])
    """
    file = None if file is None else checked_suffix(file, CLASSIFIER_SUFFIXES)
    head = as_head(solution, clip, classnames, whole=False).rescaled(clip.logit_scale)
    if head.bias is not None:
        raise ValueError("solution must be a prompt or a head without bias, got a head with a bias: use to_head")
    classifier = head.weight.to(clip.device).T
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = dict(
            form="classifier",
            classnames=head.classnames,
            logit_scale=clip.logit_scale / temperature_of(solution),
            backbone=public_backbone(clip.name),
            fingerprint=clip.image_fingerprint,
        )
        content = with_description(torch_bytes(plain_tensor(classifier)), **about)
        with writing_to(file):
            write_atomically(file, content)
            write_sidecar(file, content, **about)
    return classifier


def classnames_of(solution: Solution, classnames: Sequence[str] | None) -> tuple[str, ...]:
    """The given class names, or those of the solution, or those that it was trained on."""
    if classnames is not None:
        return given_names(solution, classnames)
    names = known_classes(solution)
    if names is None:
        raise ValueError(f"classnames must be given for a {solution.kind} that serves any classes, got None")
    return tuple(names)


def as_head(
    solution: Solution, clip: FrozenClip | None, classnames: Sequence[str] | None, *, whole: bool = True
) -> Head:
    """The classifier of a solution as a plain linear head.

    Args:
        solution: a solution of any kind that leaves image features unchanged.
        clip: the CLIP that the solution was made for; None is enough for a plain head.
        classnames: C names; None takes the classes of the solution.
        whole: whether ``classnames`` must be all classes of a solution that has classes.
    """
    own = solution.classnames
    if classnames is not None:
        given_names(solution, classnames)
    if whole and own is not None and classnames is not None and tuple(classnames) != own:
        raise ValueError(
            f"classnames must be the {len(own)} classes of the {solution.kind} or None, got {len(classnames)} names"
        )
    plain = solution.plain_head()
    if plain is not None and (whole or classnames is None):
        return plain
    if clip is None:
        raise ValueError(f"clip must be given for a {solution.kind}, whose class embeddings it computes, got None")
    if solution.image_input != "feature" or image_features(clip, solution) is not None:
        raise ValueError(
            f"solution must leave image features unchanged, got a {solution.kind} that changes them: save the "
            "solution with solution.save, or export it with to_onnx or to_torch_export"
        )
    names = classnames_of(solution, classnames)
    if whole:
        solution.check_classes(names)
    at = span(clip, [solution], names)
    weights = at.space.unit(at.ends["classes"])[0]
    bias = weights[:, -1].contiguous() if weights.shape[1] > clip.embed_dim else None
    return Head(weights[:, : clip.embed_dim].contiguous(), names, bias, logit_scale=at.space.scale)
