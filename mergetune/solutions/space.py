"""Space: what solutions of one form compute for fixed classes, at any points; loss and accuracy there.

Shapes: M points, K solutions, B images, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mergetune.clip import FrozenClip, TextEncoder, prepare_classes, prepare_images
from mergetune.data import Batches
from mergetune.facts.function_options import SPACES
from mergetune.solutions.base import Solution, State, inputs, stack_states, weighted_sums
from mergetune.solutions.kinds import check_compatible

CHUNK = 1 << 25  # numbers of class weights that are made at once: 128 MB in float32
ROWS = 2048  # images at a time
SHARES = "image shares"  # name of a state's part: shares of the ends' image features. They are no lengths.


@dataclass(frozen=True, eq=False)
class Space:
    """A space of solutions: what each of its points, a stacked state, computes for fixed classes.

    Made by :func:`space_of` for solutions of one form, and by :func:`span` for some solutions. The objective, paths,
    planes, spectra, Fisher information, merging and accuracy are written on it.

    Attributes:
        classes: states -> class features as they are interpolated, [M, C, D] or [M, C, D + 1], not normalised.
        images: states and the inputs of B images -> unit-norm image features [M, B, D]; None where features do not
            depend on the state: then they are the inputs, [B, D].
        between: points on the line from one stacked state to another, see :meth:`Solution.between`.
        scale: factor on the logits.
        normalize: whether class features are made unit norm before the product.
        width: D.
        encoder: the packed text tower, where class features come from context vectors.
        mixture: points at mixtures of some states, see :meth:`Solution.mixture`.
    """

    classes: Callable[[State], Tensor]
    images: Callable[[State, Tensor], Tensor] | None
    between: Callable[[State, State, float | Tensor], State]
    scale: float
    normalize: bool
    width: int
    encoder: TextEncoder | None = None
    mixture: Callable[[State, Tensor], State] = weighted_sums

    def unit(self, weights: Tensor) -> Tensor:
        """Class features as they meet image features."""
        return F.normalize(weights, dim=-1) if self.normalize else weights

    def features(self, states: State, x: Tensor) -> Tensor:
        """Image features, unit norm: [M, B, D], or x itself, [B, D], where they do not depend on the state."""
        return x if self.images is None else self.images(states, x)

    def logits(self, states: State, x: Tensor) -> Tensor:
        """[M, B, C] for the inputs of B images."""
        weights = self.unit(self.classes(states))
        return self.scale * inputs(self.features(states, x.to(weights)), weights) @ weights.mT


def space_of(
    clip: FrozenClip,
    form: Solution,
    classnames: Sequence[str],
    *,
    precision: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Space:
    """The space of solutions like ``form``: its points are stacked states.

    Args:
        clip: the CLIP that they were made for.
        form: one of them.
        classnames: C names; for a solution with classes of its own those, in its order.
        precision: of the towers.
        backend: "torch": plain autograd in the text tower, differentiable any number of times.

    Raises:
        ValueError: a CLIP or class names that do not belong to the solution.
    """
    form.check(clip)
    form.check_classes(classnames)
    edit = form.edit(clip, stack_states([form.state()], clip.device))
    classes = prepare_classes(clip, edit, classnames, precision=precision, backend=backend)
    images = prepare_images(clip, edit, form.image_input, precision=precision)
    return Space(
        classes=lambda states: classes(form.edit(clip, states)),
        images=None if images is None else lambda states, x: images(form.edit(clip, states), x),
        between=form.between,
        mixture=form.mixture,
        scale=clip.logit_scale if edit.scale is None else edit.scale,
        normalize=edit.normalize,
        width=clip.embed_dim,
        encoder=classes.encoder,
    )


# -- some solutions in one space ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Span:
    """Some solutions as points of one space.

    Attributes:
        space: where they lie.
        ends: K of them, one stacked state.
    """

    space: Space
    ends: State

    def points(self, mixtures: Tensor) -> State:
        """The points at mixtures of the ends.

        Args:
            mixtures: each point's shares of the ends, which sum to 1, [M, K] float64.
        """
        return self.space.mixture(self.ends, mixtures.to(next(iter(self.ends.values())).device))

    @property
    def size(self) -> int:
        """How many numbers one point has."""
        return sum(end[0].numel() for end in self.ends.values())


def span(
    clip: FrozenClip,
    solutions: Sequence[Solution],
    classnames: Sequence[str],
    *,
    space: str = "embedding",
    precision: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Span:
    """Put solutions of one kind into one space; the last one's text, scale and classes are those of all.

    Args:
        clip: the frozen CLIP of all solutions.
        solutions: of one kind.
        classnames: C names.
        space: "embedding" interpolates class features before their normalisation, and image features where solutions
            change them; "parameter" interpolates what was trained.
        precision: of the points and of the towers.
        backend: see :func:`space_of`.
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    last = solutions[-1]
    if other := [s.kind for s in solutions if type(s) is not type(last)]:
        raise TypeError(f"solutions on one path must be of one kind, got {other[0]} and {last.kind}")
    solutions = [solution.in_form_of(last) for solution in solutions]
    for solution in solutions[:-1]:
        check_compatible(solution, last, space=space)
    if space == "parameter":
        found = space_of(clip, last, classnames, precision=precision, backend=backend)
        return Span(found, _to(precision, stack_states([solution.state() for solution in solutions], clip.device)))
    return _embedded(clip, solutions, classnames, precision)


def _embedded(
    clip: FrozenClip, solutions: Sequence[Solution], classnames: Sequence[str], precision: torch.dtype
) -> Span:
    """Class features as a state, and each end's share of the image features, where ends differ in them."""
    last = solutions[-1]
    own = [image_features(clip, solution) for solution in solutions]
    state = {"classes": torch.stack([s.class_weights(clip, classnames).to(clip.device) for s in solutions])}

    def images(states: State, x: Tensor) -> Tensor:
        ends = [x if function is None else function(x) for function in own]
        return F.normalize(torch.tensordot(states[SHARES], torch.stack(ends).to(states[SHARES]), 1), dim=-1)

    change = any(function is not None for function in own)
    if change:
        state[SHARES] = torch.eye(len(solutions), device=clip.device)

    edit = last.edit(clip, stack_states([last.state()], clip.device))
    scale = clip.logit_scale if edit.scale is None else edit.scale
    found = Space(
        lambda states: states["classes"],
        images if change else None,
        last.straight,
        scale,
        edit.normalize,
        clip.embed_dim,
    )
    return Span(found, _to(precision, state))


def image_features(clip: FrozenClip, solution: Solution) -> Callable[[Tensor], Tensor] | None:
    """A solution's image features, [B, ...] -> [B, D] unit norm; None where it takes cached features as they are."""
    edit = solution.edit(clip, stack_states([solution.state()], clip.device))
    images = prepare_images(clip, edit, solution.image_input)
    return None if images is None else lambda x: images(edit, x)[0]


def _to(precision: torch.dtype, state: State) -> State:
    return {name: tensor.to(precision) for name, tensor in state.items()}


@torch.no_grad()
def measure(at: Span, mixtures: Tensor, images: Batches) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean cross-entropy, and accuracy in percent, at mixtures of the K ends.

    The text tower takes many points at once, and images are read once for them all.

    Args:
        at: the solutions.
        mixtures: each point's shares of the ends, which sum to 1, [M, K] float64.
        images: with labels.
    """
    losses, hits, space = [], [], at.space
    device = next(iter(at.ends.values())).device
    numbers = max(at.size, len(images.classnames) * space.width)
    for chunk in mixtures.to(device).split(max(1, CHUNK // numbers)):
        states = at.points(chunk)
        weights = space.unit(space.classes(states))
        weights = weights.expand(len(chunk), -1, -1)  # they may not depend on the state
        loss, right = torch.zeros(2, len(weights), dtype=torch.float64, device=device)
        for rows, labels, _ in images.batches(ROWS):
            x, labels = space.features(states, rows.to(weights)), labels.to(device)
            for m, w in enumerate(weights):
                logits = space.scale * inputs(x if space.images is None else x[m], w) @ w.T
                loss[m] += F.cross_entropy(logits, labels, reduction="sum")
                right[m] += (logits.argmax(-1) == labels).sum()
        losses += (loss / len(images)).tolist()
        hits += (100 * (right / len(images))).tolist()
    return tuple(losses), tuple(hits)
