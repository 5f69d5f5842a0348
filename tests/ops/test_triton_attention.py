"""The Triton kernels of prefix_attention: against its definition, through the ops and under a whole text tower.

They are interpreted on the CPU; ``TRITON_INTERPRET=0 pytest -m gpu`` runs the same on a GPU.
M prompts, T packed tokens, S prefix rows, H heads, D head width.
"""

from functools import partial

import pytest
import torch
from ahead_of_time import check_resources, compile_quick
from devices import COMPILED, DEVICE, INTERPRETED, WHERE_KERNELS_RUN, marked
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are NOT tested")

from mergetune.kernels import prefix_attention as module  # noqa: E402
from mergetune.kernels.prefix_attention_kernels import ELEMENTS, PARTS  # noqa: E402
from tower_cases import CONTEXT, FIRST, NAMES, clip_and_tokens, contexts, tower  # noqa: E402

from mergetune import ops  # noqa: E402
from mergetune.clip import text_encoder  # noqa: E402
from mergetune.ops import reference  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}  # halves: and twice plain torch's error
INPUTS = ("q", "k", "v", "prefix_k", "prefix_v")
RESULTS = ("out", *(f"d_{name}" for name in INPUTS))
KERNELS = ("prefix_attention_kernel", "prefix_attention_backward_kernel", "prefix_gradient_kernel")

pytestmark = [*WHERE_KERNELS_RUN, pytest.mark.usefixtures("poison_uninitialized_memory")]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a handful of texts makes many groups, and texts of 16 tokens do not fit."""
    tile = module.Config(16, 16, 16)
    monkeypatch.setattr(module, "configs", lambda *_, **__: (tile, tile))
    module.make_plan.cache_clear()
    yield
    module.make_plan.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """The name and keyword arguments of every launch."""
    calls = []
    for name in KERNELS:
        kernel = getattr(module, name)
        record = lambda *a, name=name, run=kernel.run, **kw: [calls.append((name, kw)), run(*a, **kw)][1]  # noqa: E731
        monkeypatch.setattr(kernel, "run", record)
    return calls


def problem(m, lengths, s, h, d, dtype=torch.float32, *, pooled=False, causal=True, size=1.0) -> dict:
    """Arguments of the definition, and the gradient to its result."""
    generator = torch.Generator().manual_seed(m + sum(lengths) + s + h + d)
    tokens, queries = sum(lengths), len(lengths) if pooled else sum(lengths)
    draw = lambda rows: (size * torch.randn(m, rows, h, d, generator=generator, dtype=torch.float64)).to(dtype)  # noqa: E731
    tensors = dict(zip(INPUTS, map(draw, (queries, tokens, tokens, s, s)), strict=True))
    return {**tensors, "d_out": draw(queries) / size, "lengths": lengths, "causal": causal}


def kernel(arguments: dict) -> dict[str, Tensor]:
    tensors = {name: t.to(DEVICE) for name, t in arguments.items() if isinstance(t, Tensor)}
    inputs, layout = [tensors[name] for name in INPUTS], (arguments["lengths"], arguments["causal"])
    out = module.prefix_attention(*inputs, *layout)
    gradients = module.prefix_attention_backward(tensors["d_out"], *inputs, *layout)
    return {name: t.cpu() for name, t in zip(RESULTS, (out, *gradients), strict=True)}


def definition(arguments: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    leaves = [arguments[name].to(dtype).requires_grad_() for name in INPUTS]
    out = reference.prefix_attention(*leaves, arguments["lengths"], causal=arguments["causal"])
    gradients = torch.autograd.grad(out, leaves, arguments["d_out"].to(dtype))
    return dict(zip(RESULTS, (out.detach(), *gradients), strict=True))


def largest(t: Tensor) -> float:
    return t.double().abs().max().item() if t.numel() else 0.0


def check(arguments: dict) -> None:
    """float32: a relative tolerance. Half types: error to a float64 truth at most twice plain torch's, and a little."""
    dtype = arguments["q"].dtype
    got, truth, plain = kernel(arguments), definition(arguments), None
    if dtype != torch.float32:
        plain = definition(arguments, dtype)
    cut_off = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0  # Triton's interpreter does not round it
    for name, value in truth.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == dtype
        error, allowed = largest(got[name].double() - value), TOLERANCE[dtype]
        allowed *= max(1.0, largest(value)) if plain is None else 1.0
        allowed += 2 * largest(plain[name].double() - value) + cut_off * largest(value) if plain else 0.0
        assert error <= allowed, f"{name}: off by {error}, allowed {allowed}"  # NaN fails


# -- parity -----------------------------------------------------------------------------------------------------------

VARIANTS = [  # float32 in all of them
    (torch.float32, {}),
    (torch.float32, {"causal": False}),
    (torch.float32, {"pooled": True}),
    (torch.bfloat16, {}),
    (torch.float16, {"causal": False}),
    (torch.float16, {"pooled": True}),
]


@pytest.mark.parametrize(("dtype", "variant"), VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("m", "lengths", "s", "h", "d"),
    [
        (1, (1,), 0, 1, 1),
        (2, (3, 1, 2), 1, 3, 5),
        (1, (2, 2, 5, 9), 5, 1, 33),
        (1, (1, 2, 2, 3, 4, 4, 7, 15) * 2, 5, 1, 64),
        (1, (2, 3) * 12, 17, 1, 80),
        (2, (4, 3), 0, 2, 32),
        (1, (1,) * 70, 2, 1, 16),
    ],
)
def test_parity_with_the_definition(m, lengths, s, h, d, dtype, variant):
    check(problem(m, lengths, s, h, d, dtype, **variant))


@pytest.mark.parametrize(("dtype", "variant"), VARIANTS, ids=str)
@pytest.mark.parametrize(("s", "lengths"), [(0, (16, 17, 2)), (3, (5, 33)), (15, (1, 2, 20)), (20, (3, 16))])
def test_texts_and_prefixes_longer_than_a_tile(small_tiles, s, lengths, dtype, variant):
    check(problem(1, lengths, s, 1, 20 if s == 3 else 16, dtype, **variant))


@pytest.mark.parametrize(
    ("dtype", "d", "lengths", "s", "pooled"),
    [
        (torch.float16, 64, (64, 3), 0, False),
        (torch.bfloat16, 32, (77, 20), 0, False),
        (torch.float16, 16, (77, 60), 60, False),
        (torch.float16, 16, (59, 30), 5, True),
        (torch.float16, 16, (77, 3), 0, True),
        (torch.bfloat16, 16, (130, 3), 0, True),
        (torch.float32, 16, (59, 30), 5, False),
        (torch.float32, 16, (67, 3), 0, False),
        (torch.float16, 7, (59, 30), 5, False),
        (torch.float32, 7, (27, 30), 5, True),
        (torch.float32, 7, (27, 20), 5, False),
    ],
)
def test_every_configuration(dtype, d, lengths, s, pooled):
    """The whole sequences of towers without a mask, and what needs each of the tiles that are built in."""
    check(problem(1, lengths, s, 1, d, dtype, pooled=pooled, causal=False))


def test_which_tiles_are_chosen():
    plan = lambda *lengths, s=5, d=64, dtype=torch.bfloat16, pooled=False: module.make_plan(  # noqa: E731
        lengths, s, d, dtype, torch.device(DEVICE), pooled=pooled, causal=True
    )
    chosen = [plan(59), plan(60), plan(123), plan(124), plan(60, s=64), plan(70, s=64), plan(3, s=0, d=8)]
    assert [p.config.block_k for p in chosen] == [64, 128, 128, 32, 128, 32, 64]
    assert [p.whole for p in chosen] == [True, True, True, False, True, False, True]
    assert [p.config.block_q for p in (plan(59, pooled=True), plan(200, pooled=True))] == [16, 16]
    assert plan(*[2] * 29).groups == plan(29, 30).groups == plan(*[1] * 16, pooled=True).groups == 1
    assert plan(*[2] * 30).groups == plan(30, 30).groups == plan(*[1] * 17, pooled=True).groups == 2
    for width in (1, 32, 64, 80):
        for dtype in DTYPES:
            assert all(16 <= c.block_d < 2 * max(width, 16) for c in module.configs(width, dtype, pooled=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_parts_of_the_prefix_gradient_are_added(dtype):
    """More parts than are added at a time, and more elements than a program adds."""
    parts, size = 2 * PARTS.value + 3, ELEMENTS.value + 3
    given = torch.randn(2, parts, 2, size, generator=torch.Generator().manual_seed(0))
    results = [torch.empty(2, size, dtype=dtype, device=DEVICE) for _ in range(2)]
    module.prefix_gradient_kernel[2, 2, 2](given.to(DEVICE), *results, size, parts)
    for got, value in zip(results, given.double().sum(1).unbind(1), strict=True):
        assert largest(got.cpu() - value) <= {torch.float32: 1e-5, torch.float16: 2e-2}[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_each_with_nothing_before_it(dtype):
    """A lone key: its value, and no gradient to the scores. Three TF32 products hold 21 of a float32's 24 bits."""
    arguments = problem(2, (1,) * 9, 0, 3, 8, dtype)
    got = kernel(arguments)
    exact = INTERPRETED or dtype != torch.float32
    for name, expected in (("out", arguments["v"]), ("d_v", arguments["d_out"])):
        torch.testing.assert_close(got[name], expected, rtol=0 if exact else 2**-21, atol=0)
    assert not got["d_q"].any()
    assert not got["d_k"].any()


@pytest.mark.parametrize("tiles", ["built in", "small"])
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_extreme_scores_stay_finite(size, tiles, request):
    """Scores of +-1e3 .. +-1e8: all of a query's weight lies on one key, and the others' exponentials underflow."""
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    arguments = problem(1, (3, 20, 7), 5, 1, 16, size=size)
    got, truth = kernel(arguments), definition(arguments)
    assert all(t.isfinite().all() for t in got.values())
    assert largest(got["out"].double() - truth["out"]) <= 1e-3 * largest(truth["out"])


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_views_are_read_where_they_lie(small_tiles, launches, packed, dtype):
    """Thirds of a packed [M, S + T, 3, H, D], as the text tower has them, or each of other strides; NaN lies around."""
    m, lengths, s, h, d = 2, (2, 3, 4, 6), 5, 2, 24  # two groups
    arguments = problem(m, lengths, s, h, d, dtype)
    expected = kernel(arguments)
    nans = partial(torch.full, fill_value=torch.nan, dtype=dtype, device=DEVICE)
    if packed:
        joined = nans((m, s + sum(lengths) + 1, 3, h, d))
        views = [joined[:, s:-1, i] for i in range(3)] + [joined[:, :s, i] for i in (1, 2)]
        views.append(nans((m, h, sum(lengths), d)).transpose(1, 2))
    else:
        shapes = [arguments[name].shape for name in (*INPUTS, "d_out")]
        wide = [nans((m, rows + i, h + 6 - i, d + i + 1)) for i, (_, rows, _, _) in enumerate(shapes)]
        views = [w[:, i:, :h, 1 : d + 1] for i, w in enumerate(wide)]
    strided = dict(zip((*INPUTS, "d_out"), views, strict=True))
    for name, view in strided.items():
        view.copy_(arguments[name])
    launches.clear()
    got = kernel({**arguments, **strided})
    for name in RESULTS:
        assert torch.equal(got[name], expected[name]), name
    (_, forward), (_, backward), _ = launches
    assert all(forward[name].data_ptr() == strided[name].data_ptr() for name in INPUTS)
    assert all(backward[name].data_ptr() == view.data_ptr() for name, view in strided.items())


@pytest.mark.parametrize("s", [0, 2])
def test_launches_and_tables(launches, s):
    """One launch forward, two backward, or one without a prefix; a layout's tables are copied to the device once."""
    arguments = problem(1, (2, 1), s, 2, 8)
    kernel(arguments)
    kernel({**arguments, "lengths": list(arguments["lengths"])})
    once = list(KERNELS if s else KERNELS[:2])
    assert [name for name, _ in launches] == 2 * once
    for name in ("bounds", "windows"):
        assert len({id(launch[name]) for kind, launch in launches if kind != KERNELS[2]}) == 1


@pytest.mark.parametrize("lengths", [(2, 1, 3, 1), (20, 1, 3)])
def test_the_same_bits_twice(small_tiles, lengths):
    arguments = problem(1, lengths, 5, 2, 16, torch.bfloat16)
    first, second = kernel(arguments), kernel(arguments)
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lengths": (2, 0, 1)}, r"lengths must name at least one text, of at least one token each, got \[2, 0, 1\]"),
        ({"lengths": ()}, "lengths must name at least one text"),
        ({"q": torch.zeros(0, 3, 2, 8)}, r"q must have shape \[M, T, H, d\] without a 0, got \[0, 3, 2, 8\]"),
    ],
)
def test_refusals(change, match):
    with pytest.raises(ValueError, match=match):
        kernel({**problem(1, (2, 1), 2, 2, 8), **change})


# -- through the ops --------------------------------------------------------------------------------------------------


def as_op(arguments: dict, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, tuple[int, ...]]:
    tensors = [arguments[name].to(DEVICE, dtype).requires_grad_() for name in INPUTS]
    return tensors, arguments["d_out"].to(DEVICE, dtype), arguments["lengths"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_the_backend_of_the_op(launches, pooled, causal):
    tensors, weight, lengths = as_op(problem(2, (1, 2, 4), 2, 1, 8, pooled=pooled, causal=causal))
    spread = [t.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in tensors]
    expected = ops.prefix_attention(*tensors, lengths, causal=causal, backend="torch")
    gradients = torch.autograd.grad(expected, tensors, weight)
    assert not launches
    for leaves in (tensors, spread):
        out = ops.prefix_attention(*leaves, list(lengths), causal=causal, backend="triton")
        assert torch.allclose(out, expected, atol=1e-5)
        for got in (
            torch.autograd.grad(out, leaves, weight),
            ops.prefix_attention_backward(weight, *leaves, lengths, causal=causal, backend="triton"),
        ):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, gradients, strict=True))
    assert [name for name, _ in launches] == 2 * [KERNELS[0], *2 * KERNELS[1:]]


def test_what_the_op_refuses(monkeypatch):
    tensors, weight, lengths = as_op(problem(1, (1, 2), 2, 1, 8))
    backward = partial(ops.prefix_attention_backward, lengths=lengths, backend="triton")
    wide = [t.double() for t in tensors]
    with pytest.raises(
        TypeError, match="q must be float32, bfloat16 or float16 for backend 'triton', got torch.float64"
    ):
        ops.prefix_attention(*wide, lengths, backend="triton")
    with pytest.raises(ValueError, match=r"d_out must have shape \[1, 3, 1, 8\], got \[1, 2, 1, 8\]"):
        backward(weight[:, 1:], *tensors)
    with pytest.raises(TypeError, match="d_out must have q's dtype torch.float32, got torch.float64"):
        backward(weight.double(), *tensors)
    with pytest.raises(ValueError, match=r"k must have shape \[1, 3, 1, 8\], got \[1, 2, 1, 8\]"):
        backward(weight, tensors[0], tensors[1][:, 1:], *tensors[2:])
    with pytest.raises(RuntimeError, match="differentiated once"):
        out = ops.prefix_attention(*tensors, lengths, backend="triton")
        torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend 'triton' needs tensors on cuda, got cpu"):
        ops.prefix_attention(*(t.cpu() for t in tensors), lengths, backend="triton")


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, Triton may be the default")
def test_nothing_is_launched_unless_asked_for(launches):
    for dtype in (torch.float32, torch.float16):
        tensors, weight, lengths = as_op(problem(1, (1, 2), 2, 1, 8), dtype)
        ops.prefix_attention(*tensors, lengths).backward(weight)
    assert not launches


def test_opcheck_and_compile():
    tensors, _, lengths = as_op(problem(2, (1, 2, 2), 2, 1, 8))
    torch.library.opcheck(torch.ops.mergetune.prefix_attention.default, (*tensors, list(lengths), True, "triton"))
    attention = partial(ops.prefix_attention, lengths=lengths, backend="triton")
    compiled = torch.compile(lambda *t: attention(*t), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attention(*tensors))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("settings", [{}, {"no_causal_mask": True}], ids=str)
def test_the_whole_text_tower(monkeypatch, launches, settings, shared):
    """Features and gradient of the context vectors are those of plain torch, in every kind of layout."""
    clip, tokens = clip_and_tokens(tower(**settings).to(DEVICE))
    leaf = contexts(clip, 1, None if shared else len(NAMES)).detach().to(DEVICE).requires_grad_()
    encoder = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT, shared=shared)

    ways = {name: getattr(ops, name) for name in ("prefix_attention", "prefix_attention_backward")}

    def features_and_gradient(backend: str) -> list[Tensor]:
        for name, op in ways.items():  # in place of None
            monkeypatch.setattr(ops, name, lambda *args, op=op, **kwargs: op(*args, **{**kwargs, "backend": backend}))
        features = encoder(leaf)
        return [features.detach(), *torch.autograd.grad(features.square().sum(), leaf)]

    expected = features_and_gradient("torch")
    assert not launches
    for got, value in zip(features_and_gradient("triton"), expected, strict=True):
        assert largest(got - value) <= 1e-5 * largest(value)
    calls = 3 if shared and not settings.get("no_causal_mask") else 2  # a prefix attends to itself, but not in the last
    assert [name for name, _ in launches].count(KERNELS[0]) == calls
    assert [name for name, _ in launches].count(KERNELS[1]) == calls


# -- ahead of time ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """The kernels as CLIP's text towers need them."""
    return compile_quick("prefix_attention")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time_without_spills(compiled, capability):
    cases = [case for case in compiled if case["capability"] == capability]
    backward = {("prefix_attention_backward", "bf16"), ("prefix_attention_backward", "fp32")}
    assert {(case["kernel"], case["dtype"]) for case in cases} == {("prefix_attention", "bf16"), *backward}
    check_resources(cases)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@marked(COMPILED)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_sizes_again_and_in_a_graph(dtype, pooled):
    """500 names behind a prefix of 5, in 8 heads of 64: right, the same bits every time, and in a captured graph."""
    lengths = tuple(sorted(torch.randint(2, 12, (500,), generator=torch.Generator().manual_seed(0)).tolist()))
    arguments = problem(2, lengths, 5, 8, 64, dtype, pooled=pooled)
    check(arguments)
    tensors = {name: t.cuda() if isinstance(t, Tensor) else t for name, t in arguments.items()}
    inputs = [tensors[name] for name in INPUTS]

    def run() -> tuple[Tensor, ...]:
        gradients = module.prefix_attention_backward(tensors["d_out"], *inputs, lengths, True)
        return module.prefix_attention(*inputs, lengths, True), *gradients

    first, graph = run(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
