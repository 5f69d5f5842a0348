"""What ``backend=None`` takes: the native core on a CPU, on a GPU what was verified there, plain torch until then.

On a GPU the choice comes from the verdict of :mod:`mergetune.ops.verification`. At its first call in a process the
chosen implementation is compared with the definition on the caller's own data: where they differ, or where it raises,
a warning says so, and the definition is used from then on. A backend that is asked for by name never comes here.

``MERGETUNE_BACKEND=torch`` takes plain torch on every device; ``MERGETUNE_BACKEND=verified`` goes by the verdict on a
CPU too.
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
"""In place of a backend's name: the one of the verdict, looked up when the op runs."""

Key = tuple[str, str, str, str]  # op, device ("cuda:0"), dtype ("torch.float32"), shape class

_choices: dict[str, dict[tuple[str, str, str], str]] = {}  # device -> (op, dtype, shape class) -> backend
_settled: set[str] = set()  # devices that need not be verified again in this process
_compared: set[Key] = set()
_refused: dict[Key, str] = {}


def choose(op: str, name: str, tensor: Tensor, arguments: Any, backend: str | None) -> str:
    """The backend that a call takes.

    Args:
        op: its name.
        name: of the argument whose device and dtype decide.
        tensor: that argument.
        arguments: all of them, as one object.
        backend: what the caller asked for.

    Returns:
        A backend's name; in code that torch.compile traces also :data:`VERIFIED`, for :func:`run_verified`.
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
    """Whether ``backend=None`` means the verdict's choice on a device.

    Raises:
        ValueError: MERGETUNE_BACKEND has another value than torch and verified.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "torch", VERIFIED):
        raise ValueError(f"{VARIABLE} must be empty, torch or verified, got {wanted!r}")
    return wanted == VERIFIED or (wanted == "" and device.type == "cuda")


def run_verified(op: str, tensor: Tensor, arguments: Any, *, d_out: Tensor | None = None) -> Any:
    """Runs the verdict's implementation inside a compiled graph: the op, or with ``d_out`` its backward."""
    key = op, str(tensor.device), str(tensor.dtype), arguments.shape_class()

    def run() -> Any:
        found = OPS[op].implementations[_compared_choice(key, arguments)]
        return found.run(arguments) if d_out is None else found.run_backward(d_out, arguments)

    # These two, and the comparison of the others, differentiate inside.
    direct = key in _compared and chosen(key) not in ("torch", "compile")
    return run() if direct else _outside_of_dispatch(run, tensor.device)


def _outside_of_dispatch(run: Callable[[], Any], device: torch.device) -> Any:
    """Runs in a thread of its own: within an op's kernel autograd is switched off, for this thread."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work() -> Any:
        with torch.no_grad(), torch.cuda.stream(stream) if stream else nullcontext():
            return run()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _compared_choice(key: Key, arguments: Any) -> str:
    """The verdict's backend, once it has been compared with the definition on the caller's data; else "torch"."""
    backend = chosen(key)
    if backend == "torch" or key in _compared:
        return backend
    if key[1].startswith("cuda") and torch.cuda.is_current_stream_capturing():
        return backend  # a graph's kernels cannot be looked at while it is captured: the verdict stands
    return backend if _agrees(key, backend, arguments) else "torch"


def chosen(key: Key) -> str:
    """The verdict's backend for a key; "torch" where there is none, or it has been refused in this process."""
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
    """The comparison at the first call, remembered."""
    op, device, name, shape_class = key
    dtype = getattr(torch, name.removeprefix("torch."))
    # Copies that autograd may use, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        arguments = type(arguments)(*(t.detach().clone() if isinstance(t, Tensor) else t for t in arguments))
        try:
            difference = compare_with_definition(OPS[op], OPS[op].implementations[backend], arguments, dtype)
        except Exception as error:
            OPS[op].implementations["torch"].run(arguments)  # where the arguments are at fault, this raises too
            trouble = f"raised {type(error).__name__}: {str(error)[:200]}"
        else:
            if difference is None:
                return False  # not finite: the definition shows it, and the next call compares again
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
    """Uses these verdicts on a device from now on, in this process; None is plain PyTorch for all."""
    forget(device)
    _choices[str(indexed(device))] = _choices_of(found)
    _settled.add(str(indexed(device)))


def has_verdicts(device: torch.device) -> bool:
    """Whether :func:`take_verdicts` has settled a device in this process."""
    return str(indexed(device)) in _settled


def indexed(device: torch.device) -> torch.device:
    """The device as tensors name theirs: "cuda" is the current one, "cuda:0"."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def forget(device: torch.device) -> None:
    """Drops what this process knows about a device: the next call reads the verdict and compares again."""
    name = str(indexed(device))
    _choices.pop(name, None)
    _settled.discard(name)
    for key in [key for key in (*_compared, *_refused) if key[1] == name]:
        _compared.discard(key)
        _refused.pop(key, None)


def refusals() -> dict[str, str]:
    """What was refused in this process on the caller's own data: "op device dtype size" -> backend and trouble."""
    return {" ".join(key): trouble for key, trouble in _refused.items()}


def _read_choices(device: torch.device) -> dict[tuple[str, str, str], str]:
    """The verdict's choices; none, with one line that says so, where there is no verdict or a damaged one."""
    try:
        found = read_verdicts(device_facts(device))
    except ValueError as error:
        warnings.warn(f"{error} Until then plain PyTorch is used on {device}.", stacklevel=2)
        return {}
    if found is None:
        warnings.warn(
            f"No kernel has been verified on {device} yet, so plain PyTorch is used there. "
            "`mergetune doctor --kernels` verifies them once; so does the first `fit` or `tune` on a GPU.",
            stacklevel=2,
        )
        return {}
    return _choices_of(found)


def _choices_of(found: VerdictFile | None) -> dict[tuple[str, str, str], str]:
    return {} if found is None else {(v.op, v.dtype, v.shape_class): v.chosen for v in found.verdicts}
