"""Whole models: the weights of a CLIP with the changes of a solution, in open_clip's layout."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save as serialize

from mergetune.clip import FrozenClip
from mergetune.io import write_atomically
from mergetune.solutions.base import Solution
from mergetune.solutions.states import stacked
from mergetune.solutions.written_files import checked_suffix, plain_tensor, torch_bytes

MODEL_SUFFIXES = (".safetensors", ".pt", ".pth")


def to_open_clip(solution: Solution, file: str | Path, *, clip: FrozenClip) -> Path:
    """Write the state dict of a CLIP whose weights a solution changes. ``open_clip.load_checkpoint`` reads the file.

    The file holds no class embeddings: they come from texts, as those of any CLIP.

    Args:
        solution: a solution that changes weights of the towers and nothing else, such as a LoRA.
        file: path that ends in .safetensors, .pt or .pth.
        clip: the CLIP that the solution was made for; the file has its precision.

    Returns:
        The path.

    Raises:
        ValueError: another file ending; a solution that changes no weights, or more than weights.

    Example:
        >>> import mergetune as mt, os, tempfile
        >>> clip = mt.load_clip("icon-clip")
        >>> lora = mt.LoRA.start(clip, tower="text")
        >>> mt.to_open_clip(lora, os.path.join(tempfile.mkdtemp(), "model.safetensors"), clip=clip).name
        'model.safetensors'
    """
    file = checked_suffix(file, MODEL_SUFFIXES)
    solution.check(clip)
    edit = solution.edit(clip, stacked(solution.state(), clip.device))
    if not edit.weights:
        raise ValueError(f"solution must change weights of the towers, got a {solution.kind}, which changes none")
    if edit.before or edit.beside or edit.image_maps or edit.rows or edit.context is not None:
        raise ValueError(f"solution must change weights of the towers alone, got a {solution.kind} that changes more")
    state = clip.model.state_dict()
    state |= {name: weight[0].to(state[name]) for name, weight in edit.weights.items()}
    tensors = {name: plain_tensor(tensor).clone() for name, tensor in state.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    pytorch = file.suffix != ".safetensors"
    write_atomically(file, torch_bytes(tensors) if pytorch else serialize(tensors, metadata={"format": "pt"}))
    return file
