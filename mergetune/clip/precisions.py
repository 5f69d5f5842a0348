"""The floating-point types that weights and cached features may have, by name."""

from __future__ import annotations

import torch

#: {name: type}. Weights and stored features may be rounded to it; what is trained is float32.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
