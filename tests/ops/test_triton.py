"""The Triton kernel of the LMC loss: against its definition, in any order of programs, and compiled ahead of time.

It is interpreted on the CPU; ``TRITON_INTERPRET=0 pytest -m gpu`` runs the same tests on a GPU.
"""

import inspect
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import check_resources, compile_quick
from devices import COMPILED, DEVICE, INTERPRETED, WHERE_KERNELS_RUN, marked
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are NOT tested")

from mergetune.kernels import lmc_loss as module  # noqa: E402

from mergetune.ops import reference  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]
ABSOLUTE = {torch.bfloat16: 1e-3, torch.float16: 1e-4}  # on top of twice plain torch's own error
RESULTS = ("loss", "terms", "grad")

runs_kernel = marked(WHERE_KERNELS_RUN)
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")
pytestmark = pytest.mark.usefixtures("poison_uninitialized_memory")


@pytest.fixture
def one_job(monkeypatch):
    """Each pass as one job, if it can be: programs then loop over tiles and row blocks, and merge what they have."""
    monkeypatch.setattr(module, "PARALLEL_JOBS", 1)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(b, c, d, k=2, n=3, dtype=torch.float32, w1=True, curvature=True, **options) -> dict:
    """Arguments of the definition; the first path point is the anchor, the last one w."""
    tensors = {
        "x": F.normalize(draw(b, d, seed=1), dim=-1),
        "w": draw(c, d, seed=2),
        "anchors": draw(k, c, d, seed=3),
        "w1": draw(c, d, seed=4) if w1 else None,
        "curvature": draw(c, d, seed=5).abs() if curvature else None,
    }
    tensors = {name: tensor if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(6)
    return {
        **tensors,
        "labels": torch.randint(c, (b,), generator=generator),
        "alphas": torch.linspace(0, 1, n, dtype=torch.float64),
        "betas": 0.1 + torch.rand(k, generator=generator, dtype=torch.float64),
        "scale": 10.0,
        "lam": 4.0,
        "normalize": True,
        **options,
    }


def kernel(arguments: dict, **options) -> dict[str, Tensor]:
    arguments = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    results = module.lmc_loss(**{"anchor_dots": None, **arguments}, **options)
    return {name: result.cpu() for name, result in zip(RESULTS, results, strict=True)}


def definition(arguments: dict, dtype: torch.dtype | None = torch.float64) -> dict[str, Tensor]:
    """In float64 of the values that the kernel is given, or in another dtype."""
    is_float = lambda value: isinstance(value, Tensor) and value.is_floating_point()  # noqa: E731
    cast = {name: value.to(dtype) if is_float(value) else value for name, value in arguments.items()}
    cast.pop("anchor_dots", None)
    w = cast.pop("w").detach().requires_grad_()
    loss, terms = reference.lmc_loss(w=w, **cast)
    (grad,) = torch.autograd.grad(loss, w)
    return dict(zip(RESULTS, (loss.detach(), terms, grad), strict=True))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == torch.float32
        error = (got[name].double() - value.double()).abs().max()
        assert error <= tolerance * value.abs().max().clamp_min(1), f"{name}: off by {error}"  # NaN fails


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in RESULTS:
        assert torch.equal(a[name], b[name]), name


# -- parity -----------------------------------------------------------------------------------------------------------


@runs_kernel
@pytest.mark.parametrize(
    ("b", "c", "d", "k", "n", "deterministic"),
    [
        (1, 1, 1, 1, 1, True),
        (1, 3, 17, 0, 1, False),
        (3, 1, 3, 2, 2, True),
        (3, 17, 33, 4, 1, False),
        (3, 3, 3, 1, 32, True),
        (17, 3, 65, 3, 2, False),
        (17, 33, 3, 1, 3, True),
        (17, 65, 3, 0, 0, False),
        (17, 17, 17, 4, 2, True),
        (17, 33, 65, 1, 1, False),
        (65, 3, 17, 1, 7, True),
        (65, 17, 33, 2, 2, False),
        (3, 5, 513, 1, 2, True),
    ],
)
def test_parity_with_the_definition(b, c, d, k, n, deterministic):
    arguments = problem(b, c, d, k, n)
    assert_close(kernel(arguments, deterministic=deterministic), definition(arguments))


@runs_kernel
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_parity_where_a_job_has_several_tiles(one_job, normalize, deterministic):
    arguments = problem(35, 69, 9, 1, 2, normalize=normalize, w1=False, curvature=False)
    assert_close(kernel(arguments, deterministic=deterministic), definition(arguments))


@runs_kernel
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("w1", "curvature", "lam"), [(1, 1, 3.0), (1, 0, 3.0), (1, 1, 0.0), (0, 0, 3.0)])
@pytest.mark.parametrize("k", [0, 2])
def test_parity_of_every_option(k, w1, curvature, lam, normalize):
    arguments = problem(9, 5, 7, k, w1=w1, curvature=curvature, lam=lam, normalize=normalize)
    assert_close(kernel(arguments), definition(arguments))


@runs_kernel
@pytest.mark.parametrize("alphas", [[0.0], [1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [0.3]])
def test_parity_at_the_ends_of_the_path(alphas):
    arguments = problem(9, 4, 6, alphas=torch.tensor(alphas))
    assert_close(kernel(arguments), definition(arguments))


@runs_kernel
def test_known_anchor_products():
    arguments = problem(9, 5, 7, 2, 2)
    arguments["anchor_dots"] = arguments["x"] @ arguments["anchors"].mT
    assert_close(kernel(arguments), definition(arguments))
    arguments["anchor_dots"] = torch.zeros_like(arguments["anchor_dots"])
    assert not torch.equal(kernel(arguments)["loss"], kernel({**arguments, "anchor_dots": None})["loss"])


@runs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_as_one_more_column(dtype):
    """A head of width 64 and its bias are one of width 65: the definition's logits, and the bias's own gradient."""
    arguments = problem(17, 5, 65, dtype=dtype, normalize=False, w1=False, curvature=False, scale=1.0, n=1, k=0)
    arguments["x"][:, -1] = 1
    head, bias = arguments["w"][:, :-1].double().requires_grad_(), arguments["w"][:, -1].double().requires_grad_()
    loss = F.cross_entropy(F.linear(arguments["x"][:, :-1].double(), head, bias), arguments["labels"])
    loss.backward()
    got = kernel(arguments)
    assert torch.allclose(got["loss"].double(), loss.detach(), rtol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert torch.allclose(got["grad"].double(), torch.cat([head.grad, bias.grad[:, None]], 1), atol=tolerance)


@runs_kernel
@pytest.mark.parametrize("normalize", [True, False])
def test_extreme_logits(normalize):
    """Logits of +-1e4, where all but one exponential vanish; 32 bits hold them to 1e-3, so that softmax is as exact."""
    arguments = problem(33, 17, 9, normalize=normalize, scale=1e4)
    got, expected = kernel(arguments), definition(arguments)
    assert all(value.isfinite().all() for value in got.values())
    assert_close({name: got[name] for name in ("loss", "terms")}, {n: expected[n] for n in ("loss", "terms")}, 1e-6)
    assert_close({"grad": got["grad"]}, {"grad": expected["grad"]}, 1e-3)


@runs_kernel
@pytest.mark.parametrize("k", [0, 2])
def test_zero_rows(k):
    """A class weight of 0 has the logit 0 and, like F.normalize's, a huge but finite gradient."""
    arguments = problem(5, 4, 6, k)
    arguments["w"][1] = 0
    got, expected = kernel(arguments), definition(arguments)
    assert got["grad"].isfinite().all()
    assert_close(got, expected)
    kept = [0, 2, 3]
    assert_close({"grad": got["grad"][kept]}, {"grad": expected["grad"][kept]})


@runs_kernel
def test_any_layout():
    arguments = problem(17, 5, 9)
    laid_out = dict(arguments)
    for name in ("x", "w", "anchors", "w1", "curvature"):
        laid_out[name] = arguments[name].mT.contiguous().mT
        assert not laid_out[name].is_contiguous()
    for name in ("labels", "alphas", "betas"):
        laid_out[name] = arguments[name].repeat_interleave(2)[::2]
    assert_same_bits(kernel(laid_out), kernel(arguments))


@runs_kernel
def test_mixed_dtypes():
    """Half features with float32 weights are computed in float32; anchors and the rest may even be float64."""
    arguments = problem(9, 5, 7)
    arguments["x"] = arguments["x"].bfloat16()
    expected = kernel({**arguments, "x": arguments["x"].float()})
    for name in ("anchors", "w1", "curvature"):
        arguments[name] = arguments[name].double()
    arguments |= {"alphas": arguments["alphas"].float(), "labels": arguments["labels"].int()}
    assert_close(kernel(arguments), expected, 1e-6)


@runs_kernel
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("size", "k"), [((1, 3, 3), 0), ((17, 17, 65), 2)])
def test_half_types_by_the_three_way_rule(size, k, normalize, dtype):
    """The error to a float64 truth is at most twice that of plain torch in the same dtype, and a little."""
    arguments = problem(*size, k, dtype=dtype, normalize=normalize)
    truth, plain, got = definition(arguments), definition(arguments, dtype), kernel(arguments)
    assert got["loss"].dtype == got["terms"].dtype == torch.float32
    assert got["grad"].dtype == dtype
    for name, value in truth.items():
        error, allowed = ((r[name].double() - value).abs().max() for r in (got, plain))
        assert error <= 2 * allowed + ABSOLUTE[dtype], f"{name}: off by {error}, plain torch by {allowed}"


@runs_kernel
@pytest.mark.parametrize("label", [-1, 5, 2**32 + 1])
def test_label_out_of_range_is_not_passed_over(label):
    arguments = problem(9, 5, 7)
    arguments["labels"][3] = label
    got = kernel(arguments)
    assert got["loss"].isnan()
    assert got["grad"].isnan().all()


@runs_kernel
def test_refusals():
    arguments = problem(3, 4, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match="w must be float32, bfloat16 or float16, got torch.float64"):
        kernel(arguments)


# -- one launch, the same bits ----------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """The keyword arguments of every launch, with its grid."""
    calls = []
    run = module.lmc_loss_kernel.run
    monkeypatch.setattr(module.lmc_loss_kernel, "run", lambda *a, **kw: [calls.append(kw), run(*a, **kw)][1])
    return calls


@runs_kernel
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("k", [0, 3])
def test_one_launch_a_call(launches, k, deterministic):
    arguments = problem(17, 5, 9, k, 2)
    kernel(arguments, deterministic=deterministic)  # a GPU times tile sizes at the fast variant's first call
    launches.clear()
    kernel(arguments, deterministic=deterministic)
    assert len(launches) == 1


@runs_kernel
def test_every_program_has_a_job_and_every_job_a_program(launches):
    kernel(problem(35, 37, 9, 1, 2))
    (launch,) = launches
    tickets, norms, surrogates, tiles, rows, slabs = launch["counters"].tolist()
    assert tickets == launch["grid"][0] == surrogates + tiles + rows + slabs + 1 + surrogates
    assert norms == surrogates


def test_memory_does_not_grow_with_rows_times_classes(monkeypatch):
    """Whole ImageNet-21k in large batches, on meta tensors: workspace is about one gradient."""
    workspace = []
    monkeypatch.setattr(module.lmc_loss_kernel, "run", lambda *_, **kw: workspace.append(kw["slabs"]._base.numel()))
    b, c, d, k, n = 4096, 21_841, 1024, 2, 8
    x, w, anchors, w1 = (torch.empty(*s, d, device="meta", dtype=torch.bfloat16) for s in ((b,), (c,), (k, c), (c,)))
    vectors = (torch.empty(s, device="meta") for s in (n, k))
    module.lmc_loss(x, torch.empty(b, device="meta").long(), w, anchors, *vectors, 100.0, w1, None, 8.0, True, None)
    assert workspace[0] < 1.1 * c * d < b * c


@runs_kernel
def test_deterministic_gives_the_same_bits_twice():
    arguments = problem(35, 33, 19, 2, 2, dtype=torch.bfloat16)
    assert_same_bits(kernel(arguments), kernel(arguments))


@pytest.mark.slow
@only_interpreted
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("resident", [2, 5])
def test_any_number_of_programs_at_once(monkeypatch, resident, deterministic):
    """Programs side by side, in threads that interleave anywhere: no deadlock, and no bit depends on their order."""
    arguments = problem(35, 33, 9, 2, 2)
    alone = kernel(arguments, deterministic=deterministic)
    interpreter = sys.modules["triton.runtime.interpreter"]
    executor = interpreter.GridExecutor
    create = executor.__init__
    patch = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda _: patch(module.lmc_loss_kernel.fn))

    def concurrent(self, fn, arg_names, grid, *rest, **options):
        started = threading.Event()

        def run_all_at_once(**kernel_arguments):
            if started.is_set():
                return  # one call does it for the whole grid
            started.set()
            with ThreadPoolExecutor(resident) as pool:
                for program in [pool.submit(fn, **kernel_arguments) for _ in range(grid[0])]:
                    program.result()

        run_all_at_once.__signature__ = inspect.signature(fn)
        create(self, fn, arg_names, grid, *rest, **options)
        self.fn = run_all_at_once

    monkeypatch.setattr(executor, "__init__", concurrent)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        together = kernel(arguments, deterministic=deterministic)
    finally:
        sys.setswitchinterval(interval)
    if deterministic:
        assert_same_bits(together, alone)
    assert_close(together, definition(arguments))


# -- tile sizes -------------------------------------------------------------------------------------------------------


@runs_kernel
@pytest.mark.parametrize(("dtype", "config"), [(torch.bfloat16, c) for c in module.HALF_CONFIGS]
                         + [(torch.float32, c) for c in module.FLOAT_CONFIGS])  # fmt: skip
def test_every_tile_size_is_right(monkeypatch, dtype, config):
    monkeypatch.setattr(module, "candidate_configs", lambda *_: [config])
    arguments = problem(35, 37, 33, 1, 2, dtype=dtype)
    got, truth = kernel(arguments), definition(arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert_close({name: value.float() for name, value in got.items()}, truth, tolerance)


def test_the_choice_of_tiles_depends_on_the_shape_alone():
    first = lambda *shape: module.candidate_configs(*shape)[0]  # noqa: E731
    assert first(256, 500, 512, torch.bfloat16) == module.HALF_CONFIGS[0]
    assert first(4096, 1000, 512, torch.bfloat16) == module.HALF_CONFIGS[2]  # enough tiles: larger ones
    assert first(1, 1, 512, torch.float32).block_b == 16
    assert first(4096, 1000, 1, torch.float32).block_b == 16
    for b in (1, 16, 17, 100, 10_000):
        candidates = module.candidate_configs(b, 500, 512, torch.float16)
        assert candidates
        assert len(set(candidates)) == len(candidates)
        assert all(config.block_b < 2 * max(b, 16) for config in candidates)


# -- ahead of time ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """The default configurations."""
    return compile_quick("lmc_loss")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time_without_spills(compiled, capability):
    cases = [case for case in compiled if case["capability"] == capability]
    assert {case["dtype"] for case in cases} == {"bf16", "fp32"}
    check_resources(cases)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@marked(COMPILED)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("d", [512, 513])
def test_real_sizes(d, dtype, deterministic):
    arguments = problem(256, 500, d, 2, 8, dtype=dtype, scale=100.0)
    truth, got = definition(arguments), kernel(arguments, deterministic=deterministic)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    assert_close({name: value.float() for name, value in got.items()}, truth, tolerance)
    if deterministic:
        for _ in range(20):
            assert_same_bits(kernel(arguments), got)
