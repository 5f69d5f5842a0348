"""Loading of the native core. Only this file loads the core, after torch, so that both share their OpenMP threads."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401

try:
    from mergetune import _C as core
except ImportError as error:
    raise ImportError(
        f"mergetune's native core could not be loaded ({error}). Build it with `pip install .` in the source tree "
        "(this needs only a C++17 compiler), or reinstall the wheel: `pip install --force-reinstall mergetune`."
    ) from error


def build_info() -> dict[str, Any]:
    """Facts of the native core: version, compiler, OpenMP, CPU variants, the variant in use, CUDA architectures."""
    return core.build_info()


def address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's values for the native core; 0 for None or an empty tensor."""
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()
