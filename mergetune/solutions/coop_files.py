"""Export of a prompt as a checkpoint that CoOp's evaluation reads.

Shapes: C classes, n context tokens, W width of the text tower.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from mergetune.clip import PRECISIONS, FrozenClip, fill
from mergetune.io import write_atomically, writing_in
from mergetune.solutions.base import Solution
from mergetune.solutions.exports import classnames_of, plain_tensor, torch_bytes
from mergetune.solutions.prompt import Prompt
from mergetune.solutions.published import public_backbone
from mergetune.solutions.sidecars import write_sidecar
from mergetune.solutions.space import space_of
from mergetune.solutions.temperatures import temperature_of


def to_coop(
    solution: Solution,
    folder: str | Path,
    *,
    clip: FrozenClip,
    classnames: Sequence[str] | None = None,
    epoch: int = 50,
    dtype: str = "float32",
) -> Path:
    """Write a prompt as CoOp saves one: ``prompt_learner/model.pth.tar-N`` and the text file ``checkpoint``.

    CoOp evaluates the file with ``--model-dir FOLDER --load-epoch N --eval-only``. The file does not hold N_CTX, CSC
    and CLASS_TOKEN_POSITION of TRAINER.COOP: set these to the values of the prompt (instead of N_CTX, a CTX_INIT with
    that many words works, too). Class names, text and position stand in ``model.pth.tar-N.mergetune.json`` beside it,
    which :func:`mergetune.open_solution` reads and CoOp does not. Training cannot resume from the file: optimiser and
    scheduler are None. (CoOp: trainers/coop.py; Dassl: utils/torchtools.py.)

    Args:
        solution: a prompt whose template has "." after the class name, as CoOp's have.
        folder: CoOp's output directory.
        clip: the CLIP that the prompt was made for. As in CoOp, the file holds its embeddings of the class names.
        classnames: C names; None takes those of a class-specific prompt.
        epoch: N, number in the file name.
        dtype: "float32" for CoOp's PREC fp32 and amp; "float16" for fp16, which rounds the context vectors.

    Returns:
        Path of the checkpoint.

    Raises:
        TypeError: the solution is no prompt, or the CLIP takes no prompts.
        ValueError: CoOp has no such template or CLIP, or the class names do not fit.

    Example:
        >>> import mergetune as mt, tempfile
        >>> clip = mt.load_clip("icon-clip")
        >>> prompt = mt.Prompt.from_template(clip, "a photo of a {}.")
        >>> mt.to_coop(prompt, tempfile.mkdtemp(), clip=clip, classnames=["cat", "dog"]).name
        'model.pth.tar-50'
    """
    if not isinstance(solution, Prompt):
        raise TypeError(f"solution must be a prompt, the only kind that CoOp has, got a {solution.kind}")
    if solution.template.split("{}")[1] != ".":
        raise ValueError(f"solution must have '.' after the class name, as in CoOp, got {solution.template!r}")
    embedding = clip.text.token_embedding.weight
    if clip.first_token != 1:
        raise ValueError(f"clip must have one start token before a text, as in CoOp, got {clip.first_token}")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
    if epoch < 1:
        raise ValueError(f"epoch must be at least 1, got {epoch}")
    classnames = classnames_of(solution, classnames)
    solution = solution.for_clip(clip)
    space_of(clip, solution, classnames)  # checks that clip, solution and classnames fit together
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
    file = folder / f"model.pth.tar-{epoch}"
    bytes_of_file = torch_bytes(content)
    with writing_in(folder):
        write_atomically(file, bytes_of_file)
        write_sidecar(
            file,
            bytes_of_file,
            form="coop",
            classnames=classnames,
            logit_scale=solution.logit_scale,
            temperature=temperature_of(solution),
            backbone=public_backbone(solution.backbone or clip.name),
            fingerprint=clip.text_fingerprint,
            template=solution.template,
            position=solution.position,
        )
        write_atomically(folder / "checkpoint", f"{file.name}\n".encode())
    return file
