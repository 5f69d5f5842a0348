"""The native core: loaded here and nowhere else, after torch, so that both share their OpenMP threads."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401

try:
    from mergetune import _C as core
except ImportError as error:
    raise ImportError(
        f"mergetune's native core could not be loaded ({error}). Build it with `pip install .` in the source tree "
        "(a C++17 compiler is all that it needs), or reinstall the wheel: `pip install --force-reinstall mergetune`."
    ) from error


def build_info() -> dict[str, Any]:
    """How the native core was built: version, compiler, OpenMP, CPU variants and the one in use, CUDA architectures."""
    return core.build_info()


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's values begin, as the core takes it; 0 for nothing."""
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()
