"""Where the kernels' tests run: interpreted on the CPU, or compiled on a GPU under ``TRITON_INTERPRET=0``."""

import os
from collections.abc import Callable

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
"""Marks of a test that needs a CUDA device."""

COMPILED = (*GPU, pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is not 0: Triton's kernels are interpreted"))
"""Marks of a test of a Triton kernel that is compiled."""

WHERE_KERNELS_RUN = () if INTERPRETED else GPU
"""Marks of a test of a Triton kernel that runs on both: none on the CPU, those of ``GPU`` otherwise."""


def marked(marks: tuple[pytest.MarkDecorator, ...]) -> Callable:
    """A decorator that gives a test all `marks`."""

    def decorate(test: Callable) -> Callable:
        for mark in marks:
            test = mark(test)
        return test

    return decorate
