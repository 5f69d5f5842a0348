"""Benchmark of one training step with ViT-B/16, against the official step, which encodes images and full texts.

Shapes: B batch, C classes, D embedding width, N points on a path.
"""

from __future__ import annotations

from copy import deepcopy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from measure import TASKS, compare, timed
from plain import N_CTX, TEMPLATE, PlainPrompts, text_gemms
from torch import Tensor

from mergetune import FeatureCache, FrozenClip, Prompt, fit
from mergetune.clip import fill
from mergetune.solutions import space_of
from mergetune.training.objective import Anchors, Near, Objective, path_points

BATCH, POINTS, LAM, BETA, LR = 128, 5, 8.0, 0.5, 2e-3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def official_step(
    model: open_clip.CLIP,
    prompts: PlainPrompts,
    images: Tensor,
    labels: Tensor,
    ctx: Tensor,
    tuned: Tensor,
    zero_shot: Tensor,
    alphas: list[float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The image features, and the gradient with respect to ``ctx`` as the official code computes it.

    The endpoint loss encodes images and prompts. The path loss encodes the prompts of both ends again, and the images
    at every point. Prompts have all 77 tokens. The image tower gets no gradient.
    """
    leaf = ctx.detach().clone().requires_grad_()

    def encode_images() -> Tensor:
        with torch.no_grad():
            return F.normalize(model.encode_image(images).float(), dim=-1)

    x = encode_images()
    here = F.normalize(prompts(leaf), dim=-1)
    loss = F.cross_entropy(scale * x @ here.T, labels)
    loss = loss + LAM * (1 - F.cosine_similarity(here, zero_shot, dim=-1)).mean()
    with torch.no_grad():
        end = prompts(tuned)
    start = prompts(leaf)
    for alpha in alphas:
        mixed = F.normalize(end + alpha * (start - end), dim=-1)
        loss = loss + BETA / len(alphas) * F.cross_entropy(scale * encode_images() @ mixed.T, labels)
    loss.backward()
    return x, leaf.grad


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_step(benchmark, vit_b16: FrozenClip, dtype: str) -> None:
    classes, clip, precision = TASKS["caltech101"], vit_b16, DTYPES[dtype]
    names = open_clip.IMAGENET_CLASSNAMES[:classes]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 224, 224, generator=generator).to(clip.device, precision)
    labels = (torch.arange(BATCH) % classes).to(clip.device)
    zero = Prompt.from_template(clip, TEMPLATE)
    noise = 0.01 * torch.randn(2, *zero.ctx.shape, generator=generator).to(clip.device)
    ctx, tuned = zero.ctx + noise[0], zero.with_state({"ctx": zero.ctx + noise[1]})
    w1, alphas = clip.class_embeddings(names, TEMPLATE), path_points("even", POINTS)

    prompts = PlainPrompts.of(clip.model, clip.tokenize([fill(TEMPLATE, name) for name in names]), precision)
    model = deepcopy(clip.model).to(precision)
    found: list[tuple[Tensor, Tensor]] = []
    official = (model, prompts, images, labels, ctx, tuned.ctx, w1, alphas.tolist(), clip.logit_scale)
    seconds = timed(lambda: found.append(official_step(*official)))
    ((features, expected),) = found

    rest = F.normalize(torch.randn(16 * classes - BATCH, clip.embed_dim, generator=generator), dim=-1)
    cache = FeatureCache.from_tensors(
        torch.cat([features.cpu(), rest]), torch.arange(16 * classes) % classes, names, normalize=True
    )
    parameter = ctx.clone().requires_grad_()
    space = space_of(clip, zero, names, precision=precision)
    paths = Anchors(
        classes=space.classes({"ctx": tuned.ctx[None]}),
        betas=torch.tensor([BETA], device=clip.device),
        alphas=alphas.to(clip.device),
        points=POINTS,
    )
    objective = Objective(space, paths, Near(LAM, classes=w1))
    optimizer = torch.optim.SGD([parameter], lr=0.0, momentum=0.9, weight_decay=5e-4)
    index = torch.arange(BATCH)

    def step() -> None:
        x = cache.rows(index).to(clip.device)
        loss, _ = objective({"ctx": parameter}, x, cache.labels[index].to(clip.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    if dtype == "float32":  # the gradient of a random tower is too small for a comparison in bfloat16
        assert (parameter.grad - expected).norm() <= 1e-3 * expected.norm()
    rows = 1 + N_CTX + sum(len(chunk.rows) for chunk in space.encoder.chunks)
    whole = fit(clip, cache, tuned, epochs=4, batch_size=BATCH, precision=dtype, progress=False)
    compare(
        benchmark,
        f"training step, {classes} names, B {BATCH}, N {POINTS}, {dtype}",
        step,
        measured={"the official step": seconds},
        floors={"the text tower's GEMMs": text_gemms(clip.text_as(precision), rows, classes)},
        memory=False,
        fit_ms_per_step=whole.timings["ms_per_step"],
    )
