"""LoRA: what it computes against the published block, its line in the space of changes, its files."""

import functools
import json
import math
from copy import deepcopy
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, cache, tiny_clip
from torch import Tensor, nn

from mergetune import (
    FrozenClip,
    LoRA,
    Residual,
    Stack,
    Templates,
    classifier,
    evaluate,
    fit,
    interpolate,
    load_solution,
    merge_solutions,
    merging,
    path,
    plane,
)
from mergetune.data import TensorBatches
from mergetune.evaluation.spectra import hessian
from mergetune.solutions import space_of, zero_shot_like

PARTS = ("q", "k", "v", "out", "fc", "proj")
TEXTS = ("a photo of a {}.",)


def drawn(clip: FrozenClip, seed: int = 0, *, rank: int = 2, **options) -> LoRA:
    """A LoRA with large random factors."""
    lora = LoRA.start(clip, rank=rank, **{"parts": PARTS, **options})
    generator = torch.Generator().manual_seed(seed)
    return lora.with_state({name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in lora.state().items()})


VISION = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


@functools.cache
def quick_clip(dtype: torch.dtype = torch.float32) -> FrozenClip:
    """Two towers of different widths with QuickGELU, as OpenAI's; every parameter random."""
    torch.manual_seed(0)
    model = open_clip.CLIP(8, VISION, TEXT, quick_gelu=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.ndim == 1 else 0.05)
        model.token_embedding.weight.mul_(10)
    return FrozenClip(model.to(dtype), open_clip.SimpleTokenizer(context_length=TEXT["context_length"]), "quick")


def pixels(count: int = len(LABELS), seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def batches(**options) -> TensorBatches:
    return TensorBatches(pixels(), LABELS, NAMES, **options)


# -- the published block, written out ----------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer with W0 x + s B (A x), as in the paper."""

    def __init__(self, weight: Tensor, bias: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.a, self.b, self.scale = weight, bias, a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T + self.bias
        return y if self.a is None else y + self.scale * (x @ self.a.T) @ self.b.T


class Attention(nn.Module):
    """Attention with separate projections."""

    def __init__(self, frozen: nn.MultiheadAttention, layer) -> None:
        super().__init__()
        self.heads = frozen.num_heads
        rows = zip(frozen.in_proj_weight.chunk(3), frozen.in_proj_bias.chunk(3), strict=True)
        self.q, self.k, self.v = (layer(part, *found) for part, found in zip("qkv", rows, strict=True))
        self.out = layer("out", frozen.out_proj.weight, frozen.out_proj.bias)

    def forward(self, x: Tensor, *_, attn_mask: Tensor | None = None, **__) -> tuple[Tensor]:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        logits = logits if attn_mask is None else logits + attn_mask
        return (self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)),)


def published(clip: FrozenClip, lora: LoRA, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of open_clip's model in which the layers of the published code stand."""
    model = deepcopy(clip.model)
    for tower, owner in (("text", model), ("image", model.visual)):
        for number, block in enumerate(owner.transformer.resblocks):

            def layer(part: str, weight: Tensor, bias: Tensor, tower=tower, number=number) -> Adapted:
                place = f"{tower}.{number}.{part}"
                factors = (state.get(f"{place}.A"), state.get(f"{place}.B"))
                return Adapted(weight, bias, *factors, lora.scales.get(place, 0.0))

            block.attn = Attention(block.attn, layer)
            for part, name in (("fc", "c_fc"), ("proj", "c_proj")):
                linear = getattr(block.mlp, name)
                setattr(block.mlp, name, layer(part, linear.weight, linear.bias))
    texts = model.encode_text(clip.tokenize([TEXTS[0].format(name) for name in NAMES]))
    images = model.encode_image(x)
    return clip.logit_scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("tower", ["text", "image", "both"])
def test_forward_loss_and_gradients_are_those_of_the_published_block(dtype, tolerance, tower):
    clip = quick_clip(dtype)
    lora = drawn(clip, tower=tower)
    at = space_of(clip, lora, NAMES, precision=dtype)
    own = {name: t.to(dtype).requires_grad_() for name, t in lora.state().items()}
    theirs = {name: t.detach().clone().requires_grad_() for name, t in own.items()}
    x = pixels().to(dtype)
    read = x if tower != "text" else clip.encode_image(x).to(dtype)
    images, classes = at.features(stacked_like(own), read), at.unit(at.classes(stacked_like(own)))
    found = (at.scale * images.to(dtype) @ classes.to(dtype).mT)[0]
    expected = published(clip, lora, theirs, x)
    tolerance = tolerance if tower == "both" else 1e-5  # features of a frozen tower are float32
    check(found, expected, tolerance)
    losses = [F.cross_entropy(logits, LABELS) for logits in (found, expected)]
    gradients = [torch.autograd.grad(loss, list(s.values())) for loss, s in zip(losses, (own, theirs), strict=True)]
    for a, b in zip(*gradients, strict=True):
        check(a, b, tolerance)
        assert b.abs().max() > 1e-6


def stacked_like(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[None] for name, tensor in state.items()}


def check(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal relative to the largest value."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_is_that_of_the_published_block(optimizer):
    clip = quick_clip()
    lora = drawn(clip, parts=("q", "k", "v"))
    step = {"lr": 0.01, "weight_decay": 0.1, "epochs": 1, "warmup_epochs": 0, "batch_size": 6, "optimizer": optimizer}
    found = fit(clip, batches(), lora, lam=0.0, beta=0.0, tau=1.0, **step, progress=False)
    state = {name: t.clone().requires_grad_() for name, t in lora.state().items()}
    loss = F.cross_entropy(published(clip, lora, state, pixels()), LABELS)
    loss.backward()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    kind(list(state.values()), lr=0.01, weight_decay=0.1).step()
    assert list(found.history[0]) == ["epoch", "lr", "loss", "endpoint", "surrogate"]
    assert found.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in found.solution.state().items():
        check(tensor, state[name].detach(), 1e-5 if optimizer == "sgd" else 1e-4)


# -- the space of changes ----------------------------------------------------------------------------------------------


def refactored(lora: LoRA, seed: int = 5) -> LoRA:
    """The same changes from other factors: B G and G^-1 A."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for place in lora.scales:
        a, b = lora.factors[f"{place}.A"].double(), lora.factors[f"{place}.B"].double()
        g = torch.eye(len(a), dtype=torch.float64) + 0.5 * torch.rand(len(a), len(a), generator=generator).double()
        factors |= {f"{place}.A": torch.linalg.solve(g, a), f"{place}.B": b @ g}
    return lora.with_state(factors)


def changes(lora: LoRA, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    state = stacked_like(lora.state()) if state is None else state
    return {place: lora.delta(state, place).double() for place in lora.scales}


def test_the_line_is_straight_in_the_changes_and_leaves_their_factors_alone():
    clip = quick_clip()
    a, b = drawn(clip, 1, rank=1), drawn(clip, 2, rank=3)
    ends = changes(a), changes(b)
    for t in (0.0, 0.3, 1.0, 1.5):
        expected = {place: (1 - t) * ends[0][place][0] + t * ends[1][place][0] for place in a.scales}
        for first, second in ((a, b), (refactored(a), refactored(b))):
            found = interpolate(first, second, t)
            for place, change in changes(found).items():
                check(change[0], expected[place], 1e-5)
    points = b.between(stacked_like(a.in_form_of(b).state()), stacked_like(b.state()), torch.tensor([0.25, 0.5]))
    assert {len(t) for t in points.values()} == {2} and points["image.0.q.A"].shape == (2, 6, 24)


def test_the_distance_is_that_of_the_changes_whatever_their_factors():
    clip = quick_clip()
    a, b = drawn(clip, 1, rank=1), drawn(clip, 2, rank=3)
    far = sum(0.5 * (x - y).square().sum() for x, y in zip(changes(a).values(), changes(b).values(), strict=True))
    for first, second in ((a, b), (refactored(a), b), (a, refactored(b))):
        found = b.distance(stacked_like(first.in_form_of(b).state()), stacked_like(second.state()))
        assert found.item() == pytest.approx(far.item(), rel=1e-5)
    assert b.distance(stacked_like(b.state()), stacked_like(refactored(b).state())).item() < 1e-6 * far
    nothing = b.zero_shot_points(clip, NAMES, TEXTS)[0]
    size = sum(0.5 * change.square().sum() for change in changes(b).values())
    assert b.distance(stacked_like(b.state()), stacked_like(nothing.state())).item() == pytest.approx(size.item())


def test_predictions_and_paths_do_not_depend_on_the_factors():
    """Not in the space of changes nor in that of features."""
    clip = quick_clip()
    a, b = drawn(clip, 1, rank=1), drawn(clip, 2)
    plain = [path(clip, a, b, batches(), points=4, space=space) for space in ("parameter", "embedding")]
    other = [
        path(clip, refactored(a), refactored(b), batches(), points=4, space=space)
        for space in ("parameter", "embedding")
    ]
    for found, expected in zip(other, plain, strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    half = interpolate(a, b, 1 / 3)
    logits = classifier(clip, half).logits(NAMES, pixels())
    assert plain[0].loss[1] == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-4)
    assert path(clip, b, a, batches(), points=4, space="parameter").loss == pytest.approx(plain[0].loss[::-1], rel=1e-4)


def test_zero_shot_changes_nothing():
    clip = quick_clip()
    lora, x = drawn(clip), pixels()
    expected = classifier(clip, Templates(TEXTS)).logits(NAMES, clip.encode_image(x))
    for nothing in (LoRA.start(clip), zero_shot_like(clip, lora), interpolate(zero_shot_like(clip, lora), lora, 0.0)):
        torch.testing.assert_close(classifier(clip, nothing).logits(NAMES, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), [("task_arithmetic", {"scale": 0.7}), ("ties", {"density": 0.5})])
def test_merging_acts_on_the_changes(method, options):
    clip = quick_clip()
    experts = [drawn(clip, seed, rank=rank) for seed, rank in ((1, 1), (2, 2))]
    dense = [{place: change[0] for place, change in changes(lora).items()} for lora in experts]
    start = {place: torch.zeros_like(change) for place, change in dense[0].items()}
    expected = getattr(merging, method)(start, dense, **options)
    for given in (experts, [refactored(lora) for lora in experts]):
        found = merge_solutions(method, given, base=zero_shot_like(clip, experts[0]), options=options)
        for place, change in changes(found).items():
            check(change[0], expected[place], 1e-4)
    if method == "task_arithmetic":
        assert found.rank == 3


# -- as a solution -----------------------------------------------------------------------------------------------------


def test_it_is_saved_and_stands_under_a_residual(tmp_path):
    clip = quick_clip()
    lora = drawn(clip, 3, tower="image", last_blocks=1, parts=("q", "out"))
    assert list(lora.scales) == ["image.1.q", "image.1.out"] and lora.scales["image.1.q"] == 1 / math.sqrt(2)
    stack = Stack(lora, Residual(0.3 * torch.randn(3, 8), NAMES))
    for solution in (lora, zero_shot_like(clip, lora), stack):
        solution.save(tmp_path)
        found = load_solution(tmp_path)
        x = pixels()
        assert torch.equal(*(classifier(clip, s).logits(NAMES, x) for s in (solution, found)))
        assert json.dumps(found.settings()) == json.dumps(solution.settings())
    assert evaluate(clip, lora, batches()).images == len(LABELS)


def test_what_a_lora_depends_on():
    clip = quick_clip()
    found = {tower: LoRA.start(clip, tower=tower) for tower in ("text", "image", "both")}
    assert [lora.tower for lora in found.values()] == ["text", "both", "both"]
    assert replace(found["image"], templates=()).tower == "image"
    assert [lora.image_input for lora in found.values()] == ["feature", "pixels", "pixels"]
    other = tiny_clip()
    with pytest.raises(ValueError, match="a LoRA must change a weight of shape"):
        replace(found["image"], fingerprint=None).check(other)
    with pytest.raises(ValueError, match="a LoRA must adapt blocks 0 to 0 of the image tower, got 'image.1.q'"):
        small = {name: t[..., :16] if name.endswith("A") else t[:16] for name, t in found["image"].factors.items()}
        replace(found["image"], factors=small).check_width(other)


@pytest.mark.parametrize(
    ("factors", "scales", "message"),
    [
        ({}, {}, "a LoRA must adapt at least one weight, got none"),
        ({}, {"image.0.w": 1.0}, "a place must be TOWER.BLOCK.PART"),
        ({}, {"image.0.q": 1.0, "image.0.qkv": 1.0}, "must not adapt a weight twice, got 'image.0.q'"),
        ({}, {"image.0.q": 0.0}, "scales must be positive and finite, got 0.0 for 'image.0.q'"),
        ({"A": (2, 4)}, {"image.0.q": 1.0}, "factors must hold A and B of each place"),
        ({"A": (2, 4), "B": (4, 3)}, {"image.0.q": 1.0}, r"must have shapes \[r, n\] and \[m, r\], got \[2, 4\] and"),
    ],
)
def test_what_is_no_lora_is_refused(factors, scales, message):
    with pytest.raises(ValueError, match=message):
        LoRA({f"image.0.q.{name}": torch.ones(shape) for name, shape in factors.items()}, scales)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"last_blocks": 0}, "last_blocks must be a whole number of at least 1, got 0"),
        ({"alpha": -1.0}, "alpha must be positive and finite, got -1.0"),
        ({"tower": "audio"}, "tower must be one of text, image, both, got 'audio'"),
        ({"parts": ("o",)}, "a place must be TOWER.BLOCK.PART"),
        ({"parts": ()}, "a LoRA must adapt at least one weight, got none"),
    ],
)
def test_a_start_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA.start(quick_clip(), **options)


def test_features_are_refused_where_a_lora_needs_pixels():
    clip, features = quick_clip(), cache()
    a, b, c = (drawn(clip, seed) for seed in (1, 2, 3))
    for measure in (
        lambda: evaluate(clip, a, features),
        lambda: path(clip, a, b, features),
        lambda: plane(clip, {"a": a, "b": b, "c": c}, features),
        lambda: hessian(clip, a, features),
    ):
        with pytest.raises(ValueError, match="features must hold the image input of a lora, pixels, got feature: "):
            measure()
