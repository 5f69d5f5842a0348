"""What all exports do: check the ending of a file, and bring tensors into the form of a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def checked_suffix(file: str | Path, suffixes: Sequence[str]) -> Path:
    """The path of a file to write; raises ValueError for a folder or another file ending."""
    file = Path(file)
    if file.suffix not in suffixes:
        raise ValueError(f"file must end in {', '.join(suffixes)}, got {file.name!r}")
    if file.is_dir():
        raise ValueError(f"file must be the path of a file, got the folder {file}")
    return file


def plain_tensor(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def torch_bytes(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()
