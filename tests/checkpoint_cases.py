"""Checkpoints of other projects that several test files write."""

import torch
from torch import Tensor

N_CTX, WIDTH, CLASSES = 4, 16, 3


def context(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape or (N_CTX, WIDTH), generator=torch.Generator().manual_seed(0)).to(dtype)


# -- hostile and damaged files -----------------------------------------------------------------------------------------


class Hostile:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


# -- heads -------------------------------------------------------------------------------------------------------------


NAMES = ("ant", "bee", "cat")
WEIGHT, BIAS = context(CLASSES, WIDTH), context(CLASSES)
