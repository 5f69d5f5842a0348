"""Solutions in other projects' formats: a plain linear head, open_clip's classifier, a folder for the Hub.

Shapes: C classes, D embedding width.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCardData
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.clip import FrozenClip
from mergetune.io import write_atomically
from mergetune.solutions.base import Solution
from mergetune.solutions.head import Head
from mergetune.solutions.space import image_features, span

HEAD_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


def to_head(
    solution: Solution,
    file: str | Path,
    *,
    clip: FrozenClip | None = None,
    classnames: Sequence[str] | None = None,
    fold_scale: bool = False,
) -> Head:
    """Write a plain linear head: ``weight`` [C, D], ``bias`` [C] if there is one, ``classnames`` and ``scale``.

    Its logits are ``scale * (x @ weight.T + bias)`` on unit-norm image features. In .npz and .pt all are entries beside
    each other; in .safetensors names and scale are JSON in the metadata. ``Head.from_checkpoint`` reads each back.

    Args:
        solution: a head, or a prompt, whose class embeddings become the weight.
        file: .safetensors, .npz, .pt or .pth.
        clip: the CLIP that it was made for; for a prompt only.
        classnames: of a prompt that has none of its own; a head is written whole.
        fold_scale: let weight and bias take up the scale, which is 1 then: ``logits = x @ weight.T + bias``.

    Returns:
        The head that was written.
    """
    file = Path(file)
    if file.suffix not in HEAD_SUFFIXES:
        raise ValueError(f"file must end in {', '.join(HEAD_SUFFIXES)}, got {file.name!r}")
    head = _as_head(solution, clip, classnames)
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
    write_atomically(file, content)
    return head


def zero_shot_classifier(
    solution: Solution, clip: FrozenClip, classnames: Sequence[str] | None = None, *, file: str | Path | None = None
) -> Tensor:
    """What ``open_clip.build_zero_shot_classifier`` returns, [D, C].

    ``clip.logit_scale * image_features @ classifier`` are the solution's logits. A prompt's columns have unit norm; a
    head's have the norm that keeps its logits.

    Args:
        solution: a prompt, or a head without bias.
        clip: the CLIP that it was made for.
        classnames: C names; the solution's own if None.
        file: also saved here with ``torch.save``, if given.

    Raises:
        ValueError: a head with a bias, for which such a classifier has no place.
    """
    head = _as_head(solution, clip, classnames, whole=False).rescaled(clip.logit_scale)
    if head.bias is not None:
        raise ValueError("solution must be a prompt or a head without bias, got a head with one: use to_head")
    classifier = head.weight.to(clip.device).T
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(file), torch_bytes(plain_tensor(classifier)))
    return classifier


def to_hub(
    solution: Solution, folder: str | Path, *, license: str | None = None, repo_id: str = "name/repository"
) -> None:
    """Write a folder for the Hugging Face Hub: weights as safetensors, JSON, and a model card with YAML front matter.

    ``mergetune.load_solution`` reads it, here or downloaded.

    Args:
        solution: what to write.
        folder: made if missing; a README.md in it is replaced.
        license: the card's, as the Hub spells it: "mit".
        repo_id: where it will be, for the card's example.
    """
    folder = Path(folder)
    solution.save(folder)
    write_atomically(folder / "README.md", _card(solution, license, repo_id).encode())


def push_to_hub(
    solution: Solution,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload with mergetune",
) -> str:
    """Upload what :func:`to_hub` writes to the Hugging Face Hub; the repository is made if it is not there.

    Args:
        solution: what to upload.
        repo_id: "name/repository".
        private: of a new repository; None is the account's default.
        token: of the Hub; None is the one that ``hf auth login`` keeps.
        license: see :func:`to_hub`.
        commit_message: of the upload.

    Returns:
        The repository's URL.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        to_hub(solution, folder, license=license, repo_id=repo_id)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(url)


def classnames_of(solution: Solution, classnames: Sequence[str] | None) -> tuple[str, ...]:
    names = solution.classnames if classnames is None else classnames
    if names is None:
        raise ValueError("classnames must be given for a prompt that is shared by all classes")
    return tuple(names)


def _as_head(
    solution: Solution, clip: FrozenClip | None, classnames: Sequence[str] | None, *, whole: bool = True
) -> Head:
    """A solution's classifier as a plain linear head.

    Args:
        solution: of any kind that leaves image features as they are.
        clip: the CLIP that it was made for; only a linear head needs none.
        classnames: of a solution without classes of its own, or some of its classes unless ``whole``.
        whole: refuse to leave out classes of the solution's own.
    """
    own = solution.classnames
    if whole and own is not None and classnames is not None and tuple(classnames) != own:
        raise ValueError(f"classnames must be the {solution.kind}'s own {len(own)}, or None")
    plain = solution.plain_head()
    if plain is not None and (whole or classnames is None):
        return plain
    if clip is None:
        raise ValueError(f"clip must be given for a {solution.kind}: it makes the class embeddings")
    names = classnames_of(solution, classnames)
    if solution.image_input != "feature" or image_features(clip, solution) is not None:
        raise ValueError(
            f"solution must take image features as the CLIP gives them, got a {solution.kind} that changes them: save "
            "it with solution.save, and classify with mergetune"
        )
    at = span(clip, [solution], names)
    weights = at.space.unit(at.ends["classes"])[0]
    bias = weights[:, -1].contiguous() if weights.shape[1] > clip.embed_dim else None
    return Head(weights[:, : clip.embed_dim].contiguous(), names, bias, logit_scale=at.space.scale)


def plain_tensor(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def torch_bytes(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _card(solution: Solution, license: str | None, repo_id: str) -> str:
    """The model card: what it is, what it belongs to, how it is loaded."""
    backbone = solution.backbone or ""
    complete = backbone.startswith(("hf-hub:", "local-dir:"))
    name, _, pretrained = backbone.partition("/")
    arguments = f"{backbone!r}" if complete else f"{name!r}, pretrained={pretrained!r}" if backbone else "..."
    title, tag, what = solution.card()
    data = ModelCardData(
        library_name="mergetune",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "open_clip", "mergetune", tag],
        license=license,
        base_model=backbone.removeprefix("hf-hub:") if backbone.startswith("hf-hub:") else None,
    )
    classes = solution.classnames or ()
    names = "solution.classnames" if classes else '["cat", "dog"]'
    listed = f"\nClasses: {', '.join(classes[:100])}{', ...' if len(classes) > 100 else ''}\n" if classes else ""
    return f"""---
{data.to_yaml().strip()}
---

# {title}

{what} Made for {backbone or "an unrecorded CLIP"} with mergetune ([arXiv 2601.10497](https://arxiv.org/abs/2601.10497)).

```python
import mergetune as mt
from huggingface_hub import snapshot_download

solution = mt.load_solution(snapshot_download({repo_id!r}))
clip = mt.load_clip({arguments})
weights = solution.class_embeddings(clip, {names})  # [C, D], unit norm
```
{listed}"""
