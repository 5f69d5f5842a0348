"""Before anything is imported: no network, no display, the Triton interpreter, one thread. Then shared fixtures."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process per core

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def clip():
    """A tiny CLIP. (Imported here, not above: tests of kernels alone need none.)"""
    from tiny import tiny_clip

    return tiny_clip()


@pytest.fixture
def one_thread():
    """Bits are promised for one number of threads, and a forked child must not enter its parent's thread pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison_uninitialized_memory():
    """New tensors are filled with NaN, so that whatever is read before it is written, or never written, shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # some of CUDA's operations would raise
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled
