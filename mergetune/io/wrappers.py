"""What trainers put around weights: dicts around the state dict, and prefixes before the names in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

PLAIN = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params")
AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "params_ema")
"""Keys under which trainers save the weights, and their moving average."""

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel, AveragedModel and torch.compile put before all names."""
OWNERS = (*PREFIXES, "model.", "net.", "network.", "prompt_learner.")
"""These, and the attributes in which trainers keep the model or the prompt."""

BUFFERS = frozenset(
    (
        "num_batches_tracked", "position_ids", "token_type_ids", "n_averaged", "attn_mask", "masked_bias", "inv_freq",
        "relative_position_index", "relative_coords_table", "rel_pos_indices",
    )
)  # fmt: skip
"""Last parts of the names of tensors that a model stores or makes anew, and never learns."""

MAX_DEPTH = 4  # most dicts around each other that are looked through


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor."""
    return isinstance(value, Tensor)


def inner_state(
    content: Any,
    *,
    tensor: Callable[[Any], bool] = is_tensor,
    module: Callable[[Any], bool] = lambda value: False,
    keys: Collection[str] = PLAIN,
) -> tuple[tuple[str, ...], Any]:
    """The innermost dict of weights in the content of a checkpoint, and the keys that lead to it.

    Args:
        content: the content of the file, such as ``{"state_dict": {"model": {...}}, "epoch": 3}``.
        tensor: function that says whether a value is a tensor.
        module: function that says whether a value stands for a module with tensors in it.
        keys: keys of dicts that are looked through, the preferred ones first.

    Returns:
        The keys and the dict; no keys and the content itself if no dict is around the weights.
    """
    path: tuple[str, ...] = ()
    while isinstance(content, Mapping) and len(path) < MAX_DEPTH:
        for key in keys:
            if key in content and (module(content[key]) or _holds_tensors(content[key], tensor, module, keys)):
                break
        else:
            break
        path, content = (*path, key), content[key]
    return path, content


def _holds_tensors(
    inside: Any, tensor: Callable[[Any], bool], module: Callable[[Any], bool], keys: Collection[str], depth: int = 1
) -> bool:
    if not isinstance(inside, Mapping):
        return False
    if any(tensor(value) or module(value) for value in inside.values()):
        return True
    below = (inside[key] for key in keys if key in inside)
    return depth < MAX_DEPTH and any(_holds_tensors(value, tensor, module, keys, depth + 1) for value in below)


def unwrapped(names: Collection[str], prefixes: Collection[str] = PREFIXES) -> dict[str, str]:
    """Name without the prefixes of wrappers -> name, in the order of the names.

    A prefix is removed if all names but buffers at the top have it, again and again, in any order of the prefixes.
    """
    plain = {name: name for name in names}
    while prefix := next((prefix for prefix in prefixes if _is_common(prefix, plain)), None):
        plain = {name.removeprefix(prefix): own for name, own in plain.items() if name.startswith(prefix)}
    return plain


def _is_common(prefix: str, names: Collection[str]) -> bool:
    """Whether the names, perhaps without buffers at the top, begin with a prefix."""
    inside = [name for name in names if name.startswith(prefix)]
    return bool(inside) and all(name.startswith(prefix) or name in BUFFERS for name in names)
