"""The objective on a real prompt encoder, and as fit() builds it."""

from collections.abc import Callable
from copy import deepcopy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from fit_cases import head_weight
from objective_cases import (
    CLASSES,
    DOUBLE,
    GRID_POINTS,
    NAMES,
    WIDTH,
    Expected,
    assert_agree,
    batch,
    draw,
    fisher_by_hand,
    objective_of,
    unit,
)
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from tiny import parameter, with_parameter
from torch import Tensor

from mergetune import FeatureCache, FrozenClip, Head, Prompt
from mergetune.clip import text_encoder
from mergetune.facts.function_options import SPACES, SURROGATES
from mergetune.training import fit_job
from mergetune.training.objective import Objective, path_points

# -- a real prompt encoder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=16, head_width=16, patch_size=8, image_size=8)
    text = CLIPTextCfg(context_length=16, vocab_size=49408, width=16, heads=2, layers=2)
    model = open_clip.CLIP(WIDTH, vision, text)
    with torch.no_grad():
        for parameter in (*model.transformer.parameters(), model.positional_embedding, model.text_projection):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=16), "tiny")


def open_clip_encode(clip: FrozenClip, tokens: Tensor, first: int) -> Callable[[Tensor], Tensor]:
    """One prompt's class features in float64 from open_clip's encode_text, embeddings replaced."""
    model = deepcopy(clip.model).double()
    embed, context = model.token_embedding.forward, {}

    def replaced(ids: Tensor) -> Tensor:
        ctx = context["ctx"].expand(len(ids), -1, -1)
        embedded = embed(ids)
        return torch.cat([embedded[:, :first], ctx, embedded[:, first + ctx.shape[1] :]], 1)

    model.token_embedding.forward = replaced

    def encode(ctx: Tensor) -> Tensor:
        context["ctx"] = ctx
        return model.encode_text(tokens)

    return encode


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_real_prompt_encoder_in_float64(clip, surrogate, space):
    tokens = clip.tokenize([f"X X X {name}." for name in NAMES])
    encode = text_encoder(clip.text.astype(DOUBLE), tokens, first=1, context=3)
    anchors, w1 = draw(2, 3, clip.text.width, seed=60), draw(CLASSES, WIDTH, seed=61)
    curvature = draw(CLASSES, WIDTH, seed=62).abs() if surrogate == "fisher" else None
    alphas = path_points("official", 3)
    shared = {"scale": 5.0, "normalize": True, "w1": w1, "lam": 2.0, "surrogate": surrogate, "space": space}
    objective = objective_of(
        encode,
        anchors=encode(anchors) if space == "embedding" else anchors,
        betas=torch.tensor([0.5, 2.0], dtype=DOUBLE),
        alphas=alphas,
        points=3,
        curvature=curvature,
        **shared,
    )
    expected = Expected(
        encode=open_clip_encode(clip, tokens, 1),
        anchors=list(anchors),
        betas=[0.5, 2.0],
        alphas=alphas.tolist(),
        curvature=curvature,
        **shared,
    )
    assert_agree(objective, expected, draw(3, clip.text.width, seed=63), *batch(), 1e-11)


# -- as fit() builds it ------------------------------------------------------------------------------------------------


@pytest.fixture
def built(clip) -> Callable[..., tuple[Objective, Prompt | Head]]:
    """The objective and the start of a fit() before its first step."""

    def build(tuned, features, **settings):
        job = fit_job(clip, features, tuned, **settings)
        return job.objective, job.start

    return build


@pytest.fixture(scope="module")
def features() -> FeatureCache:
    count = 12
    x = unit(draw(count, WIDTH, seed=70)).float()
    return FeatureCache.from_tensors(x, torch.arange(count) % CLASSES, NAMES)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("k", [1, 3])
def test_fit_of_prompts(clip, built, features, k, surrogate, space):
    template = "a photo of a {}."
    zero_shot = Prompt.from_template(clip, template)
    tuned = [Prompt(zero_shot.ctx + 0.1 * draw(*zero_shot.ctx.shape, seed=80 + i).float(), template) for i in range(k)]
    betas = [0.5, 2.0, 1.0][:k]
    settings = {"lam": 3.0, "beta": betas, "tau": 0.3, "points": 4, "surrogate": surrogate, "space": space}
    objective, start = built(tuned, features, precision="float32", **settings)
    tokens = clip.tokenize([template.format(name) for name in NAMES])
    encode = open_clip_encode(clip, tokens, 1)
    x, labels, scale = features.tensor().double(), features.labels, clip.model.logit_scale.double().exp().item()
    w1 = encode(zero_shot.ctx.double())
    expected = Expected(
        encode=encode,
        scale=scale,
        normalize=True,
        anchors=[prompt.ctx.double() for prompt in tuned],
        betas=betas,
        alphas=GRID_POINTS["even"],
        w1=w1,
        lam=3.0,
        surrogate=surrogate,
        space=space,
        curvature=fisher_by_hand(x, w1, scale, True) if surrogate == "fisher" else None,
    )
    middle = sum(prompt.ctx for prompt in tuned) / k
    assert torch.allclose(parameter(start), 0.7 * zero_shot.ctx + 0.3 * middle, atol=1e-7)
    assert_agree(objective, expected, parameter(start), x.float(), labels, 1e-5, like=start)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logit_scale", [1.0, 20.0])
def test_fit_of_heads(clip, built, features, logit_scale, bias, surrogate, space):
    """Whatever factor a head comes with, its logits are kept and its weights take the CLIP's unit."""
    scale = clip.model.logit_scale.double().exp().item()
    heads = [
        Head(
            weight=draw(CLASSES, WIDTH, seed=90 + i).float(),
            classnames=NAMES,
            bias=draw(CLASSES, seed=92 + i).float() if bias else None,
            logit_scale=logit_scale,
        )
        for i in range(2)
    ]
    settings = {"lam": 3.0, "beta": 0.5, "tau": 0.3, "points": 4, "surrogate": surrogate, "space": space}
    objective, start = built(heads, features, grid="official", **settings)
    x, labels = features.tensor().double(), features.labels
    w1 = clip.class_embeddings(NAMES).double()
    anchors = [head.weight.double() * logit_scale / scale for head in heads]
    if bias:
        w1 = F.pad(w1, (0, 1))
        pairs = zip(anchors, heads, strict=True)
        anchors = [torch.cat([t, head.bias.double()[:, None] * logit_scale / scale], 1) for t, head in pairs]
    expected = Expected(
        encode=lambda parameter: parameter,
        scale=scale,
        normalize=False,
        anchors=anchors,
        betas=[0.5, 0.5],
        alphas=GRID_POINTS["official"],
        w1=w1,
        lam=head_weight(3.0, features, w1, scale),
        surrogate=surrogate,
        space=space,
        curvature=fisher_by_hand(x, w1, scale, False) if surrogate == "fisher" else None,
    )
    assert torch.allclose(parameter(start).double(), 0.7 * w1 + 0.3 * sum(anchors) / 2, atol=1e-6)
    assert_agree(objective, expected, parameter(start), x.float(), labels, 1e-5, like=start)
    logits = with_parameter(start, anchors[0])
    got = logits.logit_scale * (x.float() @ logits.weight.T + (logits.bias if bias else 0))
    own = logit_scale * (x.float() @ heads[0].weight.T + (heads[0].bias if bias else 0))
    assert torch.allclose(got, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_fit_starts_where_tau_says(clip, built, features, tau):
    zero_shot = Prompt.from_template(clip)
    tuned = Prompt(draw(*zero_shot.ctx.shape, seed=95).float(), zero_shot.template)
    _, start = built(tuned, features, tau=tau)
    assert torch.equal(parameter(start), tuned.ctx if tau else zero_shot.ctx)
