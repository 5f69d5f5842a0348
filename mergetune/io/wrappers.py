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
    return isinstance(value, Tensor)


def inner_state(
    content: Mapping[Any, Any], *, tensor: Callable[[Any], bool] = is_tensor, at: Callable[[Any], Any] = lambda v: v
) -> tuple[tuple[str, ...], Mapping[Any, Any]]:
    """The innermost dict of weights in the content of a checkpoint, and the keys that lead to it.

    Args:
        content: the content of the file, such as ``{"state_dict": {"model": {...}}, "epoch": 3}``.
        tensor: function that says whether a value is a tensor.
        at: function that returns the dict in a value, for contents in which other objects stand for dicts.

    Returns:
        The keys and the dict; no keys and the content itself if no dict is around the weights.
    """
    keys: tuple[str, ...] = ()
    for _ in range(MAX_DEPTH):
        below = ((key, at(content[key])) for key in PLAIN if key in content)
        found = next(((key, inside) for key, inside in below if _holds_tensors(inside, tensor, at)), None)
        if found is None:
            break
        keys, content = (*keys, found[0]), found[1]
    return keys, content


def _holds_tensors(inside: Any, tensor: Callable[[Any], bool], at: Callable[[Any], Any], depth: int = 0) -> bool:
    if not isinstance(inside, Mapping) or depth == MAX_DEPTH:
        return False
    if any(tensor(value) for value in inside.values()):
        return True
    return any(_holds_tensors(at(inside[key]), tensor, at, depth + 1) for key in PLAIN if key in inside)


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
