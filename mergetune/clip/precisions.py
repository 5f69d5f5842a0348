"""Floating-point types of weights and cached features, by name."""

from __future__ import annotations

import torch

#: {name: dtype} for frozen weights and stored features. Trained tensors are always float32.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
