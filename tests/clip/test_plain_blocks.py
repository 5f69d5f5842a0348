"""The packed text tower by plain autograd: the frozen tower's values, gradients of weights, second derivatives."""

from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from tower_cases import CONTEXT, FIRST, NAMES, clip_and_tokens, contexts, tower

from mergetune.clip import FrozenClip, TextEncoder, packed_texts, text_encoder
from mergetune.clip.packed_blocks import Layout, run_blocks

WHERE = {"first": FIRST, "context": CONTEXT}
TOWERS = {
    "gelu": {},
    "tanh gelu": {"act_kwargs": {"approximate": "tanh"}},
    "quick gelu": {"quick_gelu": True},
    "no mask": {"no_causal_mask": True},
    "layer scale": {"ls_init_value": 0.5},
    "norm epsilon": {"norm_kwargs": {"eps": 1e-2}},
    "one layer": {"layers": 1},
}
tower_kinds = pytest.mark.parametrize("name", list(TOWERS))
both_contexts = pytest.mark.parametrize("shared", [True, False])


def exact_tower(**settings) -> tuple[FrozenClip, Tensor]:
    return clip_and_tokens(tower(dtype=torch.float64, **settings))


def context(clip: FrozenClip, prompts: int, shared: bool = True) -> Tensor:
    return contexts(clip, prompts, None if shared else len(NAMES)).detach().double().requires_grad_()


def plain_and_frozen(clip: FrozenClip, tokens: Tensor, **options) -> tuple[TextEncoder, TextEncoder]:
    frozen = text_encoder(clip.text, tokens, **WHERE, **options)
    return replace(frozen, backend="torch"), frozen


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-11) -> bool:
    return got.shape == expected.shape and bool((got - expected).abs().max() <= tolerance * expected.abs().max())


@tower_kinds
@both_contexts
def test_features_and_gradient_are_those_of_the_frozen_tower(name, shared):
    clip, tokens = exact_tower(**TOWERS[name])
    ctx, pull = context(clip, 2, shared), torch.randn(2, len(NAMES), 8, dtype=torch.float64)
    plain, frozen = (encoder(ctx) for encoder in plain_and_frozen(clip, tokens, shared=shared))
    assert plain.dtype == frozen.dtype == torch.float64
    assert close(plain, frozen)
    assert close(*(torch.autograd.grad((pull * features).sum(), ctx)[0] for features in (plain, frozen)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_other_precisions(dtype, tolerance):
    clip, tokens = clip_and_tokens(tower())
    ctx = contexts(clip, 2)
    frozen = text_encoder(clip.text_as(dtype), tokens, **WHERE)
    features = [encoder(ctx) for encoder in (replace(frozen, backend="torch"), frozen)]
    assert [f.dtype for f in features] == [torch.float32] * 2
    assert close(*features, tolerance)
    assert close(*(torch.autograd.grad(f.square().sum(), ctx)[0] for f in features), 2 * tolerance)


@tower_kinds
@both_contexts
def test_second_derivatives(name, shared):
    clip, tokens = exact_tower(**TOWERS[name])
    plain, _ = plain_and_frozen(clip, tokens, shared=shared)
    ctx = context(clip, 1, shared)
    assert gradcheck(plain, ctx, fast_mode=True)
    assert gradgradcheck(plain, ctx, fast_mode=True)


def test_the_third_derivative():
    clip, tokens = exact_tower()
    plain, _ = plain_and_frozen(clip, tokens)
    ctx = context(clip, 1)

    def bend(ctx: Tensor) -> Tensor:
        loss = F.normalize(plain(ctx), dim=-1).sin().sum()
        (slope,) = torch.autograd.grad(loss, ctx, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), ctx, create_graph=True)[0]

    assert gradcheck(bend, ctx, fast_mode=True)


def test_the_frozen_tower_is_differentiated_once():
    clip, tokens = exact_tower()
    _, frozen = plain_and_frozen(clip, tokens)
    ctx = context(clip, 1)
    (slope,) = torch.autograd.grad(frozen(ctx).square().sum(), ctx, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


# -- weights -----------------------------------------------------------------------------------------------------------


def trainable(clip: FrozenClip) -> dict[str, nn.Parameter]:
    blocks = nn.ModuleList(clip.text.blocks).requires_grad_()
    return dict(blocks.named_parameters())


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@tower_kinds
def test_gradients_of_the_weights_are_open_clips(name, kind):
    clip, tokens = exact_tower(kind=kind, **TOWERS[name])
    weights = list(trainable(clip).values())
    embedded = clip.text.token_embedding(tokens[:, FIRST : FIRST + CONTEXT])[:1]  # what open_clip itself puts there
    packed = plain_and_frozen(clip, tokens)[0](embedded)[0]
    pull = torch.randn_like(packed)
    got, expected = (
        torch.autograd.grad((pull * features).sum(), weights) for features in (packed, clip.model.encode_text(tokens))
    )
    assert all(close(*pair) for pair in zip(got, expected, strict=True))


def test_second_derivatives_in_the_weights():
    clip, tokens = exact_tower(layers=1)
    weights, ctx = trainable(clip), context(clip, 1)
    plain, _ = plain_and_frozen(clip, tokens)

    def slope(*_: Tensor) -> Tensor:  # a function of the weights, which gradcheck changes in place
        return torch.autograd.grad(plain(ctx).square().sum(), ctx, create_graph=True)[0]

    assert gradcheck(slope, tuple(weights.values()), fast_mode=True)


class Blocks(nn.ModuleList):
    """The blocks as one module, so that functional_call can put other weights in."""

    def __init__(self, blocks: tuple[nn.Module, ...], layout: Layout, backend: str | None = None) -> None:
        super().__init__(blocks)
        self.layout, self.backend = layout, backend

    def forward(self, x: Tensor) -> Tensor:
        return run_blocks(tuple(self), x, self.layout, backend=self.backend)


def test_stacked_weights_by_functional_call_and_vmap():
    """Weights of several settings, each a tensor with a leading dimension, run as one call each would."""
    clip, tokens = exact_tower()
    lengths = (2, 3, 3)
    layout = Layout(4, lengths, torch.tensor(lengths).cumsum(0) - 1, clip.text.heads, causal=True)
    x = torch.randn(1, 4 + sum(lengths), clip.text.width, dtype=torch.float64)
    blocks = Blocks(clip.text.blocks, layout, backend="torch")
    states = {name: torch.stack([w, w + 0.1 * torch.randn_like(w)]) for name, w in blocks.named_parameters()}
    states = {name: stacked.requires_grad_() for name, stacked in states.items()}
    run = lambda state: torch.func.functional_call(blocks, state, x)  # noqa: E731
    together = torch.vmap(run)(states)
    alone = torch.stack([run({name: stacked[m] for name, stacked in states.items()}) for m in range(2)])
    assert close(together, alone)
    gradients = [torch.autograd.grad(out.square().sum(), list(states.values())) for out in (together, alone)]
    assert all(close(*pair) for pair in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match="blocks must be frozen unless backend is 'torch'"):
        torch.func.functional_call(Blocks(clip.text.blocks, layout), {n: s[0] for n, s in states.items()}, x)


def test_weights_that_are_not_frozen_need_the_plain_tower():
    clip, tokens = exact_tower()
    trainable(clip)
    plain, frozen = plain_and_frozen(clip, tokens)
    ctx = context(clip, 1)
    with pytest.raises(ValueError, match="blocks must be frozen unless backend is 'torch', got weights that require"):
        frozen(ctx)
    with torch.no_grad():
        assert close(frozen(ctx), plain(ctx))


def test_another_backend_is_refused():
    clip, tokens = exact_tower()
    encoder = replace(text_encoder(clip.text, tokens, **WHERE), backend="cpp")
    with pytest.raises(ValueError, match="backend must be None or 'torch', got 'cpp'"):
        encoder(context(clip, 1))


# -- memory, precision -------------------------------------------------------------------------------------------------


@both_contexts
def test_chunks_and_checkpointing_change_nothing(shared, monkeypatch):
    clip, tokens = exact_tower()
    weights, ctx = list(trainable(clip).values()), context(clip, 3, shared)

    def derivatives(encoder: TextEncoder) -> list[Tensor]:
        (slope,) = torch.autograd.grad(encoder(ctx).square().sum(), ctx, create_graph=True)
        return [slope, *torch.autograd.grad(slope.square().sum(), [ctx, *weights])]

    expected = derivatives(plain_and_frozen(clip, tokens, shared=shared)[0])
    calls, checkpoint = [], packed_texts.checkpoint
    monkeypatch.setattr(packed_texts, "CHUNK_TOKENS", 11)
    monkeypatch.setattr(packed_texts, "checkpoint", lambda *a, **kw: calls.append(a) or checkpoint(*a, **kw))
    encoder = plain_and_frozen(clip, tokens, shared=shared, chunk_tokens=11)[0]
    assert all(close(*pair) for pair in zip(derivatives(encoder), expected, strict=True))
    assert len(encoder.chunks) > 1 and calls
    calls.clear()
    gradients = torch.autograd.grad(encoder(ctx.detach()).square().sum(), weights)  # of the weights alone
    assert calls and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("settings", [{"proj_bias": True}, {"proj_type": "none"}, {"norm_kwargs": {"eps": 1e-3}}])
def test_a_float64_copy_is_float64_from_end_to_end(settings):
    """Also where open_clip's last layer norm rounds to float32, as in a model loaded for a half type."""
    model = tower(open_clip.CustomTextCLIP, **settings)
    rounding = open_clip.transformer.LayerNormFp32(16, eps=model.text.ln_final.eps)
    rounding.load_state_dict(model.text.ln_final.state_dict())
    rounded = tower(open_clip.CustomTextCLIP, **settings)
    rounded.text.ln_final = rounding
    features = []
    for kind in (model, rounded):
        clip, tokens = clip_and_tokens(kind)
        features.append(text_encoder(clip.text_as(torch.float64), tokens, **WHERE)(context(clip, 1).detach()))
    assert features[0].dtype == torch.float64
    assert close(*features, 1e-14)
    assert (features[0] != features[0].float()).any()
