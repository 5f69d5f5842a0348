"""Both towers under an edit, against open_clip's own model: changed in place and run for one setting at a time."""

from __future__ import annotations

import re
from copy import deepcopy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from edited_models import slow
from hard_kinds import BLOCKS, KINDS, TEMPLATE, Adapter, DeepPrompt, Kind, Lora, clip_of
from open_clip.model import convert_weights_to_lp
from tiny import NAMES, SIGLIP, TEXT, VISION
from torch import Tensor, nn

from mergetune import FrozenClip
from mergetune.clip import (
    Context,
    Edit,
    TokensBefore,
    image_tokens,
    prepare_classes,
    prepare_images,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
NO_MASK = {name: value for name, value in SIGLIP.items() if name in ("no_causal_mask", "pool_type", "proj_bias")}
SHARPER = {"scale": 0.5}  # MMA's factor .001 hides errors


def pixels(clip: FrozenClip, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64).to(clip.model.logit_scale.dtype)


def stack(solutions: list[Kind]) -> dict[str, Tensor]:
    return {name: torch.stack([s.state()[name] for s in solutions]) for name in solutions[0].state()}


def fast(clip: FrozenClip, solution: Kind, states: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for all settings, [M, B, D'] and [M, C, D'], from an edit."""
    edit = solution.edit(clip, states)
    images = prepare_images(clip, edit, "pixels")
    assert images is not None
    classes = prepare_classes(clip, edit, NAMES, precision=clip.dtype)
    edit = solution.edit(clip, states)  # another edit of the form
    return images(edit, x), F.normalize(classes(edit), dim=-1)


def score(images: Tensor, classes: Tensor) -> Tensor:
    """A number in which every feature counts, [...]."""
    return (images @ classes.mT).mul(3).softmax(-1)[..., 0].sum(-1)


def drawn(kind: type[Kind], clip: FrozenClip, count: int, **fields) -> list[Kind]:
    fields = {**(SHARPER if kind is Adapter else {}), **fields}
    return [kind.drawn(clip, seed=seed, **fields) for seed in range(1, count + 1)]


# -- the four kinds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [1, 3])
@pytest.mark.parametrize(("kind", "fields"), [*((kind, {}) for kind in KINDS), (Adapter, {"scale": 0.001})])
def test_features_and_gradients_of_stacked_settings(kind, fields, settings):
    clip = clip_of()
    solutions, x = drawn(kind, clip, settings, **fields), pixels(clip)
    states = {name: values.requires_grad_() for name, values in stack(solutions).items()}
    images, classes = fast(clip, solutions[0], states, x)
    expected = [slow(clip, s, {name: values[i] for name, values in states.items()}, x) for i, s in enumerate(solutions)]
    torch.testing.assert_close(images.expand(settings, -1, -1), torch.stack([e[0] for e in expected]), **EXACT)
    torch.testing.assert_close(classes.expand(settings, -1, -1), torch.stack([e[1] for e in expected]), **EXACT)
    weights = torch.arange(1.0, settings + 1, dtype=torch.float64)
    found = torch.autograd.grad((weights * score(images, classes)).sum(), list(states.values()))
    wanted = torch.autograd.grad((weights * torch.stack([score(*e) for e in expected])).sum(), list(states.values()))
    for name, a, b in zip(states, found, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        assert (b.flatten(1).abs().amax(1) > 1e-6).all(), name  # every tensor of every setting counts


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    """Hessian-vector products of three stacked settings."""
    clip = clip_of()
    solutions, x = drawn(kind, clip, 3), pixels(clip)
    states = {name: values.requires_grad_() for name, values in stack(solutions).items()}
    direction = [values.detach().flip(0) for values in states.values()]

    def products(total: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(total, list(states.values()), create_graph=True)
        along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        return torch.autograd.grad(along, list(states.values()))

    found = products(score(*fast(clip, solutions[0], states, x)).sum())
    each = [slow(clip, s, {name: v[i] for name, v in states.items()}, x) for i, s in enumerate(solutions)]
    for a, b in zip(found, products(torch.stack([score(*e) for e in each]).sum()), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_line_of_lora_is_the_line_of_the_weights_and_does_not_depend_on_the_factors():
    clip = clip_of()
    x, (a, b) = pixels(clip), drawn(Lora, clip, 2)
    points = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    ends = stack([a]), stack([b])

    def on_the_way(first: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return fast(clip, a, a.between(first, ends[1], points), x)

    path = on_the_way(ends[0])
    weights = [a.edit(clip, end).weights for end in ends]
    edit = Edit(
        weights={name: torch.lerp(w, weights[1][name], points.view(3, 1, 1)) for name, w in weights[0].items()},
        templates=(TEMPLATE,),
    )
    torch.testing.assert_close(path[0], prepare_images(clip, edit, "pixels")(edit, x), **EXACT)
    classes = prepare_classes(clip, edit, NAMES, precision=clip.dtype)(edit)
    torch.testing.assert_close(path[1], classes, **EXACT)  # of unit norm: they come from a template
    generator = torch.Generator().manual_seed(3)
    mixed = dict(ends[0])
    for name in mixed:
        if name.endswith("A"):
            g = torch.randn(2, 2, generator=generator, dtype=torch.float64) + 2 * torch.eye(2)
            other = name[:-1] + "B"
            mixed[name], mixed[other] = torch.linalg.inv(g) @ mixed[name], mixed[other] @ g
    for found, expected in zip(on_the_way(mixed), path, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("kind", [Lora, Adapter, DeepPrompt])
def test_zero_shot_points_are_the_frozen_clip(kind):
    """Also beside another setting in one call, where they have its shapes."""
    clip = clip_of()
    a, b = drawn(kind, clip, 2)
    (zero_shot,) = b.zero_shot_points(clip, NAMES, (TEMPLATE,))
    for solutions in [[zero_shot]] if kind is Lora else [[zero_shot], [a, zero_shot]]:
        images, classes = fast(clip, zero_shot, stack(solutions), pixels(clip))
        expected = F.normalize(clip.model.encode_image(pixels(clip)), dim=-1)
        torch.testing.assert_close(images[-1], expected, **EXACT)
        text = clip.model.encode_text(clip.tokenize([TEMPLATE.format(name) for name in NAMES]))
        torch.testing.assert_close(classes[-1], F.normalize(text, dim=-1), **EXACT)
        assert len(solutions) == 1 or (classes[0] - classes[1]).abs().max() > 1e-3


# -- weights of any name, models of any kind ---------------------------------------------------------------------------

RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8}


def model_of(name: str) -> FrozenClip:
    if name == "resnet":
        torch.manual_seed(0)
        model = open_clip.CLIP(
            8, RESNET, {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        )
        return FrozenClip(model.double(), open_clip.SimpleTokenizer(context_length=16), name)
    return clip_of(open_clip.CustomTextCLIP, **NO_MASK) if name == "siglip" else clip_of()


def noisy(clip: FrozenClip, names: list[str], count: int) -> dict[str, Tensor]:
    generator, known = torch.Generator().manual_seed(1), clip.model.state_dict()
    noise = {n: torch.randn(count, *known[n].shape, generator=generator, dtype=torch.float64) for n in names}
    return {n: known[n] + 0.1 * known[n].std(correction=0).clamp(min=0.1) * e.abs() for n, e in noise.items()}


def check_weights(clip: FrozenClip, weights: dict[str, Tensor], models: list[nn.Module]) -> None:
    """Each setting against a model with its weights loaded; ``models`` are copies of the CLIP's."""
    edit, x = Edit(weights=weights, templates=(TEMPLATE, "the {}")), pixels(clip)
    x = x if clip.name != "resnet" else F.interpolate(x, 32)
    tokens = [clip.tokenize([template.format(name) for name in NAMES]) for template in edit.templates]
    for i, model in enumerate(models):
        model.load_state_dict(clip.model.state_dict() | {n: w[min(i, len(w) - 1)] for n, w in weights.items()})
    if edit.touches("image"):
        found = prepare_images(clip, edit, "pixels")(edit, x)
        expected = [F.normalize(model.encode_image(x), dim=-1) for model in models]
        torch.testing.assert_close(found, torch.stack(expected), **EXACT)
    if edit.touches("text"):
        found = prepare_classes(clip, edit, NAMES, precision=clip.dtype)(edit)
        expected = [sum(F.normalize(model.encode_text(t), dim=-1) for t in tokens) for model in models]
        torch.testing.assert_close(found, F.normalize(torch.stack(expected), dim=-1), **EXACT)


def weight_names(clip: FrozenClip) -> list[str]:
    return [n for n, t in clip.model.state_dict().items() if t.is_floating_point() and not n.startswith("logit_")]


@pytest.mark.parametrize("model", ["clip", "siglip", "resnet"])
def test_a_whole_model_is_edited(model):
    """Every tensor of both towers, three settings; and of one setting beside three of the others."""
    clip = model_of(model)
    names, models = weight_names(clip), [deepcopy(clip.model) for _ in range(3)]
    weights = noisy(clip, names, 3)
    check_weights(clip, weights, models)
    check_weights(clip, weights | {n: weights[n][:1] for n in names[::2]}, models)
    check_weights(clip, {n: w[:1] for n, w in weights.items()}, models[:1])


@pytest.mark.parametrize("model", ["clip", "siglip"])
def test_each_tensor_alone_is_edited(model):
    """Those of one block stand for those of all."""
    clip = model_of(model)
    models = [deepcopy(clip.model) for _ in range(2)]
    for name in [name for name in weight_names(clip) if ".0." not in name and ".2." not in name]:
        check_weights(clip, noisy(clip, [name], 2), models)


def test_edited_towers_take_soft_prompts_in_every_place():
    """With weights that are the model's own the features are those of the packed tower."""
    clip, width = clip_of(), 16
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    weights = {name: clip.model.state_dict()[name][None]}
    generator = torch.Generator().manual_seed(4)
    for position in ("end", "middle", "front"):
        for classes in (None, NAMES):
            shape = (3, 4, width) if classes is None else (3, len(NAMES), 4, width)
            context = Context(torch.randn(shape, generator=generator, dtype=torch.float64), TEMPLATE, position, classes)
            plain, edited = Edit(context=context), Edit(context=context, weights=weights)
            expected = prepare_classes(clip, plain, NAMES, precision=clip.dtype)(plain)
            found = prepare_classes(clip, edited, NAMES, precision=clip.dtype)(edited)
            torch.testing.assert_close(found, expected.to(found), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_other_precisions(kind, dtype):
    """A tower works in its own precision, and what is trained stays in another; features are float32."""
    clip, solutions = clip_of(dtype=dtype), drawn(kind, clip_of(), 2)
    states = {name: values.float().requires_grad_() for name, values in stack(solutions).items()}
    edit = solutions[0].edit(clip, states)
    images = prepare_images(clip, edit, "pixels")(edit, pixels(clip))
    classes = F.normalize(prepare_classes(clip, edit, NAMES, precision=dtype)(edit), dim=-1)
    expected = zip(*(slow(clip_of(), s, s.state(), pixels(clip).double()) for s in solutions), strict=True)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    for found, wanted in zip((images, classes), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.expand(2, -1, -1), torch.stack(wanted).float(), **close)
    gradients = torch.autograd.grad(score(images, classes).sum(), list(states.values()))
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_towers_are_run_in_any_precision(kind):
    """A model in open_clip's mixed precision, whose layer norms work in float32 alone, is exact in float64 as well."""
    sizes = {**VISION, "layers": BLOCKS}, {**TEXT, "layers": BLOCKS}
    model, plain = open_clip.CLIP(8, *sizes, cast_dtype=torch.bfloat16), open_clip.CLIP(8, *sizes).double()
    model.load_state_dict(clip_of().model.state_dict())
    convert_weights_to_lp(model, torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    clip, exact = (FrozenClip(m, clip_of().tokenizer, "mixed") for m in (model, plain))
    solutions, x = drawn(kind, exact, 2), pixels(exact)
    for precision, close in {
        torch.float64: EXACT,
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
        torch.bfloat16: {"rtol": 0.1, "atol": 0.1},
    }.items():
        edit = solutions[0].edit(clip, stack(solutions))
        images = prepare_images(clip, edit, "pixels", precision=precision)(edit, x)
        classes = F.normalize(prepare_classes(clip, edit, NAMES, precision=precision)(edit), dim=-1)
        expected = zip(*(slow(exact, s, s.state(), x) for s in solutions), strict=True)
        for found, wanted in zip((images, classes), expected, strict=True):
            torch.testing.assert_close(found.expand(2, -1, -1).double(), torch.stack(wanted), **close)
    edit = solutions[0].edit(clip, stack(solutions))
    own = prepare_images(clip, edit, "pixels")(edit, x)
    torch.testing.assert_close(own.expand(2, -1, -1), images.expand(2, -1, -1), rtol=0.1, atol=0.1)


# -- what is read of images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(BLOCKS))
def test_tokens_before_a_block_serve_for_what_is_changed_from_there_on(block):
    clip = clip_of()
    adapter = Adapter.drawn(clip, block=block, **SHARPER)
    edit = adapter.edit(clip, stack([adapter, *adapter.zero_shot_points(clip, NAMES, (TEMPLATE,))]))
    expected = prepare_images(clip, edit, "pixels")(edit, pixels(clip))
    for earlier in range(block + 1):
        tokens = image_tokens(clip, pixels(clip), earlier)
        found = prepare_images(clip, edit, TokensBefore(earlier))(edit, tokens)
        torch.testing.assert_close(found, expected, **EXACT)
    half = prepare_images(clip, edit, TokensBefore(block))(edit, tokens.half())  # as a cache may keep them
    torch.testing.assert_close(half, expected, rtol=0.01, atol=0.01)
    for later in range(block + 1, BLOCKS):
        with pytest.raises(ValueError, match=f"block {block}.*TokensBefore"):
            prepare_images(clip, edit, TokensBefore(later))


def test_nothing_is_computed_for_each_setting_before_the_first_change():
    """And a block whose weights are the same for all settings takes them as one batch."""
    clip, batches = FrozenClip(deepcopy(clip_of().model), clip_of().tokenizer, "counted"), {}
    for k, block in enumerate(clip.model.visual.transformer.resblocks):
        block.mlp.c_fc.register_forward_pre_hook(lambda layer, args, k=k: batches.update({k: len(args[0])}))
    name = "visual.transformer.resblocks.1.ln_2.bias"
    weights = {name: clip.model.state_dict()[name].expand(3, -1)}
    edit = Edit(weights=weights, templates=(TEMPLATE,))
    found = prepare_images(clip, edit, "pixels")(edit, pixels(clip))
    assert found.shape == (3, 2, 8) and (batches[0], batches[2]) == (2, 6)
    torch.testing.assert_close(found[2], F.normalize(clip.model.encode_image(pixels(clip)), dim=-1), **EXACT)


def test_the_projection_is_edited_on_the_rows_that_enter_it():
    """ProLIP trains ``visual.proj`` alone."""
    clip = clip_of()
    visual = clip.model.visual
    weights = noisy(clip, ["visual.proj"], 3)
    edit = Edit(weights=weights, templates=(TEMPLATE,))
    rows = visual.ln_post(visual.transformer(image_tokens(clip, pixels(clip), 0)))[:, 0]
    expected = prepare_images(clip, edit, "pixels")(edit, pixels(clip))
    torch.testing.assert_close(prepare_images(clip, edit, "pre-projection")(edit, rows), expected, **EXACT)


def test_image_maps_take_features_of_unit_norm_unless_they_take_raw_ones():
    clip = clip_of()
    x = clip.model.encode_image(pixels(clip))
    shift = torch.arange(8.0, dtype=torch.float64)
    maps = (lambda x: x + shift, lambda x: 2 * x)
    expected = F.normalize(F.normalize(x, dim=-1) + shift, dim=-1)[None]
    edit = Edit(image_maps=maps, templates=(TEMPLATE,))
    inputs = {"pixels": pixels(clip), "raw feature": x, "feature": F.normalize(x, dim=-1)}
    for image_input, images in inputs.items():
        found = prepare_images(clip, edit, image_input)(edit, images)
        torch.testing.assert_close(found, expected, **EXACT)
    edit = Edit(image_maps=maps, raw_image_map=True, templates=(TEMPLATE,))
    for image_input in ("pixels", "raw feature"):
        found = prepare_images(clip, edit, image_input)(edit, inputs[image_input])
        torch.testing.assert_close(found, F.normalize(x + shift, dim=-1)[None], **EXACT)
    with pytest.raises(ValueError, match="image_input must be 'raw feature' or earlier"):
        prepare_images(clip, edit, "feature")
    with pytest.raises(ValueError, match="only the first image map of a stack may take raw features"):
        edit.under(Edit(image_maps=maps, raw_image_map=True))


def test_features_that_no_edit_changes_are_taken_as_they_are():
    clip = clip_of()
    assert prepare_images(clip, Edit(templates=(TEMPLATE,)), "feature") is None
    solution = DeepPrompt.drawn(clip)
    assert prepare_images(clip, solution.edit(clip, stack([solution])), solution.image_input) is None


# -- what is refused ---------------------------------------------------------------------------------------------------

PROJ, BIAS = "visual.proj", "ln_final.bias"
REFUSED = [
    ({"weights": {"visual.prj": (1, 16, 8)}}, "weights must name parameters of the model two-towers, got 'visual.prj'"),
    ({"weights": {PROJ: (16, 8)}}, r"weights\['visual.proj'\] must have shape \[M, 16, 8\], got \[16, 8\]"),
    ({"weights": {PROJ: (2, 16, 9)}}, r"must have shape \[M, 16, 8\], got \[2, 16, 9\]"),
    ({"weights": {PROJ: (2, 16, 8), BIAS: (3, 16)}}, "of 2 settings or of one, got 3 for 'ln_final.bias'"),
    ({"weights": {"logit_scale": (2,)}}, "weights must not hold logit_scale: .* the edit's scale"),
    ({"before": ("text", 3)}, "before must name blocks of the text tower, 0 to 2, got 3"),
    ({"beside": ("image", -1)}, "beside must name blocks of the image tower, 0 to 2, got -1"),
    ({"beside": ("visual", 0)}, "beside must name a tower, one of text, image, got 'visual'"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_the_clip_has_no_place_for_is_refused_before_any_work(given, message):
    clip = clip_of()
    if "weights" in given:
        given = {"weights": {name: torch.zeros(shape) for name, shape in given["weights"].items()}}
    else:
        given = {name: {place: pytest.fail} for name, place in given.items()}
    edit = Edit(templates=(TEMPLATE,), **given)
    with pytest.raises(ValueError, match=message):
        prepare_images(clip, edit, "pixels")
    with pytest.raises(ValueError, match=message):
        prepare_classes(clip, edit, NAMES)


@pytest.mark.parametrize(
    ("place", "hook", "message"),
    [
        (("image", 1), lambda x: x[:, :1], "[M, 2, L, 16], got [1, 1, 5, 16]"),
        (("image", 1), lambda x: x[0], "[M, 2, L, 16], got [2, 5, 16]"),
        (("image", 1), lambda x: x[..., 1:], "[M, 2, L, 16], got [1, 2, 5, 15]"),
        (("text", 1), lambda x: x[:, :, :3], "[M, 3, 9, 16], got [1, 3, 3, 16]"),  # a text's last token has its place
    ],
)
def test_hooks_that_give_other_tokens_are_refused(place, hook, message):
    clip = clip_of()
    edit = Edit(before={place: hook}, templates=(TEMPLATE,))
    with pytest.raises(ValueError, match=re.escape(f"before[{place!r}] must give tokens of shape {message}")):
        prepare_images(clip, edit, "pixels")(edit, pixels(clip))
        prepare_classes(clip, edit, NAMES, precision=clip.dtype)(edit)


def test_hooks_and_weights_of_different_numbers_of_settings_are_refused():
    clip = clip_of()
    weights = noisy(clip, ["visual.transformer.resblocks.1.ln_1.bias"], 2)
    edit = Edit(weights=weights, before={("image", 0): lambda x: x.repeat(3, 1, 1, 1)}, templates=(TEMPLATE,))
    with pytest.raises(ValueError, match="one number of settings, got hooks of 3, weights of 2"):
        prepare_images(clip, edit, "pixels")(edit, pixels(clip))


def test_image_maps_that_mix_images_are_refused():
    clip = clip_of()
    edit = Edit(image_maps=(lambda x: x[0],), templates=(TEMPLATE,))
    with pytest.raises(ValueError, match=r"image_maps\[0\] must give features of shape \[M, 2, D\], got \[2, 8\]"):
        prepare_images(clip, edit, "raw feature")(edit, torch.ones(2, 8))


def test_inputs_that_an_image_tower_does_not_have_are_refused():
    resnet, clip = model_of("resnet"), clip_of()
    edit = Edit(weights=noisy(resnet, ["visual.conv1.weight"], 2), templates=(TEMPLATE,))
    with pytest.raises(TypeError, match="ModifiedResNet, got TokensBefore"):
        prepare_images(resnet, edit, TokensBefore(0))
    with pytest.raises(ValueError, match="visual.conv1.weight.*got 'feature': take 'pixels'"):
        prepare_images(resnet, edit, "feature")
    hooked = Edit(before={("image", 0): lambda x: x}, templates=(TEMPLATE,))
    with pytest.raises(TypeError, match="before needs an image tower made of transformer blocks.*ModifiedResNet"):
        prepare_images(resnet, hooked, "pixels")
    with pytest.raises(TypeError, match="image_tokens needs an image tower made of transformer blocks"):
        image_tokens(resnet, torch.zeros(1, 3, 32, 32), 0)
    with pytest.raises(ValueError, match="block must be one of the image tower's blocks, 0 to 2, got 3"):
        image_tokens(clip, pixels(clip), BLOCKS)
    with pytest.raises(ValueError, match="image_input must be one of 'pixels', .*got 'picture'"):
        prepare_images(clip, Edit(templates=(TEMPLATE,)), "picture")


def test_the_model_stays_as_it_was():
    """Its tensors, its mode, its modules: calls with other weights touch copies of the modules alone."""
    clip = clip_of()
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    solution = Lora.drawn(clip)
    fast(clip, solution, stack([solution] * 2), pixels(clip))
    assert all(torch.equal(before[name], tensor) for name, tensor in clip.model.state_dict().items())
    assert not any(module.training for module in clip.model.modules())
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
