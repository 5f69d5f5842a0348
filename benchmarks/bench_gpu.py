"""Benchmarks for a GPU: the loss with every backend, the text tower, whole runs, and encoding into a cache.

``gpu.py --stage speed`` runs these benchmarks on a GPU. Without a GPU, MERGETUNE_BENCH_DRY=1 runs small sizes.

Shapes: B batch, C classes, D embedding width, K anchors, N points on a path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from bench_lmc_loss import Case, naive_loss
from bench_text_tower import Case as TowerCase
from measure import DEVICE, TASKS, WIDTH, Work, compare, timed
from plain import N_CTX, TEMPLATE, PlainPrompts

from mergetune import FeatureCache, FrozenClip, ImageList, Prompt, cache_features, fit, ops
from mergetune.clip import fill
from mergetune.data import load_image
from mergetune.experiments.icons import load_icons

GPU = DEVICE == "cuda"
BACKENDS = [name for name in ops.available_backends() if name != "torch" and (not GPU or name != "cpp")]
TASKS_HERE = list(TASKS) if GPU else ["eurosat", "caltech101"]
BATCHES_HERE = [32, 128, 512, 4096] if GPU else [32]
FITS = {5: 50, 50: 50, 500: 4} if GPU else {5: 2, 50: 1}  # classes -> epochs: 500 classes take 63 steps per epoch
SHOTS, BATCH, IMAGES, ROUNDS = 16, 64, 512 if GPU else 64, 11 if GPU else 3

pytestmark = pytest.mark.skipif(
    not GPU and not os.environ.get("MERGETUNE_BENCH_DRY"), reason="no CUDA device, and MERGETUNE_BENCH_DRY is not set"
)


def launches(work: Work) -> int | None:
    """Number of kernels that one call launches on the GPU, counted by torch's profiler; None without a GPU."""
    if not GPU:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if "CUDA" in str(event.device_type)]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


def graph_of(work: Work) -> Work:
    """Captures the work in a CUDA graph and returns a function that replays the graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    return lambda: (graph.replay(), kept)[1]


def tried(make: Callable[[], Work]) -> tuple[Work | None, str]:
    """The work that ``make`` returns, after one run, or None and the error, so that other variants are still timed."""
    try:
        work = make()
        work()
    except Exception as error:  # compilers raise errors of many types
        return None, f"{type(error).__name__}: {error}"[:300]
    return work, ""


@cache
def speed() -> tuple[float, float]:
    """Bytes and float32 operations per second of the device, measured with a large copy and a large product."""
    size = 2**28 if GPU else 2**24
    source, target = torch.ones(size, device=DEVICE), torch.empty(size, device=DEVICE)
    side = 8192 if GPU else 1024
    a, b, out = (torch.randn(side, side, device=DEVICE) for _ in range(3))
    copy, product = (lambda: target.copy_(source)), (lambda: torch.mm(a, b, out=out))
    best = [min(timed(work) for _ in range(5)) for work in (copy, product)]
    return 8 * size / best[0], 2 * side**3 / best[1]


def least(case: Case) -> dict[str, float]:
    """Seconds that the memory traffic and the products of the loss take at the device's full speed."""
    bytes_per_second, operations_per_second = speed()
    ends, d = case.anchors + 1, WIDTH
    moved = 4 * d * (case.batch + case.classes * (ends + 2))  # x, the ends and w1 are read, the gradient is written
    operations = 2 * (ends + 1) * case.batch * case.classes * d
    return {
        "its bytes at full speed": moved / bytes_per_second,
        "its FLOPs at full speed": operations / operations_per_second,
    }


# -- the loss ---------------------------------------------------------------------------------------------------------

compiled_loss = torch.compile(naive_loss, dynamic=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("task", "batch"), list(product(TASKS_HERE, BATCHES_HERE)))
def test_loss(benchmark, task: str, batch: int, backend: str) -> None:
    case = Case(batch=batch, classes=TASKS[task], points=5, anchors=1)
    ours, loop = (lambda: case.fused(backend=backend)), case.loop()
    expected = loop()
    assert (ours() - expected).norm() <= 1e-3 * expected.norm()
    compiled, why = tried(lambda: case.loop(compiled_loss))
    baselines = {"a loop over the points": loop, "plain torch": lambda: case.fused(backend="torch")}
    baselines |= {"torch.compile of the loop": compiled} if compiled else {}
    compare(
        benchmark,
        f"{case.title}, {backend}",
        ours,
        baselines=baselines,
        floors={"its GEMMs": case.floors()["its GEMMs"]},
        computed=least(case),
        rounds=ROUNDS,
        memory=False,
        launches={name: launches(work) for name, work in (("ours", ours), *baselines.items())},
        not_compiled=why,
    )


# -- the text tower ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"] if GPU else ["bfloat16"])
@pytest.mark.parametrize("task", TASKS_HERE[: 3 if GPU else 1])
def test_text_tower(benchmark, vit_b16: FrozenClip, task: str, dtype: str) -> None:
    case = TowerCase(vit_b16, task, dtype)
    tokens = vit_b16.tokenize([fill(TEMPLATE, name) for name in case.names])

    def prompts(compiled: bool) -> Work:
        plain = PlainPrompts.of(vit_b16.model, tokens, case.dtype, truncate=True)
        for block in plain.transformer.resblocks if compiled else ():
            block.compile()  # the same code for all blocks: compiled once
        return lambda: plain.gradient(case.prompt.ctx, case.d)

    compiled, why = tried(lambda: prompts(True)) if GPU else (None, "not compiled in a dry run")
    captured, why_not = tried(lambda: graph_of(case.gradient)) if GPU else (None, "no CUDA device")
    baselines = {"open_clip, longest class": prompts(False)}
    baselines |= {"open_clip, compiled": compiled} if compiled else {}
    baselines |= {"ours in a CUDA graph": captured} if captured else {}
    compare(
        benchmark,
        f"{case.title}, on {DEVICE}",
        case.gradient,
        baselines=baselines,
        floors={"its GEMMs": case.gemms()},
        rounds=ROUNDS,
        launches={"ours": launches(case.gradient)},
        not_compiled=why,
        not_captured=why_not,
    )


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", FITS)
def test_fit(benchmark, vit_b16: FrozenClip, classes: int) -> None:
    """Times a whole ``fit`` on features of 16 images per class: packing, paths, steps and result."""
    names = open_clip.IMAGENET_CLASSNAMES[:classes]
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(SHOTS * classes, WIDTH, generator=generator), dim=-1)
    features = FeatureCache.from_tensors(x, torch.arange(len(x)) % classes, names)
    zero = Prompt.from_template(vit_b16, TEMPLATE)
    noise = 0.01 * torch.randn(zero.ctx.shape, generator=generator).to(zero.ctx.device)
    tuned = zero.with_state({"ctx": zero.ctx + noise})
    found = []

    def run(graph: bool) -> None:
        settings = {"epochs": FITS[classes], "cuda_graph": graph, "progress": False}
        found.append(fit(vit_b16, features, tuned, **settings))

    captured, why = tried(lambda: lambda: run(True)) if GPU else (None, "no CUDA device")
    compare(
        benchmark,
        f"fit, {classes} names, {N_CTX} context tokens, {FITS[classes]} epochs, on {DEVICE}",
        lambda: run(False),
        baselines={"in a CUDA graph": captured} if captured else {},
        rounds=2 if classes == max(FITS) else 3,
        memory=False,
        steps=found[-1].timings["steps"] if found else None,
        not_captured=why,
    )


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["icon-clip", "ViT-B-16"] if GPU else ["icon-clip"])
def test_encode_images(benchmark, request: pytest.FixtureRequest, tmp_path: Path, tower: str) -> None:
    """Decodes, encodes, writes and checks the embedded icons with the embedded CLIP and with a ViT-B/16."""
    clip, dataset = load_icons(tmp_path)
    clip = replace(clip, model=clip.model.to(DEVICE))
    if tower == "ViT-B-16":
        clip = request.getfixturevalue("vit_b16")
    images = dataset.train
    few = ImageList(images.root, images.files[:IMAGES], images.labels[:IMAGES], images.classnames)
    workers = min(8, (os.cpu_count() or 2) // 2) if GPU else 0
    pixels = torch.stack([clip.preprocess(load_image(path)) for path in few.paths[:BATCH]]).to(DEVICE)
    compare(
        benchmark,
        f"cache_features, {IMAGES} images, {tower}, {workers} workers, on {DEVICE}",
        lambda: cache_features(clip, few, tmp_path / "cache", overwrite=True, progress=False, workers=workers),
        floors={"the image tower alone": lambda: [clip.encode_image(pixels) for _ in range(IMAGES // BATCH)]},
        rounds=3,
        memory=False,
        images=IMAGES,
    )
