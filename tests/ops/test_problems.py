"""The random arguments on which implementations are compared: valid, in their shape class, equal in every process."""

import pytest
import torch
from torch import Tensor

from mergetune import ops

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape_class", ["small", "medium", "large"])
@pytest.mark.parametrize("op", sorted(ops.OPS))
def test_problems_are_valid_and_lie_in_their_shape_class(op: str, shape_class: str):
    """A verdict is looked up by shape class, so a problem of another class would judge the wrong calls."""
    for dtype in ops.OPS[op].dtypes:
        problems = ops.OPS[op].problems(shape_class, dtype, CPU)
        for problem in problems:
            problem.check()
            assert problem.shape_class() == shape_class
            assert dtype in {value.dtype for value in problem if isinstance(value, Tensor)}


@pytest.mark.parametrize("op", sorted(ops.OPS))
def test_problems_are_the_same_in_every_call_and_take_nothing_from_the_global_generator(op: str):
    before = torch.get_rng_state()
    first, second = (ops.OPS[op].problems("small", torch.float32, CPU) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
