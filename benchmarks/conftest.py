"""Setup of the benchmarks: two threads by default, facts of the machine, a ViT-B/16, and the report at the end."""

import os

os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import open_clip  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from measure import DEVICE, lines  # noqa: E402

from mergetune import FrozenClip, ops  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "core": {name: str(value) for name, value in ops.build_info().items()},
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    for bench in session.benchmarks if session else ():
        if "title" in bench.extra_info:
            for line in lines(bench.extra_info):
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def vit_b16() -> FrozenClip:
    """A ViT-B/16 with random weights, which is as fast as one with trained weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-16").to(DEVICE)
    return FrozenClip(model, open_clip.get_tokenizer("ViT-B-16"), "ViT-B-16/random")
