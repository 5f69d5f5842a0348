"""Loading of the native core. Only this file loads the core, after torch, so that both share their OpenMP threads."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401

from mergetune.facts.source_tree import check_core, why_no_core

try:
    from mergetune import _C as core
except ImportError as error:
    raise ImportError(why_no_core(error)) from error
check_core(core)


def build_info() -> dict[str, Any]:
    """Facts of the native core: file, version, compiler, OpenMP, CPU variants, the one in use, CUDA architectures."""
    return {**core.build_info(), "file": core.__file__}


def address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's values for the native core; 0 for None or an empty tensor."""
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()
