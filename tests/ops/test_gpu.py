"""Every op on a GPU: each backend, dtype and odd size, again and again, in streams, in a graph, and compiled.

``TRITON_INTERPRET=0 pytest -m gpu`` runs all of it. Without a GPU, the same cases run through the C++ core and through
Triton's interpreter, twice instead of 200 times.

Sizes: B rows, C classes, D embedding width, K anchors, N points on a path; M prompts, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from devices import COMPILED, GPU, INTERPRETED, WHERE_KERNELS_RUN, marked
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: its kernels are NOT tested")

import test_native  # noqa: E402
import test_triton  # noqa: E402
import test_triton_attention  # noqa: E402

from mergetune import ops  # noqa: E402

REPEATS = 1 if INTERPRETED else 200
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LOSS_SIZES = ((1, 1, 1, 0, 1), (3, 17, 33, 1, 1), (17, 5, 65, 2, 3), (33, 3, 127, 3, 9), (9, 37, 16, 4, 2))
ROW_SIZES = ((0, 1, 1, 1), (1, 3, 2, 4), (2, 7, 33, 5), (3, 65, 500, 17), (1, 1100, 5, 2))
ATTENTION_SIZES = (
    (1, (1,), 0, 1, 1),
    (2, (3, 1, 2), 1, 3, 5),
    (1, (1, 2, 2, 3, 4, 4, 7, 15), 5, 1, 64),
    (1, (40, 3), 17, 1, 33),
)

cuda_built = pytest.mark.skipif(not ops.build_info()["cuda_archs"], reason="built without CUDA")
CPP, TRITON = pytest.param("cpp"), pytest.param("triton", marks=WHERE_KERNELS_RUN)
CUDA, DEFAULT = pytest.param("cuda", marks=(*GPU, cuda_built)), pytest.param("default", marks=GPU)
COMPUTES_FLOAT64 = ("cpp", "cuda")


@dataclass(frozen=True)
class Case:
    """One call of an op, and the gradient of its first result.

    Attributes:
        tensors: on the CPU; "d_out" is the gradient to the first result, if that is not a number.
        leaves: which of them the gradient is taken to.
        forward: all results, of the tensors and the backend.
    """

    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]
    forward: Callable[[dict[str, Tensor], str | None], tuple[Tensor, ...]]

    def to(self, device: str, dtype: torch.dtype | None = None) -> "Case":
        cast = lambda t: t.to(device, dtype if t.is_floating_point() else None)  # noqa: E731
        return Case({name: cast(t) for name, t in self.tensors.items()}, self.leaves, self.forward)

    def run(self, backend: str | None, forward: Callable | None = None) -> list[Tensor]:
        leaves = {name: self.tensors[name].detach().requires_grad_() for name in self.leaves}
        results = (forward or self.forward)(self.tensors | leaves, None if backend == "default" else backend)
        d_out = self.tensors.get("d_out")
        gradients = torch.autograd.grad(results[0], list(leaves.values()), d_out) if leaves else ()
        return [t.detach() for t in (*results, *gradients)]

    def check(self, got: list[Tensor], tolerance: float) -> None:
        """Against the definition in float64, on the CPU: errors relative to the largest value, or to 1."""
        for ours, truth in zip(got, self.to("cpu", torch.float64).run("torch"), strict=True):
            assert ours.shape == truth.shape
            error = test_triton_attention.largest(ours.cpu() - truth)
            size = max(1.0, test_triton_attention.largest(truth))
            assert error <= tolerance * size, f"off by {error} of {size}"  # NaN fails


def loss_case(b: int, c: int, d: int, k: int, n: int, dtype: torch.dtype) -> Case:
    arguments = test_triton.problem(b, c, d, k, n, dtype)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    numbers = {name: arguments[name] for name in ("scale", "lam", "normalize")}
    return Case(tensors, ("w",), lambda given, backend: ops.lmc_loss(**given, **numbers, backend=backend))


def rows_case(k: int, b: int, c: int, p: int, dtype: torch.dtype) -> Case:
    given = vars(test_native.Problem.random(k, b, c, p, dtype))
    return Case(dict(given), (), lambda given, backend: ops.path_cross_entropy(**given, backend=backend))


def attention_case(m, lengths, s, h, d, dtype: torch.dtype, *, pooled: bool = False, causal: bool = True) -> Case:
    arguments = test_triton_attention.problem(m, lengths, s, h, d, dtype, pooled=pooled, causal=causal)
    leaves = test_triton_attention.INPUTS

    def forward(given: dict[str, Tensor], backend: str | None) -> tuple[Tensor, ...]:
        own = (given[name] for name in leaves)
        return (ops.prefix_attention(*own, lengths, causal=causal, backend=backend),)

    return Case({name: t for name, t in arguments.items() if isinstance(t, Tensor)}, leaves, forward)


def device(backend: str) -> str:
    return "cpu" if backend == "cpp" or (backend == "triton" and INTERPRETED) else "cuda"


def usual(op: str, dtype: torch.dtype) -> Case:
    """A case of an op with several tiles, groups, anchors and points."""
    if op == "lmc_loss":
        return loss_case(*((17, 18, 17, 2, 2) if INTERPRETED else (256, 500, 513, 2, 8)), dtype)
    if op == "path_cross_entropy":
        return rows_case(2, 65, 500, 17, dtype)
    lengths = (1, 2, 5) if INTERPRETED else tuple(sorted(1 + i % 11 for i in range(300)))
    return attention_case(2, lengths, 5, 2, 16 if INTERPRETED else 64, dtype)


USUAL = [pytest.param("lmc_loss", *p.values, marks=p.marks) for p in (TRITON, CUDA, DEFAULT)]
USUAL += [pytest.param("path_cross_entropy", *p.values, marks=p.marks) for p in (CPP, CUDA)]
USUAL += [pytest.param("prefix_attention", *p.values, marks=p.marks) for p in (TRITON, DEFAULT)]


def usual_dtypes(op: str) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.float64) if op == "path_cross_entropy" else DTYPES


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA, DEFAULT])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("size", LOSS_SIZES, ids=str)
def test_the_loss(size, dtype, backend):
    case = loss_case(*size, dtype)
    if dtype == torch.float64 and backend == "triton":
        with pytest.raises(TypeError, match="got torch.float64"):
            case.to(device(backend)).run(backend)
        return
    case.check(case.to(device(backend)).run(backend), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", [CPP, CUDA, DEFAULT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", ROW_SIZES, ids=str)
def test_the_rows(size, dtype, backend):
    case = rows_case(*size, dtype)
    case.check(case.to(device(backend)).run(backend), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", [TRITON, DEFAULT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", [{}, {"pooled": True}, {"causal": False}], ids=str)
@pytest.mark.parametrize("size", ATTENTION_SIZES, ids=str)
def test_the_attention(size, variant, dtype, backend):
    case = attention_case(*size, dtype, **variant)
    case.check(case.to(device(backend)).run(backend), TOLERANCE[dtype])


def test_the_check_sees_an_error():
    case = rows_case(1, 3, 5, 2, torch.float64)
    got = case.run("cpp")
    case.check(got, 1e-10)
    got[1][1, 2] += 1e-3
    with pytest.raises(AssertionError, match="off by"):
        case.check(got, 1e-10)
    got[1][1, 2] = torch.nan
    with pytest.raises(AssertionError, match="off by"):
        case.check(got, 1e-10)


# -- again and again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "backend"), USUAL)
def test_the_same_bits_every_time(op, backend):
    for dtype in usual_dtypes(op):
        case = usual(op, dtype).to(device(backend))
        first = case.run(backend)
        case.check(first, TOLERANCE[dtype])
        for _ in range(REPEATS):
            assert all(map(torch.equal, case.run(backend), first)), dtype


@marked(WHERE_KERNELS_RUN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_atomic_loss_stays_within_the_tolerance(dtype):
    case = usual("lmc_loss", dtype).to(device("triton"))
    numbers = {"scale": 10.0, "lam": 4.0, "normalize": True, "anchor_dots": None}
    for _ in range(min(REPEATS, 20)):
        got = test_triton.module.lmc_loss(**case.tensors, **numbers, deterministic=False)
        case.check(list(got), TOLERANCE[dtype])


# -- streams, graphs, torch.compile -----------------------------------------------------------------------------------


@marked(COMPILED)
@pytest.mark.parametrize(("op", "backend"), [p for p in USUAL if p.values[1] in ("triton", "cuda")])
def test_two_streams_at_once(op, backend):
    """Two problems at the same time, each in a stream of its own: the bits of each alone."""
    dtypes = usual_dtypes(op)[:2]
    cases = [usual(op, dtype).to("cuda") for dtype in dtypes]
    alone = [case.run(backend) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    together = []
    for _ in range(50):
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(case.run(backend))
    torch.cuda.synchronize()
    for i, got in enumerate(together):
        assert all(map(torch.equal, got, alone[i % len(cases)])), dtypes[i % len(cases)]


@marked(COMPILED)
@pytest.mark.parametrize(("op", "backend"), [p for p in USUAL if p.values[1] in ("triton", "cuda")])
def test_a_captured_graph_replays_the_same_bits(op, backend):
    """Then on other values, which are written into the tensors that were captured."""
    for dtype in usual_dtypes(op):
        case = usual(op, dtype).to("cuda")
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their algorithms and take their workspaces here
            expected = [t.clone() for t in case.run(backend)]
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.run(backend)
        name = {"lmc_loss": "x", "path_cross_entropy": "dots", "prefix_attention": "v"}[op]
        for _ in range(3):
            graph.replay()
            assert all(map(torch.equal, captured, expected)), dtype
        case.tensors[name].mul_(0.5)
        graph.replay()
        assert all(map(torch.equal, captured, case.run(backend))), dtype


@pytest.mark.parametrize(("op", "backend"), [p for p in USUAL if p.values[0] != "path_cross_entropy"])
def test_torch_compile_in_one_graph(op, backend):
    """Forward and gradient through the op inside of a compiled function, which computes before and after it."""
    case = usual(op, torch.float32).to(device(backend))

    def doubled(given: dict[str, Tensor], backend: str | None) -> tuple[Tensor, ...]:
        first, *rest = case.forward({name: t.clone() for name, t in given.items()}, backend)
        return 2 * first, *rest

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    got, expected = case.run(backend, compiled), case.run(backend, doubled)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, expected, strict=True))
