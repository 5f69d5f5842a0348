"""Prompt and Head: class embeddings, files that come back bit for bit, and everything that must be refused."""

import json
import os
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, VISION, normal, tiny_clip

from mergetune import FeatureCache, FrozenClip, Head, Prompt, fit, interpolate, load_solution

TEMPLATE = "a photo of a {}."


def make(clip: FrozenClip, kind: str):
    known = {"backbone": clip.name, "notes": {"origin": "test", "list": [1, 2.5, None]}}
    if kind == "shared":
        return Prompt(normal(4, 16), TEMPLATE, fingerprint=clip.text_fingerprint, **known)
    if kind == "front":
        return replace(make(clip, "shared"), position="front")
    if kind == "class-specific":
        return Prompt(normal(3, 4, 16), TEMPLATE, NAMES, fingerprint=clip.text_fingerprint, **known)
    bias = normal(3, seed=1) if kind == "head with bias" else None
    return Head(normal(3, 8), NAMES, bias, logit_scale=12.5, fingerprint=clip.image_fingerprint, **known)


KINDS = ["shared", "front", "class-specific", "head", "head with bias"]


def assert_same(a, b):
    assert type(a) is type(b)
    assert torch.equal(a.parameter, b.parameter) and a.parameter.dtype == b.parameter.dtype
    for name in ("template", "position", "classnames", "backbone", "fingerprint", "notes", "logit_scale"):
        assert getattr(a, name, None) == getattr(b, name, None), name


# -- prompts ----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="class-specific already"):
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
        assert made.position == made.per_class(NAMES).position == made.with_parameter(made.ctx).position == "middle"
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
        ("shared", ("cat", " "), "must be texts, got ' '"),
        ("shared", ("cat", 3), "must be texts, got 3"),
        ("shared", ("cat", "very " * 12), "must fit the text tower's 16 tokens"),
        ("class-specific", ("cat", "fire truck"), "3 classes in its order, got 2"),
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
    for call in (solution.class_embeddings, solution.class_weights, solution.encoder):
        with pytest.raises(ValueError, match="made for .tiny-0, .* got tiny-1"):
            call(other, NAMES)
    unknown = replace(solution, fingerprint=None)
    assert unknown.class_embeddings(other, NAMES).shape == (3, 8)
    with pytest.raises(ValueError, match="width 24"):
        unknown.class_embeddings(tiny_clip(width=24, dim=24), NAMES)


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_zero_shot_head(clip, bias):
    head = Head.zero_shot(clip, NAMES, [TEMPLATE, "the {}"], bias=bias)
    assert torch.equal(head.weight, clip.class_embeddings(NAMES, [TEMPLATE, "the {}"]))
    assert head.scale() == clip.logit_scale and (head.bias is not None) == bias
    assert (head.backbone, head.fingerprint) == (clip.name, clip.image_fingerprint)
    assert head.parameter.shape == (3, 9 if bias else 8)


@pytest.mark.parametrize("kind", ["head", "head with bias"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 0.03])
def test_rescaled_keeps_the_logits(clip, kind, scale):
    head, x = make(clip, kind), F.normalize(normal(5, 8, seed=2), dim=-1)

    def logits(head):
        return head.logit_scale * (x @ head.weight.T + (0 if head.bias is None else head.bias))

    rescaled = head.rescaled(scale)
    assert rescaled.logit_scale == scale and rescaled.notes == head.notes
    torch.testing.assert_close(logits(rescaled), logits(head))


@pytest.mark.parametrize("kind", ["head", "head with bias"])
def test_rows_of_a_head_go_by_name(clip, kind):
    head = make(clip, kind)
    assert torch.equal(head.class_weights(clip, ("dog", "cat")), head.parameter[[2, 0]])
    torch.testing.assert_close(head.class_embeddings(clip, ("dog",)), F.normalize(head.weight[2:], dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_with_parameter_is_a_copy_of_what_is_given(clip, kind):
    solution = make(clip, kind)
    values = normal(*solution.parameter.shape, seed=7).double()
    changed = solution.with_parameter(values, notes={})
    assert torch.equal(changed.parameter, values.float()) and changed.notes == {}
    values.zero_()
    assert changed.parameter.abs().sum() > 0
    assert_same(solution.with_parameter(solution.parameter), solution)


def test_two_classes_may_have_one_name(clip):
    """CLIP's names for ImageNet have "missile" and "sunglasses" twice."""
    names = ("cat", "dog", "cat")
    prompt = make(clip, "shared").class_embeddings(clip, names)
    assert torch.equal(prompt[0], prompt[2])
    head = replace(make(clip, "head"), classnames=names)
    assert torch.equal(head.class_weights(clip, names), head.parameter)
    assert torch.equal(head.class_weights(clip, ("dog", "cat")), head.parameter[[1, 0]])  # the first of the two


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weight": torch.full((3, 8), float("inf"))}, ValueError, "weight must be finite"),
        ({"weight": torch.zeros(3, 8).long()}, TypeError, "weight must be floating point"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have shape \[C, D\], got \[3\]"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \[C\] = \[3\], got \[2\]"),
        ({"bias": torch.full((3,), float("nan"))}, ValueError, "bias must be finite"),
        ({"classnames": ("a", "b")}, ValueError, "must name the 3 classes of weight, got 2"),
        ({"classnames": ("a", "b", "")}, ValueError, "must be texts"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be positive"),
    ],
)
def test_heads_that_make_no_sense_are_refused(changes, error, match):
    with pytest.raises(error, match=match):
        Head(**{"weight": torch.zeros(3, 8), "classnames": NAMES, **changes})


# -- interpolation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_interpolate(clip, kind, t):
    a = make(clip, kind)
    b = a.with_parameter(normal(*a.parameter.shape, seed=5), notes={"b": 1})
    mixed = interpolate(a, b, t)
    torch.testing.assert_close(mixed.parameter, (1 - t) * a.parameter + t * b.parameter)
    if t in (0.0, 1.0):
        assert torch.equal(mixed.parameter, (b if t else a).parameter)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_heads_of_two_scales_are_interpolated_by_their_logits(t):
    a, b = Head(normal(3, 8), NAMES, logit_scale=2.0), Head(normal(3, 8, seed=1), NAMES, logit_scale=0.5)
    mixed = interpolate(a, b, t)
    expected = (1 - t) * a.logit_scale * a.weight + t * b.logit_scale * b.weight
    torch.testing.assert_close(mixed.logit_scale * mixed.weight, expected)


def test_prompts_with_other_words_behind_the_name_have_no_line_between_them():
    with pytest.raises(ValueError, match="must end alike"):
        interpolate(Prompt(normal(4, 16), TEMPLATE), Prompt(normal(4, 16), "X X X X {}, a pet."), 0.5)


def test_prompts_with_the_name_elsewhere_have_no_line_between_them():
    with pytest.raises(ValueError, match="must have one position, got end, front"):
        interpolate(Prompt(normal(4, 16), TEMPLATE), Prompt(normal(4, 16), TEMPLATE, position="front"), 0.5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: Prompt(normal(3, 8), TEMPLATE), TypeError, "one kind, got prompt and head"),
        (lambda a: replace(a, weight=normal(3, 7)), ValueError, "one shape"),
        (lambda a: replace(a, bias=normal(3)), ValueError, "one shape"),
        (lambda a: replace(a, classnames=NAMES[::-1]), ValueError, "class 0 must be 'cat', got 'dog'"),
    ],
)
def test_what_cannot_stand_on_one_line_is_refused(clip, change, error, match):
    head = make(clip, "head")
    with pytest.raises(error, match=match):
        interpolate(change(head), head, 0.5)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_bit_for_bit(clip, tmp_path, kind):
    solution = make(clip, kind)
    solution.save(tmp_path / "new" / "folder")
    for load in (type(solution).load, load_solution):
        assert_same(load(tmp_path / "new" / "folder"), solution)
    loaded = load_solution(str(tmp_path / "new" / "folder"))
    loaded.save(tmp_path / "new" / "folder")  # onto the files that it was read from
    assert_same(load_solution(tmp_path / "new" / "folder"), solution)
    assert_same(loaded, solution)
    files = sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    assert files == ["solution.json", "solution.safetensors"]


def test_saving_writes_nothing_if_the_notes_are_not_json(clip, tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        replace(make(clip, "head"), notes={"tensor": torch.zeros(1)}).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["writing", "first rename", "second rename"])
def test_a_save_that_is_cut_off_leaves_one_whole_solution_or_none(clip, tmp_path, monkeypatch, moment):
    """New weights under the old description would be another model."""
    old, new, renames = make(clip, "shared"), Prompt(normal(4, 16, seed=9), "an icon of the {}"), []
    old.save(tmp_path)

    def fail(*_, **__):
        raise OSError("disk full")

    def rename(source, target, real=os.replace):
        renames.append(target)
        (fail if len(renames) == ("first rename", "second rename").index(moment) + 1 else real)(source, target)

    if moment == "writing":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(OSError, match="disk full"):
        new.save(tmp_path)
    try:
        found = load_solution(tmp_path)
    except ValueError:
        return  # refused is fine: the mixture is not
    assert_same(found, old)


def test_non_contiguous_and_reduced_precision_survive(tmp_path):
    ctx = normal(16, 4).half().T
    Prompt(ctx, TEMPLATE).save(tmp_path)
    assert torch.equal(Prompt.load(tmp_path).ctx, ctx)


def test_a_missing_file_is_named(clip, tmp_path):
    for load in (Prompt.load, Head.load, load_solution):
        with pytest.raises(FileNotFoundError, match="must be a folder with solution.json"):
            load(tmp_path / "missing")
    make(clip, "shared").save(tmp_path)
    (tmp_path / "solution.safetensors").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="solution.safetensors"):
        Prompt.load(tmp_path)


def test_the_wrong_kind_is_refused(clip, tmp_path):
    make(clip, "head").save(tmp_path)
    with pytest.raises(ValueError, match="must hold a prompt, got 'head'"):
        Prompt.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[]", "must have format"),
        ("{}", "must have format"),
        ({"format": "something"}, "must have format"),
        ({"version": 2}, "version must be 1, got 2: update mergetune"),
        ({"version": None}, "version must be 1"),
        ({"kind": "adapter"}, "kind must be one of prompt, head, got 'adapter'"),
    ],
)
def test_a_damaged_description_is_refused(clip, tmp_path, content, match):
    make(clip, "shared").save(tmp_path)
    file = tmp_path / "solution.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content})
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=match):
        load_solution(tmp_path)


@pytest.mark.parametrize("change", ["-template", "-classnames", "-backbone", "-notes", "classnames=5", "template=5"])
def test_a_description_that_lacks_something_is_refused(clip, tmp_path, change):
    make(clip, "shared").save(tmp_path)
    config = json.loads((tmp_path / "solution.json").read_text())
    name = change.strip("-").split("=")[0]
    config = {**config, name: 5} if "=" in change else {k: v for k, v in config.items() if k != name}
    (tmp_path / "solution.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="solution.json"):
        load_solution(tmp_path)


def test_files_from_before_the_other_positions_have_the_name_at_the_end(clip, tmp_path):
    make(clip, "shared").save(tmp_path)
    config = json.loads((tmp_path / "solution.json").read_text())
    assert config.pop("position") == "end"
    (tmp_path / "solution.json").write_text(json.dumps(config))
    assert_same(load_solution(tmp_path), make(clip, "shared"))
    for wrong in ("start", 5, ["end"]):
        (tmp_path / "solution.json").write_text(json.dumps({**config, "position": wrong}))
        with pytest.raises(ValueError, match="position must be one of"):
            load_solution(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "another"])
def test_damaged_weights_are_refused(clip, tmp_path, damage):
    make(clip, "shared").save(tmp_path)
    file = tmp_path / "solution.safetensors"
    if damage == "another":
        make(clip, "head").save(tmp_path / "head")
        (tmp_path / "head" / "solution.safetensors").replace(file)
    else:
        file.write_bytes({"truncated": file.read_bytes()[:-8], "empty": b"", "noise": bytes(range(256))}[damage])
    with pytest.raises(ValueError, match="solution.safetensors"):
        load_solution(tmp_path)


# -- tokenizers of other families -------------------------------------------------------------------------------------

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
