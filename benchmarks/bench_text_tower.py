"""Benchmark of the text tower of ViT-B/16 with a shared context, against its matrix products and open_clip's tower.

Shapes: C classes, n context tokens, W tower width, D embedding width.

A processor without AMX misses two targets for 500 names in bfloat16: ten times as fast as open_clip with texts cut to
the longest class (8.2 on a Zen 5), and sixty times as fast as open_clip with 77 tokens (35). Matrix products limit both
towers. They run at 0.9 TFLOP/s, which is 90 % of the speed of two cores with avx512_bf16; a tower of products alone
would reach 10.5 and 46. The whole tower takes 1.28 times as long as its products; the rest is GELU forward and backward
(7 %), attention (5 %), layer norms (3 %) and copies (2 %). Three ideas were examined and not used: prepacked weights of
oneDNN (Python has no access to them for bfloat16, and the products are already at the limit); sharing the first tokens
of class names in a tree (2,206 tokens would become 2,116); and storing queries, keys and values of the fixed tokens in
the first block (2 % of the products).
"""

from __future__ import annotations

import open_clip
import pytest
import torch
from measure import TASKS, Work, compare, timed
from plain import N_CTX, TEMPLATE, PlainPrompts, text_gemms
from torch import Tensor

from mergetune import FrozenClip, Prompt
from mergetune.clip import TextEncoder, fill
from mergetune.solutions import space_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = {"bfloat16": 5e-2, "float32": 1e-4}  # largest error of the gradient, relative to its norm
AT_ONCE = 125  # classes of 77 tokens whose activations fit into memory


class Case:
    """A number of class names and a precision, with the library's gradient and its baselines."""

    def __init__(self, clip: FrozenClip, task: str, dtype: str) -> None:
        self.clip, self.dtype, self.names = clip, DTYPES[dtype], open_clip.IMAGENET_CLASSNAMES[: TASKS[task]]
        self.title = f"text tower, {len(self.names)} names, {dtype}"
        self.prompt = Prompt.from_template(clip, TEMPLATE)
        space = space_of(clip, self.prompt, self.names, precision=self.dtype)
        self.encode = lambda ctx: space.classes({"ctx": ctx})
        self.encoder = space.encoder
        generator = torch.Generator().manual_seed(0)
        self.d = torch.randn(len(self.names), clip.embed_dim, generator=generator).to(clip.device)

    def gradient(self) -> Tensor:
        leaf = self.prompt.ctx.detach().clone().requires_grad_()
        self.encode(leaf[None])[0].backward(self.d)
        return leaf.grad

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.encode(self.prompt.ctx[None])[0]

    def plain(self, *, truncate: bool) -> Work:
        tokens = self.clip.tokenize([fill(TEMPLATE, name) for name in self.names])
        prompts = PlainPrompts.of(self.clip.model, tokens, self.dtype, truncate=truncate)
        return lambda: prompts.gradient(self.prompt.ctx, self.d, at_once=None if truncate else AT_ONCE)

    def gemms(self) -> Work:
        return text_gemms(self.clip.text_as(self.dtype), self.rows, len(self.names))

    @property
    def rows(self) -> int:
        encoder: TextEncoder = self.encode
        return 1 + N_CTX + sum(len(chunk.rows) for chunk in encoder.chunks)


@pytest.mark.parametrize("task", ["caltech101", "imagenet-base"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_backward(benchmark, vit_b16: FrozenClip, task: str, dtype: str) -> None:
    case = Case(vit_b16, task, dtype)
    truncated = case.plain(truncate=True)
    expected = truncated()
    assert (case.gradient() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    compare(
        benchmark,
        case.title,
        case.gradient,
        baselines={"open_clip, longest class": truncated},
        floors={"its GEMMs": case.gemms(), "its forward alone": case.forward},
        rounds=11 if len(case.names) <= 50 else 5,
        rows=case.rows,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("task", "dtype"), [("imagenet-base", "bfloat16"), ("caltech101", "float32")])
def test_against_full_length(benchmark, vit_b16: FrozenClip, task: str, dtype: str) -> None:
    """Compares with texts of 77 tokens, as in CoOp's code; this slow baseline runs once."""
    case = Case(vit_b16, task, dtype)
    seconds = timed(case.plain(truncate=False)) if benchmark.enabled else 0.0
    compare(
        benchmark,
        f"{case.title}, against 77 tokens",
        case.gradient,
        measured={"open_clip, 77 tokens": seconds},
        rounds=7,
        memory=False,
    )
