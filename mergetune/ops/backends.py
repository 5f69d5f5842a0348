"""The implementations of every op by backend, and what ``backend=`` may name.

An op is an :class:`Op` with its definition; each :class:`Implementation` of it is registered beside it.
``backend="name"`` takes exactly that implementation, or raises. What ``backend=None`` takes is decided in
:mod:`mergetune.ops.selection`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mergetune.io import dtype_name
from mergetune.ops.native import build_info

BACKENDS = ("cpp", "triton", "cuda", "compile", "torch")
SHAPE_CLASSES = ("small", "medium", "large")


@dataclass(frozen=True)
class Implementation:
    """One implementation of one op.

    Attributes:
        backend: its name in ``backend=``.
        run: the op's arguments as one object -> its results. A loss brings its gradient.
        backward: gradient of the output, arguments -> gradients, for an op whose backward is an op of its own.
        dtypes: what it computes in; None for every float dtype.
    """

    backend: str
    run: Callable[[Any], Any]
    backward: Callable[[Tensor, Any], Any] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether it computes in this dtype."""
        return self.dtypes is None or dtype in self.dtypes

    def run_backward(self, d_out: Tensor, arguments: Any) -> Any:
        """The gradients of the arguments.

        Raises:
            TypeError: the op's backward is no op of its own.
        """
        if self.backward is None:
            raise TypeError(f"backend {self.backend!r} must have a backward of its own, got None")
        return self.backward(d_out, arguments)


@dataclass(frozen=True)
class Op:
    """An op, and how its implementations are compared.

    Attributes:
        name: the op's.
        results: implementation, arguments -> everything it computes, gradients included, by name.
        truth: the same from the definition in float64.
        problems: shape class, dtype, device -> random arguments; the first are those that are timed.
        dtypes: those that are verified on a device.
        implementations: by backend; :meth:`register` adds to them.
    """

    name: str
    results: Callable[[Implementation, Any], dict[str, Tensor]]
    truth: Callable[[Any], dict[str, Tensor]]
    problems: Callable[[str, torch.dtype, torch.device], Sequence[Any]]
    dtypes: tuple[torch.dtype, ...]
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def register(self, implementation: Implementation) -> None:
        """Adds an implementation, or replaces the one with its backend's name."""
        self.implementations[implementation.backend] = implementation


OPS: dict[str, Op] = {}
"""The ops that have more than one implementation for a GPU, by name."""


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# torch.compile can trace neither the native core nor Python's import system: it asks once, while it traces.
@torch.compiler.assume_constant_result
def _cuda_is_built() -> bool:
    return bool(build_info()["cuda_archs"])


@torch.compiler.assume_constant_result
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def missing(backend: str, device: str) -> Exception | None:
    """Why a backend cannot run on a type of device ("cpu", "cuda"), as the error to raise; None where it can."""
    if backend == "cuda" and not _cuda_is_built():
        return RuntimeError("backend 'cuda' was not built: nvcc was not found, or MERGETUNE_CUDA=0 was set")
    if backend == "triton" and not _triton_is_installed():
        return RuntimeError("backend 'triton' needs the package triton, which is not installed")
    needed = {"cpp": "cpu", "cuda": "cuda", "triton": device if interpreted() else "cuda"}.get(backend, device)
    if device != needed:
        return ValueError(f"backend {backend!r} needs tensors on {needed}, got {device}")
    return None


def available_backends() -> tuple[str, ...]:
    """The backends that can be asked for here."""
    gpu = torch.cuda.is_available()
    there = {"triton": gpu and _triton_is_installed(), "cuda": gpu and _cuda_is_built()}
    return tuple(name for name in BACKENDS if there.get(name, True))


def check_backend(backend: str, device: str, among: Sequence[str]) -> None:
    """Refuses a backend that an op does not have, or that is not there or not for the device.

    Raises:
        ValueError: no such backend, or not for this type of device.
        RuntimeError: it was not built, or a package is missing.
    """
    if backend not in among:
        raise ValueError(f"backend must be None or one of {', '.join(among)}, got {backend!r}")
    if error := missing(backend, device):
        raise error


def requested(op: str, name: str, tensor: Tensor, backend: str) -> str:
    """The backend of an op that was asked for, checked against the device and dtype of the argument ``name``.

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
