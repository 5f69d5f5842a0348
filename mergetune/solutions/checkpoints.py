"""Readers of prompts in checkpoint files of other projects. No code in a file is run.

Shapes: C classes, n context vectors, L tokens of a text behind the context vectors, W width of the text tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

from torch import Tensor

from mergetune.facts.brief import brief
from mergetune.io import (
    OWNERS,
    inner_state,
    kind_of_content,
    listing,
    load_tensors,
    named,
    names_file,
    not_plain,
    read_safetensors,
    unwrapped,
)
from mergetune.solutions.dassl_folders import checkpoint_file
from mergetune.solutions.other_trainers import OtherTrainers, tensors_of_other

EMBEDDED = ("token_prefix", "token_suffix", "token_midfix")  # texts of the classes, which a prompt embeds anew
FORKS = ("tokenized_prompts", "name_lens")  # further buffers that depend on the classes alone
KGCOOP_UNUSED = ("bias_vectors", "meta_net.")  # KgCoOp saves these and never uses them; CoCoOp uses its meta_net
PRODA_ONLY = ("nc_token_prefix", "nc_token_suffix")  # texts without a class name, for an extra loss term
LEARNER = "prompt_learner."
TOWERS = ("image_encoder.", "text_encoder.", "clip_model.", "visual.", "transformer.", "logit_scale")


@brief()
@dataclass(frozen=True, eq=False)
class PromptFile:
    """Content of a CoOp-family checkpoint.

    Attributes:
        ctx: context vectors, float32: [n, W] if all classes share them, [C, n, W] if they are class-specific.
        epoch: training epoch, or None if the file does not record one.
        file: path of the file that was read.
        start: embedding of the start token, [W], which tells the backbone; None if the file does not hold it.
        suffix: embedded class names of class-specific context vectors and what follows them, [C, L, W]; or None.
    """

    ctx: Tensor
    epoch: int | None
    file: Path
    start: Tensor | None = None
    suffix: Tensor | None = None


class NoContext(ValueError):
    """A file can be read and holds no context vectors."""


def check_same_names(classnames: Sequence[str], named: Sequence[str]) -> None:
    """Raise ValueError unless the given class names are those that a file names, in any order."""
    if other := sorted(set(classnames) ^ set(named)):
        raise ValueError(f"classnames must be those of the file, got other names: {listing(other, most=5)}")


@names_file("path")
def read_prompt(path: str | Path) -> PromptFile:
    """Read the context vectors from a checkpoint of CoOp, KgCoOp, ProGrad or the official MERGETUNE.

    A ProDA checkpoint with a single prompt has the same format; one with several prompts raises ValueError.

    Args:
        path: a file such as ``model.pth.tar-N`` or ``model-best.pth.tar``, or its folder, or a folder that contains
            ``prompt_learner`` or the official code's ``prompt_mid_learner``. In a folder, the file that Dassl's text
            file ``checkpoint`` names is read, else the one with the highest epoch.

    Raises:
        FileNotFoundError: no checkpoint at ``path``; the message names checkpoints near it.
        ValueError: the file is no checkpoint, holds objects other than tensors and plain values, holds no context
            vectors, or holds further parameters.
    """
    file = checkpoint_file(path)
    content = read_safetensors(file) if kind_of_content(file) == "safetensors" else load_tensors(file)
    state = state_dict_of(file, content)
    unused = KGCOOP_UNUSED if "bias_vectors" in state else ()
    buffers = EMBEDDED + PRODA_ONLY + FORKS
    kept = [name for name in state if name not in buffers and not name.startswith(unused)]
    ctx = state.get("ctx")
    if kept != ["ctx"] and (other := tensors_of_other([*kept, *_names_below(state)])):
        raise OtherTrainers(f"{file} must hold a prompt of CoOp's form alone, got {other}")
    if ctx is None and any(f".{name}".endswith(f".{LEARNER}ctx") for name in map(_unwrapped_part, state)):
        raise OtherTrainers(_whole_model(file, content, state))
    if ctx is None and (places := [name for name in (*state, *_names_below(state)) if name.endswith(".ctx")]):
        place = places[0].removesuffix(".ctx")
        raise ValueError(
            f"{file} must hold context vectors 'ctx' at its top or in a state_dict, got {named(places[0])}: "
            f"`mergetune convert FILE prompt.safetensors --only {named(place)}` takes them out, and --tuned reads that"
        )
    if isinstance(ctx, Tensor) and ctx.is_floating_point() and ctx.ndim in (3, 4):
        _check_one_prompt_per_class(file, ctx, state)
    if not isinstance(ctx, Tensor) or ctx.ndim not in (2, 3) or not ctx.is_floating_point() or not_plain(ctx):
        what = f"ctx {list(ctx.shape)}" if isinstance(ctx, Tensor) else listing(kept, most=5)
        error = NoContext if ctx is None else ValueError
        raise error(f"{file} must hold context vectors 'ctx' [n, W] or [C, n, W], got {what}")
    if kept != ["ctx"]:
        more = listing((name for name in kept if name != "ctx"), most=5)
        raise ValueError(f"{file} must be a prompt of CoOp's form, got further parameters that would be lost: {more}")
    if ctx.ndim == 3 and any(name in state for name in PRODA_ONLY):
        ctx = ctx[0]
    if unusable := _unusable_texts(file, ctx, state):
        warn(f"{file}: {unusable}: whether the prompt fits a backbone cannot be checked with them", stacklevel=3)
        state = {"ctx": ctx}
    epoch = content.get("epoch")
    return PromptFile(
        ctx=ctx.detach().float().clone(),
        epoch=epoch if isinstance(epoch, int) else None,
        file=file,
        start=_start_of(state, ctx),
        suffix=_suffix_of(state, ctx),
    )


def state_dict_of(file: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint by name, without the dicts and the prefixes that wrappers put around them.

    Raises:
        ValueError: the checkpoint holds no state_dict.
    """
    _, state = inner_state(content)
    state = state.get("state_dict", state)  # one without tensors
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file} must hold a state_dict, got {type(state).__name__}")
    return {name: state[own] for name, own in unwrapped(list(state), OWNERS).items()}


def holds_context(file: Path) -> bool:
    """Whether a .safetensors file holds a prompt: `mergetune convert` takes prompts out of checkpoints into such files.

    Raises:
        ValueError: the file is damaged.
    """
    return any(name.rpartition(".")[2] == "ctx" for name in read_safetensors(file))


def _check_one_prompt_per_class(file: Path, ctx: Tensor, state: Mapping[str, Any]) -> None:
    """Raises ValueError if several context vectors stand for one class, as in PLOT and ProDA.

    The file's texts tell: class-specific context vectors have one text each, [C, n, W] and C texts. PLOT has N prompts
    for each of C classes, [N, n, W] and N * C texts.
    """
    if any(name in state for name in PRODA_ONLY):
        if len(ctx) > 1:
            raise ValueError(
                f"{file} must hold one prompt, got a distribution of {len(ctx)} (ProDA), which no single prompt equals"
            )
        return
    found = (_texts(state, name, ctx) for name in EMBEDDED[:2])
    texts = next((len(each) for each in found if each is not None), len(ctx))
    if ctx.ndim == 3 and texts == len(ctx):
        return
    got = f"{file} must hold one prompt for all classes or one per class, got ctx {list(ctx.shape)}"
    if ctx.ndim == 3 and texts % len(ctx):
        raise ValueError(f"{got} beside {texts:,} embedded texts, which belong to other classes")
    raise ValueError(f"{got} for {texts:,} embedded texts: PLOT's several prompts per class, which no prompt equals")


def _texts(state: Mapping[str, Any], name: str, ctx: Tensor) -> Tensor | None:
    """The buffer of this name if it holds embedded tokens of the context vectors' width, [C, L, W]; else None."""
    found = state.get(name)
    if not isinstance(found, Tensor) or found.ndim != 3 or not found.is_floating_point() or not_plain(found):
        return None
    found = found.detach().float() if found.itemsize == 1 else found.detach()  # float8 has no comparisons
    return found if found.shape[2] == ctx.shape[-1] and found.numel() else None


def _unusable_texts(file: Path, ctx: Tensor, state: Mapping[str, Any]) -> str:
    """Why the embedded texts of a file tell nothing about its backbone; "" if they tell, or if there are none.

    Raises:
        ValueError: they are embeddings of another width than the context vectors, which one backbone never has.
    """
    found = {name: state[name] for name in EMBEDDED[:2] if name in state}
    for name, texts in found.items():
        if not isinstance(texts, Tensor) or texts.ndim != 3 or not texts.is_floating_point() or not_plain(texts):
            got = list(texts.shape) if isinstance(texts, Tensor) else type(texts).__name__
            return f"{name} must be embedded texts [C, L, W], got {got}"
        if texts.shape[2] != ctx.shape[-1]:
            raise ValueError(
                f"{file} must hold {name} of the width of ctx, W = {ctx.shape[-1]}, got {texts.shape[2]}: they are of "
                "different backbones"
            )
        if name == "token_prefix" and texts.shape[1] != 1:
            return f"{name} must be one start token per class, [C, 1, W], got {list(texts.shape)}"
        if not texts.float().isfinite().all():
            return f"{name} must be finite, got NaN or infinite values"
    counts = sorted({len(texts) for texts in found.values()})
    return f"token_prefix and token_suffix must have one text per class, got {counts}" if counts[1:] else ""


def _start_of(state: Mapping[str, Any], ctx: Tensor) -> Tensor | None:
    texts = _texts(state, "token_prefix", ctx)
    start = None if texts is None else texts[0, 0].float().clone()
    return start if start is not None and start.any() and start.isfinite().all() else None


def _suffix_of(state: Mapping[str, Any], ctx: Tensor) -> Tensor | None:
    texts = _texts(state, "token_suffix", ctx) if ctx.ndim == 3 else None
    return texts if texts is not None and texts.any() and texts.isfinite().all() else None


def _unwrapped_part(name: str) -> str:
    """The name without the parts that DistributedDataParallel and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _whole_model(file: Path, content: Mapping[Any, Any], state: Mapping[str, Any]) -> str:
    """The message for a file of a whole model with a prompt in it."""
    _, inside = inner_state(content)
    ctx = next(name for name in inside if f".{_unwrapped_part(name)}".endswith(f".{LEARNER}ctx"))
    place, names = ctx.removesuffix(".ctx"), [name for name in inside if isinstance(name, str)]
    others = [name for name in names if not name.startswith(f"{place}.")]
    towers = [name for name in state if name.startswith(TOWERS)]
    what = "weights of its towers" if len(towers) == len(others) else "further parameters"
    return (
        f"{file} must hold a prompt alone, got a whole model: the prompt {ctx!r} and {len(others):,} {what} "
        f"({listing(others, most=2)}); if only the prompt was trained, `mergetune convert FILE prompt.safetensors "
        f"--only {place}` takes it out, and --tuned reads it; if the towers were trained, too, no prompt equals the "
        "model"
    )


def _names_below(state: Mapping[str, Any], depth: int = 3) -> Iterator[str]:
    """The names in dicts of a dict, such as "layer_0.q_proj.w_lora_A"."""
    for name, inside in state.items():
        if isinstance(inside, Mapping) and depth:
            yield from (f"{name}.{below}" for below in inside if not isinstance(inside[below], Mapping))
            yield from (f"{name}.{below}" for below in _names_below(inside, depth - 1))
