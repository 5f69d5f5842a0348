"""The ops, their implementations by backend, and the checks of the argument ``backend``.

Each :class:`Implementation` of an op is registered in its :class:`Op`. ``backend="name"`` takes exactly this
implementation, or raises. :mod:`mergetune.ops.selection` chooses the implementation for ``backend=None``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mergetune.facts.brief import brief
from mergetune.io import dtype_name
from mergetune.ops.native import build_info

BACKENDS = ("cpp", "triton", "cuda", "compile", "torch")
SHAPE_CLASSES = ("small", "medium", "large")


@brief()
@dataclass(frozen=True)
class Implementation:
    """One implementation of one op.

    Attributes:
        backend: name for the argument ``backend``.
        run: function from the op's arguments, as one object, to its results. The results of a loss include its
            gradient.
        backward: function from the gradient of the output and the arguments to the gradients, for ops with a separate
            backward op; else None.
        dtypes: dtypes of arguments that the implementation accepts; None accepts every float dtype.
    """

    backend: str
    run: Callable[[Any], Any]
    backward: Callable[[Tensor, Any], Any] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the implementation accepts arguments of this dtype."""
        return self.dtypes is None or dtype in self.dtypes

    def run_backward(self, d_out: Tensor, arguments: Any) -> Any:
        """The gradients with respect to the arguments.

        Raises:
            TypeError: the implementation has no backward function.
        """
        if self.backward is None:
            raise TypeError(f"backend {self.backend!r} must have a backward function, got None")
        return self.backward(d_out, arguments)


@brief()
@dataclass(frozen=True)
class Op:
    """An op with its implementations and the functions that compare them.

    Attributes:
        name: name of the op.
        results: function from implementation and arguments to all results by name, including gradients.
        truth: function from arguments to the same results of the definition in float64.
        problems: function from shape class, dtype and device to a list of random arguments; the first are timed.
        dtypes: dtypes for which implementations are verified.
        implementations: backend -> implementation; :meth:`register` adds entries.
    """

    name: str
    results: Callable[[Implementation, Any], dict[str, Tensor]]
    truth: Callable[[Any], dict[str, Tensor]]
    problems: Callable[[str, torch.dtype, torch.device], Sequence[Any]]
    dtypes: tuple[torch.dtype, ...]
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def register(self, implementation: Implementation) -> None:
        """Adds an implementation; replaces an existing one of the same backend."""
        self.implementations[implementation.backend] = implementation


OPS: dict[str, Op] = {}
"""Name -> op, for the ops with several implementations for a GPU."""


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which works on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# torch.compile can trace neither the native core nor Python's import system, so these functions run once per trace.
@torch.compiler.assume_constant_result
def _cuda_is_built() -> bool:
    return bool(build_info()["cuda_archs"])


@torch.compiler.assume_constant_result
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def missing(backend: str, device: str) -> Exception | None:
    """The error to raise if a backend cannot run on a type of device ("cpu", "cuda"); None if the backend can run."""
    if backend == "cuda" and not _cuda_is_built():
        return RuntimeError("backend 'cuda' was not built: nvcc was not found, or MERGETUNE_CUDA=0 was set")
    if backend == "triton" and not _triton_is_installed():
        return RuntimeError("backend 'triton' needs the package triton, which is not installed")
    needed = {"cpp": "cpu", "cuda": "cuda", "triton": device if interpreted() else "cuda"}.get(backend, device)
    if device != needed:
        return ValueError(f"backend {backend!r} needs tensors on {needed}, got {device}")
    return None


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    gpu = torch.cuda.is_available()
    there = {"triton": gpu and _triton_is_installed(), "cuda": gpu and _cuda_is_built()}
    return tuple(name for name in BACKENDS if there.get(name, True))


def check_backend(backend: str, device: str, among: Sequence[str]) -> None:
    """Checks that a backend exists and can run on a type of device.

    Args:
        backend: name of the backend.
        device: "cpu" or "cuda".
        among: names of the op's backends.

    Raises:
        ValueError: the op does not have the backend, or the backend does not run on this type of device.
        RuntimeError: the backend was not built, or its package is not installed.
    """
    if backend not in among:
        raise ValueError(f"backend must be None or one of {', '.join(among)}, got {backend!r}")
    if error := missing(backend, device):
        raise error


def requested(op: str, name: str, tensor: Tensor, backend: str) -> str:
    """Checks a backend that the caller named, and returns its name.

    Args:
        op: name of the op.
        name: name of the argument whose device and dtype are checked.
        tensor: value of this argument.
        backend: name of the backend.

    Raises:
        ValueError, RuntimeError: see :func:`check_backend`.
        TypeError: the backend does not compute in the tensor's dtype.
    """
    there = OPS[op].implementations
    check_backend(backend, tensor.device.type, sorted(there, key=_rank))
    if not there[backend].takes(tensor.dtype):
        *first, last = map(dtype_name, there[backend].dtypes or ())
        allowed = f"{', '.join(first)} or {last}" if first else last
        raise TypeError(f"{name} must be {allowed} for backend {backend!r}, got {tensor.dtype}")
    return backend


def _rank(backend: str) -> int:
    return BACKENDS.index(backend) if backend in BACKENDS else len(BACKENDS)
