"""What every test needs before anything is imported: no network, no display, the Triton interpreter, two threads."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
