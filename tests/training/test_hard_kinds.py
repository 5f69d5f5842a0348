"""LoRA, MMA's adapter, deep text prompts and PromptKD's student take steps of the objective, like all kinds.

What is expected is written down anew: open_clip's own model, changed in place for each point of each path.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from edited_models import slow
from hard_kinds import BLOCKS, KINDS, TEMPLATE, Adapter, DeepPrompt, Kind, Lora, Student, clip_of
from tiny import NAMES
from torch import Tensor

from mergetune import FrozenClip, Residual, Stack, fit, path
from mergetune.clip import TokensBefore, image_tokens
from mergetune.data import TensorBatches
from mergetune.evaluation.spectra import hessian
from mergetune.solutions import space_of
from mergetune.training.objective import Anchors, Near, Objective, together

LAM, BETA, TAU, ALPHAS = 0.7, 0.9, 0.4, (0.25, 0.6)
LABELS = torch.arange(5) % 3
State = dict[str, Tensor]


def pixels(dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(LABELS), 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)


def read(clip: FrozenClip, solution: Kind, x: Tensor) -> Tensor:
    """What a kind reads of images."""
    if isinstance(solution.image_input, TokensBefore):
        return image_tokens(clip, x, solution.image_input.block)
    return x if solution.image_input == "pixels" else clip.encode_image(x).to(x)


def drawn(kind: type[Kind], seed: int) -> Kind:
    """A solution that moves the CLIP visibly."""
    return kind.drawn(clip_of(), seed=seed, **({"scale": 0.5} if kind is Adapter else {}))


# -- the objective written down anew -----------------------------------------------------------------------------------


def zero_shot_state(solution: Kind) -> State | None:
    """The zero-shot solution; of LoRA with the same A."""
    state, clip = solution.state(), clip_of()
    if isinstance(solution, Lora):
        return {name: t * 0 if name.endswith("B") else t for name, t in state.items()}
    if isinstance(solution, Adapter):
        return {name: t * 0 if ".up." in name else t for name, t in state.items()}
    if isinstance(solution, Student):
        return None
    tokens, model, seen = clip.tokenize(["a photo of a dog."]), clip.model, {}
    hooks = [
        model.transformer.resblocks[k].register_forward_pre_hook(
            lambda block, args, k=k: seen.update({f"block.{k}": args[0][0, 1:5]})
        )
        for k in range(1, BLOCKS)
    ]
    model.encode_text(tokens)
    for hook in hooks:
        hook.remove()
    return {"context": model.token_embedding.weight[tokens[0, 1:5]], **seen}


def weighted(a: State, b: State, t: float) -> State:
    return {name: (1 - t) * a[name] + t * b[name] for name in b}


def point(solution: Kind, a: State, b: State, t: float) -> State:
    """A point of the path; of LoRA from the changes of the weights, each with the identity as its A."""
    if not isinstance(solution, Lora):
        return weighted(a, b, t)
    found = {}
    for name in b:
        if name.endswith("B"):
            other = name[:-1] + "A"
            found[name] = (1 - t) * a[name] @ a[other] + t * b[name] @ b[other]
            found[other] = torch.eye(len(found[name]), dtype=torch.float64)
    return found


def surrogate(solution: Kind, state: State, w1: State) -> Tensor:
    if isinstance(solution, Lora):
        deltas = [solution.scaling * state[n] @ state[n[:-1] + "A"] for n in state if n.endswith("B")]  # w1 has none
        return sum(0.5 * delta.square().sum() for delta in deltas)
    if isinstance(solution, DeepPrompt):
        ends = [slow(clip_of(), solution, s, pixels())[1] for s in (state, w1)]
        return 0.5 * (ends[0] - ends[1]).square().sum(1).mean()
    return sum(0.5 * (state[name] - w1[name]).square().sum() for name in state)


def cross_entropy(images: Tensor, classes: Tensor) -> Tensor:
    images, classes = F.normalize(images, dim=-1), F.normalize(classes, dim=-1)
    logits = clip_of().logit_scale * images @ classes.T
    return -logits.log_softmax(1)[torch.arange(len(LABELS)), LABELS].mean()


def expected_terms(solution: Kind, state: State, anchors: list[State], space: str) -> list[Tensor]:
    """Endpoint, surrogate, and the mean over each path."""
    features = slow(clip_of(), solution, state, pixels(), raw_texts=True)
    w1 = zero_shot_state(replace(solution, values=anchors[0]))
    terms = [cross_entropy(*features), torch.zeros(()) if w1 is None else surrogate(solution, state, w1)]
    for anchor in anchors:
        points = []
        for t in ALPHAS:
            if space == "parameter":
                found = slow(clip_of(), solution, point(solution, anchor, state, t), pixels())
            else:
                theirs = slow(clip_of(), solution, anchor, pixels(), raw_texts=True)
                found = [(1 - t) * a + t * b for a, b in zip(theirs, features, strict=True)]
            points.append(cross_entropy(*found))
        terms.append(sum(points) / len(points))
    return terms


def expected_loss(solution: Kind, state: State, anchors: list[State], space: str = "parameter") -> Tensor:
    endpoint, distance, *paths = expected_terms(solution, state, anchors, space)
    return endpoint + (0 if isinstance(solution, Student) else LAM) * distance + BETA * sum(paths)


# -- the same from the library -----------------------------------------------------------------------------------------


def objective_of(solution: Kind, anchors: list[Kind]) -> Objective:
    """In float64, with paths in parameter space."""
    clip = clip_of()
    space = space_of(clip, solution, NAMES, precision=torch.float64)
    states = {name: torch.stack([a.state()[name] for a in anchors]) for name in solution.state()}
    points = solution.zero_shot_points(clip, NAMES, (TEMPLATE,))
    near = None
    if points:
        w1 = {name: tensor[None] for name, tensor in points[0].state().items()}
        if solution.surrogate_on == "classes":
            near = Near(LAM, classes=space.classes(w1)[0])
        else:
            near = Near(LAM, distance=lambda states: solution.distance(states, w1))
    betas = torch.full((len(anchors),), BETA, dtype=torch.float64)
    alphas = torch.tensor(ALPHAS, dtype=torch.float64)
    classes = space.classes(states).expand(len(anchors), -1, -1)
    return Objective(space, Anchors(classes, betas, alphas, len(ALPHAS), state=states), near)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_three_stacked_states(kind):
    """Three runs in one call, and the points of their paths with them."""
    clip, anchor = clip_of(), drawn(kind, 9)
    objective = objective_of(anchor, [anchor])
    starts = [drawn(kind, seed) for seed in (1, 2, 3)]
    states = [{name: t.clone().requires_grad_() for name, t in s.state().items()} for s in starts]
    x = read(clip, anchor, pixels())
    found = together([objective] * 3, states, [(x, LABELS, None, None)] * 3)
    for solution, state, (loss, terms) in zip(starts, states, found, strict=True):
        expected = expected_terms(solution, state, [anchor.state()], "parameter")
        tolerance = {"rtol": 1e-10, "atol": 1e-10}
        if kind is DeepPrompt:  # cached features are float32
            tolerance = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(terms, torch.stack([t.detach().double() for t in expected]), **tolerance)
        wanted = torch.autograd.grad(expected_loss(solution, state, [anchor.state()]), list(state.values()))
        for a, b in zip(torch.autograd.grad(loss, list(state.values()), retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("space", ["parameter", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_fit_takes_the_step_that_is_written_down_here(kind, space):
    """From a point between zero-shot and tuned; the first step of SGD with weight decay."""
    clip, lr, decay = clip_of(dtype=torch.float32), 0.05, 0.1
    tuned = drawn(kind, 1)
    has_zero_shot = kind is not Student
    batches = TensorBatches(read(clip, tuned, pixels(torch.float32)), LABELS, NAMES, holds=tuned.image_input)
    result = fit(
        clip, batches, tuned.with_state(tuned.state()), zero_shot=TEMPLATE, space=space, grid=ALPHAS,
        lam=LAM if has_zero_shot else 0, tau=TAU if has_zero_shot else 1, beta=BETA, lr=lr, weight_decay=decay,
        epochs=1, warmup_epochs=0, batch_size=len(LABELS), precision="float32", progress=False,
    )  # fmt: skip
    w1 = zero_shot_state(tuned)
    start = tuned.state() if w1 is None else weighted(w1, tuned.state(), TAU)
    start = {name: t.detach().clone().requires_grad_() for name, t in start.items()}
    gradients = torch.autograd.grad(expected_loss(tuned, start, [tuned.state()], space), list(start.values()))
    found = result.solution.state()
    for (name, before), gradient in zip(start.items(), gradients, strict=True):
        step = -lr * (gradient + decay * before)
        assert found[name].shape == before.shape
        torch.testing.assert_close(found[name].double() - before, step, rtol=2e-3, atol=2e-6)
        assert gradient.abs().max() > 1e-6, name
    terms = expected_terms(tuned, start, [tuned.state()], space)
    entry = result.history[0]
    measured = [entry["endpoint"], entry["surrogate"], entry["path_1"]]
    assert measured == pytest.approx([t.item() for t in terms], rel=1e-4, abs=1e-6)


def test_fit_of_loras_starts_from_the_mean_of_their_changes():
    """The mean of the factors is another LoRA."""
    clip = clip_of(dtype=torch.float32)
    tuned = [drawn(Lora, seed) for seed in (1, 2)]
    batches = TensorBatches(pixels(torch.float32), LABELS, NAMES)
    still = {"epochs": 1, "lr": 1e-30, "warmup_epochs": 0, "precision": "float32", "progress": False}
    found = fit(clip, batches, tuned, tau=TAU, **still).solution
    for place in ("text.1.q", "image.2.o"):
        mean = sum(solution.delta(solution.state(), place) for solution in tuned) / 2
        torch.testing.assert_close(found.delta(found.state(), place).double(), TAU * mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["parameter", "embedding"])
def test_paths_of_the_kinds_are_measured(kind, space):
    """Loss on the way from one solution to another; LoRAs need not be of one rank."""
    clip = clip_of(dtype=torch.float32)
    ends = [drawn(kind, seed) for seed in (1, 2)]
    if kind is Lora:
        ends[0] = Lora.drawn(clip_of(), seed=1, rank=1)
    batches = TensorBatches(read(clip, ends[0], pixels(torch.float32)), LABELS, NAMES, holds=ends[0].image_input)
    found = path(clip, *[end.with_state(end.state()) for end in ends], batches, points=3, space=space)
    states = [end.state() for end in ends]
    expected = []
    for t in (0.0, 0.5, 1.0):
        if space == "parameter":
            features = slow(clip_of(), ends[1], point(ends[1], *states, t), pixels())
        else:
            raw = [slow(clip_of(), end, end.state(), pixels(), raw_texts=True) for end in ends]
            features = [(1 - t) * a + t * b for a, b in zip(*raw, strict=True)]
        expected.append(cross_entropy(*features).item())
    assert found.loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [Adapter, DeepPrompt, Student])
def test_hessians_of_the_kinds_are_exact(kind):
    """With respect to everything that is trained, of a CLIP in float32."""
    solution = drawn(kind, 1)
    solution = solution.with_state(solution.state())
    clip = clip_of(dtype=torch.float32)
    batches = TensorBatches(read(clip_of(), solution, pixels()), LABELS, NAMES, holds=solution.image_input)
    state = {name: t.double().requires_grad_() for name, t in solution.state().items()}
    direction = torch.randn(solution.numbers, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    found = hessian(clip, solution, batches, space="parameter") @ direction.numpy()
    loss = cross_entropy(*slow(clip_of(), solution, state, pixels()))
    gradients = torch.autograd.grad(loss, list(state.values()), create_graph=True)
    along = torch.cat([gradient.flatten() for gradient in gradients]) @ direction
    expected = torch.cat([d.flatten() for d in torch.autograd.grad(along, list(state.values()))])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", [Lora, Adapter, DeepPrompt])
def test_a_class_residual_stands_on_each_kind(kind):
    """The stack reads what its base reads, and gives the logits of both."""
    clip, base = clip_of(dtype=torch.float32), drawn(kind, 1)
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    stack = Stack(base.with_state(base.state()), Residual(rows, NAMES))
    assert stack.image_input == base.image_input
    at = space_of(clip, stack, NAMES)
    x = read(clip, base, pixels(torch.float32))
    logits = at.logits({name: tensor[None] for name, tensor in stack.state().items()}, x)[0]
    images, classes = slow(clip_of(), base, base.state(), pixels())
    expected = clip.logit_scale * images @ F.normalize(classes + rows, dim=-1).T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_belongs_to_the_weights_that_it_changes(kind):
    """Of one tower or both; its class embeddings may be of another width than the CLIP's."""
    clip, solution = clip_of(dtype=torch.float32), drawn(kind, 1)
    solution = solution.with_state(solution.state())
    solution = replace(solution, **solution.origin(clip))
    classes = solution.class_embeddings(clip, NAMES)
    _, expected = slow(clip_of(), solution, {n: t.double() for n, t in solution.state().items()}, pixels())
    torch.testing.assert_close(classes.double(), expected, rtol=1e-4, atol=1e-5)
    for tower, name in {"text": "ln_final.bias", "image": "visual.ln_post.bias"}.items():
        model = deepcopy(clip.model)
        model.get_parameter(name).add_(1)
        other = FrozenClip(model, clip.tokenizer, "other")
        if kind.tower in (tower, "both"):
            with pytest.raises(ValueError, match=f"clip must be the one that the {kind.kind} was made for"):
                solution.check(other)
        else:
            solution.check(other)


# -- MMA's unit --------------------------------------------------------------------------------------------------------


class ScaledGradient(torch.autograd.Function):
    """The layer of the published block: nothing forward, a factor on the gradient backward."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * d, None


def test_the_unit_of_the_adapter_takes_the_published_steps():
    """Two steps of SGD with momentum and weight decay, one branch of the published block at its factor .001."""
    clip, scale = clip_of(), 0.001
    adapter = Adapter.drawn(clip, seed=3, scale=scale)
    generator = torch.Generator().manual_seed(6)
    x, to = torch.randn(2, 1, 4, 5, 16, generator=generator, dtype=torch.float64)
    layers = ("text.down", "shared", "text.up")
    own = {name: t[None].clone().requires_grad_() for name, t in adapter.state().items() if "image" not in name}
    theirs = {name: t[0].detach().clone().requires_grad_() for name, t in adapter.published(own).items()}
    others = {name: t[None] for name, t in adapter.state().items() if "image" in name}
    settings = {"lr": 0.0015, "momentum": 0.9, "weight_decay": 5e-4}
    optimizers = [torch.optim.SGD(list(tensors.values()), **settings) for tensors in (own, theirs)]
    norm = clip.text.blocks[1].ln_1
    for _ in range(2):
        y = ScaledGradient.apply(norm(x), scale)
        for layer in layers:
            y = F.linear(y, theirs[f"{layer}.weight"], theirs[f"{layer}.bias"])
            y = y if layer == "text.up" else y.relu()
        theirs_out = ScaledGradient.apply(scale * y, 1 / scale)
        own_out = adapter.edit(clip, own | others).beside["text", 1](x)
        torch.testing.assert_close(own_out, theirs_out, rtol=1e-10, atol=1e-12)
        for optimizer, out in zip(optimizers, (own_out, theirs_out), strict=True):
            optimizer.zero_grad()
            (1e3 * out - to).square().sum().backward()
            optimizer.step()
    for name, tensor in adapter.published(own).items():
        torch.testing.assert_close(tensor[0], theirs[name], rtol=1e-10, atol=1e-12)
        assert (tensor[0] - adapter.published(adapter.state())[name]).abs().max() > 1e-6
