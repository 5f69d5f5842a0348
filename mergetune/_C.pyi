"""The native core, as type checkers see it; csrc/bindings.cpp defines it. Addresses are of data, 0 is none."""

from collections.abc import Sequence
from typing import Any

_Heads = tuple[int, int, int, int]  # a tensor [M, rows, H, d]: its address, and its strides but the last, which is 1
_ClassWeights = tuple[int, int, int, int, int, int, float, bool, int, int, int, int]
_TaskVectors = tuple[int, Sequence[int], int, int, int, int, int, bool, float, int]

__file__: str

def build_info() -> dict[str, Any]: ...
def cpu_variant_runs(variant: str) -> bool: ...
def path_cross_entropy_cpu(
    dtype: str,
    dots_ptr: int,
    stride_m: int,
    stride_b: int,
    labels_ptr: int,
    anchor_ptr: int,
    alpha_ptr: int,
    weight_ptr: int,
    rscale_ptr: int,
    loss_ptr: int,
    d_dots_ptr: int,
    d_rscale_ptr: int,
    K: int,
    B: int,
    C: int,
    P: int,
    num_threads: int,
    variant: str = "",
) -> None: ...
def path_cross_entropy_cuda(
    dtype: str,
    dots_ptr: int,
    stride_m: int,
    stride_b: int,
    labels_ptr: int,
    anchor_ptr: int,
    alpha_ptr: int,
    weight_ptr: int,
    rscale_ptr: int,
    loss_ptr: int,
    d_dots_ptr: int,
    d_rscale_ptr: int,
    K: int,
    B: int,
    C: int,
    P: int,
    stream: int,
) -> None:
    """Where CUDA was built: ``build_info()["cuda_archs"]`` is not empty."""

def path_scales_cpu(
    dtype: str, class_weights: _ClassWeights, rscale_ptr: int, products_ptr: int, num_threads: int, variant: str = ""
) -> None: ...
def class_gradient_cpu(
    dtype: str,
    class_weights: _ClassWeights,
    rscale_ptr: int,
    d_rscale_ptr: int,
    products_ptr: int,
    lam: float,
    grad_ptr: int,
    surrogate_ptr: int,
    num_threads: int,
    variant: str = "",
) -> None: ...
def prefix_attention_cpu(
    dtype: str,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    prefix_k: _Heads,
    prefix_v: _Heads,
    offsets_ptr: int,
    out: _Heads,
    M: int,
    Tq: int,
    T: int,
    S: int,
    C: int,
    H: int,
    d: int,
    causal: bool,
    num_threads: int,
    variant: str = "",
) -> None: ...
def prefix_attention_backward_cpu(
    dtype: str,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    prefix_k: _Heads,
    prefix_v: _Heads,
    offsets_ptr: int,
    d_out: _Heads,
    dq: _Heads,
    dk: _Heads,
    dv: _Heads,
    d_prefix_k: _Heads,
    d_prefix_v: _Heads,
    M: int,
    Tq: int,
    T: int,
    S: int,
    C: int,
    H: int,
    d: int,
    causal: bool,
    num_threads: int,
    variant: str = "",
) -> None: ...
def merge_deltas_cpu(dtype: str, task_vectors: _TaskVectors, out_ptr: int, variant: str = "") -> None: ...
def count_around_cpu(
    dtype: str, values_ptr: int, base_ptr: int, n: int, low: float, high: float, between_ptr: int, variant: str = ""
) -> list[int]: ...
