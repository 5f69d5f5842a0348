"""The packed text tower against open_clip's own encode_text, forward and backward, for every kind of tower it takes."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import encoder
from torch import Tensor, nn
from tower_cases import CONTEXT, EOS, FIRST, LENGTH, NAMES, PAD, Words, clip_and_tokens, contexts, tower

from mergetune.clip import FrozenClip, TextEncoder, arrange, packed_texts, text_encoder
from mergetune.solutions import Prompt, space_of

pytestmark = pytest.mark.usefixtures("poison_uninitialized_memory")


def encode_text(model: nn.Module, tokens: Tensor, ctx: Tensor, first: int = FIRST) -> Tensor:
    """open_clip's own features [M, C, D] with the context vectors put in place of the embedded tokens."""
    embedding = model.text.token_embedding if hasattr(model, "text") else model.token_embedding
    features = []
    for own in ctx:

        def put(module: nn.Module, args: tuple, embedded: Tensor, own: Tensor = own) -> Tensor:
            own = own.to(embedded).expand(len(embedded), -1, -1)
            return torch.cat([embedded[:, :first], own, embedded[:, first + own.shape[1] :]], 1)

        handle = embedding.register_forward_hook(put)
        features.append(model.encode_text(tokens))
        handle.remove()
    return torch.stack(features)


def assert_relative(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    error = ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"relative error {error}"


def assert_same_features_and_gradient(encoder: TextEncoder, model: nn.Module, tokens: Tensor, ctx: Tensor) -> None:
    got, expected = encoder(ctx), encode_text(model, tokens, ctx)
    assert got.dtype == torch.float32
    assert_relative(got.detach(), expected.detach())
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    gradients = [torch.autograd.grad((pull * features).sum(), ctx)[0] for features in (got, expected)]
    assert_relative(*gradients)


# -- every kind of tower -----------------------------------------------------------------------------------------------


TOWERS = {
    "argmax": {},
    "eos": {"pool_type": "eos"},
    "last": {"pool_type": "last"},
    "no mask, argmax": {"no_causal_mask": True},
    "no mask, eos": {"no_causal_mask": True, "pool_type": "eos"},
    "no mask, last": {"no_causal_mask": True, "pool_type": "last"},
    "linear with bias": {"proj_bias": True},
    "no projection": {"proj_type": "none"},
    "layer scale": {"ls_init_value": 0.5},
    "quick_gelu": {"quick_gelu": True},
    "one head": {"heads": 1},
    "four heads": {"heads": 4},
    "one layer": {"layers": 1},
    "narrow mlp": {"mlp_ratio": 1.5},
    "norm epsilon": {"norm_kwargs": {"eps": 1e-2}},
    "tanh gelu": {"act_kwargs": {"approximate": "tanh"}},
}


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize("name", list(TOWERS))
@pytest.mark.parametrize("shared", [True, False])
def test_features_and_gradient_are_open_clips(shared, name, kind):
    model = tower(kind, **TOWERS[name])
    clip, tokens = clip_and_tokens(model)
    ctx = contexts(clip, 2, None if shared else len(NAMES))
    encoder = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT, shared=shared)
    assert_same_features_and_gradient(encoder, model, tokens, ctx)
    assert encoder(ctx).shape[-1] == clip.embed_dim


@pytest.mark.parametrize("causal", [True, False])
def test_an_encoder_made_for_class_specific_contexts_takes_shared_ones(causal):
    model = tower(no_causal_mask=not causal)
    clip, tokens = clip_and_tokens(model)
    encoder = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT, shared=False)
    assert_same_features_and_gradient(encoder, model, tokens, contexts(clip, 2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_without_a_start_token(shared, causal):
    """SigLIP's texts begin with their first word, and their last token is the feature."""
    model = tower(open_clip.CustomTextCLIP, pool_type="last", no_causal_mask=not causal)
    clip = FrozenClip(model, Words(start=False, end=EOS), "tiny")
    assert clip.first_token == 0
    tokens = clip.tokenize([f"x x x {name}" for name in NAMES])
    ctx = contexts(clip, 2, None if shared else len(NAMES))
    got = text_encoder(clip.text, tokens, first=0, context=CONTEXT, shared=shared)(ctx)
    expected = encode_text(model, tokens, ctx, first=0)
    assert_relative(got.detach(), expected.detach())
    assert_relative(*(torch.autograd.grad(features.square().sum(), ctx)[0] for features in (got, expected)))


def test_float64_tower_keeps_its_values():
    model = tower(dtype=torch.float64)
    clip, tokens = clip_and_tokens(model)
    ctx = contexts(clip, 1).detach()
    got = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT)(ctx.double())
    assert_relative(got, encode_text(model, tokens, ctx.double()), 1e-7)


def test_open_clips_own_tokenizer():
    model = tower(vocab_size=49408, context_length=77, width=8)
    clip = FrozenClip(model, open_clip.SimpleTokenizer(), "tiny")
    prompt = Prompt.from_template(clip, "a photo of a {}.")
    names = ("cat", "hot-air balloon", "Boeing 737-800", "dog")
    assert_relative(prompt.class_embeddings(clip, names), clip.class_embeddings(names, "a photo of a {}."))


# -- the class name's position -----------------------------------------------------------------------------------------


def coop_features(model: nn.Module, tokens: Tensor, ctx: Tensor, position: str, first: int = FIRST) -> Tensor:
    """open_clip's own features [M, C, D] of CoOp's sequences, each made whole from its pieces (trainers/coop.py)."""
    embedding = model.text.token_embedding if hasattr(model, "text") else model.token_embedding
    n, features = ctx.shape[-2], []
    for own in ctx:

        def put(module: nn.Module, args: tuple, embedded: Tensor, own: Tensor = own) -> Tensor:
            texts = []
            for row, vectors, name in zip(embedded, own.expand(len(embedded), -1, -1), NAMES, strict=True):
                name_length = len(name.split())
                start, behind = row[:first], row[first + n :]
                word, rest = behind[:name_length], behind[name_length:]
                half = n // 2
                order = {
                    "end": (start, vectors, word, rest),
                    "middle": (start, vectors[:half], word, vectors[half:], rest),
                    "front": (start, word, vectors, rest),
                }[position]
                texts.append(torch.cat(order))
            return torch.stack(texts)

        handle = embedding.register_forward_hook(put)
        features.append(model.encode_text(tokens))
        handle.remove()
    return torch.stack(features)


@pytest.mark.parametrize("name", ["argmax", "eos", "last", "no mask, argmax", "no mask, last", "one layer"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_positions_are_coops(position, shared, name):
    """Through Prompt, against whole sequences in open_clip's own tower: features and gradient."""
    model = tower(open_clip.CustomTextCLIP if "no mask" in name else open_clip.CLIP, **TOWERS[name])
    clip, _ = clip_and_tokens(model)
    ctx = contexts(clip, 2, None if shared else len(NAMES))
    words = "x x x {}" if name == "eos" else "x x x {} z"
    prompt = Prompt(ctx[0].detach(), words, None if shared else NAMES, position=position)
    got = encoder(clip, prompt, NAMES)(ctx)
    expected = coop_features(model, clip.tokenize([words.format(name) for name in NAMES]), ctx, position)
    assert_relative(got.detach(), expected.detach())
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    assert_relative(*(torch.autograd.grad((pull * features).sum(), ctx)[0] for features in (got, expected)))


@pytest.mark.parametrize("position", ["middle", "front"])
@pytest.mark.parametrize("causal", [True, False])
def test_positions_without_a_start_token(position, causal):
    model = tower(open_clip.CustomTextCLIP, pool_type="last", no_causal_mask=not causal)
    clip = FrozenClip(model, Words(start=False, end=EOS), "tiny")
    ctx = contexts(clip, 1)
    got = encoder(clip, Prompt(ctx[0].detach(), "x x x {} z", position=position), NAMES)(ctx)
    tokens = clip.tokenize([f"x x x {name} z" for name in NAMES])
    expected = coop_features(model, tokens, ctx, position, first=0)
    assert_relative(got.detach(), expected.detach())
    assert_relative(*(torch.autograd.grad(features.square().sum(), ctx)[0] for features in (got, expected)))


@pytest.mark.parametrize("position", ["middle", "front"])
def test_chunks_and_checkpointing_keep_the_position(position, monkeypatch):
    clip, tokens = clip_and_tokens(tower())
    ctx, where = contexts(clip, 2), {"first": FIRST, "context": CONTEXT}
    ends = torch.tensor([FIRST + CONTEXT + len(name.split()) for name in NAMES])
    tokens, places = arrange(tokens, ends, position=position, **where)
    expected = text_encoder(clip.text, tokens, places=places, **where)(ctx)
    monkeypatch.setattr(packed_texts, "CHUNK_TOKENS", 11)
    encoder = text_encoder(clip.text, tokens, places=places, chunk_tokens=11, **where)
    assert len(encoder.chunks) > 1
    got = encoder(ctx)
    assert_relative(got.detach(), expected.detach())
    assert_relative(*(torch.autograd.grad(features.square().sum(), ctx)[0] for features in (got, expected)))


def test_what_stands_before_the_name_is_shared():
    """One row a class for its words, its end and the context vectors behind the name; the others are in the prefix."""
    clip, _ = clip_and_tokens(tower())
    own = sum(len(name.split()) + 2 for name in NAMES)  # with "z" and the end
    ctx = contexts(clip, 1)[0].detach()
    packed = {
        p: rows(space_of(clip, Prompt(ctx, "x x x {} z", position=p), NAMES).encoder)
        for p in ("end", "middle", "front")
    }
    assert packed == {"end": own, "middle": own + 2 * len(NAMES), "front": own + 3 * len(NAMES)}


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("names", [("a",), ("a b c d",), ("a b", "c d", "e f"), ("a b c", "a b", "a")])
def test_few_equal_and_falling_lengths(names, causal, shared):
    model = tower(no_causal_mask=not causal)
    clip, tokens = clip_and_tokens(model, names)
    ctx = contexts(clip, 2, None if shared else len(names))
    encoder = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT, shared=shared)
    assert_same_features_and_gradient(encoder, model, tokens, ctx)


def test_class_order_is_kept():
    clip, tokens = clip_and_tokens(tower())
    ctx = contexts(clip, 1).detach()
    together = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT, chunk_tokens=5)(ctx)
    for c in range(len(NAMES)):
        alone = text_encoder(clip.text, tokens[c : c + 1], first=FIRST, context=CONTEXT)(ctx)
        assert_relative(together[:, c], alone[:, 0])


def test_prompts_are_encoded_independently():
    clip, tokens = clip_and_tokens(tower())
    ctx = contexts(clip, 3).detach()
    encoder = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT)
    for m in range(3):
        assert_relative(encoder(ctx)[m], encoder(ctx[m : m + 1])[0])


@pytest.mark.parametrize("causal", [True, False])
def test_a_name_that_fills_the_context_exactly(causal):
    model = tower(no_causal_mask=not causal)
    longest = " ".join("abcdefgh")  # start, 3 context tokens, 8 words, end: all 13
    clip, tokens = clip_and_tokens(model, ("a", longest))
    assert (tokens[1] != PAD).all()
    encoder = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT)
    assert_same_features_and_gradient(encoder, model, tokens, contexts(clip, 1))


@pytest.mark.parametrize("pool", ["argmax", "eos", "last"])
@pytest.mark.parametrize("words", [9, 10, 30])
def test_a_name_that_is_too_long_is_refused(words, pool):
    clip, _ = clip_and_tokens(tower(pool_type=pool))
    name = " ".join("b" * words)
    with pytest.raises(ValueError, match=f"texts must fit the text tower's {LENGTH} tokens, got 'x x x b b"):
        clip.tokenize(["x x x a", f"x x x {name}"])
    prompt = Prompt(ctx=contexts(clip, 1)[0].detach(), template="x x x {}")
    with pytest.raises(ValueError, match="texts must fit"):
        prompt.class_embeddings(clip, ["a", name])


def test_context_longer_than_the_text_is_refused():
    clip, tokens = clip_and_tokens(tower())
    with pytest.raises(ValueError, match="tokens must hold the class name after the 9 context tokens"):
        text_encoder(clip.text, tokens, first=FIRST, context=9)


@pytest.mark.parametrize("names", [("a", "b"), ("a b", "a c"), ("a b",)])
def test_template_with_too_few_words_is_refused(names):
    """Context vectors must never take the place of the class name's own tokens."""
    clip, _ = clip_and_tokens(tower())
    prompt = Prompt(ctx=contexts(clip, 1)[0].detach(), template="x x {}")
    with pytest.raises(ValueError, match="template must hold 3 tokens before {}"):
        prompt.class_embeddings(clip, names)


def test_fewer_context_vectors_than_positions_are_refused():
    clip, tokens = clip_and_tokens(tower())
    with pytest.raises(ValueError):
        text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT)(contexts(clip, 1)[:, :1])


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_chunks_change_nothing(chunk_tokens, shared, causal):
    model = tower(no_causal_mask=not causal)
    clip, tokens = clip_and_tokens(model)
    ctx = contexts(clip, 2, None if shared else len(NAMES))
    options = {"first": FIRST, "context": CONTEXT, "shared": shared, "chunk_tokens": chunk_tokens}
    encoder = text_encoder(clip.text, tokens, **options)
    assert len(encoder.chunks) > 1
    assert_same_features_and_gradient(encoder, model, tokens, ctx)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("limit", [6, 12])
def test_checkpointing_changes_nothing(limit, shared, monkeypatch):
    calls, checkpoint = [], packed_texts.checkpoint

    def counted(*args, **kwargs):
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(packed_texts, "checkpoint", counted)
    model = tower()
    clip, tokens = clip_and_tokens(model)
    ctx = contexts(clip, 2, None if shared else len(NAMES))
    encoder = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT, shared=shared, chunk_tokens=limit)
    assert_same_features_and_gradient(encoder, model, tokens, ctx)
    assert not calls
    monkeypatch.setattr(packed_texts, "CHUNK_TOKENS", limit)
    assert_same_features_and_gradient(encoder, model, tokens, ctx)
    assert len(calls) >= len(encoder.chunks) > 1
    calls.clear()
    encoder(ctx.detach())
    with torch.no_grad():
        encoder(ctx)
    assert not calls


# -- what is saved -----------------------------------------------------------------------------------------------------


def rows(encoder: TextEncoder) -> int:
    return sum(len(chunk.rows) for chunk in encoder.chunks)


def test_only_the_tokens_of_the_names_are_packed():
    """Behind a shared prefix a class costs its name and the end token, whatever the context's length."""
    words, count = [name.split() for name in NAMES], len(NAMES)
    clip, tokens = clip_and_tokens(tower(context_length=77))
    assert tokens.shape[1] == 77
    options = {"first": FIRST, "context": CONTEXT}
    assert rows(text_encoder(clip.text, tokens, **options)) == sum(len(name) + 1 for name in words)
    whole = text_encoder(clip.text, tokens, **options, shared=False)
    assert rows(whole) == sum(FIRST + CONTEXT + len(name) + 1 for name in words)
    clip, tokens = clip_and_tokens(tower(no_causal_mask=True))
    assert rows(text_encoder(clip.text, tokens, **options)) == count * LENGTH


# -- other precisions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_half_copy_is_close(dtype, tolerance):
    clip, tokens = clip_and_tokens(tower())
    ctx = contexts(clip, 2)
    options = {"first": FIRST, "context": CONTEXT}
    exact, rough = (
        text_encoder(clip.text, tokens, **options)(ctx),
        text_encoder(clip.text_as(dtype), tokens, **options)(ctx),
    )
    assert rough.dtype == torch.float32
    assert_relative(rough.detach(), exact.detach(), tolerance)
    gradients = [torch.autograd.grad(features.square().sum(), ctx)[0] for features in (rough, exact)]
    assert gradients[0].dtype == torch.float32
    assert_relative(*gradients, 2 * tolerance)
    assert clip.text.dtype == torch.float32
    assert clip.text_as(dtype) is clip.text_as(dtype)


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_a_model_that_open_clip_loaded_in_a_half_type(dtype, tolerance, kind):
    """Its layer norms and embeddings stay in float32."""
    model = tower(kind, half=dtype)
    clip, tokens = clip_and_tokens(model)
    ctx = contexts(clip, 2)
    features = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT)(ctx)
    assert_relative(features.detach(), encode_text(model, tokens, ctx.detach()), tolerance)
    assert torch.autograd.grad(features.square().sum(), ctx)[0].isfinite().all()


@pytest.mark.parametrize("backward_inside", [True, False])
def test_under_autocast(backward_inside):
    """As any module, the tower may stand in a training loop under autocast."""
    clip, tokens = clip_and_tokens(tower())
    encoder, ctx = text_encoder(clip.text, tokens, first=FIRST, context=CONTEXT), contexts(clip, 2)
    expected = torch.autograd.grad(encoder(ctx).square().sum(), ctx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(ctx)
        if backward_inside:
            got = torch.autograd.grad(features.square().sum(), ctx)[0]
    if not backward_inside:
        got = torch.autograd.grad(features.square().sum(), ctx)[0]
    assert_relative(got, expected, 0.1)


# -- opaque towers -----------------------------------------------------------------------------------------------------


def padding_mask() -> nn.Module:
    """No configuration of open_clip's asks for one, only its TextTransformer."""
    model = tower(open_clip.CustomTextCLIP, no_causal_mask=True)
    model.text.use_pad_mask = True
    return model


OPAQUE = {
    "class token": (lambda: tower(open_clip.CustomTextCLIP, embed_cls=True), r"class token \(CoCa\)"),
    "padding mask": (padding_mask, "padding mask"),
    "pools first": (lambda: tower(pool_type="first"), "must pool by argmax, eos or last, got 'first'"),
    "custom block": (lambda: tower(block_type="custom"), "ResidualAttentionBlock, got CustomResidualAttentionBlock"),
    "query norm": (lambda: tower(qk_norm=True), "ResidualAttentionBlock, got CustomResidualAttentionBlock"),
    "no projection": (lambda: tower(qk_norm=True, proj_type="none"), "got CustomResidualAttentionBlock"),
}


@pytest.mark.parametrize("name", list(OPAQUE))
def test_towers_that_cannot_be_taken_apart_encode_texts_and_are_named_to_prompts(name):
    make, message = OPAQUE[name]
    model = make()
    clip = FrozenClip(model, Words(), "tiny")
    expected = F.normalize(model.encode_text(clip.tokenizer([f"x {name}" for name in NAMES])), dim=-1)
    assert_relative(clip.class_embeddings(NAMES, "x {}"), expected)
    assert (clip.embed_dim, clip.context_length) == (expected.shape[1], LENGTH)
    with pytest.raises(TypeError, match=f"{message}.*: this CLIP takes no prompts"):
        Prompt.from_template(clip, "x x x {}")


def test_a_model_that_adds_to_its_tower_is_opaque():
    """Whatever its tower looks like: only the model itself knows what it makes of a text."""

    class Adapted(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.visual, self.text, self.logit_scale = model.visual, model.text, model.logit_scale
            self.adapter = nn.Linear(8, 8)
            self.encode_image = model.encode_image

        def encode_text(self, text: Tensor) -> Tensor:
            return self.adapter(self.text(text))

    model = Adapted(tower(open_clip.CustomTextCLIP))
    clip = FrozenClip(model, Words(), "tiny")
    expected = F.normalize(model.encode_text(clip.tokenize([f"x {name}" for name in NAMES])), dim=-1)
    assert_relative(clip.class_embeddings(NAMES, "x {}"), expected)
    with pytest.raises(TypeError, match="got TextTransformer of Adapted: this CLIP takes no prompts"):
        _ = clip.text


def test_a_model_that_gives_more_than_a_row_a_text_is_refused_by_name():
    clip = FrozenClip(tower(open_clip.CustomTextCLIP, pool_type="none"), Words(), "tiny")
    with pytest.raises(TypeError, match=r"encode_text must return \[n, D\] for 5 texts, got .* from CustomTextCLIP"):
        clip.class_embeddings(NAMES, "x {}")


def test_a_model_that_is_no_clip_is_refused_by_name():
    with pytest.raises(TypeError, match="model must have encode_image, .* got Linear without encode_image"):
        FrozenClip(nn.Linear(2, 2), Words(), "tiny")
