"""Names of dtypes in torch ("float32") and in safetensors files ("F32")."""

from __future__ import annotations

from typing import Final

import torch

STORED_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in safetensors files -> dtype."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


STORED_NAMES: Final = {dtype_name(dtype): name for name, dtype in STORED_DTYPES.items()}
"""Name of a dtype ("float32") -> name in safetensors files ("F32")."""

FLOAT_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Name -> dtype, for the dtypes of stored features and of running models."""


def not_plain(tensor: torch.Tensor) -> str | None:
    """What a tensor is if it does not hold its numbers one by one, such as "a sparse tensor"; None if it does."""
    if tensor.device.type == "meta":
        return "a tensor on the device meta, which has no numbers"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.layout != torch.strided:
        return f"a {'sparse' if 'sparse' in str(tensor.layout) else tensor.layout} tensor"
    return "a nested tensor" if tensor.is_nested else None


def require_plain(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError, naming the argument, for the tensors of :func:`not_plain`."""
    if kind := not_plain(tensor):
        raise ValueError(f"{name} must be a tensor of plain numbers, got {kind}")
