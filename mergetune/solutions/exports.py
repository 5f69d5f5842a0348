"""Solutions in other projects' formats: CoOp's checkpoint, a plain linear head, open_clip's classifier, a Hub folder.

Shapes: C classes, D embedding width, W text-tower width, L context length, n context tokens.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCardData
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.clip import PRECISIONS, FrozenClip, fill
from mergetune.io import write_atomically
from mergetune.solutions.head import Head
from mergetune.solutions.kinds import Solution
from mergetune.solutions.prompt import Prompt

HEAD_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


def to_coop(
    solution: Prompt,
    folder: str | Path,
    *,
    clip: FrozenClip,
    classnames: Sequence[str] | None = None,
    epoch: int = 50,
    dtype: str = "float32",
) -> Path:
    """Write ``prompt_learner/model.pth.tar-N`` as CoOp saves it, and the text file ``checkpoint`` beside it.

    CoOp's own evaluation runs it: ``--model-dir FOLDER --load-epoch N --eval-only``, with N_CTX (or a CTX_INIT of as
    many words), CSC and CLASS_TOKEN_POSITION of TRAINER.COOP set to the solution's, as the file tells none of them.
    Optimiser and scheduler are None: there is nothing to resume. (CoOp: trainers/coop.py; Dassl: utils/torchtools.py.)

    Args:
        solution: a prompt whose text ends in "." behind the name, as CoOp's do.
        folder: CoOp's output directory.
        clip: the CLIP that it was made for; its embedded class names go into the file, as CoOp's do.
        classnames: C names; those of a class-specific prompt if None.
        epoch: N.
        dtype: "float32", as with CoOp's PREC fp32 and amp; "float16", as with fp16, rounds the context vectors.

    Returns:
        The checkpoint's path.

    Raises:
        TypeError: a head; a CLIP that takes no prompts.
        ValueError: a text or a CLIP that CoOp does not have; class names that do not fit.
    """
    if not isinstance(solution, Prompt):
        raise TypeError(f"solution must be a prompt, got a {solution.kind}: CoOp has no other")
    if solution.template.split("{}")[1] != ".":
        raise ValueError(f"solution must have '.' behind the class name, as CoOp has, got {solution.template!r}")
    embedding = clip.text.token_embedding.weight
    if clip.first_token != 1:
        raise ValueError(f"clip must have one start token before a text, as CoOp's has, got {clip.first_token}")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
    if epoch < 1:
        raise ValueError(f"epoch must be at least 1, got {epoch}")
    classnames = _classnames(solution, classnames)
    solution.encoder(clip, classnames)  # checks that all of them belong together
    texts = [fill(solution.template, name.replace("_", " ")) for name in classnames]
    embedded = embedding[clip.tokenize(texts)]
    tensors = {
        "ctx": solution.ctx,
        "token_prefix": embedded[:, :1],
        "token_suffix": embedded[:, 1 + solution.n_ctx :],
    }
    content = {
        "state_dict": OrderedDict((name, _plain(tensor).to(PRECISIONS[dtype])) for name, tensor in tensors.items()),
        "epoch": epoch,
        "optimizer": None,
        "scheduler": None,
        "val_result": None,
    }
    folder = Path(folder) / "prompt_learner"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"model.pth.tar-{epoch}"
    write_atomically(file, _torch_bytes(content))
    write_atomically(folder / "checkpoint", f"{file.name}\n".encode())
    return file


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
    tensors = {"weight": _plain(head.weight)} | ({} if head.bias is None else {"bias": _plain(head.bias)})
    extras = {"classnames": list(head.classnames), "scale": head.logit_scale}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        content = serialize(tensors, metadata={name: json.dumps(value) for name, value in extras.items()})
    elif file.suffix == ".npz":
        stream = io.BytesIO()
        np.savez(stream, **{name: tensor.numpy() for name, tensor in tensors.items()}, **extras)
        content = stream.getvalue()
    else:
        content = _torch_bytes({**tensors, **extras})
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
    if isinstance(solution, Head):
        if solution.bias is not None:
            raise ValueError("solution must be a prompt or a head without bias, got a head with one: use to_head")
        classifier = solution.rescaled(clip.logit_scale).class_weights(clip, _classnames(solution, classnames)).T
    else:
        classifier = solution.class_embeddings(clip, _classnames(solution, classnames)).T
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(file), _torch_bytes(_plain(classifier)))
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


def _classnames(solution: Solution, classnames: Sequence[str] | None) -> tuple[str, ...]:
    names = solution.classnames if classnames is None else classnames
    if names is None:
        raise ValueError("classnames must be given for a prompt that is shared by all classes")
    return tuple(names)


def _as_head(solution: Solution, clip: FrozenClip | None, classnames: Sequence[str] | None) -> Head:
    if isinstance(solution, Head):
        if classnames is not None and tuple(classnames) != solution.classnames:
            raise ValueError(f"classnames must be the head's own {len(solution.classnames)}, or None")
        return solution
    if clip is None:
        raise ValueError("clip must be given for a prompt: it makes the class embeddings")
    names = _classnames(solution, classnames)
    return Head(solution.class_embeddings(clip, names), names, logit_scale=solution.scale(clip))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _torch_bytes(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _card(solution: Solution, license: str | None, repo_id: str) -> str:
    """The model card: what it is, what it belongs to, how it is loaded."""
    backbone = solution.backbone or ""
    complete = backbone.startswith(("hf-hub:", "local-dir:"))
    name, _, pretrained = backbone.partition("/")
    arguments = f"{backbone!r}" if complete else f"{name!r}, pretrained={pretrained!r}" if backbone else "..."
    data = ModelCardData(
        library_name="mergetune",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "open_clip", "mergetune", "prompt-tuning" if isinstance(solution, Prompt) else "linear-head"],
        license=license,
        base_model=backbone.removeprefix("hf-hub:") if backbone.startswith("hf-hub:") else None,
    )
    classes = solution.classnames or ()
    if isinstance(solution, Prompt):
        title = "Soft prompt for CLIP"
        specific = f" for each of {len(classes)} classes" if classes else ""
        what = (
            f"{solution.n_ctx} context vectors{specific} around the class name: text `{solution.template}`, class name "
            f"at the {solution.position}."
        )
    else:
        title, what = (
            "Linear head for CLIP",
            f"[{len(classes)}, {solution.weight.shape[1]}], on unit-norm image features.",
        )
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
