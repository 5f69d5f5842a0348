"""Benchmark of merging safetensors files with 100 M parameters: time against reading and writing, and peak memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measure import compare
from safetensors.torch import load_file, save_file

from mergetune import merging
from mergetune.io import writing_atomically
from mergetune.merging.methods import find

WIDTH, BLOCKS, VOCABULARY = 768, 10, 49408
METHODS = {
    "average": {},
    "task_arithmetic": {},
    "dare": {},
    "slerp": {},
    "ties": {"trim": "tensor"},
    "ties, trimmed globally": {},
}
"""Title -> options; the title begins with the name of the method, up to a comma."""


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer with 100 M elements; the largest tensor has a quarter of them."""
    found: dict[str, tuple[int, ...]] = {"token_embedding.weight": (VOCABULARY, 512), "logit_scale": ()}
    for i in range(BLOCKS):
        block = {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,)}
        block |= {"attn.out_proj.weight": (WIDTH, WIDTH), "ln_1.weight": (WIDTH,), "ln_2.weight": (WIDTH,)}
        block |= {"mlp.c_fc.weight": (4 * WIDTH, WIDTH), "mlp.c_proj.weight": (WIDTH, 4 * WIDTH)}
        found |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    rest = 100_000_000 - sum(torch.Size(shape).numel() for shape in found.values())
    return found | {"head.weight": (rest // WIDTH, WIDTH)}


@pytest.fixture(scope="module", params=[torch.float16, torch.float32], ids=["float16", "float32"])
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of a base and of two experts near the base."""
    folder = tmp_path_factory.mktemp("checkpoints")
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    paths = [folder / f"{k}-{request.param}".replace("torch.", "") for k in range(3)]
    for path in paths:
        near = {name: t + 0.002 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        save_file({name: t.to(request.param) for name, t in near.items()}, path)
    return paths


def read_and_write(inputs: list[Path], out: Path) -> None:
    """Reads the inputs and writes the output through a small buffer, as every merge of files must."""
    buffer = memoryview(bytearray(2**20))
    for path in inputs:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    with writing_atomically(out) as stream:
        for begin in range(0, size := inputs[0].stat().st_size, len(buffer)):
            stream.write(buffer[: size - begin])


@pytest.mark.parametrize("title", METHODS)
def test_merge_files(benchmark, checkpoints: list[Path], title: str) -> None:
    """Merges a base and two experts; for slerp a base and one expert, for the average three experts without a base."""
    method, options = getattr(merging, title.split(",")[0]), METHODS[title]
    base = checkpoints[0] if find(title.split(",")[0]).base or title == "slerp" else None
    experts = {"average": checkpoints, "slerp": checkpoints[1:2]}.get(title, checkpoints[1:])
    inputs, out = list(experts) if base is None else [base, *experts], checkpoints[0].with_name("out")
    size = checkpoints[0].stat().st_size

    def in_memory() -> None:
        states = [load_file(path) for path in inputs]
        merged = method(None if base is None else states[0], states if base is None else states[1:], **options)
        save_file(merged, out)

    in_memory()
    expected = load_file(out)
    merging.merge_files(method, base, experts, out, **options)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())
    del expected
    compare(
        benchmark,
        f"merge_files, {title}, 100 M parameters, {checkpoints[0].name.split('-')[1]}",
        lambda: merging.merge_files(method, base, experts, out, **options),
        baselines={"load_file, the method, save_file": in_memory},
        floors={"reading and writing the files": lambda: read_and_write(inputs, out)},
        rounds=7,
        checkpoint_bytes=size,
    )
