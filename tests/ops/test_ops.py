"""The ops against their definitions: values, gradients, half types, fakes, compilation, refusals and bits."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune import ops
from mergetune.ops import reference
from mergetune.ops.backends import BACKENDS, missing

HALVES = [torch.bfloat16, torch.float16]
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the largest value of the definition in the same dtype
ABSOLUTE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}  # on top of twice plain torch's own error
SIZES = [
    # B, C, D
    (1, 2, 3),
    (2, 1, 3),
    (2, 3, 2),
    (3, 33, 2),
    (33, 2, 3),
    (33, 33, 33),
    (1, 129, 33),
    (129, 1, 2),
    (33, 129, 3),
    (129, 3, 33),
    (3, 33, 129),
    (129, 129, 129),
]

pytestmark = pytest.mark.usefixtures("poison_uninitialized_memory")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def problem(b: int, c: int, d: int, k: int = 2, n: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments of lmc_loss; the first path point is the anchor, the last one w."""
    tensors = {
        "x": F.normalize(draw(b, d, seed=1), dim=-1),
        "w": draw(c, d, seed=2),
        "anchors": draw(k, c, d, seed=3),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {
        "labels": torch.randint(c, (b,), generator=generator(4)),
        "alphas": torch.linspace(0, 1, n, dtype=torch.float64),
        "betas": 0.1 + torch.rand(k, generator=generator(5), dtype=torch.float64),
    }


def zero_shot(b: int, c: int, d: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | float]:
    return {"w1": draw(c, d, seed=6).to(dtype), "curvature": draw(c, d, seed=7).abs().to(dtype), "lam": 4.0}


def run(function=ops.lmc_loss, **arguments) -> dict[str, Tensor]:
    """The loss, its terms and the gradient to w."""
    w = arguments.pop("w").detach().requires_grad_()
    loss, terms = function(w=w, **arguments)
    (grad,) = torch.autograd.grad(loss, w)
    assert not terms.requires_grad
    assert grad.shape == w.shape
    assert grad.dtype == w.dtype
    return {"loss": loss.detach(), "terms": terms, "grad": grad}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == value.dtype
        error = (got[name] - value).abs().max()
        assert error <= RELATIVE[value.dtype] * value.abs().max().clamp_min(1), f"{name}: off by {error}"


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (1, 16), (2, 5), (3, 2), (3, 16)])
@pytest.mark.parametrize("size", SIZES)
def test_parity_with_the_definition(size, k, n, dtype):
    arguments = {**problem(*size, k, n, dtype), **zero_shot(*size, dtype), "scale": 10.0}
    assert_same(run(**arguments, backend="cpp"), run(**arguments, backend="torch"))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("lam", [0.0, 3.0, None])
@pytest.mark.parametrize("k", [0, 2])
def test_parity_of_every_option(k, lam, curvature, normalize):
    size = (17, 5, 9)
    options = {"scale": 3.0, "normalize": normalize}
    if lam is not None:
        options |= zero_shot(*size) | {"lam": lam}
        options["curvature"] = options["curvature"] if curvature else None
    arguments = {**problem(*size, k), **options}
    assert_same(run(**arguments), run(**arguments, backend="torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_betas_in_another_dtype(dtype):
    """Betas that the dtype holds exactly weigh the same in any dtype, in the loss and in the gradient."""
    arguments = {**problem(9, 4, 6, 2, 3), "scale": 10.0, "betas": torch.tensor([0.5, 2.0], dtype=dtype)}
    assert_same(run(**arguments), run(**arguments, backend="torch"))


@pytest.mark.parametrize("alphas", [[0.0], [1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [0.3]])
def test_parity_at_the_ends_of_the_path(alphas):
    arguments = {**problem(9, 4, 6), "scale": 10.0, "alphas": torch.tensor(alphas)}
    assert_same(run(**arguments), run(**arguments, backend="torch"))


@pytest.mark.parametrize("normalize", [True, False])
def test_extreme_logits(normalize):
    """Logits of 1e4, where all but one exponential vanish: no infinity, and the float64 definition's values."""
    arguments = {**problem(33, 17, 9), "scale": 1e4, "normalize": normalize}
    got = run(**arguments)
    assert all(value.isfinite().all() for value in got.values())
    assert_same(got, run(**arguments, backend="torch"))


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("k", [0, 2])
def test_zero_rows(k, dtype):
    """A class weight of 0 has the logit 0 and, like F.normalize's, a huge but finite gradient."""
    size = (5, 4, 6)
    arguments = {**problem(*size, k, dtype=dtype), **zero_shot(*size, dtype), "scale": 10.0}
    arguments["w"][1] = 0
    got, expected = run(**arguments), run(**arguments, backend="torch")
    assert got["grad"].isfinite().all()
    assert_same(got, expected)
    kept = [0, 2, 3]
    assert_same({"grad": got["grad"][kept]}, {"grad": expected["grad"][kept]})


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_any_layout(layout, dtype):
    size = (17, 5, 9)
    arguments = {**problem(*size, dtype=dtype), **zero_shot(*size, dtype)}
    arguments["anchor_dots"] = arguments["x"] @ arguments["anchors"].mT
    laid_out = {
        "transposed": lambda t: t.mT.contiguous().mT,
        "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda t: t,
        "offset": lambda t: torch.cat([t[:1], t])[1:],
    }[layout]
    changed = {
        name: laid_out(value) if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else value
        for name, value in arguments.items()
    }
    if layout == "strided":
        for name in ("labels", "alphas", "betas"):
            changed[name] = arguments[name].repeat_interleave(2)[::2]
    if layout == "expanded":  # one image, one anchor and one path point many times
        for given in (arguments, changed):
            given.pop("anchor_dots")
        for name in ("x", "labels", "anchors", "alphas", "betas"):
            changed[name] = changed[name][:1].expand(3, *changed[name].shape[1:])
            arguments[name] = changed[name].clone()
    assert_same(run(**changed, scale=10.0), run(**arguments, scale=10.0, backend="torch"))


def test_anchor_dots_handed_in_give_the_same():
    arguments = {**problem(17, 5, 9), "scale": 10.0}
    got = run(**arguments, anchor_dots=arguments["x"] @ arguments["anchors"].mT)
    assert_same(got, run(**arguments))


def test_parity_in_float32_near_convergence():
    """w almost at the anchor, as in training: the squared norm of the interpolated weight must not cancel."""
    arguments = {**problem(33, 17, 64, 1, 5, torch.float32), "scale": 100.0}
    arguments["w"] = arguments["anchors"][0] + 1e-3 * draw(17, 64, seed=9).float()
    truth = run(**{name: in_float64(value) for name, value in arguments.items()}, backend="torch")
    three_way(run(**arguments), run(**arguments, backend="torch"), truth, torch.float32)


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 3, 1), (33, 2, 1)])
def test_unit_norm_in_one_dimension_has_no_gradient(size, dtype):
    """Every weight is 1 or -1: the gradient's two terms, of size scale / norm on the path, cancel."""
    arguments = {**problem(*size, dtype=dtype), **zero_shot(*size, dtype), "scale": 10.0}
    got, expected = run(**arguments), run(**arguments, backend="torch")
    path = torch.lerp(arguments["anchors"][:, None], arguments["w"], arguments["alphas"].to(dtype).view(-1, 1, 1))
    assert got.pop("grad").abs().max() <= RELATIVE[dtype] * arguments["scale"] / path.abs().min()
    del expected["grad"]
    assert_same(got, expected)


# -- half types -------------------------------------------------------------------------------------------------------


def in_float64(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def three_way(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The error to a float64 truth is at most twice that of plain torch in the same dtype, and a little."""
    for name, value in truth.items():
        error, allowed = ((other[name].double() - value).abs().max() for other in (got, plain))
        atol = ABSOLUTE[dtype] * value.abs().max().clamp_min(1)
        assert error <= 2 * allowed + atol, f"{name}: off by {error}, plain torch by {allowed}"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("size", [(1, 2, 3), (17, 33, 64)])
def test_half_types_by_the_three_way_rule(size, k, normalize, dtype):
    arguments = {**problem(*size, k, dtype=dtype), **zero_shot(*size, dtype), "scale": 10.0, "normalize": normalize}
    truth = run(**{name: in_float64(value) for name, value in arguments.items()}, backend="torch")
    plain = run(reference.lmc_loss, **{**arguments, "alphas": arguments["alphas"].to(dtype)})
    got = run(**arguments)
    assert got["loss"].dtype == got["terms"].dtype == torch.float32
    three_way(got, plain, truth, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_features_with_float32_weights(dtype):
    arguments = problem(17, 5, 9, dtype=torch.float32)
    x = arguments.pop("x").to(dtype)
    assert_same(run(x=x, **arguments, scale=10.0), run(x=x.float(), **arguments, scale=10.0, backend="torch"))


def test_loss_scale_of_float16():
    """GradScaler starts at 65536, which float16 cannot hold; the scaled gradient itself is in range."""
    arguments = problem(4, 3, 8, 1, 2, torch.float16)
    w = arguments.pop("w").requires_grad_()
    grads = [
        torch.autograd.grad(ops.lmc_loss(w=w, **arguments, scale=1.0, backend=backend)[0] * 65536.0, w)[0]
        for backend in ("cpp", "torch")
    ]
    assert grads[1].isfinite().all()
    assert torch.allclose(*grads, rtol=1e-2)


def test_autocast_changes_nothing():
    """Logits of 100 x cosine do not survive half types, whatever surrounds the op."""
    arguments = {**problem(33, 17, 64, dtype=torch.float32), "scale": 100.0}
    with torch.autocast("cpu", torch.bfloat16):
        got = run(**arguments)
    assert_same(got, run(**arguments))


# -- autograd ---------------------------------------------------------------------------------------------------------


def test_backward_scales_the_gradient():
    arguments = {**problem(9, 4, 6), "scale": 10.0}
    w = arguments.pop("w").requires_grad_()
    once, _ = ops.lmc_loss(w=w, **arguments)
    (3 * ops.lmc_loss(w=w, **arguments)[0] + once).backward()
    assert torch.allclose(w.grad, 4 * run(w=w, **arguments)["grad"], rtol=1e-14)


def test_gradient_reaches_what_w_was_made_from():
    arguments = {**problem(9, 4, 6), "scale": 10.0}
    w, factor = arguments.pop("w"), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    expected = (run(w=w * factor, **arguments)["grad"] * w).sum()
    (got,) = torch.autograd.grad(ops.lmc_loss(w=w * factor, **arguments)[0], factor)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)


def loss_with_leaves(**options) -> tuple[dict, dict[str, Tensor]]:
    """A call of the loss, and those of its tensors that may take a gradient."""
    size = (9, 4, 6)
    arguments = {**problem(*size), **zero_shot(*size), "scale": 10.0, **options}
    leaves = {name: t for name, t in arguments.items() if isinstance(t, Tensor) and t.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return arguments, leaves


@pytest.mark.parametrize("variable", ["", "torch"])
@pytest.mark.parametrize("backend", [None, "cpp"])
def test_gradient_flows_to_w_alone(backend, variable, monkeypatch):
    """Whatever None takes."""
    monkeypatch.setenv("MERGETUNE_BACKEND", variable)
    arguments, leaves = loss_with_leaves()
    ops.lmc_loss(**arguments, backend=backend)[0].backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == ["w"]


@pytest.mark.parametrize("normalize", [True, False])
def test_the_definition_is_twice_differentiable_in_everything(normalize):
    arguments, leaves = loss_with_leaves(normalize=normalize)
    assert leaves.keys() == {"x", "w", "anchors", "alphas", "betas", "w1", "curvature"}

    def loss(*values: Tensor) -> Tensor:
        changed = dict(zip(leaves, values, strict=True))
        return ops.lmc_loss(**{**arguments, **changed}, backend="torch")[0]

    values = tuple(leaves.values())
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, values, fast_mode=True)
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(loss(*values), values))


def test_double_backward_raises():
    arguments = {**problem(9, 4, 6), "scale": 10.0}
    w = arguments.pop("w").requires_grad_()
    loss, _ = ops.lmc_loss(w=w, **arguments)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, w, create_graph=True)


def test_no_gradient_wanted():
    arguments = {**problem(9, 4, 6), "scale": 10.0}
    loss, terms = ops.lmc_loss(**arguments)
    assert not loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.lmc_loss(**arguments)[1], terms)


# -- torch.library and torch.compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "dtype", "normalize"),
    [(2, torch.float64, True), (0, torch.float32, True), (1, torch.float32, False), (2, torch.bfloat16, True)],
)
def test_opcheck(k, dtype, normalize):
    size = (7, 4, 6)
    given = {**problem(*size, k, dtype=dtype), **(zero_shot(*size, dtype) if normalize else {})}
    names = ("x", "labels", "w", "anchors", "alphas", "betas")
    rest = (10.0, given.get("w1"), given.get("curvature"), given.get("lam", 0.0), normalize, None, "cpp")
    given["w"].requires_grad_()
    torch.library.opcheck(torch.ops.mergetune.lmc_loss.default, (*(given[name] for name in names), *rest))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(compiler):
    if compiler == "inductor" and not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        pytest.skip("no C++ compiler for torch.compile")
    arguments = {**problem(9, 4, 6, dtype=torch.float32), "scale": 10.0}
    w = arguments.pop("w")

    def step(w: Tensor, x: Tensor, labels: Tensor, anchors: Tensor, alphas: Tensor, betas: Tensor, scale: float):
        return ops.lmc_loss(x, labels, w.tanh(), anchors, alphas, betas, scale=scale)

    torch.compiler.reset()
    assert_same(
        run(torch.compile(step, backend=compiler, fullgraph=True), w=w, **arguments), run(step, w=w, **arguments)
    )


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_backend_by_name_compiles_without_a_graph_break(backend):
    arguments = {**problem(9, 4, 6, dtype=torch.float32), "scale": 10.0, "backend": backend}

    def doubled(**given) -> tuple[Tensor, Tensor]:
        loss, terms = ops.lmc_loss(**given)
        return 2 * loss, terms

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, **arguments), run(doubled, **arguments))
    wrong = arguments | {"labels": torch.full((9,), 4)}
    with pytest.raises((ValueError, IndexError)):
        compiled(**wrong)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whether_a_backend_is_there_is_asked_without_a_graph_break(backend, device):
    def there(x: Tensor) -> Tensor:
        return x + (1 if missing(backend, device) is None else 0)

    torch.compiler.reset()
    found = torch.compile(there, fullgraph=True, backend="eager")(torch.zeros(1))
    assert torch.equal(found, there(torch.zeros(1)))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"w": torch.zeros(3)}, ValueError, r"x and w must have shapes \[B, D\] and \[C, D\], got \[9, 6\] and \[3\]"),
        ({"x": torch.zeros(9, 5)}, ValueError, r"x must have shape \[9, 6\], got \[9, 5\]"),
        ({"x": torch.zeros(2, 9, 6)}, ValueError, r"x and w must have shapes"),
        ({"x": torch.zeros(0, 6), "labels": torch.zeros(0).long()}, ValueError, "x must hold at least one row"),
        ({"labels": torch.zeros(8).long()}, ValueError, r"labels must have shape \[9\], got \[8\]"),
        ({"labels": torch.zeros(9, 1).long()}, ValueError, r"labels must have shape \[9\], got \[9, 1\]"),
        ({"labels": torch.zeros(9).int()}, TypeError, "labels must be int64, got torch.int32"),
        ({"labels": torch.zeros(9)}, TypeError, "labels must be int64, got torch.float32"),
        ({"anchors": torch.zeros(2, 4, 5)}, ValueError, r"anchors must have shape \[2, 4, 6\], got \[2, 4, 5\]"),
        ({"anchors": torch.zeros(4, 6)}, ValueError, r"anchors must have shape \[4, 4, 6\], got \[4, 6\]"),
        ({"betas": torch.zeros(3)}, ValueError, r"betas must have shape \[2\], got \[3\]"),
        ({"alphas": torch.zeros(0)}, ValueError, r"alphas must hold at least one path point, got shape \[0\]"),
        ({"alphas": torch.zeros(2, 2)}, ValueError, r"alphas must hold at least one path point, got shape \[2, 2\]"),
        ({"w1": torch.zeros(4, 5)}, ValueError, r"w1 must have shape \[4, 6\], got \[4, 5\]"),
        ({"curvature": torch.zeros(6)}, ValueError, r"curvature must have shape \[4, 6\], got \[6\]"),
        (
            {"anchor_dots": torch.zeros(2, 4, 9)},
            ValueError,
            r"anchor_dots must have shape \[2, 9, 4\], got \[2, 4, 9\]",
        ),
        (
            {"backend": "metal"},
            ValueError,
            "backend must be None or one of cpp, triton, cuda, compile, torch, got 'metal'",
        ),
    ],
)
def test_refusals_name_argument_rule_and_value(changed, error, message):
    arguments = {**problem(9, 4, 6, dtype=torch.float32), "scale": 10.0}
    with pytest.raises(error, match=message):
        ops.lmc_loss(**{**arguments, **changed})


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_label_out_of_range_raises(label):
    arguments = {**problem(9, 4, 6), "scale": 10.0}
    arguments["labels"][5] = label
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 3\], got {label} at index 5"):
        ops.lmc_loss(**arguments)


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_label_out_of_range_raises_in_plain_torch(label):
    arguments = {**problem(9, 4, 6), "scale": 10.0}
    arguments["labels"][5] = label
    with pytest.raises((ValueError, IndexError)):
        ops.lmc_loss(**arguments, backend="torch")


def test_a_backend_that_is_not_there_raises():
    arguments = {**problem(9, 4, 6), "scale": 10.0}
    built = bool(ops.build_info()["cuda_archs"])
    error, message = (ValueError, "needs tensors on cuda, got cpu") if built else (RuntimeError, "was not built")
    with pytest.raises(error, match=message):
        ops.lmc_loss(**arguments, backend="cuda")
    assert set(ops.available_backends()) >= {"cpp", "torch"}


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # makes the import fail as a missing package does
    with pytest.raises(RuntimeError, match="backend 'triton' needs the package triton, which is not installed"):
        ops.lmc_loss(**problem(9, 4, 6), scale=10.0, backend="triton")
    assert "triton" not in ops.available_backends()


def test_an_implementation_without_a_backward_says_so():
    with pytest.raises(TypeError, match="backend 'forward_only' must have a backward"):
        ops.Implementation("forward_only", lambda arguments: arguments.q).run_backward(torch.ones(1), None)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"dots": torch.zeros(1, 3, 2).half()}, TypeError, "dots and rscale must both be float32 or float64"),
        ({"rscale": torch.ones(2, 2).double()}, TypeError, "got torch.float32 and torch.float64"),
        ({"rscale": torch.ones(2, 3)}, ValueError, r"rscale must have shape \[2, 2\], got \[2, 3\]"),
        ({"labels": torch.zeros(2).long()}, ValueError, r"labels must have shape \[3\], got \[2\]"),
        ({"alpha": torch.ones(1)}, ValueError, r"alpha must have shape \[2\], got \[1\]"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[2\], got \[3\]"),
        ({"anchor": torch.tensor([0, 1])}, ValueError, r"anchor must lie in \[0, 0\], got 1 at index 1"),
    ],
)
def test_path_cross_entropy_refusals(changed, error, message):
    arguments = {
        "dots": torch.zeros(1, 3, 2),
        "labels": torch.zeros(3).long(),
        "anchor": torch.zeros(2).long(),
        "alpha": torch.ones(2),
        "weight": torch.ones(2),
        "rscale": torch.ones(2, 2),
    }
    ops.path_cross_entropy(**arguments)
    with pytest.raises(error, match=message):
        ops.path_cross_entropy(**{**arguments, **changed})


# -- NaN, bits and the self-test --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["x", "w", "anchors"])
def test_broken_input_shows_in_the_loss(name, value):
    """A NaN must never be lost on the way: training stops at it."""
    arguments = {**problem(33, 17, 9, dtype=torch.float32), "scale": 10.0}
    arguments[name].view(-1)[0] = value
    loss, _ = ops.lmc_loss(**arguments)
    assert loss.isnan()


@pytest.mark.parametrize("dtype", list(RELATIVE))
def test_thread_counts_give_the_same_bits(dtype):
    arguments = {**problem(130, 67, 33, 2, 5, dtype), "scale": 10.0}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(run(**arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_a_missing_core_says_how_to_mend_it():
    """None in sys.modules makes the import fail as a core that was not built does."""
    code = "import sys; sys.modules['mergetune._C'] = None; from mergetune import fit"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert "ImportError: mergetune" in found.stderr and " core" in found.stderr
    assert "`pip install .`" in found.stderr


def test_self_test_is_small():
    differences = ops.self_test()
    assert set(differences) == {"lmc_loss", "path_cross_entropy", "prefix_attention", "merge_deltas", "count_around"}
    assert max(differences.values()) < 1e-12


def test_the_triton_backend_in_the_interpreter():
    """The same op, another kernel: asked for by name, differentiated alike."""
    pytest.importorskip("triton")
    size = (17, 5, 9)
    arguments = {**problem(*size, dtype=torch.float32), **zero_shot(*size, torch.float32), "scale": 10.0}
    assert_same(run(**arguments, backend="triton"), run(**arguments, backend="torch"))


# -- prefix_attention -------------------------------------------------------------------------------------------------


def attention(dtype: torch.dtype = torch.float64, *, last_only: bool = False) -> tuple[list[Tensor], list[int]]:
    """q, k, v, prefix_k, prefix_v of two prompts, and the lengths."""
    lengths, heads = [1, 2, 2, 4], (3, 8)
    rows = [len(lengths) if last_only else sum(lengths), sum(lengths), sum(lengths), 2, 2]
    return [draw(2, n, *heads, seed=i).to(dtype).requires_grad_() for i, n in enumerate(rows)], lengths


@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_its_definition(causal, last_only):
    tensors, lengths = attention(last_only=last_only)
    out = {b: ops.prefix_attention(*tensors, lengths, causal=causal, backend=b) for b in ("cpp", "torch")}
    assert torch.allclose(out["cpp"], out["torch"], rtol=1e-12)
    weight = torch.randn_like(out["cpp"])
    expected = torch.autograd.grad(out["torch"], tensors, weight)
    for got in (
        torch.autograd.grad(out["cpp"], tensors, weight),
        ops.prefix_attention_backward(weight, *tensors, lengths, causal=causal),
        ops.prefix_attention_backward(weight, *tensors, lengths, causal=causal, backend="torch"),
    ):
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_of_attention(dtype):
    tensors, lengths = attention(dtype)
    torch.library.opcheck(torch.ops.mergetune.prefix_attention.default, (*tensors, lengths, True))


def test_attention_compiles_without_a_graph_break():
    tensors, lengths = attention(torch.float32)
    compiled = torch.compile(lambda *t: ops.prefix_attention(*t, lengths), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), ops.prefix_attention(*tensors, lengths))


def test_attention_takes_strided_heads_and_half_types():
    tensors, lengths = attention()
    spread = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    assert torch.equal(ops.prefix_attention(*spread, lengths), ops.prefix_attention(*tensors, lengths))
    halves = [t.half() for t in tensors]  # float16 has no native kernel: plain torch, unless asked for by name
    assert torch.equal(ops.prefix_attention(*halves, lengths), reference.prefix_attention(*halves, tuple(lengths)))
    with pytest.raises(TypeError, match="q must be float32, float64 or bfloat16 for backend 'cpp', got torch.float16"):
        ops.prefix_attention(*halves, lengths, backend="cpp")


@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_definition_of_attention_is_twice_differentiable(causal, last_only):
    tensors, lengths = attention(last_only=last_only)
    run = lambda *t: ops.prefix_attention(*t, lengths, causal=causal, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_double_backward_of_attention_raises():
    tensors, lengths = attention()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(ops.prefix_attention(*tensors, lengths).sum(), tensors[0], create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: {**t, "k": t["k"][:, 1:]}, ValueError, r"k must have shape \[2, 9, 3, 8\], got \[2, 8, 3, 8\]"),
        (
            lambda t: {**t, "q": t["q"][:, :5]},
            ValueError,
            "q must have a row for each of 9 tokens or 4 sequences, got 5",
        ),
        (lambda t: {**t, "prefix_v": t["prefix_v"][:, :1]}, ValueError, r"prefix_v must have shape \[2, 2, 3, 8\]"),
        (lambda t: {**t, "v": t["v"].float()}, TypeError, "must have one dtype"),
        (lambda t: {**t, "q": t["q"][0]}, ValueError, r"q must have shape \[M, T, H, d\]"),
        (lambda t: {**t, "lengths": [0, 4, 5]}, ValueError, "offsets must ascend"),
        (lambda t: {**t, "backend": "cuda"}, ValueError, "backend must be None or one of cpp, triton, compile, torch"),
    ],
)
def test_refusals_of_attention(change, error, match):
    tensors, lengths = attention()
    given = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), tensors, strict=True)) | {"lengths": lengths}
    with pytest.raises(error, match=match):
        ops.prefix_attention(**change(given))
