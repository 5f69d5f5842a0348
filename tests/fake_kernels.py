"""Implementations that stand for kernels of a simulated device: one is right and fast, each other one fails its way.

They are registered when this module is imported, in the tests and in the child process that tries them.
"""

import os
import signal
import time

import torch

from mergetune.ops import OPS, Implementation
from mergetune.ops.arguments import AttentionArguments, LossArguments

LOSS, ATTENTION = OPS["lmc_loss"], OPS["prefix_attention"]
DEFINITION = LOSS.implementations["torch"].run
CORE = LOSS.implementations["cpp"].run


def wrong(arguments: LossArguments):
    """Off by a hundredth in the gradient alone."""
    loss, terms, grad = CORE(arguments)
    return loss, terms, 1.01 * grad


def wrong_now_and_then(arguments: LossArguments):
    """Right but for every third call."""
    wrong_now_and_then.calls += 1
    return wrong(arguments) if wrong_now_and_then.calls % 3 == 0 else CORE(arguments)


wrong_now_and_then.calls = 0


def wrong_for_odd_widths(arguments: LossArguments):
    return wrong(arguments) if arguments.w.shape[1] % 2 else CORE(arguments)


def not_a_number(arguments: LossArguments):
    loss, terms, grad = CORE(arguments)
    return loss, terms, grad * torch.nan


def slow(arguments: LossArguments):
    time.sleep(0.05)
    return CORE(arguments)


def raises(arguments: LossArguments):
    raise RuntimeError("an illegal instruction was met")


def hangs(arguments: LossArguments):
    while True:
        time.sleep(0.01)


def crashes(arguments: LossArguments):
    os.kill(os.getpid(), signal.SIGSEGV)


def prints(arguments: LossArguments):
    """What a compiler may do, without the end of the line."""
    print('{"end": 1} \x1emergetune', end="", flush=True)
    return CORE(arguments)


def fast(arguments: LossArguments):
    """Right, and the core: faster than the definition."""
    return CORE(arguments)


def wrong_keys(d_out: torch.Tensor, arguments: AttentionArguments):
    """A backward of attention: off by a hundredth in the gradient of the keys alone."""
    d_q, d_k, *others = ATTENTION.implementations["cpp"].run_backward(d_out, arguments)
    return d_q, 1.01 * d_k, *others


def lacks_a_head(d_out: torch.Tensor, arguments: AttentionArguments):
    """A backward of attention: the gradient of the queries has another shape."""
    d_q, *others = ATTENTION.implementations["cpp"].run_backward(d_out, arguments)
    return d_q[:, :, 1:], *others


FAKES = (wrong, wrong_now_and_then, wrong_for_odd_widths, not_a_number, slow, raises, hangs, crashes, prints, fast)
BACKWARD_FAKES = (wrong_keys, lacks_a_head)


def register() -> None:
    for fake in FAKES:
        LOSS.register(Implementation(fake.__name__, fake))
    for fake in BACKWARD_FAKES:
        ATTENTION.register(Implementation(fake.__name__, ATTENTION.implementations["cpp"].run, fake))


def unregister() -> None:
    for op, fakes in ((LOSS, FAKES), (ATTENTION, BACKWARD_FAKES)):
        for fake in fakes:
            op.implementations.pop(fake.__name__, None)


if os.environ.get("MERGETUNE_TEST_FAKES") == "1":  # in the child; a test registers them for its own time alone
    register()
