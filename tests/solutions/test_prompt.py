"""Prompts: their texts, positions and starts."""

from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from solution_cases import KINDS, TEMPLATE, make
from tiny import NAMES, VISION, encoder, normal, tiny_clip, with_parameter

from mergetune import FeatureCache, FrozenClip, Prompt, fit

# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, "the {}", "an icon of a {}, which is red"])
def test_from_template_is_the_zero_shot_classifier(siglip, template):
    clip = tiny_clip(siglip=siglip)
    prompt = Prompt.from_template(clip, template)
    assert prompt.n_ctx == len(template.split("{")[0].split()) and prompt.classnames is None
    expected = clip.class_embeddings(NAMES, template)
    torch.testing.assert_close(prompt.class_embeddings(clip, NAMES), expected)
    torch.testing.assert_close(prompt.per_class(NAMES).class_embeddings(clip, NAMES), expected)
    torch.testing.assert_close(prompt.class_weights(clip, NAMES), clip.encode_text([template.format(n) for n in NAMES]))


def test_from_template_carries_its_origin(clip):
    prompt = Prompt.from_template(clip)
    assert (prompt.backbone, prompt.fingerprint) == (clip.name, clip.text_fingerprint)
    assert prompt.ctx.dtype == torch.float32 and not prompt.ctx.requires_grad
    prompt.ctx.zero_()  # a copy: the CLIP's own embedding stays
    assert not torch.equal(Prompt.from_template(clip).ctx, prompt.ctx)


def test_random(clip):
    prompt = Prompt.random(clip, 5, seed=3)
    assert prompt.ctx.shape == (5, 16) and prompt.template == "X X X X X {}."
    assert torch.equal(prompt.ctx, Prompt.random(clip, 5, seed=3).ctx)
    assert not torch.equal(prompt.ctx, Prompt.random(clip, 5, seed=4).ctx)
    many = Prompt.random(clip, 8, [str(i) for i in range(50)])
    assert many.ctx.shape == (50, 8, 16) and many.ctx.std().item() == pytest.approx(0.02, rel=0.05)
    assert len({tuple(c.flatten().tolist()) for c in many.ctx}) == 50
    assert prompt.class_embeddings(clip, NAMES).shape == (3, 8)
    with pytest.raises(ValueError, match="n_ctx must be at least 1, got 0"):
        Prompt.random(clip, 0)


def test_per_class_contexts_are_their_own_memory(clip):
    shared = Prompt.from_template(clip)
    own = shared.per_class(NAMES)
    assert own.ctx.shape == (3, 4, 16) and own.classnames == NAMES
    own.ctx[0] += normal(4, 16)
    assert torch.equal(own.ctx[1], shared.ctx)
    changed = own.class_embeddings(clip, NAMES) - shared.class_embeddings(clip, NAMES)
    assert changed[0].abs().max() > 1e-3 and changed[1:].abs().max() < 1e-6
    with pytest.raises(ValueError, match="ctx must be shared by all classes"):
        own.per_class(NAMES)


@pytest.mark.parametrize("siglip", [False, True])
def test_context_vectors_go_where_the_words_stood(siglip):
    """Against open_clip's own tower, run on embeddings with the context put in by hand."""
    clip = tiny_clip(siglip=siglip)
    prompt = Prompt(normal(3, 4, 16), TEMPLATE, NAMES)
    tower = clip.model.text if siglip else clip.model
    tokens = clip.tokenize([TEMPLATE.format(name) for name in NAMES])
    handle = tower.token_embedding.register_forward_hook(
        lambda module, args, out: torch.cat([out[:, :1], prompt.ctx, out[:, 5:]], 1)
    )
    try:
        with torch.no_grad():
            expected = clip.model.encode_text(tokens)
    finally:
        handle.remove()
    torch.testing.assert_close(prompt.class_weights(clip, NAMES), expected)


@pytest.mark.parametrize("position", ["middle", "front"])
@pytest.mark.parametrize("suffix", [".", "", " here."])
def test_the_name_at_another_position(clip, position, suffix):
    """Its tokens are those that CoOp's tokenizer counts, whatever punctuation is in it."""
    names = ("cat", "St. Bernard", "hot-air balloon", "7-Eleven", "U.S.A.", "what?")
    prompt, bpe = Prompt(normal(4, 16), "X X X X {}" + suffix, position=position), open_clip.SimpleTokenizer()
    before = {"middle": 2, "front": 0}[position]
    expected = []
    for name in names:
        embedded = clip.text.token_embedding.weight[clip.tokenize([f"X X X X {name}{suffix}"])[0]]
        end = 5 + len(bpe.encode(name))
        order = [embedded[:1], prompt.ctx[:before], embedded[5:end], prompt.ctx[before:], embedded[end:]]
        handle = clip.model.token_embedding.register_forward_hook(lambda *_, order=order: torch.cat(order)[None])
        with torch.no_grad():
            expected.append(clip.model.encode_text(clip.tokenize([f"X X X X {name}{suffix}"]))[0])
        handle.remove()
    torch.testing.assert_close(prompt.class_weights(clip, names), torch.stack(expected))


def test_a_name_that_fills_the_text_may_stand_anywhere(clip):
    longest = " ".join(["cat"] * 10)  # start, 4 context tokens, 10 words, end: all 16
    for position in ("end", "middle", "front"):
        prompt = Prompt(normal(4, 16), "X X X X {}", position=position)
        assert prompt.class_embeddings(clip, ["dog", longest]).isfinite().all()
        with pytest.raises(ValueError, match="must fit the text tower's 16 tokens"):
            prompt.class_embeddings(clip, ["dog", f"{longest} cat"])


def test_where_the_name_stands_is_kept(clip):
    for made in (Prompt.from_template(clip, position="middle"), Prompt.random(clip, 4, position="middle")):
        assert made.position == made.per_class(NAMES).position == with_parameter(made, made.ctx).position == "middle"
    same = Prompt.from_template(clip).ctx
    assert torch.equal(Prompt.from_template(clip, position="front").ctx, same)
    with pytest.raises(ValueError, match="position must be one of end, middle, front, got 'start'"):
        Prompt(normal(4, 16), TEMPLATE, position="start")


@pytest.mark.parametrize("position", ["middle", "front"])
@pytest.mark.parametrize("space", ["embedding", "parameter"])
def test_fit_goes_on_from_a_prompt_with_the_name_elsewhere(clip, position, space):
    """The zero-shot reference stays the ordinary text; the start mixes context vectors."""
    x = F.normalize(normal(6, 8, seed=3), dim=-1)
    cache = FeatureCache.from_tensors(x, [0, 1, 2, 0, 1, 2], NAMES)
    tuned = Prompt(normal(4, 16), TEMPLATE, position=position)
    run = {"epochs": 1, "lr": 1e-6, "warmup_lr": 1e-6, "precision": "float32", "progress": False, "space": space}
    solution = fit(clip, cache, tuned, tau=0.25, **run).solution
    assert solution.position == position
    mixed = 0.75 * Prompt.from_template(clip).ctx + 0.25 * tuned.ctx
    torch.testing.assert_close(solution.ctx, mixed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", [("red car", "red bus"), NAMES])
@pytest.mark.parametrize(
    "template",
    [
        pytest.param("a photo of {}.", id="too short"),
        pytest.param("a photo of a big {}.", id="too long"),
        pytest.param("{}.", id="none"),
        pytest.param("{} a photo of a", id="behind"),
    ],
)
def test_a_template_must_hold_one_token_for_each_context_vector(clip, template, names):
    with pytest.raises(ValueError, match="template must hold 4 tokens before {}"):
        Prompt(normal(4, 16), template).class_embeddings(clip, names)


@pytest.mark.parametrize("template", ["a photo", "{} and {}", ""])
def test_a_template_must_hold_one_place_for_the_name(clip, template):
    for call in (lambda: Prompt.from_template(clip, template), lambda: Prompt(normal(4, 16), template)):
        with pytest.raises(ValueError, match="exactly one {}"):
            call()


def test_a_template_without_words_before_the_name_is_no_prompt(clip):
    with pytest.raises(ValueError, match="at least one word before {}"):
        Prompt.from_template(clip, "{} in a photo")


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"ctx": torch.full((4, 16), float("nan"))}, ValueError, "ctx must be finite, got 64"),
        ({"ctx": torch.zeros(4, 16).int()}, TypeError, "ctx must be floating point"),
        ({"ctx": torch.zeros(16)}, ValueError, r"ctx must have shape \[n, W\]"),
        ({"ctx": torch.zeros(0, 16)}, ValueError, r"ctx must have shape \[n, W\]"),
        ({"ctx": torch.zeros(3, 4, 16)}, ValueError, "classnames must be given for class-specific"),
        ({"ctx": torch.zeros(4, 16), "classnames": NAMES}, ValueError, "and for no others"),
        ({"ctx": torch.zeros(2, 4, 16), "classnames": NAMES}, ValueError, "must name the 2 classes"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(kwargs, error, match):
    with pytest.raises(error, match=match):
        Prompt(template=TEMPLATE, **kwargs)


@pytest.mark.parametrize("names", [("cat", "dog"), ("cat", "", "dog")])
def test_class_names_of_a_prompt_are_checked_when_it_is_made(names):
    with pytest.raises(ValueError, match="classnames"):
        Prompt(torch.zeros(3, 4, 16), TEMPLATE, names)


@pytest.mark.parametrize(
    ("kind", "names", "match"),
    [
        ("shared", (), "at least one name"),
        ("shared", ("cat", " "), "must be non-empty texts, got ' '"),
        ("shared", ("cat", 3), "must be non-empty texts, got 3"),
        ("shared", ("cat", "very " * 12), "must fit the text tower's 16 tokens"),
        ("class-specific", ("cat", "fire truck"), "3 classes of the solution in the same order, got 2"),
        ("class-specific", ("cat", "dog", "fire truck"), "class 1 must be 'fire truck', got 'dog'"),
        ("head", ("cat", "bird"), "among the head's 3 classes, got 'bird'"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(clip, kind, names, match):
    with pytest.raises(ValueError, match=match):
        make(clip, kind).class_embeddings(clip, names)


@pytest.mark.parametrize("kind", KINDS)
def test_another_clip_is_refused(clip, kind):
    other, solution = tiny_clip(seed=1), make(clip, kind)
    assert solution.class_embeddings(clip, NAMES).shape == (3, 8)
    for call in (solution.class_embeddings, solution.class_weights, lambda *where: encoder(where[0], solution)):
        with pytest.raises(ValueError, match="made for .tiny-0., got tiny-1"):
            call(other, NAMES)
    unknown = replace(solution, fingerprint=None)
    assert unknown.class_embeddings(other, NAMES).shape == (3, 8)
    with pytest.raises(ValueError, match="width 24"):
        unknown.class_embeddings(tiny_clip(width=24, dim=24), NAMES)


# -- tokenizers of other families --------------------------------------------------------------------------------------


SIGLIP = {"context_length": 32, "vocab_size": 200, "width": 16, "heads": 2, "layers": 2, "no_causal_mask": True}


def pieces(texts, context_length=32):
    """Sentencepiece-like: "a" and "photo" are whole, any other word is "▁" and its letters."""
    whole = {"a": 10, "photo": 11, "of": 12}
    words = [[[whole[word]] if word in whole else [7, *map(ord, word)] for word in text.split()] for text in texts]
    ids = [[*(i for word in text for i in word), 1] for text in words]
    return torch.tensor([(own + [0] * context_length)[:context_length] for own in ids])


def test_words_before_the_name_where_all_names_begin_alike():
    clip = FrozenClip(open_clip.CustomTextCLIP(8, VISION, {**SIGLIP, "pool_type": "last"}), pieces, "tiny")
    prompt = Prompt.from_template(clip, "a photo of {}")
    assert prompt.n_ctx == 3
    names = ["cat", "a cat", "of"]  # one begins with the common piece, the others do not
    torch.testing.assert_close(prompt.class_embeddings(clip, names), clip.class_embeddings(names, "a photo of {}"))


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_stand_ins_that_are_two_tokens(position):
    """CoOp's "X X X X" holds four places only where the tokenizer knows X."""
    clip = FrozenClip(open_clip.CustomTextCLIP(8, VISION, {**SIGLIP, "pool_type": "last"}), pieces, "tiny")
    prompt = Prompt.random(clip, 4, suffix="", position=position)
    words = Prompt(prompt.ctx, "a photo of a {}", position=position)
    torch.testing.assert_close(prompt.class_weights(clip, ["cat", "dog"]), words.class_weights(clip, ["cat", "dog"]))
