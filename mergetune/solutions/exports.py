"""Exports to formats of other projects: a plain linear head, open_clip's classifier, a folder for the Hub.

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
from mergetune.io import not_reached, quiet_retries, unreachable, write_atomically
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
    """Write a solution as a plain linear head: ``weight`` [C, D], ``bias`` [C] if any, ``classnames`` and ``scale``.

    The logits of unit-norm image features x are ``scale * (x @ weight.T + bias)``. A .npz, .pt or .pth file holds the
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
        >>> clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
        >>> prompt = mt.Prompt.from_template(clip, "a photo of a {}.")
        >>> file = os.path.join(tempfile.mkdtemp(), "head.safetensors")
        >>> head = mt.to_head(prompt, file, clip=clip, classnames=["cat", "dog"])
        >>> head.weight.shape, mt.Head.from_checkpoint(file).classnames
        (torch.Size([2, 128]), ('cat', 'dog'))
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
    """A classifier matrix [D, C] in the format of ``open_clip.build_zero_shot_classifier``.

    ``clip.logit_scale * image_features @ classifier`` gives the logits of the solution. The columns of a prompt have
    unit norm; the columns of a head have the norms that keep its logits.

    Args:
        solution: a solution that leaves image features unchanged: a prompt, a head without bias, a residual on one.
        clip: the CLIP that the solution was made for.
        classnames: C names; None takes the classes of the solution.
        file: path to which the matrix is also saved with ``torch.save``.

    Raises:
        ValueError: a head with a bias, which this format cannot hold, or a solution that changes image features.

    Example:
        >>> import mergetune as mt
        >>> clip = mt.load_clip(f"local-dir:{mt.__path__[0]}/assets/icon-clip")
        >>> mt.zero_shot_classifier(mt.Templates(("an icon of a {}",)), clip, ["cat", "dog"]).shape  # [D, C]
        torch.Size([128, 2])
    """
    head = _as_head(solution, clip, classnames, whole=False).rescaled(clip.logit_scale)
    if head.bias is not None:
        raise ValueError("solution must be a prompt or a head without bias, got a head with a bias: use to_head")
    classifier = head.weight.to(clip.device).T
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(file), torch_bytes(plain_tensor(classifier)))
    return classifier


def to_hub(
    solution: Solution, folder: str | Path, *, license: str | None = None, repo_id: str = "name/repository"
) -> None:
    """Write a folder for the Hugging Face Hub: the saved solution and a model card, README.md with YAML metadata.

    ``mergetune.load_solution`` reads the folder, also after a download from the Hub.

    Args:
        solution: the solution to write.
        folder: created if it does not exist; its README.md is replaced.
        license: license in the card's metadata, as the Hub spells it, for example "mit".
        repo_id: future repository, "name/repository", for the code example in the card.

    Example:
        >>> import mergetune as mt, os, tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> mt.to_hub(mt.Head(torch.eye(2), ("cat", "dog")), folder, license="mit")
        >>> sorted(os.listdir(folder))
        ['README.md', 'solution.json', 'solution.safetensors']
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
    """Upload the folder of :func:`to_hub` to the Hugging Face Hub. The repository is created if it does not exist.

    Args:
        solution: the solution to upload.
        repo_id: "name/repository".
        private: whether a new repository is private; None takes the default of the account.
        token: access token of the Hub; None takes the token that ``hf auth login`` stored.
        license: see :func:`to_hub`.
        commit_message: message of the upload's commit.

    Returns:
        URL of the repository.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        to_hub(solution, folder, license=license, repo_id=repo_id)
        try:
            with quiet_retries():
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        except Exception as error:  # the HTTP library has its own types of error
            if not unreachable(error):
                raise
            way_on = "write the folder with to_hub and upload it later"
            raise not_reached(f"{repo_id} could not be uploaded", error, way_on=way_on) from None
    return str(url)


def classnames_of(solution: Solution, classnames: Sequence[str] | None) -> tuple[str, ...]:
    """The given class names, or those of the solution."""
    names = solution.classnames if classnames is None else classnames
    if names is None:
        raise ValueError(f"classnames must be given for a {solution.kind} that serves any classes, got None")
    return tuple(names)


def _as_head(
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
            "solution with solution.save, and classify with mergetune.classifier"
        )
    names = classnames_of(solution, classnames)
    if whole:
        solution.check_classes(names)
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
    """The model card: description, backbone, classes, and code that loads the solution."""
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
