"""A prompt as CoOp's checkpoint, which CoOp's own evaluation runs.

Shapes: C classes, n context tokens, W width of the text tower.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from mergetune.clip import PRECISIONS, FrozenClip, fill
from mergetune.io import write_atomically
from mergetune.solutions.base import Solution
from mergetune.solutions.exports import classnames_of, plain_tensor, torch_bytes
from mergetune.solutions.prompt import Prompt
from mergetune.solutions.space import space_of


def to_coop(
    solution: Solution,
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
        TypeError: another kind of solution; a CLIP that takes no prompts.
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
    classnames = classnames_of(solution, classnames)
    space_of(clip, solution, classnames)  # checks that all of them belong together
    texts = [fill(solution.template, name.replace("_", " ")) for name in classnames]
    embedded = embedding[clip.tokenize(texts)]
    tensors = {
        "ctx": solution.ctx,
        "token_prefix": embedded[:, :1],
        "token_suffix": embedded[:, 1 + solution.n_ctx :],
    }
    content = {
        "state_dict": OrderedDict(
            (name, plain_tensor(tensor).to(PRECISIONS[dtype])) for name, tensor in tensors.items()
        ),
        "epoch": epoch,
        "optimizer": None,
        "scheduler": None,
        "val_result": None,
    }
    folder = Path(folder) / "prompt_learner"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"model.pth.tar-{epoch}"
    write_atomically(file, torch_bytes(content))
    write_atomically(folder / "checkpoint", f"{file.name}\n".encode())
    return file
