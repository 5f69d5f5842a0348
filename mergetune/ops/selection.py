"""The choice of an implementation for ``backend=None``.

On a CPU the native core is chosen, on a GPU the backend in the verdict of :mod:`mergetune.ops.verification`, and plain
torch if the GPU has no verdict. The first call of a chosen implementation in a process is compared with the definition
on the caller's data. If the results differ or the implementation raises, a warning says so, and the definition is used
from then on. A backend that the caller names is never replaced.

``MERGETUNE_BACKEND=torch`` chooses plain torch on every device; ``MERGETUNE_BACKEND=verified`` uses verdicts on a CPU
as well.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mergetune.ops.agreement import compare_with_definition
from mergetune.ops.backends import OPS, missing, requested
from mergetune.ops.verdicts import VerdictFile, device_facts, read_verdicts

VARIABLE = "MERGETUNE_BACKEND"
VERIFIED = "verified"
"""Stands for the verdict's backend in compiled graphs; the backend is looked up when the op runs."""

Key = tuple[str, str, str, str]  # op, device ("cuda:0"), dtype ("torch.float32"), shape class

_choices: dict[str, dict[tuple[str, str, str], str]] = {}  # device -> (op, dtype, shape class) -> backend
_settled: set[str] = set()  # devices that need not be verified again in this process
_compared: set[Key] = set()
_refused: dict[Key, str] = {}


def choose(op: str, name: str, tensor: Tensor, arguments: Any, backend: str | None) -> str:
    """The name of the backend for a call.

    Args:
        op: name of the op.
        name: name of the argument whose device and dtype decide.
        tensor: value of this argument.
        arguments: all arguments as one object.
        backend: the caller's choice; None chooses here.

    Returns:
        Name of a backend. While torch.compile traces, also :data:`VERIFIED`, which :func:`run_verified` resolves.
    """
    if backend is not None:
        return requested(op, name, tensor, backend)
    if goes_by_verdict(tensor.device):
        key = op, str(tensor.device), str(tensor.dtype), arguments.shape_class()
        if torch.compiler.is_compiling():
            return "torch" if _chosen_when_compiled(*key) == "torch" else VERIFIED
        return _compared_choice(key, arguments)
    wanted = "cpp" if tensor.device.type == "cpu" and os.environ.get(VARIABLE) != "torch" else "torch"
    return wanted if OPS[op].implementations[wanted].takes(tensor.dtype) else "torch"


def goes_by_verdict(device: torch.device) -> bool:
    """Whether ``backend=None`` uses the verdict on a device.

    Raises:
        ValueError: MERGETUNE_BACKEND is neither empty, torch nor verified.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "torch", VERIFIED):
        raise ValueError(f"{VARIABLE} must be empty, torch or verified, got {wanted!r}")
    return wanted == VERIFIED or (wanted == "" and device.type == "cuda")


def run_verified(op: str, tensor: Tensor, arguments: Any, *, d_out: Tensor | None = None) -> Any:
    """Runs the verdict's implementation of an op, or with ``d_out`` of its backward, inside a compiled graph."""
    key = op, str(tensor.device), str(tensor.dtype), arguments.shape_class()

    def run() -> Any:
        found = OPS[op].implementations[_compared_choice(key, arguments)]
        return found.run(arguments) if d_out is None else found.run_backward(d_out, arguments)

    # "torch", "compile" and the first comparison use autograd inside.
    direct = key in _compared and chosen(key) not in ("torch", "compile")
    return run() if direct else _outside_of_dispatch(run, tensor.device)


def _outside_of_dispatch(run: Callable[[], Any], device: torch.device) -> Any:
    """Runs in another thread: within an op's kernel, torch switches autograd off for the calling thread."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work() -> Any:
        with torch.no_grad(), torch.cuda.stream(stream) if stream else nullcontext():
            return run()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _compared_choice(key: Key, arguments: Any) -> str:
    """The verdict's backend if it agrees with the definition on the caller's data, else "torch"."""
    backend = chosen(key)
    if backend == "torch" or key in _compared:
        return backend
    if key[1].startswith("cuda") and torch.cuda.is_current_stream_capturing():
        return backend  # results cannot be compared while a CUDA graph is captured: the verdict decides
    return backend if _agrees(key, backend, arguments) else "torch"


def chosen(key: Key) -> str:
    """The verdict's backend for a key; "torch" without a verdict or after a refusal in this process."""
    op, device, dtype, shape_class = key
    if key in _refused:
        return "torch"
    if device not in _choices:
        _choices[device] = _read_choices(torch.device(device))
    backend = _choices[device].get((op, dtype, shape_class), "torch")
    there = backend in OPS[op].implementations and missing(backend, torch.device(device).type) is None
    return backend if there else "torch"


@torch.compiler.assume_constant_result
def _chosen_when_compiled(op: str, device: str, dtype: str, shape_class: str) -> str:
    return chosen((op, device, dtype, shape_class))


def _agrees(key: Key, backend: str, arguments: Any) -> bool:
    """Compares a backend with the definition on the caller's data, and remembers the outcome for this process."""
    op, device, name, shape_class = key
    dtype = getattr(torch, name.removeprefix("torch."))
    # The copies are made outside of inference mode, so that autograd can use them.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        arguments = type(arguments)(*(t.detach().clone() if isinstance(t, Tensor) else t for t in arguments))
        try:
            difference = compare_with_definition(OPS[op], OPS[op].implementations[backend], arguments, dtype)
        except Exception as error:
            OPS[op].implementations["torch"].run(arguments)  # raises as well if the arguments are wrong
            trouble = f"raised {type(error).__name__}: {str(error)[:200]}"
        else:
            if difference is None:
                return False  # the definition is not finite: it is used now, and the next call compares again
            if difference.agrees:
                _compared.add(key)
                return True
            trouble = f"{difference.result} is off by {difference.error:.1e}, {difference.allowed:.1e} is allowed"
    _refused[key] = f"{backend}: {trouble}"
    warnings.warn(
        f"{op} on {device} with {dtype}, {shape_class} size: backend {backend!r} {trouble} on your data. Plain PyTorch "
        "is used instead. Please report this with the output of `mergetune doctor --kernels --json`.",
        stacklevel=2,
    )
    return False


def take_verdicts(device: torch.device, found: VerdictFile | None) -> None:
    """Uses these verdicts on a device for the rest of this process; None uses plain PyTorch for all ops."""
    forget(device)
    _choices[str(indexed(device))] = _choices_of(found)
    _settled.add(str(indexed(device)))


def has_verdicts(device: torch.device) -> bool:
    """Whether :func:`take_verdicts` was called for a device in this process."""
    return str(indexed(device)) in _settled


def indexed(device: torch.device) -> torch.device:
    """The device with its index, as tensors report it: "cuda" becomes the current device, such as "cuda:0"."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def forget(device: torch.device) -> None:
    """Forgets choices and comparisons for a device in this process: the next call reads the verdict again."""
    name = str(indexed(device))
    _choices.pop(name, None)
    _settled.discard(name)
    for key in [key for key in (*_compared, *_refused) if key[1] == name]:
        _compared.discard(key)
        _refused.pop(key, None)


def refusals() -> dict[str, str]:
    """Backends refused in this process on the caller's data: "op device dtype size" -> backend and reason."""
    return {" ".join(key): trouble for key, trouble in _refused.items()}


def _read_choices(device: torch.device) -> dict[tuple[str, str, str], str]:
    """The verdict's choices for a device; empty, with a warning, if the verdict is missing or damaged."""
    try:
        found = read_verdicts(device_facts(device))
    except ValueError as error:
        warnings.warn(f"{error} Until then plain PyTorch is used on {device}.", stacklevel=2)
        return {}
    if found is None:
        warnings.warn(
            f"No kernel has been verified on {device} yet, so plain PyTorch is used. "
            "`mergetune doctor --kernels` verifies the kernels once; so does the first `fit` or `tune` on a GPU.",
            stacklevel=2,
        )
        return {}
    return _choices_of(found)


def _choices_of(found: VerdictFile | None) -> dict[tuple[str, str, str], str]:
    return {} if found is None else {(v.op, v.dtype, v.shape_class): v.chosen for v in found.verdicts}
